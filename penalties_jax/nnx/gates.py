"""A learned gate with a target rate, for Flax NNX."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from penalties_jax._pytree import in_range
from penalties_jax.controllers import SparsityControl
from penalties_jax.functional.checks import NONNEGATIVE, public
from penalties_jax.functional.reduction import promote
from penalties_jax.functional.sparsity import DEFAULT_WEIGHT, Kind
from penalties_jax.nnx.base import field_of, held
from penalties_jax.nnx.losses import PenaltyValue
from penalties_jax.nnx.skipping import Compute, Skipping, existing, put_back
from penalties_jax.terms import SparsityTarget
from penalties_jax.terms.base import Numeric
from penalties_jax.terms.gates import Gate, check_gate, default_gate, with_temperature


class ImportancePredictor(nnx.Module):
    """A logit for each position, of how worthwhile it is: linear d to d/2, ReLU, linear to 1."""

    def __init__(self, features: int, *, rngs: nnx.Rngs):
        if features < 2:
            raise ValueError(f"features must be at least 2, got {features}")
        self.hidden = nnx.Linear(features, features // 2, rngs=rngs)
        self.out = nnx.Linear(features // 2, 1, rngs=rngs)

    def __call__(self, x: Float[Array, "*positions d"]) -> Float[Array, "*positions"]:
        """The logits of the positions."""
        return self.out(nnx.relu(self.hidden(x)))[..., 0]


class SparsityGate(Skipping):
    r"""A gate for each position, learned, whose rate of closed gates is pulled to a target.

    An importance predictor (linear d to d/2, ReLU, linear to 1) gives logits, and a gate, a
    `pj.LogisticGate()` by default, the mask: with noise in training, without after `model.eval()`.
    Each call in training records `weight * pj.SparsityTarget(target, kind)` of its gates without
    noise, whose rate is that of evaluation, for `pj.nnx.collect_penalties`. With such gates $m$ of
    shape [...] that is $w \, \ell(1 - \operatorname{mean}(m), t)$; the rate is `gate.rate`, which a
    controller may read. Multiply what is to be skipped by the mask, so that the predictor also
    learns which positions matter; or have it computed by `run`, which with `compute="gather"`
    leaves out what is skipped.

    With noise the rate of training is the mean probability of a closed gate; without noise a gate
    is closed where that is above 1/2. The two agree once probabilities are near 0 or 1: a rate of
    0.2 in training, of gates that are all closed with probability 0.2, would be 0 in evaluation.

    With the defaults and Adam, at a rate of 1e-3 to 1e-2 that falls to 0, a target is reached
    within 0.05 on three quite different jobs: benchmarks/gates.py. From 0.1 off the target on they
    pull with 2 a unit of the rate; what skipping costs in accuracy has to be less.

    Args:
        features: The size of the last axis of the input, at least 2.
        target: The share of positions to skip, in [0, 1].
        weight: The weight of the sparsity loss, at least 0.
        kind: The kind of the sparsity loss, as in `pj.sparsity_target_loss`.
        gate: What makes a mask of logits: `pj.LogisticGate`, `pj.HardConcreteGate`, `pj.TopKGate`,
            or `pj.JumpReLUGate`, whose threshold is an `nnx.Param` and all that a mask teaches.
        temperature: That of the default gate's derivative, above 0. It, the target and the weight
            are numbers, arrays or schedules, and attributes that can be set, as the gate is.
            Schedules are read at the step that `pj.nnx.set_step` or `pj.nnx.advance` has set.
        compute, capacity: How `run` computes, as in `pj.nnx.SparseMoEResNetBKLayer`.
        rngs: The random keys: of the initial parameters, and the stream "gate" of the noise.

    Raises:
        ValueError: If a number is out of range, an option is unknown, a gate and a temperature are
            given, or a capacity to "mask".
        TypeError: If `gate` is none.

    Examples:
        >>> from flax import nnx
        >>> gate = pj.nnx.SparsityGate(8, target=0.5, rngs=nnx.Rngs(0))
        >>> mask = gate(jnp.ones((2, 5, 8)))
        >>> mask.shape, bool(jnp.all((mask == 0) | (mask == 1)))
        ((2, 5), True)
        >>> gate = pj.nnx.SparsityGate(8, compute="gather", capacity=2, rngs=nnx.Rngs(0))
        >>> block = nnx.Linear(8, 8, rngs=nnx.Rngs(1))
        >>> gate.run(block, jnp.ones((2, 5, 8))).shape
        (2, 5, 8)
    """

    penalty = held("penalty")
    target = field_of("penalty", "target", "The share of positions to skip.")
    gate = held("gate", check_gate)
    weight = held("weight", in_range("weight", NONNEGATIVE))

    @public
    def __init__(
        self,
        features: int,
        *,
        target: Numeric = 0.5,
        weight: Numeric = DEFAULT_WEIGHT,
        kind: Kind = "huber",
        gate: Gate | None = None,
        temperature: Numeric | None = None,
        compute: Compute = "mask",
        capacity: int | None = None,
        rngs: nnx.Rngs,
    ):
        super().__init__(compute, capacity, target)
        self.penalty = SparsityTarget(target, kind, from_mask=True)
        self.weight = weight
        self.gate = default_gate(gate, temperature)
        self.predictor = ImportancePredictor(features, rngs=rngs)
        self.recorded = PenaltyValue(jnp.zeros((), jnp.float32))
        self.rngs = rngs.gate.fork()

    @property
    def temperature(self) -> Any:
        """That of the gate; an AttributeError if it has none."""
        gate: Any = self.gate
        return gate.temperature

    @temperature.setter
    def temperature(self, temperature: Numeric) -> None:
        self.gate = with_temperature(self.gate, temperature)

    def __call__(
        self,
        x: Float[Array, "*positions d"],
        *,
        where: Bool[Array, "..."] | None = None,
        control: SparsityControl | None = None,
        temperature: ArrayLike | None = None,
        step: ArrayLike | None = None,
    ) -> Float[Array, "*positions"]:
        """The gate of each position: 1 is computed, 0 is skipped.

        Args:
            x: The features of the positions.
            where: Which positions exist; the others are no part of the rate.
            control: A target and a weight in place of the module's own, as a controller gives.
            temperature: A temperature in place of the module's own.
            step: The step for schedules, in place of the module's own.
        """
        logits = self.predictor(existing(x, where))
        mask, settled = self._gates(logits, where, control, temperature, step)
        counted = mask if where is None else jnp.where(where, mask, 0)
        self._measure(settled, counted, counted, where)
        return mask

    def run(
        self,
        function: Callable[[Array], Array],
        x: Float[Array, "*batch n d"],
        *,
        like: Float[Array, "*batch n e"] | None = None,
        where: Bool[Array, "..."] | None = None,
        control: SparsityControl | None = None,
        temperature: ArrayLike | None = None,
        step: ArrayLike | None = None,
        capacity: int | None = None,
    ) -> Float[Array, "*batch n e"]:
        """What a function makes of the positions whose gate is open: $l + m (f(x) - l)$.

        What it skipped is remembered until the next call (`get_sparsity_stats`).

        Args:
            function: What is computed, such as a layer: from [*batch, positions, d] to [*batch,
                positions, e], each position by itself, of all positions or of gathered ones. In
                evaluation it changes no state of its own: call `eval()` of the whole model.
            x: The features of the positions, from which their gates are predicted too.
            like: What skipped positions pass on, the $l$; `x` if None, where e is d.
            where: Which positions exist; the others are skipped, and no part of the rate.
            control, temperature, step: As in a call of the gate.
            capacity: As in a call of a `pj.nnx.SparseMoEResNetBKLayer`.
        """
        if x.ndim < 2:
            raise ValueError(f"x must have the shape [*batch, positions, features], got {x.shape}")
        passed = x if like is None else like
        x = existing(x, where)
        logits = self.predictor(x)
        mask, settled = self._gates(logits, where, control, temperature, step)

        def output(values, active, computed):
            return put_back(function(values), active, passed, computed)

        return self._compute(output, x, mask, settled, logits, where, capacity)

    def _gates(self, logits, where, control, temperature, step):
        """The gates, and what they are without noise, whose loss is recorded in training."""
        gate = self._at(with_temperature(self.gate, temperature), step)
        settled = gate(logits)
        if self.deterministic:
            return settled, settled
        penalty, weight = self.penalty, self.weight
        if control is not None:
            penalty, weight = penalty._with(target=control.target), control.weight
        self.recorded[...] += self._at(weight * penalty, step)(settled, where=where)
        return gate(logits, self.rngs()), settled

    def _target(self):
        return promote(self._at(self.target))[0]
