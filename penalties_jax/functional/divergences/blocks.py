"""Walking the rows of large arrays in blocks, on one device or many."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jax.export import is_symbolic_dim
from jax.sharding import AxisType
from jaxtyping import Array, Bool, Int, PyTree, Shaped

from penalties_jax.functional.checks import Size
from penalties_jax.functional.derivatives import differentiated_as

# How many devices may hold the rows where a program does not tell: with more, the rows of a block
# that are neighbours, and read together, would be too few.
MOST_SHARDS = 64


def map_rows(
    function: Callable[..., PyTree[Array]],
    rows: PyTree[Shaped[Array, "..."]],
    block_size: int,
    shared: PyTree[Array] = (),
) -> PyTree[Array]:
    """Applies `function` to blocks of rows, one after another.

    Nothing is gathered where rows are sharded: each device walks its own.

    Args:
        function: Takes a block of `rows`, [*rows, n], and `shared`, and returns a pytree of arrays
            [*rows]. It closes over no array.
        rows: Arrays [*positions, n], each with its own n, whose axes may also have size 1.
        block_size: The number of rows in a block.
        shared: What every block is computed with.

    Returns:
        What `function` would return for the whole arrays.
    """

    def walk(rows, shared):
        return sum_rows(lambda block, fresh: (function(block, shared), ()), rows, block_size)[0]

    # JAX's own derivative of a custom_vmap calls its rule without end, and can't be transposed.
    undifferentiated = custom_vmap(walk)
    run = differentiated_as(walk, undifferentiated)

    @undifferentiated.def_vmap
    def _(size, batched, rows, shared):
        if any(jax.tree.leaves(batched[1])):
            axes = jax.tree.map(lambda own: 0 if own else None, tuple(batched))
            result = jax.vmap(walk, axes, axis_size=size)(rows, shared)
            return result, jax.tree.map(lambda _: True, result)
        # A mapped axis is one more axis of positions, which blocks may cut.
        rows = jax.tree.map(lambda x, own: x if own else x[None], rows, batched[0])
        result = map_rows(function, rows, block_size, shared)
        mapped = jax.tree.map(lambda x: x.shape[0] == size, result)
        return jax.tree.map(lambda x, own: x if own else x[0], result, mapped), mapped

    return run(rows, shared)


def sum_rows(
    function: Callable[..., tuple[PyTree[Array], PyTree[Array]]],
    rows: PyTree[Shaped[Array, "..."]],
    block_size: int,
) -> tuple[PyTree[Array], PyTree[Array]]:
    """As `map_rows`, and adds up what belongs to no row.

    Args:
        function: Takes a block of `rows` and `fresh`, [*rows], where a row was in no block before;
            returns what to keep of each row, [*rows, ...], and what to sum over blocks.
        rows: As of `map_rows`.
        block_size: The number of rows in a block.
    """
    grid = _grid(jax.tree.leaves(rows), block_size)
    if grid.length <= 1:
        return function(rows, jnp.ones(grid.positions, bool))
    # Traced once for the first block and for the others.
    traced = jax.jit(function, inline=True)
    split = jax.tree.map(grid.split, rows)

    # A function is given one axis for each axis of positions: two, XLA's TPU backend would copy.
    # Its CPU backend divides work between cores along the first, which should not have size 1.
    single = [i for i, (g, n) in enumerate(zip(grid.shards, grid.sizes, strict=True)) if g * n == 1]

    def run(index):
        block = jax.tree.map(lambda x: jnp.squeeze(grid.join(grid.block(x, index)), single), split)
        kept, sums = traced(block, jnp.squeeze(grid.join(grid.fresh(index)), single))
        return jax.tree.map(lambda x: jnp.expand_dims(x, single), kept), sums

    def step(index, carry):
        (kept, sums), (parts, terms) = carry, run(index)
        kept = jax.tree.map(partial(grid.put, index), like, kept, parts)
        return kept, jax.tree.map(jnp.add, sums, terms)

    kept, sums = run(0)
    # Whether a result is the same along an axis, a block with one row of it does not tell.
    like = kept
    if any(grid.positions[i] != 1 for i in single):
        fresh = jnp.ones(grid.positions, bool)
        like = jax.eval_shape(lambda rows: function(rows, fresh)[0], rows)
    kept = jax.tree.map(grid.pad, like, kept)
    kept, sums = lax.fori_loop(1, grid.length, step, (kept, sums))
    return jax.tree.map(grid.join, kept), sums


class Grid(NamedTuple):
    """How axes of positions are cut: across devices first, then into blocks.

    An axis of n positions becomes two, [shards, rows of a shard], and a block is a range of the
    second: whichever device holds a shard has its rows of every block.

    Attributes:
        positions: The axes before they are cut.
        shards: Into how many parts each may lie on devices.
        rows: The positions of a shard.
        sizes: Those of them in a block.
        counts: The number of blocks along each axis.
    """

    positions: tuple[Size, ...]
    shards: tuple[Size, ...]
    rows: tuple[Size, ...]
    sizes: tuple[Size, ...]
    counts: tuple[Size, ...]

    @property
    def length(self) -> Size:
        """The number of blocks."""
        return math.prod(self.counts)

    def split(self, x: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
        """Cuts each axis of positions, of all rows or of a block, in two; size 1 stays whole."""
        # One axis at a time: that is how shardings follow a reshape.
        for axis in reversed(range(len(self.positions))):
            parts = self.shards[axis] if x.shape[axis] != 1 else 1
            x = x.reshape(*x.shape[:axis], parts, x.shape[axis] // parts, *x.shape[axis + 1 :])
        return x

    def join(self, x: Array) -> Array:
        """The inverse of `split`."""
        for axis in range(len(self.positions)):
            x = x.reshape(*x.shape[:axis], x.shape[axis] * x.shape[axis + 1], *x.shape[axis + 2 :])
        return x

    def block(self, x: Shaped[Array, "..."], index: Int[Array, ""] | int) -> Shaped[Array, "..."]:
        """The rows of a block; past the end of an axis, the last that there are."""
        if jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize == 2:
            return _block_of_halves(self, x, jnp.asarray(index))
        return self.slice(x, index)

    def slice(self, x: Array, index: Int[Array, ""] | int) -> Array:
        """As `block`."""
        for axis, (start, size) in enumerate(zip(self._starts(index), self.sizes, strict=True)):
            if x.shape[2 * axis + 1] != 1:
                x = lax.dynamic_slice_in_dim(x, start, size, 2 * axis + 1)
        return x

    def fresh(self, index: Int[Array, ""] | int) -> Bool[Array, "..."]:
        """Which rows of a block are in no block before it."""
        result = jnp.ones((1,) * 2 * len(self.positions), bool)
        for axis, start in enumerate(self._starts(index)):
            last = self.rows[axis] - self.sizes[axis]
            row = jnp.minimum(start, last) + jnp.arange(self.sizes[axis]) >= start
            result &= jnp.expand_dims(row, [i for i in range(result.ndim) if i != 2 * axis + 1])
        block = [n for axis in zip(self.shards, self.sizes, strict=True) for n in axis]
        return jnp.broadcast_to(result, block)

    def pad(self, like: jax.Array | jax.ShapeDtypeStruct, part: Array) -> Array:
        """The first block with room for the others: an array like the whole result, in shards."""
        part = self.split(part)
        room = [(0, 0, 0)] * part.ndim
        for axis, shared in enumerate(self._shared(like)):
            room[2 * axis + 1] = (0, 0 if shared else self.rows[axis] - self.sizes[axis], 0)
        return lax.pad(part, jnp.zeros((), part.dtype), room)

    def put(
        self,
        index: Int[Array, ""] | int,
        like: jax.Array | jax.ShapeDtypeStruct,
        so_far: Array,
        part: Array,
    ) -> Array:
        """Writes what was computed of a block to its rows of the whole result."""
        part = self.split(part)
        offsets = [0] * part.ndim
        starts = zip(self._shared(like), self._starts(index), strict=True)
        for axis, (shared, start) in enumerate(starts):
            offsets[2 * axis + 1] = 0 if shared else start
        return lax.dynamic_update_slice(so_far, part, offsets)

    def _starts(self, index):
        starts = []
        for count, size in zip(reversed(self.counts), reversed(self.sizes), strict=True):
            starts.insert(0, (index % count) * size)
            index = index // count
        return starts

    def _shared(self, like):
        """Along which axes a result does not depend on the position: there it has size 1."""
        return [own == 1 != n for own, n in zip(like.shape, self.positions, strict=False)]


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _block_of_halves(grid, x, index):
    # XLA's CPU backend slices half precision by casting the whole array, and casts ahead of a loop
    # what does not change in it: so slice integers, of what seems to change.
    x, index = lax.optimization_barrier((x, index))
    bits = grid.slice(lax.bitcast_convert_type(x, jnp.uint16), index)
    return lax.bitcast_convert_type(bits, x.dtype)


@_block_of_halves.defjvp
def _(grid, primals, tangents):
    # Bits have no derivative.
    return _block_of_halves(grid, *primals), grid.slice(tangents[0], primals[1])


def _grid(arrays: Sequence[Array], block_size: int) -> Grid:
    positions = lax.broadcast_shapes(*(x.shape[:-1] for x in arrays))
    shards: tuple[Size, ...] = ()
    most = MOST_SHARDS
    for axis, size in enumerate(positions):
        parts = _shards(arrays, axis, size)
        if parts is None:
            parts = _parts(size, block_size, most)
            most, block_size = most // parts, block_size // parts
        shards = (*shards, parts)
    rows = tuple(n // g for n, g in zip(positions, shards, strict=True))
    sizes: tuple[Size, ...] = ()
    for n in reversed(rows):
        # An axis whose size is not known before the program runs is not cut.
        cut = not is_symbolic_dim(n)
        sizes = (max(1, min(n, block_size)) if cut else n, *sizes)
        block_size //= sizes[0] if cut else 1
    counts = tuple(1 if n == size else -(-n // size) for n, size in zip(rows, sizes, strict=True))
    return Grid(positions, shards, rows, sizes, counts)


def _shards(arrays, axis, size):
    """Into how many parts a mesh may cut an axis of positions; None if there is none to see."""
    if is_symbolic_dim(size):
        return 1
    meshes = [(x, jax.typeof(x).sharding.mesh) for x in arrays if x.shape[axis] != 1]
    known = [(x, mesh) for x, mesh in meshes if not mesh.empty]
    if not known:
        return None
    x, mesh = known[0]
    entry = jax.typeof(x).sharding.spec[axis]
    names = () if entry is None else entry if isinstance(entry, tuple) else (entry,)
    cut = math.prod(mesh.shape[name] for name in names)
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    unknown = math.prod(mesh.shape[name] for name, kind in kinds if kind == AxisType.Auto)
    return cut * math.gcd(size // cut, unknown)


def _parts(size, block_size, most):
    """Into how many parts to cut an axis for devices that can't be seen, so many or fewer.

    A block has rows of each part. There are 2, 4, 8 devices and so on.
    """
    return math.gcd(size, 1 << (min(block_size, most).bit_length() - 1))
