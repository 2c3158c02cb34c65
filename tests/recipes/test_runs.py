import dataclasses
import math
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from penalties_jax.recipes import runs
from penalties_jax.recipes.options import Options, UsageError
from tests.recipes.logs import read_log

IMAGES = ["plot.png"]


@dataclasses.dataclass(frozen=True)
class Job(Options):
    text: Path | None = None
    steps: int = 2
    weights: tuple[float, ...] = (0.0, 1.0)


@dataclasses.dataclass(frozen=True)
class OtherJob(Options):
    steps: int = 2
    rank: int = 8


def opened(options, images=IMAGES, **texts):
    """The run as it was opened; its folder is free again."""
    with runs.open_run(options, images, **texts) as run:
        assert {path.name for path in run.folder.iterdir()} >= {"config.yaml", ".lock"}
    assert not (run.folder / ".lock").exists()
    return run


@pytest.fixture
def folder(tmp_path):
    """A folder with a file of the user's, and a finished run."""
    opened(Job(out=tmp_path), text="a text")
    for name in (
        *("mine.txt", "plot.png.bak", "other.png", "pretrained/a"),
        *("checkpoints/10/leaf", "metrics.jsonl", "plot.png", "report.html"),
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return tmp_path


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(options, *, images=IMAGES):
    """The one line that refuses, with nothing touched."""
    before = contents(options.out)
    with pytest.raises(UsageError) as error:
        opened(options, images, text="a text")
    assert contents(options.out) == before
    return str(error.value)


def test_settings_are_what_decides_the_numbers(tmp_path):
    run = opened(Job(out=tmp_path / "new" / "run"), text="a text")
    assert run.folder == tmp_path / "new" / "run"
    assert run.settings["weights"] == [0.0, 1.0]
    assert run.settings["text"] == "a text"
    assert not run.settings.keys() & {"out", "resume", "overwrite"}


@pytest.mark.parametrize("seed", [0, 1])
def test_a_folder_with_a_run_is_refused(folder, seed):
    message = refused(Job(out=folder, seed=seed))
    assert "holds a finished run" in message
    assert "--resume" in message
    assert "--overwrite" in message
    (folder / "report.html").unlink()
    assert "holds an unfinished run" in refused(Job(out=folder, seed=seed))


@pytest.mark.parametrize("option", [{}, {"resume": True}, {"overwrite": True}])
def test_a_run_of_another_job_is_refused(folder, option):
    message = refused(OtherJob(out=folder, **option))
    assert "not from a run of this kind: neither --resume nor --overwrite touches it" in message


@pytest.mark.parametrize("option", [{}, {"resume": True}, {"overwrite": True}])
@pytest.mark.parametrize("name", ["config.yaml", "checkpoints/model.npz", "report.html"])
def test_somebody_elses_files_are_refused(tmp_path, name, option):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("theirs: [")
    assert "choose another --out" in refused(Job(out=tmp_path, **option))


def test_other_files_are_nobodys_business(tmp_path):
    (tmp_path / "mine.txt").touch()
    opened(Job(out=tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {"mine.txt", "config.yaml"}


@pytest.mark.parametrize("seed", [0, 1])
def test_overwriting_removes_what_a_run_wrote_and_nothing_else(folder, seed):
    run = opened(Job(out=folder, seed=seed, overwrite=True), text="a text")
    assert {path.name for path in folder.iterdir()} == {
        "mine.txt", "plot.png.bak", "other.png", "pretrained", "config.yaml",
    }  # fmt: skip
    assert run == opened(Job(out=folder, seed=seed, resume=True), text="a text")


def test_settings_that_were_edited_by_hand(folder):
    """YAML 1.1 would read a string, which no option equals."""
    settings = (folder / "config.yaml").read_text().replace("- 1.0", "- 1e0")
    (folder / "config.yaml").write_text(settings)
    assert opened(Job(out=folder, resume=True), text="a text").settings["seed"] == 0


def test_overwriting_nothing_starts(tmp_path):
    opened(Job(out=tmp_path, overwrite=True))
    assert (tmp_path / "config.yaml").exists()


def test_a_run_that_wrote_its_settings_and_no_more_can_be_resumed(tmp_path):
    assert "nothing to resume" in refused(Job(out=tmp_path, resume=True))
    run = opened(Job(out=tmp_path), text="a text")
    assert opened(Job(out=tmp_path, resume=True), text="a text") == run


def test_resuming_names_everything_that_differs(folder):
    message = refused(Job(out=folder, resume=True, seed=1, weights=(2.0,)))
    assert message == (
        f"can't resume {folder}: it was run with --seed 0, not 1; --weights [0.0, 1.0], not [2.0]"
    )
    with pytest.raises(UsageError, match="with --text a text, not another"):
        opened(Job(out=folder, resume=True), text="another")


def test_what_a_run_does_not_write_so_is_refused(folder):
    """Nothing is removed, neither what could be."""
    (folder / "metrics.jsonl").unlink()
    (folder / "metrics.jsonl").mkdir()
    for option in ({"overwrite": True}, {"resume": True}):
        assert "a metrics.jsonl that is not" in refused(Job(out=folder, **option))
    (folder / "metrics.jsonl").rmdir()
    (folder / "checkpoints").rename(folder / "elsewhere")
    (folder / "checkpoints").symlink_to(folder / "elsewhere")
    assert "a checkpoints that is not" in refused(Job(out=folder, overwrite=True))


def test_a_finished_run_that_is_resumed_is_none_until_it_ends(folder):
    opened(Job(out=folder, resume=True), text="a text")
    assert not (folder / "report.html").exists()


def test_what_another_run_does_before_the_lock_is_seen(tmp_path, monkeypatch):
    locked = runs._locked

    def other_first(folder):
        monkeypatch.setattr(runs, "_locked", locked)
        opened(Job(out=folder, seed=1))
        return locked(folder)

    monkeypatch.setattr(runs, "_locked", other_first)
    with pytest.raises(UsageError, match="holds an unfinished run"):
        opened(Job(out=tmp_path))


def test_numbers_of_other_modes_are_not_mixed(tmp_path, x64):
    with jax.enable_x64(False):
        opened(Job(out=tmp_path))
    with pytest.raises(UsageError, match=r"the modes enable_x64 False.*, not enable_x64 True"):
        opened(Job(out=tmp_path, resume=True))


def test_a_folder_has_one_run_at_a_time(tmp_path):
    run = Job(out=tmp_path)
    with runs.open_run(run, IMAGES):
        before = contents(tmp_path)
        for again in ({"overwrite": True}, {"resume": True}):
            other = f"""
from tests.recipes.test_runs import IMAGES, Job, runs, Path
with runs.open_run(Job(out=Path({str(tmp_path)!r}), **{again!r}), IMAGES):
    pass
"""
            done = subprocess.run(
                [sys.executable, "-c", other], capture_output=True, text=True, check=False
            )
            message = done.stderr.splitlines()[-1]
            assert message.endswith(f"another process runs in {tmp_path}: choose another --out")
        assert contents(tmp_path) == before
    opened(dataclasses.replace(run, resume=True))


def test_the_lock_of_a_process_that_died_is_none(tmp_path):
    hold = f"""
import os
from tests.recipes.test_runs import IMAGES, Job, runs, Path
with runs.open_run(Job(out=Path({str(tmp_path)!r})), IMAGES):
    os.kill(os.getpid(), 9)
"""
    assert subprocess.run([sys.executable, "-c", hold], check=False).returncode == -9
    assert (tmp_path / ".lock").exists()
    opened(Job(out=tmp_path, resume=True))


RECORDS = [{"kind": "train", "step": step, "loss": 1 / step} for step in (1, 2, 3)]


def logged(folder, records):
    log = runs.Log(folder)
    log.append(records)
    return log


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content + b'{"kind": "tr',
        lambda content: content + content[-30:],
        lambda content: content[:-5],
        lambda content: b"",
        lambda content: content.replace(b"0.5", b"0.6"),
        lambda content: content.replace(b"train", b"tr\xffin"),
        lambda content: None,
    ],
    ids=["cut line", "line more", "line less", "empty", "digit", "not UTF-8", "gone"],
)
def test_a_log_is_cut_or_completed_to_what_the_checkpoint_has(tmp_path, capsys, damage):
    content = logged(tmp_path, RECORDS).content
    path = tmp_path / runs.LOG
    assert path.read_bytes() == content
    damaged = damage(content)
    path.unlink()
    if damaged is not None:
        path.write_bytes(damaged)
    log = runs.Log(tmp_path)
    log.restore(content)
    assert path.read_bytes() == content
    assert log.records == RECORDS
    lines = capsys.readouterr().err.splitlines()
    longer = damaged is not None and damaged.startswith(content)
    assert len(lines) == (0 if longer else 1)
    assert all("metrics.jsonl is damaged" in line for line in lines)


def test_what_is_no_finite_number_is_null_in_the_log_and_nan_in_the_records(tmp_path):
    log = logged(tmp_path, [{"step": 1, "a": math.nan, "b": -math.inf, "c": None, "d": 1.0}])
    assert read_log(tmp_path) == [{"step": 1, "a": None, "b": None, "c": None, "d": 1.0}]
    [record] = log.records
    assert all(math.isnan(record[name]) for name in "abc")
