"""What skipping is judged by, and its report."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from penalties_jax.recipes import plots
from penalties_jax.recipes.report import Report
from penalties_jax.recipes.sparsify.config import DENSE, GROUPS
from penalties_jax.recipes.text import Corpus, unigram_loss

IMAGES = FRONTIER, CURVES, SKIPPED = "frontier.png", "curves.png", "skipped.png"


class Result(NamedTuple):
    """What one member does on held-out text.

    Attributes:
        controller: "dense", "schedule" or "dual ascent".
        target: The share of positions that it was to skip.
        rate: The share that it skips.
        loss: Its loss, in nats per byte.
        excess: Its loss above that of the dense model that was trained for as long.
        spread: The standard deviation, over positions, of the probability that the gate is open.
    """

    controller: str
    target: float
    rate: float
    loss: float
    excess: float
    spread: float


class Shown(NamedTuple):
    """A window of the held-out text, and 1 where a layer of a member computes a position of it."""

    window: Int[np.ndarray, " length"]
    masks: Float[np.ndarray, "members layers time"]


def report(
    results: Sequence[Result], records: Sequence[Mapping[str, Any]], shown: Shown, text: Corpus
) -> Report:
    """Return the report of the results, and of the training records of the log."""
    frontier = plots.frontiers(
        {
            name: [(result.rate, result.loss) for result in results if result.controller == name]
            for name in GROUPS
        },
        axes=("share of positions skipped, held-out text", "loss, nats per byte, held-out text"),
    )
    curves = plots.curves(
        [record for record in records if not record["member"].startswith(DENSE)],
        panels={
            "target": "target share of skipped positions",
            "rate": "realised share of skipped positions",
            "weight": "weight of the sparsity loss",
            "loss": "loss, nats per byte",
        },
        by="member",
        legend="controller, target",
    )
    skipped = plots.highlighted(
        bytes(shown.window[:-1].astype(np.uint8)).decode("latin-1"),
        {
            f"{result.controller}, target {result.target:g}": mask.mean(axis=0)
            for result, mask in zip(results, shown.masks, strict=True)
            if result.controller != DENSE
        },
        scale="share of layers that compute the position",
    )
    rows = [[r.controller, f"{r.target:g}", *(f"{value:.4f}" for value in r[2:])] for r in results]
    headers = ("controller", "target", "rate", "loss", "above dense", "spread of the gate")
    return Report(
        template="sparsify/report.html.jinja",
        table=(headers, rows),
        units="losses in nats per byte, on held-out text",
        images={FRONTIER: frontier, CURVES: curves, SKIPPED: skipped},
        values={"unigram": unigram_loss(text)},
    )
