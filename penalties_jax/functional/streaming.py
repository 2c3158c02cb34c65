"""Divergences from logits, row by row: nothing of the size of the logits is kept in memory.

A row is the logits of one position. In the forward pass rows go by in blocks that stay in cache
(`blocks.map_rows`), and leave a few numbers each: the normalisers of their distributions, and the
sums of their slopes. With those the derivative is elementwise, and needs no blocks: for a
divergence whose slope through log p_c is s_c, it is s_c - p_c sum(s) through the logits of P.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from penalties_jax.functional.blocks import map_rows, vary_alike
from penalties_jax.functional.divergences import (
    DIRECTIONS,
    Direction,
    divergence_term,
    expm1_minus_near,
    js_term,
    log_mixture,
)
from penalties_jax.functional.gates import check_positive, check_unit
from penalties_jax.functional.reduction import (
    AxisName,
    Reduction,
    check_broadcast,
    check_choice,
    check_reduction,
    check_same_shape,
    check_where,
    promote,
    reduce,
)

# Of one array in a block, as float32: within the cache of a CPU's core, and enough to fill a GPU.
BLOCK_BYTES = {"cpu": 2**21, "gpu": 2**26}


class Distributions(NamedTuple):
    """What a divergence is made of, class by class.

    Attributes:
        probabilities: Of each distribution.
        ratio: The log-ratio log q - log p of two, 0 where both are 0; log p of one.
    """

    probabilities: tuple[Float[Array, "*rows C"], ...]
    ratio: Float[Array, "*rows C"]


class Formula(NamedTuple):
    """A divergence of one or two distributions.

    A slope is the derivative through log-probabilities but for a multiple of the probabilities,
    which a softmax cancels: of those it is the one that is accurate where P is near Q.

    Attributes:
        term: The summand over classes, of distributions and parameters.
        slopes: The derivatives of the sum through each distribution's log-probabilities.
        parameter_slopes: The terms of its derivatives with respect to the parameters.
    """

    term: Callable[..., Array]
    slopes: tuple[Callable[..., Array], ...]
    parameter_slopes: tuple[Callable[..., Array], ...] = ()


class Normaliser(NamedTuple):
    """The largest logit of a row, and the sum of exp((logit - largest) / T)."""

    peak: Float[Array, "*rows"]
    total: Float[Array, "*rows"]


class Statistics(NamedTuple):
    """What is kept of a row for its derivative; 0 is what is not asked for.

    Attributes:
        normalisers: Of each distribution.
        slope_sums: The sums of the slopes over the classes.
        parameters: The derivatives with respect to the temperature and the parameters; with
            sharded classes, what this member adds to them.
    """

    normalisers: tuple[Normaliser, ...]
    slope_sums: tuple[Float[Array, "*rows"], ...]
    parameters: tuple[Float[Array, "*rows"], ...]


class Wanted(NamedTuple):
    """What will be differentiated: which logits, and which of temperature and parameters."""

    logits: tuple[bool, ...]
    parameters: tuple[bool, ...]


def kl_from_logits(
    logits_p: Float[Array, "*positions C"],
    logits_q: Float[Array, "*positions C"],
    *,
    direction: Direction = "forward",
    temperature: ArrayLike = 1.0,
    block_size: int | None = None,
    reduction: Reduction = "mean",
    where: Bool[Array, "*positions"] | None = None,
    axis_name: AxisName | None = None,
    class_axis_name: AxisName | None = None,
) -> Float[Array, "..."]:
    r"""The Kullback-Leibler divergence from raw logits, in nats, with no temporary of their size.

    The same as `pj.kl_divergence` of $\log\mathrm{softmax}(\text{logits} / T)$, but more accurate
    where P is near Q, and in half precision. Its derivatives are
    $p (\log p - \log q - \mathrm{KL}) / T$ and $(q - p) / T$. A class is excluded by logits of -inf
    in both.

    Hinton's distillation, optax and torch have the expectation over the reference, which is
    direction="reverse".

    Differentiable once, in reverse mode. Works on arrays sharded over positions, of which nothing
    is gathered. On a CPU, gradients for both logits together may hold an array or two of their
    size, and a few rows that fit the last cache take less time as `pj.kl_divergence` of their
    `jax.nn.log_softmax`.

    Args:
        logits_p: Unnormalised log-probabilities, classes last. By convention the model.
        logits_q: The same of the reference.
        direction: "forward" is KL(P||Q), "reverse" KL(Q||P), "symmetric" the mean of the two.
        temperature: The $T$ by which both are divided, above 0: for all, or one for each position.
            Nothing makes up for it: for gradients that don't depend on it, multiply by $T^2$.
        block_size: Rows that are processed at once, for each device that JAX sees; if None, 2 MiB
            of each array on a CPU, and 64 MiB on a GPU.
        reduction: "mean" or "sum" over the positions, or "none".
        where: Mask of positions, which broadcasts to their shape.
        axis_name: Mapped axes over whose members to sum or average.
        class_axis_name: Axes of `jax.shard_map` over which the classes are sharded.

    Returns:
        A scalar, or an array of the shape of the positions for "none".

    Raises:
        TypeError: If logits are not arrays.
        ValueError: If the shapes differ, `where` does not broadcast to the positions, `block_size`
            is below 1, the temperature is a number not above 0, or an option is unknown.

    References:
        Hinton, Vinyals & Dean (2015), Distilling the knowledge in a neural network.

    Examples:
        >>> import jax.numpy as jnp
        >>> import penalties_jax as pj
        >>> round(float(pj.kl_from_logits(jnp.array([[0.0, 1.0]]), jnp.array([[3.0, 3.0]]))), 4)
        0.1109
    """
    check_choice("direction", direction, DIRECTIONS)
    logits_p, logits_q = arrays_of_classes(logits_p=logits_p, logits_q=logits_q)
    check_same_shape(logits_p=logits_p, logits_q=logits_q)
    options = Options(block_size, reduction, where, axis_name, class_axis_name)
    return _reduced(KL[direction], (logits_p, logits_q), (temperature,), options)


def js_from_logits(
    logits_p: Float[Array, "*positions C"],
    logits_q: Float[Array, "*positions C"],
    *,
    mixture: ArrayLike = 0.5,
    temperature: ArrayLike = 1.0,
    block_size: int | None = None,
    reduction: Reduction = "mean",
    where: Bool[Array, "*positions"] | None = None,
    axis_name: AxisName | None = None,
    class_axis_name: AxisName | None = None,
) -> Float[Array, "..."]:
    r"""The generalised Jensen-Shannon divergence from raw logits, in nats, as `pj.js_divergence`.

    $b\,\mathrm{KL}(P \| M) + (1 - b)\,\mathrm{KL}(Q \| M)$ with $M = b P + (1 - b) Q$ and
    $P = \mathrm{softmax}(\text{logits} / T)$. Streamed, and differentiable, as
    `pj.kl_from_logits`.

    Args:
        logits_p: Unnormalised log-probabilities, classes last.
        logits_q: The same of the other distribution.
        mixture: The $b$, in [0, 1].
        temperature: The $T$ by which both are divided, above 0.
        block_size: Rows that are processed at once, for each device that JAX sees; if None, 2 MiB
            of each array on a CPU, and 64 MiB on a GPU.
        reduction: "mean" or "sum" over the positions, or "none".
        where: Mask of positions, which broadcasts to their shape.
        axis_name: Mapped axes over whose members to sum or average.
        class_axis_name: Axes of `jax.shard_map` over which the classes are sharded.

    Returns:
        A scalar, or an array of the shape of the positions for "none".

    Raises:
        TypeError, ValueError: As `pj.kl_from_logits`.

    References:
        Lin (1991), Divergence measures based on the Shannon entropy.

    Examples:
        >>> import jax.numpy as jnp
        >>> import penalties_jax as pj
        >>> far = jnp.array([[0.0, 200.0]])
        >>> round(float(pj.js_from_logits(far, -far)), 4)
        0.6931
    """
    logits_p, logits_q = arrays_of_classes(logits_p=logits_p, logits_q=logits_q)
    check_same_shape(logits_p=logits_p, logits_q=logits_q)
    check_unit("mixture", mixture)
    options = Options(block_size, reduction, where, axis_name, class_axis_name)
    return _reduced(JS, (logits_p, logits_q), (temperature, mixture), options)


def entropy_from_logits(
    logits: Float[Array, "*positions C"],
    *,
    temperature: ArrayLike = 1.0,
    normalize: bool = False,
    block_size: int | None = None,
    reduction: Reduction = "mean",
    where: Bool[Array, "*positions"] | None = None,
    axis_name: AxisName | None = None,
    class_axis_name: AxisName | None = None,
) -> Float[Array, "..."]:
    r"""The Shannon entropy of softmax(logits / T), in nats, as `pj.entropy`.

    Streamed, and differentiable, as `pj.kl_from_logits`; the derivative is
    $-\pi (\log \pi + H) / T$.

    Args:
        logits: Unnormalised log-probabilities, classes last.
        temperature: The $T$, above 0.
        normalize: Divide by ln C, so that the uniform distribution has entropy 1; a single class
            has entropy 0.
        block_size: Rows that are processed at once, for each device that JAX sees; if None, 2 MiB
            of each array on a CPU, and 64 MiB on a GPU.
        reduction: "mean" or "sum" over the positions, or "none".
        where: Mask of positions, which broadcasts to their shape.
        axis_name: Mapped axes over whose members to sum or average.
        class_axis_name: Axes of `jax.shard_map` over which the classes are sharded.

    Returns:
        A scalar, or an array of the shape of the positions for "none".

    Raises:
        TypeError, ValueError: As `pj.kl_from_logits`.

    References:
        Shannon (1948), A mathematical theory of communication.

    Examples:
        >>> import jax.numpy as jnp
        >>> import penalties_jax as pj
        >>> float(pj.entropy_from_logits(jnp.zeros((3, 4)), normalize=True))
        1.0
    """
    (logits,) = arrays_of_classes(logits=logits)
    scale = 1.0
    if normalize:
        classes = logits.shape[-1]
        if class_axis_name is not None:
            classes *= lax.axis_size(class_axis_name)
        scale = 1 / math.log(classes) if classes > 1 else 0.0
    options = Options(block_size, reduction, where, axis_name, class_axis_name)
    return _reduced(ENTROPY, (logits,), (temperature,), options, scale)


def _kl_term(x):
    p, q = x.probabilities
    return divergence_term(p, q, x.ratio)


def _kl_slope_p(x):
    """-p d: where only q is 0, the derivative through log p is 0, as if d were 1."""
    p, _ = x.probabilities
    return jnp.where(jnp.isneginf(x.ratio), -p, jnp.where(p == 0, 0, -p * x.ratio))


def _kl_slope_q(x):
    p, q = x.probabilities
    near = p * (x.ratio + expm1_minus_near(x.ratio))
    return jnp.where(jnp.abs(x.ratio) < 1, near, q - p)


def _swapped(function):
    def swapped(x):
        return function(Distributions(x.probabilities[::-1], -x.ratio))

    return swapped


def _mean(f, g):
    return lambda x: (f(x) + g(x)) / 2


_FORWARD = Formula(_kl_term, (_kl_slope_p, _kl_slope_q))
_REVERSE = Formula(
    _swapped(_FORWARD.term), tuple(_swapped(slope) for slope in reversed(_FORWARD.slopes))
)
KL = {
    "forward": _FORWARD,
    "reverse": _REVERSE,
    "symmetric": Formula(
        _mean(_FORWARD.term, _REVERSE.term),
        tuple(map(_mean, _FORWARD.slopes, _REVERSE.slopes)),
    ),
}


def _js_term(x, b):
    p, q = x.probabilities
    return js_term(p, q, x.ratio, b)


def _js_slope_p(x, b):
    return _js_slope(x.probabilities[0], x.ratio, b, 1 - b)


def _js_slope_q(x, b):
    return _js_slope(x.probabilities[1], -x.ratio, 1 - b, b)


def _js_slope(p, ratio, b, c):
    return jnp.where((p == 0) | (b == 0), 0, -b * p * log_mixture(ratio, b, c))


def _js_slope_b(x, b):
    """The term of KL(P||M) - KL(Q||M): what m gains cancels in the sum over classes."""
    p, q = x.probabilities
    from_p = jnp.where(p == 0, 0, p * log_mixture(x.ratio, b, 1 - b))
    from_q = jnp.where(q == 0, 0, q * log_mixture(-x.ratio, 1 - b, b))
    return from_q - from_p


JS = Formula(_js_term, (_js_slope_p, _js_slope_q), (_js_slope_b,))


def _surprise(x):
    (p,) = x.probabilities
    return -p * jnp.where(p == 0, 0, x.ratio)


ENTROPY = Formula(_surprise, (_surprise,))


class Options(NamedTuple):
    """What all streamed functions share."""

    block_size: int | None
    reduction: Reduction
    where: Bool[Array, "*positions"] | None
    axis_name: AxisName | None
    class_axis_name: AxisName | None

    def check(self, *temperature: ArrayLike) -> None:
        """Raises ValueError for a bad option, or a temperature that is not above 0."""
        check_reduction(self.reduction)
        check_block_size(self.block_size)
        for number in temperature:
            check_positive("temperature", number)


def check_block_size(block_size: Any) -> None:
    """Raises ValueError for a block size that is not an integer of at least 1."""
    if block_size is not None and not (isinstance(block_size, int) and block_size >= 1):
        raise ValueError(f"block_size must be an integer of at least 1, got {block_size!r}")


def arrays_of_classes(**inputs: Any) -> tuple[Array, ...]:
    """The arrays that are meant, also by Flax variables.

    Raises:
        TypeError: If one is not an array.
        ValueError: If one has no axis of classes, or no class on it.
    """
    arrays = []
    for name, x in inputs.items():
        if not isinstance(x, (jax.Array, np.ndarray)) and hasattr(x, "__jax_array__"):
            x = x.__jax_array__()
        if not isinstance(x, (jax.Array, np.ndarray)):
            raise TypeError(f"{name} must be an array, got a {type(x).__name__}")
        if not x.ndim or not x.shape[-1]:
            raise ValueError(f"{name} needs classes on its last axis, got shape {x.shape}")
        arrays.append(x)
    return tuple(arrays)


def _reduced(formula, logits, parameters, options, scale=1.0):
    options.check(parameters[0])
    return _evaluate(formula, logits, parameters, scale, **options._asdict())


@partial(
    jax.jit, static_argnames=("formula", "block_size", "reduction", "axis_name", "class_axis_name")
)
def _evaluate(
    formula, logits, parameters, scale, *, where, block_size, reduction, axis_name, class_axis_name
):
    positions = logits[0].shape[:-1]
    check_where(where, positions)
    parameters = by_position(parameters, positions, jnp.result_type(jnp.float32, *logits))
    classes = logits[0].shape[-1]
    static = Static(formula, block_size or rows_in_block(classes), class_axis_name)
    values: Array = _divergences(static, *vary_alike((logits, parameters)))
    if class_axis_name is not None:
        values = lax.psum(values, class_axis_name)
    values = scale * values
    if where is not None:
        values = jnp.where(where, values, 0)
    return reduce(values, reduction=reduction, where=where, axis_name=axis_name)


def by_position(
    parameters: tuple[ArrayLike, ...], positions: tuple[int, ...], dtype: Any
) -> tuple[Float[Array, "*positions 1"], ...]:
    """The temperature and the mixture, each one for all positions or for each, as `map_rows` asks.

    Raises:
        ValueError: If one does not broadcast to the positions.
    """
    for name, parameter in zip(("temperature", "mixture"), parameters, strict=False):
        check_broadcast(name, parameter, positions)
    arrays = (jnp.asarray(x, dtype) for x in parameters)
    return tuple(x.reshape((1,) * (len(positions) - x.ndim) + x.shape + (1,)) for x in arrays)


def rows_in_block(classes: int, block_bytes: Mapping[str, int] = BLOCK_BYTES) -> int:
    """How many rows of float32 logits make a block on this backend."""
    backend = jax.default_backend()
    return max(1, block_bytes.get(backend, block_bytes["gpu"]) // (4 * max(classes, 1)))


class Static(NamedTuple):
    """What changes the program."""

    formula: Formula
    block_size: int
    class_axis_name: AxisName | None


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _divergences(
    static: Static,
    logits: tuple[Float[Array, "*positions C"], ...],
    parameters: tuple[Float[Array, "*positions 1"], ...],
) -> Float[Array, "*positions"]:
    """The divergence at each position; with sharded classes, what this member adds to it."""
    wanted = Wanted((False,) * len(logits), (False,) * len(parameters))
    return statistics_of(static, wanted, logits, parameters)[0]


def statistics_of(
    static: Static,
    wanted: Wanted,
    logits: tuple[Float[Array, "*positions C"], ...],
    parameters: tuple[Float[Array, "*positions 1"], ...],
) -> tuple[Float[Array, "*positions"], Statistics]:
    """The divergence at each position, or this member's part of it, and its statistics."""

    def rows(*arrays):
        mine, others = arrays[: len(logits)], arrays[len(logits) :]
        return _statistics(static.formula, static.class_axis_name, wanted, mine, others)

    return map_rows(rows, (*logits, *parameters), static.block_size)


def _statistics(formula, class_axis_name, wanted, logits, parameters):
    temperature, *others = parameters
    logits = promote(*logits)
    normalisers = tuple(normaliser_of(z, temperature, class_axis_name) for z in logits)
    x = _distributions(logits, temperature, normalisers)

    def part(terms, want):
        return jnp.sum(terms, -1) if want else jnp.zeros_like(normalisers[0].peak)

    def total(terms, want):
        whole = part(terms, want)
        return whole if class_axis_name is None or not want else lax.psum(whole, class_axis_name)

    slopes = [slope(x, *others) for slope in formula.slopes]
    by_temperature, *by_others = wanted.parameters
    # Through logits / T it is the sum of gradient x logit, up to a constant in the logits: log p
    # will do.
    gradients = [
        s - p * total(s, by_temperature)[..., None]
        for s, p in zip(slopes, x.probabilities, strict=True)
    ]
    towards = sum(
        jnp.where(g == 0, 0, g * log_probabilities_of(z, temperature, normaliser))
        for g, z, normaliser in zip(gradients, logits, normalisers, strict=True)
    )
    statistics = Statistics(
        normalisers=normalisers,
        slope_sums=tuple(map(total, slopes, wanted.logits)),
        parameters=(
            -part(towards, by_temperature) / jnp.squeeze(temperature, -1),
            *(
                part(slope(x, *others), want)
                for slope, want in zip(formula.parameter_slopes, by_others, strict=True)
            ),
        ),
    )
    return jnp.sum(formula.term(x, *others), -1), statistics


def normaliser_of(
    z: Float[Array, "*rows C"], temperature: ArrayLike, class_axis_name: AxisName | None
) -> Normaliser:
    """The normaliser of each row, over all members that hold some of its classes."""
    peak = jnp.max(z, -1)
    if class_axis_name is not None:
        peak = lax.pmax(peak, class_axis_name)
    total = jnp.sum(jnp.exp((z - peak[..., None]) / temperature), -1)
    return Normaliser(peak, total if class_axis_name is None else lax.psum(total, class_axis_name))


def _distributions(logits, temperature, normalisers):
    probabilities = tuple(
        probabilities_of(z, temperature, n) for z, n in zip(logits, normalisers, strict=True)
    )
    if len(logits) == 1:
        log_p = log_probabilities_of(logits[0], temperature, normalisers[0])
        return Distributions(probabilities, log_p)
    (z_p, z_q), (n_p, n_q) = logits, normalisers
    # Of near logits the difference is exact, and so is that of the normalisers, but for rounding
    # of the size of their difference.
    shift = (n_q.peak - n_p.peak)[..., None] / temperature + jnp.log(n_q.total / n_p.total)[
        ..., None
    ]
    return Distributions(probabilities, jnp.where(z_p == z_q, 0, z_q - z_p) / temperature - shift)


def probabilities_of(
    z: Float[Array, "*rows C"], temperature: ArrayLike, normaliser: Normaliser
) -> Float[Array, "*rows C"]:
    """The softmax of logits whose normaliser is known."""
    peak, total = (x[..., None] for x in normaliser)
    return jnp.exp((z - peak) / temperature) / total


def log_probabilities_of(
    z: Float[Array, "*rows C"], temperature: ArrayLike, normaliser: Normaliser
) -> Float[Array, "*rows C"]:
    """Its logarithm."""
    peak, total = (x[..., None] for x in normaliser)
    return (z - peak) / temperature - jnp.log(total)


def _divergences_forward(static, logits, parameters):
    wanted = Wanted(*(tuple(x.perturbed for x in group) for group in (logits, parameters)))
    logits, parameters = (tuple(x.value for x in group) for group in (logits, parameters))
    values, statistics = statistics_of(static, wanted, logits, parameters)
    return values, (logits, parameters, statistics)


def _divergences_backward(static, residuals, cotangent):
    logits, parameters, statistics = residuals
    if isinstance(cotangent, SymbolicZero):
        return None, None
    # A position that is masked out may hold anything.
    ignored = cotangent == 0

    def through(logit, gradient):
        weighted = jnp.where(ignored[..., None], 0, cotangent[..., None] * gradient)
        return weighted.astype(logit.dtype)

    def through_parameter(parameter, slope):
        return sum_to(parameter, jnp.where(ignored, 0, cotangent * slope))

    gradients = gradients_of(static.formula, logits, parameters, statistics)
    return (
        tuple(map(through, logits, gradients)),
        tuple(map(through_parameter, parameters, statistics.parameters)),
    )


def gradients_of(
    formula: Formula,
    logits: tuple[Float[Array, "*rows C"], ...],
    parameters: tuple[Float[Array, "*rows 1"], ...],
    statistics: Statistics,
) -> list[Float[Array, "*rows C"]]:
    """The gradients of each row's divergence through its logits."""
    temperature, *others = parameters
    x = _distributions(promote(*logits), temperature, statistics.normalisers)
    return [
        (slope(x, *others) - p * total[..., None]) / temperature
        for slope, p, total in zip(
            formula.slopes, x.probabilities, statistics.slope_sums, strict=True
        )
    ]


def sum_to(
    parameter: Float[Array, "*positions 1"], cotangent: Float[Array, "*rows"]
) -> Float[Array, "*positions 1"]:
    """Sums the cotangents of rows over the axes along which a parameter is shared."""
    each = cotangent[..., None]
    axes = [axis for axis, n in enumerate(parameter.shape) if n != each.shape[axis]]
    return jnp.sum(each, axes, keepdims=True)


_divergences.defvjp(_divergences_forward, _divergences_backward, symbolic_zeros=True)
