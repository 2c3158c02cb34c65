"""Gates: probabilities by many draws, declared gradients, evaluation mode, transformations."""

import math
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

import penalties_jax.functional as F  # noqa: N812
from tests.catalogue import GATE_CASES, every, only
from tests.oracles import assert_close, gradient, lattice

DRAWS = 1_000_000
KEY = jax.random.key(0)
LOGITS = np.arange(-4.0, 5.0)
RANDOM = only(lambda case: case.is_a("random"), GATE_CASES)
every_gate = every(RANDOM)
every_case = every(GATE_CASES)


@pytest.fixture(scope="module", autouse=True)
def quick_compiles():
    """Unoptimised programs, which compile in a fraction of the time."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def assert_frequencies(events, probabilities):
    """Shares of the last axis that are within five standard errors of their probabilities."""
    count = events.shape[-1]
    errors = np.sqrt(probabilities * (1 - probabilities) / count)
    assert np.all(np.abs(events.mean(-1) - probabilities) < 5 * errors)


def draws(logits, count=DRAWS):
    return jnp.broadcast_to(jnp.asarray(logits, jnp.float32)[:, None], (len(logits), count))


@pytest.mark.parametrize("temperature", [0.3, 2.0])
def test_a_hard_logistic_gate_opens_with_its_probability(temperature):
    gates = np.asarray(F.logistic_gate(draws(LOGITS), KEY, temperature=temperature))
    assert np.all((gates == 0) | (gates == 1))
    assert_frequencies(gates == 1, special.expit(LOGITS))


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_the_noise_of_a_soft_gate_is_logistic(temperature):
    soft = F.logistic_gate(draws([0.75], 100_000), KEY, temperature=temperature, hard=False)
    noise = temperature * special.logit(np.asarray(soft, np.float64)[0]) - 0.75
    assert stats.kstest(noise[np.isfinite(noise)], "logistic").pvalue > 1e-3
    hard = F.logistic_gate(draws([0.75], 100_000), KEY, temperature=temperature)
    assert np.array_equal(hard, np.asarray(soft) > 0.5)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
@pytest.mark.parametrize("key", [KEY, None], ids=["noise", "evaluation"])
def test_a_hard_gate_has_the_gradient_of_the_soft_one(temperature, key, x64):
    logits, weights = lattice(0, 3, 5), lattice(1, 3, 5)

    def total(logits, hard):
        gates = F.logistic_gate(logits, key, temperature=temperature, hard=hard)
        return (weights * gates).sum()

    hard, soft = (jax.grad(total)(jnp.asarray(logits), hard) for hard in (True, False))
    assert np.array_equal(hard, soft)
    differences = gradient(lambda x: float(total(jnp.asarray(x), False)), logits)
    assert_close(hard, differences, rtol=1e-8, atol=1e-11)
    gates = F.logistic_gate(jnp.asarray(logits), key, temperature=temperature, hard=False)
    gates = np.asarray(gates)
    assert_close(hard, weights * gates * (1 - gates) / temperature, rtol=1e-10)


def test_logistic_gates_in_evaluation():
    logits = jnp.asarray([-3.0, -1e-6, 0.0, 1e-6, 2.0])
    assert F.logistic_gate(logits, None, temperature=0.25).tolist() == [0, 0, 0, 1, 1]
    for temperature in (0.5, 2.0):
        soft = F.logistic_gate(logits, None, temperature=temperature, hard=False)
        desired = special.expit(np.asarray(logits, np.float64) / temperature)
        assert_close(soft, desired, rtol=1e-6)


@pytest.mark.parametrize(
    ("temperature", "stretch"), [(2 / 3, (-0.1, 1.1)), (0.3, (-0.5, 1.2)), (2.0, (-0.05, 2.0))]
)
def test_hard_concrete_gates_are_0_and_1_with_their_probabilities(temperature, stretch):
    logits = np.array([-3.0, -0.5, 0.0, 2.0])
    options = {"temperature": temperature, "stretch": stretch}
    gates = np.asarray(F.hard_concrete_gate(draws(logits), KEY, **options))
    assert np.all((gates >= 0) & (gates <= 1))
    l0 = np.asarray(F.hard_concrete_l0(jnp.asarray(logits), **options), np.float64)
    assert_frequencies(gates != 0, l0)
    low, high = stretch
    ones = special.expit(logits - temperature * np.log((1 - low) / (high - 1)))
    assert_frequencies(gates == 1, ones)
    assert np.all((l0 > ones) & (ones > 0))


def test_the_expected_l0_and_its_gradient(x64):
    """The closed form against the law of the noise: P(L > where the stretched gate is 0)."""
    for temperature, (low, high) in ((2 / 3, (-0.1, 1.1)), (0.25, (-1.0, 1.5))):
        call = partial(F.hard_concrete_l0, temperature=temperature, stretch=(low, high))
        closed = stats.logistic.sf(temperature * special.logit(-low / (high - low)) - LOGITS)
        assert_close(call(jnp.asarray(LOGITS)), closed, rtol=1e-12)
        slopes = jax.vmap(jax.grad(call))(jnp.asarray(LOGITS))
        assert_close(slopes, closed * (1 - closed), rtol=1e-11)
    assert_close(F.hard_concrete_l0(jnp.asarray(0.0)), special.expit(2 / 3 * np.log(11)))


@pytest.mark.parametrize("key", [KEY, None], ids=["noise", "evaluation"])
def test_hard_concrete_gradients(key, x64):
    logits, weights = np.linspace(-5, 5, 400), lattice(2, 400)
    options = {"temperature": 0.5, "stretch": (-0.2, 1.3)}

    def total(logits):
        return (weights * F.hard_concrete_gate(logits, key, **options)).sum()

    slope = jax.grad(total)(jnp.asarray(logits))
    gates = np.asarray(F.hard_concrete_gate(jnp.asarray(logits), key, **options))
    inner = (gates > 0) & (gates < 1)
    assert 0.1 < inner.mean() < 0.5
    s = (gates + 0.2) / 1.5
    temperature = 1 if key is None else 0.5
    desired = np.where(inner, weights * 1.5 * s * (1 - s) / temperature, 0)
    assert_close(slope, desired, rtol=1e-8)
    if key is None:
        assert_close(gates, np.clip(1.5 * special.expit(logits) - 0.2, 0, 1), rtol=1e-12)


@every_case
def test_without_noise(case, x64):
    """The oracle's gates, at any shape."""
    for x in (lattice(3, 4, 6), lattice(4, 2, 3, 5)):
        assert_close(case.raw(jnp.asarray(x), **case.without_noise), case.formula(x), rtol=1e-12)


@every_gate
def test_the_same_key_gives_the_same_gates(case):
    logits = jnp.zeros((50, 8))
    again = [np.asarray(case.raw(logits, key=jax.random.key(seed))) for seed in (1, 1, 2)]
    assert np.array_equal(again[0], again[1])
    assert not np.array_equal(again[0], again[2])
    assert not np.all(again[0] == again[0][:1])
    evaluated = case.raw(logits, key=None)
    assert np.all(evaluated == evaluated[:1])


@every_case
def test_jit_and_low_precision(case):
    logits = jnp.asarray(lattice(3, 4, 6), jnp.float32)
    numbers = {name: 0.7 * x for name, x in case.numbers.items()}
    for key in [{"key": KEY}, {"key": None}] if case.is_a("random") else [{}]:
        plain = case.raw(logits, **key, **numbers)
        traced = {name: jnp.asarray(x) for name, x in numbers.items()}
        compiled = jax.jit(lambda x, key=key, **numbers: case.raw(x, **key, **numbers))
        assert_close(compiled(logits, **traced), plain, rtol=1e-6, atol=1e-7)
        low = case.raw(logits.astype(jnp.bfloat16), **key, **numbers)
        assert low.dtype == plain.dtype == jnp.float32
        # The logits are exact in bfloat16, and the noise is drawn in float32.
        assert_close(low, plain, rtol=1e-6, atol=1e-7)
        assert case.raw(jnp.arange(4), **key).dtype == jnp.float32


@every_gate
def test_vmap(case):
    def gate(x, key):
        return case.raw(x, key=key)

    logits = jnp.asarray(lattice(4, 3, 6), jnp.float32)
    keys = jax.random.split(KEY, 3)
    for mapped, alone in (
        (jax.vmap(gate)(logits, keys), [gate(*pair) for pair in zip(logits, keys, strict=True)]),
        (jax.vmap(lambda x: gate(x, None))(logits), [gate(x, None) for x in logits]),
    ):
        assert_close(mapped, np.stack(alone), rtol=1e-6, atol=1e-7)
    slopes = jax.vmap(jax.grad(lambda x, key: (gate(x, key) * jnp.arange(6)).sum()))(logits, keys)
    assert np.all(np.isfinite(slopes))
    assert np.any(np.asarray(slopes) != 0)


@every_case
def test_a_traced_number_does_not_retrace(case):
    """And eagerly, another number compiles nothing."""
    logits = jnp.asarray(lattice(5, 4), jnp.float32)
    key = {"key": KEY} if case.is_a("random") else {}
    for name, number in case.numbers.items():
        chex.clear_trace_counter()

        def gate(number, name=name):
            return case.raw(logits, **key, **{name: number})

        call = jax.jit(chex.assert_max_traces(gate, n=1))
        for factor in (0.5, 1.0, 2.0):
            traced = call(jnp.asarray(factor * number))
            assert_close(traced, gate(factor * number), rtol=1e-6, atol=1e-7)
        with jax.no_tracing():
            gate(0.75 * number)


def test_a_temperature_for_each_feature(x64):
    logits, temperature = lattice(6, 4, 3), np.array([0.5, 1.0, 3.0])
    gates = F.logistic_gate(jnp.asarray(logits), None, temperature=temperature, hard=False)
    assert_close(gates, special.expit(logits / temperature), rtol=1e-12)
    l0 = F.hard_concrete_l0(jnp.asarray(logits), temperature=temperature)
    assert_close(l0, special.expit(logits + temperature * np.log(11)), rtol=1e-12)


def test_step_gate_and_jump_relu_values_and_declared_gradients():
    """Per-feature thresholds and bandwidths; the rectangle is open, and x at theta is closed."""
    theta, eps = np.array([0.5, 1.0, 2.0]), np.array([0.25, 0.5, 1.0])
    offsets = np.array([-2.0, -0.5, -0.49, -0.25, 0.0, 0.25, 0.49, 0.5, 2.0])
    x = theta + offsets[:, None] * eps
    # 0.49 is off the edge by more than rounding, and 0.5 is on it exactly.
    inside = np.broadcast_to(np.abs(offsets)[:, None] < 0.5, x.shape)
    above = np.broadcast_to(offsets[:, None] > 0, x.shape)
    weights = lattice(7, *x.shape)
    kernel = weights * inside / eps
    arrays = [jnp.asarray(value, jnp.float32) for value in (x, theta)]
    for gate, value, by_x, by_theta in (
        (F.step_gate, above, np.zeros_like(x), -kernel.sum(0)),
        (F.jump_relu, np.where(above, x, 0), weights * above, -(theta * kernel).sum(0)),
    ):
        assert_close(gate(*arrays, bandwidth=eps), value, rtol=1e-6)

        def total(x, theta, gate=gate):
            return (weights * gate(x, theta, bandwidth=eps)).sum()

        slopes = jax.jit(jax.grad(total, (0, 1)))(*arrays)
        assert_close(slopes[0], by_x, rtol=1e-6)
        assert_close(slopes[1], by_theta, rtol=1e-5, atol=1e-6)
        # Forward mode, and no gradient in the bandwidth.
        tangents = [jnp.ones_like(value) for value in arrays]
        _, change = jax.jvp(total, arrays, tangents)
        assert_close(change, by_x.sum() + by_theta.sum(), rtol=1e-5, atol=1e-5)
        assert jax.grad(lambda eps, gate=gate: gate(*arrays, bandwidth=eps).sum())(1.0) == 0


def test_step_gate_and_jump_relu_of_a_scalar_threshold_and_low_precision():
    x = jnp.asarray([-1.0, 0.5, 1.0, 1.5], jnp.bfloat16)
    assert F.step_gate(x, 1.0).tolist() == [0, 0, 0, 1]
    assert F.jump_relu(x, 1.0).tolist() == [0, 0, 0, 1.5]
    assert F.step_gate(x, 1.0).dtype == F.jump_relu(x, 1).dtype == jnp.float32
    assert jax.vmap(F.jump_relu, (0, None))(x, 0.25).tolist() == [0, 0.5, 1.0, 1.5]
    slope = jax.grad(lambda t: F.step_gate(jnp.asarray([1.0002]), t).sum())(1.0)
    assert_close(slope, -1000, rtol=1e-6)
    assert jax.grad(lambda t: F.step_gate(jnp.asarray([1.002]), t).sum())(1.0) == 0


@pytest.mark.parametrize("theta", [-0.5, 0.7, 1.5])
def test_the_kernel_gradient_of_an_expectation(theta):
    """E H(x - theta) has the derivative -density; E x H(x - theta) -theta times it."""
    x = np.random.default_rng(0).normal(size=DRAWS).astype(np.float32)
    bandwidth = 0.1
    inside = stats.norm.cdf(theta + bandwidth / 2) - stats.norm.cdf(theta - bandwidth / 2)
    error = 5 * math.sqrt(inside / DRAWS) / bandwidth
    density = stats.norm.pdf(theta)
    assert error < density / 10
    for gate, factor in ((F.step_gate, 1.0), (F.jump_relu, theta)):
        slope = jax.grad(
            lambda threshold, gate=gate: gate(jnp.asarray(x), threshold, bandwidth=bandwidth).mean()
        )(theta)
        assert abs(float(slope) + factor * density) < abs(factor) * (error + density / 500)


@pytest.mark.parametrize("axis", [-1, 0, 1])
@pytest.mark.parametrize("key", [KEY, None], ids=["noise", "evaluation"])
def test_top_k_opens_exactly_k(axis, key):
    logits = np.random.default_rng(1).normal(size=(6, 7, 8)).astype(np.float32)
    for k in (1, 3, logits.shape[axis]):
        gates = np.asarray(F.top_k_gate(jnp.asarray(logits), k, key, axis=axis))
        assert np.all((gates == 0) | (gates == 1))
        assert np.all(gates.sum(axis) == k)
        if key is None:
            rank = np.argsort(np.argsort(-logits, axis), axis)
            assert np.array_equal(gates, rank < k)


def test_of_equal_logits_the_first_are_taken():
    logits = jnp.asarray([[1.0, 2.0, 2.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    assert F.top_k_gate(logits, 2, None).tolist() == [[0, 1, 1, 0], [1, 1, 0, 0]]


def test_top_k_frequencies():
    """For k = 1 those of softmax; for k = 2, of draws without replacement."""
    logits = np.array([1.0, 0.0, -1.5, 2.0, 0.5])
    p = special.softmax(logits)
    rows = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (100_000, 5))
    assert_frequencies(np.asarray(F.top_k_gate(rows, 1, KEY)).T, p)
    second = np.array([sum(p[j] * p[i] / (1 - p[j]) for j in range(5) if j != i) for i in range(5)])
    assert_frequencies(np.asarray(F.top_k_gate(rows, 2, KEY)).T, p + second)


@pytest.mark.parametrize(("k", "temperature", "axis"), [(1, 1.0, -1), (2, 0.5, -1), (3, 2.0, 0)])
def test_the_derivative_of_top_k(k, temperature, axis, x64):
    logits, weights = lattice(8, 4, 5), lattice(9, 4, 5)

    def total(logits, key=None):
        return (weights * F.top_k_gate(logits, k, key, temperature=temperature, axis=axis)).sum()

    def soft(x):
        return (weights * k * special.softmax(x / temperature, axis)).sum()

    slope = jax.grad(total)(jnp.asarray(logits))
    assert_close(slope, gradient(soft, logits), rtol=1e-8, atol=1e-11)
    # The gates sum to k, and so the derivative sums to 0; the noise moves it.
    noisy = jax.grad(total)(jnp.asarray(logits), KEY)
    assert_close(np.asarray(noisy).sum(axis), 0, atol=1e-12)
    assert not np.allclose(noisy, slope, rtol=0.01)


def test_straight_through():
    hard, soft = jnp.asarray([1.0, 1e8, 0.1]), jnp.asarray([0.3, 1e-3, 7.0])
    assert np.array_equal(F.straight_through(hard, soft), hard)
    slopes = jax.grad(lambda h, s: (F.straight_through(h, s**2) * hard).sum(), (0, 1))(hard, soft)
    assert_close(slopes[0], 0)
    assert_close(slopes[1], 2 * np.asarray(soft, np.float64) * np.asarray(hard), rtol=1e-6)
    with pytest.raises(ValueError, match=r"hard and soft.*\(3,\).*\(2,\)"):
        F.straight_through(hard, soft[:2])


@every_case
def test_bad_numbers(case):
    logits = jnp.zeros((4, 3))
    for name in case.numbers:
        call = partial(case.raw, logits, **case.without_noise)
        # A threshold may be anything; the widths of the noise and of the kernel may not.
        for number in (0, -1.0, math.nan) if name != "threshold" else ():
            with pytest.raises(ValueError, match=f"{name} must be above 0"):
                call(**{name: number})
        with pytest.raises(ValueError, match=rf"{name} must broadcast.*\(4,\)"):
            call(**{name: jnp.ones(4)})
        with pytest.raises(TypeError, match=f"{name} is a schedule"):
            call(**{name: lambda step: 0.5})


def test_other_bad_input():
    logits = jnp.zeros((4, 3))
    for k in (0, -1, 4):
        with pytest.raises(ValueError, match=r"k must be from 1.*3, got"):
            F.top_k_gate(logits, k, None)
    F.top_k_gate(logits, 4, None, axis=0)
    with pytest.raises(ValueError, match="axis"):
        F.top_k_gate(logits, 1, None, axis=2)
    for stretch in ((0.0, 1.1), (-0.1, 1.0), (0.1, 0.9), (1.1, -0.1)):
        with pytest.raises(ValueError, match="stretch"):
            F.hard_concrete_gate(logits, KEY, stretch=stretch)
        with pytest.raises(ValueError, match="stretch"):
            F.hard_concrete_l0(logits, stretch=stretch)
