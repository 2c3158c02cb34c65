"""A learned gate with a target rate, for Flax linen."""

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from penalties_jax._pytree import checked, in_range, resolve, with_learned
from penalties_jax.controllers import SparsityControl
from penalties_jax.functional.checks import NONNEGATIVE, UNIT
from penalties_jax.functional.sparsity import DEFAULT_WEIGHT, Kind
from penalties_jax.linen.losses import check_plain, record, step_for
from penalties_jax.terms import SparsityTarget
from penalties_jax.terms.base import Numeric
from penalties_jax.terms.gates import Gate, default_gate, with_temperature


class SparsityGate(nn.Module):
    """`pj.nnx.SparsityGate` for linen, with noise from the stream "gate".

    The number of features is that of the input, and it records as `pj.linen.ActivityPenalty` does.

    Attributes:
        target, weight, kind, gate, temperature: As in `pj.nnx.SparsityGate`; so are errors. All
            numbers are Python numbers, else it is a TypeError. A threshold is a parameter.
        deterministic: Whether to leave the noise out and record nothing, as in evaluation.

    Examples:
        >>> gate = pj.linen.SparsityGate(target=0.5)
        >>> x = jnp.ones((2, 5, 8))
        >>> variables = gate.init(jax.random.key(0), x, deterministic=True)
        >>> mask = gate.apply(variables, x, rngs={"gate": jax.random.key(1)})
        >>> mask.shape
        (2, 5)
    """

    target: Numeric = 0.5
    weight: Numeric = DEFAULT_WEIGHT
    kind: Kind = "huber"
    gate: Gate | None = None
    temperature: Numeric | None = None
    deterministic: bool = False

    def __post_init__(self):
        for name, valid in (("target", UNIT), ("weight", NONNEGATIVE)):
            object.__setattr__(self, name, in_range(name, valid)(getattr(self, name)))
            check_plain(name, getattr(self, name))
        check_plain("gate", default_gate(self.gate, self.temperature))
        SparsityTarget(self.target, self.kind)
        checked("deterministic", self.deterministic, bool)
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "*positions d"],
        *,
        where: Bool[Array, "..."] | None = None,
        control: SparsityControl | None = None,
        temperature: ArrayLike | None = None,
        deterministic: bool | None = None,
        step: ArrayLike | None = None,
    ) -> Float[Array, "*positions"]:
        """The gate of each position, as in a call of `pj.nnx.SparsityGate`."""
        deterministic = self.deterministic if deterministic is None else deterministic
        if x.shape[-1] < 2:
            raise ValueError(f"x must have at least 2 features, got {x.shape[-1]}")
        hidden = nn.relu(nn.Dense(x.shape[-1] // 2, name="hidden")(x))
        logits = nn.Dense(1, name="out")(hidden)[..., 0]
        gate = with_temperature(default_gate(self.gate, self.temperature), temperature)
        gate = with_learned(
            gate, lambda name, value: self.param(name, lambda _: jnp.asarray(value))
        )
        step = step_for(self, gate, step)
        gate = resolve(gate, step)
        settled = gate(logits)
        if not deterministic or self.is_initializing():
            target, weight = control or (self.target, self.weight)
            penalty = SparsityTarget(target, self.kind, from_mask=True)
            record(self, weight * penalty, settled, where, step)
        return settled if deterministic else gate(logits, self.make_rng("gate"))
