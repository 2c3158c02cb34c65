"""A run's folder: its settings, its log, its checkpoints, written so that a crash loses nothing."""

import dataclasses
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp
import yaml


class UsageError(Exception):
    """What the user asked for can't be done; the message is one line that says why."""


SETTINGS = "config.yaml"
LOG = "metrics.jsonl"
CHECKPOINTS = "checkpoints"


def check_numbers(
    config: object, *, positive: Iterable[str] = (), nonnegative: Iterable[str] = ()
) -> None:
    """Refuse a config whose named fields, numbers or tuples of them, are out of range.

    Raises:
        UsageError: If a value is not finite, or not above (or at) zero.
    """
    for names, allowed, in_range in (
        (positive, "above 0", lambda value: value > 0),
        (nonnegative, "0 or above", lambda value: value >= 0),
    ):
        for name in names:
            values = getattr(config, name)
            for value in values if isinstance(values, tuple) else (values,):
                if not (math.isfinite(value) and in_range(value)):
                    option = name.replace("_", "-")
                    raise UsageError(f"--{option} must be a finite number {allowed}, not {value}")


def check_model(config: Any) -> None:
    """Refuse a seed, a width or a number of heads that the small language model can't have.

    Raises:
        UsageError: If the seed doesn't fit 32 bits, or the width is no multiple of the heads.
    """
    if config.seed >= 2**32:
        raise UsageError(f"--seed must be below 2**32, not {config.seed}")
    if config.width % config.heads:
        raise UsageError(
            f"--width must be a multiple of --heads, not {config.width} of {config.heads}"
        )


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


def open_run(config: Any, products: Iterable[str], **texts: str) -> dict[str, Any]:
    """Start the run in `config.out`, or check that it can be resumed, as `config.resume` says.

    Args:
        config: A dataclass of options, with `out` and `resume` among them.
        products: What a run writes at its end, as of `start_run`.
        **texts: A description of each text, in place of the option of that name.

    Returns:
        Everything that decides the run's numbers, as plain values: the `config.yaml`.

    Raises:
        UsageError: As `start_run` and `check_resumable`.
    """
    settings = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in (dataclasses.asdict(config) | texts).items()
        if name not in ("out", "resume")
    }
    if config.resume:
        check_resumable(config.out, settings)
    else:
        start_run(config.out, settings, products)
    return settings


def start_run(folder: Path, settings: Mapping[str, Any], products: Iterable[str]) -> None:
    """Make `folder` ready for a run from its beginning.

    The log, the checkpoints and the named `products` of an earlier run are removed, and
    `config.yaml` is written. Everything else in the folder stays.

    Raises:
        UsageError: If the folder can't be made or written, or if what would be removed is not from
            an earlier run of this kind: its `config.yaml` has other options.
    """
    taken = [name for name in (SETTINGS, LOG, CHECKPOINTS, *products) if (folder / name).exists()]
    if taken and _read_settings(folder).keys() != settings.keys():
        raise UsageError(
            f"{folder} holds a {taken[0]} that is not from a run of this kind; choose another --out"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / CHECKPOINTS).exists():
            shutil.rmtree(folder / CHECKPOINTS)
        for name in (LOG, *products):
            (folder / name).unlink(missing_ok=True)
        write_file(folder / SETTINGS, yaml.safe_dump(dict(settings), sort_keys=False))
    except OSError as error:
        raise UsageError(f"can't write to the folder {folder}: {error.strerror}") from error


def check_resumable(folder: Path, settings: Mapping[str, Any]) -> None:
    """Check that `folder` holds a run with the same settings.

    Raises:
        UsageError: If there is no run, or one with other settings.
    """
    found = _read_settings(folder)
    if not found:
        raise UsageError(f"nothing to resume: no settings of a run in {folder / SETTINGS}")
    for name in {**settings, **found}:
        if found.get(name) != settings.get(name):
            raise UsageError(
                f"can't resume {folder}: it was run with {name} {found.get(name)}, "
                f"not {settings.get(name)}"
            )


def _read_settings(folder: Path) -> dict[str, Any]:
    """Return the settings of the run in `folder`; none if there is no readable run."""
    try:
        found = yaml.safe_load((folder / SETTINGS).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def append_log(folder: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Append one line of JSON for each record, all in one write."""
    lines = "".join(json.dumps(record) + "\n" for record in records)
    with open(folder / LOG, "a", encoding="utf-8") as log:
        log.write(lines)


def read_log(folder: Path) -> list[dict[str, Any]]:
    """Return the records of the log; a last line that a crash cut short is left out."""
    path = folder / LOG
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def rewind_log(folder: Path, step: int) -> None:
    """Keep only the log's training records up to `step`, those that a checkpoint there has seen."""
    kept = [
        record
        for record in read_log(folder)
        if record["kind"] == "train" and record["step"] <= step
    ]
    write_file(folder / LOG, "".join(json.dumps(record) + "\n" for record in kept))


@contextmanager
def open_checkpoints(folder: Path) -> Iterator[ocp.CheckpointManager]:
    """Open a run's checkpoints: the latest is kept, and each appears whole or not at all."""
    options = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False)
    with ocp.CheckpointManager((folder / CHECKPOINTS).absolute(), options=options) as manager:
        yield manager
