"""Averages by token and by sequence, as what a term does with the values of its penalty."""

from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, Real

from penalties_jax import functional
from penalties_jax._pytree import config, number, option, refuse_schedules
from penalties_jax.functional.averages import Sequences, Tokens, check_divisors
from penalties_jax.functional.checks import AT_LEAST_ONE, POSITIVE
from penalties_jax.functional.reduction import AxisName
from penalties_jax.terms.base import Config, Numeric

__all__ = ["Aggregate"]


@config
class Aggregate(Config):
    """How values [batch, time] are averaged: `pj.aggregate` as a config.

    In `pj.Term(..., aggregate=pj.Aggregate(...))` it takes the place of a penalty's reduction.

    Attributes:
        tokens, sequences, num_segments, length, normalizer, axis_name: As in `pj.aggregate`.
            Numbers can't be schedules; a normalizer that comes with the batch goes to the term.

    Examples:
        >>> losses = jnp.array([[1.0, 3.0, 9.0], [4.0, 9.0, 9.0]])
        >>> mask = jnp.array([[True, True, False], [True, False, False]])
        >>> float(pj.Aggregate(tokens="sum")(losses, where=mask))
        4.0
    """

    tokens: Tokens = option(default="mean", choices=Tokens)
    sequences: Sequences = option(default="mean", choices=Sequences)
    num_segments: int | None = option(default=None, valid=AT_LEAST_ONE, kw_only=True)
    length: Numeric | None = number(default=None, valid=POSITIVE, single=True, kw_only=True)
    normalizer: Numeric | None = number(default=None, valid=POSITIVE, single=True, kw_only=True)
    axis_name: AxisName | None = option(default=None, kw_only=True)

    def __post_init__(self):
        super().__post_init__()
        refuse_schedules(self, "length", "normalizer")
        check_divisors(self.tokens, self.sequences, length=self.length, normalizer=self.normalizer)

    def __call__(
        self,
        values: Real[ArrayLike, "batch time"],
        *,
        where: Bool[ArrayLike, "..."] | None = None,
        segment_ids: Int[ArrayLike, "batch time"] | None = None,
    ) -> Float[Array, ""]:
        """The average of values, as `pj.aggregate` gives it."""
        return functional.aggregate(
            values,
            where=where,
            tokens=self.tokens,
            sequences=self.sequences,
            segment_ids=segment_ids,
            num_segments=self.num_segments,
            length=self.length,
            normalizer=self.normalizer,
            axis_name=self.axis_name,
        )
