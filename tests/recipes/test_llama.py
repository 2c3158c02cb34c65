import json

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.flax
import tokenizers
from flax import nnx

import penalties_jax as pj
from penalties_jax.recipes import llama, memory, text
from penalties_jax.recipes.llama.folders import NAMES as FOLDER_NAMES
from penalties_jax.recipes.llama.gguf_files import NAMES as GGUF_NAMES
from penalties_jax.recipes.options import UsageError

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


def expected_logits(tokens, config, weights):
    """Of one sequence, in float64, position by position; pairs are turned as complex numbers."""
    weights = {key: array.astype(float) for key, array in weights.items()}
    size, group = config["head_dim"], config["num_attention_heads"] // config["num_key_value_heads"]

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config["rms_norm_eps"]) * scale

    def turn(x):
        half = size // 2
        steps = np.arange(len(x))[:, None] * config["rope_theta"] ** (-np.arange(half) * 2 / size)
        turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * steps)[:, None]
        return np.concatenate([turned.real, turned.imag], -1)

    x = weights[("tokens",), None][tokens]
    for layer in range(config["num_hidden_layers"]):
        part = {place[1:]: array for (place, at), array in weights.items() if at == layer}
        y = norm(x, part["attention_norm",])
        queries, keys, values = (
            (y @ part["attention", name].T).reshape(len(x), -1, size)
            for name in ("queries", "keys", "values")
        )
        queries, keys, mixed = turn(queries), turn(keys), np.zeros_like(queries)
        for position in range(len(x)):
            for head in range(queries.shape[1]):
                seen = keys[: position + 1, head // group]
                scores = np.exp(seen @ queries[position, head] / np.sqrt(size))
                mixed[position, head] = (
                    scores / scores.sum() @ values[: position + 1, head // group]
                )
        x = x + mixed.reshape(len(x), -1) @ part["attention", "out"].T
        y = norm(x, part["feed_forward_norm",])
        gate, up = (y @ part["feed_forward", name].T for name in ("gate", "up"))
        x = x + (gate / (1 + np.exp(-gate)) * up) @ part["feed_forward", "down"].T
    head = weights.get((("head",), None), weights[("tokens",), None])
    return norm(x, weights[("norm",), None]) @ head.T


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return llama.load(write_folder(tmp_path_factory.mktemp("tiny") / "model"))


@jax.jit
def logits(state_and_graph, tokens):
    return nnx.merge(*state_and_graph)(tokens)


def run(model, tokens):
    return logits(nnx.split(model), jnp.asarray(tokens))


TOKENS_SEEN = np.array([[5, 80, 3, 3, 250, 17, 99, 4], [1, 2, 3, 4, 5, 6, 7, 8]])


@pytest.mark.parametrize(
    ("tied", "options"),
    [(True, {}), (False, {"shards": 3}), (False, {"dtype": jnp.bfloat16})],
    ids=["tied", "untied, in shards", "bfloat16"],
)
def test_logits_are_those_of_the_formulas(tmp_path, tied, options):
    config = CONFIG | {"tie_word_embeddings": tied}
    weights = make_weights(config)
    model = llama.load(write_folder(tmp_path / "model", config, **options)).model
    found = run(model, TOKENS_SEEN)
    dtype = options.get("dtype", jnp.float32)
    rounded = {key: np.asarray(jnp.asarray(x, dtype), np.float32) for key, x in weights.items()}
    for row, tokens in zip(found, TOKENS_SEEN, strict=True):
        np.testing.assert_allclose(row, expected_logits(tokens, config, rounded), atol=2e-5)
    np.testing.assert_allclose(model.hidden(TOKENS_SEEN) @ model.kernel, found, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_a_gguf_file_is_the_same_model_as_the_folder(tmp_path, tied):
    config = CONFIG | {"tie_word_embeddings": tied}
    folder = llama.load(write_folder(tmp_path / "model", config))
    file = llama.load(write_gguf(tmp_path / "model.gguf", config))
    assert file.model.config.__dict__ == pytest.approx(folder.model.config.__dict__)
    for one, other in zip(
        *(jax.tree.leaves(nnx.state(x.model)) for x in (folder, file)), strict=True
    ):
        np.testing.assert_array_equal(one, other)
    assert file.tokenizer.encode(TEXT).ids == folder.tokenizer.encode(TEXT).ids
    assert (
        folder.tokenizer.decode(file.tokenizer.encode(TEXT).ids, skip_special_tokens=False) == TEXT
    )


def test_quantised_arrays_are_dequantised(tmp_path):
    model = llama.load(write_gguf(tmp_path / "m.gguf", quantised=("queries", "up"))).model
    exact = make_weights(CONFIG)
    for place, linear in (("attention", "queries"), ("feed_forward", "up")):
        kernel = np.asarray(getattr(getattr(model.blocks, place), linear).kernel[...])
        for layer in range(CONFIG["num_hidden_layers"]):
            original = exact[("blocks", place, linear), layer].T
            assert 0 < np.abs(kernel[layer] - original).max() < np.abs(original).max() / 100


def test_one_block_is_compiled_however_many_there_are():
    def products(layers):
        config = llama.LlamaConfig(9, 8, 8, layers, 2, 1, 4, 10.0, 1e-5, True)
        model = nnx.eval_shape(lambda: llama.Llama(config, rngs=nnx.Rngs(0)))
        graph, state = nnx.split(model)
        tokens = jax.ShapeDtypeStruct((1, 4), jnp.int32)

        def loss(state, tokens):
            return nnx.merge(graph, state)(tokens).sum()

        return str(jax.make_jaxpr(jax.grad(loss))(state, tokens)).count("dot_general")

    assert products(2) == products(5)


def test_adapters_start_as_the_model_share_its_arrays_and_then_change_it(loaded):
    model = loaded.model
    adapted = llama.with_adapters(model, 3, rngs=nnx.Rngs(1))
    graph, adapters, rest = nnx.split(adapted, nnx.LoRAParam, ...)
    np.testing.assert_allclose(run(adapted, TOKENS_SEEN), run(model, TOKENS_SEEN), atol=1e-5)
    shared = {id(leaf) for leaf in jax.tree.leaves(nnx.state(model))}
    assert {id(leaf) for leaf in jax.tree.leaves(rest)} == shared
    leaves = jax.tree.leaves(adapters)
    assert len(leaves) == 2 * 7
    assert sum(leaf.size for leaf in leaves) == llama.adapters(model.config, 3)
    first = adapters["blocks"]["attention"]["queries"]["lora_a"][...]
    assert jnp.abs(first[0] - first[1]).max() > 0.01
    assert isinstance(model.blocks.attention.out, nnx.Linear)

    # A, B and a product for each layer, by hand: the adapted layer is x (W + A B).
    moved = jax.tree.map(lambda leaf: leaf + 0.05, adapters)
    weights = make_weights(CONFIG)
    for place, layer in weights:
        if layer is not None and len(sizes(CONFIG)[place[-1]]) == 2:
            adapter = moved[place[0]][place[1]][place[2]]
            a, b = (np.asarray(adapter[name][...][layer]) for name in ("lora_a", "lora_b"))
            weights[place, layer] = weights[place, layer] + (a @ b).T
    found = run(nnx.merge(graph, moved, rest), TOKENS_SEEN)
    expected = expected_logits(TOKENS_SEEN[0], CONFIG, weights)
    np.testing.assert_allclose(found[0], expected, atol=5e-5)


STEP = 0.01


def members(model):
    """Three members along a line, a step apart."""
    adapted = llama.with_adapters(model, 2, rngs=nnx.Rngs(0))
    graph, adapters, rest = nnx.split(adapted, nnx.LoRAParam, ...)
    each = [jax.tree.map(lambda leaf, at=at: leaf + at, adapters) for at in (0.06, 0.07, 0.08)]
    return graph, each, rest


def test_a_sweep_of_adapters_shares_the_base(loaded):
    graph, each, rest = members(loaded.model)

    def loss(adapters, rest):
        log_p = jax.nn.log_softmax(nnx.merge(graph, adapters, rest)(jnp.asarray(TOKENS_SEEN)))
        return -log_p[..., 7].mean()

    values, gradients = jax.jit(jax.vmap(jax.value_and_grad(loss), (0, None)))(pj.stack(each), rest)
    for value, adapters in zip(values, each, strict=True):
        log_p = jax.nn.log_softmax(run(nnx.merge(graph, adapters, rest), TOKENS_SEEN))
        np.testing.assert_allclose(value, -log_p[..., 7].mean(), rtol=1e-5)
    slope = sum(leaf[1].sum() for leaf in jax.tree.leaves(gradients))
    np.testing.assert_allclose(slope, (values[2] - values[0]) / (2 * STEP), rtol=0.02)


def greedy(model, prompt, length):
    for _ in range(length):
        prompt = [
            *prompt,
            int(run(model, [prompt + [0] * (16 - len(prompt))])[0, len(prompt) - 1].argmax()),
        ]
    return prompt


def test_what_is_generated_is_the_likeliest_token_of_the_whole_text(loaded):
    model, prompts = loaded.model, [[5, 80, 3, 3], [9]]
    expected = [greedy(model, prompt, 12 - len(prompt)) for prompt in prompts]
    padded = jnp.array([prompts[0], [*prompts[1], 77, 77, 77]])
    found = llama.generate(model, padded, 8, lengths=jnp.array([4, 1]))
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(llama.generate(model, padded[:1], 8), expected[:1])


def test_each_member_of_a_sweep_generates(loaded):
    graph, each, rest = members(loaded.model)
    prompt = jnp.array([[5, 80, 3, 3]])

    def text_of(adapters):
        return llama.generate(nnx.merge(graph, adapters, rest), prompt, 6)

    found = jax.vmap(text_of)(pj.stack(each))
    expected = [greedy(nnx.merge(graph, adapters, rest), [5, 80, 3, 3], 6) for adapters in each]
    np.testing.assert_array_equal(found[:, 0], expected)
    assert len({tuple(row) for row in expected}) > 1


def test_what_is_written_ends_at_a_mark(loaded, monkeypatch):
    prompts = ["the", "The 12 the"]
    rows = [loaded.tokenizer.encode(prompt).ids for prompt in prompts]
    expected = [greedy(loaded.model, row, 5)[len(row) :] for row in rows]
    written = llama.write(loaded.model, loaded.tokenizer, prompts, 5)
    assert written == [loaded.tokenizer.decode(row) for row in expected]
    ended = make_tokenizer()
    ended.add_special_tokens([TOKENS[expected[0][2]]])
    assert llama.write(loaded.model, ended, prompts[:1], 5) == [ended.decode(expected[0][:2])]


def test_a_text_in_tokens_is_the_same_text_and_its_end_held_out(loaded):
    written = text.split("t", TEXT * 20)
    corpus = llama.in_tokens(written, loaded.tokenizer)
    everything = np.concatenate([corpus.train, corpus.held_out])
    assert loaded.tokenizer.decode(everything, skip_special_tokens=False) == TEXT * 20
    assert len(corpus.held_out) == -(-len(everything) // 10)
    assert corpus.describe().startswith(f"t, {len(everything)} tokens, sha256 ")
    with pytest.raises(UsageError, match=r"its held-out part has \d+ tokens and needs 100 "):
        text.check_length(corpus, batch_size=1, context=99)
    batch = text.batches(corpus, 0)(jnp.int32(0), 2, 5)
    windows = np.lib.stride_tricks.sliding_window_view(corpus.train, 5)
    assert all((windows == row).all(1).any() for row in np.asarray(batch))
    assert batch.max() > 255 or corpus.train.max() <= 255


def test_numbers_of_parameters_are_those_of_the_model():
    for tied in (True, False):
        config = llama.LlamaConfig(50, 8, 12, 3, 4, 2, 6, 10.0, 1e-5, tied)
        model = nnx.eval_shape(lambda config=config: llama.Llama(config, rngs=nnx.Rngs(0)))
        leaves = jax.tree.leaves(nnx.state(model))
        assert llama.parameters(config) == sum(leaf.size for leaf in leaves)


def test_an_estimate_of_fine_tuning_is_near_what_its_program_takes():
    config = llama.LlamaConfig(4000, 64, 128, 6, 4, 2, 16, 10.0, 1e-5, True)
    rank, count, batch, context = 4, 3, 2, 32
    adapted = nnx.eval_shape(
        lambda: llama.with_adapters(llama.Llama(config, rngs=nnx.Rngs(0)), rank, rngs=nnx.Rngs(0))
    )
    graph, adapters, rest = nnx.split(adapted, nnx.LoRAParam, ...)
    tokens = jax.ShapeDtypeStruct((batch, context), jnp.int32)
    hidden = jax.ShapeDtypeStruct((batch, context, config.width), jnp.float32)

    def loss(adapters, rest, tokens, base):
        model = nnx.merge(graph, adapters, rest)
        return pj.linear_distillation(
            model.hidden(tokens), model.kernel, base, model.kernel, tokens
        ).total

    step = jax.vmap(jax.grad(loss), (0, None, None, None))
    stacked = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((count, *leaf.shape), leaf.dtype), adapters
    )
    found = jax.jit(step).lower(stacked, rest, tokens, hidden).compile().memory_analysis()
    taken = found.temp_size_in_bytes / memory.BYTES
    estimate = (
        llama.fine_tuning(config, members=count, rank=rank, batch_size=batch, context=context)
        - llama.parameters(config)
        - count * memory.COPIES * llama.adapters(config, rank)
    )
    print(taken, estimate)
    assert 0.7 < estimate / taken < 2
