"""Penalties that are one pure function, reduced over the arrays of a pytree."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, ClassVar

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
    leaves_by_name,
    spread,
)
from penalties_jax.terms.base import LAST, Numeric, Penalty, ProximalPart, is_absent


@abstract
class Reduced(Penalty):
    """A penalty that is its fields, and the function that takes them by name."""

    reduction: Reduction = option(default="sum", choices=Reduction, kw_only=True)
    axis_name: AxisName | None = option(default=None, kw_only=True)

    _function: ClassVar[Callable[..., Any]]

    def _pure(self) -> Callable[..., Any]:
        """The function."""
        return type(self)._function

    def _value(self, inputs, where):
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
        counts = [member._count(row[0], mask) for member, row, mask in present]
        return add_up(totals, counts, reduction=self.reduction, axis_name=self.axis_name)

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

    def _count(self, x, where):
        """How many values a mean over one array divides by."""
        shape = list(jnp.shape(x))
        if self.class_axis is not None:
            del shape[self.class_axis]
        return count(tuple(shape), where)

    def _members(self, structure):
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


def count_groups(x: Any, where: Any, axis: Axis | None) -> Any:
    """How many groups along an axis, or axes, have an included entry."""
    in_group = functools.partial(jnp.any, axis=axis)
    included = None if where is None else in_group(jnp.broadcast_to(where, jnp.shape(x)))
    return count(jax.eval_shape(in_group, x).shape, included)


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
            total = sum(self._count(leaf, None) for leaf in leaves if not is_absent(leaf))
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


class Separable(Weighted):
    """A sum over single values."""

    _by_group = False

    @public
    def elementwise(self, x: PyTree) -> PyTree:
        return self._with(reduction="none", axis_name=None)(x)
