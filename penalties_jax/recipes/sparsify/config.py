"""The options of learning to skip, and the members that they ask for."""

import dataclasses
import math
from collections import Counter
from pathlib import Path
from typing import get_args

from penalties_jax.functional.sparsity import Kind
from penalties_jax.nnx.skipping import HEAD_ROOM, Compute
from penalties_jax.recipes.memory import COPIES, activations, check_memory, transformer
from penalties_jax.recipes.options import Options, UsageError, check_options

GROUPS = DENSE, SCHEDULE, DUAL = "dense", "schedule", "dual ascent"


@dataclasses.dataclass(frozen=True)
class SparsifyConfig(Options):
    """Train a small language model to skip a share of its work, by a schedule and by dual ascent.

    Losses are in nats per byte.
    """

    out: Path = Path("runs/sparsify")
    log_every: int = 10

    text: Path | None = None
    """A UTF-8 file to train on; by default Python's own help topics."""

    targets: tuple[float, ...] = (0.2, 0.5, 0.7)
    """The shares of positions to skip."""

    compute: Compute = "gather"
    """Whether layers compute as many positions as a target leaves and 10% more, or all, masked."""

    kind: Kind = "adaptive"
    """The sparsity loss of the schedule; dual ascent uses l1, the Lagrangian's own."""

    sparsity_weight: float = 3.0
    """The weight of the sparsity loss at the end of the schedule."""

    warmup_fraction: float = 0.5
    """The part of the steps in which the schedule raises target and weight."""

    dual_step_size: float = 0.02
    """What dual ascent adds to the weight in a step, times how far the rate is off its target."""

    steps: int = 300
    """Optimiser steps towards the targets."""

    batch_size: int = 4
    """Sequences in a batch."""

    learning_rate: float = 2e-3
    """Adam's highest learning rate towards the targets."""

    evaluation_windows: int = 128
    """Sequences of the held-out text to evaluate on, at most."""

    timing_steps: int = 15
    """Steps of one model of each target that are timed, in training and in evaluation."""


def check(config: SparsifyConfig) -> None:
    """Refuse options that can't be run.

    Raises:
        UsageError: As `check_options` and `check_memory`; and if a name is unknown, or a share
            above 1.
    """
    members = 1 + 2 * len(config.targets)
    check_options(config, members=members, may_be_zero=("targets", "timing_steps"))
    for name, known in (("kind", get_args(Kind)), ("compute", get_args(Compute))):
        given = getattr(config, name)
        if given not in known:
            raise UsageError(f"--{name} must be one of {', '.join(known)}, not {given}")
    if config.width < 2:
        raise UsageError(f"--width must be at least 2, not {config.width}")
    if len({f"{target:g}" for target in config.targets}) < len(config.targets):
        raise UsageError(f"--targets must differ in their first six digits, not {config.targets}")
    if max(config.targets) > 1 or config.warmup_fraction > 1:
        raise UsageError("--targets and --warmup-fraction must be at most 1")
    check_memory(config, numbers)


def numbers(config: SparsifyConfig) -> int:
    """Return how many numbers training holds at once, about.

    A model for each member, and the activations of those that are computed together.
    """
    width = config.width
    parameters = transformer(config, block=73 * width**2 // 2)
    kept = activations(config, batch_size=config.batch_size, block=40 * width)
    together = Counter(capacity(config, target) for _, target in members(config))
    return together.total() * COPIES * parameters + max(together.values()) * kept


def members(config: SparsifyConfig) -> list[tuple[str, float]]:
    """Return the group and the target of each member, group after group."""
    targets = {DENSE: (0.0,), SCHEDULE: config.targets, DUAL: config.targets}
    return [(name, target) for name in GROUPS for target in targets[name]]


def capacity(config: SparsifyConfig, target: float) -> int:
    """Return how many positions of a sequence a layer with that target computes."""
    if config.compute == "mask":
        return config.context
    return max(1, min(config.context, math.ceil(HEAD_ROOM * (1 - target) * config.context)))


def kind(config: SparsifyConfig, name: str) -> Kind | None:
    """Return the sparsity loss of a group; the dense model has none."""
    return {DENSE: None, SCHEDULE: config.kind, DUAL: "l1"}[name]
