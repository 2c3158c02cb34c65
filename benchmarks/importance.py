"""Value and gradient of importance minimality: time over memory passes, and temporaries.

The importances of 16,384 positions and 4,096 components; a third of them are 0. The least that
value and gradient cost is to read them, and to read them again and write as much: three passes, at
the speed at which the same array is multiplied by a number in the same rounds. The textbook is the
formula, as one would write it, under automatic differentiation.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import penalties_jax as pj
from benchmarks.harness import (
    BAR,
    OURS,
    PEER,
    Spread,
    compiled,
    figure,
    measure,
    memory_passes,
    ratio,
    save,
    spread,
    table,
    verdict,
    write_json,
)

SHAPE, QUICK_SHAPE = (16, 1024, 4096), (4, 1024, 2048)
ROUNDS = 15
BETA, EPS = 0.5, 1e-12
MEMORY_BAR, SPEED_BAR = 0.01, 1.5


class Case(NamedTuple):
    """A per-value penalty of a number that is annealed, and the textbook's expression."""

    config: Callable[..., Any]
    textbook: Callable[..., Any]
    number: float
    dtype: Any
    time_bar: float | None


def _smooth_l0(c, gamma):
    return c**2 / (c**2 + gamma**2)


CASES = {
    "smooth L0, float32": Case(
        lambda gamma: pj.SmoothL0(gamma=gamma), _smooth_l0, 0.1, jnp.float32, 1.3
    ),
    "smooth L0, bfloat16": Case(
        lambda gamma: pj.SmoothL0(gamma=gamma), _smooth_l0, 0.1, jnp.bfloat16, 2.0
    ),
    # A power costs more than memory does: its bar is the textbook.
    "L_p, float32": Case(
        lambda p: pj.Lp(p=p, eps=EPS), lambda c, p: (c + EPS) ** p, 0.9, jnp.float32, None
    ),
}


class Result(NamedTuple):
    """What was measured of one case; times are over those of three memory passes."""

    name: str
    time: Spread
    textbook_time: Spread
    speed: Spread
    milliseconds: Spread
    temporaries: float
    textbook_temporaries: float
    time_bar: float | None

    @property
    def met(self) -> bool:
        """Whether time, or the speed beside the textbook, is within its bar, and memory too."""
        fast = (
            self.speed.median >= SPEED_BAR
            if self.time_bar is None
            else self.time.median <= self.time_bar
        )
        return fast and self.temporaries <= MEMORY_BAR


def run(*, quick: bool, out: Path) -> str:
    """Measures all cases; writes importance.json and importance.png; returns the table."""
    shape = QUICK_SHAPE if quick else SHAPE
    seconds, results = {}, []
    for name, case in CASES.items():
        seconds[name], result = _measure(name, case, shape)
        results.append(result)
    write_json(
        out / "importance.json",
        {"shape": shape, "results": [result._asdict() for result in results], "seconds": seconds},
    )
    _plot(results, shape, out / "importance.png")
    return f"value and gradient at importances {list(shape)}, beta {BETA}\n\n" + table(
        [_row(result) for result in results]
    )


def _measure(name, case, shape):
    keys = jax.random.split(jax.random.key(0))
    used = jax.random.bernoulli(keys[0], 2 / 3, shape)
    c = jnp.where(used, jax.random.uniform(keys[1], shape), 0).astype(case.dtype)

    def ours(c, number):
        return pj.importance_minimality(c, case.config(number), beta=BETA).total

    def textbook(c, number):
        sums = jnp.sum(case.textbook(c, number), (0, 1), dtype=jnp.float32)
        means = sums / math.prod(shape[:2])
        return jnp.sum(means + BETA * means * jnp.log2(1 + sums))

    number = jnp.float32(case.number)
    programs = {
        "penalties-jax": compiled(jax.value_and_grad(ours), c, number),
        "textbook": compiled(jax.value_and_grad(textbook), c, number.astype(case.dtype)),
        "copy": memory_passes(c)["read and write"],
    }
    seconds = measure(programs, rounds=ROUNDS, label=name)
    passes = 1.5 * seconds["copy"]
    return seconds, Result(
        name=name,
        time=ratio(seconds["penalties-jax"], passes),
        textbook_time=ratio(seconds["textbook"], passes),
        speed=ratio(seconds["textbook"], seconds["penalties-jax"]),
        milliseconds=spread(seconds["penalties-jax"] * 1e3),
        temporaries=(programs["penalties-jax"].temporaries or 0) / c.nbytes,
        textbook_temporaries=(programs["textbook"].temporaries or 0) / c.nbytes,
        time_bar=case.time_bar,
    )


def _row(result):
    bar = f"speed {SPEED_BAR}" if result.time_bar is None else f"time {result.time_bar}"
    return {
        "penalty": result.name,
        "time over three passes": result.time.text(),
        "textbook": result.textbook_time.text(),
        "times as fast": result.speed.text(),
        "ms": f"{result.milliseconds.median:.0f}",
        "temporaries": f"{result.temporaries:.1%}",
        "textbook's": f"{result.textbook_temporaries:.0%}",
        "bar": f"{bar}, memory {MEMORY_BAR:.0%}: {verdict(met=result.met)}",
    }


def _plot(results, shape, path):
    drawing, (ax,) = figure(1, width=7, height=2.4)
    rows = np.arange(len(results))[::-1]
    for label, color, times in (
        ("penalties-jax", OURS, "time"),
        ("textbook under autodiff", PEER, "textbook_time"),
    ):
        values = [getattr(result, times) for result in results]
        ax.errorbar(
            [value.median for value in values],
            rows,
            xerr=np.hstack([value.error for value in values]),
            fmt="o",
            markersize=7,
            color=color,
            label=label,
        )
    for row, result in zip(rows, results, strict=True):
        if result.time_bar is not None:
            ax.vlines(result.time_bar, row - 0.3, row + 0.3, color=BAR, lw=2)
    ax.axvline(1, color="#333333", linewidth=0.8, linestyle=":")
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter("{x:g}")
    ax.set_ylim(-0.6, len(results) - 0.4)
    ax.set_yticks(rows, [result.name for result in results])
    ax.set_xlabel("time over three memory passes (log scale; bars in red)")
    ax.set_title(f"Value and gradient at importances {list(shape)}, compiled", fontsize=11)
    ax.grid(axis="x", color="#dddddd", linewidth=0.6)
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=9)
    save(drawing, path)
