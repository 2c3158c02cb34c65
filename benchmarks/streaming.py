"""KL from logits and from hidden states, beside the forms in common use.

Value and gradient for the first argument, in one program. From logits the yardstick is the time to
move five arrays: to read two, then to read two and write one.
"""

import importlib
from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from shutil import which
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

import penalties_jax as pj
from benchmarks.harness import (
    OURS,
    PEER,
    Program,
    bandwidth,
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
OURS_HALF = "ours, bfloat16"
FIVE_ARRAYS_BAR, TEMPORARIES_BAR, BLOCKS_BAR = 1.4, 0.01, 128e6
BARS = {
    "log_softmax": 2.0,
    "optax": 2.0,
    "torch, eager": 4.0,
    "naive": 1.0,
    "checkpointed": 1.5,
}
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
    """Measures both forms; writes streaming.json and two plots; returns the tables."""
    texts, record = [], {}
    rounds = QUICK_ROUNDS if quick else ROUNDS
    for shape in QUICK_LOGITS if quick else LOGITS:
        text, record[f"logits {shape}"] = from_logits(shape, rounds)
        texts.append(text)
    rounds = QUICK_ROUNDS if quick else HIDDEN_ROUNDS
    for shape in QUICK_HIDDEN if quick else HIDDEN:
        text, record[f"hidden {shape}"] = from_hidden(shape, rounds)
        texts.append(text)
    record["scaling"] = scaling(quick, out)
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
    if find_spec("distrax"):
        functions["distrax"] = distrax_kl
    programs: dict[str, Program] = {
        name: compiled(jax.value_and_grad(f), p, q) for name, f in functions.items()
    }
    half = logits(shape, jnp.bfloat16)
    for name, f in {OURS_HALF: pj.kl_from_logits, "log_softmax, bfloat16": textbook}.items():
        programs[name] = compiled(jax.value_and_grad(f), *half)
    moves = {
        "read two": compiled(lambda a, b: jnp.sum(a + b), p, q),
        "read two, write one": compiled(lambda a, b: a + 1.5 * b, p, q),
    }
    calls = {**programs, **moves, **torch_calls(p, q)}
    times = measure(calls, rounds=rounds, label=f"KL from logits {shape}")
    five = times["read two"] + times["read two, write one"]
    textbook_temporaries = programs["log_softmax"].temporaries or 1
    rows = []
    for name in calls:
        if name in moves:
            continue
        slower, over = ratio(times[name], times["ours"]), ratio(times[name], five)
        kept = programs[name].temporaries if name in programs else None
        word = ""
        if name == "ours":
            within = kept is not None and kept <= TEMPORARIES_BAR * textbook_temporaries
            word = (
                f"{FIVE_ARRAYS_BAR:g} x five arrays: {verdict(met=over.median <= FIVE_ARRAYS_BAR)}"
                f"; {TEMPORARIES_BAR:.0%} of temporaries: {verdict(met=within)}"
            )
        elif name == OURS_HALF:
            word = f"at most 1: {verdict(met=slower.median <= 1)}"
        elif name in BARS:
            word = f"at least {BARS[name]:g}: {verdict(met=slower.median >= BARS[name])}"
        rows.append(
            {
                f"KL of logits {shape}": name,
                "ms": f"{1e3 * spread(times[name]).median:.3g}",
                "over five arrays": over.text(),
                "times ours": "" if name == "ours" else slower.text(),
                "temporaries, MB": "" if kept is None else f"{kept / 1e6:.1f}",
                "bar": word,
            }
        )
    speed = bandwidth(times["read two, write one"], 3 * p.nbytes)
    text = (
        f"{table(rows)}\n\nFive arrays: {1e3 * spread(five).median:.3g} ms; {speed.text(1)} GB/s."
    )
    return text, {"seconds": times}


def distrax_kl(logits_p: Array, logits_q: Array) -> Array:
    """By the distributions of distrax."""
    categorical = importlib.import_module("distrax").Categorical
    return jnp.mean(categorical(logits=logits_p).kl_divergence(categorical(logits=logits_q)))


def torch_calls(p: Array, q: Array) -> dict[str, Callable[[], Any]]:
    """PyTorch's KL with its backward pass, eager and compiled, where torch is installed."""
    if not find_spec("torch"):
        return {}
    torch = importlib.import_module("torch")
    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    model = torch.tensor(np.asarray(p), device=device, requires_grad=True)
    reference = torch.tensor(np.asarray(q), device=device)

    def kl(model: Any, reference: Any) -> Any:
        log_p, log_q = torch.log_softmax(model, -1), torch.log_softmax(reference, -1)
        return torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="batchmean")

    def call(function: Callable[..., Any]) -> None:
        model.grad = None
        function(model, reference).backward()
        if device == "cuda":
            torch.cuda.synchronize()

    calls = {"torch, eager": partial(call, kl)}
    if which("g++") or device == "cuda":
        calls["torch.compile"] = partial(call, torch.compile(kl))
    return calls


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
    allowed = kernel.nbytes + BLOCKS_BAR
    lines = []
    for name, program in programs.items():
        slower = ratio(times[name], times["ours"])
        kept = program.temporaries or 0
        word = (
            f"kernel + 128 MB: {verdict(met=kept <= allowed)}"
            if name == "ours"
            else f"at least {BARS[name]:g}: {verdict(met=slower.median >= BARS[name])}"
        )
        lines.append(
            {
                f"KL of hidden states {shape}": name,
                "s": spread(times[name]).text(3),
                "times ours": "" if name == "ours" else slower.text(),
                "temporaries, MB": f"{kept / 1e6:.0f}",
                "bar": word,
            }
        )
    return table(lines), {"seconds": times}


def scaling(quick: bool, out: Path) -> dict[str, Any]:
    """Time and memory against the number of classes, of rows, and the size of a block."""
    values = QUICK_VALUES if quick else VALUES
    rounds = QUICK_ROUNDS
    record: dict[str, Any] = {}
    cases = {
        "classes": [(values // c, c, None) for c in (QUICK_CLASSES if quick else CLASSES)],
        "rows": [(r, values // 1024, None) for r in ((16, 64) if quick else (16, 64, 256, 1024))],
        "rows in a block": [
            (values // 32768, 32768, b) for b in (QUICK_BLOCKS if quick else BLOCKS)
        ],
    }
    for name, shapes in cases.items():
        along = {"classes": 1, "rows": 0, "rows in a block": 2}[name]
        record[name] = {"along": [shape[along] for shape in shapes], "ns": {}, "MB": {}}
        for rows, classes, block in shapes:
            p, q = logits((rows, classes))
            ours = partial(pj.kl_from_logits, block_size=block)
            programs = {
                label: compiled(jax.value_and_grad(f), p, q)
                for label, f in {"kl_from_logits": ours, "log_softmax": textbook}.items()
            }
            times = measure(programs, rounds=rounds, label=f"{name}: {rows} x {classes}")
            for label, program in programs.items():
                time, memory = (record[name][unit].setdefault(label, []) for unit in ("ns", "MB"))
                time.append(1e9 * spread(times[label]).median / p.size)
                memory.append((program.temporaries or 0) / 1e6)
    for unit, title in {
        "ns": "ns for a value and its gradient, each logit",
        "MB": "temporaries, MB",
    }.items():
        drawing, axes = figure(3, width=12, height=3.6)
        for ax, (name, measured) in zip(axes, record.items(), strict=True):
            for (label, curve), color in zip(measured[unit].items(), (OURS, PEER), strict=True):
                ax.plot(measured["along"], curve, "o-", color=color, label=label)
            ax.set(xlabel=name, xscale="log")
            ax.set(**({"ylim": (0, None)} if unit == "ns" else {"yscale": "log"}))
        axes[0].set(ylabel=title)
        axes[0].legend(frameon=False)
        save(drawing, out / f"streaming-{unit}.png")
    return record
