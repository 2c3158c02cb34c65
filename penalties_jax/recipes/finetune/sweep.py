"""Fine-tune several members at once: one program, a stack of objectives and of adapters."""

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

import penalties_jax as pj
from penalties_jax.recipes import training
from penalties_jax.recipes.language_model import LanguageModel, mean_loss, with_adapters
from penalties_jax.recipes.text import Batches, Rounds
from penalties_jax.recipes.training import Metrics, Step, descend


class State(NamedTuple):
    """What fine-tuning changes: the stacked members, and their budgets' states, if any."""

    members: training.State
    budgets: Any


class Budgets(NamedTuple):
    """What sets the members' KL weights: stacked controllers that read a KL on some windows.

    On others it is logged only.
    """

    controllers: pj.Budget
    measured: Rounds
    held_out: Rounds


class Shared(NamedTuple):
    """What fine-tuning reads: two models, split into graph and rest, and the stacked objectives.

    The base model is whole, the adapted one without the adapters.
    """

    base: tuple[nnx.GraphDef, nnx.State]
    adapted: tuple[nnx.GraphDef, nnx.State]
    objectives: pj.Objective
    batches: Batches
    budgets: Budgets | None


class Scores(NamedTuple):
    """Means over windows of text, in nats per byte: two cross-entropies, and KL(member || base)."""

    base_loss: Float[Array, " members"]
    loss: Float[Array, " members"]
    kl: Float[Array, " members"]


def start_sweep(
    base: LanguageModel,
    objectives: Sequence[pj.Objective],
    batches: Batches,
    budgets: Budgets | None = None,
    *,
    optimizer: optax.GradientTransformation,
    rank: int,
    seed: int,
) -> tuple[State, Shared]:
    """Return the stacked members before their first step, all alike, and what they share."""
    graph, adapters, rest = nnx.split(
        with_adapters(base, rank, rngs=nnx.Rngs(seed)), nnx.LoRAParam, ...
    )
    member = training.State(adapters, optimizer.init(adapters))
    state = State(
        members=pj.stack([member] * len(objectives)),
        budgets=budgets and jax.vmap(lambda budget: budget.init())(budgets.controllers),
    )
    shared = Shared(nnx.split(base), (graph, rest), pj.stack(objectives), batches, budgets)
    return state, shared


def sweep_step(optimizer: optax.GradientTransformation, *, batch_size: int, length: int) -> Step:
    """Return `step(state, shared, index) -> (state, metrics)`, one step of every member.

    All members see the same batch, and the base model's logits of it are computed once. An
    objective's outputs are "logits", "reference_logits" and "targets". The metrics are its
    own and, under "gradient/<name>", the norm of the gradient of each with respect to the logits,
    where a divergence has gradient 0 at its minimum. Each has one value for each member.

    With budgets, the weight of "kl" is that of the member's controller, "kl/weight", which reads
    "kl/measured", the KL of the member after the step; "kl/held_out" is what no controller reads.
    """

    def step(state: State, shared: Shared, index: Array) -> tuple[State, Metrics]:
        windows = shared.batches(index, batch_size, length)
        reference_logits = nnx.merge(*shared.base)(windows[:, :-1])

        def update(
            member: training.State, objective: pj.Objective
        ) -> tuple[training.State, Metrics]:
            def total(adapters):
                outputs = {
                    "logits": _logits(shared, adapters, windows),
                    "reference_logits": reference_logits,
                    "targets": windows[:, 1:],
                }
                value, metrics = objective(outputs, step=index)
                return value, (metrics, outputs)

            gradient, (metrics, outputs) = jax.grad(total, has_aux=True)(member.parameters)
            norms = objective.grad_norms(outputs, step=index, wrt=("logits",))
            metrics |= {f"gradient/{name}": norm for name, norm in norms.items()}
            return descend(optimizer, member, gradient), metrics

        weights = kl_weights(state, shared)
        weighted = jax.vmap(lambda objective, weight: objective.with_weight("kl", weight))
        members, metrics = jax.vmap(update)(state.members, weighted(shared.objectives, weights))
        if not shared.budgets:
            return State(members, None), metrics

        controllers, *rounds = shared.budgets
        kl, held_out = (score(members, shared, each(index, batch_size)).kl for each in rounds)
        budgets = jax.vmap(lambda budget, state, kl: budget.update(state, kl=kl))(
            controllers, state.budgets, kl
        )
        metrics |= {"kl/weight": weights, "kl/measured": kl, "kl/held_out": held_out}
        return State(members, budgets), metrics

    return step


@jax.jit
def kl_weights(state: State, shared: Shared) -> Float[Array, " members"]:
    """Return the weight of each member's "kl", for the step at hand."""
    if shared.budgets:
        return jax.vmap(operator.call)(shared.budgets.controllers, state.budgets).weight
    return shared.objectives.terms["kl"].weight


def _logits(
    shared: Shared, adapters: nnx.State, windows: Int[Array, "batch length"]
) -> Float[Array, "batch length-1 256"]:
    graph, rest = shared.adapted
    return nnx.merge(graph, adapters, rest)(windows[:, :-1])


@jax.jit
def evaluate(
    members: training.State, shared: Shared, windows: Int[Array, "windows length"]
) -> Scores:
    """Score every member, and the base model, on `windows`, a few at a time."""
    scores = jax.lax.map(
        lambda window: score(members, shared, window[None]), windows, batch_size=16
    )
    return jax.tree.map(lambda values: values.mean(axis=0), scores)


def score(members: training.State, shared: Shared, windows: Int[Array, "windows length"]) -> Scores:
    """Score every member, and the base model, on `windows`."""
    targets = windows[:, 1:]
    base_logits = nnx.merge(*shared.base)(windows[:, :-1])

    def of_member(adapters: nnx.State) -> Scores:
        logits = _logits(shared, adapters, windows)
        return Scores(
            base_loss=mean_loss(base_logits, targets),
            loss=mean_loss(logits, targets),
            kl=pj.kl_from_logits(logits, base_logits),
        )

    return jax.vmap(of_member)(members.parameters)
