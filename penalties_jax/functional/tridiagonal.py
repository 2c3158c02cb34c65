"""The diagonal of the resolvent of a tridiagonal matrix, in linear time."""

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Complex, Float

from penalties_jax.functional.reduction import check_choice, promote

Method = Literal["auto", "scan", "associative_scan"]
METHODS = ("auto", "scan", "associative_scan")


def resolvent_diagonal(
    diagonal: Float[Array, "*batch n"],
    couplings: Float[Array, "*batch n-1"],
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
    $|G_{kk}| \le 1 / |\operatorname{Im} z|$, at any n, in float32.

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
        >>> import jax.numpy as jnp
        >>> import penalties_jax as pj
        >>> diagonal = pj.resolvent_diagonal(jnp.array([1.0, 1.0]), jnp.array([0.0]))
        >>> diagonal[0] == 1 / (1 - 1j)
        Array(True, dtype=bool)
    """
    check_choice("method", method, METHODS)
    if not jnp.iscomplexobj(z):
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
    dtype = jnp.result_type(a, jnp.complex64)
    # Time leads, as a scan wants it.
    d = jnp.moveaxis(a, -1, 0).astype(dtype) - jnp.asarray(z, dtype)
    w = jnp.moveaxis(products, -1, 0)
    left = _ratios(d, w, method)
    if causal:
        return jnp.moveaxis(_reciprocal(left), 0, -1)
    right = jnp.flip(_ratios(jnp.flip(d, 0), jnp.flip(w, 0), method), 0)
    return jnp.moveaxis(_reciprocal(left + right - d), 0, -1)


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def _ratios(d, w, method):
    """l_1 = d_1, l_k = d_k - w_{k-1} / l_{k-1}, along the first axis."""
    return _by(method, _ratios_by_scan, _ratios_by_tree)(d, w)


@_ratios.defjvp
def _(method, primals, tangents):
    """The derivative is a linear recurrence with factors below 1 in size, whatever the method."""
    (d, w), (d_tangent, w_tangent) = primals, tangents
    ratios = _ratios(d, w, method)
    inverse = _reciprocal(ratios[:-1])
    offsets = d_tangent.at[1:].add(-w_tangent * inverse)
    return ratios, _by(method, _recurrence_by_scan, _recurrence_by_tree)(w * inverse**2, offsets)


def _by(method, scan, tree):
    if method == "auto":
        return partial(lax.platform_dependent, cpu=scan, default=tree)
    return scan if method == "scan" else tree


def _ratios_by_scan(d, w):
    def step(ratio, entries):
        d, w = entries
        ratio = d - w * _reciprocal(ratio)
        return ratio, ratio

    _, rest = lax.scan(step, d[0], (d[1:], w))
    return jnp.concatenate([d[:1], rest])


def _ratios_by_tree(d, w):
    """Ratios as products of the matrices [[d, -w], [1, 0]], each divided by its largest entry."""
    below = jnp.concatenate([jnp.zeros_like(d[:1]), w])

    def compose(first, second):
        (a, b, c, e), (p, q, r, s) = first, second
        product = (p * a + q * c, p * b + q * e, r * a + s * c, r * b + s * e)
        scale = 1 / jnp.max(jnp.stack([jnp.abs(entry) for entry in product]), 0)
        return tuple(entry * scale for entry in product)

    matrices = (d, -below, jnp.ones_like(d), jnp.zeros_like(d))
    numerator, _, denominator, _ = lax.associative_scan(compose, matrices)
    return numerator / denominator


def _recurrence_by_scan(factors, offsets):
    """y_1 = offset_1, y_k = factor_{k-1} y_{k-1} + offset_k, along the first axis."""

    def step(y, entries):
        factor, offset = entries
        y = factor * y + offset
        return y, y

    _, rest = lax.scan(step, offsets[0], (factors, offsets[1:]))
    return jnp.concatenate([offsets[:1], rest])


def _recurrence_by_tree(factors, offsets):
    def compose(first, second):
        return first[0] * second[0], second[0] * first[1] + second[1]

    factors = jnp.concatenate([jnp.zeros_like(offsets[:1]), factors])
    return lax.associative_scan(compose, (factors, offsets))[1]


def _reciprocal(x):
    """1 / x for what is bounded away from 0: without the care for overflow, which costs time."""
    return jnp.conj(x) / (jnp.square(x.real) + jnp.square(x.imag))
