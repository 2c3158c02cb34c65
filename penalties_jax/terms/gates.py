"""Gates as configs, and the penalty of how many are open."""

import dataclasses
from typing import Any

from jax.typing import ArrayLike
from jaxtyping import Array, Float, Real

from penalties_jax import functional
from penalties_jax._pytree import abstract, config, number, option
from penalties_jax.functional.checks import ABOVE_ONE, ANY, AT_LEAST_ONE, BELOW_ZERO, POSITIVE
from penalties_jax.functional.reduction import evaluate
from penalties_jax.terms.base import Config, Numeric
from penalties_jax.terms.reduced import Separable

__all__ = [
    "HardConcreteGate",
    "HardConcreteL0",
    "JumpReLUGate",
    "LogisticGate",
    "TopKGate",
]


@abstract
class Gate(Config):
    """What gates share: a config that makes a mask of logits."""

    def __call__(
        self, logits: Real[ArrayLike, "..."], key: Array | None = None
    ) -> Float[Array, "..."]:
        """The gates of logits.

        Args:
            logits: How worthwhile it is to open each gate, of shape [...].
            key: A JAX random key for a gate with noise; None for none, as in evaluation.

        Returns:
            An array of the shape of `logits`, float32 or wider; 1 is open, 0 closed.

        Raises:
            TypeError: If a hyperparameter still is a schedule.
            ValueError: If an array does not broadcast to the logits.
        """
        self._check_resolved()
        return self._mask(logits, key)

    def _mask(self, logits, key):
        raise NotImplementedError


def check_gate(gate: Any) -> Gate:
    """A gate, or a TypeError."""
    if not isinstance(gate, Gate):
        raise TypeError(f"gate must be a config such as pj.HardConcreteGate(), got {gate!r}")
    return gate


def default_gate(gate: Gate | None, temperature: Numeric | None) -> Gate:
    """What a module gates by: a logistic gate at a temperature, or another that is given."""
    if gate is None:
        return LogisticGate(1.0 if temperature is None else temperature)
    if temperature is not None:
        raise ValueError(f"{gate!r} has a temperature of its own, or none: leave temperature= out")
    return check_gate(gate)


def with_temperature(gate: Gate, temperature: Numeric | None) -> Gate:
    """The gate at another temperature, if one is given; a TypeError if it has none."""
    if temperature is None:
        return gate
    if not hasattr(gate, "temperature"):
        raise TypeError(f"{gate!r} has no temperature")
    return dataclasses.replace(gate, temperature=temperature)


@config
class LogisticGate(Gate):
    """The logistic gate: `pj.logistic_gate` as a config.

    Attributes:
        temperature, hard: As in `pj.logistic_gate`.

    Examples:
        >>> gate = pj.LogisticGate(temperature=pj.anneal(1.0, 0.1, start=0, end=100))
        >>> gate.at(50)(jnp.array([-2.0, 0.5, 3.0])).tolist()
        [0.0, 1.0, 1.0]
    """

    temperature: Numeric = number(default=1.0, valid=POSITIVE)
    hard: bool = option(default=True, kw_only=True)

    def _mask(self, logits, key):
        return functional.logistic_gate(logits, key, temperature=self.temperature, hard=self.hard)


@config
class HardConcreteGate(Gate):
    """The hard concrete gate: `pj.hard_concrete_gate` as a config.

    Attributes:
        temperature: As in `pj.hard_concrete_gate`.
        low, high: The two numbers of its `stretch`.

    Examples:
        >>> pj.HardConcreteGate()(jnp.array([-4.0, 0.0, 4.0])).tolist()
        [0.0, 0.5, 1.0]
    """

    temperature: Numeric = number(default=2 / 3, valid=POSITIVE)
    low: Numeric = number(default=-0.1, valid=BELOW_ZERO, kw_only=True)
    high: Numeric = number(default=1.1, valid=ABOVE_ONE, kw_only=True)

    def _mask(self, logits, key):
        stretch = (self.low, self.high)
        return functional.hard_concrete_gate(
            logits, key, temperature=self.temperature, stretch=stretch
        )


@config
class JumpReLUGate(Gate):
    """The gate of JumpReLU: `pj.step_gate` as a config, without noise.

    x times the gate of x is `pj.jump_relu`, whose derivative in the threshold it estimates too. The
    gate alone has a derivative in the threshold, and none in the logits.

    Attributes:
        threshold, bandwidth: As in `pj.step_gate`.

    Examples:
        >>> pj.JumpReLUGate(threshold=1.0)(jnp.array([0.2, 0.9, 1.1])).tolist()
        [0.0, 0.0, 1.0]
    """

    threshold: Numeric = number(default=0.0, valid=ANY, learned=True)
    bandwidth: Numeric = number(default=1e-3, valid=POSITIVE, kw_only=True)

    def _mask(self, logits, key):
        del key  # no noise
        return functional.step_gate(logits, self.threshold, bandwidth=self.bandwidth)


@config
class TopKGate(Gate):
    """The k gates of largest logits: `pj.top_k_gate` as a config.

    Attributes:
        k, temperature, axis, hard: As in `pj.top_k_gate`.

    Examples:
        >>> pj.TopKGate(2)(jnp.array([0.1, 2.0, -1.0, 0.5])).tolist()
        [0.0, 1.0, 0.0, 1.0]
    """

    k: int = option(valid=AT_LEAST_ONE)
    temperature: Numeric = number(default=1.0, valid=POSITIVE, kw_only=True)
    axis: int = option(default=-1, kw_only=True)
    hard: bool = option(default=True, kw_only=True)

    def _mask(self, logits, key):
        return functional.top_k_gate(
            logits, self.k, key, temperature=self.temperature, axis=self.axis, hard=self.hard
        )


def _probability_open(logits, temperature, low, high):
    return functional.hard_concrete_l0(logits, temperature=temperature, stretch=(low, high))


def _expected_l0(logits, *, temperature, low, high, weights, reduction, where, axis_name):
    parameters = {"temperature": temperature, "low": low, "high": high}
    options = {"reduction": reduction, "where": where, "axis_name": axis_name}
    return evaluate(_probability_open, (logits,), parameters, weights=weights, **options)


@config
class HardConcreteL0(Separable):
    """The expected number of open hard concrete gates: the sum of `pj.hard_concrete_l0`.

    Attributes:
        temperature, low, high: As in `pj.HardConcreteGate`.
        weights, reduction, axis_name: As in `pj.L1`.

    Examples:
        >>> round(float(pj.HardConcreteL0()({"first": jnp.zeros(2), "second": jnp.zeros(1)})), 4)
        2.4955
    """

    temperature: Numeric = number(default=2 / 3, valid=POSITIVE)
    low: Numeric = number(default=-0.1, valid=BELOW_ZERO, kw_only=True)
    high: Numeric = number(default=1.1, valid=ABOVE_ONE, kw_only=True)

    _function = staticmethod(_expected_l0)
