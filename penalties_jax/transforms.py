"""Penalties on parameters as optax gradient transformations."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array
from optax._src.base import NO_PARAMS_MSG

from penalties_jax.functional.checks import ANY, NONNEGATIVE, bare, standard_promotion
from penalties_jax.functional.reduction import promote
from penalties_jax.terms.base import Numeric, Penalty, check_one_input, is_absent

__all__ = ["add_penalty", "proximal"]

Mask = Any | Callable[[optax.Params], Any]


class PenaltyState(NamedTuple):
    """The number of optimiser steps so far, for schedules."""

    count: Any  # pyright: ignore[reportIncompatibleMethodOverride]


def add_penalty(
    penalty: Penalty, weight: Numeric = 1.0, mask: Mask | None = None
) -> optax.GradientTransformation:
    r"""Adds the gradient of a penalty on the parameters: $u + w \nabla f(\theta)$.

    Before `optax.scale_by_adam` this is the coupled form, as if the penalty were part of the loss;
    after it the decoupled one, as in AdamW. It always comes before the learning rate.
    `pj.L2()` at weight w / 2 is `optax.add_decayed_weights(w)`.

    Args:
        penalty: A config. Its schedules, and that of `weight`, see the number of optimiser steps.
        weight: The $w$: a number, a scalar array of shape [] or a schedule.
        mask: A pytree of booleans like the parameters, or a function that returns one from them;
            as in optax, parameters under False are left alone.

    Returns:
        A transformation that keeps each update's dtype. Parameters that are not floating-point
        are no part of the penalty, and their updates pass through.

    Raises:
        TypeError: If `penalty` is not a config, or compares two inputs.
        ValueError: In `update`, if it is called without parameters.

    References:
        Loshchilov & Hutter (2019), Decoupled weight decay regularization.

    Examples:
        >>> import optax
        >>> optimizer = optax.chain(pj.add_penalty(pj.L1(), weight=0.5), optax.sgd(1.0))
        >>> params = jnp.array([2.0, -2.0, 0.0])
        >>> updates, _ = optimizer.update(jnp.zeros(3), optimizer.init(params), params)
        >>> updates.tolist()
        [-0.5, 0.5, -0.0]
    """
    _check_config(penalty, "add_penalty")
    weight = bare(weight)
    ANY.check(weight=weight)

    def change(updates, params, count):
        resolved, scale = penalty.at(count), _at(weight, count)
        # In float32 at least, so that the weight meets the gradient before it is rounded.
        params = jax.tree.map(lambda p: promote(p)[0], params)
        gradients = jax.grad(lambda params: resolved(params))(params)
        return jax.tree.map(
            lambda u, g: jnp.asarray(promote(u)[0] + scale * g, u.dtype), updates, gradients
        )

    return _transformation(change, mask)


def proximal(
    penalty: Penalty, learning_rate: Numeric, weight: Numeric = 1.0, mask: Mask | None = None
) -> optax.GradientTransformation:
    r"""Turns the step of a chain into a proximal step; comes last in the chain.

    The new parameters are $\operatorname{prox}_{\eta w f}(\theta + u)$, with $\eta$ the learning
    rate, so that L1 gives exact zeros. After plain SGD the fixed point is the minimum of
    loss + w f. After Adam, which rescales each coordinate's gradient but not the penalty's
    step, it is the minimum for a penalty that is rescaled coordinate by coordinate. It belongs
    inside `optax.MultiSteps` and `optax.apply_if_finite`, never around them.

    Args:
        penalty: A config that has a proximal operator.
        learning_rate: The $\eta$ of the step before, at least 0: a number or a schedule.
        weight: The $w$, at least 0: a number, a scalar array of shape [] or a schedule.
        mask: As in `pj.add_penalty`; so are result and errors.

    Raises:
        NotImplementedError: In `update`, if the penalty has no proximal operator.

    References:
        Parikh & Boyd (2014), Proximal algorithms, section 4.2.

    Examples:
        >>> import optax
        >>> optimizer = optax.chain(optax.sgd(1.0), pj.proximal(pj.L1(), 1.0, weight=0.5))
        >>> params = jnp.array([2.0, 0.1])
        >>> updates, _ = optimizer.update(jnp.zeros(2), optimizer.init(params), params)
        >>> optax.apply_updates(params, updates).tolist()
        [1.5, 0.0]
    """
    _check_config(penalty, "proximal")
    learning_rate, weight = bare((learning_rate, weight))
    NONNEGATIVE.check(learning_rate=learning_rate, weight=weight)

    def change(updates, params, count):
        step_size = _at(learning_rate, count) * _at(weight, count)
        moved = jax.tree.map(lambda p, u: sum(promote(p, u)), params, updates)
        nearest = penalty.at(count).prox(moved, step_size)
        return jax.tree.map(lambda z, p: jnp.asarray(z - promote(p)[0], p.dtype), nearest, params)

    return _transformation(change, mask)


def _check_config(penalty, name):
    if not isinstance(penalty, Penalty):
        raise TypeError(
            f"pj.{name} takes a penalty config such as pj.L1(), got {penalty!r}; in "
            f"inject_hyperparams, write optax.inject_hyperparams(pj.{name}, "
            'static_args=("penalty", "mask"))'
        )
    check_one_input(f"pj.{name}", penalty)


def _at(value: Any, count: Array) -> Any:
    return value(count) if callable(value) else value


def _transformation(change, mask):
    """Applies `change(updates, params, count)` to the leaves that are floating-point."""

    def init(params):
        del params
        return PenaltyState(count=jnp.zeros((), jnp.int32))

    @standard_promotion()
    def update(updates, state, params=None):
        if params is None:
            raise ValueError(NO_PARAMS_MSG)
        leaves, structure = jax.tree.flatten(params, is_leaf=is_absent)
        update_leaves = structure.flatten_up_to(updates)
        changes = [
            not is_absent(p) and u is not None and jnp.issubdtype(jnp.result_type(p), jnp.floating)
            for p, u in zip(leaves, update_leaves, strict=True)
        ]

        def select(values):
            pairs = zip(values, changes, strict=True)
            return structure.unflatten(value if changed else None for value, changed in pairs)

        changed = change(select(update_leaves), select(leaves), state.count)
        updates = structure.unflatten(
            u if new is None else new
            for u, new in zip(update_leaves, structure.flatten_up_to(changed), strict=True)
        )
        return updates, PenaltyState(count=optax.safe_increment(state.count))

    transformation = optax.GradientTransformation(init, update)
    return transformation if mask is None else optax.masked(transformation, mask)
