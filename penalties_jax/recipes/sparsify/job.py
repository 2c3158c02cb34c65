"""Learning to skip from beginning to end."""

import json

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from penalties_jax.recipes import text
from penalties_jax.recipes.devices import choose_mesh, is_main, make_mesh
from penalties_jax.recipes.files import write_file
from penalties_jax.recipes.pretraining import pretrained
from penalties_jax.recipes.report import format_table, likely_cause, write_results
from penalties_jax.recipes.runs import Run, open_run
from penalties_jax.recipes.sparsify.config import (
    DENSE,
    DUAL,
    SCHEDULE,
    SparsifyConfig,
    capacity,
    check,
    kind,
    members,
)
from penalties_jax.recipes.sparsify.model import SparseLanguageModel
from penalties_jax.recipes.sparsify.results import (
    IMAGES,
    TIMES,
    Result,
    Shown,
    report,
    table_of_times,
)
from penalties_jax.recipes.sparsify.sweep import (
    Shared,
    State,
    controls,
    evaluate,
    start_sweep,
    sweep_step,
)
from penalties_jax.recipes.sparsify.timing import Times, measure
from penalties_jax.recipes.training import Trained, train


def sparsify(config: SparsifyConfig) -> list[Result]:
    """Run the job: train dense or load, train towards the targets, evaluate, write everything.

    Raises:
        UsageError: If an option, the text or the folder can't be used. Nothing is written then.
        RunError: If every member has diverged; what there is, is written.
        StoppedError: If a signal asked for it.
    """
    check(config)
    config = choose_mesh(config, config.batch_size)
    corpus = text.read_text(config.text, text.help_topics)
    text.check_length(corpus, batch_size=config.batch_size, context=config.context)
    with open_run(config, (*IMAGES, TIMES), text=corpus.describe()) as run:
        trained, shared = _train(config, run, corpus)
        windows = text.spread_windows(
            corpus.held_out, count=config.evaluation_windows, length=config.context + 1
        )
        results, window = _evaluate(config, trained.state, shared, windows)
        times = measure(config, trained.state, shared)
        if times and is_main():
            _write_times(run, times)
        shown = report(results, times, trained.log.records, window, corpus)
        write_results(run, trained, results, shown, _cause(config, trained))
    return results


def _write_times(run: Run, times: list[Times]) -> None:
    """Print them, and write them to a file of their own: a log is the same in every run."""
    print(format_table(*table_of_times(times)), end="\n\n")
    lines = "".join(f"{json.dumps(each._asdict())}\n" for each in times)
    write_file(run.folder / TIMES, lines.encode("utf-8"))


def _cause(config: SparsifyConfig, trained: Trained) -> str:
    own = {
        DENSE: {},
        SCHEDULE: {"sparsity_weight": config.sparsity_weight},
        DUAL: {"dual_step_size": config.dual_step_size},
    }
    names = ("learning_rate", "sparsity_weight", "dual_step_size")
    swept = [own[name] for name, _ in members(config)]
    return likely_cause(config, SparsifyConfig(), names, swept, trained.diverged)


def _train(config: SparsifyConfig, run: Run, corpus: text.Corpus) -> tuple[Trained, Shared]:
    model = pretrained(
        SparseLanguageModel,
        config,
        corpus,
        batch_size=config.batch_size,
        dense=True,
    )
    state, shared = start_sweep(config, model, text.batches(corpus, config.seed))
    labels = [{"member": f"{name} {target:g}"} for name, target in members(config)]
    trained = train(
        run,
        sweep_step(config),
        state,
        shared,
        mesh=make_mesh(config),
        steps=config.steps,
        every=config.log_every,
        members=labels,
    )
    return trained, shared


def _evaluate(
    config: SparsifyConfig, state: State, shared: Shared, windows: Int[Array, "windows length"]
) -> tuple[list[Result], Shown]:
    scores = map(np.asarray, evaluate(config, state.models, shared, windows))
    losses, dropped, masks, probabilities = scores
    loss, finite = losses.mean(axis=1), np.isfinite(losses.mean(axis=1))
    # The gates of a member that has diverged say nothing.
    rate = np.where(finite, 1 - masks.mean(axis=(1, 2, 3)), np.nan)
    room = np.where(finite, dropped.mean(axis=(1, 2)), np.nan)
    weight = np.asarray(controls(shared, state.controllers).weight)
    spread = probabilities.std(axis=(1, 3)).mean(axis=1)
    columns = (rate, room, loss, loss - loss[0], spread)
    results = [
        Result(
            *(name, target, kind(config, name), float(weight[i]), capacity(config, target)),
            *(float(column[i]) for column in columns),
        )
        for i, (name, target) in enumerate(members(config))
    ]
    # The picture is of prose: of the window with the most letters.
    shown = int(jnp.argmax(jnp.sum((windows >= ord("a")) & (windows <= ord("z")), axis=1)))
    return results, Shown(np.asarray(windows[shown]), masks[:, shown])
