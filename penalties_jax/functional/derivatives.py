"""Declared derivatives, for what automatic ones overflow, cancel or are NaN at."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from penalties_jax.functional.checks import standard_promotion

Axis = int | tuple[int, ...]

# Beyond the logarithms of all numbers, of float64 too.
FAR = 1000.0


def elementwise_derivatives(
    *partials: Callable[..., Array],
) -> Callable[[Callable[..., Array]], Callable[..., Array]]:
    """Declares the partial derivatives of an elementwise function, one for each argument.

    A partial derivative is only computed if its argument is differentiated, and may itself be
    differentiated again.
    """

    def declare(function):
        declared = jax.custom_jvp(function)

        @functools.partial(declared.defjvp, symbolic_zeros=True)
        @standard_promotion()
        def _(primals, tangents):
            value = declared(*primals)
            tangent = sum(
                (
                    derivative(*primals) * t
                    for derivative, t in zip(partials, tangents, strict=True)
                    if not isinstance(t, SymbolicZero)
                ),
                start=jnp.zeros_like(value),
            )
            return value, tangent

        return declared

    return declare


def differentiated_as(
    other: Callable[..., Any], function: Callable[..., Any]
) -> Callable[..., Any]:
    """`function`, with the derivatives of another that computes the same."""
    declared = jax.custom_jvp(function)

    @functools.partial(declared.defjvp, symbolic_zeros=True)
    @standard_promotion()
    def _(primals, tangents):
        # What does not move has no tangent, not one of 0: a logit of -inf would make that NaN.
        moves = jax.tree.map(lambda t: not isinstance(t, SymbolicZero), tangents)

        def moved(to):
            return other(*jax.tree.map(lambda m, x, own: own if m else x, moves, primals, to))

        def moving(tree):
            return (jax.tree.map(lambda m, x: x if m else None, moves, tree),)

        return jax.jvp(moved, moving(primals), moving(tangents))

    return declared


@jax.custom_jvp
def with_value(x: Float[Array, "..."], value: Float[Array, "..."]) -> Float[Array, "..."]:
    """Another value, with the derivative of x."""
    del x  # only differentiated
    return value


@with_value.defjvp
def _(primals, tangents):
    return primals[1], tangents[0]


@elementwise_derivatives(jnp.sign)
def absolute(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """|x|, with derivative 0 at 0."""
    return jnp.abs(x)


def _over_slope(x, temperature) -> Array:
    return -over(x, temperature) / temperature


@elementwise_derivatives(lambda x, temperature: 1 / temperature, _over_slope)
def over(x: Float[Array, "..."], temperature: Float[Array, "..."]) -> Float[Array, "..."]:
    """X / T, up to where its exponential is 0 or infinite.

    So that where that has no slope any more, the derivative in T is no infinity times 0.
    """
    return jnp.clip(x / temperature, -FAR, FAR)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def norm(x: Float[Array, "..."], axis: Axis | None = None) -> Float[Array, "..."]:
    """The 2-norm over `axis`, without overflow or underflow, and with derivative 0 at 0."""
    scale = _scale(x, axis)
    return _root(jnp.sum(jnp.square(x / scale), axis)) * jnp.squeeze(scale, axis)


@norm.defjvp
@standard_promotion()
def _(axis, primals, tangents):
    (x,), (tangent,) = primals, tangents
    return norm(x, axis), jnp.sum(normalized(x, axis) * tangent, axis)


def normalized(x: Float[Array, "..."], axis: Axis | None = None) -> Float[Array, "..."]:
    """The unit vectors x / norm(x, axis); 0, with derivative 0, where the norm is 0."""
    scaled = x / _scale(x, axis)
    length = _root(jnp.sum(jnp.square(scaled), axis, keepdims=True))
    return scaled / jnp.where(length > 0, length, 1)


@jax.custom_jvp
def largest_singular_value(x: Float[Array, "*matrices m n"]) -> Float[Array, "*matrices"]:
    """That of each matrix, without overflow; its derivative is u v^T, of one pair of many."""
    return _leading_triple(x)[0]


@largest_singular_value.defjvp
@standard_promotion()
def _(primals, tangents):
    (x,), (tangent,) = primals, tangents
    value, u, v = _leading_triple(x)
    return value, jnp.sum(u[..., :, None] * v[..., None, :] * tangent, (-2, -1))


def _leading_triple(x):
    """The largest singular value of each matrix and its vectors, 0 for a matrix of zeros.

    By the Gram matrix of the shorter side: of the largest the squares lose no digits, and its
    eigenvectors take a fraction of the time of all singular vectors.
    """
    if 0 in x.shape[-2:]:
        *matrices, m, n = x.shape
        return tuple(jnp.zeros((*matrices, *side), x.dtype) for side in ((), (m,), (n,)))
    if x.shape[-2] < x.shape[-1]:
        value, v, u = _leading_triple(jnp.swapaxes(x, -2, -1))
        return value, u, v
    scale = _scale(x, (-2, -1))
    x = x / scale
    # All of a Gram matrix is needed at once: on a mesh with explicit axes it is replicated.
    sharding = jax.typeof(x).sharding
    replicated = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[:-2], None, None))
    gram = jnp.matmul(
        jnp.swapaxes(x, -2, -1),
        x,
        precision=lax.Precision.HIGHEST,
        out_sharding=replicated if any(sharding.spec) else None,
    )
    v = _leading_eigenvector(gram)
    image = jnp.sum(x * v[..., None, :], -1)
    return norm(image, -1) * jnp.squeeze(scale, (-2, -1)), normalized(image, -1), v


@jax.custom_jvp
def _leading_eigenvector(symmetric):
    return jnp.linalg.eigh(symmetric)[1][..., -1]


@_leading_eigenvector.defjvp
@standard_promotion()
def _(primals, tangents):
    (symmetric,), (tangent,) = primals, tangents
    values, vectors = jnp.linalg.eigh(symmetric)
    leading, gaps = vectors[..., -1], values[..., -1:] - values
    # Of equal values any vector leads, and none of them moves.
    apart = gaps > 0
    along = jnp.sum(vectors * jnp.sum(tangent * leading[..., None, :], -1)[..., None], -2)
    turn = jnp.where(apart, along / jnp.where(apart, gaps, 1), 0)
    return leading, jnp.sum(vectors * turn[..., None, :], -1)


def norm_across(norms: Float[Array, ""], axis_name: str | tuple[str, ...]) -> Float[Array, ""]:
    """The norm over the members of mapped axes, from the norm on each."""
    largest = lax.pmax(lax.stop_gradient(norms), axis_name)
    scale = jnp.where((largest > 0) & (largest < jnp.inf), largest, 1)
    return _root(lax.psum(jnp.square(norms / scale), axis_name)) * scale


def _scale(x, axis):
    largest = jnp.max(jnp.abs(lax.stop_gradient(x)), axis, keepdims=True, initial=0)
    return jnp.where((largest > 0) & (largest < jnp.inf), largest, 1)


def _root(squares):
    positive = squares > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, squares, 1)), 0)
