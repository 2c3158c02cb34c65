import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from flax import nnx

from penalties_jax.recipes.cli import main
from penalties_jax.recipes.sparsify.config import DENSE, DUAL, SCHEDULE
from penalties_jax.recipes.sparsify.model import SparseLanguageModel
from penalties_jax.recipes.sparsify.results import IMAGES
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
        *IMAGES, "report.html", "config.yaml", "metrics.jsonl", "checkpoints", "pretrained",
    }  # fmt: skip
    assert all(plot.stat().st_size < 200_000 for plot in folder.glob("*.png"))
    settings = yaml.safe_load((folder / "config.yaml").read_text())
    assert settings["targets"] == [0.2, 1.0]
    report = (folder / "report.html").read_text()
    assert len(re.findall("data:image/png;base64,", report)) == 3
    assert "://" not in report


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
    for record in evaluation:
        assert 0 <= record["rate"] <= 1
        assert record["excess"] == pytest.approx(record["loss"] - evaluation[0]["loss"], abs=1e-6)


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
        np.testing.assert_array_equal(a[:, :7], b[:, :7])
        assert np.abs(a[:, 7:] - b[:, 7:]).min(axis=-1).max() > 0


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
