"""A small byte-level transformer, and low-rank adapters for its linear layers."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

BYTES = 256


class Attention(nnx.Module):
    """Causal multi-head self-attention."""

    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs):
        self.heads = heads
        self.queries_keys_values = nnx.Linear(width, 3 * width, use_bias=False, rngs=rngs)
        self.out = nnx.Linear(width, width, use_bias=False, rngs=rngs)

    def __call__(self, x: Float[Array, "batch time width"]) -> Float[Array, "batch time width"]:
        """Mix each position with those before it."""
        batch, time, width = x.shape
        packed = self.queries_keys_values(x).reshape(batch, time, 3, self.heads, -1)
        queries, keys, values = jnp.unstack(packed, axis=2)
        mixed = jax.nn.dot_product_attention(queries, keys, values, is_causal=True)
        return self.out(mixed.reshape(batch, time, width))


class FeedForward(nnx.Module):
    """Two linear layers with a GELU between them, four times as wide inside."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.up = nnx.Linear(width, 4 * width, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, use_bias=False, rngs=rngs)

    def __call__(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
        """Transform each position by itself."""
        return self.down(jax.nn.gelu(self.up(x)))


class Block(nnx.Module):
    """Attention and feed-forward, each on a normalised copy of the residual stream."""

    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs):
        self.attention_norm = nnx.RMSNorm(width, rngs=rngs)
        self.attention = Attention(width, heads, rngs=rngs)
        self.feed_forward_norm = nnx.RMSNorm(width, rngs=rngs)
        self.feed_forward = FeedForward(width, rngs=rngs)

    def __call__(self, x: Float[Array, "batch time width"]) -> Float[Array, "batch time width"]:
        """Add what each of the two has to say to the residual stream."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.feed_forward(self.feed_forward_norm(x))


class LanguageModel(nnx.Module):
    """A pre-norm transformer that predicts the next byte of inputs of `context` bytes at most.

    Positions are learnt; `width`, a multiple of `heads`, is the size of the residual stream.
    """

    def __init__(self, *, width: int, layers: int, heads: int, context: int, rngs: nnx.Rngs):
        self.bytes = nnx.Embed(BYTES, width, rngs=rngs)
        self.positions = nnx.Embed(context, width, rngs=rngs)
        self.blocks = nnx.List(
            [self.make_block(width, heads, context, rngs=rngs) for _ in range(layers)]
        )
        self.norm = nnx.RMSNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, BYTES, use_bias=False, rngs=rngs)

    def make_block(self, width: int, heads: int, context: int, *, rngs: nnx.Rngs) -> Any:
        """Return one of the blocks."""
        return Block(width, heads, rngs=rngs)

    def __call__(self, text: Int[Array, "batch time"]) -> Float[Array, "batch time 256"]:
        """Return the logits of the byte after each byte of `text`."""
        x = self.bytes(text) + self.positions(jnp.arange(text.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def mean_loss(
    logits: Float[Array, "batch time 256"], targets: Int[Array, "batch time"]
) -> Float[Array, ""]:
    """Return the mean of -log softmax(logits)[target], in nats per byte."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


def with_adapters(model: LanguageModel, rank: int, *, rngs: nnx.Rngs) -> LanguageModel:
    """Return a copy of `model` with a low-rank adapter on each linear layer of its blocks.

    The layer x W becomes x W + x A B, with A random and B zero, so that the copy computes what
    `model` does until it is trained. A and B are `nnx.LoRAParam`. Hu et al. 2021, "LoRA: Low-Rank
    Adaptation of Large Language Models".
    """

    def adapt(linear: nnx.Linear) -> nnx.LoRA:
        return nnx.LoRA(
            linear.in_features, rank, linear.out_features, base_module=linear, rngs=rngs
        )

    adapted = nnx.clone(model)
    for block in adapted.blocks:
        attention, feed_forward = block.attention, block.feed_forward
        attention.queries_keys_values = adapt(attention.queries_keys_values)
        attention.out = adapt(attention.out)
        feed_forward.up = adapt(feed_forward.up)
        feed_forward.down = adapt(feed_forward.down)
    return adapted
