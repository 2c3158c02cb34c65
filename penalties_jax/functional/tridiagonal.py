"""The diagonal of the resolvent of a tridiagonal matrix, in linear time."""

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Complex, Real

from penalties_jax.functional.checks import public
from penalties_jax.functional.reduction import lie_alike, promote

__all__ = ["resolvent_diagonal"]

Method = Literal["auto", "scan", "associative_scan"]


@public
def resolvent_diagonal(
    diagonal: Real[ArrayLike, "*batch n"],
    couplings: Real[ArrayLike, "*batch n-1"],
    *,
    z: ArrayLike = 1j,
    causal: bool = False,
    method: Method = "auto",
) -> Complex[Array, "*batch n"]:
    r"""The diagonal of $(H - z I)^{-1}$ for a real tridiagonal H: $G_{kk}$.

    With $d_k = a_k - z$, the left ratios are $l_1 = d_1$, $l_k = d_k - b_{k-1} c_{k-1} / l_{k-1}$,
    the right ratios $r_k$ the same from the other end, and
    $G_{kk} = 1 / (l_k + r_k - d_k)$. For $b_k c_k \ge 0$ every ratio has an imaginary part of at
    least $|\operatorname{Im} z|$, so that no division is near 0 and
    $|G_{kk}| \le 1 / |\operatorname{Im} z|$, at any n, in float32. Ratios are squared on the way:
    in float32, entries beyond 1e18 and an $|\operatorname{Im} z|$ below 1e-18 are out of range.

    Args:
        diagonal: The $a_k$, of shape [..., n], of any real dtype.
        couplings: The products $b_k c_k \ge 0$ of the entries above and below the diagonal, of
            shape [..., n - 1]; 0 separates the matrix into two blocks.
        z: A complex number off the real axis.
        causal: Whether $G_{kk}$ is that of the leading k by k block, $1 / l_k$: a function of the
            entries up to k, as an autoregressive model needs.
        method: How the recurrences run: "scan", n sequential steps; "associative_scan", a tree of
            depth log n; "auto" takes the scan on a CPU, where it is the faster, and the
            associative scan elsewhere. See `benchmarks/README.md`.

    Returns:
        An array of the shape of `diagonal`: complex64, or complex128 for float64.

    Raises:
        ValueError: If the shapes don't fit, `z` is a real number, or `method` is unknown.

    References:
        Meurant (1992), A review on the inverse of symmetric tridiagonal and block tridiagonal
        matrices.

    Examples:
        >>> diagonal = pj.resolvent_diagonal(jnp.array([1.0, 1.0]), jnp.array([0.0]))
        >>> diagonal[0] == 1 / (1 - 1j)
        Array(True, dtype=bool)
    """
    if not jnp.iscomplexobj(z) or (isinstance(z, complex) and z.imag == 0):
        raise ValueError(f"z must be a complex number off the real axis, got {z!r}")
    return _resolvent_diagonal(diagonal, couplings, z, causal=causal, method=method)


@partial(jax.jit, static_argnames=("causal", "method"))
def _resolvent_diagonal(diagonal, couplings, z, *, causal, method):
    a, products = promote(diagonal, couplings)
    if not a.ndim or products.shape != (*a.shape[:-1], a.shape[-1] - 1):
        raise ValueError(
            "diagonal and couplings must have the shapes [..., n] and [..., n - 1], "
            f"got {a.shape} and {products.shape}"
        )
    (a, products), *_ = lie_alike((a, products))
    dtype = jnp.result_type(a, jnp.complex64)
    # Time leads, as a scan wants it.
    d = jnp.moveaxis(a, -1, 0).astype(dtype) - jnp.asarray(z, dtype)
    w = jnp.moveaxis(products, -1, 0)
    none = jnp.zeros_like(d[:1], w.dtype)
    left = _ratios(d, jnp.concatenate([none, w]), method, False)
    if causal:
        return jnp.moveaxis(_reciprocal(left), 0, -1)
    right = _ratios(d, jnp.concatenate([w, none]), method, True)
    return jnp.moveaxis(_reciprocal(left + right - d), 0, -1)


@partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _ratios(d, w, method, reverse):
    """l_k = d_k - w_k / l_{k-1} along the first axis, from its end if reversed; w starts with 0."""
    return _by(method, _ratios_by_scan, _ratios_by_tree, reverse)(d, w)


@_ratios.defjvp
def _(method, reverse, primals, tangents):
    """The derivative is a linear recurrence with factors below 1 in size, whatever the method."""
    (d, w), (d_tangent, w_tangent) = primals, tangents
    ratios = _ratios(d, w, method, reverse)
    inverse = _shift(_reciprocal(ratios), reverse)
    offsets = d_tangent - _scale(w_tangent, inverse)
    return ratios, _recurrence(_scale(w, inverse * inverse), offsets, method, reverse)


def _recurrence(factors, offsets, method, reverse):
    """y_k = factor_k y_{k-1} + offset_k: a bidiagonal system, whose transpose runs backwards."""
    by = partial(_by, method, _recurrence_by_scan, _recurrence_by_tree)
    return lax.custom_linear_solve(
        lambda y: y - factors * _shift(y, reverse),
        offsets,
        lambda _, offsets: by(reverse)(factors, offsets),
        lambda _, offsets: by(not reverse)(_shift(factors, not reverse), offsets),
    )


def _by(method, scan, tree, reverse):
    scan, tree = partial(scan, reverse=reverse), partial(tree, reverse=reverse)
    if method == "auto":
        return partial(lax.platform_dependent, cpu=scan, default=tree)
    return scan if method == "scan" else tree


def _ratios_by_scan(d, w, *, reverse):
    def step(inverse, entries):
        d, w = entries
        ratio = d - _scale(w, inverse)
        return _reciprocal(ratio), ratio

    return lax.scan(step, jnp.zeros_like(d[0]), (d, w), reverse=reverse)[1]


def _ratios_by_tree(d, w, *, reverse):
    """Ratios as products of the matrices [[d, -w], [1, 0]], each divided by its largest entry."""

    def compose(first, second):
        (a, b, c, e), (p, q, r, s) = first, second
        product = (p * a + q * c, p * b + q * e, r * a + s * c, r * b + s * e)
        scale = 1 / jnp.max(jnp.stack([jnp.abs(entry) for entry in product]), 0)
        return tuple(entry * scale for entry in product)

    matrices = (d, -w.astype(d.dtype), jnp.ones_like(d), jnp.zeros_like(d))
    numerator, _, denominator, _ = lax.associative_scan(compose, matrices, reverse=reverse)
    return numerator / denominator


def _recurrence_by_scan(factors, offsets, *, reverse):
    def step(y, entries):
        factor, offset = entries
        y = factor * y + offset
        return y, y

    return lax.scan(step, jnp.zeros_like(offsets[0]), (factors, offsets), reverse=reverse)[1]


def _recurrence_by_tree(factors, offsets, *, reverse):
    def compose(first, second):
        return first[0] * second[0], second[0] * first[1] + second[1]

    return lax.associative_scan(compose, (factors, offsets), reverse=reverse)[1]


def _shift(x, reverse):
    """x_{k-1} at k, or x_{k+1} if reversed, and 0 at the start."""
    none = jnp.zeros_like(x[:1])
    return jnp.concatenate([x[1:], none] if reverse else [none, x[:-1]])


# Complex arithmetic by parts: XLA would divide with a care for overflow that is not needed here,
# and multiply a real number as if it had an imaginary part.


@jax.custom_jvp
def _reciprocal(x):
    """1 / x for what is bounded away from 0."""
    scale = 1 / (jnp.square(x.real) + jnp.square(x.imag))
    return lax.complex(x.real * scale, -x.imag * scale)


@_reciprocal.defjvp
def _(primals, tangents):
    inverse = _reciprocal(*primals)
    return inverse, -inverse * inverse * tangents[0]


def _scale(real, x):
    return lax.complex(real * x.real, real * x.imag)
