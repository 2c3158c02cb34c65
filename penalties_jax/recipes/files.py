"""Files that are whole or not there, and lines for whoever watches a run."""

import os
import sys
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from penalties_jax.recipes.devices import is_main

PROGRAM = "penalties-jax"
# Of what is told; a path may be longer.
LONGEST_LINE = 600


def write_file(path: Path, content: str | bytes) -> None:
    """Write a whole file or nothing: readers see the old content or the new, never a part."""
    data = content.encode("utf-8") if isinstance(content, str) else content
    # One name in a folder, so that what a kill leaves goes, and never piles up.
    new = path.with_name(f".{PROGRAM}.new")
    new.unlink(missing_ok=True)
    try:
        with open(new, "xb") as file:
            file.write(data)
            sync(file)
        new.replace(path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise


def sync(file: IO[Any]) -> None:
    """Have what was written to a file be on the disk."""
    file.flush()
    os.fsync(file.fileno())


def tell(message: str) -> None:
    """Print one line on standard error: escaped, cut in the middle, and by the main process."""
    words = " ".join(message.split())
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in words)
    if len(line) > LONGEST_LINE:
        line = f"{line[: LONGEST_LINE // 2]} ... {line[-LONGEST_LINE // 2 :]}"
    if is_main():
        # Beside a progress bar, if there is one.
        tqdm.write(f"{PROGRAM}: {line}", file=sys.stderr)
