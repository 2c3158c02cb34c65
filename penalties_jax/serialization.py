"""Configs as plain dicts, JSON and YAML."""

import contextlib
import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from penalties_jax._pytree import TYPES, BareSchedule, Pytree, fields

__all__ = ["from_dict", "from_json", "from_yaml", "to_dict", "to_json", "to_yaml"]

_RESERVED = {"type", "array", "tuple"}


def to_dict(config: Pytree) -> dict[str, Any]:
    """A config, such as a penalty, a term or an objective, as a dict of plain Python values.

    Returns:
        {"type": its class, and its fields}. Arrays become {"array": nested lists, "dtype": name}.

    Raises:
        TypeError: If it holds a function, such as a bare schedule, whose field is named.

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
        values[field.name] = _encode(value, f"{name}.{field.name}")
    return {"type": name, **values}


def from_dict(data: dict[str, Any]) -> Any:
    """The config that `pj.to_dict` was given; its numbers are checked as in the constructor.

    Args:
        data: What `pj.to_dict` returned. Arrays come back as NumPy arrays.

    Raises:
        ValueError: If "type" is missing or unknown, or a value is out of range.
        TypeError: If a field is missing or unknown, or a value is of another type. Each names the
            path of what is wrong, such as `Objective.terms['kl'].penalty`.

    Examples:
        >>> pj.from_dict({"type": "SmoothL0", "gamma": 0.1}).gamma
        0.1
    """
    return _config(data, "")


def to_json(config: Pytree) -> str:
    """A config as JSON, by `pj.to_dict`, which says what is raised.

    Examples:
        >>> pj.from_json(pj.to_json(pj.Huber(delta=2.0))).delta
        2.0
    """
    return json.dumps(to_dict(config), indent=2)


def from_json(text: str) -> Any:
    """The config that `pj.to_json` was given, by `pj.from_dict`; a ValueError for what is not JSON.

    Examples:
        >>> pj.from_json('{"type": "L2", "clip": 3.0}').clip
        3.0
    """
    return from_dict(json.loads(text))


def to_yaml(config: Pytree) -> str:
    """A config as YAML, by `pj.to_dict`; needs PyYAML, of the extra `recipes`.

    Examples:
        >>> pj.from_yaml(pj.to_yaml(pj.Lp(p=0.5))) == pj.Lp(p=0.5)
        True
    """
    from penalties_jax import _yaml

    return _yaml.dump(to_dict(config))


def from_yaml(text: str) -> Any:
    """The config that `pj.to_yaml` was given, by `pj.from_dict`; a `yaml.YAMLError` for other text.

    1e-4 is a number and `on` a word, as in YAML 1.2.

    Examples:
        >>> pj.from_yaml("{type: L1, reduction: mean}").reduction
        'mean'
    """
    from penalties_jax import _yaml

    return from_dict(_yaml.load(text))


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


def _config(data, path):
    """The config that is at a path; the root's is the name of its type."""
    kind = data.get("type") if isinstance(data, dict) else data
    if kind is data or not isinstance(kind, str) or kind not in TYPES:
        at = path and f"{path}: "
        raise ValueError(f"{at}type must be one of {sorted(TYPES)}, got {kind!r}")
    path = path or kind
    given = {name: value for name, value in data.items() if name != "type"}
    names = [field.name for field in fields(TYPES[kind])]
    for name in given.keys() - names:
        raise TypeError(f"{path}: unknown field {name!r}; fields are {', '.join(names)}")
    for field in fields(TYPES[kind]):
        required = field.default is field.default_factory is dataclasses.MISSING
        if required and field.name not in given:
            raise TypeError(f"{path}: missing field {field.name!r}")
    values = {name: _decode(value, f"{path}.{name}") for name, value in given.items()}
    for field in fields(TYPES[kind]):
        # JSON has no tuples.
        if field.name in values and "valid" not in field.metadata:
            value = values[field.name]
            values[field.name] = tuple(value) if isinstance(value, list) else value
    with _errors_at(path, kind):
        return TYPES[kind](**values)


def _decode(value, path):
    match value:
        case {"type": _}:
            return _config(value, path)
        case {"array": items, "dtype": dtype}:
            with _errors_at(path):
                return np.asarray(items, jnp.dtype(dtype))
        case {"tuple": list(items)}:
            return tuple(_decode(items, path))
        case dict():
            return {key: _decode(item, f"{path}[{key!r}]") for key, item in value.items()}
        case list():
            return [_decode(item, f"{path}[{i}]") for i, item in enumerate(value)]
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
