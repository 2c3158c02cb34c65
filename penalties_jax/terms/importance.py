"""Importance minimality."""

from collections.abc import Callable

from jax.tree_util import Partial
from jaxtyping import Array, PyTree

from penalties_jax import functional
from penalties_jax._pytree import config, number, option
from penalties_jax.functional.checks import AT_LEAST_ONE, NONNEGATIVE
from penalties_jax.functional.reduction import AxisName
from penalties_jax.terms.base import Numeric, Penalty

__all__ = ["ImportanceMinimality"]


@config
class ImportanceMinimality(Penalty):
    """The total of `pj.importance_minimality` as a config; `parts` has the rest.

    Its metrics are its parts: "total", "sparsity" and "frequency".

    Attributes:
        penalty: That of each value: a config that has `elementwise`, or a function.
        beta, reference_count, axis_name: As in `pj.importance_minimality`.

    Examples:
        >>> penalty = pj.ImportanceMinimality(pj.SmoothL0(gamma=1.0), beta=1.0)
        >>> [float(part) for part in penalty.parts({"mlp": jnp.ones((2, 2))})]
        [2.0, 1.0, 1.0]
    """

    penalty: Penalty | Callable[[Array], Array]
    beta: Numeric = number(default=0.0, valid=NONNEGATIVE)
    reference_count: Numeric | None = number(default=None, valid=AT_LEAST_ONE)
    axis_name: AxisName | None = option(default=None, kw_only=True)

    def __post_init__(self):
        if not isinstance(self.penalty, Penalty):
            if not callable(self.penalty):
                raise TypeError(
                    "ImportanceMinimality.penalty must be a config such as pj.Lp(p=0.4), or a "
                    f"function of each value, got {self.penalty!r}"
                )
            # A function is structure, as an option is.
            object.__setattr__(self, "penalty", Partial(self.penalty))
        super().__post_init__()

    @property
    def class_axis(self) -> int:
        return -1

    def parts(
        self, importances: PyTree, *, where: PyTree | None = None
    ) -> functional.ImportanceLoss:
        """The total and what it is made of: `pj.importance_minimality` with these options."""
        self._check_resolved()
        return functional.importance_minimality(
            importances,
            self.penalty,
            beta=self.beta,
            reference_count=self.reference_count,
            where=where,
            axis_name=self.axis_name,
        )

    def elementwise(self, x: PyTree) -> PyTree:
        raise TypeError("ImportanceMinimality is no per-value penalty: pass its .penalty")

    def value(self, inputs, where):
        (importances,) = inputs
        return self.parts(importances, where=where).total

    def _metrics(self, inputs, where):
        (importances,) = inputs
        return self.parts(importances, where=where)._asdict()
