"""The sparse Birman-Krein layer: features of a resolvent, at the positions that are worth it."""

import dataclasses
import itertools

import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from penalties_jax._pytree import in_range
from penalties_jax.functional.checks import NONNEGATIVE, POSITIVE, UNIT, check_same_shape, public
from penalties_jax.functional.gates import logistic_gate
from penalties_jax.functional.reduction import promote
from penalties_jax.functional.sparsity import DEFAULT_WEIGHT, Active, Kind, balanced_loss
from penalties_jax.functional.tridiagonal import resolvent_diagonal
from penalties_jax.nnx.base import field_of, held
from penalties_jax.nnx.experts import MixtureOfExperts
from penalties_jax.nnx.gates import ImportancePredictor
from penalties_jax.nnx.skipping import Compute, Skipping, existing, put_back
from penalties_jax.terms import SparsityTarget
from penalties_jax.terms.base import Numeric

# What the learned potential is clipped to.
LARGEST_POTENTIAL = 3.0
INTERPOLATION_CHANNELS = (2, 16, 16, 2)


class SparseBKCore(nnx.Module):
    """Resolvent features of a potential, computed at some positions and interpolated at others.

    H is tridiagonal with the diagonal $-2 + v_k$, v the potential clipped to [-3, 3], and off
    diagonals 1; the features of position k are the real and the imaginary part of
    $G_{kk} = [(H - i I)^{-1}]_{kk}$ (`pj.resolvent_diagonal`). A position with mask 0 is skipped:
    it drops its couplings to its neighbours, in its own example only, and its features come from
    three convolutions of width 3 over those of the computed positions. The mask carries its
    gradient. With the `pj.Active` of gathered positions the potential is theirs alone, and so is
    the work on the resolvent.

    Args:
        n_seq: The length of the sequences.
        causal: Whether features depend on the positions up to their own only, as in an
            autoregressive model: the resolvent is that of the leading block, and the convolutions
            look back.
        rngs: The random keys of the initial parameters.

    Raises:
        ValueError: If `n_seq` is below 1; in a call, if a shape is not [batch, n_seq], or that of
            the slots.

    Examples:
        >>> from flax import nnx
        >>> core = pj.nnx.SparseBKCore(6, rngs=nnx.Rngs(0))
        >>> nnx.jit(core)(jnp.zeros((2, 6)), jnp.ones((2, 6))).shape
        (2, 6, 2)
    """

    @public
    def __init__(self, n_seq: int, *, causal: bool = False, rngs: nnx.Rngs):
        if n_seq < 1:
            raise ValueError(f"n_seq must be at least 1, got {n_seq}")
        self.n_seq = n_seq
        self.causal = causal
        padding = "CAUSAL" if causal else "SAME"
        self.interpolation = nnx.List(
            [
                nnx.Conv(a, b, kernel_size=(3,), padding=padding, rngs=rngs)
                for a, b in itertools.pairwise(INTERPOLATION_CHANNELS)
            ]
        )

    def __call__(
        self,
        potential: Float[Array, "batch slots"],
        mask: Float[Array, "batch n"],
        active: Active | None = None,
    ) -> Float[Array, "batch n 2"]:
        """The features of all positions.

        Args:
            potential: That of all positions or, with `active`, of the gathered ones.
            mask: 1 for positions to compute, 0 for those to skip.
            active: Which positions are gathered, by `pj.gather_active`; the others are to be 0 in
                the mask.
        """
        slots = self.n_seq if active is None else active.indices.shape[-1]
        for name, x, length in (("potential", potential, slots), ("mask", mask, self.n_seq)):
            if x.ndim != 2 or x.shape[1] != length:
                raise ValueError(f"{name} must have the shape [batch, {length}], got {x.shape}")
        coupled = mask[:, :-1] * mask[:, 1:]
        if active is not None:
            # Two slots beside each other are coupled if their positions are.
            after = active.indices[:, :-1]
            adjacent = active.indices[:, 1:] == after + 1
            coupled = jnp.where(adjacent, jnp.take_along_axis(coupled, after, 1, mode="clip"), 0)
        diagonal = jnp.clip(potential, -LARGEST_POTENTIAL, LARGEST_POTENTIAL) - 2
        resolvent = resolvent_diagonal(diagonal, coupled, causal=self.causal)
        parts = jnp.stack([resolvent.real, resolvent.imag], -1)
        features = put_back(parts, active, jnp.zeros((*mask.shape, 2), parts.dtype), mask)
        interpolated = features
        for i, convolution in enumerate(self.interpolation):
            interpolated = convolution(nnx.relu(interpolated) if i else interpolated)
        return features + (1 - mask[..., None]) * interpolated


class SparseMoEResNetBKLayer(Skipping):
    r"""A mixture-of-experts feed-forward with sparse resolvent features, at a target sparsity.

    The output is $m h + a W \varphi$, with $h$ the mixture of experts of the input, $\varphi$ the
    features of a `pj.nnx.SparseBKCore` whose potential is linear in $h$, a learned scale $a$, and
    the gates $m$: a skipped position has no experts, and features that are interpolated. Of the
    experts those that the router prefers are computed, and weighted by its probabilities (which sum
    to 1 over them if there are several).

    Which positions it computes is decided by an importance predictor and `pj.logistic_gate`, as in
    `pj.nnx.SparsityGate`. The rate of skipped positions, without the noise of training, carries its
    gradient, so the predictor learns from the sparsity loss of the last call and from the accuracy
    loss.

    With `compute="mask"` every position is computed and then masked, which takes as long at every
    rate. With "gather" only `capacity` positions of each example are, those of the most open gates:
    experts, potential and resolvent run on them alone. That many are computed in training, open or
    not, so that closed gates learn too; open ones beyond it are skipped (`"dropped"` of
    `get_sparsity_stats`). In evaluation the gates decide: of four capacities, evenly from that of
    training to `n_seq`, the least is taken that has room for all of them in the fullest example, in
    one program. Which gates there is room for depends on the whole sequence, later positions
    included, of a causal layer too; where there is room for all of them, it does not matter.

    Args:
        d_model: The size of the last axis, at least 2.
        n_seq: The length of the sequences.
        num_experts: How many experts the feed-forward has.
        top_k: How many of them a position uses.
        dropout: The rate of dropout after the experts.
        target_sparsity: The share of positions to skip, in [0, 1].
        sparsity_loss_weight: The weight of the sparsity loss, at least 0; its default is that of
            `pj.nnx.SparsityGate`.
        sparsity_loss_type: Its kind, as in `pj.sparsity_target_loss`.
        causal: As in `pj.nnx.SparseBKCore`.
        temperature: That of the gate's derivative, above 0. It, the target and the weight of the
            sparsity loss are as the numbers of a `pj.nnx.SparsityGate`.
        compute: "mask" or "gather".
        capacity: How many positions of each example "gather" computes, from 1 to `n_seq`; a static
            attribute that can be set, at the price of another program. By default 1.1 times what
            the target leaves at construction, which then has to be a plain number: where a target
            is set later on, set the capacity too.
        rngs: The random keys: of the initial parameters, and the streams "dropout" and "gate".

    Raises:
        ValueError: If a number is out of range, an option is unknown, or a capacity is given to
            "mask".

    References:
        Shazeer et al. (2017), Outrageously large neural networks: the sparsely-gated
        mixture-of-experts layer.

    Examples:
        >>> from flax import nnx
        >>> layer = pj.nnx.SparseMoEResNetBKLayer(8, 16, target_sparsity=0.5, rngs=nnx.Rngs(0))
        >>> nnx.jit(lambda layer, x: layer(x))(layer, jnp.ones((2, 16, 8))).shape
        (2, 16, 8)
    """

    sparsity = held("sparsity")
    target_sparsity = field_of("sparsity", "target", "The share of positions to skip.")
    sparsity_loss_weight = held(
        "sparsity_loss_weight", in_range("sparsity_loss_weight", NONNEGATIVE)
    )
    temperature = held("temperature", in_range("temperature", POSITIVE))

    @public
    def __init__(
        self,
        d_model: int,
        n_seq: int,
        num_experts: int = 4,
        top_k: int = 1,
        dropout: float = 0.1,
        target_sparsity: Numeric = 0.5,
        sparsity_loss_weight: Numeric = DEFAULT_WEIGHT,
        sparsity_loss_type: Kind = "adaptive",
        *,
        causal: bool = False,
        temperature: Numeric = 1.0,
        compute: Compute = "mask",
        capacity: int | None = None,
        rngs: nnx.Rngs,
    ):
        super().__init__(compute, capacity, target_sparsity)
        self.sparsity = SparsityTarget(target_sparsity, sparsity_loss_type)
        self.sparsity_loss_weight = sparsity_loss_weight
        self.temperature = temperature
        self.experts = MixtureOfExperts(d_model, num_experts, top_k, dropout, rngs=rngs)
        self.predictor = ImportancePredictor(d_model, rngs=rngs)
        self.potential = nnx.Linear(d_model, 1, rngs=rngs)
        self.core = SparseBKCore(n_seq, causal=causal, rngs=rngs)
        self.out = nnx.Linear(2, d_model, rngs=rngs)
        self.scale = nnx.Param(jnp.ones((), jnp.float32))
        self._room(n_seq)
        self.rngs = rngs.gate.fork()

    def __call__(
        self,
        x: Float[Array, "batch n d"],
        *,
        where: Bool[Array, "batch n"] | None = None,
        mask: Float[Array, "batch n"] | Bool[Array, "batch n"] | None = None,
        temperature: ArrayLike | None = None,
        capacity: int | None = None,
    ) -> Float[Array, "batch n d"]:
        """The output of the layer; what it skipped is remembered until the next call.

        Args:
            x: The input, of shape [batch, n_seq, d_model]; another is a ValueError.
            where: Which positions exist; the others are skipped, and no part of the rate.
            mask: Which positions to compute, in place of the learned gate: 1, 0 or in between, or
                boolean. All of them make the layer dense.
            temperature: A temperature in place of the layer's own.
            capacity: How many positions to compute, in place of the layer's own choice, in
                evaluation too.
        """
        if x.ndim != 3 or x.shape[1] != self.core.n_seq:
            raise ValueError(f"x must have the shape [batch, {self.core.n_seq}, d], got {x.shape}")
        x = existing(x, where)
        logits = self.predictor(x)
        if mask is None:
            mask, settled = self._gates(logits, temperature)
        else:
            UNIT.check(mask=mask)
            check_same_shape(mask=mask, positions=logits)
            (mask,) = (settled,) = promote(mask)
        return self._compute(self._output, x, mask, settled, logits, where, capacity)

    def _output(self, values, active, mask):
        """The output at all positions, of the input at those that are computed."""
        feed_forward = self.experts(values)
        features = self.core(self.potential(feed_forward)[..., 0], mask, active)
        nothing = jnp.zeros((*mask.shape, feed_forward.shape[-1]), feed_forward.dtype)
        kept = put_back(feed_forward, active, nothing, mask)
        return kept + self.scale[...] * self.out(features)

    def gate(
        self, x: Float[Array, "batch n d"], *, temperature: ArrayLike | None = None
    ) -> Float[Array, "batch n"]:
        """Which positions the layer computes: 1, or skips: 0."""
        return self._gates(self.predictor(x), temperature)[0]

    def _gates(self, logits, temperature):
        """The gates, and what they are without noise."""
        temperature = self._at(self.temperature) if temperature is None else temperature
        settled = logistic_gate(logits, None, temperature=temperature)
        if self.deterministic:
            return settled, settled
        return logistic_gate(logits, self.rngs(), temperature=temperature), settled

    def get_sparsity_loss(self, target_sparsity: ArrayLike | None = None) -> Float[Array, ""]:
        """The sparsity loss of the last call, unweighted; at another target, if one is given."""
        sparsity = self.sparsity
        if target_sparsity is not None:
            sparsity = dataclasses.replace(sparsity, target=target_sparsity)
        return self._at(sparsity)(self.rate[...])

    def get_balanced_loss(
        self,
        accuracy_loss: Float[Array, ""],
        sparsity_weight: ArrayLike | None = None,
        accuracy_weight: ArrayLike = 1.0,
        target_sparsity: ArrayLike | None = None,
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """The accuracy loss with the sparsity loss of the last call, as `pj.balanced_loss`.

        The target and the weight of the sparsity loss are the layer's own if None. The rate and
        the target are among the parts, as "current_sparsity" and "target_sparsity".
        """
        total, parts = balanced_loss(
            accuracy_loss,
            self.get_sparsity_loss(target_sparsity),
            accuracy_weight=accuracy_weight,
            sparsity_weight=(
                self._at(self.sparsity_loss_weight) if sparsity_weight is None else sparsity_weight
            ),
        )
        target = self._target(target_sparsity)
        return total, parts | {"current_sparsity": self.rate[...], "target_sparsity": target}

    def _target(self, target: ArrayLike | None = None):
        return promote(self._at(self.target_sparsity if target is None else target))[0]
