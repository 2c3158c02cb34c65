"""What modules share that compute some of their positions and skip the others."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Bool, Float

from penalties_jax.functional.checks import check_same_shape, option_of
from penalties_jax.functional.reduction import varies_over
from penalties_jax.functional.sparsity import (
    Active,
    between,
    check_capacity,
    scatter_active,
    sparsity_rate,
    take_first,
)
from penalties_jax.nnx.base import Configured, Measurement
from penalties_jax.terms.base import Numeric

Compute = Literal["mask", "gather"]

# The slots that there are, for each that a target leaves to compute.
HEAD_ROOM = 1.1
# How many capacities evaluation chooses from, from the module's own to all positions.
SIZES = 4


class Skipping(Configured):
    """A module that computes positions at which a gate is open, masked or gathered.

    Attributes:
        compute: Whether all positions are computed and then masked ("mask"), or only as many as
            there is room for ("gather").
        capacity: How much room "gather" has: how many positions of each example. None is `share`
            of them, what the target at construction leaves, times 1.1.
    """

    def __init__(self, compute: Compute, capacity: int | None, target: Numeric):
        super().__init__()
        self.compute = option_of(Compute)("compute", compute)
        self.capacity = option_of(int | None)("capacity", capacity)
        if compute == "mask" and capacity is not None:
            raise ValueError(f"capacity is that of compute='gather', got {capacity} for 'mask'")
        if capacity is not None and capacity < 1:
            raise ValueError(f"capacity must be at least 1, got {capacity}")
        plain = isinstance(target, (int, float))
        self.share = min(1.0, HEAD_ROOM * (1 - target)) if plain else None
        if compute == "gather" and capacity is None and not plain:
            raise ValueError(
                f"capacity= is needed where the target is no plain number, got {target!r}: "
                "how much is computed is part of the program"
            )
        self.rate = Measurement.none_yet()
        self.computed = Measurement.none_yet()
        self.dropped = Measurement.none_yet()

    def _compute(
        self,
        run: Callable[[Array, Active | None, Array], Array],
        x: Float[Array, "*batch n d"],
        mask: Float[Array, "*batch n"],
        settled: Float[Array, "*batch n"],
        logits: Float[Array, "*batch n"],
        where: Bool[Array, "*batch n"] | None,
        capacity: int | None,
    ) -> Array:
        """What `run` makes of the positions that are computed; measures how many those are.

        Args:
            run: From values, where they were taken from (None for everywhere), and the mask of all
                positions that is left of what is dropped, to the output.
            x: What lies at the positions.
            mask: The gates, from which positions are dropped that there is no room for: those that
                are least open first, among equal ones those of the lowest logits.
            settled: The gates without noise, whose rate is measured.
            logits: The importance of the positions.
            where: Which positions exist; the others are skipped, and not counted.
            capacity: How many to compute. None is the module's own in training; in evaluation the
                least of `SIZES` that has room for the open gates of the fullest example.
        """
        size = x.shape[-2]
        if capacity is not None:
            check_capacity(capacity, size)
        if where is not None:
            where = jnp.broadcast_to(where, mask.shape)
            mask = jnp.where(where, mask, 0)

        def at(capacity):
            if capacity == size:
                return run(x, None, mask), mask
            values, active = take_first(x, (mask, logits), where, capacity=capacity)
            ones = jnp.ones(active.mask.shape, mask.dtype)
            computed = scatter_active(ones, active, jnp.zeros_like(mask), gate=mask)
            return run(values, active, computed), computed

        if capacity is not None or not self.deterministic:
            output, computed = at(self._room(size) if capacity is None else capacity)
        else:
            sizes = self._sizes(size)
            needed = jnp.max(jnp.sum(mask > 0, -1), initial=0)
            # Members of a mapped axis take one branch: the sum of their gradients may lie in it.
            if axes := varies_over(needed):
                needed = lax.pmax(needed, tuple(axes))
            chosen = jnp.searchsorted(jnp.array(sizes), needed)
            branches = [partial(at, capacity) for capacity in sizes]
            if isinstance(chosen, Tracer):
                output, computed = lax.switch(chosen, branches)
            else:
                # Outside of jit a switch would be compiled at each call.
                output, computed = branches[int(chosen)]()
        self._measure(settled, mask, computed, where)
        return output

    def _measure(
        self,
        settled: Float[Array, "*batch n"],
        mask: Float[Array, "*batch n"],
        computed: Float[Array, "*batch n"],
        where: Bool[Array, "..."] | None,
    ) -> None:
        """Remembers the rate of the gates without noise, and how many are computed and dropped."""
        self.rate[...] = sparsity_rate(settled, where=where)
        examples = max(1, math.prod(mask.shape[:-1]))
        count = partial(jnp.sum, dtype=jnp.float32)
        self.computed[...] = count(lax.stop_gradient(computed)) / examples
        self.dropped[...] = count(lax.stop_gradient(mask - computed)) / examples

    def _room(self, size: int) -> int:
        """How many of `size` positions are computed in training."""
        if self.compute == "mask":
            return size
        if self.capacity is not None:
            check_capacity(self.capacity, size)
            return self.capacity
        if self.share is None:
            raise ValueError("capacity= is needed where the target is no plain number")
        return max(1, min(size, math.ceil(self.share * size)))

    def _sizes(self, size: int) -> list[int]:
        least = self._room(size)
        steps = SIZES - 1
        return sorted({least + math.ceil(i * (size - least) / steps) for i in range(SIZES)})

    def get_sparsity_stats(self) -> dict[str, Float[Array, ""]]:
        """What the last call skipped, and the target.

        "sparsity_ratio" is the rate of closed gates without noise, as in evaluation. With noise,
        "num_computed" is how many gates were open and computed, "dropped" how many open ones there
        was no room for: means over the examples, from 0 to the number of positions.
        """
        return {
            "sparsity_ratio": self.rate[...],
            "num_computed": self.computed[...],
            "dropped": self.dropped[...],
            "target_sparsity": self._target(),
        }

    def _target(self) -> Any:
        raise NotImplementedError


def existing(x: Float[Array, "*batch n d"], where: Bool[Array, "..."] | None) -> Array:
    """What lies at the positions, with 0 where none is: there may be anything."""
    if where is None:
        return x
    return jnp.where(jnp.broadcast_to(where, x.shape[:-1])[..., None], x, 0)


def put_back(
    values: Array, active: Active | None, like: Array, gate: Float[Array, "*batch n"]
) -> Array:
    """`pj.scatter_active`, also of all positions."""
    if active is None:
        check_same_shape(values=values, like=like)
        return between(like, values, gate[..., None])
    return scatter_active(values, active, like, gate=gate)
