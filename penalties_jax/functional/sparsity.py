"""Rates of skipped work, losses that pull them to a target, and gathering what is computed."""

import operator
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, PyTree, Real, Shaped
from numpy.lib.array_utils import normalize_axis_index

from penalties_jax.functional.checks import (
    NONNEGATIVE,
    POSITIVE,
    UNIT,
    bare,
    check_fits,
    check_same_shape,
    check_where,
    public,
)
from penalties_jax.functional.derivatives import Axis, absolute, elementwise_derivatives
from penalties_jax.functional.divergences.formulas import expm1_minus
from penalties_jax.functional.penalties import huber_loss
from penalties_jax.functional.reduction import (
    AxisName,
    Reduction,
    add_up,
    count,
    evaluate,
    lie_alike,
    promote,
    reduce,
    spread,
)

__all__ = [
    "Active",
    "balanced_loss",
    "gather_active",
    "scatter_active",
    "sparsity_rate",
    "sparsity_target_loss",
    "token_targets",
]

Kind = Literal["l2", "l1", "kl", "huber", "adaptive"]

# That of a Huber loss of a rate, at which gates reach their targets (benchmarks/gates.py).
DEFAULT_WEIGHT = 20.0

# What the kl kind takes for a rate, or a share that is computed, of 0.
FLOOR = 1e-8

# The temperatures beyond which targets are a step, or all alike.
COLDEST, HOTTEST = 1e-9, 1e9


@public
def sparsity_rate(
    mask: PyTree[Shaped[ArrayLike, "..."]],
    *,
    axis: Axis | None = None,
    where: PyTree[Bool[ArrayLike, "..."]] | None = None,
    axis_name: AxisName | None = None,
) -> PyTree[Float[Array, "..."]]:
    r"""The share of skipped work: $s = 1 - \operatorname{mean}(m)$.

    The rate carries the gradient of the mask: $-1 / n$ for each of its n entries.

    Args:
        mask: The $m$, in [0, 1]: 1 is computed, 0 is skipped. Of any real dtype or boolean; an
            array of shape [...], or a pytree of them, such as one for each layer.
        axis: What one rate is taken over: None for all of an array; -1 of [batch, time] for one
            rate an example.
        where: Mask that broadcasts to `mask`, or a pytree of them: entries that exist, such as
            positions that are not padding. Where none does, the rate is 0.
        axis_name: Mapped axes over whose members one rate is taken: that of the global batch.

    Returns:
        A scalar, or an array of the axes that are left, in [0, 1]; for a pytree one of rates.

    Raises:
        ValueError, TypeError: If `where` does not broadcast to `mask`, or is not boolean.

    References:
        Bengio et al. (2015), Conditional computation in neural networks for faster models.

    Examples:
        >>> float(pj.sparsity_rate(jnp.array([1, 0, 0, 1])))
        0.5
    """
    return _sparsity_rate(mask, axis=axis, where=where, axis_name=axis_name)


@partial(jax.jit, static_argnames=("axis", "axis_name"))
def _sparsity_rate(mask, *, axis, where, axis_name):
    def rate(mask, where):
        check_where(where, jnp.shape(mask))
        (skipped,) = promote(1 - promote(mask)[0])
        if where is not None:
            (skipped, where), *_ = lie_alike((skipped, where))
            skipped = jnp.where(where, skipped, 0)
        return reduce(skipped, reduction="mean", where=where, axis_name=axis_name, axis=axis)

    masks, structure = jax.tree.flatten(mask)
    return structure.unflatten(map(rate, masks, spread("where", where, structure)))


@public
def sparsity_target_loss(
    rate: PyTree[Real[ArrayLike, "..."]],
    target: PyTree[ArrayLike],
    *,
    kind: Kind = "l2",
    delta: ArrayLike = 0.1,
    reduction: Reduction = "none",
    where: PyTree[Bool[ArrayLike, "..."]] | None = None,
    axis_name: AxisName | None = None,
) -> PyTree[Float[Array, "..."]]:
    r"""How far rates of skipped work are from their targets.

    With $s$ the rate and $t$ the target:

    - "l2" is $(s - t)^2$ and "l1" $|s - t|$, with gradient 0 at the target;
    - "kl" is $t \ln \frac{t}{s} + (1 - t) \ln \frac{1 - t}{1 - s}$ with $0 \ln 0 = 0$, in nats,
      computed without cancellation. $s$ and $1 - s$ are each taken to be at least 1e-8, and the
      derivative, $(1 - t) / (1 - s) - t / s$, passes through: at a rate of 0 or 1 it is finite,
      and points back to the target. At a rate of exactly 0, which hard gates can have, it is as
      large as $10^8 t$: clip gradients;
    - "huber", or "adaptive", is `pj.huber` of $s - t$.

    Args:
        rate: The $s$, in [0, 1]: an array of shape [...], such as a scalar or one rate for each
            token, or a pytree of them, such as one for each layer.
        target: The $t$, in [0, 1]: an array that broadcasts with `rate`, or a pytree like it. Of a
            pytree of rates it has to broadcast to each of them.
        kind: "l2", "l1", "kl", "huber" or "adaptive".
        delta: The $\delta$ of "huber", above 0.
        reduction: "none" for a loss for each rate, "mean" or "sum" for a scalar over all of them.
        where: Mask that broadcasts to the losses, or a pytree of them.
        axis_name: Mapped axes over whose members to sum or average losses. A rate over the global
            batch comes from `pj.sparsity_rate(..., axis_name=...)`, and needs none here.

    Returns:
        An array of the shape of `rate` and `target` broadcast, in a pytree like `rate`; a scalar
        for "mean" and "sum".

    Raises:
        ValueError, TypeError: As `pj.l1`.

    Examples:
        >>> float(pj.sparsity_target_loss(jnp.array(0.25), 0.75))
        0.25
    """
    POSITIVE.check(delta=delta)
    rates, structure = jax.tree.flatten(rate)

    def loss(rate, target, where):
        UNIT.check(target=target)
        if structure.num_nodes > 1:
            # In a tree, an array is no list of targets for the layers.
            check_fits(jnp.shape(rate), target=target)
        rate, target = jnp.broadcast_arrays(*promote(rate, target))
        parameters = {"delta": delta} if kind in ("huber", "adaptive") else {}
        each = "none" if reduction == "none" else "sum"
        value = evaluate(_FORMULAS[kind], (rate, target), parameters, each, where, axis_name)
        return value, count(rate.shape, where)

    pairs = list(
        map(loss, rates, spread("target", target, structure), spread("where", where, structure))
    )
    losses = [value for value, _ in pairs]
    if reduction == "none":
        return structure.unflatten(losses)
    counts = [included for _, included in pairs]
    return add_up(losses, counts, reduction=reduction, axis_name=axis_name)


@public
def token_targets(
    scores: Real[ArrayLike, "..."],
    mean: ArrayLike,
    *,
    temperature: ArrayLike = 0.25,
    axis: int = -1,
    where: Bool[ArrayLike, "..."] | None = None,
) -> Float[Array, "..."]:
    r"""Targets of single positions, of a given mean, higher where a score is lower.

    Where a score says how difficult a position is, as the entropy of a prediction does, easy
    positions are to be skipped more often. Only the order of scores counts, so that they have no
    units and may be infinite. A share $l_i$ of the positions has a higher score than position i,
    and a share $u_i$ one that is at least as high:

    $$t_i = \frac{C(u_i, m) - C(l_i, m)}{u_i - l_i}, \quad C(u, m) = T \ln\left(1 +
    \frac{(e^{u / T} - 1)(e^{m / T} - 1)}{e^{1 / T} - 1}\right)$$

    $C$ is Frank's copula: convex in $u$, which makes targets rise as scores fall, with slopes in
    [0, 1], and $C(1, m) = m$, to which the sum over positions telescopes. Without ties $t_i$ is a
    sigmoid of $u / T$, averaged over a cell of width $1 / n$. Equal scores have equal targets.

    Targets are constants: no gradient reaches scores, mean or temperature.

    Args:
        scores: How difficult each position is, of shape [..., n] with the positions along `axis`.
            One that is NaN has a target of NaN.
        mean: The $m$, in [0, 1]: the mean of the targets, a number or an array that broadcasts to
            the shape of `scores` without `axis`, such as one for each sequence.
        temperature: The $T$, above 0, of a shape as `mean`'s: towards 0 the easiest $m n$ positions
            have target 1 and the others 0; towards infinity all have $m$.
        axis: What the mean is taken along.
        where: Mask that broadcasts to `scores`: positions that exist. The others have target 0 and
            no part in the mean.

    Returns:
        An array of the shape of `scores`, in [0, 1]: targets for `pj.sparsity_target_loss`.

    Raises:
        ValueError, TypeError: As `pj.l1`; for a mean outside of [0, 1]; if there is no such axis.

    References:
        Frank (1979), On the simultaneous associativity of F(x, y) and x + y - F(x, y).

    Examples:
        >>> entropies = jnp.array([0.1, 2.0, 0.7, 0.1])
        >>> [round(float(target), 2) for target in pj.token_targets(entropies, 0.5)]
        [0.72, 0.19, 0.38, 0.72]
    """
    UNIT.check(mean=mean)
    POSITIVE.check(temperature=temperature)
    shape = jnp.shape(scores)
    axis = normalize_axis_index(axis, len(shape))
    check_fits(shape[:axis] + shape[axis + 1 :], mean=mean, temperature=temperature)
    check_where(where, shape)
    return _token_targets(scores, mean, temperature, where, axis=axis)


@partial(jax.jit, static_argnames="axis")
def _token_targets(scores, mean, temperature, where, *, axis):
    scores, mean, temperature = lax.stop_gradient(promote(scores, mean, temperature))
    where = jnp.broadcast_to(True if where is None else where, scores.shape)
    (scores, where), (mean, temperature), _ = lie_alike(
        (scores, where), (mean, temperature), axis=axis
    )
    rows = (jnp.moveaxis(x, axis, -1) for x in (scores, where))
    targets = _targets_of_rows(*rows, mean, jnp.clip(temperature, COLDEST, HOTTEST))
    return jnp.moveaxis(targets, -1, axis)


@partial(jnp.vectorize, signature="(n),(n),(),()->(n)")
def _targets_of_rows(scores, where, mean, temperature):
    positions = jnp.arange(scores.size)
    scores = jnp.where(where, scores, 0)
    # Difficult ones first, and last those that don't exist.
    absent, easiness, order = lax.sort((~where, -scores, positions), num_keys=2)
    rises = (easiness[1:] != easiness[:-1]) | (absent[1:] != absent[:-1])
    edge = jnp.ones(1, bool)
    begins, ends = jnp.concatenate([edge, rises]), jnp.concatenate([rises, edge])
    lower = lax.cummax(jnp.where(begins, positions, 0))
    upper = lax.cummin(jnp.where(ends, positions + 1, scores.size), reverse=True)
    count = jnp.maximum(jnp.sum(where), 1)
    before, width, after = (
        x.astype(scores.dtype) / count for x in (lower, upper - lower, count - upper)
    )
    targets = _frank_slope(before, width, after, mean, temperature)
    targets = jnp.where(absent, 0, jnp.where(jnp.isnan(easiness), easiness, targets))
    _, targets = lax.sort((order, targets), num_keys=1)
    return targets


def _frank_slope(before, width, after, mean, temperature):
    """The mean slope in u of Frank's copula, between shares: that of sigma(x) over a width of h."""
    h = width / temperature
    rest = 1 - mean
    odds = _log1mexp(mean / temperature) - _log1mexp(rest / temperature)
    start, end = (before - rest) / temperature + odds, (mean - after) / temperature + odds
    # Of sigma and 1 - sigma the smaller, which keeps its digits.
    above = start + end > 0
    start, end = jnp.where(above, -end, start), jnp.where(above, -start, end)
    near = jnp.log1p(lax.logistic(start) * jnp.expm1(jnp.minimum(h, 1)))
    far = jax.nn.softplus(end) - jax.nn.softplus(start)
    slope = jnp.where(h < 1, near, far) / h
    return jnp.where(above, 1 - slope, slope)


def _log1mexp(x):
    """The logarithm of 1 - e^-x."""
    return jnp.log(-jnp.expm1(-x))


@public
def balanced_loss(
    accuracy_loss: Real[ArrayLike, ""],
    sparsity_loss: Real[ArrayLike, ""],
    *,
    accuracy_weight: ArrayLike = 1.0,
    sparsity_weight: ArrayLike = 0.01,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The weighted sum of an accuracy and a sparsity loss, $w_a L_a + w_s L_s$, and its parts.

    Args:
        accuracy_loss, sparsity_loss: The $L_a$ and $L_s$, of shape [].
        accuracy_weight, sparsity_weight: The $w_a$ and $w_s$, at least 0. At weight 0 a loss adds
            exactly 0, whatever it is. A rate is moved where $w_s$ times the slope of the sparsity
            loss is above what a unit of the rate costs in accuracy: at the default, which is the
            usual one in the literature, hardly ever. Begin with 20 for the kind "huber" and with 1
            for "l1".

    Returns:
        The total, and a dict of scalars: "total_loss", "accuracy_loss", "sparsity_loss",
        "accuracy_weight" and "sparsity_weight".

    Raises:
        ValueError: If a weight is a negative number.

    Examples:
        >>> total, parts = pj.balanced_loss(jnp.array(2.0), jnp.array(0.5), sparsity_weight=0.1)
        >>> round(float(total), 4)
        2.05
    """
    NONNEGATIVE.check(accuracy_weight=accuracy_weight, sparsity_weight=sparsity_weight)
    losses = {"accuracy": accuracy_loss, "sparsity": sparsity_loss}
    return _balance(losses, {"accuracy": accuracy_weight, "sparsity": sparsity_weight})


class Active(NamedTuple):
    """Which positions `pj.gather_active` took, and which of its slots are in use.

    Attributes:
        indices: The position of each slot, of shape [*batch, capacity]: ascending, each once.
        mask: Whether the position is among those of `where`; the values of the others are 0.

    Examples:
        >>> x, scores = jnp.arange(4.0), jnp.array([0.1, 0.9, 0.3, 0.8])
        >>> _, active = pj.gather_active(x, scores, 2)
        >>> active.indices.tolist(), active.mask.tolist()
        ([1, 3], [True, True])
    """

    indices: Int[Array, "*batch capacity"]
    mask: Bool[Array, "*batch capacity"]


@public
def gather_active(
    x: Shaped[ArrayLike, "*batch_n_rest"],
    scores: Real[ArrayLike, "*batch n"],
    capacity: int,
    *,
    where: Bool[ArrayLike, "*batch n"] | None = None,
) -> tuple[Shaped[Array, "*batch_capacity_rest"], Active]:
    r"""The `capacity` positions of highest score, in their order: $v_j = x_{i_j}$.

    What follows runs on them alone, and `pj.scatter_active` puts it back: the capacity is static,
    so the work of a program is too. Of equal scores the first are taken, and a score of NaN is
    below all others. Where fewer positions exist than there are slots, the rest of the slots are
    masked, and 0: what runs on them must have a finite derivative there. The gradient flows to `x`
    at the positions taken; scores have none: it is the `gate` of `pj.scatter_active` that teaches
    them.

    Args:
        x: What lies at the positions, of shape [*batch, n, ...].
        scores: How worthwhile each position is, of shape [*batch, n].
        capacity: How many positions of each example to take, an integer from 1 to n.
        where: Which positions may be taken, of the shape of `scores`; all if None.

    Returns:
        The values, of shape [*batch, capacity, ...] and the dtype of `x`, and their `pj.Active`.

    Raises:
        ValueError: If a shape does not fit, or `capacity` is below 1 or above n.
        TypeError: If `where` is not boolean, or `capacity` no integer.

    References:
        Raposo et al. (2024), Mixture-of-depths: dynamically allocating compute in transformer-based
        language models.

    Examples:
        >>> x, scores = jnp.array([1.0, 2.0, 3.0, 4.0]), jnp.array([0.1, 0.9, 0.3, 0.8])
        >>> values, active = pj.gather_active(x, scores, 2)
        >>> pj.scatter_active(10 * values, active, x).tolist()
        [1.0, 20.0, 3.0, 40.0]
    """
    if not jnp.ndim(scores):
        raise ValueError("scores needs positions on its last axis, got shape ()")
    _check_positions(jnp.shape(scores), x=x)
    if where is not None:
        check_where(where, jnp.shape(scores))
        check_same_shape(scores=scores, where=where)
    size = jnp.shape(scores)[-1]
    capacity = operator.index(capacity)
    check_capacity(capacity, size)
    return take_first(x, (scores,), where, capacity=capacity)


@public
def scatter_active(
    values: Shaped[ArrayLike, "*batch_capacity_rest"],
    active: Active,
    like: Shaped[ArrayLike, "*batch_n_rest"],
    *,
    gate: Real[ArrayLike, "*batch n"] | None = None,
) -> Shaped[Array, "*batch_n_rest"]:
    r"""Puts values back where `pj.gather_active` took them from: $l + g (v - l)$ there.

    Everywhere else it is `like` ($l$): what skipped positions pass on, such as the input of a
    layer, or an interpolation. The `gate` carries the gradient of the scores: the gate itself where
    it is straight-through, the score as in mixture of depths. Without it $g = 1$, and scores learn
    nothing.

    Args:
        values: The $v$, of shape [*batch, capacity, ...].
        active: The slots, as `pj.gather_active` returned them.
        like: The $l$, of shape [*batch, n, ...].
        gate: The $g$ of all positions, of shape [*batch, n]; it is read at the active ones.

    Returns:
        An array of the shape of `like`, of the dtype that `values` and `like` promote to.

    Raises:
        ValueError: If a shape does not fit.
        TypeError: If `active` is no `pj.Active`, or with a gate an array is not floating-point.

    References:
        As `pj.gather_active`.

    Examples:
        >>> x, gate = jnp.array([1.0, 2.0, 3.0]), jnp.array([0.0, 0.5, 1.0])
        >>> values, active = pj.gather_active(x, gate, 2)
        >>> pj.scatter_active(-values, active, x, gate=gate).tolist()
        [1.0, 0.0, -3.0]
    """
    if not isinstance(active, Active):
        raise TypeError(f"active must be a pj.Active, as pj.gather_active returns, got {active!r}")
    active = bare(active)
    slots = jnp.shape(active.indices)
    if not slots:
        raise ValueError("active needs slots on its last axis, got shape ()")
    _check_positions(slots, values=values)
    positions = (*slots[:-1], *jnp.shape(like)[len(slots) - 1 : len(slots)])
    _check_positions(positions, like=like)
    expected = positions + jnp.shape(values)[len(slots) :]
    if jnp.shape(like) != expected or slots[-1] > positions[-1]:
        raise ValueError(
            "values and like must have the shapes [*batch, capacity, ...] and [*batch, n, ...], "
            f"got {jnp.shape(values)} and {jnp.shape(like)}"
        )
    if gate is not None:
        if jnp.shape(gate) != positions:
            raise ValueError(f"gate must have the shape {positions}, got {jnp.shape(gate)}")
        for name, x in (("values", values), ("like", like)):
            if not jnp.issubdtype(jnp.result_type(x), jnp.floating):
                raise TypeError(f"with a gate {name} must be floating, got {jnp.result_type(x)}")
    return _scatter_active(values, active, like, gate)


def check_capacity(capacity: int, size: int) -> None:
    """Raises ValueError for a capacity that there are not so many positions for."""
    if not 1 <= capacity <= size:
        raise ValueError(
            f"capacity must be from 1 to the number of positions, {size}, got {capacity}"
        )


def _check_positions(shape, **arrays):
    for name, x in arrays.items():
        if jnp.shape(x)[: len(shape)] != shape:
            raise ValueError(f"{name} must start with the shape {shape}, got {jnp.shape(x)}")


@partial(jax.jit, static_argnames="capacity")
def take_first(
    x: Array, scores: tuple[Array, ...], where: Array | None, *, capacity: int
) -> tuple[Array, Active]:
    """`pj.gather_active` by several scores: by the second where the first are equal, and so on."""
    scores = promote(*lax.stop_gradient(scores))
    exists = jnp.ones(scores[0].shape, bool) if where is None else jnp.asarray(where)
    positions = lax.broadcasted_iota(jnp.int32, exists.shape, exists.ndim - 1)
    x, (scores, exists, positions) = _lie_by_example(x, (scores, exists, positions))
    keys = ~exists, *(jnp.where(exists, -score, 0) for score in scores)
    excluded, *_, positions = lax.sort((*keys, positions), num_keys=len(keys))
    indices, mask = lax.sort((positions[..., :capacity], ~excluded[..., :capacity]), num_keys=1)
    active = Active(indices, mask)
    values = _taken(x, active)
    return jnp.where(_beside(mask, values), values, jnp.zeros_like(values)), active


@jax.jit
def _scatter_active(values, active, like, gate):
    like = jnp.asarray(like, jnp.result_type(values, like))
    (like, values), (active, gate) = _lie_by_example((like, values), (active, gate))
    before = _taken(like, active)
    # Before the gate, whose derivative would else be NaN where an empty slot is.
    after = jnp.where(_beside(active.mask, before), values, before)
    if gate is not None:
        after = between(before, after, _beside(_taken(gate, active), before))
    return _by_example(_put, active, like, after)


def between(before: Array, after: Array, gate: Array) -> Array:
    """What is before at a gate of 0, and after at 1, to the last bit; in the dtype of both."""
    low, high, share = promote(before, after, gate)
    mixed = (1 - share) * low + share * high
    return mixed.astype(jnp.result_type(before, after))


def _lie_by_example(arrays, positions):
    """Has all lie alike on a mesh, but for what lies at a position."""
    axes, rest = (jnp.ndim(jax.tree.leaves(tree)[0]) for tree in (positions, arrays))
    arrays, positions, _ = lie_alike(arrays, positions, axis=tuple(range(axes, rest)))
    return arrays, positions


def _taken(x, active):
    """What lies at the positions of all slots."""
    return _by_example(_take, active, x)


def _by_example(function, active, *arrays):
    """Of each example by itself, so that a sharded batch stays as it is."""
    for _ in active.indices.shape[:-1]:
        function = jax.vmap(function)
    return function(active.indices, *arrays)


def _take(indices, x):
    return x.at[indices].get(mode="promise_in_bounds", unique_indices=True, indices_are_sorted=True)


def _put(indices, x, values):
    at = x.at[indices]
    return at.set(values, mode="promise_in_bounds", unique_indices=True, indices_are_sorted=True)


def _beside(x, values):
    """Of one number a position, beside all that lies there."""
    return x.reshape(*x.shape, *(1,) * (values.ndim - x.ndim))


@jax.jit
def _balance(losses, weights):
    values = promote(*losses.values(), *weights.values())
    losses, weights = (dict(zip(losses, part, strict=True)) for part in (values[:2], values[2:]))
    total = sum(weights[name] * jnp.where(weights[name] != 0, losses[name], 0) for name in losses)
    parts = {f"{name}_loss": loss for name, loss in losses.items()}
    parts |= {f"{name}_weight": weight for name, weight in weights.items()}
    return total, {"total_loss": total, **parts}


def _squared(rate, target):
    return jnp.square(rate - target)


def _absolute(rate, target):
    return absolute(rate - target)


def _huber(rate, target, delta):
    return huber_loss(rate - target, delta)


def _kl_slope_rate(rate, target):
    """(1 - t) / (1 - s) - t / s with both floors, over one denominator so that it is 0 at s = t."""
    skipped, computed = _floored(rate)
    lift, other_lift = skipped - rate, computed - (1 - rate)
    numerator = (rate - target) + lift - target * (lift + other_lift)
    return numerator / (skipped * computed)


def _kl_slope_target(rate, target):
    (skipped, computed), (t, rest) = _floored(rate), _floored(target)
    return jnp.log(t / skipped) - jnp.log(rest / computed)


@elementwise_derivatives(_kl_slope_rate, _kl_slope_target)
def _kl(rate, target):
    skipped, computed = _floored(rate)
    return _kl_term(target, skipped, rate - target) + _kl_term(1 - target, computed, target - rate)


def _kl_term(p, q, difference):
    """The term p ln(p / q) + q - p for q - p = difference, but for a floor under q."""
    change = difference / jnp.where(p > 0, p, 1)
    near = (p > 0) & (jnp.abs(change) < 0.5)
    far = difference - p * jnp.log(q / jnp.where(p > 0, p, 1))
    return jnp.where(near, p * expm1_minus(jnp.log1p(jnp.where(near, change, 0))), far)


def _floored(share):
    return jnp.maximum(share, FLOOR), jnp.maximum(1 - share, FLOOR)


_FORMULAS = {"l2": _squared, "l1": _absolute, "kl": _kl, "huber": _huber, "adaptive": _huber}
