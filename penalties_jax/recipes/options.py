"""The options that every job has, and what options may be."""

import contextlib
import dataclasses
import math
import os
from collections.abc import Collection
from pathlib import Path

import numpy as np

# What counts steps and positions in a compiled program.
INT32 = 2**31 - 1
FLOAT32 = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
# Options that have another bound: a key has 32 bits, and each layer is compiled by itself.
MOST = {"seed": 2**32 - 1, "layers": 1_000}
MOST_MEMBERS = 10_000
# Longer than any path that a run writes below its folder.
DEEP_BELOW = ("-" * 60,) * 4


class UsageError(Exception):
    """What the user asked for can't be done; the message is one line that says why."""


class RunError(Exception):
    """The run can't go on, or has nothing to show; the message is one line that says why."""


@dataclasses.dataclass(frozen=True)
class Options:
    """The options that every job has; a job adds its own, and other defaults."""

    out: Path = Path("runs")
    """The folder that the run writes to."""

    resume: bool = False
    """Continue the run in that folder, made with the same options, from its last checkpoint."""

    overwrite: bool = False
    """Start over in that folder: what an earlier run of this job wrote there is removed, but for
    the model before the job, which would be the same."""

    seed: int = 0
    """The seed of the initial parameters and of the batches."""

    log_every: int = 20
    """Steps between two lines of the log, and two checkpoints."""

    pretrain_steps: int = 900
    """Optimiser steps of the model before the job begins."""

    pretrain_learning_rate: float = 3e-3
    """Adam's highest learning rate in these steps."""

    width: int = 64
    """The size of the model's residual stream, a multiple of the number of heads."""

    layers: int = 2
    """The number of transformer blocks."""

    heads: int = 4
    """The number of attention heads in each block."""

    context: int = 128
    """The length of a sequence, in bytes."""

    mesh: str | None = None
    """The devices that share a batch, as data=N; by default all, if their number divides it."""


def check_options(options: Options, *, members: int, may_be_zero: Collection[str] = ()) -> None:
    """Refuse options that can't be run, and touch nothing.

    Numbers are finite and above 0, and neither too large nor too small for what they become in a
    compiled program: int32, float32, a key of 32 bits. The seed and those that are named may be 0.
    An option of several values has at least one, and no two alike.

    Args:
        options: What was asked for.
        members: How many members they ask for.
        may_be_zero: The names of options.

    Raises:
        UsageError: If an option is none of that, the width is no multiple of the heads, there are
            too many members, the folder can't be one, or both resume and overwrite are asked for.
    """
    for name, given in vars(options).items():
        values = given if isinstance(given, tuple) else (given,)
        if not values or len(set(values)) < len(values):
            raise UsageError(f"{flag(name)} needs at least one value, all different, not {given}")
        for value in values:
            # A bool is an int too.
            if type(value) in (int, float):
                _check_number(name, value, zero=name in ("seed", *may_be_zero))
    if members > MOST_MEMBERS:
        raise UsageError(f"at most {MOST_MEMBERS} members train at once, not {members}")
    if options.width % options.heads:
        raise UsageError(
            f"--width must be a multiple of --heads, not {options.width} of {options.heads}"
        )
    if options.resume and options.overwrite:
        raise UsageError("--resume continues a run and --overwrite starts over: give one of them")
    _check_folder(options.out)


def _check_number(name: str, value: float, *, zero: bool) -> None:
    # In Python's numbers, which hold what was typed: a whole number may be beyond every float.
    if not 0 <= value < math.inf or (value == 0 and not zero):
        allowed = "0 or above" if zero else "above 0"
        raise UsageError(f"{flag(name)} must be a finite number {allowed}, not {value}")
    whole = isinstance(value, int)
    smallest, largest = (1, MOST.get(name, INT32)) if whole else FLOAT32
    if value > largest:
        raise UsageError(f"{flag(name)} must be at most {largest}, not {value}")
    if 0 < value < smallest:
        raise UsageError(f"{flag(name)} must be at least {smallest}, not {value}")


def _check_folder(folder: Path) -> None:
    try:
        os.fspath(folder).encode("utf-8")
        # As deep below as a checkpoint's files are: there is nothing yet, or something is wrong.
        deepest = folder.absolute().joinpath(*DEEP_BELOW)
        # Each name by itself: what lies below a folder that isn't there is not looked at.
        for path in (deepest, *(Path(deepest.anchor, name) for name in folder.parts)):
            with contextlib.suppress(FileNotFoundError):
                path.lstat()
    except ValueError as error:
        raise UsageError(f"can't write to the folder {folder}: {error}") from error
    except OSError as error:
        raise UsageError(f"can't write to the folder {folder}: {error.strerror}") from error


def flag(name: str) -> str:
    """Return how the option of that name is typed."""
    return "--" + name.replace("_", "-")
