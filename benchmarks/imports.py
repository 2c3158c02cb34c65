"""What `import penalties_jax` adds to importing jax and optax, in a fresh interpreter each time."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

from benchmarks.harness import measure, spread, table, verdict, write_json

ROUNDS, QUICK_ROUNDS = 30, 5
BASE, OURS = "import jax, optax", "import jax, optax, penalties_jax"
BAR_MS = 150


def run(*, quick: bool, out: Path) -> str:
    """Measures the imports; writes imports.json; returns the table."""
    programs = {statement: partial(_fresh, statement) for statement in (BASE, OURS)}
    seconds = measure(programs, rounds=QUICK_ROUNDS if quick else ROUNDS, label="imports")
    added = spread(1e3 * (seconds[OURS] - seconds[BASE]))
    write_json(out / "imports.json", {"added_ms": added._asdict(), "seconds": seconds})
    rows = [
        {
            "statement": f"`{statement}`",
            "ms": spread(1e3 * times).text(0),
            "added ms": added.text(0) if statement == OURS else "",
            f"bar {BAR_MS} ms": verdict(met=added.median <= BAR_MS) if statement == OURS else "",
        }
        for statement, times in seconds.items()
    ]
    return "a fresh interpreter, from its start to its end\n\n" + table(rows)


def _fresh(statement: str) -> None:
    # As an installed package is imported: from bytecode, which the first, untimed rounds write.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    subprocess.run([sys.executable, "-c", statement], check=True, env=env)
