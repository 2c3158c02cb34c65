"""Flax linen modules: objectives that count their steps, penalties on activations, learned gates.

Numbers of configs are Python numbers here: a linen module is static, and compared by value.
"""

from penalties_jax.linen.gates import SparsityGate
from penalties_jax.linen.losses import (
    ActivityPenalty,
    Loss,
    advance,
    collect_penalties,
    param_penalty,
    set_step,
)

__all__ = [
    "ActivityPenalty",
    "Loss",
    "SparsityGate",
    "advance",
    "collect_penalties",
    "param_penalty",
    "set_step",
]
