"""Estimates of KL from sampled tokens: exact values, exact expectations, declared gradients."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

import penalties_jax.functional as F  # noqa: N812
from tests import oracles
from tests.catalogue import CASES, choices_of, every, only
from tests.oracles import as_float32, assert_close, lattice

ESTIMATES = only(lambda case: case.function is F.kl_estimate, CASES)
ESTIMATORS = choices_of(F.kl_estimate)["estimator"]
LOG_RATIOS = np.array([0.0, 1e-30, 1e-6, 1e-4, 1e-2, 0.3, 0.99, 1.01, 3.0, 20.0, 80.0, 100.0, 1e30])


@every(ESTIMATES)
def test_value_and_gradient_at_the_edges(case):
    """Small ratios keep their digits; infinite ones give infinity, never NaN."""
    log_q = as_float32([*LOG_RATIOS, *-LOG_RATIOS])
    log_p = np.zeros_like(log_q)

    @jax.jit
    def everything(log_p, log_q):
        slopes = jax.grad(lambda *x: case.raw(*x, reduction="sum"), (0, 1))
        return (
            case.raw(log_p, log_q, reduction="none"),
            slopes(log_p, log_q),
            jax.jvp(lambda x: slopes(log_p, x)[1], (log_q,), (jnp.ones_like(log_q),))[1],
        )

    values, slopes, second = everything(log_p.astype(np.float32), log_q.astype(np.float32))
    desired = oracles.precisely(case.formula, log_p, log_q)
    assert_close(values, as_float32(desired), rtol=1e-5, atol=1e-37)
    for argument, slope in enumerate(slopes):
        desired = oracles.slope(case.formula, log_p, log_q, argument=argument)
        assert_close(slope, as_float32(desired), rtol=2e-5, atol=1e-37)
    with np.errstate(over="ignore"):
        curvature = {"k1": np.zeros_like(log_q), "k2": np.ones_like(log_q), "k3": np.exp(log_q)}
    desired = as_float32(curvature[case.settings["estimator"]])
    assert_close(second, desired, rtol=2e-5, atol=1e-7)


def test_a_token_that_q_excludes():
    log_p, log_q = jnp.asarray([-1.0]), jnp.asarray([-math.inf])
    for estimator in ESTIMATORS:
        assert F.kl_estimate(log_p, log_q, estimator=estimator) == math.inf


def test_a_token_that_p_excludes():
    log_p, log_q = jnp.asarray([-math.inf]), jnp.asarray([-1.0])
    for estimator, value in {"k1": -math.inf, "k2": math.inf, "k3": math.inf}.items():
        assert F.kl_estimate(log_p, log_q, estimator=estimator) == value


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_exact_expectations(estimator, x64):
    """Over every token with its probability: k1 and k3 are unbiased, k2 is r^2/2 on average."""
    logits = lattice(0, 7)
    log_p, log_q = special.log_softmax(logits), special.log_softmax(lattice(1, 7))
    p, q = np.exp(log_p), np.exp(log_q)
    kl, back = oracles.kl(log_p, log_q), oracles.kl(log_q, log_p)

    def expected(logits):
        tokens = F.kl_estimate(
            jax.nn.log_softmax(logits), log_q, estimator=estimator, reduction="none"
        )
        return (p * tokens).sum()

    value, slope = jax.value_and_grad(expected)(logits)
    desired = {"k1": kl, "k2": (p * (log_q - log_p) ** 2).sum() / 2, "k3": kl}
    assert_close(value, desired[estimator], rtol=1e-12)
    # At fixed tokens the gradient of k1 is 0, of k2 that of KL(P||Q), of k3 that of KL(Q||P).
    slopes = {"k1": 0 * p, "k2": p * (log_p - log_q - kl), "k3": p - q}
    assert_close(slope, slopes[estimator], rtol=1e-10, atol=1e-14)
    assert back != pytest.approx(kl)


def test_nonnegative_and_near_each_other():
    """Near P = Q in float32: k2 and k3 agree to the next order, and are never negative."""
    random = np.random.default_rng(0)
    log_p = random.normal(-8, 2, 20_000).astype(np.float32)
    log_q = (log_p + 1e-4 * random.normal(size=log_p.shape)).astype(np.float32)
    k2, k3 = (
        np.asarray(F.kl_estimate(log_p, log_q, estimator=name, reduction="none"))
        for name in ("k2", "k3")
    )
    assert np.all(k2 >= 0)
    assert np.all(k3 >= 0)
    assert_close(k3, k2, rtol=1e-3)
    ratio = log_q.astype(float) - log_p
    assert_close(k3, np.expm1(ratio) - ratio, rtol=1e-4, atol=1e-15)


def test_padding_may_hold_anything():
    log_p = jnp.asarray([-1.0, -math.inf, math.nan, -2.0, math.inf])
    log_q = jnp.asarray([-1.5, -math.inf, 0.0, math.nan, math.inf])
    where = jnp.asarray([True, False, False, False, False])
    for case in ESTIMATES.values():
        value, slopes = jax.value_and_grad(partial(case.raw, where=where), (0, 1))(log_p, log_q)
        assert_close(value, case.formula(np.array(-1.0), np.array(-1.5)), rtol=1e-6)
        assert all(np.all(np.asarray(slope)[1:] == 0) for slope in slopes)
        assert all(np.isfinite(slope).all() for slope in slopes)


def test_default_is_k3():
    log_p, log_q = jnp.asarray([-1.0, -3.0]), jnp.asarray([-1.5, -1.0])
    assert F.kl_estimate(log_p, log_q) == F.kl_estimate(log_p, log_q, estimator="k3")


def test_an_unknown_estimator_lists_the_valid_ones():
    with pytest.raises(ValueError, match=r"(?s)(?=.*k4)(?=.*k1)(?=.*k2)(?=.*k3)"):
        F.kl_estimate(jnp.zeros(2), jnp.zeros(2), estimator="k4")
