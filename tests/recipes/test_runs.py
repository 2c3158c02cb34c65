import dataclasses
from pathlib import Path

import pytest

from penalties_jax.recipes import runs
from penalties_jax.recipes.options import Options, UsageError

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


@pytest.fixture
def folder(tmp_path):
    """A folder with a file of the user's, and a finished run."""
    runs.open_run(Job(out=tmp_path), IMAGES, text="a text")
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
        runs.open_run(options, images, text="a text")
    assert contents(options.out) == before
    return str(error.value)


def test_write_file_leaves_the_old_file_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "file"
    runs.write_file(path, "old")

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr(runs.os, "replace", fail)
    with pytest.raises(OSError, match="no space left"):
        runs.write_file(path, b"new")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("file", "old")]


def test_settings_are_what_decides_the_numbers(tmp_path):
    run = runs.open_run(Job(out=tmp_path / "new" / "run"), IMAGES, text="a text")
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
    runs.open_run(Job(out=tmp_path), IMAGES)
    assert {path.name for path in tmp_path.iterdir()} == {"mine.txt", "config.yaml"}


@pytest.mark.parametrize("seed", [0, 1])
def test_overwriting_removes_what_a_run_wrote_and_nothing_else(folder, seed):
    run = runs.open_run(Job(out=folder, seed=seed, overwrite=True), IMAGES, text="a text")
    assert {path.name for path in folder.iterdir()} == {
        "mine.txt", "plot.png.bak", "other.png", "pretrained", "config.yaml",
    }  # fmt: skip
    assert run == runs.open_run(Job(out=folder, seed=seed, resume=True), IMAGES, text="a text")


def test_settings_that_were_edited_by_hand(folder):
    """YAML 1.1 would read a string, which no option equals."""
    settings = (folder / "config.yaml").read_text().replace("- 1.0", "- 1e0")
    (folder / "config.yaml").write_text(settings)
    assert runs.open_run(Job(out=folder, resume=True), IMAGES, text="a text").settings["seed"] == 0


def test_overwriting_nothing_starts(tmp_path):
    runs.open_run(Job(out=tmp_path, overwrite=True), IMAGES)
    assert (tmp_path / "config.yaml").exists()


def test_a_run_that_wrote_its_settings_and_no_more_can_be_resumed(tmp_path):
    assert "nothing to resume" in refused(Job(out=tmp_path, resume=True))
    run = runs.open_run(Job(out=tmp_path), IMAGES, text="a text")
    assert runs.open_run(Job(out=tmp_path, resume=True), IMAGES, text="a text") == run


def test_resuming_names_everything_that_differs(folder):
    message = refused(Job(out=folder, resume=True, seed=1, weights=(2.0,)))
    assert message == (
        f"can't resume {folder}: it was run with --seed 0, not 1; --weights [0.0, 1.0], not [2.0]"
    )
    with pytest.raises(UsageError, match="with --text a text, not another"):
        runs.open_run(Job(out=folder, resume=True), IMAGES, text="another")


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
