"""Logits that are bounded smoothly, as the heads of some models have them."""

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from penalties_jax.functional.derivatives import elementwise_derivatives

# None, a number, or one of these for each of two heads.
Softcap = ArrayLike | tuple[ArrayLike | None, ArrayLike | None] | None


def slope(z: Float[Array, "..."], cap: Float[Array, "..."]) -> Float[Array, "..."]:
    """The derivative 1 / cosh(z / cap)^2, also where tanh is rounded to 1."""
    e = jnp.exp(-2 * jnp.abs(z / cap))
    return 4 * e / jnp.square(1 + e)


def slope_of_cap(z: Float[Array, "..."], cap: Float[Array, "..."]) -> Float[Array, "..."]:
    """The derivative in the cap; 0 at an excluded class."""
    u = z / cap
    # From |u| = 50 on the slope is below what a tanh of 1 is rounded by.
    return jnp.where(jnp.isneginf(z), 0, jnp.tanh(u) - jnp.clip(u, -50, 50) * slope(z, cap))


@elementwise_derivatives(slope, slope_of_cap)
def capped(z: Float[Array, "..."], cap: Float[Array, "..."]) -> Float[Array, "..."]:
    """Cap tanh(z / cap); z for a cap of infinity, and of a class that is excluded by -inf."""
    return jnp.where(jnp.isneginf(z) | jnp.isinf(cap), z, cap * jnp.tanh(z / cap))
