"""Depth that depends on the input: a block that is applied until positions halt, and early exit."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, PyTree

from penalties_jax._pytree import in_range
from penalties_jax.functional import (
    entropy_from_logits,
    halting_log_probabilities,
    halting_weights,
)
from penalties_jax.functional.checks import (
    NONNEGATIVE,
    check_classes,
    check_fits,
    check_where,
    public,
)
from penalties_jax.functional.halting import depth_of
from penalties_jax.functional.reduction import lie_alike, promote, reduce, vary_alike
from penalties_jax.nnx.base import Configured, Measurement, held
from penalties_jax.nnx.losses import PenaltyValue
from penalties_jax.objective import check_scalar
from penalties_jax.terms import PonderCost, PonderDivergence
from penalties_jax.terms.base import Numeric


class Steps(NamedTuple):
    """All steps of a `pj.nnx.AdaptiveDepth`.

    Attributes:
        states: What each step gives, steps first.
        weights: What each step of a position counts for, steps last; they sum to 1.
        depth: How many steps a position takes in evaluation, from 1.
    """

    states: Float[Array, "steps *positions d"]
    weights: Float[Array, "*positions steps"]
    depth: Int[Array, "*positions"]


def _of_steps(penalty):
    if not isinstance(penalty, (PonderCost, PonderDivergence)):
        raise TypeError(
            f"AdaptiveDepth.penalty must be a PonderCost or a PonderDivergence, got {penalty!r}"
        )
    return penalty


class AdaptiveDepth(Configured):
    r"""A block that is applied up to `max_depth` times, at each position until it halts.

    After each step a halting unit, linear d to 1, gives each position's logit $z_n$. The penalty
    says what that means:

    - `pj.PonderCost(epsilon)`, adaptive computation time: the output is the mean of the states
      under `pj.halting_weights` of $h_n = \sigma(z_n)$, in training and in evaluation;
    - `pj.PonderDivergence(rate)`, PonderNet: the state of step n is the output with probability
      $p_n$ (`pj.halting_log_probabilities`). In training the output is their mean; to minimise the
      expected loss instead, take each step's from `steps`. In evaluation it is the state at the
      median of n.

    A step computes all positions, also those that have halted, which others may attend to; their
    output stays. In evaluation the steps end when all positions have halted, which changes no
    output. There `lax.while_loop` has no derivative in reverse, and outside of jit is compiled at
    each call.

    Each call in training records the weighted penalty for `pj.nnx.collect_penalties`. The variable
    `depth` is the mean depth of the last call: how many steps its positions take in evaluation.

    Args:
        block: A module or a function from [..., d] to [..., d], whose parameters all steps share.
        max_depth: The most steps, at least 1.
        features: The d.
        penalty: A `pj.PonderCost`, which is the default, or a `pj.PonderDivergence`, whose `inputs`
            make no difference: it is computed from the logits.
        weight: The weight of the penalty, at least 0. It is a number, an array or a schedule, and
            an attribute that can be set, as the penalty is. Schedules are read at the step that
            `pj.nnx.set_step` or `pj.nnx.advance` has set.
        rngs: The random keys of the halting unit's parameters.

    Raises:
        ValueError: If a number is out of range; in a call, if the block gives another shape or
            dtype than it is given.
        TypeError: If the penalty is another.

    References:
        Graves (2016), Adaptive computation time for recurrent neural networks. Dehghani et al.
        (2019), Universal transformers. Banino, Balaguer & Blundell (2021), PonderNet: learning to
        ponder.

    Examples:
        >>> from flax import nnx
        >>> block = nnx.Linear(8, 8, rngs=nnx.Rngs(0))
        >>> layer = pj.nnx.AdaptiveDepth(block, 4, 8, rngs=nnx.Rngs(1))
        >>> y = layer(jnp.ones((2, 5, 8)))
        >>> y.shape, 1 <= float(layer.depth[...]) <= 4
        ((2, 5, 8), True)
        >>> float(pj.nnx.collect_penalties(layer)) > 0
        True
    """

    penalty = held("penalty", _of_steps)
    weight = held("weight", in_range("weight", NONNEGATIVE))

    @public
    def __init__(
        self,
        block: Callable[[Array], Array],
        max_depth: int,
        features: int,
        *,
        penalty: PonderCost | PonderDivergence | None = None,
        weight: Numeric = 0.01,
        rngs: nnx.Rngs,
    ):
        _check_depth(max_depth)
        super().__init__()
        self.block = block
        self.max_depth = max_depth
        self.penalty = PonderCost() if penalty is None else penalty
        self.weight = weight
        self.unit = nnx.Linear(features, 1, rngs=rngs)
        self.recorded = PenaltyValue(jnp.zeros((), jnp.float32))
        self.depth = Measurement.none_yet()

    def __call__(
        self,
        x: Float[Array, "*positions d"],
        *,
        where: Bool[Array, "..."] | None = None,
        step: ArrayLike | None = None,
    ) -> Float[Array, "*positions d"]:
        """The output of each position.

        Args:
            x: The state that the steps begin with.
            where: Which positions exist: the others cost nothing, and no step is made for them.
                What they give means nothing.
            step: The step for schedules, in place of the module's own.
        """
        if self.deterministic:
            return self._until_halted(x, where, step)
        states, weights, _ = self.steps(x, where=where, step=step)
        # A state that counts for nothing may be infinite.
        counted = jnp.where(jnp.moveaxis(weights, -1, 0)[..., None] > 0, states, 0)
        return jnp.einsum("n...d,...n->...d", counted, weights).astype(x.dtype)

    def steps(
        self,
        x: Float[Array, "*positions d"],
        *,
        where: Bool[Array, "..."] | None = None,
        step: ArrayLike | None = None,
    ) -> Steps:
        """All `max_depth` steps, with their weights; records as a call does.

        The expected loss of PonderNet is the sum of the losses of the states, each times its
        weight. Arguments are as in a call.
        """
        states, logits = [], []
        for _ in range(self.max_depth):
            x, logit = self._next(x)
            states.append(x)
            logits.append(logit)
        logits = jnp.stack(logits, -1)
        penalty = self._at(self.penalty, step)
        depth, weights = _halted(penalty, logits)
        if isinstance(penalty, PonderDivergence):
            weights = jnp.exp(halting_log_probabilities(logits))
        if not self.deterministic:
            value = check_scalar("penalty", _value(penalty, logits, where))
            self.recorded[...] += self._at(self.weight, step) * value
        self._measure(depth, where)
        return Steps(jnp.stack(states), weights, depth)

    def _until_halted(self, x, where, step):
        """The output, after as many steps as the last position takes."""
        penalty = self._at(self.penalty, step)
        definition, params, rest = nnx.split(self, nnx.Param, ...)
        steps = jnp.arange(self.max_depth)
        # At a step that is not made nothing halts. Positions lie where the input's do.
        nothing = jnp.full(x.shape[:-1], -jnp.inf, promote(x)[0].dtype)
        _, nothing, _ = lie_alike(x, nothing, axis=-1)
        logits = jnp.broadcast_to(nothing[..., None], (*nothing.shape, self.max_depth))

        def goes_on(carry):
            n, *_, logits, _ = carry
            running = _halted(penalty, logits)[0] > n
            return jnp.any(running if where is None else running & where)

        def advance(carry):
            n, x, y, logits, rest = carry
            module = nnx.merge(definition, params, rest)
            x, logit = module._next(x)
            logits = jnp.where(steps == n, logit[..., None], logits)
            weights = jnp.where(steps == n, _halted(penalty, logits)[1], 0)
            weight = jnp.sum(weights, -1, keepdims=True)
            y = y + jnp.where(weight > 0, weight * x, 0)
            return n + 1, x, y, logits, nnx.state(module, nnx.Not(nnx.Param))

        x, y, logits = vary_alike((x, jnp.zeros_like(promote(x)[0]), logits))
        start = jnp.zeros((), jnp.int32), x, y, logits, rest
        *_, y, logits, rest = lax.while_loop(goes_on, advance, start)
        nnx.update(self, rest)
        self._measure(_halted(penalty, logits)[0], where)
        return y.astype(x.dtype)

    def _next(self, x):
        """The next state, and whether to halt there as a logit."""
        state = self.block(x)
        if (state.shape, state.dtype) != (x.shape, x.dtype):
            raise ValueError(
                f"block must give what it is given, {x.dtype}{list(x.shape)}, "
                f"got {state.dtype}{list(state.shape)}"
            )
        return state, promote(self.unit(state)[..., 0])[0]

    def _measure(self, depth, where):
        depth = depth if where is None else jnp.where(where, depth, 0)
        mean = reduce(promote(depth)[0], reduction="mean", where=where, axis_name=None)
        self.depth[...] = mean.astype(self.depth.dtype)


def _value(penalty, logits, where):
    """What the steps cost, by the logits whatever the penalty is of."""
    if isinstance(penalty, PonderDivergence):
        return penalty._with(inputs="logits")(logits, where=where)
    return penalty(jax.nn.sigmoid(logits), where=where)


def _halted(penalty: Any, logits: Array) -> tuple[Array, Array]:
    """How many steps positions take in evaluation, and the weights of their states there."""
    if isinstance(penalty, PonderCost):
        halting = jax.nn.sigmoid(logits)
        weights = halting_weights(halting, epsilon=penalty.epsilon)
        return depth_of(halting, penalty.epsilon), weights
    depth = depth_of(jnp.exp(halting_log_probabilities(logits)), 0.5)
    return depth, jax.nn.one_hot(depth - 1, logits.shape[-1], dtype=logits.dtype)


class EarlyExit(NamedTuple):
    """Where the elements of a batch left, by `pj.nnx.early_exit`.

    Attributes:
        logits: Those of the exit that each element took.
        depth: How many blocks came before it, from 1.
        exits: How many elements left after each block.
    """

    logits: Float[Array, "*elements C"]
    depth: Int[Array, "*elements"]
    exits: Int[Array, " max_depth"]


@public
def early_exit(
    block: Callable[[Any, Array], Any],
    head: Callable[[Any, Array], Array],
    x: PyTree,
    *,
    max_depth: int,
    threshold: ArrayLike,
    normalize: bool = False,
    where: Bool[ArrayLike, "..."] | None = None,
) -> EarlyExit:
    r"""Runs blocks one after the other, until all elements of a batch are certain enough.

    After each block an element leaves if the entropy of softmax(z), z the logits of the exit, is
    below the threshold; what it left with stays, and after the last block all leave. A
    `lax.while_loop` ends when all have left, so that what is saved is what the last of them does
    not need; it has no derivative in reverse. Not compiled by itself: call it inside of jit.

    Args:
        block: From the state and the index of the block, a traced integer from 0, to the next
            state, of the same shapes. Of one block that is shared `lambda x, i: block(x)`, of
            several `lambda x, i: jax.lax.switch(i, blocks, x)`, of stacked parameters
            `lambda x, i: f(jax.tree.map(lambda p: p[i], params), x)`. It may write nothing.
        head: From a state and the index of its block to logits [..., C], one row an element:
            [batch, C] if examples leave as a whole, [batch, time, C] if tokens do.
        x: The state to begin with: an array, or a pytree of them.
        max_depth: How many blocks there are, at least 1.
        threshold: The entropy below which an element leaves, at least 0, in nats: a number, or one
            for each element. At 0 none leaves early.
        normalize: Whether entropies are divided by ln C, as in `pj.entropy_from_logits`.
        where: Mask of the elements that exist. No block is run for the others, whose logits and
            depth are 0.

    Raises:
        ValueError: If a number is out of range, or an array does not fit.

    References:
        Teerapittayanon, McDanel & Kung (2016), BranchyNet: fast inference via early exiting from
        deep neural networks.

    Examples:
        >>> sharper = lambda x, i: 2 * x
        >>> logits = jnp.array([[8.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
        >>> exit = pj.nnx.early_exit(sharper, lambda x, i: x, logits, max_depth=4, threshold=0.1)
        >>> exit.depth.tolist(), exit.exits.tolist()
        ([1, 2, 4], [1, 1, 0, 1])
        >>> exit.logits.tolist()
        [[16.0, 0.0], [4.0, 0.0], [0.0, 0.0]]
    """
    _check_depth(max_depth)
    NONNEGATIVE.check(threshold=threshold)
    start = jnp.zeros((), jnp.int32)
    first = jax.eval_shape(lambda x, i: head(block(x, i), i), x, start)
    check_classes(logits=first)
    elements = first.shape[:-1]
    check_fits(elements, threshold=threshold)
    check_where(where, elements)

    def waits(depth):
        return depth == 0 if where is None else (depth == 0) & where

    def goes_on(carry):
        return jnp.any(waits(carry[-1]))

    def advance(carry):
        n, x, logits, depth = carry
        x = block(x, n)
        own = head(x, n)
        certain = entropy_from_logits(own, normalize=normalize, reduction="none") < threshold
        leaves = waits(depth) & (certain | (n + 1 == max_depth))
        logits = jnp.where(leaves[..., None], own, logits)
        return n + 1, x, logits, jnp.where(leaves, n + 1, depth)

    nothing = jnp.zeros(first.shape, first.dtype, device=first.sharding)
    depth = jnp.zeros_like(nothing[..., 0], jnp.int32)
    x, nothing, depth = vary_alike((x, nothing, depth))
    carry = start, x, nothing, depth
    *_, logits, depth = lax.while_loop(goes_on, advance, carry)
    left = depth[..., None] == 1 + jnp.arange(max_depth)
    exits = jnp.sum(left, tuple(range(len(elements))), dtype=jnp.int32)
    return EarlyExit(logits, depth, exits)


def _check_depth(max_depth):
    if max_depth < 1:
        raise ValueError(f"max_depth must be at least 1, got {max_depth}")
