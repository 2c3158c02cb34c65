"""Divergences from log-probabilities, from logits, and from hidden states; transport."""

from penalties_jax.functional.divergences import hidden, logits, logprobs, top_k, transport
from penalties_jax.functional.divergences.hidden import *
from penalties_jax.functional.divergences.logits import *
from penalties_jax.functional.divergences.logprobs import *
from penalties_jax.functional.divergences.top_k import *
from penalties_jax.functional.divergences.transport import *

__all__ = []
__all__ += hidden.__all__
__all__ += logits.__all__
__all__ += logprobs.__all__
__all__ += top_k.__all__
__all__ += transport.__all__
