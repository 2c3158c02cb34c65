"""How many steps a position takes: what halting probabilities mean, and what they cost."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, Real

from penalties_jax.functional.checks import (
    FINITE,
    UNIT,
    check_fits,
    public,
    standard_promotion,
)
from penalties_jax.functional.divergences.formulas import KL
from penalties_jax.functional.divergences.logprobs import SumOfTerms
from penalties_jax.functional.reduction import AxisName, Reduction, evaluate, lie_alike, promote

__all__ = [
    "halting_log_probabilities",
    "halting_weights",
    "ponder_cost",
    "ponder_divergence",
    "ponder_divergence_from_logits",
]


@public
def ponder_cost(
    halting: Real[ArrayLike, "*positions T"],
    *,
    epsilon: ArrayLike = 0.01,
    weights: ArrayLike = 1.0,
    reduction: Reduction = "mean",
    where: Bool[ArrayLike, "..."] | None = None,
    axis_name: AxisName | None = None,
) -> Float[Array, "..."]:
    r"""Graves' ponder cost, $\rho = N + R$: the steps a position takes, and its remainder.

    Of halting probabilities $h_1, ..., h_T$ a position halts at the first step N at which
    $\sum_{n \le N} h_n \ge 1 - \epsilon$, at the latest at T, with the remainder
    $R = 1 - \sum_{n < N} h_n$. N is piecewise constant, so that the gradient is that of R: -1
    through $h_n$ for n < N, and 0 from N on. A position that halts at once costs 2.

    Args:
        halting: The h, in [0, 1], steps last: a sigmoid of what a halting unit gives.
        epsilon: The $\epsilon$, in [0, 1], so that a position may halt after one step: a number,
            or one for each position.
        weights, reduction, where, axis_name: As in `pj.kl_divergence`, and so are errors.

    Returns:
        A scalar, or an array of the shape of the positions for "none".

    Raises:
        ValueError: If there is no step.

    References:
        Graves (2016), Adaptive computation time for recurrent neural networks.

    Examples:
        >>> halting = jnp.array([[0.5, 0.25, 0.5, 0.5], [1.0, 0.0, 0.0, 0.0]])
        >>> pj.ponder_cost(halting, reduction="none").tolist()
        [3.25, 2.0]
    """
    UNIT.check(epsilon=epsilon)
    options = {"reduction": reduction, "where": where, "axis_name": axis_name}
    return _of_steps(_cost, options, weights, {"halting": halting}, epsilon=epsilon)


@public
def ponder_divergence(
    halting: Real[ArrayLike, "*positions T"],
    rate: ArrayLike,
    *,
    weights: ArrayLike = 1.0,
    reduction: Reduction = "mean",
    where: Bool[ArrayLike, "..."] | None = None,
    axis_name: AxisName | None = None,
) -> Float[Array, "..."]:
    r"""PonderNet's penalty, in nats: the KL from when a position halts to a geometric prior.

    $\mathrm{KL}(P \| G)$ of $p_n = \lambda_n \prod_{j < n} (1 - \lambda_j)$, the last step taking
    the rest, and of the geometric distribution of rate $\lambda_p$, truncated to the T steps and
    normalised: $g_n = (1 - \lambda_p)^{n - 1} / \sum_{k < T} (1 - \lambda_p)^k$. Its mean is about
    $1 / \lambda_p$ steps where T is well above that. At a rate of 0 it is uniform; at 1 all of it
    is the first step, and any other costs infinity, with a finite gradient.

    Where $\lambda_n$ is 0 or 1 the value is its limit; the slope, which is infinite, is taken to be
    0, the limit of what a sigmoid passes on. In float32 a sigmoid is 1 from logits of 17 on: where
    there are logits, `pj.ponder_divergence_from_logits` loses nothing.

    Args:
        halting: The $\lambda$, in [0, 1], steps last, as `pj.ponder_cost` takes them: the
            probability of halting at a step that is reached. The last of them has no part in it.
        rate: The $\lambda_p$, in [0, 1]: a number, or one for each position.
        weights, reduction, where, axis_name: As in `pj.kl_divergence`, and so are errors.

    Returns:
        A scalar, or an array of the shape of the positions for "none".

    Raises:
        ValueError: If there is no step.

    References:
        Banino, Balaguer & Blundell (2021), PonderNet: learning to ponder.

    Examples:
        >>> halting = jnp.array([[0.5, 0.5, 0.5], [1.0, 0.0, 0.0]])
        >>> [round(float(x), 4) for x in pj.ponder_divergence(halting, 0.5, reduction="none")]
        [0.0398, 0.5596]
    """
    UNIT.check(rate=rate)
    options = {"reduction": reduction, "where": where, "axis_name": axis_name}
    return _of_steps(_divergence, options, weights, {"halting": halting}, rate=rate)


@public
def ponder_divergence_from_logits(
    logits: Real[ArrayLike, "*positions T"],
    rate: ArrayLike,
    *,
    weights: ArrayLike = 1.0,
    reduction: Reduction = "mean",
    where: Bool[ArrayLike, "..."] | None = None,
    axis_name: AxisName | None = None,
) -> Float[Array, "..."]:
    r"""PonderNet's penalty, from logits: `pj.ponder_divergence` of $\lambda_n = \sigma(z_n)$.

    Value and gradient are exact also where a sigmoid would round to 0 or 1.

    Args:
        logits: The z, steps last: what a halting unit gives, before a sigmoid. The last of them has
            no part in it.
        rate, weights, reduction, where, axis_name: As in `pj.ponder_divergence`; so are result and
            errors.

    Examples:
        >>> logits = jnp.array([0.0, 0.0, 0.0])
        >>> round(float(pj.ponder_divergence_from_logits(logits, 0.5)), 4)
        0.0398
        >>> float(pj.ponder_divergence_from_logits(jnp.array([jnp.inf, 0.0, 0.0]), 1.0))
        0.0
    """
    UNIT.check(rate=rate)
    options = {"reduction": reduction, "where": where, "axis_name": axis_name}
    return _of_steps(_divergence_of_logits, options, weights, {"logits": logits}, rate=rate)


@public
def halting_weights(
    halting: Real[ArrayLike, "*positions T"], *, epsilon: ArrayLike = 0.01
) -> Float[Array, "*positions T"]:
    r"""The weights of the states of a position, which sum to 1: $h_n$ for n < N, R at N, then 0.

    With N and R as in `pj.ponder_cost`; the output of adaptive computation time is the mean of its
    states under them. The gradient is theirs at a fixed N.

    Args:
        halting, epsilon: As in `pj.ponder_cost`; so are errors.

    Examples:
        >>> pj.halting_weights(jnp.array([0.5, 0.25, 0.5, 0.5])).tolist()
        [0.5, 0.25, 0.25, 0.0]
    """
    UNIT.check(epsilon=epsilon)
    return _halting_weights(halting, epsilon)


@public
def halting_log_probabilities(
    logits: Real[ArrayLike, "*positions T"],
) -> Float[Array, "*positions T"]:
    r"""The log-probabilities of when a position halts, $\log \lambda_n \prod_{j<n} (1-\lambda_j)$.

    With $\lambda_n = \sigma(z_n)$ the probability of halting at a step that is reached; the last
    step takes the rest. PonderNet's loss is the mean of the losses of all steps under them.

    Args:
        logits: As in `pj.ponder_divergence_from_logits`; so are errors.

    Examples:
        >>> jnp.exp(pj.halting_log_probabilities(jnp.array([0.0, 0.0, -9.0]))).tolist()
        [0.5, 0.25, 0.25]
    """
    _check_steps("logits", logits)
    return _halting_log_probabilities(logits)


@standard_promotion()
def depth_of(halting: Float[Array, "*positions T"], epsilon: ArrayLike) -> Int[Array, "*positions"]:
    """The N of `pj.ponder_cost`, from 1 to T; of when positions halt the median, with 1/2."""
    epsilon = _for_all_steps("epsilon", epsilon, halting.shape)
    return 1 + jnp.sum(_before_halting(halting, epsilon), -1, dtype=jnp.int32)


def _of_steps(formula, options, weights, inputs, **numbers):
    ((name, x),) = inputs.items()
    _check_steps(name, x)
    FINITE.check(weights=weights)
    numbers = {name: _for_all_steps(name, value, jnp.shape(x)) for name, value in numbers.items()}
    return evaluate(formula, (x,), numbers, weights=weights, axis=-1, **options)


def _check_steps(name, x):
    if not jnp.ndim(x) or not jnp.shape(x)[-1]:
        raise ValueError(f"{name} needs steps on its last axis, got shape {jnp.shape(x)}")


def _for_all_steps(name, value, shape):
    """A number of each position, with an axis of one step."""
    check_fits(shape[:-1], **{name: value})
    return jnp.expand_dims(value, -1) if jnp.ndim(value) else value


def _before_halting(halting, epsilon):
    """Whether a step is before the one at which its position halts."""
    last = halting.shape[-1] - 1
    # The first time counts, whatever comes after it.
    spent = lax.cummax(jnp.cumsum(lax.stop_gradient(halting), -1), halting.ndim - 1)
    return ~(spent >= 1 - epsilon) & (jnp.arange(last + 1) < last)


def _cost(halting, epsilon, axis):
    before = _before_halting(halting, epsilon)
    return 2 + jnp.sum(jnp.where(before, 1 - halting, 0), axis)


def _divergence(halting, rate, axis):
    return _to_prior(_log_probabilities(*_logs(halting)), rate, axis)


def _divergence_of_logits(logits, rate, axis):
    return _to_prior(_log_probabilities(*_logs_of_logits(logits)), rate, axis)


def _to_prior(log_p, rate, axis):
    return SumOfTerms(KL["forward"])(log_p, _log_prior(rate, log_p), axis=axis)


def _logs(halting):
    """Log h and log(1 - h), with slope 0 where h is 0 or 1."""
    never, surely = halting == 0, halting == 1
    inside = jnp.where(never | surely, 0.5, halting)
    halts = jnp.where(never, -jnp.inf, jnp.where(surely, 0, jnp.log(inside)))
    passes = jnp.where(surely, -jnp.inf, jnp.where(never, 0, jnp.log1p(-inside)))
    return halts, passes


def _logs_of_logits(logits):
    return jax.nn.log_sigmoid(logits), jax.nn.log_sigmoid(-logits)


def _log_probabilities(halts, passes):
    """When a position halts, from the logarithms of halting and of not, at each step reached."""
    last = halts.shape[-1] - 1
    passed = jnp.cumsum(passes[..., :last], -1)
    reached = jnp.concatenate([jnp.zeros_like(passes[..., :1]), passed], -1)
    return reached + jnp.where(jnp.arange(last + 1) < last, halts, 0)


def _log_prior(rate, like):
    """Of the truncated geometric distribution, in the shape of another."""
    later = jnp.arange(like.shape[-1]) > 0
    rest = jnp.where(later, 1 - rate, 1)
    logs = jnp.where(rest > 0, jnp.log(jnp.where(rest > 0, rest, 1)), -jnp.inf)
    total = jnp.sum(lax.cumprod(rest, rest.ndim - 1), -1, keepdims=True)
    return jnp.zeros_like(like) + jnp.cumsum(logs, -1) - jnp.log(total)


@jax.jit
def _halting_weights(halting, epsilon):
    _check_steps("halting", halting)
    halting, epsilon = promote(halting, epsilon)
    epsilon = _for_all_steps("epsilon", epsilon, halting.shape)
    (halting, epsilon), *_ = lie_alike((halting, epsilon))
    before = _before_halting(halting, epsilon)
    before_or_at = jnp.concatenate([jnp.ones_like(before[..., :1]), before[..., :-1]], -1)
    spent = jnp.where(before, halting, 0)
    rest = 1 - jnp.sum(spent, -1, keepdims=True)
    return jnp.where(before_or_at & ~before, rest, spent)


@jax.jit
def _halting_log_probabilities(logits):
    return _log_probabilities(*_logs_of_logits(*promote(logits)))
