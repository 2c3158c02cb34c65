"""One config of every kind, with the function that it stands for and inputs that it takes."""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import numpy as np

import penalties_jax as pj
from tests.oracles import lattice


def jit_once(function):
    """Jits a function so that a second trace of it raises AssertionError."""
    chex.clear_trace_counter()
    return jax.jit(chex.assert_max_traces(function, n=1))


class Example(NamedTuple):
    """A config class, its settings, and the function that takes the same settings."""

    make: Callable[..., Any]
    function: Callable[..., Any]
    settings: dict[str, Any]
    inputs: int = 1

    @property
    def config(self):
        return self.make(**self.settings)

    @property
    def separable(self):
        return self.make in SEPARABLE

    @property
    def reduced(self):
        return self.make is not pj.Orthogonality

    def data(self, seed=0, shape=(4, 3)):
        """Inputs of this config: log-probabilities where it takes them."""
        arrays = [lattice(seed + i, *shape).astype(np.float32) for i in range(self.inputs)]
        divergences = (pj.KLDivergence, pj.JSDivergence, pj.Entropy)
        if self.make in divergences and self.settings.get("inputs") != "logits":
            return tuple(np.asarray(jax.nn.log_softmax(x)) for x in arrays)
        return tuple(arrays)


def kl_of_logits(*logits, inputs, **options):
    """The function that stands for a config whose inputs are logits."""
    assert inputs == "logits"
    return pj.kl_from_logits(*logits, **options)


SEPARABLE = (pj.L1, pj.L2, pj.ElasticNet, pj.Lp, pj.LogSum, pj.SmoothL0, pj.Huber)

EXAMPLES = {
    "l1": Example(pj.L1, pj.l1, {"weights": 0.5}),
    "l2": Example(pj.L2, pj.l2, {"center": 0.25, "clip": 1.0, "weights": 2.0}),
    "l2 about the mean": Example(pj.L2, pj.l2, {"center": "mean"}),
    "elastic net": Example(pj.ElasticNet, pj.elastic_net, {"l1_ratio": 0.3}),
    "lp": Example(pj.Lp, pj.lp, {"p": 0.5, "eps": 1e-3}),
    "log sum": Example(pj.LogSum, pj.log_sum, {"eps": 0.5, "weights": 2.0}),
    "smooth l0": Example(pj.SmoothL0, pj.smooth_l0, {"gamma": 0.5, "weights": 3.0}),
    "smooth l0, normalised": Example(
        pj.SmoothL0, pj.smooth_l0, {"gamma": 0.5, "normalize_at_one": True}
    ),
    "huber": Example(pj.Huber, pj.huber, {"delta": 0.75}),
    "group lasso": Example(pj.GroupLasso, pj.group_lasso, {"axis": -1, "weights": 0.5}),
    "kl, reverse": Example(pj.KLDivergence, pj.kl_divergence, {"direction": "reverse"}, 2),
    "js": Example(pj.JSDivergence, pj.js_divergence, {"mixture": 0.3}, 2),
    "entropy": Example(pj.Entropy, pj.entropy, {"temperature": 0.5, "normalize": True}),
    "kl of logits": Example(
        pj.KLDivergence, kl_of_logits, {"inputs": "logits", "temperature": 0.5}, 2
    ),
    "kl estimate": Example(pj.KLEstimate, pj.kl_estimate, {"estimator": "k2"}, 2),
    "consistency": Example(pj.Consistency, pj.consistency, {"metric": "l1"}, 2),
    "orthogonality": Example(pj.Orthogonality, pj.orthogonality, {"mode": "hard"}),
}
