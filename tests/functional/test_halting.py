"""Halting against loops over steps and scipy in float64, with their gradients and edges."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import mpmath
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


def probabilities(chances):
    """When one position halts, by products."""
    reached, p = 1.0, []
    for chance in chances[:-1]:
        p.append(reached * chance)
        reached *= 1 - chance
    return [*p, reached]


def test_halting_log_probabilities(x64):
    p = np.apply_along_axis(probabilities, -1, special.expit(LOGITS))
    assert_close(jnp.exp(pj.halting_log_probabilities(LOGITS)), p, rtol=1e-12)
    assert np.isneginf(pj.halting_log_probabilities(jnp.array([jnp.inf, 0.0]))).tolist() == [
        False,
        True,
    ]


# Chances of halting, and the logits they are of.
CHANCES = special.expit(LOGITS)
DIVERGENCES = {
    "probabilities": (pj.ponder_divergence, CHANCES, np.asarray),
    "logits": (pj.ponder_divergence_from_logits, LOGITS, special.expit),
}
of_either = pytest.mark.parametrize(
    ("function", "x", "chances"), DIVERGENCES.values(), ids=DIVERGENCES
)


@of_either
@pytest.mark.parametrize("rate", [1e-6, 0.05, 0.3, 0.95])
def test_ponder_divergence(function, x, chances, rate, x64):
    """By scipy's truncated geometric distribution: the value, and both slopes."""

    def oracle(x, rate):
        prior = stats.geom.pmf(np.arange(1, STEPS + 1), rate) / stats.geom.cdf(STEPS, rate)
        p = np.apply_along_axis(probabilities, -1, chances(x))
        return stats.entropy(p, prior, axis=-1).mean()

    slopes = quick_jit(jax.value_and_grad(function, (0, 1)))
    value, (slope, rate_slope) = slopes(x, jnp.float64(rate))
    assert_close(value, oracle(x, rate), rtol=1e-10)
    assert_close(slope, gradient(lambda x: oracle(x, rate), x), rtol=1e-5, atol=1e-8)
    if rate > 1e-3:
        desired = (oracle(x, rate + 1e-6) - oracle(x, rate - 1e-6)) / 2e-6
        assert_close(rate_slope, desired, rtol=1e-6)


@of_either
def test_a_prior_of_its_own_at_each_position(function, x, chances, x64):
    rates = RANDOM.uniform(0.1, 0.9, x.shape[:-1])
    each = function(x, rates, reduction="none")
    for i in np.ndindex(rates.shape):
        assert_close(
            each[i], CASES["ponder_divergence"].having(rate=rates[i]).formula(chances(x[i]))
        )


def test_of_probabilities_as_of_logits(x64):
    """By the chain rule: the value, and the slope in the logits."""
    direct = jax.value_and_grad(pj.ponder_divergence_from_logits)
    chained = jax.value_and_grad(lambda z, rate: pj.ponder_divergence(jax.nn.sigmoid(z), rate))
    for rate in (0.0, 0.3):
        for actual, desired in zip(chained(LOGITS, rate), direct(LOGITS, rate), strict=True):
            assert_close(actual, desired, rtol=1e-12, atol=1e-15)


def halting_exactly(halting, rate):
    """The value and the slopes of one position, with all digits."""
    with mpmath.workdps(60):
        rest, h = 1 - mpmath.mpf(rate), [mpmath.mpf(float(x)) for x in halting]
        prior = [rest**n for n in range(len(h))]

        def value(*h):
            reached, p = mpmath.mpf(1), []
            for chance in h[:-1]:
                p.append(reached * chance)
                reached *= 1 - chance
            pairs = zip([*p, reached], prior, strict=True)
            return sum(x * mpmath.log(x / g) for x, g in pairs if x) + mpmath.log(sum(prior))

        def slope(i):
            step = h[i] * (1 - h[i]) * mpmath.mpf(10) ** -20
            ends = [value(*h[:i], h[i] + move, *h[i + 1 :]) for move in (step, -step)]
            return (ends[0] - ends[1]) / (2 * step)

        return float(value(*h)), [float(slope(i)) for i in range(len(h) - 1)]


@pytest.mark.parametrize("rate", [0.0, 0.3, 1e-6])
def test_chances_near_0_and_1(rate):
    """To the digits of float32, however near to either end a chance of halting is."""
    least, most = np.float32(1e-30), np.nextafter(np.float32(1), np.float32(0))
    rows = [(least, least), (1e-10, most), (most, least), (0.5, most), (1e-4, 1 - 1e-4)]
    rows = np.pad(np.float32(rows), ((0, 0), (0, 1)))
    rate = float(np.float32(rate))
    of_rows = jax.jit(jax.vmap(jax.value_and_grad(pj.ponder_divergence), (0, None)))
    values, slopes = of_rows(rows, rate)
    for row, value, slope in zip(rows, values, slopes, strict=True):
        exact, exact_slopes = halting_exactly(row, rate)
        assert_close(value, exact, rtol=1e-6)
        assert_close(slope, [*exact_slopes, 0], rtol=1e-5, atol=1e-5)


def test_small_chances_add_up():
    """1 - h has lost digits of h, which a thousand steps show."""
    halting = np.full(1000, np.float32(1e-4))
    exact = CASES["ponder_divergence"].having(rate=0.0).formula(np.float64(halting))
    assert_close(pj.ponder_divergence(halting, 0.0), exact, rtol=3e-7)


SATURATED = {
    "probabilities": (
        pj.ponder_divergence,
        [[1, 0, 0], [0, 0, 0], [0, 0, 1], [1, 1, 0], [0.5, 1, 0]],
    ),
    "logits": (
        pj.ponder_divergence_from_logits,
        [
            [np.inf, 0, 0],
            [-np.inf, -np.inf, 0],
            [-1e30, -1e30, 0],
            [np.inf, 1e30, 0],
            [0, np.inf, 0],
        ],
    ),
}


@pytest.mark.parametrize(("function", "rows"), SATURATED.values(), ids=SATURATED)
@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
def test_saturated(function, rows, rate):
    """Values are the limits, and gradients numbers, where a chance is 0 or 1 exactly."""
    rows = jnp.array(rows, jnp.float32)
    with np.errstate(divide="ignore"):
        log_g = np.log((1 - rate) ** np.arange(3.0) / ((1 - rate) ** np.arange(3.0)).sum())
    half = -np.log(2) - log_g[:2].mean()
    desired = [-log_g[0], -log_g[2], -log_g[2], -log_g[0], half]
    value, pull = jax.vjp(partial(function, reduction="none"), rows, jnp.float32(rate))
    assert_close(value, desired, rtol=1e-6, atol=1e-7)
    slopes, rate_slope = pull(jnp.ones(5))
    assert np.isfinite(rate_slope)
    assert np.isfinite(slopes).all()
    assert np.all(np.asarray(slopes)[:4] == 0)
    assert np.all(np.asarray(slopes)[4, 1:] == 0)
    alone, slope = jax.value_and_grad(function, 1)(rows[0], jnp.float32(rate))
    assert_close(slope, {0.0: -1, 0.3: -1.7 / 2.19 - 0.7 / 2.19, 1.0: -1}[rate], rtol=1e-6)
    assert_close(alone, -log_g[0], rtol=1e-6)


def test_what_is_nearly_sure_to_halt_costs_infinity_beside_a_prior_of_0():
    """1e30 is as good as infinity where a later step is possible, and not where it is not."""
    logits = jnp.array([1e30, 1e30, 0], jnp.float32)
    assert_close(pj.ponder_divergence_from_logits(logits, 0.3), np.log(2.19), rtol=1e-6)
    value, slopes = jax.value_and_grad(pj.ponder_divergence_from_logits)(logits, 1.0)
    assert np.isposinf(value)
    assert np.isfinite(slopes).all()


def test_what_is_no_chance_is_not_hidden():
    for wrong in (-0.1, 1.1, np.nan):
        assert np.isnan(pj.ponder_divergence(jnp.array([0.2, wrong, 0.9]), 0.3)), wrong


of_halting = pytest.mark.parametrize(
    "function",
    [
        pj.ponder_cost,
        partial(pj.ponder_divergence, rate=0.3),
        partial(pj.ponder_divergence_from_logits, rate=0.3),
    ],
    ids=["cost", "probabilities", "logits"],
)


@of_halting
def test_what_is_excluded_may_hold_anything(function, x64):
    where = RANDOM.random(HALTING.shape[:-1]) < 0.5
    held = np.where(where[..., None], HALTING, np.nan)
    value, slope = jax.value_and_grad(partial(function, where=where))(held)
    assert_close(value, np.asarray(function(HALTING, reduction="none"))[where].mean(), rtol=1e-12)
    assert np.all(np.asarray(slope)[~where] == 0)
    assert np.isfinite(slope).all()


@of_halting
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
    """Terms of what a model returns: of the same halting, and of logits, whose rate is annealed."""
    rate = pj.anneal(0.0, 0.4, start=0, end=4)
    of_logits = pj.PonderDivergence(rate, inputs="logits")
    objective = pj.Objective(
        terms={
            "cost": pj.Term(pj.PonderCost(), on="halting", weight=0.1),
            "divergence": pj.Term(pj.PonderDivergence(rate), on="halting", where="mask"),
            "of logits": pj.Term(of_logits, on="logits", where="mask"),
        }
    )
    mask = np.arange(5) < 3
    outputs = {"halting": CHANCES, "logits": LOGITS, "mask": np.broadcast_to(mask, (8, 5))}
    total, metrics = objective(outputs, step=2)
    assert_close(metrics["divergence"], pj.ponder_divergence(CHANCES[:, :3], 0.2), rtol=1e-5)
    assert_close(metrics["of logits"], metrics["divergence"], rtol=1e-5)
    assert_close(total, 0.1 * pj.ponder_cost(CHANCES) + 2 * metrics["divergence"], rtol=1e-5)


def test_a_config_says_what_it_is_of():
    for config in (pj.PonderDivergence(0.3), pj.PonderDivergence(0.3, inputs="logits")):
        assert pj.from_dict(pj.to_dict(config)) == config
    with pytest.raises(ValueError, match=r"inputs must be one of .*'probabilities', 'logits'"):
        pj.PonderDivergence(0.3, inputs="logprobs")


@pytest.mark.parametrize("shape", [(), (3, 0)])
def test_steps_are_needed(shape):
    x = jnp.zeros(shape)
    message = re.escape(f"needs steps on its last axis, got shape {shape}")
    for function in (
        pj.ponder_cost,
        pj.halting_weights,
        pj.halting_log_probabilities,
        partial(pj.ponder_divergence, rate=0.5),
        partial(pj.ponder_divergence_from_logits, rate=0.5),
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
    for call in (pj.ponder_divergence, pj.ponder_divergence_from_logits):
        with pytest.raises(ValueError, match=re.escape("rate must be in [0, 1], got -0.1")):
            call(x, -0.1)
    with pytest.raises(ValueError, match=re.escape("PonderDivergence.rate must be in [0, 1]")):
        pj.PonderDivergence(1.5)
    with pytest.raises(TypeError, match="where must be boolean"):
        pj.ponder_cost(x, where=jnp.ones(2))
