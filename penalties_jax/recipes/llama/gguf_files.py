"""Models in GGUF files, as llama.cpp runs them."""

import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from penalties_jax.recipes.llama.checkpoint import Checkpoint, Fields, need, reading
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
# The types of fields, by number; of struct's those that it has.
CODES = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
# tokenizer.ggml.token_type
CONTROL, USER_DEFINED = 3, 4


class Tensor(NamedTuple):
    """Where the numbers of an array are, and how they are quantised."""

    shape: tuple[int, ...]
    type: int
    offset: int


class Cursor:
    """Reads a GGUF file from its beginning, by the types that it names.

    `gguf.GGUFReader` does this too: in seconds for a vocabulary, and of a file that is damaged it
    may read forever.
    """

    def __init__(self, data: np.ndarray):
        self.data = data
        self.position = 0

    def bytes(self, count: int) -> bytes:
        """Return the next bytes."""
        found = self.data[self.position : self.position + count].tobytes()
        if len(found) < count:
            raise ValueError("it ends early")
        self.position += count
        return found

    def numbers(self, codes: str) -> tuple[Any, ...]:
        """Return the next numbers, of types as struct names them."""
        layout = struct.Struct("<" + codes)
        return layout.unpack(self.bytes(layout.size))

    def string(self) -> str:
        """Return the next string."""
        return self.bytes(*self.numbers("Q")).decode("utf-8")

    def value(self) -> Any:
        """Return the next value, whose type stands before it: a number, a string, or a list."""
        (kind,) = self.numbers("I")
        if kind != ARRAY:
            return self._of_type(kind)
        kind, count = self.numbers("IQ")
        return [self._of_type(kind) for _ in range(count)]

    def _of_type(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind not in CODES:
            raise ValueError(f"it has a value of the type {kind}")
        return self.numbers(CODES[kind])[0]

    def tensor(self) -> tuple[str, Tensor]:
        """Return the next tensor and its name; the file gives its shape from the last axis on."""
        name, (axes,) = self.string(), self.numbers("I")
        shape = [self.numbers("Q")[0] for _ in range(axes)]
        return name, Tensor(tuple(reversed(shape)), *self.numbers("IQ"))


def read_header(data: np.ndarray) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the fields and the tensors of a file, these with offsets from its beginning.

    Raises:
        ValueError: If it is no GGUF file, or damaged.
    """
    cursor = Cursor(data)
    if cursor.bytes(4) != b"GGUF":
        raise ValueError("it is no GGUF file")
    version, count, fields_count = cursor.numbers("IQQ")
    if version not in (2, 3):
        raise ValueError(f"it has the version {version}")
    fields = {}
    for _ in range(fields_count):
        name = cursor.string()
        fields[name] = cursor.value()
    tensors = dict(cursor.tensor() for _ in range(count))
    aligned = fields.get("general.alignment", 32)
    if type(aligned) is not int or aligned < 1:
        raise ValueError(f"it is aligned to {aligned!r}")
    start = -(-cursor.position // aligned) * aligned
    return fields, {
        name: tensor._replace(offset=start + tensor.offset) for name, tensor in tensors.items()
    }


def open_gguf(path: Path) -> Checkpoint:
    """Open a GGUF file.

    Raises:
        UsageError: If it can't be read, or what it holds is not supported.
    """
    gguf = need("gguf")
    with reading(path):
        data = np.memmap(path, mode="r")
        header, tensors = read_header(data)
    fields = Fields(path, header)
    config = _config(fields, tensors)

    def read(name: str) -> np.ndarray:
        tensor = tensors[name]
        with reading(path, NotImplementedError):
            kind = gguf.GGMLQuantizationType(tensor.type)
            shape = gguf.quant_shape_to_byte_shape(tensor.shape, kind)
            stored = data[tensor.offset : tensor.offset + math.prod(shape)].reshape(shape)
            weights = gguf.dequantize(stored, kind)
        heads = {"attn_q": config.heads, "attn_k": config.key_heads}.get(name.split(".")[-2])
        return weights if heads is None else _unpermuted(weights, heads)

    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    return Checkpoint(path, config, NAMES, shapes, read, _tokenizer(fields))


def _unpermuted(weights: np.ndarray, heads: int) -> np.ndarray:
    """Put what llama.cpp rotates, neighbours, half a head apart again, as `rotate` has it."""
    outputs, inputs = weights.shape
    pairs = weights.reshape(heads, outputs // heads // 2, 2, inputs)
    return pairs.swapaxes(1, 2).reshape(outputs, inputs)


def _config(fields: Fields, tensors: Mapping[str, Tensor]) -> LlamaConfig:
    path, get = fields.path, fields.get
    if (architecture := get("general.architecture", str)) != "llama":
        raise UsageError(f"{path} has the architecture {architecture!r}: only 'llama' is supported")
    if (scaling := get("llama.rope.scaling.type", str, "none")) != "none":
        raise UsageError(f"{path} scales rotary positions ({scaling!r}), which is not supported")
    width, heads = get("llama.embedding_length", int), get("llama.attention.head_count", int)
    head_width = get("llama.attention.key_length", int, width // max(heads, 1))
    if (rotated := get("llama.rope.dimension_count", int, head_width)) != head_width:
        raise UsageError(f"{path} rotates {rotated} of {head_width} numbers: it must be all")
    if (embedding := NAMES["tokens",]) not in tensors:
        raise UsageError(f"{path} has no {embedding!r}")
    return LlamaConfig(
        vocabulary=tensors[embedding].shape[0],
        width=width,
        inner_width=get("llama.feed_forward_length", int),
        layers=get("llama.block_count", int),
        heads=heads,
        key_heads=get("llama.attention.head_count_kv", int, heads),
        head_width=head_width,
        rope_theta=get("llama.rope.freq_base", float, 10_000.0),
        epsilon=get("llama.attention.layer_norm_rms_epsilon", float),
        tied=NAMES["head",] not in tensors,
    )


def _tokenizer(fields: Fields) -> Any:
    """Rebuild the tokenizer that the file describes: byte-level BPE, each digit by itself."""
    tokenizers = need("tokenizers")
    path, get = fields.path, fields.get
    kind = f"{get('tokenizer.ggml.model', str)}, {get('tokenizer.ggml.pre', str)}"
    if kind != "gpt2, smollm":
        raise UsageError(f"{path} has the tokenizer {kind!r}: only 'gpt2, smollm' is supported")
    tokens = fields.several("tokenizer.ggml.tokens", str)
    types = fields.several("tokenizer.ggml.token_type", int)
    if len(types) != len(tokens):
        raise UsageError(f"{path} has {len(tokens)} tokens and the types of {len(types)}")
    vocabulary = {token: number for number, token in enumerate(tokens)}
    merges = [tuple(each.split(" ")) for each in fields.several("tokenizer.ggml.merges", str)]
    # tokenizers has no class of its own for what it raises.
    with reading(path, Exception):
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Digits(individual_digits=True),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    for token, type_ in zip(tokens, types, strict=True):
        if type_ in (CONTROL, USER_DEFINED):
            special = type_ == CONTROL
            added = tokenizers.AddedToken(token, special=special, normalized=False)
            (tokenizer.add_special_tokens if special else tokenizer.add_tokens)([added])
    return tokenizer
