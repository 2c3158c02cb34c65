"""What a model's files hold, whatever their format is, and how they become a model."""

import contextlib
import importlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from penalties_jax.recipes.llama.model import Llama, LlamaConfig
from penalties_jax.recipes.options import UsageError

# Where a parameter is in the model, up to the kernel, embedding or scale.
Place = tuple[Any, ...]


class Checkpoint(NamedTuple):
    """A model's files, opened.

    Attributes:
        path: What errors name.
        config: The sizes.
        names: How the files call each parameter, with {} for the number of its layer.
        shapes: Of each array, by its name in the files: of matrices [outputs, inputs].
        read: Returns the array of a name.
        tokenizer: A `tokenizers.Tokenizer`.
    """

    path: Path
    config: LlamaConfig
    names: Mapping[Place, str]
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], np.ndarray]
    tokenizer: Any


def build(checkpoint: Checkpoint) -> Llama:
    """Return the model with the parameters that are in the files, in float32.

    Raises:
        UsageError: If there are parameters too few or too many, or of other shapes; if there are
            tokens beyond the embedding.
    """
    config, path = checkpoint.config, checkpoint.path
    largest = max(checkpoint.tokenizer.get_vocab(with_added_tokens=True).values(), default=0)
    if largest >= config.vocabulary:
        raise UsageError(
            f"the tokenizer of {path} doesn't match the model: it has a token {largest}, and the "
            f"model has {config.vocabulary}"
        )
    graph, abstract = nnx.split(nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0))))
    parameters = dict(nnx.to_flat_state(abstract))
    names = {place: _names(checkpoint, place) for place in parameters}
    if unknown := checkpoint.shapes.keys() - {name for each in names.values() for name in each}:
        raise UsageError(f"{path} has {min(unknown)!r}, which is not supported")
    for place, variable in parameters.items():
        variable.set_value(jnp.asarray(_stacked(checkpoint, names[place], place, variable.shape)))
    return nnx.merge(graph, abstract)


def _names(checkpoint: Checkpoint, place: Place) -> list[str]:
    name = checkpoint.names[place[:-1]]
    layers = checkpoint.config.layers if place[0] == "blocks" else 1
    return [name.format(layer) for layer in range(layers)]


def _stacked(
    checkpoint: Checkpoint, names: list[str], place: Place, shape: tuple[int, ...]
) -> np.ndarray:
    """Return a parameter, filled layer by layer, so that one layer is there twice and no more."""
    array = np.empty(shape, np.float32)
    rows = array if place[0] == "blocks" else array[None]
    for row, name in zip(rows, names, strict=True):
        into = row.T if place[-1] == "kernel" else row
        found = checkpoint.shapes.get(name)
        if found is None:
            raise UsageError(f"{checkpoint.path} has no {name!r}")
        if found != into.shape:
            raise UsageError(
                f"{name!r} in {checkpoint.path} has the shape {list(found)}, not {list(into.shape)}"
            )
        into[:] = checkpoint.read(name)
    return array


def need(package: str) -> Any:
    """Return a package of the extra `llm`.

    Raises:
        UsageError: If it is not installed.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise UsageError(
            f"pretrained models need {error.name}: pip install 'penalties-jax[llm]'"
        ) from error


@contextlib.contextmanager
def reading(path: Path, *errors: type[Exception]) -> Iterator[None]:
    """Have what can't be read be a UsageError that names the file.

    Args:
        path: The file.
        errors: What its reader raises for damaged files, beside ValueError.
    """
    try:
        yield
    except OSError as error:
        raise UsageError(f"can't read {path}: {error.strerror or error}") from error
    except (ValueError, *errors) as error:
        raise UsageError(f"can't read {path}, which seems damaged: {error}") from error
