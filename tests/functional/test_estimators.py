"""Estimates of KL from sampled tokens: exact values, exact expectations, declared gradients."""

import functools
import inspect
import itertools
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
from tests.programs import quick_jit

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
    clipped = abs(log_q) > case.settings.get("log_ratio_clip", math.inf)
    desired = np.where(clipped, 0, as_float32(curvature[case.settings["estimator"]]))
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


# What they are in expectation: exactly, over all tokens of a vocabulary of 8.

EIGHT = np.arange(8)
LOGITS_P, LOG_Q, LOG_SAMPLER = -EIGHT / 2, *map(special.log_softmax, (-EIGHT / 4, -EIGHT / 3))
# Of each: whether the value, and the gradient, are those of KL(P||Q) in expectation.
EXACT = {
    # (estimator, gradient, has importance): on policy, off policy
    ("k1", "own", False): ((True, False), (False, False)),
    ("k2", "own", False): ((False, True), (False, False)),
    ("k3", "own", False): ((True, False), (False, False)),
    ("k1", "kl", False): ((True, True), (False, False)),
    ("k2", "kl", False): ((False, True), (False, False)),
    ("k3", "kl", False): ((True, True), (False, False)),
    ("k1", "own", True): ((True, True), (True, True)),
    ("k2", "own", True): ((False, False), (False, False)),
    ("k3", "own", True): ((True, True), (True, True)),
    ("k1", "kl", True): ((True, True), (True, True)),
    ("k2", "kl", True): ((False, True), (False, True)),
    ("k3", "kl", True): ((True, True), (True, True)),
}


@functools.cache
def program(estimator, gradient, weighted):
    """The estimates of all tokens, and their gradients in both logits."""

    def each(logits, logits_q, log_sampler):
        return F.kl_estimate(
            jax.nn.log_softmax(logits),
            jax.nn.log_softmax(logits_q),
            estimator=estimator,
            gradient=gradient,
            importance=log_sampler if weighted else None,
            reduction="none",
        )

    return quick_jit(lambda *x: (each(*x)[:, None], *jax.jacrev(each, (0, 1))(*x)))


def moments(log_sampler, *options):
    """The mean and the standard deviation of an estimate, and of its gradients."""
    weights = np.exp(log_sampler)
    for rows in program(*options)(LOGITS_P, LOG_Q, log_sampler):
        mean = weights @ rows
        yield mean, np.sqrt(weights @ np.square(rows - mean).sum(1))


def kl_and_gradients():
    log_p = special.log_softmax(LOGITS_P)
    p, kl = np.exp(log_p), oracles.kl(log_p, LOG_Q)
    return kl, p * (log_p - LOG_Q - kl), np.exp(LOG_Q) - p


def test_there_is_every_estimate():
    gradients = choices_of(F.kl_estimate)["gradient"]
    assert {*EXACT} == {*itertools.product(ESTIMATORS, gradients, (False, True))}


@pytest.mark.parametrize("options", EXACT, ids=lambda x: "-".join(map(str, x)))
def test_what_is_exact_on_and_off_policy(options, x64):
    kl, slope, slope_q = kl_and_gradients()
    for log_sampler, exact in zip(
        (special.log_softmax(LOGITS_P), LOG_SAMPLER), EXACT[options], strict=True
    ):
        (value, _), (own, _), (by_q, _) = moments(log_sampler, *options)
        assert (np.allclose(value, kl, rtol=1e-12), np.allclose(own, slope, atol=1e-14)) == exact
        if options[1] == "kl" and exact[1]:
            assert_close(by_q, slope_q, atol=1e-14)


def test_the_table_of_biases_and_deviations(x64):
    """That of the docstring, in units of the divergence and of the length of its gradient."""
    kl, slope, _ = kl_and_gradients()
    units = [(kl, kl), (slope, np.linalg.norm(slope))]
    rows = []
    for estimator, gradient, weighted in EXACT:
        cells = [estimator, f'"{gradient}"', "given" if weighted else ""]
        for log_sampler in (special.log_softmax(LOGITS_P), LOG_SAMPLER):
            found = moments(log_sampler, estimator, gradient, weighted)
            for (mean, deviation), (exact, unit) in zip(found, units, strict=False):
                bias = np.linalg.norm(mean - exact) / unit
                bias = (mean - exact).item() / unit if exact is kl else bias
                bias = f"{bias:.2f}" if abs(bias) > 1e-9 else "0"
                cells.append(f"{bias} ± {deviation / unit:.2f}")
        rows.append(f"| {' | '.join(cells)} |".replace("|  |", "| |"))
    assert "\n".join(rows) in inspect.getdoc(F.kl_estimate)


# The gradient of KL, the clip, and importance, token by token.


@pytest.mark.parametrize("clip", [None, 1.5])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("gradient", ["own", "kl"])
def test_token_by_token(gradient, weighted, clip, x64):
    """Values against the formulas as they are written, own gradients against differences."""
    log_p, log_q, log_s = -(lattice(2, 3, 12) + 2.5)
    ratios = np.append(log_q - log_p, 0)
    assert clip is None or 0 < (abs(ratios) > clip).sum() < 12

    def value(p, q, s, estimator):
        r = q - p
        r = r if clip is None else np.clip(r, -clip, clip)
        formula = {"k1": -r, "k2": r**2 / 2, "k3": np.exp(r) - 1 - r}[estimator]
        return formula * (np.exp(p - s) if weighted else 1)

    def call(log_p, log_q, log_s, estimator, reduction):
        return F.kl_estimate(
            log_p,
            log_q,
            estimator=estimator,
            gradient=gradient,
            log_ratio_clip=clip,
            importance=log_s if weighted else None,
            reduction=reduction,
        )

    @quick_jit
    def everything(*inputs):
        slopes = jax.grad(call, (0, 1))
        return [(call(*inputs, name, "none"), slopes(*inputs, name, "sum")) for name in ESTIMATORS]

    found = everything(log_p, log_q, log_s)
    for estimator, (values, (by_p, by_q)) in zip(ESTIMATORS, found, strict=True):
        assert_close(values, value(log_p, log_q, log_s, estimator), rtol=1e-11)
        if gradient == "kl":
            r = log_q - log_p if clip is None else np.clip(log_q - log_p, -clip, clip)
            weight = np.exp(log_p - log_s) if weighted else np.ones(12)
            assert_close(by_p, -weight * r, rtol=1e-12)
            assert_close(by_q, -weight, rtol=1e-12)
        else:
            total = [
                oracles.gradient(lambda x, e=estimator: value(x, log_q, log_s, e).sum(), log_p),
                oracles.gradient(lambda x, e=estimator: value(log_p, x, log_s, e).sum(), log_q),
            ]
            assert_close(by_p, total[0], rtol=1e-8, atol=1e-8)
            assert_close(by_q, total[1], rtol=1e-8, atol=1e-8)


def test_a_clip_keeps_far_ratios_finite():
    """In float32, where e^99 is infinite; own gradients are 0 there, and 1 x ratio at the edge."""
    log_p, log_q = jnp.float32([-100.0, -1.0, -3.0, -1.0]), jnp.float32([-1.0, -100.0, -1.0, -1.5])
    assert F.kl_estimate(log_p, log_q) == math.inf
    for estimator in ESTIMATORS:
        call = partial(F.kl_estimate, estimator=estimator, log_ratio_clip=2.0, reduction="sum")
        value, slopes = jax.value_and_grad(call, (0, 1))(log_p, log_q)
        assert np.isfinite(value)
        for slope in slopes:
            assert np.all((np.asarray(slope) != 0) == [False, False, True, True])
    slope = jax.grad(partial(call, gradient="kl"))(log_p, log_q)
    assert_close(slope, [-2, 2, -2, 0.5])


@pytest.mark.parametrize("gradient", ["own", "kl"])
def test_off_policy_at_the_edges(gradient):
    """A ratio beyond all floats meets a weight below them; P may exclude what was sampled."""
    log_p, log_q = jnp.float32([-120.0, -math.inf, -1.0]), jnp.float32([-2.0, -2.0, -1.0])
    importance = jnp.float32([-1.0, -1.0, -1.0])
    call = partial(F.kl_estimate, gradient=gradient, importance=importance, reduction="none")
    values = call(log_p, log_q)
    assert_close(values, [math.exp(-1), 0, 0], rtol=1e-5)
    for estimator in ESTIMATORS:
        total = partial(call, estimator=estimator, reduction="sum")
        assert all(np.isfinite(slope).all() for slope in jax.grad(total, (0, 1))(log_p, log_q))


def test_bad_options_of_estimates():
    x = jnp.zeros(2)
    with pytest.raises(ValueError, match=r"gradient must be one of 'own', 'kl', got 'k2'"):
        F.kl_estimate(x, x, gradient="k2")
    with pytest.raises(ValueError, match=r"log_ratio_clip must be above 0, got 0.0"):
        F.kl_estimate(x, x, log_ratio_clip=0.0)
    with pytest.raises(ValueError, match=r"log_p and importance must have the same shape"):
        F.kl_estimate(x, x, importance=jnp.zeros((2, 2)))


def test_default_is_k3():
    log_p, log_q = jnp.asarray([-1.0, -3.0]), jnp.asarray([-1.5, -1.0])
    assert F.kl_estimate(log_p, log_q) == F.kl_estimate(log_p, log_q, estimator="k3")


def test_an_unknown_estimator_lists_the_valid_ones():
    with pytest.raises(ValueError, match=r"(?s)(?=.*k4)(?=.*k1)(?=.*k2)(?=.*k3)"):
        F.kl_estimate(jnp.zeros(2), jnp.zeros(2), estimator="k4")


INF = np.inf
# log p, log q and the sampler's, and what k1, k2 and k3 are.
EDGES = {
    "neither has it": (-INF, -INF, None, (0, 0, 0)),
    "a mask that is no infinity": (-1e30, -1.0, -1.0, (0, 0, 1)),
    "the reference excludes it": (-1.0, -INF, -1.0, (INF, INF, INF)),
    "equal, by a ratio beyond the range": (-1.0, -1.0, -95.0, (0, 0, 0)),
    "by a sampler that excludes it": (-1.0, -1.0, -INF, (0, 0, 0)),
    "beyond the range": (-100.0, -1.0, -200.0, (-INF, INF, INF)),
    "a product within it": (-19.5, -19.25, -108.5, (-0.25, 0.03125, np.expm1(0.25) - 0.25)),
}


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("gradient", ["own", "kl"])
@pytest.mark.parametrize(("log_p", "log_q", "sampler", "values"), EDGES.values(), ids=EDGES)
def test_at_the_edges_of_probabilities(log_p, log_q, sampler, values, estimator, gradient):
    importance = {} if sampler is None else {"importance": jnp.float32(sampler)}
    options = {"estimator": estimator, "gradient": gradient, **importance}
    estimate = partial(F.kl_estimate, **options)
    value, slopes = jax.value_and_grad(estimate, (0, 1))(jnp.float32(log_p), jnp.float32(log_q))
    weight = np.exp(log_p - sampler) if sampler and 80 < log_p - sampler < 100 else 1.0
    expected = values[("k1", "k2", "k3").index(estimator)]
    np.testing.assert_allclose(value, expected and expected * weight, rtol=1e-4)
    if sampler is None or log_p - sampler < 80:
        assert not np.isnan(slopes).any()
