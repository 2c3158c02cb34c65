"""Structural penalties."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.tree_util import Partial

from penalties_jax import functional
from penalties_jax._pytree import abstract, config, number, option
from penalties_jax.functional.checks import FINITE, check_where
from penalties_jax.functional.constraints import Metric, Mode, Rows
from penalties_jax.functional.derivatives import Axis
from penalties_jax.functional.reduction import Reduction, spread
from penalties_jax.terms.base import Numeric, Penalty
from penalties_jax.terms.reduced import Reduced, groups

__all__ = [
    "Consistency",
    "GradientPenalty",
    "InterpolatedGradientPenalty",
    "Orthogonality",
    "OutputMagnitude",
]


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

    def value(self, inputs, where):
        (tree,) = inputs
        options = {"mode": self.mode, "normalize": self.normalize, "axis": self.axis}
        leaves, structure = jax.tree.flatten(tree)
        total = jnp.zeros((), jnp.float32)
        for x, mask in zip(leaves, spread("where", where, structure), strict=True):
            check_where(mask, jnp.shape(x))
            x = x if mask is None else jnp.where(mask, x, 0)
            total = total + functional.orthogonality(x, **options)
        return total


@config
class OutputMagnitude(Reduced):
    """Keeps outputs at a scale: `pj.output_magnitude` as a config, of each array of a pytree.

    Attributes:
        target, axis, reduction, axis_name: As in `pj.output_magnitude`; a mean over a pytree
            divides by the count of all positions. Without an axis its only metric is "raw".

    Examples:
        >>> outputs = {"a": jnp.array([3.0, -3.0]), "b": jnp.ones(4)}
        >>> round(float(pj.OutputMagnitude()(outputs)), 4)
        2.0
    """

    target: Numeric = number(default=1.0, valid=FINITE)
    axis: Axis | None = option(default=None, kw_only=True)
    reduction: Reduction = option(default="mean", choices=Reduction, kw_only=True)

    _function = staticmethod(functional.output_magnitude)

    def _included(self, x, where):
        return groups(x, where, self.axis)

    def _count(self, x, where):
        positions = super()._count(x, where)
        if self.axis is not None or self.axis_name is None:
            return positions
        # One value over all members counts once: each of them that has entries counts a share.
        return positions / jnp.maximum(lax.psum(positions, self.axis_name), 1)

    def _metrics(self, inputs, where):
        if self.axis is not None:
            return super()._metrics(inputs, where)
        return {"raw": self._with(reduction="sum").value(inputs, where)}


@abstract
class OfGradients(Penalty):
    """What gradient penalties share: a function, whose parameters may be an input too."""

    f: Callable[..., Any]
    target_norm: Numeric = number(default=1.0, valid=FINITE, kw_only=True)

    def __post_init__(self):
        super().__post_init__()
        # A function is structure, as an option is.
        object.__setattr__(self, "f", Partial(self.f))

    @property
    def takes(self) -> range:
        return range(self._inputs, self._inputs + 2)

    @property
    def takes_where(self) -> bool:
        return False


@config
class GradientPenalty(OfGradients):
    r"""The gradient penalty of a function: `pj.gradient_penalty` as a config.

    Called with examples x alone, it is that of $f(x_i)$; with (parameters, x), that of
    $f(\text{parameters}, x_i)$, and the parameters, any pytree, get its gradient. So a critic is
    defined once, and what is trained of it comes with the outputs.

    Attributes:
        f: A function of one example, or of parameters and one example; it is told by its identity,
            so that a new lambda is a new program, and a config that holds it can't be serialised.
        target_norm: As in `pj.gradient_penalty`, which takes no `where`.

    Examples:
        >>> critic = lambda weights, x: jnp.dot(weights, x)
        >>> flat = pj.Term(pj.GradientPenalty(critic), on=("weights", "x"), weight=10.0)
        >>> loss = lambda outputs: jnp.mean(outputs["x"] @ outputs["weights"])
        >>> objective = pj.Objective(loss, terms={"flat": flat})
        >>> outputs = {"weights": jnp.array([3.0, 0.0]), "x": jnp.ones((4, 2))}
        >>> float(objective(outputs)[0])
        43.0
    """

    def value(self, inputs, where):
        del where  # none
        *parameters, x = inputs
        f = partial(self.f, *parameters)
        return functional.gradient_penalty(f, x, target_norm=self.target_norm)


@config
class InterpolatedGradientPenalty(OfGradients):
    r"""The gradient penalty between examples: `pj.interpolated_gradient_penalty` as a config.

    Called with (a, b, key) or, of a function of parameters and one example, with
    (parameters, a, b, key).

    Attributes:
        f, target_norm: As in `pj.GradientPenalty`.

    Examples:
        >>> penalty = pj.InterpolatedGradientPenalty(lambda weights, x: jnp.dot(weights, x))
        >>> real, fake, key = jnp.ones((2, 2)), jnp.zeros((2, 2)), jax.random.key(0)
        >>> float(penalty(jnp.array([3.0, 0.0]), real, fake, key))
        4.0
    """

    _inputs = 3

    def value(self, inputs, where):
        del where  # none
        *parameters, a, b, key = inputs
        f = partial(self.f, *parameters)
        return functional.interpolated_gradient_penalty(f, a, b, key, target_norm=self.target_norm)
