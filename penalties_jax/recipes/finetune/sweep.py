"""Fine-tune several members in one program: a stack of adapters, of KL weights or of budgets."""

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float
from tqdm import tqdm

import penalties_jax as pj
from penalties_jax.recipes import training
from penalties_jax.recipes.devices import is_main
from penalties_jax.recipes.finetune.kinds import Bytes, Scores, Tokens, Windows
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
    """What fine-tuning reads.

    Attributes:
        kind: What is computed with the model.
        model: The model, split into its graph and all but the adapters.
        start: The adapters before the first step, with which the model is the base model.
        kl_weights: The weight of each member's KL, where it has no budget.
        batches: The text to train on.
        budgets: What sets the weights instead, if anything.
    """

    kind: Bytes | Tokens
    model: tuple[nnx.GraphDef, nnx.State]
    start: nnx.State
    kl_weights: Float[Array, " members"]
    batches: Batches
    budgets: Budgets | None

    def with_adapters(self, adapters: nnx.State) -> Any:
        """Return the model of a member."""
        graph, rest = self.model
        return nnx.merge(graph, adapters, rest)

    def reference(self, windows: Windows) -> Array:
        """Return what the base model says of windows."""
        return self.kind.reference(self.with_adapters(self.start), windows)


def start_sweep(
    kind: Bytes | Tokens,
    adapted: nnx.Module,
    kl_weights: Sequence[float],
    batches: Batches,
    budgets: Budgets | None = None,
    *,
    optimizer: optax.GradientTransformation,
) -> tuple[State, Shared]:
    """Return the stacked members before their first step, all alike, and what they share."""
    graph, adapters, rest = nnx.split(adapted, nnx.LoRAParam, ...)
    member = training.State(adapters, optimizer.init(adapters))
    state = State(
        members=pj.stack([member] * len(kl_weights)),
        budgets=budgets and jax.vmap(lambda budget: budget.init())(budgets.controllers),
    )
    # Numbers of an objective become arrays, as all that is read.
    kind, weights = jax.tree.map(jnp.asarray, kind), jnp.array(kl_weights)
    return state, Shared(kind, (graph, rest), adapters, weights, batches, budgets)


def sweep_step(optimizer: optax.GradientTransformation, *, batch_size: int, length: int) -> Step:
    """Return `step(state, shared, index) -> (state, metrics)`, one step of every member.

    All members see the same batch, and what the base model says of it is computed once. The
    metrics are those of the kind; each has one value for each member.

    With budgets, the weight of the KL is that of the member's controller, "kl/weight", which reads
    "kl/measured", the KL of the member after the step; "kl/held_out" is what no controller reads.
    """

    def step(state: State, shared: Shared, index: Array) -> tuple[State, Metrics]:
        windows = shared.batches(index, batch_size, length)
        reference = shared.reference(windows)

        def update(member: training.State, kl_weight: Array) -> tuple[training.State, Metrics]:
            def total(adapters):
                model = shared.with_adapters(adapters)
                return shared.kind.total(model, kl_weight, reference, windows)

            gradient, metrics = jax.grad(total, has_aux=True)(member.parameters)
            return descend(optimizer, member, gradient), metrics

        weights = kl_weights(state, shared)
        members, metrics = shared.kind.over_members(update, state.members, weights)
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
    """Return the weight of each member's KL, for the step at hand."""
    if shared.budgets:
        return jax.vmap(operator.call)(shared.budgets.controllers, state.budgets).weight
    return shared.kl_weights


# Windows that are scored at once.
FEW = 16


def evaluate(members: training.State, shared: Shared, windows: Windows) -> Scores:
    """Score every member, and the base model, on `windows`, a few at a time."""
    parts = [windows[first : first + FEW] for first in range(0, len(windows), FEW)]
    with tqdm(parts, desc="evaluate", unit="part", disable=not is_main()) as progress:
        scores = [jax.block_until_ready(score(members, shared, part)) for part in progress]
    shares = jnp.array([len(part) for part in parts]) / len(windows)
    return jax.tree.map(lambda *values: shares @ jnp.stack(values), *scores)


@jax.jit
def score(members: training.State, shared: Shared, windows: Windows) -> Scores:
    """Score every member, and the base model, on `windows`."""
    reference = shared.reference(windows)

    def of_member(adapters: nnx.State) -> Scores:
        return shared.kind.score(shared.with_adapters(adapters), reference, windows)

    return shared.kind.over_members(of_member, members.parameters)
