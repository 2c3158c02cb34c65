"""A comparison of decompositions from beginning to end."""

import dataclasses

import jax.numpy as jnp
from flax import nnx

from penalties_jax.recipes.decompose.config import (
    LP,
    SMOOTH_L0,
    USUAL,
    DecomposeConfig,
    check,
    members,
    size_of,
)
from penalties_jax.recipes.decompose.results import IMAGES, Result, report
from penalties_jax.recipes.decompose.sweep import evaluate, train_sweep
from penalties_jax.recipes.decompose.targets import Target, TextModel, train_toy_model
from penalties_jax.recipes.devices import choose_mesh
from penalties_jax.recipes.language_model import LanguageModel
from penalties_jax.recipes.pretraining import pretrained
from penalties_jax.recipes.report import likely_cause, write_results
from penalties_jax.recipes.runs import open_run
from penalties_jax.recipes.text import Corpus, check_length, help_topics, read_text
from penalties_jax.recipes.training import Trained


def decompose(config: DecomposeConfig) -> list[Result]:
    """Run the job: train or load the network, decompose it, evaluate, write everything.

    Raises:
        UsageError: If an option, the text or the folder can't be used. Nothing is written then.
        RunError: If every decomposition has diverged; what there is, is written.
        StoppedError: If a signal asked for it.
    """
    size = size_of(config)
    config = dataclasses.replace(config, **size._asdict())
    check(config)
    config = choose_mesh(config, size.batch_size)
    text = read_text(config.text, help_topics)
    if config.target == "lm":
        check_length(text, batch_size=size.batch_size, context=config.context)
    with open_run(config, IMAGES, text=text.describe()) as run:
        trained, shared = train_sweep(config, run, _target(config, text))
        scores, found = evaluate(config, trained.state.parameters, shared)
        results = [
            Result(
                *member,
                *(float(column[i]) for column in scores),
                recovery=None if found is None else float(found[i]),
            )
            for i, member in enumerate(members(config))
        ]
        shown = report(config, results, trained.log.records)
        write_results(run, trained, results, shown, _cause(config, trained))
    return results


def _cause(config: DecomposeConfig, trained: Trained) -> str:
    coefficients = {LP: "lp_coefficients", SMOOTH_L0: "smooth_l0_coefficients"}
    names = ("learning_rate", "faithfulness_weight", *coefficients.values())
    swept = [{coefficients[member.penalty]: member.coefficient} for member in members(config)]
    return likely_cause(config, USUAL[config.target], names, swept, trained.diverged)


def _target(config: DecomposeConfig, text: Corpus) -> Target:
    """Train or load the network to decompose."""
    if config.target == "tms":
        return train_toy_model(features=config.features, hidden=config.hidden, seed=config.seed)
    model = pretrained(LanguageModel, config, text, batch_size=8)
    graph, parameters = nnx.split(model)
    train, held_out = jnp.asarray(text.train), jnp.asarray(text.held_out)
    return TextModel(parameters, train, held_out, graph, config.context)
