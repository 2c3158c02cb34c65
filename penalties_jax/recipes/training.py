"""A training loop in compiled chunks: one trace, whatever the number of steps."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jaxtyping import Array, PyTree
from tqdm import tqdm

from penalties_jax.recipes.runs import Run, append_log, open_checkpoints, rewind_log

Metrics = dict[str, Array]
Step = Callable[[Any, PyTree, Array], tuple[Any, Metrics]]
Chunk = Callable[[Any, PyTree, int, int], tuple[Any, Metrics]]


class State(NamedTuple):
    """What an optimiser trains; of a sweep, with the members as the first axis of its leaves."""

    parameters: Any
    optimizer: optax.OptState


def descend(optimizer: optax.GradientTransformation, state: State, gradient: Any) -> State:
    """Take one step of the optimiser."""
    updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.parameters)
    return State(optax.apply_updates(state.parameters, updates), optimizer_state)


def split_members(tree: Any, counts: Mapping[str, int]) -> dict[str, Any]:
    """Split the first axis of every leaf into groups, one after another."""

    def part(first: int, last: int) -> Any:
        return jax.tree.map(lambda leaf: leaf[first:last], tree)

    ends = np.cumsum(list(counts.values())).tolist()
    return {name: part(end - counts[name], end) for name, end in zip(counts, ends, strict=True)}


def compile_chunk(step: Step) -> Chunk:
    """Compile a loop over `step(state, data, index) -> (state, metrics)`.

    Returns:
        `chunk(state, data, first, last)`, which runs the steps `first <= index < last` and returns
        the state after them and the mean of each metric over them. The bounds are traced, so a
        shorter last chunk is the same program.
    """

    @jax.jit
    def chunk(state, data, first, last):
        def body(index, carry):
            state, sums = carry
            state, metrics = step(state, data, index)
            return state, jax.tree.map(jnp.add, sums, metrics)

        _, shapes = jax.eval_shape(step, state, data, first)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        state, sums = jax.lax.fori_loop(first, last, body, (state, zeros))
        return state, jax.tree.map(lambda total: total / (last - first), sums)

    return chunk


def train(
    chunk: Chunk,
    state: Any,
    data: PyTree,
    *,
    first: int,
    last: int,
    every: int,
    title: str,
    record: Callable[[int, Any, Metrics], None] = lambda done, state, metrics: None,
) -> Any:
    """Return the state after the steps from `first` to `last`, in chunks of `every` at most.

    Chunks end at multiples of `every`. After each, `record` is called with the number of steps
    done, the state, and the mean of each metric over the chunk.
    """
    with tqdm(total=last, initial=first, desc=title, unit="step") as progress:
        while first < last:
            end = min(last, first - first % every + every)
            state, metrics = jax.block_until_ready(chunk(state, data, first, end))
            record(end, state, metrics)
            progress.set_postfix(loss=f"{metrics['loss'].mean():.3f}", refresh=False)
            progress.update(end - first)
            first = end
    return state


def train_run(
    run: Run,
    step: Step,
    state: Any,
    data: PyTree,
    *,
    members: Sequence[Mapping[str, Any]],
    placement: jax.sharding.Sharding | None = None,
) -> Any:
    """Return the state after a run's last step: from its last checkpoint on, logged and saved.

    Args:
        run: Where, and how many steps.
        step: As of `compile_chunk`; each of its metrics has one value for each member.
        state: The state before the first step.
        data: What the steps read.
        members: What the log's line of each member begins with.
        placement: Where state and data are; None is the first device.
    """
    # On a device by name, as what a checkpoint restores is: else resuming would be another program.
    state, data = jax.device_put((state, data), placement or jax.local_devices()[0])
    with open_checkpoints(run.folder) as checkpoints:
        done = checkpoints.latest_step() or 0
        if done:
            state = checkpoints.restore(done, args=ocp.args.StandardRestore(state))
        rewind_log(run.folder, done)

        def record(done: int, state: Any, metrics: Metrics) -> None:
            lines = [
                {"kind": "train", "step": done, **member}
                | {name: float(values[i]) for name, values in metrics.items()}
                for i, member in enumerate(members)
            ]
            append_log(run.folder, lines)
            checkpoints.save(done, args=ocp.args.StandardSave(state))

        return train(
            compile_chunk(step),
            state,
            data,
            first=done,
            last=run.settings["steps"],
            every=run.settings["log_every"],
            title="train",
            record=record,
        )


def adam(learning_rate: float, steps: int) -> optax.GradientTransformation:
    """Return Adam whose learning rate rises to `learning_rate` over the first tenth of the steps.

    It then falls along a cosine, to a tenth at the last.
    """
    return optax.adam(
        optax.warmup_cosine_decay_schedule(
            init_value=0.0,
            peak_value=learning_rate,
            warmup_steps=steps // 10,
            decay_steps=steps,
            end_value=learning_rate / 10,
        )
    )
