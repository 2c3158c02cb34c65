"""A sweep of 16 configs in one compiled program, beside 16 runs.

Each run decomposes the toy model of superposition under smooth L0 with another coefficient, as
`penalties-jax decompose --target tms` does. The sweep stacks the 16 configs and maps over them.
The runs beside it either have their hyperparameters as Python constants, as hand-written penalties
do, so that each compiles anew, or share one program whose argument is the config. Times include
tracing and compiling.
"""

import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import penalties_jax as pj
from benchmarks.harness import spread, table, verdict, write_json
from penalties_jax.recipes.decompose.components import losses, start
from penalties_jax.recipes.decompose.targets import ToyModel

COEFFICIENTS = np.geomspace(3e-4, 1e-2, 16).tolist()
QUICK_COEFFICIENTS = COEFFICIENTS[::8]
STEPS, QUICK_STEPS = 300, 30
BATCH, COMPONENTS = 256, 10
ROUNDS, QUICK_ROUNDS = 3, 1
CONSTANTS_BAR, SHARED_BAR, DIFFERENCE_BAR = 2.0, 1.2, 1e-4

WEIGHT = jnp.array([[0.66, 0.93], [-1.07, -0.36], [0.01, -1.13], [-0.67, 0.91], [1.08, -0.34]])
TARGET = ToyModel(weight=WEIGHT, bias=jnp.full(5, -0.25), probability=0.05)


def run(*, quick: bool, out: Path) -> str:
    """Times the sweep and the runs; writes sweep.json; returns the tables."""
    steps = QUICK_STEPS if quick else STEPS
    configs = [
        coefficient
        * pj.ImportanceMinimality(
            pj.SmoothL0(gamma=pj.anneal_fraction(1.0, 0.1, total_steps=steps)), beta=0.5
        )
        for coefficient in (QUICK_COEFFICIENTS if quick else COEFFICIENTS)
    ]
    key = jax.random.key(0)

    def sweep() -> Any:
        return jax.jit(lambda stack: jax.vmap(lambda config: train(config, key, steps))(stack))(
            pj.stack(configs)
        )

    def constants() -> Any:
        results = [jax.jit(lambda config=config: train(config, key, steps))() for config in configs]
        return jnp.stack(results)

    def shared() -> Any:
        program = jax.jit(lambda config: train(config, key, steps))
        return jnp.stack([program(config) for config in configs])

    sides = {"sweep": sweep, "constants": constants, "shared": shared}
    rounds = QUICK_ROUNDS if quick else ROUNDS
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    values = {}
    for _ in tqdm(range(rounds), desc="sweep", unit="round", leave=False):
        for name, side in sides.items():
            jax.clear_caches()
            begin = time.perf_counter()
            values[name] = np.asarray(side())
            seconds[name].append(time.perf_counter() - begin)
    times = {name: np.array(values) for name, values in seconds.items()}
    change = np.abs(values["sweep"] - values["shared"])
    difference = float(np.max(change) / np.max(np.abs(values["shared"])))
    over_constants = spread(times["constants"] / times["sweep"])
    over_shared = spread(times["sweep"] / times["shared"])
    write_json(out / "sweep.json", {"steps": steps, "seconds": times, "difference": difference})
    rows = [
        {
            f"{len(configs)} configs": "sweep: stacked configs, one program",
            "s": spread(times["sweep"]).text(1),
            "ratio": "",
            "bar": "",
        },
        {
            f"{len(configs)} configs": "runs with Python constants",
            "s": spread(times["constants"]).text(1),
            "ratio": f"sweep {over_constants.text(1)} times as fast",
            "bar": f"{CONSTANTS_BAR:g}: {verdict(met=over_constants.median >= CONSTANTS_BAR)}",
        },
        {
            f"{len(configs)} configs": "runs that share one program",
            "s": spread(times["shared"]).text(1),
            "ratio": f"sweep takes {over_shared.text(2)} times as long",
            "bar": f"{SHARED_BAR:g}: {verdict(met=over_shared.median <= SHARED_BAR)}",
        },
    ]
    return (
        f"{steps} steps of decomposing the toy model, batch {BATCH}, compilation included\n\n"
        + table(rows)
        + f"\n\nlargest difference of a result from its own run: {difference:.1e} of the largest; "
        f"bar {DIFFERENCE_BAR:g}: {verdict(met=difference <= DIFFERENCE_BAR)}"
    )


def train(penalty: Any, key: jax.Array, steps: int) -> jax.Array:
    """Decompose the target; return the mean importance of each component at the end."""
    optimizer = optax.adam(1e-3)
    sites = start(key, TARGET, COMPONENTS)

    def parts(sites: Any, index: Any) -> Any:
        inputs = TARGET.sample(jax.random.fold_in(key, index), BATCH)
        return losses(jax.random.fold_in(key, index), TARGET, sites, inputs)

    def step(index: Any, carry: Any) -> Any:
        sites, state = carry

        def total(sites: Any) -> jax.Array:
            value = parts(sites, index)
            return value.faithfulness + value.reconstruction + penalty.at(index)(value.importances)

        updates, state = optimizer.update(jax.grad(total)(sites), state)
        return optax.apply_updates(sites, updates), state

    sites, _ = jax.lax.fori_loop(0, steps, step, (sites, optimizer.init(sites)))
    return jnp.concatenate([jnp.mean(c, 0) for c in parts(sites, steps).importances.values()])
