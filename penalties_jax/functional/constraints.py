"""Structural penalties: orthogonality, consistency, gradient penalties, output magnitude."""

import math
from collections.abc import Callable
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Real

from penalties_jax.functional.checks import (
    FINITE,
    check_fits,
    check_same_shape,
    check_where,
    public,
)
from penalties_jax.functional.derivatives import Axis, absolute, norm, norm_across, normalized
from penalties_jax.functional.divergences import kl_divergence
from penalties_jax.functional.reduction import (
    AxisName,
    Reduction,
    evaluate,
    lie_alike,
    promote,
    reduce,
)

__all__ = [
    "consistency",
    "gradient_penalty",
    "interpolated_gradient_penalty",
    "orthogonality",
    "output_magnitude",
]

Mode = Literal["soft", "hard", "spectral"]
Rows = Literal["rows", "sequence", "vocabulary"]
Metric = Literal["mse", "l1", "cosine", "kl"]


@public
def orthogonality(
    x: Real[ArrayLike, "..."],
    *,
    mode: Mode = "soft",
    normalize: bool = True,
    axis: Rows = "rows",
) -> Float[Array, ""]:
    r"""How far rows are from orthogonal, by their Gram matrix $G$ of n rows.

    - "soft" is $\sum_{i \ne j} G_{ij}^2$;
    - "hard" is $\lVert G - I \rVert_F^2$;
    - "spectral" is $(\operatorname{tr} G - n)^2$ plus soft.

    With normalised nonzero rows the three coincide; a zero row, which stays zero, adds 1 to "hard",
    and z zero rows add z^2 to "spectral".

    Args:
        x: Array of at least two axes, [n, d] or [batch, seq, vocab].
        mode: "soft", "hard" or "spectral".
        normalize: Divide each row by its 2-norm.
        axis: What a row is: "rows" are the vectors along the last axis, "sequence" has a row for
            each index of the second axis, "vocabulary" one for each index of the last axis.

    Returns:
        A scalar.

    Raises:
        ValueError: If `x` has fewer than two axes, or an option is unknown.

    References:
        Brock et al. (2017), Neural photo editing with introspective adversarial networks. Bansal,
        Chen & Wang (2018), Can we gain more from orthogonality regularizations in training deep
        CNNs?

    Examples:
        >>> float(pj.orthogonality(jnp.ones((2, 4))))
        2.0
    """
    if jnp.ndim(x) < 2:
        raise ValueError(f"x must have at least two axes, got shape {jnp.shape(x)}")
    return _orthogonality(x, mode=mode, normalize=normalize, axis=axis)


@partial(jax.jit, static_argnames=("mode", "normalize", "axis"))
def _orthogonality(x, *, mode, normalize, axis):
    (x,) = promote(x)
    slices = {"rows": slice(None, -1), "sequence": slice(1, 2), "vocabulary": slice(-1, None)}
    rows = tuple(range(x.ndim))[slices[axis]]
    features = tuple(a for a in range(x.ndim) if a not in rows)
    if normalize:
        x = normalized(x, features)
    # Every row meets every other, so on a mesh with explicit axes the result is replicated.
    sharding = jax.typeof(x).sharding
    gram = jnp.tensordot(
        x,
        x,
        (features, features),
        precision=lax.Precision.HIGHEST,
        out_sharding=NamedSharding(sharding.mesh, PartitionSpec()) if any(sharding.spec) else None,
    )
    size = tuple(x.shape[a] for a in rows)
    n = math.prod(size)
    identity = jnp.eye(n, dtype=bool).reshape(size + size)
    if mode == "hard":
        return jnp.sum(jnp.square(gram - identity))
    soft = jnp.sum(jnp.square(jnp.where(identity, 0, gram)))
    if mode == "soft":
        return soft
    return jnp.square(jnp.sum(jnp.square(x)) - n) + soft


@public
def consistency(
    a: Real[ArrayLike, "..."],
    b: Real[ArrayLike, "..."],
    *,
    metric: Metric = "mse",
    reduction: Reduction = "mean",
    where: Bool[ArrayLike, "..."] | None = None,
    axis_name: AxisName | None = None,
) -> Float[Array, "..."]:
    r"""How far two outputs for the same input differ.

    - "mse" is $(a - b)^2$ and "l1" $|a - b|$, an entry at a time;
    - "cosine" is $1 - a \cdot b / (\lVert a \rVert \lVert b \rVert)$ along the last axis, 1 with
      gradient 0 where a vector is zero;
    - "kl" is the mean of KL(a||b) and KL(b||a) of log-probabilities along the last axis.

    Args:
        a: Values of shape [..., C], of any real dtype.
        b: Values of the same shape.
        metric: "mse", "l1", "cosine" or "kl".
        reduction: "mean" or "sum" over entries ("mse", "l1") or positions ("cosine", "kl"), or
            "none", for an array of their shape.
        where: Mask of entries or positions, which broadcasts to their shape.
        axis_name: As in `pj.kl_divergence`; so are result and errors.

    References:
        Laine & Aila (2017), Temporal ensembling for semi-supervised learning.

    Examples:
        >>> a, b = jnp.array([[1.0, 0.0]]), jnp.array([[0.0, 1.0]])
        >>> float(pj.consistency(a, b)), float(pj.consistency(a, b, metric="cosine"))
        (1.0, 1.0)
    """
    check_same_shape(a=a, b=b)
    if metric == "kl":
        return kl_divergence(
            a, b, direction="symmetric", reduction=reduction, where=where, axis_name=axis_name
        )
    formula, axis = _DISTANCES[metric]
    return evaluate(formula, (a, b), {}, reduction, where, axis_name, axis=axis)


@public
def gradient_penalty(
    f: Callable[[Array], Array], x: Real[ArrayLike, "batch ..."], *, target_norm: ArrayLike = 1.0
) -> Float[Array, ""]:
    r"""The gradient penalty: the mean over examples of $(\lVert \nabla f(x_i) \rVert_2 - t)^2$.

    Not compiled by itself, since programs are cached by the identity of `f`: call it inside a
    jitted step. An example whose gradient is zero gives a finite gradient of the penalty.

    Args:
        f: Maps one example, of shape [...], to a scalar (or an array of one element); it is mapped
            over the batch. For a critic that takes a batch, pass `lambda x: critic(x[None])`.
        x: Examples of shape [batch, ...].
        target_norm: The $t$: 1 for a critic that should be 1-Lipschitz, 0 to flatten `f`.

    Returns:
        A scalar.

    Raises:
        ValueError: If `f` does not return one element for an example.

    References:
        Gulrajani et al. (2017), Improved training of Wasserstein GANs.

    Examples:
        >>> float(pj.gradient_penalty(lambda x: 3 * x.sum(), jnp.ones((2, 1))))
        4.0
    """
    FINITE.check(target_norm=target_norm)

    def score(example):
        value = f(example)
        if jnp.size(value) != 1:
            raise ValueError(
                f"f must map one example to one element, got shape {jnp.shape(value)} "
                f"for an example of shape {example.shape}"
            )
        return jnp.reshape(value, ())

    gradients = jax.vmap(jax.grad(score))(*promote(x))
    norms = norm(gradients, tuple(range(1, gradients.ndim)))
    return jnp.sum(jnp.square(norms - target_norm)) / max(norms.size, 1)


@public
def interpolated_gradient_penalty(
    f: Callable[[Array], Array],
    a: Real[ArrayLike, "batch ..."],
    b: Real[ArrayLike, "batch ..."],
    key: Array,
    *,
    target_norm: ArrayLike = 1.0,
) -> Float[Array, ""]:
    r"""The gradient penalty at $\tilde x = e a + (1 - e) b$, one uniform $e$ for each example.

    Args:
        f, target_norm: As in `pj.gradient_penalty`; so are result and errors.
        a: Examples of shape [batch, ...], such as real ones.
        b: Examples of the same shape, such as generated ones.
        key: A JAX random key; the same key gives the same points.

    Examples:
        >>> real, fake, key = jnp.ones((2, 3)), jnp.zeros((2, 3)), jax.random.key(0)
        >>> float(pj.interpolated_gradient_penalty(lambda x: x[0], real, fake, key))
        0.0
    """
    check_same_shape(a=a, b=b)
    a, b = promote(a, b)
    if not a.ndim:
        raise ValueError("a and b must have a batch axis, got shape ()")
    e = jax.random.uniform(key, (a.shape[0],) + (1,) * (a.ndim - 1), a.dtype)
    return gradient_penalty(f, e * a + (1 - e) * b, target_norm=target_norm)


@public
def output_magnitude(
    x: Real[ArrayLike, "..."],
    *,
    target: ArrayLike = 1.0,
    axis: Axis | None = None,
    reduction: Reduction = "mean",
    where: Bool[ArrayLike, "..."] | None = None,
    axis_name: AxisName | None = None,
) -> Float[Array, "..."]:
    r"""Keeps outputs at a scale: $(\operatorname{rms}(x) - t)^2$.

    Args:
        x, axis_name: As in `pj.l1`; so are errors.
        target: The $t$, in the units of `x`; an array broadcasts to the positions.
        axis: What one root mean square runs over: None for all of `x`, on every member of
            `axis_name`; -1 for one at each position.
        reduction: "mean" or "sum" over the positions that `axis` leaves, or "none".
        where: Mask of entries that broadcasts to `x`; a position without any contributes nothing.

    Returns:
        A scalar, or an array of the shape of the positions for "none".

    Examples:
        >>> round(float(pj.output_magnitude(jnp.array([3.0, -3.0]))), 4)
        4.0
    """
    FINITE.check(target=target)
    return _output_magnitude(
        x, target, axis=axis, reduction=reduction, where=where, axis_name=axis_name
    )


@partial(jax.jit, static_argnames=("axis", "reduction", "axis_name"))
def _output_magnitude(x, target, *, axis, reduction, where, axis_name):
    check_where(where, x.shape)
    (x,) = promote(x)
    count = jnp.asarray(x.size if axis is None else jnp.size(x, axis), x.dtype)
    if where is not None:
        (x, where), *_ = lie_alike((x, jnp.broadcast_to(where, x.shape)))
        x = jnp.where(where, x, 0)
        count = jnp.sum(where, axis, dtype=jnp.int32).astype(x.dtype)
    norms = norm(x, axis)
    check_fits(norms.shape, target=target)
    if axis is None and axis_name is not None:
        count, norms = lax.psum(count, axis_name), norm_across(norms, axis_name)
    rms = norms / jnp.sqrt(jnp.maximum(count, 1))
    values = jnp.where(count > 0, jnp.square(rms - target), 0)
    if axis is None:
        return values
    positions = None if where is None else count > 0
    return reduce(values, reduction=reduction, where=positions, axis_name=axis_name)


def _squared_error(a, b):
    return jnp.square(a - b)


def _absolute_error(a, b):
    return absolute(a - b)


def _cosine_distance(a, b, axis):
    return 1 - jnp.sum(normalized(a, axis) * normalized(b, axis), axis)


_DISTANCES = {
    "mse": (_squared_error, None),
    "l1": (_absolute_error, None),
    "cosine": (_cosine_distance, -1),
}
