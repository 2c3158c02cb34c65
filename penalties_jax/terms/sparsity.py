"""Targets for the rate of skipped work."""

import jax
import jax.numpy as jnp
from jax import lax

from penalties_jax import functional
from penalties_jax._pytree import config, number, option
from penalties_jax.functional.checks import POSITIVE, UNIT, check_fits
from penalties_jax.functional.derivatives import Axis
from penalties_jax.functional.reduction import Reduction, spread
from penalties_jax.functional.sparsity import Kind
from penalties_jax.terms.base import Numeric, is_absent
from penalties_jax.terms.penalties import L1
from penalties_jax.terms.reduced import Reduced

__all__ = ["SparsityTarget"]


@config
class SparsityTarget(Reduced):
    """How far rates of skipped work are from a target: `pj.sparsity_target_loss` as a config.

    Takes rates of any shape or, with `from_mask`, masks [...] of which it takes one rate an array:
    of the whole array, or along `axis`. `where` then says which entries of a mask exist.

    Its metrics are those of the losses, and "rate" and "target", the mean rate and its target.

    Attributes:
        target, kind, delta: As in `pj.sparsity_target_loss`.
        from_mask: Whether inputs are masks: 1 is computed, 0 is skipped.
        axis: With `from_mask`, the axes that a rate runs over; all if None.
        reduction, axis_name: As in `pj.sparsity_target_loss`.

    Examples:
        >>> masks = {"first": jnp.array([1.0, 0.0]), "second": jnp.array([1.0, 1.0])}
        >>> float(pj.SparsityTarget(target=0.5, kind="l1", from_mask=True)(masks))
        0.25
    """

    target: Numeric = number(valid=UNIT)
    kind: Kind = option(default="l2", choices=Kind)
    delta: Numeric = number(default=0.1, valid=POSITIVE, kw_only=True)
    from_mask: bool = option(default=False, kw_only=True)
    axis: Axis | None = option(default=None, kw_only=True)
    reduction: Reduction = option(default="mean", choices=Reduction, kw_only=True)

    _function = staticmethod(functional.sparsity_target_loss)

    def value(self, inputs, where):
        if not self.from_mask:
            return super().value(inputs, where)
        of_rates, rates, included = self._of_rates(inputs, where)
        return of_rates.value((rates,), included)

    def _metrics(self, inputs, where):
        of_rates, rates, included = self._of_rates(inputs, where)
        ones = jax.tree.map(jnp.ones_like, rates)
        mean = L1(reduction="mean", axis_name=of_rates.axis_name)
        return {
            **super(SparsityTarget, of_rates)._metrics((rates,), included),
            "rate": mean.value((rates,), included),
            "target": mean._with(weights=of_rates.target).value((ones,), included),
        }

    def _of_rates(self, inputs, where):
        """The same of rates, the rates, and which of them exist."""
        if not self.from_mask:
            return self, *inputs, where
        masks, structure = jax.tree.flatten(inputs[0], is_leaf=is_absent)
        rates, included = [], []
        for mask, exists in zip(masks, spread("where", where, structure), strict=True):
            rates.append(mask if is_absent(mask) else self._rate(mask, exists))
            included.append(exists if is_absent(mask) else self._any_included(mask, exists))
        # A rate over the global batch is the same on every member: its loss counts once.
        of_rates = self._with(from_mask=False, axis_name=None)
        return of_rates, structure.unflatten(rates), structure.unflatten(included)

    def _of_arrays(self, row, where, reduction):
        # Else every rate of a tree would be compared with the targets of all of them.
        check_fits(jnp.shape(row[0]), target=self.target)
        return super()._of_arrays(row, where, reduction)

    def _rate(self, mask, where):
        options = {"axis": self.axis, "where": where, "axis_name": self.axis_name}
        return functional.sparsity_rate(mask, **options)

    def _any_included(self, mask, where):
        if where is None:
            return None
        included = jnp.any(jnp.broadcast_to(where, jnp.shape(mask)), self.axis)
        name = self.axis_name
        return included if name is None else lax.psum(included.astype(jnp.int32), name) > 0
