"""Distances between samples."""

import jax
import jax.numpy as jnp

from penalties_jax import functional
from penalties_jax._pytree import config, number, option
from penalties_jax.functional.checks import POSITIVE
from penalties_jax.functional.reduction import leaves_by_name
from penalties_jax.terms.base import Numeric, Penalty

__all__ = ["MMD"]


@config
class MMD(Penalty):
    """The squared maximum mean discrepancy: `pj.mmd` as a config, summed over two pytrees.

    Attributes:
        scales, unbiased: As in `pj.mmd`, which takes no `where`.

    Examples:
        >>> x, y = jnp.array([[0.0], [1.0]]), jnp.array([[1.0], [0.0]])
        >>> round(abs(float(pj.MMD()(x, y))), 6)
        0.0
    """

    scales: Numeric = number(default=(1.0,), valid=POSITIVE)
    unbiased: bool = option(default=False, kw_only=True)

    _inputs = 2

    @property
    def takes_where(self) -> bool:
        return False

    def value(self, inputs, where):
        del where  # none
        a, b = inputs
        pairs = zip(
            jax.tree.leaves(a),
            leaves_by_name("the second input", b, jax.tree.structure(a)),
            strict=True,
        )
        values = [
            functional.mmd(*pair, scales=self.scales, unbiased=self.unbiased) for pair in pairs
        ]
        return sum(values, start=jnp.zeros((), jnp.float32))
