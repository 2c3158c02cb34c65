"""Penalties that are one pure function, reduced over the arrays of a pytree."""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, PyTree

from penalties_jax._pytree import abstract, fields, number, option
from penalties_jax.functional.checks import NONNEGATIVE, public
from penalties_jax.functional.derivatives import Axis
from penalties_jax.functional.reduction import (
    AxisName,
    Reduction,
    add_up,
    count,
    evaluate,
    leaves_by_name,
    spread,
    summary,
)
from penalties_jax.terms.base import LAST, Numeric, Penalty, ProximalPart, is_absent

__all__ = ["Separable"]


@abstract
class Reduced(Penalty):
    """A penalty that is its fields, and the function that takes them by name."""

    reduction: Reduction = option(default="sum", choices=Reduction, kw_only=True)
    axis_name: AxisName | None = option(default=None, kw_only=True)

    _function: ClassVar[Callable[..., Any]]

    @property
    def has_reduction(self) -> bool:
        return True

    def _pure(self) -> Callable[..., Any]:
        """The function."""
        return type(self)._function

    def value(self, inputs, where):
        structure = jax.tree.structure(inputs[0], is_leaf=is_absent)
        rows = list(
            zip(*(leaves_by_name("an input", tree, structure) for tree in inputs), strict=True)
        )
        if any(len(set(map(is_absent, row))) > 1 for row in rows):
            raise ValueError("an array of one input is None in the other: leave it out of both")
        leaves = list(
            zip(self._members(structure), rows, spread("where", where, structure), strict=True)
        )
        if self.reduction == "none":
            return structure.unflatten(
                row[0] if is_absent(row[0]) else member._of_arrays(row, mask, "none")
                for member, row, mask in leaves
            )
        present = [leaf for leaf in leaves if not is_absent(leaf[1][0])]
        totals = [member._of_arrays(row, mask, "sum") for member, row, mask in present]
        counts = [self._count(row[0], mask) for _, row, mask in present]
        return add_up(totals, counts, reduction=self.reduction, axis_name=self.axis_name)

    def _metrics(self, inputs, where):
        structure = jax.tree.structure(inputs[0], is_leaf=is_absent)
        values = self._with(reduction="none").value(inputs, where)
        masks = [
            self._included(x, mask)[1]
            for x, mask in zip(
                jax.tree.leaves(inputs[0], is_leaf=is_absent),
                spread("where", where, structure),
                strict=True,
            )
            if not is_absent(x)
        ]
        return summary(jax.tree.leaves(values), masks, axis_name=self.axis_name)

    def _of_arrays(self, row, where, reduction):
        """The function of one array of each input."""
        function = self._pure()
        options = {"reduction": reduction, "where": where, "axis_name": self.axis_name}
        return self._call(function, row, self._numbers_of(function) | options)

    def _call(self, function, row, options):
        return function(*row, **options)

    def _numbers_of(self, function):
        """The fields that a function takes; one that is None is left to its default."""
        taken = parameters_of(function) - {"reduction", "axis_name"}
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name in taken}
        return {name: value for name, value in values.items() if value is not None}

    def _included(self, x, where):
        """The shape of the values of one array, and the mask of those that count."""
        shape = list(jnp.shape(x))
        if self.class_axis is not None:
            del shape[self.class_axis]
        return tuple(shape), where

    def _count(self, x, where):
        """How many values a mean over one array divides by."""
        return count(*self._included(x, where))

    def _members(self, structure) -> Sequence[Any]:
        """One config for each array: numbers given as pytrees like the input are dealt out."""
        columns = {
            field.name: spread(field.name, getattr(self, field.name), structure)
            for field in fields(self)
            if "valid" in field.metadata
        }
        return [
            self._with(**{name: column[i] for name, column in columns.items()})
            for i in range(structure.num_leaves)
        ]


def groups(x: Any, where: Any, axis: Axis | None) -> tuple[tuple[int, ...], Any]:
    """The shape of what is left of an array along an axis, or axes, and what has an entry there."""
    in_group = functools.partial(jnp.any, axis=axis)
    included = None if where is None else in_group(jnp.broadcast_to(where, jnp.shape(x)))
    return jax.eval_shape(in_group, x).shape, included


@functools.cache
def parameters_of(function: Callable[..., Any]) -> frozenset[str]:
    """The names of a function's parameters."""
    return frozenset(inspect.signature(function).parameters)


@abstract
class Weighted(Reduced):
    """A weighted sum over values or groups, which may have a proximal operator."""

    weights: Numeric = number(default=1.0, valid=NONNEGATIVE, kw_only=True)

    _prox: ClassVar[Callable[..., Array] | None] = None
    _order: ClassVar[int] = LAST
    _by_group: ClassVar[bool] = True

    def _proximal_parts(self, leaves, structure, step_size):
        operator = type(self)._prox
        if operator is None:
            raise self._without_prox()
        if self.reduction == "none":
            raise ValueError('prox needs a scalar penalty: reduction must be "sum" or "mean"')
        if self.reduction == "mean":
            present = [leaf for leaf in leaves if not is_absent(leaf)]
            total = sum(self._count(leaf, None) for leaf in present)
            members = 1 if self.axis_name is None else lax.psum(1, self.axis_name)
            step_size = step_size / max(total * members, 1)
        return [
            [] if is_absent(leaf) else [member._proximal_part(operator, step_size)]
            for member, leaf in zip(self._members(structure), leaves, strict=True)
        ]

    def _proximal_part(self, operator, step_size):
        step = step_size * self.weights
        operator = functools.partial(operator, **self._numbers_of(operator))
        return ProximalPart(operator, step, self._order, self._curvature(step), self._by_group)

    def _curvature(self, step):
        del step  # nothing in it is quadratic
        return 0.0


class PerValue(NamedTuple):
    """A function of each value, and the options it is given: found again by their identity."""

    function: Callable[..., Array]
    options: tuple[tuple[str, Any], ...] = ()

    def __call__(self, x: Array, **numbers: Array) -> Array:
        """The values, of the shape of `x`; a ValueError if they are of another."""
        values = jnp.asarray(self.function(x, **numbers, **dict(self.options)))
        if values.shape != x.shape:
            raise ValueError(
                f"{self.function!r} must return a value for each of its input, of shape {x.shape}, "
                f"got shape {values.shape}; a function of the whole input is a pj.Function"
            )
        return values


@abstract
class Separable(Weighted):
    r"""A weighted sum over single values, $\sum_i w_i f(x_i)$: the base for one of your own.

    A subclass is decorated with `pj.config`, has the hyperparameters of $f$ as fields, and $f$ as
    `formula`, a static method from an array and those of the fields that it names to an array of
    the same shape. It then is all that `pj.L1` is: a pytree that takes trees, masks, weights,
    schedules, meshes, and its gradient by automatic differentiation. The function may be called
    with 0 where `where` excludes an entry. For a function without a class there is
    `pj.Elementwise`.

    Attributes:
        weights, reduction, axis_name: As in `pj.L1`.

    Examples:
        >>> @pj.config
        ... class Cauchy(pj.Separable):
        ...     gamma: float = pj.number(default=1.0)
        ...
        ...     @staticmethod
        ...     def formula(x, gamma):
        ...         return jnp.log1p((x / gamma) ** 2)
        >>> round(float(Cauchy(gamma=2.0)(jnp.array([0.0, -2.0]))), 4)
        0.6931
    """

    formula: ClassVar[Callable[..., Array] | None] = None

    def _of_arrays(self, row, where, reduction):
        formula, numbers, fill = self._per_value()
        if formula is None:
            return super()._of_arrays(row, where, reduction)
        return evaluate(
            formula,
            tuple(map(jnp.asarray, row)),
            numbers,
            reduction,
            where,
            self.axis_name,
            weights=self.weights,
            fill=fill,
            cached=not self.of_function,
        )

    def _per_value(self) -> tuple[PerValue | None, Mapping[str, Any], float]:
        """What it is of each value, of which numbers, and what it is given for no value."""
        formula = type(self).formula
        if formula is None:
            return None, {}, 0.0
        numbers = self._numbers_of(formula)
        options = {f.name for f in fields(self) if f.metadata.get("option")} & numbers.keys()
        given = tuple((name, numbers.pop(name)) for name in sorted(options))
        return PerValue(formula, given), numbers, 0.0

    _by_group = False

    @public
    def elementwise(self, x: PyTree) -> PyTree:
        return self._with(reduction="none", axis_name=None)(x)
