"""Masking, promotion and reduction: one meaning for `where`, `axis_name` and `reduction`."""

import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec, reshard
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, PyTree
from numpy.lib.array_utils import normalize_axis_index, normalize_axis_tuple

from penalties_jax.functional.checks import Size, check_fits, check_where
from penalties_jax.functional.derivatives import Axis
from penalties_jax.functional.platform import recomputed

Reduction = Literal["sum", "mean", "none"]
AxisName = str | tuple[str, ...]


def wide(*inputs: Any) -> Any:
    """The dtype that inputs are computed in: float64 if one of them is, else float32.

    What is narrower, float8 and integers of any size too, is upcast; Python numbers never widen.

    Raises:
        TypeError: If one is complex.
    """
    types = [jax.typeof(x) for x in inputs]
    if any(jnp.issubdtype(x.dtype, jnp.complexfloating) for x in types):
        raise TypeError("complex input is not supported; take its real and imaginary parts")
    doubles = any(x.dtype == jnp.float64 and not x.weak_type for x in types)
    return jnp.float64 if doubles else jnp.float32


def promote(*inputs: Any) -> tuple[Array, ...]:
    """Casts to one floating dtype, that of `wide`."""
    dtype = wide(*inputs)
    return tuple(jnp.asarray(x, dtype) for x in inputs)


def count(
    shape: tuple[Size, ...],
    where: Bool[ArrayLike, "..."] | None,
    *,
    dtype: Any = jnp.float32,
    axis: Axis | None = None,
) -> Float[Array, "..."] | Size:
    """How many values of a shape a mask includes, along `axis` or in all."""
    if where is None:
        axes = range(len(shape)) if axis is None else axis if isinstance(axis, tuple) else (axis,)
        return math.prod(shape[a] for a in axes)
    if axis is None:
        repeats = math.prod(shape) // max(jnp.size(where), 1)
        return jnp.sum(where, dtype=jnp.int32).astype(dtype) * repeats
    return jnp.sum(jnp.broadcast_to(where, shape), axis, dtype=jnp.int32).astype(dtype)


def reduce(
    values: Float[Array, "..."],
    *,
    reduction: str,
    where: Bool[Array, "..."] | None,
    axis_name: AxisName | None,
    axis: Axis | None = None,
) -> Float[Array, "..."]:
    """Reduces values that are already 0 where `where` is False.

    Args:
        values: What to reduce, of shape [...].
        reduction: "sum", "mean" over the included entries, or "none" for the values themselves.
        where: Mask that broadcasts to the shape of `values`, or None for all.
        axis_name: Mapped axes whose members' values belong to the same reduction.
        axis: What to reduce over; None is everything.

    Returns:
        A scalar, or an array of the axes that are left; `values` for "none". The mean over nothing
        is 0.
    """
    if reduction == "none":
        return values
    total = jnp.sum(values, axis)
    if reduction == "sum":
        return total if axis_name is None else lax.psum(total, axis_name)
    included = jnp.asarray(count(values.shape, where, dtype=values.dtype, axis=axis), values.dtype)
    if axis_name is not None:
        total, included = lax.psum((total, included), axis_name)
    return total / jnp.maximum(included, 1)


def add_up(
    totals: Sequence[Array],
    counts: Sequence[Array | Size],
    *,
    reduction: str,
    axis_name: AxisName | None,
) -> Float[Array, ""]:
    """The "sum" or "mean" over several arrays, from the total of each and its local count."""
    zero = jnp.zeros((), jnp.float32)
    total = sum(totals, start=zero)
    if reduction == "sum":
        return total
    included = sum(counts, start=zero)
    included = included if axis_name is None else lax.psum(included, axis_name)
    return total / jnp.maximum(included, 1)


def summary(
    values: Sequence[Array],
    masks: Sequence[Bool[ArrayLike, "..."] | None],
    *,
    axis_name: AxisName | None,
) -> dict[str, Float[Array, ""]]:
    """The sum, mean, maximum and minimum of the values of several arrays, by name; 0 if of none.

    Args:
        values: The arrays, which are 0 where their masks are False.
        masks: A mask that broadcasts to each array, or None for all of it.
        axis_name: As in `reduce`.
    """
    zero = jnp.zeros((), jnp.float32)
    # They are for the log, and a maximum over devices has no derivative.
    values = lax.stop_gradient(list(values))
    total = sum(map(jnp.sum, values), start=zero)
    counts = [count(x.shape, mask) for x, mask in zip(values, masks, strict=True)]
    included = sum(counts, start=zero)
    if axis_name is not None:
        total, included = lax.psum((total, included), axis_name)
    pairs = [lie_alike(pair)[0] for pair in zip(values, masks, strict=True)]

    def largest(sign):
        each = [jnp.max(sign * x, initial=-jnp.inf, where=mask) for x, mask in pairs]
        most = functools.reduce(jnp.maximum, each, zero - jnp.inf)
        most = most if axis_name is None else lax.pmax(most, axis_name)
        return jnp.where(included > 0, sign * most, 0)

    mean = total / jnp.maximum(included, 1)
    return {"raw": total, "mean": mean, "max": largest(1), "min": largest(-1)}


def spread(name: str, value: Any, structure: Any) -> list[Any]:
    """One value for each leaf of a tree: `value` for all of them, or its own at each."""
    if value is None or jax.tree_util.all_leaves([value]):
        return [value] * structure.num_leaves
    return leaves_by_name(name, value, structure)


def leaves_by_name(name: str, tree: Any, structure: Any) -> list[Any]:
    """The leaves of a tree in the order of another, whose mappings may be of other types.

    So a dict of arrays matches an `nnx.State` of the same names.

    Raises:
        ValueError: If it has other names.
    """
    order = _plain(structure.unflatten(range(structure.num_leaves)))
    try:
        leaves = jax.tree.structure(order).flatten_up_to(_plain(tree))
    except ValueError as error:
        raise ValueError(f"{name} must be a tree like the input: {error}") from error
    return [
        leaf for _, leaf in sorted(zip(jax.tree.leaves(order), leaves, strict=True), key=_first)
    ]


def _first(pair):
    return pair[0]


def _plain(tree):
    """The tree with its mappings as dicts."""

    def convert(node):
        if not isinstance(node, Mapping):
            return node
        return {key: _plain(child) for key, child in node.items()}

    return jax.tree.map(convert, tree, is_leaf=lambda node: isinstance(node, Mapping))


def vary_alike(tree: PyTree[Array]) -> PyTree[Array]:
    """Lets all arrays vary over the mapped axes over which any of them does.

    So that inside `shard_map` their cotangents may differ between members, and are summed where
    the array itself did not.
    """
    axes = frozenset().union(*map(varies_over, jax.tree.leaves(tree)))

    def varying(x):
        return lax.pcast(x, tuple(sorted(axes - varies_over(x))), to="varying")

    return jax.tree.map(varying, tree)


def varies_over(x: Array) -> frozenset[str]:
    """The mapped axes, inside `shard_map`, over whose members an array may differ."""
    return jax.typeof(x).manual_axis_type.varying


def lie_alike(
    arrays: PyTree[Any],
    rows: PyTree[Any] = (),
    shared: PyTree[Any] = (),
    *,
    axis: Axis | None = (),
) -> tuple[Any, Any, Any]:
    """Lays arrays that meet alike on a mesh with Explicit axes; elsewhere does nothing.

    There `jnp.where` takes only arrays that lie alike, and so does a declared derivative. What is
    whole along an axis follows what is cut along it, so that nothing is gathered.

    Args:
        arrays: Arrays that broadcast with each other; along an axis, those of one size meet.
        rows: Arrays that broadcast with those without `axis`.
        shared: Arrays that meet none of these, and are only brought to the mesh.
        axis: The axis or axes that `rows` don't have; None is all.
    """
    types = map(jax.typeof, jax.tree.leaves((arrays, rows, shared)))
    mesh = next((x.sharding.mesh for x in types if any(x.sharding.spec)), None)
    if mesh is None:
        return arrays, rows, shared
    every = list(range(max(map(jnp.ndim, jax.tree.leaves(arrays)))))
    without = every if axis is None else normalize_axis_tuple(axis, len(every))
    alone = [None] * max(map(jnp.ndim, jax.tree.leaves(shared)), default=0)
    groups = (arrays, every), (rows, [a for a in every if a not in without]), (shared, alone)

    def entries(x, axes):
        """How each axis is cut, by where it is and its size."""
        x = jax.typeof(x)
        return zip(axes[len(axes) - x.ndim :], x.shape, x.sharding.spec, strict=True)

    cuts = {
        (a, n): entry
        for tree, axes in groups
        for x in jax.tree.leaves(tree)
        for a, n, entry in entries(x, axes)
        if entry is not None and a is not None
    }

    def lay(x, axes):
        own = jax.typeof(x).sharding
        spec = PartitionSpec(*(entry or cuts.get((a, n)) for a, n, entry in entries(x, axes)))
        if not spec or (own.mesh == mesh and own.spec == spec):
            return x
        return reshard(x, NamedSharding(mesh, spec))

    return tuple(jax.tree.map(partial(lay, axes=axes), tree) for tree, axes in groups)


def evaluate(
    formula: Callable[..., Array],
    inputs: tuple[ArrayLike, ...],
    parameters: Mapping[str, Any],
    reduction: str,
    where: Any,
    axis_name: AxisName | None,
    *,
    weights: Any = 1.0,
    axis: int | None = None,
    fill: float = 0.0,
    cached: bool = True,
) -> Any:
    """Reduces `weights * formula(*inputs, **parameters)`; the body of most public functions.

    Excluded entries are replaced before the formula and their values after it, so that neither a
    value nor a gradient sees what they hold. The formula is recomputed in the backward pass: it
    is bound by memory, and a residual of the size of the input costs more than the formula.

    Args:
        formula: A function that is found again by its value, as one at module level is (programs
            are cached by it). Without `axis` it is elementwise; with it, it takes `axis=` and sums
            over that axis.
        inputs: Arrays of one shape.
        parameters: Numbers or arrays that broadcast to the inputs, by name; None is left out.
        reduction, axis_name: As in `reduce`.
        where: Mask that broadcasts to the values.
        weights: A factor that broadcasts to the values.
        axis: The class axis, which the values don't have.
        fill: What the formula is given of the inputs where an entry is excluded.
        cached: Whether the formula is its value: what a user's function closes over may change.
    """
    run: Any = _evaluate if cached else inspect.unwrap(_evaluate)
    return run(formula, inputs, parameters, reduction, where, axis_name, weights, axis, fill)


@partial(jax.jit, static_argnames=("formula", "reduction", "axis_name", "axis", "fill"))
def _evaluate(formula, inputs, parameters, reduction, where, axis_name, weights, axis, fill):
    shape = inputs[0].shape
    parameters = {name: value for name, value in parameters.items() if value is not None}
    check_fits(shape, **parameters)
    if axis is not None:
        axis = normalize_axis_index(axis, len(shape))
        shape = shape[:axis] + shape[axis + 1 :]
    check_fits(shape, weights=weights)
    check_where(where, shape)

    def values(inputs, parameters, weights, where):
        inputs = promote(*inputs)
        dtype = wide(*inputs, *parameters.values(), weights)
        *inputs, weights = (jnp.asarray(x, dtype) for x in (*inputs, weights))
        parameters = {name: jnp.asarray(value, dtype) for name, value in parameters.items()}
        entries = where
        if axis is not None and where is not None:
            entries = jnp.expand_dims(jnp.broadcast_to(where, shape), axis)
        (inputs, parameters, entries), (weights, where), _ = lie_alike(
            (inputs, parameters, entries), (weights, where), axis=() if axis is None else axis
        )
        if where is None:
            return weights * _apply(formula, inputs, parameters, axis)
        inputs = [jnp.where(entries, x, fill) for x in inputs]
        parameters = {
            name: jnp.where(entries, value, 1) if value.ndim else value
            for name, value in parameters.items()
        }
        weights = jnp.where(where, weights, 0) if weights.ndim else weights
        return jnp.where(where, weights * _apply(formula, inputs, parameters, axis), 0)

    def reduced(inputs, parameters, weights, where):
        return reduce(
            values(inputs, parameters, weights, where),
            reduction=reduction,
            where=where,
            axis_name=axis_name,
        )

    # With the sum inside, the cotangent that the backward pass waits for is a scalar. Without a sum
    # it is an array, which a barrier would keep in memory.
    again = partial(jax.checkpoint, prevent_cse=False) if reduction == "none" else recomputed
    return again(reduced)(inputs, parameters, weights, where)


def _apply(formula, inputs, parameters, axis):
    return formula(*inputs, **parameters, **({} if axis is None else {"axis": axis}))
