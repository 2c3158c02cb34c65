"""What every function shares: reduction, masks, dtypes, transformations, errors."""

import inspect
import pickle
from functools import partial

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from scipy import special

import penalties_jax.functional as F  # noqa: N812
from tests.functional.cases import CASES, FUNCTIONS, PENALTIES, SHAPE, quick_jit
from tests.oracles import assert_close, gradient, lattice

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
every_function = pytest.mark.parametrize("case", FUNCTIONS.values(), ids=FUNCTIONS.keys())
every_penalty = pytest.mark.parametrize("case", PENALTIES.values(), ids=PENALTIES.keys())
properties = hypothesis.settings(deadline=None, max_examples=10, derandomize=True, database=None)


def excluded(case, mask):
    """Where the inputs are excluded by a mask of the entries."""
    return ~np.broadcast_to(mask.reshape(mask.shape + (1,) * (3 - mask.ndim)), SHAPE)


def poisoned(case, inputs, mask):
    """What `case.function` takes, with NaN, inf and -inf in turn wherever it is excluded."""
    poison = np.resize((np.nan, np.inf, -np.inf), SHAPE)
    return tuple(np.where(excluded(case, mask), poison, case.prepare(x)) for x in inputs)


def through(case, slope, x):
    """The gradient in what `prepare` took, from that in what it gave: the chain rule."""
    if case.prepare is not jax.nn.log_softmax:
        return slope
    return slope - special.softmax(x, axis=-1) * slope.sum(-1, keepdims=True)


def assert_is_gradient(case, slopes, inputs, where):
    """The gradient of the mean, against differences of the oracle's."""
    for position, (slope, x) in enumerate(zip(slopes, inputs, strict=True)):

        def total(x, position=position):
            moved = (*inputs[:position], x, *inputs[position + 1 :])
            return case.reduced(*moved, reduction="mean", where=where)

        assert_close(slope, gradient(total, x), rtol=1e-6, atol=1e-9)


@every_case
def test_value_and_gradient_under_a_mask(case, x64):
    """In float64, with NaN and infinities wherever the mask excludes."""
    inputs, mask = case.data(), case.mask()

    @quick_jit
    def everything(inputs):
        call = partial(case.function, where=case.where(mask))
        mean = jax.value_and_grad(partial(call, reduction="mean"), range(case.inputs))
        return call(*inputs, reduction="none"), mean(*inputs)

    entries, (mean, slopes) = everything(poisoned(case, inputs, mask))
    slopes = tuple(map(np.asarray, slopes))
    assert entries.dtype == mean.dtype == slopes[0].dtype == np.float64
    close = {"rtol": 1e-12, "atol": 1e-14}
    assert_close(entries, case.reduced(*inputs, reduction="none", where=mask), **close)
    assert_close(mean, case.reduced(*inputs, reduction="mean", where=mask), **close)
    assert all(np.all(slope[excluded(case, mask)] == 0) for slope in slopes)
    chained = (through(case, slope, x) for slope, x in zip(slopes, inputs, strict=True))
    assert_is_gradient(case, chained, inputs, mask)


@every_function
def test_nothing_included_is_exactly_zero(case):
    nowhere = np.zeros(case.mask_shape, bool)
    arguments = tuple(x.astype(np.float32) for x in poisoned(case, case.data(), nowhere))

    @quick_jit
    def everything(*arguments):
        call = partial(case.function, where=case.where(nowhere))
        return (
            call(*arguments, reduction="none"),
            call(*arguments, reduction="sum"),
            jax.value_and_grad(partial(call, reduction="mean"), range(case.inputs))(*arguments),
        )

    for result in jax.tree.leaves(everything(*arguments)):
        assert np.all(np.asarray(result) == 0)


@every_function
def test_no_entries_at_all_is_zero(case):
    inputs = tuple(jnp.zeros((0, *SHAPE[1:])) for _ in range(case.inputs))

    @quick_jit
    def everything(*inputs):
        return (
            case.function(*inputs, reduction="none"),
            case.function(*inputs, reduction="sum"),
            jax.value_and_grad(lambda *x: case.function(*x, reduction="mean"))(*inputs),
        )

    entries, total, (mean, slope) = everything(*inputs)
    assert total == mean == 0
    assert entries.size == 0
    assert slope.shape == inputs[0].shape


@pytest.mark.parametrize("name", ["l2-mean", "group_lasso", "kl", "k3", "output_magnitude"])
def test_masks_of_broadcast_shapes(name):
    case = FUNCTIONS[name]
    call = quick_jit(lambda *x, where: case.call(*x, reduction="mean", where=where))
    for shape in ((), (1,), (SHAPE[len(case.mask_shape) - 1],), (8,) + (1,) * len(SHAPE[1:])):
        mask = np.random.default_rng(3).random(shape[-len(case.mask_shape) :]) < 0.7
        full = np.broadcast_to(mask, case.mask_shape)
        actual = call(*case.data(), where=case.where(mask) if mask.shape else mask)
        desired = case.reduced(*case.data(), reduction="mean", where=full)
        assert_close(actual, desired, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mask", [True, False])
def test_a_python_bool_is_a_mask(mask):
    assert F.l1(jnp.ones(3), where=mask) == 3.0 * mask


@every_function
def test_half_precision_is_float32_inside(case):
    """The value of half-precision input is that of the same numbers in float32."""
    calls = quick_jit(
        lambda *x: (
            case.function(*x, reduction="none"),
            jax.value_and_grad(lambda *x: case.function(*x, reduction="mean"))(*x),
        )
    )
    prepared = tuple(case.prepare(x.astype(np.float32)) for x in case.data())
    mean = calls(*prepared)[1][0]
    assert_close(mean, case.reduced(*case.data(), reduction="mean"), atol=1e-6)
    for dtype in (jnp.float16, jnp.bfloat16):
        half = tuple(x.astype(dtype) for x in prepared)
        entries, (mean, slope) = calls(*half)
        assert entries.dtype == mean.dtype == jnp.float32
        assert slope.dtype == dtype
        exact_entries, (exact_mean, exact_slope) = calls(*(x.astype(np.float32) for x in half))
        assert_close(entries, exact_entries, rtol=1e-6, atol=1e-7)
        assert_close(mean, exact_mean, rtol=1e-6, atol=1e-7)
        assert_close(slope, exact_slope, rtol=float(jnp.finfo(dtype).eps), atol=1e-7)


@every_function
@pytest.mark.parametrize("dtype", ["int8", "int64"])
def test_integers_become_float32(case, dtype):
    """Log-probabilities too, where they happen to be integers: 0 is the logarithm of 1."""
    values = np.random.default_rng(0).integers(-3, 4, size=(case.inputs, *SHAPE))
    if case.prepare is jax.nn.log_softmax:
        values[:] = 0
    with jax.enable_x64(dtype == "int64"):
        result = case.function(*(jnp.asarray(x, dtype) for x in values), reduction="mean")
        assert result.dtype == jnp.float32
    exact = case.function(*values.astype(np.float32), reduction="mean")
    assert_close(result, exact, rtol=1e-6)


def test_small_integers_do_not_wrap():
    assert F.l1(jnp.asarray([-128], jnp.int8)) == 128
    assert F.l2(jnp.asarray([3], jnp.uint8), center=5) == 4
    assert F.l2(jnp.asarray([200], jnp.uint8)) == 40_000
    assert F.l1(jnp.asarray([True, False])) == 1


def test_half_precision_accumulates_in_float32():
    for dtype in (jnp.bfloat16, jnp.float16):
        x = jnp.ones((300, 400), dtype)
        assert F.l1(x) == 120_000
        assert F.l1(x, reduction="mean") == 1
        assert F.l1(x, weights=jnp.asarray(0.5, dtype)) == 60_000


@every_penalty
def test_weights(case, x64):
    (x,), mask, weights = case.data(), case.mask(), lattice(9, *case.mask_shape)
    entries = case.reduced(x, reduction="none", where=mask)

    @quick_jit
    def everything(weights):
        def reduced(reduction):
            return lambda weights: case.call(
                x, weights=weights, reduction=reduction, where=case.where(mask)
            )

        return (
            reduced("none")(weights),
            jax.value_and_grad(reduced("sum"))(weights),
            jax.value_and_grad(reduced("mean"))(weights),
        )

    for used in (weights, np.where(mask, weights, np.nan)):
        none, (total, slope), (mean, mean_slope) = everything(used)
        assert_close(none, weights * entries, rtol=1e-12)
        assert_close(total, (weights * entries).sum(), rtol=1e-11)
        assert_close(slope, entries, rtol=1e-12)
        # The mean divides by the count, not by the weights.
        assert_close(mean, (weights * entries).sum() / mask.sum(), rtol=1e-11)
        assert_close(mean_slope, entries / mask.sum(), rtol=1e-12)


@pytest.mark.parametrize("name", ["l1", "group_lasso"])
def test_weights_of_broadcast_shapes(name):
    case = PENALTIES[name]
    weights, (x,) = np.abs(lattice(9, *case.mask_shape)), case.data()
    entries = case.reduced(x, reduction="none")
    for shaped in (weights[:1], weights[:, :1], weights[0], weights.flat[0]):
        assert_close(case.call(x, weights=shaped), (shaped * entries).sum(), atol=1e-5)
    slope = jax.grad(lambda weight: case.call(x, weights=weight, reduction="mean"))(1.0)
    assert_close(slope, entries.mean())


@every_function
def test_composes_with_transformations(case, x64):
    """Jit, vmap, scan, remat, jvp and second derivatives, in one compiled program."""

    def total(*inputs):
        return case.call(*inputs, reduction="mean")

    inputs, tangent = case.data(), lattice(7, *SHAPE)
    pair = tuple(np.stack([x, x + 0.0625]) for x in inputs)
    value_and_slopes = quick_jit(jax.value_and_grad(total, range(case.inputs)))

    @quick_jit
    def everything(inputs, pair):
        def along(x):
            return total(x, *inputs[1:])

        def scanned(pair):
            def step(carry, element):
                return carry + jax.checkpoint(total)(*element), None

            return jax.lax.scan(step, 0.0, pair)[0]

        return (
            jax.value_and_grad(scanned)(pair),
            jax.vmap(jax.value_and_grad(total))(*pair),
            None if case.once else twice(along),
        )

    def twice(along):
        return (
            jax.jvp(jax.value_and_grad(along), (inputs[0],), (tangent,))[1],
            jax.grad(lambda x: (jax.grad(along)(x) * tangent).sum())(inputs[0]),
        )

    scanned, mapped, second = everything(inputs, pair)
    values, slopes = zip(
        *(value_and_slopes(*(x[index] for x in pair)) for index in range(2)), strict=True
    )
    assert_close(values[0], case.reduced(*inputs, reduction="mean"), rtol=1e-12, atol=1e-14)
    assert_is_gradient(case, slopes[0], inputs, None)
    slopes = [slope for slope, *_ in slopes]
    tight = {"rtol": 1e-9, "atol": 1e-12}
    assert_close(scanned[0], sum(values), **tight)
    assert_close(scanned[1][0], slopes, **tight)
    assert_close(mapped[0], values, **tight)
    assert_close(mapped[1], slopes, **tight)
    if case.once:
        with pytest.raises(ValueError, match="reverse-mode"):
            jax.grad(lambda x: jax.grad(total)(x, *inputs[1:]).sum())(inputs[0])
        return
    (forward, forward_over_reverse), reverse_over_reverse = second
    assert_close(forward, (slopes[0] * tangent).sum(), **tight)
    ahead, behind = (
        value_and_slopes(inputs[0] + distance * tangent, *inputs[1:])[1][0]
        for distance in (1e-5, -1e-5)
    )
    # L_p bends hardest, at the smallest values: five digits of its differences are true.
    close = {"rtol": 1e-5, "atol": 1e-8}
    assert_close(forward_over_reverse, (ahead - behind) / 2e-5, **close)
    assert_close(reverse_over_reverse, (ahead - behind) / 2e-5, **close)


@every_function
def test_masking_is_dropping(case):
    """Property: an excluded leading row may as well not be there; and order does not matter."""
    inputs = tuple(x.astype(np.float32) for x in case.data(5))

    @quick_jit
    def masked(keep, order):
        column = keep[:, None, None]
        mask = jnp.broadcast_to(
            column if len(case.mask_shape) == 3 else keep[:, None], case.mask_shape
        )
        arrays = tuple(jnp.where(column, case.prepare(x), jnp.nan)[order] for x in inputs)
        where = case.where(mask[order])
        return (
            case.function(*arrays, reduction="sum", where=where),
            case.function(*arrays, reduction="mean", where=where),
        )

    @properties
    @hypothesis.given(st.lists(st.booleans(), min_size=8, max_size=8), st.permutations(range(8)))
    def holds(keep, order):
        keep = np.array(keep)
        rows = np.zeros(case.mask_shape, bool)
        rows[keep] = True
        sum_, mean = masked(keep, np.array(order))
        data = tuple(x.astype(np.float64) for x in inputs)
        for actual, reduction in ((sum_, "sum"), (mean, "mean")):
            dropped = case.reduced(*data, reduction=reduction, where=rows)
            assert_close(actual, dropped, rtol=1e-5, atol=1e-6)

    holds()


@every_case
def test_an_unknown_reduction_lists_the_valid_ones(case):
    with pytest.raises(ValueError, match=r"(?s)(?=.*avg)(?=.*sum)(?=.*mean)(?=.*none)"):
        case.call(*case.data(), reduction="avg")


@every_case
@pytest.mark.parametrize("shape", [(2,), (7, 3, 5), (4, 8, 3, 5)], ids=str)
def test_a_mask_that_does_not_fit_shows_both_shapes(case, shape):
    with pytest.raises(ValueError, match=r"where") as raised:
        case.call(*case.data(), where=np.ones(shape, bool))
    assert str(shape) in str(raised.value)
    assert str(SHAPE) in str(raised.value) or str(SHAPE[:-1]) in str(raised.value)
    with pytest.raises(ValueError, match=r"where"):
        jax.jit(lambda *x: case.call(*x, where=jnp.ones(shape, bool)))(*case.data())


@every_penalty
@pytest.mark.parametrize("shape", [(2,), (4, 8, 3, 5)], ids=str)
def test_weights_that_do_not_fit_show_both_shapes(case, shape):
    with pytest.raises(ValueError, match=r"weights") as raised:
        case.call(*case.data(), weights=np.ones(shape))
    assert str(shape) in str(raised.value)
    assert str(case.mask_shape) in str(raised.value)


@pytest.mark.parametrize("name", [n for n, case in CASES.items() if case.inputs == 2])
def test_inputs_that_disagree_show_both_shapes(name):
    with pytest.raises(ValueError, match=r"\(2, 5\)") as raised:
        CASES[name].call(jnp.zeros((2, 5)), jnp.zeros((2, 4)))
    assert "(2, 4)" in str(raised.value)
    # Shapes that would broadcast do not agree either.
    with pytest.raises(ValueError, match=r"\(1, 5\)"):
        CASES[name].call(jnp.zeros((2, 5)), jnp.zeros((1, 5)))


PENALTY = "*weights=1.0 *reduction='sum' *where=None *axis_name=None"
DIVERGENCE = "*reduction='mean' *where=None *axis_name=None"
SIGNATURES = {
    F.l1: "x " + PENALTY,
    F.l2: "x *center=None *clip=None " + PENALTY,
    F.elastic_net: "x *l1_ratio=0.5 " + PENALTY,
    F.lp: "x p *eps=1e-12 " + PENALTY,
    F.smooth_l0: "x gamma *normalize_at_one=False " + PENALTY,
    F.huber: "x delta=1.0 " + PENALTY,
    F.group_lasso: "x *axis " + PENALTY,
    F.kl_divergence: "log_p log_q *direction='forward' *axis=-1 " + DIVERGENCE,
    F.js_divergence: "log_p log_q *mixture=0.5 *axis=-1 " + DIVERGENCE,
    F.entropy: "log_p *temperature=1.0 *normalize=False *axis=-1 " + DIVERGENCE,
    F.kl_estimate: "log_p log_q *estimator='k3' " + DIVERGENCE,
    F.consistency: "a b *metric='mse' " + DIVERGENCE,
    F.output_magnitude: "x *target=1.0 *axis=None " + DIVERGENCE,
    F.orthogonality: "x *mode='soft' *normalize=True *axis='rows'",
    F.gradient_penalty: "f x *target_norm=1.0",
    F.interpolated_gradient_penalty: "f a b key *target_norm=1.0",
    F.prox_l1: "v t",
    F.prox_l2: "v t *center=0.0",
    F.prox_elastic_net: "v t *l1_ratio=0.5",
    F.prox_huber: "v t *delta=1.0",
    F.prox_group_lasso: "v t *axis",
}


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda function: function.__name__)
def test_signatures(function):
    def text(parameter):
        default = "" if parameter.default is parameter.empty else f"={parameter.default!r}"
        return "*" * (parameter.kind is parameter.KEYWORD_ONLY) + parameter.name + default

    assert inspect.isfunction(function)
    assert pickle.loads(pickle.dumps(function)) is function
    assert function.__doc__
    found = set(map(text, inspect.signature(function).parameters.values()))
    assert found == set(SIGNATURES[function].split())


@pytest.mark.parametrize(
    "call",
    [
        lambda x, h: F.l1(x, weights=h),
        lambda x, h: F.l2(x, center=h, clip=h),
        lambda x, h: F.elastic_net(x, l1_ratio=h),
        lambda x, h: F.lp(x, h, eps=h),
        lambda x, h: F.smooth_l0(x, h),
        lambda x, h: F.huber(x, h),
        lambda x, h: F.js_divergence(x, x, mixture=h),
        lambda x, h: F.entropy(x, temperature=h),
        lambda x, h: F.output_magnitude(x, target=h),
        lambda x, h: F.prox_elastic_net(x, h, l1_ratio=h),
        lambda x, h: F.prox_huber(x, h, delta=h),
    ],
)
def test_hyperparameters_are_traced(call, caplog):
    """A new number compiles nothing new, also when the function is called outside jit."""
    x = jnp.linspace(-1.0, 1.0, 6)
    call(x, 0.5)
    with jax.log_compiles(), caplog.at_level("WARNING"):
        call(x, 0.25)
    assert not caplog.records
