"""Rates of skipped work and their losses: formulas, edges, masks, pytrees, the global batch."""

import math

import hypothesis
import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from hypothesis import strategies as st
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from scipy.special import xlogy

import penalties_jax.functional as F  # noqa: N812
from tests.catalogue import choices_of
from tests.oracles import as_float32, assert_close, gradient, lattice
from tests.programs import jit_once

KINDS = choices_of(F.sparsity_target_loss)["kind"]
every_kind = pytest.mark.parametrize("kind", KINDS)
# Exact in float32, and off the kinks at the target and at a distance of delta.
RATES = (2 * np.arange(1, 31, 2) + 1) / 64
TARGETS = np.array([0.125, 0.5, 0.90625])


@pytest.fixture(scope="module", autouse=True)
def quick_compiles():
    """Unoptimised programs, which compile in a fraction of the time."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def exact(kind, s, t, delta=0.1):
    """The loss in float64."""
    d = np.abs(s - t)
    if kind == "kl":
        skipped, computed = np.maximum(s, 1e-8), np.maximum(1 - s, 1e-8)
        return xlogy(t, t / skipped) + xlogy(1 - t, (1 - t) / computed)
    if kind in ("huber", "adaptive"):
        return np.where(d < delta, d**2 / 2, delta * (d - delta / 2))
    return {"l2": d**2, "l1": d}[kind]


@every_kind
@pytest.mark.parametrize("delta", [0.1, 0.3])
def test_value_and_gradients(kind, delta, x64):
    s, t = (np.array(x) for x in np.broadcast_arrays(RATES[:, None], TARGETS))

    def total(s, t):
        return F.sparsity_target_loss(s, t, kind=kind, delta=delta, reduction="sum")

    assert_close(
        F.sparsity_target_loss(s, t, kind=kind, delta=delta), exact(kind, s, t, delta), rtol=1e-12
    )
    rate_slope, target_slope = jax.grad(total, (0, 1))(jnp.asarray(s), jnp.asarray(t))
    by_rate = gradient(lambda x: exact(kind, x, t, delta).sum(), s)
    by_target = gradient(lambda x: exact(kind, s, x, delta).sum(), t)
    assert_close(rate_slope, by_rate, rtol=1e-6, atol=1e-8)
    assert_close(target_slope, by_target, rtol=1e-6, atol=1e-8)


@every_kind
@pytest.mark.parametrize("target", TARGETS)
def test_value_and_gradient_in_float32(kind, target):
    s = jnp.asarray(RATES, jnp.float32)
    values = F.sparsity_target_loss(s, target, kind=kind)
    assert values.dtype == jnp.float32
    assert_close(values, exact(kind, RATES, target), rtol=3e-6)
    slopes = jax.grad(lambda s: F.sparsity_target_loss(s, target, kind=kind, reduction="sum"))(s)
    desired = gradient(lambda x: exact(kind, x, target).sum(), RATES)
    assert_close(slopes, desired, rtol=1e-5, atol=1e-7)


@every_kind
def test_at_an_inner_target_all_is_zero(kind):
    for target in (0.3, 0.5, 0.99):
        value, slope = jax.value_and_grad(
            lambda s, target=target: F.sparsity_target_loss(s, target, kind=kind)
        )(jnp.float32(target))
        assert (value, slope) == (0, 0)


@pytest.mark.parametrize("target", [0.0, 1e-4, 0.3, 1.0])
def test_kl_at_the_ends(target):
    """Finite at rates 0 and 1, by the floored formula, with a slope that points to the target."""
    rates = np.array([0.0, 2.0**-20, 0.25, 0.75, 1 - 2.0**-20, 1.0])
    t = float(np.float32(target))
    values, slopes = jax.vmap(
        jax.value_and_grad(lambda s: F.sparsity_target_loss(s, target, kind="kl"))
    )(jnp.asarray(rates, jnp.float32))
    assert_close(values, exact("kl", rates, t), rtol=2e-6, atol=1e-12)
    desired = (1 - t) / np.maximum(1 - rates, 1e-8) - t / np.maximum(rates, 1e-8)
    assert_close(slopes, desired, rtol=1e-5)
    away = rates != t
    assert np.all(np.sign(slopes)[away] == np.sign(rates - t)[away])


def test_kl_below_the_floor(x64):
    """As floored, which may be negative there, by at most 1e-8."""
    shares = np.array([0.0, 1e-12, 1e-9, 0.9e-8, 1e-8, 1.1e-8, 1e-7])
    for s, t in (np.meshgrid(shares, shares), np.meshgrid(1 - shares, 1 - shares)):
        values = F.sparsity_target_loss(s, t, kind="kl")
        assert np.all(np.asarray(values) >= -1.001e-8)
        assert_close(values, exact("kl", s, t), rtol=1e-6, atol=1e-8)


def test_kl_near_its_target_keeps_its_digits():
    random = np.random.default_rng(0)
    ends = 10.0 ** random.uniform(-5, np.log10(0.5), 3000)
    t = np.where(random.random(3000) < 0.5, ends, 1 - ends).astype(np.float32)
    s = as_float32(t * (1 + 10.0 ** random.uniform(-6, -1, 3000) * random.choice([-1, 1], 3000)))
    s = np.clip(s, 0, 1 - 2.0**-20).astype(np.float32)
    values = np.asarray(F.sparsity_target_loss(jnp.asarray(s), jnp.asarray(t), kind="kl"))
    assert np.all(values >= 0)
    with mpmath.workdps(50):
        pairs = [(mpmath.mpf(float(a)), mpmath.mpf(float(b))) for a, b in zip(s, t, strict=True)]
        desired = [
            float(b * mpmath.log(b / a) + (1 - b) * mpmath.log((1 - b) / (1 - a))) for a, b in pairs
        ]
    assert_close(values, np.array(desired), rtol=1e-5)


def test_adaptive_is_huber():
    s = jnp.asarray(RATES)
    a, b = (F.sparsity_target_loss(s, 0.5, kind=kind, delta=0.2) for kind in ("adaptive", "huber"))
    assert np.array_equal(a, b)


def test_defaults_are_l2_none_and_a_delta_of_a_tenth():
    s = jnp.asarray(RATES)
    assert_close(F.sparsity_target_loss(s, 0.5), (RATES - 0.5) ** 2)
    assert_close(F.sparsity_target_loss(s, 0.5, kind="huber"), exact("huber", RATES, 0.5))


@every_kind
def test_rates_and_targets_for_each_token_and_reductions(kind):
    random = np.random.default_rng(1)
    s, t = random.integers(1, 64, (4, 6)) / 64, random.integers(1, 64, (6,)) / 64
    mask = random.random((4, 6)) < 0.5
    entries = exact(kind, s, t)
    inputs = jnp.asarray(s), jnp.asarray(t)
    for where, kept in ((None, np.ones_like(mask)), (mask, mask), (mask[:1], mask[:1] | (s < 0))):
        sum_, mean, none = (
            F.sparsity_target_loss(*inputs, kind=kind, reduction=name, where=where)
            for name in ("sum", "mean", "none")
        )
        desired = np.where(kept, entries, 0)
        assert_close(none, desired, rtol=1e-5, atol=1e-7)
        assert_close(sum_, desired.sum(), rtol=1e-5)
        assert_close(mean, desired.sum() / kept.sum(), rtol=1e-5)


@every_kind
def test_excluded_rates_may_hold_anything(kind):
    s, t = jnp.array([0.25, math.nan, math.inf]), jnp.array([0.5, 0.5, math.nan])
    where = jnp.array([True, False, False])
    value, slopes = jax.value_and_grad(
        lambda s, t: F.sparsity_target_loss(s, t, kind=kind, reduction="mean", where=where), (0, 1)
    )(s, t)
    assert_close(value, exact(kind, 0.25, 0.5), rtol=1e-5)
    for slope in slopes:
        assert slope[0] != 0
        assert_close(slope[1:], 0)


def test_layers_in_a_pytree():
    s = {"a": np.array(0.25), "b": np.array([0.5, 0.75, 0.125])}
    rates = jax.tree.map(jnp.asarray, s)
    own = {"a": 0.5, "b": jnp.array([0.25, 0.5, 0.5])}
    for target in (0.375, own):
        t = own if target is own else {"a": target, "b": target}
        losses = F.sparsity_target_loss(rates, target)
        desired = {name: (s[name] - np.asarray(t[name])) ** 2 for name in s}
        assert losses.keys() == desired.keys()
        for name in s:
            assert losses[name].shape == s[name].shape
            assert_close(losses[name], desired[name])
        total = sum(x.sum() for x in desired.values())
        assert_close(F.sparsity_target_loss(rates, target, reduction="sum"), total)
        # One mean over all rates, not one of means.
        assert_close(F.sparsity_target_loss(rates, target, reduction="mean"), total / 4)
    where = {"a": jnp.array(False), "b": jnp.array([True, False, True])}
    masked = F.sparsity_target_loss(rates, own, reduction="mean", where=where)
    assert_close(masked, (0.25**2 + 0.375**2) / 2)


@pytest.mark.parametrize("dtype", [jnp.bool_, jnp.int8, jnp.int32, jnp.bfloat16, jnp.float32])
def test_rate_of_masks_of_every_dtype(dtype):
    mask = np.random.default_rng(2).random((5, 67)) < 0.3
    rate = F.sparsity_rate(jnp.asarray(mask, dtype))
    assert rate.dtype == jnp.float32
    assert rate.shape == ()
    assert_close(rate, 1 - mask.mean(), rtol=1e-6)


def test_a_rate_in_low_precision_is_a_mean_in_float32():
    mask = np.zeros(4099, bool)
    mask[:3] = True
    assert_close(F.sparsity_rate(jnp.asarray(mask, jnp.bfloat16)), 1 - 3 / 4099, rtol=1e-6)


@pytest.mark.parametrize("axis", [None, -1, 0, (0, 2), (-1, -2)])
@pytest.mark.parametrize("masked", [False, True])
def test_rate_and_gradient_over_axes(axis, masked):
    random = np.random.default_rng(3)
    mask = random.integers(0, 65, (3, 4, 5)) / 64
    where = random.random((3, 4, 5)) < 0.6 if masked else None
    kept = np.ones_like(mask) if where is None else where.astype(float)
    rate = F.sparsity_rate(jnp.asarray(mask), axis=axis, where=where)
    count = np.maximum(kept.sum(axis), 1)
    assert_close(rate, (kept * (1 - mask)).sum(axis) / count, rtol=1e-6, atol=1e-7)
    slopes = jax.grad(lambda mask: F.sparsity_rate(mask, axis=axis, where=where).sum())(
        jnp.asarray(mask)
    )
    assert_close(slopes, -kept / np.maximum(kept.sum(axis, keepdims=True), 1), rtol=1e-6)


def test_padding_in_a_rate():
    """It may hold NaN, and an example of nothing else has rate 0 and gradient 0."""
    mask = jnp.array([[1.0, 0.0, math.nan], [math.nan, math.inf, math.nan]])
    where = jnp.array([[True, True, False], [False, False, False]])
    assert_close(F.sparsity_rate(mask, where=where), 0.5)
    assert_close(F.sparsity_rate(mask, axis=-1, where=where), [0.5, 0])
    slope = jax.grad(lambda mask: F.sparsity_rate(mask, axis=-1, where=where).sum())(mask)
    assert_close(slope, [[-0.5, -0.5, 0], [0, 0, 0]])
    assert_close(F.sparsity_rate(mask, where=jnp.zeros((3,), bool)), 0)
    # A mask of lengths broadcasts.
    columns = jnp.array([True, True, False])
    assert_close(F.sparsity_rate(jnp.array([[1, 0, 1], [0, 0, 1]]), where=columns), 0.75)


def test_rates_of_layers():
    masks = {"a": jnp.array([1, 0, 0, 0]), "b": [jnp.array([[True, True], [True, False]])]}
    rates = F.sparsity_rate(masks)
    assert (float(rates["a"]), float(rates["b"][0])) == (0.75, 0.25)
    where = {"a": jnp.array([True, True, False, False]), "b": [jnp.array([False, True])]}
    rates = F.sparsity_rate(masks, where=where)
    assert (float(rates["a"]), float(rates["b"][0])) == (0.5, 0.5)


def test_the_global_batch_on_eight_devices():
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(AxisType.Auto,))
    random = np.random.default_rng(4)
    mask = (random.integers(0, 65, (8, 3, 5)) / 64).astype(np.float32)
    where = random.random(mask.shape) < 0.5
    where[0], where[1] = False, True
    target, count = 0.3, where.sum()

    def rate(mask, where):
        return F.sparsity_rate(mask, where=where, axis_name="batch")

    def mean(mask, where):
        return F.sparsity_target_loss(
            mask, target, reduction="mean", where=where, axis_name="batch"
        )

    for function, formula, slope in (
        (rate, lambda m: 1 - m, where * -1.0 / count),
        (mean, lambda m: (m - target) ** 2, where * 2 * (mask - target) / count),
    ):
        sharded = jax.shard_map(
            function, mesh=mesh, in_specs=(P("batch"), P("batch")), out_specs=P()
        )
        value, slopes = jax.jit(jax.value_and_grad(sharded))(mask, where)
        assert_close(value, formula(mask)[where].sum() / count, rtol=1e-5)
        assert_close(slopes, slope, rtol=1e-5, atol=1e-8)


def test_balanced_loss():
    losses = jnp.array(2.0), jnp.array(0.5)
    total, parts = F.balanced_loss(*losses, accuracy_weight=0.75, sparsity_weight=0.125)
    assert {name: float(part) for name, part in parts.items()} == {
        "total_loss": 0.75 * 2 + 0.125 * 0.5,
        "accuracy_loss": 2.0,
        "sparsity_loss": 0.5,
        "accuracy_weight": 0.75,
        "sparsity_weight": 0.125,
    }
    assert total == parts["total_loss"]
    assert_close(F.balanced_loss(*losses)[0], 2.005, rtol=1e-6)


def test_balanced_loss_gradients_and_traced_weights():
    slopes = jax.jit(
        jax.grad(
            lambda a, s, wa, ws: F.balanced_loss(a, s, accuracy_weight=wa, sparsity_weight=ws)[0],
            (0, 1, 2, 3),
        )
    )(2.0, 0.5, 0.75, 0.125)
    assert_close(jnp.stack(slopes), [0.75, 0.125, 2.0, 0.5])


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_loss_of_weight_0_adds_exactly_0(value):
    """And it gets no gradient."""

    def total(accuracy, sparsity, **weights):
        return F.balanced_loss(accuracy, sparsity, **weights)[0]

    slopes = jax.value_and_grad(total, (0, 1))
    weights = {"accuracy_weight": 1.0, "sparsity_weight": 0.0}
    assert slopes(3.0, value, **weights) == (3.0, (1.0, 0.0))
    weights = {"accuracy_weight": 0, "sparsity_weight": jnp.array(2.0)}
    assert slopes(value, 3.0, **weights) == (6.0, (0.0, 2.0))
    assert not np.isfinite(total(3.0, value))


def test_bad_input():
    rate, schedule = jnp.array([0.5, 0.25]), lambda step: 0.5
    for target in (-0.01, 1.01, math.nan, 2):
        with pytest.raises(ValueError, match=r"\[0, 1\]"):
            F.sparsity_target_loss(rate, target)
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        F.sparsity_target_loss({"a": rate, "b": rate}, {"a": 0.5, "b": 1.5})
    with pytest.raises(ValueError, match=r"(?s)(?=.*'l3')(?=.*l2)(?=.*l1)(?=.*kl)(?=.*huber)"):
        F.sparsity_target_loss(rate, 0.5, kind="l3")
    with pytest.raises(ValueError, match=r"(?s)(?=.*total)(?=.*mean)"):
        F.sparsity_target_loss(rate, 0.5, reduction="total")
    with pytest.raises(TypeError, match="schedule"):
        F.sparsity_target_loss(rate, schedule)
    with pytest.raises(ValueError, match=r"(?i)shape"):
        F.sparsity_target_loss(rate, jnp.array([0.5, 0.5, 0.5]))
    with pytest.raises(ValueError, match=r"where.*\(3,\)"):
        F.sparsity_target_loss(rate, 0.5, where=jnp.ones(3, bool))
    with pytest.raises(TypeError, match="where must be boolean"):
        F.sparsity_target_loss(rate, 0.5, where=jnp.ones(2))
    with pytest.raises(TypeError, match="where must be boolean"):
        F.sparsity_rate(rate, where=jnp.ones(2, int))
    with pytest.raises(ValueError, match=r"where.*\(3,\)"):
        F.sparsity_rate(rate, where=jnp.ones(3, bool))
    for name in ("accuracy_weight", "sparsity_weight"):
        with pytest.raises(ValueError, match=f"{name} must be at least 0"):
            F.balanced_loss(jnp.array(1.0), jnp.array(1.0), **{name: -0.5})


def test_an_array_of_targets_is_none_for_a_tree_of_rates():
    """Each rate would be compared with all of them."""
    rates = {"a": jnp.array(0.2), "b": jnp.array(0.5)}
    with pytest.raises(ValueError, match="target must broadcast"):
        F.sparsity_target_loss(rates, jnp.array([0.2, 0.5]))
    per_layer = F.sparsity_target_loss(rates, {"a": 0.2, "b": jnp.array(0.5)}, reduction="mean")
    assert float(per_layer) == 0


# Targets of single positions.

MEANS = (0.0, 1e-6, 0.25, 0.5, 0.9, 1.0)
TEMPERATURES = (1e-3, 0.05, 0.25, 2.0, 1e3)


def copula_targets(scores, mean, temperature):
    """Of one row, with 60 digits, by the formula as it is written."""
    with mpmath.workdps(60):
        m, one = mpmath.mpf(float(mean)), mpmath.mpf(1)
        t = mpmath.mpf(float(temperature))

        def copula(u):
            rises = mpmath.expm1(u / t) * mpmath.expm1(m / t) / mpmath.expm1(1 / t)
            return t * mpmath.log1p(rises)

        def target(score):
            lower = one * sum(other > score for other in scores) / len(scores)
            upper = one * sum(other >= score for other in scores) / len(scores)
            return float((copula(upper) - copula(lower)) / (upper - lower))

        return [target(score) for score in scores]


@pytest.mark.parametrize("mean", MEANS)
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_token_targets_are_slopes_of_franks_copula(mean, temperature, x64):
    scores = np.random.default_rng(5).integers(0, 9, 12) / 8
    targets = F.token_targets(scores, mean, temperature=temperature)
    assert targets.dtype == jnp.float64
    assert_close(targets, copula_targets(scores, mean, temperature), rtol=1e-10, atol=1e-15)
    assert_close(np.mean(targets), mean, rtol=1e-13)


SCORES = st.lists(
    st.floats(width=32, allow_nan=False) | st.sampled_from([0.0, -0.0, 1.0, math.inf, -math.inf]),
    min_size=9,
    max_size=9,
)
UNITS = st.floats(0, 1, width=32)


@hypothesis.settings(deadline=None, max_examples=200, derandomize=True, database=None)
@hypothesis.given(
    SCORES, st.lists(st.booleans(), min_size=9, max_size=9), UNITS, st.floats(-9, 9).map(np.exp)
)
def test_token_targets_have_their_mean_range_and_order(scores, where, mean, temperature):
    scores, where, mean = np.float32(scores), np.array(where), np.float32(mean)
    targets = np.asarray(
        F.token_targets(
            *map(jnp.asarray, (scores, mean)), temperature=jnp.float32(temperature), where=where
        )
    )
    assert targets.dtype == np.float32
    assert np.all((targets >= 0) & (targets <= 1))
    assert np.all(targets[~where] == 0)
    kept = targets[where]
    assert_close(kept.sum(), where.sum() * np.float64(mean), rtol=2e-6, atol=1e-7)
    falls = np.diff(kept[np.argsort(-scores[where], kind="stable")])
    assert np.all(falls >= -1e-6)
    for score in scores[where]:
        assert len({*targets[where & (scores == score)]}) == 1


def test_token_targets_of_a_long_sequence():
    scores = jnp.asarray(np.random.default_rng(6).normal(size=100_000), jnp.float32)
    for mean in (0.3, 1e-3):
        for temperature in (1e-6, 0.01, 0.25):
            targets = np.asarray(F.token_targets(scores, mean, temperature=temperature))
            assert_close(np.mean(targets, dtype=np.float64), mean, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("temperature", [1e-30, 1e-12])
def test_cold_targets_are_a_threshold(temperature):
    targets = F.token_targets(
        jnp.array([0.5, -math.inf, math.inf, 0.25, 3.0]), 0.4, temperature=temperature
    )
    assert_close(targets, [0, 1, 0, 1, 0], atol=1e-6)


@pytest.mark.parametrize("temperature", [1e9, 1e30, math.inf])
def test_hot_targets_and_those_of_equal_scores_are_the_mean(temperature):
    targets = F.token_targets(jnp.arange(5.0), 0.4, temperature=temperature)
    assert_close(targets, [0.4] * 5, rtol=1e-6)
    for score in (0.0, math.inf, -math.inf):
        assert_close(F.token_targets(jnp.full(5, score), 0.4), [0.4] * 5, rtol=1e-6)


def test_the_default_temperature():
    """At a mean of a half, from nearly a sigmoid of -2 to one of 2."""
    targets = np.asarray(F.token_targets(jnp.arange(1000.0), 0.5))
    assert_close(targets[[0, -1]], [1 / (1 + np.exp(-2)), 1 / (1 + np.exp(2))], rtol=5e-3)


@pytest.mark.parametrize("mean", [0, 1, 0.0, 1.0])
def test_a_mean_at_an_end_is_exact(mean):
    scores = jnp.array([0.5, -math.inf, math.inf, 0.25, 0.25])
    for temperature in TEMPERATURES:
        assert np.all(np.asarray(F.token_targets(scores, mean, temperature=temperature)) == mean)


def test_means_of_several_sequences_along_an_axis():
    random = np.random.default_rng(7)
    scores = random.normal(size=(3, 7, 4)).astype(np.float32)
    where, means = random.random((3, 7, 1)) < 0.7, np.float32(random.random((3, 4)))
    where[0] = False

    @jit_once
    def targets(scores, means, where):
        return F.token_targets(scores, means, axis=1, where=where)

    actual = targets(scores, means, where)
    rows = jax.vmap(jax.vmap(lambda s, m, w: F.token_targets(s, m, where=w)))(
        scores.swapaxes(1, 2), means, np.broadcast_to(where, scores.shape).swapaxes(1, 2)
    )
    assert_close(actual, np.asarray(rows).swapaxes(1, 2))
    counts = np.broadcast_to(where, scores.shape).sum(1)
    assert_close(actual.sum(1), counts * means, rtol=1e-5)
    targets(scores, means / 2, where)


def test_what_padding_holds_is_no_score():
    where = jnp.array([True, False, True, False])
    expected = F.token_targets(jnp.array([1.0, 2.0]), 0.3)
    for padding in (math.nan, math.inf, -math.inf, 1.0):
        scores = jnp.array([1.0, padding, 2.0, padding])
        targets = F.token_targets(scores, 0.3, where=where)
        assert targets.tolist() == [float(expected[0]), 0, float(expected[1]), 0]


def test_a_score_that_is_nan_has_no_target():
    assert np.isnan(F.token_targets(jnp.array([1.0, math.nan, 2.0]), 0.3)).tolist() == [0, 1, 0]


def test_token_targets_are_constants():
    def total(*inputs):
        scores, mean, temperature = inputs
        return jnp.sum(F.token_targets(scores, mean, temperature=temperature) ** 2)

    slopes = jax.grad(total, (0, 1, 2))(jnp.arange(4.0), 0.0, 0.25)
    assert not any(np.any(slope) for slope in slopes)


def test_token_targets_on_a_sharded_batch():
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(AxisType.Explicit,))
    scores = np.random.default_rng(8).normal(size=(8, 6)).astype(np.float32)
    expected = F.token_targets(scores, 0.3)
    with jax.set_mesh(mesh):
        placed = jax.device_put(scores, jax.NamedSharding(mesh, P("batch")))
        compiled = jax.jit(lambda x: F.token_targets(x, 0.3)).lower(placed).compile()
        targets = compiled(placed)
    assert "all-gather" not in compiled.as_text()
    assert targets.sharding.spec == P("batch", None)
    assert_close(targets, np.asarray(expected), rtol=1e-6)


def test_rates_of_tokens_meet_their_targets():
    """The loss's minimum: each token's rate at its target, their mean at the mean."""
    entropies = jnp.array([[0.5, 1.5, 0.1, 3.0], [0.2, 0.2, 0.2, 0.0]])
    where = jnp.array([[True] * 4, [True, True, True, False]])
    targets = F.token_targets(entropies, 0.6, where=where)

    def loss(logits):
        rates = jax.nn.sigmoid(logits)
        return F.sparsity_target_loss(rates, targets, kind="kl", reduction="sum", where=where)

    logits = jnp.zeros((2, 4))
    for _ in range(300):
        logits -= 4 * jax.grad(loss)(logits)
    rates = jax.nn.sigmoid(logits)
    assert_close(jnp.where(where, rates, 0), np.asarray(targets), atol=1e-3)
    assert_close(F.sparsity_rate(1 - rates, where=where), 0.6, rtol=1e-3)


def test_bad_input_of_token_targets():
    scores = jnp.ones((2, 3))
    for mean in (-0.01, 1.01, math.nan, np.array([0.5, 2.0])):
        with pytest.raises(ValueError, match=r"mean must be in \[0, 1\]"):
            F.token_targets(scores, mean)
    for temperature in (0, -1.0, math.nan):
        with pytest.raises(ValueError, match="temperature must be above 0"):
            F.token_targets(scores, 0.5, temperature=temperature)
    with pytest.raises(ValueError, match=r"mean must broadcast to shape \(2,\), got shape \(3,\)"):
        F.token_targets(scores, jnp.ones(3))
    with pytest.raises(ValueError, match=r"temperature must broadcast to shape \(3,\)"):
        F.token_targets(scores, 0.5, temperature=jnp.ones(2), axis=0)
    with pytest.raises(ValueError, match=r"where must broadcast to shape \(2, 3\)"):
        F.token_targets(scores, 0.5, where=jnp.ones(2, bool))
    with pytest.raises(TypeError, match="where must be boolean"):
        F.token_targets(scores, 0.5, where=jnp.ones(3))
    with pytest.raises(ValueError, match="axis 2 is out of bounds"):
        F.token_targets(scores, 0.5, axis=2)
    with pytest.raises(ValueError, match="axis -1 is out of bounds"):
        F.token_targets(jnp.array(1.0), 0.5)
    with pytest.raises(TypeError, match="mean is a schedule"):
        F.token_targets(scores, lambda step: 0.5)


# Gathering what is computed.


def gathered_by_hand(x, scores, capacity, where):
    """A loop over examples: the values, the positions, and which of the slots are in use."""
    values, positions, used = [], [], []
    for row, score, exists in zip(x, scores, where, strict=True):
        known = [-np.inf if np.isnan(s) else s for s in score]
        keys = (np.where(exists, key, 0) for key in (np.negative(known), np.isnan(score)))
        ranks = zip(~exists, *keys, range(len(row)), strict=True)
        chosen = sorted(i for *_, i in sorted(ranks)[:capacity])
        values.append([row[i] * exists[i] for i in chosen])
        positions.append(chosen)
        used.append([exists[i] for i in chosen])
    return np.array(values), np.array(positions), np.array(used)


SCORES = np.array(
    [[0.5, 2.0, -1.0, 2.0, 0.0], [np.nan, 1.0, -np.inf, np.inf, 1.0], [0.0, 0.0, 0.0, 0.0, 0.0]]
)
EXISTS = np.array([[1, 1, 0, 1, 1], [1, 0, 1, 0, 0], [1, 1, 1, 1, 1]], bool)
X = lattice(0, 3, 5, 2)


@pytest.mark.parametrize("capacity", [1, 3, 5])
@pytest.mark.parametrize("exists", [None, EXISTS])
def test_gathered_positions_are_those_of_a_loop(capacity, exists, x64):
    where = np.ones_like(EXISTS) if exists is None else exists
    values, positions, used = gathered_by_hand(X, SCORES, capacity, where)
    actual, active = F.gather_active(X, SCORES, capacity, where=exists)
    np.testing.assert_array_equal(actual, values)
    np.testing.assert_array_equal(active.indices, positions)
    np.testing.assert_array_equal(active.mask, used)


@pytest.mark.parametrize("capacity", [1, 3, 5])
@pytest.mark.parametrize("gate", [None, lattice(3, 3, 5)])
def test_scattered_values_are_those_of_a_loop(capacity, gate, x64):
    _, positions, used = gathered_by_hand(X, SCORES, capacity, EXISTS)
    values, like = lattice(1, 3, capacity, 2), lattice(2, 3, 5, 2)
    g = np.ones((3, 5)) if gate is None else gate

    def by_hand(values, like, g):
        result = like.copy()
        for b, j in np.argwhere(used):
            i = positions[b, j]
            result[b, i] = like[b, i] + g[b, i] * (values[b, j] - like[b, i])
        return result

    active = F.Active(jnp.asarray(positions), jnp.asarray(used))
    assert_close(
        F.scatter_active(values, active, like, gate=gate), by_hand(values, like, g), rtol=1e-14
    )
    weights = lattice(4, 3, 5, 2)

    def loss(values, like, g):
        gate_or_none = None if gate is None else g
        return jnp.sum(weights * F.scatter_active(values, active, like, gate=gate_or_none) ** 2)

    slopes = jax.grad(loss, (0, 1, 2))(*map(jnp.asarray, (values, like, g)))
    for i, slope in enumerate(slopes if gate is not None else slopes[:2]):

        def along(x, i=i):
            parts = [values, like, g]
            parts[i] = x
            return (weights * by_hand(*parts) ** 2).sum()

        assert_close(slope, gradient(along, (values, like, g)[i]), rtol=1e-6, atol=1e-8)


def test_gathering_and_scattering_derivatives_agree_forwards():
    active = F.gather_active(X, SCORES, 3, where=EXISTS)[1]

    def there_and_back(x, gate):
        values, _ = F.gather_active(x, SCORES, 3, where=EXISTS)
        return F.scatter_active(jnp.sin(values), active, x, gate=gate)

    point = jnp.asarray(X, jnp.float32), jnp.asarray(lattice(3, 3, 5), jnp.float32)
    jax.test_util.check_grads(there_and_back, point, order=2, modes=["fwd", "rev"], atol=2e-2)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_gates_of_0_and_1_are_exact(dtype):
    """However far values are from what they are put beside."""
    like = jnp.array([256, 6e4 if dtype == jnp.float16 else 1e8, -6e4, 1], dtype)
    values, gate = jnp.array([0.5, 1, 6e4, 3], dtype), jnp.array([1.0, 1, 1, 0])
    active = F.Active(jnp.arange(4), jnp.ones(4, bool))
    actual = F.scatter_active(values, active, like, gate=gate)
    assert actual.dtype == dtype
    assert jnp.array_equal(actual, jnp.where(gate == 1, values, like))


def test_gates_mix_what_is_floating():
    x, scores = jnp.arange(4), jnp.ones(4)
    values, active = F.gather_active(x, scores, 2)
    with pytest.raises(TypeError, match="with a gate values must be floating, got int32"):
        F.scatter_active(values, active, x, gate=scores)


def test_what_does_not_exist_passes_nothing_on():
    """Neither values of empty slots nor their derivatives, whatever is made of them."""
    x = jnp.where(EXISTS[..., None], X, jnp.nan)

    def loss(x, gate):
        values, active = F.gather_active(x, SCORES, 4, where=EXISTS)
        return jnp.nansum(F.scatter_active(values / values, active, jnp.zeros_like(x), gate=gate))

    value, slopes = jax.value_and_grad(loss, (0, 1))(x, jnp.ones(EXISTS.shape))
    assert float(value) == 2 * min(4, 4) + 2 * 2 + 2 * 4
    assert jnp.all(jnp.isfinite(slopes[1]))
    assert not jnp.any(slopes[0][~EXISTS])


def test_gathering_takes_any_axes_and_dtypes():
    scores = jnp.array([1.0, 3.0, 2.0])
    for x in (jnp.arange(3), jnp.array([True, False, True]), jnp.ones((3, 2, 2), jnp.bfloat16)):
        values, active = F.gather_active(x, scores, 2)
        assert values.dtype == x.dtype
        assert jnp.array_equal(values, x[1:])
        back = F.scatter_active(values, active, x)
        assert back.dtype == x.dtype
        assert jnp.array_equal(back, x)
    half = F.scatter_active(values, active, x, gate=scores)
    assert half.dtype == jnp.bfloat16


@pytest.mark.parametrize("devices", [1, 4, 8])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_gathering_on_a_sharded_batch(devices, kind):
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(kind,), devices=jax.devices()[:devices])
    x, scores = lattice(0, 8, 6, 3), lattice(1, 8, 6)
    sharding = jax.sharding.NamedSharding(mesh, P("data"))

    def there_and_back(x, scores):
        values, active = F.gather_active(x, scores, 2)
        return F.scatter_active(values**2, active, x, gate=scores)

    def slopes(x, scores):
        return jax.grad(lambda *inputs: jnp.sum(jnp.sin(there_and_back(*inputs))), (0, 1))(
            x, scores
        )

    inputs = [jnp.asarray(a, jnp.float32) for a in (x, scores)]
    placed = [jax.device_put(a, sharding) for a in inputs]
    compiled = jax.jit(slopes).lower(*placed).compile()
    assert not any(name in compiled.as_text() for name in ("all-gather", "all-to-all"))
    with jax.set_mesh(mesh):
        for actual, desired in zip(compiled(*placed), slopes(*inputs), strict=True):
            assert_close(actual, desired, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            (X, SCORES, 0),
            ValueError,
            "capacity must be from 1 to the number of positions, 5, got 0",
        ),
        (
            (X, SCORES, 6),
            ValueError,
            "capacity must be from 1 to the number of positions, 5, got 6",
        ),
        ((X, SCORES, 2.5), TypeError, "capacity must be of type int, got 2.5"),
        ((X, SCORES[:, :4], 2), ValueError, r"x must start with the shape \(3, 4\), got \(3, 5, 2"),
        ((X, 1.0, 1), ValueError, "scores needs positions on its last axis"),
    ],
)
def test_what_cannot_be_gathered(arguments, error, message):
    with pytest.raises(error, match=message):
        F.gather_active(*arguments)


def test_masks_that_do_not_fit():
    with pytest.raises(TypeError, match="where must be boolean, got float"):
        F.gather_active(X, SCORES, 2, where=np.float32(EXISTS))
    with pytest.raises(ValueError, match="scores and where must have the same shape"):
        F.gather_active(X, SCORES, 2, where=EXISTS[0])
    values, active = F.gather_active(X, SCORES, 2)
    for like, message in (
        (X[:2], r"like must start with the shape \(3, "),
        (X[..., 0], r"got \(3, 2, 2\) and \(3, 5\)"),
        (X[:, :1], r"got \(3, 2, 2\) and \(3, 1, 2\)"),
    ):
        with pytest.raises(ValueError, match=message):
            F.scatter_active(values, active, like)
    with pytest.raises(ValueError, match=r"values must start with the shape \(3, 2\), got \(3, 1"):
        F.scatter_active(values[:, :1], active, X)
    with pytest.raises(ValueError, match=r"gate must have the shape \(3, 5\), got \(5,\)"):
        F.scatter_active(values, active, X, gate=SCORES[0])
    with pytest.raises(TypeError, match=r"active must be a pj\.Active"):
        F.scatter_active(values, tuple(active), X)
