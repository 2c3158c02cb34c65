"""Plots as PNG bytes: no global state, no display."""

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
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
# Two colours that colour-blind readers tell apart.
PAIR = ("#0072b2", "#d55e00")


def frontier(
    x: Sequence[float], y: Sequence[float], *, labels: Sequence[str], axes: tuple[str, str]
) -> bytes:
    """Plot one labelled point for each member, joined in their order."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7, 4.8), layout="constrained")
        plot = figure.subplots()
        plot.plot(x, y, color="#bbbbbb", zorder=1)
        plot.scatter(x, y, s=80, c=_colours(len(x)), zorder=2)
        for index, (label, across, up) in enumerate(zip(labels, x, y, strict=True)):
            # Above and below in turn, so that neighbours don't meet.
            offset = (0, -18) if index % 2 else (0, 10)
            text = plot.annotate(
                label, (across, up), offset, textcoords="offset points", ha="center"
            )
            text.set_path_effects([withStroke(linewidth=3, foreground="white")])
        plot.set(xlabel=axes[0], ylabel=axes[1])
        plot.margins(0.12)
        return _png(figure)


def frontiers(
    panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]], *, label: str
) -> bytes:
    """Plot the points of each group, by its name, joined from left to right.

    A panel for each quantity on the horizontal axis, which begins at 0.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(2 + 4 * len(panels), 4), layout="constrained")
        plots = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for plot, (across, groups) in zip(plots, panels.items(), strict=True):
            for colour, (name, points) in zip(_colours(len(groups)), groups.items(), strict=True):
                x, y = zip(*sorted(points), strict=True)
                plot.plot(x, y, "o-", color=colour, label=name, markersize=8)
            furthest = max(x for points in groups.values() for x, _ in points) or 1
            plot.set(xlabel=across, xlim=(-0.04 * furthest, 1.04 * furthest))
        plots[0].set(ylabel=label)
        plots[0].legend(frameon=False)
        return _png(figure)


def pareto(
    groups: Mapping[str, Sequence[Sequence[tuple[float, float]]]], *, axes: tuple[str, str]
) -> bytes:
    """Plot the points of each group, for each setting those of its seeds, and its Pareto front.

    Less is better on both axes; the second is logarithmic.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7, 4.4), layout="constrained")
        plot = figure.subplots()
        for colour, (name, settings) in zip(PAIR, groups.items(), strict=True):
            points = [point for seeds in settings for point in seeds]
            if not points:
                continue
            plot.scatter(*zip(*points, strict=True), s=30, color=colour, alpha=0.6, linewidths=0)
            for seeds in settings:
                means, low, high = (f(seeds, axis=0) for f in (np.mean, np.min, np.max))
                plot.errorbar(
                    *means,
                    xerr=[[means[0] - low[0]], [high[0] - means[0]]],
                    yerr=[[means[1] - low[1]], [high[1] - means[1]]],
                    color=colour,
                    linewidth=1,
                )
            front = _pareto_front(points)
            plot.plot(*zip(*front, strict=True), color=colour, label=name)
        plot.set(xlabel=axes[0], ylabel=axes[1], yscale="log")
        if plot.has_data():
            plot.legend(frameon=False)
        return _png(figure)


def _pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points that no other beats on both axes, from left to right."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(points):
        if not front or y < front[-1][1]:
            front.append((x, y))
    return front


def highlighted(text: str, shades: Mapping[str, Sequence[float]], *, scale: str) -> bytes:
    """Plot a text once for each member, each character on its shade in [0, 1]: 1 is dark."""
    columns = 64
    lines = math.ceil(len(text) / columns)
    colours = matplotlib.colormaps["Blues"]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.2, 0.24 * (lines + 2.2) * len(shades)), layout="constrained")
        for plot, (name, values) in zip(
            figure.subplots(len(shades), squeeze=False)[:, 0], shades.items(), strict=True
        ):
            grid = np.full(lines * columns, np.nan)
            grid[: len(text)] = values
            image = plot.imshow(
                grid.reshape(lines, columns), cmap=colours, vmin=0, vmax=1.4, aspect="auto"
            )
            for i, character in enumerate(text):
                shown = {"\n": "¶", " ": "", "$": r"\$"}.get(character, character)
                plot.text(i % columns, i // columns, shown, ha="center", va="center", size=7)
            plot.set_title(name, size=8)
            plot.axis("off")
            image.set_label(scale)
        figure.supxlabel(f"shade: {scale}", size=8)
        return _png(figure)


def curves(
    records: Sequence[Mapping[str, Any]],
    *,
    panels: Mapping[str, str],
    by: str,
    legend: str,
    limited: str | None = None,
) -> bytes:
    """Plot metrics of a log over its steps: a panel for each metric, a line for each member.

    `panels` are the titles by metric; `by` tells the members apart, and `legend` is its name. In
    the panel of the metric that it limits it is a dashed line too, unless it is far above.
    """
    members = sorted({record[by] for record in records})
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7, 2.7 * len(panels)), layout="constrained")
        plots = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
        for plot, (metric, label) in zip(plots, panels.items(), strict=True):
            coloured = list(zip(_colours(len(members)), members, strict=True))
            for colour, member in coloured:
                own = [record for record in records if record[by] == member]
                steps, values = ([record[name] for record in own] for name in ("step", metric))
                # Of one step there is no line to see.
                marker = "o" if len(steps) == 1 else ""
                plot.plot(steps, values, marker, color=colour, label=_label(member))
            if metric == limited:
                plot.set(ylim=plot.get_ylim())
                for colour, member in coloured:
                    plot.axhline(member, color=colour, linestyle="--", linewidth=1)
            plot.set(title=label)
        plots[-1].set(xlabel="step")
        lines = plots[0].get_legend_handles_labels()
        figure.legend(*lines, title=legend, loc="outside right upper", frameon=False)
        return _png(figure)


def _label(member: Any) -> str:
    return member if isinstance(member, str) else f"{member:g}"


def _colours(count: int) -> list[tuple[float, ...]]:
    colours = matplotlib.colormaps["viridis"]
    return [colours(0.9 * index / max(1, count - 1)) for index in range(count)]


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()
