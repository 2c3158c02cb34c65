"""Estimates of a KL divergence from the log-probabilities of sampled tokens."""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from penalties_jax.functional.divergences import expm1_minus
from penalties_jax.functional.reduction import (
    AxisName,
    Reduction,
    check_choice,
    check_reduction,
    check_same_shape,
    evaluate,
)

Estimator = Literal["k1", "k2", "k3"]
ESTIMATORS = ("k1", "k2", "k3")


def kl_estimate(
    log_p: Float[Array, "..."],
    log_q: Float[Array, "..."],
    *,
    estimator: Estimator = "k3",
    reduction: Reduction = "mean",
    where: Bool[Array, "..."] | None = None,
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
        where: Mask of tokens that broadcasts to their shape.
        axis_name: Mapped axes over whose members to sum or average.

    Returns:
        A scalar, or an array of the shape of `log_p` for "none".

    Raises:
        ValueError: If the shapes differ, `where` does not broadcast to them, or an option is
            unknown.

    References:
        Schulman (2020), Approximating KL divergence.

    Examples:
        >>> import jax.numpy as jnp
        >>> import penalties_jax as pj
        >>> log_p, log_q = jnp.log(jnp.array([0.5, 0.2])), jnp.log(jnp.array([0.25, 0.4]))
        >>> round(float(pj.kl_estimate(log_p, log_q, estimator="k2")), 4)
        0.2402
        >>> round(float(pj.kl_estimate(log_p, log_q, estimator="k3")), 4)
        0.25
    """
    check_choice("estimator", estimator, ESTIMATORS)
    check_reduction(reduction)
    check_same_shape(log_p=log_p, log_q=log_q)
    return evaluate(
        _FORMULAS[estimator],
        (log_p, log_q),
        {},
        weights=1.0,
        where=where,
        reduction=reduction,
        axis_name=axis_name,
    )


def _k1(log_p, log_q):
    return log_p - log_q


def _k2(log_p, log_q):
    return jnp.square(log_q - log_p) / 2


def _k3(log_p, log_q):
    return expm1_minus(log_q - log_p)


_FORMULAS = {"k1": _k1, "k2": _k2, "k3": _k3}
