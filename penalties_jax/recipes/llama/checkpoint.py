"""What a model's files hold, whatever their format is, and how they become a model."""

import contextlib
import dataclasses
import importlib
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax.numpy as jnp
import numpy as np
from flax import nnx

from penalties_jax.recipes.llama.memory import parameters
from penalties_jax.recipes.llama.model import Llama, LlamaConfig
from penalties_jax.recipes.memory import beyond_memory
from penalties_jax.recipes.options import INT32, MOST, UsageError

Value = TypeVar("Value")
# Where a parameter is in the model: the names of attributes.
Place = tuple[Any, ...]


class Checkpoint(NamedTuple):
    """A model's files, opened: what is in them, but for the numbers.

    Attributes:
        path: What errors name.
        config: The sizes.
        names: How the files call each parameter, with {} for the number of its layer, by its place
            without the last attribute.
        shapes: Of each array, by its name in the files; of matrices (outputs, inputs).
        read: Returns the array of a name.
        tokenizer: A `tokenizers.Tokenizer`.
    """

    path: Path
    config: LlamaConfig
    names: Mapping[Place, str]
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], np.ndarray]
    tokenizer: Any

    def check(self) -> None:
        """Refuse what is no model: before anything large is read.

        Raises:
            UsageError: If a size is none that a model can have; if the tokenizer has tokens beyond
                the embedding.
        """
        for field in dataclasses.fields(self.config):
            value = getattr(self.config, field.name)
            most = MOST.get(field.name, INT32) if field.type is int else math.inf
            # A float may be NaN, or infinite.
            if field.type is not bool and not (0 < value <= most and value < math.inf):
                raise UsageError(f"{self.path} gives the model the {field.name} {value!r}")
        if self.config.heads % self.config.key_heads or self.config.head_width % 2:
            raise UsageError(
                f"{self.path} has {self.config.heads} heads of {self.config.head_width} numbers "
                f"for {self.config.key_heads} of keys: these must divide them, and be of even size"
            )
        largest = max(self.tokenizer.get_vocab(with_added_tokens=True).values(), default=0)
        if largest >= self.config.vocabulary:
            raise UsageError(
                f"the tokenizer of {self.path} doesn't match the model, which has "
                f"{self.config.vocabulary} tokens: it has a token {largest}"
            )


def build(checkpoint: Checkpoint) -> Llama:
    """Return the model with the parameters that are in the files, in float32.

    Raises:
        UsageError: If there are parameters too few or too many, of other shapes, or not finite; if
            there is too little memory.
    """
    path, config = checkpoint.path, checkpoint.config
    graph, abstract = nnx.split(nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0))))
    wanted = {place: _names(checkpoint, place) for place, _ in nnx.to_flat_state(abstract)}
    if unknown := checkpoint.shapes.keys() - {name for names in wanted.values() for name in names}:
        raise UsageError(f"{path} has {min(unknown)!r}, which is not supported")
    for place, variable in nnx.to_flat_state(abstract):
        shape = variable.shape[1:] if _is_stacked(place) else variable.shape
        _check_shapes(checkpoint, wanted[place], shape[::-1] if _is_kernel(place) else shape)
    if sizes := beyond_memory(parameters(config)):
        raise UsageError(f"the model {path} needs {sizes}")
    for place, variable in nnx.to_flat_state(abstract):
        # Filled layer by layer: of no more than one there is a copy.
        array = np.empty(variable.shape, np.float32)
        layers = array if _is_stacked(place) else array[None]
        for layer, name in enumerate(wanted[place]):
            read = checkpoint.read(name)
            if not np.isfinite(read).all():
                raise UsageError(f"{name!r} in {path} has numbers that are not finite")
            layers[layer] = read.T if _is_kernel(place) else read
        variable.set_value(jnp.asarray(array))
    return nnx.merge(graph, abstract)


def _names(checkpoint: Checkpoint, place: Place) -> list[str]:
    name = checkpoint.names[place[:-1]]
    layers = checkpoint.config.layers if _is_stacked(place) else 1
    return [name.format(layer) for layer in range(layers)]


def _is_stacked(place: Place) -> bool:
    return place[0] == "blocks"


def _is_kernel(place: Place) -> bool:
    return place[-1] == "kernel"


def _check_shapes(checkpoint: Checkpoint, names: list[str], shape: tuple[int, ...]) -> None:
    for name in names:
        found = checkpoint.shapes.get(name)
        if found is None:
            raise UsageError(f"{checkpoint.path} has no {name!r}")
        if found != shape:
            raise UsageError(
                f"{name!r} in {checkpoint.path} has the shape {list(found)}, not {list(shape)}"
            )


class Fields:
    """What a file says, of the types that it should be."""

    def __init__(self, path: Path, fields: Mapping[str, Any]):
        self.path = path
        self.fields = fields

    def get(self, name: str, kind: type[Value], otherwise: Value | None = None) -> Value:
        """Return a field, or what stands for one that isn't there; of whole numbers floats.

        Raises:
            UsageError: If it is not there, and nothing stands for it, or is of another type.
        """
        value: Any = self.fields.get(name, otherwise)
        if kind is float and type(value) is int:
            with reading(self.path, OverflowError):
                value = float(value)
        if type(value) is not kind:
            raise UsageError(f"{self.path} has no {name!r} of the type {kind.__name__}")
        return value

    def several(self, name: str, kind: type[Value]) -> list[Value]:
        """Return a field of several values."""
        values = self.get(name, list)
        if wrong := {type(value).__name__ for value in values} - {kind.__name__}:
            raise UsageError(f"{self.path} has a {min(wrong)} in {name!r}")
        return values


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
        raise UsageError(f"can't read {path}, it seems damaged: {error}") from error
