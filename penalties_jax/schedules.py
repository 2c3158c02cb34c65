"""Schedules: functions of the step that are pytrees, so that annealing never recompiles."""

import math
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from penalties_jax._pytree import Pytree, Schedule, config, number, option, refuse_schedules
from penalties_jax.functional.checks import PLAIN, public
from penalties_jax.functional.derivatives import with_value
from penalties_jax.functional.reduction import wide

__all__ = ["anneal", "anneal_fraction"]

Shape = Literal["linear", "cosine", "exponential", "cubic", "quarters", "step"]

# A step is high digits and low ones, each of which a float32 holds.
BITS = 16
BASE = 2**BITS

# A step that is later than all there will be, so that infinity is one too.
LATEST = 1e30


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
        numbers = count, self.init, self.final, self.start, self.end
        dtype = wide(*numbers)
        digits = [_digits(step, dtype) for step in (count, self.start, self.end)]
        value = _between(self.init, self.final, *digits, shape=self.shape, dtype=dtype)
        return value.astype(wide(self.init, self.final))


def _digits(step, dtype):
    """Its high and low digits, step = BASE high + low: a float32 may not hold all of them."""
    array: Any = np if isinstance(step, PLAIN) else jnp
    if array is jnp and jnp.issubdtype(step.dtype, jnp.integer):
        step = step if step.dtype.itemsize > 2 else step.astype(jnp.int32)
        return step >> BITS, step & (BASE - 1)
    step = array.clip(array.asarray(step, np.float64 if array is np else dtype), -LATEST, LATEST)
    high = array.floor(step / BASE)
    return high, step - BASE * high


@partial(jax.jit, static_argnames=("shape", "dtype"))
def _between(init, final, count, start, end, *, shape, dtype):
    init, final, count, start, end = jax.tree.map(
        lambda x: jnp.asarray(x, dtype), (init, final, count, start, end)
    )

    def steps(a, b):
        return BASE * (b[0] - a[0]) + (b[1] - a[1])

    elapsed, remaining = steps(start, count), steps(count, end)
    shares = _shares(shape, elapsed, remaining, steps(start, end))
    # From the smaller endpoint, whose digits would be lost in the larger one.
    falls = jnp.abs(init) > jnp.abs(final)
    small, large = jnp.where(falls, final, init), jnp.where(falls, init, final)
    share = jnp.where(falls, *shares)
    if shape == "exponential":
        log = jnp.log(jnp.abs(small))
        value = jnp.sign(large) * jnp.exp(log + share * (jnp.log(jnp.abs(large)) - log))
    else:
        value = small + share * (large - small)
    bounded = jnp.clip(value, jnp.minimum(init, final), jnp.maximum(init, final))
    value = with_value(value, jnp.where(share < 1, bounded, large))
    return jnp.where(remaining <= 0, final, jnp.where(elapsed <= 0, init, value))


def _shares(shape, elapsed, remaining, duration):
    """The parts that `init` and `final` have in the value, which add up to 1."""
    if shape in ("quarters", "step"):
        # Compared without the division, whose rounding would move a switch by a step.
        passed = [4 * elapsed >= k * duration for k in (3, 2, 1)]
        return jnp.select(passed, [0.0, 0.33, 0.67], 1.0), jnp.select(
            passed, [1.0, 0.67, 0.33], 0.0
        )
    duration = jnp.where(duration > 0, duration, 1)
    v, u = (jnp.clip(steps / duration, 0, 1) for steps in (remaining, elapsed))
    match shape:
        case "cosine":
            return _haversine(v, u), _haversine(u, v)
        case "cubic":
            return v**3, 1 - v**3
        case _:
            return v, u


def _haversine(u, v):
    """(1 - cos(pi u)) / 2 for u = 1 - v, with the digits of whichever is small."""
    below = u < v
    small = jnp.square(jnp.sin(math.pi / 2 * jnp.where(below, u, v)))
    return jnp.where(below, small, 1 - small)


def _plain(*values: Any) -> bool:
    return all(isinstance(value, PLAIN) for value in values)


def anneal(
    init: ArrayLike, final: ArrayLike, *, start: ArrayLike, end: ArrayLike, shape: Shape = "linear"
) -> Anneal:
    r"""A schedule from `init` to `final`, between the steps `start` and `end`.

    With $u = (\text{step} - \text{start}) / (\text{end} - \text{start})$ clipped to [0, 1]:

    - "linear", "cosine", "cubic" and "quarters" are init (1 - s(u)) + final s(u), where s is $u$,
      $(1 - \cos \pi u) / 2$, $1 - (1 - u)^3$, and 0, 0.33, 0.67, 1 on the four quarters; "step" is
      another name of "quarters";
    - "exponential" is $\text{init}\,(\text{final} / \text{init})^u$.

    Up to `start` it is exactly `init`, from `end` on exactly `final`, also in float32; between, it
    never leaves the two and never turns back, however small or near to each other they are. With
    start == end it is a step. It is an `optax.Schedule` and a pytree whose leaves are the four
    numbers: changing them never recompiles, and schedules can be stacked and mapped. Of one that
    is an argument of a compiled function, or stacked, they are float32: a step above 2^24 is then
    rounded, unless it is given as an array of integers.

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
