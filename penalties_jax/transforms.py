"""Penalties and rates of skipped work as optax transformations, and the step in their state."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jax.typing import ArrayLike
from jaxtyping import Array, Int
from optax._src.base import NO_PARAMS_MSG

from penalties_jax.functional.checks import (
    ANY,
    AT_LEAST_ONE,
    FINITE,
    NONNEGATIVE,
    POSITIVE,
    UNIT,
    bare,
    let_in_one,
    standard_promotion,
)
from penalties_jax.functional.reduction import promote
from penalties_jax.objective import Objective, Outputs, as_scalar
from penalties_jax.terms.base import Numeric, Penalty, check_one_input, is_absent

__all__ = ["add_objective", "add_penalty", "proximal", "scale_by_sparsity", "step_of"]

Mask = Any | Callable[[optax.Params], Any]


class PenaltyState(NamedTuple):
    """The number of optimiser steps so far, for schedules."""

    count: Any  # pyright: ignore[reportIncompatibleMethodOverride]


class MonitoredState(NamedTuple):
    """The same, and what a monitored penalty was at the step before."""

    count: Any  # pyright: ignore[reportIncompatibleMethodOverride]
    penalty_value: Any
    penalty_gradient_norm: Any


def add_penalty(
    penalty: Penalty, weight: Numeric = 1.0, mask: Mask | None = None, *, monitor: bool = False
) -> optax.GradientTransformationExtraArgs:
    r"""Adds the gradient of a penalty on the parameters: $u + w \nabla f(\theta)$.

    Before `optax.scale_by_adam` this is the coupled form, as if the penalty were part of the loss;
    after it the decoupled one, as in AdamW. It always comes before the learning rate.
    `pj.L2()` at weight w / 2 is `optax.add_decayed_weights(w)`.

    Args:
        penalty: A config. Its schedules, and that of `weight`, see the number of optimiser steps.
        weight: The $w$: a number, a scalar array of shape [] or a schedule.
        mask: A pytree of booleans like the parameters, or a function that returns one from them;
            as in optax, parameters under False are left alone.
        monitor: Whether the state also has `penalty_value` and `penalty_gradient_norm`, scalars in
            float32: $f(\theta)$ and the 2-norm of $\nabla f(\theta)$, without the weight, at the
            parameters that the last update was given. `optax.tree.get(state, "penalty_value")`
            finds it.

    Returns:
        A transformation that keeps each update's dtype. Parameters that are not floating-point
        are no part of the penalty, and their updates pass through.

    Raises:
        TypeError: If `penalty` is not a config, or compares two inputs.
        ValueError: In `update`, if it is called without parameters.

    References:
        Loshchilov & Hutter (2019), Decoupled weight decay regularization.

    Examples:
        >>> import optax
        >>> optimizer = optax.chain(pj.add_penalty(pj.L1(), weight=0.5), optax.sgd(1.0))
        >>> params = jnp.array([2.0, -2.0, 0.0])
        >>> updates, _ = optimizer.update(jnp.zeros(3), optimizer.init(params), params)
        >>> updates.tolist()
        [-0.5, 0.5, -0.0]
    """
    _check_config(penalty, "add_penalty")
    weight = bare(weight)
    ANY.check(weight=weight)

    def change(updates, params, count, **extra):
        value, gradients = _differentiate(penalty.at(count), params)
        return _plus(updates, _at(weight, count), gradients), (value, gradients)

    return _transformation(change, mask, monitor)


def proximal(
    penalty: Penalty,
    learning_rate: Numeric,
    weight: Numeric = 1.0,
    mask: Mask | None = None,
    *,
    monitor: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Turns the step of a chain into a proximal step; comes last in the chain.

    The new parameters are $\operatorname{prox}_{\eta w f}(\theta + u)$, with $\eta$ the learning
    rate, so that L1 gives exact zeros. After plain SGD the fixed point is the minimum of
    loss + w f. After Adam, which rescales each coordinate's gradient but not the penalty's
    step, it is the minimum for a penalty that is rescaled coordinate by coordinate. It belongs
    inside `optax.MultiSteps` and `optax.apply_if_finite`, never around them.

    Args:
        penalty: A config that has a proximal operator.
        learning_rate: The $\eta$ of the step before, at least 0: a number or a schedule.
        weight: The $w$, at least 0: a number, a scalar array of shape [] or a schedule.
        mask, monitor: As in `pj.add_penalty`; so are result and errors. What is monitored is the
            gradient of the penalty, not the step that its proximal operator makes.

    Raises:
        NotImplementedError: In `update`, if the penalty has no proximal operator.

    References:
        Parikh & Boyd (2014), Proximal algorithms, section 4.2.

    Examples:
        >>> import optax
        >>> optimizer = optax.chain(optax.sgd(1.0), pj.proximal(pj.L1(), 1.0, weight=0.5))
        >>> params = jnp.array([2.0, 0.1])
        >>> updates, _ = optimizer.update(jnp.zeros(2), optimizer.init(params), params)
        >>> optax.apply_updates(params, updates).tolist()
        [1.5, 0.0]
    """
    _check_config(penalty, "proximal")
    learning_rate, weight = bare((learning_rate, weight))
    NONNEGATIVE.check(learning_rate=learning_rate, weight=weight)

    def change(updates, params, count, **extra):
        step_size = _at(learning_rate, count) * _at(weight, count)
        moved = jax.tree.map(lambda p, u: sum(promote(p, u)), params, updates)
        resolved = penalty.at(count)
        nearest = resolved.prox(moved, step_size)
        changed = jax.tree.map(
            lambda z, p: jnp.asarray(z - promote(p)[0], p.dtype), nearest, params
        )
        return changed, _differentiate(resolved, params) if monitor else None

    return _transformation(change, mask, monitor)


def add_objective(
    objective: Objective,
    forward: Callable[[optax.Params, Any], Outputs],
    weight: Numeric = 1.0,
    *,
    mask: Mask | None = None,
    every: ArrayLike = 1,
    monitor: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Adds the gradient of an objective of a model's outputs: $u + w \nabla_\theta F(\theta, b)$.

    $F(\theta, b)$ is the total of the objective on `forward(params, batch)`. So any term,
    divergences from another model included, becomes part of an optimizer; where it stands in a
    chain means what it does for `pj.add_penalty`. The batch comes as an extra argument,
    `optimizer.update(updates, state, params, batch=batch)`; the extra argument `step=` takes the
    place of the count of updates, and others are ignored.

    It comes before `optax.MultiSteps`, `optax.chain(pj.add_objective(...),
    optax.MultiSteps(...).gradient_transformation())`, so that its gradient is accumulated with
    the others. Inside it sees only the batch of the last microbatch, for MultiSteps accumulates
    updates but no extra arguments.

    Args:
        objective: The terms. Their schedules, and that of `weight`, see `step=` or count // every.
        forward: A function from parameters and batch to the outputs that the objective takes. It
            is given all parameters, whatever the `mask`; under `optax.masked` and
            `optax.multi_transform` the other ones are `optax.MaskedNode`.
        weight, mask, monitor: As in `pj.add_penalty`; so is the result.
        every: How many updates make a step: before `optax.MultiSteps`, its number of microbatches.

    Raises:
        TypeError: If `objective` is not a `pj.Objective`, or `forward` no function; in `update`, if
            it is called without `batch=`. In `optax.inject_hyperparams` both are static:
            `static_args=("objective", "forward")`.
        ValueError: If `every` is below 1; in `update`, if it is called without parameters.

    Examples:
        >>> import optax
        >>> term = pj.Term(pj.L2(), on="y", weight=0.5)
        >>> term = pj.add_objective(pj.Objective(terms={"y": term}), lambda w, x: {"y": w * x})
        >>> optimizer = optax.chain(term, optax.sgd(0.1))
        >>> w, x = jnp.array(2.0), jnp.array([1.0, 3.0])
        >>> updates, _ = optimizer.update(jnp.zeros(()), optimizer.init(w), w, batch=x)
        >>> float(updates)
        -2.0
    """
    if not isinstance(objective, Objective) or not callable(forward):
        raise TypeError(
            "pj.add_objective takes a pj.Objective and a function of parameters and batch, got "
            f"{objective!r} and {forward!r}; in inject_hyperparams, write optax.inject_hyperparams("
            'pj.add_objective, static_args=("objective", "forward"))'
        )
    weight = bare(weight)
    ANY.check(weight=weight)
    if not jnp.issubdtype(jnp.result_type(every), jnp.integer):
        raise TypeError(f"every must be an integer, got {every!r}")
    AT_LEAST_ONE.check(every=every)

    def change(updates, params, count, *, batch, step, whole):
        step = count // every if step is None else bare(step)

        def total(params):
            everything = jax.tree.map(
                lambda own, other: other if own is None else own,
                params,
                whole,
                is_leaf=lambda node: node is None,
            )
            return objective(forward(everything, batch), step=step)[0]

        value, gradients = jax.value_and_grad(total)(params)
        gradients = jax.tree.map(lambda g: promote(g)[0], gradients)
        return _plus(updates, _at(weight, step), gradients), (value, gradients)

    transformation = _transformation(change, mask, monitor)

    def update(updates, state, params=None, *, step=None, **extra):
        if "batch" not in extra:
            raise TypeError(
                "pj.add_objective needs the batch: optimizer.update(updates, state, params, "
                "batch=batch)"
            )
        return transformation.update(
            updates, state, params, batch=extra["batch"], step=step, whole=params
        )

    return optax.GradientTransformationExtraArgs(transformation.init, update)


def scale_by_sparsity(
    power: Numeric = 0.5, *, least: Numeric = 0.1
) -> optax.GradientTransformationExtraArgs:
    r"""Scales the updates by the share that is computed: $u \max(1 - s, \epsilon)^p$.

    A gradient that comes from a share $1 - s$ of the positions is as noisy as that of a batch so
    much smaller, for which a smaller learning rate is right: in proportion for SGD, $p = 1$; by the
    root for Adam, $p = 1/2$. A negative power raises it: before SGD, $p = -1$ makes up for a mean
    over all positions in which the skipped ones have gradient 0. It belongs after
    `optax.scale_by_adam`, which takes most of a factor before it out again.

    The rate $s$ comes as an extra argument, `optimizer.update(updates, state, params, rate=rate)`;
    other extra arguments are ignored. `optax.masked` limits it to some parameters, such as those
    of the layers that skip. Inside `optax.MultiSteps` the rate is that of the last microbatch.

    Args:
        power: The $p$: a number, a scalar array of shape [] or a schedule, which sees the number of
            updates.
        least: The $\epsilon$, above 0, as `power`: where a gate has closed and all is skipped,
            there are still updates that may open it.

    Returns:
        A transformation that keeps each update's dtype, and needs no parameters. Updates that are
        not floating-point pass through.

    Raises:
        TypeError: In `update`, if it is called without `rate=`, or that is no number.
        ValueError: If a number is out of range; in `update`, if the rate is no scalar.

    References:
        Goyal et al. (2017), Accurate, large minibatch SGD, section 2.1. Malladi et al. (2022), On
        the SDEs and scaling rules for adaptive gradient algorithms.

    Examples:
        >>> import optax
        >>> optimizer = optax.chain(pj.scale_by_sparsity(), optax.sgd(1.0))
        >>> params = jnp.array([2.0, -2.0])
        >>> state = optimizer.init(params)
        >>> updates, _ = optimizer.update(jnp.ones(2), state, params, rate=jnp.array(0.75))
        >>> updates.tolist()
        [-0.5, -0.5]
    """
    power, least = bare((power, least))
    FINITE.check(power=power)
    POSITIVE.check(least=least)

    def init(params):
        del params
        return PenaltyState(jnp.zeros((), jnp.int32))

    @standard_promotion()
    def update(updates, state, params=None, *, rate=None, **extra):
        del params, extra
        if rate is None:
            raise TypeError(
                "pj.scale_by_sparsity needs the rate: optimizer.update(updates, state, params, "
                "rate=rate)"
            )
        rate = as_scalar("rate", let_in_one("rate", rate))
        UNIT.check(rate=rate)
        rate, p, epsilon = promote(rate, _at(power, state.count), _at(least, state.count))
        factor = jnp.maximum(1 - rate, epsilon) ** p

        def scaled(u):
            floating = jnp.issubdtype(jnp.result_type(u), jnp.floating)
            return jnp.asarray(promote(u)[0] * factor, u.dtype) if floating else u

        count = optax.safe_increment(state.count)
        return jax.tree.map(scaled, updates), PenaltyState(count)

    return optax.GradientTransformationExtraArgs(init, update)


def step_of(state: Any) -> Int[Array, "..."]:
    """The number of optimiser steps so far, from the state of any optax optimizer.

    That is, in this order: the `gradient_step` of `optax.MultiSteps`; the `count` that states of
    optax and of this library have; the `step` of what holds the state. Microbatches are no steps,
    nor are updates that `optax.apply_if_finite` around an optimizer leaves out. Under
    `optax.multi_transform` any branch that counts will do.

    Args:
        state: A state of optax, however nested, or what has one as its `opt_state`: an
            `nnx.Optimizer`, Flax's `TrainState`.

    Returns:
        An int32 scalar; of a mapped state, an array of its shape. In a traced function it is the
        first count; outside, all are compared.

    Raises:
        ValueError: If nothing counts, or if counts differ: lists them.

    Examples:
        >>> import optax
        >>> optimizer = optax.MultiSteps(optax.adam(1e-3), every_k_schedule=2)
        >>> params = jnp.ones(3)
        >>> state = optimizer.init(params)
        >>> for _ in range(5):
        ...     _, state = optimizer.update(params, state, params)
        >>> int(pj.step_of(state))
        2
    """
    states = list(_named_tuples(bare(getattr(state, "opt_state", state))))
    steps = {
        f"{path}.gradient_step": node.gradient_step
        for path, node in states
        if isinstance(node, optax.MultiStepsState)
    }
    steps = steps or {f"{path}.count": node.count for path, node in states if _counts(node)}
    if not steps and hasattr(state, "opt_state") and hasattr(state, "step"):
        steps = {".step": bare(state.step)}
    if not steps:
        raise ValueError(
            f"nothing in a {type(state).__name__} counts optimizer steps: chain the optimizer with "
            "optax.scale_by_schedule(lambda count: 1.0), which does, or keep a count of your own"
        )
    first, *others = steps.values()
    traced = any(isinstance(step, Tracer) for step in steps.values())
    if not traced and any(not np.array_equal(first, other) for other in others):
        shown = ", ".join(f"{path} is {step}" for path, step in steps.items())
        raise ValueError(f"the counts of optimizer steps differ: {shown}; pass one of these states")
    return jnp.asarray(first, jnp.int32)


def _named_tuples(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The named tuples in a tree, which optax's states are, with their paths."""
    if hasattr(tree, "_fields"):
        yield path, tree
    for keys, node in jax.tree.leaves_with_path(
        tree, is_leaf=lambda node: node is not tree and hasattr(node, "_fields")
    ):
        if hasattr(node, "_fields"):
            yield from _named_tuples(node, path + jax.tree_util.keystr(keys))


# Their `count` starts again at 0.
_RESTARTED = (optax.ApplyEvery, optax.contrib.ReduceLROnPlateauState)


def _counts(node):
    """Whether a state has a count of optimiser steps."""
    ours = isinstance(node, (PenaltyState, MonitoredState))
    theirs = type(node).__module__.startswith("optax.") and not isinstance(node, _RESTARTED)
    return "count" in node._fields and (ours or theirs)


def _check_config(penalty, name):
    if not isinstance(penalty, Penalty):
        raise TypeError(
            f"pj.{name} takes a penalty config such as pj.L1(), got {penalty!r}; in "
            f"inject_hyperparams, write optax.inject_hyperparams(pj.{name}, "
            'static_args=("penalty", "mask"))'
        )
    check_one_input(f"pj.{name}", penalty)


def _at(value: Any, count: ArrayLike) -> Any:
    return value(count) if callable(value) else value


def _differentiate(penalty, params):
    """The value and the gradient of a penalty."""
    # In float32 at least, so that the weight meets the gradient before it is rounded.
    params = jax.tree.map(lambda p: promote(p)[0], params)
    return jax.value_and_grad(lambda params: penalty(params))(params)


def _plus(updates, weight, gradients):
    return jax.tree.map(
        lambda u, g: jnp.asarray(promote(u)[0] + weight * g, u.dtype), updates, gradients
    )


def _transformation(change, mask, monitor):
    """Applies `change(updates, params, count, **extra)` to the leaves that are floating-point.

    It returns the updates, and the value and gradients to be monitored.
    """

    def init(params):
        del params
        count = jnp.zeros((), jnp.int32)
        zero = jnp.zeros((), jnp.float32)
        return MonitoredState(count, zero, zero) if monitor else PenaltyState(count)

    @standard_promotion()
    def update(updates, state, params=None, **extra):
        if params is None:
            raise ValueError(NO_PARAMS_MSG)
        leaves, structure = jax.tree.flatten(params, is_leaf=is_absent)
        update_leaves = structure.flatten_up_to(updates)
        changes = [
            not is_absent(p) and u is not None and jnp.issubdtype(jnp.result_type(p), jnp.floating)
            for p, u in zip(leaves, update_leaves, strict=True)
        ]

        def select(values):
            pairs = zip(values, changes, strict=True)
            return structure.unflatten(value if changed else None for value, changed in pairs)

        changed, measured = change(select(update_leaves), select(leaves), state.count, **extra)
        updates = structure.unflatten(
            u if new is None else new
            for u, new in zip(update_leaves, structure.flatten_up_to(changed), strict=True)
        )
        count = optax.safe_increment(state.count)
        if not monitor:
            return updates, PenaltyState(count)
        value, gradients = measured
        numbers = (jnp.asarray(x, jnp.float32) for x in (value, optax.tree.norm(gradients)))
        return updates, MonitoredState(count, *numbers)

    transformation = optax.GradientTransformationExtraArgs(init, update)
    return transformation if mask is None else optax.masked(transformation, mask)
