"""The penalties as configs: what a penalty is, apart from what it is applied to."""

from penalties_jax.terms import (
    averages,
    base,
    constraints,
    divergences,
    gates,
    halting,
    importance,
    own,
    penalties,
    reduced,
    routing,
    samples,
    sparsity,
)
from penalties_jax.terms.averages import *
from penalties_jax.terms.base import *
from penalties_jax.terms.constraints import *
from penalties_jax.terms.divergences import *
from penalties_jax.terms.gates import *
from penalties_jax.terms.halting import *
from penalties_jax.terms.importance import *
from penalties_jax.terms.own import *
from penalties_jax.terms.penalties import *
from penalties_jax.terms.reduced import *
from penalties_jax.terms.routing import *
from penalties_jax.terms.samples import *
from penalties_jax.terms.sparsity import *

__all__ = []
__all__ += averages.__all__
__all__ += base.__all__
__all__ += constraints.__all__
__all__ += divergences.__all__
__all__ += gates.__all__
__all__ += halting.__all__
__all__ += importance.__all__
__all__ += own.__all__
__all__ += penalties.__all__
__all__ += reduced.__all__
__all__ += routing.__all__
__all__ += samples.__all__
__all__ += sparsity.__all__
