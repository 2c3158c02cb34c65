"""A penalty in an optimizer: the time of a step beside that of `optax.add_decayed_weights`.

Every chain is Adam with something between `scale_by_adam` and the learning rate, applied to the
same parameters and gradients, compiled, with parameters and state donated: as in a train step.
"""

from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import penalties_jax as pj
from benchmarks.harness import (
    BAR,
    OURS,
    Spread,
    compiled,
    figure,
    measure,
    ratio,
    save,
    spread,
    table,
    verdict,
    write_json,
)

WIDTH, QUICK_WIDTH = 1000, 300
ROUNDS = 25
WEIGHT = 1e-4
BASELINE = "optax.add_decayed_weights"

# A step's time over the baseline's, at most.
BARS = {"pj.L1": 1.05, "pj.L2": 1.05, "pj.SmoothL0": 1.15}


class Result(NamedTuple):
    """What was measured of one chain."""

    name: str
    milliseconds: Spread
    time: Spread
    temporaries: int
    bar: float | None

    @property
    def met(self) -> bool:
        """Whether the step is within its bar; the baseline is its own."""
        return self.bar is None or self.time.median <= self.bar


def shapes(width: int) -> dict[str, tuple[int, ...]]:
    """The shapes of a small language model; 50M values in 15 arrays at width 1000."""
    layers = {
        f"layer{i}/{name}": shape
        for i in range(3)
        for name, shape in {
            "in": (width, 4 * width),
            "in_bias": (4 * width,),
            "out": (4 * width, width),
            "out_bias": (width,),
        }.items()
    }
    return {
        "embedding": (20 * width, width),
        **layers,
        "norm": (width,),
        "head": (width, 6 * width - 16),
    }


def _parameters(key, width):
    sizes = shapes(width)
    keys = jax.random.split(key, len(sizes))
    return {
        name: jax.random.normal(key, shape, jnp.float32)
        for key, (name, shape) in zip(keys, sizes.items(), strict=True)
    }


def _chains():
    middles = {
        BASELINE: optax.add_decayed_weights(WEIGHT),
        "pj.L1": pj.add_penalty(pj.L1(), WEIGHT),
        "pj.L2": pj.add_penalty(pj.L2(), WEIGHT / 2),
        "pj.SmoothL0": pj.add_penalty(pj.SmoothL0(gamma=0.1), WEIGHT),
    }
    return {
        name: optax.chain(optax.scale_by_adam(), middle, optax.scale_by_learning_rate(3e-4))
        for name, middle in middles.items()
    }


def _step(optimizer):
    def step(params, state, gradients):
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    return step


def run(*, quick: bool, out: Path) -> str:
    """Measures all chains; writes transforms.json and transforms.png; returns the table."""
    width = QUICK_WIDTH if quick else WIDTH
    gradients = _parameters(jax.random.key(1), width)
    size = sum(leaf.size for leaf in jax.tree.leaves(gradients))
    programs = {}
    for name, optimizer in _chains().items():
        params = _parameters(jax.random.key(0), width)
        state = optimizer.init(params)
        programs[name] = compiled(_step(optimizer), params, state, gradients, carried=2)
    seconds = measure(programs, rounds=ROUNDS, label="optimizer step")
    results = [
        Result(
            name=name,
            milliseconds=spread(1e3 * times),
            time=ratio(times, seconds[BASELINE]),
            temporaries=programs[name].temporaries or 0,
            bar=BARS.get(name),
        )
        for name, times in seconds.items()
    ]
    write_json(
        out / "transforms.json",
        {"size": size, "results": [result._asdict() for result in results], "seconds": seconds},
    )
    _plot(results, size, out / "transforms.png")
    return (
        f"one Adam step on {size / 1e6:.1f}M float32 parameters in {len(gradients)} arrays\n\n"
        + (table([_row(result, size) for result in results]))
    )


def _row(result, size):
    return {
        "between Adam and the learning rate": f"`{result.name}`",
        "ms": result.milliseconds.text(0),
        "over the baseline": "1" if result.bar is None else result.time.text(3),
        "temporaries": f"{result.temporaries / (4 * size):.1%}",
        "bar": "" if result.bar is None else f"{result.bar:g}: {verdict(met=result.met)}",
    }


def _plot(results, size, path):
    drawing, (ax,) = figure(1, width=7, height=2.4)
    judged = [result for result in results if result.bar is not None]
    rows = np.arange(len(judged))[::-1]
    ax.errorbar(
        [result.time.median for result in judged],
        rows,
        xerr=np.hstack([result.time.error for result in judged]),
        fmt="o",
        markersize=7,
        color=OURS,
        label="median and quartiles",
    )
    ax.vlines(
        [result.bar for result in judged], rows - 0.3, rows + 0.3, color=BAR, lw=2, label="bar"
    )
    ax.axvline(1, color="#333333", linewidth=0.8, linestyle=":", label=BASELINE)
    ax.set_ylim(-0.6, len(judged) - 0.4)
    ax.set_yticks(rows, [result.name for result in judged])
    ax.set_xlabel(f"time of a step over that with {BASELINE}")
    ax.set_title(f"Adam on {size / 1e6:.0f}M float32 parameters, compiled", fontsize=11)
    ax.grid(axis="x", color="#dddddd", linewidth=0.6)
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=9)
    save(drawing, path)
