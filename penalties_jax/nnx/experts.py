"""A feed-forward of several experts, which computes those that each position uses."""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import NamedSharding, reshard
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

# How much more rows the blocks may have than there are, as a share of them.
SPARE = 1 / 8


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
        outputs = by_shard(routed, (x, preferred), (self.up[...], self.down[...]))
        return self.dropout(jnp.einsum("...k,...kd->...d", weights, outputs))


def by_shard(
    function: Callable[..., Array], rows: Sequence[Array], shared: Sequence[Array]
) -> Array:
    """A function of rows that needs all of them at once, of each shard by itself.

    That is where the shards are known, on a mesh with Explicit axes.
    """
    sharding = jax.typeof(rows[0]).sharding
    if not any(sharding.spec):
        return function(*rows, *shared)
    cut = P(*sharding.spec[:-1], None)
    specs = (cut,) * len(rows) + (P(),) * len(shared)
    pairs = zip((*rows, *shared), specs, strict=True)
    placed = [reshard(x, NamedSharding(sharding.mesh, spec)) for x, spec in pairs]
    return jax.shard_map(function, mesh=sharding.mesh, in_specs=specs, out_specs=cut)(*placed)


def routed(
    x: Float[Array, "*positions d"],
    routes: Int[Array, "*positions k"],
    up: Float[Array, "experts d hidden"],
    down: Float[Array, "experts hidden d"],
) -> Float[Array, "*positions k d"]:
    """What each position's experts make of it, by matrix products of the positions they have.

    Positions are sorted by expert and cut into blocks of one expert each. However they are spread,
    the blocks have at most `SPARE` more rows than there are: `lax.ragged_dot` would compute every
    expert for every row, where a platform has no kernel for it.
    """
    shape, (experts, features) = routes.shape, up.shape[:2]
    rows = x.reshape(math.prod(shape[:-1]), features)
    count = routes.size
    size = 1 + int(SPARE * count / experts)
    blocks = (count + experts * (size - 1)) // size
    expert = routes.reshape(-1)
    order = jnp.argsort(expert)
    rows_of = jnp.bincount(expert, length=experts)
    blocks_of = -(-rows_of // size)
    ends = jnp.cumsum(blocks_of)
    empty_before = size * (ends - blocks_of) - (jnp.cumsum(rows_of) - rows_of)
    options = {"unique_indices": True, "mode": "promise_in_bounds"}
    sorted_slots = jnp.arange(count) + empty_before[expert[order]]
    slot = jnp.zeros(count, int).at[order].set(sorted_slots, **options)
    # A slot that stays empty reads beyond the rows, which is 0.
    source = jnp.full(blocks * size, len(rows))
    source = source.at[slot].set(jnp.arange(count) // shape[-1], **options)
    block_expert = jnp.searchsorted(ends, jnp.arange(blocks), side="right").clip(max=experts - 1)

    inputs = rows.at[source].get(mode="fill", fill_value=0).reshape(blocks, size, features)
    # XLA's CPU backend gathers the experts of all blocks entry by entry, which takes longer than
    # the products; one at a time they are slices.
    outputs = lax.platform_dependent(
        inputs, block_expert, up, down, cpu=_one_by_one, default=_all_at_once
    )
    return outputs.reshape(blocks * size, features)[slot].reshape(*shape, features)


def _all_at_once(blocks, expert, up, down):
    hidden = jax.nn.gelu(jnp.einsum("bsd,bdh->bsh", blocks, up[expert]))
    return jnp.einsum("bsh,bhd->bsd", hidden, down[expert])


def _one_by_one(blocks, expert, up, down):
    def step(_, block):
        x, e = block
        return None, jax.nn.gelu(x @ up[e]) @ down[e]

    return lax.scan(step, None, (blocks, expert))[1]
