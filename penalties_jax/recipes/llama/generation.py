"""What a model writes after a prompt: at each position the likeliest token."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int

from penalties_jax.recipes.llama.model import Llama


def generate(
    model: Llama,
    tokens: Int[Array, "batch time"],
    length: int,
    *,
    lengths: Int[Array, " batch"] | None = None,
) -> Int[Array, "batch room"]:
    """Return the prompts, each with the tokens after it that are the likeliest, one by one.

    Works under jit and vmap, as over a stack of adapters.

    Args:
        model: What writes.
        tokens: The prompts, of at least one token.
        length: How many tokens to add: `room` is `time + length`.
        lengths: How many tokens of each prompt count, at least one; by default all. What a row has
            after its prompt is replaced, so that shorter prompts have more tokens added.
    """
    rows, time = tokens.shape
    lengths = jnp.full(rows, time) if lengths is None else lengths
    graph, state = nnx.split(model)
    return _generate(graph, state, tokens, lengths, room=time + length)


# Prompts too are read token by token: one program, whatever their lengths are.
@partial(jax.jit, static_argnames=("graph", "room"))
def _generate(
    graph: nnx.GraphDef, state: Any, tokens: Array, lengths: Array, *, room: int
) -> Array:
    model = nnx.merge(graph, state)
    rows, time = tokens.shape
    text = jnp.zeros((rows, room), jnp.int32).at[:, :time].set(tokens)

    def step(position, carry):
        text, cache = carry
        token = jax.lax.dynamic_slice_in_dim(text, position, 1, axis=1)
        hidden, cache = model.continued(token, position, cache)
        likeliest = jnp.argmax(hidden[:, 0] @ model.kernel, axis=-1).astype(jnp.int32)
        after = text[:, position + 1]
        chosen = jnp.where(position + 1 < lengths, after, likeliest)
        return text.at[:, position + 1].set(chosen), cache

    return jax.lax.fori_loop(0, room - 1, step, (text, model.empty_cache(rows, room)))[0]


def write(model: Llama, tokenizer: Any, prompts: Sequence[str], length: int) -> list[str]:
    """Return the text that a model writes after each prompt: `length` tokens, up to its end mark.

    Args:
        model: What writes.
        tokenizer: Of the model, from `load`.
        prompts: Texts of at least one token each.
        length: How many tokens to write.
    """
    ids = [tokenizer.encode(prompt, add_special_tokens=False).ids for prompt in prompts]
    lengths = np.array([len(row) for row in ids])
    tokens = np.zeros((len(ids), max(lengths)), np.int32)
    for row, prompt in zip(tokens, ids, strict=True):
        row[: len(prompt)] = prompt
    texts = np.asarray(generate(model, jnp.asarray(tokens), length, lengths=jnp.asarray(lengths)))
    added = tokenizer.get_added_tokens_decoder()
    special = [number for number, token in added.items() if token.special]
    written = []
    for text, start in zip(texts, lengths, strict=True):
        new = text[start : start + length]
        ended = np.isin(new, special)
        written.append(tokenizer.decode(new[: ended.argmax() if ended.any() else None].tolist()))
    return written
