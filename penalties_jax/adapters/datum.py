"""Batches of records: ragged sequences become padded arrays and a mask, which an objective takes.

A record is anything with `loss_fn_inputs`, a mapping from names to arrays, such as the Tinker SDK's
`Datum`. Its log-probabilities are those of sampled tokens, [T], or of all classes, [T, C].
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from penalties_jax.objective import Metrics, Objective, Outputs, pick, pick_inputs
from penalties_jax.terms.base import Penalty
from penalties_jax.terms.reduced import Reduced

__all__ = ["Record", "collate", "is_sampled", "measure", "objective_for", "penalty_for"]

Target = Literal["logprobs", "probs"] | tuple[Literal["field"], str]


class Record(Protocol):
    """What a batch is made of: anything with arrays by name, each [T] or [T, C].

    Examples:
        >>> from types import SimpleNamespace
        >>> record = SimpleNamespace(loss_fn_inputs={"logprobs": jnp.array([-1.0, -0.5])})
    """

    @property
    def loss_fn_inputs(self) -> Mapping[str, Any]:
        """Arrays by name, positions first: of NumPy, JAX, torch, or with a `to_numpy()`."""
        ...


def collate(
    records: Sequence[Record],
    logprobs: Sequence[Any] | None = None,
    *,
    reference_logprobs: Sequence[Any] | None = None,
    reference_field: str | None = None,
    compute_reference: Callable[[Sequence[Record]], Sequence[Any]] | None = None,
    rows: int | None = None,
    length: int | None = None,
) -> dict[str, np.ndarray]:
    """The padded arrays of a batch, by the names under which a `pj.Term` finds them.

    Args:
        records: The batch.
        logprobs: The log-probabilities of each record, [T] of its sampled tokens or [T, C] of all
            classes; None for those in its field "logprobs".
        reference_logprobs: Those of the reference model, in the same shapes.
        reference_field: The name of the field that holds them.
        compute_reference: A function from the records to them.
        rows: How many rows to pad to; the number of records if None.
        length: How many positions to pad to; the longest record's if None.

    Returns:
        "logprobs" [rows, length] or [rows, length, C]; "mask" [rows, length], False where nothing
        is; "reference" like "logprobs" if one is given; `"field/<name>"` for every field of
        numbers that all records have, one entry for each position. Padding is 0.

    Raises:
        KeyError: If a record lacks the field of its log-probabilities or of its reference.
        ValueError: If there are no records, more than one reference is given, lengths differ
            within a record, classes differ within the batch, `rows` or `length` is too small, or
            an integer needs more than 32 bits.

    Examples:
        >>> from types import SimpleNamespace
        >>> records = [SimpleNamespace(loss_fn_inputs={"weights": jnp.ones(n)}) for n in (3, 2)]
        >>> batch = pj.adapters.datum.collate(records, [jnp.zeros(3), jnp.zeros(2)])
        >>> sorted(batch), batch["mask"].astype(int).tolist()
        (['field/weights', 'logprobs', 'mask'], [[1, 1, 1], [1, 1, 0]])
    """
    if not records:
        raise ValueError("a batch needs at least one record")
    if logprobs is None:
        logprobs = _field(records, "logprobs")
    arrays = {"logprobs": _floats("logprobs", records, logprobs)}
    lengths = [len(x) for x in arrays["logprobs"]]
    reference = _reference(records, reference_logprobs, reference_field, compute_reference)
    if reference is not None:
        arrays["reference"] = _floats("the reference", records, reference)
        for i, (x, y) in enumerate(zip(*arrays.values(), strict=True)):
            if x.shape != y.shape:
                raise ValueError(
                    f"record {i}: logprobs of shape {x.shape}, but a reference of shape {y.shape}"
                )
    shared = set.intersection(*(set(record.loss_fn_inputs) for record in records))
    for name in sorted(shared):
        values = [_to_numpy(x) for x in _field(records, name)]
        numbers = all(x.dtype.kind in "biuf" for x in values)
        alike = len({x.shape[1:] for x in values}) == 1
        if numbers and alike and [x.shape[:1] for x in values] == [(n,) for n in lengths]:
            arrays[f"field/{name}"] = values
    rows, length = rows or len(records), length or max(lengths)
    if rows < len(records) or length < max(lengths):
        raise ValueError(
            f"rows={rows} and length={length} are less than the batch's {len(records)} records of "
            f"up to {max(lengths)} positions"
        )
    batch = {name: _pad(name, values, rows, length) for name, values in arrays.items()}
    batch["mask"] = _pad("mask", [np.ones(n, bool) for n in lengths], rows, length)
    return batch


def measure(
    penalty: Reduced,
    records: Sequence[Record],
    logprobs: Sequence[Any] | None = None,
    *,
    target: Target = "logprobs",
    sampled: bool | None = None,
    reference_logprobs: Sequence[Any] | None = None,
    reference_field: str | None = None,
    compute_reference: Callable[[Sequence[Record]], Sequence[Any]] | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    r"""A penalty on a batch of records, and what is usually logged of it.

    Args:
        penalty: `pj.L1()`, `pj.L2()`, `pj.KLDivergence()`, `pj.KLEstimate()` or `pj.Entropy()`. The
            last three are of the log-probabilities.
        records, logprobs, reference_logprobs, reference_field, compute_reference: As for `collate`.
        target: What L1 and L2 are of: "logprobs", "probs", or ("field", name) for a field of the
            records, which has one entry for each position.
        sampled: As for `is_sampled`: a divergence is then estimated, as `penalty_for` says.

    Returns:
        The value by the penalty's own reduction, of shape [], and a flat dict of scalars: of L1
        "l1_raw" (the sum, $\sum_i w_i |x_i|$) and "l1_mean"; of L2 "l2_raw"
        ($\sum_i w_i x_i^2$), "l2_mean" and "l2_max"; of a KL "kl_divergence" (the mean over
        positions), "kl_max" and "kl_min"; of an entropy "entropy", its mean. All are 0 without
        any position.

    Raises:
        KeyError: If a field is not in all records.
        TypeError: If the penalty is none of those.
        ValueError: As `collate` and `penalty_for`; if a KL has no reference, or another target than
            the log-probabilities.

    Examples:
        >>> from types import SimpleNamespace
        >>> record = SimpleNamespace(loss_fn_inputs={"logprobs": jnp.array([-1.0, -3.0])})
        >>> value, metrics = pj.adapters.datum.measure(pj.L1(), [record])
        >>> {name: float(value) for name, value in metrics.items()}
        {'l1_mean': 2.0, 'l1_raw': 4.0}
    """
    kind = penalty.measured_as
    if kind is None:
        raise TypeError(f"expected L1, L2, KLDivergence, KLEstimate or Entropy, got {penalty!r}")
    batch = collate(
        records,
        logprobs,
        reference_logprobs=reference_logprobs,
        reference_field=reference_field,
        compute_reference=compute_reference,
    )
    names = ["logprobs"]
    if kind in ("kl", "entropy") and target != "logprobs":
        raise ValueError(f"{penalty!r} is of the log-probabilities, got target={target!r}")
    if kind == "kl":
        names.append("reference")
        if "reference" not in batch:
            raise ValueError(
                "a KL needs one of reference_logprobs, reference_field and compute_reference"
            )
    elif kind in ("l1", "l2"):
        names = [_name_of(target, batch)]
    adapted = penalty_for(penalty, sampled=is_sampled(batch, sampled))
    return _measure(adapted, [batch[name] for name in names], batch["mask"], kind, target)


def penalty_for(penalty: Penalty, *, sampled: bool) -> Penalty:
    r"""The penalty that estimates a divergence from sampled tokens; others as they are.

    Args:
        penalty: A penalty, or a sum of some.
        sampled: Whether log-probabilities are those of sampled tokens, [..., T]: then
            `pj.KLDivergence()` becomes `pj.KLEstimate()`, and `pj.Entropy()` the mean of $-\log p$,
            which estimates it. As estimates they are to be read: their gradients at fixed tokens
            are not those of the divergence (`pj.kl_estimate`).

    Raises:
        ValueError: For a divergence that such tokens don't tell: a reverse, symmetric or
            Jensen-Shannon one, one with a temperature, or one from logits. For an estimate, where
            log-probabilities are those of all classes.

    Examples:
        >>> type(pj.adapters.datum.penalty_for(pj.KLDivergence(), sampled=True)).__name__
        'KLEstimate'
    """
    if sampled:
        return penalty.estimate()
    for node in penalty.summands:
        if node.of_samples:
            raise ValueError(
                f"{node!r} is of sampled tokens [T], and log-probabilities are those of classes: "
                "use KLDivergence or Entropy, or say sampled=True"
            )
    return penalty


def objective_for(objective: Objective, *, sampled: bool) -> Objective:
    """The objective for a batch of `collate`: of what is there, and of no padding.

    Args:
        objective: Its terms pick their inputs by the names that `collate` gives, and "probs".
            Each leaves out the padding, beside what its own mask leaves out; a mask [..., T] is one
            of positions, and a field that is a mask may hold 0 and 1. The objective's `loss` has to
            leave the padding out itself, by "mask".
        sampled: As for `penalty_for`: whether log-probabilities are [..., T], not [..., T, C].

    Raises:
        ValueError: As `penalty_for`; if a term adds penalties of entries to some of positions.

    Examples:
        >>> objective = pj.Objective(terms={"l1": pj.Term(pj.L1(), on="logprobs")})
        >>> batch = {"logprobs": jnp.array([[-2.0, 9.0]]), "mask": jnp.array([[True, False]])}
        >>> total, _ = pj.adapters.datum.objective_for(objective, sampled=True)(batch)
        >>> float(total)
        2.0
    """

    def adapt(name, term):
        penalty = penalty_for(term.penalty, sampled=sampled)
        positions = {node.class_axis is not None for node in penalty.summands}
        if len(positions) > 1:
            raise ValueError(
                f"term {name!r} adds penalties of entries to penalties of positions: make them two"
            )
        where = _Included(name, term.on, term.where, positions.pop())
        return dataclasses.replace(term, penalty=penalty, where=where)

    terms = {name: adapt(name, term) for name, term in objective.terms.items()}
    return dataclasses.replace(objective, terms=terms)


@dataclasses.dataclass(frozen=True)
class _Included:
    """The mask of a term: what is there of its input, and in a mask of its own. Equal by value."""

    name: str
    on: Any
    where: Any
    of_positions: bool

    def __call__(self, outputs: Outputs) -> Bool[Array, "..."]:
        """The mask."""
        label, mask = f"term {self.name!r}", jnp.asarray(outputs["mask"])
        if not self.of_positions:
            first, *_ = pick_inputs(label, outputs, self.on)
            mask = _with_axes_of(jax.tree.leaves(first)[0], mask)
        if self.where is None:
            return mask
        own = self.where(outputs) if callable(self.where) else pick(label, outputs, self.where)
        return mask & _with_axes_of(mask, jnp.asarray(own) != 0)


def _with_axes_of(x, mask):
    """A mask of positions, with the axes of what is at them."""
    return mask.reshape(*mask.shape, *(1,) * (x.ndim - mask.ndim))


@partial(jax.jit, static_argnames=("kind", "target"))
def _measure(penalty, inputs, mask, kind, target):
    if target == "probs" and kind in ("l1", "l2"):
        inputs = [jnp.exp(x) for x in inputs]
    where = _with_axes_of(inputs[0], mask) if penalty.class_axis is None else mask
    value = penalty(*inputs, where=where)
    values = dataclasses.replace(penalty, reduction="none")(*inputs, where=where)
    total, included = jnp.sum(values), jnp.broadcast_to(where, values.shape)
    mean = total / jnp.maximum(jnp.sum(included), 1)
    largest = jnp.max(values, where=included, initial=-jnp.inf)
    smallest = jnp.min(values, where=included, initial=jnp.inf)
    largest, smallest = (jnp.where(jnp.any(included), x, 0) for x in (largest, smallest))
    return value, {
        "l1": {"l1_raw": total, "l1_mean": mean},
        "l2": {"l2_raw": total, "l2_mean": mean, "l2_max": largest},
        "kl": {"kl_divergence": mean, "kl_max": largest, "kl_min": smallest},
        "entropy": {"entropy": -mean if getattr(penalty, "maximize", False) else mean},
    }[kind]


def _name_of(target, batch):
    name = f"field/{target[1]}" if isinstance(target, tuple) and target[0] == "field" else target
    if name == "probs":
        return "logprobs"
    if name not in batch or name == "mask":
        fields = sorted(key.removeprefix("field/") for key in batch if key.startswith("field/"))
        raise KeyError(
            f"no target {target!r}: there are 'logprobs', 'probs', and ('field', name) for "
            f"fields of all records with an entry for each position, here {fields}"
        )
    return name


def is_sampled(batch: Mapping[str, Any], sampled: bool | None) -> bool:
    """Whether a batch has log-probabilities of sampled tokens; None for what their shape says.

    Args:
        batch: What `collate` returned.
        sampled: True, False, or None: then [rows, T] is sampled, [rows, T, C] has classes.

    Raises:
        KeyError: If it has no "logprobs".
        ValueError: If they should have classes, and are [rows, T].

    Examples:
        >>> pj.adapters.datum.is_sampled({"logprobs": jnp.zeros((2, 3, 50))}, None)
        False
    """
    alone = batch["logprobs"].ndim == 2
    if alone and sampled is False:
        raise ValueError("sampled=False needs log-probabilities [T, C] of classes, got [T]")
    return alone if sampled is None else sampled


def _reference(records, reference_logprobs, reference_field, compute_reference):
    given = [x for x in (reference_logprobs, reference_field, compute_reference) if x is not None]
    if len(given) > 1:
        raise ValueError(
            "give one of reference_logprobs, reference_field and compute_reference, not several"
        )
    if reference_field is not None:
        return _field(records, reference_field)
    return reference_logprobs if compute_reference is None else compute_reference(records)


def _field(records, name):
    for i, record in enumerate(records):
        if name not in record.loss_fn_inputs:
            raise KeyError(
                f"record {i} has no field {name!r} in its loss_fn_inputs, only "
                f"{sorted(record.loss_fn_inputs)}"
            )
    return [record.loss_fn_inputs[name] for record in records]


def _floats(name, records, values):
    arrays = [_to_numpy(x).astype(np.float32) for x in values]
    if len(arrays) != len(records):
        raise ValueError(f"{len(records)} records, but {name} of {len(arrays)}")
    return arrays


def _to_numpy(x):
    """On the host, of one of the kinds of array that a `Record` may hold."""
    if hasattr(x, "to_numpy"):
        x = x.to_numpy()
    elif hasattr(x, "detach"):
        x = x.detach().cpu()
        x = (x.float() if x.is_floating_point() else x).numpy()
    return np.asarray(x)


def _pad(name, arrays, rows, length):
    trailing = {x.shape[1:] for x in arrays}
    if len(trailing) > 1:
        raise ValueError(f"{name}: records differ in their last axes, {sorted(trailing)}")
    kinds = {x.dtype.kind for x in arrays}
    dtype = bool if kinds == {"b"} else np.int32 if kinds <= set("biu") else np.float32
    result = np.zeros((rows, length, *trailing.pop()), dtype)
    for row, x in zip(result, arrays, strict=False):
        row[: len(x)] = x
        if dtype is np.int32 and np.any(row[: len(x)] != x):
            raise ValueError(f"{name}: an integer needs more than 32 bits")
    return result
