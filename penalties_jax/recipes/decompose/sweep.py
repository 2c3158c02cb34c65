"""Train the members of a sweep at once: one program, a stack of penalties and of components."""

import functools
from collections import Counter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

import penalties_jax as pj
from penalties_jax.recipes.decompose.components import Scores, Sites, losses, recovery, score, start
from penalties_jax.recipes.decompose.config import LP, SMOOTH_L0, DecomposeConfig, members, size_of
from penalties_jax.recipes.decompose.targets import Target, ToyModel
from penalties_jax.recipes.devices import make_mesh, split_over_devices
from penalties_jax.recipes.runs import Run
from penalties_jax.recipes.training import (
    Metrics,
    State,
    Step,
    Trained,
    descend,
    split_members,
    train,
)


class Shared(NamedTuple):
    """What training reads: the network, the weighted penalties of each name, stacked, random keys.

    `keys` are those of the members, `key` is that of the batches.
    """

    target: Target
    penalties: dict[str, Any]
    keys: Array
    key: Array


def penalties(config: DecomposeConfig) -> dict[str, pj.ImportanceMinimality]:
    """Return the two penalties, without a coefficient, annealed over the steps."""
    anneal = functools.partial(pj.anneal_fraction, total_steps=size_of(config).steps)
    per_value = {
        LP: pj.Lp(p=anneal(2.0, config.p_final)),
        SMOOTH_L0: pj.SmoothL0(gamma=anneal(1.0, config.gamma_final)),
    }
    return {
        name: pj.ImportanceMinimality(penalty, beta=config.beta)
        for name, penalty in per_value.items()
    }


def train_sweep(config: DecomposeConfig, run: Run, target: Target) -> tuple[Trained, Shared]:
    """Train all members; return that, and what they shared."""
    size, everyone, plain = size_of(config), members(config), penalties(config)
    weighted = {
        name: pj.stack([m.coefficient * plain[name] for m in everyone if m.penalty == name])
        for name in plain
    }
    keys = jnp.stack([jax.random.key(member.seed) for member in everyone])
    shared = Shared(target, weighted, keys, jax.random.key(config.seed))
    optimizer = optax.adam(optax.cosine_decay_schedule(size.learning_rate, size.steps))

    @jax.jit
    def begin(shared: Shared) -> State:
        def one(key: Array) -> State:
            sites = start(key, shared.target, size.components)
            return State(sites, optimizer.init(sites))

        return jax.vmap(one)(shared.keys)

    trained = train(
        run,
        sweep_step(config, optimizer),
        begin(shared),
        shared,
        mesh=make_mesh(config),
        steps=size.steps,
        every=config.log_every,
        members=[{"member": member.label, **member._asdict()} for member in everyone],
    )
    return trained, shared


def sweep_step(config: DecomposeConfig, optimizer: optax.GradientTransformation) -> Step:
    """Return `step(state, shared, index) -> (state, metrics)`, one step of every member.

    The batch is that of all devices. Each metric has one value for each member.
    """
    size = size_of(config)
    counts = Counter(member.penalty for member in members(config))
    # Both penalties' sparsities, at the end of their anneals, read every member on one axis.
    final = {name: penalty.at(size.steps).penalty for name, penalty in penalties(config).items()}
    log = functools.partial(
        pj.importance_metrics, penalties=final, beta=config.beta, thresholds=(config.threshold,)
    )

    def step(state: State, shared: Shared, index: Array) -> tuple[State, Metrics]:
        batch_key = jax.random.fold_in(shared.key, index)
        inputs = split_over_devices(shared.target.sample(batch_key, size.batch_size))
        keys = jax.vmap(lambda key: jax.random.fold_in(key, index))(shared.keys)

        def total(sites: Sites) -> Any:
            """A sum over members, whose gradient is that of each."""
            parts = jax.vmap(losses, (0, None, 0, None))(keys, shared.target, sites, inputs)
            importances = split_members(parts.importances, counts)
            minimality = [
                jax.vmap(lambda penalty, c: penalty.at(index)(c))(
                    shared.penalties[name], importances[name]
                )
                for name in counts
            ]
            weighted = size.faithfulness_weight * parts.faithfulness + parts.reconstruction
            return jnp.sum(weighted + jnp.concatenate(minimality)), parts

        gradient, parts = jax.grad(total, has_aux=True)(state.parameters)
        metrics = {"loss": parts.reconstruction, "faithfulness": parts.faithfulness}
        metrics |= jax.vmap(log)(parts.importances)
        return jax.vmap(functools.partial(descend, optimizer))(state, gradient), metrics

    return step


def evaluate(config: DecomposeConfig, sites: Sites, shared: Shared) -> tuple[Scores, Array | None]:
    """Judge every member on a batch that nothing was trained on, and how well a toy was found."""
    key = jax.random.fold_in(shared.key, 2**31)
    count = 16 * size_of(config).batch_size

    @jax.jit
    def judged(sites: Sites, shared: Shared) -> tuple[Scores, Any]:
        inputs = shared.target.unseen.sample(key, count)

        def one(member: tuple[Array, Sites]) -> tuple[Scores, Any]:
            key, sites = member
            scores = score(key, shared.target, sites, inputs, threshold=config.threshold)
            found = recovery(shared.target, sites) if isinstance(shared.target, ToyModel) else None
            return scores, found

        # One after another: side by side, the adversaries' activations take gigabytes.
        return jax.lax.map(one, (shared.keys, sites))

    return judged(sites, shared)
