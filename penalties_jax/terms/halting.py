"""What steps cost."""

from penalties_jax import functional
from penalties_jax._pytree import abstract, config, number, option
from penalties_jax.functional.checks import FINITE, UNIT
from penalties_jax.functional.reduction import Reduction
from penalties_jax.terms.base import Numeric
from penalties_jax.terms.reduced import Reduced

__all__ = ["PonderCost", "PonderDivergence"]


@abstract
class OfSteps(Reduced):
    """A penalty of positions, whose steps are on the last axis."""

    weights: Numeric = number(default=1.0, valid=FINITE, kw_only=True)
    reduction: Reduction = option(default="mean", choices=Reduction, kw_only=True)

    @property
    def class_axis(self) -> int:
        return -1


@config
class PonderCost(OfSteps):
    """Graves' cost of halting probabilities, N + R: `pj.ponder_cost` as a config.

    Attributes:
        epsilon, weights, reduction, axis_name: As in `pj.ponder_cost`.

    Examples:
        >>> float((0.01 * pj.PonderCost())(jnp.array([0.5, 0.25, 0.5, 0.5])) * 100)
        3.25
    """

    epsilon: Numeric = number(default=0.01, valid=UNIT)

    _function = staticmethod(functional.ponder_cost)
    measured_as = "ponder_cost"


@config
class PonderDivergence(OfSteps):
    """PonderNet's KL of halting logits to a geometric prior: `pj.ponder_divergence` as a config.

    Attributes:
        rate, weights, reduction, axis_name: As in `pj.ponder_divergence`.

    Examples:
        >>> round(float(pj.PonderDivergence(rate=0.5)(jnp.zeros(3))), 4)
        0.0398
    """

    rate: Numeric = number(valid=UNIT)

    _function = staticmethod(functional.ponder_divergence)
    measured_as = "ponder_divergence"
