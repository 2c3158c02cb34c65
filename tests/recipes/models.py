"""Tiny models of the Llama family, written to files as others write them."""

import json

import gguf
import jax.numpy as jnp
import numpy as np
import safetensors.flax
import tokenizers

from penalties_jax.recipes.llama.folders import NAMES as FOLDER_NAMES
from penalties_jax.recipes.llama.gguf_files import NAMES as GGUF_NAMES

CONFIG = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "rope_theta": 100.0,
    "rms_norm_eps": 1e-3,
    "tie_word_embeddings": True,
}
SPECIAL = ["<|endoftext|>", "<|im_start|>"]
MERGES = [("h", "e"), ("Ġ", "t"), ("Ġt", "he"), ("1", "2")]
TOKENS = [*SPECIAL, *sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())]
TOKENS += ["".join(merge) for merge in MERGES]
TEXT = "the 12 then\n\nThe é <|im_start|> the"


def sizes(config):
    width, inner = config["hidden_size"], config["intermediate_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    return {
        "tokens": (len(TOKENS), width),
        "head": (len(TOKENS), width),
        "norm": (width,),
        "attention_norm": (width,),
        "feed_forward_norm": (width,),
        "queries": (queries, width),
        "keys": (keys, width),
        "values": (keys, width),
        "out": (width, queries),
        "gate": (inner, width),
        "up": (inner, width),
        "down": (width, inner),
    }


def make_weights(config):
    """Random arrays by (place, layer), of matrices [outputs, inputs], and no layer outside."""
    rng, weights = np.random.default_rng(0), {}
    for place in FOLDER_NAMES:
        if place == ("head",) and config["tie_word_embeddings"]:
            continue
        for layer in range(config["num_hidden_layers"]) if place[0] == "blocks" else [None]:
            shape = sizes(config)[place[-1]]
            array = rng.normal(size=shape) / np.sqrt(shape[-1]) + (len(shape) == 1)
            weights[place, layer] = array.astype(np.float32)
    return weights


def make_tokenizer():
    vocabulary = {token: number for number, token in enumerate(TOKENS)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, MERGES))
    split = tokenizers.pre_tokenizers.Digits(individual_digits=True)
    level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, level])
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def write_folder(folder, config=CONFIG, *, shards=1, dtype=jnp.float32, weights=None):
    folder.mkdir(exist_ok=True)
    weights = make_weights(config) if weights is None else weights
    arrays = {
        FOLDER_NAMES[place].format(layer): jnp.asarray(array, dtype)
        for (place, layer), array in weights.items()
    }
    (folder / "config.json").write_text(json.dumps({"vocab_size": len(TOKENS)} | config))
    make_tokenizer().save(str(folder / "tokenizer.json"))
    if shards == 1:
        safetensors.flax.save_file(arrays, folder / "model.safetensors")
        return folder
    index = {name: f"model-{number % shards}.safetensors" for number, name in enumerate(arrays)}
    for file in set(index.values()):
        part = {name: array for name, array in arrays.items() if index[name] == file}
        safetensors.flax.save_file(part, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return folder


def write_gguf(path, config=CONFIG, *, quantised=(), **changes):
    """As llama.cpp's own converter: it rotates neighbours, and so reorders queries and keys."""
    writer = gguf.GGUFWriter(path, changes.get("architecture", "llama"))
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_rope_dimension_count(changes.get("rotated", config["head_dim"]))
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if "scaling" in changes:
        writer.add_rope_scaling_type(changes["scaling"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(changes.get("pre", "smollm"))
    writer.add_token_list(changes.get("tokens", TOKENS))
    writer.add_token_types(changes.get("types", [3] * len(SPECIAL) + [1] * (len(TOKENS) - 2)))
    writer.add_token_merges([" ".join(merge) for merge in MERGES])
    heads = {"queries": config["num_attention_heads"], "keys": config["num_key_value_heads"]}
    for (place, layer), array in make_weights(config).items():
        if count := heads.get(place[-1]):
            rows, columns = array.shape
            array = array.reshape(count, 2, rows // count // 2, columns).swapaxes(1, 2)
            array = array.reshape(rows, columns)
        kind = None
        if place[-1] in quantised:
            kind = gguf.GGMLQuantizationType.Q8_0
            array = gguf.quantize(array, kind)
        writer.add_tensor(GGUF_NAMES[place].format(layer), array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
