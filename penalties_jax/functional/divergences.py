"""Divergences between distributions that are given by their log-probabilities."""

import math
from typing import Literal

import jax.numpy as jnp
from jax import lax
from jax.nn import log_softmax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from penalties_jax.functional.decorators import elementwise_derivatives
from penalties_jax.functional.gates import check_unit
from penalties_jax.functional.reduction import (
    AxisName,
    Reduction,
    check_choice,
    check_reduction,
    check_same_shape,
    evaluate,
)

Direction = Literal["forward", "reverse", "symmetric"]
DIRECTIONS = ("forward", "reverse", "symmetric")

# A log-ratio whose exponential still is a number.
LARGE = 60.0


def kl_divergence(
    log_p: Float[Array, "..."],
    log_q: Float[Array, "..."],
    *,
    direction: Direction = "forward",
    axis: int = -1,
    reduction: Reduction = "mean",
    where: Bool[Array, "..."] | None = None,
    axis_name: AxisName | None = None,
) -> Float[Array, "..."]:
    r"""The Kullback-Leibler divergence, in nats: $\sum_c p_c (\log p_c - \log q_c)$.

    Computed as the generalised divergence $\sum_c p_c (e^{d_c} - 1 - d_c)$ with
    $d = \log q - \log p$, the same number for normalised distributions. Each of its terms is at
    least 0, so that it is never negative, and accurate where the textbook difference cancels. The
    derivative is the textbook's: $p (\log p - \log q + 1)$ through `log_p` and $-p$ through
    `log_q`; through a softmax it is $p (\log p - \log q - \mathrm{KL})$ and $q - p$.

    A class with p = 0 contributes q, with p = q = 0 nothing, both with gradient 0; q = 0 where
    p > 0 makes the value inf, and its gradient stays finite.

    Args:
        log_p: Natural log-probabilities, normalised along `axis`, shape [..., C, ...]. By
            convention the model.
        log_q: The same of the reference. Half precision is upcast but not renormalised.
        direction: "forward" is KL(P||Q), "reverse" KL(Q||P), "symmetric" the mean of the two.
        axis: The class axis. The other axes are the positions.
        reduction: "mean" or "sum" over the positions, or "none".
        where: Mask of positions, which broadcasts to their shape.
        axis_name: Mapped axes over whose members to sum or average.

    Returns:
        A scalar, or an array of the shape of the positions for "none".

    Raises:
        ValueError: If the shapes differ, `where` does not broadcast to the positions, or an option
            is unknown.

    References:
        Kullback & Leibler (1951), On information and sufficiency.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> import penalties_jax as pj
        >>> log_p = jax.nn.log_softmax(jnp.array([[0.0, 1.0]]))
        >>> float(pj.kl_divergence(log_p, log_p))
        0.0
        >>> log_q = jnp.log(jnp.array([[0.5, 0.5]]))
        >>> round(float(pj.kl_divergence(log_p, log_q)), 4)
        0.1109
    """
    check_choice("direction", direction, DIRECTIONS)
    check_same_shape(log_p=log_p, log_q=log_q)
    formulas = {"forward": _kl_forward, "reverse": _kl_reverse, "symmetric": _kl_symmetric}
    return _divergence(formulas[direction], (log_p, log_q), axis, reduction, where, axis_name)


def js_divergence(
    log_p: Float[Array, "..."],
    log_q: Float[Array, "..."],
    *,
    mixture: ArrayLike = 0.5,
    axis: int = -1,
    reduction: Reduction = "mean",
    where: Bool[Array, "..."] | None = None,
    axis_name: AxisName | None = None,
) -> Float[Array, "..."]:
    r"""The generalised Jensen-Shannon divergence, in nats.

    $b\,\mathrm{KL}(P \| M) + (1 - b)\,\mathrm{KL}(Q \| M)$ with $M = b P + (1 - b) Q$. It lies in
    [0, H(b)], with H the binary entropy (ln 2 at b = 1/2), which disjoint distributions reach; it
    is 0 at b = 0 and 1, and JS / b tends to KL(P||Q) as b tends to 0. The derivative through
    `log_p` is $b\, p (\log p - \log m)$, 0 at p = 0.

    Args:
        log_p: Natural log-probabilities, normalised along `axis`, shape [..., C, ...].
        log_q: The same of the other distribution.
        mixture: The $b$, in [0, 1].
        axis: The class axis. The other axes are the positions.
        reduction: "mean" or "sum" over the positions, or "none".
        where: Mask of positions, which broadcasts to their shape.
        axis_name: Mapped axes over whose members to sum or average.

    Returns:
        A scalar, or an array of the shape of the positions for "none".

    Raises:
        ValueError: If the shapes differ, `where` does not broadcast to the positions, the mixture
            is a number outside of [0, 1], or an option is unknown.

    References:
        Lin (1991), Divergence measures based on the Shannon entropy.

    Examples:
        >>> import jax.numpy as jnp
        >>> import penalties_jax as pj
        >>> log_p, log_q = jnp.log(jnp.array([[1.0, 0.0]])), jnp.log(jnp.array([[0.0, 1.0]]))
        >>> round(float(pj.js_divergence(log_p, log_q)), 4)
        0.6931
    """
    check_same_shape(log_p=log_p, log_q=log_q)
    check_unit("mixture", mixture)
    inputs = (log_p, log_q)
    return _divergence(_js, inputs, axis, reduction, where, axis_name, mixture=mixture)


def entropy(
    log_p: Float[Array, "..."],
    *,
    temperature: ArrayLike = 1.0,
    normalize: bool = False,
    axis: int = -1,
    reduction: Reduction = "mean",
    where: Bool[Array, "..."] | None = None,
    axis_name: AxisName | None = None,
) -> Float[Array, "..."]:
    r"""The Shannon entropy, in nats: $H = -\sum_c \pi_c \log \pi_c$, $\pi$ = softmax(log p / T).

    The derivative is $-\pi (\log \pi + H) / T$, and 0 at p = 0.

    Args:
        log_p: Natural log-probabilities along `axis`, shape [..., C, ...].
        temperature: The $T$, above 0.
        normalize: Divide by ln C, so that the uniform distribution has entropy 1; a single class
            has entropy 0.
        axis: The class axis. The other axes are the positions.
        reduction: "mean" or "sum" over the positions, or "none".
        where: Mask of positions, which broadcasts to their shape.
        axis_name: Mapped axes over whose members to sum or average.

    Returns:
        A scalar, or an array of the shape of the positions for "none".

    Raises:
        ValueError: If `where` does not broadcast to the positions, or an option is unknown.

    References:
        Shannon (1948), A mathematical theory of communication.

    Examples:
        >>> import jax.numpy as jnp
        >>> import penalties_jax as pj
        >>> float(pj.entropy(jnp.log(jnp.array([[0.25, 0.25, 0.5, 0.0]])), normalize=True))
        0.75
    """
    scale = 1.0
    if normalize:
        classes = jnp.shape(log_p)[axis]
        scale = 1 / math.log(classes) if classes > 1 else 0.0
    return _divergence(
        _entropy, (log_p,), axis, reduction, where, axis_name, scale, temperature=temperature
    )


def _divergence(formula, inputs, axis, reduction, where, axis_name, scale=1.0, **parameters):
    check_reduction(reduction)
    return evaluate(
        formula,
        inputs,
        parameters,
        weights=scale,
        where=where,
        axis=axis,
        reduction=reduction,
        axis_name=axis_name,
    )


@elementwise_derivatives(jnp.expm1)
def expm1_minus(d: Float[Array, "..."]) -> Float[Array, "..."]:
    """expm1(d) - d, which is at least 0, without cancellation near 0."""
    far = jnp.expm1(d) - jnp.minimum(d, jnp.finfo(d.dtype).max)
    return jnp.where(jnp.abs(d) < 1, expm1_minus_near(d), far)


def expm1_minus_near(d):
    """The same for |d| < 1, by its Taylor series up to terms below rounding at |d| = 1."""
    d = jnp.where(jnp.abs(d) < 1, d, 0)
    series = jnp.zeros_like(d)
    for k in reversed(range(18 if d.dtype == jnp.float64 else 11)):
        series = series * d + 1 / math.factorial(k + 2)
    return jnp.square(d) * series


def _log_ratio(log_p, log_q):
    """Log q - log p, and 0 for a class that has probability 0 in both."""
    return jnp.where(log_p == log_q, 0, log_q - log_p)


def divergence_term(p, q, d):
    """The term p (expm1(d) - d) = q - p - p d, d = log q - log p; q at p = 0, inf at only q = 0."""
    far = jnp.where(jnp.isneginf(d), jnp.inf, jnp.where(p == 0, q, q - p - p * d))
    return jnp.where(jnp.abs(d) < 1, p * expm1_minus_near(d), far)


def _kl_slope_p(log_p, log_q):
    supported = ~(jnp.isneginf(log_p) | jnp.isneginf(log_q))
    log_p, log_q = (jnp.where(supported, x, 0) for x in (log_p, log_q))
    return jnp.where(supported, jnp.exp(log_p) * (log_p - log_q + 1), 0)


def _kl_slope_q(log_p, log_q):
    return -jnp.exp(log_p)


@elementwise_derivatives(_kl_slope_p, _kl_slope_q)
def _kl_term(log_p, log_q):
    return divergence_term(jnp.exp(log_p), jnp.exp(log_q), _log_ratio(log_p, log_q))


def _kl_forward(log_p, log_q, axis):
    return jnp.sum(_kl_term(log_p, log_q), axis)


def _kl_reverse(log_p, log_q, axis):
    return jnp.sum(_kl_term(log_q, log_p), axis)


def _kl_symmetric(log_p, log_q, axis):
    return (_kl_forward(log_p, log_q, axis) + _kl_reverse(log_p, log_q, axis)) / 2


def _log_mean_exp(weight, rest, d):
    """log(rest + weight e^d) for weight + rest = 1 and d <= LARGE."""
    near = jnp.log1p(weight * jnp.expm1(jnp.minimum(d, LARGE)))
    # Where log1p would cancel, and only there: elsewhere `rest` may be too near to 1.
    far = (d < -1) & (weight > 0.5)
    return jnp.where(far, jnp.log(rest + weight * jnp.exp(d)), near)


def _log_mixture_slope(log_p, log_q, b, c):
    """The share of Q in the mixture, c q / m."""
    return lax.logistic(_log_ratio(log_p, log_q) + jnp.log(c) - jnp.log(b))


@elementwise_derivatives(
    lambda *arguments: -_log_mixture_slope(*arguments),
    _log_mixture_slope,
    lambda log_p, log_q, b, c: _log_mixture_slope(log_q, log_p, c, b) / b,
    lambda log_p, log_q, b, c: _log_mixture_slope(log_p, log_q, b, c) / c,
)
def _log_mixture(log_p, log_q, b, c):
    return log_mixture(_log_ratio(log_p, log_q), b, c)


def log_mixture(d, b, c):
    """Log m - log p for m = b p + c q and d = log q - log p; inf where p = 0."""
    far = d > LARGE
    weight, rest = jnp.where(far, b, c), jnp.where(far, c, b)
    ratio = _log_mean_exp(weight, rest, jnp.where(far, -d, d)) + jnp.where(far, d, 0)
    return jnp.where(c == 0, 0, ratio)


def _js_slope_p(log_p, log_q, b):
    p = jnp.exp(log_p)
    return jnp.where(
        jnp.isneginf(log_p) | (b == 0), 0, -b * p * _log_mixture(log_p, log_q, b, 1 - b)
    )


def _js_slope_q(log_p, log_q, b):
    q = jnp.exp(log_q)
    return jnp.where(
        jnp.isneginf(log_q) | (b == 1), 0, -(1 - b) * q * _log_mixture(log_q, log_p, 1 - b, b)
    )


def _js_slope_b(log_p, log_q, b):
    """The term of KL(P||M) - KL(Q||M): what m gains cancels in the sum over classes."""
    from_p = jnp.exp(log_p) * _log_mixture(log_p, log_q, b, 1 - b)
    from_q = jnp.exp(log_q) * _log_mixture(log_q, log_p, 1 - b, b)
    return jnp.where(jnp.isneginf(log_q), 0, from_q) - jnp.where(jnp.isneginf(log_p), 0, from_p)


@elementwise_derivatives(_js_slope_p, _js_slope_q, _js_slope_b)
def _js_term(log_p, log_q, b):
    return js_term(jnp.exp(log_p), jnp.exp(log_q), _log_ratio(log_p, log_q), b)


def js_term(p, q, d, b):
    """The term of the Jensen-Shannon divergence, d = log q - log p, with mixture b."""
    c = 1 - b
    m = b * p + c * q
    term_p = divergence_term(p, m, log_mixture(d, b, c))
    term_q = divergence_term(q, m, log_mixture(-d, c, b))
    return jnp.where((b == 0) | (b == 1), 0, b * term_p + c * term_q)


def _js(log_p, log_q, mixture, axis):
    return jnp.sum(_js_term(log_p, log_q, mixture), axis)


def _entropy(log_p, temperature, axis):
    supported = ~jnp.isneginf(log_p / lax.stop_gradient(temperature))
    scaled = jnp.where(supported, jnp.where(supported, log_p, 0) / temperature, -jnp.inf)
    log_pi = jnp.where(supported, log_softmax(scaled, axis), 0)
    return -jnp.sum(jnp.where(supported, jnp.exp(log_pi) * log_pi, 0), axis)
