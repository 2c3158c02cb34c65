"""A comparison of decompositions from beginning to end."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from flax import nnx

from penalties_jax.recipes.decompose.config import DecomposeConfig, check, members, size_of
from penalties_jax.recipes.decompose.results import IMAGES, Result, report
from penalties_jax.recipes.decompose.sweep import evaluate, train_sweep
from penalties_jax.recipes.decompose.targets import Target, TextModel, train_toy_model
from penalties_jax.recipes.language_model import LanguageModel
from penalties_jax.recipes.options import UsageError
from penalties_jax.recipes.pretraining import pretrained
from penalties_jax.recipes.report import write_results
from penalties_jax.recipes.runs import open_run, read_log
from penalties_jax.recipes.text import Corpus, check_length, help_topics, read_text


def decompose(config: DecomposeConfig) -> list[Result]:
    """Run the job: train or load the network, decompose it, evaluate, write everything.

    Raises:
        UsageError: If an option, the text or the folder can't be used, and nothing is written then;
            or if every decomposition has diverged.
    """
    size = size_of(config)
    config = dataclasses.replace(config, **size._asdict())
    check(config)
    text = read_text(config.text, help_topics)
    if config.target == "lm":
        check_length(text, batch_size=size.batch_size, context=config.context)
    run = open_run(config, IMAGES, text=text.describe())
    state, shared = train_sweep(config, run, _target(config, text))
    scores, found = evaluate(config, state.parameters, shared)
    if not np.isfinite(scores.distance).any():
        raise UsageError("every decomposition has diverged: lower --learning-rate")
    results = [
        Result(
            *member,
            *(float(column[i]) for column in scores),
            recovery=None if found is None else float(found[i]),
        )
        for i, member in enumerate(members(config))
    ]
    write_results(run, results, report(config, results, read_log(run.folder)))
    return results


def _target(config: DecomposeConfig, text: Corpus) -> Target:
    """Train or load the network to decompose."""
    if config.target == "tms":
        return train_toy_model(features=config.features, hidden=config.hidden, seed=config.seed)
    model = pretrained(LanguageModel, config, text, batch_size=8, learning_rate=3e-3)
    graph, parameters = nnx.split(model)
    train, held_out = jnp.asarray(text.train), jnp.asarray(text.held_out)
    return TextModel(parameters, train, held_out, graph, config.context)
