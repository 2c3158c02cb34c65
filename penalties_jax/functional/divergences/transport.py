"""Optimal transport between distributions over classes that have an order."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Real

from penalties_jax.functional.checks import ASCENDING, ORDER, check_same_shape, public
from penalties_jax.functional.derivatives import absolute, elementwise_derivatives
from penalties_jax.functional.divergences.formulas import log_ratio
from penalties_jax.functional.reduction import AxisName, Reduction, evaluate

__all__ = ["wasserstein"]


@public
def wasserstein(
    log_p: Real[ArrayLike, "..."],
    log_q: Real[ArrayLike, "..."],
    *,
    positions: Real[ArrayLike, "..."] | None = None,
    order: float = 1,
    axis: int = -1,
    reduction: Reduction = "mean",
    where: Bool[ArrayLike, "..."] | None = None,
    axis_name: AxisName | None = None,
) -> Float[Array, "..."]:
    r"""The Wasserstein distance between distributions over ordered classes, to the power of r.

    The least $\sum_{ij} \pi_{ij} |x_i - x_j|^r$ of all ways $\pi$ to move P to Q: for $r = 1$ it is
    $\sum_c |F_c - G_c| (x_{c+1} - x_c)$ with the cumulative probabilities F and G, and for any r
    $\int_0^1 |F^{-1}(u) - G^{-1}(u)|^r du$. No root is taken, so that no gradient is infinite.

    The derivative through `log_p` is that of normalised distributions, for which a constant times
    p is nothing. It is piecewise constant times p, and 0 where P = Q.

    Args:
        log_p: Natural log-probabilities, normalised along `axis`, shape [..., C, ...].
        log_q: The same of the other distribution.
        positions: Where the classes are, ascending: an array [C], or one that broadcasts to
            `log_p` with its class axis moved to the end. None is 0, 1, ..., C - 1.
        order: The $r$, a plain number of at least 1. Above 1 it sorts 2 C numbers a position.
        axis, reduction, where, axis_name: As in `pj.kl_divergence`; so are result and errors.

    References:
        Peyré & Cuturi (2019), Computational optimal transport, section 2.6.

    Examples:
        >>> log_p, log_q = jnp.log(jnp.array([1.0, 0.0, 0.0])), jnp.log(jnp.array([0.0, 0.5, 0.5]))
        >>> float(pj.wasserstein(log_p, log_q)), float(pj.wasserstein(log_p, log_q, order=2))
        (1.5, 2.5)
    """
    check_same_shape(log_p=log_p, log_q=log_q)
    ORDER.check(order=order)
    ASCENDING.check(positions=positions)
    log_p, log_q = (jnp.moveaxis(x, axis, -1) for x in (log_p, log_q))
    classes = log_p.shape[-1]
    if positions is None:
        positions = np.arange(classes)
    elif jnp.shape(positions)[-1:] != (classes,):
        raise ValueError(
            f"positions must have the {classes} classes of log_p on their last axis, "
            f"got shape {jnp.shape(positions)}"
        )
    parameters = {"positions": positions}
    options = {"reduction": reduction, "where": where, "axis_name": axis_name}
    return evaluate(_Transport(order), (log_p, log_q), parameters, axis=-1, **options)


class _Transport(NamedTuple):
    """The cost of moving P to Q."""

    order: float

    def __call__(self, log_p, log_q, positions, axis):
        del axis  # the last
        ahead = jnp.cumsum(_difference(log_p, log_q), -1)[..., :-1]
        if self.order == 1:
            return jnp.sum(absolute(ahead) * jnp.diff(positions), -1)
        # Mass moves from class i to class j between two neighbours in the order of all cumulative
        # probabilities. Equal ones stay in the order of their classes: F_0, G_0, F_1, G_1, ...
        both = jnp.stack([jnp.cumsum(jnp.exp(x), -1)[..., :-1] for x in (log_p, log_q)], -1)
        both = both.reshape(*both.shape[:-2], 2 * both.shape[-2])
        rank = jnp.argsort(lax.stop_gradient(both), -1)
        lower, upper = rank[..., :-1], rank[..., 1:]
        i = jnp.cumsum(lower % 2 == 0, -1)
        j = jnp.cumsum(lower % 2, -1)
        # The difference of near numbers has lost its digits, which their own sum has kept.
        mass = jnp.where(
            lower // 2 == upper // 2,
            _take(absolute(ahead), lower // 2),
            _take(both, upper) - _take(both, lower),
        )
        distance = absolute(_take(positions, i) - _take(positions, j))
        apart = distance > 0
        cost = jnp.where(apart, jnp.where(apart, distance, 1) ** self.order, 0)
        return jnp.sum(mass * cost, -1)


def _take(values, indices):
    values = jnp.broadcast_to(values, (*indices.shape[:-1], values.shape[-1]))
    return jnp.take_along_axis(values, indices, -1)


@elementwise_derivatives(lambda log_p, log_q: jnp.exp(log_p), lambda log_p, log_q: -jnp.exp(log_q))
def _difference(log_p, log_q):
    """P - q, with the digits that the difference of near probabilities has lost."""
    ratio = log_ratio(log_p, log_q)
    return jnp.sign(ratio) * jnp.exp(jnp.maximum(log_p, log_q)) * jnp.expm1(-jnp.abs(ratio))
