"""A training loop in compiled chunks: one trace, whatever the number of steps."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
from jaxtyping import Array, PyTree
from tqdm import tqdm

from penalties_jax.recipes.runs import append_log, open_checkpoints, rewind_log

Metrics = dict[str, Array]
Step = Callable[[Any, PyTree, Array], tuple[Any, Metrics]]


def compile_chunk(step: Step) -> Callable[[Any, PyTree, int, int], tuple[Any, Metrics]]:
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
    chunk: Callable[[Any, PyTree, int, int], tuple[Any, Metrics]],
    state: Any,
    data: PyTree,
    *,
    first: int,
    last: int,
    every: int,
    title: str,
    record: Callable[[int, Any, Metrics], None] = lambda done, state, metrics: None,
) -> Any:
    """Run the steps from `first` to `last` in chunks that end at multiples of `every`.

    Args:
        chunk: A compiled chunk of steps.
        state: The state before the first step.
        data: What the steps read.
        first: The first step.
        last: The step to stop before.
        every: The length of a chunk.
        title: The name of the progress bar, which shows the mean loss.
        record: Called after each chunk with the number of steps done, the state, and the mean of
            each metric over the chunk.

    Returns:
        The state after the last step.
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
    step: Step,
    state: Any,
    data: PyTree,
    *,
    folder: Path,
    steps: int,
    every: int,
    title: str,
    records: Callable[[Metrics], list[dict[str, Any]]],
    placement: jax.sharding.Sharding | None = None,
) -> Any:
    """Train in a run's folder: from its last checkpoint on, with a log and checkpoints.

    Args:
        step: As of `compile_chunk`.
        state: The state before the first step.
        data: What the steps read.
        folder: The folder of the run.
        steps: The number of steps in all.
        every: The number of steps between two lines of the log, and two checkpoints.
        title: The name of the progress bar.
        records: From the means over a chunk to its lines in the log.
        placement: Where state and data are; None is the first device.

    Returns:
        The state after the last step.
    """
    # On a device by name, as what a checkpoint restores is: else resuming would be another program.
    state, data = jax.device_put((state, data), placement or jax.local_devices()[0])
    with open_checkpoints(folder) as checkpoints:
        done = checkpoints.latest_step() or 0
        if done:
            state = checkpoints.restore(done, args=ocp.args.StandardRestore(state))
        rewind_log(folder, done)

        def record(done: int, state: Any, metrics: Metrics) -> None:
            append_log(
                folder, [{"kind": "train", "step": done} | line for line in records(metrics)]
            )
            checkpoints.save(done, args=ocp.args.StandardSave(state))

        return train(
            compile_chunk(step),
            state,
            data,
            first=done,
            last=steps,
            every=every,
            title=title,
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
