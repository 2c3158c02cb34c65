"""A feed-forward of several experts, which computes those that each position uses."""

import math
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import NamedSharding, reshard
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from penalties_jax.functional.reduction import vary_alike

# How many more rows may be computed than there are, as a share of them.
SPARE = 1 / 6

_anew = partial(jax.checkpoint, prevent_cse=False)


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


@jax.jit
def routed(
    x: Float[Array, "*positions d"],
    routes: Int[Array, "*positions k"],
    up: Float[Array, "experts d hidden"],
    down: Float[Array, "experts hidden d"],
) -> Float[Array, "*positions k d"]:
    """What each position's experts make of it, by matrix products of the positions they have.

    Positions are sorted by expert. However they are spread, few more are computed than there are:
    `lax.ragged_dot` would compute every expert for every row, where a platform has no kernel for
    it. On accelerators that is one product of blocks of rows. On a CPU many small products take
    longer than few large ones, and a branch costs nothing: there it is one for each expert.
    """
    # Members of a mapped axis may take other branches: where their gradients are summed is no place
    # for one.
    x, routes, up, down = vary_alike((x, routes, up, down))
    shape, features = routes.shape, up.shape[1]
    expert = routes.reshape(-1)
    order = jnp.argsort(expert)
    load = jnp.bincount(expert, length=len(up))
    rows = x.reshape(math.prod(shape[:-1]), features)[order // shape[-1]]
    outputs = lax.platform_dependent(rows, load, up, down, cpu=_by_expert, default=_by_block)
    options = {"unique_indices": True, "mode": "promise_in_bounds"}
    return jnp.zeros_like(outputs).at[order].set(outputs, **options).reshape(*shape, features)


def _by_block(rows, load, up, down):
    """Cuts the rows of each expert into blocks; what a block has beyond them is not looked at."""
    count, experts = len(rows), len(up)
    size = 1 + int(SPARE * count / experts)
    blocks_of = -(-load // size)
    ends = jnp.cumsum(blocks_of)
    block = jnp.arange((count + experts * (size - 1)) // size)
    expert = jnp.searchsorted(ends, block, side="right").clip(max=experts - 1)
    # How much further than its row each expert's slot is.
    shift = size * (ends - blocks_of) - (jnp.cumsum(load) - load)
    taken = (size * block - shift[expert])[:, None] + jnp.arange(size)
    inputs = rows.at[taken].get(mode="fill", fill_value=0)
    hidden = jax.nn.gelu(jnp.einsum("bsd,bdh->bsh", inputs, up[expert]))
    outputs = jnp.einsum("bsh,bhd->bsd", hidden, down[expert])
    row = jnp.arange(count)
    slot = row + shift[jnp.searchsorted(jnp.cumsum(load), row, side="right")]
    return outputs.reshape(len(block) * size, rows.shape[-1])[slot]


def _by_expert(rows, load, up, down):
    """Computes for each expert the least of `_sizes` that has room for its rows.

    What that has beyond them, the experts after it write over.
    """
    sizes = _sizes(len(rows), len(up))
    chosen = _shared(jnp.searchsorted(jnp.array(sizes), load))
    rows = jnp.concatenate([rows, jnp.zeros_like(rows)])

    def product(size, outputs, up, down, start):
        if size == 0:
            return outputs
        own = lax.dynamic_slice_in_dim(rows, start, size)
        return lax.dynamic_update_slice_in_dim(outputs, jax.nn.gelu(own @ up) @ down, start, 0)

    # What a branch keeps for its derivative, all of them would have to fill: each computes it anew.
    branches = [_anew(partial(product, size)) for size in sizes]

    def step(outputs, expert):
        chosen, *operands = expert
        return lax.switch(chosen, branches, outputs, *operands), None

    start = jnp.cumsum(load) - load
    outputs = jnp.zeros_like(rows, jnp.result_type(rows, up, down))
    outputs, _ = lax.scan(_anew(step), outputs, (chosen, up, down, start))
    return outputs[: len(rows) // 2]


def _sizes(count: int, experts: int) -> list[int]:
    """Numbers of rows, from 0 to `count`, each at most by `SPARE` more than the one before.

    Or by that share of the rows of an expert, if all have equally many.
    """
    sizes, least = [0], math.ceil(SPARE * count / experts)
    while sizes[-1] < count:
        sizes.append(min(count, sizes[-1] + max(least, int(SPARE * sizes[-1]))))
    return sizes


@jax.custom_batching.custom_vmap
def _shared(chosen: Int[Array, " experts"]) -> Int[Array, " experts"]:
    """Under vmap the largest of all members: if each had its own, they would take every branch."""
    return chosen


@_shared.def_vmap
def _(_axis_size, _in_batched, chosen):
    return _shared(jnp.max(chosen, 0)), False
