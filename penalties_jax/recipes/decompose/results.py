"""What decompositions are judged by, and their report."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from penalties_jax.recipes import plots
from penalties_jax.recipes.decompose.config import PENALTIES, TITLES, DecomposeConfig
from penalties_jax.recipes.report import Report

IMAGES = FRONTIER, ADVERSARIAL, CURVES = "frontier.png", "adversarial.png", "curves.png"


class Result(NamedTuple):
    """How one decomposition did on inputs it was not trained on.

    Attributes:
        penalty: "lp" or "smooth_l0".
        coefficient: What the penalty was multiplied with.
        seed: The seed of its initial components and masks.
        l0: CI-L0, the mean number of components in use at a position, averaged over matrices.
        distance: The distance of the output with components scaled by their importance.
        adversarial: The same under 20 steps of adversarial masks.
        faithfulness: The mean squared error of the summed components.
        recovery: Of the toy model, the mean maximal cosine similarity with its features.
    """

    penalty: str
    coefficient: float
    seed: int
    l0: float
    distance: float
    adversarial: float
    faithfulness: float
    recovery: float | None


def frontier(
    results: Sequence[Result], penalty: str, metric: str
) -> list[list[tuple[float, float]]]:
    """Return (CI-L0, metric) of a penalty's members: a list for each coefficient, over seeds.

    Members that have diverged are left out.
    """
    points: dict[float, list[tuple[float, float]]] = {}
    for result in results:
        point = (result.l0, getattr(result, metric))
        if result.penalty == penalty and np.isfinite(point).all():
            points.setdefault(result.coefficient, []).append(point)
    return [points[coefficient] for coefficient in sorted(points)]


def matched(results: Sequence[Result], metric: str, count: int = 5) -> list[tuple[float, ...]]:
    """Return rows of (CI-L0, metric under L_p, under smooth L0) where both frontiers reach.

    Means over seeds, between which log(metric) is interpolated linearly in CI-L0.
    """
    curves = []
    for name in PENALTIES:
        means = sorted(tuple(np.mean(points, axis=0)) for points in frontier(results, name, metric))
        curves.append(np.array([mean for mean in means if mean[1] > 0]).T)
    if not all(curve.size for curve in curves):
        return []
    low, high = max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves)
    if not low < high:
        return []
    grid = np.linspace(low, high, count)
    columns = [np.exp(np.interp(grid, x, np.log(y))) for x, y in curves]
    return [tuple(map(float, row)) for row in zip(grid, *columns, strict=True)]


def report(
    config: DecomposeConfig, results: Sequence[Result], records: Sequence[Mapping[str, Any]]
) -> Report:
    """Return the report of the results, and of the training records of the log."""
    toy = config.target == "tms"
    unit = "mean squared error" if toy else "KL, nats per byte"

    def pareto(metric: str, label: str) -> bytes:
        return plots.pareto(
            {TITLES[penalty]: frontier(results, penalty, metric) for penalty in PENALTIES},
            axes=(f"CI-L0 (importance above {config.threshold:g}), per matrix", f"{label}: {unit}"),
        )

    curves = plots.curves(
        [record for record in records if record["seed"] == config.seed],
        panels={
            "loss": f"stochastic reconstruction: {unit}",
            f"importance/ci_l0_{config.threshold:g}": "CI-L0, all matrices together",
            "importance/smooth_l0_no_beta": f"smooth L0, gamma {config.gamma_final:g}",
            "importance/lp_no_beta": f"L_p, p = {config.p_final:g}",
        },
        by="member",
        legend="penalty, coefficient",
    )
    headers = ("penalty", "coefficient", "seed", "CI-L0", "masked", "adversarial", "faithfulness")
    rows = [
        [TITLES[result.penalty], f"{result.coefficient:g}", f"{result.seed}"]
        + [f"{value:.4g}" for value in result[3:7]]
        for result in results
    ]
    if toy:
        headers = (*headers, "recovery")
        rows = [[*row, f"{result.recovery:.3f}"] for row, result in zip(rows, results, strict=True)]
    compared = [[f"{value:.4g}" for value in row] for row in matched(results, "distance")]
    return Report(
        template="decompose/report.html.jinja",
        table=(headers, rows),
        units=f"masked and adversarial in {unit}",
        images={
            FRONTIER: pareto("distance", "importance-masked model"),
            ADVERSARIAL: pareto("adversarial", "adversarial masks"),
            CURVES: curves,
        },
        values={"unit": unit, "matched": (("CI-L0", *TITLES.values()), compared)},
    )
