"""Divergences of rows of logits: nothing of the size of the logits is kept in memory.

A row is the logits of one position. In the forward pass rows go by in blocks that stay in cache
(`blocks.map_rows`), and leave a few numbers each: the normalisers of their distributions, and the
sums of their slopes. With those the derivative is elementwise, and needs no blocks: for a
divergence whose slope through log p_c is s_c, it is s_c - p_c sum(s) through the logits of P.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from penalties_jax.functional.checks import (
    POSITIVE,
    Size,
    check_block_size,
    check_choice,
    check_classes,
    check_fits,
    check_same_shape,
    check_where,
    standard_promotion,
)
from penalties_jax.functional.divergences.blocks import map_rows
from penalties_jax.functional.divergences.formulas import Distributions, Formula, log_ratio
from penalties_jax.functional.platform import rows_in_block
from penalties_jax.functional.reduction import (
    AxisName,
    Reduction,
    lie_alike,
    promote,
    reduce,
    vary_alike,
    wide,
)


class Options(NamedTuple):
    """What all streamed functions share."""

    block_size: int | None
    reduction: Reduction
    where: Bool[ArrayLike, "*#positions"] | None
    axis_name: AxisName | None
    class_axis_name: AxisName | None

    def check(self) -> None:
        """Raises ValueError for a bad option."""
        check_choice("reduction", self.reduction, Reduction)
        check_block_size(self.block_size)


class Walk(NamedTuple):
    """How rows are walked: so many at once, of classes that are sharded over these axes."""

    block_size: int
    class_axis_name: AxisName | None


class Rows(NamedTuple):
    """What belongs to a row.

    Attributes:
        logits: Of each distribution.
        parameters: The temperature, and the formula's own.
        labels: The classes of a cross entropy.
        included: Which rows count: what the others hold is not looked at.
    """

    logits: tuple[Float[Array, "*rows C"], ...]
    parameters: tuple[Float[Array, "*rows 1"], ...]
    labels: Int[Array, "*rows 1"] | None = None
    included: Bool[Array, "*rows 1"] | None = None

    def wide_logits(self) -> tuple[Float[Array, "*rows C"], ...]:
        """The logits in the dtype of the computation."""
        return tuple(_only(self.included, z, 0) for z in promote(*self.logits))


class Normaliser(NamedTuple):
    """The largest logit of a row, and the sum of exp((logit - largest) / T)."""

    peak: Float[Array, "*rows"]
    total: Float[Array, "*rows"]


class Statistics(NamedTuple):
    """What is kept of a row for its derivative; 0 is what is not asked for.

    Attributes:
        normalisers: Of each distribution.
        slope_sums: The sums of the slopes over the classes.
        parameters: The derivatives with respect to the parameters; with sharded classes, what this
            member adds to them.
    """

    normalisers: tuple[Normaliser, ...]
    slope_sums: tuple[Float[Array, "*rows"], ...]
    parameters: tuple[Float[Array, "*rows"], ...]


class Wanted(NamedTuple):
    """What will be differentiated: which logits, and which of the parameters."""

    logits: tuple[bool, ...]
    parameters: tuple[bool, ...]


def divergence_of_logits(
    formula: Formula,
    logits: tuple[Any, ...],
    options: Options,
    *,
    scale: ArrayLike = 1.0,
    **parameters: ArrayLike,
) -> Float[Array, "..."]:
    """A formula of the softmax of logits [*positions, C], reduced and times `scale`.

    Raises:
        TypeError: If logits are not arrays.
        ValueError: If shapes don't fit each other, or a parameter or an option is bad.
    """
    names = ("logits",) if len(logits) == 1 else ("logits_p", "logits_q")
    check_classes(**dict(zip(names, logits, strict=True)))
    if len(logits) == 2:
        check_same_shape(logits_p=logits[0], logits_q=logits[1])
    check_parameters(formula, parameters)
    options.check()
    return _evaluate(formula, logits, parameters, scale, **options._asdict())


def check_parameters(formula: Formula, parameters: Mapping[str, ArrayLike]) -> None:
    """Raises ValueError for a plain number out of range."""
    POSITIVE.check(temperature=parameters["temperature"])
    formula.check(parameters)


@partial(
    jax.jit, static_argnames=("formula", "block_size", "reduction", "axis_name", "class_axis_name")
)
def _evaluate(
    formula, logits, parameters, scale, *, where, block_size, reduction, axis_name, class_axis_name
):
    *positions, classes = logits[0].shape
    check_where(where, tuple(positions))
    dtype = wide(*logits)
    numbers = by_position(formula, parameters, tuple(positions), dtype)
    where = None if where is None else jnp.broadcast_to(where, positions)
    (logits, numbers), (scale, where), _ = lie_alike((logits, numbers), (scale, where), axis=-1)
    included = None if where is None else where[..., None]
    numbers = tuple(x if x.size == 1 else _only(included, x, 1) for x in numbers)
    walk = Walk(block_size or rows_in_block(classes), class_axis_name)
    values: Array = _divergences(
        formula, walk, vary_alike(Rows(logits, numbers, included=included))
    )
    if class_axis_name is not None:
        values = lax.psum(values, class_axis_name)
    values = _only(where, scale * values, 0)
    return reduce(values, reduction=reduction, where=where, axis_name=axis_name)


def by_position(
    formula: Formula, parameters: Mapping[str, ArrayLike], positions: tuple[Size, ...], dtype: Any
) -> tuple[Float[Array, "*positions 1"], ...]:
    """The temperature and the formula's parameters, each one for all positions or for each.

    Raises:
        ValueError: If one does not broadcast to the positions.
    """
    check_fits(positions, **parameters)
    names = ("temperature", *(parameter.name for parameter in formula.parameters))
    arrays = (jnp.asarray(parameters[name], dtype) for name in names)
    return tuple(x.reshape((1,) * (len(positions) - x.ndim) + x.shape + (1,)) for x in arrays)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _divergences(formula: Formula, walk: Walk, rows: Rows) -> Float[Array, "*positions"]:
    """The divergence at each position; with sharded classes, what this member adds to it."""
    nothing = Wanted((False,) * len(rows.logits), (False,) * len(rows.parameters))
    return statistics_of(formula, walk, nothing, rows)[0]


@standard_promotion()
def _divergences_forward(formula, walk, rows):
    perturbed, rows = (
        jax.tree.map(lambda x, part=part: getattr(x, part), rows) for part in ("perturbed", "value")
    )
    wanted = Wanted(perturbed.logits, perturbed.parameters)
    values, statistics = statistics_of(formula, walk, wanted, rows)
    return values, (rows, statistics)


@standard_promotion()
def _divergences_backward(formula, walk, residuals, cotangent):
    rows, statistics = residuals
    if isinstance(cotangent, SymbolicZero):
        return (None,)
    # A position that is masked out may hold anything.
    ignored = cotangent == 0

    def through(logit, gradient):
        weighted = cotangent[..., None] * jnp.where(ignored[..., None], 0, gradient)
        return weighted.astype(logit.dtype)

    def through_parameter(parameter, slope):
        return sum_to(parameter, cotangent * jnp.where(ignored, 0, slope))

    gradients = gradients_of(formula, walk, rows, statistics)
    return (
        Rows(
            tuple(map(through, rows.logits, gradients)),
            tuple(map(through_parameter, rows.parameters, statistics.parameters)),
        ),
    )


_divergences.defvjp(_divergences_forward, _divergences_backward, symbolic_zeros=True)


def statistics_of(
    formula: Formula, walk: Walk, wanted: Wanted, rows: Rows
) -> tuple[Float[Array, "*positions"], Statistics]:
    """The divergence at each position, or this member's part of it, and its statistics."""

    def block(rows, _):
        return _statistics(formula, walk.class_axis_name, wanted, rows)

    return map_rows(block, rows, walk.block_size)


def _statistics(formula, class_axis_name, wanted, rows):
    temperature, *others = rows.parameters
    logits = rows.wide_logits()
    normalisers = tuple(_normaliser(z, temperature, class_axis_name) for z in logits)
    x = _distributions(rows, class_axis_name, normalisers)

    def part(terms, want):
        return jnp.sum(terms, -1) if want else jnp.zeros_like(normalisers[0].peak)

    def total(terms, want):
        whole = part(terms, want)
        return whole if class_axis_name is None or not want else lax.psum(whole, class_axis_name)

    slopes = [slope(x, *others) for slope in formula.slopes_of_logits]
    by_temperature, *by_others = wanted.parameters
    # Through logits / T it is the sum of gradient x logit, up to a constant in the logits: log p
    # will do.
    gradients = [
        s - p * total(s, by_temperature)[..., None]
        for s, p in zip(slopes, x.probabilities, strict=True)
    ]
    towards = sum(g * jnp.where(g == 0, 0, log) for g, log in zip(gradients, x.logs, strict=True))
    statistics = Statistics(
        normalisers=normalisers,
        slope_sums=tuple(map(total, slopes, wanted.logits)),
        parameters=(
            -part(towards, by_temperature) / jnp.squeeze(temperature, -1),
            *(
                part(parameter.slope(x, *others), want)
                for parameter, want in zip(formula.parameters, by_others, strict=True)
            ),
        ),
    )
    return jnp.sum(formula.term(x, *others), -1), statistics


def gradients_of(
    formula: Formula, walk: Walk, rows: Rows, statistics: Statistics
) -> list[Float[Array, "*rows C"]]:
    """The gradients of each row's divergence through its logits."""
    temperature, *others = rows.parameters
    x = _distributions(rows, walk.class_axis_name, statistics.normalisers)
    return [
        (slope(x, *others) - p * total[..., None]) / temperature
        for slope, p, total in zip(
            formula.slopes_of_logits, x.probabilities, statistics.slope_sums, strict=True
        )
    ]


def _normaliser(z, temperature, class_axis_name):
    """The normaliser of each row, over all members that hold some of its classes."""
    # The normaliser does not depend on it.
    peak = lax.stop_gradient(jnp.max(z, -1))
    if class_axis_name is not None:
        peak = lax.pmax(peak, class_axis_name)
    total = jnp.sum(jnp.exp((z - peak[..., None]) / temperature), -1)
    return Normaliser(peak, total if class_axis_name is None else lax.psum(total, class_axis_name))


def _distributions(rows, class_axis_name, normalisers):
    temperature, logits = rows.parameters[0], rows.wide_logits()
    pairs = list(zip(logits, normalisers, strict=True))
    probabilities = tuple(_probabilities(z, temperature, n) for z, n in pairs)
    logs = tuple(_log_probabilities(z, temperature, n) for z, n in pairs)
    if len(logits) == 1:
        return Distributions(probabilities, logs, label=_label(rows, class_axis_name))
    (z_p, z_q), (n_p, n_q) = logits, normalisers
    # Of near logits the difference is exact, and so is that of the normalisers, but for rounding
    # of the size of their difference.
    shift = (n_q.peak - n_p.peak)[..., None] / temperature + jnp.log(n_q.total / n_p.total)[
        ..., None
    ]
    ratio = log_ratio(z_p, z_q) / temperature - shift
    return Distributions(probabilities, logs, ratio)


def _label(rows, class_axis_name):
    """Which class is the label; members of a class axis hold classes in their order."""
    if rows.labels is None:
        return None
    classes = rows.logits[0].shape[-1]
    first = 0 if class_axis_name is None else lax.axis_index(class_axis_name) * classes
    return rows.labels - first == jnp.arange(classes)


def _probabilities(z, temperature, normaliser):
    peak, total = (x[..., None] for x in normaliser)
    return jnp.exp((z - peak) / temperature) / total


def _log_probabilities(z, temperature, normaliser):
    peak, total = (x[..., None] for x in normaliser)
    return (z - peak) / temperature - jnp.log(total)


def _only(included, x, other):
    """What is included, and `other` elsewhere."""
    return x if included is None else jnp.where(included, x, other)


def sum_to(
    parameter: Float[Array, "*positions 1"], cotangent: Float[Array, "*rows"]
) -> Float[Array, "*positions 1"]:
    """Sums the cotangents of rows over the axes along which a parameter is shared."""
    each = cotangent[..., None]
    axes = [axis for axis, n in enumerate(parameter.shape) if n != each.shape[axis]]
    return jnp.sum(each, axes, keepdims=True)
