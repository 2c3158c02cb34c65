"""Value and gradient of every separable penalty: time over memory passes, and temporaries.

A value and its gradient must read the input for the one, and read it and write as much for the
other: three passes over memory. Everything beyond them is time and memory lost. Beside each penalty
stands the expression that one would write by hand, under automatic differentiation.
"""

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
    Program,
    Spread,
    bandwidth,
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

SIZE, QUICK_SIZE = 64_000_000, 8_000_000
ROUNDS = 21
TIME_BAR, MEMORY_BAR = 1.3, 0.01
EPS = 1e-12


class Case(NamedTuple):
    """A penalty and the textbook's expression for it, both of an array and one number."""

    ours: Callable[..., Any]
    textbook: Callable[..., Any]
    number: float
    time_bar: float | None = TIME_BAR


def _textbook_huber(x, delta):
    magnitude = jnp.abs(x)
    inside = 0.5 * x**2
    return jnp.sum(jnp.where(magnitude <= delta, inside, delta * (magnitude - 0.5 * delta)))


def _textbook_scad(x, a):
    magnitude = jnp.abs(x)
    falling = magnitude - (magnitude - 1) ** 2 / (2 * (a - 1))
    beyond = jnp.where(magnitude <= a, falling, (a + 1) / 2)
    return jnp.sum(jnp.where(magnitude <= 1, magnitude, beyond))


# The number is the hyperparameter that one anneals, so it is an argument of the compiled program.
CASES = {
    "l1": Case(
        lambda x, weight: pj.l1(x, weights=weight),
        lambda x, weight: weight * jnp.sum(jnp.abs(x)),
        1e-3,
    ),
    "l2": Case(
        lambda x, weight: pj.l2(x, weights=weight),
        lambda x, weight: weight * jnp.sum(x**2),
        1e-3,
    ),
    "elastic_net": Case(
        lambda x, l1_ratio: pj.elastic_net(x, l1_ratio=l1_ratio),
        lambda x, l1_ratio: jnp.sum(l1_ratio * jnp.abs(x) + (1 - l1_ratio) * x**2),
        0.5,
    ),
    "smooth_l0": Case(pj.smooth_l0, lambda x, g: jnp.sum(x**2 / (x**2 + g**2)), 0.1),
    "huber": Case(pj.huber, _textbook_huber, 1.0),
    "mcp": Case(
        pj.mcp, lambda x, g: jnp.sum(jnp.where(abs(x) < g, abs(x) - x**2 / 2 / g, g / 2)), 3.0
    ),
    "scad": Case(pj.scad, _textbook_scad, 3.7),
    # Powers and logarithms cost more than memory does: their time has no bar.
    "lp": Case(pj.lp, lambda x, p: jnp.sum((jnp.abs(x) + EPS) ** p), 0.5, time_bar=None),
    "log_sum": Case(
        pj.log_sum, lambda x, eps: jnp.sum(jnp.log1p(jnp.abs(x) / eps)), 0.1, time_bar=None
    ),
}


class Result(NamedTuple):
    """What was measured of one penalty; times are over those of three memory passes."""

    name: str
    time: Spread
    textbook_time: Spread
    outside_jit_time: Spread
    at_copy_speed: Spread
    milliseconds: Spread
    copy_bandwidth: Spread
    temporaries: float
    textbook_temporaries: float
    time_bar: float | None

    def within(self) -> tuple[bool, bool]:
        """Whether time and temporaries are within their bars."""
        return (
            self.time_bar is None or self.time.median <= self.time_bar,
            self.temporaries <= MEMORY_BAR,
        )


def run(*, quick: bool, out: Path) -> str:
    """Measures all penalties; writes penalties.json and penalties.png; returns the table."""
    size = QUICK_SIZE if quick else SIZE
    x = jax.random.normal(jax.random.key(0), (size,), jnp.float32)
    seconds, results = {}, []
    for name, case in CASES.items():
        seconds[name], result = _measure(name, case, x)
        results.append(result)
    write_json(
        out / "penalties.json",
        {"size": size, "results": [result._asdict() for result in results], "seconds": seconds},
    )
    _plot(results, size, out / "penalties.png")
    copy = np.median([result.copy_bandwidth.median for result in results])
    return (
        f"value and gradient on {size // 10**6}M float32 values; copy bandwidth {copy:.1f} GB/s\n\n"
        + table([_row(result) for result in results])
    )


def _measure(name, case, x):
    number = jnp.float32(case.number)
    outside = jax.value_and_grad(case.ours)
    programs = {
        "penalties-jax": compiled(jax.value_and_grad(case.ours), x, number),
        "textbook": compiled(jax.value_and_grad(case.textbook), x, number),
        "outside jit": Program(outside, (x, number)),
        **memory_passes(x),
    }
    seconds = measure(programs, rounds=ROUNDS, label=name)
    copy = seconds["read and write"]
    passes = seconds["read"] + copy
    times = {program: ratio(values, passes) for program, values in seconds.items()}
    temporaries = {
        program: (programs[program].temporaries or 0) / x.nbytes
        for program in ("penalties-jax", "textbook")
    }
    result = Result(
        name=name,
        time=times["penalties-jax"],
        textbook_time=times["textbook"],
        outside_jit_time=times["outside jit"],
        at_copy_speed=ratio(seconds["penalties-jax"], 1.5 * copy),
        milliseconds=spread(seconds["penalties-jax"] * 1e3),
        copy_bandwidth=bandwidth(copy, 2 * x.nbytes),
        temporaries=temporaries["penalties-jax"],
        textbook_temporaries=temporaries["textbook"],
        time_bar=case.time_bar,
    )
    return seconds, result


def _row(result):
    in_time, in_memory = result.within()
    return {
        "penalty": f"`{result.name}`",
        "time over three passes": result.time.text(),
        "textbook": result.textbook_time.text(),
        "outside jit": result.outside_jit_time.text(),
        "over 1.5 copies": result.at_copy_speed.text(),
        "ms": f"{result.milliseconds.median:.0f}",
        f"bar {TIME_BAR}": "none" if result.time_bar is None else verdict(met=in_time),
        "temporaries": f"{result.temporaries:.1%}",
        "textbook's": f"{result.textbook_temporaries:.0%}",
        f"bar {MEMORY_BAR:.0%}": verdict(met=in_memory),
    }


def _plot(results, size, path):
    drawing, (time, memory) = figure(2, width=9, height=3.9, sharey=True)
    rows = np.arange(len(results))[::-1]
    sides = (
        ("penalties-jax", OURS, 0.17, "time", "temporaries"),
        (
            "textbook expression under autodiff",
            PEER,
            -0.17,
            "textbook_time",
            "textbook_temporaries",
        ),
    )
    for label, color, shift, times, temporaries in sides:
        ratios = [getattr(result, times) for result in results]
        time.errorbar(
            [value.median for value in ratios],
            rows + shift,
            xerr=np.hstack([value.error for value in ratios]),
            fmt="o",
            markersize=6,
            color=color,
            label=label,
        )
        shares = [100 * getattr(result, temporaries) for result in results]
        bars = memory.barh(rows + shift, shares, height=0.32, color=color)
        memory.bar_label(bars, [f"{share:.0f}" for share in shares], padding=3, fontsize=8)
    time.axvline(1, color="#333333", linewidth=0.8, linestyle=":")
    time.axvline(TIME_BAR, color=BAR, linewidth=1.2, linestyle="--", label=f"bar: {TIME_BAR}")
    time.set_xscale("log", base=2)
    time.xaxis.set_major_formatter("{x:g}")
    time.grid(axis="x", color="#dddddd", linewidth=0.6)
    time.set_xlabel("time over three memory passes (log scale)")
    time.set_yticks(rows, [result.name for result in results])
    memory.set_xlabel("temporaries, % of the input")
    memory.margins(x=0.12)
    drawing.suptitle(
        f"Value and gradient on {size // 10**6}M float32 values, compiled", fontsize=11
    )
    drawing.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    save(drawing, path)
