"""Flax NNX modules: objectives that count steps, activity penalties, gates, adaptive depth."""

from penalties_jax.nnx.base import Number, Step, advance, set_step
from penalties_jax.nnx.gates import SparsityGate
from penalties_jax.nnx.halting import AdaptiveDepth, EarlyExit, Steps, early_exit
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
    "AdaptiveDepth",
    "EarlyExit",
    "Loss",
    "Number",
    "Penalty",
    "PenaltyValue",
    "SparseBKCore",
    "SparseMoEResNetBKLayer",
    "SparsityGate",
    "Step",
    "Steps",
    "advance",
    "collect_penalties",
    "early_exit",
    "param_penalty",
    "set_step",
]
