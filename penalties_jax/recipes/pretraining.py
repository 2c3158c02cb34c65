"""Pretrain a language model, once: the same settings and text find the same checkpoint."""

import hashlib
import json
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp
from flax import nnx
from jaxtyping import Array

from penalties_jax.recipes.language_model import LanguageModel, mean_loss
from penalties_jax.recipes.options import Options
from penalties_jax.recipes.text import Batches, Corpus, batches
from penalties_jax.recipes.training import Metrics, State, adam, compile_chunk, descend, train

Model = TypeVar("Model", bound=LanguageModel)


def pretrained(
    kind: type[Model],
    options: Options,
    corpus: Corpus,
    *,
    batch_size: int,
    learning_rate: float,
    **call: Any,
) -> Model:
    """Return a model trained on `corpus`, from a checkpoint in the run's folder if there is one.

    Each checkpoint is a folder named by a fingerprint of what decides the parameters. Orbax writes
    it under another name and renames it at the end, so what is found is whole.

    The model is of the given kind, and called with `call` in training. Its sizes, the seed and the
    steps are those of the options; the learning rate is that of `adam`.
    """
    sizes = {name: getattr(options, name) for name in ("width", "layers", "heads", "context")}
    steps = options.pretrain_steps
    training = {"steps": steps, "batch_size": batch_size, "learning_rate": learning_rate}
    settings = {"seed": options.seed, **sizes, **training}

    @nnx.jit
    def make() -> Model:
        model = kind(**sizes, rngs=nnx.Rngs(options.seed))
        model.eval()
        return model

    graph, parameters, rest = nnx.split(make(), nnx.Param, ...)
    optimizer = adam(learning_rate, steps)

    def step(state: State, data: Batches, index: Array) -> tuple[State, Metrics]:
        windows = data(index, batch_size, options.context + 1)

        def loss(parameters: nnx.State) -> Array:
            model = nnx.merge(graph, parameters, rest, copy=True)
            return mean_loss(model(windows[:, :-1], **call), windows[:, 1:])

        value, gradient = jax.value_and_grad(loss)(state.parameters)
        return descend(optimizer, state, gradient), {"loss": value}

    path = options.out.absolute() / "pretrained" / fingerprint(settings, corpus)
    with ocp.StandardCheckpointer() as checkpointer:
        if path.exists():
            parameters = checkpointer.restore(path, parameters)
        else:
            state = State(parameters, optimizer.init(parameters))
            data = batches(corpus, options.seed)
            every = max(1, steps // 20)
            chunk = compile_chunk(step)
            state = train(chunk, state, data, first=0, last=steps, every=every, title="pretrain")
            parameters = state.parameters
            checkpointer.save(path, parameters)
    return nnx.merge(graph, parameters, rest)


def fingerprint(settings: dict[str, float], corpus: Corpus) -> str:
    """Return 16 hexadecimal digits that change with any of the settings or bytes."""
    content = json.dumps([settings, corpus.describe()])
    return hashlib.sha256(content.encode("utf-8")).hexdigest()[:16]
