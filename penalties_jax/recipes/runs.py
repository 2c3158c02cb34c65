"""A run's folder: its settings and its log, written so that a crash loses nothing."""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import yaml
from filelock import FileLock, Timeout

from penalties_jax import _yaml
from penalties_jax.recipes.devices import agree, any_process, is_main
from penalties_jax.recipes.files import sync, tell, write_file
from penalties_jax.recipes.options import Options, UsageError, flag

SETTINGS = "config.yaml"
LOG = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
LOCK = ".lock"
MODES = ("jax_enable_x64", "jax_default_prng_impl", "jax_default_matmul_precision")
# The last file that a run writes: with it, a run is finished.
REPORT = "report.html"


class Run(NamedTuple):
    """A run that may write to its folder; its settings are those of `config.yaml`."""

    folder: Path
    settings: dict[str, Any]


@contextmanager
def open_run(options: Options, images: Iterable[str], **texts: str) -> Iterator[Run]:
    """Start or resume the run in `options.out`, or refuse to, and touch nothing then.

    Of an earlier run that is overwritten, the log, the checkpoints, the images and the report are
    removed. Everything else in the folder stays, and so does the pretrained model. Until it is
    left, no other run can have the folder.

    Args:
        options: All but where and how to start decide the run's numbers, and become its settings.
        images: The names of the images that the job writes.
        **texts: A description of each text, in place of the option of that name.

    Raises:
        UsageError: If the folder holds a run already, or files of that name that are not from a run
            of this job; if what is to be resumed isn't there, or was run with other options; if the
            folder can't be written, or another process runs in it.
    """
    settings = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in (dataclasses.asdict(options) | texts).items()
        if name not in ("out", "resume", "overwrite")
    }
    settings["modes"] = numeric_modes()
    agree("their options, texts or modes", settings)
    with contextlib.ExitStack() as held:
        refusal = None
        if is_main():
            try:
                _open(options, settings, images, held)
            except UsageError as error:
                refusal = error
        if any_process(refusal is not None):
            raise refusal or UsageError("the main process refused")
        yield Run(options.out, settings)


def _open(
    options: Options, settings: dict[str, Any], images: Iterable[str], held: contextlib.ExitStack
) -> None:
    folder = options.out
    # Before the lock, which is a file too, and again, when no other run can change the folder.
    _check(options, settings, images)
    held.enter_context(_locked(folder))
    taken = _check(options, settings, images)
    if options.resume:
        # It is no finished run until it is one again.
        (folder / REPORT).unlink(missing_ok=True)
    else:
        _start(folder, settings, taken)


def _check(options: Options, settings: dict[str, Any], images: Iterable[str]) -> list[str]:
    """Refuse a folder that can't be taken, or return which files of a run it has."""
    folder, earlier = options.out, _read_settings(options.out)
    files = (SETTINGS, REPORT, CHECKPOINTS, LOG, *images)
    taken = [name for name in files if os.path.lexists(folder / name)]
    strange = [name for name in taken if not _is_of_a_run(folder / name)]
    if strange or (taken and earlier.keys() != settings.keys()):
        raise UsageError(
            f"{folder} holds a {[*strange, *taken][0]} that is not from a run of this kind: "
            "neither --resume nor --overwrite touches it; choose another --out"
        )
    if options.resume:
        _check_resumable(folder, earlier, settings)
    elif taken and not options.overwrite:
        finished = "a finished" if REPORT in taken else "an unfinished"
        raise UsageError(
            f"{folder} holds {finished} run: --resume continues it where the options are the same, "
            "--overwrite removes it and starts over"
        )
    return taken


def _is_of_a_run(path: Path) -> bool:
    is_there = path.is_dir if path.name == CHECKPOINTS else path.is_file
    return is_there() and not path.is_symlink()


def fingerprint(settings: Mapping[str, Any]) -> str:
    """Return 16 hexadecimal digits that change with any of the settings."""
    return hashlib.sha256(json.dumps(settings).encode("utf-8")).hexdigest()[:16]


def numeric_modes() -> str:
    """Return the settings of jax that change which numbers a run computes."""
    return ", ".join(f"{name.removeprefix('jax_')} {getattr(jax.config, name)}" for name in MODES)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other processes out of a folder; the lock of one that died is none."""
    path = folder / LOCK
    lock = FileLock(path)
    with _errors_of(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise UsageError(f"another process runs in {folder}: choose another --out") from error
    try:
        yield
    finally:
        # Before it is released: who waits for it sees that it is gone.
        path.unlink(missing_ok=True)
        lock.release()


def _check_resumable(folder: Path, earlier: dict[str, Any], settings: dict[str, Any]) -> None:
    if not earlier:
        raise UsageError(f"nothing to resume: no settings of a run in {folder / SETTINGS}")
    different = [
        f"{'the modes' if name == 'modes' else flag(name)} {earlier[name]}, not {value}"
        for name, value in settings.items()
        if earlier[name] != value
    ]
    if different:
        raise UsageError(f"can't resume {folder}: it was run with {'; '.join(different)}")


def _start(folder: Path, settings: dict[str, Any], taken: Iterable[str]) -> None:
    with _errors_of(folder):
        for name in taken:
            if name == CHECKPOINTS:
                shutil.rmtree(folder / name)
            elif name != SETTINGS:
                (folder / name).unlink()
        # Last, so that what is interrupted before is still a run, which can be overwritten.
        write_file(folder / SETTINGS, _yaml.dump(settings))


def _read_settings(folder: Path) -> dict[str, Any]:
    """Return the settings of the run in `folder`; none if there is no readable run."""
    try:
        found = _yaml.load((folder / SETTINGS).read_text(encoding="utf-8"))
        str(found)  # A ValueError for an integer that is too long to be shown.
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


@contextmanager
def _errors_of(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UsageError(
            f"can't write to the folder {folder}: {error.strerror or error}"
        ) from error


class Log:
    """The log of a run: lines of JSON in its folder, and what they say.

    What is no finite number is null there, and NaN here.
    """

    def __init__(self, folder: Path):
        self.path = folder / LOG
        self.records: list[dict[str, Any]] = []
        self.content = b""

    def restore(self, content: bytes) -> None:
        """Have the log be what a checkpoint has of it: cut, or completed, and that is said."""
        found = self.path.read_bytes() if self.path.exists() else b""
        if not found.startswith(content):
            tell(f"{self.path} is damaged: its lines are taken from the checkpoint")
        if is_main():
            write_file(self.path, content)
        self.content = content
        self.records = [_read(line) for line in content.splitlines()]

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Append a line for each record; they are on the disk then."""
        lines = "".join(f"{json.dumps(_jsonable(record))}\n" for record in records).encode("utf-8")
        if is_main():
            with open(self.path, "ab") as file:
                file.write(lines)
                sync(file)
        self.content += lines
        self.records += [_read(line) for line in lines.splitlines()]


def _jsonable(record):
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in record.items()
    }


def _read(line):
    record = json.loads(line)
    return {name: math.nan if value is None else value for name, value in record.items()}
