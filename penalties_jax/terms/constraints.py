"""Structural penalties."""

import jax
import jax.numpy as jnp

from penalties_jax import functional
from penalties_jax._pytree import config, option
from penalties_jax.functional.checks import check_where
from penalties_jax.functional.constraints import Metric, Mode, Rows
from penalties_jax.functional.reduction import Reduction, spread
from penalties_jax.terms.base import Penalty
from penalties_jax.terms.reduced import Reduced

__all__ = ["Consistency", "Orthogonality"]


@config
class Consistency(Reduced):
    """How far two outputs for one input differ: `pj.consistency` as a config.

    Attributes:
        metric, reduction, axis_name: As in `pj.consistency`.

    Examples:
        >>> float(pj.Consistency("l1")(jnp.zeros(2), jnp.array([1.0, 3.0])))
        2.0
    """

    metric: Metric = option(default="mse", choices=Metric)
    reduction: Reduction = option(default="mean", choices=Reduction, kw_only=True)

    _function = staticmethod(functional.consistency)
    _inputs = 2

    @property
    def class_axis(self) -> int | None:
        return -1 if self.metric in ("cosine", "kl") else None

    @property
    def of_distributions(self) -> bool:
        return self.metric == "kl"


@config
class Orthogonality(Penalty):
    """How far rows are from orthogonal: `pj.orthogonality` as a config, summed over a pytree.

    Attributes:
        mode, normalize, axis: As in `pj.orthogonality`. With mode "soft" an entry that `where`
            excludes counts as 0, so that a row of such meets no other; the others take no `where`.

    Examples:
        >>> float(pj.Orthogonality()({"a": jnp.eye(2), "b": jnp.eye(2, 3)}))
        0.0
    """

    mode: Mode = option(default="soft", choices=Mode)
    normalize: bool = option(default=True, kw_only=True)
    axis: Rows = option(default="rows", choices=Rows, kw_only=True)

    @property
    def takes_where(self) -> bool:
        return self.mode == "soft"

    def _value(self, inputs, where):
        (tree,) = inputs
        options = {"mode": self.mode, "normalize": self.normalize, "axis": self.axis}
        leaves, structure = jax.tree.flatten(tree)
        total = jnp.zeros((), jnp.float32)
        for x, mask in zip(leaves, spread("where", where, structure), strict=True):
            check_where(mask, jnp.shape(x))
            x = x if mask is None else jnp.where(mask, x, 0)
            total = total + functional.orthogonality(x, **options)
        return total
