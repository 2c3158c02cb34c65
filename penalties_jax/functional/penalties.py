"""Penalties on values: each is its formula, handed to one reduction."""

from functools import partial
from typing import Literal

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from penalties_jax.functional.decorators import compiled, elementwise_derivatives
from penalties_jax.functional.reduction import (
    Axis,
    AxisName,
    Reduction,
    check_broadcast,
    check_choice,
    check_reduction,
    check_where,
    evaluate,
    norm,
    promote,
    reduce,
)


def l1(
    x: Float[Array, "..."],
    *,
    weights: ArrayLike = 1.0,
    reduction: Reduction = "sum",
    where: Bool[Array, "..."] | None = None,
    axis_name: AxisName | None = None,
) -> Float[Array, "..."]:
    r"""The L1 norm (lasso): $\sum_i w_i |x_i|$.

    The derivative is $w_i \operatorname{sign}(x_i)$, and 0 at 0. An entry of -inf, such as a
    masked-out log-probability, makes the value inf: leave it out with `where`.

    Args:
        x: Values of shape [...], of any real dtype; below 32 bits they are upcast to float32.
        weights: A number (the usual lambda), or an array that broadcasts to `x` (the adaptive
            lasso). "mean" divides by the count, not by the sum of the weights.
        reduction: "sum", "mean" or "none".
        where: Mask that broadcasts to `x`; an excluded entry contributes nothing to the value or
            the gradient, whatever it holds.
        axis_name: Mapped axes over whose members to sum or average.

    Returns:
        A scalar, or an array of the shape of `x` for "none".

    Raises:
        ValueError: If `weights` or `where` does not broadcast to `x`, or `reduction` is unknown.

    References:
        Tibshirani (1996), Regression shrinkage and selection via the lasso. Zou (2006), The
        adaptive lasso and its oracle properties.

    Examples:
        >>> import jax.numpy as jnp
        >>> import penalties_jax as pj
        >>> float(pj.l1(jnp.array([-2.0, 0.0, 1.0])))
        3.0
    """
    return _penalty(absolute, x, weights, reduction, where, axis_name)


def l2(
    x: Float[Array, "..."],
    *,
    center: ArrayLike | Literal["mean"] | None = None,
    clip: ArrayLike | None = None,
    weights: ArrayLike = 1.0,
    reduction: Reduction = "sum",
    where: Bool[Array, "..."] | None = None,
    axis_name: AxisName | None = None,
) -> Float[Array, "..."]:
    r"""The squared L2 norm (ridge): $\sum_i w_i (x_i - c_i)^2$.

    There is no factor 1/2, which `optax.l2_loss` has.

    Args:
        x: Values of shape [...], of any real dtype; below 32 bits they are upcast to float32.
        center: The $c$: a number, an array that broadcasts to `x`, "mean" for the mean of the
            included entries (of all members of `axis_name`), which is differentiated through, or
            None for 0.
        clip: Bound on $|x_i - c_i|$, applied after centering. Beyond it an entry's own term is
            constant, so that -inf is bounded too, unless `center` is "mean".
        weights: A number, or an array that broadcasts to `x`.
        reduction: "sum", "mean" or "none".
        where: Mask that broadcasts to `x`.
        axis_name: Mapped axes over whose members to sum or average.

    Returns:
        A scalar, or an array of the shape of `x` for "none".

    Raises:
        ValueError: If an array does not broadcast to `x`, or an option is unknown.

    References:
        Hoerl & Kennard (1970), Ridge regression: biased estimation for nonorthogonal problems.

    Examples:
        >>> import jax.numpy as jnp
        >>> import penalties_jax as pj
        >>> float(pj.l2(jnp.array([1.0, 3.0])))
        10.0
        >>> float(pj.l2(jnp.array([1.0, 3.0]), center="mean"))
        2.0
    """
    check_reduction(reduction)
    if isinstance(center, str):
        check_choice("center", center, ("mean",))
        return _l2_about_mean(
            x, clip, weights, where=where, reduction=reduction, axis_name=axis_name
        )
    return _penalty(
        _squared_distance, x, weights, reduction, where, axis_name, center=center, clip=clip
    )


def elastic_net(
    x: Float[Array, "..."],
    *,
    l1_ratio: ArrayLike = 0.5,
    weights: ArrayLike = 1.0,
    reduction: Reduction = "sum",
    where: Bool[Array, "..."] | None = None,
    axis_name: AxisName | None = None,
) -> Float[Array, "..."]:
    r"""The elastic net: $\sum_i w_i (a |x_i| + (1 - a) x_i^2)$.

    scikit-learn's $(\alpha, r)$ has a factor 1/2 on the square: it is $a = 2r / (1 + r)$ with
    weight $\alpha (1 + r) / 2$ here.

    Args:
        x: Values of shape [...], of any real dtype; below 32 bits they are upcast to float32.
        l1_ratio: The $a$, in [0, 1]: 1 is the L1 norm, 0 the squared L2 norm.
        weights: A number, or an array that broadcasts to `x`.
        reduction: "sum", "mean" or "none".
        where: Mask that broadcasts to `x`.
        axis_name: Mapped axes over whose members to sum or average.

    Returns:
        A scalar, or an array of the shape of `x` for "none".

    Raises:
        ValueError: If an array does not broadcast to `x`, or `reduction` is unknown.

    References:
        Zou & Hastie (2005), Regularization and variable selection via the elastic net.

    Examples:
        >>> import jax.numpy as jnp
        >>> import penalties_jax as pj
        >>> float(pj.elastic_net(jnp.array([-2.0, 1.0]), l1_ratio=0.5))
        4.0
    """
    return _penalty(_elastic_net, x, weights, reduction, where, axis_name, l1_ratio=l1_ratio)


def lp(
    x: Float[Array, "..."],
    p: ArrayLike,
    *,
    eps: ArrayLike = 1e-12,
    weights: ArrayLike = 1.0,
    reduction: Reduction = "sum",
    where: Bool[Array, "..."] | None = None,
    axis_name: AxisName | None = None,
) -> Float[Array, "..."]:
    r"""The L_p penalty: $\sum_i w_i (|x_i| + \epsilon)^p$.

    The derivative is $p (|x_i| + \epsilon)^{p - 1} \operatorname{sign}(x_i)$, and 0 at 0. For
    p < 1 it grows without bound as x tends to 0, up to what `eps` allows. At x = 0 the value is
    $\epsilon^p$: 1.6e-5 at p = 0.4.

    Args:
        x: Values of shape [...], of any real dtype; below 32 bits they are upcast to float32.
        p: The exponent, above 0: a number, or an array that broadcasts to `x`.
        eps: The $\epsilon$, at least 0.
        weights: A number, or an array that broadcasts to `x`.
        reduction: "sum", "mean" or "none".
        where: Mask that broadcasts to `x`.
        axis_name: Mapped axes over whose members to sum or average.

    Returns:
        A scalar, or an array of the shape of `x` for "none".

    Raises:
        ValueError: If an array does not broadcast to `x`, or `reduction` is unknown.

    References:
        Frank & Friedman (1993), A statistical view of some chemometrics regression tools.

    Examples:
        >>> import jax.numpy as jnp
        >>> import penalties_jax as pj
        >>> round(float(pj.lp(jnp.array([4.0, -9.0]), 0.5)), 5)
        5.0
    """
    return _penalty(_power, x, weights, reduction, where, axis_name, p=p, eps=eps)


def smooth_l0(
    x: Float[Array, "..."],
    gamma: ArrayLike,
    *,
    normalize_at_one: bool = False,
    weights: ArrayLike = 1.0,
    reduction: Reduction = "sum",
    where: Bool[Array, "..."] | None = None,
    axis_name: AxisName | None = None,
) -> Float[Array, "..."]:
    r"""Smooth L0 (Geman-McClure): $\sum_i w_i\, x_i^2 / (x_i^2 + \gamma^2)$.

    It is 0 at 0, 1/2 at $\gamma$, and tends to 1: a count of the entries well above $\gamma$. The
    derivative $2 x \gamma^2 / (x^2 + \gamma^2)^2$ is 0 at 0 and peaks at
    $3 \sqrt 3 / (8 \gamma)$, at $x = \gamma / \sqrt 3$. Nothing overflows on the way: an entry of
    1e30, or inf, counts 1 and has gradient 0.

    Args:
        x: Values of shape [...], of any real dtype; below 32 bits they are upcast to float32.
        gamma: The $\gamma$, above 0, in the units of `x`: a number, or an array that broadcasts to
            `x`.
        normalize_at_one: Multiply by $1 + \gamma^2$, so that x = 1 costs 1 at every gamma.
        weights: A number, or an array that broadcasts to `x`.
        reduction: "sum", "mean" or "none".
        where: Mask that broadcasts to `x`.
        axis_name: Mapped axes over whose members to sum or average.

    Returns:
        A scalar, or an array of the shape of `x` for "none".

    Raises:
        ValueError: If an array does not broadcast to `x`, or `reduction` is unknown.

    References:
        Geman & McClure (1985), Bayesian image analysis: an application to single photon emission
        tomography.

    Examples:
        >>> import jax.numpy as jnp
        >>> import penalties_jax as pj
        >>> float(pj.smooth_l0(jnp.array([0.0, 1.0, 1e6]), gamma=1.0))
        1.5
    """
    formula = _geman_mcclure_at_one if normalize_at_one else _geman_mcclure
    return _penalty(formula, x, weights, reduction, where, axis_name, gamma=gamma)


def log_sum(
    x: Float[Array, "..."],
    eps: ArrayLike = 1.0,
    *,
    weights: ArrayLike = 1.0,
    reduction: Reduction = "sum",
    where: Bool[Array, "..."] | None = None,
    axis_name: AxisName | None = None,
) -> Float[Array, "..."]:
    r"""The log-sum penalty: $\sum_i w_i \ln(1 + |x_i| / \epsilon)$.

    The derivative is $\operatorname{sign}(x_i) / (\epsilon + |x_i|)$, and 0 at 0: the smaller
    `eps`, the nearer to a count of the entries, and the steeper at 0.

    Args:
        x: Values of shape [...], of any real dtype; below 32 bits they are upcast to float32.
        eps: The $\epsilon$, above 0, in the units of `x`: a number, or an array that broadcasts to
            `x`.
        weights: A number, or an array that broadcasts to `x`.
        reduction: "sum", "mean" or "none".
        where: Mask that broadcasts to `x`.
        axis_name: Mapped axes over whose members to sum or average.

    Returns:
        A scalar, or an array of the shape of `x` for "none".

    Raises:
        ValueError: If an array does not broadcast to `x`, or `reduction` is unknown.

    References:
        Candès, Wakin & Boyd (2008), Enhancing sparsity by reweighted l1 minimization.

    Examples:
        >>> import jax.numpy as jnp
        >>> import penalties_jax as pj
        >>> round(float(pj.log_sum(jnp.array([1.0, -3.0]), eps=1.0)), 4)
        2.0794
    """
    return _penalty(_log_magnitude, x, weights, reduction, where, axis_name, eps=eps)


def huber(
    x: Float[Array, "..."],
    delta: ArrayLike = 1.0,
    *,
    weights: ArrayLike = 1.0,
    reduction: Reduction = "sum",
    where: Bool[Array, "..."] | None = None,
    axis_name: AxisName | None = None,
) -> Float[Array, "..."]:
    r"""The Huber penalty: $x_i^2 / 2$ for $|x_i| \le \delta$, else $\delta (|x_i| - \delta / 2)$.

    Also known as the soft L1 (SciPy's `soft_l1` is the pseudo-Huber function).

    Args:
        x: Values of shape [...], of any real dtype; below 32 bits they are upcast to float32.
        delta: The $\delta$, above 0, in the units of `x`: a number, or an array that broadcasts to
            `x`.
        weights: A number, or an array that broadcasts to `x`.
        reduction: "sum", "mean" or "none".
        where: Mask that broadcasts to `x`.
        axis_name: Mapped axes over whose members to sum or average.

    Returns:
        A scalar, or an array of the shape of `x` for "none".

    Raises:
        ValueError: If an array does not broadcast to `x`, or `reduction` is unknown.

    References:
        Huber (1964), Robust estimation of a location parameter.

    Examples:
        >>> import jax.numpy as jnp
        >>> import penalties_jax as pj
        >>> float(pj.huber(jnp.array([1.0, -3.0]), delta=1.0))
        3.0
    """
    return _penalty(huber_loss, x, weights, reduction, where, axis_name, delta=delta)


def group_lasso(
    x: Float[Array, "..."],
    *,
    axis: Axis,
    weights: ArrayLike = 1.0,
    reduction: Reduction = "sum",
    where: Bool[Array, "..."] | None = None,
    axis_name: AxisName | None = None,
) -> Float[Array, "..."]:
    r"""The group lasso: $\sum_g w_g \lVert x_g \rVert_2$, with the groups along `axis`.

    The derivative is $w_g x / \lVert x_g \rVert_2$, and 0 at a group of zeros. Norms are scaled,
    so that 1e30 does not overflow.

    Args:
        x: Values of shape [...], of any real dtype; below 32 bits they are upcast to float32.
        axis: The axis or axes within a group; the other axes count the groups.
        weights: A number, or an array that broadcasts to the shape of the groups. Yuan & Lin
            weight a group by the square root of its size; here it is left to the caller.
        reduction: "sum", "mean" (over the groups with an included entry) or "none".
        where: Mask of entries that broadcasts to `x`.
        axis_name: Mapped axes over whose members to sum or average.

    Returns:
        A scalar, or an array of the shape of the groups for "none".

    Raises:
        ValueError: If `weights` does not broadcast to the groups, `where` does not broadcast to
            `x`, `axis` is not one of its axes, or `reduction` is unknown.

    References:
        Yuan & Lin (2006), Model selection and estimation in regression with grouped variables.

    Examples:
        >>> import jax.numpy as jnp
        >>> import penalties_jax as pj
        >>> float(pj.group_lasso(jnp.array([[3.0, 4.0], [0.0, 0.0]]), axis=1))
        5.0
    """
    check_reduction(reduction)
    return _group_lasso(
        x, weights, axis=axis, where=where, reduction=reduction, axis_name=axis_name
    )


def _penalty(formula, x, weights, reduction, where, axis_name, **parameters):
    check_reduction(reduction)
    return evaluate(
        formula,
        (x,),
        parameters,
        weights=weights,
        where=where,
        reduction=reduction,
        axis_name=axis_name,
    )


@compiled("reduction", "axis_name")
def _l2_about_mean(x, clip, weights, *, where, reduction, axis_name):
    total = partial(evaluate, where=where, axis_name=axis_name)
    center = total(_identity, (x,), {}, weights=1.0, reduction="mean")
    return total(
        _squared_distance,
        (x,),
        {"center": center, "clip": clip},
        weights=weights,
        reduction=reduction,
    )


@compiled("axis", "reduction", "axis_name")
def _group_lasso(x, weights, *, axis, where, reduction, axis_name):
    check_where(where, x.shape)
    (x,) = promote(x)
    groups = None
    if where is not None:
        where = jnp.broadcast_to(where, x.shape)
        groups = jnp.any(where, axis)
        x = jnp.where(where, x, 0)
    norms = norm(x, axis)
    check_broadcast("weights", weights, norms.shape)
    values = weights * norms
    if groups is not None:
        values = jnp.where(groups, jnp.where(groups, weights, 0) * norms, 0)
    return reduce(values, reduction=reduction, where=groups, axis_name=axis_name)


def _identity(x):
    return x


@elementwise_derivatives(jnp.sign)
def absolute(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """|x|, with derivative 0 at 0."""
    return jnp.abs(x)


def _squared_distance(x, center=0.0, clip=None):
    distance = x - center
    if clip is not None:
        distance = jnp.clip(distance, -clip, clip)
    return jnp.square(distance)


def _elastic_net_slope(x, l1_ratio):
    rest = 1 - l1_ratio
    return l1_ratio * jnp.sign(x) + jnp.where((rest > 0) | jnp.isfinite(x), 2 * rest * x, 0)


def _elastic_net_ratio_slope(x, l1_ratio):
    magnitude = absolute(x)
    return magnitude * (1 - magnitude)


@elementwise_derivatives(_elastic_net_slope, _elastic_net_ratio_slope)
def _elastic_net(x, l1_ratio):
    magnitude = jnp.abs(x)
    finite = jnp.minimum(magnitude, jnp.finfo(x.dtype).max)
    return magnitude * (l1_ratio + (1 - l1_ratio) * finite)


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
    return jnp.where(positive, p * _raise(jnp.where(positive, base, 1), p - 1), 0)


@elementwise_derivatives(_power_slope, _power_p_slope, _power_eps_slope)
def _power(x, p, eps):
    return _raise(jnp.abs(x) + eps, p)


def _raise(base, p):
    """base^p for a base of at least 0: as exact as the logarithm, and vectorised on a CPU."""
    return jnp.exp(jnp.where(p == 0, 0, p * jnp.log(base)))


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
    return gamma / (gamma + gamma * jnp.square(gamma / x))


def _geman_mcclure_at_one(x, gamma):
    return (1 + jnp.square(gamma)) * _geman_mcclure(x, gamma)


def _log_slope(x, eps):
    return jnp.sign(x) / (eps + jnp.abs(x))


def _log_eps_slope(x, eps):
    magnitude = absolute(x)
    return -magnitude / (eps * (eps + magnitude))


@elementwise_derivatives(_log_slope, _log_eps_slope)
def _log_magnitude(x, eps):
    magnitude = jnp.abs(x)
    ratio = magnitude / eps
    overflown = jnp.isinf(ratio)
    return jnp.where(
        overflown,
        jnp.log(jnp.where(overflown, magnitude, 1)) - jnp.log(eps),
        jnp.log1p(ratio),
    )


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
