"""How far two samples are from being of one distribution."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.export import is_symbolic_dim
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Real

from penalties_jax.functional.checks import POSITIVE, public
from penalties_jax.functional.derivatives import FAR, elementwise_derivatives
from penalties_jax.functional.platform import by_platform
from penalties_jax.functional.reduction import promote, vary_alike

__all__ = ["mmd"]


@public
def mmd(
    x: Real[ArrayLike, "n d"],
    y: Real[ArrayLike, "m d"],
    *,
    scales: ArrayLike | tuple[ArrayLike, ...] = (1.0,),
    unbiased: bool = False,
) -> Float[Array, ""]:
    r"""The squared maximum mean discrepancy of two samples, with Gaussian kernels.

    $\overline{k(x, x')} + \overline{k(y, y')} - 2\, \overline{k(x, y)}$, the means over all pairs,
    with $k(x, y)$ the mean over scales s of $\exp(-\lVert x - y \rVert^2 / (2 s^2))$. It is at
    least 0, up to rounding, and above it also for samples of one distribution; without the pairs of
    a point with itself (`unbiased`) it is 0 on average for these, and may be negative.

    Pairs are taken block by block, forward and backward: memory grows with n + m. Squared distances
    are those of $|x|^2 + |y|^2 - 2 x y$ about the mean of both samples, so that a scale far below
    their spread (a thousandth, in float32) loses its digits.

    Args:
        x: A sample of shape [n, d], of any real dtype; below 32 bits it is upcast to float32.
        y: Another, of shape [m, d].
        scales: The s, above 0, in the units of the samples: a number, an array [k], or a tuple.
            The median distance is a usual one.
        unbiased: Whether to leave out the pairs of a point with itself.

    Returns:
        A scalar.

    Raises:
        ValueError: If `x` and `y` are not two matrices of as many columns, have no rows (fewer
            than two if `unbiased`), or a scale is out of its range.
        TypeError: If an input is not an array, or a number is a schedule.

    References:
        Gretton et al. (2012), A kernel two-sample test.

    Examples:
        >>> x, y = jnp.array([[0.0], [1.0]]), jnp.array([[0.0], [3.0]])
        >>> round(float(pj.mmd(x, y, scales=(1.0, 2.0))), 4)
        0.3145
    """
    if not jax.tree.leaves(scales):
        raise ValueError("scales must hold at least one number, got none")
    for scale in jax.tree.leaves(scales):
        POSITIVE.check(scales=scale)
    shapes = jnp.shape(x), jnp.shape(y)
    if not all(len(shape) == 2 for shape in shapes) or shapes[0][1] != shapes[1][1]:
        raise ValueError(f"x and y must be [n, d] and [m, d], got {shapes[0]} and {shapes[1]}")
    least = 2 if unbiased else 1
    for name, (rows, _) in zip("xy", shapes, strict=True):
        if not is_symbolic_dim(rows) and rows < least:
            raise ValueError(f"{name} needs at least {least} rows, got {rows}")
    return _mmd(x, y, scales, unbiased=unbiased)


@partial(jax.jit, static_argnames="unbiased")
def _mmd(x, y, scales, *, unbiased):
    x, y = vary_alike(tuple(map(_replicated, promote(x, y))))
    (n, _), (m, _) = x.shape, y.shape
    scales = [s for leaf in jax.tree.leaves(scales) for s in jnp.ravel(jnp.asarray(leaf, x.dtype))]
    points = jnp.concatenate([x, y])
    # The kernel knows differences alone: its derivative through a common centre is 0.
    points = points - lax.stop_gradient(jnp.mean(points, 0))
    squares = jnp.sum(jnp.square(points), -1)
    index = jnp.arange(n + m)

    @jax.checkpoint
    def witness(i):
        """At a point, the mean kernel with its own sample less that with the other one."""
        products = jnp.matmul(points, points[i], precision=lax.Precision.HIGHEST)
        distances = jnp.maximum(squares + squares[i] - 2 * products, 0)
        kernel = sum(_gaussian(distances, s) for s in scales) / len(scales)
        kernel = jnp.where(index == i, 0 if unbiased else 1, kernel)
        own = (index < n) == (i < n)
        size = jnp.where(index < n, n, m)
        return jnp.sum(jnp.where(own, kernel / (size - unbiased), -kernel / size))

    def each(platform, index):
        block = None if is_symbolic_dim(n + m) else platform.rows_in_product(n + m)
        return lax.map(witness, index, batch_size=block)

    values = by_platform(each, index)
    return jnp.mean(values[:n]) + jnp.mean(values[n:])


def _ratio(square, scale):
    # Of a scale whose square is no number, as of one that is.
    scale = jnp.maximum(scale, jnp.sqrt(jnp.finfo(scale.dtype).tiny))
    return square / scale / scale, scale


def _gaussian_slope(square, scale) -> Array:
    _, scale = _ratio(square, scale)
    return -_gaussian(square, scale) / scale / scale / 2


def _gaussian_scale_slope(square, scale) -> Array:
    ratio, scale = _ratio(square, scale)
    return _gaussian(square, scale) * jnp.minimum(ratio, FAR) / scale


@elementwise_derivatives(_gaussian_slope, _gaussian_scale_slope)
def _gaussian(square, scale):
    """The kernel of a squared distance, with derivative 0 where it is 0."""
    return jnp.exp(-_ratio(square, scale)[0] / 2)


def _replicated(x):
    """Of a mesh with explicit axes, since every sample meets every other."""
    sharding = jax.typeof(x).sharding
    if not any(sharding.spec):
        return x
    return jax.sharding.reshard(x, NamedSharding(sharding.mesh, PartitionSpec()))
