"""Models in GGUF files, as llama.cpp runs them."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from penalties_jax.recipes.llama.checkpoint import Checkpoint, need, reading
from penalties_jax.recipes.llama.model import LlamaConfig
from penalties_jax.recipes.options import UsageError

NAMES = {
    ("tokens",): "token_embd.weight",
    ("blocks", "attention_norm"): "blk.{}.attn_norm.weight",
    ("blocks", "attention", "queries"): "blk.{}.attn_q.weight",
    ("blocks", "attention", "keys"): "blk.{}.attn_k.weight",
    ("blocks", "attention", "values"): "blk.{}.attn_v.weight",
    ("blocks", "attention", "out"): "blk.{}.attn_output.weight",
    ("blocks", "feed_forward_norm"): "blk.{}.ffn_norm.weight",
    ("blocks", "feed_forward", "gate"): "blk.{}.ffn_gate.weight",
    ("blocks", "feed_forward", "up"): "blk.{}.ffn_up.weight",
    ("blocks", "feed_forward", "down"): "blk.{}.ffn_down.weight",
    ("norm",): "output_norm.weight",
    ("head",): "output.weight",
}
# tokenizer.ggml.token_type
CONTROL, USER_DEFINED = 3, 4


def open_gguf(path: Path) -> Checkpoint:
    """Open a GGUF file.

    Raises:
        UsageError: If it can't be read, or what it holds is not supported.
    """
    gguf = need("gguf")
    with reading(path, KeyError, IndexError, OverflowError):
        reader = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    config = _config(path, fields, tied=NAMES["head",] not in tensors)

    def read(name: str) -> np.ndarray:
        tensor = tensors[name]
        with reading(path):
            weights = gguf.dequantize(tensor.data, tensor.tensor_type)
        heads = {"attn_q": config.heads, "attn_k": config.key_heads}
        return _unpermuted(weights, heads.get(name.split(".")[-2]))

    return Checkpoint(
        path=path,
        config=config,
        names=NAMES,
        shapes={name: tuple(map(int, tensor.shape[::-1])) for name, tensor in tensors.items()},
        read=read,
        tokenizer=_tokenizer(path, fields),
    )


def _unpermuted(weights: np.ndarray, heads: int | None) -> np.ndarray:
    """Put what llama.cpp rotates, neighbours, half a head apart again, as our model has it."""
    if heads is None:
        return weights
    outputs, inputs = weights.shape
    pairs = weights.reshape(heads, outputs // heads // 2, 2, inputs)
    return pairs.swapaxes(1, 2).reshape(outputs, inputs)


def _config(path: Path, fields: Mapping[str, Any], *, tied: bool) -> LlamaConfig:
    get = partial(_get, path, fields)
    if (architecture := get("general.architecture")) != "llama":
        raise UsageError(f"{path} has the architecture {architecture!r}: only 'llama' is supported")
    if (scaling := fields.get("llama.rope.scaling.type", "none")) != "none":
        raise UsageError(f"{path} scales rotary positions ({scaling!r}), which is not supported")
    width, heads = get("llama.embedding_length"), get("llama.attention.head_count")
    head_width = fields.get("llama.attention.key_length", width // heads)
    if (rotated := fields.get("llama.rope.dimension_count", head_width)) != head_width:
        raise UsageError(f"{path} rotates {rotated} of {head_width} numbers: it must be all")
    return LlamaConfig(
        vocabulary=len(get("tokenizer.ggml.tokens")),
        width=width,
        inner_width=get("llama.feed_forward_length"),
        layers=get("llama.block_count"),
        heads=heads,
        key_heads=fields.get("llama.attention.head_count_kv", heads),
        head_width=head_width,
        rope_theta=fields.get("llama.rope.freq_base", 10_000.0),
        epsilon=get("llama.attention.layer_norm_rms_epsilon"),
        tied=tied,
    )


def _tokenizer(path: Path, fields: Mapping[str, Any]) -> Any:
    """Rebuild the tokenizer that the file describes: byte-level BPE, digits by themselves."""
    tokenizers = need("tokenizers")
    get = partial(_get, path, fields)
    kind = get("tokenizer.ggml.model"), get("tokenizer.ggml.pre")
    if kind != ("gpt2", "smollm"):
        raise UsageError(
            f"{path} has the tokenizer {'/'.join(kind)}: only gpt2/smollm is supported"
        )
    tokens = get("tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in get("tokenizer.ggml.merges")]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Digits(individual_digits=True),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    types = get("tokenizer.ggml.token_type")
    for token, type_ in zip(tokens, types, strict=True):
        if type_ in (CONTROL, USER_DEFINED):
            special = type_ == CONTROL
            added = tokenizers.AddedToken(token, special=special, normalized=False)
            (tokenizer.add_special_tokens if special else tokenizer.add_tokens)([added])
    return tokenizer


def _get(path: Path, fields: Mapping[str, Any], name: str) -> Any:
    if name not in fields:
        raise UsageError(f"{path} has no {name!r}")
    return fields[name]
