"""Weights of an objective that learn from a validation loss, by its gradient through one update."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from penalties_jax._pytree import has_schedule
from penalties_jax.functional.checks import NONNEGATIVE, let_in_one, standard_promotion
from penalties_jax.functional.reduction import promote
from penalties_jax.objective import Metrics, Objective, Outputs, check_scalar

__all__ = ["hypergradient_step"]


@standard_promotion()
def hypergradient_step(
    objective: Objective,
    forward: Callable[[optax.Params, Any], Outputs],
    optimizer: optax.GradientTransformation,
    params: optax.Params,
    opt_state: optax.OptState,
    batch: Any,
    validation_batch: Any,
    *,
    learning_rate: ArrayLike,
    validation: Callable[[Outputs], ArrayLike] | None = None,
    step: ArrayLike | None = None,
) -> tuple[Objective, Metrics]:
    r"""Moves all weights of an objective so that the next update of the parameters is a better one.

    With $\theta'(w) = \theta + \operatorname{update}(\nabla_\theta F_w(\theta, b))$ the parameters
    after one update of the optimizer, on the total $F_w$ of a batch $b$, and $V(\theta')$ a loss
    on a validation batch, the hypergradient of the weight $w_k$ is

    $$h_k = \frac{\partial}{\partial w_k} V(\theta'(w)), \quad w_k \leftarrow w_k e^{-\eta w_k
    h_k}$$

    After plain SGD of learning rate $\alpha$ it is $-\alpha \nabla V(\theta') \cdot \nabla
    f_k(\theta)$: a weight rises while its penalty pulls the parameters to where the validation
    loss is lower. The step is one of gradient descent on $\ln w_k$: weights keep their sign, and
    one of 0 stays 0. No step changes a weight by more than a factor of e, and a hypergradient that
    is not finite changes none. A weight that is a schedule stays as it is, and so does that of a
    term which is disabled.

    Neither parameters nor optimizer move: call it with those that the next update begins at, in one
    jitted function with that update, whose gradient it shares. It differentiates whatever the
    optimizer does to gradients. A parameter whose gradient is 0, or squares to 0, takes no part,
    since the root in Adam has no derivative there. It looks one step ahead: where the weights
    settle need not be best after many.

    Args:
        objective: The terms, whose weights are scalars of shape [], or of a stack under `jax.vmap`.
        forward: A function from parameters and a batch to the outputs that the objective takes.
        optimizer: What updates the parameters: any of optax that needs no extra arguments.
        params: The $\theta$, a pytree of floating-point arrays.
        opt_state: The optimizer's state.
        batch: The $b$, what `forward` takes.
        validation_batch: As `batch`, of data that it has no part of.
        learning_rate: The $\eta$, at least 0, in units of 1 / V. Hypergradients have the
            optimizer's learning rate as a factor: try $\eta = 1 / (5 \alpha)$ at first.
        validation: A function from outputs to $V$, a scalar; None is the objective's own loss,
            without its terms.
        step: The optimiser step, for schedules, as in a call of the objective.

    Returns:
        The objective with other weights, and a flat dict of scalars: "loss", the $V(\theta')$
        before its weights moved, and `"<name>/hypergradient"` and `"<name>/weight"`, the new one,
        of every weight that is no schedule.

    Raises:
        TypeError: If `objective` is not a `pj.Objective`, or has schedules and no `step` is given.
        ValueError: If there is neither `validation` nor a loss in the objective; if that, or a
            weight, is not a scalar; if `learning_rate` is negative.

    References:
        Luketina et al. (2016), Scalable gradient-based tuning of continuous regularization
        hyperparameters. Kivinen & Warmuth (1997), Exponentiated gradient versus gradient descent.

    Examples:
        >>> import optax
        >>> objective = pj.Objective(
        ...     loss=lambda outputs: (outputs["w"] - outputs["target"]) ** 2,
        ...     terms={"l2": pj.Term(pj.L2(), on="w", weight=0.1)},
        ... )
        >>> forward = lambda w, target: {"w": w, "target": target}
        >>> optimizer, w = optax.sgd(0.1), jnp.array(2.0)
        >>> state = optimizer.init(w)
        >>> after, metrics = pj.hypergradient_step(
        ...     objective, forward, optimizer, w, state, 2.0, 1.0, learning_rate=10.0
        ... )
        >>> round(float(metrics["l2/hypergradient"]), 3), round(float(metrics["l2/weight"]), 3)
        (-0.768, 0.216)
    """
    if not isinstance(objective, Objective):
        raise TypeError(f"hypergradient_step takes a pj.Objective, got {objective!r}")
    validation = objective.loss if validation is None else validation
    if validation is None:
        raise ValueError("the objective has no loss: pass validation=, a function of the outputs")
    learning_rate = let_in_one("learning_rate", learning_rate)
    NONNEGATIVE.check(learning_rate=learning_rate)
    weights = {
        name: promote(term.weight)[0]
        for name, term in objective.terms.items()
        if not has_schedule(term.weight)
    }

    def loss_after(weights):
        def total(params):
            return _with_weights(objective, weights)(forward(params, batch), step=step)[0]

        # A root has no derivative at 0, where small squares go: that would ruin all of them.
        def rooted(g):
            return jnp.where(jnp.abs(g) > jnp.sqrt(jnp.finfo(g.dtype).tiny), g, 0)

        gradients = jax.tree.map(rooted, jax.grad(total)(params))
        updates, _ = optimizer.update(gradients, opt_state, params)
        outputs = forward(optax.apply_updates(params, updates), validation_batch)
        return check_scalar("the validation loss", validation(outputs))

    loss, slopes = jax.value_and_grad(loss_after)(weights)
    moved = {name: _moved(weight, slopes[name], learning_rate) for name, weight in weights.items()}
    metrics = {"loss": loss}
    metrics |= {f"{name}/hypergradient": slope for name, slope in slopes.items()}
    metrics |= {f"{name}/weight": weight for name, weight in moved.items()}
    return _with_weights(objective, moved), metrics


def _with_weights(objective, weights):
    terms = {
        name: term._with(weight=weights.get(name, term.weight))
        for name, term in objective.terms.items()
    }
    return dataclasses.replace(objective, terms=terms)


def _moved(weight, slope, learning_rate):
    change = -promote(learning_rate)[0] * weight * slope
    factor = jnp.exp(jnp.clip(jnp.where(jnp.isfinite(change), change, 0), -1, 1))
    return jnp.asarray(weight * factor, weight.dtype)
