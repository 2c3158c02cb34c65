"""What there is to test: one entry for each penalty, divergence, constraint and gate.

An entry names a function, its config and an oracle: the textbook's formula in numpy's terms, which
takes float64 arrays, or the same as numbers of mpmath with 200 digits, and hyperparameters by name.
Slopes, limits, minimisers and reductions follow from it by `Case`, an entry with the settings of
one variant. Names, defaults and ranges of hyperparameters come from the signature and from the
config's fields. The parametrised tests take their cases from the tables at the end, and
test_catalogue.py finds whatever has no entry.
"""

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, Literal, get_args, get_origin

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from jax.typing import ArrayLike
from jaxtyping import AbstractArray
from scipy import special, stats

import penalties_jax as pj
import penalties_jax.functional as F  # noqa: N812
from tests import oracles
from tests.oracles import expm1, log

INF = math.inf
SHAPE = (8, 3, 5)

# A fact about every variant of an entry, or a function of the settings.
Fact = bool | Callable[..., bool]


@dataclasses.dataclass(frozen=True, eq=False)
class Entry:
    """A function, its config, its oracle, and the settings that are tested."""

    function: Callable[..., Any]
    config: type | None
    oracle: Callable[..., Any]
    variants: dict[str, dict[str, Any]] = dataclasses.field(
        default_factory=lambda: {"": {}}, kw_only=True
    )

    def cases(self):
        """One case for each variant; the first stands for all where one is enough."""
        for variant, settings in self.variants.items():
            yield Case(self, self.function, variant, settings)


@dataclasses.dataclass(frozen=True, eq=False)
class Penalty(Entry):
    """A sum over entries, or over norms if not separable: of groups along the last axis, or of
    matrices.

    `oracle(x, **hyperparameters)` gives each entry's value; it may ask for `where`.
    """

    separable: Fact = dataclasses.field(default=True, kw_only=True)
    convex: Fact = dataclasses.field(kw_only=True)
    proximal: Fact = dataclasses.field(default=False, kw_only=True)
    grouped: bool = dataclasses.field(default=False, kw_only=True)
    by_matrix: bool = dataclasses.field(default=False, kw_only=True)


@dataclasses.dataclass(frozen=True, eq=False)
class Divergence(Entry):
    """A sum over classes, of log-probabilities, logits and hidden states.

    `oracle(p, q, **hyperparameters)` gives each class's term for probabilities above 0; a class
    that is absent has the limit.
    """

    of_logits: Callable[..., Any]
    of_hidden: Callable[..., Any] | None = dataclasses.field(default=None, kw_only=True)

    def cases(self):
        yield from super().cases()
        for variant, settings in self.variants.items():
            # In blocks that don't divide the rows.
            yield Case(self, self.of_logits, variant, settings | {"block_size": 2})


@dataclasses.dataclass(frozen=True, eq=False)
class Constraint(Entry):
    """What is neither: `oracle(*inputs, **hyperparameters)` gives the value of an entry or row.

    Of `distributions` inputs are log-probabilities along the last axis, of `chances` probabilities
    by themselves.
    """

    of_logits: Callable[..., Any] | None = dataclasses.field(default=None, kw_only=True)
    by_row: Fact = dataclasses.field(default=False, kw_only=True)
    distributions: Fact = dataclasses.field(default=False, kw_only=True)
    chances: bool = dataclasses.field(default=False, kw_only=True)
    masks_entries: bool = dataclasses.field(default=False, kw_only=True)

    def cases(self):
        yield from super().cases()
        if self.of_logits:
            for variant, settings in self.variants.items():
                yield Case(self, self.of_logits, variant, settings)


@dataclasses.dataclass(frozen=True, eq=False)
class Gate(Entry):
    """`oracle(x, **hyperparameters)` gives the gates without noise; `random` gates take a key."""

    random: bool = dataclasses.field(default=True, kw_only=True)


def numbers_of(function):
    """The hyperparameters of a function that are numbers or arrays, and their defaults."""
    kinds = set(get_args(ArrayLike))
    return {
        name: parameter.default
        for name, parameter in inspect.signature(function).parameters.items()
        if kinds <= set(get_args(parameter.annotation))
    }


def arrays_of(function):
    """The names of what a function is of: arrays that have to be given."""
    kinds = {
        name: get_args(parameter.annotation)
        for name, parameter in inspect.signature(function).parameters.items()
    }
    return [
        name
        for name, kinds in kinds.items()
        if any(isinstance(kind, type) and issubclass(kind, AbstractArray) for kind in kinds)
        and type(None) not in kinds
    ]


def choices_of(function):
    """The options of a function that are one of a few words, and the words."""
    annotations = {
        name: parameter.annotation
        for name, parameter in inspect.signature(function).parameters.items()
    }
    return {name: get_args(x) for name, x in annotations.items() if get_origin(x) is Literal}


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """A function with the settings of one variant, on arrays of shape [8, 3, 5].

    `call(*inputs, **options)` is the function after `prepare`: log_softmax for log-probabilities,
    because their declared derivatives are those along normalised ones, and a sigmoid for chances.
    """

    entry: Entry
    function: Callable[..., Any]
    variant: str
    settings: dict[str, Any]

    @property
    def name(self):
        return "-".join(filter(None, (self.function.__name__, self.variant)))

    def having(self, **settings):
        """The same case with other settings."""
        return dataclasses.replace(self, settings=self.settings | settings)

    def is_a(self, fact):
        """Whether an entry's fact, by its name, is true of this variant."""
        value = getattr(self.entry, fact, False)
        return value(**self.settings) if callable(value) else value

    # What it takes.

    @functools.cached_property
    def parameters(self):
        return inspect.signature(self.function).parameters

    @functools.cached_property
    def inputs(self):
        return len(arrays_of(self.function))

    @property
    def reduced(self):
        return "reduction" in self.parameters

    def of_entries(self, mask):
        """A mask of what the function averages, as one of each entry of its input."""
        return np.broadcast_to(mask.reshape(mask.shape + (1,) * (3 - mask.ndim)), SHAPE)

    @property
    def streamed(self):
        """Whether it goes by in blocks, and its first derivative is in reverse mode only."""
        return "block_size" in self.parameters

    @property
    def by_row(self):
        return isinstance(self.entry, Divergence) or self.is_a("by_row") or self.is_a("grouped")

    @property
    def mask_shape(self):
        return SHAPE[: 1 if self.is_a("by_matrix") else 2 if self.by_row else 3]

    @property
    def numbers(self):
        """The plain numbers among the hyperparameters, weights left out."""
        values = numbers_of(self.function) | self.settings
        return {
            name: value
            for name, value in values.items()
            if isinstance(value, float) and name != "weights"
        }

    @property
    def structure(self):
        """What cases have in common that one program can serve: all but the numbers' values."""
        options = {name: x for name, x in self.settings.items() if name not in self.numbers}
        return self.function, *sorted(options.items()), *sorted(self.numbers)

    def where(self, mask):
        """What the function wants for a mask of what it averages."""
        entries = self.is_a("grouped") or self.is_a("masks_entries")
        return mask[..., None] if entries else mask

    @property
    def normalised(self):
        """Whether its inputs are log-probabilities."""
        distributions = isinstance(self.entry, Divergence) or self.is_a("distributions")
        return distributions and not self.streamed

    @property
    def of_chances(self):
        """Whether its inputs are in [0, 1]."""
        return self.is_a("chances") and self.function is self.entry.function

    def prepare(self, x):
        if self.normalised:
            return jax.nn.log_softmax(x)
        return jax.nn.sigmoid(x) if self.of_chances else x

    def raw(self, *inputs, **options):
        return self.function(*inputs, **(self.settings | options))

    def call(self, *inputs, **options):
        return self.raw(*map(self.prepare, inputs), **options)

    @property
    def without_noise(self):
        """The key that a gate is given in evaluation."""
        return {"key": None} if "key" in self.parameters else {}

    @property
    def shape(self):
        """What its first input may have: of as many axes as it says, if it does."""
        first = self.parameters[arrays_of(self.function)[0]].annotation
        axes = get_args(first)[0].dim_str.split()
        return SHAPE if any(axis[0] in ".*" for axis in axes) else SHAPE[-len(axes) :]

    def data(self, seed=0, shape=SHAPE):
        """Inputs that no two entries of are equal, so that differences are off every kink."""
        return tuple(oracles.lattice(seed + i, *shape) + i / 128 for i in range(self.inputs))

    def mask(self, seed=0):
        return np.random.default_rng(seed).random(self.mask_shape) < 0.6

    # What it should give.

    def formula(self, *inputs, where=None, **numbers):
        """The oracle of what it takes, with other numbers than the settings' if they are given."""
        values = {name: parameter.default for name, parameter in self.parameters.items()}
        values |= self.settings | numbers | {"where": where}
        if values.get("floor") is not None:
            inputs = oracles.floored(*inputs, values["floor"])
        wanted = list(inspect.signature(self.entry.oracle).parameters)[self.inputs :]
        return self.entry.oracle(*inputs, **{name: values[name] for name in wanted})

    def entries(self, *inputs, where=None, **numbers):
        """The unreduced value in float64, where `call` is given the same inputs."""
        if isinstance(self.entry, Divergence):
            return self.formula(*self.probabilities(inputs, **numbers), **numbers).sum(-1)
        if self.is_a("distributions"):
            inputs = [special.log_softmax(x, axis=-1) for x in inputs]
        if self.is_a("chances"):
            inputs = map(special.expit, inputs)
        return self.formula(*inputs, where=where, **numbers)

    def reduced_entries(self, *inputs, reduction, where=None, **numbers):
        mask = np.ones(self.mask_shape, bool) if where is None else where
        entries = np.where(mask, self.entries(*inputs, where=mask, **numbers), 0.0)
        if reduction == "none":
            return entries
        return entries.sum() / (max(mask.sum(), 1) if reduction == "mean" else 1)

    # Of one that is separable.

    def values(self, x, **numbers):
        """Each entry's value, exactly; its numbers may be arrays."""
        names, arrays = [*self.numbers], (self.numbers | numbers).values()
        return oracles.precisely(
            lambda x, *values: self.formula(x, **dict(zip(names, values, strict=True))), x, *arrays
        )

    def slopes(self, x, name=None, side=0, **numbers):
        """Each entry's derivative in x, or in one of the hyperparameters."""
        names, arrays = [*self.numbers], (self.numbers | numbers).values()
        return oracles.slope(
            lambda x, *values: self.formula(x, **dict(zip(names, values, strict=True))),
            *(x, *arrays),
            argument=0 if name is None else 1 + names.index(name),
            side=side,
        )

    # Of a divergence.

    @property
    def of_log_probabilities(self):
        """The same formula's function of log-probabilities."""
        wanted = inspect.signature(self.entry.function).parameters
        settings = {name: x for name, x in self.settings.items() if name in wanted}
        return dataclasses.replace(self, function=self.entry.function, settings=settings)

    def probabilities(self, logits, temperature=None, **_):
        temperature = self.numbers.get("temperature", 1.0) if temperature is None else temperature
        # A class that is absent everywhere contributes nothing.
        return [np.maximum(special.softmax(x / temperature, axis=-1), 1e-300) for x in logits]

    def gradients(self, *logits):
        """Each row's gradient in its logits, by complex steps of the terms."""
        inputs = self.probabilities(logits)
        for i, p in enumerate(inputs):
            slopes = np.zeros(p.shape)
            for moved in self.moved_together(p.shape[-1]):
                stepped = [*inputs[:i], p * (1 + 1e-100j * moved), *inputs[i + 1 :]]
                slopes += moved * self.sums(*stepped).imag / 1e-100
            along = slopes - p * slopes.sum(-1, keepdims=True)
            yield along / self.numbers.get("temperature", 1.0)

    def moved_together(self, classes):
        """Masks of the classes whose terms are of one class each: of all, but with a floor."""
        return np.eye(classes) if "floor" in self.settings else np.ones((1, classes))

    def sums(self, *probabilities, **numbers):
        """The terms that a class that is moved changes: its own, but with a floor all, summed."""
        terms = self.formula(*probabilities, **numbers)
        return terms.sum(-1, keepdims=True) if "floor" in self.settings else terms

    @property
    def precise_numbers(self):
        return {name: mpmath.mpf(x) for name, x in self.numbers.items()}

    def exact_values(self, *log_probabilities):
        """Each row's value, with all digits; a class of probability 0 has the limit."""
        temperature = self.numbers.get("temperature")
        absent = [np.isneginf(x) for x in log_probabilities]

        def value(*rows):
            p = [oracles.probabilities(x, temperature) for x in rows]
            terms = self.formula(*p, **self.precise_numbers)
            least, one = oracles.probabilities(oracles.precise([-INF, 0.0]))
            pairs = {(0, 1): (least, one), (1, 0): (one, least)} if self.inputs == 2 else {}
            for (i, j), pair in pairs.items():
                # Terms are homogeneous: what is infinite beside a 1 is so beside any probability.
                if self.formula(*pair, **self.precise_numbers) > mpmath.mpf(10) ** 40:
                    terms = np.where(absent[i] & ~absent[j], mpmath.inf, terms)
            return terms.sum(-1)

        return oracles.precisely(value, *log_probabilities)

    def exact_gradients(self, *logits):
        """Each row's gradient in its logits, with all digits."""
        temperature, h = self.numbers.get("temperature", 1.0), mpmath.mpf(10) ** -40

        def gradient(*rows, i):
            p = [oracles.probabilities(x, temperature) for x in rows]
            slopes = 0
            for moved in self.moved_together(p[i].shape[-1]):
                above, below = (
                    self.sums(
                        *p[:i], p[i] * (1 + step * moved), *p[i + 1 :], **self.precise_numbers
                    )
                    for step in (h, -h)
                )
                slopes = slopes + moved * (above - below) / (2 * h)
            return (slopes - p[i] * slopes.sum(-1, keepdims=True)) / temperature

        for i in range(self.inputs):
            yield oracles.precisely(functools.partial(gradient, i=i), *logits)

    # Its proximal operator, and its config.

    def prox(self, v, t, **numbers):
        operator = getattr(F, f"prox_{self.entry.function.__name__}")
        wanted = inspect.signature(operator).parameters
        settings = self.settings | self.numbers | numbers
        return operator(v, t, **{name: x for name, x in settings.items() if name in wanted})

    def config(self, **options):
        settings = {} if self.function is self.entry.function else {"inputs": "logits"}
        return self.entry.config(**(self.settings | settings | options))


# The entries.


def _square(x, center, clip, where):
    if isinstance(center, str):
        center = (x * where).sum() / max(where.sum(), 1)
    distance = abs(x if center is None else x - center)
    return (distance if clip is None else np.minimum(distance, clip)) ** 2


PENALTIES = [
    Penalty(F.l1, pj.L1, abs, convex=True, proximal=True),
    Penalty(
        F.l2,
        pj.L2,
        _square,
        variants={
            "mean": {"center": "mean"},
            "": {},
            "center": {"center": 0.3},
            "clip": {"clip": 0.7},
            "center-clip": {"center": -0.5, "clip": 1.3},
        },
        convex=lambda center=None, clip=None: clip is None,
        separable=lambda center=None, clip=None: center != "mean",
        proximal=lambda center=None, clip=None: center != "mean" and clip is None,
    ),
    Penalty(
        F.elastic_net,
        pj.ElasticNet,
        lambda x, l1_ratio: l1_ratio * abs(x) + (1 - l1_ratio) * x**2,
        variants={"": {"l1_ratio": 0.3}, "ridge": {"l1_ratio": 0.0}, "lasso": {"l1_ratio": 1.0}},
        convex=True,
        proximal=True,
    ),
    Penalty(
        F.lp,
        pj.Lp,
        lambda x, p, eps: (abs(x) + eps) ** p,
        variants={
            "": {"p": 0.4},
            "bare": {"p": 0.4, "eps": 0.0},
            "lasso": {"p": 1.0},
            "bare-lasso": {"p": 1.0, "eps": 0.0},
            "ridge": {"p": 2.0, "eps": 0.0},
            "square": {"p": 2.0, "eps": 0.1},
            "cube": {"p": 3.0, "eps": 0.1},
        },
        convex=lambda p, eps=1e-12: p >= 1,
    ),
    Penalty(
        F.log_sum,
        pj.LogSum,
        lambda x, eps: log(1 + abs(x) / eps),
        variants={"": {"eps": 0.3}, "default": {}, "narrow": {"eps": 1e-12}},
        convex=False,
    ),
    Penalty(
        F.smooth_l0,
        pj.SmoothL0,
        lambda x, gamma, normalize_at_one: (
            (1 + gamma**2 if normalize_at_one else 1) * x**2 / (x**2 + gamma**2)
        ),
        variants={
            "": {"gamma": 0.5},
            "normalised": {"gamma": 0.5, "normalize_at_one": True},
            **{f"{gamma:g}": {"gamma": gamma} for gamma in (1.0, 1e-3, 1e-12)},
            "normalised-wide": {"gamma": 2.0, "normalize_at_one": True},
            "normalised-narrow": {"gamma": 0.1, "normalize_at_one": True},
        },
        convex=False,
    ),
    Penalty(
        F.huber,
        pj.Huber,
        lambda x, delta: np.where(abs(x) <= delta, x**2 / 2, delta * (abs(x) - delta / 2)),
        variants={"": {}, "narrow": {"delta": 0.4}, "narrower": {"delta": 0.1}},
        convex=True,
        proximal=True,
    ),
    Penalty(
        F.mcp,
        pj.MCP,
        lambda x, gamma, lam: np.where(
            abs(x) <= gamma * lam, lam * abs(x) - x**2 / (2 * gamma), gamma * lam**2 / 2
        ),
        variants={"": {"gamma": 1.5, "lam": 0.7}, "wide": {"gamma": 3.0}},
        convex=False,
        proximal=True,
    ),
    Penalty(
        F.scad,
        pj.SCAD,
        lambda x, a, lam: np.where(
            abs(x) <= lam,
            lam * abs(x),
            np.where(
                abs(x) <= a * lam,
                (2 * a * lam * abs(x) - x**2 - lam**2) / (2 * (a - 1)),
                lam**2 * (a + 1) / 2,
            ),
        ),
        # The proximal operator's steps are these a - 1 and a + 1 too.
        variants={"": {"a": 2.5, "lam": 0.5}, "default": {}},
        convex=False,
        proximal=True,
    ),
    Penalty(
        F.group_lasso,
        pj.GroupLasso,
        lambda x: np.linalg.norm(x, axis=-1),
        variants={"": {"axis": -1}},
        convex=True,
        proximal=True,
        separable=False,
        grouped=True,
    ),
    Penalty(
        F.spectral_norm,
        pj.SpectralNorm,
        lambda x: np.linalg.norm(x, 2, axis=(-2, -1)),
        convex=True,
        separable=False,
        by_matrix=True,
    ),
]


def _kl(p, q, direction="forward", skew=None):
    if direction == "symmetric":
        return (_kl(p, q, skew=skew) + _kl(q, p, skew=skew)) / 2
    if direction == "reverse":
        return _kl(q, p, skew=skew)
    m = (skew or 0) * p + (1 - (skew or 0)) * q
    return p * log(p / m) - p + m


def _js(p, q, mixture):
    m = mixture * p + (1 - mixture) * q
    return mixture * p * log(p / m) + (1 - mixture) * q * log(q / m)


DIVERGENCES = [
    Divergence(
        F.kl_divergence,
        pj.KLDivergence,
        _kl,
        F.kl_from_logits,
        of_hidden=F.linear_kl,
        variants={
            "": {},
            "reverse": {"direction": "reverse"},
            "symmetric": {"direction": "symmetric"},
            "skew": {"skew": 0.3},
            "floor": {"floor": -4.0},
            "skew-floor-reverse": {"direction": "reverse", "skew": 0.2, "floor": -4.0},
        },
    ),
    Divergence(
        F.js_divergence,
        pj.JSDivergence,
        _js,
        F.js_from_logits,
        of_hidden=F.linear_js,
        variants={
            "": {"mixture": 0.2},
            "even": {},
            "other": {"mixture": 0.75},
            "floor": {"mixture": 0.3, "floor": -4.0},
        },
    ),
    Divergence(
        F.alpha_divergence,
        pj.AlphaDivergence,
        lambda p, q, alpha: (
            (alpha * p + (1 - alpha) * q - p**alpha * q ** (1 - alpha)) / (alpha * (1 - alpha))
            if alpha not in (0, 1)
            else _kl(p, q, "forward" if alpha else "reverse")
        ),
        F.alpha_from_logits,
        of_hidden=F.linear_alpha,
        variants={str(alpha): {"alpha": alpha} for alpha in (0.3, 1.0, 0.0, 2.0, -0.6)},
    ),
    Divergence(
        F.entropy,
        pj.Entropy,
        lambda p, normalize: -p * log(p) / (np.log(p.shape[-1]) if normalize else 1),
        F.entropy_from_logits,
        of_hidden=F.linear_entropy,
        variants={"": {}, "normalised": {"temperature": 0.7, "normalize": True}},
    ),
]


# Rows of (log p, log q), four classes each, for all divergences.
EDGE_ROWS = np.array(
    [
        ([0.0, -INF, -INF, -INF], [0.0, -INF, -INF, -INF]),  # the same one-hot
        ([0.0, -INF, -INF, -INF], [-INF, 0.0, -INF, -INF]),  # disjoint
        (np.log([0.5, 0.5, 0.0001, 0.0002])[[0, 2, 1, 3]], [-INF, -INF, 0.0, -INF]),
        ([0.0, -INF, -INF, -INF], np.log([0.25] * 4)),  # p = 0
        (np.log([0.25] * 4), [-INF, 0.0, -INF, -INF]),  # q = 0 where p > 0
        ([*np.log([0.2, 0.8]), -INF, -INF], [*np.log([0.7, 0.3]), -INF, -INF]),  # p = q = 0
        (np.log([0.1, 0.2, 0.3, 0.4]), np.log([0.4, 0.3, 0.2, 0.1])),
        (np.log([0.1, 0.2, 0.3, 0.4]), np.log([0.1, 0.2, 0.3, 0.4])),
        (np.log([0.1, 0.2, 0.3, 0.4]), np.log([0.100001, 0.199999, 0.3, 0.4])),
        ([0.0, -1e30, -1e30, -INF], [*np.log([0.5, 0.25]), -1e30, *np.log([0.25])]),
        ([*np.log([0.5, 0.5]), -1e30, -INF], [0.0, -1e30, -1e30, -1e30]),
        ([0.0, -80.0, -100.0, -1000.0], [-1000.0, -100.0, 0.0, -80.0]),
        ([-1e-30, -69.0, -200.0, -1e4], [-1e-30, -70.0, -1e4, -200.0]),
        ([0.0, -20.0, -21.0, -22.0], [0.0, -20.5, -20.0, -25.0]),
    ],
    dtype=np.float32,
).astype(np.float64)


def _consistency(a, b, metric):
    if metric == "kl":
        return _kl(np.exp(a), np.exp(b), "symmetric").sum(-1)
    if metric == "cosine":
        return 1 - (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    return abs(a - b) if metric == "l1" else (a - b) ** 2


def _transport(log_p, log_q, order):
    """Of each row, by its quantile functions at the middle of where both are constant."""

    def of_row(p, q):
        classes = np.arange(len(p))
        if order == 1:
            return stats.wasserstein_distance(classes, classes, p, q)
        ends = [np.cumsum(x)[:-1] for x in (p, q)]
        edges = np.concatenate([[0], np.sort(np.concatenate(ends)), [1]])
        at = (edges[1:] + edges[:-1]) / 2
        i, j = (np.searchsorted(x, at) for x in ends)
        return (np.diff(edges) * abs(i - j) ** order).sum()

    return np.vectorize(of_row, signature="(n),(n)->()")(np.exp(log_p), np.exp(log_q))


def _mmd(x, y, scales, unbiased):
    """Pair by pair."""

    def kernel(a, b):
        square = ((a - b) ** 2).sum()
        return np.mean([np.exp(-square / (2 * s**2)) for s in np.ravel(scales)])

    def mean(a, b, skip):
        pairs = [(i, j) for i in range(len(a)) for j in range(len(b)) if not (skip and i == j)]
        return np.mean([kernel(a[i], b[j]) for i, j in pairs])

    return mean(x, x, unbiased) + mean(y, y, unbiased) - 2 * mean(x, y, False)


def _orthogonality(x, mode, normalize, axis):
    """By the Gram matrix of the rows, entry by entry."""
    last = {"rows": x, "sequence": np.moveaxis(x, 1, 0), "vocabulary": np.moveaxis(x, -1, 0)}[axis]
    rows = np.reshape(last, (-1, x.shape[-1]) if axis == "rows" else (len(last), -1))
    if normalize:
        lengths = np.linalg.norm(rows, axis=-1, keepdims=True)
        rows = rows / np.where(lengths > 0, lengths, 1)
    gram = np.array([[one @ two for two in rows] for one in rows])
    diagonal, n = np.diag(gram), len(rows)
    soft = (gram**2).sum() - (diagonal**2).sum()
    return (
        soft
        + {
            "soft": 0,
            "hard": ((diagonal - 1) ** 2).sum(),
            "spectral": (diagonal.sum() - n) ** 2,
        }[mode]
    )


def _ponder(halting, epsilon):
    """Graves' N + R of each position, step by step."""

    def of_position(halting):
        n, spent = 1, 0.0
        while n < len(halting) and spent + halting[n - 1] < 1 - epsilon:
            n, spent = n + 1, spent + halting[n - 1]
        return n + 1 - spent

    return np.apply_along_axis(of_position, -1, halting)


def _ponder_divergence(halting, rate):
    """By scipy's geometric distribution, and chances of halting multiplied step by step."""

    def of_position(halting):
        steps = np.arange(1, len(halting) + 1)
        if rate:
            prior = stats.geom.pmf(steps, rate) / stats.geom.cdf(len(halting), rate)
        else:
            prior = np.full(len(halting), 1 / len(halting))
        halts, reached = [], 1.0
        for chance in halting[:-1]:
            halts.append(reached * chance)
            reached = reached * (1 - chance)
        return stats.entropy([*halts, reached], prior)

    return np.apply_along_axis(of_position, -1, halting)


def _estimate(log_p, log_q, estimator, log_ratio_clip):
    r = log_q - log_p
    if log_ratio_clip is not None:
        r = np.clip(r, -log_ratio_clip, log_ratio_clip)
    return {
        "k1": lambda: -r,
        "k2": lambda: r**2 / 2,
        "k3": lambda: expm1(r) - r,
    }[estimator]()


CONSTRAINTS = [
    Constraint(
        F.kl_estimate,
        pj.KLEstimate,
        _estimate,
        variants={name: {"estimator": name} for name in ("k3", "k1", "k2")}
        | {"clipped": {"estimator": "k3", "log_ratio_clip": 0.77}},
    ),
    Constraint(
        F.consistency,
        pj.Consistency,
        _consistency,
        variants={name: {"metric": name} for name in ("mse", "l1", "cosine", "kl")},
        by_row=lambda metric: metric in ("cosine", "kl"),
        distributions=lambda metric: metric == "kl",
    ),
    Constraint(
        F.z_loss,
        pj.ZLoss,
        lambda logits: special.logsumexp(logits, axis=-1) ** 2,
        variants={"": {"block_size": 2}},
        by_row=True,
    ),
    Constraint(
        F.router_z_loss,
        pj.RouterZLoss,
        lambda logits: special.logsumexp(logits, axis=-1) ** 2,
        by_row=True,
    ),
    Constraint(
        F.ponder_cost,
        pj.PonderCost,
        _ponder,
        variants={"": {}, "early": {"epsilon": 0.3}},
        by_row=True,
    ),
    Constraint(
        F.ponder_divergence,
        pj.PonderDivergence,
        _ponder_divergence,
        of_logits=F.ponder_divergence_from_logits,
        variants={"": {"rate": 0.3}, "uniform": {"rate": 0.0}, "late": {"rate": 0.01}},
        by_row=True,
        chances=True,
    ),
    Constraint(
        F.wasserstein,
        pj.Wasserstein,
        _transport,
        variants={"": {}, "2": {"order": 2}, "3": {"order": 3}},
        by_row=True,
        distributions=True,
    ),
    Constraint(
        F.mmd,
        pj.MMD,
        _mmd,
        variants={"": {"scales": 0.7}, "unbiased": {"unbiased": True}},
    ),
    Constraint(
        F.output_magnitude,
        pj.OutputMagnitude,
        lambda x, target: (np.sqrt((x * x).mean(-1)) - target) ** 2,
        variants={"": {"axis": -1, "target": 0.5}},
        by_row=True,
        masks_entries=True,
    ),
    Constraint(
        F.orthogonality,
        pj.Orthogonality,
        _orthogonality,
        variants={
            f"{mode}{suffix}": {"mode": mode, "normalize": normalize}
            for mode in ("soft", "hard", "spectral")
            for normalize, suffix in ((True, ""), (False, "-as-it-is"))
        }
        | {f"hard-{axis}": {"mode": "hard", "axis": axis} for axis in ("sequence", "vocabulary")},
    ),
]


def _expected_gate(logits, temperature, stretch):
    low, high = stretch
    return stats.logistic.sf(temperature * special.logit(-low / (high - low)) - logits)


GATES = [
    Gate(
        F.logistic_gate,
        pj.LogisticGate,
        lambda x, temperature, hard: (
            np.where(x > 0, 1.0, 0.0) if hard else special.expit(x / temperature)
        ),
        variants={"": {}, "soft": {"hard": False}},
    ),
    Gate(
        F.hard_concrete_gate,
        pj.HardConcreteGate,
        lambda x, stretch: np.clip((stretch[1] - stretch[0]) * special.expit(x) + stretch[0], 0, 1),
    ),
    Gate(F.hard_concrete_l0, pj.HardConcreteL0, _expected_gate, random=False),
    Gate(
        F.top_k_gate,
        pj.TopKGate,
        lambda x, k, temperature, hard: (
            np.argsort(np.argsort(-x, axis=-1), axis=-1) < k
            if hard
            else k * special.softmax(x / temperature, axis=-1)
        ),
        variants={"": {"k": 2}, "soft": {"k": 2, "hard": False}},
    ),
    Gate(
        F.step_gate,
        pj.JumpReLUGate,
        lambda x, threshold: x > threshold,
        variants={"": {"threshold": 0.25}},
        random=False,
    ),
    Gate(
        F.jump_relu,
        None,
        lambda x, threshold: np.where(x > threshold, x, 0),
        variants={"": {"threshold": 0.25}},
        random=False,
    ),
]


# Public functions and configs that are none of these: the file that tests each, and why.
OTHERS = {
    "aggregate": ("functional/test_averages.py", "it averages what others compute"),
    "cross_entropy_from_logits": ("functional/test_streaming.py", "it takes labels"),
    "balanced_loss": ("functional/test_sparsity.py", "two losses, weighted"),
    "gather_active": ("functional/test_sparsity.py", "it moves what lies at positions"),
    "gradient_penalty": ("functional/test_constraints.py", "it takes a callable"),
    "kl_to_top_k": ("functional/test_top_k.py", "it takes tokens"),
    "halting_log_probabilities": ("functional/test_halting.py", "it gives steps their own"),
    "halting_weights": ("functional/test_halting.py", "it gives steps their own"),
    "importance_metrics": ("functional/test_importance.py", "a dict of numbers"),
    "importance_minimality": ("functional/test_importance.py", "it takes a penalty"),
    "interpolated_gradient_penalty": ("functional/test_constraints.py", "it takes a callable"),
    "linear_cross_entropy": ("functional/test_linear.py", "it takes labels"),
    "linear_distillation": ("functional/test_linear.py", "it takes labels"),
    "linear_kl_to_top_k": ("functional/test_top_k.py", "it takes tokens"),
    "linear_log_prob": ("functional/test_linear.py", "it takes tokens"),
    "linear_log_prob_and_entropy": ("functional/test_linear.py", "it takes tokens"),
    "load_balance": ("functional/test_routing.py", "two inputs of different kinds"),
    "resolvent_diagonal": ("functional/test_tridiagonal.py", "linear algebra"),
    "scatter_active": ("functional/test_sparsity.py", "it moves what lies at positions"),
    "sparsity_rate": ("functional/test_sparsity.py", "a measurement, of trees"),
    "sparsity_target_loss": ("functional/test_sparsity.py", "it takes trees of rates"),
    "straight_through": ("functional/test_gates.py", "how gates get their gradients"),
    "token_targets": ("functional/test_sparsity.py", "ranks, without derivatives"),
    "Elementwise": ("test_own.py", "it takes a function"),
    "Function": ("test_own.py", "it takes a function"),
    "Separable": ("test_own.py", "a base"),
    "Aggregate": ("test_aggregates.py", "made for terms"),
    "AdaptiveKL": ("test_controllers.py", "a controller"),
    "AdaptiveSparsityScheduler": ("test_controllers.py", "a controller"),
    "Budget": ("test_controllers.py", "a controller"),
    "CrossEntropy": ("test_terms.py", "it takes labels"),
    "DualAscent": ("test_controllers.py", "a controller"),
    "GradientPenalty": ("test_terms.py", "it takes a callable"),
    "ImportanceMinimality": ("test_importance.py", "it takes a penalty"),
    "InterpolatedGradientPenalty": ("test_terms.py", "it takes a callable"),
    "KLToTopK": ("functional/test_top_k.py", "it takes tokens"),
    "LoadBalance": ("functional/test_routing.py", "two inputs of different kinds"),
    "Objective": ("test_objective.py", "made of terms"),
    "SampledEntropy": ("test_terms.py", "the mean of what tokens are given"),
    "SparsityTarget": ("test_sparsity_target.py", "its function takes trees of rates"),
    "Term": ("test_objective.py", "made of a penalty"),
}


# The tables that tests take their cases from.


def every(cases, argument="case", slow=lambda case: False):
    """Parametrises a test by cases, and leaves some of them to make test-slow."""
    marked = [
        pytest.param(case, id=name, marks=pytest.mark.slow if slow(case) else ())
        for name, case in cases.items()
    ]
    return pytest.mark.parametrize(argument, marked)


def streamed_again(case):
    """Whether it takes long to compile, and what it shares with the first of its kind is tested."""
    return case.streamed and case.function is not DIVERGENCES[0].of_logits


def only(fact, cases):
    return {name: case for name, case in cases.items() if fact(case)}


def first_of_each(key, cases):
    """The first case of each kind."""
    return {group[0].name: group[0] for group in grouped(key, cases)}


def grouped(key, cases):
    """The cases of each kind together."""
    groups = {}
    for case in cases.values():
        groups.setdefault(key(case), []).append(case)
    return list(groups.values())


def by_structure(cases):
    """Cases that one program serves, by the name of the first."""
    return {group[0].name: group for group in grouped(lambda case: case.structure, cases)}


def cases_of(*entries):
    return {case.name: case for entry in entries for case in entry.cases()}


def saturating(x, gamma):
    """As a user writes smooth L0."""
    return x**2 / (x**2 + gamma**2)


def squared_distance(x, center):
    """As a user writes L2 to a center."""
    return ((x - center) ** 2).sum()


CASES = cases_of(*PENALTIES, *DIVERGENCES, *CONSTRAINTS)
REDUCED = only(lambda case: case.reduced, CASES)
PENALTY_CASES = cases_of(*PENALTIES)
STRUCTURES = first_of_each(lambda case: case.structure, REDUCED)
# One of each function, for what does not depend on its options.
FUNCTIONS = first_of_each(lambda case: (case.function, case.by_row), REDUCED)
SEPARABLE = only(lambda case: case.is_a("separable"), CASES)
PROXIMAL = only(lambda case: case.is_a("proximal"), CASES)
DIVERGENCE_CASES = cases_of(*DIVERGENCES)
CONFIGS = first_of_each(lambda case: case.structure, only(lambda case: case.entry.config, CASES))
GATE_CASES = cases_of(*GATES)
# Those of masks, not of penalties, and all of whose options are numbers or words.
GATE_CONFIGS = {
    name: case.config()
    for name, case in GATE_CASES.items()
    if case.entry.config and case.entry.config is not pj.HardConcreteL0
}
EXAMPLES = {name: case.config() for name, case in CONFIGS.items()} | {
    "Against": pj.Consistency("l1").against(np.full(SHAPE, 0.25, np.float32)),
    "Elementwise": pj.Elementwise(saturating, gamma=0.5, fill=1.0),
    "Function": pj.Function(squared_distance, center=0.5),
    "CrossEntropy": pj.CrossEntropy(z_loss=0.1, temperature=0.7),
    "HardConcreteL0": pj.HardConcreteL0(),
    "KLToTopK": pj.KLToTopK("reverse", temperature=0.7),
    "ImportanceMinimality": pj.ImportanceMinimality(pj.SmoothL0(gamma=0.5), beta=0.5),
    "LoadBalance": pj.LoadBalance(),
    "SampledEntropy": pj.SampledEntropy(maximize=True),
    "SparsityTarget": pj.SparsityTarget(target=0.5, kind="huber", delta=0.2),
}


def inputs_of(config):
    """What an example may be called with."""
    case = next((case for case in CONFIGS.values() if case.config() == config), None)
    if case is None:
        values = jnp.abs(jnp.float32(oracles.lattice(0, *SHAPE)))
        if isinstance(config, pj.LoadBalance):
            return values, values > 1
        labels = jnp.arange(values[..., 0].size).reshape(values.shape[:-1]) % values.shape[-1]
        if isinstance(config, pj.KLToTopK):
            ids = jnp.stack([labels, (labels + 2) % values.shape[-1]], -1)
            return values, ids, jnp.log(jnp.full(ids.shape, 0.3))
        return (values, labels)[: config.takes[0]]
    prepare = case.prepare if case.of_chances else jax.nn.log_softmax
    return tuple(prepare(jnp.float32(x)) for x in case.data(shape=case.shape))
