"""Configs as plain dicts, JSON and YAML."""

import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable, Mapping
from types import UnionType
from typing import Any, Union, get_args, get_origin

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from penalties_jax._pytree import TYPES, BareSchedule, Pytree, fields

__all__ = ["from_dict", "from_json", "from_yaml", "to_dict", "to_json", "to_yaml"]

_RESERVED = {"type", "array", "tuple"}

# What the names of functions in a serialised config mean.
Functions = Mapping[str, Callable[..., Any]]


def to_dict(config: Pytree) -> dict[str, Any]:
    """A config, such as a penalty, a term or an objective, as a dict of plain Python values.

    Returns:
        {"type": its class, and its fields}. Arrays become {"array": nested lists, "dtype": name},
        and a function that can be imported, of `pj.Elementwise`, `pj.Function`,
        `pj.ImportanceMinimality` or the loss of an objective, "module:name".

    Raises:
        TypeError: If it holds another function, such as a lambda or a bare schedule: its field is
            named.

    Examples:
        >>> pj.to_dict(pj.L1(weights=0.5))
        {'type': 'L1', 'reduction': 'sum', 'axis_name': None, 'weights': 0.5}
    """
    name = type(config).__name__
    if not isinstance(config, Pytree):
        raise TypeError(f"to_dict takes a config, got {config!r}")
    values = {}
    for field in fields(config):
        value = getattr(config, field.name)
        if field.metadata.get("option") and isinstance(value, tuple):
            value = list(value)
        label = f"{name}.{field.name}"
        function = _function_of(value) if _takes_function(field) else None
        values[field.name] = _encode(value, label) if function is None else _name(function, label)
    return {"type": name, **values}


def from_dict(data: dict[str, Any], *, functions: Functions | None = None) -> Any:
    """The config that `pj.to_dict` was given; its numbers are checked as in the constructor.

    Args:
        data: What `pj.to_dict` returned. Arrays come back as NumPy arrays.
        functions: The functions that its names, such as "module:name", stand for. Nothing is
            imported.

    Raises:
        ValueError: If "type" is missing or unknown, or a value is out of range.
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
    return _config(data, "", functions or {})


def to_json(config: Pytree) -> str:
    """A config as JSON, by `pj.to_dict`, which says what is raised.

    Examples:
        >>> pj.from_json(pj.to_json(pj.Huber(delta=2.0))).delta
        2.0
    """
    return json.dumps(to_dict(config), indent=2)


def from_json(text: str, *, functions: Functions | None = None) -> Any:
    """The config that `pj.to_json` was given, by `pj.from_dict`; a ValueError for what is not JSON.

    Args:
        text: The JSON.
        functions: As in `pj.from_dict`.

    Examples:
        >>> pj.from_json('{"type": "L2", "clip": 3.0}').clip
        3.0
    """
    return from_dict(json.loads(text), functions=functions)


def to_yaml(config: Pytree) -> str:
    """A config as YAML, by `pj.to_dict`; needs PyYAML, of the extra `recipes`.

    Examples:
        >>> pj.from_yaml(pj.to_yaml(pj.Lp(p=0.5))) == pj.Lp(p=0.5)
        True
    """
    from penalties_jax import _yaml

    return _yaml.dump(to_dict(config))


def from_yaml(text: str, *, functions: Functions | None = None) -> Any:
    """The config that `pj.to_yaml` was given, by `pj.from_dict`; a `yaml.YAMLError` for other text.

    1e-4 is a number and `on` a word, as in YAML 1.2.

    Args:
        text: The YAML.
        functions: As in `pj.from_dict`.

    Examples:
        >>> pj.from_yaml("{type: L1, reduction: mean}").reduction
        'mean'
    """
    from penalties_jax import _yaml

    return from_dict(_yaml.load(text), functions=functions)


def _encode(value, label):
    match value:
        case BareSchedule():
            raise value.refuse("serialised")
        case Pytree():
            return to_dict(value)
        case None | bool() | str():
            return value
        case np.generic() | np.ndarray() | jax.Array():
            return {"array": np.asarray(value).tolist(), "dtype": np.asarray(value).dtype.name}
        case int() | float():
            return value
        case dict():
            if _RESERVED & value.keys() or not all(isinstance(key, str) for key in value):
                raise TypeError(f"{label}: keys must be strings other than {sorted(_RESERVED)}")
            return {key: _encode(item, f"{label}[{key!r}]") for key, item in value.items()}
        case list():
            return [_encode(item, f"{label}[{i}]") for i, item in enumerate(value)]
        case tuple():
            return {"tuple": _encode(list(value), label)}
        case _:
            raise TypeError(f"{label} is {value!r}, which can't be serialised")


def _takes_function(field):
    """Whether a field may be a function, and a string in it is the name of one."""
    union = get_origin(field.type) in (Union, UnionType)
    kinds = get_args(field.type) if union else (field.type,)
    return any(get_origin(kind) is Callable for kind in kinds) and str not in kinds


def _function_of(value):
    """The function that a field holds; None if it holds none."""
    bare = (
        value.func if isinstance(value, Partial) and not (value.args or value.keywords) else value
    )
    return bare if callable(bare) and not isinstance(bare, Pytree) else None


def _name(function, label):
    """The "module:name" by which a function is found."""
    module, name = getattr(function, "__module__", ""), getattr(function, "__qualname__", "")
    if getattr(sys.modules.get(module), name, None) is not function:
        raise TypeError(
            f"{label} is {function!r}, which can't be serialised: only a function that can be "
            "imported by its name can"
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
        # JSON has no tuples.
        if field.name in values and "valid" not in field.metadata:
            value = values[field.name]
            values[field.name] = tuple(value) if isinstance(value, list) else value
    with _errors_at(path, kind):
        return TYPES[kind](**values)


def _decode(value, path, functions):
    match value:
        case {"type": _}:
            return _config(value, path, functions)
        case {"array": items, "dtype": dtype}:
            with _errors_at(path):
                return np.asarray(items, jnp.dtype(dtype))
        case {"tuple": list(items)}:
            return tuple(_decode(items, path, functions))
        case dict():
            return {
                key: _decode(item, f"{path}[{key!r}]", functions) for key, item in value.items()
            }
        case list():
            return [_decode(item, f"{path}[{i}]", functions) for i, item in enumerate(value)]
        case _:
            return value


@contextlib.contextmanager
def _errors_at(path, kind=""):
    """Gives an error the path of what it is about, in place of the name of a type."""
    try:
        yield
    except (TypeError, ValueError) as error:
        own, dot, field = str(error).partition(".")
        message = f"{path}.{field}" if dot and own == kind else f"{path}: {error}"
        raise (TypeError if isinstance(error, TypeError) else ValueError)(message) from error
