"""A run's folder: its settings, its log, its checkpoints, written so that a crash loses nothing."""

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import orbax.checkpoint as ocp
import yaml

from penalties_jax import _yaml
from penalties_jax.recipes.options import Options, UsageError, flag

SETTINGS = "config.yaml"
LOG = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
# The last file that a run writes: with it, a run is finished.
REPORT = "report.html"


class Run(NamedTuple):
    """A run that may write to its folder; its settings are those of `config.yaml`."""

    folder: Path
    settings: dict[str, Any]


def write_file(path: Path, content: str | bytes) -> None:
    """Write a whole file or nothing: readers see the old content or the new, never a part."""
    data = content.encode("utf-8") if isinstance(content, str) else content
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as new:
        try:
            new.write(data)
            new.close()
            os.chmod(new.name, 0o644)
            os.replace(new.name, path)
        except BaseException:
            os.unlink(new.name)
            raise


def open_run(options: Options, images: Iterable[str], **texts: str) -> Run:
    """Start or resume the run in `options.out`, or refuse to, and touch nothing then.

    Of an earlier run that is overwritten, the log, the checkpoints, the images and the report are
    removed. Everything else in the folder stays, and so does the pretrained model.

    Args:
        options: All but where and how to start decide the run's numbers, and become its settings.
        images: The names of the images that the job writes.
        **texts: A description of each text, in place of the option of that name.

    Raises:
        UsageError: If the folder holds a run already, or files of that name that are not from a run
            of this job; if what is to be resumed isn't there, or was run with other options; if the
            folder can't be written.
    """
    settings = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in (dataclasses.asdict(options) | texts).items()
        if name not in ("out", "resume", "overwrite")
    }
    folder, earlier = options.out, _read_settings(options.out)
    files = (SETTINGS, REPORT, CHECKPOINTS, LOG, *images)
    taken = [name for name in files if (folder / name).exists()]
    if taken and earlier.keys() != settings.keys():
        raise UsageError(
            f"{folder} holds a {taken[0]} that is not from a run of this kind: neither --resume "
            "nor --overwrite touches it; choose another --out"
        )
    if options.resume:
        _check_resumable(folder, earlier, settings)
    elif taken and not options.overwrite:
        finished = "a finished" if REPORT in taken else "an unfinished"
        raise UsageError(
            f"{folder} holds {finished} run: --resume continues it where the options are the same, "
            "--overwrite removes it and starts over"
        )
    else:
        _start(folder, settings, taken)
    return Run(folder, settings)


def _check_resumable(folder: Path, earlier: dict[str, Any], settings: dict[str, Any]) -> None:
    if not earlier:
        raise UsageError(f"nothing to resume: no settings of a run in {folder / SETTINGS}")
    different = [
        f"{flag(name)} {earlier[name]}, not {value}"
        for name, value in settings.items()
        if earlier[name] != value
    ]
    if different:
        raise UsageError(f"can't resume {folder}: it was run with {'; '.join(different)}")


def _start(folder: Path, settings: dict[str, Any], taken: Iterable[str]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in taken:
            if name == CHECKPOINTS:
                shutil.rmtree(folder / name)
            elif name != SETTINGS:
                (folder / name).unlink()
        # Last, so that what is interrupted before is still a run, which can be overwritten.
        write_file(folder / SETTINGS, _yaml.dump(settings))
    except OSError as error:
        raise UsageError(f"can't write to the folder {folder}: {error.strerror}") from error


def _read_settings(folder: Path) -> dict[str, Any]:
    """Return the settings of the run in `folder`; none if there is no readable run."""
    try:
        found = _yaml.load((folder / SETTINGS).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def append_log(folder: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Append one line of JSON for each record, all in one write."""
    with open(folder / LOG, "a", encoding="utf-8") as log:
        log.write(_lines(records))


def read_log(folder: Path) -> list[dict[str, Any]]:
    """Return the records of the log; a last line that a crash cut short is left out."""
    path = folder / LOG
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def rewind_log(folder: Path, step: int) -> None:
    """Keep only the log's training records up to `step`, those that a checkpoint there has seen."""
    train = [record for record in read_log(folder) if record["kind"] == "train"]
    write_file(folder / LOG, _lines(record for record in train if record["step"] <= step))


def _lines(records: Iterable[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


@contextmanager
def open_checkpoints(folder: Path) -> Iterator[ocp.CheckpointManager]:
    """Open a run's checkpoints: the latest is kept, and each appears whole or not at all."""
    options = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False)
    with ocp.CheckpointManager((folder / CHECKPOINTS).absolute(), options=options) as manager:
        yield manager
