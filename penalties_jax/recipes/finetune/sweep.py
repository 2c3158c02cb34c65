"""Fine-tune several members at once: one program, a stack of objectives and of adapters."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

import penalties_jax as pj
from penalties_jax.recipes.language_model import LanguageModel, mean_loss, with_adapters
from penalties_jax.recipes.text import Batches
from penalties_jax.recipes.training import Metrics, State, Step, descend


class Shared(NamedTuple):
    """What fine-tuning reads: two models, split into graph and rest, and the stacked objectives.

    The base model is whole, the adapted one without the adapters.
    """

    base: tuple[nnx.GraphDef, nnx.State]
    adapted: tuple[nnx.GraphDef, nnx.State]
    objectives: pj.Objective
    batches: Batches


class Scores(NamedTuple):
    """Means over windows of text, in nats per byte: two cross-entropies, and KL(member || base)."""

    base_loss: Float[Array, " members"]
    loss: Float[Array, " members"]
    kl: Float[Array, " members"]


def start_sweep(
    base: LanguageModel,
    objectives: Sequence[pj.Objective],
    batches: Batches,
    *,
    optimizer: optax.GradientTransformation,
    rank: int,
    seed: int,
) -> tuple[State, Shared]:
    """Return the stacked members before their first step, all alike, and what they share."""
    graph, adapters, rest = nnx.split(
        with_adapters(base, rank, rngs=nnx.Rngs(seed)), nnx.LoRAParam, ...
    )
    members = pj.stack([State(adapters, optimizer.init(adapters))] * len(objectives))
    shared = Shared(nnx.split(base), (graph, rest), pj.stack(objectives), batches)
    return members, shared


def sweep_step(optimizer: optax.GradientTransformation, *, batch_size: int, length: int) -> Step:
    """Return `step(members, shared, index) -> (members, metrics)`, one step of every member.

    All members see the same batch, and the base model's logits of it are computed once. An
    objective's outputs are "logits", "reference_logits" and "targets". The metrics are its
    own and, under "gradient/<name>", the norm of the gradient of each with respect to the logits,
    where a divergence has gradient 0 at its minimum. Each has one value for each member.
    """

    def step(members: State, shared: Shared, index: Array) -> tuple[State, Metrics]:
        windows = shared.batches(index, batch_size, length)
        reference_logits = nnx.merge(*shared.base)(windows[:, :-1])

        def update(member: State, objective: pj.Objective) -> tuple[State, Metrics]:
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

        return jax.vmap(update)(members, shared.objectives)

    return step


def _logits(
    shared: Shared, adapters: nnx.State, windows: Int[Array, "batch length"]
) -> Float[Array, "batch length-1 256"]:
    graph, rest = shared.adapted
    return nnx.merge(graph, adapters, rest)(windows[:, :-1])


@jax.jit
def evaluate(members: State, shared: Shared, windows: Int[Array, "windows length"]) -> Scores:
    """Score every member, and the base model, on `windows`."""

    def score(window: Int[Array, " length"]) -> Scores:
        windows, targets = window[None], window[None, 1:]
        base_logits = nnx.merge(*shared.base)(windows[:, :-1])

        def member_score(adapters: nnx.State) -> Scores:
            logits = _logits(shared, adapters, windows)
            return Scores(
                base_loss=mean_loss(base_logits, targets),
                loss=mean_loss(logits, targets),
                kl=pj.kl_from_logits(logits, base_logits),
            )

        return jax.vmap(member_score)(members.parameters)

    scores = jax.lax.map(score, windows, batch_size=16)
    return jax.tree.map(lambda values: values.mean(axis=0), scores)
