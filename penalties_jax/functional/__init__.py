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
from penalties_jax.functional.penalties import (
    elastic_net,
    group_lasso,
    huber,
    l1,
    l2,
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

__all__ = [
    "consistency",
    "elastic_net",
    "entropy",
    "gradient_penalty",
    "group_lasso",
    "huber",
    "interpolated_gradient_penalty",
    "js_divergence",
    "kl_divergence",
    "kl_estimate",
    "l1",
    "l2",
    "lp",
    "orthogonality",
    "output_magnitude",
    "prox_elastic_net",
    "prox_group_lasso",
    "prox_huber",
    "prox_l1",
    "prox_l2",
    "smooth_l0",
]
