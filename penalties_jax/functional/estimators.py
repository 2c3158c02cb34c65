"""Estimates of a KL divergence from the log-probabilities of sampled tokens."""

import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Real

from penalties_jax.functional.checks import (
    POSITIVE,
    check_same_shape,
    public,
    standard_promotion,
)
from penalties_jax.functional.divergences.formulas import expm1_minus
from penalties_jax.functional.reduction import AxisName, Reduction, evaluate

__all__ = ["kl_estimate"]

Estimator = Literal["k1", "k2", "k3"]
EstimateGradient = Literal["own", "kl"]


@public
def kl_estimate(
    log_p: Real[ArrayLike, "..."],
    log_q: Real[ArrayLike, "..."],
    *,
    estimator: Estimator = "k3",
    gradient: EstimateGradient = "own",
    log_ratio_clip: ArrayLike | None = None,
    importance: Real[ArrayLike, "..."] | None = None,
    reduction: Reduction = "mean",
    where: Bool[ArrayLike, "..."] | None = None,
    axis_name: AxisName | None = None,
) -> Float[Array, "..."]:
    r"""Per-token estimates of KL(P||Q), in nats, for tokens sampled from P.

    With $r = \log q(\text{token}) - \log p(\text{token})$:

    - k1 = $-r$ is unbiased, noisy, and can be negative;
    - k2 = $r^2 / 2$ is biased, with low variance;
    - k3 = $e^r - 1 - r$ is at least 0, and unbiased where P covers Q.

    Their own gradients, with respect to P at fixed sampled tokens, are another matter: in
    expectation that of k2 alone is the gradient of KL(P||Q), that of k1 is 0, and that of k3 is the
    gradient of KL(Q||P). With gradient="kl" each keeps its value and has the gradient of KL(P||Q)
    in expectation: $-r$ in $\log p$, which is that of k2, and -1 in $\log q$.

    Tokens that another policy than P sampled, an older one or a faster one, are off policy, and all
    this is off. `importance`, the log-probabilities that their sampler gave them, makes it right:
    values are multiplied by the ratio $w = p / p_\text{sampler}$, which gradient="own"
    differentiates, and gradient="kl" does not: it is $-w r$.

    An example: bias ± standard deviation of one token's value, in units of the divergence, and of
    its gradient in the logits of P, in units of the length of the divergence's. Tokens 0 to 7 have
    probabilities proportional to $e^{-i/2}$ in P, $e^{-i/4}$ in Q, and $e^{-i/3}$ for the sampler
    off policy. A bias of 0 is exact in expectation, here and elsewhere.

    | | gradient | importance | value, on policy | its gradient | value, off policy | its gradient |
    | --- | --- | --- | --- | --- | --- | --- |
    | k1 | "own" | | 0 ± 4.07 | 1.00 ± 5.49 | -1.33 ± 4.82 | 1.71 ± 5.72 |
    | k2 | "own" | | -0.11 ± 1.24 | 0 ± 2.24 | 0.18 ± 1.74 | 0.31 ± 2.85 |
    | k3 | "own" | | 0 ± 1.90 | 0.22 ± 3.45 | 0.48 ± 2.73 | 0.78 ± 4.78 |
    | k1 | "kl" | | 0 ± 4.07 | 0 ± 2.24 | -1.33 ± 4.82 | 0.31 ± 2.85 |
    | k2 | "kl" | | -0.11 ± 1.24 | 0 ± 2.24 | 0.18 ± 1.74 | 0.31 ± 2.85 |
    | k3 | "kl" | | 0 ± 1.90 | 0 ± 2.24 | 0.48 ± 2.73 | 0.31 ± 2.85 |
    | k1 | "own" | given | 0 ± 4.07 | 0 ± 5.73 | 0 ± 3.91 | 0 ± 6.17 |
    | k2 | "own" | given | -0.11 ± 1.24 | 0.17 ± 1.72 | -0.11 ± 0.82 | 0.17 ± 1.78 |
    | k3 | "own" | given | 0 ± 1.90 | 0 ± 2.24 | 0 ± 1.19 | 0 ± 1.90 |
    | k1 | "kl" | given | 0 ± 4.07 | 0 ± 2.24 | 0 ± 3.91 | 0 ± 1.90 |
    | k2 | "kl" | given | -0.11 ± 1.24 | 0 ± 2.24 | -0.11 ± 0.82 | 0 ± 1.90 |
    | k3 | "kl" | given | 0 ± 1.90 | 0 ± 2.24 | 0 ± 1.19 | 0 ± 1.90 |

    Args:
        log_p: Log-probabilities of the sampled tokens under P, of shape [...].
        log_q: Log-probabilities of the same tokens under Q.
        estimator: "k1", "k2" or "k3".
        gradient: "own", or "kl" for that of KL(P||Q).
        log_ratio_clip: The largest |r|, above 0: r is clamped to it in the value, and in the factor
            $r$ of the gradient "kl"; what r alone gives the gradient "own" is 0 beyond it. Without
            it k3 is infinite from an r of 89 on. It is a bias where it acts.
        importance: Log-probabilities of the same tokens under the policy that sampled them; None if
            that is P. A token that P excludes then counts as 0.
        reduction: "mean" or "sum" over the tokens, or "none".
        where, axis_name: As in `pj.kl_divergence`; so are result and errors.

    Raises:
        ValueError: If the shapes differ, or `log_ratio_clip` is a plain number that is not above 0.

    References:
        Schulman (2020), Approximating KL divergence.

    Examples:
        >>> log_p, log_q = jnp.log(jnp.array([0.5, 0.2])), jnp.log(jnp.array([0.25, 0.4]))
        >>> round(float(pj.kl_estimate(log_p, log_q)), 4)
        0.25
        >>> slopes = jax.grad(pj.kl_estimate)(log_p, log_q, gradient="kl", reduction="sum")
        >>> [round(float(slope), 4) for slope in slopes]
        [0.6931, -0.6931]
    """
    check_same_shape(log_p=log_p, log_q=log_q)
    inputs = (log_p, log_q)
    if importance is not None:
        check_same_shape(log_p=log_p, importance=importance)
        inputs = (*inputs, importance)
    if log_ratio_clip is not None:
        POSITIVE.check(log_ratio_clip=log_ratio_clip)
    parameters = {"log_ratio_clip": log_ratio_clip}
    formula = _Estimate(estimator, gradient)
    return evaluate(formula, inputs, parameters, reduction, where, axis_name)


class _Estimate(NamedTuple):
    """The estimate of each token; found again by its options."""

    estimator: Estimator
    gradient: EstimateGradient

    def __call__(self, log_p, log_q, importance=None, log_ratio_clip=None):
        # A token that neither has is none.
        ratio = jnp.where(jnp.isneginf(log_p) & jnp.isneginf(log_q), 0, log_q - log_p)
        if log_ratio_clip is not None:
            inside = jnp.abs(ratio) <= log_ratio_clip
            ratio = jnp.where(inside, ratio, log_ratio_clip * jnp.sign(ratio))
        if importance is None:
            weight, value = 1.0, _FORMULAS[self.estimator](ratio)
        else:
            # What P excludes has weight 0 and no ratio.
            excluded = jnp.isneginf(log_p)
            ratio = jnp.where(excluded, 0, ratio)
            log_weight = jnp.where(excluded, log_p, log_p - importance)
            value, weight = _weighted(self.estimator, ratio, log_weight)
        if self.gradient == "own":
            return value
        value, weight = lax.stop_gradient((value, weight))
        return _with_gradient_of_kl(value, log_p, log_q, ratio, weight)


def _k1(ratio):
    return -ratio


def _k2(ratio):
    return jnp.square(ratio) / 2


_FORMULAS = {"k1": _k1, "k2": _k2, "k3": expm1_minus}


def _weighted(estimator, ratio, log_weight):
    """The estimate times the weight, which overflows only where that does; and the weight."""
    largest = float(jnp.finfo(ratio.dtype).max)
    most = math.log(largest / 2)
    root = jnp.exp(jnp.minimum(log_weight / 2, most))
    weight = jnp.minimum(root * root, largest)
    if estimator == "k2":
        return _k2(root * ratio), weight
    # Where q is 0 the value is infinite, and its derivative through p is 0.
    infinite = jnp.isneginf(ratio)
    ratio = jnp.where(infinite, 0, ratio)
    if estimator == "k1":
        value = _times_square(root, -ratio)
    else:
        # The product with the exponential is q over the sampler's probability.
        product = jnp.exp(jnp.minimum(log_weight + jnp.maximum(ratio, 0.5), most))
        far = product - _times_square(root, 1 + jnp.maximum(ratio, 0.5))
        far = jnp.where(log_weight + ratio > most, jnp.inf, far)
        near = _times_square(root, expm1_minus(jnp.minimum(ratio, 2)))
        value = jnp.where(ratio > 1, far, near)
    return jnp.where(infinite & (root > 0), jnp.inf, value), weight


def _times_square(root, x):
    return (root * x) * root


@jax.custom_jvp
def _with_gradient_of_kl(value, log_p, log_q, ratio, weight):
    """The value, with what has in expectation the gradient of KL(P||Q) in P and in Q."""
    return value


@_with_gradient_of_kl.defjvp
@standard_promotion()
def _(primals, tangents):
    value, _, _, ratio, weight = primals
    _, by_p, by_q, _, _ = tangents
    return value, -weight * (ratio * by_p + by_q)
