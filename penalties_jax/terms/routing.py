"""Penalties of a router."""

import jax
import jax.numpy as jnp

from penalties_jax import functional
from penalties_jax._pytree import config, number, option
from penalties_jax.functional.checks import FINITE
from penalties_jax.functional.reduction import AxisName, Reduction, leaves_by_name, spread
from penalties_jax.terms.base import Numeric, Penalty
from penalties_jax.terms.reduced import Reduced

__all__ = ["LoadBalance", "RouterZLoss"]


@config
class LoadBalance(Penalty):
    """`pj.load_balance` of probabilities and assignments as a config, summed over two pytrees.

    So a dict of layers has one loss for each.

    Attributes:
        axis_name: As in `pj.load_balance`.

    Examples:
        >>> probabilities, assigned = jnp.array([[0.75, 0.25]]), jnp.array([[1, 0]])
        >>> float(pj.LoadBalance()(probabilities, assigned))
        1.5
    """

    axis_name: AxisName | None = option(default=None, kw_only=True)

    _inputs = 2
    measured_as = "load_balance"

    @property
    def class_axis(self) -> int:
        return -1

    def value(self, inputs, where):
        probabilities, structure = jax.tree.flatten(inputs[0])
        assigned = leaves_by_name("the second input", inputs[1], structure)
        masks = spread("where", where, structure)
        values = [
            functional.load_balance(*pair, where=mask, axis_name=self.axis_name)
            for *pair, mask in zip(probabilities, assigned, masks, strict=True)
        ]
        return sum(values, start=jnp.zeros((), jnp.float32))


@config
class RouterZLoss(Reduced):
    """ST-MoE's penalty of a router's logits: `pj.router_z_loss` as a config.

    Attributes:
        class_axis_name, weights, reduction, axis_name: As in `pj.router_z_loss`.

    Examples:
        >>> round(float(pj.RouterZLoss()(jnp.log(jnp.array([[1.0, 2.0]])))), 4)
        1.2069
    """

    class_axis_name: AxisName | None = option(default=None, kw_only=True)
    weights: Numeric = number(default=1.0, valid=FINITE, kw_only=True)
    reduction: Reduction = option(default="mean", choices=Reduction, kw_only=True)

    _function = staticmethod(functional.router_z_loss)
    measured_as = "router_z_loss"

    @property
    def class_axis(self) -> int:
        return -1
