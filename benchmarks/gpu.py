"""Penalties and divergences on a GPU beside plain JAX, optax, PyTorch and Liger-Kernel.

The programs are those whose bytes `benchmarks.accelerators` counts, at the same sizes: a value and
its gradient. What is bound by memory is judged by a copy in the same rounds, what is bound by
products by one product of hidden states and kernel. Programs are called several times before they
are waited for, so that starting one hides behind the one before. What a peer computes has to agree
with ours, and a peer that fails has the error in its cell.

    python -m benchmarks.gpu [--out DIRECTORY]

`make bench-gpu` runs it after the tests. On a CPU the arrays are small: that is to try it. It needs
no more than jax, optax, jaxtyping, matplotlib and tqdm, on a machine that can fetch nothing.
"""

import argparse
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float
from tqdm import tqdm

import penalties_jax as pj
from benchmarks import accelerators, harness, penalties, streaming
from benchmarks.harness import (
    Program,
    Spread,
    compiled,
    figure,
    machine,
    measure,
    memory_passes,
    ratio,
    save,
    spread,
    table,
    write_json,
)

if find_spec("torch"):
    from benchmarks import torch_peers
else:
    torch_peers = None

OURS, PLAIN, OPTAX, UNIT = "penalties-jax", "plain JAX", "optax", "unit"
# Each column's colour and marker, in the order of the tables.
COLUMNS = {
    OURS: (harness.OURS, "o"),
    PLAIN: (harness.PEER, "s"),
    OPTAX: (harness.PEER, "d"),
    "torch, eager": ("#777777", "s"),
    "torch.compile": ("#777777", "^"),
    "Liger-Kernel": (harness.BAR, "v"),
}
ROUNDS = 9
# In a round a program is called for so many seconds, and so often at most: each call that is on its
# way holds its results.
SECONDS, MOST_CALLS = 0.02, 10
# After so many seconds peers are left out, and what is ours is measured to the end.
PEERS_UNTIL = 270
# Norms of results differ by so much at most: half precision, and products in another order.
AGREEMENT = 0.02
# On a CPU all axes are so many times shorter.
SMALLER = 16
LONGEST_ERROR = 80

T = TypeVar("T")


def proximal(updates, parameters):
    """`pj.proximal` of L1, with the number of steps as a constant."""
    transform = pj.proximal(pj.L1(), 1.0, accelerators.WEIGHT)
    return transform.update(updates, transform.init(parameters), parameters)[0]


def soft_threshold(updates, parameters):
    """The same as one would write it."""
    stepped = parameters + updates
    shrunk = jnp.sign(stepped) * jnp.maximum(jnp.abs(stepped) - accelerators.WEIGHT, 0)
    return shrunk - parameters


def decayed(updates, parameters):
    """`pj.add_penalty` of L2 by `optax.add_decayed_weights`."""
    transform = optax.add_decayed_weights(2 * accelerators.WEIGHT)
    return transform.update(updates, transform.init(parameters), parameters)[0]


def optax_cross_entropy(hidden, kernel, labels):
    """Cross entropy of all the logits."""
    logits = (hidden @ kernel).astype(jnp.float32)
    return jnp.mean(optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels))


def optax_linear_kl(hidden_p, kernel_p, hidden_q, kernel_q):
    """KL of all the logits."""
    return _optax_kl(hidden_p @ kernel_p, hidden_q @ kernel_q)


def _optax_kl(p, q):
    return streaming.optax_kl(p.astype(jnp.float32), q.astype(jnp.float32))


def _optax_huber(x):
    return jnp.sum(optax.losses.huber_loss(x, delta=penalties.CASES["huber"].number))


def _of_unit_logits(key, shape, dtype):
    return accelerators.FEATURES**-0.25 * jax.random.normal(key, shape, dtype)


class Row(NamedTuple):
    """What is measured of a case of `benchmarks.accelerators`.

    Attributes:
        limit: The least that it takes: so many arrays moved, or products of hidden states and
            kernel.
        optax: The same by optax, before differentiation; None where it has nothing of the kind.
        draw: What its arrays hold.
        of: How many leading arguments are differentiated; 0 for the result itself.
        products: Whether the limit is one of products.
    """

    limit: int
    optax: Callable[..., Any] | None = None
    draw: Callable[..., Array] = jax.random.normal
    of: int = 1
    products: bool = False


ROWS = {
    "`kl_from_logits`, float32, forward": Row(5, _optax_kl),
    "`kl_from_logits`, bfloat16, forward": Row(5, _optax_kl),
    "`kl_from_logits`, float32, reverse": Row(5, lambda p, q: _optax_kl(q, p)),
    "`js_from_logits`, float32": Row(7),
    "`entropy_from_logits`, float32": Row(3),
    "`kl_divergence`, float32": Row(5, _optax_kl),
    "`linear_kl`": Row(4, optax_linear_kl, _of_unit_logits, of=2, products=True),
    "`linear_cross_entropy`": Row(3, optax_cross_entropy, _of_unit_logits, of=2, products=True),
    "`importance_minimality`": Row(3, draw=jax.random.uniform),
    "`add_penalty`": Row(3, decayed, of=0),
    "`proximal`": Row(3, of=0),
    "`l1`": Row(2),
    "`l2`": Row(2),
    "`lp`": Row(2),
    "`huber`": Row(2, _optax_huber),
    "`smooth_l0`": Row(2),
}


def cases() -> dict[str, accelerators.Case]:
    """What is measured, by name: on a CPU of arrays that are small."""
    every = accelerators.cases()
    every["`proximal`"] = every["`add_penalty`"]._replace(ours=proximal, textbook=soft_threshold)
    return {name: every[name]._replace(arguments=_sized(every[name].arguments)) for name in ROWS}


def _sized(arguments):
    if jax.default_backend() != "cpu":
        return arguments
    return tuple(
        jax.ShapeDtypeStruct(tuple(max(n // SMALLER, 1) for n in x.shape), x.dtype)
        for x in arguments
    )


@dataclass
class Enqueued:
    """A program that is called several times before it is waited for.

    Attributes:
        call: Starts it once, and gives the result that there will be.
        wait: Waits for a result.
        norms: The norm of each array of a result.
        temporaries: Bytes beside arguments and results, at the peak of a call; None if unknown.
        calls: How often it is called.
    """

    call: Callable[[], Any]
    wait: Callable[[Any], Any]
    norms: Callable[[Any], Sequence[float]]
    temporaries: int | None
    calls: int = 1

    def __call__(self) -> None:
        """Starts all calls, and waits for the last."""
        for _ in range(self.calls - 1):
            self.call()
        self.wait(self.call())


def in_jax(program: Program) -> Enqueued:
    """A compiled program."""
    call = partial(program.call, *program.arguments)
    return Enqueued(call, jax.block_until_ready, norms, program.temporaries)


def norms(result: Any) -> list[float]:
    """The norm of each array of a result, in float32."""
    return [float(_norm(x)) for x in jax.tree.leaves(result)]


@jax.jit
def _norm(x):
    return jnp.sqrt(jnp.sum(jnp.square(x.astype(jnp.float32))))


def in_torch(call: Callable[[], Any]) -> Enqueued:
    """A program of PyTorch: what it holds is known after it has run."""
    assert torch_peers is not None
    call()
    return Enqueued(call, torch_peers.wait, torch_peers.norms, torch_peers.temporaries(call))


def attempt(make: Callable[[], T]) -> T | str:
    """What is made, or the class and the first line of the error.

    What compilers and a lack of memory raise has no class in common, and each goes into the table.
    """
    try:
        return make()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def ready(program: Enqueued, wanted: Sequence[float] | None = None) -> Enqueued:
    """A program that has run, and how often to call it.

    Args:
        program: To be called once.
        wanted: The norms that its results should have; None to take them as they are.

    Raises:
        ValueError: If they have others.
    """
    found = program.norms(program.call())
    if wanted is not None and not np.allclose(found, wanted, rtol=AGREEMENT, atol=0):
        raise ValueError(f"norms {_listed(found)}, ours {_listed(wanted)}")
    begin = time.perf_counter()
    program()
    once = time.perf_counter() - begin
    program.calls = min(max(math.ceil(SECONDS / once), 1), MOST_CALLS)
    program()
    return program


def _listed(norms):
    return ", ".join(f"{norm:.4g}" for norm in norms)


class Result(NamedTuple):
    """What was measured of one row.

    Attributes:
        name: Of the program.
        limit: The least that it takes, in words.
        least: The seconds that this takes, round by round.
        seconds: Of one call, by column.
        temporaries: Bytes, by column, where they are known.
        errors: Why a column has no time.
    """

    name: str
    limit: str
    least: Float[np.ndarray, "rounds"]
    seconds: dict[str, Float[np.ndarray, "rounds"]]
    temporaries: dict[str, int]
    errors: dict[str, str]

    @property
    def reached(self) -> Spread:
        """The time of the limit over ours."""
        return ratio(self.least, self.seconds[OURS])

    def over_ours(self, column: str) -> Spread:
        """The time of a column over ours."""
        return ratio(self.seconds[column], self.seconds[OURS])


def measure_row(name: str, row: Row, case: accelerators.Case, *, peers: bool) -> Result:
    """Measures a row: ours, plain JAX, and if asked for the others.

    A peer that fails is in the errors; if ours fails, that is raised.
    """
    arguments, textbook = drawn(row.draw, case.arguments), case.textbook
    ours = ready(in_jax(compiled(case.ours, *arguments)))
    wanted = ours.norms(ours.call())
    makers = {PLAIN: lambda: in_jax(compiled(textbook, *arguments))} if textbook else {}
    makers |= _peers(name, row, arguments) if peers else {}
    made = {
        column: attempt(lambda make=make: ready(make(), wanted)) for column, make in makers.items()
    }
    units, unit = _unit(row, arguments)
    programs = {OURS: ours} | {x: p for x, p in made.items() if not isinstance(p, str)}
    timed = programs | {UNIT: ready(in_jax(unit))}
    seconds = measure(timed, rounds=ROUNDS, label=name, warmup=1)
    seconds = {x: times / timed[x].calls for x, times in seconds.items()}
    return Result(
        name=name,
        limit=_limit(row),
        least=row.limit / units * seconds.pop(UNIT),
        seconds=seconds,
        temporaries={x: p.temporaries for x, p in programs.items() if p.temporaries is not None},
        errors={x: error for x, error in made.items() if isinstance(error, str)},
    )


def _limit(row):
    return f"{row.limit} {'products' if row.products else 'arrays'}"


def drawn(draw: Callable[..., Array], structs: Sequence[jax.ShapeDtypeStruct]) -> list[Array]:
    """Arrays for shapes and dtypes; integers are classes."""

    def one(key, x):
        if jnp.issubdtype(x.dtype, jnp.integer):
            return jax.random.randint(key, x.shape, 0, accelerators.CLASSES // SMALLER, x.dtype)
        return draw(key, x.shape, x.dtype)

    keys = jax.random.split(jax.random.key(0), len(structs))
    return jax.block_until_ready([one(key, x) for key, x in zip(keys, structs, strict=True)])


def _peers(name, row, arguments):
    makers = {}
    if row.optax:
        makers[OPTAX] = lambda: in_jax(compiled(differentiated(row), *arguments))
    if torch_peers:
        for column, make in torch_peers.peers(name, arguments, row.of).items():
            makers[column] = lambda make=make: in_torch(make())
    return makers


def differentiated(row: Row) -> Callable[..., Any]:
    """What optax has, with gradients if the row has them."""
    assert row.optax is not None
    return jax.value_and_grad(row.optax, tuple(range(row.of))) if row.of else row.optax


def _unit(row, arguments):
    """Of what the limit is so many: how many of them, and the program that takes as long."""
    if row.products:
        return 1, compiled(jnp.matmul, *arguments[:2])
    return 2, memory_passes(arguments[0])["read and write"]


def report(results: Sequence[Result], absent: Mapping[str, str]) -> str:
    """The machine, a table of times and one of temporaries, and what is not in them.

    Args:
        results: Of the rows.
        absent: What there is not, and why.
    """
    found = {column for x in results for column in (*x.seconds, *x.errors)}
    columns = [column for column in COLUMNS if column in found]
    return "\n\n".join(
        (
            ", ".join(f"{key} {value}" for key, value in where().items()),
            table([_times(result, columns) for result in results]),
            table([_memory(result, columns) for result in results]),
            *(f"Without {what}: {reason}." for what, reason in absent.items()),
        )
    )


def _times(result, columns):
    def cell(column):
        if column in result.errors:
            return result.errors[column].replace("|", "\\|")[:LONGEST_ERROR]
        if column not in result.seconds:
            return ""
        milliseconds = f"{1e3 * spread(result.seconds[column]).median:.3g}"
        return (
            milliseconds if column == OURS else f"{milliseconds}: {result.over_ours(column).text()}"
        )

    return {
        "ms: times ours": result.name,
        "limit": result.limit,
        "reached": f"{result.reached.median:.0%}" if result.seconds else "",
    } | {column: cell(column) for column in columns}


def _memory(result, columns):
    held = result.temporaries
    cells = {x: f"{held[x] / 1e6:.1f}" if x in held else "" for x in columns}
    return {"temporaries, MB": result.name} | cells


def plot(results: Sequence[Result], path: Path) -> None:
    """Times over the limit, a line for each row."""
    drawing, (ax,) = figure(1, width=8, height=1 + 0.33 * len(results))
    lines = np.arange(len(results))[::-1]
    for column, (color, marker) in COLUMNS.items():
        for line, result in zip(lines, results, strict=True):
            if column in result.seconds:
                over = ratio(result.seconds[column], result.least).median
                ax.plot(over, line, marker, color=color, label=column)
    ax.axvline(1, color="#333333", linewidth=0.8, linestyle=":")
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter("{x:g}")
    ax.set_yticks(lines, [result.name.replace("`", "") for result in results])
    ax.set_xlabel("time over that of the limit (log scale)")
    ax.grid(axis="x", color="#dddddd", linewidth=0.6)
    handles = dict(zip(*ax.get_legend_handles_labels()[::-1], strict=True))
    ax.legend(handles.values(), handles, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    save(drawing, path)


def where() -> dict[str, Any]:
    """The machine, and the versions of the peers too."""
    names = ("torch", "triton", "liger-kernel")
    there = [name for name in names if find_spec(name.replace("-", "_"))]
    return machine() | {name: version(name) for name in there}


def run(out: Path) -> str:
    """Measures all rows; writes gpu.json, gpu.md and gpu.png; returns the tables."""
    begin, results, text = time.monotonic(), [], ""
    absent = torch_peers.missing() if torch_peers else {"PyTorch": "it is not installed"}
    for name, case in (progress := tqdm(cases().items(), unit="program")):
        progress.set_postfix_str(name)
        row, peers = ROWS[name], time.monotonic() - begin < PEERS_UNTIL
        result = attempt(partial(measure_row, name, row, case, peers=peers))
        if isinstance(result, str):
            result = Result(name, _limit(row), np.array([]), {}, {}, {OURS: result})
        results.append(result)
        if not peers:
            absent |= {f"peers of {name}": f"{PEERS_UNTIL} seconds had gone"}
        if torch_peers:
            torch_peers.clear()
        # After each row: it is kept whatever happens to the machine.
        text = report(results, absent)
        (out / "gpu.md").write_text(f"{text}\n")
        record = {"results": [result._asdict() for result in results], "absent": absent}
        write_json(out / "gpu.json", {"versions": where()} | record)
    plot(results, out / "gpu.png")
    return text


def main() -> None:
    """Measures everything, and prints the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "gpu")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    # PyTorch needs memory too.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    print(run(out))
    print(f"\nTables, JSON and a plot: {out}")


if __name__ == "__main__":
    main()
