"""What gathering saves: the language model of `penalties-jax sparsify` at several rates.

A step in evaluation is the loss of a batch, one in training its value, gradient and plain SGD;
"layers" is the value of the sparse layers alone. At a rate r each layer computes
ceil(1.1 (1 - r) n) of its n positions; at 0 all but one, so that gate, gather and scatter are paid
for in full. The dense model computes all positions: "every expert" as a mixture of experts is in a
textbook, and as these layers did when all they could do was to mask; "dense" those in use alone.
"""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from benchmarks.harness import (
    BAR,
    OURS,
    PEER,
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
from penalties_jax.nnx.skipping import HEAD_ROOM
from penalties_jax.recipes.language_model import mean_loss
from penalties_jax.recipes.sparsify.model import SparseLanguageModel

BATCH, CONTEXT, LAYERS, HEADS = 4, 128, 2, 4
WIDTHS, QUICK_WIDTHS = (64, 256), (64,)
ROUNDS, QUICK_ROUNDS = 60, 20
DENSE, EVERY, WHOLE = "dense", "every expert", "rate 0"
# The rate of each model that gathers; the others compute all positions.
RATES = {WHOLE: 0.0, "rate 0.5": 0.5, "rate 0.7": 0.7}
# At most, of the step that computes every expert; what gate, gather and scatter add, of the dense
# step.
OVERHEAD = 1.08
BARS = {
    "evaluation": {WHOLE: OVERHEAD, "rate 0.5": 0.65, "rate 0.7": 0.5},
    "training": {WHOLE: OVERHEAD, "rate 0.5": 0.75, "rate 0.7": 0.6},
    "layers": {"rate 0.5": 0.6, "rate 0.7": 0.45},
}


class EveryExpert(nnx.Module):
    """The peer: all experts of all positions, of which each position keeps one."""

    def __init__(self, experts: Any):
        self.router, self.up, self.down = experts.router, experts.up, experts.down

    def __call__(self, x: Float[Array, "*positions d"]) -> Float[Array, "*positions d"]:
        """The weighted output of the preferred expert."""
        probabilities = jax.nn.softmax(self.router(x))
        chosen = jax.nn.one_hot(jnp.argmax(probabilities, -1), probabilities.shape[-1])
        hidden = jax.nn.gelu(jnp.einsum("...d,edh->...eh", x, self.up[...]))
        weights = (probabilities * chosen)[..., None]
        return jnp.einsum("...eh,ehd->...d", weights * hidden, self.down[...])


class Result(NamedTuple):
    """What was measured of one program."""

    width: int
    what: str
    name: str
    capacity: int
    milliseconds: Spread
    over_dense: Spread
    over_every: Spread
    bar: float | None

    @property
    def met(self) -> bool:
        """Whether the bar is, of which the overhead's is one of the dense step."""
        judged = self.over_dense if self.name == WHOLE else self.over_every
        return self.bar is None or judged.median <= self.bar


def run(*, quick: bool, out: Path) -> str:
    """Measures steps; writes skipping.json and skipping.png; returns the table."""
    results, seconds = [], {}
    for width in QUICK_WIDTHS if quick else WIDTHS:
        for what in BARS:
            times = measure(
                {name: _program(what, width, name) for name in (DENSE, EVERY, *RATES)},
                rounds=QUICK_ROUNDS if quick else ROUNDS,
                label=f"{what}, width {width}",
            )
            seconds[f"{what}, {width}"] = times
            results += [
                Result(
                    width,
                    what,
                    name,
                    capacity_of(name),
                    spread(1e3 * own),
                    ratio(own, times[DENSE]),
                    ratio(own, times[EVERY]),
                    BARS[what].get(name),
                )
                for name, own in times.items()
            ]
    write_json(
        out / "skipping.json", {"results": [r._asdict() for r in results], "seconds": seconds}
    )
    _plot(results, out / "skipping.png")
    title = f"{BATCH} sequences of {CONTEXT} bytes, {LAYERS} layers of 4 experts, 1 in use"
    return f"{title}\n\n{table([_row(result) for result in results])}"


def capacity_of(name: str) -> int:
    """How many positions of each example a layer computes."""
    if name not in RATES:
        return CONTEXT
    return min(CONTEXT - 1, math.ceil(HEAD_ROOM * (1 - RATES[name]) * CONTEXT))


def _program(what: str, width: int, name: str) -> Any:
    model = SparseLanguageModel(
        width=width, layers=LAYERS, heads=HEADS, context=CONTEXT, rngs=nnx.Rngs(0)
    )
    model.eval()
    if name == EVERY:
        for layer in model.layers():
            experts: Any = EveryExpert(layer.experts)
            layer.experts = experts
    graph, parameters, rest = nnx.split(model, nnx.Param, ...)
    merged = partial(_merged, graph, rest)
    dense, capacity = name not in RATES, capacity_of(name)

    def evaluate(parameters: Any, windows: Int[Array, "batch length"]) -> Array:
        return mean_loss(
            merged(parameters)(windows[:, :-1], dense=dense, capacity=capacity), windows[:, 1:]
        )

    def train(parameters: Any, windows: Int[Array, "batch length"]) -> tuple[Any]:
        gradients = jax.grad(evaluate)(parameters, windows)
        return (jax.tree.map(lambda p, g: p - 1e-3 * g, parameters, gradients),)

    def layers(parameters: Any, x: Float[Array, "batch n d"]) -> Array:
        for block in merged(parameters).blocks:
            mask = jnp.ones(x.shape[:2]) if dense else None
            x = x + block.sparse(x, mask=mask, capacity=capacity)
        return x

    windows = jax.random.randint(jax.random.key(0), (BATCH, CONTEXT + 1), 0, 256)
    states = jax.random.normal(jax.random.key(1), (BATCH, CONTEXT, width))
    if what == "training":
        return compiled(train, jax.tree.map(jnp.copy, parameters), windows, carried=1)
    function: Callable[..., Any] = {"evaluation": evaluate, "layers": layers}[what]
    return compiled(function, parameters, states if what == "layers" else windows)


def _merged(graph, rest, parameters):
    return nnx.merge(graph, parameters, rest, copy=True)


def _row(result: Result) -> dict[str, str]:
    return {
        "width": str(result.width),
        "what": result.what,
        "model": result.name,
        "positions": str(result.capacity),
        "ms": result.milliseconds.text(1),
        "over dense": "1" if result.name == DENSE else result.over_dense.text(),
        "over every expert": "1" if result.name == EVERY else result.over_every.text(),
        "bar": "" if result.bar is None else f"{result.bar:g}: {verdict(met=result.met)}",
    }


def _plot(results: list[Result], path: Path) -> None:
    widths = sorted({result.width for result in results})
    drawing, axes = figure(len(widths) * len(BARS), width=3 * len(widths) * len(BARS), height=3.2)
    panels = [(width, what) for width in widths for what in BARS]
    for ax, (width, what) in zip(axes, panels, strict=True):
        chosen = [r for r in results if (r.width, r.what) == (width, what)]
        for i, result in enumerate(chosen):
            colour = OURS if result.name in RATES else PEER
            ax.bar(i, result.over_every.median, color=colour, yerr=result.over_every.error)
            if result.bar and result.name != WHOLE:
                ax.plot([i - 0.4, i + 0.4], [result.bar] * 2, color=BAR)
        ax.set_xticks(
            range(len(chosen)), [r.name for r in chosen], rotation=45, ha="right", fontsize=8
        )
        ax.set_title(f"{what}, width {width}", fontsize=10)
    axes[0].set_ylabel("time over that with every expert")
    save(drawing, path)
