"""KL from logits and from hidden states, beside the forms in common use.

Value and gradient for the first argument, in one program. From logits the yardstick is the time to
move five arrays: to read two, then to read two and write one.
"""

import importlib
from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

import penalties_jax as pj
from benchmarks.harness import (
    BAR,
    OURS,
    PEER,
    Program,
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

LOGITS, QUICK_LOGITS = ((2048, 32768), (512, 131072)), ((256, 8192),)
HIDDEN, QUICK_HIDDEN = ((2048, 512, 32768), (1024, 512, 131072)), ((256, 64, 8192),)
ROUNDS, HIDDEN_ROUNDS, QUICK_ROUNDS = 9, 3, 3
FIVE_ARRAYS_BAR, TEXTBOOK_BAR, TORCH_BAR, TEMPORARIES_BAR = 1.4, 2.0, 4.0, 0.01
NAIVE_BAR, CHECKPOINTED_BAR = 1.0, 1.5
CLASSES, QUICK_CLASSES = tuple(2**k for k in range(10, 19)), (1024, 4096)
VALUES, QUICK_VALUES = 2**25, 2**20
BLOCKS, QUICK_BLOCKS = (1, 2, 4, 8, 16, 32, 64, 128), (1, 8)


def textbook(logits_p: Array, logits_q: Array) -> Array:
    """Sum of p (log p - log q), by `jax.nn.log_softmax`."""
    log_p, log_q = jax.nn.log_softmax(logits_p), jax.nn.log_softmax(logits_q)
    return jnp.mean(jnp.sum(jnp.exp(log_p) * (log_p - log_q), -1))


def optax_kl(logits_p: Array, logits_q: Array) -> Array:
    """The same by optax, whose second argument is what the expectation is over."""
    log_q = jax.nn.log_softmax(logits_q)
    return jnp.mean(optax.losses.kl_divergence(log_q, jax.nn.softmax(logits_p)))


def checkpointed(hidden_p: Array, kernel_p: Array, hidden_q: Array, kernel_q: Array) -> Array:
    """Textbook blocks of 128 rows, recomputed in the backward pass."""

    @jax.checkpoint
    def block(rows: tuple[Array, Array]) -> Array:
        return textbook(rows[0] @ kernel_p, rows[1] @ kernel_q)

    blocks = tuple(x.reshape(-1, min(128, len(x)), x.shape[1]) for x in (hidden_p, hidden_q))
    return jnp.mean(jax.lax.map(block, blocks))


def naive(hidden_p: Array, kernel_p: Array, hidden_q: Array, kernel_q: Array) -> Array:
    """Textbook, on all the logits."""
    return textbook(hidden_p @ kernel_p, hidden_q @ kernel_q)


def run(*, quick: bool, out: Path) -> str:
    """Measures both forms; writes streaming.json and streaming.png; returns the tables."""
    texts, record = [], {}
    rounds = QUICK_ROUNDS if quick else ROUNDS
    for shape in QUICK_LOGITS if quick else LOGITS:
        text, record[f"logits {shape}"] = from_logits(shape, rounds)
        texts.append(text)
    rounds = QUICK_ROUNDS if quick else HIDDEN_ROUNDS
    for shape in QUICK_HIDDEN if quick else HIDDEN:
        text, record[f"hidden {shape}"] = from_hidden(shape, rounds)
        texts.append(text)
    record["scaling"] = scaling(quick, out / "streaming.png")
    write_json(out / "streaming.json", record)
    return "\n\n".join(texts)


def logits(shape: tuple[int, int], dtype: Any = jnp.float32) -> tuple[Array, Array]:
    """Nearby logits of a model and of its reference."""
    keys = jax.random.split(jax.random.key(0))
    p = jax.random.normal(keys[0], shape)
    return p.astype(dtype), (p + 0.1 * jax.random.normal(keys[1], shape)).astype(dtype)


def from_logits(shape: tuple[int, int], rounds: int) -> tuple[str, dict[str, Any]]:
    """One shape, beside its peers."""
    p, q = logits(shape)
    functions = {"ours": pj.kl_from_logits, "log_softmax": textbook, "optax": optax_kl}
    programs: dict[str, Program] = {
        name: compiled(jax.value_and_grad(f), p, q) for name, f in functions.items()
    }
    half = logits(shape, jnp.bfloat16)
    programs["ours, bfloat16"] = compiled(jax.value_and_grad(pj.kl_from_logits), *half)
    programs["read two"] = compiled(lambda a, b: jnp.sum(a + b), p, q)
    programs["read two, write one"] = compiled(lambda a, b: a + 1.5 * b, p, q)
    calls: dict[str, Callable[[], Any]] = dict(programs)
    if find_spec("torch"):
        calls["torch, eager"] = torch_kl(np.asarray(p), np.asarray(q))
    times = measure(calls, rounds=rounds, label=f"KL from logits {shape}")
    five = times["read two"] + times["read two, write one"]
    temporaries = programs["log_softmax"].temporaries or 1
    bars = {
        "log_softmax": TEXTBOOK_BAR,
        "optax": TEXTBOOK_BAR,
        "torch, eager": TORCH_BAR,
        "ours, bfloat16": 1.0,
    }
    rows = []
    for name in calls:
        if name.startswith("read"):
            continue
        slower = ratio(times[name], times["ours"])
        over = ratio(times[name], five)
        peer = programs.get(name)
        kept = None if peer is None else peer.temporaries
        word = ""
        if name == "ours":
            word = f"{FIVE_ARRAYS_BAR:g} arrays: {verdict(met=over.median <= FIVE_ARRAYS_BAR)}"
            met = kept is not None and kept <= TEMPORARIES_BAR * temporaries
            word += f"; {TEMPORARIES_BAR:.0%} of temporaries: {verdict(met=met)}"
        elif name == "ours, bfloat16":
            word = f"at most {bars[name]:g}: {verdict(met=slower.median <= bars[name])}"
        elif name in bars:
            word = f"at least {bars[name]:g}: {verdict(met=slower.median >= bars[name])}"
        rows.append(
            {
                f"KL of logits {shape}": name,
                "ms": f"{1e3 * spread(times[name]).median:.0f}",
                "over five arrays": over.text(),
                "times ours": "" if name == "ours" else slower.text(),
                "temporaries, MB": "" if kept is None else f"{kept / 1e6:.1f}",
                "bar": word,
            }
        )
    return table(rows), {"seconds": times}


def torch_kl(p: np.ndarray, q: np.ndarray) -> Callable[[], Any]:
    """PyTorch's KL, eager, with its backward pass."""
    torch = importlib.import_module("torch")
    model = torch.tensor(p, requires_grad=True)
    reference = torch.tensor(q)

    def call() -> Any:
        model.grad = None
        log_p = torch.log_softmax(model, -1)
        log_q = torch.log_softmax(reference, -1)
        value = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
        value.backward()
        return model.grad

    return call


def from_hidden(shape: tuple[int, int, int], rounds: int) -> tuple[str, dict[str, Any]]:
    """One shape, beside the naive form and checkpointed blocks."""
    rows, width, classes = shape
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (rows, width))
    kernel = jax.random.normal(keys[1], (width, classes)) / width**0.5
    reference = hidden + 0.1 * jax.random.normal(keys[2], (rows, width))
    functions: Mapping[str, Callable[..., Array]] = {
        "ours": pj.linear_kl,
        "naive": naive,
        "checkpointed": checkpointed,
    }
    arguments = (hidden, kernel, reference, kernel)
    programs = {
        name: compiled(jax.value_and_grad(f, (0, 1)), *arguments) for name, f in functions.items()
    }
    times = measure(programs, rounds=rounds, label=f"KL from hidden states {shape}", warmup=1)
    bars = {"naive": NAIVE_BAR, "checkpointed": CHECKPOINTED_BAR}
    allowed = kernel.nbytes + 128e6
    lines = []
    for name, program in programs.items():
        slower = ratio(times[name], times["ours"])
        kept = program.temporaries or 0
        word = (
            f"kernel + 128 MB: {verdict(met=kept <= allowed)}"
            if name == "ours"
            else f"at least {bars[name]:g}: {verdict(met=slower.median >= bars[name])}"
        )
        lines.append(
            {
                f"KL of hidden states {shape}": name,
                "s": spread(times[name]).text(),
                "times ours": "" if name == "ours" else slower.text(),
                "temporaries, MB": f"{kept / 1e6:.0f}",
                "bar": word,
            }
        )
    return table(lines), {"seconds": times}


def scaling(quick: bool, path: Path) -> dict[str, Any]:
    """Time and memory against the number of classes, of rows, and the size of a block."""
    values = QUICK_VALUES if quick else VALUES
    rounds = QUICK_ROUNDS
    drawing, axes = figure(3, width=12, height=3.6)
    record: dict[str, Any] = {}
    cases = {
        "classes": [(values // c, c, None) for c in (QUICK_CLASSES if quick else CLASSES)],
        "rows": [(r, values // 1024, None) for r in ((16, 64) if quick else (16, 64, 256, 1024))],
        "rows in a block": [
            (values // 32768 or 1, 32768, b) for b in (QUICK_BLOCKS if quick else BLOCKS)
        ],
    }
    for ax, (name, shapes) in zip(axes, cases.items(), strict=True):
        along, ours, theirs, memory = [], [], [], []
        for rows, classes, block in shapes:
            p, q = logits((rows, classes))
            programs = {
                "ours": compiled(
                    jax.value_and_grad(partial(pj.kl_from_logits, block_size=block)), p, q
                ),
                "log_softmax": compiled(jax.value_and_grad(textbook), p, q),
            }
            times = measure(programs, rounds=rounds, label=f"{name}: {rows} x {classes}")
            along.append({"classes": classes, "rows": rows}.get(name, block))
            ours.append(1e9 * spread(times["ours"]).median / p.size)
            theirs.append(1e9 * spread(times["log_softmax"]).median / p.size)
            memory.append((programs["ours"].temporaries or 0) / p.nbytes)
        ax.plot(along, ours, "o-", color=OURS, label="kl_from_logits")
        ax.plot(along, theirs, "o-", color=PEER, label="log_softmax")
        ax.plot(along, memory, "o--", color=BAR, label="our temporaries, share of the logits")
        ax.set(xlabel=name, xscale="log", ylim=(0, None))
        record[name] = {"along": along, "ours": ours, "log_softmax": theirs, "memory": memory}
    axes[0].set(ylabel="ns for a value and its gradient, each logit")
    axes[0].legend(frameon=False, fontsize=8)
    save(drawing, path)
    return record
