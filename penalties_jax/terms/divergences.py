"""Divergences and their estimates."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, ClassVar, Literal, get_args

import jax
import jax.numpy as jnp

from penalties_jax import functional
from penalties_jax._pytree import abstract, config, fields, number, option
from penalties_jax.functional.checks import (
    ASCENDING,
    AT_LEAST_ONE,
    BELOW_ZERO,
    FINITE,
    NONNEGATIVE,
    ORDER,
    POSITIVE,
    UNIT,
)
from penalties_jax.functional.divergences.formulas import Direction
from penalties_jax.functional.divergences.top_k import Tail
from penalties_jax.functional.estimators import EstimateGradient, Estimator
from penalties_jax.functional.reduction import AxisName, Reduction, evaluate
from penalties_jax.terms.base import Numeric, Penalty
from penalties_jax.terms.reduced import Reduced, parameters_of

__all__ = [
    "AlphaDivergence",
    "CrossEntropy",
    "Entropy",
    "JSDivergence",
    "KLDivergence",
    "KLEstimate",
    "KLToTopK",
    "SampledEntropy",
    "Wasserstein",
    "ZLoss",
]

Inputs = Literal["logprobs", "logits", "hidden"]
Streamed = Literal["logits", "hidden"]


def by_input(kinds: Any, *functions: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    """The functions of a divergence by what they take, in the order of a `Literal`."""
    return dict(zip(get_args(kinds), functions, strict=True))


def not_of_samples(penalty: Penalty) -> ValueError:
    """The error for a penalty that sampled tokens don't tell."""
    return ValueError(f"{penalty!r} can't be estimated from log-probabilities of sampled tokens")


@abstract
class OfClasses(Reduced):
    """What is of distributions over classes: one function for each kind of input."""

    inputs: Inputs = option(default="logits", choices=Inputs, kw_only=True)
    temperature: Numeric | None = number(default=None, valid=POSITIVE, kw_only=True)
    softcap: Numeric | None = number(default=None, valid=POSITIVE, kw_only=True)
    weights: Numeric = number(default=1.0, valid=FINITE, kw_only=True)
    block_size: int | None = option(default=None, valid=AT_LEAST_ONE, kw_only=True)
    class_axis_name: AxisName | None = option(default=None, kw_only=True)
    reduction: Reduction = option(default="mean", choices=Reduction, kw_only=True)

    _functions: ClassVar[dict[str, Callable[..., Any]]]
    # Inputs that need not be there, after the biases.
    _optional: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self):
        super().__post_init__()
        name = type(self).__name__
        takers = {kind: parameters_of(function) for kind, function in self._functions.items()}
        for field in fields(self):
            kinds = [kind for kind, taken in takers.items() if field.name in taken]
            if not kinds or self.inputs in kinds:
                continue
            value = getattr(self, field.name)
            if value is not None if field.default is None else value != field.default:
                needed = " or ".join(map(repr, kinds))
                raise ValueError(f"{name}.{field.name} needs inputs={needed}, got {value!r}")

    @property
    def takes(self) -> range:
        needed, optional = self._arrays()
        return range(len(needed), len(needed) + len(optional) + 1)

    @property
    def class_axis(self) -> int:
        return -1

    def estimate(self) -> Penalty:
        raise not_of_samples(self)

    def _run(self, program, inputs, where):
        needed, _ = self._arrays()
        arrays, others = inputs[: len(needed)], inputs[len(needed) :]
        _, biases = arrays_of(self._pure())
        biases, others = others[: len(biases)], others[len(biases) :]
        if any(bias is None for bias in biases):
            # Of a head that has none, where the other may have one.
            zeros = jnp.zeros(jnp.shape(inputs[1])[-1:])
            biases = (zeros if bias is None else bias for bias in biases)
        return super()._run(program, (*arrays, *biases, *others), where)

    def _pure(self):
        return self._functions[self.inputs]

    def _arrays(self):
        """The names of its inputs: those that it needs, and biases and others, which follow."""
        own = {field.name for field in fields(self)}
        needed, biases = arrays_of(self._pure())
        return [name for name in needed if name not in own], [*biases, *self._optional]

    def _call(self, function, row, options):
        needed, optional = self._arrays()
        return function(**dict(zip([*needed, *optional], row, strict=False)), **options)


@functools.cache
def arrays_of(function: Callable[..., Any]) -> tuple[list[str], list[str]]:
    """The names of what a function has to be given by position, and of biases it may be."""
    parameters = inspect.signature(function).parameters.values()
    needed = [x.name for x in parameters if x.default is x.empty]
    return needed, [x.name for x in parameters if x.name.startswith("bias")]


@abstract
class Divergence(OfClasses):
    """What divergences share."""

    inputs: Inputs = option(default="logprobs", choices=Inputs, kw_only=True)
    axis: int = option(default=-1, kw_only=True)

    @property
    def class_axis(self) -> int:
        return self.axis

    @property
    def of_distributions(self) -> bool:
        return self.inputs == "logprobs" and len(self.takes) == 1 and 2 in self.takes


@config
class KLDivergence(Divergence):
    """KL(P||Q), of which P, the first input, is the model: `pj.kl_divergence` as a config.

    Of log-probabilities that are not normalised, such as those of the top classes only, the value
    is that of the generalised divergence and the derivative is not its own: it isn't 0 where P = Q.

    Attributes:
        direction, skew, floor: As in `pj.kl_divergence`; a skew that is None costs nothing, where
            one that is a number of 0 may be another later.
        inputs: "logprobs"; "logits" for `pj.kl_from_logits`; or "hidden" for `pj.linear_kl`, of
            inputs (hidden_p, kernel_p, hidden_q, kernel_q), and bias_p and bias_q if there are any.
        temperature, softcap, block_size, class_axis_name: As in `pj.linear_kl`, and not for
            log-probabilities; softcap for hidden states only.
        axis, weights, reduction, axis_name: As in `pj.kl_divergence`; the axis of logits is the
            last.

    Examples:
        >>> log_p, log_q = jnp.log(jnp.array([0.75, 0.25])), jnp.log(jnp.array([0.5, 0.5]))
        >>> round(float(pj.KLDivergence()(log_p, log_q)), 4)
        0.1308
    """

    direction: Direction = option(default="forward", choices=Direction)
    skew: Numeric | None = number(default=None, valid=UNIT, kw_only=True)
    floor: Numeric | None = number(default=None, valid=BELOW_ZERO, kw_only=True)

    _functions = by_input(
        Inputs, functional.kl_divergence, functional.kl_from_logits, functional.linear_kl
    )
    measured_as = "kl"

    def estimate(self) -> Penalty:
        if self != KLDivergence(reduction=self.reduction, axis_name=self.axis_name):
            return super().estimate()
        return KLEstimate(reduction=self.reduction, axis_name=self.axis_name)


@config
class JSDivergence(Divergence):
    r"""The generalised Jensen-Shannon divergence: `pj.js_divergence` as a config.

    Attributes:
        mixture, floor: As in `pj.js_divergence`.
        inputs, temperature, softcap, block_size, class_axis_name: As in `pj.KLDivergence`.
        axis, weights, reduction, axis_name: As in `pj.KLDivergence`.

    Examples:
        >>> log_p, log_q = jnp.log(jnp.array([1.0, 0.0])), jnp.log(jnp.array([0.0, 1.0]))
        >>> round(float(pj.JSDivergence()(log_p, log_q)), 4)
        0.6931
    """

    mixture: Numeric = number(default=0.5, valid=UNIT)
    floor: Numeric | None = number(default=None, valid=BELOW_ZERO, kw_only=True)

    _functions = by_input(
        Inputs, functional.js_divergence, functional.js_from_logits, functional.linear_js
    )


@config
class AlphaDivergence(Divergence):
    r"""The alpha divergence: `pj.alpha_divergence` as a config.

    Attributes:
        alpha: As in `pj.alpha_divergence`.
        inputs, temperature, softcap, block_size, class_axis_name: As in `pj.KLDivergence`.
        axis, weights, reduction, axis_name: As in `pj.KLDivergence`.

    Examples:
        >>> round(float(pj.AlphaDivergence(alpha=0.0)(*jnp.log(jnp.array([[0.5], [1.0]])))), 4)
        0.1931
    """

    alpha: Numeric = number(valid=FINITE)

    _functions = by_input(
        Inputs, functional.alpha_divergence, functional.alpha_from_logits, functional.linear_alpha
    )


@config
class Entropy(Divergence):
    r"""The Shannon entropy H: `pj.entropy` as a config. As a term of a loss it sharpens.

    Attributes:
        temperature, normalize: As in `pj.entropy`.
        maximize: Whether it is -H, whose minimum is the uniform distribution.
        inputs: "logprobs"; "logits" for `pj.entropy_from_logits`; or "hidden" for
            `pj.linear_entropy`, of inputs (hidden, kernel), and bias if there is one.
        softcap, block_size, class_axis_name, axis, weights, reduction, axis_name: As in
            `pj.KLDivergence`.

    Examples:
        >>> round(float(pj.Entropy(maximize=True)(jnp.log(jnp.array([0.5, 0.5])))), 4)
        -0.6931
    """

    temperature: Numeric = number(default=1.0, valid=POSITIVE, kw_only=True)
    maximize: bool = option(default=False, kw_only=True)
    normalize: bool = option(default=False, kw_only=True)

    _functions = by_input(
        Inputs, functional.entropy, functional.entropy_from_logits, functional.linear_entropy
    )
    measured_as = "entropy"

    def estimate(self) -> Penalty:
        options = {"reduction": self.reduction, "axis_name": self.axis_name}
        if self != Entropy(maximize=self.maximize, **options):
            return super().estimate()
        return SampledEntropy(self.maximize, **options)

    def value(self, inputs, where):
        value = super().value(inputs, where)
        return jax.tree.map(jnp.negative, value) if self.maximize else value


@config
class CrossEntropy(OfClasses):
    r"""The cross entropy of labels: `pj.cross_entropy_from_logits` as a config.

    Attributes:
        inputs: "logits" of inputs (logits, labels), or "hidden" for `pj.linear_cross_entropy`, of
            (hidden, kernel, labels), and bias if there is one.
        z_loss: As in `pj.linear_cross_entropy`.
        temperature, softcap, block_size, class_axis_name, weights, reduction, axis_name: As in
            `pj.KLDivergence`.

    Examples:
        >>> logits, labels = jnp.array([[0.0, 1.0]]), jnp.array([1])
        >>> round(float(pj.CrossEntropy()(logits, labels)), 4)
        0.3133
        >>> of_hidden = pj.CrossEntropy(inputs="hidden", z_loss=1e-4)
        >>> round(float(of_hidden(jnp.ones((1, 1)), logits, labels)), 4)
        0.3134
    """

    inputs: Streamed = option(default="logits", choices=Streamed, kw_only=True)
    z_loss: Numeric = number(default=0.0, valid=NONNEGATIVE, kw_only=True)

    _functions = by_input(
        Streamed, functional.cross_entropy_from_logits, functional.linear_cross_entropy
    )


@config
class KLToTopK(OfClasses):
    r"""The KL divergence from a teacher's likeliest tokens: `pj.kl_to_top_k` as a config.

    Attributes:
        direction, tail: As in `pj.kl_to_top_k`.
        inputs: "logits" of inputs (logits, ids, log_q), and log_rest if it is known, or "hidden"
            for `pj.linear_kl_to_top_k`, of (hidden, kernel, ids, log_q), and bias and log_rest if
            there are any: None stands for a bias that there is not.
        temperature, softcap, block_size, class_axis_name, weights, reduction, axis_name: As in
            `pj.KLDivergence`.

    Examples:
        >>> ids, log_q = jnp.array([[5, 2]]), jnp.log(jnp.full((1, 2), 0.25))
        >>> round(float(pj.KLToTopK("reverse")(jnp.zeros((1, 8)), ids, log_q)), 4)
        0.1438
        >>> of_hidden = pj.KLToTopK("reverse", inputs="hidden")
        >>> round(float(of_hidden(jnp.ones((1, 1)), jnp.zeros((1, 8)), ids, log_q)), 4)
        0.1438
    """

    direction: Direction = option(default="forward", choices=Direction)
    tail: Tail = option(default="bucket", choices=Tail, kw_only=True)
    inputs: Streamed = option(default="logits", choices=Streamed, kw_only=True)

    _functions = by_input(Streamed, functional.kl_to_top_k, functional.linear_kl_to_top_k)
    _optional = ("log_rest",)


@config
class KLEstimate(Reduced):
    """KL(P||Q) estimated from sampled tokens: `pj.kl_estimate` as a config.

    Of inputs (log_p, log_q), and `importance` as a third where another policy sampled.

    Attributes:
        estimator, gradient, log_ratio_clip, reduction, axis_name: As in `pj.kl_estimate`.

    Examples:
        >>> log_p, log_q = jnp.log(jnp.array([0.5, 0.2])), jnp.log(jnp.array([0.25, 0.4]))
        >>> round(float(pj.KLEstimate("k2")(log_p, log_q)), 4)
        0.2402
    """

    estimator: Estimator = option(default="k3", choices=Estimator)
    gradient: EstimateGradient = option(default="own", choices=EstimateGradient, kw_only=True)
    log_ratio_clip: Numeric | None = number(default=None, valid=POSITIVE, kw_only=True)
    reduction: Reduction = option(default="mean", choices=Reduction, kw_only=True)

    _function = staticmethod(functional.kl_estimate)
    of_samples = True
    measured_as = "kl"

    @property
    def takes(self) -> range:
        return range(2, 4)

    def _call(self, function, row, options):
        log_p, log_q, *importance = row
        return function(
            log_p, log_q, **dict(zip(["importance"], importance, strict=False)), **options
        )


def _surprise(log_p, *, maximize, reduction, where, axis_name):
    weight = -1.0 if maximize else 1.0
    return evaluate(jnp.negative, (log_p,), {}, reduction, where, axis_name, weights=weight)


@config
class SampledEntropy(Reduced):
    r"""The mean of $-\log p$ of sampled tokens [..., T], which estimates an entropy.

    Attributes:
        maximize: Whether it is negated.
        reduction, axis_name: As in `pj.kl_estimate`.

    Examples:
        >>> float(pj.SampledEntropy()(jnp.array([-1.0, -2.0])))
        1.5
    """

    maximize: bool = option(default=False)
    reduction: Reduction = option(default="mean", choices=Reduction, kw_only=True)

    _function = staticmethod(_surprise)
    of_samples = True
    measured_as = "entropy"


@config
class Wasserstein(Reduced):
    """The Wasserstein distance over ordered classes: `pj.wasserstein` as a config.

    Attributes:
        positions, order, axis, reduction, axis_name: As in `pj.wasserstein`.

    Examples:
        >>> log_p, log_q = jnp.log(jnp.array([1.0, 0.0])), jnp.log(jnp.array([0.0, 1.0]))
        >>> float(pj.Wasserstein(positions=jnp.array([0.0, 3.0]), order=2)(log_p, log_q))
        9.0
    """

    positions: Numeric | None = number(default=None, valid=ASCENDING, kw_only=True)
    order: float = option(default=1, valid=ORDER, kw_only=True)
    axis: int = option(default=-1, kw_only=True)
    reduction: Reduction = option(default="mean", choices=Reduction, kw_only=True)

    _function = staticmethod(functional.wasserstein)
    _inputs = 2
    measured_as = "wasserstein"

    @property
    def class_axis(self) -> int:
        return self.axis

    def estimate(self) -> Penalty:
        raise not_of_samples(self)


@config
class ZLoss(Reduced):
    """The square of the log-normaliser of logits: `pj.z_loss` as a config.

    Attributes:
        block_size, class_axis_name, weights, reduction, axis_name: As in `pj.z_loss`.

    Examples:
        >>> round(float(pj.ZLoss()(jnp.log(jnp.array([[1.0, 2.0]])))), 4)
        1.2069
    """

    block_size: int | None = option(default=None, valid=AT_LEAST_ONE, kw_only=True)
    class_axis_name: AxisName | None = option(default=None, kw_only=True)
    weights: Numeric = number(default=1.0, valid=FINITE, kw_only=True)
    reduction: Reduction = option(default="mean", choices=Reduction, kw_only=True)

    _function = staticmethod(functional.z_loss)
    measured_as = "z_loss"

    @property
    def class_axis(self) -> int:
        return -1
