"""Structural penalties against plain numpy loops, with their edges."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import penalties_jax.functional as F  # noqa: N812
from tests import oracles
from tests.catalogue import CASES, INF, choices_of, every, only
from tests.oracles import as_float32, assert_close, gradient, lattice
from tests.programs import quick_jit

ORTHOGONALITY = only(lambda case: case.function is F.orthogonality, CASES)
SOFT = ORTHOGONALITY["orthogonality-soft"]

MODES, AXES = map(choices_of(F.orthogonality).get, ("mode", "axis"))


@every(ORTHOGONALITY)
def test_orthogonality(case, x64):
    x = lattice(0, 2, 3, 4)
    value, slope = quick_jit(jax.value_and_grad(case.raw))(x)
    assert value.shape == ()
    assert value.dtype == jnp.float64
    assert_close(value, case.formula(x), rtol=1e-11)
    assert_close(slope, gradient(case.formula, x), rtol=1e-6, atol=1e-8)


def test_orthogonality_second_derivative(x64):
    x, tangent = lattice(1, 3, 4), lattice(2, 3, 4)
    slope = jax.grad(partial(F.orthogonality, mode="spectral"))

    @quick_jit
    def everything(x, tangent):
        return (
            (slope(x + 1e-5 * tangent) - slope(x - 1e-5 * tangent)) / 2e-5,
            jax.jvp(slope, (x,), (tangent,))[1],
            jax.grad(lambda x: (slope(x) * tangent).sum())(x),
        )

    differences, forward, reverse = everything(x, tangent)
    assert_close(forward, differences, rtol=1e-6, atol=1e-7)
    assert_close(reverse, differences, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("mode", MODES)
def test_orthogonality_at_the_edges(mode):
    """Zero rows, huge rows, tiny rows; rows that are orthogonal already."""
    call = jax.jit(jax.value_and_grad(partial(F.orthogonality, mode=mode)))
    value, slope = call(jnp.asarray([[1.0, 2.0, 0.0], [0.0, 0.0, 0.0], [3.0, 1.0, 0.0]]))
    assert_close(value, 1.0 + (mode != "soft"), rtol=1e-5)
    assert np.isfinite(slope).all()
    value, slope = call(jnp.zeros((3, 3)))
    assert_close(value, {"soft": 0, "hard": 3, "spectral": 9}[mode])
    assert np.isfinite(slope).all()
    # The penalty of normalised rows does not see their lengths; its gradient is inverse to them.
    rows = np.array([[1.0, 2.0, 0.0], [2.0, 1.0, 1.0], [0.0, 1.0, 1.0]])
    scales = np.array([[1e30], [1e-30], [1.0]])
    value, slope = call(jnp.asarray(rows, jnp.float32))
    scaled_value, scaled_slope = call(jnp.asarray(rows * scales, jnp.float32))
    assert_close(scaled_value, value, rtol=1e-5)
    desired = np.asarray(slope, np.float64) / scales
    assert_close(np.asarray(scaled_slope) * scales, desired * scales, rtol=1e-4, atol=1e-6)
    value, slope = call(jnp.asarray([[2.0, 0.0], [0.0, 3.0]]))
    assert_close(value, 0, atol=1e-12)
    assert_close(slope, 0, atol=1e-6)


def test_orthogonality_maps_over_a_batch(x64):
    """Flattened rows make one Gram matrix; vmap makes one for each example."""
    x = lattice(3, 2, 3, 4)
    whole, mapped = quick_jit(lambda x: (F.orthogonality(x), jax.vmap(F.orthogonality)(x)))(x)
    assert_close(whole, SOFT.formula(x), rtol=1e-10)
    assert_close(mapped, [SOFT.formula(matrix) for matrix in x], rtol=1e-10)


def test_orthogonality_dtypes():
    x = lattice(4, 3, 4)
    call = quick_jit(jax.value_and_grad(F.orthogonality))
    for dtype in (jnp.float16, jnp.bfloat16, jnp.float32):
        value, slope = call(jnp.asarray(x, dtype))
        assert value.dtype == jnp.float32
        assert slope.dtype == dtype
        assert_close(value, SOFT.formula(x), rtol=1e-5)
    value = F.orthogonality(jnp.asarray([[1, 2], [3, -1]]), normalize=False)
    assert value.dtype == jnp.float32
    assert_close(value, 2.0)


def test_consistency_at_the_edges():
    """Equal inputs, zero rows, huge and tiny rows, and log-probabilities with -inf."""
    l1 = jax.value_and_grad(partial(F.consistency, metric="l1", reduction="sum"), (0, 1))
    value, slopes = l1(jnp.asarray([1.0, 2.0, 0.0]), jnp.asarray([1.0, 0.0, -0.0]))
    assert value == 2
    assert_close(np.stack(slopes), [[0, 1, 0], [0, -1, 0]])

    cosine = jax.jit(
        jax.value_and_grad(partial(F.consistency, metric="cosine", reduction="sum"), (0, 1))
    )
    zero, one = jnp.zeros((1, 3)), jnp.asarray([[1.0, 2.0, 2.0]])
    for a, b in ((zero, one), (one, zero), (zero, zero)):
        value, slopes = cosine(a, b)
        assert value == 1
        assert all(np.isfinite(slope).all() for slope in slopes)
    value, slopes = cosine(one, one)
    assert_close(value, 0, atol=1e-6)
    assert_close(np.stack(slopes), 0, atol=1e-6)
    a, b = np.array([[1.0, 2.0, 0.0]]), np.array([[2.0, 0.0, 1.0]])
    value, slopes = cosine(*(x.astype(np.float32) for x in (a, b)))
    assert_close(value, 1 - 0.4, rtol=1e-6)
    for scale_a, scale_b in ((1e30, 1e-30), (1e30, 1e30), (1e-30, 1e-30)):
        scales = np.array([scale_a, scale_b])
        scaled = cosine(*as_float32([a * scale_a, b * scale_b]).astype(np.float32))
        assert_close(scaled[0], value, rtol=1e-5)
        actual = np.stack(scaled[1]).astype(np.float64) * scales[:, None, None]
        assert_close(actual, np.stack(slopes), rtol=1e-4, atol=1e-6)

    kl = jax.value_and_grad(partial(F.consistency, metric="kl", reduction="sum"), (0, 1))
    log_p = jnp.asarray([[0.0, -INF, -INF]])
    log_q = jnp.asarray([[-INF, 0.0, -INF]])
    assert kl(log_p, log_p)[0] == 0
    value, slopes = kl(log_p, log_q)
    assert value == INF
    through_p, through_q = oracles.kl_gradient(log_p, log_q)
    back_q, back_p = oracles.kl_gradient(log_q, log_p)
    assert_close(slopes[0], (through_p + back_p) / 2)
    assert_close(slopes[1], (through_q + back_q) / 2)


def test_output_magnitude(x64):
    x = lattice(9, 3, 4, 5)
    for axis in (None, -1, 0, (0, 2)):

        def oracle(x, axis=axis):
            return ((np.sqrt((x * x).mean(axis)) - 0.7) ** 2).mean()

        call = partial(F.output_magnitude, target=0.7, axis=axis)
        value, slope = quick_jit(jax.value_and_grad(call))(x)
        assert_close(value, oracle(x), rtol=1e-12)
        assert_close(slope, gradient(oracle, x), rtol=1e-6, atol=1e-9)
    derivative = jax.grad(lambda target: F.output_magnitude(x, target=target))(0.7)
    assert_close(derivative, 2 * (0.7 - np.sqrt((x * x).mean())), rtol=1e-12)


def test_output_magnitude_masks_entries(x64):
    """The root mean square is of the included entries; groups with none do not count."""
    x, mask = lattice(10, 4, 5), np.random.default_rng(4).random((4, 5)) < 0.6
    mask[2] = False
    poisoned = np.where(mask, x, np.nan)

    def by_row(x):
        included = mask.any(-1)
        mean = (np.where(mask, x, 0) ** 2).sum(-1)[included] / mask.sum(-1)[included]
        return ((np.sqrt(mean) - 0.7) ** 2).mean()

    def altogether(x):
        return (np.sqrt((x[mask] ** 2).mean()) - 0.7) ** 2

    for axis, oracle in ((-1, by_row), (None, altogether)):
        call = quick_jit(
            jax.value_and_grad(
                lambda x, mask, axis=axis: F.output_magnitude(x, target=0.7, axis=axis, where=mask)
            )
        )
        value, slope = call(poisoned, mask)
        assert_close(value, oracle(x), rtol=1e-12)
        assert_close(slope, gradient(oracle, x), rtol=1e-6, atol=1e-9)
        assert np.all(np.asarray(slope)[~mask] == 0)
        value, slope = call(poisoned, np.zeros_like(mask))
        assert value == 0
        assert np.all(np.asarray(slope) == 0)


def test_output_magnitude_at_the_edges():
    for axis in (None, -1):
        call = jax.jit(
            jax.value_and_grad(
                lambda x, target, axis=axis: F.output_magnitude(x, target=target, axis=axis)
            )
        )
        for small in (0.0, 1e-30):
            value, slope = call(jnp.full((4, 4), small), 1.0)
            assert_close(value, 1)
            assert np.isfinite(slope).all()
        value, slope = call(jnp.full((4, 4), 1e15), 1.0)
        assert_close(value, 1e30, rtol=1e-5)
        assert_close(slope, 2e15 / 16, rtol=1e-5)
        # The square of the inputs overflows, the root mean square and its distance do not.
        value, slope = call(jnp.full((4, 4), 2.0**100), 2.0**100)
        assert value == 0
        assert np.all(np.asarray(slope) == 0)


def square(x):
    return (x**2).sum() / 2


def test_gradient_penalty(x64):
    """f = x A x / 2 + w x has the gradient A x + w."""
    random = np.random.default_rng(0)
    A, w = random.normal(size=(3, 3)), random.normal(size=3)
    A = A + A.T
    x = random.normal(size=(5, 3))

    def oracle(x, A=A, w=w, target=1.0):
        return ((np.linalg.norm(x @ A + w, axis=1) - target) ** 2).mean()

    def penalty(x, A, w, target=1.0):
        return F.gradient_penalty(lambda x: x @ A @ x / 2 + w @ x, x, target_norm=target)

    @quick_jit
    def everything(x, A, w, target):
        slopes = jax.grad(penalty, (0, 2, 3))(x, A, w, target)
        forward = jax.jvp(lambda w: penalty(x, A, w, target), (w,), (jnp.ones(3),))[1]
        return penalty(x, A, w), penalty(x, A, w, target), slopes, forward

    default, value, (slope_x, slope_w, slope_target), forward = everything(x, A, w, 0.3)
    assert_close(default, oracle(x), rtol=1e-12)
    oracle = partial(oracle, target=0.3)
    assert_close(value, oracle(x), rtol=1e-12)
    assert_close(slope_x, gradient(oracle, x), rtol=1e-6, atol=1e-9)
    assert_close(slope_w, gradient(lambda w: oracle(x, w=w), w), rtol=1e-6, atol=1e-9)
    assert_close(forward, np.asarray(slope_w).sum(), rtol=1e-9)
    desired = gradient(lambda target: oracle(x, target=target), np.array(0.3))
    assert_close(slope_target, desired, rtol=1e-7)


def test_gradient_penalty_of_examples_of_any_rank(x64):
    images = lattice(12, 4, 2, 3)

    @quick_jit
    def everything(images):
        return (
            F.gradient_penalty(square, images),
            F.gradient_penalty(lambda number: number**2, images[:, 0, 0]),
        )

    of_images, of_numbers = everything(images)
    assert_close(of_images, ((np.sqrt((images**2).sum((1, 2))) - 1) ** 2).mean(), rtol=1e-12)
    assert_close(of_numbers, ((2 * abs(images[:, 0, 0]) - 1) ** 2).mean(), rtol=1e-12)


def test_gradient_penalty_at_the_edges():
    """Where the gradient of f is 0 the penalty has a finite gradient; 1e30 does not overflow."""

    @jax.jit
    def call(x, target):
        def penalty(x, scale):
            return F.gradient_penalty(lambda x: scale * square(x), x, target_norm=target)

        return jax.value_and_grad(penalty, (0, 1))(x, 1.0)

    for x, target, desired in (
        (0.0, 1.0, 1.0),
        (0.0, 0.0, 0.0),
        (1e-30, 1.0, 1.0),
        (3e15, 0.0, 27e30),
        (2.0**100, 0.0, np.inf),
    ):
        value, slopes = call(jnp.full((2, 3), x), target)
        assert_close(value, desired, rtol=1e-5)
        assert np.isfinite(slopes[0]).all()
        assert np.isfinite(slopes[1]) or value == np.inf
        assert target or x or np.all(np.asarray(slopes[0]) == 0)
    for dtype in (jnp.bfloat16, jnp.float16):
        value, (slope, _) = call(jnp.ones((2, 4), dtype), 1.0)
        assert value.dtype == jnp.float32
        assert slope.dtype == dtype
        assert_close(value, 1.0, rtol=1e-5)


def test_gradient_penalty_sees_each_call_of_a_callable():
    """Nothing is cached by the callable's identity."""
    state = {"scale": 1.0}
    x = jnp.asarray([[3.0, 4.0]])

    def f(x):
        return state["scale"] * square(x)

    assert_close(F.gradient_penalty(f, x), 16.0)
    state["scale"] = 2.0
    assert_close(F.gradient_penalty(f, x), 81.0)


def test_interpolated_gradient_penalty():
    """Between b = 0 and a = (1, 1) the gradient of half the square is (e, e)."""
    a, b = jnp.ones((4096, 2)), jnp.zeros((4096, 2))
    x = jnp.asarray(lattice(11, 5, 3), jnp.float32)

    @jax.jit
    def everything(key):
        def penalty(f, target=0.0, a=a, b=b):
            return F.interpolated_gradient_penalty(f, a, b, key, target_norm=target)

        return {
            "square": penalty(square),
            "one": penalty(square, a=a[:1], b=b[:1]),
            "difference": penalty(lambda x: (x[0] - x[1]) ** 2),
            "line": penalty(lambda x: 3 * x[0] + 4 * x[1], target=1.0),
            "same": penalty(square, target=1.0, a=x, b=x),
            "slope": jax.grad(lambda w: penalty(lambda x: w * square(x)))(2.0),
        }

    values = everything(jax.random.key(0))
    # 2 e^2 is 2/3 on average.
    assert_close(values["square"], 2 / 3, rtol=0.05)
    assert_close(values["slope"], 2 * 2 * values["square"], rtol=1e-5)
    # One e for each example: not one for each coordinate, and not one for all.
    assert values["difference"] == 0
    assert abs(values["square"] - values["one"]) > 1e-3
    # For a line every point has the same gradient; where a = b there is one point.
    assert_close(values["line"], 16.0, rtol=1e-5)
    assert_close(values["same"], F.gradient_penalty(square, x), rtol=1e-5)
    # The key decides, and nothing else.
    others = [everything(jax.random.key(seed))["one"] for seed in (0, 1, 2)]
    assert others[0] == values["one"]
    assert len(set(map(float, others))) == 3


ERRORS = {
    "mode": (lambda x: F.orthogonality(x, mode="firm"), MODES),
    "axis": (lambda x: F.orthogonality(x, axis="columns"), AXES),
    "metric": (
        lambda x: F.consistency(x, x, metric="l3"),
        choices_of(F.consistency)["metric"],
    ),
    "shapes": (
        lambda x: F.interpolated_gradient_penalty(jnp.sum, x, x[:1], jax.random.key(0)),
        ("(2, 3)", "(1, 3)"),
    ),
}


@pytest.mark.parametrize(("call", "fragments"), ERRORS.values(), ids=ERRORS.keys())
def test_errors(call, fragments):
    with pytest.raises(ValueError, match=".*".join(map(re.escape, fragments))):
        call(jnp.ones((2, 3)))
