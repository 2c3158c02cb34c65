import base64
import re
import shutil
import signal
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

from penalties_jax.recipes import text, training
from penalties_jax.recipes.cli import main
from penalties_jax.recipes.finetune import FinetuneConfig, job
from penalties_jax.recipes.finetune.job import make_budgets, make_objective, start_sweep
from tests.recipes.logs import read_log

WEIGHTS = ("0", "0.5", "5")
SIZES = {
    "steps": 7,
    "log-every": 3,
    "batch-size": 2,
    "rank": 2,
    "learning-rate": 0.03,
    "pretrain-steps": 8,
    "pretrain-batch-size": 2,
    "evaluation-windows": 4,
    "width": 16,
    "layers": 1,
    "heads": 2,
    "context": 16,
}
SIZED = ["finetune", *(f"--{name}={value}" for name, value in SIZES.items())]
TINY = [*SIZED, "--kl-weights", *WEIGHTS]
# One that is exceeded from the first step on, by which its weight grows, and one that never is.
BUDGETS = ("0.0001", "1000")
BUDGETED = [*SIZED, "--budget-step-size=0.0001", "--kl-budget", *BUDGETS]


class Run(NamedTuple):
    """A whole run through the command.

    Attributes:
        folder: Its output.
        killed: Its output as it was between logging step 6 and saving the checkpoint there.
        chunk: The compiled chunk of its sweep.
    """

    folder: Path
    killed: Path
    chunk: Any


@pytest.fixture(scope="module")
def run(run_and_kill):
    chunks = []
    compile_chunk = training.compile_chunk

    def keep_chunk(step):
        chunks.append(compile_chunk(step))
        return chunks[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "compile_chunk", keep_chunk)
        folder, killed = run_and_kill(TINY)
    _, chunk = chunks
    return Run(folder, killed, chunk)


def test_everything_is_written(run):
    folder = run.folder
    assert {path.name for path in folder.iterdir()} == {
        "config.yaml",
        "metrics.jsonl",
        "adaptation.png",
        "curves.png",
        "report.html",
        "checkpoints",
        "pretrained",
    }
    for plot in folder.glob("*.png"):
        assert plot.stat().st_size < 200_000
    settings = yaml.safe_load((folder / "config.yaml").read_text())
    assert settings["kl_weights"] == [0.0, 0.5, 5.0]
    assert settings["target_text"].startswith("Python's standard library, ")


def test_the_sweep_is_one_program(run):
    assert run.chunk._cache_size() == 1


def test_log_has_a_line_for_each_weight_and_finite_numbers(run):
    folder = run.folder
    records = read_log(folder)
    assert [(record["kind"], record["step"], record["kl_weight"]) for record in records] == [
        (kind, step, float(weight))
        for kind, step in (("train", 3), ("train", 6), ("train", 7), ("evaluation", 7))
        for weight in WEIGHTS
    ]
    values = [value for record in records for value in record.values() if value != record["kind"]]
    assert np.isfinite(values).all()
    for record in records:
        if record["kind"] == "train":
            assert {"loss", "total", "kl", "kl/weighted"} <= set(record)
            assert {"gradient/loss", "gradient/kl", "gradient/kl/weighted"} <= set(record)


def test_a_larger_weight_is_nearer_the_base_model(run):
    folder = run.folder
    kl = [record["kl"] for record in read_log(folder) if record["kind"] == "evaluation"]
    assert kl == sorted(kl, reverse=True)
    assert min(kl) > 0


def test_report_is_self_contained(run):
    folder = run.folder
    html = (folder / "report.html").read_text()
    assert not re.search(r"https?:|<link|<script|url\(", html)
    sources = re.findall(r'src="([^"]*)"', html)
    images = [base64.b64decode(source.removeprefix("data:image/png;base64,")) for source in sources]
    assert images == [(folder / name).read_bytes() for name in ("adaptation.png", "curves.png")]
    for name in yaml.safe_load((folder / "config.yaml").read_text()):
        assert f"<td>{name}</td>" in html


@pytest.fixture(scope="module")
def of_budgets(run_and_kill):
    return run_and_kill(BUDGETED)


@pytest.mark.slow
def test_budgets_learn_their_weights(of_budgets, capsys):
    folder, _ = of_budgets
    settings = yaml.safe_load((folder / "config.yaml").read_text())
    assert settings["kl_budget"] == [0.0001, 1000]
    assert settings["kl_weights"] is None
    records = read_log(folder)
    assert [(r["step"], r["kl_budget"]) for r in records] == [
        (step, float(budget)) for step in (3, 6, 7, 7) for budget in BUDGETS
    ]
    exceeded, kept = records[::2], records[1::2]
    assert [r["kl/weight"] for r in kept[:-1]] == [0, 0, 0]
    assert kept[-1]["kl_weight"] == 0
    # What each step adds, by hand; the log has means of 3, 3 and 1 steps.
    added = [r["kl/measured"] - 0.0001 for r in exceeded[:-1]]
    assert exceeded[-1]["kl_weight"] == pytest.approx(np.dot([3, 3, 1], added), rel=1e-4)
    assert exceeded[2]["kl/weight"] == pytest.approx(np.dot([3, 3], added[:2]), rel=1e-4)
    for r in exceeded[:-1]:
        assert r["kl/held_out"] == pytest.approx(r["kl/measured"], rel=1)
    html = (folder / "report.html").read_text()
    assert "KL budget" in html
    assert f"<td>{exceeded[-1]['kl_weight']:.4f}</td>" in html


def test_a_budget_that_holds_by_itself_trains_as_without_a_penalty(of_budgets, run):
    kept = [r for r in read_log(of_budgets[0]) if r["kl_budget"] == 1000]
    without = [r for r in read_log(run.folder) if r["kl_weight"] == 0]
    for ours, theirs in zip(kept, without, strict=True):
        shared = ours.keys() & theirs.keys() - {"kind"}
        assert shared >= {"step", "kl"}
        assert {name: ours[name] for name in shared} == pytest.approx(
            {name: theirs[name] for name in shared}, rel=1e-4
        )


def test_a_controller_reads_windows_that_evaluation_leaves_out():
    config = FinetuneConfig(kl_budget=(0.1, 0.4), evaluation_windows=4, context=16)
    base = text.split("base", "".join(map(chr, range(32, 127))) * 40)
    budgets = make_budgets(config, base)
    sizes = budgets.controllers.step_size
    np.testing.assert_allclose(sizes, [0.2, 0.05], rtol=1e-6)
    evaluated = text.spread_windows(base.held_out, count=4, length=17)
    np.testing.assert_array_equal(budgets.held_out.windows, evaluated)
    read = {tuple(window) for window in np.asarray(budgets.measured.windows).tolist()}
    assert len(read) == len(base.held_out) // 17 - 4
    assert not read & {tuple(window) for window in np.asarray(evaluated).tolist()}


def test_resuming_a_killed_run_of_budgets_gives_the_same_numbers(of_budgets, tmp_path):
    folder, killed = of_budgets
    shutil.copytree(killed, tmp_path, dirs_exist_ok=True)
    main([*BUDGETED, "--out", str(tmp_path), "--resume"])
    assert read_log(tmp_path) == read_log(folder)
    assert contents(tmp_path) == contents(folder)


def test_resuming_a_killed_run_gives_the_same_numbers(run, tmp_path, capsys):
    shutil.copytree(run.killed, tmp_path, dirs_exist_ok=True)
    assert [record["step"] for record in read_log(tmp_path)] == [3, 3, 3, 6, 6, 6]
    assert not (tmp_path / "report.html").exists()

    main([*TINY, "--out", str(tmp_path), "--resume"])
    assert read_log(tmp_path) == read_log(run.folder)
    assert (tmp_path / "report.html").exists()

    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        main([*TINY, "--seed", "1", "--rank", "3", "--out", str(tmp_path), "--resume"])
    assert "it was run with --seed 0, not 1; --rank 2, not 3\n" in capsys.readouterr().err


def test_a_second_run_is_refused_and_touches_nothing(run, capsys):
    def state():
        return {path: path.stat().st_mtime_ns for path in run.folder.rglob("*")}

    before = state()
    for options in ([], ["--seed", "1"]):
        capsys.readouterr()
        with pytest.raises(SystemExit, match="2"):
            main([*TINY, *options, "--out", str(run.folder)])
        [line] = capsys.readouterr().err.splitlines()
        assert "holds a finished run: --resume" in line
        assert "--overwrite" in line
        assert state() == before


def test_overwriting_starts_over_and_keeps_the_pretrained_model(run, tmp_path, monkeypatch, capsys):
    shutil.copytree(run.folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "mine.png").touch()

    def interrupted(*arguments, **options):
        signal.raise_signal(signal.SIGINT)
        return start_sweep(*arguments, **options)

    monkeypatch.setattr(job, "start_sweep", interrupted)
    with pytest.raises(SystemExit, match="130"):
        main([*TINY, "--out", str(tmp_path), "--overwrite"])
    [line] = capsys.readouterr().err.splitlines()[-1:]
    assert line == "penalties-jax: stopped by SIGINT; --resume continues this run"
    assert {path.name for path in tmp_path.iterdir()} == {
        "mine.png", "config.yaml", "metrics.jsonl", "pretrained",
    }  # fmt: skip
    assert read_log(tmp_path) == []
    assert contents(tmp_path / "pretrained") == contents(run.folder / "pretrained")


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.npz")}


def test_terms_are_those_with_a_weight():
    assert set(make_objective(FinetuneConfig()).terms) == {"kl"}
    config = FinetuneConfig(l1_weight=2.0, l2_weight=3.0, entropy_weight=4.0, on="probs")
    outputs = {
        "logits": jnp.zeros((1, 2, 256)),
        "reference_logits": jnp.zeros((1, 2, 256)),
        "targets": jnp.zeros((1, 2), int),
    }
    _, metrics = jax.jit(make_objective(config))(outputs)
    expected = {
        "loss": np.log(256),
        "kl": 0,
        "kl/weighted": 0,
        "l1": 1 / 256,
        "l1/weighted": 2 / 256,
        "l2": 1 / 256**2,
        "l2/weighted": 3 / 256**2,
        "entropy": -np.log(256),
        "entropy/weighted": -4 * np.log(256),
        "total": -3 * np.log(256) + 2 / 256 + 3 / 256**2,
    }
    assert {name: float(value) for name, value in metrics.items()} == pytest.approx(
        expected, rel=1e-5, abs=1e-9
    )
    on_logprobs = make_objective(FinetuneConfig(l1_weight=1.0))
    np.testing.assert_allclose(jax.jit(on_logprobs)(outputs)[1]["l1"], np.log(256), rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ("--steps 0", "--steps must be"),
        ("--steps -3", "--steps must be"),
        ("--steps many", "--steps"),
        ("--seed -1", "--seed must be"),
        ("--seed 4294967296", "--seed must be at most"),
        ("--learning-rate nan", "--learning-rate must be"),
        ("--l1-weight -0.1", "--l1-weight must be"),
        ("--kl-weights", "--kl-weights needs at least one"),
        ("--kl-weights 0 -1", "--kl-weights must be"),
        ("--kl-weights 1 1", "--kl-weights needs at least one"),
        ("--kl-budget", "--kl-budget needs at least one"),
        ("--kl-budget 0", "--kl-budget must be a finite number above 0"),
        ("--kl-budget 0.1 -1", "--kl-budget must be"),
        ("--kl-budget nan", "--kl-budget must be"),
        ("--kl-budget 0.1 0.1", "--kl-budget needs at least one value, all different"),
        ("--kl-budget 0.1 --kl-weights 0", "--kl-budget takes the place of --kl-weights"),
        ("--kl-weights 0 0.01 0.1 0.5 1 --kl-budget 0.1", "give one of them"),
        ("--kl-budget 0.1 --budget-step-size 0", "--budget-step-size must be"),
        ("--kl-budget 0.1 --evaluation-windows 1000", "with fewer --evaluation-windows"),
        ("--width 10 --heads 4", "--width must be a multiple"),
        ("--on tokens", "--on"),
        ("--unknown 1", "--unknown"),
        ("--base-text {folder}/missing", "can't read the text file"),
        ("--target-text {folder}/empty", "is empty"),
        ("--target-text {folder}/binary", "is not UTF-8"),
        ("--base-text {folder}/short", "is too short"),
        ("--out {folder}/short", "can't write to the folder"),
        ("--out {folder}/short/below", "can't write to the folder"),
        ("--resume", "nothing to resume"),
        ("--resume --overwrite", "give one of them"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(tmp_path, capsys, options, problem):
    (tmp_path / "empty").touch()
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "short").write_text("not enough text")
    before = sorted(tmp_path.iterdir())
    arguments = options.format(folder=tmp_path).split()
    out = [] if "--out" in arguments else ["--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as stop:
        main(["finetune", *out, *arguments])
    assert stop.value.code == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert len(output.err.splitlines()) == 1
    assert output.err.startswith("penalties-jax: error: ")
    assert problem in output.err
    assert sorted(tmp_path.iterdir()) == before
