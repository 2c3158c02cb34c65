"""Divergences: exact values and declared gradients at every edge, and accuracy from logits."""

import math
from functools import partial

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from scipy import special

import penalties_jax.functional as F  # noqa: N812
from tests import oracles
from tests.catalogue import (
    DIVERGENCE_CASES,
    EDGE_ROWS,
    INF,
    by_structure,
    choices_of,
    every,
    first_of_each,
    only,
)
from tests.oracles import assert_close, gradient, lattice
from tests.programs import jit_once, operations, quick_jit

DIRECTIONS = choices_of(F.kl_divergence)["direction"]
properties = hypothesis.settings(deadline=None, max_examples=30, derandomize=True, database=None)

LOG_P, LOG_Q = EDGE_ROWS[:, 0], EDGE_ROWS[:, 1]
FROM_LOG_PROBABILITIES = only(lambda case: not case.streamed, DIVERGENCE_CASES)
STRUCTURES = first_of_each(lambda case: case.structure, FROM_LOG_PROBABILITIES)
FUNCTIONS = first_of_each(lambda case: case.function, FROM_LOG_PROBABILITIES)


def directed(direction, forward, log_p, log_q):
    """From a function of (log_p, log_q) for KL(P||Q), the one for another direction."""
    if direction == "forward":
        return forward(log_p, log_q)
    if direction == "reverse":
        return forward(log_q, log_p)
    return (forward(log_p, log_q) + forward(log_q, log_p)) / 2


def exact_kl_gradients(direction):
    through_p, through_q = oracles.kl_gradient(LOG_P, LOG_Q)
    back_q, back_p = oracles.kl_gradient(LOG_Q, LOG_P)
    return {
        "forward": (through_p, through_q),
        "reverse": (back_p, back_q),
        "symmetric": ((through_p + back_p) / 2, (through_q + back_q) / 2),
    }[direction]


def exact_js_gradients(mixture):
    rows = [
        oracles.exact_js_parts(log_p, log_q, mixture)[1:]
        for log_p, log_q in zip(LOG_P, LOG_Q, strict=True)
    ]
    return tuple(map(np.array, zip(*rows, strict=True)))


def single(*arrays):
    return tuple(jnp.asarray(x, jnp.float32) for x in arrays)


@every(by_structure(FROM_LOG_PROBABILITIES), "variants")
def test_at_the_edges(variants):
    """Values, and the gradients that are declared through each input."""
    rows = (LOG_P, LOG_Q)[: variants[0].inputs]
    inputs = single(*rows)

    @jax.jit
    def everything(numbers):
        def total(*inputs):
            return variants[0].raw(*inputs, **numbers, reduction="sum")

        slopes = jax.grad(total, range(len(inputs)))
        along = tuple(jnp.full_like(x, 1 / (1 + i)) for i, x in enumerate(inputs))
        return (
            variants[0].raw(*inputs, **numbers, reduction="none"),
            slopes(*inputs),
            jax.jvp(lambda *x: sum(map(jnp.sum, slopes(*x))), inputs, along)[1],
        )

    for case in variants:
        values, slopes, second = everything(case.numbers)
        # What the sums of rows that are not normalised, as entropies are, can have of digits.
        atol = 1e-37 if case.inputs == 2 else 1e-6
        assert_close(values, oracles.as_float32(case.exact_values(*rows)), rtol=1e-5, atol=atol)
        assert np.isfinite(second)
        if case.function is F.kl_divergence and not {"skew", "floor"} & {*case.settings}:
            direction = case.settings.get("direction", "forward")
            # The two halves of the symmetric one cancel; the others are exact entry by entry.
            atol = 3e-8 if direction == "symmetric" else 1e-34
            for slope, desired in zip(slopes, exact_kl_gradients(direction), strict=True):
                assert_close(slope, desired, rtol=1e-5, atol=atol)
        if case.function is F.js_divergence and "floor" not in case.settings:
            assert np.asarray(values)[0] == 0
            exact = exact_js_gradients(case.numbers["mixture"])
            for slope, desired, row in zip(slopes, exact, rows, strict=True):
                # b p log(p/m) is a difference of logarithms of order one, times p.
                assert_close(slope, desired, rtol=2e-5, atol=3e-8)
                assert np.all(np.asarray(slope)[np.isneginf(row)] == 0)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_kl_of_half_precision_is_that_of_the_rounded_numbers(dtype):
    rows = np.clip(EDGE_ROWS, -6e4, None) if dtype == jnp.float16 else EDGE_ROWS
    rows = np.where(np.isneginf(EDGE_ROWS), -INF, rows)
    log_p, log_q = (jnp.asarray(rows[:, index], dtype) for index in range(2))
    exact = [
        oracles.exact_kl(*row)
        for row in zip(
            np.asarray(log_p).astype(float), np.asarray(log_q).astype(float), strict=True
        )
    ]
    values = F.kl_divergence(log_p, log_q, reduction="none")
    assert values.dtype == jnp.float32
    assert_close(values, oracles.as_float32(exact), rtol=1e-5, atol=1e-37)
    # Inputs of two dtypes meet in float32.
    mixed = F.kl_divergence(log_p, log_q.astype(jnp.float32), reduction="none")
    assert_close(mixed, values, rtol=1e-6)


def test_js_bounds_and_ends():
    """Disjoint distributions reach H(b); the ends of the mixture are exactly 0."""
    log_p, log_q = single([[0.0, -INF]], [[-INF, 0.0]])
    mixtures = jnp.linspace(0.0, 1.0, 11)
    js = jax.jit(jax.vmap(lambda b: F.js_divergence(log_p, log_q, mixture=b)))
    binary = special.entr(np.linspace(0, 1, 11)) + special.entr(1 - np.linspace(0, 1, 11))
    assert_close(js(mixtures), binary, rtol=2e-6)
    assert_close(F.js_divergence(log_p, log_q), math.log(2), rtol=1e-6)
    ends = jax.jit(jax.value_and_grad(lambda p, q, b: F.js_divergence(p, q, mixture=b), (0, 1)))
    for mixture in (0.0, 1.0):
        value, slopes = ends(*single(LOG_P, LOG_Q), mixture)
        assert value == 0
        assert all(np.all(np.asarray(slope) == 0) for slope in slopes)


@pytest.mark.parametrize("mixture", [1e-8, 1e-4, 0.3])
@pytest.mark.parametrize("swapped", [False, True])
def test_js_of_nearly_disjoint_distributions(mixture, swapped):
    """With so small a share of one in the mixture, that share is all there is of some classes."""
    logits = [[0.0, -30.0, -9.0, -2.0], [-30.0, 0.0, -2.0, -9.0]]
    log_p, log_q = single(*special.log_softmax(logits, axis=-1))
    share, pair = (1 - mixture, (log_q, log_p)) if swapped else (mixture, (log_p, log_q))
    share = float(np.float32(share))
    total, through_p, through_q = oracles.exact_js_parts(*map(np.asarray, pair), share)
    value, slopes = jax.value_and_grad(partial(F.js_divergence, mixture=share), (0, 1))(*pair)
    assert_close(value, total, rtol=1e-5)
    for slope, desired in zip(slopes, (through_p, through_q), strict=True):
        assert_close(slope, desired, rtol=0, atol=1e-6 * np.abs(desired).max())


def test_js_over_mixture_tends_to_kl():
    log_p, log_q = (special.log_softmax(lattice(seed, 6, 9), axis=-1) for seed in (0, 1))
    js = jax.jit(partial(F.js_divergence, reduction="none"))
    for mixture, tolerance in ((1e-3, 1e-2), (1e-5, 2e-4), (1e-7, 1e-5)):
        values = js(*single(log_p, log_q), mixture=mixture)
        assert_close(np.asarray(values) / mixture, oracles.kl(log_p, log_q), rtol=tolerance)
        values = js(*single(log_q, log_p), mixture=mixture)
        assert_close(np.asarray(values) / mixture, oracles.kl(log_q, log_p), rtol=tolerance)


@pytest.mark.parametrize("alpha", [0.3, -0.6, 2.0])
def test_derivatives_with_respect_to_alpha(alpha, x64):
    """The first and the second, of distributions near and far: alone, and with the inputs."""
    log_p, log_q = (special.log_softmax(4 * lattice(seed, 4, 5), axis=-1) for seed in (2, 3))

    @quick_jit
    def slopes(alpha):
        total = partial(F.alpha_divergence, reduction="sum")
        return jax.grad(total, (0, 1, 2))(log_p, log_q, alpha)

    p, q = np.exp(log_p), np.exp(log_q)
    desired = gradient(
        lambda a: ((a * p + (1 - a) * q - p**a * q ** (1 - a)) / (a * (1 - a))).sum(), alpha
    )
    assert_close(slopes(alpha)[2], desired, rtol=1e-7)
    second = jax.jvp(slopes, (alpha,), (1.0,))[1]
    ahead, behind = (slopes(alpha + step) for step in (1e-5, -1e-5))
    for found, a, b in zip(second, ahead, behind, strict=True):
        assert_close(found, (a - b) / 2e-5, rtol=1e-6, atol=1e-8)


def test_derivative_with_respect_to_the_mixture(x64):
    log_p, log_q = (special.log_softmax(lattice(seed, 4, 5), axis=-1) for seed in (2, 3))
    log_p[0], log_q[0] = np.log([0.5, 0.5, 1, 1, 1]), np.log([1, 0.2, 0.8, 1, 1])
    log_p[0, 2:], log_q[0, [0, 3, 4]] = -INF, -INF
    slope = jax.jit(jax.grad(lambda b: F.js_divergence(log_p, log_q, mixture=b)))
    for mixture in (0.05, 0.5, 0.9):
        desired = gradient(lambda b: oracles.js(log_p, log_q, b).mean(), np.array(mixture))
        assert_close(slope(mixture), desired, rtol=1e-7, atol=1e-10)
    # Second derivatives: in the mixture alone, and mixed with the inputs.
    total = partial(F.js_divergence, reduction="sum")

    @quick_jit
    def everything(b):
        def slopes(b):
            return jax.grad(lambda p, q, b: total(p, q, mixture=b), (0, 1, 2))(log_p, log_q, b)

        return slopes(b), jax.jvp(slopes, (b,), (1.0,))[1]

    ahead, behind = (everything(0.3 + h)[0] for h in (1e-5, -1e-5))
    for second, one, two in zip(everything(0.3)[1], ahead, behind, strict=True):
        assert_close(second, (one - two) / 2e-5, rtol=1e-6, atol=1e-8)
    # At 0, where the value is 0, the derivative is KL(P||Q).
    slope = jax.grad(lambda b: F.js_divergence(log_p[1:], log_q[1:], mixture=b))
    assert_close(slope(0.0), oracles.kl(log_p[1:], log_q[1:]).mean(), rtol=1e-9)
    assert_close(slope(1.0), -oracles.kl(log_q[1:], log_p[1:]).mean(), rtol=1e-9)


LOGITS = np.array([[0.0, 1.0, -2.0, 0.5], [-INF, 1.0, 2.0, 0.0], [3.0, -INF, -INF, 1.0]])
OTHER_LOGITS = np.array([[0.0, -INF, 1.0, 0.5], [-INF, 2.0, 0.0, -1.0], [0.5, -INF, 0.0, 0.0]])


def softmax_gradient(log_p, through):
    """The chain rule of log_softmax."""
    return through - np.exp(log_p) * through.sum(-1, keepdims=True)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_kl_gradient_through_log_softmax(direction):
    """p (log p - log q - KL) and q - p; finite also from logits that hold -inf."""

    def total(a, b, **options):
        log_p, log_q = jax.nn.log_softmax(a), jax.nn.log_softmax(b)
        return F.kl_divergence(log_p, log_q, direction=direction, **options)

    slopes = jax.jit(jax.grad(partial(total, reduction="sum"), (0, 1)))
    logits = np.asarray(lattice(4, 6, 7)), np.asarray(lattice(5, 6, 7))
    log_p, log_q = (special.log_softmax(x, axis=-1) for x in logits)
    p, q = np.exp(log_p), np.exp(log_q)

    def of_p(log_p, log_q, p):
        return p * (log_p - log_q - (p * (log_p - log_q)).sum(-1, keepdims=True))

    forward = np.stack([of_p(log_p, log_q, p), q - p])
    backward = np.stack([p - q, of_p(log_q, log_p, q)])
    desired = {
        "forward": forward,
        "reverse": backward,
        "symmetric": (forward + backward) / 2,
    }[direction]
    assert_close(np.stack(slopes(*single(*logits))), desired, rtol=1e-5, atol=1e-6)

    log_p, log_q = (special.log_softmax(x, axis=-1) for x in (LOGITS, OTHER_LOGITS))
    forward = [
        softmax_gradient(log, through)
        for log, through in zip((log_p, log_q), oracles.kl_gradient(log_p, log_q), strict=True)
    ]
    backward = [
        softmax_gradient(log, through)
        for log, through in zip(
            (log_p, log_q), oracles.kl_gradient(log_q, log_p)[::-1], strict=True
        )
    ]
    desired = {
        "forward": np.stack(forward),
        "reverse": np.stack(backward),
        "symmetric": (np.stack(forward) + np.stack(backward)) / 2,
    }[direction]
    slopes = jax.jit(jax.grad(partial(total, reduction="sum"), (0, 1)))
    assert_close(np.stack(slopes(*single(LOGITS, OTHER_LOGITS))), desired, rtol=1e-5, atol=1e-6)


@every(STRUCTURES, slow=lambda case: case.name not in FUNCTIONS)
def test_derivatives_from_logits_that_hold_minus_infinity(case, x64):
    """Classes masked in both rows: differences of the finite logits, first and second order."""
    absent = np.array([[False] * 4, [True, False, False, False], [False, True, True, False]])
    inputs = tuple(np.where(absent, -INF, lattice(6 + i, 3, 4)) for i in range(case.inputs))
    tangents = tuple(lattice(8 + i, 3, 4) for i in range(case.inputs))

    def total(*inputs):
        return case.call(*inputs, reduction="sum")

    slopes = jax.grad(total, range(case.inputs))

    @quick_jit
    def everything(*inputs):
        return (
            jax.jvp(jax.value_and_grad(total, range(case.inputs)), inputs, tangents),
            jax.grad(
                lambda *x: sum((s * t).sum() for s, t in zip(slopes(*x), tangents, strict=True)),
                range(case.inputs),
            )(*inputs),
        )

    def moved(distance):
        return everything(*(x + distance * t for x, t in zip(inputs, tangents, strict=True)))

    ((value, first), (forward, forward_over_reverse)), reverse_over_reverse = everything(*inputs)
    ((ahead, slopes_ahead), _), _ = moved(1e-5)
    ((behind, slopes_behind), _), _ = moved(-1e-5)
    assert_close(value, case.entries(*inputs).sum(), rtol=1e-12)
    assert_close(forward, (ahead - behind) / 2e-5, rtol=1e-6, atol=1e-9)
    assert_close(
        forward, sum((s * t).sum() for s, t in zip(first, tangents, strict=True)), rtol=1e-9
    )
    for index in range(case.inputs):
        desired = (slopes_ahead[index] - slopes_behind[index]) / 2e-5
        assert_close(forward_over_reverse[index], desired, rtol=1e-6, atol=1e-8)
        assert_close(reverse_over_reverse[index], desired, rtol=1e-6, atol=1e-8)
        assert np.all(np.asarray(first[index])[absent] == 0)


@pytest.mark.parametrize("call", [F.kl_divergence, partial(F.kl_divergence, direction="reverse")])
def test_the_declared_derivative_can_be_differentiated_again(call, x64):
    """p (log p - log q + 1) and -p, differentiated by differences, off the simplex too."""
    inputs = tuple(special.log_softmax(lattice(seed, 2, 4), axis=-1) + 0.1 for seed in (10, 11))
    tangents = tuple(lattice(seed, 2, 4) for seed in (12, 13))
    slopes = jax.jit(jax.grad(partial(call, reduction="sum"), (0, 1)))
    second = jax.jvp(slopes, inputs, tangents)[1]
    ahead, behind = (
        slopes(*(x + h * t for x, t in zip(inputs, tangents, strict=True))) for h in (1e-5, -1e-5)
    )
    for index in range(2):
        desired = (ahead[index] - behind[index]) / 2e-5
        assert_close(second[index], desired, rtol=1e-6, atol=1e-9)


def required(value):
    """The relative error that float32 may have at a divergence of this size."""
    return np.select(
        [value >= 1e-2, value >= 1e-6, value >= 1e-8, value >= 1e-10],
        [3e-5, 1e-3, 1e-2, 5e-2],
        np.inf,
    )


@pytest.mark.parametrize(("classes", "rows"), [(1_000, 8), (131_072, 2)])
def test_accuracy_in_float32(classes, rows):
    """Nearby distributions, from float32 logits: each row, and the mean of those of one size."""
    noises = np.array([1e-5, 2e-5, 5e-5, 1e-4, 3e-4, 1e-3, 1e-2, 0.1, 1.0])
    random = np.random.default_rng(classes)
    a = random.normal(size=(len(noises), rows, classes)).astype(np.float32)
    b = (a + noises[:, None, None] * random.normal(size=a.shape)).astype(np.float32)
    cases = only(lambda case: case.inputs == 2, FROM_LOG_PROBABILITIES)
    desired = {
        name: case.entries(*(x.astype(np.float64) for x in (a, b))) for name, case in cases.items()
    }
    kl = desired["kl_divergence"]
    assert kl.min() < 1e-10 < 1e-2 < kl.max()

    @jax.jit
    def everything(a, b):
        result = {name: case.call(a, b, reduction="none") for name, case in cases.items()}
        return result, jax.vmap(cases["kl_divergence"].call)(a, b)

    result, means = everything(a, b)
    for name, values in result.items():
        values = np.asarray(values)
        assert np.all(values >= 0)
        error = np.abs(values / desired[name] - 1)
        assert np.all(error <= required(desired[name])), (name, error, desired[name])
    error = np.abs(np.asarray(means) / kl.mean(-1) - 1)
    assert np.all(error <= required(kl.mean(-1)))


def test_entropy():
    """With temperature, normalised or not, from one-hot to uniform rows."""
    n = 5
    one_hot, two = np.full(n, -INF), np.full(n, -INF)
    one_hot[2], two[:2] = 0.0, np.log(0.5)
    rows = np.stack(
        [one_hot, two, np.full(n, -np.log(n)), *special.log_softmax(lattice(14, 4, n), axis=-1)]
    )
    rows = np.vstack([rows, [0.0, -1e30, -1e30, -INF, -1e30], [0.0, -50.0, -90.0, -200.0, -1e4]])
    rows = rows.astype(np.float32).astype(np.float64)

    @jax.jit
    def everything(x, temperature):
        def total(x):
            return F.entropy(x, temperature=temperature, reduction="sum")

        return (
            F.entropy(x, temperature=temperature, reduction="none"),
            F.entropy(x, temperature=temperature, reduction="none", normalize=True),
            jax.grad(total)(x),
            jax.jvp(jax.grad(total), (x,), (jnp.ones_like(x),))[1],
        )

    for temperature in (1.0, 0.5, 3.0, 0.01, 1e3):
        values, normalised, slopes, second = everything(*single(rows), temperature)
        desired = oracles.entropy(rows, temperature)
        assert_close(values, desired, rtol=1e-5, atol=1e-6)
        assert_close(normalised, desired / np.log(n), rtol=1e-5, atol=1e-6)
        scaled = rows / temperature
        log_pi = scaled - special.logsumexp(scaled, axis=-1, keepdims=True)
        pi = np.exp(log_pi)
        finite = np.where(pi > 0, log_pi, 0.0)
        slope = -pi * (finite + desired[:, None]) / temperature
        assert_close(slopes, slope, rtol=1e-4, atol=1e-6 / temperature)
        assert np.isfinite(second).all()
        assert np.all(np.asarray(values) >= 0)
    values, normalised, slopes, _ = everything(*single(rows), 1.0)
    assert values[0] == 0
    assert_close(normalised[2], 1.0, rtol=1e-6)
    assert np.all(np.asarray(slopes)[0] == 0)


def test_entropy_of_one_class_is_zero():
    for normalize in (False, True):
        value, slope = jax.value_and_grad(partial(F.entropy, normalize=normalize))(
            jnp.zeros((3, 1))
        )
        assert value == 0
        assert np.all(np.asarray(slope) == 0)


def test_derivative_with_respect_to_the_temperature(x64):
    log_p = special.log_softmax(lattice(15, 4, 5), axis=-1)
    log_p[0, 2] = -INF
    for normalize, scale in ((False, 1.0), (True, math.log(5))):
        slope = jax.jit(jax.grad(lambda t: F.entropy(log_p, temperature=t, normalize=normalize)))  # noqa: B023
        for temperature in (0.3, 1.0, 4.0):
            desired = gradient(lambda t: oracles.entropy(log_p, t).mean(), np.array(temperature))
            assert_close(slope(temperature), desired / scale, rtol=1e-7, atol=1e-10)


@every(FUNCTIONS)
def test_axis_and_shapes(case):
    inputs = [
        np.asarray(special.log_softmax(lattice(16 + i, 2, 3, 5), axis=-1), np.float32)
        for i in range(case.inputs)
    ]
    values = case.raw(*inputs, reduction="none")
    assert values.shape == (2, 3)
    moved = (np.moveaxis(x, -1, 1) for x in inputs)
    assert_close(case.raw(*moved, axis=-2, reduction="none"), values, rtol=1e-6)
    moved = (np.moveaxis(x, -1, 0) for x in inputs)
    mask = np.array([[True, False, True]])
    masked = case.raw(*moved, axis=0, where=mask)
    assert_close(masked, np.asarray(values)[:, [0, 2]].mean(), rtol=1e-6)
    assert_close(case.raw(*(x[0, 0] for x in inputs)), values[0, 0], rtol=1e-6)
    with pytest.raises(ValueError, match="axis"):
        case.raw(*inputs, axis=3)


def test_an_infinite_row_does_not_hide_behind_nan():
    log_p, log_q = single([[0.0, -INF], [-1.0, -0.4586751]], [[-INF, 0.0], [-1.0, -0.4586751]])
    for reduction in ("sum", "mean"):
        assert F.kl_divergence(log_p, log_q, reduction=reduction) == INF
        assert F.kl_divergence(log_p, log_q, direction="symmetric", reduction=reduction) == INF
    assert F.kl_divergence(log_p, log_q, where=np.array([False, True])) == 0


ROW = st.lists(st.floats(-40, 40, width=32), min_size=6, max_size=6)


def test_properties():
    """Nonnegative, symmetric where it should be, bounded, and blind to the order of classes."""
    binary = float(special.entr(0.2) + special.entr(0.8))

    @jax.jit
    def everything(a, b):
        values = {
            name: case.call(*(a, b)[: case.inputs]) for name, case in FROM_LOG_PROBABILITIES.items()
        }
        # With a floor Q is another distribution.
        pairs = [c for c in STRUCTURES.values() if c.inputs == 2 and "floor" not in c.settings]
        same = [case.call(a, a) for case in pairs]
        complement = F.js_divergence(*map(jax.nn.log_softmax, (a, b)), mixture=0.8)
        return values | {"same": jnp.stack(same).max(), "complement": complement}

    @properties
    @hypothesis.given(ROW, ROW, st.permutations(range(6)))
    def holds(a, b, order):
        a, b = np.float32([a]), np.float32([b])
        values = {k: float(v) for k, v in everything(a, b).items()}
        swapped = {k: float(v) for k, v in everything(b, a).items()}
        permuted = {k: float(v) for k, v in everything(a[:, order], b[:, order]).items()}
        assert all(value >= 0 for value in values.values())
        assert values["same"] == 0
        close = {"rtol": 1e-5, "atol": 1e-6}
        assert_close(swapped["kl_divergence"], values["kl_divergence-reverse"], rtol=1e-6)
        assert_close(
            swapped["kl_divergence-symmetric"], values["kl_divergence-symmetric"], rtol=1e-6
        )
        assert_close(swapped["js_divergence"], values["complement"], **close)
        assert_close(swapped["js_divergence-even"], values["js_divergence-even"], **close)
        assert values["js_divergence-even"] <= math.log(2) * (1 + 1e-6)
        assert values["js_divergence"] <= binary * (1 + 1e-6)
        assert values["entropy"] <= math.log(6) * (1 + 1e-6)
        for name, value in permuted.items():
            assert_close(value, values[name], **close)

    holds()


@pytest.mark.parametrize(
    ("call", "valid"),
    [
        (partial(F.kl_divergence, direction="backward"), DIRECTIONS),
        (partial(F.kl_divergence, reduction="batchmean"), ("sum", "mean", "none")),
    ],
)
def test_bad_options_list_the_valid_ones(call, valid):
    with pytest.raises(ValueError, match=r"batchmean|backward") as raised:
        call(jnp.zeros((2, 1)), jnp.zeros((2, 1)))
    assert all(option in str(raised.value) for option in valid)


def test_entropy_of_a_masked_logit_at_low_temperature():
    logits = jnp.asarray([1.0, 2.0, jnp.finfo(jnp.float32).min])

    def entropy(logits, temperature):
        return F.entropy(jax.nn.log_softmax(logits), temperature=temperature)

    value, slopes = jax.jit(jax.value_and_grad(entropy, (0, 1)))(logits, 0.5)
    assert_close(value, special.entr(special.softmax([2.0, 4.0])).sum())
    assert all(np.isfinite(slope).all() for slope in slopes)


# Options for where only one of the two has mass.

# Log p and log q: a class impossible for q, one that neither has, and one below any floor.
ALONE = np.array(
    [
        [[*np.log([0.5, 0.25, 0.25 - 1e-9, 1e-9]), -INF]],
        [[np.log(0.75), -INF, *np.log([0.25 - 1e-12, 1e-12]), -INF]],
    ]
)


def by_loops(kind, direction, skew=0.0, floor=None):
    """A divergence to a mixture, from Q with a floor, class by class."""
    p, q = np.exp(ALONE[:, 0])
    if floor is not None:
        raised = [max(b, math.exp(floor)) if a + b else 0.0 for a, b in zip(p, q, strict=True)]
        q = np.array(raised) / sum(raised)

    def to_mixture(p, q, b):
        pairs = zip(p, b * p + (1 - b) * q, strict=True)
        return sum(x * math.log(x / m) for x, m in pairs if x)

    if kind == "js":
        return (to_mixture(p, q, 0.5) + to_mixture(q, p, 0.5)) / 2
    return directed(direction, lambda p, q: to_mixture(p, q, skew), p, q)


def test_what_one_calls_impossible_costs_a_finite_amount():
    """With a skew or a floor; the second input is Q in every direction."""
    options = [{"skew": 0.1}, {"floor": -8.0}, {"skew": 0.3, "floor": -8.0}]

    @quick_jit
    def everything(log_p, log_q):
        kl = [
            function(log_p, log_q, direction=direction, **each)
            for function in (F.kl_divergence, F.kl_from_logits)
            for direction in DIRECTIONS
            for each in options
        ]
        return kl, [f(log_p, log_q, floor=-2.0) for f in (F.js_divergence, F.js_from_logits)]

    inputs = single(*ALONE)
    kl, js = everything(*inputs)
    desired = [by_loops("kl", direction, **each) for direction in DIRECTIONS for each in options]
    assert_close(kl, 2 * desired, rtol=1e-5)
    assert_close(js, by_loops("js", "", floor=-2.0))
    assert np.isinf(F.kl_divergence(*inputs))
    assert kl[0] <= -math.log(0.1)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_ends_of_a_skew(direction):
    """At 1 value and gradient are 0; at 0, plain or traced, it is the divergence itself."""
    inputs = single(LOG_P, LOG_Q)
    plain = partial(F.kl_divergence, direction=direction)
    assert operations(partial(plain, skew=0.0), *inputs) == operations(plain, *inputs)
    assert operations(partial(plain, skew=0.1), *inputs) != operations(plain, *inputs)

    @jit_once
    def everything(skew):
        total = partial(plain, skew=skew, reduction="sum")
        return plain(*inputs, skew=skew, reduction="none"), jax.grad(total, (0, 1))(*inputs)

    values, slopes = everything(1.0)
    assert np.all(np.asarray(values) == 0)
    assert all(np.all(np.asarray(slope) == 0) for slope in slopes)
    values, slopes = everything(0.0)
    assert_close(values, plain(*inputs, reduction="none"), rtol=1e-6)
    desired = jax.grad(partial(plain, reduction="sum"), (0, 1))(*inputs)
    for slope, expected in zip(slopes, desired, strict=True):
        assert_close(slope, expected, rtol=1e-6, atol=1e-7)


FORMS = {
    "kl": (F.kl_divergence, F.kl_from_logits, DIRECTIONS),
    "js": (F.js_divergence, F.js_from_logits, [None]),
}


@pytest.mark.parametrize("name", FORMS)
def test_where_the_model_agrees_with_the_floored_reference(name):
    """P = Q': value and gradients are 0, of logits and through `log_q`."""
    of_logs, of_logits, directions = FORMS[name]
    log_q = ALONE[1][:, [0, 1, 2, 4]]
    # The last class neither has.
    raised = np.maximum(np.exp(log_q), math.exp(-3.0)) * [1, 1, 1, 0]
    log_p = np.where(raised > 0, np.log(np.where(raised > 0, raised, 1) / raised.sum()), -INF)
    inputs = single(log_p, log_q)
    for function in (of_logs, of_logits):
        calls = [
            partial(function, floor=-3.0, **({"direction": direction} if direction else {}))
            for direction in directions
        ]
        results = quick_jit(
            lambda *x, calls=calls: [jax.value_and_grad(f, (0, 1))(*x) for f in calls]
        )
        for value, slopes in results(*inputs):
            assert 0 <= value < 1e-13
            # The declared derivative of KL(P||Q') through log P is P, which a softmax cancels.
            zero = slopes if function is of_logits else slopes[1:]
            assert all(np.abs(slope).max() < 2e-7 for slope in zero)


@pytest.mark.parametrize("name", FORMS)
def test_derivatives_with_respect_to_skew_and_floor(name, x64):
    """By differences, one number for each position, of classes that one or both exclude."""
    of_logs, of_logits, directions = FORMS[name]
    a, b = (lattice(seed, 3, 6) for seed in (20, 21))
    a[:, 2], b[:, 2], b[0, 4], a[1, 5] = -INF, -INF, -INF, -INF
    numbers = {"floor": np.array([-2.0, -3.1, -2.3])}
    numbers |= {"skew": np.array([0.2, 0.9, 1e-2])} if name == "kl" else {}
    for direction in directions[-1:]:
        options = {"direction": direction} if direction else {}

        def from_logits(numbers, options=options):
            return of_logits(a, b, **numbers, **options, reduction="sum")

        def from_log_softmax(numbers, options=options):
            each = {key: x[:, None] for key, x in numbers.items()}
            pair = jax.nn.log_softmax(a), jax.nn.log_softmax(b)
            return of_logs(*pair, **each, **options, reduction="sum")

        for form in (from_log_softmax, from_logits):
            value, slopes = quick_jit(form), quick_jit(jax.grad(form))(numbers)
            for key, x in numbers.items():
                desired = gradient(lambda y, v=value, k=key: v(numbers | {k: y}), x, 1e-5)
                assert_close(slopes[key], desired, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("function", [F.kl_divergence, F.kl_from_logits])
def test_a_skew_or_a_floor_out_of_range(function):
    x = jnp.zeros((2, 4))
    for skew in (-0.1, 1.5, math.nan):
        with pytest.raises(ValueError, match=r"skew must be in \[0, 1\]"):
            function(x, x, skew=skew)
    for floor in (0.0, 1e-6, math.nan):
        with pytest.raises(ValueError, match="floor must be below 0"):
            function(x, x, floor=floor)
    with pytest.raises(ValueError, match="skew must broadcast"):
        function(x, x, skew=np.full(3, 0.5))


def test_a_skew_and_a_floor_of_what_is_excluded():
    """A position that holds anything, with a mask; numbers of it too."""
    x, where = jnp.full((2, 4), math.log(0.25)), np.array([True, False])
    held, numbers = x.at[1].set(math.nan), np.array([[0.5], [math.nan]])
    call = partial(F.kl_from_logits, skew=numbers[:, 0], floor=-numbers[:, 0], where=where)
    of_logs = partial(F.kl_divergence, skew=numbers, floor=-numbers, where=where)
    for function in (call, of_logs):
        value, slopes = quick_jit(jax.value_and_grad(function, (0, 1)))(x, held)
        assert_close(value, 0, atol=1e-12)
        assert all(np.all(np.asarray(slope)[1] == 0) for slope in slopes)
