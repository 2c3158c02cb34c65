"""How much memory a run takes, about, and whether there is as much: before anything is built.

What is counted are float32 numbers that are held at the same time: those of Adam, of the
activations that a gradient needs, and of the logits. What a compiler saves or wastes is not.
"""

import dataclasses
import math
import os
from collections.abc import Callable
from typing import Any

import jax

from penalties_jax.recipes.options import Options, UsageError, flag

BYTES = 4
# Of what is trained: it and Adam's two moments, before and after a chunk of steps.
COPIES = 6
# Of the logits of a byte: themselves, their softmax, and the gradient.
CLASSES = 3 * 256


def check_memory(options: Options, numbers: Callable[[Any], int]) -> None:
    """Refuse a run that doesn't fit in memory: the device's, or the machine's.

    Args:
        options: What was asked for.
        numbers: How many numbers such options hold at once.

    Raises:
        UsageError: If there is no device, or they don't fit; it names the options that, halved,
            save the most.
    """
    if sizes := beyond_memory(numbers(options)):
        raise UsageError(f"this needs {sizes}: lower {', '.join(_heaviest(options, numbers))}")


def beyond_memory(numbers: int) -> str | None:
    """Say how much memory that many numbers take, and how much there is; nothing if they fit.

    Raises:
        UsageError: If there is no device.
    """
    needed, there = BYTES * numbers, device_memory()
    if needed <= there:
        return None
    return f"about {in_words(needed)} of memory and there are {in_words(there)}"


def _heaviest(options: Options, numbers: Callable[[Any], int]) -> list[str]:
    left = {
        flag(name): numbers(dataclasses.replace(options, **{name: half}))
        for name, value in vars(options).items()
        if (half := _half(value))
    }
    return [name for name, count in left.items() if count <= 1.5 * min(left.values())]


def _half(value: Any) -> Any:
    """Half of a whole number or of several values, and nothing of anything else."""
    if isinstance(value, tuple):
        return value[: len(value) // 2]
    return value // 2 if type(value) is int else None


def device_memory() -> float:
    """Return the bytes of the first device; of one that shares the machine's, all of those.

    Raises:
        UsageError: If jax finds no device.
    """
    try:
        device = jax.local_devices()[0]
    except RuntimeError as error:
        raise UsageError(f"jax finds no device: {error}") from error
    return (device.memory_stats() or {}).get("bytes_limit", host_memory())


def host_memory() -> float:
    """Return the bytes of this machine's memory; infinity where the system doesn't tell."""
    # There is none on Windows.
    if not hasattr(os, "sysconf"):
        return math.inf
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def in_words(size: float) -> str:
    """Return a number of bytes as people say it: 3.2 TB."""
    unit, *larger = "bytes", "kB", "MB", "GB", "TB", "PB", "EB"
    while size >= 999.5 and larger:
        size, unit = size / 1000, larger.pop(0)
    return f"{size:.3g} {unit}"


def transformer(options: Options, *, block: int) -> int:
    """Return the parameters of a byte-level transformer whose blocks have `block` of them."""
    embeddings = (256 + options.context) * options.width
    return embeddings + options.layers * block + 257 * options.width


def activations(options: Options, *, batch_size: int, block: int) -> int:
    """Return the numbers that a gradient keeps of one batch through a transformer.

    Args:
        options: The sizes.
        batch_size: The number of sequences.
        block: How many are kept of one position in one block, beside its scores of the others.
    """
    scores = 2 * options.heads * options.context
    return batch_size * options.context * (options.layers * (block + scores) + CLASSES)
