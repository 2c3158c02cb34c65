"""The Llama architecture in Flax NNX, its blocks stacked, and low-rank adapters for them."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """The sizes of a model, and what its numbers are computed with."""

    vocabulary: int
    """The number of tokens."""

    width: int
    """The size of the residual stream."""

    inner_width: int
    """The size of the feed-forward layers inside."""

    layers: int
    """The number of blocks."""

    heads: int
    """The number of query heads in each block."""

    key_heads: int
    """The number of heads of keys and values, which divides that of the queries."""

    head_width: int
    """The size of a head, even."""

    rope_theta: float
    """The base of the wavelengths of rotary positions."""

    epsilon: float
    """What is added to a mean of squares before its root divides."""

    tied: bool
    """Whether the output kernel is the embedding."""


class Cache(NamedTuple):
    """The keys and values of all positions up to now, in a buffer with room for those to come."""

    keys: Float[Array, "*layers batch room key_heads head_width"]
    values: Float[Array, "*layers batch room key_heads head_width"]


class Attention(nnx.Module):
    """Causal self-attention with rotary positions; several queries may share keys and values."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        self.config = config
        queries, keys = config.heads * config.head_width, config.key_heads * config.head_width
        self.queries = _linear(config.width, queries, rngs)
        self.keys = _linear(config.width, keys, rngs)
        self.values = _linear(config.width, keys, rngs)
        self.out = _linear(queries, config.width, rngs)

    def __call__(
        self, x: Float[Array, "batch time width"], start: Int[Array, ""], cache: Cache | None
    ) -> tuple[Float[Array, "batch time width"], Cache | None]:
        """Mix each position with those before it: of `x`, and of the cache before `start`."""
        config, (batch, time, _) = self.config, x.shape
        positions = start + jnp.arange(time)
        queries = self.queries(x).reshape(batch, time, config.heads, config.head_width)
        keys = self.keys(x).reshape(batch, time, config.key_heads, config.head_width)
        values = self.values(x).reshape(batch, time, config.key_heads, config.head_width)
        queries = rotate(queries, positions, config.rope_theta)
        keys = rotate(keys, positions, config.rope_theta)
        if cache is not None:
            keys = jax.lax.dynamic_update_slice_in_dim(cache.keys, keys, start, axis=1)
            values = jax.lax.dynamic_update_slice_in_dim(cache.values, values, start, axis=1)
            cache = Cache(keys, values)
        seen = jnp.arange(keys.shape[1]) <= positions[:, None]
        mixed = jax.nn.dot_product_attention(queries, keys, values, mask=seen[None, None])
        return self.out(mixed.reshape(batch, time, -1)), cache


class FeedForward(nnx.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        self.gate = _linear(config.width, config.inner_width, rngs)
        self.up = _linear(config.width, config.inner_width, rngs)
        self.down = _linear(config.inner_width, config.width, rngs)

    def __call__(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
        """Transform each position by itself."""
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class Block(nnx.Module):
    """Attention and feed-forward, each on a normalised copy of the residual stream."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        self.attention_norm = _norm(config, rngs)
        self.attention = Attention(config, rngs=rngs)
        self.feed_forward_norm = _norm(config, rngs)
        self.feed_forward = FeedForward(config, rngs=rngs)

    def __call__(
        self, x: Float[Array, "batch time width"], start: Int[Array, ""], cache: Cache | None
    ) -> tuple[Float[Array, "batch time width"], Cache | None]:
        """Add what each of the two has to say to the residual stream."""
        mixed, cache = self.attention(self.attention_norm(x), start, cache)
        x = x + mixed
        return x + self.feed_forward(self.feed_forward_norm(x)), cache


class Llama(nnx.Module):
    """A pre-norm transformer that predicts the next token.

    `blocks` is one block whose parameters have the layers as their first axis: a scan goes through
    them, so that one block is compiled, and a gradient keeps of each layer what goes into it.
    """

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.tokens = nnx.Embed(config.vocabulary, config.width, rngs=rngs)
        self.blocks = nnx.vmap(lambda rngs: Block(config, rngs=rngs))(rngs.split(config.layers))
        self.norm = _norm(config, rngs)
        self.head = None if config.tied else _linear(config.width, config.vocabulary, rngs)

    @property
    def kernel(self) -> Float[Array, "width vocabulary"]:
        """What the last hidden states are multiplied with to have logits."""
        return self.tokens.embedding[...].T if self.head is None else self.head.kernel[...]

    def hidden(self, tokens: Int[Array, "batch time"]) -> Float[Array, "batch time width"]:
        """Return the last hidden states, normalised: times `kernel` they are the logits."""
        return self.continued(tokens, jnp.int32(0), None)[0]

    def continued(
        self, tokens: Int[Array, "batch time"], start: Int[Array, ""], cache: Cache | None
    ) -> tuple[Float[Array, "batch time width"], Cache | None]:
        """Return the hidden states of tokens from position `start` on, and the cache with them."""
        graph, layers = nnx.split(self.blocks)

        def layer(x, parameters_and_cache):
            parameters, cache = parameters_and_cache
            return nnx.merge(graph, parameters)(x, start, cache)

        # In a scan nothing is there to be merged with what is computed again.
        layer = jax.checkpoint(layer, prevent_cse=False)
        x, cache = jax.lax.scan(layer, self.tokens(tokens), (layers, cache))
        return self.norm(x), cache

    def empty_cache(self, batch_size: int, room: int) -> Cache:
        """Return the cache before the first of `room` positions."""
        config = self.config
        shape = (config.layers, batch_size, room, config.key_heads, config.head_width)
        return Cache(jnp.zeros(shape), jnp.zeros(shape))

    def __call__(self, tokens: Int[Array, "batch time"]) -> Float[Array, "batch time vocabulary"]:
        """Return the logits of the token after each of `tokens`."""
        return self.hidden(tokens) @ self.kernel


def rotate(
    x: Float[Array, "batch time heads width"], positions: Int[Array, " time"], theta: float
) -> Float[Array, "batch time heads width"]:
    """Turn the pair (x_i, x_{i + width / 2}) of each head by position * theta^(-2 i / width).

    Su et al. 2021, "RoFormer: Enhanced Transformer with Rotary Position Embedding", with the pairs
    as in Hugging Face's files.
    """
    half = x.shape[-1] // 2
    angles = positions[:, None] * theta ** (-jnp.arange(half) / half)
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    first, second = x[..., :half], x[..., half:]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def with_adapters(model: Llama, rank: int, *, rngs: nnx.Rngs) -> Llama:
    """Return a copy of `model` with a low-rank adapter on each linear layer of its blocks.

    As `language_model.with_adapters`: the copy computes what `model` does until it is trained, A
    and B are `nnx.LoRAParam`, and all else is the model's own arrays, not copies of them.
    """

    def adapt(linear: nnx.Linear) -> nnx.LoRA:
        sizes = linear.in_features, rank, linear.out_features
        adapter = nnx.vmap(lambda rngs: nnx.LoRA(*sizes, rngs=rngs))(
            rngs.split(model.config.layers)
        )
        adapter.base_module = nnx.data(linear)
        return adapter

    adapted = nnx.clone(model)
    for part in (adapted.blocks.attention, adapted.blocks.feed_forward):
        for name, child in list(vars(part).items()):
            if isinstance(child, nnx.Linear):
                setattr(part, name, adapt(child))
    return adapted


def _linear(inputs: int, outputs: int, rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(inputs, outputs, use_bias=False, rngs=rngs)


def _norm(config: LlamaConfig, rngs: nnx.Rngs) -> nnx.RMSNorm:
    return nnx.RMSNorm(config.width, epsilon=config.epsilon, rngs=rngs)
