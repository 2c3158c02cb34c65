"""Estimates of a KL divergence from the log-probabilities of sampled tokens."""

from typing import Literal

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Real

from penalties_jax.functional.checks import check_same_shape, public
from penalties_jax.functional.divergences.formulas import expm1_minus
from penalties_jax.functional.reduction import AxisName, Reduction, evaluate

__all__ = ["kl_estimate"]

Estimator = Literal["k1", "k2", "k3"]


@public
def kl_estimate(
    log_p: Real[ArrayLike, "..."],
    log_q: Real[ArrayLike, "..."],
    *,
    estimator: Estimator = "k3",
    reduction: Reduction = "mean",
    where: Bool[ArrayLike, "..."] | None = None,
    axis_name: AxisName | None = None,
) -> Float[Array, "..."]:
    r"""Per-token estimates of KL(P||Q), in nats, for tokens sampled from P.

    With $r = \log q(\text{token}) - \log p(\text{token})$:

    - k1 = $-r$ is unbiased, noisy, and can be negative;
    - k2 = $r^2 / 2$ is biased, with low variance;
    - k3 = $e^r - 1 - r$ is at least 0, and unbiased where P covers Q.

    As estimates they are to be read, not differentiated: at fixed sampled tokens only the gradient
    of k2 is in expectation that of KL(P||Q) with respect to P. That of k1 is 0 in expectation,
    and that of k3 is the gradient of KL(Q||P).

    Args:
        log_p: Log-probabilities of the sampled tokens under P, which they were sampled from, of
            shape [...].
        log_q: Log-probabilities of the same tokens under Q.
        estimator: "k1", "k2" or "k3".
        reduction: "mean" or "sum" over the tokens, or "none".
        where, axis_name: As in `pj.kl_divergence`; so are result and errors.

    References:
        Schulman (2020), Approximating KL divergence.

    Examples:
        >>> log_p, log_q = jnp.log(jnp.array([0.5, 0.2])), jnp.log(jnp.array([0.25, 0.4]))
        >>> round(float(pj.kl_estimate(log_p, log_q)), 4)
        0.25
    """
    check_same_shape(log_p=log_p, log_q=log_q)
    return evaluate(_FORMULAS[estimator], (log_p, log_q), {}, reduction, where, axis_name)


def _k1(log_p, log_q):
    return log_p - log_q


def _k2(log_p, log_q):
    return jnp.square(log_q - log_p) / 2


def _k3(log_p, log_q):
    return expm1_minus(log_q - log_p)


_FORMULAS = {"k1": _k1, "k2": _k2, "k3": _k3}
