"""Models in folders as on Hugging Face: config.json, safetensors, tokenizer.json."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from penalties_jax.recipes.llama.checkpoint import Checkpoint, Fields, need, reading
from penalties_jax.recipes.llama.model import LlamaConfig
from penalties_jax.recipes.options import UsageError

CONFIG, TOKENIZER = "config.json", "tokenizer.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
NAMES = {
    ("tokens",): "model.embed_tokens.weight",
    ("blocks", "attention_norm"): "model.layers.{}.input_layernorm.weight",
    ("blocks", "attention", "queries"): "model.layers.{}.self_attn.q_proj.weight",
    ("blocks", "attention", "keys"): "model.layers.{}.self_attn.k_proj.weight",
    ("blocks", "attention", "values"): "model.layers.{}.self_attn.v_proj.weight",
    ("blocks", "attention", "out"): "model.layers.{}.self_attn.o_proj.weight",
    ("blocks", "feed_forward_norm"): "model.layers.{}.post_attention_layernorm.weight",
    ("blocks", "feed_forward", "gate"): "model.layers.{}.mlp.gate_proj.weight",
    ("blocks", "feed_forward", "up"): "model.layers.{}.mlp.up_proj.weight",
    ("blocks", "feed_forward", "down"): "model.layers.{}.mlp.down_proj.weight",
    ("norm",): "model.norm.weight",
    ("head",): "lm_head.weight",
}
# What may be in a config, and the only value of it that is computed here.
ONLY = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
    "sliding_window": None,
}
ARCHITECTURE = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
# Constants, which older folders have.
BUFFERS = "rotary_emb.inv_freq"


def open_folder(folder: Path) -> Checkpoint:
    """Open a folder.

    Raises:
        UsageError: If a file is not there or can't be read, or what it holds is not supported.
    """
    config = _config(folder / CONFIG)
    shapes, file_of = {}, {}
    for file in _weight_files(folder):
        with _opened(file) as weights:
            sizes = {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
        shapes |= sizes
        file_of |= dict.fromkeys(sizes, file)
    # Of a tied head there may be a copy.
    for name in list(shapes):
        if name.endswith(BUFFERS) or (config.tied and name == NAMES["head",]):
            del shapes[name]

    def read(name: str) -> np.ndarray:
        with _opened(file_of[name]) as weights:
            return weights.get_tensor(name)

    return Checkpoint(folder, config, NAMES, shapes, read, _tokenizer(folder / TOKENIZER))


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Any]:
    safetensors = need("safetensors")
    with reading(file, safetensors.SafetensorError), safetensors.safe_open(file, "np") as weights:
        yield weights


def _tokenizer(path: Path) -> Any:
    tokenizers = need("tokenizers")
    text = _text(path)
    # tokenizers has no class of its own for what it raises.
    with reading(path, Exception):
        return tokenizers.Tokenizer.from_str(text)


def _weight_files(folder: Path) -> list[Path]:
    """Return the one file, or those that the index names."""
    index = folder / INDEX
    if not index.exists():
        return [folder / WEIGHTS]
    names = _json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise UsageError(f"{index} has no 'weight_map' of names to files")
    return [folder / name for name in sorted(set(names.values()))]


def _config(path: Path) -> LlamaConfig:
    config = _json(path)
    given = {name: value for name in ARCHITECTURE if (value := config.get(name))}
    if not given or not given.items() <= ARCHITECTURE.items():
        raise UsageError(f"{path} is of {given or 'no architecture'}: supported is {ARCHITECTURE}")
    for name, only in ONLY.items():
        if (value := config.get(name, only)) != only:
            raise UsageError(f"{path} has the {name} {value!r}: only {only!r} is supported")
    # Since version 5 transformers has both in one.
    rope = next(filter(None, map(config.get, ("rope_parameters", "rope_scaling"))), {})
    kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else None
    if kind != "default":
        raise UsageError(f"{path} scales rotary positions ({rope}), which is not supported")
    given = {**rope, **config}
    get = Fields(path, {name: value for name, value in given.items() if value is not None}).get
    width, heads = get("hidden_size", int), get("num_attention_heads", int)
    return LlamaConfig(
        vocabulary=get("vocab_size", int),
        width=width,
        inner_width=get("intermediate_size", int),
        layers=get("num_hidden_layers", int),
        heads=heads,
        key_heads=get("num_key_value_heads", int, heads),
        head_width=get("head_dim", int, width // max(heads, 1)),
        rope_theta=get("rope_theta", float, 10_000.0),
        epsilon=get("rms_norm_eps", float, 1e-6),
        tied=get("tie_word_embeddings", bool, False),
    )


def _json(path: Path) -> Mapping[str, Any]:
    text = _text(path)
    with reading(path, RecursionError):
        content = json.loads(text)
    if not isinstance(content, dict):
        raise UsageError(f"{path} has no object of JSON")
    return content


def _text(path: Path) -> str:
    with reading(path):
        return path.read_text(encoding="utf-8")
