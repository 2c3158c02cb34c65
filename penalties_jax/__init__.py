"""Penalties and divergences for JAX and Flax, exact at the edges and on any number of devices.

Pure functions (`pj.l1`, `pj.kl_divergence`, ...), the same as configs that are pytrees (`pj.L1()`,
`pj.KLDivergence()`, ...), schedules for their hyperparameters (`pj.anneal`), objectives made of
them (`pj.Objective`), and optax transformations (`pj.add_penalty`, `pj.proximal`).
"""

import importlib
from typing import TYPE_CHECKING

from penalties_jax import functional
from penalties_jax.functional import (
    DistillationLoss,
    ImportanceLoss,
    ImportanceStats,
    balanced_loss,
    consistency,
    elastic_net,
    entropy,
    entropy_from_logits,
    gradient_penalty,
    group_lasso,
    hard_concrete_gate,
    hard_concrete_l0,
    huber,
    importance_metrics,
    importance_minimality,
    interpolated_gradient_penalty,
    js_divergence,
    js_from_logits,
    jump_relu,
    kl_divergence,
    kl_estimate,
    kl_from_logits,
    l1,
    l2,
    linear_cross_entropy,
    linear_distillation,
    linear_js,
    linear_kl,
    log_sum,
    logistic_gate,
    lp,
    orthogonality,
    output_magnitude,
    resolvent_diagonal,
    smooth_l0,
    sparsity_rate,
    sparsity_target_loss,
    step_gate,
    straight_through,
    top_k_gate,
)
from penalties_jax.objective import Objective, Term
from penalties_jax.pytree import stack
from penalties_jax.schedules import (
    AdaptiveSparsityScheduler,
    DualAscent,
    SparsityControl,
    anneal,
    anneal_fraction,
)
from penalties_jax.serialization import (
    from_dict,
    from_json,
    from_yaml,
    to_dict,
    to_json,
    to_yaml,
)
from penalties_jax.terms import (
    L1,
    L2,
    Consistency,
    ElasticNet,
    Entropy,
    GroupLasso,
    Huber,
    ImportanceMinimality,
    JSDivergence,
    KLDivergence,
    KLEstimate,
    LogSum,
    Lp,
    Orthogonality,
    SmoothL0,
    SparsityTarget,
)
from penalties_jax.transforms import add_penalty, proximal

if TYPE_CHECKING:
    from penalties_jax import adapters as adapters
    from penalties_jax import linen as linen
    from penalties_jax import nnx as nnx
    from penalties_jax import recipes as recipes

__version__ = "0.1.0"

__all__ = [
    "L1",
    "L2",
    "AdaptiveSparsityScheduler",
    "Consistency",
    "DistillationLoss",
    "DualAscent",
    "ElasticNet",
    "Entropy",
    "GroupLasso",
    "Huber",
    "ImportanceLoss",
    "ImportanceMinimality",
    "ImportanceStats",
    "JSDivergence",
    "KLDivergence",
    "KLEstimate",
    "LogSum",
    "Lp",
    "Objective",
    "Orthogonality",
    "SmoothL0",
    "SparsityControl",
    "SparsityTarget",
    "Term",
    "add_penalty",
    "anneal",
    "anneal_fraction",
    "balanced_loss",
    "consistency",
    "elastic_net",
    "entropy",
    "entropy_from_logits",
    "from_dict",
    "from_json",
    "from_yaml",
    "functional",
    "gradient_penalty",
    "group_lasso",
    "hard_concrete_gate",
    "hard_concrete_l0",
    "huber",
    "importance_metrics",
    "importance_minimality",
    "interpolated_gradient_penalty",
    "js_divergence",
    "js_from_logits",
    "jump_relu",
    "kl_divergence",
    "kl_estimate",
    "kl_from_logits",
    "l1",
    "l2",
    "linear_cross_entropy",
    "linear_distillation",
    "linear_js",
    "linear_kl",
    "log_sum",
    "logistic_gate",
    "lp",
    "orthogonality",
    "output_magnitude",
    "proximal",
    "resolvent_diagonal",
    "smooth_l0",
    "sparsity_rate",
    "sparsity_target_loss",
    "stack",
    "step_gate",
    "straight_through",
    "to_dict",
    "to_json",
    "to_yaml",
    "top_k_gate",
]

# Rooms that need an extra, or take long to import: loaded on first use.
_LAZY = ("adapters", "linen", "nnx", "recipes")


def __getattr__(name: str):
    if name in _LAZY:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *_LAZY})
