"""What a divergence needs to know of a row of logits, in one pass over its classes.

On an accelerator the passes over the logits are what a divergence costs. A sum of exponentials
about a running peak takes one, and so does a mean under the softmax: both are rescaled when the
peak rises (Milakov & Gimelshein 2018, Online normalizer calculation for softmax).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from penalties_jax.functional.divergences.formulas import DOWN, MOST, log_ratio
from penalties_jax.functional.reduction import AxisName


class Moments(NamedTuple):
    """Of one distribution, what is known of the classes that were seen.

    Attributes:
        peak: The largest logit.
        total: The sum of the weights w = exp((logit - peak) / T).
        weighted: Of one of two distributions, the sum of w d where d, the `difference` of the
            logits, is finite; of one alone, the sum of w (logit - peak) / T. None if not wanted.
        lone: The sum of w where d is infinite; None of one alone.
    """

    peak: Any
    total: Any
    weighted: Any = None
    lone: Any = None


def moments(
    logits: tuple[Float[Array, "*rows C"], ...],
    temperature: Float[Array, "... 1"],
    weighted: bool,
    class_axis_name: AxisName | None,
) -> tuple[Moments, ...]:
    """The moments of each distribution, [*rows].

    Args:
        logits: Of one or two distributions.
        temperature: The T.
        weighted: Whether the weighted sums are wanted.
        class_axis_name: Axes whose members hold the other classes.
    """
    rate = jnp.ones_like(logits[0]) / temperature
    # XLA's TPU backend fuses what is computed into the pass if nothing else is read as it is.
    one = lax.optimization_barrier(jnp.ones((), rate.dtype))
    first = _of_single_classes(tuple(one * z for z in logits), rate, weighted)
    zero = jnp.zeros((), rate.dtype)
    empty = tuple(jax.tree.map(lambda _: zero, x)._replace(peak=zero - jnp.inf) for x in first)
    _, found = lax.reduce((rate, first), (zero, empty), _united, (rate.ndim - 1,))
    if class_axis_name is None:
        return found
    return tuple(_of_all_members(x, temperature, class_axis_name) for x in found)


def _of_single_classes(logits, rate, weighted):
    ones = jnp.ones_like(rate)
    if not weighted:
        return tuple(Moments(z, ones) for z in logits)
    if len(logits) == 1:
        return (Moments(logits[0], ones, jnp.zeros_like(rate)),)
    p, q = logits
    between = difference(p, q)
    finite = jnp.where(of_one_alone(between), 0, between)
    # An expression of its own for each: XLA's GPU backend writes to memory what has many users.
    pairs = zip(logits, reversed(logits), strict=True)
    return tuple(
        Moments(z, ones, finite, jnp.where(other < _lowest(rate), ones, 0)) for z, other in pairs
    )


def difference(p: Float[Array, "..."], q: Float[Array, "..."]) -> Float[Array, "..."]:
    """Scaled down, q - p of logits, 0 where both are -inf."""
    return log_ratio(p * DOWN, q * DOWN)


def of_one_alone(between: Float[Array, "..."]) -> Bool[Array, "..."]:
    """Where one logit is -inf and the other is not, by their `difference`, also from peaks."""
    # Masks by the logits themselves XLA's GPU backend would write to memory in a loop.
    return jnp.abs(between) > jnp.finfo(between.dtype).max / 2


def _united(a, b):
    """The moments of two sets of classes together, and 1 / T, which is 0 of the empty set."""
    rate = jnp.maximum(a[0], b[0])
    return rate, tuple(_merged(x, y, rate) for x, y in zip(a[1], b[1], strict=True))


def _merged(a, b, rate):
    rise = _rise(a.peak, b.peak, rate)
    a, b = _seen_from(a, jnp.maximum(rise, 0)), _seen_from(b, jnp.maximum(-rise, 0))
    less = jnp.exp(-jnp.abs(rise))
    by_a, by_b = jnp.where(rise > 0, less, 1), jnp.where(rise > 0, 1, less)
    merged = jax.tree.map(lambda x, y: by_a * x + by_b * y, _sums(a), _sums(b))
    return merged._replace(peak=jnp.maximum(a.peak, b.peak))


def _of_all_members(x, temperature, class_axis_name):
    peak = lax.pmax(x.peak, class_axis_name)
    rise = _rise(x.peak, peak, 1 / jnp.squeeze(temperature, -1))
    sums = jax.tree.map(lambda part: jnp.exp(-rise) * part, _sums(_seen_from(x, rise)))
    return lax.psum(sums, class_axis_name)._replace(peak=peak)


def _sums(x):
    return x._replace(peak=None)


def _rise(peak, other, rate):
    """How much higher another peak is, over T; that of masked classes alone is as low as can be."""
    lowest = _lowest(rate)
    return (jnp.maximum(other, lowest) - jnp.maximum(peak, lowest)) * rate


def _lowest(like):
    return jnp.finfo(like.dtype).min


def _seen_from(x, rise):
    """The moments, where what is counted from the peak is from one that is higher by so much."""
    alone = x.weighted is not None and x.lone is None
    return x._replace(weighted=x.weighted - jnp.minimum(rise, MOST) * x.total) if alone else x
