"""Masking, promotion and reduction: one meaning for `where`, `axis_name` and `reduction`."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float
from numpy.lib.array_utils import normalize_axis_index

Reduction = Literal["sum", "mean", "none"]
AxisName = str | tuple[str, ...]
Axis = int | tuple[int, ...]

REDUCTIONS = ("sum", "mean", "none")


class Sums(NamedTuple):
    """A reduction before its division: what several arrays share in one mean."""

    total: Float[Array, "..."]
    count: Float[Array, "..."]  # pyright: ignore[reportIncompatibleMethodOverride]

    def reduce(self, reduction: str) -> Any:
        """The "sum" or "mean", or for "sums" itself; the mean over nothing is 0."""
        if reduction == "sums":
            return self
        return self.total if reduction == "sum" else self.total / jnp.maximum(self.count, 1)


def check_choice(name: str, value: Any, valid: Sequence[str]) -> None:
    """Raises ValueError that lists the valid values of an option."""
    if value not in valid:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, valid))}, got {value!r}")


def check_reduction(reduction: str) -> None:
    """Raises ValueError for an unknown reduction; "sums" is for callers within the package."""
    if reduction != "sums":
        check_choice("reduction", reduction, REDUCTIONS)


def check_same_shape(**arrays: Any) -> None:
    """Raises ValueError that shows the shapes of two arrays which differ in shape."""
    (first, a), (second, b) = arrays.items()
    if jnp.shape(a) != jnp.shape(b):
        raise ValueError(
            f"{first} and {second} must have the same shape, got {jnp.shape(a)} and {jnp.shape(b)}"
        )


def check_broadcast(name: str, array: Any, shape: tuple[int, ...]) -> None:
    """Raises ValueError that shows both shapes if `array` does not broadcast to `shape`.

    Raises TypeError for a schedule, which has a value only at a step.
    """
    if callable(array):
        raise TypeError(f"{name} is a schedule, {array!r}: pass its value at the step")
    own = jnp.shape(array)
    fits = len(own) <= len(shape) and all(
        n in (1, m) for n, m in zip(reversed(own), reversed(shape), strict=False)
    )
    if not fits:
        raise ValueError(f"{name} must broadcast to shape {shape}, got shape {own}")


def check_where(where: Any, shape: tuple[int, ...]) -> None:
    """Raises TypeError for a mask that is not boolean, ValueError for one that does not fit."""
    if where is None:
        return
    if jnp.result_type(where) != jnp.bool_:
        raise TypeError(f"where must be boolean, got {jnp.result_type(where)}; write mask != 0")
    check_broadcast("where", where, shape)


def promote(*inputs: Any) -> tuple[Array, ...]:
    """Casts to one floating dtype of at least 32 bits: the widest of the inputs'."""
    dtype = jnp.result_type(jnp.float32, *(jnp.asarray(x).dtype for x in inputs))
    if jnp.issubdtype(dtype, jnp.complexfloating):
        raise TypeError("complex input is not supported; take its real and imaginary parts")
    return tuple(jnp.asarray(x, dtype) for x in inputs)


def reduce(
    values: Float[Array, "..."],
    *,
    reduction: str,
    where: Bool[Array, "..."] | None,
    axis_name: AxisName | None,
    axis: Axis | None = None,
) -> Any:
    """Reduces values that are already 0 where `where` is False.

    Args:
        values: What to reduce, of shape [...].
        reduction: "sum", "mean" over the included entries, "none" for the values themselves, or
            "sums" for the two `Sums` a mean is made of.
        where: Mask that broadcasts to the shape of `values`, or None for all.
        axis_name: Mapped axes whose members' values belong to the same reduction.
        axis: What to reduce over; None is everything.

    Returns:
        A scalar, or an array of the axes that are left; `values` for "none"; a `Sums` for "sums".
    """
    if reduction == "none":
        return values
    total = jnp.sum(values, axis)
    if where is None:
        count = jnp.asarray(values.size // max(total.size, 1), values.dtype)
    elif axis is None:
        repeats = values.size // max(where.size, 1)
        count = jnp.sum(where, dtype=jnp.int32).astype(values.dtype) * repeats
    else:
        included = jnp.broadcast_to(where, values.shape)
        count = jnp.sum(included, axis, dtype=jnp.int32).astype(values.dtype)
    if axis_name is not None:
        total, count = lax.psum((total, count), axis_name)
    return Sums(total, count).reduce(reduction)


def add_up(values: Sequence[Sums], reduction: str) -> Any:
    """The reduction over several arrays, each of which has been reduced to its `Sums`."""
    zero = jnp.zeros((), jnp.float32)
    sums = Sums(
        sum((value.total for value in values), start=zero),
        sum((value.count for value in values), start=zero),
    )
    return sums.reduce(reduction)


def spread(value: Any, structure: Any) -> list[Any]:
    """One value for each leaf of a tree: `value` for all of them, or its own at each."""
    if value is None or jax.tree_util.all_leaves([value]):
        return [value] * structure.num_leaves
    return structure.flatten_up_to(value)


@partial(jax.jit, static_argnames=("formula", "axis", "reduction", "axis_name"))
def evaluate(
    formula: Callable[..., Array],
    inputs: tuple[Array, ...],
    parameters: Mapping[str, Any],
    *,
    weights: Any,
    where: Any,
    axis: int | None = None,
    reduction: str,
    axis_name: AxisName | None,
) -> Any:
    """Reduces `weights * formula(*inputs, **parameters)`; the body of most public functions.

    Excluded entries are replaced before the formula and their values after it, so that neither a
    value nor a gradient sees what they hold. The formula is recomputed in the backward pass: it
    is bound by memory, and a residual of the size of the input costs more than the formula.

    Args:
        formula: A function at module level (programs are cached by its identity). Without `axis`
            it is elementwise; with it, it takes `axis=` and sums over that axis.
        inputs: Arrays of one shape.
        parameters: Numbers or arrays that broadcast to the inputs, by name; None is left out.
        weights: A factor that broadcasts to the values.
        where: Mask that broadcasts to the values.
        axis: The class axis, which the values don't have.
        reduction: As in `reduce`.
        axis_name: As in `reduce`.
    """
    for x in inputs:
        if not isinstance(x, jax.Array):
            raise TypeError(
                f"expected an array, got a {type(x).__name__}; for pytrees use a config, as pj.L1()"
            )
    shape = inputs[0].shape
    parameters = {name: value for name, value in parameters.items() if value is not None}
    for name, value in parameters.items():
        check_broadcast(name, value, shape)
    if axis is not None:
        axis = normalize_axis_index(axis, len(shape))
        shape = shape[:axis] + shape[axis + 1 :]
    check_broadcast("weights", weights, shape)
    check_where(where, shape)

    def values(inputs, parameters, weights, where):
        inputs = promote(*inputs)
        dtype = jnp.result_type(*inputs, *parameters.values(), weights)
        *inputs, weights = (jnp.asarray(x, dtype) for x in (*inputs, weights))
        parameters = {name: jnp.asarray(value, dtype) for name, value in parameters.items()}
        if where is None:
            return weights * _apply(formula, inputs, parameters, axis)
        entries = where if axis is None else jnp.expand_dims(jnp.broadcast_to(where, shape), axis)
        inputs = [jnp.where(entries, x, 0) for x in inputs]
        parameters = {
            name: jnp.where(entries, value, 1) if value.ndim else value
            for name, value in parameters.items()
        }
        weights = jnp.where(where, weights, 0) if weights.ndim else weights
        return jnp.where(where, weights * _apply(formula, inputs, parameters, axis), 0)

    # With the sum inside, the cotangent that the backward pass waits for is a scalar. Without a sum
    # it is an array, which the barrier against common subexpressions would keep in memory.
    @partial(jax.checkpoint, prevent_cse=reduction != "none")
    def reduced(inputs, parameters, weights, where):
        return reduce(
            values(inputs, parameters, weights, where),
            reduction=reduction,
            where=where,
            axis_name=axis_name,
        )

    return reduced(inputs, parameters, weights, where)


def _apply(formula, inputs, parameters, axis):
    return formula(*inputs, **parameters, **({} if axis is None else {"axis": axis}))


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def norm(x: Float[Array, "..."], axis: Axis | None = None) -> Float[Array, "..."]:
    """The 2-norm, without overflow or underflow, and with derivative 0 at 0.

    Args:
        x: Array of shape [...].
        axis: What to sum over; None is everything.
    """
    scale = _scale(x, axis)
    return _root(jnp.sum(jnp.square(x / scale), axis)) * jnp.squeeze(scale, axis)


@norm.defjvp
def _(axis, primals, tangents):
    (x,), (tangent,) = primals, tangents
    return norm(x, axis), jnp.sum(direction(x, axis) * tangent, axis)


def direction(x: Float[Array, "..."], axis: Axis | None = None) -> Float[Array, "..."]:
    """The unit vectors x / norm(x); 0, with derivative 0, where the norm is 0.

    Args:
        x: Array of shape [...].
        axis: What the norm sums over; None is everything.
    """
    scaled = x / _scale(x, axis)
    length = _root(jnp.sum(jnp.square(scaled), axis, keepdims=True))
    return scaled / jnp.where(length > 0, length, 1)


def norm_across(norms: Float[Array, ""], axis_name: AxisName) -> Float[Array, ""]:
    """The norm over the members of mapped axes, from the norm on each."""
    largest = lax.pmax(lax.stop_gradient(norms), axis_name)
    scale = jnp.where((largest > 0) & (largest < jnp.inf), largest, 1)
    return _root(lax.psum(jnp.square(norms / scale), axis_name)) * scale


def _scale(x, axis):
    largest = jnp.max(jnp.abs(lax.stop_gradient(x)), axis, keepdims=True, initial=0)
    return jnp.where((largest > 0) & (largest < jnp.inf), largest, 1)


def _root(squares):
    positive = squares > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, squares, 1)), 0)
