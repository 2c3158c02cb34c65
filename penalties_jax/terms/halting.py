"""What steps cost."""

from typing import Literal

from penalties_jax import functional
from penalties_jax._pytree import abstract, config, number, option
from penalties_jax.functional.checks import FINITE, UNIT
from penalties_jax.functional.reduction import Reduction
from penalties_jax.terms.base import Numeric
from penalties_jax.terms.divergences import by_input
from penalties_jax.terms.reduced import Reduced

__all__ = ["PonderCost", "PonderDivergence"]

Inputs = Literal["probabilities", "logits"]


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
    """PonderNet's KL of halting to a geometric prior: `pj.ponder_divergence` as a config.

    Attributes:
        rate, weights, reduction, axis_name: As in `pj.ponder_divergence`.
        inputs: "probabilities", of halting; or "logits" for `pj.ponder_divergence_from_logits`.

    Examples:
        >>> round(float(pj.PonderDivergence(rate=0.5)(jnp.full(3, 0.5))), 4)
        0.0398
        >>> round(float(pj.PonderDivergence(rate=0.5, inputs="logits")(jnp.zeros(3))), 4)
        0.0398
    """

    rate: Numeric = number(valid=UNIT)
    inputs: Inputs = option(default="probabilities", choices=Inputs, kw_only=True)

    _functions = by_input(
        Inputs, functional.ponder_divergence, functional.ponder_divergence_from_logits
    )
    measured_as = "ponder_divergence"

    def _pure(self):
        return self._functions[self.inputs]
