"""Pretrain a language model, once: the same settings and text find the same checkpoint."""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from penalties_jax.recipes.devices import make_mesh
from penalties_jax.recipes.language_model import LanguageModel, mean_loss
from penalties_jax.recipes.options import Options, RunError
from penalties_jax.recipes.runs import Run, fingerprint, numeric_modes
from penalties_jax.recipes.text import Batches, Corpus, batches
from penalties_jax.recipes.training import Metrics, State, adam, descend, train

Model = TypeVar("Model", bound=LanguageModel)


def pretrained(
    kind: type[Model],
    options: Options,
    corpus: Corpus,
    *,
    batch_size: int,
    **call: Any,
) -> Model:
    """Return a model trained on `corpus`, as far as the run's folder has it already.

    What decides the parameters names a folder, by its fingerprint, with a log and checkpoints.

    The model is of the given kind, and called with `call` in training. Its sizes, the seed, the
    steps and the learning rate are those of the options.

    Raises:
        RunError: If it diverges.
        StoppedError: If a signal asked for it.
    """
    sizes = {name: getattr(options, name) for name in ("width", "layers", "heads", "context")}
    steps, learning_rate = options.pretrain_steps, options.pretrain_learning_rate
    training = {"steps": steps, "batch_size": batch_size, "learning_rate": learning_rate}
    settings = {"seed": options.seed, **sizes, **training, "text": corpus.describe()}
    settings["modes"] = numeric_modes()

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
        return descend(optimizer, state, gradient), {"loss": value[None]}

    trained = train(
        Run(options.out / "pretrained" / fingerprint(settings), settings),
        step,
        State(parameters, optimizer.init(parameters)),
        batches(corpus, options.seed),
        mesh=make_mesh(options),
        steps=steps,
        every=options.log_every,
        members=[{}],
        title="pretrain",
    )
    if trained.diverged:
        raise RunError("pretraining has diverged: lower --pretrain-learning-rate")
    return nnx.merge(graph, jax.tree.map(jnp.asarray, trained.state.parameters), rest)
