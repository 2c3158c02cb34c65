"""The Tinker SDK: an objective as the loss of `TrainingClient.forward_backward_custom`."""

import importlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from penalties_jax.adapters.datum import (
    Arrays,
    Record,
    check_distributions,
    collate,
    explained,
    is_sampled,
    objective_for,
)
from penalties_jax.objective import Objective

SHORTEST = 16


def as_loss(
    objective: Objective,
    *,
    sampled: bool | None = None,
    reference_logprobs: Arrays | None = None,
    reference_field: str | None = None,
    compute_reference: Callable[[Sequence[Record]], Arrays] | None = None,
    grad_norms: bool = False,
) -> Callable[..., tuple[Any, dict[str, float]]]:
    """A loss for `TrainingClient.forward_backward_custom`, whose gradient JAX computes.

    Its program is compiled once for each bucket of shapes: rows and positions are padded to powers
    of two, of which the mask leaves out what is not there.

    Args:
        objective: Terms on "logprobs", "probs", "reference" and `"field/<name>"`, as
            `penalties_jax.adapters.datum.collate` names them.
        sampled: As for `penalties_jax.adapters.datum.measure`.
        reference_logprobs, reference_field, compute_reference: As for
            `penalties_jax.adapters.datum.collate`.
        grad_norms: Whether metrics have the norms of gradients in the log-probabilities too, of
            the loss and of each term under the names of its metrics, as in `"<name>/grad_norm"`
            and `"<name>/weighted/grad_norm"`. It takes a backward pass for each.

    Returns:
        A function of `(data, logprobs_list)`, torch tensors, and optionally `step=` for schedules.
        It returns the total as a torch scalar, and the objective's metrics as floats. Its
        gradient can't be differentiated again.

    Raises:
        TypeError: If `objective` is not a `pj.Objective`.
        KeyError, TypeError, ValueError: The function does, as `collate`, `objective_for` and the
            objective; if a divergence is given classes whose probabilities don't sum to 1, as
            those of the top ones only.

    Examples:
        >>> objective = pj.Objective(
        ...     terms={"kl": pj.Term(pj.KLEstimate(), on=("logprobs", "reference"), weight=0.1)}
        ... )
        >>> loss = pj.adapters.tinker.as_loss(objective, reference_field="reference_logprobs")
        >>> # client.forward_backward_custom(data, loss)
    """
    if not isinstance(objective, Objective):
        raise TypeError(f"as_loss takes a pj.Objective, got {objective!r}")
    read = _read(objective)

    def loss(
        data: Sequence[Record], logprobs_list: Arrays, *, step: ArrayLike | None = None
    ) -> tuple[Any, dict[str, float]]:
        batch = collate(
            data,
            logprobs_list,
            reference_logprobs=reference_logprobs,
            reference_field=reference_field,
            compute_reference=compute_reference,
            rows=_bucket(len(data), 1),
            length=_bucket(max(map(len, logprobs_list), default=1), SHORTEST),
        )
        # A field that no term reads is no part of the program.
        batch = {k: x for k, x in batch.items() if not k.startswith("field/") or read(k)}
        of_samples = is_sampled(batch, None) if sampled is None else sampled
        adapted = objective_for(objective, sampled=of_samples)
        try:
            _check_distributions(adapted, batch)
            (total, metrics), gradient = _value_and_gradient(adapted, batch, step, grad_norms)
        except KeyError as error:
            raise explained(error, batch, data) from error
        gradients = [gradient[i, : len(x)] for i, x in enumerate(logprobs_list)]
        return (
            _as_torch(float(total), gradients, logprobs_list),
            {name: float(value) for name, value in metrics.items()},
        )

    return loss


@partial(jax.jit, static_argnames="grad_norms")
def _value_and_gradient(objective, batch, step, grad_norms):
    logprobs = batch["logprobs"]

    def outputs_of(logprobs):
        return _outputs({**batch, "logprobs": logprobs})

    def total(logprobs):
        return objective(outputs_of(logprobs), step=step)

    (value, metrics), gradient = jax.value_and_grad(total, has_aux=True)(logprobs)
    if grad_norms:
        norms = objective.grad_norms_of(outputs_of, logprobs, step=step)
        metrics |= {f"{name}/grad_norm": norm for name, norm in norms.items()}
    return (value, metrics), gradient


def _outputs(batch):
    return {**batch, "probs": jnp.exp(batch["logprobs"])}


def _check_distributions(objective, batch):
    for term in objective.terms.values():
        if not callable(term.on):
            keys = (term.on,) if isinstance(term.on, str) else term.on
            names = [key for key in keys if key in batch]
            included = partial(lambda where: where(_outputs(batch)), term.where)
            check_distributions(term.penalty, batch, names, included)


def _read(objective):
    """Whether an objective may read a key."""
    terms = objective.terms.values()
    keys = [key for term in terms for key in (term.on, term.where)]
    if objective.loss is not None or any(callable(key) for key in keys):
        return lambda key: True
    names = {name for key in keys if key for name in ((key,) if isinstance(key, str) else key)}
    return names.__contains__


def _bucket(n, smallest):
    return max(smallest, 1 << (n - 1).bit_length())


def _as_torch(total, gradients, logprobs):
    """A scalar in torch's graph, with a gradient that is known."""
    torch = importlib.import_module("torch")
    once_differentiable = importlib.import_module("torch.autograd.function").once_differentiable

    class Known(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *tensors):
            dtype = torch.promote_types(tensors[0].dtype, torch.float32)
            return torch.tensor(total, dtype=dtype, device=tensors[0].device)

        @staticmethod
        @once_differentiable
        def backward(ctx, cotangent):
            return tuple(
                cotangent * torch.tensor(np.asarray(g), dtype=x.dtype, device=x.device)
                for g, x in zip(gradients, logprobs, strict=True)
            )

    return Known.apply(*logprobs)
