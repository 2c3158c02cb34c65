"""Divergences between distributions that are given by their log-probabilities."""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Real

from penalties_jax.functional.checks import (
    FINITE,
    POSITIVE,
    Size,
    check_classes,
    check_same_shape,
    public,
)
from penalties_jax.functional.derivatives import elementwise_derivatives, over
from penalties_jax.functional.divergences.floors import floored_log_probabilities
from penalties_jax.functional.divergences.formulas import (
    ALPHA,
    ENTROPY,
    JS,
    Direction,
    Distributions,
    Formula,
    kl_formula,
    log_ratio,
    with_floor,
)
from penalties_jax.functional.reduction import AxisName, Reduction, evaluate

__all__ = ["alpha_divergence", "entropy", "js_divergence", "kl_divergence"]


@public
def kl_divergence(
    log_p: Real[ArrayLike, "..."],
    log_q: Real[ArrayLike, "..."],
    *,
    direction: Direction = "forward",
    skew: ArrayLike | None = None,
    floor: ArrayLike | None = None,
    axis: int = -1,
    weights: ArrayLike = 1.0,
    reduction: Reduction = "mean",
    where: Bool[ArrayLike, "..."] | None = None,
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

    Minimised over P, the model, KL(P||Q) is mode-seeking, or zero-forcing: P stays where Q has
    mass. KL(Q||P), direction="reverse", is mode-covering, or zero-avoiding: P has mass wherever Q
    does. Where only one of them has mass two options bound what that costs:

    - `skew` b: from P to the mixture of both, $\mathrm{KL}(P \| b P + (1 - b) Q)$, at most
      $-\ln b$. With direction="reverse" the roles are exchanged,
      $\mathrm{KL}(Q \| b Q + (1 - b) P)$, and "symmetric" is the mean of the two. With P the
      student, "reverse" is DistiLLM's skewed KL and "forward" its skewed reverse KL.
    - `floor` f: Q is replaced by $Q' = \max(q, e^f) / \sum \max(q, e^f)$ over the classes of which
      P or Q has something; with a skew, before that. The second input is Q in every direction.
      Value and gradient are 0 where P = Q', and through `log_q` the gradient only passes what is
      above the floor.

    Args:
        log_p: Natural log-probabilities, normalised along `axis`, shape [..., C, ...]. By
            convention the model.
        log_q: The same of the reference. Half precision is upcast but not renormalised.
        direction: "forward" is KL(P||Q), "reverse" KL(Q||P), "symmetric" the mean of the two.
        skew: The b, in [0, 1]: 0 is no skew, as None is, and costs nothing if it is a plain number;
            at 1 the divergence is 0. One for all, or an array that broadcasts to `log_p`.
        floor: The f, a log-probability below 0, as skew; None is none.
        axis: The class axis. The other axes are the positions.
        weights: A finite factor of either sign, for all positions or one for each: a number, or
            an array that broadcasts to their shape. "mean" divides by the count, not by the sum of
            the weights.
        reduction: "mean" or "sum" over the positions, or "none".
        where: Mask of positions, which broadcasts to their shape; an excluded one contributes
            nothing to the value or the gradient, whatever it holds.
        axis_name: Mapped axes over whose members to sum or average.

    Returns:
        A scalar, or an array of the shape of the positions for "none".

    Raises:
        ValueError: If shapes differ, a number is out of its range, an array does not broadcast to
            the positions, or an option is unknown.
        TypeError: If an input is not an array, a number is a schedule, or `where` is not boolean.

    References:
        Kullback & Leibler (1951), On information and sufficiency. Ko et al. (2024), DistiLLM:
        towards streamlined distillation for large language models.

    Examples:
        >>> log_p = jax.nn.log_softmax(jnp.array([[0.0, 1.0]]))
        >>> float(pj.kl_divergence(log_p, log_p))
        0.0
        >>> log_q = jnp.log(jnp.array([[0.5, 0.5]]))
        >>> round(float(pj.kl_divergence(log_p, log_q)), 4)
        0.1109
        >>> impossible = jnp.log(jnp.array([[1.0, 0.0]]))
        >>> [round(float(pj.kl_divergence(log_p, impossible, **x)), 4)
        ...  for x in ({}, {"skew": 0.1}, {"floor": -10.0})]
        [inf, 1.3506, 6.7284]
    """
    formula, numbers = kl_formula(direction, skew, floor)
    return _of_pair(formula, log_p, log_q, axis, weights, reduction, where, axis_name, **numbers)


@public
def js_divergence(
    log_p: Real[ArrayLike, "..."],
    log_q: Real[ArrayLike, "..."],
    *,
    mixture: ArrayLike = 0.5,
    floor: ArrayLike | None = None,
    axis: int = -1,
    weights: ArrayLike = 1.0,
    reduction: Reduction = "mean",
    where: Bool[ArrayLike, "..."] | None = None,
    axis_name: AxisName | None = None,
) -> Float[Array, "..."]:
    r"""The generalised Jensen-Shannon divergence, in nats.

    $b\,\mathrm{KL}(P \| M) + (1 - b)\,\mathrm{KL}(Q \| M)$ with $M = b P + (1 - b) Q$. It lies in
    [0, H(b)], with H the binary entropy (ln 2 at b = 1/2), which disjoint distributions reach; it
    is 0 at b = 0 and 1, and JS / b tends to KL(P||Q) as b tends to 0. The derivative through
    `log_p` is $b\, p (\log p - \log m)$, 0 at p = 0, and that in b KL(P||M) - KL(Q||M).

    Args:
        log_p: Natural log-probabilities, normalised along `axis`, shape [..., C, ...].
        log_q: The same of the other distribution.
        mixture: The $b$, in [0, 1].
        floor: Under the log-probabilities of Q, as in `pj.kl_divergence`.
        axis, weights, reduction, where, axis_name: As in `pj.kl_divergence`; so are result and
            errors.

    References:
        Lin (1991), Divergence measures based on the Shannon entropy.

    Examples:
        >>> log_p, log_q = jnp.log(jnp.array([[1.0, 0.0]])), jnp.log(jnp.array([[0.0, 1.0]]))
        >>> round(float(pj.js_divergence(log_p, log_q)), 4)
        0.6931
    """
    formula, numbers = with_floor(JS, floor, mixture=mixture)
    return _of_pair(formula, log_p, log_q, axis, weights, reduction, where, axis_name, **numbers)


@public
def alpha_divergence(
    log_p: Real[ArrayLike, "..."],
    log_q: Real[ArrayLike, "..."],
    alpha: ArrayLike,
    *,
    axis: int = -1,
    weights: ArrayLike = 1.0,
    reduction: Reduction = "mean",
    where: Bool[ArrayLike, "..."] | None = None,
    axis_name: AxisName | None = None,
) -> Float[Array, "..."]:
    r"""The alpha divergence: $(1 - \sum_c p_c^\alpha q_c^{1 - \alpha}) / (\alpha (1 - \alpha))$.

    KL(P||Q) at 1, KL(Q||P) at 0, in nats; Hellinger's $4 (1 - \sum_c \sqrt{p_c q_c})$ at 1/2, half
    the chi-square at 2. A class with p = 0 < q contributes $q / \alpha$, one with q = 0 < p
    $p / (1 - \alpha)$; inf for $\alpha \le 0$ and $\alpha \ge 1$, with a finite gradient.

    Args:
        log_p, log_q, axis, weights, reduction, where, axis_name: As in `pj.kl_divergence`; so are
            result and errors.
        alpha: The $\alpha$, any real number, or an array that broadcasts to `log_p`.

    References:
        Minka (2005), Divergence measures and message passing.

    Examples:
        >>> round(float(pj.alpha_divergence(*jnp.log(jnp.array([[0.75, 0.25], [0.5, 0.5]])), 2)), 4)
        0.125
    """
    return _of_pair(ALPHA, log_p, log_q, axis, weights, reduction, where, axis_name, alpha=alpha)


@public
def entropy(
    log_p: Real[ArrayLike, "..."],
    *,
    temperature: ArrayLike = 1.0,
    normalize: bool = False,
    axis: int = -1,
    weights: ArrayLike = 1.0,
    reduction: Reduction = "mean",
    where: Bool[ArrayLike, "..."] | None = None,
    axis_name: AxisName | None = None,
) -> Float[Array, "..."]:
    r"""The Shannon entropy, in nats: $H = -\sum_c \pi_c \log \pi_c$, $\pi$ = softmax(log p / T).

    The derivative is $-\pi (\log \pi + H) / T$, and 0 at p = 0.

    Args:
        log_p: Natural log-probabilities along `axis`, shape [..., C, ...].
        temperature: The $T$, above 0.
        normalize: Divide by ln C, so that the uniform distribution has entropy 1; a single class
            has entropy 0.
        axis, weights, reduction, where, axis_name: As in `pj.kl_divergence`; so are result and
            errors.

    References:
        Shannon (1948), A mathematical theory of communication.

    Examples:
        >>> float(pj.entropy(jnp.log(jnp.array([[0.25, 0.25, 0.5, 0.0]])), normalize=True))
        0.75
    """
    POSITIVE.check(temperature=temperature)
    FINITE.check(weights=weights)
    if normalize:
        if not jnp.ndim(log_p):
            check_classes(log_p=log_p)
        weights = weights * entropy_scale(jnp.shape(log_p)[axis])
    options = {"reduction": reduction, "where": where, "axis_name": axis_name}
    parameters = {"temperature": temperature}
    return evaluate(_tempered_entropy, (log_p,), parameters, weights=weights, axis=axis, **options)


def entropy_scale(classes: Size) -> float:
    """What divides the entropy by that of the uniform distribution; 0 for a single class."""
    return 1 / math.log(classes) if classes > 1 else 0.0


def _tempered_entropy(log_p, temperature, axis):
    peak = jnp.max(lax.stop_gradient(log_p), axis, keepdims=True)
    scaled = over(log_ratio(peak, log_p), temperature)
    log_pi = scaled - jnp.log(jnp.sum(jnp.exp(scaled), axis, keepdims=True))
    # A row that is excluded as a whole has no peak, and an entropy of 0.
    log_pi = jnp.where(jnp.isneginf(log_p), -jnp.inf, log_pi)
    return SumOfTerms(ENTROPY)(log_pi, axis=axis)


def _of_pair(formula, log_p, log_q, axis, weights, reduction, where, axis_name, **parameters):
    check_same_shape(log_p=log_p, log_q=log_q)
    formula.check(parameters)
    FINITE.check(weights=weights)
    options = {"reduction": reduction, "where": where, "axis_name": axis_name}
    inputs, total = (log_p, log_q), SumOfTerms(formula)
    return evaluate(total, inputs, parameters, weights=weights, axis=axis, **options)


class SumOfTerms(NamedTuple):
    """A formula as a function of log-probabilities; equal for equal formulas."""

    formula: Formula

    def __call__(
        self, *logs: Float[Array, "..."], axis: int, **parameters: Any
    ) -> Float[Array, "..."]:
        """The sum over the classes, with the formula's slopes as its derivatives."""
        term, slopes, named, *_ = self.formula
        numbers = [parameters[parameter.name] for parameter in named]
        if self.formula.floored:
            log_p, log_q = logs
            logs = log_p, floored_log_probabilities(log_p, log_q, parameters["floor"], axis)

        def of_logs(function):
            def applied(*arguments):
                return function(_distributions(*arguments[: len(logs)]), *arguments[len(logs) :])

            return applied

        partials = map(of_logs, (*slopes, *(parameter.slope for parameter in named)))
        declared = elementwise_derivatives(*partials)(of_logs(term))
        return jnp.sum(declared(*logs, *numbers), axis)


def _distributions(*logs):
    probabilities = tuple(map(jnp.exp, logs))
    if len(logs) == 1:
        return Distributions(probabilities, logs)
    return Distributions(probabilities, logs, log_ratio(*logs))
