"""Learning to skip from beginning to end."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Int

from penalties_jax.recipes import text
from penalties_jax.recipes.devices import choose_mesh, make_mesh
from penalties_jax.recipes.pretraining import pretrained
from penalties_jax.recipes.report import likely_cause, write_results
from penalties_jax.recipes.runs import Run, open_run
from penalties_jax.recipes.sparsify.config import (
    DENSE,
    DUAL,
    SCHEDULE,
    SparsifyConfig,
    check,
    members,
)
from penalties_jax.recipes.sparsify.model import SparseLanguageModel
from penalties_jax.recipes.sparsify.results import IMAGES, Result, Shown, report
from penalties_jax.recipes.sparsify.sweep import Shared, evaluate, start_sweep, sweep_step
from penalties_jax.recipes.training import Trained, adam, train

LARGEST_GRADIENT = 1.0


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
    with open_run(config, IMAGES, text=corpus.describe()) as run:
        trained, shared = _train(config, run, corpus)
        windows = text.spread_windows(
            corpus.held_out, count=config.evaluation_windows, length=config.context + 1
        )
        results, window = _evaluate(config, trained.state.models.parameters, shared, windows)
        shown = report(results, trained.log.records, window, corpus)
        write_results(run, trained, results, shown, _cause(config, trained))
    return results


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
    # At a rate of 0, where the gates start, the derivative of "kl" is as large as 1e8.
    optimizer = optax.chain(
        optax.clip_by_global_norm(LARGEST_GRADIENT), adam(config.learning_rate, config.steps)
    )
    state, shared = start_sweep(config, model, text.batches(corpus, config.seed), optimizer)
    labels = [{"member": f"{name} {target:g}"} for name, target in members(config)]
    trained = train(
        run,
        sweep_step(config, optimizer),
        state,
        shared,
        mesh=make_mesh(config),
        steps=config.steps,
        every=config.log_every,
        members=labels,
    )
    return trained, shared


def _evaluate(
    config: SparsifyConfig, parameters: Any, shared: Shared, windows: Int[Array, "windows length"]
) -> tuple[list[Result], Shown]:
    losses, masks, probabilities = map(np.asarray, evaluate(parameters, shared, windows))
    loss = losses.mean(axis=0)
    # The gates of a member that has diverged say nothing.
    rate = np.where(np.isfinite(loss), 1 - masks.mean(axis=(0, 2, 3)), np.nan)
    spread = probabilities.std(axis=(0, 3)).mean(axis=1)
    columns = (rate, loss, loss - loss[0], spread)
    results = [
        Result(name, target, *(float(column[i]) for column in columns))
        for i, (name, target) in enumerate(members(config))
    ]
    # The picture is of prose: of the window with the most letters.
    shown = int(jnp.argmax(jnp.sum((windows >= ord("a")) & (windows <= ord("z")), axis=1)))
    return results, Shown(np.asarray(windows[shown]), masks[shown])
