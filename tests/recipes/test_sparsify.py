import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from flax import nnx

from penalties_jax.recipes.cli import main
from penalties_jax.recipes.options import UsageError
from penalties_jax.recipes.sparsify.config import (
    DENSE,
    DUAL,
    SCHEDULE,
    SparsifyConfig,
    check,
    numbers,
)
from penalties_jax.recipes.sparsify.model import SparseLanguageModel
from penalties_jax.recipes.sparsify.results import IMAGES, TIMES
from penalties_jax.recipes.sparsify.sweep import evaluate, start_sweep, sweep_step
from penalties_jax.recipes.text import Corpus, batches
from tests.recipes.logs import read_log

SIZES = {
    "steps": 7,
    "log-every": 3,
    "batch-size": 2,
    "pretrain-steps": 4,
    "evaluation-windows": 8,
    "width": 16,
    "layers": 1,
    "heads": 2,
    "context": 16,
    "timing-steps": 3,
}
TINY = [
    "sparsify",
    *(f"--{name}={value}" for name, value in SIZES.items()),
    "--targets",
    "0.2",
    "1",
]
MEMBERS = [
    "dense 0",
    *(f"{name} {target}" for name in (SCHEDULE, DUAL) for target in ("0.2", "1")),
]


@pytest.fixture(scope="module")
def folders(run_and_kill):
    return run_and_kill(TINY)


@pytest.mark.slow
def test_everything_is_written(folders):
    folder, _ = folders
    assert {path.name for path in folder.iterdir()} == {
        *IMAGES, TIMES, "report.html", "config.yaml", "metrics.jsonl", "checkpoints", "pretrained",
    }  # fmt: skip
    assert all(plot.stat().st_size < 200_000 for plot in folder.glob("*.png"))
    settings = yaml.safe_load((folder / "config.yaml").read_text())
    assert settings["targets"] == [0.2, 1.0]
    report = (folder / "report.html").read_text()
    assert len(re.findall("data:image/png;base64,", report)) == 3
    assert "://" not in report
    evaluation = [r for r in read_log(folders[0]) if r["kind"] == "evaluation"]
    off = [r for r in evaluation if abs(r["rate"] + r["dropped"] - r["target"]) > 0.05]
    assert 0 < len(off) == len(re.findall(r"skips \d", report))


@pytest.mark.slow
def test_log(folders):
    records = read_log(folders[0])
    train = [record for record in records if record["kind"] == "train"]
    assert [(record["step"], record["member"]) for record in train] == [
        (step, member) for step in (3, 6, 7) for member in MEMBERS
    ]
    assert all(np.isfinite(record[name]) for record in train for name in ("loss", "rate", "weight"))
    assert all(
        record["rate"] == record["weight"] == 0 for record in train if "dense" in record["member"]
    )
    last = {record["member"]: record for record in train if record["step"] == 7}
    assert last[f"{SCHEDULE} 1"]["target"] == pytest.approx(1)
    assert last[f"{DUAL} 0.2"]["target"] == pytest.approx(0.2)
    evaluation = [record for record in records if record["kind"] == "evaluation"]
    assert [record["controller"] for record in evaluation] == [
        DENSE, SCHEDULE, SCHEDULE, DUAL, DUAL,
    ]  # fmt: skip
    assert [record["capacity"] for record in evaluation] == [16, 15, 1, 15, 1]
    kinds = [record.get("loss_kind") for record in evaluation]
    assert kinds == [None, "adaptive", "adaptive", "l1", "l1"]
    assert [record["weight"] for record in evaluation[:3]] == pytest.approx([0, 3, 3])
    assert all(record["weight"] > 0 for record in evaluation[3:])
    for record in evaluation:
        assert 0 <= record["rate"] <= 1
        assert 0 <= record["dropped"] <= 1 - record["rate"] + 1e-6
        assert record["excess"] == pytest.approx(record["loss"] - evaluation[0]["loss"], abs=1e-6)


@pytest.mark.slow
def test_times(folders):
    lines = (folders[0] / TIMES).read_text(encoding="utf-8").splitlines()
    times = [json.loads(line) for line in lines]
    assert [(each["target"], each["capacity"]) for each in times] == [(0, 16), (0.2, 15), (1, 1)]
    for each in times:
        for side in ("training", "evaluation"):
            assert 0 < each[side] < 60
            tokens = SIZES["batch-size"] * SIZES["context"]
            assert each[f"{side}_tokens"] * each[side] == pytest.approx(tokens)
    report = (folders[0] / "report.html").read_text()
    assert "<h2>Times</h2>" in report
    assert all(f"<td>{each['training']:.3g}</td>" in report for each in times)


@pytest.mark.slow
def test_a_run_that_times_nothing(tmp_path):
    main([*TINY, "--targets", "0.5", "--timing-steps", "0", "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out" / TIMES).exists()
    assert "<h2>Times</h2>" not in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.slow
def test_an_interrupted_run_continues_to_the_same_end(folders):
    folder, killed = folders
    main([*TINY, "--out", str(killed), "--resume"])
    assert read_log(killed) == read_log(folder)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--targets", "0.2", "1.5"], "--targets and --warmup-fraction must be at most 1"),
        (["--targets", "0.5", "0.5"], "all different"),
        (["--targets", "0.5", "0.50000001"], "--targets must differ in their first six digits"),
        (["--targets", "-0.1"], "--targets must be a finite number 0 or above"),
        (["--kind", "l3"], "kind"),
        (["--compute", "skip"], "compute"),
        (["--timing-steps", "-1"], "--timing-steps must be a finite number 0 or above, not -1"),
        (["--width", "1", "--heads", "1"], "--width must be at least 2"),
        (["--width", "15"], "multiple of --heads"),
        (["--sparsity-weight", "-1"], "--sparsity-weight must be a finite number above 0"),
        (["--seed", str(2**32)], "--seed must be at most 4294967295"),
        (["--text", "/no/such/file"], "can't read"),
        (["--resume"], "nothing to resume"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        main(["sparsify", *arguments, "--out", str(tmp_path / "out")])
    assert stop.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "out").exists()


def test_what_no_command_line_lets_through_is_refused_too():
    with pytest.raises(UsageError, match="--compute must be one of mask, gather, not skip"):
        check(SparsifyConfig(compute="skip"))


def test_memory_holds_the_activations_of_members_that_are_computed_together():
    gathered, masked = (
        numbers(SparsifyConfig(compute=compute, batch_size=size))
        for compute, size in (("gather", 7), ("mask", 2))
    )
    # 2 members of a target of 7 sequences are as much as 7 members of 2.
    assert gathered == masked


@pytest.fixture(scope="module")
@nnx.jit
def model():
    model = SparseLanguageModel(width=16, layers=2, heads=2, context=12, rngs=nnx.Rngs(0))
    model.eval()
    return model


@pytest.mark.slow
def test_no_byte_is_predicted_from_later_ones(model):
    text = jax.random.randint(jax.random.key(0), (1, 12), 0, 256)
    changed = text.at[0, 7:].set((text[0, 7:] + 1) % 256)
    for dense in (True, False):
        a, b = (np.asarray(model(x, dense=dense)) for x in (text, changed))
        # Later bytes change how many rows an expert's product has, and so how it is rounded.
        np.testing.assert_allclose(a[:, :7], b[:, :7], atol=2e-6)
        assert np.abs(a[:, 7:] - b[:, 7:]).min(axis=-1).max() > 1e-3


@pytest.mark.slow
def test_the_gates_are_what_the_layers_use(model):
    text = jax.random.randint(jax.random.key(1), (3, 12), 0, 256)
    closed = nnx.clone(model)
    for layer in closed.layers():
        layer.predictor.out.bias[...] -= 2.0
    _, masks, probabilities = closed.with_gates(text)
    assert masks.shape == probabilities.shape == (2, 3, 12)
    np.testing.assert_array_equal(masks, probabilities > 0.5)
    closed(text)
    rates = jnp.stack([layer.rate[...] for layer in closed.layers()])
    np.testing.assert_allclose(rates, 1 - masks.mean(axis=(1, 2)), rtol=1e-6)
    closed(text, dense=True)
    assert all(layer.rate[...] == 0 for layer in closed.layers())


def few_steps(model, **options):
    """The metrics of three steps, a list for each member, and the scores after them."""
    config = SparsifyConfig(batch_size=2, steps=3, context=12, **options)
    text = np.tile(np.arange(256, dtype=np.uint8), 2)
    corpus = Corpus("bytes", text, text)
    state, shared = start_sweep(config, model, batches(corpus, 0))
    step = jax.jit(sweep_step(config))
    metrics = []
    for index in range(config.steps):
        state, measured = step(state, shared, index)
        metrics.append(measured)
    scores = evaluate(config, state.models, shared, jnp.asarray(text[:26].reshape(2, 13), int))
    return jax.tree.map(lambda *values: jnp.stack(values, 1), *metrics), scores


@pytest.mark.slow
def test_members_are_trained_and_evaluated_at_their_capacity(model):
    """Which is 1.1 (1 - target) 12, rounded up: all gates are open, so the rest is dropped."""
    metrics, scores = few_steps(model, targets=(0.5, 0.0, 0.9), learning_rate=1e-8)
    capacities = np.array([12, 7, 12, 2, 7, 12, 2])
    np.testing.assert_array_equal(metrics["rate"], 0)
    np.testing.assert_allclose(
        metrics["dropped"], 1 - np.stack([capacities] * 3, 1) / 12, rtol=1e-6
    )
    np.testing.assert_allclose(scores.dropped[:, 0, 0], 1 - capacities / 12, rtol=1e-6)


@pytest.mark.slow
def test_members_that_compute_everything_are_those_of_a_run_that_masks(model):
    """In their places, whatever is trained beside them."""
    (gathered, scores), (masked, expected) = (
        few_steps(model, targets=(0.5, 0.0), compute=compute) for compute in ("gather", "mask")
    )
    for everything in (0, 2, 4):
        for a, b in ((gathered["loss"], masked["loss"]), (scores.loss, expected.loss)):
            np.testing.assert_allclose(a[everything], b[everything], rtol=1e-5)
    for halved in (1, 3):
        assert np.abs(gathered["loss"][halved] - masked["loss"][halved]).min() > 1e-4


@pytest.mark.slow
def test_with_room_for_all_open_gates_gathering_is_masking(model):
    text = jax.random.randint(jax.random.key(4), (3, 12), 0, 256)
    closed = nnx.clone(model)
    for layer in closed.layers():
        layer.predictor.out.bias[...] -= 2.2
    masked, masks, _ = closed.with_gates(text)
    room = int(masks.sum(-1).max())
    assert 0 < room < 12
    gathered = closed(text, capacity=room)
    np.testing.assert_allclose(gathered, masked, atol=1e-5)
    np.testing.assert_array_equal(closed.dropped(), 0)
    assert np.abs(closed(text, capacity=1) - masked).max() > 1e-3
    assert closed.dropped().max() > 0
