"""A learned gate with a target rate, for Flax linen."""

from flax import linen as nn
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from penalties_jax._pytree import in_range
from penalties_jax.controllers import SparsityControl
from penalties_jax.functional.checks import NONNEGATIVE, POSITIVE, UNIT
from penalties_jax.functional.gates import logistic_gate
from penalties_jax.functional.sparsity import Kind
from penalties_jax.linen.losses import at_step, check_plain, record
from penalties_jax.terms import SparsityTarget
from penalties_jax.terms.base import Numeric


class SparsityGate(nn.Module):
    """`pj.nnx.SparsityGate` for linen, with noise from the stream "gate".

    The number of features is that of the input, and it records as `pj.linen.ActivityPenalty` does.

    Attributes:
        target, weight, kind, temperature: As in `pj.nnx.SparsityGate`; so are errors. Numbers, and
            those of schedules, are Python numbers, else it is a TypeError.
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
    weight: Numeric = 0.01
    kind: Kind = "huber"
    temperature: Numeric = 1.0
    deterministic: bool = False

    def __post_init__(self):
        for name, valid in (("target", UNIT), ("weight", NONNEGATIVE), ("temperature", POSITIVE)):
            number = in_range(name, valid)(getattr(self, name))
            check_plain(name, number)
            object.__setattr__(self, name, number)
        SparsityTarget(self.target, self.kind)
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
        key = None if deterministic else self.make_rng("gate")
        mask = logistic_gate(
            logits,
            key,
            temperature=at_step(self, self.temperature, step)
            if temperature is None
            else temperature,
        )
        if not deterministic or self.is_initializing():
            target, weight = control or (self.target, self.weight)
            penalty = SparsityTarget(target, self.kind, from_mask=True)
            record(self, weight * penalty, mask, where, step)
        return mask
