"""Plots as PNG bytes: no global state, no display."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "axes.axisbelow": True,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.edgecolor": "#888888",
    "lines.linewidth": 1.8,
}


def frontier(
    x: Sequence[float], y: Sequence[float], *, labels: Sequence[str], axes: tuple[str, str]
) -> bytes:
    """Plot one labelled point for each member, joined in their order.

    Args:
        x: What is paid.
        y: What is gained.
        labels: The texts beside the points, above and below in turn so that neighbours don't meet.
        axes: The labels of the two axes, with units.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7, 4.8), layout="constrained")
        plot = figure.subplots()
        plot.plot(x, y, color="#bbbbbb", zorder=1)
        plot.scatter(x, y, s=80, c=_colours(len(x)), zorder=2)
        for index, (label, across, up) in enumerate(zip(labels, x, y, strict=True)):
            offset = (0, -18) if index % 2 else (0, 10)
            text = plot.annotate(
                label, (across, up), offset, textcoords="offset points", ha="center"
            )
            text.set_path_effects([withStroke(linewidth=3, foreground="white")])
        plot.set(xlabel=axes[0], ylabel=axes[1])
        plot.margins(0.12)
        return _png(figure)


def curves(
    records: Sequence[Mapping[str, Any]], *, panels: Mapping[str, str], by: str, legend: str
) -> bytes:
    """Plot metrics of a log over its steps: a panel for each metric, a line for each member.

    Args:
        records: The log's records, with "step", `by` and the metrics.
        panels: The title, with units, of each metric's panel.
        by: What tells the members apart.
        legend: What `by` is called.
    """
    members = sorted({record[by] for record in records})
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7, 2.7 * len(panels)), layout="constrained")
        plots = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
        for plot, (metric, label) in zip(plots, panels.items(), strict=True):
            for colour, member in zip(_colours(len(members)), members, strict=True):
                own = [record for record in records if record[by] == member]
                steps, values = zip(
                    *((record["step"], record[metric]) for record in own), strict=True
                )
                plot.plot(steps, values, color=colour, label=f"{member:g}")
            plot.set(title=label)
        plots[-1].set(xlabel="step")
        lines = plots[0].get_legend_handles_labels()
        figure.legend(*lines, title=legend, loc="outside right upper", frameon=False)
        return _png(figure)


def _colours(count: int) -> list[tuple[float, ...]]:
    colours = matplotlib.colormaps["viridis"]
    return [colours(0.9 * index / max(1, count - 1)) for index in range(count)]


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()
