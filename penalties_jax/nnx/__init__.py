"""Flax NNX modules: objectives that count their steps, penalties on activations, learned gates."""

from penalties_jax.nnx.base import Number, Step, advance, set_step
from penalties_jax.nnx.gates import SparsityGate
from penalties_jax.nnx.losses import (
    ActivityPenalty,
    Loss,
    PenaltyValue,
    collect_penalties,
    param_penalty,
)
from penalties_jax.nnx.sparse_bk import SparseBKCore, SparseMoEResNetBKLayer

# As it was called before.
Penalty = PenaltyValue

__all__ = [
    "ActivityPenalty",
    "Loss",
    "Number",
    "Penalty",
    "PenaltyValue",
    "SparseBKCore",
    "SparseMoEResNetBKLayer",
    "SparsityGate",
    "Step",
    "advance",
    "collect_penalties",
    "param_penalty",
    "set_step",
]
