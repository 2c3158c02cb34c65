"""Objectives, penalties on activations and penalties on parameters, for Flax linen."""

import numbers
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax.linen.module import _context
from flax.traverse_util import path_aware_map
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PyTree

from penalties_jax._pytree import checked, has_schedule, resolve
from penalties_jax.objective import Metrics, Objective, Outputs, check_scalar
from penalties_jax.terms.base import Penalty, check_one_input

PENALTIES = "penalties"
SCHEDULE = "schedule"


def check_plain(name: str, config: Any) -> None:
    """Raises TypeError for a config with array leaves, which a static module can't hold."""
    for leaf in jax.tree.leaves(config):
        if not isinstance(leaf, numbers.Real):
            raise TypeError(f"{name} must hold Python numbers only in a linen module, got {leaf!r}")


def step_for(module: nn.Module, config: Any, step: ArrayLike | None) -> ArrayLike | None:
    """The step; if none is given and a config needs one, the module's, of "schedule"."""
    if step is None and has_schedule(config):
        known = module.has_variable(SCHEDULE, "step") or module.is_mutable_collection(SCHEDULE)
        if not known:
            raise TypeError(
                f'{config!r} holds a schedule: pass step=, or apply the collection "schedule" '
                "that init returns, which needs an axis under nn.scan and nn.vmap"
            )
        step = step_of(module).value
    return step


def step_of(module: nn.Module) -> nn.Variable:
    """The step of a module, from 0."""
    return module.variable(SCHEDULE, "step", jnp.zeros, (), jnp.int32)


def record(
    module: nn.Module, penalty: Penalty, x: PyTree, where: PyTree | None, step: ArrayLike | None
) -> None:
    """Adds a penalty to what the module has recorded, if the caller collects penalties."""
    if module.is_initializing():
        step_for(module, penalty, step)
    elif module.is_mutable_collection(PENALTIES):
        recorded = module.variable(PENALTIES, "recorded", jnp.zeros, (), jnp.float32)
        value = resolve(penalty, step_for(module, penalty, step))(x, where=where)
        recorded.value = recorded.value + check_scalar("penalty", value)
    elif _is_cut_off(module):
        raise ValueError(
            f"{'/'.join(module.path)} is under a transform that drops what it records: give it an "
            'axis, as in nn.scan(..., variable_axes={"params": 0, "penalties": 0})'
        )


def _is_cut_off(module):
    """Whether the caller collects penalties, and a lifted transform in between doesn't.

    A lifted scope has no link to the scope outside, but its debug path names the transforms. The
    modules that are being called have scopes: the innermost that isn't lifted is of this `apply`,
    unless the module that is applied is itself lifted, when nobody knows.
    """
    path = module.scope.debug_path
    if not _is_lifted(path) or "()" in path[0]:
        return False
    scopes = (caller.scope for caller in reversed(_context.module_stack) if caller is not None)
    unlifted = (s for s in scopes if s is not None and not _is_lifted(s.root.debug_path))
    applied = next(unlifted, None)
    return applied is not None and applied.is_mutable_collection(PENALTIES)


def _is_lifted(debug_path):
    return any("(" in name for name in debug_path)


class Loss(nn.Module):
    """`pj.nnx.Loss` for linen, with the step in the collection "schedule".

    Attributes:
        objective: A `pj.Objective` whose numbers are Python numbers; an array is a TypeError.

    Examples:
        >>> term = pj.Term(pj.L1(), on="hidden", weight=pj.anneal(0.0, 1.0, start=0, end=2))
        >>> loss = pj.linen.Loss(pj.Objective(terms={"l1": term}))
        >>> outputs = {"hidden": jnp.ones(4)}
        >>> state = loss.init({}, outputs)
        >>> for _ in range(3):
        ...     (total, metrics), state = loss.apply(state, outputs, mutable=["schedule"])
        >>> float(total)
        4.0
    """

    objective: Objective

    def __post_init__(self):
        check_plain("objective", checked("objective", self.objective, Objective))
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        outputs: Outputs,
        *,
        step: ArrayLike | None = None,
        advance: bool = True,
        detail: bool | None = None,
    ) -> tuple[Float[Array, ""], Metrics]:
        """The total and its parts, as in a call of `pj.nnx.Loss`."""
        if step is not None:
            return self.objective(outputs, step=step, detail=detail)
        count = step_of(self)
        result = self.objective(outputs, step=count.value, detail=detail)
        if advance and not self.is_initializing():
            count.value = jnp.asarray(optax.safe_increment(count.value))
        return result


class ActivityPenalty(nn.Module):
    """`pj.nnx.ActivityPenalty` for linen, with what is recorded in the collection "penalties".

    It is recorded when the collection is mutable, as in training:
    `model.apply(variables, x, mutable=["penalties"])`. `pj.linen.collect_penalties` sums it. Under
    `nn.scan` and `nn.vmap` the collection needs an axis, else it is a ValueError:
    `variable_axes={"params": 0, "penalties": 0}`. Where the module that is applied is itself such
    a transform, `nn.vmap(Model)(...).apply`, nothing tells, and without it nothing is recorded.

    Attributes:
        penalty: A config whose numbers are Python numbers; an array is a TypeError.
        weight: A number or a schedule.

    Examples:
        >>> penalised = pj.linen.ActivityPenalty(pj.L1(), weight=0.5)
        >>> y, state = penalised.apply({}, jnp.array([1.0, -3.0]), mutable=["penalties"])
        >>> total, state = pj.linen.collect_penalties(state)
        >>> float(total), state
        (2.0, {})
    """

    penalty: Penalty
    weight: Any = 1.0

    def __post_init__(self):
        check_plain("penalty", self.penalty)
        check_one_input("ActivityPenalty", self.penalty)
        check_plain("weight", (self.weight * self.penalty).scale)
        super().__post_init__()

    @nn.compact
    def __call__(
        self, x: PyTree, *, where: PyTree | None = None, step: ArrayLike | None = None
    ) -> PyTree:
        """Return `x`, after recording its penalty, as in a call of `pj.nnx.ActivityPenalty`."""
        record(self, self.weight * self.penalty, x, where, step)
        return x


def set_step(variables: Mapping[str, Any], step: ArrayLike) -> dict[str, Any]:
    """The same variables at another step, as `pj.nnx.set_step`: all in the collection "schedule".

    Args:
        variables: The collections that `init` or `apply` returns; without "schedule" they stay.
        step: An integer, or an array of one.

    Examples:
        >>> weight = pj.anneal(0.0, 1.0, start=0, end=4)
        >>> penalised = pj.linen.ActivityPenalty(pj.L1(), weight=weight)
        >>> variables = penalised.init({}, jnp.ones(4))
        >>> variables = pj.linen.set_step(variables, 2)
        >>> y, state = penalised.apply(variables, jnp.ones(4), mutable=["penalties"])
        >>> float(pj.linen.collect_penalties(state)[0])
        2.0
    """
    return _map_steps(lambda held: jnp.full_like(held, step), variables)


def advance(variables: Mapping[str, Any]) -> dict[str, Any]:
    """The same variables a step further, as `pj.nnx.advance`: those of a `Loss` too.

    Args:
        variables: As in `pj.linen.set_step`.

    Examples:
        >>> variables = pj.linen.advance({"schedule": {"a": {"step": jnp.int32(2)}}})
        >>> int(variables["schedule"]["a"]["step"])
        3
    """
    return _map_steps(optax.safe_increment, variables)


def _map_steps(function, variables):
    def changed(path, leaf):
        return function(leaf) if path[-1] == "step" else leaf

    collections = dict(variables)
    if SCHEDULE in collections:
        collections[SCHEDULE] = path_aware_map(changed, collections[SCHEDULE])
    return collections


def collect_penalties(variables: Mapping[str, Any]) -> tuple[Float[Array, ""], dict[str, Any]]:
    """Sums what modules have recorded, as `pj.nnx.collect_penalties`, and takes it out.

    Args:
        variables: The mutated collections that `apply` returns, with or without "penalties".

    Returns:
        The sum, of shape [], and the other collections, for the next step.

    Examples:
        >>> state = {"penalties": {"a": {"recorded": jnp.array([1.0, 2.0])}}, "batch_stats": {}}
        >>> total, state = pj.linen.collect_penalties(state)
        >>> float(total), state
        (3.0, {'batch_stats': {}})
    """
    recorded = jax.tree.leaves(variables.get(PENALTIES, {}))
    total = sum((jnp.sum(leaf) for leaf in recorded), start=jnp.zeros((), jnp.float32))
    return total, {name: tree for name, tree in variables.items() if name != PENALTIES}


def param_penalty(
    params: Mapping[str, Any],
    penalty: Penalty,
    filter: Callable[[Any, Array], bool] = lambda path, value: True,
) -> Float[Array, ""]:
    """A penalty on the parameters that a filter selects, as `pj.nnx.param_penalty`.

    Args:
        params: A tree of parameters, `variables["params"]`.
        penalty: As in `pj.nnx.param_penalty`; so are result and errors.
        filter: From the path of a parameter, a tuple of names, and its value to whether it counts.

    Examples:
        >>> params = {"dense": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}
        >>> kernels = lambda path, value: path[-1] == "kernel"
        >>> float(pj.linen.param_penalty(params, pj.L1(), kernels))
        6.0
    """
    selected = path_aware_map(lambda path, x: x if filter(path, x) else None, params)
    if not jax.tree.leaves(selected):
        raise ValueError(f"filter selects no parameter, got {filter!r}")
    return check_scalar("penalty", penalty(selected))
