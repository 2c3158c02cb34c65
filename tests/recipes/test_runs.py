import dataclasses
import math

import pytest

from penalties_jax.recipes import runs


@dataclasses.dataclass
class Numbers:
    steps: int = 1
    kl_weights: tuple[float, ...] = (0.0, 1.0)


@pytest.mark.parametrize(
    ("numbers", "problem"),
    [
        (Numbers(steps=0), "--steps must be a finite number above 0, not 0"),
        (Numbers(kl_weights=(0.0, -1.0)), "--kl-weights must be .* 0 or above, not -1.0"),
        (Numbers(kl_weights=(math.nan,)), "--kl-weights .* not nan"),
        (Numbers(kl_weights=(math.inf,)), "--kl-weights .* not inf"),
    ],
)
def test_check_numbers(numbers, problem):
    runs.check_numbers(Numbers(), positive=["steps"], nonnegative=["kl_weights"])
    with pytest.raises(runs.UsageError, match=problem):
        runs.check_numbers(numbers, positive=["steps"], nonnegative=["kl_weights"])


def test_write_file_leaves_the_old_file_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "file"
    runs.write_file(path, "old")

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr(runs.os, "replace", fail)
    with pytest.raises(OSError, match="no space left"):
        runs.write_file(path, b"new")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("file", "old")]


def test_start_run_removes_only_what_a_run_wrote(tmp_path):
    runs.start_run(tmp_path, {"seed": 0}, products=[])
    for name in ("mine.txt", "report.html", "metrics.jsonl", "checkpoints/10/leaf", "pretrained/a"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    runs.start_run(tmp_path, {"seed": 1}, products=["report.html"])
    found = {path.name for path in tmp_path.iterdir()}
    assert found == {"mine.txt", "pretrained", "config.yaml"}
    runs.check_resumable(tmp_path, {"seed": 1})


@pytest.mark.parametrize("name", ["config.yaml", "checkpoints/model.npz", "report.html"])
def test_start_run_refuses_a_folder_with_somebody_elses_files(tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("theirs: 1")
    with pytest.raises(runs.UsageError, match="not from a run of this kind; choose another --out"):
        runs.start_run(tmp_path, {"seed": 1}, products=["report.html"])
    assert path.read_text() == "theirs: 1"


def test_check_resumable_names_what_differs(tmp_path):
    with pytest.raises(runs.UsageError, match="nothing to resume"):
        runs.check_resumable(tmp_path, {})
    runs.start_run(tmp_path, {"seed": 1, "steps": 2}, products=[])
    with pytest.raises(runs.UsageError, match="it was run with steps 2, not 3"):
        runs.check_resumable(tmp_path, {"seed": 1, "steps": 3})
    with pytest.raises(runs.UsageError, match="it was run with steps 2, not None"):
        runs.check_resumable(tmp_path, {"seed": 1})
    (tmp_path / "config.yaml").write_text("a: [")
    with pytest.raises(runs.UsageError, match="nothing to resume"):
        runs.check_resumable(tmp_path, {})


def test_log_survives_a_line_cut_short_and_rewinds(tmp_path):
    assert runs.read_log(tmp_path) == []
    records = [{"kind": "train", "step": step, "loss": 1 / step} for step in (1, 2, 3)]
    runs.append_log(tmp_path, records[:2])
    runs.append_log(tmp_path, [records[2], {"kind": "evaluation", "step": 3}])
    with open(tmp_path / runs.LOG, "a") as log:
        log.write('{"kind": "tr')
    assert runs.read_log(tmp_path)[:3] == records
    runs.rewind_log(tmp_path, 2)
    assert runs.read_log(tmp_path) == records[:2]
