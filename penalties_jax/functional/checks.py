"""What may come in: what counts as an array, ranges of numbers, choices, shapes and masks."""

import contextlib
import functools
import inspect
import numbers
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, repeat
from types import UnionType
from typing import Any, Literal, NamedTuple, ParamSpec, TypeVar, Union, get_args, get_origin

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import AbstractArray, PyTree

P = ParamSpec("P")
R = TypeVar("R")

# An integer, or what jax.export has for one that is open.
Size = Any

# What an option is annotated as, beside words to choose from and tuples.
OPTIONS = (bool, int, float, str, type(None))

# What is read, where a number is checked.
PLAIN: Any = (np.ndarray, np.generic, bool, int, float, complex)


@contextlib.contextmanager
def standard_promotion() -> Iterator[None]:
    """Has arrays of different dtypes and ranks mean what they always do, in strict modes too.

    Around what is called from outside, and around what is differentiated later: the rules of
    declared derivatives.
    """
    if _promotes_as_ever():
        yield
    else:
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            yield


def _promotes_as_ever():
    modes: Any = jax.config
    return (
        modes.jax_numpy_dtype_promotion == "standard" and modes.jax_numpy_rank_promotion == "allow"
    )


def public(function: Callable[P, R]) -> Callable[P, R]:
    """Lets in what the annotations of a function say, and has it mean the same in every mode.

    Where they say an array, a number, or a pytree of such, what holds an array is replaced by it,
    and what is none is a TypeError. Options are what `option_of` lets in.
    """
    body: Callable[..., R] = function
    parameters = inspect.signature(function).parameters
    doors = {name: _door(name, parameter.annotation) for name, parameter in parameters.items()}

    @functools.wraps(function)
    def entered(*inputs: P.args, **options: P.kwargs) -> R:
        let_in = map(lambda door, x: door(x), chain(doors.values(), repeat(_as_it_is)), inputs)
        named = {name: doors.get(name, _as_it_is)(x) for name, x in options.items()}
        # A context manager takes longer than all the rest.
        if _promotes_as_ever():
            return body(*let_in, **named)
        with standard_promotion():
            return body(*let_in, **named)

    return entered


def _door(name, annotation):
    """What is made of an argument that has an annotation."""
    kinds = _kinds(annotation)
    held = [kind for each in kinds if get_origin(each) is tuple for kind in get_args(each)]
    if any(isinstance(kind, type(PyTree)) for kind in kinds) or any(map(_is_of_arrays, held)):
        return functools.partial(let_in, name)
    if not _is_of_arrays(annotation):
        of_options = all(kind in OPTIONS or get_origin(kind) in (tuple, Literal) for kind in kinds)
        return functools.partial(option_of(annotation), name) if of_options else _as_it_is
    types = [kind for kind in kinds if isinstance(kind, type)]
    words = [type(word) for kind in kinds for word in get_args(kind)]
    of_numbers = float in types and not any(issubclass(kind, AbstractArray) for kind in types)
    others = tuple({type(None), *words} & {*types, *words})
    return functools.partial(_number if of_numbers else _array, name, others)


def _kinds(annotation):
    union = get_origin(annotation) in (Union, UnionType)
    return get_args(annotation) if union else (annotation,)


def _is_of_arrays(annotation):
    types = (kind for kind in _kinds(annotation) if isinstance(kind, type))
    return any(issubclass(kind, (jax.Array, AbstractArray)) for kind in types)


def _as_it_is(x):
    return x


def _array(name, others, x):
    if isinstance(x, (jax.Array, float)):
        return x
    if holds_array(x):
        x = x.__jax_array__()
    if not (is_numeric(x) or isinstance(x, others)):
        if callable(x):
            raise TypeError(f"{name} is a schedule, {x!r}: pass its value at the step")
        raise TypeError(f"{name} must be an array, got a {type(x).__name__}: {x!r}")
    # jax takes a whole number for an int32, and refuses a larger one.
    return float(x) if type(x) is int and abs(x) >= 2**31 else x


def let_in_one(name: str, x: Any) -> Any:
    """An array, a number or None, as it is let in; a TypeError for what is none of them."""
    return _array(name, (type(None),), x)


def is_numeric(x: Any) -> bool:
    """Whether something is a number or an array of numbers."""
    if isinstance(x, (jax.Array, np.ndarray, np.generic)):
        return is_real(x.dtype) or jnp.issubdtype(x.dtype, jnp.complexfloating)
    return isinstance(x, PLAIN)


def is_real(dtype: Any) -> bool:
    """Whether a dtype is one of real numbers or of booleans."""
    return any(jnp.issubdtype(dtype, kind) for kind in (jnp.floating, jnp.integer, jnp.bool_))


def _number(name, others, x):
    return as_number(_array(name, others, x))


def as_number(x: Any) -> Any:
    """A number in a dtype that meets others, as float8 and int4 do not."""
    if isinstance(x, (float, int)):
        return x
    dtype = np.dtype(getattr(x, "dtype", float))
    return x.astype(np.float32) if dtype.kind == "V" and dtype.itemsize == 1 else x


def let_in(name: str, tree: Any) -> Any:
    """A pytree of arrays, as they are let in; a TypeError for what is none."""
    if tree is None or isinstance(tree, jax.Array):
        return tree
    return jax.tree.map(functools.partial(_array, name, ()), tree, is_leaf=holds_array)


def holds_array(node: Any) -> bool:
    """Whether a node holds an array for whoever asks, as a Flax or a Keras variable does."""
    return not isinstance(node, jax.Array) and hasattr(node, "__jax_array__")


def bare(tree: Any) -> Any:
    """A pytree with arrays in the place of what holds one."""
    return jax.tree.map(
        lambda node: node.__jax_array__() if holds_array(node) else node, tree, is_leaf=holds_array
    )


class Range(NamedTuple):
    """The values that a number may take.

    Attributes:
        description: What an error says that they must be, such as "above 0".
        contains: From a number, or a NumPy array of them, to whether it is one.

    Examples:
        >>> @pj.config
        ... class Stretched(pj.Separable):
        ...     scale: float = pj.number(valid=pj.Range("above 0", lambda value: value > 0))
        ...     formula = staticmethod(lambda x, scale: jnp.abs(x) / scale)
        >>> Stretched(0.0)
        Traceback (most recent call last):
        ValueError: Stretched.scale must be above 0, got 0.0
    """

    description: str
    contains: Callable[[Any], Any]

    def check(self, **values: Any) -> None:
        """Raises ValueError for a plain number, or array of them, that is out of range.

        A `jax.Array` is never read: that would wait for the device. An entry of an array may be
        NaN, where a mask leaves it out.
        """
        for name, value in values.items():
            self.check_all(name, value, (value,))

    def check_all(self, name: str, shown: Any, values: Iterable[Any]) -> None:
        """The same for all that a value stands for, such as the ends of a schedule."""
        for value in values:
            if isinstance(value, (float, int)):
                valid = self.contains(value)
            elif not isinstance(value, PLAIN):
                continue
            elif np.iscomplexobj(value):
                raise TypeError(f"{name} must be real, got {shown!r}")
            else:
                valid = self.contains(value)
                valid = np.all(valid | np.isnan(value) if np.ndim(value) else valid)
            if not valid:
                raise ValueError(f"{name} must be {self.description}, got {shown!r}")


POSITIVE = Range("above 0", lambda value: value > 0)
NONNEGATIVE = Range("at least 0", lambda value: value >= 0)
BELOW_ZERO = Range("below 0", lambda value: value < 0)
ABOVE_ONE = Range("above 1", lambda value: value > 1)
ABOVE_TWO = Range("above 2", lambda value: value > 2)
AT_LEAST_ONE = Range("at least 1", lambda value: value >= 1)
ORDER = Range("at least 1, and finite", lambda value: (value >= 1) & (value < np.inf))
UNIT = Range("in [0, 1]", lambda value: (value >= 0) & (value <= 1))
ASCENDING = Range(
    "ascending", lambda value: np.array_equal(np.sort(np.atleast_1d(value)), np.atleast_1d(value))
)
FINITE = Range("finite", np.isfinite)
ANY = Range("not NaN", lambda value: value == value)


@functools.cache
def option_of(annotation: Any) -> Callable[[str, Any], Any]:
    """From the name of an option and what is given to the option; an error names the option.

    Lists become tuples, NumPy's scalars Python's.

    Args:
        annotation: The type. What it is not of is a TypeError; for a `Literal` a ValueError that
            lists the valid values.
    """
    is_valid = is_of(annotation)
    choices = get_origin(annotation) is Literal

    def check(name, value):
        value = _plain(value)
        if type(value) in (list, tuple):
            value = tuple(map(_plain, value))
        if is_valid(value):
            return value
        if choices:
            valid = ", ".join(map(repr, get_args(annotation)))
            raise ValueError(f"{name} must be one of {valid}, got {value!r}")
        raise TypeError(f"{name} must be of type {_in_words(annotation)}, got {value!r}")

    return check


def _plain(value):
    return value.item() if isinstance(value, np.generic) else value


def _in_words(annotation):
    name = str(annotation) if get_args(annotation) else annotation.__name__
    return re.sub(r"\b(\w+\.)+", "", name)


def is_of(annotation: Any) -> Callable[[Any], bool]:
    """Whether a value is of an annotated type, as far as can be told without its parameters."""
    kind, parameters = get_origin(annotation), get_args(annotation)
    if kind in (Union, UnionType):
        kinds = [is_of(parameter) for parameter in parameters]
        return lambda value: any(is_kind(value) for is_kind in kinds)
    if kind is Literal:
        types = tuple(map(type, parameters))
        return lambda value: isinstance(value, types) and value in parameters
    if kind is tuple and parameters[1:] == (...,):
        is_item = is_of(parameters[0])
        return lambda value: isinstance(value, tuple) and all(map(is_item, value))
    if annotation in (int, float):
        number = numbers.Integral if annotation is int else numbers.Real
        return lambda value: isinstance(value, number) and not isinstance(value, bool)
    cls = type(None) if annotation is None else kind or annotation
    if cls is Any or not isinstance(cls, type):
        return lambda value: True
    return lambda value: isinstance(value, cls)


def check_same_shape(**arrays: Any) -> None:
    """Raises ValueError that shows the shapes of two arrays which differ in shape."""
    (first, a), (second, b) = arrays.items()
    if jnp.shape(a) != jnp.shape(b):
        raise ValueError(
            f"{first} and {second} must have the same shape, got {jnp.shape(a)} and {jnp.shape(b)}"
        )


def check_fits(shape: tuple[Size, ...], **arrays: Any) -> None:
    """Raises ValueError that shows both shapes if an array does not broadcast to `shape`."""
    for name, array in arrays.items():
        own = jnp.shape(array)
        fits = len(own) <= len(shape) and all(
            n in (1, m) for n, m in zip(reversed(own), reversed(shape), strict=False)
        )
        if not fits:
            raise ValueError(f"{name} must broadcast to shape {shape}, got shape {own}")


def check_where(where: Any, shape: tuple[Size, ...]) -> None:
    """Raises TypeError for a mask that is not boolean, ValueError for one that does not fit."""
    if where is None:
        return
    if jnp.result_type(where) != jnp.bool_:
        raise TypeError(f"where must be boolean, got {jnp.result_type(where)}; write mask != 0")
    check_fits(shape, where=where)


def check_labels(positions: tuple[Size, ...], **labels: Any) -> None:
    """Raises TypeError for labels that are not integers, ValueError unless there is one each."""
    for name, x in labels.items():
        if not jnp.issubdtype(jnp.result_type(x), jnp.integer):
            raise TypeError(f"{name} must be integers, got {jnp.result_type(x)}")
        if jnp.shape(x) != positions:
            raise ValueError(
                f"{name} must have shape {positions}, that of the positions, got {jnp.shape(x)}"
            )


def check_classes(**inputs: Any) -> None:
    """Raises ValueError for an array that has no axis of classes, or no class on it."""
    for name, x in inputs.items():
        if not jnp.ndim(x) or not jnp.shape(x)[-1]:
            raise ValueError(f"{name} needs classes on its last axis, got shape {jnp.shape(x)}")
