"""Halting against loops over steps and scipy in float64, with their gradients and edges."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from scipy import special, stats

import penalties_jax as pj
from tests.catalogue import CASES
from tests.oracles import assert_close, gradient
from tests.programs import quick_jit

STEPS = 6
RANDOM = np.random.default_rng(0)
# Some positions halt at once, some in between, some never do.
HALTING = RANDOM.beta(0.6, 2.0, (8, 5, STEPS))
HALTING[:2, 0, 0] = 1.0
LOGITS = 2 * RANDOM.normal(size=(8, 5, STEPS))


def by_loop(halting, epsilon=0.01):
    """Graves' N, R and weights of one position."""
    spent, weights = 0.0, np.zeros(len(halting))
    for n, h in enumerate(halting):
        if spent + h >= 1 - epsilon or n + 1 == len(halting):
            weights[n] = 1 - spent
            return n + 1, 1 - spent, weights
        weights[n] = h
        spent += h
    raise AssertionError("no step")


def test_halting_weights(x64):
    """With the depths of all kinds among them; the cost is N + R."""
    positions = HALTING.reshape(-1, STEPS)
    depths, rests, weights = zip(*map(by_loop, positions), strict=True)
    assert {1, 2, STEPS} <= {*depths}
    actual = pj.halting_weights(positions)
    assert_close(actual, weights, rtol=1e-13, atol=1e-15)
    assert_close(actual.sum(-1), 1, rtol=1e-14)
    cost = pj.ponder_cost(positions, reduction="none")
    assert_close(cost, np.add(depths, rests), rtol=1e-14)


def test_the_gradient_is_that_of_the_remainder(x64):
    """-1 for each step before the last, which finite differences see off the jumps of N."""
    total = partial(pj.ponder_cost, reduction="sum")
    slope = jax.grad(total)(HALTING)
    depths = np.apply_along_axis(lambda h: by_loop(h)[0], -1, HALTING)
    assert np.array_equal(slope, -1.0 * (np.arange(STEPS) < depths[..., None] - 1))

    def loop(halting):
        return sum(sum(by_loop(h)[:2]) for h in halting.reshape(-1, STEPS))

    assert_close(slope, gradient(loop, HALTING), rtol=1e-6, atol=1e-8)


def test_the_gradient_of_weights(x64):
    at = RANDOM.normal(size=(3, STEPS))
    slope = jax.grad(lambda h: jnp.sum(at * pj.halting_weights(h)))(HALTING[0, :3])

    def loop(halting):
        return (at * [by_loop(h)[2] for h in halting]).sum()

    assert_close(slope, gradient(loop, HALTING[0, :3]), rtol=1e-6, atol=1e-8)


def test_epsilon_may_differ_by_position(x64):
    epsilon = RANDOM.uniform(0, 0.6, HALTING.shape[:-1])
    weights = [
        by_loop(h, e)[2] for h, e in zip(HALTING.reshape(-1, STEPS), epsilon.ravel(), strict=True)
    ]
    assert_close(pj.halting_weights(HALTING, epsilon=epsilon).reshape(-1, STEPS), weights)
    assert pj.halting_weights(HALTING, epsilon=1.0).argmax(-1).max() == 0


def test_a_step_that_is_not_a_number_is_not_hidden():
    assert np.isnan(pj.ponder_cost(jnp.array([0.2, jnp.nan, 0.9])))


def probabilities(logits):
    """Of one position, by products."""
    reached, p = 1.0, []
    for chance in special.expit(logits[:-1]):
        p.append(reached * chance)
        reached *= 1 - chance
    return [*p, reached]


def test_halting_log_probabilities(x64):
    p = np.apply_along_axis(probabilities, -1, LOGITS)
    assert_close(jnp.exp(pj.halting_log_probabilities(LOGITS)), p, rtol=1e-12)
    assert np.isneginf(pj.halting_log_probabilities(jnp.array([jnp.inf, 0.0]))).tolist() == [
        False,
        True,
    ]


@pytest.mark.parametrize("rate", [1e-6, 0.05, 0.3, 0.95])
def test_ponder_divergence(rate, x64):
    """By scipy's truncated geometric distribution: the value, and both slopes."""

    def oracle(logits, rate):
        prior = stats.geom.pmf(np.arange(1, STEPS + 1), rate) / stats.geom.cdf(STEPS, rate)
        p = np.apply_along_axis(probabilities, -1, logits)
        return stats.entropy(p, prior, axis=-1).mean()

    slopes = quick_jit(jax.value_and_grad(pj.ponder_divergence, (0, 1)))
    value, (slope, rate_slope) = slopes(LOGITS, jnp.float64(rate))
    assert_close(value, oracle(LOGITS, rate), rtol=1e-10)
    assert_close(slope, gradient(lambda z: oracle(z, rate), LOGITS), rtol=1e-5, atol=1e-8)
    if rate > 1e-3:
        desired = (oracle(LOGITS, rate + 1e-6) - oracle(LOGITS, rate - 1e-6)) / 2e-6
        assert_close(rate_slope, desired, rtol=1e-6)


def test_a_prior_of_its_own_at_each_position(x64):
    rates = RANDOM.uniform(0.1, 0.9, LOGITS.shape[:-1])
    each = pj.ponder_divergence(LOGITS, rates, reduction="none")
    for i in np.ndindex(rates.shape):
        assert_close(each[i], CASES["ponder_divergence"].having(rate=rates[i]).entries(LOGITS[i]))


@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
def test_saturated_logits(rate):
    """Values are the limits, and gradients numbers, where a sigmoid is 0 or 1 exactly."""
    first, last, never = [np.inf, 0, 0], [-np.inf, -np.inf, 0], [-1e30, -1e30, -1e30]
    rows = jnp.array([first, last, never, [1e30, 1e30, 0], [0, np.inf, 0]], jnp.float32)
    with np.errstate(divide="ignore"):
        log_g = np.log((1 - rate) ** np.arange(3.0) / ((1 - rate) ** np.arange(3.0)).sum())
    # What is as good as never is not never: beside a prior of 0 it costs infinity too.
    first_or_hardly_later = -log_g[0] if rate < 1 else np.inf
    half = -np.log(2) - log_g[:2].mean()
    desired = [-log_g[0], -log_g[2], -log_g[2], first_or_hardly_later, half]
    value, pull = jax.vjp(partial(pj.ponder_divergence, reduction="none"), rows, jnp.float32(rate))
    assert_close(value, desired, rtol=1e-6, atol=1e-7)
    assert all(np.isfinite(x).all() for x in pull(jnp.ones(5)))
    alone, slope = jax.value_and_grad(pj.ponder_divergence, 1)(rows[0], jnp.float32(rate))
    assert_close(slope, {0.0: -1, 0.3: -1.7 / 2.19 - 0.7 / 2.19, 1.0: -1}[rate], rtol=1e-6)
    assert_close(alone, -log_g[0], rtol=1e-6)


@pytest.mark.parametrize("function", [pj.ponder_cost, partial(pj.ponder_divergence, rate=0.3)])
def test_what_is_excluded_may_hold_anything(function, x64):
    where = RANDOM.random(HALTING.shape[:-1]) < 0.5
    held = np.where(where[..., None], HALTING, np.nan)
    value, slope = jax.value_and_grad(partial(function, where=where))(held)
    assert_close(value, np.asarray(function(HALTING, reduction="none"))[where].mean(), rtol=1e-12)
    assert np.all(np.asarray(slope)[~where] == 0)
    assert np.isfinite(slope).all()


@pytest.mark.parametrize("function", [pj.ponder_cost, partial(pj.ponder_divergence, rate=0.3)])
def test_over_devices(function):
    """Sharded under jit, and by the name of an axis, with uneven masks."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    where = RANDOM.random(HALTING.shape[:-1]) < 0.4
    x, lie = np.float32(HALTING), NamedSharding(mesh, P("data"))
    inside = jax.shard_map(
        lambda x, where: function(x, where=where, axis_name="data"),
        mesh=mesh,
        in_specs=P("data"),
        out_specs=P(),
    )
    desired = jax.value_and_grad(lambda x: function(x, where=where))(x)
    for sharded in (inside, lambda x, where: function(x, where=where)):
        actual = jax.jit(jax.value_and_grad(sharded))(*jax.device_put((x, where), lie))
        jax.tree.map(partial(assert_close, rtol=1e-6, atol=1e-7), actual, desired)


def test_in_an_objective():
    """A term of what a model returns, whose rate is annealed."""
    cost = pj.Term(pj.PonderCost(), on="halting", weight=0.1)
    rate = pj.anneal(0.0, 0.4, start=0, end=4)
    divergence = pj.Term(pj.PonderDivergence(rate), on="logits", where="mask")
    objective = pj.Objective(terms={"cost": cost, "divergence": divergence})
    mask = np.arange(5) < 3
    outputs = {"halting": HALTING, "logits": LOGITS, "mask": np.broadcast_to(mask, (8, 5))}
    total, metrics = objective(outputs, step=2)
    assert_close(metrics["divergence"], pj.ponder_divergence(LOGITS[:, :3], 0.2), rtol=1e-5)
    assert_close(total, 0.1 * pj.ponder_cost(HALTING) + metrics["divergence"], rtol=1e-6)


@pytest.mark.parametrize("shape", [(), (3, 0)])
def test_steps_are_needed(shape):
    x = jnp.zeros(shape)
    message = re.escape(f"needs steps on its last axis, got shape {shape}")
    for function in (
        pj.ponder_cost,
        pj.halting_weights,
        pj.halting_log_probabilities,
        partial(pj.ponder_divergence, rate=0.5),
    ):
        with pytest.raises(ValueError, match=message):
            function(x)


def test_bad_numbers():
    x = jnp.zeros((2, 3))
    for call in (pj.ponder_cost, pj.halting_weights):
        with pytest.raises(ValueError, match=re.escape("epsilon must be in [0, 1], got 1.5")):
            call(x, epsilon=1.5)
        with pytest.raises(ValueError, match=r"epsilon must broadcast to shape \(2,\)"):
            call(x, epsilon=jnp.zeros(3))
    with pytest.raises(ValueError, match=re.escape("rate must be in [0, 1], got -0.1")):
        pj.ponder_divergence(x, -0.1)
    with pytest.raises(ValueError, match=re.escape("PonderDivergence.rate must be in [0, 1]")):
        pj.PonderDivergence(1.5)
    with pytest.raises(TypeError, match="where must be boolean"):
        pj.ponder_cost(x, where=jnp.ones(2))
