r"""Divergences from a teacher that is known by its likeliest tokens.

The student is a distribution over those tokens and one bucket for the rest, whose logits are
$z_i / T$ and the logsumexp of all other $z_c / T$: it is taken from these alone, as what
$1 - \sum_i p_i$ cancels is lost. All else happens on k + 1 numbers a row.
"""

from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, Real

from penalties_jax.functional.checks import ANY, PLAIN, check_classes, check_where, public
from penalties_jax.functional.derivatives import differentiated_as
from penalties_jax.functional.divergences.blocks import map_rows
from penalties_jax.functional.divergences.formulas import KL, MOST, Direction, Formula, Parameter
from penalties_jax.functional.divergences.heads import Head, capped_by, divergence_of_heads
from penalties_jax.functional.divergences.logprobs import SumOfTerms
from penalties_jax.functional.divergences.rows import (
    Normaliser,
    Options,
    Statistics,
    cotangents_of,
    divergence_of_logits,
    gradients_of,
    statistics_of,
    times,
)
from penalties_jax.functional.divergences.running import Moments, moments
from penalties_jax.functional.divergences.softcap import Softcap
from penalties_jax.functional.platform import by_platform
from penalties_jax.functional.reduction import AxisName, Reduction, vary_alike

__all__ = ["kl_to_top_k", "linear_kl_to_top_k"]

Tail = Literal["bucket", "truncate"]

# By how much probabilities may sum to more than 1.
ABOVE_ONE, ABOVE_ONE_IN_HALVES = 1e-4, 2.0**-6


@public
def kl_to_top_k(
    logits: Real[ArrayLike, "*positions C"],
    ids: Int[ArrayLike, "*positions k"],
    log_q: Real[ArrayLike, "*positions k"],
    *,
    direction: Direction = "forward",
    tail: Tail = "bucket",
    log_rest: Real[ArrayLike, "..."] | None = None,
    temperature: ArrayLike = 1.0,
    block_size: int | None = None,
    weights: ArrayLike = 1.0,
    reduction: Reduction = "mean",
    where: Bool[ArrayLike, "..."] | None = None,
    axis_name: AxisName | None = None,
    class_axis_name: AxisName | None = None,
) -> Float[Array, "..."]:
    r"""The Kullback-Leibler divergence from a teacher that is known by its k likeliest tokens.

    With $p_i$ of the student, $q_i$ of the teacher at the k tokens and $P$, $Q$ for all the rest,
    "bucket" is the divergence of distributions over k + 1 classes,
    $\sum_i p_i (\log p_i - \log q_i) + P (\log P - \log Q)$, and "truncate" leaves the rest out:
    $\sum_i p_i (\log p_i - \log q_i) - p_i + q_i$, with its derivative
    $p_i (\log p_i - \log q_i)$ through $\log p_i$. Both are sums of nonnegative terms, as
    `pj.kl_divergence`, and 0 with gradient 0 where the two agree.

    Distillation from the top tokens usually means direction="reverse", KL(teacher||student), which
    is that of Hinton's, and mode-covering. Either tail has about the gradient of the divergence
    over all classes, which renormalising both distributions over the k tokens has not: for random
    teachers whose first 64 of 1,000 tokens have 82% of their mass, and students of other tastes,
    the cosine of the angle to the full gradient is 0.99 with a bucket, 0.98 truncated, and 0.47
    renormalised.

    The logits are read twice and a gradient is written once; on accelerators a mask of a block of
    rows is held beside them. Differentiable as `pj.kl_from_logits`; in `log_q`, `log_rest` and the
    temperature too.

    Args:
        logits: The student's, classes last. A class is excluded by a logit of -inf.
        ids: The teacher's tokens, each once, counted over all members of `class_axis_name`. In a
            `jax.Array`, which is not read, one outside of [0, C) is a token that the student can't
            say, and one that comes twice makes the result meaningless.
        log_q: The teacher's log-probabilities of them, at the teacher's own temperature. -inf pads:
            the token of such an entry, which may be any number, belongs to the rest.
        direction: "forward" is KL(student||teacher), "reverse" KL(teacher||student), "symmetric"
            the mean of the two.
        tail: "bucket" or "truncate".
        log_rest: The teacher's log-probability of the rest, for all positions or for each; nothing
            to a truncated one. If None it is $\log(1 - \sum_i q_i)$, of which at least 4 k eps is
            left, and at most a half, for k tokens and the eps of `log_q`'s dtype: give it with half
            precision.
        temperature: The $T$ by which the student's logits are divided, above 0: for all positions,
            or one for each.
        block_size: Rows that are processed at once, for each device of the mesh that arrays lie on;
            if None, 2 MiB of logits on a CPU and 32 MiB of their mask elsewhere.
        weights, reduction, where, axis_name: As in `pj.kl_divergence`; so is the result.
        class_axis_name: Axes of `jax.shard_map` over which the classes are sharded.

    Raises:
        ValueError: As `pj.kl_divergence`; if shapes don't fit each other; and, of what is no
            `jax.Array`, if ids are out of range or repeated, or probabilities sum to more than
            1 + 1e-4, 1 + 2^-6 in half precision.
        TypeError: As `pj.kl_divergence`, or if ids are not integers.

    References:
        Hinton, Vinyals & Dean (2015), Distilling the knowledge in a neural network.

    Examples:
        >>> logits, ids = jnp.zeros((1, 8)), jnp.array([[5, 2]])
        >>> log_q = jnp.log(jnp.full((1, 2), 0.25))
        >>> round(float(pj.kl_to_top_k(logits, ids, log_q, direction="reverse")), 4)
        0.1438
        >>> float(pj.kl_to_top_k(logits, ids, log_q - jnp.log(2.0)))
        0.0
    """
    check_classes(logits=logits)
    options = Options(block_size, reduction, where, axis_name, class_axis_name, weights)
    formula, teacher = _teacher(jnp.shape(logits), ids, log_q, log_rest, direction, tail, options)
    return divergence_of_logits(
        formula, (logits,), options, ids=ids, temperature=temperature, **teacher
    )


@public
def linear_kl_to_top_k(
    hidden: Real[ArrayLike, "*positions D"],
    kernel: Real[ArrayLike, "D C"],
    ids: Int[ArrayLike, "*positions k"],
    log_q: Real[ArrayLike, "*positions k"],
    *,
    bias: Real[ArrayLike, " C"] | None = None,
    direction: Direction = "forward",
    tail: Tail = "bucket",
    log_rest: Real[ArrayLike, "..."] | None = None,
    temperature: ArrayLike = 1.0,
    softcap: Softcap = None,
    block_size: int | None = None,
    weights: ArrayLike = 1.0,
    reduction: Reduction = "mean",
    where: Bool[ArrayLike, "..."] | None = None,
    axis_name: AxisName | None = None,
    class_axis_name: AxisName | None = None,
) -> Float[Array, "..."]:
    r"""`pj.kl_to_top_k` of $h W + b$ from hidden states, without all the logits.

    Streamed, and differentiable, as `pj.linear_kl`.

    Args:
        hidden: The student's last hidden states.
        kernel: Its output kernel, classes last.
        ids, log_q, direction, tail, log_rest: As in `pj.kl_to_top_k`; so are errors.
        bias: Added to the logits.
        temperature, softcap, block_size, reduction, class_axis_name: As in `pj.linear_kl`.
        weights, where, axis_name: As in `pj.kl_divergence`; so is the result.

    Examples:
        >>> ids, log_q = jnp.array([[5, 2]]), jnp.log(jnp.full((1, 2), 0.125))
        >>> float(pj.linear_kl_to_top_k(jnp.ones((1, 1)), jnp.zeros((1, 8)), ids, log_q))
        0.0
    """
    heads = capped_by(softcap, Head(hidden, kernel, bias))
    check_classes(hidden=hidden, kernel=kernel)
    options = Options(block_size, reduction, where, axis_name, class_axis_name, weights)
    shape = (*jnp.shape(hidden)[:-1], jnp.shape(kernel)[-1])
    formula, teacher = _teacher(shape, ids, log_q, log_rest, direction, tail, options)
    return divergence_of_heads(formula, heads, options, ids=ids, temperature=temperature, **teacher)


def _teacher(shape, ids, log_q, log_rest, direction, tail, options) -> tuple[Any, dict[str, Any]]:
    """The formula and what it takes of the teacher, checked."""
    positions, classes = shape[:-1], shape[-1]
    if options.class_axis_name is not None:
        classes *= lax.axis_size(options.class_axis_name)
    if not jnp.issubdtype(jnp.result_type(ids), jnp.integer):
        raise TypeError(f"ids must be integers, got {jnp.result_type(ids)}")
    for name, x in (("ids", ids), ("log_q", log_q)):
        own = jnp.shape(x)
        if own[:-1] != positions or not own or not own[-1]:
            raise ValueError(
                f"{name} must have an axis of tokens after those of the positions, {positions}, "
                f"got shape {own}"
            )
    if jnp.shape(ids) != jnp.shape(log_q):
        raise ValueError(
            f"ids and log_q must have the same shape, got {jnp.shape(ids)} and {jnp.shape(log_q)}"
        )
    check_where(options.where, positions)
    _check_tokens(ids, log_q, options.where, classes)
    dtype = jnp.result_type(log_q)
    eps = float(jnp.finfo(dtype if jnp.issubdtype(dtype, jnp.floating) else jnp.float32).eps)
    known = {} if tail == "truncate" or log_rest is None else {"log_rest": log_rest}
    return TopK(direction, tail, eps, rest=bool(known)), {"log_q": log_q, **known}


def _check_tokens(ids, log_q, where, classes):
    """Raises ValueError for values that a teacher can't have, where they may be read."""
    # What a mask that may not be read leaves out may be anything.
    if where is not None and not isinstance(where, PLAIN):
        return
    padding = None
    if isinstance(log_q, PLAIN):
        logs = np.asarray(log_q, np.float64)
        padding = np.isneginf(logs)
        with np.errstate(over="ignore"):
            sums = np.exp(logs).sum(-1)
        most = 1 + (ABOVE_ONE_IN_HALVES if np.asarray(log_q).dtype.itemsize <= 2 else ABOVE_ONE)
        above = sums[(sums > most) & _included(where, sums.shape)]
        if above.size:
            raise ValueError(
                "log_q must be log-probabilities of tokens, whose probabilities sum to at most 1, "
                f"got {above[0]:.6g}"
            )
    if isinstance(ids, PLAIN):
        tokens = np.asarray(ids)
        counted = np.broadcast_to(_included(where, tokens.shape[:-1])[..., None], tokens.shape)
        # Where log_q may not be read, -1 and a token that comes again may be what pads.
        lowest = -1 if padding is None else 0
        counted = counted if padding is None else counted & ~padding
        outside = tokens[counted & ((tokens < lowest) | (tokens >= classes))]
        if outside.size:
            raise ValueError(f"ids must be in [0, {classes}), got {outside[0]}")
        if padding is not None:
            # What pads is given numbers that are no tokens, and differ.
            own = np.where(counted, tokens.astype(np.int64), -1 - np.arange(tokens.shape[-1]))
            ordered = np.sort(own, axis=-1)
            again = ordered[..., 1:][ordered[..., 1:] == ordered[..., :-1]]
            if again.size:
                raise ValueError(
                    f"ids must name each token once, got {again[0]} twice at a position"
                )


def _included(where, positions):
    return np.broadcast_to(True if where is None else where, positions)


class TopK(NamedTuple):
    """The formula of a teacher that is known by k tokens, which rows have as their labels.

    Attributes:
        direction: Of the divergence.
        tail: Whether the rest is a class.
        eps: Of the dtype in which the teacher's log-probabilities came.
        rest: Whether its log-probability of the rest is a parameter.
    """

    direction: Direction
    tail: Tail
    eps: float
    rest: bool

    @property
    def slopes(self) -> tuple[Any, ...]:
        """One for each distribution that has logits."""
        return self.divergence.slopes[:1]

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """What it takes of the teacher."""
        of_rest = (Parameter("log_rest", None, ANY),) if self.rest else ()
        return (Parameter("log_q", None, ANY, several=True), *of_rest)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of that."""
        return tuple(parameter.name for parameter in self.parameters)

    @property
    def divergence(self) -> Formula:
        """The generalised divergence, whose slopes are those of its terms."""
        formula = KL[self.direction]
        return formula._replace(slopes=formula.centred)

    def check(self, parameters: Any) -> None:
        """Nothing is left to check."""

    def __call__(
        self,
        scores: Float[Array, "*rows n"],
        log_q: Float[Array, "... k"],
        log_rest: Float[Array, "... 1"] | None = None,
    ) -> Float[Array, "*rows"]:
        """The divergence, from the student's logits of the k tokens and of the rest."""
        total = jnp.sum(jnp.exp(scores), -1, keepdims=True)
        log_p = scores - jnp.log(jnp.where(total > 0, total, 1))
        if self.tail == "truncate":
            log_p = log_p[..., :-1]
        else:
            rest = self._rest(log_q) if log_rest is None else log_rest
            log_q, rest = jnp.broadcast_arrays(log_q, rest)
            log_q = jnp.concatenate([log_q, rest[..., :1]], -1)
        return SumOfTerms(self.divergence)(*jnp.broadcast_arrays(log_p, log_q), axis=-1)

    def _rest(self, log_q):
        k = jnp.sum(~jnp.isneginf(log_q), -1, keepdims=True)
        most = 1 - jnp.minimum(4 * self.eps * k, 0.5).astype(log_q.dtype)
        total = jnp.sum(jnp.exp(log_q), -1, keepdims=True)
        return jnp.log1p(-jnp.where(total < most, total, most))


@statistics_of.register
def _(formula: TopK, walk, wanted, rows):
    def on(platform, rows):
        block = partial(_of_block, formula, platform, walk.class_axis_name, wanted)
        size = walk.block_size or platform.rows_in_mask(rows.logits[0].shape[-1])
        return vary_alike((rows, map_rows(lambda rows, _: block(rows), rows, size)))[1]

    return by_platform(on, rows, known=walk.platform)


@gradients_of.register
def _(formula: TopK, walk, rows, statistics):
    del formula  # is in the slopes
    by_scores = statistics.slope_sums
    return [_gradient(walk, rows, statistics, by_scores, by_scores[1].dtype)]


@cotangents_of.register
def _(formula: TopK, walk, rows, statistics, cotangent):
    del formula
    by_scores = tuple(times(cotangent, slope) for slope in statistics.slope_sums)
    return [_gradient(walk, rows, statistics, by_scores, rows.logits[0].dtype)]


def _of_block(formula, platform, class_axis_name, wanted, rows):
    """The divergence of each row, and its derivatives: through the scores, and in the rest."""
    temperature, *teacher = rows.parameters
    ids, known = _own_ids(rows, class_axis_name)
    scores = _at_ids(rows, ids, known, class_axis_name)
    rest = _rest_of(rows, ids, platform, class_axis_name, weighted=wanted.parameters[0])
    lowest = float(jnp.finfo(scores.dtype).min)
    of_rest = jnp.maximum(rest.peak, lowest)
    peak = jnp.maximum(of_rest, lax.stop_gradient(jnp.max(scores, -1)))
    scores = (scores - peak[..., None]) / temperature
    base = (of_rest - peak)[..., None] / temperature
    nothing = jnp.isneginf(rest.peak)
    total = jnp.where(nothing, 1, rest.total)
    bucket = jnp.where(nothing[..., None], -jnp.inf, base + jnp.log(total)[..., None])
    value, pull = jax.vjp(formula, jnp.concatenate([scores, bucket], -1), *teacher)
    by_scores, *by_teacher = pull(jnp.ones_like(value))
    by_parameters = [jnp.zeros_like(value), *by_teacher]
    if wanted.parameters[0]:
        # Of scores whose slopes sum to 0: a shift of all of them counts for nothing.
        mean = base + jnp.where(nothing, 0, rest.weighted / total)[..., None]
        along = jnp.maximum(jnp.concatenate([scores, mean], -1), -MOST)
        by_parameters[0] = -jnp.sum(by_scores * along, -1) / jnp.squeeze(temperature, -1)
    by_scores = by_scores / temperature
    members = 1 if class_axis_name is None else lax.axis_size(class_axis_name)
    return value / members, Statistics(
        (Normaliser(of_rest, total),),
        (by_scores[..., :-1], by_scores[..., -1]),
        tuple(x / members for x in by_parameters),
    )


def _own_ids(rows, class_axis_name):
    """Where the tokens are among the classes that are here, C for one that is not; which exist."""
    classes = rows.logits[0].shape[-1]
    first, every = 0, classes
    if class_axis_name is not None:
        first = lax.axis_index(class_axis_name) * classes
        every *= lax.axis_size(class_axis_name)
    tokens = rows.labels.astype(jnp.int32)
    known = (tokens >= 0) & (tokens < every) & ~jnp.isneginf(rows.parameters[1])
    own = tokens - first
    ids = jnp.where(known & (own >= 0) & (own < classes), own, classes)
    positions = lax.broadcast_shapes(ids.shape[:-1], rows.logits[0].shape[:-1])
    return jnp.broadcast_to(ids, (*positions, ids.shape[-1])), known


def _at_ids(rows, ids, known, class_axis_name):
    """The logits of the tokens, -inf of those that are no classes."""
    (z,), classes = rows.logits, rows.logits[0].shape[-1]
    z = jnp.broadcast_to(z, (*ids.shape[:-1], classes))
    here = ids < classes
    found = jnp.take_along_axis(z, jnp.where(here, ids, 0), -1)
    (found,) = rows._replace(logits=(found,)).wide_logits()
    if class_axis_name is not None:
        found = lax.psum(jnp.where(here, found, 0), class_axis_name)
    return jnp.where(known, found, -jnp.inf)


def _rest_of(rows, ids, platform, class_axis_name, *, weighted):
    """The moments of all other classes."""
    (z,) = rows.logits
    z = jnp.broadcast_to(z, (*ids.shape[:-1], z.shape[-1]))
    mask = jnp.zeros_like(z, bool)
    mask = _with(mask, ids, jnp.ones_like(ids, bool))
    z = jnp.where(mask, -jnp.inf, *rows.wide_logits())

    def in_passes(z, temperature):
        peak = lax.stop_gradient(jnp.max(z, -1))
        if class_axis_name is not None:
            peak = lax.pmax(peak, class_axis_name)
        above = jnp.maximum(peak, jnp.finfo(z.dtype).min)[..., None]
        scores = (z - above) / temperature
        terms = jnp.exp(scores)
        sums = [jnp.sum(terms, -1)]
        if weighted:
            sums.append(jnp.sum(terms * jnp.where(terms > 0, scores, 0), -1))
        if class_axis_name is not None:
            sums = lax.psum(sums, class_axis_name)
        return Moments(peak, *sums)

    def at_once(z, temperature):
        return moments((z,), temperature, weighted, class_axis_name)[0]

    run = differentiated_as(in_passes, at_once) if platform.fuses else in_passes
    return run(z, rows.parameters[0])


def _gradient(walk, rows, statistics, by_scores, dtype):
    """Through the logits, from that through the scores of tokens and of the rest, over T."""
    (normaliser,), (by_ids, by_rest) = statistics.normalisers, by_scores
    ids, _ = _own_ids(rows, walk.class_axis_name)
    (peak, total), by_rest = normaliser.by_class(), by_rest[..., None]
    (z,) = rows.wide_logits()
    # The tokens' own may be above the peak.
    below = jnp.where(z > peak, peak, z)
    share = jnp.exp((below - peak) / rows.parameters[0]) / total
    gradient = jnp.where(by_rest == 0, 0, by_rest * share).astype(dtype)
    return _with(gradient, ids, by_ids.astype(dtype))


def _with(x, ids, values):
    """An array with other values at some classes of each row; past the last there is none."""

    def row(x, ids, values):
        return x.at[ids].set(values, mode="drop")

    for _ in x.shape[:-1]:
        row = jax.vmap(row)
    return row(x, ids, values)
