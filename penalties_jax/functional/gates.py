"""Gates in [0, 1] that are learned: stochastic relaxations and straight-through estimators."""

import operator
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Real
from numpy.lib.array_utils import normalize_axis_index

from penalties_jax.functional.checks import (
    ABOVE_ONE,
    ANY,
    BELOW_ZERO,
    POSITIVE,
    check_fits,
    check_same_shape,
    public,
)
from penalties_jax.functional.derivatives import elementwise_derivatives, over, with_value
from penalties_jax.functional.reduction import lie_alike, promote

__all__ = [
    "hard_concrete_gate",
    "hard_concrete_l0",
    "jump_relu",
    "logistic_gate",
    "step_gate",
    "straight_through",
    "top_k_gate",
]


@public
def straight_through(
    hard: Real[ArrayLike, "..."], soft: Real[ArrayLike, "..."]
) -> Float[Array, "..."]:
    r"""The value of `hard` with the derivative of `soft`.

    The value is `hard` to the last bit, which $h + s - \operatorname{stopgrad}(s)$ is not.

    Args:
        hard: What is used, of shape [...].
        soft: What is differentiated, of the same shape.

    Returns:
        An array of the shape of `hard`.

    Raises:
        ValueError: If the shapes differ.

    References:
        Bengio, Léonard & Courville (2013), Estimating or propagating gradients through stochastic
        neurons for conditional computation.

    Examples:
        >>> f = lambda x: pj.straight_through(jax.numpy.round(x), x**2)
        >>> float(f(0.75)), float(jax.grad(f)(0.75))
        (1.0, 1.5)
    """
    check_same_shape(hard=hard, soft=soft)
    return _meeting(with_value, soft, hard)


@public
def logistic_gate(
    logits: Real[ArrayLike, "..."],
    key: Array | None,
    *,
    temperature: ArrayLike = 1.0,
    hard: bool = True,
) -> Float[Array, "..."]:
    r"""The logistic (binary concrete) gate: $\sigma((a + L) / T)$, L logistic noise.

    A hard gate is 1 where $a + L > 0$, else 0. It is open with probability $\sigma(a)$ at every
    temperature (without noise where that is above 1/2), and has the derivative of the soft gate
    (`pj.straight_through`).

    Args:
        logits: The $a$, of shape [...], of any real dtype.
        key: A JAX random key; the same key gives the same gates. None to evaluate without noise.
        temperature: The $T$, above 0: a number, or an array that broadcasts to `logits`. A low
            one makes soft gates nearly hard, and gradients large and rare.
        hard: Whether the gate is 0 or 1, or in between.

    Returns:
        Gates in [0, 1], of the shape of `logits`, float32 or wider.

    Raises:
        ValueError: If a number is out of its range, or an array does not broadcast.
        TypeError: If a number is a schedule.

    References:
        Maddison, Mnih & Teh (2017), The concrete distribution. Jang, Gu & Poole (2017),
        Categorical reparameterization with Gumbel-softmax.

    Examples:
        >>> pj.logistic_gate(jnp.array([-2.0, 0.5, 3.0]), None).tolist()
        [0.0, 1.0, 1.0]
    """
    _check_scale(logits, temperature=temperature)
    return _logistic_gate(logits, key, temperature, hard=hard)


@public
def hard_concrete_gate(
    logits: Real[ArrayLike, "..."],
    key: Array | None,
    *,
    temperature: ArrayLike = 2 / 3,
    stretch: tuple[ArrayLike, ArrayLike] = (-0.1, 1.1),
) -> Float[Array, "..."]:
    r"""The hard concrete gate: $\operatorname{clip}(\gamma + (\zeta - \gamma) s, 0, 1)$.

    Here $s = \sigma((a + L) / T)$ with logistic noise L, stretched to the interval
    $(\gamma, \zeta)$ beyond [0, 1], so that a gate is exactly 0, or exactly 1, with positive
    probability, and still has a derivative in between. Without noise $s = \sigma(a)$.

    Args:
        logits, key: As in `pj.logistic_gate`; so are result and errors. The paper's $\log \alpha$.
        temperature: The $T$ (the paper's $\beta$), above 0.
        stretch: The $\gamma < 0$ and $\zeta > 1$.

    References:
        Louizos, Welling & Kingma (2018), Learning sparse neural networks through L0
        regularization.

    Examples:
        >>> pj.hard_concrete_gate(jnp.array([-4.0, 0.0, 4.0]), None).tolist()
        [0.0, 0.5, 1.0]
    """
    _check_scale(logits, temperature=temperature)
    _check_stretch(stretch)
    return _hard_concrete_gate(logits, key, temperature, stretch)


@public
def hard_concrete_l0(
    logits: Real[ArrayLike, "..."],
    *,
    temperature: ArrayLike = 2 / 3,
    stretch: tuple[ArrayLike, ArrayLike] = (-0.1, 1.1),
) -> Float[Array, "..."]:
    r"""The probability that a hard concrete gate is not 0: $\sigma(a - T \ln(-\gamma / \zeta))$.

    Summed, it is the expected L0 norm of the gates, which can be differentiated (equation 12 of
    the paper).

    Args:
        logits, temperature, stretch: As in `pj.hard_concrete_gate`; so are result and errors.

    Examples:
        >>> round(float(pj.hard_concrete_l0(jnp.array(0.0))), 4)
        0.8318
    """
    _check_scale(logits, temperature=temperature)
    _check_stretch(stretch)
    return _hard_concrete_l0(logits, temperature, stretch)


@public
def step_gate(
    x: Real[ArrayLike, "..."], threshold: ArrayLike, *, bandwidth: ArrayLike = 1e-3
) -> Float[Array, "..."]:
    r"""The step $H(x - \theta)$: 1 where $x > \theta$, else 0.

    The derivative with respect to $\theta$ is a kernel estimate, $-\frac{1}{\epsilon}
    K((x - \theta) / \epsilon)$ with the rectangle $K(u) = 1$ where $|u| < 1/2$; that with respect
    to x is 0. Its sum is an L0 norm whose expected gradient with respect to $\theta$ is that of
    a kernel density estimate. There is no noise, in training or in evaluation.

    Args:
        x: Values of shape [...], of any real dtype.
        threshold: The $\theta$: a number, or an array that broadcasts to `x`, such as one for each
            feature.
        bandwidth: The $\epsilon$, above 0, in the units of `x`; it may be annealed.

    Returns:
        0 or 1, of the shape of `x`, float32 or wider.

    Raises:
        ValueError, TypeError: As `pj.logistic_gate`.

    References:
        Rajamanoharan et al. (2024), Jumping ahead: improving reconstruction fidelity with JumpReLU
        sparse autoencoders.

    Examples:
        >>> x = jnp.array([0.2, 0.9, 1.1])
        >>> pj.step_gate(x, 1.0).tolist()
        [0.0, 0.0, 1.0]
        >>> float(jax.grad(lambda threshold: pj.step_gate(x, threshold, bandwidth=0.5).sum())(1.0))
        -4.0
    """
    return _at_threshold(_step, x, threshold, bandwidth)


@public
def jump_relu(
    x: Real[ArrayLike, "..."], threshold: ArrayLike, *, bandwidth: ArrayLike = 1e-3
) -> Float[Array, "..."]:
    r"""JumpReLU: $x H(x - \theta)$, x where it is above the threshold and 0 elsewhere.

    The derivative with respect to x is $H(x - \theta)$; that with respect to $\theta$ is the
    kernel estimate $-\frac{\theta}{\epsilon} K((x - \theta) / \epsilon)$.

    Args:
        x, threshold, bandwidth: As in `pj.step_gate`; so are errors.

    Returns:
        An array of the shape of `x`, float32 or wider.

    Examples:
        >>> pj.jump_relu(jnp.array([0.5, 2.0]), 1.0).tolist()
        [0.0, 2.0]
    """
    return _at_threshold(_jump_relu, x, threshold, bandwidth)


@public
def top_k_gate(
    logits: Real[ArrayLike, "..."],
    k: int,
    key: Array | None,
    *,
    temperature: ArrayLike = 1.0,
    axis: int = -1,
    hard: bool = True,
) -> Float[Array, "..."]:
    r"""Opens the k gates with the largest logits along an axis.

    With a key, Gumbel noise is added first: the gates are then k draws without replacement with
    probabilities $\operatorname{softmax}(a)$. Exactly k are 1; of equal ones the first are taken.
    The derivative is that of $k \operatorname{softmax}((a + G) / T)$, which also sums to k.

    Args:
        logits, key: As in `pj.logistic_gate`; so are result and errors.
        k: How many to open, an integer from 1 to the size of the axis.
        temperature: The $T$ of the derivative, above 0.
        axis: What the k gates are chosen along.
        hard: Whether k gates are 1 and the others 0; if not, they are $k \operatorname{softmax}((a
            + G) / T)$ themselves, of which one may be above 1.

    References:
        Kool, van Hoof & Welling (2019), Stochastic beams and where to find them: the
        Gumbel-top-k trick.

    Examples:
        >>> pj.top_k_gate(jnp.array([0.1, 2.0, -1.0, 0.5]), 2, None).tolist()
        [0.0, 1.0, 0.0, 1.0]
    """
    _check_scale(logits, temperature=temperature)
    axis = normalize_axis_index(axis, jnp.ndim(logits))
    size = jnp.shape(logits)[axis]
    k = operator.index(k)
    if not 1 <= k <= size:
        raise ValueError(f"k must be from 1 to the size of the axis, {size}, got {k}")
    return _top_k_gate(logits, key, temperature, k=k, axis=axis, hard=hard)


def _check_scale(like, **scale):
    check_fits(jnp.shape(like), **scale)
    POSITIVE.check(**scale)


def _check_stretch(stretch):
    low, high = stretch
    BELOW_ZERO.check(**{"stretch[0]": low})
    ABOVE_ONE.check(**{"stretch[1]": high})


def _noisy(logits, key, draw=jax.random.logistic):
    (logits,) = promote(logits)
    if key is not None:
        logits = logits + draw(key, logits.shape, logits.dtype)
    # Of two gates that are never open neither is further from it.
    largest = float(jnp.finfo(logits.dtype).max) ** 0.5
    return jnp.clip(logits, -largest, largest)


@partial(jax.jit, static_argnames="hard")
def _logistic_gate(logits, key, temperature, *, hard):
    (logits, temperature), *_ = lie_alike(promote(logits, temperature))
    noisy = _noisy(logits, key)
    soft = lax.logistic(over(noisy, temperature))
    return with_value(soft, (noisy > 0).astype(soft.dtype)) if hard else soft


@jax.jit
def _hard_concrete_gate(logits, key, temperature, stretch):
    low, high = stretch
    # Without noise the temperature has no part in it: the gate's median would be at sigma(a / T).
    scaled = promote(logits)[0] if key is None else over(_noisy(logits, key), temperature)
    return jnp.clip(low + (high - low) * lax.logistic(scaled), 0, 1)


@jax.jit
def _hard_concrete_l0(logits, temperature, stretch):
    low, high = stretch
    return lax.logistic(promote(logits)[0] - temperature * jnp.log(-low / high))


def _at_threshold(function, x, threshold, bandwidth):
    ANY.check(threshold=threshold)
    check_fits(jnp.shape(x), threshold=threshold)
    _check_scale(x, bandwidth=bandwidth)
    return _meeting(function, x, threshold, bandwidth)


@partial(jax.jit, static_argnums=0)
def _meeting(function, *arrays):
    return function(*lie_alike(promote(*arrays))[0])


def _rectangle(x, threshold, bandwidth):
    return (jnp.abs(x - threshold) < bandwidth / 2).astype(x.dtype) / bandwidth


def _zero(x, threshold, bandwidth):
    return jnp.zeros_like(x)


@elementwise_derivatives(
    _zero,
    lambda x, threshold, bandwidth: -_rectangle(x, threshold, bandwidth),
    _zero,
)
def _step(x, threshold, bandwidth):
    return (x > threshold).astype(x.dtype)


@elementwise_derivatives(
    lambda x, threshold, bandwidth: _step(x, threshold, bandwidth),
    lambda x, threshold, bandwidth: -threshold * _rectangle(x, threshold, bandwidth),
    _zero,
)
def _jump_relu(x, threshold, bandwidth):
    return jnp.where(x > threshold, x, 0)


@partial(jax.jit, static_argnames=("k", "axis", "hard"))
def _top_k_gate(logits, key, temperature, *, k, axis, hard):
    (logits, temperature), *_ = lie_alike(promote(logits, temperature))
    noisy = _noisy(logits, key, jax.random.gumbel)
    # Before the temperature divides them, which has no part in what equal logits are.
    below = noisy - lax.stop_gradient(jnp.max(noisy, axis, keepdims=True))
    soft = k * jax.nn.softmax(over(below, temperature), axis)
    if not hard:
        return soft
    rows = jnp.moveaxis(noisy, axis, -1)
    _, chosen = lax.top_k(lax.stop_gradient(rows), k)
    # Row by row, since a scatter does not say how its result lies on a mesh.
    opened = jnp.vectorize(
        lambda chosen: jnp.zeros(rows.shape[-1], rows.dtype).at[chosen].set(1),
        signature="(k)->(n)",
    )(chosen)
    return with_value(soft, jnp.moveaxis(opened, -1, axis))
