"""Frozen dataclasses that are pytrees: numbers are leaves, options are structure."""

import dataclasses
import numbers
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar, dataclass_transform, get_args, get_origin

import jax
import jax.numpy as jnp
import numpy as np

from penalties_jax.functional.checks import (
    ANY,
    Range,
    as_number,
    bare,
    is_numeric,
    let_in,
    option_of,
)

__all__ = ["Range", "config", "number", "option", "stack"]

Class = TypeVar("Class", bound=type)
Tree = TypeVar("Tree")

# Every config class by its name, which is how a serialised config says what it is.
TYPES: dict[str, type] = {}


def number(
    *,
    default: Any = dataclasses.MISSING,
    valid: Range = ANY,
    choices: Any = None,
    single: bool = False,
    learned: bool = False,
    kw_only: bool = False,
) -> Any:
    """A field of a config that is a leaf: a number, an array, a schedule, or a pytree of them.

    Args:
        default: What it is if it is not given; None makes it optional.
        valid: The `pj.Range` that a plain number has to be in, else it is a ValueError.
        choices: A `Literal` of names that stand for a computed number; they are structure.
        single: Whether it is one for all arrays of an input, never a pytree like the input.
        learned: Whether a Flax module that holds it makes it a parameter.
        kw_only: Whether it is given by name only.

    Examples:
        >>> @pj.config
        ... class Shifted(pj.Separable):
        ...     shift: float = pj.number(default=0.0)
        ...     formula = staticmethod(lambda x, shift: jnp.abs(x - shift))
        >>> float(Shifted(1.0)(jnp.array([0.0, 3.0])))
        3.0
    """
    metadata = {
        "valid": valid,
        "choices": choices,
        "single": single,
        "learned": learned,
        "check": _checked_number,
    }
    return dataclasses.field(default=default, kw_only=kw_only, metadata=metadata)


def in_range(label: str, valid: Range) -> Callable[[Any], Any]:
    """Gives a number or a schedule as a field holds it; ValueError if it is out of its range."""
    return partial(_checked_number, label, field=number(valid=valid, single=True))


def option(
    *,
    default: Any = dataclasses.MISSING,
    choices: Any = None,
    valid: Range = ANY,
    kw_only: bool = False,
) -> Any:
    """A field of a config that is structure: changing it changes the program.

    Args:
        default: What it is if it is not given.
        choices: A `Literal` of what it may be, else it is a ValueError; without one, what is not of
            the annotated type is a TypeError.
        valid: The `pj.Range` that a number has to be in, else it is a ValueError.
        kw_only: Whether it is given by name only.

    Examples:
        >>> @pj.config
        ... class Power(pj.Separable):
        ...     exponent: int = pj.option(default=2)
        ...     formula = staticmethod(lambda x, exponent: x**exponent)
        >>> float(Power(4)(jnp.array([1.0, 2.0])))
        17.0
    """
    metadata = {"option": True, "choices": choices, "range": valid}
    return dataclasses.field(default=default, kw_only=kw_only, metadata=metadata)


def numbers_by_name() -> Any:
    """A field that is a dict of numbers, as those of `number`."""
    metadata = {"check": _checked_numbers}
    return dataclasses.field(default_factory=dict, kw_only=True, metadata=metadata)


def arrays() -> Any:
    """A field that is a pytree of arrays."""
    return dataclasses.field(metadata={"check": _checked_arrays})


@dataclass_transform(frozen_default=True, eq_default=False, field_specifiers=(number, option))
def abstract(cls: Class) -> Class:
    """Gives a base class of configs fields that its subclasses share."""
    return dataclasses.dataclass(frozen=True, eq=False, repr=False)(cls)


@dataclass_transform(frozen_default=True, eq_default=False, field_specifiers=(number, option))
def config(cls: Class) -> Class:
    """Makes a class a frozen dataclass and a pytree: a decorator.

    Fields that are made by `pj.option` are structure, all others children. Numbers and options are
    checked when it is constructed, and never when it is unflattened. It is found again by its name,
    by `pj.from_dict`.

    Args:
        cls: A subclass of `pj.Penalty` or `pj.Separable`.

    Returns:
        The class.

    Raises:
        ValueError: If there is a config of the same name in another module.

    Examples:
        >>> @pj.config
        ... class Cubed(pj.Separable):
        ...     formula = staticmethod(lambda x: jnp.abs(x) ** 3)
        >>> float(Cubed(weights=0.5)(jnp.array([-1.0, 2.0])))
        4.5
    """
    cls = abstract(cls)
    names = [field.name for field in fields(cls)]

    def flatten_with_keys(node):
        static, children = [], []
        for field in fields(cls):
            value = getattr(node, field.name)
            if _is_structure(field, value):
                static.append((field.name, value))
            else:
                children.append((jax.tree_util.GetAttrKey(field.name), value))
        return children, tuple(static)

    def unflatten(static, children):
        values = dict(static)
        values |= zip([name for name in names if name not in values], children, strict=True)
        return _build(cls, values)

    # A notebook defines a class again and again.
    known = TYPES.setdefault(cls.__name__, cls)
    if known.__module__ != cls.__module__:
        raise ValueError(f"there is a config called {cls.__name__} already, in {known.__module__}")
    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten)
    TYPES[cls.__name__] = cls
    return cls


def fields(node: Any) -> tuple[dataclasses.Field, ...]:
    """The dataclass fields of a config or its class."""
    return dataclasses.fields(node)


def _is_structure(field, value):
    """Options are, and names that stand for a computed number."""
    return field.metadata.get("option") or (
        isinstance(value, str) and value in get_args(field.metadata.get("choices"))
    )


def _build(cls, values):
    node = object.__new__(cls)
    for name, value in values.items():
        object.__setattr__(node, name, value)
    return node


class Pytree:
    """What all configs share: a checked construction and equality by value."""

    def __new__(cls, *values: Any, **named: Any):
        if "__dataclass_fields__" not in vars(cls):
            raise TypeError(f"{cls.__name__} is no config: decorate the class with pj.config")
        return super().__new__(cls)

    def __post_init__(self):
        for field in fields(self):
            label = f"{type(self).__name__}.{field.name}"
            value = getattr(self, field.name)
            value = field.metadata.get("check", _checked_option)(label, value, field)
            object.__setattr__(self, field.name, value)

    def __eq__(self, other):
        if type(self) is not type(other):
            return NotImplemented
        leaves, structure = jax.tree.flatten(self)
        other_leaves, other_structure = jax.tree.flatten(other)
        return structure == other_structure and all(
            np.shape(a) == np.shape(b) and np.array_equal(a, b)
            for a, b in zip(leaves, other_leaves, strict=True)
        )

    def __repr__(self):
        shown = (
            f"{field.name}={value!r}"
            for field, value in ((field, getattr(self, field.name)) for field in fields(self))
            if type(value) is not type(field.default) or value != field.default
        )
        return f"{type(self).__name__}({', '.join(shown)})"

    def __hash__(self):
        return hash((type(self), jax.tree.structure(self)))

    def _with(self: Tree, **values: Any) -> Tree:
        current = {field.name: getattr(self, field.name) for field in fields(self)}
        return _build(type(self), current | values)


class Schedule:
    """A value that depends on the step: a callable from the step, and a pytree."""

    def constant(self: Tree, value: Any) -> Tree:
        """A schedule like this one, with the same options, that is `value` at every step."""
        raise NotImplementedError

    def endpoints(self) -> tuple[Any, ...]:
        """The values that bound it, as far as they are known."""
        return ()


@jax.tree_util.register_static
class BareSchedule(Schedule):
    """A callable from the step that is not a pytree, kept as structure, equal by identity."""

    def __init__(self, schedule: Callable[[Any], Any], label: str):
        self.schedule = schedule
        self.label = label

    def __call__(self, count: Any) -> Any:
        """The value at step `count`."""
        return self.schedule(count)

    def refuse(self, what: str) -> TypeError:
        """The error for what only schedules that are pytrees can do."""
        return TypeError(
            f"{self.label} is a bare schedule, {self.schedule!r}, and can't be {what}; "
            "use pj.anneal"
        )

    def __eq__(self, other):
        return isinstance(other, BareSchedule) and self.schedule is other.schedule

    def __hash__(self):
        return id(self.schedule)

    def __repr__(self):
        return repr(self.schedule)

    def __deepcopy__(self, memo):
        return self

    def __reduce__(self):
        raise self.refuse("pickled")


def is_schedule(node: Any) -> bool:
    """Whether a node of a config is a schedule."""
    return isinstance(node, Schedule)


def resolve(tree: Tree, step: Any) -> Tree:
    """Replaces every schedule in a pytree by its value at `step`."""
    return jax.tree.map(
        lambda node: node(step) if is_schedule(node) else node, tree, is_leaf=is_schedule
    )


def refuse_schedules(node: Pytree, *names: str) -> None:
    """Raises TypeError for a schedule in a field where there can't be one."""
    for name in names:
        if has_schedule(getattr(node, name)):
            raise TypeError(f"{type(node).__name__}.{name} can't be a schedule")


def with_learned(node: Tree, make: Callable[[str, Any], Any]) -> Tree:
    """A config with `make(name, value)` in the place of numbers that are learned."""
    if not isinstance(node, Pytree):
        return node
    learned = [field.name for field in fields(node) if field.metadata.get("learned")]
    values = {name: getattr(node, name) for name in learned}
    return node._with(**{name: make(name, x) for name, x in values.items() if not is_schedule(x)})


def has_schedule(tree: Any) -> bool:
    """Whether any value in a pytree still depends on the step."""
    return any(map(is_schedule, jax.tree.leaves(tree, is_leaf=is_schedule)))


def stack(configs: Sequence[Tree]) -> Tree:
    """Stacks configs of one type leaf by leaf, to map over them with `jax.vmap`.

    Args:
        configs: At least one config, schedule, term or objective, all with the same options.

    Returns:
        One of the same type, whose leaves have a new leading axis: n numbers become an array [n].
        A number that is a schedule in another config becomes one that stays what it is.

    Raises:
        ValueError: If there is none, or if two differ in type or in an option, which is named.
        TypeError: If one holds a bare schedule, whose field is named.

    Examples:
        >>> sweep = pj.stack([pj.SmoothL0(gamma=gamma) for gamma in (0.1, 1.0)])
        >>> values = jax.vmap(lambda config: config(jnp.ones(3)))(sweep)
        >>> [round(float(value), 3) for value in values]
        [2.97, 1.5]
        >>> pj.stack([pj.L1(weights=w) for w in (2.0, pj.anneal(0, 1, start=0, end=9))]).at(0)
        L1(weights=Array([2., 0.], dtype=float32))
    """
    if not configs:
        raise ValueError("stack needs at least one config, got none")
    for node in jax.tree.leaves(configs, is_leaf=is_schedule):
        if isinstance(node, BareSchedule):
            raise node.refuse("stacked")
    configs = _with_schedules(configs)
    for other in configs[1:]:
        _check_same_options(configs[0], other, type(configs[0]).__name__)
    return jax.tree.map(lambda *leaves: jnp.stack([jnp.asarray(leaf) for leaf in leaves]), *configs)


def _with_schedules(configs):
    """The configs, in which a number is a constant schedule where it is a schedule in another."""
    flat = [jax.tree.flatten(config, is_leaf=is_schedule) for config in configs]
    if len({structure for _, structure in flat}) > 1:
        return configs

    def alike(nodes):
        schedule = next(filter(is_schedule, nodes), None)
        if schedule is None:
            return nodes
        return [node if is_schedule(node) else schedule.constant(node) for node in nodes]

    columns = [alike(nodes) for nodes in zip(*(leaves for leaves, _ in flat), strict=True)]
    return [
        structure.unflatten(column[i] for column in columns)
        for i, (_, structure) in enumerate(flat)
    ]


def _check_same_options(a, b, label):
    if type(a) is not type(b):
        raise ValueError(f"stack needs configs of one type; {label} is {a!r} and {b!r}")
    if isinstance(a, Pytree):
        for field in fields(a):
            x, y = getattr(a, field.name), getattr(b, field.name)
            name = f"{label}.{field.name}"
            if _is_structure(field, x) or _is_structure(field, y):
                if type(x) is not type(y) or x != y:
                    raise ValueError(f"stack needs the same options; {name} is {x!r} and {y!r}")
            elif jax.tree.structure(x) != jax.tree.structure(y):
                _check_same_options(x, y, name)
    elif isinstance(a, dict) and a.keys() == b.keys():
        for key in a:
            _check_same_options(a[key], b[key], f"{label}[{key!r}]")
    elif jax.tree.structure(a) != jax.tree.structure(b):
        raise ValueError(f"stack needs configs of one structure; {label} is {a!r} and {b!r}")


def _checked_option(label, value, field):
    value = checked(label, value, field.metadata.get("choices") or field.type)
    if isinstance(value, numbers.Real):
        field.metadata.get("range", ANY).check(**{label: value})
    return value


def checked(label: str, value: Any, annotation: Any) -> Any:
    """A value as a field of an annotated type holds it; an error names the item that is of none."""
    value = tuple(value) if isinstance(value, list) else value
    if not isinstance(value, tuple | Mapping):
        return option_of(annotation)(label, value)
    kind, parameters = get_origin(annotation), get_args(annotation)
    if isinstance(value, tuple) and kind is tuple and parameters[1:] == (...,):
        return tuple(checked(f"{label}[{i}]", item, parameters[0]) for i, item in enumerate(value))
    if isinstance(value, Mapping) and kind is Mapping:
        of_name, of_item = parameters
        return {
            checked(f"{label}: a name", name, of_name): checked(f"{label}[{name!r}]", x, of_item)
            for name, x in value.items()
        }
    return option_of(annotation)(label, value)


def _checked_number(label, value, field):
    # A number is what a variable holds now: it does not move along with a model.
    value = bare(value)
    choices, valid = field.metadata["choices"], field.metadata["valid"]
    if isinstance(value, str) and choices:
        return checked(label, value, choices)
    if value is None and field.default is None:
        return value

    def check(node):
        if is_schedule(node):
            valid.check_all(label, node, node.endpoints())
        elif callable(node) and not _is_config(node):
            node = BareSchedule(node, label)
        elif isinstance(node, float) or (is_numeric(node) and not jnp.iscomplexobj(node)):
            node, given = _as_float(label, node), node
            valid.check_all(label, given, (node,))
        else:
            raise TypeError(f"{label} must be a number, an array or a schedule, got {value!r}")
        return node

    if value is None or field.metadata["single"]:
        return check(value)
    return jax.tree.map(check, value, is_leaf=_is_config)


def _is_config(node):
    return isinstance(node, Pytree | Schedule)


def _as_float(label, number):
    if not isinstance(number, numbers.Integral):
        return as_number(number)
    try:
        return float(number)
    except OverflowError as error:
        raise ValueError(f"{label} must be a number that floats reach, got a larger one") from error


def _checked_arrays(label, value, field):
    for node in jax.tree.leaves(value, is_leaf=_is_config):
        if _is_config(node):
            raise TypeError(f"{label} must be arrays, got {node!r}")
    return let_in(label, value)


def _checked_numbers(label, value, field):
    named = checked(label, value, field.type)
    return {
        name: _checked_number(f"{label}[{name!r}]", item, number()) for name, item in named.items()
    }
