"""Schedules: functions of the step that are pytrees, so that annealing never recompiles."""

import math
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from penalties_jax._pytree import Pytree, Schedule, config, number, option, refuse_schedules
from penalties_jax.functional.checks import PLAIN, public
from penalties_jax.functional.reduction import wide

__all__ = ["anneal", "anneal_fraction"]

Shape = Literal["linear", "cosine", "exponential", "cubic", "quarters"]


@config
class Anneal(Pytree, Schedule):
    """A value that moves from `init` to `final` between two steps; made by `pj.anneal`."""

    init: Any = number(single=True)
    final: Any = number(single=True)
    start: Any = number(single=True)
    end: Any = number(single=True)
    shape: Shape = option(default="linear", choices=Shape, kw_only=True)

    def __post_init__(self):
        super().__post_init__()
        refuse_schedules(self, "init", "final", "start", "end")
        if _plain(self.start, self.end) and not np.all(self.start <= self.end):
            raise ValueError(f"start must be at most end, got start={self.start}, end={self.end}")
        known = self.shape == "exponential" and _plain(self.init, self.final)
        if known and not np.all(np.sign(self.init) * np.sign(self.final) > 0):
            raise ValueError(
                "an exponential anneal needs init and final nonzero and of one sign, "
                f"got init={self.init}, final={self.final}"
            )

    def constant(self, value: Any) -> "Anneal":
        """One of the same steps and shape that is `value` at all of them."""
        return self._with(init=value, final=value)

    def endpoints(self) -> tuple[Any, ...]:
        """The values before and after."""
        return self.init, self.final

    @public
    def __call__(self, count: ArrayLike) -> Float[Array, "..."]:
        """The value at step `count`."""
        elapsed = jnp.asarray(count) - self.start
        duration = self.end - self.start
        u = jnp.clip(elapsed / jnp.where(duration > 0, duration, 1), 0, 1)
        match self.shape:
            case "exponential":
                sizes = jnp.abs(self.init) ** (1 - u) * jnp.abs(self.final) ** u
                value = jnp.sign(self.init) * sizes
            case "quarters":
                # Compared without the division, whose rounding would move a switch by a step.
                switched = [4 * elapsed >= k * duration for k in (3, 2, 1)]
                fraction = jnp.select(switched, [1.0, 0.67, 0.33], 0.0)
                value = self.init + (self.final - self.init) * fraction
            case shape:
                value = self.init + (self.final - self.init) * _fraction(shape, u)
        value = jnp.where(elapsed <= 0, self.init, value)
        value = jnp.where(jnp.asarray(count) >= self.end, self.final, value)
        return value.astype(wide(self.init, self.final))


def _fraction(shape, u):
    match shape:
        case "cosine":
            return (1 - jnp.cos(math.pi * u)) / 2
        case "cubic":
            return 1 - (1 - u) ** 3
        case _:
            return u


def _plain(*values: Any) -> bool:
    return all(isinstance(value, PLAIN) for value in values)


def anneal(
    init: ArrayLike, final: ArrayLike, *, start: ArrayLike, end: ArrayLike, shape: Shape = "linear"
) -> Anneal:
    r"""A schedule from `init` to `final`, between the steps `start` and `end`.

    With $u = (\text{step} - \text{start}) / (\text{end} - \text{start})$ clipped to [0, 1]:

    - "linear", "cosine", "cubic" and "quarters" are init + (final - init) s(u), where s is $u$,
      $(1 - \cos \pi u) / 2$, $1 - (1 - u)^3$, and 0, 0.33, 0.67, 1 on the four quarters;
    - "exponential" is $\text{init}\,(\text{final} / \text{init})^u$.

    Up to `start` it is `init`; from `end` on it is exactly `final`, also in float32. With
    start == end it is a step. It is an `optax.Schedule` and a pytree whose leaves are the four
    numbers: changing them never recompiles, and schedules can be stacked and mapped.

    Args:
        init, final: The values before and after.
        start, end: The steps between which it moves.
        shape: One of those above.

    Returns:
        A callable from the step (an integer, or an array of them) to the value.

    Raises:
        ValueError: If `shape` is unknown, start > end, or an exponential has an endpoint of 0 or
            endpoints of different sign.

    References:
        Zhu & Gupta (2017), To prune, or not to prune, for the cubic shape.

    Examples:
        >>> gamma = pj.anneal(1.0, 0.1, start=100, end=200)
        >>> [round(float(gamma(step)), 3) for step in (0, 100, 150, 200, 300)]
        [1.0, 1.0, 0.55, 0.1, 0.1]
    """
    return Anneal(init, final, start, end, shape=shape)


def anneal_fraction(
    init: ArrayLike,
    final: ArrayLike | None,
    *,
    total_steps: int,
    start_frac: float = 0.0,
    end_frac: float = 1.0,
    shape: Shape = "linear",
) -> Anneal:
    r"""`pj.anneal` between two fractions of training, from step $a N$ to step $b N$ of $N$.

    Args:
        init, shape: As in `pj.anneal`; so are result and errors.
        final: The value after; None means that it stays `init`.
        total_steps: The $N$, the number of steps in training, at least 1.
        start_frac, end_frac: The $a \le b$, in [0, 1].

    Examples:
        >>> p = pj.anneal_fraction(2.0, 0.4, total_steps=1_000, start_frac=0.5)
        >>> [round(float(p(step)), 3) for step in (500, 750, 1_000)]
        [2.0, 1.2, 0.4]
    """
    if total_steps < 1:
        raise ValueError(f"total_steps must be at least 1, got {total_steps}")
    if not 0 <= start_frac <= end_frac <= 1:
        raise ValueError(
            "start_frac and end_frac must satisfy 0 <= start_frac <= end_frac <= 1, "
            f"got start_frac={start_frac}, end_frac={end_frac}"
        )
    start, end = start_frac * total_steps, end_frac * total_steps
    return Anneal(init, init if final is None else final, start, end, shape=shape)
