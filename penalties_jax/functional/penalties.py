r"""Penalties on values, each beside its proximal operator.

A penalty is a formula, handed to one reduction. A proximal operator is
$\operatorname{prox}_{t f}(v) = \arg\min_z \tfrac12 \lVert z - v \rVert^2 + t f(z)$.

Formulas are arithmetic: what a select or a clamp gives, XLA's CPU backend writes to memory before
it sums it.
"""

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Real

from penalties_jax.functional.checks import (
    ABOVE_ONE,
    ABOVE_TWO,
    ANY,
    NONNEGATIVE,
    POSITIVE,
    UNIT,
    check_fits,
    check_where,
    option_of,
    public,
)
from penalties_jax.functional.derivatives import (
    Axis,
    absolute,
    elementwise_derivatives,
    largest_singular_value,
    norm,
    normalized,
    with_value,
)
from penalties_jax.functional.reduction import (
    AxisName,
    Reduction,
    evaluate,
    lie_alike,
    promote,
    reduce,
)

__all__ = [
    "elastic_net",
    "group_lasso",
    "huber",
    "l1",
    "l2",
    "log_sum",
    "lp",
    "mcp",
    "prox_elastic_net",
    "prox_group_lasso",
    "prox_huber",
    "prox_l1",
    "prox_l2",
    "prox_mcp",
    "prox_scad",
    "scad",
    "smooth_l0",
    "spectral_norm",
]


@public
def l1(
    x: Real[ArrayLike, "..."],
    *,
    weights: ArrayLike = 1.0,
    reduction: Reduction = "sum",
    where: Bool[ArrayLike, "..."] | None = None,
    axis_name: AxisName | None = None,
) -> Float[Array, "..."]:
    r"""The L1 norm (lasso): $\sum_i w_i |x_i|$.

    The derivative is $w_i \operatorname{sign}(x_i)$, and 0 at 0. An entry of -inf, such as a
    masked-out log-probability, makes the value inf: leave it out with `where`.

    Args:
        x: Values of shape [...], of any real dtype; below 32 bits they are upcast to float32.
        weights: A number of at least 0 (the usual lambda), or an array that broadcasts to `x` (the
            adaptive lasso). "mean" divides by the count, not by the sum of the weights.
        reduction: "sum", "mean" or "none".
        where: Mask that broadcasts to `x`; an excluded entry contributes nothing to the value or
            the gradient, whatever it holds.
        axis_name: Mapped axes over whose members to sum or average.

    Returns:
        A scalar, or an array of the shape of `x` for "none".

    Raises:
        ValueError: If a number is out of its range, an array does not broadcast to `x`, or an
            option is unknown.
        TypeError: If `x` is not an array, a number is a schedule, or `where` is not boolean.

    References:
        Tibshirani (1996), Regression shrinkage and selection via the lasso. Zou (2006), The
        adaptive lasso and its oracle properties.

    Examples:
        >>> float(pj.l1(jnp.array([-2.0, 0.0, 1.0])))
        3.0
    """
    return _penalty(absolute, x, weights, reduction, where, axis_name)


@public
def prox_l1(v: Real[ArrayLike, "..."], t: ArrayLike) -> Float[Array, "..."]:
    r"""Soft thresholding, $\operatorname{sign}(v) \max(|v| - t, 0)$: the proximal operator of |z|.

    Args:
        v: Point of shape [...]; below 32 bits it is upcast to float32, and the result stays so.
        t: Step size times the weight of the penalty: a number of at least 0, or an array that
            broadcasts to `v`.

    Returns:
        An array of the shape of `v`.

    Raises:
        ValueError: If a number is out of its range, or an array does not broadcast to `v`.
        TypeError: If a number is a schedule.

    References:
        Donoho & Johnstone (1994), Ideal spatial adaptation by wavelet shrinkage.

    Examples:
        >>> pj.prox_l1(jnp.array([-3.0, 0.5, 2.0]), 1.0).tolist()
        [-2.0, 0.0, 1.0]
    """
    return _proximal(_soft_threshold, v, t)


def _soft_threshold(v, t):
    return jnp.sign(v) * jnp.maximum(jnp.abs(v) - t, 0)


@public
def l2(
    x: Real[ArrayLike, "..."],
    *,
    center: ArrayLike | Literal["mean"] | None = None,
    clip: ArrayLike | None = None,
    weights: ArrayLike = 1.0,
    reduction: Reduction = "sum",
    where: Bool[ArrayLike, "..."] | None = None,
    axis_name: AxisName | None = None,
) -> Float[Array, "..."]:
    r"""The squared L2 norm (ridge): $\sum_i w_i (x_i - c_i)^2$.

    There is no factor 1/2, which `optax.l2_loss` has.

    Args:
        x, weights, reduction, where, axis_name: As in `pj.l1`; so are result and errors.
        center: The $c$: a number, an array that broadcasts to `x`, "mean" for the mean of the
            included entries (of all members of `axis_name`), which is differentiated through, or
            None for 0.
        clip: Bound on $|x_i - c_i|$, above 0, applied after centering. Beyond it an entry's own
            term is constant, so that -inf is bounded too, unless `center` is "mean".

    References:
        Hoerl & Kennard (1970), Ridge regression: biased estimation for nonorthogonal problems.

    Examples:
        >>> float(pj.l2(jnp.array([1.0, 3.0])))
        10.0
        >>> float(pj.l2(jnp.array([1.0, 3.0]), center="mean"))
        2.0
    """
    POSITIVE.check(clip=clip)
    if isinstance(center, str):
        NONNEGATIVE.check(weights=weights)
        option_of(Literal["mean"])("center", center)
        return _about_mean(x, clip, weights, reduction, where, axis_name)
    ANY.check(center=center)
    return _penalty(
        _squared_distance, x, weights, reduction, where, axis_name, center=center, clip=clip
    )


@public
def prox_l2(
    v: Real[ArrayLike, "..."], t: ArrayLike, *, center: ArrayLike = 0.0
) -> Float[Array, "..."]:
    r"""$c + (v - c) / (1 + 2 t)$: the proximal operator of $(z - c)^2$.

    Args:
        v, t: As in `pj.prox_l1`; so are result and errors.
        center: The $c$, a number or an array that broadcasts to `v`.

    References:
        Parikh & Boyd (2014), Proximal algorithms, section 6.1.1.

    Examples:
        >>> pj.prox_l2(jnp.array([3.0]), 1.0).tolist()
        [1.0]
    """
    ANY.check(center=center)
    return _proximal(_shrink, v, t, center=center)


def _shrink(v, t, center):
    return center + (v - center) / (1 + 2 * t)


@partial(jax.jit, static_argnums=(3, 5))
def _about_mean(x, clip, weights, reduction, where, axis_name):
    center = _penalty(_identity, x, 1.0, "mean", where, axis_name)
    return _penalty(
        _squared_distance, x, weights, reduction, where, axis_name, center=center, clip=clip
    )


def _identity(x):
    return x


def _squared_distance(x, center=0.0, clip=None):
    distance = x - center
    if clip is not None:
        distance = jnp.clip(distance, -clip, clip)
    return jnp.square(distance)


@public
def elastic_net(
    x: Real[ArrayLike, "..."],
    *,
    l1_ratio: ArrayLike = 0.5,
    weights: ArrayLike = 1.0,
    reduction: Reduction = "sum",
    where: Bool[ArrayLike, "..."] | None = None,
    axis_name: AxisName | None = None,
) -> Float[Array, "..."]:
    r"""The elastic net: $\sum_i w_i (a |x_i| + (1 - a) x_i^2)$.

    scikit-learn's $(\alpha, r)$ has a factor 1/2 on the square: it is $a = 2r / (1 + r)$ with
    weight $\alpha (1 + r) / 2$ here.

    Args:
        x, weights, reduction, where, axis_name: As in `pj.l1`; so are result and errors.
        l1_ratio: The $a$, in [0, 1]: 1 is the L1 norm, 0 the squared L2 norm.

    References:
        Zou & Hastie (2005), Regularization and variable selection via the elastic net.

    Examples:
        >>> float(pj.elastic_net(jnp.array([-2.0, 1.0]), l1_ratio=0.5))
        4.0
    """
    UNIT.check(l1_ratio=l1_ratio)
    return _penalty(_elastic_net, x, weights, reduction, where, axis_name, l1_ratio=l1_ratio)


@public
def prox_elastic_net(
    v: Real[ArrayLike, "..."], t: ArrayLike, *, l1_ratio: ArrayLike = 0.5
) -> Float[Array, "..."]:
    r"""Soft threshold at $t a$, then divide by $1 + 2 t (1 - a)$, for $a |z| + (1 - a) z^2$.

    Args:
        v, t: As in `pj.prox_l1`; so are result and errors.
        l1_ratio: The $a$, in [0, 1].

    Examples:
        >>> pj.prox_elastic_net(jnp.array([0.25, 2.5]), 1.0, l1_ratio=0.5).tolist()
        [0.0, 1.0]
    """
    UNIT.check(l1_ratio=l1_ratio)
    return _proximal(_threshold_and_shrink, v, t, l1_ratio=l1_ratio)


def _threshold_and_shrink(v, t, l1_ratio):
    return _soft_threshold(v, t * l1_ratio) / (1 + 2 * t * (1 - l1_ratio))


def _elastic_net_slope(x, l1_ratio):
    rest = 1 - l1_ratio
    return l1_ratio * jnp.sign(x) + 2 * rest * jnp.where((rest > 0) | jnp.isfinite(x), x, 0)


def _elastic_net_ratio_slope(x, l1_ratio):
    magnitude = absolute(x)
    return magnitude * (1 - magnitude)


@elementwise_derivatives(_elastic_net_slope, _elastic_net_ratio_slope)
def _elastic_net(x, l1_ratio):
    magnitude = jnp.abs(x)
    finite = jnp.minimum(magnitude, jnp.finfo(x.dtype).max)
    return magnitude * (l1_ratio + (1 - l1_ratio) * finite)


@public
def lp(
    x: Real[ArrayLike, "..."],
    p: ArrayLike,
    *,
    eps: ArrayLike = 1e-12,
    weights: ArrayLike = 1.0,
    reduction: Reduction = "sum",
    where: Bool[ArrayLike, "..."] | None = None,
    axis_name: AxisName | None = None,
) -> Float[Array, "..."]:
    r"""The L_p penalty: $\sum_i w_i (|x_i| + \epsilon)^p$.

    The derivative is $p (|x_i| + \epsilon)^{p - 1} \operatorname{sign}(x_i)$, and 0 at 0. For
    p < 1 it grows without bound as x tends to 0, up to what `eps` allows. At x = 0 the value is
    $\epsilon^p$: 1.6e-5 at p = 0.4. There is no proximal operator in closed form.

    Args:
        x, weights, reduction, where, axis_name: As in `pj.l1`; so are result and errors.
        p: The exponent, above 0: a number, or an array that broadcasts to `x`.
        eps: The $\epsilon$, at least 0.

    References:
        Frank & Friedman (1993), A statistical view of some chemometrics regression tools.

    Examples:
        >>> round(float(pj.lp(jnp.array([4.0, -9.0]), 0.5)), 5)
        5.0
    """
    POSITIVE.check(p=p)
    NONNEGATIVE.check(eps=eps)
    return _penalty(_power, x, weights, reduction, where, axis_name, p=p, eps=eps)


def _power_slope(x, p, eps):
    magnitude = jnp.abs(x)
    nonzero = magnitude > 0
    base = jnp.where(nonzero, magnitude + eps, 1)
    return p * _raise(base, p - 1) * jnp.sign(x)


def _power_p_slope(x, p, eps):
    base = absolute(x) + eps
    positive = base > 0
    base = jnp.where(positive, base, 1)
    return jnp.where(positive, _raise(base, p) * jnp.log(base), 0)


def _power_eps_slope(x, p, eps):
    base = absolute(x) + eps
    positive = base > 0
    slope = p * _raise(jnp.where(positive, base, 1), p - 1)
    return jnp.where(positive | (p == 1), slope, 0)


@elementwise_derivatives(_power_slope, _power_p_slope, _power_eps_slope)
def _power(x, p, eps):
    # Without the choice of `_raise`: p is above 0.
    return jnp.exp(p * jnp.log(jnp.abs(x) + eps))


def _raise(base, p):
    """base^p for a base of at least 0: as exact as the logarithm, and vectorised on a CPU."""
    return jnp.exp(jnp.where(p == 0, 0, p * jnp.log(base)))


@public
def smooth_l0(
    x: Real[ArrayLike, "..."],
    gamma: ArrayLike,
    *,
    normalize_at_one: bool = False,
    weights: ArrayLike = 1.0,
    reduction: Reduction = "sum",
    where: Bool[ArrayLike, "..."] | None = None,
    axis_name: AxisName | None = None,
) -> Float[Array, "..."]:
    r"""Smooth L0 (Geman-McClure): $\sum_i w_i\, x_i^2 / (x_i^2 + \gamma^2)$.

    It is 0 at 0, 1/2 at $\gamma$, and tends to 1: a count of the entries well above $\gamma$. The
    derivative $2 x \gamma^2 / (x^2 + \gamma^2)^2$ is 0 at 0 and peaks at
    $3 \sqrt 3 / (8 \gamma)$, at $x = \gamma / \sqrt 3$. Nothing overflows on the way: an entry of
    1e30, or inf, counts 1 and has gradient 0.

    Args:
        x, weights, reduction, where, axis_name: As in `pj.l1`; so are result and errors.
        gamma: The $\gamma$, above 0, in the units of `x`: a number, or an array that broadcasts to
            `x`.
        normalize_at_one: Multiply by $1 + \gamma^2$, so that x = 1 costs 1 at every gamma.

    References:
        Geman & McClure (1985), Bayesian image analysis: an application to single photon emission
        tomography.

    Examples:
        >>> float(pj.smooth_l0(jnp.array([0.0, 1.0, 1e6]), gamma=1.0))
        1.5
    """
    POSITIVE.check(gamma=gamma)
    formula = _geman_mcclure_at_one if normalize_at_one else _geman_mcclure
    return _penalty(formula, x, weights, reduction, where, axis_name, gamma=gamma)


def _geman_mcclure_ratio(x, gamma):
    largest = float(jnp.finfo(x.dtype).max) ** 0.5
    return jnp.clip(x / gamma, -largest, largest)


def _geman_mcclure_slope(x, gamma):
    r = _geman_mcclure_ratio(x, gamma)
    rest = 1 / (1 + jnp.square(r))
    return 2 / gamma * (r * rest) * rest


def _geman_mcclure_gamma_slope(x, gamma):
    r = _geman_mcclure_ratio(x, gamma)
    return -2 / gamma * jnp.square(r / (1 + jnp.square(r)))


@elementwise_derivatives(_geman_mcclure_slope, _geman_mcclure_gamma_slope)
def _geman_mcclure(x, gamma):
    # Nothing in common with the slope, which XLA would keep in memory from one to the other.
    return gamma / (gamma + gamma * jnp.square(gamma / x))


def _geman_mcclure_at_one_slope(x, gamma):
    r = _geman_mcclure_ratio(x, gamma)
    rest = 1 / (1 + jnp.square(r))
    return 2 * (gamma + 1 / gamma) * (r * rest) * rest


def _geman_mcclure_at_one_gamma_slope(x, gamma):
    return 2 * gamma * jnp.square(_geman_mcclure(x, gamma)) + _geman_mcclure_gamma_slope(x, gamma)


@elementwise_derivatives(_geman_mcclure_at_one_slope, _geman_mcclure_at_one_gamma_slope)
def _geman_mcclure_at_one(x, gamma):
    return (1 + jnp.square(gamma)) * _geman_mcclure(x, gamma)


@public
def log_sum(
    x: Real[ArrayLike, "..."],
    eps: ArrayLike = 1.0,
    *,
    weights: ArrayLike = 1.0,
    reduction: Reduction = "sum",
    where: Bool[ArrayLike, "..."] | None = None,
    axis_name: AxisName | None = None,
) -> Float[Array, "..."]:
    r"""The log-sum penalty: $\sum_i w_i \ln(1 + |x_i| / \epsilon)$.

    The derivative is $\operatorname{sign}(x_i) / (\epsilon + |x_i|)$, and 0 at 0: the smaller
    `eps`, the nearer to a count of the entries, and the steeper at 0.

    Args:
        x, weights, reduction, where, axis_name: As in `pj.l1`; so are result and errors.
        eps: The $\epsilon$, above 0, in the units of `x`: a number, or an array that broadcasts to
            `x`.

    References:
        Candès, Wakin & Boyd (2008), Enhancing sparsity by reweighted l1 minimization.

    Examples:
        >>> round(float(pj.log_sum(jnp.array([1.0, -3.0]), eps=1.0)), 4)
        2.0794
    """
    POSITIVE.check(eps=eps)
    return _penalty(_log_magnitude, x, weights, reduction, where, axis_name, eps=eps)


def _log_slope(x, eps):
    return jnp.sign(x) / (eps + jnp.abs(x))


def _log_eps_slope(x, eps):
    zero = x == 0
    magnitude = jnp.where(zero, 1, absolute(x))
    # No product of eps and a small magnitude, nor a quotient that XLA would divide by one.
    return jnp.where(zero, 0, -1 / (eps * (1 + eps / magnitude)))


@elementwise_derivatives(_log_slope, _log_eps_slope)
def _log_magnitude(x, eps):
    # What the ratio is beyond 2^100, where it may overflow, is told by its root.
    magnitude = jnp.abs(x)
    root = jnp.sqrt(magnitude) / jnp.sqrt(eps)
    near = jnp.log1p(jnp.minimum(magnitude / eps, 2.0**100))
    return near + 2 * jnp.log(jnp.maximum(root / 2.0**50, 1))


@public
def huber(
    x: Real[ArrayLike, "..."],
    delta: ArrayLike = 1.0,
    *,
    weights: ArrayLike = 1.0,
    reduction: Reduction = "sum",
    where: Bool[ArrayLike, "..."] | None = None,
    axis_name: AxisName | None = None,
) -> Float[Array, "..."]:
    r"""The Huber penalty: $x_i^2 / 2$ for $|x_i| \le \delta$, else $\delta (|x_i| - \delta / 2)$.

    Also known as the soft L1 (SciPy's `soft_l1` is the pseudo-Huber function).

    Args:
        x, weights, reduction, where, axis_name: As in `pj.l1`; so are result and errors.
        delta: The $\delta$, above 0, in the units of `x`: a number, or an array that broadcasts to
            `x`.

    References:
        Huber (1964), Robust estimation of a location parameter.

    Examples:
        >>> float(pj.huber(jnp.array([1.0, -3.0]), delta=1.0))
        3.0
    """
    POSITIVE.check(delta=delta)
    return _penalty(huber_loss, x, weights, reduction, where, axis_name, delta=delta)


@public
def prox_huber(
    v: Real[ArrayLike, "..."], t: ArrayLike, *, delta: ArrayLike = 1.0
) -> Float[Array, "..."]:
    r"""$v / (1 + t)$ where $|v| \le \delta (1 + t)$, else $v - t \delta \operatorname{sign}(v)$.

    Args:
        v, t: As in `pj.prox_l1`; so are result and errors.
        delta: The $\delta$ of the Huber penalty, above 0.

    References:
        Beck (2017), First-order methods in optimization, example 6.54.

    Examples:
        >>> pj.prox_huber(jnp.array([1.0, 5.0]), 1.0, delta=1.0).tolist()
        [0.5, 4.0]
    """
    POSITIVE.check(delta=delta)
    return _proximal(_shrink_or_shift, v, t, delta=delta)


def _shrink_or_shift(v, t, delta):
    inside = jnp.abs(v) <= delta * (1 + t)
    shrunk = jnp.where(inside, v, 0) / (1 + t)
    return jnp.where(inside, shrunk, v - jnp.where(inside, 0, t * delta) * jnp.sign(v))


def _huber_slope(x, delta):
    return jnp.clip(x, -delta, delta)


def _huber_delta_slope(x, delta):
    return jnp.maximum(jnp.abs(x) - delta, 0)


@elementwise_derivatives(_huber_slope, _huber_delta_slope)
def huber_loss(x: Float[Array, "..."], delta: Float[Array, "..."]) -> Float[Array, "..."]:
    """x^2 / 2 inside delta, linear outside."""
    magnitude = jnp.abs(x)
    inside = jnp.minimum(magnitude, delta)
    return inside * (magnitude - inside / 2)


@public
def mcp(
    x: Real[ArrayLike, "..."],
    gamma: ArrayLike,
    lam: ArrayLike = 1.0,
    *,
    weights: ArrayLike = 1.0,
    reduction: Reduction = "sum",
    where: Bool[ArrayLike, "..."] | None = None,
    axis_name: AxisName | None = None,
) -> Float[Array, "..."]:
    r"""MCP: $\lambda |x_i| - x_i^2 / (2 \gamma)$ for $|x_i| \le \gamma \lambda$, then constant.

    The minimax concave penalty, whose slope falls to 0, so that large entries are not shrunk.

    Args:
        x, weights, reduction, where, axis_name: As in `pj.l1`; so are result and errors.
        gamma: The $\gamma$, above 1: the larger, the nearer to $\lambda |x_i|$.
        lam: The $\lambda$, at least 0, in the units of `x`; a weight scales the value alone.

    References:
        Zhang (2010), Nearly unbiased variable selection under minimax concave penalty.

    Examples:
        >>> float(pj.mcp(jnp.array([1.0, -5.0]), gamma=2.0))
        1.75
    """
    ABOVE_ONE.check(gamma=gamma)
    NONNEGATIVE.check(lam=lam)
    return _penalty(_mcp, x, weights, reduction, where, axis_name, gamma=gamma, lam=lam)


@public
def prox_mcp(
    v: Real[ArrayLike, "..."], t: ArrayLike, *, gamma: ArrayLike, lam: ArrayLike = 1.0
) -> Float[Array, "..."]:
    r"""The soft threshold at $t \lambda$, over $1 - t / \gamma$, up to $\gamma \lambda$; beyond, v.

    For $t \ge \gamma$ it is v where $|v| > \lambda \sqrt{t \gamma}$, else 0.

    Args:
        v, t: As in `pj.prox_l1`; so are result and errors.
        gamma, lam: As in `pj.mcp`.

    Examples:
        >>> pj.prox_mcp(jnp.array([0.5, 1.5, 3.0]), 1.0, gamma=2.0).tolist()
        [0.0, 1.0, 3.0]
    """
    ABOVE_ONE.check(gamma=gamma)
    NONNEGATIVE.check(lam=lam)
    return _proximal(_firm_threshold, v, t, gamma=gamma, lam=lam)


def _firm_threshold(v, t, gamma, lam):
    convex = t < gamma
    # Of rounding, where the divisor is near 0, there is more than v itself.
    shrunk = _soft_threshold(v, t * lam) / jnp.where(convex, 1 - t / gamma, 1)
    shrunk = with_value(shrunk, jnp.clip(shrunk, -jnp.abs(v), jnp.abs(v)))
    kept = jnp.abs(v) > lam * jnp.where(convex, gamma, jnp.sqrt(t * gamma))
    return jnp.where(kept, v, jnp.where(convex, shrunk, 0))


@elementwise_derivatives(
    lambda x, gamma, lam: jnp.sign(x) * jnp.maximum(lam - jnp.abs(x) / gamma, 0),
    lambda x, gamma, lam: jnp.square(jnp.minimum(absolute(x) / gamma, lam)) / 2,
    lambda x, gamma, lam: jnp.minimum(absolute(x), gamma * lam),
)
def _mcp(x, gamma, lam):
    inside = jnp.minimum(jnp.abs(x), gamma * lam)
    return inside * (lam - inside / (2 * gamma))


@public
def scad(
    x: Real[ArrayLike, "..."],
    a: ArrayLike = 3.7,
    lam: ArrayLike = 1.0,
    *,
    weights: ArrayLike = 1.0,
    reduction: Reduction = "sum",
    where: Bool[ArrayLike, "..."] | None = None,
    axis_name: AxisName | None = None,
) -> Float[Array, "..."]:
    r"""SCAD: $\lambda |x_i|$ for $|x_i| \le \lambda$, bent down to be constant from $a \lambda$ on.

    The smoothly clipped absolute deviation, which shrinks small entries as L1 does and large ones
    not at all. Between, it is $\lambda |x_i| - (|x_i| - \lambda)^2 / (2 (a - 1))$, whose slope
    falls to 0; beyond $a \lambda$ it is $\lambda^2 (a + 1) / 2$.

    Args:
        x, weights, reduction, where, axis_name: As in `pj.l1`; so are result and errors.
        a: The $a$, above 2: the larger, the nearer to $\lambda |x_i|$.
        lam: As in `pj.mcp`.

    References:
        Fan & Li (2001), Variable selection via nonconcave penalized likelihood and its oracle
        properties.

    Examples:
        >>> float(pj.scad(jnp.array([1.0, -5.0]), a=3.0))
        3.0
    """
    ABOVE_TWO.check(a=a)
    NONNEGATIVE.check(lam=lam)
    return _penalty(_scad, x, weights, reduction, where, axis_name, a=a, lam=lam)


@public
def prox_scad(
    v: Real[ArrayLike, "..."], t: ArrayLike, *, a: ArrayLike = 3.7, lam: ArrayLike = 1.0
) -> Float[Array, "..."]:
    r"""The soft threshold at $t \lambda$ up to $\lambda (1 + t)$, then a line to v at $a \lambda$.

    The line is $\lambda + (|v| - \lambda (1 + t)) / (1 - t / (a - 1))$. For $t \ge a - 1$ there is
    none: it is v where $|v|$ is above $\lambda (a + 1 + t) / 2$ (above
    $\lambda \sqrt{t (a + 1)}$ if $t > a + 1$), else the soft threshold.

    Args:
        v, t: As in `pj.prox_l1`; so are result and errors.
        a, lam: As in `pj.scad`.

    Examples:
        >>> pj.prox_scad(jnp.array([0.5, 1.5, 2.5, 4.0]), 1.0, a=3.0).tolist()
        [0.0, 0.5, 2.0, 4.0]
    """
    ABOVE_TWO.check(a=a)
    NONNEGATIVE.check(lam=lam)
    return _proximal(_shrink_or_keep, v, t, a=a, lam=lam)


def _shrink_or_keep(v, t, a, lam):
    magnitude, width = jnp.abs(v), a - 1
    soft = jnp.clip(magnitude - t * lam, 0, lam)
    convex = t < width
    line = soft + jnp.maximum(magnitude - lam * (1 + t), 0) * (
        width / jnp.where(convex, width - t, width)
    )
    line = with_value(line, jnp.minimum(line, magnitude))
    edge = jnp.where(t <= a + 1, (a + 1 + t) / 2, jnp.sqrt(t * (a + 1)))
    kept = magnitude > lam * jnp.where(convex, a, edge)
    return jnp.sign(v) * jnp.where(kept, magnitude, jnp.where(convex, line, soft))


def _scad_fall(x, a, lam):
    """By how much the slope has fallen from lam."""
    # Where a mask excludes, a is 1.
    return jnp.clip((absolute(x) - lam) / jnp.maximum(a - 1, 1), 0, lam)


@elementwise_derivatives(
    lambda x, a, lam: jnp.sign(x) * (lam - _scad_fall(x, a, lam)),
    lambda x, a, lam: jnp.square(_scad_fall(x, a, lam)) / 2,
    lambda x, a, lam: jnp.minimum(absolute(x), a * lam) + _scad_fall(x, a, lam),
)
def _scad(x, a, lam):
    near, inside = (jnp.minimum(jnp.abs(x), edge) for edge in (lam, a * lam))
    # Where a mask excludes, a is 1.
    return lam * near + (inside - near) * (lam - (inside - near) / jnp.maximum(2 * (a - 1), 1))


@public
def group_lasso(
    x: Real[ArrayLike, "..."],
    *,
    axis: Axis,
    weights: ArrayLike = 1.0,
    reduction: Reduction = "sum",
    where: Bool[ArrayLike, "..."] | None = None,
    axis_name: AxisName | None = None,
) -> Float[Array, "..."]:
    r"""The group lasso: $\sum_g w_g \lVert x_g \rVert_2$, with the groups along `axis`.

    The derivative is $w_g x / \lVert x_g \rVert_2$, and 0 at a group of zeros. Norms are scaled,
    so that 1e30 does not overflow.

    Args:
        x, axis_name: As in `pj.l1`.
        axis: The axis or axes within a group; the other axes count the groups.
        weights: A number of at least 0, or an array that broadcasts to the shape of the groups.
            Yuan & Lin weight a group by the square root of its size; here it is left to the caller.
        reduction: "sum", "mean" (over the groups with an included entry) or "none".
        where: Mask of entries that broadcasts to `x`.

    Returns:
        A scalar, or an array of the shape of the groups for "none".

    Raises:
        ValueError: As `pj.l1`, or if `axis` is not one of the axes of `x`.
        TypeError: As `pj.l1`.

    References:
        Yuan & Lin (2006), Model selection and estimation in regression with grouped variables.

    Examples:
        >>> float(pj.group_lasso(jnp.array([[3.0, 4.0], [0.0, 0.0]]), axis=1))
        5.0
    """
    NONNEGATIVE.check(weights=weights)
    return _group_lasso(
        x, weights, axis=axis, where=where, reduction=reduction, axis_name=axis_name
    )


@public
def prox_group_lasso(v: Real[ArrayLike, "..."], t: ArrayLike, *, axis: Axis) -> Float[Array, "..."]:
    r"""Block soft thresholding, $v_g \max(1 - t / \lVert v_g \rVert_2, 0)$.

    Args:
        v: As in `pj.prox_l1`; so are result and errors.
        t: As in `pj.prox_l1`, but an array broadcasts to the shape of the groups: that of `v`
            without `axis`.
        axis: The axis or axes within a group.

    Examples:
        >>> pj.prox_group_lasso(jnp.array([[3.0, 4.0], [0.0, 1.0]]), 2.5, axis=1).tolist()
        [[1.5, 2.0], [0.0, 0.0]]
    """
    NONNEGATIVE.check(t=t)
    return _prox_group_lasso(v, t, axis=axis)


@public
def spectral_norm(
    x: Real[ArrayLike, "..."],
    *,
    weights: ArrayLike = 1.0,
    reduction: Reduction = "sum",
    where: Bool[ArrayLike, "..."] | None = None,
    axis_name: AxisName | None = None,
) -> Float[Array, "..."]:
    r"""The spectral norm: $\sum_k w_k \sigma_1(x_k)$, the largest singular value of each matrix.

    The derivative is $w_k u v^\top$ of its singular vectors, one pair of them where the largest
    is repeated, and 0 at a matrix of zeros. Matrices are scaled, so that 1e30 does not overflow.
    The square of the Frobenius norm is `pj.l2`.

    It takes all eigenvectors of the smaller Gram matrix of a matrix [m, n]: about
    $m n \min(m, n) + 9 \min(m, n)^3$ multiplications, on one device each.

    Args:
        x: Matrices of shape [..., m, n], of any real dtype; below 32 bits they are upcast to
            float32.
        weights: A number of at least 0, or an array that broadcasts to the leading axes [...].
        reduction: "sum", "mean" (over the matrices) or "none".
        where: Mask of matrices that broadcasts to the leading axes [...].
        axis_name: As in `pj.l1`.

    Returns:
        A scalar, or an array [...] of one value a matrix for "none".

    Raises:
        ValueError: As `pj.l1`, or if `x` has fewer than two axes.
        TypeError: As `pj.l1`.

    References:
        Yoshida & Miyato (2017), Spectral norm regularization for improving the generalizability of
        deep learning.

    Examples:
        >>> float(pj.spectral_norm(jnp.array([[3.0, 0.0], [0.0, -4.0], [0.0, 0.0]])))
        4.0
    """
    NONNEGATIVE.check(weights=weights)
    if jnp.ndim(x) < 2:
        raise ValueError(
            f"x must have at least two axes, got shape {jnp.shape(x)}; leave out what is no "
            "matrix, such as a bias: None in its place, or mask= of pj.add_penalty"
        )
    return _spectral_norm(x, weights, reduction, where, axis_name)


@partial(jax.jit, static_argnums=(2, 4))
def _spectral_norm(x, weights, reduction, where, axis_name):
    check_where(where, x.shape[:-2])
    (x,) = promote(x)
    if where is not None:
        x = jnp.where(jnp.asarray(where)[..., None, None], x, 0)
    values = largest_singular_value(x)
    return evaluate(_identity, (values,), {}, reduction, where, axis_name, weights=weights)


@partial(jax.jit, static_argnames=("axis", "reduction", "axis_name"))
def _group_lasso(x, weights, *, axis, where, reduction, axis_name):
    check_where(where, x.shape)
    x, weights = promote(x, weights)
    groups = None
    if where is not None:
        where = jnp.broadcast_to(where, x.shape)
        (x, where), weights, _ = lie_alike((x, where), weights, axis=axis)
        groups = jnp.any(where, axis)
        x = jnp.where(where, x, 0)
    norms = norm(x, axis)
    check_fits(norms.shape, weights=weights)
    values = weights * norms
    if groups is not None:
        values = jnp.where(groups, jnp.where(groups, weights, 0) * norms, 0)
    return reduce(values, reduction=reduction, where=groups, axis_name=axis_name)


@partial(jax.jit, static_argnames="axis")
def _prox_group_lasso(v, t, *, axis):
    v, t = promote(v, t)
    groups = jax.eval_shape(partial(norm, axis=axis), v).shape
    check_fits(groups, t=t)

    def operator(v, t):
        lengths = jnp.expand_dims(norm(v, axis), axis)
        return normalized(v, axis) * jnp.maximum(lengths - t, 0)

    return _moved(operator, v, jnp.expand_dims(jnp.broadcast_to(t, groups), axis))


def _penalty(formula, x, weights, reduction, where, axis_name, **parameters):
    NONNEGATIVE.check(weights=weights)
    return evaluate(formula, (x,), parameters, reduction, where, axis_name, weights=weights)


def _proximal(operator, v, t, **parameters):
    NONNEGATIVE.check(t=t)
    return _at_point(operator, v, t, parameters)


@partial(jax.jit, static_argnums=0)
def _at_point(operator, v, t, parameters):
    check_fits(jnp.shape(v), t=t, **parameters)
    (v, t, *numbers), *_ = lie_alike(promote(v, t, *parameters.values()))
    return _moved(partial(operator, **dict(zip(parameters, numbers, strict=True))), v, t)


def _moved(operator, v, t):
    """What an operator makes of v; v to the bit, and with derivative 1, at a step of 0."""
    still = t == 0
    moved = operator(jnp.where(still, lax.stop_gradient(v), v), t)
    # Of the first only the derivative is looked at, which in t is the operator's.
    return with_value(moved + jnp.where(still, v, 0), jnp.where(still, v, moved))
