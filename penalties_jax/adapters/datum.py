"""Batches of records: ragged sequences become padded arrays and a mask, which an objective takes.

A record is anything with `loss_fn_inputs`, a mapping from names to arrays, such as the Tinker SDK's
`Datum`. Its log-probabilities are those of sampled tokens, [T], or of all classes, [T, C].
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PyTree

from penalties_jax.objective import Metrics, Objective, Outputs, pick, pick_inputs
from penalties_jax.terms.base import Penalty

__all__ = ["Record", "collate", "is_sampled", "measure", "objective_for", "penalty_for"]

# One for each record: a sequence of them, or one array.
Arrays = Sequence[Any] | np.ndarray | jax.Array
Target = Literal["logprobs", "probs"] | tuple[Literal["field"], str]

# How far from 1 the probabilities of all classes may sum, in half precision too.
NORMALIZED_WITHIN = 1e-2


@runtime_checkable
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
    logprobs: Arrays | None = None,
    *,
    reference_logprobs: Arrays | None = None,
    reference_field: str | None = None,
    compute_reference: Callable[[Sequence[Record]], Arrays] | None = None,
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
        numbers that all records have, one entry for each position; other fields are left out.
        Padding is 0.

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
        if not _misfit(name, values, lengths):
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
    penalty: Penalty,
    records: Sequence[Record],
    logprobs: Arrays | None = None,
    *,
    target: Target = "logprobs",
    sampled: bool | None = None,
    reference_logprobs: Arrays | None = None,
    reference_field: str | None = None,
    compute_reference: Callable[[Sequence[Record]], Arrays] | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    r"""A penalty on a batch of records, and what is usually logged of it.

    Args:
        penalty: `pj.L1()`, `pj.L2()`, `pj.KLDivergence()`, `pj.KLEstimate()`, `pj.Entropy()`, or
            a multiple of one. The last three are of the log-probabilities.
        records, logprobs, reference_logprobs, reference_field, compute_reference: As for `collate`.
        target: What L1 and L2 are of: "logprobs", "probs", or ("field", name) for a field of the
            records, which has one entry for each position.
        sampled: As for `is_sampled`: a divergence is then estimated, as `penalty_for` says.

    Returns:
        The value by the penalty's own reduction, of shape [], and a flat dict of scalars: of L1
        "l1_raw" (the sum, $\sum_i w_i |x_i|$) and "l1_mean"; of L2 "l2_raw"
        ($\sum_i w_i x_i^2$, without its center and clip), "l2_mean" and "l2_max"; of a KL
        "kl_divergence" (the mean over positions), "kl_max" and "kl_min"; of an entropy "entropy",
        its mean. They are those of the penalty before it is multiplied. All are 0 without any
        position.

    Raises:
        KeyError: If a field is not in all records.
        TypeError: If the penalty is none of those.
        ValueError: As `collate` and `penalty_for`; if a KL has no reference, or another target than
            the log-probabilities; if those of classes don't sum to 1, as of the top ones only.

    Examples:
        >>> from types import SimpleNamespace
        >>> record = SimpleNamespace(loss_fn_inputs={"logprobs": jnp.array([-1.0, -3.0])})
        >>> value, metrics = pj.adapters.datum.measure(pj.L1(), [record])
        >>> {name: float(value) for name, value in metrics.items()}
        {'l1_mean': 2.0, 'l1_raw': 4.0}
    """
    first, *others = penalty.summands
    kind = first.measured_as
    if kind not in LOGGED or any(other != first for other in others):
        raise TypeError(
            "expected L1, L2, KLDivergence, KLEstimate or Entropy, or a multiple of one, got "
            f"{penalty!r}: measure each by itself"
        )
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
        names = [_name_of(target, batch, records)]
    adapted = penalty_for(penalty, sampled=is_sampled(batch, sampled))
    check_distributions(adapted, batch, names, lambda: batch["mask"])
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

            A term on a function keeps its penalty, which is given what the function returns. Of
            entries or positions [rows, T, ...] the padding is left out, of [rows, ...] the rows
            without any position, and of other shapes nothing: inside a row, and where it changes
            the rows, the function leaves the padding out itself, by "mask".
        sampled: As for `penalty_for`: whether log-probabilities are [..., T], not [..., T, C].

    Raises:
        ValueError: As `penalty_for`; if a term adds penalties of entries to some of positions, or
            has one that takes no mask. In a call, if log-probabilities [..., T] should be those of
            classes.

    Examples:
        >>> objective = pj.Objective(terms={"l1": pj.Term(pj.L1(), on="logprobs")})
        >>> batch = {"logprobs": jnp.array([[-2.0, 9.0]]), "mask": jnp.array([[True, False]])}
        >>> total, _ = pj.adapters.datum.objective_for(objective, sampled=True)(batch)
        >>> float(total)
        2.0
    """

    def adapt(name, term):
        own = callable(term.on)
        penalty = term.penalty if own else penalty_for(term.penalty, sampled=sampled)
        axes = {node.class_axis for node in penalty.summands}
        if len(axes) > 1:
            raise ValueError(
                f"term {name!r} adds penalties of entries to penalties of positions: make them two"
            )
        unmasked = [node for node in penalty.summands if not node.takes_where]
        if unmasked and not own:
            raise ValueError(
                f"term {name!r}: {unmasked[0]!r} takes no mask, and would count the padding: "
                "leave it out in a function as on="
            )
        where = term.where if unmasked else _Included(name, term.on, term.where, axes.pop())
        return dataclasses.replace(term, penalty=penalty, where=where)

    terms = {name: adapt(name, term) for name, term in objective.terms.items()}
    return dataclasses.replace(objective, terms=terms)


@dataclasses.dataclass(frozen=True)
class _Included:
    """The mask of a term: what is there of its input, and in a mask of its own. Equal by value."""

    name: str
    on: Any
    where: Any
    class_axis: int | None

    def __call__(self, outputs: Outputs) -> PyTree[Bool[Array, "..."] | None]:
        """The mask, or one for each array of the first input."""
        label, mask = f"term {self.name!r}", jnp.asarray(outputs["mask"])
        own = self.where(outputs) if callable(self.where) else self.where
        own = pick(label, outputs, own) if isinstance(own, str) else own
        first, *_ = pick_inputs(label, outputs, self.on)

        def included(x):
            shape = jnp.shape(x)
            if self.class_axis is not None:
                if not callable(self.on) and len(shape) == mask.ndim:
                    raise ValueError(
                        f"{label}: sampled=False needs log-probabilities [T, C] of classes, got [T]"
                    )
                shape = tuple(n for a, n in enumerate(shape) if a != self.class_axis % len(shape))
            masks = [] if own is None else [jnp.asarray(own) != 0]
            if shape[:2] == mask.shape:
                masks.append(mask)
            elif shape[:1] == mask.shape[:1]:
                masks.append(jnp.any(mask, axis=1))
            ndim = max([len(shape), *(m.ndim for m in masks)])
            masks = [m.reshape(*m.shape, *(1,) * (ndim - m.ndim)) for m in masks]
            return functools.reduce(jnp.logical_and, masks) if masks else None

        return jax.tree.map(included, first)


def _with_axes_of(x, mask):
    """A mask of positions, with the axes of what is at them."""
    return mask.reshape(*mask.shape, *(1,) * (x.ndim - mask.ndim))


# What is logged of each kind, and which of the penalty's own metrics it is.
LOGGED = {
    "l1": {"l1_raw": "raw", "l1_mean": "mean"},
    "l2": {"l2_raw": "raw", "l2_mean": "mean", "l2_max": "max"},
    "kl": {"kl_divergence": "mean", "kl_max": "max", "kl_min": "min"},
    "entropy": {"entropy": "mean"},
}


@functools.partial(jax.jit, static_argnames=("kind", "target"))
def _measure(penalty, inputs, mask, kind, target):
    of_one = penalty.summands[0]
    if target == "probs" and kind in ("l1", "l2"):
        inputs = [jnp.exp(x) for x in inputs]
    where = _with_axes_of(inputs[0], mask) if of_one.class_axis is None else mask
    value = penalty(*inputs, where=where)
    # Those of what a penalty is of, not of what it makes of it.
    plain = {"l2": {"center": None, "clip": None}, "entropy": {"maximize": False}}
    metrics = of_one.replace(**plain.get(kind, {})).metrics(*inputs, where=where)
    return value, {name: metrics[metric] for name, metric in LOGGED[kind].items()}


def check_distributions(
    penalty: Penalty,
    batch: Mapping[str, Any],
    names: Sequence[str],
    included: Callable[[], Any],
) -> None:
    """Raises ValueError for classes whose probabilities don't sum to 1, if a divergence needs it.

    Args:
        penalty: What is applied to those arrays; only a divergence needs it.
        batch: What `collate` returned, which is on the host.
        names: The arrays in it.
        included: Returns the mask of the positions that count.
    """
    if not any(node.of_distributions for node in penalty.summands):
        return
    for name in (name for name in names if batch[name].ndim > 2):
        with np.errstate(over="ignore"):
            sums = np.exp(batch[name]).sum(-1)
        off = batch["mask"] & ~(np.abs(sums - 1) <= NORMALIZED_WITHIN)
        if off.any() and (off := off & np.asarray(included())).any():
            record, position = np.argwhere(off)[0]
            raise ValueError(
                f"record {record}: the probabilities of {name!r} at position {position} sum to "
                f"{sums[record, position]:.3g} over {batch[name].shape[-1]} classes, and a "
                "divergence needs all classes: renormalise them by jax.nn.log_softmax, or say "
                "sampled=True if they are of sampled tokens"
            )


def _name_of(target, batch, records):
    is_field = isinstance(target, tuple) and target[0] == "field"
    name = f"field/{target[1]}" if is_field else str(target)
    if name == "probs":
        return "logprobs"
    if name not in batch or name == "mask":
        fields = sorted(key.removeprefix("field/") for key in batch if key.startswith("field/"))
        field = str(target[1] if isinstance(target, tuple) else target)
        reason = _why_left_out(field, records, batch["mask"].sum(1))
        raise KeyError(
            f"no target {target!r}: there are 'logprobs', 'probs', and ('field', name) for "
            f"fields of all records with an entry for each position, here {fields}"
            f"{reason and f'; {reason}'}"
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


def explained(error: KeyError, batch: Mapping[str, Any], records: Sequence[Record]) -> KeyError:
    """The error for a missing key, and why if it is that of a field that `collate` has left out."""
    names = {name for record in records for name in record.loss_fn_inputs}
    missing = sorted(name for name in names if repr(f"field/{name}") in str(error))
    reasons = [_why_left_out(name, records, batch["mask"].sum(1)) for name in missing]
    return KeyError("; ".join([str(error.args[0]), *filter(None, reasons)]))


def _why_left_out(name, records, lengths):
    having = [name in record.loss_fn_inputs for record in records]
    if not any(having):
        return ""
    if not all(having):
        return f"record {having.index(False)} has no field {name!r}"
    return _misfit(name, [_to_numpy(x) for x in _field(records, name)], lengths)


def _misfit(name, values, lengths):
    """Why the values of a field are no entries of positions; "" if they are."""
    for i, (x, n) in enumerate(zip(values, lengths, strict=False)):
        if x.dtype.kind not in "biuf":
            return f"field {name!r} of record {i} holds no numbers"
        if x.shape[:1] != (n,):
            return f"field {name!r} of record {i} has {_entries(x)} for {n} positions"
        if x.shape[1:] != values[0].shape[1:]:
            shapes = f"{values[0].shape[1:]} in record 0 and {x.shape[1:]} in record {i}"
            return f"field {name!r} has entries of shapes {shapes}"
    return ""


def _entries(x):
    return f"{len(x)} entries" if x.ndim else "a single number"


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
