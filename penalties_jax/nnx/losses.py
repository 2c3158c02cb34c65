"""Objectives, penalties on activations and penalties on parameters, for Flax NNX."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PyTree

from penalties_jax._pytree import checked, in_range
from penalties_jax.functional.checks import ANY
from penalties_jax.nnx.base import Configured, count, held
from penalties_jax.objective import Metrics, Objective, Outputs, check_scalar
from penalties_jax.terms.base import Numeric, Penalty, check_one_input


class PenaltyValue(nnx.Variable[Float[Array, "..."]]):
    r"""What a module has recorded since it was last collected: $\sum w f(x)$ over its calls.

    Of shape [], or [layers] for modules that a scan or a vmap has stacked. An optimizer that is
    made with `wrt=nnx.Param` leaves it alone.

    Examples:
        >>> from flax import nnx
        >>> penalised = pj.nnx.ActivityPenalty(pj.L1())
        >>> _ = penalised(jnp.array([1.0, -3.0]))
        >>> float(nnx.state(penalised, pj.nnx.PenaltyValue)["recorded"][...])
        4.0
    """


class Loss(Configured):
    r"""An objective, $L + \sum_k w_k f_k$, that keeps the step for its schedules.

    A step counts when a call is in training, without `step=`, without `advance=False`, and not
    after `model.eval()`: so a loop that calls it once for each optimiser step need not pass one.
    Where it is called more often, as for each microbatch, set the step (`pj.nnx.set_step`) and pass
    `advance=False`. The step is saved with the module.

    Args:
        objective: A `pj.Objective`, whose value is of shape []. `loss.objective` can be set: other
            numbers are no new program.

    Examples:
        >>> weight = pj.anneal(0.0, 1.0, start=0, end=2)
        >>> term = pj.Term(pj.L1(), on="hidden", weight=weight)
        >>> loss = pj.nnx.Loss(pj.Objective(terms={"l1": term}))
        >>> [float(loss({"hidden": jnp.ones(4)})[0]) for _ in range(3)]
        [0.0, 2.0, 4.0]
        >>> float(loss({"hidden": jnp.ones(4)}, step=1)[0])
        2.0
    """

    objective = held("objective", partial(checked, "objective", annotation=Objective))

    def __init__(self, objective: Objective):
        super().__init__()
        self.objective = objective

    def __call__(
        self,
        outputs: Outputs,
        *,
        step: ArrayLike | None = None,
        advance: bool = True,
        detail: bool | None = None,
    ) -> tuple[Float[Array, ""], Metrics]:
        """The total and its parts; results and errors are as in a call of the objective.

        Args:
            outputs: What the objective picks its inputs from.
            step: The step for schedules, in place of the module's own, which then stays.
            advance: Whether this call is a training step, after which the module's step goes up.
            detail: As in a call of the objective.
        """
        step_now = self.step[...] if step is None else step
        result = self.objective(outputs, step=step_now, detail=detail)
        if step is None and advance and not self.deterministic:
            count(self.step)
        return result


def _of_one_input(penalty):
    check_one_input("ActivityPenalty", penalty)
    return penalty


class ActivityPenalty(Configured):
    """The identity, which records a penalty $w f(x)$ on what passes through, of any shape.

    What is recorded adds up, call by call, until `pj.nnx.collect_penalties` takes it. After
    `model.eval()` nothing is recorded. Schedules are read at the step that `pj.nnx.set_step` or
    `pj.nnx.advance` has set.

    Args:
        penalty: The $f$: a config.
        weight: The $w$: a number, an array or a schedule. Both are attributes that can be set.

    Raises:
        TypeError: If the penalty compares two inputs.

    Examples:
        >>> penalised = pj.nnx.ActivityPenalty(pj.L1(), weight=0.5)
        >>> penalised(jnp.array([1.0, -3.0])).tolist()
        [1.0, -3.0]
        >>> float(pj.nnx.collect_penalties(penalised))
        2.0
    """

    penalty = held("penalty", _of_one_input)
    weight = held("weight", in_range("weight", ANY))

    def __init__(self, penalty: Penalty, weight: Numeric = 1.0):
        super().__init__()
        self.penalty = penalty
        self.weight = weight
        self.recorded = PenaltyValue(jnp.zeros((), jnp.float32))

    def __call__(
        self, x: PyTree, *, where: PyTree | None = None, step: ArrayLike | None = None
    ) -> PyTree:
        """Return `x`, an array or a pytree of them, after recording its penalty.

        Args:
            x, where: As in a call of the penalty; so are errors.
            step: The step for schedules, in place of the module's own.
        """
        if not self.deterministic:
            penalty = self._at(self.weight * self.penalty, step)
            self.recorded[...] += check_scalar("penalty", penalty(x, where=where))
        return x


def collect_penalties(model: nnx.Module) -> Float[Array, ""]:
    r"""Sums what modules have recorded since the last time, $\sum w f(x)$, and clears it.

    Called inside the function that is differentiated, after the model. Layers that a scan or a
    vmap has stacked count one by one, a layer that is called twice counts twice, and a layer that
    is shared counts once for each call. Of shape []; 0 if nothing was recorded.

    Args:
        model: The module that the penalties are in, at any depth.

    Examples:
        >>> from flax import nnx
        >>> model = nnx.Sequential(nnx.relu, pj.nnx.ActivityPenalty(pj.L2()))
        >>> y = model(jnp.array([-1.0, 2.0]))
        >>> float(pj.nnx.collect_penalties(model)), float(pj.nnx.collect_penalties(model))
        (4.0, 0.0)
    """
    total = jnp.zeros((), jnp.float32)
    for _, variable in nnx.iter_graph(model):
        if isinstance(variable, PenaltyValue):
            total = total + jnp.sum(variable[...])
            variable[...] = jnp.zeros_like(variable[...])
    return total


def param_penalty(model: nnx.Module, penalty: Penalty, filter: Any = nnx.Param) -> Float[Array, ""]:
    r"""A penalty on the parameters $\theta_S$ of a model that a filter selects: $f(\theta_S)$.

    Args:
        model: The module; inside `nnx.grad` the gradient goes to its parameters.
        penalty: A config. Result and errors are those of a call of it.
        filter: An NNX filter: a type of variable, `nnx.PathContains("kernel")`, a function of path
            and variable, or a combination by `nnx.All`, `nnx.Any` and `nnx.Not`.

    Raises:
        ValueError: If the filter selects nothing, or if the value is not of shape [].

    Examples:
        >>> from flax import nnx
        >>> model = nnx.Linear(2, 3, kernel_init=nnx.initializers.ones, rngs=nnx.Rngs(0))
        >>> float(pj.nnx.param_penalty(model, pj.L1(), nnx.PathContains("kernel")))
        6.0
    """
    selected = nnx.state(model, filter)
    if not jax.tree.leaves(selected):
        raise ValueError(f"filter selects no parameter of the model, got {filter!r}")
    return check_scalar("penalty", penalty(selected))
