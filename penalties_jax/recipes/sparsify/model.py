"""The byte-level transformer with sparse resolvent layers in place of its feed-forwards."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from penalties_jax.nnx import SparseMoEResNetBKLayer
from penalties_jax.recipes.language_model import Attention, LanguageModel

# Gates start open: at this logit, and none of them near closing.
OPEN = 2.0


class SparseBlock(nnx.Module):
    """Attention and a sparse layer, each on a normalised copy of the residual stream."""

    def __init__(self, width: int, heads: int, context: int, *, rngs: nnx.Rngs):
        self.attention_norm = nnx.RMSNorm(width, rngs=rngs)
        self.attention = Attention(width, heads, rngs=rngs)
        self.sparse_norm = nnx.RMSNorm(width, rngs=rngs)
        self.sparse = SparseMoEResNetBKLayer(width, context, dropout=0.0, causal=True, rngs=rngs)
        self.sparse.predictor.out.bias = nnx.Param(jnp.full((1,), OPEN, jnp.float32))

    def __call__(
        self,
        x: Float[Array, "batch time width"],
        dense: bool | Bool[Array, ""],
        capacity: int | None,
    ) -> tuple[Float[Array, "batch time width"], Float[Array, "batch time width"]]:
        """Add what each of the two has to say; return that, and the sparse layer's input."""
        attended = x + self.attention(self.attention_norm(x))
        seen = self.sparse_norm(attended)
        mask = jnp.where(dense, 1.0, self.sparse.gate(seen))
        return attended + self.sparse(seen, mask=mask, capacity=capacity), seen


class SparseLanguageModel(LanguageModel):
    """The transformer of `LanguageModel` with sparse layers; an input has `context` bytes.

    Each layer computes `capacity` positions of it, those of the most open gates, or all.
    """

    def make_block(self, width: int, heads: int, context: int, *, rngs: nnx.Rngs) -> SparseBlock:
        """Return one of the blocks."""
        return SparseBlock(width, heads, context, rngs=rngs)

    def __call__(
        self,
        text: Int[Array, "batch time"],
        *,
        dense: bool | Bool[Array, ""] = False,
        capacity: int | None = None,
    ) -> Float[Array, "batch time 256"]:
        """Return the logits of the byte after each byte of `text`, skipping nothing if `dense`."""
        return self._run(text, dense, capacity)[0]

    def with_gates(
        self,
        text: Int[Array, "batch time"],
        *,
        dense: bool | Bool[Array, ""] = False,
        capacity: int | None = None,
    ) -> tuple[
        Float[Array, "batch time 256"],
        Float[Array, "layers batch time"],
        Float[Array, "layers batch time"],
    ]:
        """Return the logits, the gates of each sparse layer, and how probably they open."""
        logits, seen = self._run(text, dense, capacity)
        layers = list(zip(self.layers(), seen, strict=True))
        masks = jnp.stack([layer.gate(x) for layer, x in layers])
        probabilities = jnp.stack([nnx.sigmoid(layer.predictor(x)) for layer, x in layers])
        return logits, jnp.where(dense, 1.0, masks), jnp.where(dense, 1.0, probabilities)

    def _run(self, text, dense, capacity):
        x, seen = self.bytes(text) + self.positions(jnp.arange(text.shape[1])), []
        for block in self.blocks:
            x, inputs = block(x, dense, capacity)
            seen.append(inputs)
        return self.head(self.norm(x)), seen

    def layers(self) -> list[SparseMoEResNetBKLayer]:
        """Return the sparse layers, first to last."""
        return [block.sparse for block in self.blocks]

    def rates(self) -> Float[Array, " layers"]:
        """Return the share of closed gates of each sparse layer, at its last call."""
        return jnp.stack([layer.rate[...] for layer in self.layers()])

    def dropped(self) -> Float[Array, " layers"]:
        """Return the share of positions that each had no room for, though their gates were open."""
        return jnp.stack([layer.dropped[...] / layer.core.n_seq for layer in self.layers()])
