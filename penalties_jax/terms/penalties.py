"""Penalties on values."""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import PyTree

from penalties_jax import functional
from penalties_jax._pytree import config, number, option
from penalties_jax.functional.checks import ABOVE_ONE, ABOVE_TWO, NONNEGATIVE, POSITIVE, UNIT
from penalties_jax.functional.derivatives import Axis
from penalties_jax.terms.base import BETWEEN, FIRST, Numeric, Penalty
from penalties_jax.terms.reduced import Separable, Weighted, groups

__all__ = [
    "L1",
    "L2",
    "MCP",
    "SCAD",
    "ElasticNet",
    "GroupLasso",
    "Huber",
    "LogSum",
    "Lp",
    "SmoothL0",
    "SpectralNorm",
]


@config
class L1(Separable):
    """The L1 norm: `pj.l1` as a config, of an array or of every array of a pytree.

    Attributes:
        weights: As in `pj.l1`, or a pytree of such like the input.
        reduction, axis_name: As in `pj.l1`; a mean over a pytree divides by the count of them all.

    Examples:
        >>> penalty = 0.5 * pj.L1()
        >>> float(penalty(jnp.array([1.0, -3.0])))
        2.0
        >>> penalty.prox(jnp.array([1.0, -3.0]), 1.0).tolist()
        [0.5, -2.5]
    """

    _function = staticmethod(functional.l1)
    _prox = staticmethod(functional.prox_l1)
    _order = BETWEEN
    measured_as = "l1"


@config
class L2(Separable):
    """The squared L2 norm: `pj.l2` as a config, with `prox` unless about the mean or clipped.

    Attributes:
        center: As in `pj.l2`, or a pytree of such like the input; "mean" is that of each array.
        clip: As in `pj.l2`.
        weights, reduction, axis_name: As in `pj.L1`.

    Examples:
        >>> pretrained = {"kernel": jnp.ones(2), "bias": jnp.zeros(1)}
        >>> float(pj.L2(center=pretrained)({"kernel": jnp.zeros(2), "bias": jnp.ones(1)}))
        3.0
    """

    center: Numeric | Literal["mean"] | None = number(default=None, choices=Literal["mean"])
    clip: Numeric | None = number(default=None, valid=POSITIVE)

    _function = staticmethod(functional.l2)
    _prox = staticmethod(functional.prox_l2)
    _order = FIRST
    measured_as = "l2"

    def elementwise(self, x: PyTree) -> PyTree:
        if isinstance(self.center, str):
            return Penalty.elementwise(self, x)
        return super().elementwise(x)

    def _proximal_parts(self, leaves, structure, step_size):
        if isinstance(self.center, str) or self.clip is not None:
            raise self._without_prox()
        return super()._proximal_parts(leaves, structure, step_size)

    def _curvature(self, step):
        return 2 * step


@config
class ElasticNet(Separable):
    """The elastic net: `pj.elastic_net` as a config.

    Attributes:
        l1_ratio: As in `pj.elastic_net`.
        weights, reduction, axis_name: As in `pj.L1`.

    Examples:
        >>> float(pj.ElasticNet(l1_ratio=0.5)(jnp.array([-2.0, 1.0])))
        4.0
    """

    l1_ratio: Numeric = number(default=0.5, valid=UNIT)

    _function = staticmethod(functional.elastic_net)
    _prox = staticmethod(functional.prox_elastic_net)
    _order = BETWEEN

    def _curvature(self, step):
        return 2 * step * (1 - self.l1_ratio)


@config
class Lp(Separable):
    """The L_p penalty: `pj.lp` as a config.

    Attributes:
        p, eps: As in `pj.lp`.
        weights, reduction, axis_name: As in `pj.L1`.

    Examples:
        >>> penalty = pj.Lp(p=pj.anneal(2.0, 1.0, start=0, end=100))
        >>> float(penalty.at(100)(jnp.array([-2.0, 1.0])))
        3.0
    """

    p: Numeric = number(valid=POSITIVE)
    eps: Numeric = number(default=1e-12, valid=NONNEGATIVE)

    _function = staticmethod(functional.lp)


@config
class SmoothL0(Separable):
    """Smooth L0 (Geman-McClure): `pj.smooth_l0` as a config.

    Attributes:
        gamma, normalize_at_one: As in `pj.smooth_l0`.
        weights, reduction, axis_name: As in `pj.L1`.

    Examples:
        >>> float(pj.SmoothL0(gamma=1.0)(jnp.array([0.0, 1.0, 1e6])))
        1.5
    """

    gamma: Numeric = number(valid=POSITIVE)
    normalize_at_one: bool = option(default=False, kw_only=True)

    _function = staticmethod(functional.smooth_l0)


@config
class LogSum(Separable):
    """The log-sum penalty: `pj.log_sum` as a config.

    Attributes:
        eps: As in `pj.log_sum`.
        weights, reduction, axis_name: As in `pj.L1`.

    Examples:
        >>> round(float(pj.LogSum(eps=0.5)(jnp.array([0.5, 0.0]))), 4)
        0.6931
    """

    eps: Numeric = number(default=1.0, valid=POSITIVE)

    _function = staticmethod(functional.log_sum)


@config
class Huber(Separable):
    """The Huber penalty: `pj.huber` as a config.

    Attributes:
        delta: As in `pj.huber`.
        weights, reduction, axis_name: As in `pj.L1`.

    Examples:
        >>> float(pj.Huber(delta=1.0)(jnp.array([1.0, -3.0])))
        3.0
    """

    delta: Numeric = number(default=1.0, valid=POSITIVE)

    _function = staticmethod(functional.huber)
    _prox = staticmethod(functional.prox_huber)


@config
class MCP(Separable):
    """The minimax concave penalty: `pj.mcp` as a config.

    Attributes:
        gamma, lam: As in `pj.mcp`.
        weights, reduction, axis_name: As in `pj.L1`.

    Examples:
        >>> float(pj.MCP(gamma=2.0)(jnp.array([1.0, -5.0])))
        1.75
    """

    gamma: Numeric = number(valid=ABOVE_ONE)
    lam: Numeric = number(default=1.0, valid=NONNEGATIVE)

    _function = staticmethod(functional.mcp)
    _prox = staticmethod(functional.prox_mcp)


@config
class SCAD(Separable):
    """The smoothly clipped absolute deviation: `pj.scad` as a config.

    Attributes:
        a, lam: As in `pj.scad`.
        weights, reduction, axis_name: As in `pj.L1`.

    Examples:
        >>> float(pj.SCAD(a=3.0)(jnp.array([1.0, -5.0])))
        3.0
    """

    a: Numeric = number(default=3.7, valid=ABOVE_TWO)
    lam: Numeric = number(default=1.0, valid=NONNEGATIVE)

    _function = staticmethod(functional.scad)
    _prox = staticmethod(functional.prox_scad)


@config
class GroupLasso(Weighted):
    """The group lasso: `pj.group_lasso` as a config, of each array of a pytree by itself.

    Attributes:
        axis: As in `pj.group_lasso`: 0 for the columns of a kernel [in, out].
        weights, reduction, axis_name: As in `pj.group_lasso`; weights as in `pj.L1` too.

    Examples:
        >>> float(pj.GroupLasso(axis=1)(jnp.array([[3.0, 4.0], [0.0, 0.0]])))
        5.0
    """

    axis: Axis = option()

    _function = staticmethod(functional.group_lasso)
    _prox = staticmethod(functional.prox_group_lasso)

    def _included(self, x, where):
        return groups(x, where, self.axis)


@config
class SpectralNorm(Weighted):
    """The spectral norm: `pj.spectral_norm` as a config, of each array of a pytree by itself.

    A kernel of a convolution, [height, width, in, out], is a matrix [in, out] for each offset.

    Attributes:
        weights, reduction, axis_name: As in `pj.spectral_norm`; weights as in `pj.L1` too.

    Examples:
        >>> params = {"kernel": jnp.array([[3.0, 0.0], [0.0, 4.0]]), "bias": None}
        >>> float(pj.SpectralNorm()(params))
        4.0
    """

    _function = staticmethod(functional.spectral_norm)

    def _included(self, x, where):
        return jnp.shape(x)[:-2], where
