"""Penalties for trainers of others: batches of records, the Tinker SDK, and Keras."""

import importlib
from typing import TYPE_CHECKING

from penalties_jax.adapters import datum, tinker

if TYPE_CHECKING:
    from penalties_jax.adapters import keras as keras

__all__ = ["datum", "tinker"]

# What imports a package of an extra: loaded on first use.
_LAZY = ("keras",)


def __getattr__(name: str):
    if name in _LAZY:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *_LAZY})
