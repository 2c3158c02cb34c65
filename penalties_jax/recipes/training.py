"""A training loop in compiled chunks: one trace, whatever the number of steps."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree
from tqdm import tqdm

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
