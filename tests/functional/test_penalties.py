"""Penalties at their edges: values, first and second derivatives against the table of formulas."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

import penalties_jax.functional as F  # noqa: N812
from tests.functional.cases import quick_jit
from tests.oracles import as_float32, assert_close, gradient, lattice


class Penalty(NamedTuple):
    """A penalty with fixed hyperparameters, its formula, its derivative, and both at infinity."""

    call: Callable[..., Any]
    value: Callable[[np.ndarray], np.ndarray]
    slope: Callable[[np.ndarray], np.ndarray]
    at_infinity: tuple[float, float]


def square(center=0.0, clip=math.inf):
    return Penalty(
        partial(F.l2, center=center, clip=None if clip == math.inf else clip),
        lambda x: np.minimum(np.abs(x - center), clip) ** 2,
        lambda x: np.where(np.abs(x - center) < clip, 2 * (x - center), 0.0),
        (clip**2, math.inf if clip == math.inf else 0.0),
    )


def elastic_net(l1_ratio):
    return Penalty(
        partial(F.elastic_net, l1_ratio=l1_ratio),
        lambda x: l1_ratio * np.abs(x) + (1 - l1_ratio) * x * x,
        lambda x: l1_ratio * np.sign(x) + 2 * (1 - l1_ratio) * x,
        (math.inf, math.inf if l1_ratio < 1 else 1.0),
    )


def power(p, eps):
    return Penalty(
        partial(F.lp, p=p, eps=eps),
        lambda x: (np.abs(x) + eps) ** p,
        lambda x: np.where(
            x == 0, 0.0, p * np.where(x == 0, 1.0, np.abs(x) + eps) ** (p - 1) * np.sign(x)
        ),
        (math.inf, 0.0 if p < 1 else 1.0 if p == 1 else math.inf),
    )


def log_sum(eps):
    return Penalty(
        partial(F.log_sum, eps=eps),
        lambda x: np.log1p(np.abs(x) / eps),
        lambda x: np.sign(x) / (eps + np.abs(x)),
        (math.inf, 0.0),
    )


def geman_mcclure(gamma, normalize_at_one=False):
    scale = 1 + gamma**2 if normalize_at_one else 1.0
    return Penalty(
        partial(F.smooth_l0, gamma=gamma, normalize_at_one=normalize_at_one),
        lambda x: scale * x**2 / (x**2 + gamma**2),
        lambda x: scale * 2 * x * gamma**2 / (x**2 + gamma**2) ** 2,
        (scale, 0.0),
    )


def huber(delta):
    return Penalty(
        partial(F.huber, delta=delta),
        lambda x: np.where(np.abs(x) <= delta, x * x / 2, delta * (np.abs(x) - delta / 2)),
        lambda x: np.clip(x, -delta, delta),
        (math.inf, delta),
    )


POWERS = [(0.4, 0.0), (0.4, 1e-12), (1.0, 0.0), (1.0, 1e-12), (2.0, 0.0), (2.0, 0.1)]
PENALTIES = {
    "l1": Penalty(F.l1, np.abs, np.sign, (math.inf, 1.0)),
    "l2": square(),
    "l2-center": square(center=0.25),
    "l2-clip": square(clip=0.7),
    "l2-center-clip": square(center=-0.5, clip=1.3),
    **{f"elastic_net-{ratio}": elastic_net(ratio) for ratio in (0.0, 0.25, 1.0)},
    **{f"lp-{p}-{eps}": power(p, eps) for p, eps in POWERS},
    **{f"log_sum-{eps}": log_sum(eps) for eps in (1.0, 1e-12)},
    **{f"smooth_l0-{gamma}": geman_mcclure(gamma) for gamma in (1.0, 1e-3, 1e-12)},
    "smooth_l0-normalised-2": geman_mcclure(2.0, normalize_at_one=True),
    "smooth_l0-normalised": geman_mcclure(0.1, normalize_at_one=True),
    **{f"huber-{delta}": huber(delta) for delta in (1.0, 0.1)},
}
every_penalty = pytest.mark.parametrize("penalty", PENALTIES.values(), ids=PENALTIES.keys())

MAGNITUDES = [1e-30, 1e-12, 1e-5, 0.1, 1.0, 1e3, 1e12, 1e18, 1e30]
EDGES = np.array([0.0, -0.0, *MAGNITUDES, *(-x for x in MAGNITUDES), *lattice(1, 20)])


def values_and_slopes(call):
    """The unreduced values and the gradient of their sum, in one program."""
    return jax.jit(
        lambda x: (call(x, reduction="none"), jax.grad(lambda x: call(x, reduction="sum"))(x))
    )


@every_penalty
def test_value_and_gradient_at_the_edges(penalty):
    """In float32, where 1e30 squared overflows and 1e-30 squared underflows."""
    x = as_float32(EDGES)
    calls = values_and_slopes(penalty.call)
    values, slopes = calls(jnp.asarray(x, jnp.float32))
    tiny = 1e-32  # products below about 1e-38 are flushed to zero
    assert_close(values, as_float32(penalty.value(x)), rtol=1e-5, atol=tiny)
    assert_close(slopes, as_float32(penalty.slope(x)), rtol=1e-5, atol=tiny)
    if penalty.slope(np.zeros(1)) == 0:
        assert np.all(np.asarray(slopes)[:2] == 0)
    value, slope = penalty.at_infinity
    values, slopes = calls(jnp.asarray([math.inf, -math.inf], jnp.float32))
    assert_close(values, value)
    assert_close(slopes, [slope, -slope])


@every_penalty
def test_second_derivatives(penalty, x64):
    """Differences of the gradient in float64, and never NaN at the edges."""
    slopes = jax.grad(lambda x: penalty.call(x, reduction="sum"))

    @quick_jit
    def everything(x):
        def slope_sum(x):
            return slopes(x).sum()

        return (
            (slopes(x + 1e-6) - slopes(x - 1e-6)) / 2e-6,
            jax.jvp(slopes, (x,), (jnp.ones_like(x),))[1],
            jax.grad(slope_sum)(x),
        )

    differences, forward, reverse = map(np.asarray, everything(EDGES))
    smooth = slice(-20, None)
    assert_close(forward[smooth], differences[smooth], rtol=1e-5, atol=1e-6)
    assert_close(reverse[smooth], differences[smooth], rtol=1e-5, atol=1e-6)
    # Far below eps the curvature of L_p alone is beyond float64: no NaN is what can be asked.
    assert not np.isnan(forward).any()
    assert not np.isnan(reverse).any()
    assert np.isfinite(forward[:2]).all()
    assert np.isfinite(reverse[:2]).all()


@pytest.mark.parametrize("name", ["l1", "lp-0.4-0.0", "lp-1.0-1e-12", "huber-1.0"])
def test_forward_mode_at_zero(name):
    x = jnp.asarray([0.0, -0.0])
    assert jax.jvp(PENALTIES[name].call, (x,), (jnp.ones(2),))[1] == 0


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


HYPERPARAMETERS = {
    "weights": (lambda x, h: F.l1(x, weights=h), lambda x, h: h * np.abs(x)),
    "center": (lambda x, h: F.l2(x, center=h), lambda x, h: (x - h) ** 2),
    "clip": (lambda x, h: F.l2(x, clip=h), lambda x, h: np.minimum(np.abs(x), h) ** 2),
    "l1_ratio": (
        lambda x, h: F.elastic_net(x, l1_ratio=h),
        lambda x, h: h * np.abs(x) + (1 - h) * x**2,
    ),
    "p": (lambda x, h: F.lp(x, h), lambda x, h: (np.abs(x) + 1e-12) ** h),
    "p-eps-0": (lambda x, h: F.lp(x, h, eps=0.0), lambda x, h: np.abs(x) ** h),
    "eps": (lambda x, h: F.lp(x, 0.4, eps=h), lambda x, h: (np.abs(x) + h) ** 0.4),
    "log_sum": (F.log_sum, lambda x, h: np.log1p(np.abs(x) / h)),
    "gamma": (F.smooth_l0, lambda x, h: x**2 / (x**2 + h**2)),
    "gamma-normalised": (
        partial(F.smooth_l0, normalize_at_one=True),
        lambda x, h: (1 + h**2) * x**2 / (x**2 + h**2),
    ),
    "delta": (
        F.huber,
        lambda x, h: np.where(np.abs(x) < h, x**2 / 2, h * (np.abs(x) - h / 2)),
    ),
}


@pytest.mark.parametrize(("call", "formula"), HYPERPARAMETERS.values(), ids=HYPERPARAMETERS.keys())
def test_gradient_with_respect_to_hyperparameters(call, formula, x64):
    """A number, or an array of one for each entry."""
    x = np.array([0.0, *lattice(5, 8), 1.0, 20.0])
    hyperparameters = np.linspace(0.31, 0.77, len(x))

    @quick_jit
    def everything(hyperparameters, number):
        return (
            jax.value_and_grad(call, 1)(x, hyperparameters),
            jax.grad(call, 1)(x, number),
            jax.vmap(call, (None, 0))(x, hyperparameters),
        )

    (value, slopes), slope, swept = everything(hyperparameters, 0.53)
    assert_close(value, formula(x, hyperparameters).sum(), rtol=1e-12)
    desired = gradient(lambda h: formula(x, h).sum(), hyperparameters)
    assert_close(slopes, desired, rtol=1e-6, atol=1e-9)
    desired = gradient(lambda h: formula(x, h).sum(), np.array(0.53))
    assert_close(slope, desired, rtol=1e-6, atol=1e-9)
    assert_close(swept, [formula(x, h).sum() for h in hyperparameters], rtol=1e-12)


MASKED_ARRAYS = {
    "l1 weights": lambda x, h, **options: F.l1(x, weights=h, **options),
    "l2 center": lambda x, h, **options: F.l2(x, center=h, **options),
    "l2 clip": lambda x, h, **options: F.l2(x, clip=h, **options),
    "l2 weights": lambda x, h, **options: F.l2(x, center="mean", weights=h, **options),
    "elastic_net": lambda x, h, **options: F.elastic_net(x, l1_ratio=h, **options),
    "lp p": F.lp,
    "lp eps": lambda x, h, **options: F.lp(x, 0.4, eps=h, **options),
    "log_sum": F.log_sum,
    "smooth_l0": F.smooth_l0,
    "huber": F.huber,
    "group_lasso weights": lambda x, h, where, **options: F.group_lasso(
        jnp.stack([x, x], -1), axis=-1, weights=h, where=where[..., None], **options
    ),
}


@pytest.mark.parametrize("call", MASKED_ARRAYS.values(), ids=MASKED_ARRAYS.keys())
def test_masked_hyperparameters_may_hold_anything(call):
    x = np.asarray(lattice(6, 6), np.float32)
    hyperparameters = np.linspace(0.25, 0.75, 6, dtype=np.float32)
    mask = np.array([True, False, True, True, False, True])
    mean = quick_jit(
        jax.value_and_grad(lambda x, h: call(x, h, where=mask, reduction="mean"), (0, 1))
    )
    clean, clean_slopes = mean(x, hyperparameters)
    for poison in np.float32([math.nan, math.inf, -math.inf, 0.0]):
        hidden = np.where(mask, hyperparameters, poison)
        for hidden_x in (x, np.where(mask, x, poison)):
            value, slopes = mean(hidden_x, hidden)
            assert_close(value, clean, rtol=1e-6)
            for slope, clean_slope in zip(slopes, clean_slopes, strict=True):
                assert_close(slope, clean_slope, rtol=1e-6)
                assert np.all(np.asarray(slope)[~mask] == 0)


def test_masked_entries_do_not_reach_a_shared_hyperparameter():
    """The gradient in one number for all entries, with NaN in masked values and weights."""
    x, weights = np.float32([0.3, -0.6, math.nan]), np.float32([1.0, 2.0, math.nan])
    mask = np.array([True, True, False])
    for function in (F.smooth_l0, F.huber, F.lp):
        slope = jax.grad(lambda h, function=function: function(x, h, weights=weights, where=mask))
        clean = jax.grad(lambda h, function=function: function(x[:2], h, weights=weights[:2]))
        assert_close(slope(0.5), clean(0.5), rtol=1e-6)


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


ERRORS = {
    "center": (lambda x: F.l2(x, center="median"), "(?=.*median)(?=.*mean)"),
    "center shape": (lambda x: F.l2(x, center=np.ones(4)), r"(?=.*\(4,\))(?=.*\(2, 3\))"),
    "gamma shape": (lambda x: F.smooth_l0(x, np.ones(4)), r"(?=.*\(4,\))(?=.*\(2, 3\))"),
    "p shape": (lambda x: F.lp(x, np.ones((3, 2))), r"(?=.*\(3, 2\))(?=.*\(2, 3\))"),
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


FLOATS = st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False)


@pytest.mark.parametrize(
    "name",
    ["l1", "l2-center-clip", "lp-0.4-1e-12", "smooth_l0-0.001", "elastic_net-0.25", "huber-0.1"],
)
def test_properties(name):
    """Nonnegative, bounded slopes of the right sign, and even around the centre."""
    penalty = PENALTIES[name]
    center = -0.5 if "center" in name else 0.0
    calls = values_and_slopes(penalty.call)

    @hypothesis.settings(deadline=None, max_examples=25, derandomize=True, database=None)
    @hypothesis.given(st.lists(FLOATS, min_size=6, max_size=6))
    def holds(entries):
        offset = np.asarray(entries, np.float32)
        values, slopes = calls(np.float32(center) + offset)
        mirrored, mirrored_slopes = calls(np.float32(center) - offset)
        assert np.all(values >= 0)
        assert not np.isnan(slopes).any()
        assert np.all(np.asarray(slopes) * np.sign(np.float32(center) + offset - center) >= 0)
        if center == 0:
            assert_close(mirrored, values, rtol=1e-6)
            assert_close(mirrored_slopes, -np.asarray(slopes), rtol=1e-6)

    holds()
