"""The options that every job has, and what options may be."""

import dataclasses
import math
from collections.abc import Collection
from pathlib import Path


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
    """Start over in that folder: what an earlier run of this job wrote there is removed."""

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


def check_options(options: Options, *, may_be_zero: Collection[str] = ()) -> None:
    """Refuse options that can't be run.

    Numbers are finite and above 0. The seed and those that are named may be 0. An option of several
    values has at least one, and no two alike.

    Raises:
        UsageError: If an option is none of that, the seed doesn't fit 32 bits, the width is no
            multiple of the heads, or both resume and overwrite are asked for.
    """
    for name, given in vars(options).items():
        values = given if isinstance(given, tuple) else (given,)
        if not values or len(set(values)) < len(values):
            raise UsageError(f"{flag(name)} needs at least one value, all different, not {given}")
        zero = name in ("seed", *may_be_zero)
        for value in values:
            # A bool is an int too.
            if type(value) not in (int, float):
                continue
            if not math.isfinite(value) or value < 0 or (value == 0 and not zero):
                allowed = "0 or above" if zero else "above 0"
                raise UsageError(f"{flag(name)} must be a finite number {allowed}, not {value}")
    if options.seed >= 2**32:
        raise UsageError(f"--seed must be below 2**32, not {options.seed}")
    if options.width % options.heads:
        raise UsageError(
            f"--width must be a multiple of --heads, not {options.width} of {options.heads}"
        )
    if options.resume and options.overwrite:
        raise UsageError("--resume continues a run and --overwrite starts over: give one of them")


def flag(name: str) -> str:
    """Return how the option of that name is typed."""
    return "--" + name.replace("_", "-")
