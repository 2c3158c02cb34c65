"""Divergences from the last hidden states: the logits are never held all at once."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, Real

from penalties_jax.functional.checks import FINITE, check_fits, public
from penalties_jax.functional.divergences.formulas import (
    ALPHA,
    CROSS_ENTROPY,
    ENTROPY,
    JS,
    KL,
    Direction,
    kl_formula,
    with_floor,
)
from penalties_jax.functional.divergences.heads import (
    Head,
    Part,
    capped_by,
    divergence_of_heads,
    sum_of_parts,
)
from penalties_jax.functional.divergences.rows import Options
from penalties_jax.functional.divergences.softcap import Softcap
from penalties_jax.functional.reduction import AxisName, Reduction

__all__ = [
    "DistillationLoss",
    "LogProbAndEntropy",
    "linear_alpha",
    "linear_cross_entropy",
    "linear_distillation",
    "linear_entropy",
    "linear_js",
    "linear_kl",
    "linear_log_prob",
    "linear_log_prob_and_entropy",
]


class DistillationLoss(NamedTuple):
    r"""What `linear_distillation` returns: only the total has a gradient.

    Each is of shape [], or has that of the positions with reduction="none".

    Attributes:
        total: $w_{\mathrm{ce}}\,\mathrm{CE} + w_{\mathrm{kl}}\,\mathrm{KL}$.
        cross_entropy: The CE with its z-loss, unweighted, for the log.
        kl: The KL, likewise.

    Examples:
        >>> hidden, kernel = jnp.ones((1, 1)), jnp.zeros((1, 2))
        >>> loss = pj.linear_distillation(hidden, kernel, hidden, kernel, jnp.array([0]))
        >>> float(loss.kl), round(float(loss.cross_entropy), 4)
        (0.0, 0.6931)
    """

    total: Float[Array, "..."]
    cross_entropy: Float[Array, "..."]
    kl: Float[Array, "..."]


class LogProbAndEntropy(NamedTuple):
    """What `linear_log_prob_and_entropy` returns: each has the shape of the positions.

    Attributes:
        log_prob: That of the tokens.
        entropy: Of the distributions they were drawn from.

    Examples:
        >>> hidden, kernel = jnp.ones((1, 1)), jnp.zeros((1, 2))
        >>> both = pj.linear_log_prob_and_entropy(hidden, kernel, jnp.array([0]))
        >>> round(float(both.log_prob[0]), 4), round(float(both.entropy[0]), 4)
        (-0.6931, 0.6931)
    """

    log_prob: Float[Array, "*positions"]
    entropy: Float[Array, "*positions"]


@public
def linear_kl(
    hidden_p: Real[ArrayLike, "*positions D"],
    kernel_p: Real[ArrayLike, "D C"],
    hidden_q: Real[ArrayLike, "*positions E"],
    kernel_q: Real[ArrayLike, "E C"],
    *,
    bias_p: Real[ArrayLike, " C"] | None = None,
    bias_q: Real[ArrayLike, " C"] | None = None,
    direction: Direction = "forward",
    skew: ArrayLike | None = None,
    floor: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
    softcap: Softcap = None,
    block_size: int | None = None,
    weights: ArrayLike = 1.0,
    reduction: Reduction = "mean",
    where: Bool[ArrayLike, "..."] | None = None,
    axis_name: AxisName | None = None,
    class_axis_name: AxisName | None = None,
) -> Float[Array, "..."]:
    r"""The Kullback-Leibler divergence from hidden states, in nats, without all the logits.

    `pj.kl_from_logits` of $h_p W_p + b_p$ and $h_q W_q + b_q$, whose logits exist a block of rows
    at a time. In value and gradient together each product is computed once; beside the gradients
    themselves, of which the kernel's is accumulated in float32, a few blocks are in memory.

    Half-precision factors are multiplied as they are, and accumulated in float32, where gradients
    stay until their cotangent, a loss scale or a small weight, has come; on accelerators the logits
    of such factors are rounded to their dtype, as those of a model are. Differentiable, and
    exported, as `pj.kl_from_logits`. In a loop over microbatches take gradients inside of the loop:
    differentiating through it stores a kernel's gradient for each step. Means of microbatches that
    are masked unevenly don't average to the mean: use reduction="sum" there, and divide by the
    number of included positions of the whole batch. Under `jit` on sharded rows the kernel's
    gradient is summed over devices once a block; in `shard_map` once in all.

    Args:
        hidden_p: The last hidden states. By convention the model's.
        kernel_p: The output kernel, classes last.
        hidden_q: Those of the reference, at the same positions.
        kernel_q: Its kernel, for the same classes.
        bias_p: Added to the model's logits.
        bias_q: Added to the reference's.
        direction, weights, where, axis_name: As in `pj.kl_divergence`; so are result and errors.
        skew, floor: As in `pj.kl_from_logits`: no product is computed again for them.
        temperature: The $T$ by which logits are divided, after they are capped; above 0: for all,
            or one for each position.
        softcap: The $c$ of heads whose logits are $c \tanh(z / c)$, as Gemma's are; above 0: for
            all heads, or a pair, of P's and Q's. None and infinity are no cap. A class that is
            excluded by a bias of -inf stays excluded.
        block_size: Rows that are processed at once, for each device of the mesh that arrays lie on;
            if None, 64 MiB of each head's float32 logits on a CPU and 1 GiB elsewhere, but at least
            240 rows.
        reduction: "mean" or "sum" over the positions, or "none", which computes the products again
            in the backward pass.
        class_axis_name: Axes of `jax.shard_map` over which the classes, of kernels and biases, are
            sharded.

    References:
        Hsu et al. (2024), Liger Kernel: efficient Triton kernels for LLM training.

    Examples:
        >>> kernel = jnp.array([[0.0, 1.0]])
        >>> round(float(pj.linear_kl(jnp.ones((3, 1)), kernel, jnp.zeros((3, 1)), kernel)), 4)
        0.1109
    """
    heads = capped_by(softcap, Head(hidden_p, kernel_p, bias_p), Head(hidden_q, kernel_q, bias_q))
    options = Options(block_size, reduction, where, axis_name, class_axis_name, weights)
    formula, numbers = kl_formula(direction, skew, floor)
    return divergence_of_heads(formula, heads, options, temperature=temperature, **numbers)


@public
def linear_js(
    hidden_p: Real[ArrayLike, "*positions D"],
    kernel_p: Real[ArrayLike, "D C"],
    hidden_q: Real[ArrayLike, "*positions E"],
    kernel_q: Real[ArrayLike, "E C"],
    *,
    bias_p: Real[ArrayLike, " C"] | None = None,
    bias_q: Real[ArrayLike, " C"] | None = None,
    mixture: ArrayLike = 0.5,
    floor: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
    softcap: Softcap = None,
    block_size: int | None = None,
    weights: ArrayLike = 1.0,
    reduction: Reduction = "mean",
    where: Bool[ArrayLike, "..."] | None = None,
    axis_name: AxisName | None = None,
    class_axis_name: AxisName | None = None,
) -> Float[Array, "..."]:
    r"""The generalised Jensen-Shannon divergence from hidden states, in nats.

    `pj.js_from_logits` of $h_p W_p + b_p$ and $h_q W_q + b_q$; streamed, and differentiable, as
    `pj.linear_kl`.

    Args:
        hidden_p, kernel_p, hidden_q, kernel_q, bias_p, bias_q: As in `pj.linear_kl`.
        mixture: The $b$ of $M = b P + (1 - b) Q$, in [0, 1].
        floor: As in `pj.kl_from_logits`.
        temperature, softcap, block_size, reduction, class_axis_name: As in `pj.linear_kl`.
        weights, where, axis_name: As in `pj.kl_divergence`; so are result and errors.

    Examples:
        >>> kernel = jnp.array([[0.0, 200.0]])
        >>> round(float(pj.linear_js(jnp.ones((3, 1)), kernel, -jnp.ones((3, 1)), kernel)), 4)
        0.6931
    """
    heads = capped_by(softcap, Head(hidden_p, kernel_p, bias_p), Head(hidden_q, kernel_q, bias_q))
    options = Options(block_size, reduction, where, axis_name, class_axis_name, weights)
    formula, numbers = with_floor(JS, floor, mixture=mixture)
    return divergence_of_heads(formula, heads, options, temperature=temperature, **numbers)


@public
def linear_alpha(
    hidden_p: Real[ArrayLike, "*positions D"],
    kernel_p: Real[ArrayLike, "D C"],
    hidden_q: Real[ArrayLike, "*positions E"],
    kernel_q: Real[ArrayLike, "E C"],
    alpha: ArrayLike,
    *,
    bias_p: Real[ArrayLike, " C"] | None = None,
    bias_q: Real[ArrayLike, " C"] | None = None,
    temperature: ArrayLike = 1.0,
    softcap: Softcap = None,
    block_size: int | None = None,
    weights: ArrayLike = 1.0,
    reduction: Reduction = "mean",
    where: Bool[ArrayLike, "..."] | None = None,
    axis_name: AxisName | None = None,
    class_axis_name: AxisName | None = None,
) -> Float[Array, "..."]:
    r"""The alpha divergence of $h_p W_p + b_p$ and $h_q W_q + b_q$, streamed as `pj.linear_kl`.

    Args:
        hidden_p, kernel_p, hidden_q, kernel_q, bias_p, bias_q: As in `pj.linear_kl`.
        temperature, softcap, block_size, reduction, class_axis_name: As in `pj.linear_kl`.
        alpha, weights, where, axis_name: As in `pj.alpha_divergence`; so are result and errors.

    Examples:
        >>> float(pj.linear_alpha(jnp.ones((3, 1)), jnp.eye(1), jnp.ones((3, 1)), jnp.eye(1), 1.0))
        0.0
    """
    heads = capped_by(softcap, Head(hidden_p, kernel_p, bias_p), Head(hidden_q, kernel_q, bias_q))
    options = Options(block_size, reduction, where, axis_name, class_axis_name, weights)
    return divergence_of_heads(ALPHA, heads, options, temperature=temperature, alpha=alpha)


@public
def linear_cross_entropy(
    hidden: Real[ArrayLike, "*positions D"],
    kernel: Real[ArrayLike, "D C"],
    labels: Int[ArrayLike, "*positions"],
    *,
    bias: Real[ArrayLike, " C"] | None = None,
    z_loss: ArrayLike = 0.0,
    temperature: ArrayLike = 1.0,
    softcap: Softcap = None,
    block_size: int | None = None,
    weights: ArrayLike = 1.0,
    reduction: Reduction = "mean",
    where: Bool[ArrayLike, "..."] | None = None,
    axis_name: AxisName | None = None,
    class_axis_name: AxisName | None = None,
) -> Float[Array, "..."]:
    r"""The cross entropy of labels from hidden states, in nats, without all the logits.

    $-\log\mathrm{softmax}(z)_y + w \log^2 \sum_c e^{z_c}$ of $z = (h W + b) / T$, with the
    $w$ of `z_loss`; streamed, and differentiable, as `pj.linear_kl`. The derivative is
    softmax - onehot(y) through z, and $2 w \log(\sum_c e^{z_c})$ softmax.

    Args:
        hidden: The last hidden states.
        kernel: The output kernel, classes last.
        labels: The classes y, counted over all members of `class_axis_name`. One outside of [0, C)
            has cross entropy 0, but a z-loss, and counts in a mean: exclude padding by
            `where=labels >= 0`.
        bias: Added to the logits.
        z_loss: The weight $w$ of `pj.z_loss`, at least 0: for all, or one for each position.
        temperature, softcap, block_size, reduction, class_axis_name: As in `pj.linear_kl`.
        weights, where, axis_name: As in `pj.kl_divergence`.

    Returns:
        A scalar, or an array of the shape of the positions for "none".

    Raises:
        ValueError: As `pj.kl_divergence`.
        TypeError: As `pj.kl_divergence`, or if labels are not integers.

    References:
        Wijmans et al. (2024), Cut your losses in large-vocabulary language models. Chowdhery et
        al. (2022), PaLM: scaling language modeling with Pathways, whose `z_loss` is 1e-4.

    Examples:
        >>> kernel = jnp.array([[0.0, 1.0]])
        >>> round(float(pj.linear_cross_entropy(jnp.ones((1, 1)), kernel, jnp.array([1]))), 4)
        0.3133
    """
    options = Options(block_size, reduction, where, axis_name, class_axis_name, weights)
    heads = capped_by(softcap, Head(hidden, kernel, bias))
    parts = [Part(CROSS_ENTROPY, 1.0, {"temperature": temperature, "z_loss": z_loss})]
    return sum_of_parts(parts, heads, options, labels=labels)[0]


@public
def linear_distillation(
    hidden_p: Real[ArrayLike, "*positions D"],
    kernel_p: Real[ArrayLike, "D C"],
    hidden_q: Real[ArrayLike, "*positions E"],
    kernel_q: Real[ArrayLike, "E C"],
    labels: Int[ArrayLike, "*positions"],
    *,
    kl_weight: ArrayLike = 1.0,
    cross_entropy_weight: ArrayLike = 1.0,
    z_loss: ArrayLike = 0.0,
    bias_p: Real[ArrayLike, " C"] | None = None,
    bias_q: Real[ArrayLike, " C"] | None = None,
    direction: Direction = "forward",
    temperature: ArrayLike = 1.0,
    softcap: Softcap = None,
    block_size: int | None = None,
    reduction: Reduction = "mean",
    where: Bool[ArrayLike, "..."] | None = None,
    axis_name: AxisName | None = None,
    class_axis_name: AxisName | None = None,
) -> DistillationLoss:
    r"""Cross entropy and divergence from a reference, in one pass over the model's logits.

    $w_{\mathrm{ce}}\,\mathrm{CE}(P, y) + w_{\mathrm{kl}}\,\mathrm{KL}(P \| Q)$, the sum of
    `pj.linear_cross_entropy`, its z-loss included, and `pj.linear_kl` by their weights: the model's
    products are computed once for both. Only the total has a gradient: that of its parts, which are
    for the log, is 0.

    The temperature is that of the divergence alone, not of the cross entropy; multiply `kl_weight`
    by $T^2$ for gradients that don't depend on it. Hinton's distillation is KL(Q||P),
    direction="reverse".

    Args:
        hidden_p, kernel_p, hidden_q, kernel_q, bias_p, bias_q: As in `pj.linear_kl`.
        labels: The classes y, as for `pj.linear_cross_entropy`.
        kl_weight: The weight of the divergence; for reduction="none" also one for each position.
        cross_entropy_weight: The weight of the cross entropy, likewise.
        z_loss: As in `pj.linear_cross_entropy`: part of the cross entropy.
        temperature: The $T$ of the divergence, above 0.
        direction, where, axis_name: As in `pj.kl_divergence`.
        softcap, block_size, reduction, class_axis_name: As in `pj.linear_kl`.

    Returns:
        A `DistillationLoss(total, cross_entropy, kl)`. Only the total has a gradient.

    Raises:
        ValueError, TypeError: As `pj.linear_cross_entropy`.

    References:
        Hinton, Vinyals & Dean (2015), Distilling the knowledge in a neural network.

    Examples:
        >>> hidden, kernel = jnp.ones((1, 1)), jnp.array([[0.0, 1.0]])
        >>> loss = pj.linear_distillation(hidden, kernel, 0 * hidden, kernel, jnp.array([1]))
        >>> round(float(loss.total), 4)
        0.4242
    """
    weights = {"kl_weight": kl_weight, "cross_entropy_weight": cross_entropy_weight}
    FINITE.check(**weights)
    check_fits(jnp.shape(labels) if reduction == "none" else (), **weights)
    heads = capped_by(softcap, Head(hidden_p, kernel_p, bias_p), Head(hidden_q, kernel_q, bias_q))
    options = Options(block_size, reduction, where, axis_name, class_axis_name)
    parts = (
        Part(CROSS_ENTROPY, cross_entropy_weight, {"temperature": 1.0, "z_loss": z_loss}),
        Part(KL[direction], kl_weight, {"temperature": temperature}),
    )
    total, (cross_entropy, kl) = sum_of_parts(parts, heads, options, labels=labels)
    return DistillationLoss(total, lax.stop_gradient(cross_entropy), lax.stop_gradient(kl))


@public
def linear_log_prob(
    hidden: Real[ArrayLike, "*positions D"],
    kernel: Real[ArrayLike, "D C"],
    tokens: Int[ArrayLike, "*positions"],
    *,
    bias: Real[ArrayLike, " C"] | None = None,
    temperature: ArrayLike = 1.0,
    softcap: Softcap = None,
    block_size: int | None = None,
    where: Bool[ArrayLike, "..."] | None = None,
    class_axis_name: AxisName | None = None,
) -> Float[Array, "*positions"]:
    r"""The log-probability of each token from hidden states, in nats, without all the logits.

    $\log\mathrm{softmax}((h W + b) / T)_y$; streamed, and differentiable, as `pj.linear_kl` with
    reduction="none".

    Args:
        hidden: The last hidden states.
        kernel: The output kernel, classes last.
        tokens: The classes y, counted over all members of `class_axis_name`. One outside of [0, C)
            has log-probability 0.
        bias: Added to the logits.
        temperature, softcap, block_size, class_axis_name: As in `pj.linear_kl`.
        where: As in `pj.kl_divergence`; an excluded position has 0.

    Returns:
        An array of the shape of the positions.

    Raises:
        ValueError, TypeError: As `pj.linear_cross_entropy`.

    Examples:
        >>> kernel = jnp.array([[0.0, 1.0]])
        >>> round(float(pj.linear_log_prob(jnp.ones((1, 1)), kernel, jnp.array([1]))[0]), 4)
        -0.3133
    """
    heads = capped_by(softcap, Head(hidden, kernel, bias))
    options = Options(block_size, "none", where, None, class_axis_name)
    return sum_of_parts([_log_prob(temperature)], heads, options, tokens=tokens)[0]


@public
def linear_entropy(
    hidden: Real[ArrayLike, "*positions D"],
    kernel: Real[ArrayLike, "D C"],
    *,
    bias: Real[ArrayLike, " C"] | None = None,
    temperature: ArrayLike = 1.0,
    softcap: Softcap = None,
    block_size: int | None = None,
    weights: ArrayLike = 1.0,
    reduction: Reduction = "mean",
    where: Bool[ArrayLike, "..."] | None = None,
    axis_name: AxisName | None = None,
    class_axis_name: AxisName | None = None,
) -> Float[Array, "..."]:
    r"""The Shannon entropy of $\mathrm{softmax}((h W + b) / T)$, streamed as `pj.linear_kl`.

    Args:
        hidden: The last hidden states.
        kernel: The output kernel, classes last.
        bias: Added to the logits.
        temperature, softcap, block_size, reduction, class_axis_name: As in `pj.linear_kl`.
        weights, where, axis_name: As in `pj.kl_divergence`; so are result and errors.

    Examples:
        >>> round(float(pj.linear_entropy(jnp.ones((3, 1)), jnp.zeros((1, 2)))), 4)
        0.6931
    """
    heads = capped_by(softcap, Head(hidden, kernel, bias))
    options = Options(block_size, reduction, where, axis_name, class_axis_name, weights)
    return divergence_of_heads(ENTROPY, heads, options, temperature=temperature)


@public
def linear_log_prob_and_entropy(
    hidden: Real[ArrayLike, "*positions D"],
    kernel: Real[ArrayLike, "D C"],
    tokens: Int[ArrayLike, "*positions"],
    *,
    bias: Real[ArrayLike, " C"] | None = None,
    temperature: ArrayLike = 1.0,
    softcap: Softcap = None,
    block_size: int | None = None,
    where: Bool[ArrayLike, "..."] | None = None,
    class_axis_name: AxisName | None = None,
) -> LogProbAndEntropy:
    r"""`pj.linear_log_prob` and, by position, `pj.linear_entropy`, of products computed once.

    $\log p_y$ and $-\sum_c p_c \log p_c$ of $p = \mathrm{softmax}((h W + b) / T)$: what a policy
    gradient with an entropy bonus takes at each position. Both have a gradient.

    Args:
        hidden, kernel, tokens, bias, where: As in `pj.linear_log_prob`.
        temperature, softcap, block_size, class_axis_name: As in `pj.linear_kl`.

    Returns:
        A `LogProbAndEntropy(log_prob, entropy)` of arrays of the shape of the positions.

    Raises:
        ValueError, TypeError: As `pj.linear_cross_entropy`.

    Examples:
        >>> kernel = jnp.array([[0.0, 1.0]])
        >>> both = pj.linear_log_prob_and_entropy(jnp.ones((1, 1)), kernel, jnp.array([1]))
        >>> round(float(both.entropy[0]), 4)
        0.5822
    """
    heads = capped_by(softcap, Head(hidden, kernel, bias))
    options = Options(block_size, "none", where, None, class_axis_name)
    parts = _log_prob(temperature), Part(ENTROPY, 1.0, {"temperature": temperature})
    _, (surprise, entropy) = sum_of_parts(parts, heads, options, tokens=tokens)
    return LogProbAndEntropy(-surprise, entropy)


def _log_prob(temperature):
    return Part(CROSS_ENTROPY, -1.0, {"temperature": temperature, "z_loss": 0.0})
