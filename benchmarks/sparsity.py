"""What the sparsity loss adds to a training step of the language model that learns to skip.

The step is that of `penalties-jax sparsify` for one model: loss, gradient and Adam. With the loss
comes the whole of it: the target and the weight from `DualAscent`, the loss itself, its gradient
through the gates, and the update of the multiplier.
"""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import penalties_jax as pj
from benchmarks.harness import Spread, compiled, measure, ratio, spread, table, verdict, write_json
from penalties_jax.recipes.language_model import mean_loss
from penalties_jax.recipes.sparsify.model import SparseLanguageModel

BATCH, CONTEXT, WIDTH, LAYERS, HEADS = 4, 128, 64, 2, 4
ROUNDS, QUICK_ROUNDS = 200, 50
WITHOUT = "without it"
BAR = 1.01


class Result(NamedTuple):
    """What was measured of a step."""

    name: str
    milliseconds: Spread
    time: Spread


def run(*, quick: bool, out: Path) -> str:
    """Measures a step without and with the loss; writes sparsity.json; returns the table."""
    windows = jax.random.randint(jax.random.key(0), (BATCH, CONTEXT + 1), 0, 256)
    programs = {name: _program(windows, kind) for name, kind in {WITHOUT: None, "l1": "l1"}.items()}
    seconds = measure(programs, rounds=QUICK_ROUNDS if quick else ROUNDS, label="training step")
    results = [
        Result(name, spread(1e3 * times), ratio(times, seconds[WITHOUT]))
        for name, times in seconds.items()
    ]
    write_json(
        out / "sparsity.json",
        {"results": [result._asdict() for result in results], "seconds": seconds},
    )
    return (
        f"a training step of the sparse language model, {BATCH} sequences of {CONTEXT} bytes\n\n"
        + table([_row(result) for result in results])
    )


def _program(windows: jax.Array, kind: Any) -> Any:
    model = SparseLanguageModel(
        width=WIDTH, layers=LAYERS, heads=HEADS, context=CONTEXT, rngs=nnx.Rngs(0)
    )
    model.eval()
    graph, parameters, rest = nnx.split(model, nnx.Param, ...)
    optimizer = optax.adam(1e-3)
    controller = pj.DualAscent(target=0.5)

    def step(parameters, moments, multiplier, rest, windows):
        control = controller(multiplier)

        def total(parameters):
            model = nnx.merge(graph, parameters, rest, copy=True)
            loss = mean_loss(model(windows[:, :-1]), windows[:, 1:])
            if kind is None:
                return loss, (loss, None)
            rates = jnp.stack([layer.rate[...] for layer in model.layers()])
            penalty = pj.SparsityTarget(control.target, kind)(rates)
            value, _ = pj.balanced_loss(loss, penalty, sparsity_weight=control.weight)
            return value, (loss, jnp.mean(rates))

        gradient, (loss, rate) = jax.grad(total, has_aux=True)(parameters)
        updates, moments = optimizer.update(gradient, moments, parameters)
        if rate is not None:
            multiplier = controller.update(multiplier, rate=rate, value=loss)
        return optax.apply_updates(parameters, updates), moments, multiplier

    state = (parameters, optimizer.init(parameters), controller.init())
    # Every program gives its own state away.
    return compiled(step, *jax.tree.map(jnp.copy, state), rest, windows, carried=3)


def _row(result: Result) -> dict[str, str]:
    baseline = result.name == WITHOUT
    return {
        "sparsity loss": result.name if baseline else f"`{result.name}`, by dual ascent",
        "ms": result.milliseconds.text(1),
        "over a step without": "1" if baseline else result.time.text(3),
        "bar": "" if baseline else f"{BAR:g}: {verdict(met=result.time.median <= BAR)}",
    }
