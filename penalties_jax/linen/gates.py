"""A learned gate with a target rate, for Flax linen."""

from flax import linen as nn
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from penalties_jax.controllers import SparsityControl
from penalties_jax.functional.checks import NONNEGATIVE, POSITIVE
from penalties_jax.functional.gates import logistic_gate
from penalties_jax.functional.sparsity import Kind
from penalties_jax.linen.losses import check_plain, record
from penalties_jax.terms import SparsityTarget


class SparsityGate(nn.Module):
    r"""A gate for each position, learned, whose rate of closed gates is pulled to a target.

    An importance predictor (linear d to d/2, ReLU, linear to 1) gives logits, and
    `pj.logistic_gate` hard gates: with noise from the stream "gate", or without. Each call in
    training records `weight * pj.SparsityTarget(target, kind)` of its gates for
    `collect_penalties`. With gates $m$ of shape [...] that is
    $w \, \ell(1 - \operatorname{mean}(m), t)$. Multiply what is to be skipped by the gate, so that
    the predictor also learns which positions matter.

    With noise the rate of training is the mean probability of a closed gate; without noise a gate
    is closed where that is above 1/2. The two agree once probabilities are near 0 or 1.

    Attributes:
        target: The share of positions to skip, in [0, 1].
        weight: The weight of the sparsity loss, at least 0.
        kind: The kind of the sparsity loss, as in `pj.sparsity_target_loss`.
        temperature: That of the gate's derivative, above 0.
        deterministic: Whether to leave the noise out and record nothing, as in evaluation.

    Raises:
        ValueError: If a number is out of range or `kind` is unknown.
        TypeError: If one is not a Python number.

    References:
        Bengio, Léonard & Courville (2013), Estimating or propagating gradients through stochastic
        neurons for conditional computation.

    Examples:
        >>> gate = pj.linen.SparsityGate(target=0.5)
        >>> x = jnp.ones((2, 5, 8))
        >>> variables = gate.init(jax.random.key(0), x, deterministic=True)
        >>> mask = gate.apply(variables, x, rngs={"gate": jax.random.key(1)})
        >>> mask.shape
        (2, 5)
    """

    target: float = 0.5
    weight: float = 0.01
    kind: Kind = "huber"
    temperature: float = 1.0
    deterministic: bool = False

    def __post_init__(self):
        for name in ("target", "weight", "temperature"):
            check_plain(name, getattr(self, name))
        NONNEGATIVE.check(weight=self.weight)
        POSITIVE.check(temperature=self.temperature)
        SparsityTarget(self.target, self.kind)
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "*positions d"],
        *,
        where: Bool[Array, "*positions"] | None = None,
        control: SparsityControl | None = None,
        temperature: ArrayLike | None = None,
        deterministic: bool | None = None,
    ) -> Float[Array, "*positions"]:
        """The gate of each position: 1 is computed, 0 is skipped.

        Args:
            x: The features of the positions.
            where: Which positions exist; the others are no part of the rate.
            control: A target and a weight in place of the module's own, as a controller gives.
            temperature: A temperature in place of the module's own.
            deterministic: In place of the module's own.
        """
        temperature = self.temperature if temperature is None else temperature
        deterministic = self.deterministic if deterministic is None else deterministic
        if x.shape[-1] < 2:
            raise ValueError(f"x must have at least 2 features, got {x.shape[-1]}")
        hidden = nn.relu(nn.Dense(x.shape[-1] // 2, name="hidden")(x))
        logits = nn.Dense(1, name="out")(hidden)[..., 0]
        key = None if deterministic else self.make_rng("gate")
        mask = logistic_gate(logits, key, temperature=temperature)
        if not deterministic:
            target, weight = control or (self.target, self.weight)
            loss = SparsityTarget(target, self.kind, from_mask=True)
            record(self, lambda: weight * loss(mask, where=where))
        return mask
