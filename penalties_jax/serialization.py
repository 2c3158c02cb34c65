"""Configs as plain dicts, JSON and YAML."""

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
        TypeError: If a field is missing or unknown.

    Examples:
        >>> pj.from_dict({"type": "SmoothL0", "gamma": 0.1}).gamma
        0.1
    """
    kind = data.get("type") if isinstance(data, dict) else data
    if kind is data or not isinstance(kind, str) or kind not in TYPES:
        raise ValueError(f"type must be one of {sorted(TYPES)}, got {kind!r}")
    values = {name: _decode(value) for name, value in data.items() if name != "type"}
    return TYPES[kind](**values)


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
    import yaml

    return yaml.safe_dump(to_dict(config), sort_keys=False)


def from_yaml(text: str) -> Any:
    """The config that `pj.to_yaml` was given, by `pj.from_dict`; a `yaml.YAMLError` for other text.

    Examples:
        >>> pj.from_yaml("{type: L1, reduction: mean}").reduction
        'mean'
    """
    import yaml

    return from_dict(yaml.safe_load(text))


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


def _decode(value):
    match value:
        case {"type": _}:
            return from_dict(value)
        case {"array": items, "dtype": dtype}:
            return np.asarray(items, jnp.dtype(dtype))
        case {"tuple": items}:
            return tuple(_decode(item) for item in items)
        case dict():
            return {key: _decode(item) for key, item in value.items()}
        case list():
            return [_decode(item) for item in value]
        case _:
            return value
