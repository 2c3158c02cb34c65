"""Pure functions: arrays in, arrays out."""

from penalties_jax.functional.constraints import (
    consistency,
    gradient_penalty,
    interpolated_gradient_penalty,
    orthogonality,
    output_magnitude,
)
from penalties_jax.functional.divergences import entropy, js_divergence, kl_divergence
from penalties_jax.functional.estimators import kl_estimate
from penalties_jax.functional.gates import (
    hard_concrete_gate,
    hard_concrete_l0,
    jump_relu,
    logistic_gate,
    step_gate,
    straight_through,
    top_k_gate,
)
from penalties_jax.functional.importance import (
    ImportanceLoss,
    ImportanceStats,
    importance_metrics,
    importance_minimality,
)
from penalties_jax.functional.linear import (
    DistillationLoss,
    linear_cross_entropy,
    linear_distillation,
    linear_js,
    linear_kl,
)
from penalties_jax.functional.penalties import (
    elastic_net,
    group_lasso,
    huber,
    l1,
    l2,
    log_sum,
    lp,
    smooth_l0,
)
from penalties_jax.functional.proximal import (
    prox_elastic_net,
    prox_group_lasso,
    prox_huber,
    prox_l1,
    prox_l2,
)
from penalties_jax.functional.sparsity import (
    balanced_loss,
    sparsity_rate,
    sparsity_target_loss,
)
from penalties_jax.functional.streaming import (
    entropy_from_logits,
    js_from_logits,
    kl_from_logits,
)
from penalties_jax.functional.tridiagonal import resolvent_diagonal

__all__ = [
    "DistillationLoss",
    "ImportanceLoss",
    "ImportanceStats",
    "balanced_loss",
    "consistency",
    "elastic_net",
    "entropy",
    "entropy_from_logits",
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
    "prox_elastic_net",
    "prox_group_lasso",
    "prox_huber",
    "prox_l1",
    "prox_l2",
    "resolvent_diagonal",
    "smooth_l0",
    "sparsity_rate",
    "sparsity_target_loss",
    "step_gate",
    "straight_through",
    "top_k_gate",
]
