"""A feed-forward of several experts, which computes those that each position uses."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

# How much more rows the blocks may have than there are, as a share of them.
SPARE = 1 / 6


class MixtureOfExperts(nnx.Module):
    """A feed-forward of several experts, of which each position computes its `top_k`."""

    def __init__(self, features: int, experts: int, top_k: int, dropout: float, *, rngs: nnx.Rngs):
        if experts < 1:
            raise ValueError(f"num_experts must be at least 1, got {experts}")
        if not 1 <= top_k <= experts:
            raise ValueError(f"top_k must be from 1 to num_experts, {experts}, got {top_k}")
        if not 0 <= dropout <= 1:
            raise ValueError(f"dropout must be from 0 to 1, got {dropout}")
        initializer = nnx.initializers.lecun_normal(batch_axis=(0,))
        self.top_k = top_k
        self.router = nnx.Linear(features, experts, use_bias=False, rngs=rngs)
        shape = (experts, features, 4 * features)
        self.up = nnx.Param(initializer(rngs.params(), shape, jnp.float32))
        shape = (experts, 4 * features, features)
        self.down = nnx.Param(initializer(rngs.params(), shape, jnp.float32))
        self.dropout = nnx.Dropout(dropout, rngs=rngs)

    def __call__(self, x: Float[Array, "*positions d"]) -> Float[Array, "*positions d"]:
        """The weighted sum of the preferred experts."""
        probabilities = jax.nn.softmax(self.router(x))
        _, preferred = lax.top_k(lax.stop_gradient(probabilities), self.top_k)
        weights = jnp.take_along_axis(probabilities, preferred, -1)
        if self.top_k > 1:
            weights = weights / jnp.sum(weights, -1, keepdims=True)
        count = math.prod(x.shape[:-1])
        rows, routes = x.reshape(count, x.shape[-1]), preferred.reshape(count, self.top_k)
        outputs = routed(rows, routes, self.up[...], self.down[...])
        mixed = jnp.einsum(
            "...k,...kd->...d", weights, outputs.reshape(*weights.shape, x.shape[-1])
        )
        return self.dropout(mixed)


def routed(
    rows: Float[Array, "n d"],
    routes: Int[Array, "n k"],
    up: Float[Array, "experts d hidden"],
    down: Float[Array, "experts hidden d"],
) -> Float[Array, "n k d"]:
    """What each row's experts make of it, by matrix products of the rows that they have.

    Rows are sorted by expert and cut into blocks of one expert each. However they are spread, the
    blocks have at most `SPARE` more rows than there are: `lax.ragged_dot` would compute every
    expert for every row, where a platform has no kernel for it.
    """
    experts, count = len(up), routes.size
    size = 1 + int(SPARE * count / experts)
    blocks = (count + experts * (size - 1)) // size
    expert = routes.reshape(-1)
    order = jnp.argsort(expert)
    rows_of = jnp.bincount(expert, length=experts)
    ends = jnp.cumsum(-(-rows_of // size))
    first_slot = size * ends - size * -(-rows_of // size)
    first_row = jnp.cumsum(rows_of) - rows_of
    of_sorted = expert[order]
    slot_of_sorted = jnp.arange(count) + (first_slot - first_row)[of_sorted]
    options = {"unique_indices": True, "mode": "promise_in_bounds"}
    slot = jnp.zeros(count, int).at[order].set(slot_of_sorted, **options)
    # A slot that stays empty reads beyond the rows, which is 0.
    source = jnp.full(blocks * size, len(rows)).at[slot].set(jnp.arange(count) // routes.shape[1])
    block_expert = jnp.searchsorted(ends, jnp.arange(blocks), side="right").clip(max=experts - 1)

    inputs = rows.at[source].get(mode="fill", fill_value=0).reshape(blocks, size, rows.shape[1])
    hidden = jax.nn.gelu(jnp.einsum("bsd,bdh->bsh", inputs, up[block_expert]))
    outputs = jnp.einsum("bsh,bhd->bsd", hidden, down[block_expert])
    return outputs.reshape(blocks * size, rows.shape[1])[slot].reshape(*routes.shape, rows.shape[1])
