"""A training loop in compiled chunks: one trace, whatever the number of steps."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, PyTree
from tqdm import tqdm

from penalties_jax.recipes.checkpoints import Checkpoints
from penalties_jax.recipes.devices import agree, is_main, kept_on_every_device, to_every_device
from penalties_jax.recipes.files import tell
from penalties_jax.recipes.runs import CHECKPOINTS, Log, Run, fingerprint
from penalties_jax.recipes.stopping import stop_if_asked

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
        means = jax.tree.map(lambda total: total / (last - first), sums)
        return kept_on_every_device((state, means))

    return chunk


class Trained(NamedTuple):
    """What training ends with.

    Attributes:
        state: The state after the last step, on the host.
        step: The number of steps that were done: all, unless every member has diverged.
        log: The log, with a line for each member that was still training.
        diverged: The step by which the loss of a member, by its number, was no finite number.
    """

    state: Any
    step: int
    log: Log
    diverged: dict[int, int]


def train(
    run: Run,
    step: Step,
    state: Any,
    data: PyTree,
    *,
    mesh: Mesh,
    steps: int,
    every: int,
    members: Sequence[Mapping[str, Any]],
    title: str = "train",
) -> Trained:
    """Train from the last checkpoint in a folder on, or else from the first step.

    A chunk of `every` steps at most is logged, then saved, and then the run may be stopped. A
    member whose "loss" or "total" is no finite number has diverged: it has no further lines, and
    when all have, training ends.

    Args:
        run: Where log and checkpoints are, and what tells this training from others.
        step: As of `compile_chunk`; each of its metrics has one value for each member.
        state: The state before the first step.
        data: What the steps read.
        mesh: The devices, each of which holds state and data.
        steps: The number of steps.
        every: The steps between two checkpoints, which are at its multiples and at the end.
        members: What the log's line of each member begins with.
        title: The name of the progress bar.

    Raises:
        StoppedError: If a signal asked for it.
    """
    if is_main():
        run.folder.mkdir(parents=True, exist_ok=True)
    checkpoints = Checkpoints(run.folder / CHECKPOINTS, fingerprint(run.settings))
    log = Log(run.folder)
    state = jax.tree.map(np.asarray, state)
    done, state, content = checkpoints.latest(state)
    agree("the checkpoint that they find", (done, content))
    log.restore(content)
    # Both ways from the host to devices by name: else resuming would be another program.
    state, data = to_every_device((state, data), mesh)
    chunk, diverged = compile_chunk(step), _diverged(log, members)
    hidden = not is_main()
    with tqdm(total=steps, initial=done, desc=title, unit="step", disable=hidden) as progress:
        while done < steps and len(diverged) < len(members):
            stop_if_asked()
            end = min(steps, done - done % every + every)
            with jax.set_mesh(mesh):
                state, means = chunk(state, data, done, end)
            metrics = {name: np.asarray(values, float).tolist() for name, values in means.items()}
            training = [i for i in range(len(members)) if i not in diverged]
            log.append(
                {"kind": "train", "step": end, **members[i]}
                | {name: values[i] for name, values in metrics.items()}
                for i in training
            )
            for i, record in zip(training, log.records[-len(training) :], strict=True):
                if not _is_finite(record):
                    diverged[i] = end
                    tell(f"{_words(title, members[i])}: diverged, no finite loss by step {end}")
            checkpoints.save(end, state, log.content)
            progress.set_postfix(loss=f"{np.mean(metrics['loss']):.3f}", refresh=False)
            progress.update(end - done)
            done = end
    return Trained(jax.tree.map(np.asarray, state), done, log, diverged)


def _diverged(log: Log, members: Sequence[Mapping[str, Any]]) -> dict[int, int]:
    """Return at which step each member has diverged, of those that have, as the log says."""
    return {
        i: record["step"]
        for record in log.records
        if not _is_finite(record)
        for i, member in enumerate(members)
        if member.items() <= record.items()
    }


def _is_finite(record: Mapping[str, Any]) -> bool:
    """Whether a loss is, and what is minimised, where that is more."""
    return all(math.isfinite(record.get(name, 0)) for name in ("loss", "total"))


def _words(title: str, member: Mapping[str, Any]) -> str:
    label = member.get("member") or ", ".join(f"{name} {x}" for name, x in member.items())
    return ", ".join(filter(None, (title, label)))


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
