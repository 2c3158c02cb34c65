"""Controllers: rules that react to a measurement, pytrees with explicit state."""

import math
from typing import Any, ClassVar, Literal, NamedTuple

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
from penalties_jax.functional.checks import (
    NONNEGATIVE,
    PLAIN,
    POSITIVE,
    UNIT,
    Range,
    check_fits,
    let_in_one,
    public,
)
from penalties_jax.functional.sparsity import DEFAULT_WEIGHT
from penalties_jax.schedules import Shape, anneal

__all__ = ["AdaptiveKL", "AdaptiveSparsityScheduler", "Budget", "DualAscent", "SparsityControl"]


class SparsityControl(NamedTuple):
    """What a controller asks for, of shape [], or [n] of a controller with arrays for n layers.

    Attributes:
        target: What the measurement should be: a rate of skipped work, a KL, or a limit of it.
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

    # The field that is the target: it may be a schedule, the others may not.
    setpoint: ClassVar[str] = "target"

    def __post_init__(self):
        super().__post_init__()
        others = (field.name for field in fields(self) if field.name != self.setpoint)
        refuse_schedules(self, *others)

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
        initial_weight, final_weight: The weight, before and after, at least 0. The defaults are
            for the kind "huber": a tenth of the weight of a `pj.nnx.SparsityGate`, and all of it.
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
    initial_weight: Any = number(default=DEFAULT_WEIGHT / 10, valid=NONNEGATIVE)
    final_weight: Any = number(default=DEFAULT_WEIGHT, valid=NONNEGATIVE)
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
        state = AdaptiveState(*map(jnp.asarray, state))
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

    target: Any = number(single=True)

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
    """Steps so far, and the weight that a controller moves."""

    count: Int[Array, ""]  # pyright: ignore[reportIncompatibleMethodOverride]
    weight: Float[Array, "..."]


class Weigher(Controller):
    """Moves the weight alone, by how one measurement compares with the target.

    Each number may be an array [n], for n weights. A measurement that says nothing, NaN or what
    would make a weight infinite, moves none.
    """

    target: Any
    # The name of the argument of `update` that is the measurement.
    measure: str
    initial_weight: Any
    max_weight = math.inf

    def __post_init__(self):
        own = self.setpoint == "target"
        if own and isinstance(self.target, Setpoint):
            object.__setattr__(self, "target", self.target.target)
        super().__post_init__()
        if not self.measure.isidentifier() or self.measure in ("self", "state"):
            raise ValueError(
                f"{type(self).__name__}.measure must be the name of an argument of update, "
                f"got {self.measure!r}"
            )
        if own:
            object.__setattr__(self, "target", Setpoint(self.target))

    @public
    def init(self) -> DualState:
        """The state before the first step."""
        names = (field.name for field in fields(self) if not field.metadata.get("option"))
        numbers = [getattr(self, name) for name in names if name != self.setpoint]
        target = self.target(self.target.init())
        shape = jnp.broadcast_shapes(*map(jnp.shape, [target, *numbers]))
        weight = jnp.minimum(jnp.asarray(self.initial_weight, jnp.float32), self.max_weight)
        return DualState(
            jnp.zeros((), jnp.int32), jnp.broadcast_to(weight, shape).astype(jnp.float32)
        )

    @public
    def update(
        self, state: DualState, *, value: ArrayLike | None = None, **extra: Any
    ) -> DualState:
        """The state after a step with this measurement; one of NaN changes no weight."""
        measured = let_in_one(self.measure, {"value": value, **extra}.get(self.measure))
        if measured is None:
            raise TypeError(f"{type(self).__name__}.update needs {self.measure}=, the measurement")
        check_fits(jnp.shape(state.weight), **{self.measure: measured})
        moved = self._moved(state.weight, jnp.asarray(measured, jnp.float32), self.target(state))
        weight = jnp.where(jnp.isfinite(moved), moved, state.weight)
        count = jnp.asarray(optax.safe_increment(state.count))
        return DualState(count, weight.astype(jnp.float32))

    @public
    def __call__(
        self, state: DualState, *, value: ArrayLike | None = None, **extra: Any
    ) -> SparsityControl:
        """The target and the weight for the step at hand."""
        return SparsityControl(self.target(state), jnp.asarray(state.weight))

    def _moved(self, weight: Array, measured: Array, target: Array) -> Array:
        """The weight after a measurement."""
        raise NotImplementedError


@config
class DualAscent(Weigher):
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

    measure = "rate"

    def _moved(self, weight, measured, target):
        excess = jnp.abs(measured - target) - self.tolerance
        return jnp.clip(weight + self.step_size * excess, 0, self.max_weight)


@config
class Budget(Weigher):
    r"""Learns the weight of a penalty as the Lagrange multiplier of value <= limit.

    The multiplier goes up the dual, $\lambda \leftarrow \min(\max(0, \lambda + \eta (v - b)),
    \lambda_{\max})$ for a value $v$ and its limit $b$: it rises while the value is above its limit
    and falls while it is below, so that a limit which holds by itself costs nothing, at a weight of
    0. `pj.DualAscent` is for a target with two sides: under a target of 0.1, a value of 0.01 raises
    its weight.

    In a loop the multiplier is an integral control, which lags: where the value takes $\tau$ steps
    to follow the weight, by $g$ per unit of weight, an $\eta$ above $1 / (2 g \tau)$ rings.

    Attributes:
        limit: The $b$: a number, a schedule of it, or an array with one for each of n values.
            `target` is a view of it, which `optax.inject_hyperparams` takes.
        step_size: The $\eta$, above 0.
        measure: The name of the argument of `update` that is the $v$. optax gives every extra
            argument to every controller: each reads its own. A $v$ that is NaN, or infinite under
            no $\lambda_{\max}$, changes no weight.
        initial_weight: The weight at step 0, at least 0.
        max_weight: The $\lambda_{\max}$, above 0.

    Raises:
        ValueError: If a number is out of range; in `update`, if the value is of another shape than
            the weight.
        TypeError: In `update`, if there is no argument of that name.

    References:
        Arrow, Hurwicz & Uzawa (1958), Studies in linear and non-linear programming. Stooke, Achiam
        & Abbeel (2020), Responsive safety in reinforcement learning by PID Lagrangian methods.

    Examples:
        >>> budget = pj.Budget(0.1, step_size=0.5, measure="kl")
        >>> state = budget.init()
        >>> for kl in (0.5, 0.3, 0.02):
        ...     state = budget.update(state, kl=kl)
        ...     print(round(float(budget(state).weight), 3))
        0.2
        0.3
        0.26
    """

    limit: Any = number(single=True)
    step_size: Any = number(default=0.01, valid=POSITIVE)
    measure: str = option(default="value", kw_only=True)
    initial_weight: Any = number(default=0.0, valid=NONNEGATIVE, kw_only=True)
    max_weight: Any = number(default=math.inf, valid=POSITIVE, kw_only=True)
    setpoint: ClassVar[str] = "limit"

    @property
    def target(self) -> Setpoint:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The limit, as a stateful schedule for `optax.inject_hyperparams`."""
        return Setpoint(self.limit)

    def _moved(self, weight, measured, target):
        return jnp.clip(weight + self.step_size * (measured - target), 0, self.max_weight)


# How far off its target, in parts of it, a value can count.
FURTHEST = 0.2


@config
class AdaptiveKL(Weigher):
    r"""Adapts the weight of a KL penalty until the KL is at its target, as trainers of RLHF do.

    $\lambda \leftarrow \lambda (1 + \operatorname{clip}(v / t - 1, -0.2, 0.2)\, n / h)$ for a value
    $v$, its target $t$, $n$ samples a step and a horizon of $h$ samples. It has two sides, as
    `pj.DualAscent`: a KL below its target lowers the weight, but never to 0. `pj.Budget` ends there
    where the KL stays below by itself, and is faster where the weight begins far off.

    Attributes:
        target: The $t$, above 0: a number, a schedule of it, or an array with one for each of n
            values. It is also the view of itself that `optax.inject_hyperparams` takes.
        horizon: The $h$, above 0: in about 5 h samples, a value far off moves the weight by e.
        initial_weight: The weight at step 0, above 0.
        samples: The $n$, above 0 and below 5 h.
        measure: As in `pj.Budget`, and so are the errors.

    References:
        Ziegler et al. (2019), Fine-tuning language models from human preferences, section 2.2.

    Examples:
        >>> controller = pj.AdaptiveKL(6.0, horizon=10_000, samples=256, measure="kl")
        >>> state = controller.update(controller.init(), kl=9.0)
        >>> round(float(controller(state).weight), 6)
        0.201024
    """

    target: Any = number(valid=POSITIVE, single=True)
    horizon: Any = number(valid=POSITIVE)
    initial_weight: Any = number(default=0.2, valid=POSITIVE, kw_only=True)
    samples: Any = number(default=1.0, valid=POSITIVE, kw_only=True)
    measure: str = option(default="value", kw_only=True)

    def __post_init__(self):
        super().__post_init__()
        # From there on a weight could be 0 for ever, or negative.
        if isinstance(self.horizon, PLAIN):
            most = self.horizon / FURTHEST
            below = Range(f"below 5 times the horizon of {self.horizon}", lambda x: x < most)
            below.check(**{"AdaptiveKL.samples": self.samples})

    def _moved(self, weight, measured, target):
        error = jnp.clip(measured / target - 1, -FURTHEST, FURTHEST)
        return weight * (1 + error * self.samples / self.horizon)
