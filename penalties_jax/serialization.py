"""Configs as plain dicts, JSON and YAML."""

import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable, Mapping
from functools import partial
from types import UnionType
from typing import Any, Union, get_args, get_origin

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from penalties_jax._plain import TOO_DEEP, check_bounds, check_length, number, repeated
from penalties_jax._pytree import TYPES, BareSchedule, Pytree, fields
from penalties_jax.functional.checks import is_real

__all__ = ["from_dict", "from_json", "from_yaml", "to_dict", "to_json", "to_yaml"]

# The keys that say what a dict stands for, and what such a dict looks like.
_FORMS = {
    "type": '{"type": name, and its fields}',
    "array": '{"array": numbers, or lists of them, "dtype": name, "shape": sizes if any is 0}',
    "tuple": '{"tuple": list}',
    "namedtuple": '{"namedtuple": "module:name", "fields": dict}',
}

# What the names of functions in a serialised config mean.
Functions = Mapping[str, Callable[..., Any]]


def to_dict(config: Pytree) -> dict[str, Any]:
    """A config, such as a penalty, a term or an objective, as a dict of plain Python values.

    Returns:
        {"type": its class, and its fields}. Arrays become {"array": nested lists, "dtype": name},
        with their "shape" if a size is 0; tuples {"tuple": list}; NamedTuples
        {"namedtuple": "module:name", "fields": dict}; and a function that can be imported, of
        `pj.Elementwise`, `pj.Function`, `pj.ImportanceMinimality` or the loss of an objective,
        "module:name".

    Raises:
        TypeError: If it holds another function, such as a lambda or a bare schedule, or a mapping
            or sequence of another type: its field is named.
        ValueError: If it has more than 300,000 keys and values, or is nested more than 64 levels
            deep.

    Examples:
        >>> pj.to_dict(pj.L1(weights=0.5))
        {'type': 'L1', 'reduction': 'sum', 'axis_name': None, 'weights': 0.5}
    """
    if not isinstance(config, Pytree):
        raise TypeError(f"to_dict takes a config, got {config!r}")
    data = _encode_config(config)
    check_bounds(data)
    return data


def from_dict(data: dict[str, Any], *, functions: Functions | None = None) -> Any:
    """The config that `pj.to_dict` was given; its numbers are checked as in the constructor.

    Args:
        data: What `pj.to_dict` returned. Arrays come back as NumPy arrays.
        functions: The functions that its names, such as "module:name", stand for. Nothing is
            imported: the module of a NamedTuple has to be, before.

    Raises:
        ValueError: If "type" is missing or unknown, a value is out of range, a number is none of
            its dtype, or there is more than `pj.to_dict` writes.
        TypeError: If a field is missing or unknown, a value is of another type, or `functions` does
            not have a name. Each names the path of what is wrong, such as
            `Objective.terms['kl'].penalty`.

    Examples:
        >>> pj.from_dict({"type": "SmoothL0", "gamma": 0.1}).gamma
        0.1
        >>> data = {"type": "Elementwise", "function": "jax.nn:softplus"}
        >>> penalty = pj.from_dict(data, functions={"jax.nn:softplus": jax.nn.softplus})
        >>> round(float(penalty(jnp.zeros(1))), 4)
        0.6931
    """
    check_bounds(data)
    return _config(data, "", functions or {})


def to_json(config: Pytree) -> str:
    """A config as JSON, by `pj.to_dict`, which says what is raised.

    A ValueError too for more than 4,000,000 characters.

    Examples:
        >>> pj.from_json(pj.to_json(pj.Huber(delta=2.0))).delta
        2.0
    """
    text = json.dumps(to_dict(config), indent=2)
    check_length(text)
    return text


def from_json(text: str, *, functions: Functions | None = None) -> Any:
    """The config that `pj.to_json` was given, by `pj.from_dict`.

    A ValueError for what is not JSON, has a key twice in one object, or is longer than `pj.to_json`
    writes.

    Args:
        text: The JSON.
        functions: As in `pj.from_dict`.

    Examples:
        >>> pj.from_json('{"type": "L2", "clip": 3.0}').clip
        3.0
    """
    check_length(text)
    try:
        data = json.loads(
            text,
            parse_float=partial(number, float),
            parse_int=partial(number, int),
            object_pairs_hook=_object,
        )
    except RecursionError as error:
        raise ValueError(f"the text {TOO_DEEP}") from error
    return from_dict(data, functions=functions)


def to_yaml(config: Pytree) -> str:
    """A config as YAML, by `pj.to_dict`; needs PyYAML, of the extra `recipes`.

    A ValueError too for more than 20,000 keys and values, or 300,000 characters.

    Examples:
        >>> pj.from_yaml(pj.to_yaml(pj.Lp(p=0.5))) == pj.Lp(p=0.5)
        True
    """
    from penalties_jax import _yaml

    return _yaml.dump(to_dict(config))


def from_yaml(text: str, *, functions: Functions | None = None) -> Any:
    """The config that `pj.to_yaml` was given, by `pj.from_dict`.

    A ValueError for what is not YAML, has a key twice in one mapping, has tags, or is more than
    `pj.to_yaml` writes once its aliases and merges (<<) are written out. 1e-4 and 010 are the
    numbers 0.0001 and 10, `on` and 2020-01-01 are words, as in YAML 1.2.

    Args:
        text: The YAML.
        functions: As in `pj.from_dict`.

    Examples:
        >>> pj.from_yaml("{type: L1, reduction: mean}").reduction
        'mean'
    """
    from penalties_jax import _yaml

    try:
        data = _yaml.load(text)
    except _yaml.ERROR as error:
        raise ValueError(f"the text is no YAML that is read: {error}") from error
    return from_dict(data, functions=functions)


def _object(pairs):
    for key in repeated(key for key, _ in pairs):
        raise ValueError(f"the text has the key {key!r} twice in one object")
    return dict(pairs)


def _encode_config(config):
    name = type(config).__name__
    values = {}
    for field in fields(config):
        value = getattr(config, field.name)
        if field.metadata.get("option") and isinstance(value, tuple):
            value = list(value)
        if isinstance(value, Partial) and not (value.args or value.keywords):
            value = value.func
        label = f"{name}.{field.name}"
        function = _function_of(value) if _takes_function(field) else None
        values[field.name] = _encode(value, label) if function is None else _name(function, label)
    return {"type": name, **values}


def _encode(value, label):
    match value:
        case BareSchedule():
            raise value.refuse("serialised")
        case Pytree():
            return _encode_config(value)
        case None | bool() | str():
            return value
        case np.generic() | np.ndarray() | jax.Array():
            return _encode_array(np.asarray(value))
        case int() | float():
            return value
        case dict() if type(value) is dict:
            if _FORMS.keys() & value.keys() or not all(isinstance(key, str) for key in value):
                raise TypeError(f"{label}: keys must be strings other than {sorted(_FORMS)}")
            return {key: _encode(item, f"{label}[{key!r}]") for key, item in value.items()}
        case list() if type(value) is list:
            return [_encode(item, f"{label}[{i}]") for i, item in enumerate(value)]
        case tuple() if type(value) is tuple:
            return {"tuple": _encode(list(value), label)}
        case _ if _is_named_tuple(type(value)):
            return {
                "namedtuple": _name(type(value), label),
                "fields": _encode(value._asdict(), label),
            }
        case _:
            raise TypeError(f"{label} is {value!r}, which can't be serialised")


def _encode_array(array):
    data = {"array": array.tolist(), "dtype": array.dtype.name}
    # Of no rows, a list does not tell how long they are.
    return data if array.size else data | {"shape": list(array.shape)}


def _takes_function(field):
    """Whether a field may be a function, and a string in it is the name of one."""
    union = get_origin(field.type) in (Union, UnionType)
    kinds = get_args(field.type) if union else (field.type,)
    return any(get_origin(kind) is Callable for kind in kinds) and str not in kinds


def _function_of(value):
    """The function that a field holds; None if it holds none."""
    return value if callable(value) and not isinstance(value, Pytree) else None


def _name(function, label):
    """The "module:name" by which a function is found."""
    module, name = getattr(function, "__module__", ""), getattr(function, "__qualname__", "")
    if getattr(sys.modules.get(module), name, None) is not function:
        raise TypeError(
            f"{label} is {function!r}, which can't be serialised: only what can be imported by its "
            "name can"
        )
    return f"{module}:{name}"


def _config(data, path, functions):
    """The config that is at a path; the root's is the name of its type."""
    kind = data.get("type") if isinstance(data, dict) else data
    if kind is data or not isinstance(kind, str) or kind not in TYPES:
        at = path and f"{path}: "
        raise ValueError(
            f"{at}type must be one of {sorted(TYPES)}, got {kind!r}; a class of your own is one "
            "once its module is imported"
        )
    path = path or kind
    given = {name: value for name, value in data.items() if name != "type"}
    names = [field.name for field in fields(TYPES[kind])]
    for name in given.keys() - names:
        raise TypeError(f"{path}: unknown field {name!r}; fields are {', '.join(names)}")
    for field in fields(TYPES[kind]):
        required = field.default is field.default_factory is dataclasses.MISSING
        if required and field.name not in given:
            raise TypeError(f"{path}: missing field {field.name!r}")
    values = {name: _decode(value, f"{path}.{name}", functions) for name, value in given.items()}
    for field in fields(TYPES[kind]):
        value = values.get(field.name)
        if isinstance(value, str) and _takes_function(field):
            if value not in functions:
                raise TypeError(
                    f"{path}.{field.name} is {value!r}, and functions= has "
                    f"{sorted(functions) or 'nothing'}: say what it means by "
                    f"functions={{{value!r}: ...}}"
                )
            values[field.name] = functions[value]
        # JSON has no tuples, and options are no lists.
        if isinstance(value, list) and "check" not in field.metadata:
            values[field.name] = tuple(value)
    with _errors_at(path, kind):
        return TYPES[kind](**values)


def _decode(value, path, functions):
    match value:
        case {"type": _}:
            return _config(value, path, functions)
        case {"array": items, "dtype": str(dtype), **rest} if rest.keys() <= {"shape"}:
            with _errors_at(path):
                return _array(items, dtype, **rest)
        case {"tuple": list(items), **rest} if not rest:
            return tuple(_decode(items, path, functions))
        case {"namedtuple": str(name), "fields": dict(items), **rest} if not rest:
            kind = _named_tuple(name, items, path)
            values = (_decode(items[field], f"{path}.{field}", functions) for field in kind._fields)
            return tuple.__new__(kind, values)
        case dict():
            for key in value:
                if not isinstance(key, str):
                    raise TypeError(f"{path}: keys must be strings, got {key!r}")
                if key in _FORMS:
                    raise TypeError(f"{path}: a dict with {key!r} must be {_FORMS[key]}")
            return {
                key: _decode(item, f"{path}[{key!r}]", functions) for key, item in value.items()
            }
        case list():
            return [_decode(item, f"{path}[{i}]", functions) for i, item in enumerate(value)]
        case _:
            return value


def _array(items, dtype, shape=None):
    """An array of a dtype; a TypeError or ValueError unless that is what the items are of."""
    dtype = jnp.dtype(dtype)
    if not is_real(dtype):
        raise TypeError(f"dtype must be one of real numbers or booleans, got {dtype.name!r}")
    # Of objects first: strings side by side would each take the room of the longest.
    if not all(isinstance(x, bool | int | float) for x in np.asarray(items, object).ravel()):
        raise TypeError(f"must be a number, or lists of numbers of one length, got {items!r}")
    given = np.asarray(items)
    if not is_real(given.dtype):
        raise ValueError(f"must be of integers of up to 64 bits, got {items!r}")
    with np.errstate(all="ignore"):
        array = given.astype(dtype)
    if jnp.issubdtype(dtype, jnp.floating):
        held = (np.isfinite(array) == np.isfinite(given)) & (np.isnan(array) == np.isnan(given))
    else:
        held = array.tolist() == given.tolist()
    if not np.all(held):
        raise ValueError(f"must be of what {dtype.name} can hold, got {items!r}")
    if shape is None:
        return array
    if not (isinstance(shape, list) and all(type(n) is int and 0 <= n < 2**31 for n in shape)):
        raise TypeError(f"shape must be a list of sizes, got {shape!r}")
    return array.reshape(shape)


def _is_named_tuple(kind):
    return isinstance(kind, type) and issubclass(kind, tuple) and hasattr(kind, "_fields")


def _named_tuple(name, items, path) -> Any:
    """The class of a name, which items are the fields of."""
    module, _, attribute = name.partition(":")
    # As it is: a module may import what it is asked for.
    kind: Any = vars(sys.modules[module]).get(attribute) if module in sys.modules else None
    if not _is_named_tuple(kind):
        raise TypeError(
            f"{path}: {name!r} is no NamedTuple of a module that is imported, and nothing is "
            "imported here"
        )
    if items.keys() != {*kind._fields}:
        raise TypeError(f"{path}: the fields of {name} are {kind._fields}, got {[*items]}")
    return kind


@contextlib.contextmanager
def _errors_at(path, kind=""):
    """Gives an error the path of what it is about, in place of the name of a type."""
    try:
        yield
    except (TypeError, ValueError) as error:
        own, dot, field = str(error).partition(".")
        message = f"{path}.{field}" if dot and own == kind else f"{path}: {error}"
        raise (TypeError if isinstance(error, TypeError) else ValueError)(message) from error
