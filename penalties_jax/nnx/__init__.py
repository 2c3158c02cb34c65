"""Flax NNX modules: objectives that count their steps, penalties on activations, learned gates."""

from penalties_jax.nnx.gates import SparsityGate
from penalties_jax.nnx.losses import (
    ActivityPenalty,
    Loss,
    Penalty,
    collect_penalties,
    param_penalty,
)
from penalties_jax.nnx.sparse_bk import SparseBKCore, SparseMoEResNetBKLayer

__all__ = [
    "ActivityPenalty",
    "Loss",
    "Penalty",
    "SparseBKCore",
    "SparseMoEResNetBKLayer",
    "SparsityGate",
    "collect_penalties",
    "param_penalty",
]
