r"""Proximal operators: $\operatorname{prox}_{t f}(v) = \arg\min_z \tfrac12 (z - v)^2 + t f(z)$.

Each takes the point `v`, an array of shape [...], and the step `t`: the step size times the weight
of the penalty, at least 0, a number or an array that broadcasts to `v`. The result has the shape of
`v`; below 32 bits it is computed in float32 and returned so.

Source for all of them: Parikh & Boyd (2014), Proximal algorithms.
"""

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from penalties_jax.functional.decorators import compiled
from penalties_jax.functional.reduction import Axis, check_broadcast, direction, norm, promote


@compiled()
def prox_l1(v: Float[Array, "..."], t: ArrayLike) -> Float[Array, "..."]:
    r"""Soft thresholding, $\operatorname{sign}(v) \max(|v| - t, 0)$: the proximal operator of |z|.

    Args:
        v: Point of shape [...].
        t: Step that broadcasts to `v`.

    Raises:
        ValueError: If `t` does not broadcast to `v`.

    References:
        Donoho & Johnstone (1994), Ideal spatial adaptation by wavelet shrinkage.

    Examples:
        >>> import jax.numpy as jnp
        >>> from penalties_jax.functional import prox_l1
        >>> prox_l1(jnp.array([-3.0, 0.5, 2.0]), 1.0).tolist()
        [-2.0, 0.0, 1.0]
    """
    v, t = _point_and_step(v, t)
    return jnp.sign(v) * jnp.maximum(jnp.abs(v) - t, 0)


@compiled()
def prox_l2(
    v: Float[Array, "..."], t: ArrayLike, *, center: ArrayLike = 0.0
) -> Float[Array, "..."]:
    r"""$c + (v - c) / (1 + 2 t)$: the proximal operator of $(z - c)^2$.

    Args:
        v: Point of shape [...].
        t: Step that broadcasts to `v`.
        center: The $c$, a number or an array that broadcasts to `v`.

    Raises:
        ValueError: If `t` or `center` does not broadcast to `v`.

    References:
        Parikh & Boyd (2014), Proximal algorithms, section 6.1.1.

    Examples:
        >>> import jax.numpy as jnp
        >>> from penalties_jax.functional import prox_l2
        >>> prox_l2(jnp.array([3.0]), 1.0).tolist()
        [1.0]
    """
    v, t = _point_and_step(v, t)
    check_broadcast("center", center, v.shape)
    center = jnp.asarray(center)
    return center + (v - center) / (1 + 2 * t)


@compiled()
def prox_elastic_net(
    v: Float[Array, "..."], t: ArrayLike, *, l1_ratio: ArrayLike = 0.5
) -> Float[Array, "..."]:
    r"""Soft threshold at $t a$, then divide by $1 + 2 t (1 - a)$, for $a |z| + (1 - a) z^2$.

    Args:
        v: Point of shape [...].
        t: Step that broadcasts to `v`.
        l1_ratio: The $a$, in [0, 1].

    Raises:
        ValueError: If `t` or `l1_ratio` does not broadcast to `v`.

    References:
        Zou & Hastie (2005), Regularization and variable selection via the elastic net.

    Examples:
        >>> import jax.numpy as jnp
        >>> from penalties_jax.functional import prox_elastic_net
        >>> prox_elastic_net(jnp.array([0.25, 2.5]), 1.0, l1_ratio=0.5).tolist()
        [0.0, 1.0]
    """
    v, t = _point_and_step(v, t)
    check_broadcast("l1_ratio", l1_ratio, v.shape)
    return prox_l1(v, t * l1_ratio) / (1 + 2 * t * (1 - l1_ratio))


@compiled()
def prox_huber(
    v: Float[Array, "..."], t: ArrayLike, *, delta: ArrayLike = 1.0
) -> Float[Array, "..."]:
    r"""$v / (1 + t)$ where $|v| \le \delta (1 + t)$, else $v - t \delta \operatorname{sign}(v)$.

    Args:
        v: Point of shape [...].
        t: Step that broadcasts to `v`.
        delta: The $\delta$ of the Huber penalty, above 0.

    Raises:
        ValueError: If `t` or `delta` does not broadcast to `v`.

    References:
        Beck (2017), First-order methods in optimization, example 6.54.

    Examples:
        >>> import jax.numpy as jnp
        >>> from penalties_jax.functional import prox_huber
        >>> prox_huber(jnp.array([1.0, 5.0]), 1.0, delta=1.0).tolist()
        [0.5, 4.0]
    """
    v, t = _point_and_step(v, t)
    check_broadcast("delta", delta, v.shape)
    inside = jnp.abs(v) <= delta * (1 + t)
    return jnp.where(inside, v / (1 + t), v - jnp.where(inside, 0, t * delta) * jnp.sign(v))


@compiled("axis")
def prox_group_lasso(v: Float[Array, "..."], t: ArrayLike, *, axis: Axis) -> Float[Array, "..."]:
    r"""Block soft thresholding, $v_g \max(1 - t / \lVert v_g \rVert_2, 0)$.

    Args:
        v: Point of shape [...].
        t: Step, a number or an array that broadcasts to the shape of the groups: that of `v`
            without `axis`.
        axis: The axis or axes within a group.

    Raises:
        ValueError: If `t` does not broadcast to the groups.

    References:
        Yuan & Lin (2006), Model selection and estimation in regression with grouped variables.

    Examples:
        >>> import jax.numpy as jnp
        >>> from penalties_jax.functional import prox_group_lasso
        >>> prox_group_lasso(jnp.array([[3.0, 4.0], [0.0, 1.0]]), 2.5, axis=1).tolist()
        [[1.5, 2.0], [0.0, 0.0]]
    """
    (v,) = promote(v)
    norms = norm(v, axis)
    check_broadcast("t", t, norms.shape)
    return direction(v, axis) * jnp.expand_dims(jnp.maximum(norms - t, 0), axis)


def _point_and_step(v, t):
    (v,) = promote(v)
    check_broadcast("t", t, v.shape)
    return v, jnp.asarray(t)
