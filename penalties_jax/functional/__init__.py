"""Pure functions: arrays in, arrays out."""

from penalties_jax.functional import (
    averages,
    constraints,
    divergences,
    estimators,
    gates,
    halting,
    importance,
    penalties,
    routing,
    samples,
    sparsity,
    tridiagonal,
)
from penalties_jax.functional.averages import *
from penalties_jax.functional.constraints import *
from penalties_jax.functional.divergences import *
from penalties_jax.functional.estimators import *
from penalties_jax.functional.gates import *
from penalties_jax.functional.halting import *
from penalties_jax.functional.importance import *
from penalties_jax.functional.penalties import *
from penalties_jax.functional.routing import *
from penalties_jax.functional.samples import *
from penalties_jax.functional.sparsity import *
from penalties_jax.functional.tridiagonal import *

__all__ = []
__all__ += averages.__all__
__all__ += constraints.__all__
__all__ += divergences.__all__
__all__ += estimators.__all__
__all__ += gates.__all__
__all__ += halting.__all__
__all__ += importance.__all__
__all__ += penalties.__all__
__all__ += routing.__all__
__all__ += samples.__all__
__all__ += sparsity.__all__
__all__ += tridiagonal.__all__
