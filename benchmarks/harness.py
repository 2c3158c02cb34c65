"""What every benchmark shares: alternating rounds, memory, bandwidth, tables, JSON and plots.

A benchmark compiles what it compares ahead of time (`compiled`), gives the programs names, and has
them measured in alternating rounds (`measure`): one call of each in turn, again and again. Two
programs are compared by the ratio of their times within one round, so that whatever slows the
machine for a while slows both sides. Medians and interquartile ranges are what is reported.

Examples:
    >>> import jax.numpy as jnp
    >>> x = jnp.ones(1000)
    >>> programs = {
    ...     "double": compiled(lambda x: 2 * x, x),
    ...     "sine": compiled(jnp.sin, x),
    ... }
    >>> times = measure(programs, rounds=3, label="example")
    >>> ratio(times["sine"], times["double"]).median > 0
    True
"""

import gc
import json
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tqdm import tqdm

# Colours that stay apart in print and for colour-blind readers.
OURS, PEER, BAR = "#0072b2", "#e69f00", "#b5322a"


class Spread(NamedTuple):
    """A median and the quartiles around it."""

    median: float
    low: float
    high: float

    def text(self, digits: int = 2) -> str:
        """The median with its interquartile range, for a table."""
        return f"{self.median:.{digits}f} ({self.low:.{digits}f} to {self.high:.{digits}f})"

    @property
    def error(self) -> Float[np.ndarray, "2 1"]:
        """The lengths of an error bar, below and above."""
        return np.array([[self.median - self.low], [self.high - self.median]])


def spread(values: Any) -> Spread:
    """The median and the quartiles of some values."""
    low, median, high = np.quantile(np.asarray(values), (0.25, 0.5, 0.75))
    return Spread(float(median), float(low), float(high))


def ratio(times: Float[np.ndarray, "rounds"], base: Float[np.ndarray, "rounds"]) -> Spread:
    """The ratio of two programs' times, taken round by round."""
    return spread(times / base)


@dataclass
class Program:
    """A compiled program with its arguments, to be called again and again.

    Attributes:
        call: The compiled program.
        arguments: What it is called with.
        carried: How many leading arguments each call replaces by its result, as a train step
            replaces parameters and state; they may be donated.
        temporaries: Bytes of temporary memory at the peak of a call, from XLA's own analysis:
            neither arguments nor results. None where the backend does not tell.
    """

    call: Callable[..., Any]
    arguments: tuple[Any, ...]
    carried: int = 0
    temporaries: int | None = None

    def __call__(self) -> None:
        """Runs once, and waits for the result."""
        result = jax.block_until_ready(self.call(*self.arguments))
        if self.carried:
            self.arguments = (*result, *self.arguments[self.carried :])


def compiled(function: Callable[..., Any], *arguments: Any, carried: int = 0) -> Program:
    """Compiles a function for its arguments, so that a call is the program and nothing else.

    Args:
        function: What to compile; with `carried`, it returns a tuple of that many values.
        *arguments: What it is called with: arrays or pytrees of arrays.
        carried: How many leading arguments are donated, and replaced by the result.
    """
    program = jax.jit(function, donate_argnums=range(carried)).lower(*arguments).compile()
    analysis = program.memory_analysis()
    temporaries = None if analysis is None else int(analysis.temp_size_in_bytes)
    return Program(program, arguments, carried, temporaries)


def measure(
    programs: Mapping[str, Callable[[], Any]], *, rounds: int, label: str, warmup: int = 2
) -> dict[str, Float[np.ndarray, "rounds"]]:
    """Times programs in alternating rounds.

    Args:
        programs: What to time, by name; a call must wait for its result, as a `Program` does.
        rounds: How often each program is timed; each round starts at another program, so that
            none always runs after the same one.
        label: What the progress bar says.
        warmup: Rounds that are not timed.

    Returns:
        Seconds, by name, in the order of the rounds.
    """
    names = list(programs)
    seconds = {name: np.empty(rounds) for name in names}
    gc.collect()
    for i in tqdm(range(-warmup, rounds), desc=label, unit="round", leave=False):
        start = i % len(names)
        for name in names[start:] + names[:start]:
            begin = time.perf_counter()
            programs[name]()
            end = time.perf_counter()
            if i >= 0:
                seconds[name][i] = end - begin
    return seconds


def memory_passes(x: Float[Array, "..."]) -> dict[str, Program]:
    """What it costs to move an array, to be measured in the same rounds as what is judged by it.

    Returns:
        "read": a sum, one pass over memory. "read and write": a multiplication by a number,
        two passes; the result is new memory, as a gradient is.
    """
    return {
        "read": compiled(jnp.sum, x),
        "read and write": compiled(lambda x, scale: x * scale, x, jnp.asarray(1.5, x.dtype)),
    }


def bandwidth(times: Float[np.ndarray, "rounds"], moved: int) -> Spread:
    """GB/s of a program that moves so many bytes."""
    return spread(moved / times / 1e9)


def machine() -> dict[str, Any]:
    """What was measured on: the machine, its load, and the versions that matter."""
    device = jax.devices()[0]
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "device": f"{device.platform} ({device.device_kind})",
        "system": f"{platform.system()} {platform.machine()}",
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        **{name: version(name) for name in ("jax", "jaxlib", "optax", "numpy")},
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def verdict(*, met: bool) -> str:
    """A table's word for a bar."""
    return "met" if met else "MISSED"


def table(rows: Sequence[Mapping[str, str]]) -> str:
    """A Markdown table with aligned columns; the keys of the rows are its head."""
    lines = [list(rows[0]), *(list(row.values()) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "| " + " | ".join(cell.ljust(n) for cell, n in zip(line, widths, strict=True)) + " |"
        for line in lines
    )


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a result with the machine it comes from; arrays become lists."""
    content = {"machine": machine(), **content}
    path.write_text(json.dumps(content, indent=1, default=np.ndarray.tolist) + "\n")


def figure(
    columns: int, *, width: float, height: float, **options: Any
) -> tuple[Figure, list[Axes]]:
    """A figure with some axes beside each other, drawn without a display or global state."""
    result = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(result)
    axes = result.subplots(1, columns, squeeze=False, **options)[0]
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.set_axisbelow(True)
    return result, list(axes)


def save(drawing: Figure, path: Path) -> None:
    """Writes a figure as PNG, small enough to be committed."""
    drawing.savefig(path, dpi=110)
