"""Penalties at their edges: values, first and second derivatives against their oracles."""

import math
from functools import partial

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

import penalties_jax.functional as F  # noqa: N812
from tests.catalogue import PENALTY_CASES, SEPARABLE, by_structure, every, first_of_each
from tests.oracles import as_float32, assert_close, gradient, lattice
from tests.programs import quick_jit

pytestmark = pytest.mark.cheap
PROGRAMS = first_of_each(lambda case: case.structure, SEPARABLE)


MAGNITUDES = [1e-30, 1e-12, 1e-5, 0.1, 1.0, 1e3, 1e12, 1e18, 1e30]
EDGES = np.array([0.0, -0.0, *MAGNITUDES, *(-x for x in MAGNITUDES), *lattice(1, 20)])


def values_and_slopes(call):
    """The unreduced values and the gradient of their sum, in one program."""
    return jax.jit(
        lambda x: (call(x, reduction="none"), jax.grad(lambda x: call(x, reduction="sum"))(x))
    )


@every(by_structure(SEPARABLE), "variants")
def test_value_and_gradient_at_the_edges(variants):
    """In float32, where 1e30 squared overflows and 1e-30 squared underflows."""
    x = as_float32([*EDGES, math.inf, -math.inf])

    def along(name, x, numbers):
        def values(number):
            return variants[0].raw(x, **(numbers | {name: number}), reduction="none")

        return jax.jvp(values, (jnp.float32(numbers[name]),), (jnp.float32(1),))[1]

    @jax.jit
    def everything(x, numbers):
        call = partial(variants[0].raw, **numbers)
        none = partial(call, reduction="none")
        tangents = jax.jvp(none, (x,), (jnp.ones_like(x),))[1]
        return none(x), jax.grad(call)(x), tangents, {n: along(n, x, numbers) for n in numbers}

    for case in variants:
        values, slopes, tangents, through = everything(jnp.asarray(x, jnp.float32), case.numbers)
        tiny = 1e-32  # products below about 1e-38 are flushed to zero
        assert_close(values, as_float32(case.values(x)), rtol=1e-5, atol=tiny)
        desired = as_float32(case.slopes(x))
        assert_close(slopes, desired, rtol=1e-5, atol=tiny)
        assert_close(tangents, desired, rtol=1e-5, atol=tiny)
        if desired[0] == 0:
            assert np.all(np.asarray(slopes)[:2] == 0)
        for name, slope in through.items():
            # To the size of what cancels in it; where it is infinite it only has to be a number.
            desired = as_float32(case.slopes(x, name, side=1))
            finite = np.isfinite(x) & np.isfinite(desired)
            assert_close(np.asarray(slope)[finite], desired[finite], rtol=1e-4, atol=1e-7)
            assert not np.isnan(slope).any()


@every(by_structure(SEPARABLE), "variants")
def test_second_derivatives(variants, x64):
    """Differences of the gradient in float64, and never NaN at the edges."""

    @quick_jit
    def everything(x, numbers):
        slopes = jax.grad(partial(variants[0].raw, **numbers))

        def slope_sum(x):
            return slopes(x).sum()

        return (
            (slopes(x + 1e-6) - slopes(x - 1e-6)) / 2e-6,
            jax.jvp(slopes, (x,), (jnp.ones_like(x),))[1],
            jax.grad(slope_sum)(x),
        )

    for case in variants:
        differences, forward, reverse = map(np.asarray, everything(EDGES, case.numbers))
        smooth = slice(-20, None)
        assert_close(forward[smooth], differences[smooth], rtol=1e-5, atol=1e-6)
        assert_close(reverse[smooth], differences[smooth], rtol=1e-5, atol=1e-6)
        # Far below eps the curvature of L_p alone is beyond float64: no NaN is what can be asked.
        assert not np.isnan(forward).any()
        assert not np.isnan(reverse).any()
        assert np.isfinite(forward[:2]).all()
        assert np.isfinite(reverse[:2]).all()


def test_landmarks():
    """Values that the reference states."""
    assert_close(F.lp(0.0, 0.4), 1.585e-5, rtol=1e-3)
    gamma = jnp.asarray([1.0, 0.1, 1e-3])
    assert_close(F.smooth_l0(gamma, gamma, reduction="none"), 0.5, rtol=1e-6)
    assert_close(
        F.smooth_l0(jnp.ones(3), gamma, normalize_at_one=True, reduction="none"), 1.0, rtol=1e-6
    )
    at_peak = gamma / math.sqrt(3)
    slope = jax.grad(lambda x: F.smooth_l0(x, gamma))
    assert_close(slope(at_peak), 3 * math.sqrt(3) / 8 / np.asarray(gamma), rtol=1e-5)
    assert np.all(slope(at_peak) >= slope(at_peak * 1.1))
    assert np.all(slope(at_peak) >= slope(at_peak * 0.9))
    assert_close(F.smooth_l0(jnp.asarray([0.0, 1.0, 1e6]), 1.0), 1.5, rtol=1e-6)
    assert_close(F.smooth_l0(jnp.asarray([1e-25]), 1e-25), 0.5, rtol=1e-5)
    # The elastic net and Huber at the ends of their ranges.
    x = jnp.asarray([-2.0, 0.5])
    assert F.elastic_net(x, l1_ratio=1.0) == F.l1(x)
    assert F.elastic_net(x, l1_ratio=0.0) == F.l2(x)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_l2_around_the_mean(reduction, x64):
    """The mean is of the included entries, and is differentiated through."""
    x, mask = lattice(3, 4, 6), np.random.default_rng(3).random((4, 6)) < 0.6
    weights = np.abs(lattice(4, 4, 6))

    def oracle(x, clip=np.inf, weights=1.0):
        center = x[mask].mean()
        entries = weights * np.minimum(np.abs(x - center), clip) ** 2
        return entries[mask].sum() / (mask.sum() if reduction == "mean" else 1)

    poisoned = np.where(mask, x, np.nan)
    for options in ({}, {"clip": 0.9}, {"weights": weights}):
        value, slope = jax.value_and_grad(
            partial(F.l2, center="mean", reduction=reduction, where=mask, **options)
        )(poisoned)
        assert_close(value, oracle(x, **options), rtol=1e-12)
        assert_close(slope, gradient(partial(oracle, **options), x), rtol=1e-6, atol=1e-9)
    # Adding a constant changes nothing, and a single entry is its own mean.
    shifted = F.l2(poisoned + 100.0, center="mean", reduction=reduction, where=mask)
    assert_close(shifted, oracle(x), rtol=1e-10)
    assert F.l2(jnp.asarray([3.0]), center="mean") == 0


def test_l2_clip_bounds_minus_infinity():
    log_p = jnp.asarray([0.0, -1.0, -math.inf])
    value, slope = jax.value_and_grad(partial(F.l2, clip=5.0))(log_p)
    assert_close(value, 26.0)
    assert_close(slope, [0.0, -2.0, 0.0])
    for function in (F.l1, F.l2):
        assert function(log_p) == math.inf
        value, slope = jax.value_and_grad(
            lambda x, function=function: function(x, where=jnp.isfinite(x))
        )(log_p)
        assert value == 1
        assert np.isfinite(slope).all()
        assert slope[2] == 0


def arrays_of(case, shape):
    """Its hyperparameters and weights as arrays, around what they are."""
    around = np.linspace(0.9, 1.1, math.prod(shape)).reshape(shape)
    return {name: x * around for name, x in {**case.numbers, "weights": 0.5}.items()}


@every(PROGRAMS)
def test_gradient_with_respect_to_hyperparameters(case, x64):
    """A number, or an array of one for each entry."""
    x = np.array([0.0, *lattice(5, 8), 1.0, 20.0])
    numbers = case.numbers | {"weights": 0.5}
    arrays = arrays_of(case, x.shape)

    @quick_jit
    def everything(arrays, numbers):
        def total(numbers):
            return case.raw(x, **numbers)

        both = jax.value_and_grad(total)
        return both(arrays), both(numbers), jax.vmap(total)(arrays)

    def desired(numbers):
        """The weighted values, and the derivative of each in each hyperparameter."""
        settings = dict(numbers)
        weights = settings.pop("weights")
        values = case.values(x, **settings)
        slopes = {name: weights * case.slopes(x, name, **settings) for name in settings}
        return weights * values, slopes | {"weights": values}

    of_arrays, of_numbers, swept = everything(arrays, numbers)
    for (value, slopes), (values, exact) in (
        (of_arrays, desired(arrays)),
        (of_numbers, desired(numbers)),
    ):
        assert_close(value, values.sum(), rtol=1e-12)
        for name, slope in slopes.items():
            wanted = exact[name] if slope.shape else exact[name].sum()
            assert_close(slope, wanted, rtol=1e-9, atol=1e-12)
    each = [{name: array[i] for name, array in arrays.items()} for i in range(len(x))]
    assert_close(swept, [desired(numbers)[0].sum() for numbers in each], rtol=1e-12)


@every(first_of_each(lambda case: case.structure, PENALTY_CASES))
def test_masked_hyperparameters_may_hold_anything(case):
    """As arrays, or as one number for all entries of which some hold NaN."""
    (x,), mask = case.data(6), case.mask(6)
    x, arrays = np.float32(x), arrays_of(case, case.mask_shape)
    included = {"x": case.of_entries(mask)} | dict.fromkeys(arrays, mask)
    clean = {"x": x} | {name: np.float32(array) for name, array in arrays.items()}

    @quick_jit
    def everything(values):
        def mean(numbers, **arrays):
            return case.raw(**arrays, **numbers, where=case.where(mask), reduction="mean")

        shared = {name: values[name] for name in ("x", "weights")}
        return (
            jax.value_and_grad(lambda values: mean({}, **values))(values),
            jax.grad(lambda numbers: mean(numbers, **shared))(case.numbers),
        )

    (value, slopes), shared = everything(clean)
    for poison in np.float32([math.nan, math.inf, -math.inf, 0.0]):
        hidden = {name: np.where(included[name], clean[name], poison) for name in clean}
        for values in (hidden | {"x": x}, hidden):
            (found, found_slopes), found_shared = everything(values)
            assert_close(found, value, rtol=1e-6)
            for name, slope in found_slopes.items():
                assert_close(slope, slopes[name], rtol=1e-6)
                assert np.all(np.asarray(slope)[~included[name]] == 0)
            for name, slope in found_shared.items():
                assert_close(slope, shared[name], rtol=1e-6)


@every(PROGRAMS)
def test_hyperparameters_that_do_not_fit_show_both_shapes(case):
    for name in case.numbers:
        call = partial(case.raw, **{name: np.full(4, case.numbers[name])})
        for wrapped in (call, jax.jit(call)):
            with pytest.raises(ValueError, match=rf"{name}.*\(2, 3\).*\(4,\)"):
                wrapped(jnp.ones((2, 3)))


GROUPS = np.array(
    [
        [3.0, -4.0, 12.0],
        [0.0, 0.0, 0.0],
        [0.0, -2.0, 0.0],
        [1e30, 1e30, -1e30],
        [1e-30, -1e-30, 0.0],
        [1e30, 1e-30, 0.0],
        [1e-3, 2e-3, 2e-3],
    ]
)


def test_group_lasso_at_the_edges():
    norms = np.linalg.norm(GROUPS, axis=1)
    units = GROUPS / np.where(norms == 0, 1.0, norms)[:, None]
    for x, axis in ((GROUPS, -1), (GROUPS.T, 0), (GROUPS.reshape(7, 1, 3), (1, 2))):
        values, slopes = values_and_slopes(partial(F.group_lasso, axis=axis))(
            jnp.asarray(x, jnp.float32)
        )
        assert_close(values, norms, rtol=1e-6)
        assert_close(
            np.asarray(slopes).reshape(x.shape),
            units.reshape(7, 3).T.reshape(3, 7) if axis == 0 else units.reshape(x.shape),
            rtol=1e-6,
            atol=1e-37,
        )
    assert np.all(
        np.asarray(values_and_slopes(partial(F.group_lasso, axis=-1))(jnp.zeros((2, 3)))[1]) == 0
    )
    assert F.group_lasso(jnp.asarray([math.inf, 1.0]), axis=0) == math.inf


def test_group_lasso_second_derivatives(x64):
    x, tangent = lattice(7, 4, 3), lattice(8, 4, 3)
    slopes = jax.grad(partial(F.group_lasso, axis=-1))
    norms = np.linalg.norm(x, axis=-1, keepdims=True)
    unit = x / norms
    desired = (tangent - unit * (unit * tangent).sum(-1, keepdims=True)) / norms
    assert_close(jax.jvp(slopes, (x,), (tangent,))[1], desired, rtol=1e-10, atol=1e-12)
    assert_close(
        jax.grad(lambda x: (slopes(x) * tangent).sum())(x), desired, rtol=1e-10, atol=1e-12
    )
    # A Hessian is about 1/norm: within float32's range at every edge.
    second = jax.jit(
        lambda x: jax.jvp(slopes, (x,), (jnp.arange(21, dtype=x.dtype).reshape(7, 3),))[1]
    )
    for dtype in (np.float32, np.float64):
        assert np.isfinite(second(GROUPS.astype(dtype))).all()


def test_group_lasso_masks_entries_and_counts_groups(x64):
    """Where a group has no included entry it is not counted; "none" gives 0 there."""
    x = lattice(9, 5, 4)
    mask = np.random.default_rng(2).random((5, 4)) < 0.6
    mask[1] = False
    weights = np.arange(1.0, 6.0)
    poisoned = np.where(mask, x, np.nan)

    def norms(x):
        return weights * np.sqrt((np.where(mask, x, 0.0) ** 2).sum(-1))

    call = partial(
        F.group_lasso, axis=-1, where=mask, weights=np.where(mask.any(-1), weights, np.nan)
    )
    assert_close(call(poisoned, reduction="none"), norms(x), rtol=1e-12)
    assert_close(call(poisoned), norms(x).sum(), rtol=1e-12)
    value, slope = jax.value_and_grad(partial(call, reduction="mean"))(poisoned)
    assert_close(value, norms(x).sum() / 4, rtol=1e-12)
    assert_close(slope, gradient(lambda x: norms(x).sum() / 4, x), rtol=1e-6, atol=1e-9)
    assert np.all(np.asarray(slope)[~mask] == 0)


@pytest.mark.parametrize(
    "shape", [(1000, 700), pytest.param((700, 1000), marks=pytest.mark.slow)], ids=str
)
def test_spectral_norm_of_large_matrices(shape):
    x = np.random.default_rng(0).normal(size=shape)
    u, s, v = np.linalg.svd(x, full_matrices=False)
    value, slope = jax.value_and_grad(F.spectral_norm)(np.float32(x))
    assert_close(value, s[0], rtol=1e-6)
    assert_close(slope, np.outer(u[:, 0], v[0]), rtol=1e-4, atol=1e-6)


ROTATION = np.array([[1.0, 2.0, 2.0], [2.0, 1.0, -2.0], [2.0, -2.0, 1.0]]) / 3
REPEATED = {
    "orthogonal": ROTATION,
    "two": ROTATION @ np.diag([2.0, 2.0, 1.0]),
    "with zeros": ROTATION @ np.diag([2.0, 0.0, 0.0]),
    "identity": np.eye(3),
    "ones": np.ones((3, 3)),
    "wide": np.eye(2, 3),
    "row": np.array([[3.0, 4.0]]),
    "number": np.array([[-3.0]]),
}


@every(REPEATED, "x")
def test_spectral_norm_has_a_subgradient_at_repeated_values(x):
    """Of x, and with singular values that add up to 1; and finite second derivatives."""

    @quick_jit
    def everything(x):
        slopes = jax.grad(F.spectral_norm)
        return F.spectral_norm(x), slopes(x), jax.jvp(slopes, (x,), (jnp.ones_like(x),))[1]

    for scaled in map(np.float32, (x, 1e30 * x, 1e-30 * x)):
        value, slope, second = everything(scaled)
        exact = np.linalg.norm(np.float64(scaled), 2)
        assert_close(value, exact, rtol=1e-6)
        assert_close((np.float64(slope) * scaled).sum(), exact, rtol=1e-6)
        assert_close(np.linalg.norm(np.float64(slope), "nuc"), 1, rtol=1e-6)
        assert np.isfinite(second).all()


def test_second_derivatives_of_the_spectral_norm(x64):
    x, direction = np.random.default_rng(0).normal(size=(2, 4, 3))
    along = jax.jvp(jax.grad(F.spectral_norm), (x,), (direction,))[1]

    def slope_along(x):
        u, _, v = np.linalg.svd(x)
        return u[:, 0] @ direction @ v[0]

    assert_close(along, gradient(slope_along, x), rtol=1e-9)


def test_spectral_norm_at_zero():
    value, slope = jax.value_and_grad(F.spectral_norm)(jnp.zeros((2, 3, 4)))
    assert value == 0
    assert np.all(np.asarray(slope) == 0)


@pytest.mark.parametrize("shape", [(0, 3), (2, 3, 0), (0, 2, 3)], ids=str)
def test_spectral_norm_of_nothing(shape):
    value, slope = jax.value_and_grad(F.spectral_norm)(jnp.zeros(shape))
    assert value == 0
    assert slope.shape == shape


ERRORS = {
    "matrices": (lambda x: F.spectral_norm(x[0]), r"(?=.*two axes)(?=.*\(3,\))(?=.*mask=)"),
    "center": (lambda x: F.l2(x, center="median"), "(?=.*median)(?=.*mean)"),
    "axis": (lambda x: F.group_lasso(x, axis=2), r"(?=.*axis)(?=.*2)"),
    "group weights": (
        lambda x: F.group_lasso(x, axis=-1, weights=np.ones(3)),
        r"(?=.*weights)(?=.*\(3,\))(?=.*\(2,\))",
    ),
}


@pytest.mark.parametrize(("call", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_errors(call, message):
    for wrapped in (call, jax.jit(call)):
        with pytest.raises(ValueError, match="(?s)" + message):
            wrapped(jnp.ones((2, 3)))


@every(SEPARABLE)
def test_no_array_is_written_before_it_is_summed(case):
    """As a select or a clamp would be on a CPU: XLA fuses arithmetic alone with its sums."""
    x = jax.ShapeDtypeStruct((1024, 1024), jnp.float32)
    numbers = {name: jnp.float32(number) for name, number in case.numbers.items()}

    def penalty(x, numbers):
        return case.call(x, **numbers)

    for function in (penalty, jax.value_and_grad(penalty)):
        program = jax.jit(function).lower(x, numbers).compile()
        assert program.memory_analysis().temp_size_in_bytes < 0.01 * 4 * x.size


FLOATS = st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False)


@every(PROGRAMS)
def test_properties(case):
    """Nonnegative, bounded slopes of the right sign, and even around the centre."""
    center = case.settings.get("center", 0.0)
    calls = values_and_slopes(case.raw)
    bound = case.values(np.inf)

    @hypothesis.settings(deadline=None, max_examples=25, derandomize=True, database=None)
    @hypothesis.given(st.lists(FLOATS, min_size=6, max_size=6))
    def holds(entries):
        offset = np.asarray(entries, np.float32)
        values, slopes = calls(np.float32(center) + offset)
        mirrored, mirrored_slopes = calls(np.float32(center) - offset)
        assert np.all(values >= 0)
        assert np.all(np.float64(values) <= bound * (1 + 1e-6))
        assert not np.isnan(slopes).any()
        assert np.all(np.asarray(slopes) * np.sign(np.float32(center) + offset - center) >= 0)
        if center == 0:
            assert_close(mirrored, values, rtol=1e-6)
            assert_close(mirrored_slopes, -np.asarray(slopes), rtol=1e-6)

    holds()
