"""Controllers: rules that react to a measurement, pytrees with explicit state."""

import math
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from penalties_jax._pytree import (
    Pytree,
    config,
    fields,
    is_schedule,
    number,
    option,
    refuse_schedules,
)
from penalties_jax.functional.checks import NONNEGATIVE, POSITIVE, UNIT, check_fits, public
from penalties_jax.schedules import Shape, anneal

__all__ = ["AdaptiveSparsityScheduler", "DualAscent", "SparsityControl"]


class SparsityControl(NamedTuple):
    """What a controller asks for, of shape [], or [n] of a controller with arrays for n layers.

    Attributes:
        target: What the rate of skipped work should be.
        weight: The weight of the loss that pulls it there.

    Examples:
        >>> controller = pj.DualAscent(target=0.5, initial_weight=1.0)
        >>> target, weight = controller(controller.init())
        >>> float(target), float(weight)
        (0.5, 1.0)
    """

    target: Float[Array, "..."]
    weight: Float[Array, "..."]


class Controller(Pytree):
    """A rule with explicit state: `init()`, then at each step a call and an `update`.

    A call reads the control for the step at hand and changes nothing; `update` gives the state
    for the next step. Both are pure, and take the same measurements.
    """

    def __post_init__(self):
        super().__post_init__()
        refuse_schedules(self, *(field.name for field in fields(self) if field.name != "target"))

    def init(self) -> Any:
        """The state before the first step."""
        raise NotImplementedError

    def update(self, state: Any, *, value: ArrayLike | None = None, **extra: Any) -> Any:
        """The state after a step with these measurements."""
        raise NotImplementedError

    def __call__(
        self, state: Any, *, value: ArrayLike | None = None, **extra: Any
    ) -> SparsityControl:
        """The target and the weight for the step at hand."""
        raise NotImplementedError

    @property
    def weight(self) -> "View":
        """The weight alone, as a stateful schedule for `optax.inject_hyperparams`."""
        return View(self, "weight")


@config
class View(Pytree):
    """One number of a controller, by the protocol of optax's stateful schedules."""

    controller: Controller
    name: Literal["target", "weight"] = option()

    def init(self) -> Any:
        """The controller's state before the first step."""
        return self.controller.init()

    def update(self, state: Any, **extra: Any) -> Any:
        """The controller's state after a step."""
        return self.controller.update(state, **extra)

    def __call__(self, state: Any, **extra: Any) -> Float[Array, "..."]:
        """The number for the step at hand."""
        return getattr(self.controller(state, **extra), self.name)


class AdaptiveState(NamedTuple):
    """Steps so far, the last loss (-inf at first), how far it is backed off, and for how long."""

    count: Int[Array, ""]  # pyright: ignore[reportIncompatibleMethodOverride]
    value: Float[Array, ""]
    level: Float[Array, ""]
    hold: Float[Array, ""]


@config
class AdaptiveSparsityScheduler(Controller):
    """A target and a weight that rise over a warm-up, and back off while a loss is too high.

    The target goes from `initial_sparsity` to `final_sparsity` as `pj.anneal` of shape
    `schedule_type` from step 0 to `warmup_steps`, the weight linearly. Backed off to level n they
    are $0.9^n$ and $0.5^n$ times that. Without memory the level is 1 in a step whose value is above
    the threshold, else 0. With `remember`, such a value adds 1 to the level, which then holds for
    `hold_steps`, whatever the value; after that it falls by 1 in every `recovery_steps` steps while
    the value is not above the threshold.

    Attributes:
        initial_sparsity, final_sparsity: The target, before and after, in [0, 1].
        initial_weight, final_weight: The weight, before and after, at least 0.
        warmup_steps: The length of the warm-up, above 0.
        schedule_type: A shape of `pj.anneal`.
        accuracy_threshold: A monitored loss above it, or NaN, backs off. The measurement is
            `value=`, of a call and of `update`; where it isn't given, the last one.
        remember: Whether the back-off outlasts the step.
        hold_steps: With `remember`, how long a new level holds, at least 0.
        recovery_steps: How long it takes to recover from one level, above 0.

    Raises:
        ValueError: If a number is out of range, `schedule_type` is unknown, or as `pj.anneal`.

    Examples:
        >>> controller = pj.AdaptiveSparsityScheduler(warmup_steps=10, accuracy_threshold=3.0)
        >>> state = controller.init()
        >>> for _ in range(10):
        ...     state = controller.update(state, value=2.0)
        >>> [round(float(controller(state, value=value).target), 3) for value in (2.0, 4.0)]
        [0.5, 0.45]
    """

    initial_sparsity: Any = number(default=0.2, valid=UNIT)
    final_sparsity: Any = number(default=0.5, valid=UNIT)
    initial_weight: Any = number(default=0.001, valid=NONNEGATIVE)
    final_weight: Any = number(default=0.01, valid=NONNEGATIVE)
    warmup_steps: Any = number(default=1000.0, valid=POSITIVE)
    schedule_type: Shape = option(default="cosine", choices=Shape)
    accuracy_threshold: Any = number(default=math.inf)
    remember: bool = option(default=False, kw_only=True)
    hold_steps: Any = number(default=100.0, valid=NONNEGATIVE, kw_only=True)
    recovery_steps: Any = number(default=100.0, valid=POSITIVE, kw_only=True)

    def __post_init__(self):
        super().__post_init__()
        self._schedules()

    def _schedules(self):
        end = self.warmup_steps
        shape = self.schedule_type
        return (
            anneal(self.initial_sparsity, self.final_sparsity, start=0.0, end=end, shape=shape),
            anneal(self.initial_weight, self.final_weight, start=0.0, end=end),
        )

    @property
    def target(self) -> View:
        """The target alone, as a stateful schedule for `optax.inject_hyperparams`."""
        return View(self, "target")

    def init(self) -> AdaptiveState:
        """The state before the first step."""
        return AdaptiveState(
            count=jnp.zeros((), jnp.int32),
            value=jnp.full((), -jnp.inf, jnp.float32),
            level=jnp.zeros((), jnp.float32),
            hold=jnp.zeros((), jnp.float32),
        )

    @public
    def update(
        self, state: AdaptiveState, *, value: ArrayLike | None = None, **extra: Any
    ) -> AdaptiveState:
        """The state after a step in which the monitored loss was `value`."""
        observed = self._observe(state, value)
        return observed._replace(count=jnp.asarray(optax.safe_increment(state.count)))

    @public
    def __call__(
        self, state: AdaptiveState, *, value: ArrayLike | None = None, **extra: Any
    ) -> SparsityControl:
        """The target and the weight for the step at hand, if the monitored loss is `value`."""
        level = self._observe(state, value).level
        target, weight = (schedule(state.count) for schedule in self._schedules())
        return SparsityControl(target * 0.9**level, weight * 0.5**level)

    def _observe(self, state, value):
        value = state.value if value is None else jnp.asarray(value, jnp.float32)
        over = ~(value <= self.accuracy_threshold)
        if not self.remember:
            return state._replace(value=value, level=over.astype(jnp.float32))
        holding = state.hold > 0
        recovered = jnp.maximum(state.level - 1 / self.recovery_steps, 0)
        kept = jnp.where(holding, state.level, recovered)
        backs_off = over & ~holding
        return state._replace(
            value=value,
            level=jnp.where(backs_off, state.level + 1, kept).astype(jnp.float32),
            hold=jnp.where(backs_off, self.hold_steps, jnp.maximum(state.hold - 1, 0)).astype(
                jnp.float32
            ),
        )


@config
class Setpoint(Pytree):
    """A number or a schedule by the protocol of optax's stateful schedules."""

    target: Any = number(valid=UNIT, single=True)

    def init(self) -> "CountState":
        """The state before the first step."""
        return CountState(jnp.zeros((), jnp.int32))

    def update(self, state: "CountState", **extra: Any) -> "CountState":
        """The state after a step."""
        return CountState(jnp.asarray(optax.safe_increment(state.count)))

    def __call__(self, state: Any, **extra: Any) -> Float[Array, "..."]:
        """The value at the step that a state with a `count` is at."""
        value = self.target(state.count) if is_schedule(self.target) else self.target
        return jnp.asarray(value, jnp.float32)

    def __repr__(self):
        return repr(self.target)


class CountState(NamedTuple):
    """Steps so far."""

    count: Int[Array, ""]  # pyright: ignore[reportIncompatibleMethodOverride]


class DualState(NamedTuple):
    """The state of a `DualAscent`: steps so far, and the multiplier."""

    count: Int[Array, ""]  # pyright: ignore[reportIncompatibleMethodOverride]
    weight: Float[Array, "..."]


@config
class DualAscent(Controller):
    r"""Learns the weight of a sparsity loss as a Lagrange multiplier: no weight to tune.

    The constraint is that the rate $s$ is within $\epsilon$ of its target $t$. The multiplier of
    that constraint goes up the dual, $\lambda \leftarrow \max(0, \lambda + \eta (|s - t| -
    \epsilon))$: it rises while the rate is off its target and falls, slowly, while it is on it.
    Times `pj.sparsity_target_loss` of kind "l1" it is the Lagrangian's own term, whose pull does
    not weaken near the target; the other kinds work with a larger multiplier.

    Attributes:
        target: The $t$, in [0, 1]: a number, a schedule of it, or an array with one for each layer.
            It is also the view of itself that `optax.inject_hyperparams` takes.
        step_size: The $\eta$, above 0: what one step far off the target adds to the weight.
        tolerance: The $\epsilon$, at least 0. At 0 the noise of the measurement makes the weight
            rise for ever.
        initial_weight: The weight at step 0, at least 0.
        max_weight: What the weight never passes.

    Raises:
        ValueError: If a number is out of range; in `update`, if the rate is of another shape than
            the weight: take its mean, or give the controller one target for each layer.
        TypeError: In `update`, if there is no `rate=`, the measurement.

    References:
        Arrow, Hurwicz & Uzawa (1958), Studies in linear and non-linear programming. Gallego-Posada
        et al. (2022), Controlled sparsity via constrained optimization.

    Examples:
        >>> controller = pj.DualAscent(target=0.5, step_size=0.1)
        >>> target, weight = controller(controller.update(controller.init(), rate=0.2))
        >>> float(target), round(float(weight), 4)
        (0.5, 0.0295)
    """

    target: Any = number(valid=UNIT, single=True)
    step_size: Any = number(default=0.01, valid=POSITIVE)
    tolerance: Any = number(default=0.005, valid=NONNEGATIVE, kw_only=True)
    initial_weight: Any = number(default=0.0, valid=NONNEGATIVE, kw_only=True)
    max_weight: Any = number(default=math.inf, valid=POSITIVE, kw_only=True)

    def __post_init__(self):
        if isinstance(self.target, Setpoint):
            object.__setattr__(self, "target", self.target.target)
        super().__post_init__()
        object.__setattr__(self, "target", Setpoint(self.target))

    @public
    def init(self) -> DualState:
        """The state before the first step."""
        target = self.target(self.target.init())
        numbers = (target, self.step_size, self.tolerance, self.max_weight)
        shape = jnp.broadcast_shapes(jnp.shape(self.initial_weight), *map(jnp.shape, numbers))
        weight = jnp.minimum(jnp.asarray(self.initial_weight, jnp.float32), self.max_weight)
        return DualState(
            jnp.zeros((), jnp.int32), jnp.broadcast_to(weight, shape).astype(jnp.float32)
        )

    @public
    def update(
        self,
        state: DualState,
        *,
        value: ArrayLike | None = None,
        rate: ArrayLike | None = None,
        **extra: Any,
    ) -> DualState:
        """The state after a step in which the rate was `rate`; a rate of NaN changes no weight."""
        if rate is None:
            raise TypeError("DualAscent.update needs rate=, the measured rate of skipped work")
        check_fits(jnp.shape(state.weight), rate=rate)
        excess = jnp.abs(rate - self.target(state)) - self.tolerance
        moved = jnp.clip(state.weight + self.step_size * excess, 0, self.max_weight)
        weight = jnp.where(jnp.isnan(rate), state.weight, moved)
        count = jnp.asarray(optax.safe_increment(state.count))
        return DualState(count, weight.astype(jnp.float32))

    @public
    def __call__(
        self, state: DualState, *, value: ArrayLike | None = None, **extra: Any
    ) -> SparsityControl:
        """The target and the weight for the step at hand."""
        return SparsityControl(self.target(state), state.weight)
