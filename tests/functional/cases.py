"""Every function that takes reduction, where and axis_name, beside its oracle, as one table.

`call(*inputs, **options)` is `function` after `prepare`, on arrays of shape [8, 3, 5]: divergences
are prepared by log_softmax, because their declared derivatives are those along normalised
distributions. `entries(*inputs, where=mask)` is the unreduced value in float64. `mask` has the
shape of the entries; `where` is what the function wants for it.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from scipy.special import log_softmax

import penalties_jax.functional as F  # noqa: N812
from tests import oracles

SHAPE = (8, 3, 5)

# Unoptimised programs compile in half the time; for what does not depend on optimisation.
quick_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


class Case(NamedTuple):
    """One function with fixed hyperparameters, and its oracle."""

    function: Callable[..., Any]
    entries: Callable[..., np.ndarray]
    inputs: int = 1
    mask_shape: tuple[int, ...] = SHAPE
    where: Callable[[Any], Any] = lambda mask: mask
    prepare: Callable[[Any], Any] = lambda x: x
    once: bool = False  # differentiable once, and in reverse mode only

    def call(self, *inputs, **options):
        return self.function(*map(self.prepare, inputs), **options)

    def data(self, seed=0):
        """Inputs that no two entries of are equal, so that differences are off every kink."""
        return tuple(oracles.lattice(seed + i, *SHAPE) + i / 128 for i in range(self.inputs))

    def mask(self, seed=0):
        return np.random.default_rng(seed).random(self.mask_shape) < 0.6

    def reduced(self, *inputs, reduction, where=None):
        """The oracle's value, reduced."""
        mask = np.ones(self.mask_shape, bool) if where is None else where
        entries = np.where(mask, self.entries(*inputs, where=mask), 0.0)
        if reduction == "none":
            return entries
        return entries.sum() / (max(mask.sum(), 1) if reduction == "mean" else 1)


def elementwise(function, formula, inputs=1, **fixed):
    return Case(partial(function, **fixed), lambda *x, where: formula(*x), inputs=inputs)


def divergence(function, formula, inputs=2, **fixed):
    return Case(
        partial(function, **fixed),
        lambda *x, where: formula(*(log_softmax(value, axis=-1) for value in x)),
        inputs=inputs,
        mask_shape=SHAPE[:-1],
        prepare=jax.nn.log_softmax,
    )


def streamed(function, formula, inputs=2, **fixed):
    """From logits, in blocks that don't divide the rows."""
    case = divergence(partial(function, block_size=2), formula, inputs, **fixed)
    return case._replace(prepare=lambda x: x, once=True)


def by_row(function, formula, inputs=1, where=lambda mask: mask[..., None], **fixed):
    return Case(
        partial(function, **fixed),
        lambda *x, where: formula(*x),
        inputs=inputs,
        mask_shape=SHAPE[:-1],
        where=where,
    )


def huber(x, delta):
    return np.where(np.abs(x) < delta, x * x / 2, delta * (np.abs(x) - delta / 2))


def centred_square(x, *, where):
    return (x - x[where].sum() / max(where.sum(), 1)) ** 2


def symmetric_kl(log_p, log_q):
    return (oracles.kl(log_p, log_q) + oracles.kl(log_q, log_p)) / 2


def cosine_distance(a, b):
    return 1 - (a * b).sum(-1) / np.sqrt((a * a).sum(-1) * (b * b).sum(-1))


PENALTIES = {
    "l1": elementwise(F.l1, np.abs),
    "l2": elementwise(F.l2, np.square),
    "l2-center": elementwise(F.l2, lambda x: (x - 0.3) ** 2, center=0.3),
    "l2-clip": elementwise(F.l2, lambda x: np.clip(x - 0.3, -0.7, 0.7) ** 2, center=0.3, clip=0.7),
    "l2-mean": Case(partial(F.l2, center="mean"), centred_square),
    "elastic_net": elementwise(F.elastic_net, lambda x: 0.3 * abs(x) + 0.7 * x * x, l1_ratio=0.3),
    "lp": elementwise(F.lp, lambda x: (np.abs(x) + 1e-12) ** 0.4, p=0.4),
    "lp-cube": elementwise(F.lp, lambda x: (np.abs(x) + 0.1) ** 3, p=3.0, eps=0.1),
    "log_sum": elementwise(F.log_sum, lambda x: np.log1p(np.abs(x) / 0.3), eps=0.3),
    "smooth_l0": elementwise(F.smooth_l0, lambda x: x * x / (x * x + 0.25), gamma=0.5),
    "smooth_l0-normalised": elementwise(
        F.smooth_l0, lambda x: 1.25 * x * x / (x * x + 0.25), gamma=0.5, normalize_at_one=True
    ),
    "huber": elementwise(F.huber, partial(huber, delta=1.0)),
    "huber-narrow": elementwise(F.huber, partial(huber, delta=0.4), delta=0.4),
    "group_lasso": by_row(F.group_lasso, partial(np.linalg.norm, axis=-1), axis=-1),
}

DIVERGENCES = {
    "kl": divergence(F.kl_divergence, oracles.kl),
    "kl-reverse": divergence(F.kl_divergence, lambda p, q: oracles.kl(q, p), direction="reverse"),
    "kl-symmetric": divergence(F.kl_divergence, symmetric_kl, direction="symmetric"),
    "js": divergence(F.js_divergence, oracles.js),
    "js-mixture": divergence(F.js_divergence, partial(oracles.js, mixture=0.2), mixture=0.2),
    "entropy": divergence(F.entropy, oracles.entropy, inputs=1),
    "entropy-normalised": divergence(
        F.entropy,
        lambda log_p: oracles.entropy(log_p, 0.7) / np.log(SHAPE[-1]),
        inputs=1,
        temperature=0.7,
        normalize=True,
    ),
}

STREAMED = {
    "kl_from_logits": streamed(F.kl_from_logits, oracles.kl),
    "kl_from_logits-reverse": streamed(
        F.kl_from_logits, lambda p, q: oracles.kl(q, p), direction="reverse"
    ),
    "kl_from_logits-symmetric": streamed(F.kl_from_logits, symmetric_kl, direction="symmetric"),
    "js_from_logits": streamed(F.js_from_logits, oracles.js),
    "js_from_logits-mixture": streamed(
        F.js_from_logits, partial(oracles.js, mixture=0.2), mixture=0.2
    ),
    "entropy_from_logits": streamed(F.entropy_from_logits, oracles.entropy, inputs=1),
    "entropy_from_logits-normalised": streamed(
        F.entropy_from_logits,
        lambda log_p: oracles.entropy(log_p, 0.7) / np.log(SHAPE[-1]),
        inputs=1,
        temperature=0.7,
        normalize=True,
    ),
}

ESTIMATORS = {
    "k1": elementwise(F.kl_estimate, lambda p, q: p - q, inputs=2, estimator="k1"),
    "k2": elementwise(F.kl_estimate, lambda p, q: (p - q) ** 2 / 2, inputs=2, estimator="k2"),
    "k3": elementwise(
        F.kl_estimate, lambda p, q: np.expm1(q - p) - (q - p), inputs=2, estimator="k3"
    ),
}

CONSTRAINTS = {
    "consistency-mse": elementwise(F.consistency, lambda a, b: (a - b) ** 2, inputs=2),
    "consistency-l1": elementwise(F.consistency, lambda a, b: np.abs(a - b), inputs=2, metric="l1"),
    "consistency-cosine": by_row(
        F.consistency, cosine_distance, inputs=2, where=lambda mask: mask, metric="cosine"
    ),
    "consistency-kl": divergence(F.consistency, symmetric_kl, metric="kl"),
    "output_magnitude": by_row(
        F.output_magnitude,
        lambda x: (np.sqrt((x * x).mean(-1)) - 0.5) ** 2,
        axis=-1,
        target=0.5,
    ),
}

CASES = PENALTIES | DIVERGENCES | STREAMED | ESTIMATORS | CONSTRAINTS

# One of each function, for what does not depend on its options.
FUNCTIONS = {
    name: CASES[name]
    for name in (
        *("l1", "l2-mean", "elastic_net", "lp", "smooth_l0", "huber", "group_lasso"),
        *("kl", "js", "entropy", "k3", "consistency-mse", "consistency-cosine"),
        *("kl_from_logits", "js_from_logits", "entropy_from_logits"),
        "output_magnitude",
    )
}
