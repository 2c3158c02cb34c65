"""Penalties and divergences for JAX and Flax, exact at the edges and on any number of devices.

Pure functions (`pj.l1`, `pj.kl_divergence`, ...), the same as configs that are pytrees (`pj.L1()`,
`pj.KLDivergence()`, ...), schedules for their hyperparameters (`pj.anneal`), objectives made of
them (`pj.Objective`), and optax transformations (`pj.add_penalty`, `pj.proximal`).

Examples in docstrings begin with `import jax, jax.numpy as jnp` and `import penalties_jax as pj`.
"""

import importlib
from typing import TYPE_CHECKING

from penalties_jax import (
    _pytree,
    controllers,
    functional,
    hypergradients,
    objective,
    schedules,
    serialization,
    terms,
    transforms,
)
from penalties_jax._pytree import *
from penalties_jax.controllers import *
from penalties_jax.functional import *
from penalties_jax.hypergradients import *
from penalties_jax.objective import *
from penalties_jax.schedules import *
from penalties_jax.serialization import *
from penalties_jax.terms import *
from penalties_jax.transforms import *

if TYPE_CHECKING:
    from penalties_jax import adapters as adapters
    from penalties_jax import linen as linen
    from penalties_jax import nnx as nnx
    from penalties_jax import recipes as recipes

__version__ = "0.2.0"

# Each room lists its public names; here they become one face.
__all__ = ["functional"]
__all__ += _pytree.__all__
__all__ += controllers.__all__
__all__ += functional.__all__
__all__ += hypergradients.__all__
__all__ += objective.__all__
__all__ += schedules.__all__
__all__ += serialization.__all__
__all__ += terms.__all__
__all__ += transforms.__all__

# Rooms that need an extra, or take long to import: loaded on first use.
_LAZY = ("adapters", "linen", "nnx", "recipes")


def __getattr__(name: str):
    if name in _LAZY:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *_LAZY})
