"""Divergences of rows of logits: nothing of the size of the logits is kept in memory.

A row is the logits of one position. In the forward pass rows go by in blocks that stay in cache
(`blocks.map_rows`), and leave a few numbers each: the normalisers of their distributions, and the
sums of their slopes. With those the derivative is elementwise, and needs no blocks: for a
divergence whose slope through log p_c is s_c, it is s_c - p_c sum(s) through the logits of P.
"""

from collections.abc import Mapping
from functools import partial, singledispatch
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from penalties_jax.functional.checks import (
    AT_LEAST_ONE,
    FINITE,
    POSITIVE,
    Size,
    check_classes,
    check_fits,
    check_labels,
    check_same_shape,
    check_where,
    standard_promotion,
)
from penalties_jax.functional.derivatives import differentiated_as
from penalties_jax.functional.divergences.blocks import map_rows
from penalties_jax.functional.divergences.floors import above, excess, floored
from penalties_jax.functional.divergences.formulas import (
    DOWN,
    INFINITE,
    MOST,
    Computed,
    Distributions,
    Formula,
    Mean,
)
from penalties_jax.functional.divergences.running import difference, moments, of_one_alone
from penalties_jax.functional.divergences.softcap import capped
from penalties_jax.functional.platform import Platform, apart, by_platform, rows_in_block
from penalties_jax.functional.reduction import (
    AxisName,
    Reduction,
    lie_alike,
    promote,
    reduce,
    vary_alike,
    wide,
)

T = TypeVar("T")


class Options(NamedTuple):
    """What all streamed functions share."""

    block_size: int | None
    reduction: Reduction
    where: Bool[ArrayLike, "..."] | None
    axis_name: AxisName | None
    class_axis_name: AxisName | None
    weights: ArrayLike = 1.0

    def check(self) -> None:
        """Raises ValueError for a bad option."""
        FINITE.check(weights=self.weights)
        if self.block_size is not None:
            AT_LEAST_ONE.check(block_size=self.block_size)


class Walk(NamedTuple):
    """How rows are walked.

    Attributes:
        block_size: So many at once; if None, as many as the platform is best at.
        class_axis_name: Axes over which the classes are sharded.
        platform: Of the program, where it is known.
    """

    block_size: int | None
    class_axis_name: AxisName | None
    platform: Platform | None = None


class Rows(NamedTuple):
    """What belongs to a row.

    Attributes:
        logits: Of each distribution.
        parameters: The temperature, and the formula's own.
        labels: The class of a cross entropy, or the tokens by which a teacher is known.
        included: Which rows count: what the others hold is not looked at.
        softcaps: The bounds of each distribution's logits, where they have some.
    """

    logits: tuple[Float[Array, "*rows C"], ...]
    parameters: tuple[Float[Array, "*rows 1"], ...]
    labels: Int[Array, "*rows k"] | None = None
    included: Bool[Array, "*rows 1"] | None = None
    softcaps: tuple[Float[Array, "*rows 1"] | None, ...] = ()

    def apart(self, numbers: T) -> tuple["Rows", T]:
        """The rows, and numbers of them, for sums that share nothing with others: `apart`."""
        softcaps, numbers = apart((self.softcaps, numbers))
        return self._replace(softcaps=softcaps), numbers

    def wide_logits(self) -> tuple[Float[Array, "... C"], ...]:
        """The logits in the dtype of the computation, capped."""
        logits = tuple(_only(self.included, z, 0) for z in promote(*self.logits))
        caps = self.softcaps or (None,) * len(logits)
        return tuple(
            z if cap is None else capped(z, cap) for z, cap in zip(logits, caps, strict=True)
        )


class Normaliser(NamedTuple):
    """What makes probabilities of a row of logits.

    Attributes:
        peak: The largest logit.
        total: The sum of exp((logit - largest) / T).
        excess: Of Q with a floor, by how much that raises the sum of its probabilities.
    """

    peak: Float[Array, "*rows"]
    total: Float[Array, "*rows"]
    excess: Float[Array, "*rows"] | None = None

    def by_class(self) -> tuple[Float[Array, "... 1"], Float[Array, "... 1"]]:
        """Peak and total, beside the classes of their row."""
        return self.peak[..., None], self.total[..., None]


class Statistics(NamedTuple):
    """What is kept of a row for its derivative; 0 is what is not asked for.

    Attributes:
        normalisers: Of each distribution.
        slope_sums: The sums of the slopes over the classes; with a floor also the sum of what
            passes it of the gradient through log q'. Of k tokens and a rest, the slopes.
        parameters: The derivatives with respect to the parameters; with sharded classes, what this
            member adds to them.
    """

    normalisers: tuple[Normaliser, ...]
    slope_sums: tuple[Float[Array, "..."], ...]
    parameters: tuple[Float[Array, "..."], ...]


class Wanted(NamedTuple):
    """What will be differentiated: which logits, and which of the parameters."""

    logits: tuple[bool, ...]
    parameters: tuple[bool, ...]

    def slope_sums(self, formula: Formula) -> tuple[bool, ...]:
        """For which logits their slopes are summed; the temperature and a floor need all."""
        needed = self.parameters[0] or (formula.floored and self.parameters[-1])
        return tuple(own or needed for own in self.logits)


def divergence_of_logits(
    formula: Computed,
    logits: tuple[Any, ...],
    options: Options,
    *,
    scale: ArrayLike = 1.0,
    labels: Int[ArrayLike, "*positions"] | None = None,
    ids: Int[ArrayLike, "*positions k"] | None = None,
    **parameters: ArrayLike,
) -> Float[Array, "..."]:
    """A formula of the softmax of logits [*positions, C], reduced and times `scale`.

    Of one that takes `ids`, the caller has checked these.

    Raises:
        TypeError: If logits are not arrays, or labels are not integers.
        ValueError: If shapes don't fit each other, or a parameter or an option is bad.
    """
    names = ("logits",) if len(logits) == 1 else ("logits_p", "logits_q")
    check_classes(**dict(zip(names, logits, strict=True)))
    if len(logits) == 2:
        check_same_shape(logits_p=logits[0], logits_q=logits[1])
    if labels is not None:
        check_labels(jnp.shape(logits[0])[:-1], labels=labels)
    check_parameters(formula, parameters)
    options.check()
    labels = ids if labels is None else labels
    return _evaluate(formula, logits, labels, parameters, scale, **options._asdict())


def check_parameters(formula: Computed, parameters: Mapping[str, ArrayLike]) -> None:
    """Raises ValueError for a plain number out of range."""
    POSITIVE.check(temperature=parameters["temperature"])
    formula.check(parameters)


@partial(
    jax.jit, static_argnames=("formula", "block_size", "reduction", "axis_name", "class_axis_name")
)
def _evaluate(
    formula,
    logits,
    labels,
    parameters,
    scale,
    *,
    where,
    block_size,
    reduction,
    axis_name,
    class_axis_name,
    weights,
):
    positions = logits[0].shape[:-1]
    check_where(where, positions)
    check_fits(positions, weights=weights)
    dtype = wide(*logits)
    numbers = by_position(formula, parameters, positions, dtype)
    scale = scale * jnp.asarray(weights, dtype)
    where = None if where is None else jnp.broadcast_to(where, positions)
    labels = with_axis(labels, positions)
    (logits, numbers, labels), (scale, where), _ = lie_alike(
        (logits, numbers, labels), (scale, where), axis=-1
    )
    included = None if where is None else where[..., None]
    # Of what may be no number a reverse pass through another one would see the derivative.
    numbers = tuple(x if x.size == 1 else _only(included, x, 1) for x in numbers)
    scale = _only(where, scale, 0) if scale.ndim else scale
    walk = Walk(block_size, class_axis_name)
    values: Array = _divergences(formula, walk, vary_alike(Rows(logits, numbers, labels, included)))
    if class_axis_name is not None:
        values = lax.psum(values, class_axis_name)
    values = scale * _only(where, values, 0)
    return reduce(values, reduction=reduction, where=where, axis_name=axis_name)


def with_axis(labels: Any, positions: tuple[Size, ...]) -> Any:
    """Labels with an axis after those of the positions, which ids have already."""
    return labels if labels is None or labels.ndim > len(positions) else labels[..., None]


def by_position(
    formula: Computed, parameters: Mapping[str, ArrayLike], positions: tuple[Size, ...], dtype: Any
) -> tuple[Float[Array, "*positions n"], ...]:
    """The temperature and the formula's parameters, each one for all positions or for each.

    Raises:
        ValueError: If one does not broadcast to the positions.
    """
    several = {parameter.name for parameter in formula.parameters if parameter.several}
    check_fits(positions, **{name: x for name, x in parameters.items() if name not in several})

    def laid(name):
        x = jnp.asarray(parameters[name], dtype)
        own = x.shape if name in several else (*x.shape, 1)
        return x.reshape((1,) * (len(positions) + 1 - len(own)) + own)

    return tuple(map(laid, ("temperature", *formula.names)))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _divergences(formula: Computed, walk: Walk, rows: Rows) -> Float[Array, "*positions"]:
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

    def through_parameter(parameter, slope):
        return sum_to(parameter, times(cotangent, slope))

    return (
        Rows(
            tuple(cotangents_of(formula, walk, rows, statistics, cotangent)),
            tuple(map(through_parameter, rows.parameters, statistics.parameters)),
        ),
    )


_divergences.defvjp(_divergences_forward, _divergences_backward, symbolic_zeros=True)


def times(weight: Float[Array, "*rows"], slope: Float[Array, "..."]) -> Float[Array, "..."]:
    """What belongs to rows by the weight of each; one that weighs nothing may hold anything."""
    weight = weight.reshape(weight.shape + (1,) * (slope.ndim - weight.ndim))
    return weight * jnp.where(weight == 0, 0, slope)


@singledispatch
def statistics_of(
    formula: Formula, walk: Walk, wanted: Wanted, rows: Rows
) -> tuple[Float[Array, "*positions"], Statistics]:
    """The divergence at each position, or this member's part of it, and its statistics."""
    in_passes = partial(_in_passes, formula, walk.class_axis_name, wanted)
    at_once = partial(_at_once, formula, walk.class_axis_name, wanted)

    def on(platform, rows):
        if platform.fuses:
            found = differentiated_as(in_passes, at_once)(rows)
        else:
            size = walk.block_size or rows_in_block(rows.logits[0].shape[-1])
            found = map_rows(lambda rows, _: in_passes(rows), rows, size)
        return vary_alike((rows, found))[1]

    return by_platform(on, rows, known=walk.platform)


def _in_passes(formula, class_axis_name, wanted, rows):
    """A pass over the classes for each peak, one for each total, and one for the rest."""
    temperature = rows.parameters[0]
    normalisers = tuple(_normaliser(z, temperature, class_axis_name) for z in rows.wide_logits())
    normalisers = _raised(formula, class_axis_name, rows, normalisers)
    slope_sums = _slope_sums(formula, class_axis_name, wanted, rows, normalisers)
    return _statistics(formula, class_axis_name, wanted, rows, normalisers, slope_sums)


def _at_once(formula, class_axis_name, wanted, rows):
    """A pass for the normalisers and, if means tell, the sums of the slopes; one for the rest."""
    temperature = rows.parameters[0]
    told = any(wanted.slope_sums(formula)) and not formula.floored
    of_means = formula.slope_sums if told else None
    found = moments(rows.wide_logits(), temperature, of_means is not None, class_axis_name)
    normalisers = tuple(Normaliser(x.peak, x.total) for x in found)
    normalisers = _raised(formula, class_axis_name, rows, normalisers)
    if of_means:
        slope_sums = of_means(*(_mean(x, normalisers, temperature) for x in found))
    else:
        slope_sums = _slope_sums(formula, class_axis_name, wanted, rows, normalisers)
    return _statistics(formula, class_axis_name, wanted, rows, normalisers, slope_sums)


def _mean(x, normalisers, temperature):
    """The mean of the log-ratio under one of two distributions, or that of one's own log."""
    weighted = x.weighted / x.total
    if x.lone is None:
        return Mean(weighted - jnp.log(x.total), 0)
    lone = x.lone / x.total
    between = _from_peaks(weighted, 1 - lone, normalisers)
    ratio = _log_ratio(between, 1 - lone, normalisers, jnp.squeeze(temperature, -1))
    infinite = jnp.abs(ratio) > INFINITE
    return Mean(jnp.where(infinite, 0, ratio), jnp.where(infinite, 1, lone))


def _raised(formula, class_axis_name, rows, normalisers):
    """The normalisers, with that of a floor."""
    if not formula.floored:
        return normalisers
    p, q = normalisers
    x = _distributions(rows, class_axis_name, normalisers)
    return p, q._replace(excess=_sum(excess(x, rows.parameters[-1]), class_axis_name))


def _slope_sums(formula, class_axis_name, wanted, rows, normalisers):
    x, others = _distributions(rows, class_axis_name, normalisers), _others(formula, rows)
    none = jnp.zeros_like(normalisers[0].total)
    wants = wanted.slope_sums(formula)
    sums = tuple(
        _sum(slope(x, *others), class_axis_name) if want else none
        for slope, want in zip(formula.slopes_of_logits, wants, strict=True)
    )
    if not formula.floored:
        return sums
    stays = above(x.under, rows.parameters[-1])
    slope, share = (
        _sum(jnp.where(stays, part, 0), class_axis_name)
        for part in (formula.slopes_of_logits[1](x, *others), x.probabilities[1])
    )
    return *sums, slope - share * sums[1] if wants[1] else none


def _sum(parts, class_axis_name):
    part = jnp.sum(parts, -1)
    return part if class_axis_name is None else lax.psum(part, class_axis_name)


def _others(formula, rows):
    """The parameters of the formula's functions."""
    return rows.parameters[1 : 1 + len(formula.parameters)]


def _statistics(formula, class_axis_name, wanted, rows, normalisers, slope_sums):
    temperature, others = rows.parameters[0], _others(formula, rows)

    def total(terms, rows, normalisers):
        return jnp.sum(terms(_distributions(rows, class_axis_name, normalisers), *others), -1)

    def slope_of_temperature(x, *others):
        # Through logits / T it is the sum of gradient x logit, of which a constant only counts
        # for what a shift of all logits changes.
        gradients = _gradients(formula, x, rows, slope_sums)
        logs = (jnp.where(log < -INFINITE, -MOST, log) for log in (x.under or x).logs)
        along = sum(map(jnp.multiply, gradients, logs))
        if formula.of_normaliser:
            along += _through_normaliser(formula, x, others) * x.log_normaliser
        return -along / temperature

    def slope_of_floor(x, *others):
        stays = above(x.under, rows.parameters[-1])
        return jnp.where(stays, 0, _through_logs(formula, x, others, slope_sums)[1])

    slopes = [slope_of_temperature, *(parameter.slope for parameter in formula.parameters)]
    slopes += [slope_of_floor][: formula.floored]
    by_parameters = tuple(
        total(slope, rows, normalisers) if want else jnp.zeros_like(normalisers[0].total)
        for slope, want in zip(slopes, wanted.parameters, strict=True)
    )
    rows, normalisers = rows.apart(normalisers)
    value = total(formula.term, rows, normalisers)
    if formula.of_normaliser:
        part = 1 if class_axis_name is None else lax.axis_size(class_axis_name)
        own = formula.of_normaliser(_log_normaliser(normalisers[0], temperature), *others)
        value += jnp.squeeze(own, -1) / part
    return value, Statistics(normalisers, slope_sums, by_parameters)


def _gradients(formula, x, rows, slope_sums):
    """Through logits / T."""
    others = _others(formula, rows)
    gradients = _through_logs(formula, x, others, slope_sums)
    if formula.of_normaliser:
        gradients[0] += _through_normaliser(formula, x, others)
    if formula.floored:
        passed = jnp.where(above(x.under, rows.parameters[-1]), gradients[1], 0)
        gradients[1] = passed - x.under.probabilities[1] * slope_sums[-1][..., None]
    return gradients


def _through_logs(formula, x, others, slope_sums):
    """Through logarithms of which the probabilities are the softmax."""
    sums = slope_sums[: len(x.probabilities)]
    return [
        slope(x, *others) - p * total[..., None]
        for slope, p, total in zip(formula.slopes_of_logits, x.probabilities, sums, strict=True)
    ]


def _through_normaliser(formula, x, others):
    log = x.log_normaliser
    _, slope = jax.jvp(
        lambda log: formula.of_normaliser(log, *others), (log,), (jnp.ones_like(log),)
    )
    return x.probabilities[0] * slope


@singledispatch
def gradients_of(
    formula: Formula, walk: Walk, rows: Rows, statistics: Statistics
) -> list[Float[Array, "... C"]]:
    """The gradients of each row's divergence through its logits, after they are capped."""
    temperature = rows.parameters[0]
    rows, statistics = rows.apart(statistics)
    x = _distributions(rows, walk.class_axis_name, statistics.normalisers)
    return [g / temperature for g in _gradients(formula, x, rows, statistics.slope_sums)]


@singledispatch
def cotangents_of(
    formula: Formula,
    walk: Walk,
    rows: Rows,
    statistics: Statistics,
    cotangent: Float[Array, "*rows"],
) -> list[Float[Array, "... C"]]:
    """The same by the cotangents of rows, in the dtypes of their logits."""
    gradients = gradients_of(formula, walk, rows, statistics)
    return [
        times(cotangent, gradient).astype(logit.dtype)
        for logit, gradient in zip(rows.logits, gradients, strict=True)
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
        return Distributions(
            probabilities,
            logs,
            label=_label(rows, class_axis_name),
            log_normaliser=_log_normaliser(normalisers[0], temperature),
        )
    by_class = [Normaliser(*n.by_class()) for n in normalisers]
    between = _from_peaks(difference(*logits), 1, by_class)
    ratio = _log_ratio(between, 1, by_class, temperature)
    # A class of which both have nothing, unless one alone excludes it.
    p, q = probabilities
    nowhere = (p == 0) & (q == 0) & ~of_one_alone(between)
    ratio = jnp.where(nowhere & (jnp.abs(ratio) > INFINITE), 0, ratio)
    x, raised = Distributions(probabilities, logs, ratio), normalisers[1].excess
    return x if raised is None else floored(x, rows.parameters[-1], raised[..., None])


def _log_normaliser(normaliser, temperature):
    peak, total = normaliser.by_class()
    largest = float(jnp.finfo(peak.dtype).max)
    return jnp.clip(peak / temperature, -largest, largest) + jnp.log(total)


def _from_peaks(between, share, normalisers):
    """A difference of logits by `difference`, or a share of it, where both count from their peaks.

    Of near logits it is exact, but for rounding of its size; nothing is divided by T yet, over
    which both may be infinite.
    """
    p, q = normalisers
    return between - share * difference(p.peak, q.peak)


def _log_ratio(between, share, normalisers, temperature):
    """The log-ratio, or a share of it, of a difference by `_from_peaks`."""
    p, q = normalisers
    return between / DOWN / temperature - share * jnp.log(q.total / p.total)


def _label(rows, class_axis_name):
    """Which class is the label; members of a class axis hold classes in their order."""
    if rows.labels is None:
        return None
    classes = rows.logits[0].shape[-1]
    first = 0 if class_axis_name is None else lax.axis_index(class_axis_name) * classes
    return rows.labels - first == jnp.arange(classes)


def _probabilities(z, temperature, normaliser):
    peak, total = normaliser.by_class()
    return jnp.exp((z - peak) / temperature) / total


def _log_probabilities(z, temperature, normaliser):
    peak, total = normaliser.by_class()
    return (z - peak) / temperature - jnp.log(total)


def _only(included, x, other):
    """What is included, and `other` elsewhere."""
    return x if included is None else jnp.where(included, x, other)


def sum_to(
    parameter: Float[Array, "*positions n"], cotangent: Float[Array, "..."]
) -> Float[Array, "*positions n"]:
    """Sums the cotangents of rows over the axes along which a parameter is shared."""
    each = cotangent.reshape(cotangent.shape + (1,) * (parameter.ndim - cotangent.ndim))
    axes = [axis for axis, n in enumerate(parameter.shape) if n != each.shape[axis]]
    return jnp.sum(each, axes, keepdims=True)
