"""Train several members towards their rates at once: one program, groups by controller."""

import functools
import operator
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

import penalties_jax as pj
from penalties_jax.functional.sparsity import Kind
from penalties_jax.recipes import training
from penalties_jax.recipes.language_model import mean_loss
from penalties_jax.recipes.sparsify.config import DENSE, DUAL, GROUPS, SCHEDULE, SparsifyConfig
from penalties_jax.recipes.sparsify.config import members as members_of
from penalties_jax.recipes.sparsify.model import SparseLanguageModel
from penalties_jax.recipes.text import Batches
from penalties_jax.recipes.training import Metrics, Step, descend, split_members


class State(NamedTuple):
    """What training changes: the members, group after group, and the controllers' states."""

    models: training.State
    controllers: dict[str, Any]


class Shared(NamedTuple):
    """What training reads: the model without its parameters, and the controllers, stacked.

    The members that are `dense` skip nothing.
    """

    model: tuple[nnx.GraphDef, nnx.State]
    dense: Bool[Array, " members"]
    controllers: dict[str, Any]
    batches: Batches


class Scores(NamedTuple):
    """Cross-entropies, where layers compute a position (1, else 0), and how probable that is."""

    loss: Float[Array, "windows members"]
    masks: Float[Array, "windows members layers time"]
    probabilities: Float[Array, "windows members layers time"]


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


def start_sweep(
    config: SparsifyConfig,
    model: SparseLanguageModel,
    batches: Batches,
    optimizer: optax.GradientTransformation,
) -> tuple[State, Shared]:
    """Return the stacked members before their first step, and what they share."""
    graph, parameters, rest = nnx.split(model, nnx.Param, ...)
    groups, members = controllers(config), members_of(config)
    parameters = pj.stack([parameters] * len(members))
    state = State(
        training.State(parameters, jax.vmap(optimizer.init)(parameters)),
        {name: pj.stack([controller.init() for controller in groups[name]]) for name in GROUPS},
    )
    shared = Shared(
        model=(graph, rest),
        dense=jnp.array([name == DENSE for name, _ in members]),
        controllers={name: pj.stack(groups[name]) for name in GROUPS},
        batches=batches,
    )
    return state, shared


def sweep_step(config: SparsifyConfig, optimizer: optax.GradientTransformation) -> Step:
    """Return `step(state, shared, index) -> (state, metrics)`, one step of every member.

    The gates are deterministic and straight-through, so the rate of training is that of
    evaluation. All members see the same batch. Each metric has one value for each member.
    """
    kinds: dict[str, Kind] = {DENSE: "l1", SCHEDULE: config.kind, DUAL: "l1"}
    counts = Counter(name for name, _ in members_of(config))

    def each(function: Callable[..., Any], *groups: dict[str, Any]) -> dict[str, Any]:
        """Call `function` on every member of each group."""
        return {name: jax.vmap(function)(*(group[name] for group in groups)) for name in GROUPS}

    def update(controller: Any, state: Any, measured: tuple[Array, Array]) -> Any:
        loss, rate = measured
        return controller.update(state, value=loss, rate=rate)

    def balanced(kind: Kind, measured: tuple[Array, Array], control: pj.SparsityControl) -> Array:
        loss, rates = measured
        penalty = pj.SparsityTarget(control.target, kind)(rates)
        return pj.balanced_loss(loss, penalty, sparsity_weight=control.weight)[0]

    def step(state: State, shared: Shared, index: Array) -> tuple[State, Metrics]:
        windows = shared.batches(index, config.batch_size, config.context + 1)
        controls = each(operator.call, shared.controllers, state.controllers)

        def of_member(parameters: Any, dense: Array) -> tuple[Array, Array]:
            model = _merge(shared, parameters)
            loss = mean_loss(model(windows[:, :-1], dense=dense), windows[:, 1:])
            return loss, jnp.stack([layer.rate[...] for layer in model.layers()])

        def total(parameters: Any) -> tuple[Array, tuple[Array, Array]]:
            """A sum over members, whose gradient is that of each."""
            losses, rates = jax.vmap(of_member)(parameters, shared.dense)
            groups = split_members((losses, rates), counts)
            totals = [
                jax.vmap(functools.partial(balanced, kinds[name]))(groups[name], controls[name])
                for name in GROUPS
            ]
            return jnp.sum(jnp.concatenate(totals)), (losses, jnp.mean(rates, 1))

        gradients, measured = jax.grad(total, has_aux=True)(state.models.parameters)
        models = jax.vmap(functools.partial(descend, optimizer))(state.models, gradients)
        groups = split_members(measured, counts)
        updated = each(update, shared.controllers, state.controllers, groups)
        control = jax.tree.map(lambda *values: jnp.concatenate(values), *controls.values())
        losses, rates = measured
        return State(models, updated), {"loss": losses, "rate": rates, **control._asdict()}

    return step


@jax.jit
def evaluate(parameters: Any, shared: Shared, windows: Int[Array, "windows length"]) -> Scores:
    """Score every member on `windows`."""

    def of_window(window: Int[Array, " length"]) -> Scores:
        inputs, targets = window[None, :-1], window[None, 1:]

        def of_member(parameters: Any, dense: Array) -> Scores:
            model = _merge(shared, parameters)
            logits, masks, probabilities = model.with_gates(inputs, dense=dense)
            return Scores(mean_loss(logits, targets), masks[:, 0], probabilities[:, 0])

        return jax.vmap(of_member)(parameters, shared.dense)

    return jax.lax.map(of_window, windows, batch_size=8)


def _merge(shared: Shared, parameters: nnx.State) -> SparseLanguageModel:
    graph, rest = shared.model
    return nnx.merge(graph, parameters, rest, copy=True)
