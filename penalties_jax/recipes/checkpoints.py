"""Checkpoints: a file of arrays each, named by its step and a checksum of all that it is."""

import hashlib
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

from penalties_jax.recipes.devices import is_main
from penalties_jax.recipes.files import tell, write_file
from penalties_jax.recipes.options import UsageError

Tree = TypeVar("Tree")

NAME = re.compile(r"(\d{1,18})-([0-9a-f]{16})\.npz")


class Checkpoints:
    """The checkpoints of a training in a folder: the two latest are kept.

    A file that doesn't have the checksum in its name is damaged, or of another step or training,
    and never used; what else is in the folder is left alone.
    """

    def __init__(self, folder: Path, training: str):
        self.folder = folder
        self.training = training

    def save(self, step: int, tree: Any, log: bytes = b"") -> None:
        """Save arrays and a log as what there is after `step`: whole, or not at all."""
        if not is_main():
            return
        leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]
        buffer = io.BytesIO()
        np.savez(buffer, *leaves, log=np.frombuffer(log, np.uint8))
        data = buffer.getvalue()
        path = self.folder / f"{step}-{self._checksum(step, data)}.npz"
        self.folder.mkdir(exist_ok=True)
        write_file(path, data)
        earlier = [other for at, _, other in self._files() if at < step]
        for _, _, other in self._files():
            if other not in (path, *earlier[:1]):
                other.unlink()

    def latest(self, like: Tree) -> tuple[int, Tree, bytes]:
        """Return the step, the pytree and the log of the latest that is whole.

        Damaged ones are named on the way. Without any it is step 0, `like` itself, and no log.

        Raises:
            UsageError: If it holds other arrays than `like`.
        """
        leaves, structure = jax.tree.flatten(like)
        for step, checksum, path in self._files():
            data = path.read_bytes()
            if self._checksum(step, data) != checksum:
                tell(f"{path} is damaged, and not used")
                continue
            with np.load(io.BytesIO(data), allow_pickle=False) as saved:
                arrays = [saved[f"arr_{i}"] for i in range(len(saved) - 1)]
                log = saved["log"].tobytes()
            if [_layout(array) for array in arrays] != [_layout(leaf) for leaf in leaves]:
                raise UsageError(f"{path} is of another version of this job: use --overwrite")
            # Of a dtype that NumPy doesn't know, such as bfloat16, it keeps the bytes.
            views = [a.view(leaf.dtype) for a, leaf in zip(arrays, leaves, strict=True)]
            return step, structure.unflatten(views), log
        return 0, like, b""

    def _files(self) -> list[tuple[int, str, Path]]:
        """Return step, checksum and path of each, the latest first."""

        def found() -> Iterator[tuple[int, str, Path]]:
            for path in self.folder.iterdir() if self.folder.is_dir() else ():
                if (match := NAME.fullmatch(path.name)) and path.is_file():
                    yield int(match[1]), match[2], path

        return sorted(found(), reverse=True)

    def _checksum(self, step: int, data: bytes) -> str:
        digest = hashlib.sha256(f"{self.training} {step}\n".encode())
        digest.update(data)
        return digest.hexdigest()[:16]


def _layout(array: Any) -> tuple[tuple[int, ...], int]:
    return array.shape, array.dtype.itemsize
