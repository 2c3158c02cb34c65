"""Real text in numbers: two corpora that every Python carries, held-out parts, windows, batches."""

import hashlib
import math
import stat
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Integer

from penalties_jax.recipes.devices import split_over_devices
from penalties_jax.recipes.options import UsageError

HELD_OUT_FRACTION = 0.1
LARGEST_CORPUS = 1_000_000
LARGEST_TEXT = 100_000_000


class Corpus(NamedTuple):
    """A text in numbers, and its name for reports; its last tenth is never trained on.

    The numbers are bytes, or the tokens of a tokenizer, as `unit` says.
    """

    name: str
    train: np.ndarray
    held_out: np.ndarray
    unit: str = "byte"

    def describe(self) -> str:
        """Say in one line what the corpus is, so that two runs can tell if they read the same."""
        digest = hashlib.sha256(self.train.tobytes() + self.held_out.tobytes()).hexdigest()
        total = len(self.train) + len(self.held_out)
        return f"{self.name}, {total} {self.unit}s, sha256 {digest[:16]}"


def help_topics() -> Corpus:
    """Return Python's own help topics (`help("...")`): English prose about the language.

    Raises:
        UsageError: If this Python is installed without them.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise UsageError("this Python has no help topics; give a text with --base-text") from error
    return split("Python's help topics", "\n".join(topics[name] for name in sorted(topics)))


def standard_library() -> Corpus:
    """Return the source of the standard library's top-level modules, by name, up to 1 MB.

    Raises:
        UsageError: If this Python is installed without its source files.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    texts = []
    room = LARGEST_CORPUS
    for path in sorted(folder.glob("*.py")):
        if room <= 0:
            break
        texts.append(path.read_text(encoding="utf-8"))
        room -= len(texts[-1])
    if not texts:
        raise UsageError(f"no Python source in {folder}; give a text with --target-text")
    return split("Python's standard library", "".join(texts)[:LARGEST_CORPUS])


def read_text(path: Path | None, otherwise: Callable[[], Corpus]) -> Corpus:
    """Read the user's own UTF-8 text; without a path, return what `otherwise` does.

    Raises:
        UsageError: If the path is no regular file of at most 100 MB, or can't be read; if the file
            is empty, or isn't UTF-8.
    """
    if path is None:
        return otherwise()
    try:
        # Of devices and pipes nothing is read: they may have no end, or never begin.
        if not stat.S_ISREG(path.stat().st_mode):
            raise UsageError(f"can't read the text file {path}: it is not a regular file")
        with path.open("rb") as file:
            data = file.read(LARGEST_TEXT + 1)
        text = data.decode("utf-8")
    except OSError as error:
        raise UsageError(f"can't read the text file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"the text file {path} is not UTF-8 (byte {error.start})") from error
    except ValueError as error:
        raise UsageError(f"can't read the text file {path}: {error}") from error
    if len(data) > LARGEST_TEXT:
        raise UsageError(f"the text file {path} is larger than {LARGEST_TEXT // 10**6} MB")
    if not text:
        raise UsageError(f"the text file {path} is empty")
    # As it can be written into the run's settings, and read from its report.
    return split(path.name.encode("utf-8", "backslashreplace").decode(), text)


def split(name: str, text: str) -> Corpus:
    """Encode `text` as UTF-8 and hold out its last tenth."""
    return hold_out(name, np.frombuffer(text.encode("utf-8"), np.uint8))


def hold_out(name: str, data: np.ndarray, unit: str = "byte") -> Corpus:
    """Hold out the last tenth of a text."""
    cut = len(data) - math.ceil(len(data) * HELD_OUT_FRACTION)
    return Corpus(name, data[:cut], data[cut:], unit)


def check_length(corpus: Corpus, *, batch_size: int, context: int) -> None:
    """Refuse a corpus without one batch of distinct windows to train on and one to evaluate on.

    A window is `context + 1` units: the inputs, and the same shifted by one.

    Raises:
        UsageError: If a part is too short.
    """
    for part, data, windows in (
        ("training", corpus.train, batch_size),
        ("held-out", corpus.held_out, 1),
    ):
        needed = windows * (context + 1)
        if len(data) < needed:
            raise UsageError(
                f"the text {corpus.name!r} is too short: its {part} part has {len(data)} "
                f"{corpus.unit}s and needs {needed} ({windows} x {context + 1})"
            )


class Batches(NamedTuple):
    """Random windows of a text, the same ones at the same index."""

    text: Integer[Array, " units"]
    key: Array

    def __call__(self, index: Array, size: int, length: int) -> Int[Array, "size length"]:
        """Draw the batch at `index`: `size` windows of `length` units."""
        key = jax.random.fold_in(self.key, index)
        return split_over_devices(sample_windows(self.text, key, batch_size=size, length=length))


def batches(corpus: Corpus, seed: int) -> Batches:
    """Return the batches of a corpus's training part."""
    return Batches(jnp.asarray(corpus.train), jax.random.key(seed))


def sample_windows(
    data: Integer[Array, " units"], key: Array, *, batch_size: int, length: int
) -> Int[Array, "batch length"]:
    """Draw windows of `length` units that start anywhere in `data`, uniformly."""
    starts = jax.random.randint(key, (batch_size,), 0, len(data) - length + 1)
    return data[starts[:, None] + jnp.arange(length)].astype(jnp.int32)


class Rounds(NamedTuple):
    """Windows that are read in turn, over and over."""

    windows: Int[Array, "windows length"]

    def __call__(self, index: Array, size: int) -> Int[Array, "size length"]:
        """Read the `size` windows of the turn at `index`."""
        turn = (index * size + jnp.arange(size)) % len(self.windows)
        return split_over_devices(self.windows[turn])


def spread_windows(data: np.ndarray, *, count: int, length: int) -> Int[Array, "windows length"]:
    """Cut `data` into windows that don't overlap, and keep at most `count`, spread evenly."""
    return _spread(data, count, length)[0]


def windows_between(data: np.ndarray, *, count: int, length: int) -> Int[Array, "windows length"]:
    """Return the windows that `spread_windows` leaves out."""
    return _spread(data, count, length)[1]


def _spread(data: np.ndarray, count: int, length: int) -> tuple[Array, Array]:
    windows = data[: len(data) // length * length].reshape(-1, length)
    chosen = np.linspace(0, len(windows) - 1, min(count, len(windows))).round().astype(int)
    others = np.delete(windows, chosen, axis=0)
    return jnp.asarray(windows[chosen], jnp.int32), jnp.asarray(others, jnp.int32)


def unigram_loss(corpus: Corpus) -> float:
    """Return what frequencies alone score on the held-out part, in nats per byte or token.

    The frequencies are those of the training part, one added to the count of each byte, or of each
    token up to the largest that the text has. A model that has learnt anything from context is
    below this.
    """
    largest = max(255, *(part.max() for part in (corpus.train, corpus.held_out)))
    counts = np.bincount(corpus.train, minlength=largest + 1) + 1
    return float(-np.log(counts / counts.sum())[corpus.held_out].mean())
