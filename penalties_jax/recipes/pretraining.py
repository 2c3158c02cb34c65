"""Pretrain the small language model, once: the same settings and text find the same checkpoint."""

import functools
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8

from penalties_jax.recipes.language_model import LanguageModel, mean_loss
from penalties_jax.recipes.text import Corpus, sample_windows
from penalties_jax.recipes.training import adam, compile_chunk, train

Model = TypeVar("Model", bound=nnx.Module)


class Pretraining(NamedTuple):
    """What decides the pretrained parameters, beside the text.

    Attributes:
        seed: The seed of the initial parameters and of the batches.
        width: The size of the residual stream.
        layers: The number of blocks.
        heads: The number of attention heads in each block.
        context: The length of a training sequence, in bytes.
        steps: The number of optimiser steps.
        batch_size: The number of sequences in a batch.
        learning_rate: Adam's highest learning rate, reached after a tenth of the steps; it then
            falls to a tenth along a cosine.
    """

    seed: int
    width: int
    layers: int
    heads: int
    context: int
    steps: int
    batch_size: int
    learning_rate: float


@functools.partial(nnx.jit, static_argnums=0)
def make_model(settings: Pretraining) -> LanguageModel:
    """Return a model with initial parameters."""
    return LanguageModel(
        width=settings.width,
        layers=settings.layers,
        heads=settings.heads,
        context=settings.context,
        rngs=nnx.Rngs(settings.seed),
    )


def pretrained_model(settings: Pretraining, corpus: Corpus, folder: Path) -> LanguageModel:
    """Return the language model trained on `corpus`, as `pretrained`."""
    return pretrained(make_model(settings), LanguageModel.__call__, settings, corpus, folder)


def pretrained(
    model: Model,
    logits: Callable[[Model, Int[Array, "batch time"]], Float[Array, "batch time 256"]],
    settings: Pretraining,
    corpus: Corpus,
    folder: Path,
) -> Model:
    """Return a model trained on `corpus`, from a checkpoint under `folder` if there is one.

    Each checkpoint is a folder named by a fingerprint of the settings and the text. Orbax writes
    it under another name and renames it at the end, so what is found is whole.

    Args:
        model: The model with initial parameters.
        logits: What it predicts for the byte after each byte of a text.
        settings: What decides the parameters, beside the text.
        corpus: The text.
        folder: Where checkpoints are.
    """
    graph, parameters, rest = nnx.split(model, nnx.Param, ...)

    def loss(parameters: nnx.State, windows: Int[Array, "batch length"]) -> Array:
        model = nnx.merge(graph, parameters, rest, copy=True)
        return mean_loss(logits(model, windows[:, :-1]), windows[:, 1:])

    path = folder.absolute() / fingerprint(settings, corpus)
    with ocp.StandardCheckpointer() as checkpointer:
        if path.exists():
            parameters = checkpointer.restore(path, parameters)
        else:
            parameters = _train(loss, parameters, settings, corpus)
            checkpointer.save(path, parameters)
    return nnx.merge(graph, parameters, rest)


def fingerprint(settings: Pretraining, corpus: Corpus) -> str:
    """Return 16 hexadecimal digits that change with any of the settings or bytes."""
    content = json.dumps([settings._asdict(), corpus.describe()])
    return hashlib.sha256(content.encode("utf-8")).hexdigest()[:16]


class _State(NamedTuple):
    parameters: Any
    optimizer: optax.OptState


class _Data(NamedTuple):
    text: UInt8[Array, " bytes"]
    key: Array


def _train(
    loss: Callable[[nnx.State, Array], Array],
    parameters: nnx.State,
    settings: Pretraining,
    corpus: Corpus,
) -> nnx.State:
    optimizer = adam(settings.learning_rate, settings.steps)

    def step(state: _State, data: _Data, index: Array) -> tuple[_State, dict[str, Array]]:
        windows = sample_windows(
            data.text,
            jax.random.fold_in(data.key, index),
            batch_size=settings.batch_size,
            length=settings.context + 1,
        )
        value, gradient = jax.value_and_grad(loss)(state.parameters, windows)
        updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.parameters)
        parameters = optax.apply_updates(state.parameters, updates)
        return _State(parameters, optimizer_state), {"loss": value}

    return train(
        compile_chunk(step),
        _State(parameters, optimizer.init(parameters)),
        _Data(jnp.asarray(corpus.train), jax.random.key(settings.seed)),
        first=0,
        last=settings.steps,
        every=max(1, settings.steps // 20),
        title="pretrain",
    ).parameters
