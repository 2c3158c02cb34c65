"""What skipping is judged by, and its report."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from penalties_jax.recipes import plots
from penalties_jax.recipes.report import Report, Table
from penalties_jax.recipes.sparsify.config import DENSE, GROUPS
from penalties_jax.recipes.sparsify.timing import Times
from penalties_jax.recipes.text import Corpus, unigram_loss

IMAGES = FRONTIER, CURVES, SKIPPED = "frontier.png", "curves.png", "skipped.png"
TIMES = "times.jsonl"
# How far the share that is skipped may be from its target without a word in the report.
TOLERANCE = 0.05


class Result(NamedTuple):
    """What one member does on held-out text.

    Attributes:
        controller: "dense", "schedule" or "dual ascent".
        target: The share of positions that it was to skip.
        loss_kind: The sparsity loss that it was trained with; the dense model has none.
        weight: The weight of that loss at the end.
        capacity: How many positions of a sequence its layers compute.
        rate: The share of gates that are closed.
        dropped: The share of positions whose gate is open, and that there is no room for.
        loss: Its loss, in nats per byte.
        excess: Its loss above that of the dense model that was trained for as long.
        spread: The standard deviation, over positions, of the probability that the gate is open.
    """

    controller: str
    target: float
    loss_kind: str | None
    weight: float
    capacity: int
    rate: float
    dropped: float
    loss: float
    excess: float
    spread: float

    @property
    def skipped(self) -> float:
        """The share of positions that are skipped, because their gate is closed or dropped."""
        return self.rate + self.dropped


class Shown(NamedTuple):
    """A window of the held-out text, and 1 where the gate of a layer of a member is open."""

    window: Int[np.ndarray, " length"]
    masks: Float[np.ndarray, "members layers time"]


def report(
    results: Sequence[Result],
    times: Sequence[Times],
    records: Sequence[Mapping[str, Any]],
    shown: Shown,
    text: Corpus,
) -> Report:
    """Return the report of the results, of the times, and of the training records of the log."""
    across = {"share of positions skipped, held-out text": [r.skipped for r in results]}
    if times:
        # Both controllers run the programs of a target.
        of_dense, *of_targets = times
        across["milliseconds a step in evaluation, one model"] = [
            1e3 * each.evaluation for each in (of_dense, *of_targets, *of_targets)
        ]
    panels = {
        label: {
            name: [
                (x, result.loss)
                for x, result in zip(xs, results, strict=True)
                if result.controller == name
            ]
            for name in GROUPS
        }
        for label, xs in across.items()
    }
    frontier = plots.frontiers(panels, label="loss, nats per byte, held-out text")
    curves = plots.curves(
        [record for record in records if not record["member"].startswith(DENSE)],
        panels={
            "target": "target share of skipped positions",
            "rate": "share of gates that are closed",
            "dropped": "share of positions that there was no room for",
            "weight": "weight of the sparsity loss",
            "loss": "loss, nats per byte",
        },
        by="member",
        legend="controller, target",
    )
    highlighted = plots.highlighted(
        bytes(shown.window[:-1].astype(np.uint8)).decode("latin-1"),
        {
            f"{result.controller}, target {result.target:g}": mask.mean(axis=0)
            for result, mask in zip(results, shown.masks, strict=True)
            if result.controller != DENSE
        },
        scale="share of layers whose gate is open at the position",
    )
    headers = ("controller", "target", "kind", "weight", "capacity", "rate", "dropped", "skipped")
    rows = [
        [r.controller, f"{r.target:g}", r.loss_kind or "", f"{r.weight:.3g}", f"{r.capacity}"]
        + [f"{x:.4f}" for x in (r.rate, r.dropped, r.skipped, r.loss, r.excess, r.spread)]
        for r in results
    ]
    return Report(
        template="sparsify/report.html.jinja",
        table=((*headers, "loss", "above dense", "spread of the gate"), rows),
        units="losses in nats per byte, on held-out text",
        images={FRONTIER: frontier, CURVES: curves, SKIPPED: highlighted},
        values={
            "unigram": unigram_loss(text),
            "missed": [r for r in results if abs(r.skipped - r.target) > TOLERANCE],
            "times": table_of_times(times) if times else None,
        },
    )


def table_of_times(times: Sequence[Times]) -> Table:
    """Return the table of the times, the first of which are those of the dense model."""
    sides = ("training", "evaluation")
    columns = ("s/step", "tokens/s", "of dense")
    headers = [f"{side}: {column}" for side in sides for column in columns]
    rows = []
    for i, each in enumerate(times):
        row = [f"{each.target:g}" if i else DENSE, f"{each.capacity}"]
        for side in sides:
            seconds, dense = getattr(each, side), getattr(times[0], side)
            tokens = getattr(each, f"{side}_tokens")
            row += [f"{seconds:.3g}", f"{tokens:.0f}", f"{seconds / dense:.2f}"]
        rows.append(row)
    return ("target", "capacity", *headers), rows
