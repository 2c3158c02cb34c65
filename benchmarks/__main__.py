"""Runs the benchmarks: `python -m benchmarks [--quick] [--device gpu] [--out PATH] [NAME ...]`."""

from pathlib import Path
from typing import Annotated, Literal

import jax
import tyro

from benchmarks import (
    gates,
    importance,
    imports,
    penalties,
    resolvent,
    skipping,
    sparsity,
    streaming,
    sweep,
    transforms,
)
from benchmarks.harness import machine

BENCHMARKS = {
    "gates": gates.run,
    "importance": importance.run,
    "imports": imports.run,
    "penalties": penalties.run,
    "resolvent": resolvent.run,
    "skipping": skipping.run,
    "sparsity": sparsity.run,
    "streaming": streaming.run,
    "sweep": sweep.run,
    "transforms": transforms.run,
}
Name = Literal[
    "gates",
    "importance",
    "imports",
    "penalties",
    "resolvent",
    "skipping",
    "sparsity",
    "streaming",
    "sweep",
    "transforms",
]


def main(
    names: Annotated[tuple[Name, ...], tyro.conf.Positional] = (),
    /,
    quick: bool = False,
    device: Literal["cpu", "gpu"] = "cpu",
    out: Path = Path(__file__).parent / "results",
) -> None:
    """Measures penalties-jax beside its peers, and prints tables.

    Args:
        names: What to run; all of it if none is named.
        quick: Smaller arrays.
        device: What to run on.
        out: Where JSON and plots go.
    """
    jax.config.update("jax_platforms", {"cpu": "cpu", "gpu": "cuda"}[device])
    out.mkdir(parents=True, exist_ok=True)
    print(", ".join(f"{key} {value}" for key, value in machine().items()), flush=True)
    for name in names or BENCHMARKS:
        print(f"\n{name}: {BENCHMARKS[name](quick=quick, out=out)}", flush=True)
    print(f"\nJSON and plots: {out}")


if __name__ == "__main__":
    tyro.cli(main)
