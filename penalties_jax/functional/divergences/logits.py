"""Divergences from logits, which are read as often as they have to be, and never copied."""

import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, Real

from penalties_jax.functional.checks import check_classes, public
from penalties_jax.functional.divergences.formulas import (
    ALPHA,
    CROSS_ENTROPY,
    ENTROPY,
    JS,
    Z_LOSS,
    Direction,
    kl_formula,
    with_floor,
)
from penalties_jax.functional.divergences.logprobs import entropy_scale
from penalties_jax.functional.divergences.rows import Options, divergence_of_logits
from penalties_jax.functional.reduction import AxisName, Reduction

__all__ = [
    "alpha_from_logits",
    "cross_entropy_from_logits",
    "entropy_from_logits",
    "js_from_logits",
    "kl_from_logits",
    "z_loss",
]


@public
def kl_from_logits(
    logits_p: Real[ArrayLike, "*positions C"],
    logits_q: Real[ArrayLike, "*positions C"],
    *,
    direction: Direction = "forward",
    skew: ArrayLike | None = None,
    floor: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
    block_size: int | None = None,
    weights: ArrayLike = 1.0,
    reduction: Reduction = "mean",
    where: Bool[ArrayLike, "..."] | None = None,
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

    With a `skew`, and by a `floor` under log q at the temperature, Q is as in `pj.kl_divergence`.

    On accelerators one pass over the classes finds the normalisers and the mean log-ratio, and a
    second one the value and the gradient: with the gradient written, 5 arrays of the size of the
    logits are moved; 7 with a skew, and with a floor 9 on a GPU and 11 on a TPU. There a value of
    1e-2 and more has the rounding of those normalisers, as the textbook's. On a CPU rows go by in
    blocks that stay in cache.

    Differentiable in reverse mode, and after that any number of times in both modes, as by
    `jax.hessian`; a second reverse pass holds ten arrays of the size of the logits. Works on arrays
    sharded over positions or classes, of which nothing is gathered. In `jax.export` a symbolic axis
    of positions is not cut into blocks. On a CPU, gradients for both logits together may hold an
    array or two of their size, and a few rows that fit the last cache take less time as
    `pj.kl_divergence` of their `jax.nn.log_softmax`.

    Args:
        logits_p: Unnormalised log-probabilities, classes last. By convention the model.
        logits_q: The same of the reference.
        direction, weights, reduction, where, axis_name: As in `pj.kl_divergence`; so are result and
            errors.
        skew, floor: As there, one for all positions or one for each.
        temperature: The $T$ by which both are divided, above 0: for all, or one for each position.
            Nothing makes up for it: for gradients that don't depend on it, multiply by $T^2$.
        block_size: Rows that are processed at once on a CPU, for each device of the mesh that
            arrays lie on; if None, 2 MiB of each array. Accelerators need no blocks.
        class_axis_name: Axes of `jax.shard_map` over which the classes are sharded.

    References:
        Hinton, Vinyals & Dean (2015), Distilling the knowledge in a neural network.

    Examples:
        >>> round(float(pj.kl_from_logits(jnp.array([[0.0, 1.0]]), jnp.array([[3.0, 3.0]]))), 4)
        0.1109
    """
    options = Options(block_size, reduction, where, axis_name, class_axis_name, weights)
    formula, numbers = kl_formula(direction, skew, floor)
    return divergence_of_logits(
        formula, (logits_p, logits_q), options, temperature=temperature, **numbers
    )


@public
def js_from_logits(
    logits_p: Real[ArrayLike, "*positions C"],
    logits_q: Real[ArrayLike, "*positions C"],
    *,
    mixture: ArrayLike = 0.5,
    floor: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
    block_size: int | None = None,
    weights: ArrayLike = 1.0,
    reduction: Reduction = "mean",
    where: Bool[ArrayLike, "..."] | None = None,
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
        floor: As in `pj.kl_from_logits`.
        temperature, block_size, class_axis_name: As in `pj.kl_from_logits`.
        weights, reduction, where, axis_name: As in `pj.kl_divergence`; so are result and errors.

    Examples:
        >>> far = jnp.array([[0.0, 200.0]])
        >>> round(float(pj.js_from_logits(far, -far)), 4)
        0.6931
    """
    options = Options(block_size, reduction, where, axis_name, class_axis_name, weights)
    formula, numbers = with_floor(JS, floor, mixture=mixture)
    return divergence_of_logits(
        formula, (logits_p, logits_q), options, temperature=temperature, **numbers
    )


@public
def alpha_from_logits(
    logits_p: Real[ArrayLike, "*positions C"],
    logits_q: Real[ArrayLike, "*positions C"],
    alpha: ArrayLike,
    *,
    temperature: ArrayLike = 1.0,
    block_size: int | None = None,
    weights: ArrayLike = 1.0,
    reduction: Reduction = "mean",
    where: Bool[ArrayLike, "..."] | None = None,
    axis_name: AxisName | None = None,
    class_axis_name: AxisName | None = None,
) -> Float[Array, "..."]:
    r"""The alpha divergence of $\mathrm{softmax}(\text{logits} / T)$, as `pj.alpha_divergence`.

    Args:
        logits_p, logits_q, temperature, block_size, class_axis_name: As in `pj.kl_from_logits`.
        alpha, weights, reduction, where, axis_name: As in `pj.alpha_divergence`; so are result and
            errors.

    Examples:
        >>> round(float(pj.alpha_from_logits(jnp.array([0.0, 1.0]), jnp.zeros(2), 1.0)), 4)
        0.1109
    """
    options = Options(block_size, reduction, where, axis_name, class_axis_name, weights)
    parameters = {"temperature": temperature, "alpha": alpha}
    return divergence_of_logits(ALPHA, (logits_p, logits_q), options, **parameters)


@public
def entropy_from_logits(
    logits: Real[ArrayLike, "*positions C"],
    *,
    temperature: ArrayLike = 1.0,
    normalize: bool = False,
    block_size: int | None = None,
    weights: ArrayLike = 1.0,
    reduction: Reduction = "mean",
    where: Bool[ArrayLike, "..."] | None = None,
    axis_name: AxisName | None = None,
    class_axis_name: AxisName | None = None,
) -> Float[Array, "..."]:
    r"""The Shannon entropy of softmax(logits / T), in nats, as `pj.entropy`.

    Streamed, and differentiable, as `pj.kl_from_logits`; the derivative is
    $-\pi (\log \pi + H) / T$.

    Args:
        logits: Unnormalised log-probabilities, classes last.
        temperature, block_size, class_axis_name: As in `pj.kl_from_logits`.
        normalize: As in `pj.entropy`.
        weights, reduction, where, axis_name: As in `pj.kl_divergence`; so are result and errors.

    Examples:
        >>> float(pj.entropy_from_logits(jnp.zeros((3, 4)), normalize=True))
        1.0
    """
    check_classes(logits=logits)
    classes = jnp.shape(logits)[-1] * (
        1 if class_axis_name is None else lax.axis_size(class_axis_name)
    )
    scale = entropy_scale(classes) if normalize else 1.0
    options = Options(block_size, reduction, where, axis_name, class_axis_name, weights)
    return divergence_of_logits(ENTROPY, (logits,), options, scale=scale, temperature=temperature)


@public
def cross_entropy_from_logits(
    logits: Real[ArrayLike, "*positions C"],
    labels: Int[ArrayLike, "*positions"],
    *,
    z_loss: ArrayLike = 0.0,
    temperature: ArrayLike = 1.0,
    block_size: int | None = None,
    weights: ArrayLike = 1.0,
    reduction: Reduction = "mean",
    where: Bool[ArrayLike, "..."] | None = None,
    axis_name: AxisName | None = None,
    class_axis_name: AxisName | None = None,
) -> Float[Array, "..."]:
    r"""The cross entropy of labels from raw logits, in nats, as `pj.linear_cross_entropy`.

    $-\log\mathrm{softmax}(z / T)_y + w \log^2 \sum_c e^{z_c / T}$ with the $w$ of `z_loss`;
    streamed, and differentiable, as `pj.kl_from_logits`.

    Args:
        logits: The z, classes last.
        labels, z_loss: As in `pj.linear_cross_entropy`; so are errors.
        temperature, block_size, class_axis_name: As in `pj.kl_from_logits`.
        weights, reduction, where, axis_name: As in `pj.kl_divergence`; so is the result.

    Examples:
        >>> logits, labels = jnp.array([[0.0, 1.0]]), jnp.array([1])
        >>> round(float(pj.cross_entropy_from_logits(logits, labels)), 4)
        0.3133
    """
    options = Options(block_size, reduction, where, axis_name, class_axis_name, weights)
    parameters = {"temperature": temperature, "z_loss": z_loss}
    return divergence_of_logits(CROSS_ENTROPY, (logits,), options, labels=labels, **parameters)


@public
def z_loss(
    logits: Real[ArrayLike, "*positions C"],
    *,
    block_size: int | None = None,
    weights: ArrayLike = 1.0,
    reduction: Reduction = "mean",
    where: Bool[ArrayLike, "..."] | None = None,
    axis_name: AxisName | None = None,
    class_axis_name: AxisName | None = None,
) -> Float[Array, "..."]:
    r"""The square of the log-normaliser, $\log^2 \sum_c e^{z_c}$, which keeps logits near 0.

    A softmax does not tell how far all logits of a position are from 0, and they drift away. With a
    small weight, 1e-4 in PaLM, this holds their normaliser near 1. Streamed, and differentiable, as
    `pj.kl_from_logits`; the derivative is $2 \log(\sum_c e^{z_c})$ softmax(z). With a cross
    entropy of hidden states it costs nothing as `z_loss=` of `pj.linear_cross_entropy`.

    Args:
        logits: The z, classes last.
        block_size, class_axis_name: As in `pj.kl_from_logits`.
        weights, reduction, where, axis_name: As in `pj.kl_divergence`; so are result and errors.

    References:
        de Brebisson & Vincent (2016), The Z-loss: a shift and scale invariant classification loss
        belonging to the spherical family. Chowdhery et al. (2022), PaLM: scaling language modeling
        with Pathways.

    Examples:
        >>> round(float(pj.z_loss(jnp.log(jnp.array([[1.0, 2.0]])))), 4)
        1.2069
    """
    options = Options(block_size, reduction, where, axis_name, class_axis_name, weights)
    return divergence_of_logits(Z_LOSS, (logits,), options, temperature=1.0)
