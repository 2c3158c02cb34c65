"""What may come in: ranges of numbers, choices, shapes, masks, and what counts as an array."""

import math
import numbers
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np


class Range(NamedTuple):
    """The values that a number may take."""

    description: str
    contains: Callable[[float], bool]

    def check(self, **values: Any) -> None:
        """Raises ValueError for a plain number out of range; an array is never read."""
        for name, value in values.items():
            self.check_all(name, value, (value,))

    def check_all(self, name: str, shown: Any, values: Iterable[Any]) -> None:
        """The same for all that a value stands for, such as the ends of a schedule."""
        for value in values:
            if isinstance(value, numbers.Real) and not self.contains(float(value)):
                raise ValueError(f"{name} must be {self.description}, got {shown!r}")


POSITIVE = Range("above 0", lambda value: value > 0)
NONNEGATIVE = Range("at least 0", lambda value: value >= 0)
BELOW_ZERO = Range("below 0", lambda value: value < 0)
ABOVE_ONE = Range("above 1", lambda value: value > 1)
AT_LEAST_ONE = Range("at least 1", lambda value: value >= 1)
UNIT = Range("in [0, 1]", lambda value: 0 <= value <= 1)
FINITE = Range("finite", math.isfinite)
ANY = Range("not NaN", lambda value: value == value)


def check_choice(name: str, value: Any, choices: Any) -> None:
    """Raises ValueError that lists the valid values of an option, those of a `Literal`."""
    valid = get_args(choices)
    if value not in valid:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, valid))}, got {value!r}")


def check_block_size(block_size: Any, name: str = "block_size") -> None:
    """Raises ValueError for a block size that is not an integer of at least 1."""
    if block_size is not None and not (isinstance(block_size, int) and block_size >= 1):
        raise ValueError(f"{name} must be an integer of at least 1, got {block_size!r}")


def check_same_shape(**arrays: Any) -> None:
    """Raises ValueError that shows the shapes of two arrays which differ in shape."""
    (first, a), (second, b) = arrays.items()
    if jnp.shape(a) != jnp.shape(b):
        raise ValueError(
            f"{first} and {second} must have the same shape, got {jnp.shape(a)} and {jnp.shape(b)}"
        )


def check_resolved(**values: Any) -> None:
    """Raises TypeError for a schedule, which has a value only at a step."""
    for name, value in values.items():
        if callable(value):
            raise TypeError(f"{name} is a schedule, {value!r}: pass its value at the step")


def check_fits(shape: tuple[int, ...], **arrays: Any) -> None:
    """Raises ValueError that shows both shapes if an array does not broadcast to `shape`.

    Raises TypeError for a schedule.
    """
    check_resolved(**arrays)
    for name, array in arrays.items():
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
    check_fits(shape, where=where)


def check_labels(labels: Any, positions: tuple[int, ...]) -> None:
    """Raises TypeError for labels that are not integers, ValueError unless there is one each."""
    if not jnp.issubdtype(jnp.result_type(labels), jnp.integer):
        raise TypeError(f"labels must be integers, got {jnp.result_type(labels)}")
    if jnp.shape(labels) != positions:
        raise ValueError(
            f"labels must have shape {positions}, that of the positions, got {jnp.shape(labels)}"
        )


def arrays_of_classes(**inputs: Any) -> tuple[jax.Array, ...]:
    """The arrays that are meant, also by Flax variables.

    Raises:
        TypeError: If one is not an array.
        ValueError: If one has no axis of classes, or no class on it.
    """
    arrays: list[Any] = []
    for name, x in inputs.items():
        if not isinstance(x, (jax.Array, np.ndarray)) and hasattr(x, "__jax_array__"):
            x = x.__jax_array__()
        if not isinstance(x, (jax.Array, np.ndarray)):
            raise TypeError(f"{name} must be an array, got a {type(x).__name__}")
        if not x.ndim or not x.shape[-1]:
            raise ValueError(f"{name} needs classes on its last axis, got shape {x.shape}")
        arrays.append(x)
    return tuple(arrays)
