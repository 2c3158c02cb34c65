"""Train several members towards their rates: one program, capacity after capacity."""

import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

import penalties_jax as pj
from penalties_jax.recipes import training
from penalties_jax.recipes.language_model import mean_loss
from penalties_jax.recipes.sparsify.config import (
    DENSE,
    DUAL,
    GROUPS,
    SCHEDULE,
    SparsifyConfig,
    capacity,
    members,
)
from penalties_jax.recipes.sparsify.model import SparseLanguageModel
from penalties_jax.recipes.text import Batches
from penalties_jax.recipes.training import Metrics, Step, adam, descend

LARGEST_GRADIENT = 1.0


class State(NamedTuple):
    """What training changes: the members of each capacity, and each group's controllers' states."""

    models: dict[int, training.State]
    controllers: dict[str, Any]


class Member(NamedTuple):
    """Whether a member skips nothing, and whether a schedule is what it follows."""

    dense: bool | Bool[Array, "*members"]
    scheduled: bool | Bool[Array, "*members"]


class Shared(NamedTuple):
    """What training reads: the model without its parameters, members and controllers, stacked."""

    model: tuple[nnx.GraphDef, nnx.State]
    members: Member
    controllers: dict[str, Any]
    batches: Batches


class Measured(NamedTuple):
    """Of each member the cross-entropy, and the shares of gates closed and of positions dropped."""

    loss: Float[Array, "*members"]
    rate: Float[Array, "*members"]
    dropped: Float[Array, "*members"]


class Scores(NamedTuple):
    """Cross-entropies, positions dropped, open gates (1, else 0), and how probable that is."""

    loss: Float[Array, "members windows"]
    dropped: Float[Array, "members windows layers"]
    masks: Float[Array, "members windows layers time"]
    probabilities: Float[Array, "members windows layers time"]


def together(config: SparsifyConfig) -> dict[int, list[int]]:
    """Return the numbers of the members of each capacity, which are computed together."""
    groups: dict[int, list[int]] = {}
    for i, (_, target) in enumerate(members(config)):
        groups.setdefault(capacity(config, target), []).append(i)
    return groups


def split(config: SparsifyConfig, tree: Any) -> dict[int, Any]:
    """Return what a pytree of all members has of those of each capacity."""
    return {
        size: jax.tree.map(operator.itemgetter(np.array(group)), tree)
        for size, group in together(config).items()
    }


def in_order(config: SparsifyConfig, parts: dict[int, Any]) -> Any:
    """Return what there is of the members of each capacity, as one pytree of all members."""
    groups = together(config)
    order = np.argsort(np.concatenate(list(groups.values())))
    return jax.tree.map(
        lambda *leaves: jnp.concatenate(leaves)[order], *(parts[size] for size in groups)
    )


def controllers(config: SparsifyConfig) -> dict[str, list[Any]]:
    """Return the controllers of each group; the dense model's asks for nothing."""
    schedules = [
        pj.AdaptiveSparsityScheduler(
            initial_sparsity=0.0,
            final_sparsity=target,
            initial_weight=config.sparsity_weight / 10,
            final_weight=config.sparsity_weight,
            warmup_steps=max(1, round(config.warmup_fraction * config.steps)),
        )
        for target in config.targets
    ]
    ascents = [
        pj.DualAscent(target=target, step_size=config.dual_step_size) for target in config.targets
    ]
    return {DENSE: [pj.DualAscent(target=0.0)], SCHEDULE: schedules, DUAL: ascents}


@jax.jit
def controls(shared: Shared, states: dict[str, Any]) -> pj.SparsityControl:
    """Return what the controllers ask of each member."""
    asked = [jax.vmap(operator.call)(shared.controllers[name], states[name]) for name in GROUPS]
    return jax.tree.map(lambda *values: jnp.concatenate(values), *asked)


def make_optimizer(config: SparsifyConfig) -> optax.GradientTransformation:
    """Return the optimiser of each member."""
    # At a rate of 0, where the gates start, the derivative of "kl" is as large as 1e8.
    return optax.chain(
        optax.clip_by_global_norm(LARGEST_GRADIENT), adam(config.learning_rate, config.steps)
    )


def start_sweep(
    config: SparsifyConfig, model: SparseLanguageModel, batches: Batches
) -> tuple[State, Shared]:
    """Return the stacked members before their first step, and what they share."""
    graph, parameters, rest = nnx.split(model, nnx.Param, ...)
    state = training.State(parameters, make_optimizer(config).init(parameters))
    groups, names = controllers(config), [name for name, _ in members(config)]
    shared = Shared(
        model=(graph, rest),
        members=Member(
            dense=jnp.array([name == DENSE for name in names]),
            scheduled=jnp.array([name == SCHEDULE for name in names]),
        ),
        controllers={name: pj.stack(groups[name]) for name in GROUPS},
        batches=batches,
    )
    models = {size: pj.stack([state] * len(group)) for size, group in together(config).items()}
    states = {name: pj.stack([controller.init() for controller in groups[name]]) for name in GROUPS}
    return State(models, states), shared


def member_step(
    config: SparsifyConfig, model: tuple[nnx.GraphDef, nnx.State], size: int
) -> Callable[..., tuple[training.State, Measured]]:
    """Return `step(state, member, control, windows) -> (state, measured)` at a capacity.

    The gates are deterministic and straight-through, so the rate of training is that of
    evaluation.
    """
    optimizer = make_optimizer(config)

    def step(
        state: training.State,
        member: Member,
        control: pj.SparsityControl,
        windows: Int[Array, "batch length"],
    ) -> tuple[training.State, Measured]:
        def total(parameters: nnx.State) -> tuple[Array, Measured]:
            merged = _merge(model, parameters)
            logits = merged(windows[:, :-1], dense=member.dense, capacity=size)
            loss, rates = mean_loss(logits, windows[:, 1:]), merged.rates()
            penalty = jnp.where(
                member.scheduled,
                pj.SparsityTarget(control.target, config.kind)(rates),
                pj.SparsityTarget(control.target, "l1")(rates),
            )
            balanced, _ = pj.balanced_loss(loss, penalty, sparsity_weight=control.weight)
            return balanced, Measured(loss, jnp.mean(rates), jnp.mean(merged.dropped()))

        gradient, measured = jax.grad(total, has_aux=True)(state.parameters)
        return descend(optimizer, state, gradient), measured

    return step


def sweep_step(config: SparsifyConfig) -> Step:
    """Return `step(state, shared, index) -> (state, metrics)`, one step of every member.

    Members of one capacity are computed together, and one capacity after another. All see the same
    batch. Each metric has one value for each member.
    """
    ends = np.cumsum([len(each) for each in controllers(config).values()])[:-1]

    def step(state: State, shared: Shared, index: Array) -> tuple[State, Metrics]:
        windows = shared.batches(index, config.batch_size, config.context + 1)
        control = controls(shared, state.controllers)
        models, parts = {}, {}
        for size, own in split(config, (shared.members, control)).items():
            train = jax.vmap(member_step(config, shared.model, size), (0, 0, 0, None))
            models[size], parts[size] = train(state.models[size], *own, windows)
        measured = in_order(config, parts)
        updated = {
            name: jax.vmap(_update)(shared.controllers[name], state.controllers[name], loss, rate)
            for name, loss, rate in zip(
                GROUPS, jnp.split(measured.loss, ends), jnp.split(measured.rate, ends), strict=True
            )
        }
        return State(models, updated), measured._asdict() | control._asdict()

    return step


def _update(controller: Any, state: Any, loss: Array, rate: Array) -> Any:
    return controller.update(state, value=loss, rate=rate)


@functools.partial(jax.jit, static_argnames="config")
def evaluate(
    config: SparsifyConfig,
    models: dict[int, training.State],
    shared: Shared,
    windows: Int[Array, "windows length"],
) -> Scores:
    """Score every member on `windows`."""

    def of_member(size: int, parameters: nnx.State, member: Member) -> Scores:
        def of_window(window: Int[Array, " length"]) -> Scores:
            model = _merge(shared.model, parameters)
            logits, masks, probabilities = model.with_gates(
                window[None, :-1], dense=member.dense, capacity=size
            )
            loss = mean_loss(logits, window[None, 1:])
            return Scores(loss, model.dropped(), masks[:, 0], probabilities[:, 0])

        return jax.lax.map(of_window, windows, batch_size=8)

    parts = {
        size: jax.vmap(functools.partial(of_member, size))(models[size].parameters, own)
        for size, own in split(config, shared.members).items()
    }
    return in_order(config, parts)


def member_loss(model: tuple[nnx.GraphDef, nnx.State], size: int) -> Callable[..., Array]:
    """Return `loss(parameters, dense, windows)`, the cross-entropy at a capacity."""

    def loss(parameters: nnx.State, dense: bool, windows: Int[Array, "batch length"]) -> Array:
        logits = _merge(model, parameters)(windows[:, :-1], dense=dense, capacity=size)
        return mean_loss(logits, windows[:, 1:])

    return loss


def _merge(model: tuple[nnx.GraphDef, nnx.State], parameters: nnx.State) -> SparseLanguageModel:
    graph, rest = model
    return nnx.merge(graph, parameters, rest, copy=True)
