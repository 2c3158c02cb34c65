"""Walking the rows of large arrays in blocks that stay in cache, on one device or many."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jax.sharding import AxisType
from jaxtyping import Array, Float, PyTree

# Of float32 values of one array in a block: within the cache of one core on a CPU; enough to fill
# a GPU.
BLOCK_BYTES = {"cpu": 2**20, "gpu": 2**26}


def map_rows(
    function: Callable[..., Any], arrays: Sequence[Float[Array, "..."]], block_size: int | None
) -> Any:
    """Applies `function` to blocks of rows, one after another.

    Nothing is gathered where rows are sharded: each device walks its own.

    Args:
        function: Takes blocks [*rows, C] of the arrays, and returns a pytree of arrays [*rows].
        arrays: Arrays [*positions, C], whose axes may also have size 1.
        block_size: The number of rows in a block; None chooses it from the shape and the backend.

    Returns:
        What `function` would return for the whole arrays.
    """

    @custom_vmap
    def run(arrays):
        return _walk(function, arrays, block_size)

    @run.def_vmap
    def _(size, batched, arrays):
        # A mapped axis is one more axis of positions, which blocks may cut.
        arrays = [x if own else x[None] for x, own in zip(arrays, batched[0], strict=True)]
        result = map_rows(function, arrays, block_size)
        mapped = jax.tree.map(lambda x: x.shape[0] == size, result)
        return jax.tree.map(lambda x, own: x if own else x[0], result, mapped), mapped

    return run(list(arrays))


def rows_in_block(classes: int, block_size: int | None) -> int:
    """The number of rows in a block: `block_size`, or as many as stay in cache."""
    if block_size is not None:
        return block_size
    return max(1, BLOCK_BYTES.get(jax.default_backend(), 2**26) // (4 * max(classes, 1)))


def vary_alike(tree: PyTree[Array]) -> PyTree[Array]:
    """Lets all arrays vary over the mapped axes over which any of them does.

    So that inside `shard_map` their cotangents may differ between members, and are summed where
    the array itself did not.
    """

    def varies(x):
        return jax.typeof(x).manual_axis_type.varying

    axes = frozenset().union(*map(varies, jax.tree.leaves(tree)))
    return jax.tree.map(lambda x: lax.pcast(x, tuple(sorted(axes - varies(x))), to="varying"), tree)


def _walk(function, arrays, block_size):
    positions = jnp.broadcast_shapes(*(x.shape[:-1] for x in arrays))
    parts = [_shards(arrays, axis, size) for axis, size in enumerate(positions)]
    local = [n // g for n, g in zip(positions, parts, strict=True)]
    budget = rows_in_block(max(x.shape[-1] for x in arrays), block_size)
    sizes = []
    for n in reversed(local):
        sizes.insert(0, max(1, min(n, budget)))
        budget //= sizes[0]
    counts = [-(-n // size) for n, size in zip(local, sizes, strict=True)]
    if math.prod(counts) <= 1:
        return function(*arrays)

    # One axis at a time: that is how shardings follow a reshape.
    def split(x):
        for axis in reversed(range(len(positions))):
            rows = (parts[axis], local[axis]) if x.shape[axis] > 1 else (1, 1)
            x = x.reshape(*x.shape[:axis], *rows, *x.shape[axis + 1 :])
        return x

    def join(x):
        for axis in range(len(positions)):
            rows = x.shape[axis] * x.shape[axis + 1]
            x = x.reshape(*x.shape[:axis], rows, *x.shape[axis + 2 :])
        return x

    def starts(index):
        found = []
        for count, size in zip(reversed(counts), reversed(sizes), strict=True):
            found.insert(0, (index % count) * size)
            index = index // count
        return found

    def block(x, index):
        """The rows of a block, [shards x rows, ...]; past the end, the last there are."""
        for axis, (start, size) in enumerate(zip(starts(index), sizes, strict=True)):
            if x.shape[2 * axis + 1] > 1:
                x = lax.dynamic_slice_in_dim(x, start, size, 2 * axis + 1)
        return x

    def whole(part):
        """The first block, padded to all rows: so it has the type of the rest, on any device."""
        room = [
            (0, 0 if shared else extra, 0)
            for shared, n, size in zip(same(part), local, sizes, strict=True)
            for extra in (0, n - size)
        ]
        return lax.pad(part, jnp.zeros((), part.dtype), room)

    def put(result, part, index):
        offsets = [
            i
            for shared, start in zip(same(part), starts(index), strict=True)
            for i in (0, 0 if shared else start)
        ]
        return lax.dynamic_update_slice(result, part, offsets)

    def same(part):
        """Along which axes of positions a result is the same, as all its arrays have size 1."""
        shapes = zip(part.shape[::2], part.shape[1::2], parts, sizes, strict=True)
        return [(g, rows) == (1, 1) != (own, size) for g, rows, own, size in shapes]

    split_arrays = [split(x) for x in arrays]

    def run(index):
        return function(*(block(x, index) for x in split_arrays))

    def step(index, result):
        return jax.tree.map(lambda all, part: put(all, part, index), result, run(index))

    result = lax.fori_loop(1, math.prod(counts), step, jax.tree.map(whole, run(0)))
    return jax.tree.map(join, result)


def _shards(arrays, axis, size):
    """Into how many parts an axis of positions may be cut across devices."""
    meshes = [(x, jax.typeof(x).sharding.mesh) for x in arrays if x.shape[axis] > 1]
    if all(mesh.empty for _, mesh in meshes):
        return math.gcd(size, jax.device_count())
    x, mesh = next((x, mesh) for x, mesh in meshes if not mesh.empty)
    entry = jax.typeof(x).sharding.spec[axis]
    names = () if entry is None else entry if isinstance(entry, tuple) else (entry,)
    known = math.prod(mesh.shape[name] for name in names)
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    unknown = math.prod(mesh.shape[name] for name, kind in kinds if kind == AxisType.Auto)
    return known * math.gcd(size // known, unknown)
