"""The options of a decomposition, and the members that they ask for."""

import dataclasses
from pathlib import Path
from typing import Literal, NamedTuple

from penalties_jax.recipes.decompose.components import HIDDEN
from penalties_jax.recipes.memory import COPIES, activations, check_memory, transformer
from penalties_jax.recipes.options import MOST, Options, UsageError, check_options

PENALTIES = LP, SMOOTH_L0 = "lp", "smooth_l0"
TITLES = {LP: "L_p", SMOOTH_L0: "smooth L0"}


@dataclasses.dataclass(frozen=True)
class DecomposeConfig(Options):
    """Decompose a small network's parameters under two importance penalties, and compare them.

    Options that are not given take the target's usual value, which `--full` raises.
    """

    out: Path = Path("runs/decompose")
    pretrain_steps: int = 600
    context: int = 64

    seed: int = 0
    """The seed of the network and of the batches; members count up from it."""

    target: Literal["lm", "tms"] = "lm"
    """The feed-forward matrices of a byte-level transformer, or a toy model of superposition."""

    full: bool = False
    """Five coefficients and three seeds for each penalty, and more steps."""

    text: Path | None = None
    """A UTF-8 file for the transformer; by default Python's own help topics."""

    lp_coefficients: tuple[float, ...] | None = None
    """The coefficients of the L_p penalty."""

    smooth_l0_coefficients: tuple[float, ...] | None = None
    """The coefficients of the smooth L0 penalty."""

    p_final: float = 0.4
    """The p of L_p at the end of its anneal from 2."""

    gamma_final: float = 0.1
    """The gamma of smooth L0 at the end of its anneal from 1."""

    seeds: int | None = None
    """The number of decompositions at each coefficient."""

    beta: float = 0.5
    """The weight of the frequency term, relative to the first term of either penalty."""

    faithfulness_weight: float | None = None
    """The weight of the faithfulness loss."""

    components: int | None = None
    """The number of components of each matrix."""

    steps: int | None = None
    """Optimiser steps of the decomposition."""

    batch_size: int | None = None
    """Sequences, or inputs of the toy model, in a batch: of all devices together."""

    learning_rate: float | None = None
    """Adam's learning rate at the first step; it falls to 0 along a cosine."""

    threshold: float = 0.1
    """The importance above which a component counts as in use."""

    features: int = 5
    """The number of features of the toy model."""

    hidden: int = 2
    """The number of its hidden units."""


class Size(NamedTuple):
    """How much work a run is; what the config leaves open is filled in by `size_of`."""

    lp_coefficients: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    smooth_l0_coefficients: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    seeds: int = 1
    components: int = 64
    steps: int = 500
    batch_size: int = 4
    learning_rate: float = 1e-3
    faithfulness_weight: float = 30.0


USUAL = {
    "lm": Size(),
    "tms": Size(
        lp_coefficients=(3e-4, 5e-4, 8e-4),
        smooth_l0_coefficients=(3e-4, 5e-4, 8e-4),
        components=20,
        steps=2000,
        batch_size=512,
        learning_rate=3e-3,
        # What a toy model's components miss is a component too: a heavy weight freezes them.
        faithfulness_weight=0.1,
    ),
}
FIVE = {"lm": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2), "tms": (1e-4, 2e-4, 4e-4, 8e-4, 1.6e-3)}


def size_of(config: DecomposeConfig) -> Size:
    """Return the usual size of a run, but for what the config asks for."""
    size = USUAL[config.target]
    if config.full:
        five = FIVE[config.target]
        size = size._replace(lp_coefficients=five, smooth_l0_coefficients=five, seeds=3)
    given = {name: getattr(config, name) for name in Size._fields}
    return size._replace(**{name: value for name, value in given.items() if value is not None})


def check(config: DecomposeConfig) -> None:
    """Refuse options that can't be run.

    Raises:
        UsageError: As `check_options` and `check_memory`; and if the threshold isn't below 1, or
            the last member's seed is no seed.
    """
    size = size_of(config)
    check_options(config, members=_count(size), may_be_zero=("beta", "threshold"))
    if config.threshold >= 1:
        raise UsageError(f"--threshold must be below 1, got {config.threshold:g}")
    if config.seed + size.seeds - 1 > MOST["seed"]:
        raise UsageError(f"--seeds count up from --seed, at most to {MOST['seed']}")
    check_memory(config, numbers)


def numbers(config: DecomposeConfig) -> int:
    """Return how many numbers the decompositions hold at once, about.

    The components of all members train at once, and each is evaluated by itself.
    """
    size = size_of(config)
    if config.target == "tms":
        sites, sides = 2, config.features + config.hidden
        model, area = COPIES * config.features * config.hidden, config.features * config.hidden
        positions, run = size.batch_size, 4 * config.features * size.batch_size
    else:
        width = config.width
        sites, sides, area = 2 * config.layers, 5 * width, 4 * width**2
        model = COPIES * transformer(config, block=12 * width**2)
        positions = size.batch_size * config.context
        run = activations(config, batch_size=size.batch_size, block=20 * width)
    components = size.components * (sides + 3 * HIDDEN)
    gates = positions * size.components * 2 * HIDDEN
    masked = run + sites * (positions * size.components * 4 + area)
    member = sites * (COPIES * components + gates) + 2 * masked
    return model + _count(size) * member


def _count(size: Size) -> int:
    return size.seeds * (len(size.lp_coefficients) + len(size.smooth_l0_coefficients))


class Member(NamedTuple):
    """One decomposition of a sweep."""

    penalty: str
    coefficient: float
    seed: int

    @property
    def label(self) -> str:
        """What plots call it, and those of other seeds."""
        return f"{TITLES[self.penalty]} {self.coefficient:g}"


def members(config: DecomposeConfig) -> list[Member]:
    """Return the members of the sweep, penalty after penalty."""
    size = size_of(config)
    coefficients = {LP: size.lp_coefficients, SMOOTH_L0: size.smooth_l0_coefficients}
    return [
        Member(name, coefficient, config.seed + i)
        for name in PENALTIES
        for coefficient in coefficients[name]
        for i in range(size.seeds)
    ]
