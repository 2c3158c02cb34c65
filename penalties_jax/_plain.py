"""Plain data, as it comes from files: how much of it there may be, its numbers and its keys."""

import math
from collections.abc import Callable, Iterable
from typing import Any

# A level is up to five calls in each other, of a thousand that Python allows.
MAX_DEPTH = 64
# Keys and values, each as often as it is referred to: about half a second. Arrays of more numbers
# belong in a checkpoint.
MAX_NODES = 300_000
# In JSON an empty dict is 24 bytes of memory for each of its characters: 100 MB.
MAX_CHARACTERS = 4_000_000


def check_bounds(data: Any, most: int = MAX_NODES) -> None:
    """Raises ValueError for lists and dicts that are nested too deep, or hold too much."""
    nodes, containers = 0, [data]
    # Level by level: what holds itself has no last one.
    for _ in range(MAX_DEPTH + 1):
        containers = [node for node in containers if isinstance(node, dict | list | tuple)]
        if not containers:
            return
        nodes += sum(len(node) * (1 + isinstance(node, dict)) for node in containers)
        if nodes > most:
            raise ValueError(f"the config {too_many(most)}")
        containers = [
            item
            for node in containers
            for item in (node.values() if isinstance(node, dict) else node)
        ]
    raise ValueError(f"the config {TOO_DEEP}")


TOO_DEEP = f"is nested more than {MAX_DEPTH} levels deep"


def too_many(most: int) -> str:
    """What an error says of more keys and values than there may be."""
    return f"has more than {most:,} keys and values; large arrays belong in a checkpoint"


def check_length(text: Any, most: int = MAX_CHARACTERS) -> None:
    """Raises TypeError for what is no text, ValueError for one that is too long."""
    if not isinstance(text, str | bytes):
        raise TypeError(f"the text must be a string, got {text!r}")
    if len(text) > most:
        raise ValueError(
            f"the text has {len(text):,} characters, more than {most:,}; large arrays belong in a "
            "checkpoint"
        )


def number(kind: Callable[[str], Any], digits: str) -> Any:
    """The number that digits are; if it is beyond floats, what no field takes."""
    return kind(digits) if math.isfinite(float(digits)) else BeyondFloats(digits)


class BeyondFloats:
    """A number that floats don't reach, for the error of the field that it is in."""

    def __init__(self, digits: str):
        self.digits = digits

    def __repr__(self):
        return f"{self.digits:.40}"


def repeated(keys: Iterable[str]) -> list[str]:
    """The keys that come again."""
    seen: set[str] = set()
    return [key for key in keys if key in seen or seen.add(key)]
