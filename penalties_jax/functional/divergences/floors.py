"""A floor under log q: what the reference calls impossible then costs a finite amount.

Q' is max(q, e^floor) over its sum, Z, on the classes of which P or Q has something. A derivative
through log q' passes to log q where that is above the floor, and not elsewhere.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from penalties_jax.functional.derivatives import with_value
from penalties_jax.functional.divergences.formulas import Distributions


def floored_log_probabilities(
    log_p: Float[Array, "..."], log_q: Float[Array, "..."], floor: Float[Array, "..."], axis: int
) -> Float[Array, "..."]:
    """Log q'."""
    x = Distributions((jnp.exp(log_p), jnp.exp(log_q)), (log_p, log_q))
    raised = jnp.where(_nowhere(log_p, log_q), -jnp.inf, jnp.where(above(x, floor), log_q, floor))
    total = jnp.sum(jnp.exp(raised), axis, keepdims=True)
    log_z = jnp.log1p(jnp.sum(excess(x, floor), axis, keepdims=True))
    # The sum is rounded also where nothing rises; its derivative holds off the simplex too.
    return raised - with_value(jnp.log(jnp.where(total > 0, total, 1)), log_z)


def excess(x: Distributions, floor: Float[Array, "..."]) -> Float[Array, "..."]:
    """By how much each class rises; their sum is Z - 1, without cancellation."""
    rises = ~(above(x, floor) | _nowhere(*x.logs))
    return jnp.where(rises, jnp.exp(floor) - x.probabilities[1], 0)


def floored(
    x: Distributions, floor: Float[Array, "..."], excess: Float[Array, "..."]
) -> Distributions:
    """P and Q', of P and Q and the sum of the `excess`."""
    (p, q), (log_p, log_q) = x.probabilities, x.logs
    stays, nowhere, log_z = above(x, floor), _nowhere(log_p, log_q), jnp.log1p(excess)
    raised = jnp.where(nowhere, 0, jnp.where(stays, q, jnp.exp(floor)))
    log_raised = jnp.where(nowhere, -jnp.inf, jnp.where(stays, log_q, floor))
    ratio = jnp.where(nowhere, 0, jnp.where(stays, x.ratio, floor - log_p) - log_z)
    return x._replace(
        probabilities=(p, raised / (1 + excess)),
        logs=(log_p, log_raised - log_z),
        ratio=ratio,
        under=x,
    )


def above(x: Distributions, floor: Float[Array, "..."]) -> Bool[Array, "..."]:
    """Where log q is above the floor."""
    return x.logs[1] > floor


def _nowhere(log_p, log_q):
    return jnp.isneginf(log_p) & jnp.isneginf(log_q)
