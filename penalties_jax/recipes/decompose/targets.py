"""Small networks to decompose: a toy model of superposition, and the language model's MLPs.

A target names its weight matrices and runs with any function in their place: `forward(apply, x)`
calls `apply(name, x)` where the network multiplies x by the matrix of that name.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8

import penalties_jax as pj
from penalties_jax.recipes.language_model import LanguageModel
from penalties_jax.recipes.text import sample_windows

Apply = Callable[[str, Array], Array]
STATIC = {"static": True}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ToyModel:
    """relu(x W W^T + b): more features than hidden units, each active now and then.

    W is the weight and b the bias. A feature is active with the given probability, and then uniform
    in [0, 1]. Elhage et al. (2022), Toy models of superposition.
    """

    weight: Float[Array, "features hidden"]
    bias: Float[Array, " features"]
    probability: float = dataclasses.field(metadata=STATIC)

    @property
    def weights(self) -> dict[str, Array]:
        """The matrices to decompose, by name: W, and its transpose as a matrix of its own."""
        return {"encode": self.weight, "decode": self.weight.T}

    def sample(self, key: Array, batch_size: int) -> Float[Array, "batch features"]:
        """Draw inputs."""
        shape = (batch_size, *self.bias.shape)
        active, size = jax.random.split(key)
        return jax.random.bernoulli(active, self.probability, shape) * jax.random.uniform(
            size, shape
        )

    @property
    def unseen(self) -> "ToyModel":
        """The same network: inputs are drawn anew each time."""
        return self

    def forward(self, apply: Apply, x: Float[Array, "batch features"]) -> Array:
        """Run the network with `apply` in place of its matrices."""
        return jax.nn.relu(apply("decode", apply("encode", x)) + self.bias)

    def distance(self, output: Array, clean: Array) -> Float[Array, ""]:
        """The mean squared error."""
        return jnp.mean(jnp.square(output - clean))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TextModel:
    """The byte-level transformer, of which the feed-forward matrices are decomposed."""

    parameters: nnx.State
    text: UInt8[Array, " bytes"]
    held_out: UInt8[Array, " bytes"]
    graph: nnx.GraphDef[LanguageModel] = dataclasses.field(metadata=STATIC)
    context: int = dataclasses.field(metadata=STATIC)

    @property
    def weights(self) -> dict[str, Array]:
        """The matrices to decompose, by name."""
        return {
            f"block{i}/{name}": getattr(block.feed_forward, name).kernel[...]
            for i, block in enumerate(self._model().blocks)
            for name in ("up", "down")
        }

    def sample(self, key: Array, batch_size: int) -> Int[Array, "batch time"]:
        """Draw windows of the text."""
        return sample_windows(self.text, key, batch_size=batch_size, length=self.context)

    @property
    def unseen(self) -> "TextModel":
        """The same network, of inputs that nothing was trained on."""
        return dataclasses.replace(self, text=self.held_out)

    def forward(self, apply: Apply, x: Int[Array, "batch time"]) -> Array:
        """Run the network with `apply` in place of its matrices; return log-probabilities."""
        model = self._model()
        for i, block in enumerate(model.blocks):
            for name in ("up", "down"):
                setattr(block.feed_forward, name, partial(apply, f"block{i}/{name}"))
        return jax.nn.log_softmax(model(x))

    def distance(self, output: Array, clean: Array) -> Float[Array, ""]:
        """KL(clean || output), in nats per byte."""
        return pj.kl_divergence(clean, output)

    def _model(self) -> LanguageModel:
        return nnx.merge(self.graph, self.parameters, copy=True)


Target = ToyModel | TextModel


def train_toy_model(
    *, features: int, hidden: int, probability: float = 0.05, seed: int = 0, steps: int = 5_000
) -> ToyModel:
    """Train a toy model of superposition to reproduce its inputs."""
    key = jax.random.key(seed)
    weight = jax.random.normal(key, (features, hidden)) / hidden**0.5
    parameters = {"weight": weight, "bias": jnp.zeros(features)}
    optimizer = optax.adam(optax.cosine_decay_schedule(5e-3, steps))

    @jax.jit
    def train(parameters: Any) -> Any:
        def step(index: Array, carry: Any) -> Any:
            parameters, state = carry

            def loss(parameters: Any) -> Array:
                model = ToyModel(**parameters, probability=probability)
                x = model.sample(jax.random.fold_in(key, index), 1024)
                return model.distance(model.forward(lambda name, x: x @ model.weights[name], x), x)

            updates, state = optimizer.update(jax.grad(loss)(parameters), state, parameters)
            return optax.apply_updates(parameters, updates), state

        return jax.lax.fori_loop(0, steps, step, (parameters, optimizer.init(parameters)))[0]

    return ToyModel(**train(parameters), probability=probability)
