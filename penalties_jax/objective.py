"""Named, weighted penalties on the outputs of a model: one total, and what it is made of."""

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PyTree

from penalties_jax._pytree import Pytree, config, has_schedule, number, option, resolve
from penalties_jax.functional.checks import bare, check_where, standard_promotion
from penalties_jax.functional.derivatives import norm
from penalties_jax.functional.reduction import promote
from penalties_jax.terms.averages import Aggregate
from penalties_jax.terms.base import Numeric, Penalty, distinct

__all__ = ["Objective", "Term"]

# What a model returns: a mapping, a dataclass, a NamedTuple, or a module with attributes.
Outputs = Any
Metrics = dict[str, Float[Array, ""]]

# What terms can't be called, and their metrics can't.
TAKEN = ("loss", "total", "penalties")
TAKEN_IN_A_TERM = ("weighted", "weight")


@config
class Term(Pytree):
    """A penalty $f$, what it is applied to, and its weight $w$: $w f(x)$ is its share of a total.

    Attributes:
        penalty: The penalty: a config; anything else is a TypeError.
        on: The key of its input in the outputs, a tuple of keys (one for each input), or a
            function of the outputs that returns the input or a tuple of inputs.
        where: The key of a mask, a function of the outputs that returns one, or None.
        weight: The factor of its value in the total: a number, an array or a schedule. At weight 0
            the term adds exactly 0, whatever its value.
        enabled: False or 0 for a term that counts as one of weight 0; it keeps its weight, and
            its value is still reported.
        aggregate: A `pj.Aggregate`, which averages the penalty's values of positions [batch, time]
            in place of its own reduction: what `where` excludes counts in neither.
        segments: The key of the segment ids, or a function of the outputs that returns them.
        normalizer: The key of a number that comes with the batch, or a function as before: it
            stands for that of `aggregate`, as the count of a global batch of which this is a part.

    Raises:
        TypeError: If the penalty is no config, or a field is of another type.
        ValueError: If `segments` or `normalizer` is there without an `aggregate`, or both it and
            that have a normalizer. In an objective, if `aggregate` meets a penalty without a value
            for each position [batch, time], which names the term.

    Examples:
        >>> term = pj.Term(pj.KLDivergence(), on=("logprobs", "reference"), weight=0.1)
        >>> term.weight
        0.1
        >>> average = pj.Aggregate(sequences="tokens")
        >>> term = pj.Term(pj.L2(), on="x", where="mask", aggregate=average, normalizer="tokens")
        >>> outputs = {"x": jnp.array([[1.0, 3.0]]), "mask": jnp.array([[True, False]])}
        >>> total, _ = pj.Objective(terms={"l2": term})(outputs | {"tokens": jnp.array(4)})
        >>> float(total)
        0.25
    """

    penalty: Penalty
    on: str | tuple[str, ...] | Callable[[Outputs], Any] = option()
    where: str | Callable[[Outputs], Any] | None = option(default=None)
    weight: Numeric = number(default=1.0, single=True)
    enabled: ArrayLike = number(default=1.0, single=True)
    aggregate: Aggregate | None = dataclasses.field(default=None, kw_only=True)
    segments: str | Callable[[Outputs], Any] | None = option(default=None, kw_only=True)
    normalizer: str | Callable[[Outputs], Any] | None = option(default=None, kw_only=True)

    def __post_init__(self):
        if not isinstance(self.penalty, Penalty):
            raise TypeError(f"Term.penalty must be a config such as pj.L1(), got {self.penalty!r}")
        super().__post_init__()
        for name in ("segments", "normalizer"):
            key = getattr(self, name)
            if key is not None and self.aggregate is None:
                raise ValueError(f"Term.{name} needs Term.aggregate, got {key!r}")
        average = self.aggregate
        if average and average.normalizer is not None and self.normalizer is not None:
            raise ValueError(f"Term.normalizer is {self.normalizer!r}, and its aggregate has one")

    def _weight(self, name):
        weight = jnp.where(self.enabled, self.weight, 0)
        return as_scalar(f"the weight of term {name!r}", weight)

    @standard_promotion()
    def _hyperparameters(self, name: str, step: ArrayLike | None) -> Metrics:
        """The weight and the values of schedules, by name, at a step."""
        weight = promote(resolve(self, step)._weight(name))[0]
        names, values = [], []
        for path, schedule in self.penalty.scheduled():
            names.append(path)
            values.append(jnp.mean(promote(bare(resolve(schedule, step)))[0]))
        names = distinct(names, taken=TAKEN_IN_A_TERM)
        return {"weight": weight} | dict(zip(names, values, strict=True))

    @standard_promotion()
    def _evaluate(self, name: str, outputs: Outputs, step: Any, detail: bool) -> Metrics:
        details = self._hyperparameters(name, step) if detail else {}
        self = resolve(self, step)
        weight = self._weight(name)
        gate = partial(_gate, weight)
        outputs = replace_named(outputs, jax.tree.map(gate, named(outputs)))
        label = f"term {name!r}"
        inputs = pick_inputs(label, outputs, self.on)
        mask = _pick_optional(label, outputs, self.where)
        segment_ids = _pick_optional(label, outputs, self.segments)
        if segment_ids is not None:
            # What padding holds is not for the penalty either.
            check_where(mask, jnp.shape(segment_ids))
            there = segment_ids != 0
            mask = there if mask is None else mask & there
        penalty, average = jax.tree.map(gate, (self.penalty, self.aggregate))
        if average is None:
            value = penalty(*inputs, where=mask)
        else:
            values = _by_position(label, penalty, inputs, mask)
            if self.normalizer is not None:
                normalizer = _pick_optional(label, outputs, self.normalizer)
                average = average._with(normalizer=normalizer)
            value = average(values, where=mask, segment_ids=segment_ids)
        value = check_scalar(label, value)
        counted = jnp.where((weight != 0) | jnp.isfinite(value), value, 0)
        if detail:
            measured = penalty.metrics(*inputs, where=mask)
            names = distinct(measured, taken=("weighted", *details))
            details |= dict(zip(names, measured.values(), strict=True))
        return {name: value, f"{name}/weighted": weight * counted} | under(name, details)


@config
class Objective(Pytree):
    r"""A loss and named penalty terms on the outputs of a model: $L + \sum_k w_k f_k$.

    The loss, the values and weights of terms and the total are scalars; what they pick from the
    outputs has any shape. A pytree: as an argument of a jitted step its numbers may change without
    a new compilation, and a stack of objectives (`pj.stack`) can be mapped over.

    Attributes:
        loss: A function from the outputs to a scalar, or None for none.
        terms: The penalty terms by name. "loss", "total", "penalties" and names with a "/" are
            taken.
        detail: Whether a call measures more than the total needs, if it does not say itself.

    Raises:
        TypeError: If a term is not a `pj.Term`; in `replace`, for an unknown hyperparameter.
        ValueError: If a name is one that is taken; in `replace`, if a value is out of range, or
            several parts of the penalty have such a hyperparameter, which are listed.
        KeyError: Where a method names a term that is not there.

    Examples:
        >>> objective = pj.Objective(
        ...     loss=lambda outputs: jnp.mean((outputs["prediction"] - outputs["target"]) ** 2),
        ...     terms={"l1": pj.Term(pj.L1(), on="hidden", weight=pj.anneal(0, 1, start=0, end=4))},
        ... )
        >>> outputs = {"prediction": jnp.ones(2), "target": jnp.zeros(2), "hidden": jnp.ones(3)}
        >>> total, metrics = jax.jit(objective)(outputs, step=2)
        >>> {name: float(value) for name, value in sorted(metrics.items())}
        {'l1': 3.0, 'l1/weighted': 1.5, 'loss': 1.0, 'total': 2.5}
    """

    loss: Callable[[Outputs], ArrayLike] | None = option(default=None)
    terms: Mapping[str, Term] = dataclasses.field(default_factory=dict)
    detail: bool = option(default=False, kw_only=True)

    def __post_init__(self):
        super().__post_init__()
        for name in self.terms:
            if name in TAKEN or "/" in name:
                raise ValueError(
                    f"a term can't be called {name!r}: {', '.join(map(repr, TAKEN))} and names "
                    "with a '/' stand for other metrics"
                )

    def __call__(
        self, outputs: Outputs, *, step: ArrayLike | None = None, detail: bool | None = None
    ) -> tuple[Float[Array, ""], Metrics]:
        """The total, and what it is made of.

        Args:
            outputs: What the loss and the terms pick their inputs from, by name: a mapping, a
                dataclass, a NamedTuple, or a module with attributes. Properties have names too.
                Functions are given the same.
            step: The optimiser step, for schedules.
            detail: Whether to measure more than the total needs: Python's True or False, which
                changes the program, or None for what the objective has.

        Returns:
            The total, and a flat dict of scalars: "loss" (0 without one), the value of each term
            under its name, its share of the total under `"<name>/weighted"`, and "total".

            With `detail` also "penalties", the sum of the shares; what `hyperparameters` gives;
            and what the `metrics` of each penalty are, as in `"<name>/raw"`. Where a hyperparameter
            has the name of a metric, the metric gets a number: `"<name>/target_2"`.

        Raises:
            KeyError: If an input is missing: names the term, the key and the keys there are.
            TypeError: If a schedule needs the `step` and there is none, or the outputs have no
                names.
            ValueError: If the loss, a term or its weight is not a scalar.
        """
        _check_not_a_count(outputs)
        metrics = self._metrics(outputs, step, self.detail if detail is None else detail)
        return metrics["total"], metrics

    def hyperparameters(self, step: ArrayLike | None = None) -> Metrics:
        """What changes with the step, as scalars by name.

        Args:
            step: As in a call; so are errors.

        Returns:
            The weight of each term under `"<name>/weight"`, 0 if it is disabled, and the value of
            each hyperparameter of a penalty that is a schedule: `"<name>/gamma"`, `"<name>/scale"`
            of a multiple, and in a sum under the name that the part has among the metrics,
            `"<name>/smoothl0/gamma"`. Of arrays it is the mean. A pytree of schedules has one for
            each, `"<name>/weights/kernel"`.

        Examples:
            >>> penalty = pj.SmoothL0(gamma=pj.anneal(1.0, 0.5, start=0, end=4))
            >>> objective = pj.Objective(terms={"l0": pj.Term(penalty, on="x", weight=0.5)})
            >>> {name: float(value) for name, value in objective.hyperparameters(2).items()}
            {'l0/weight': 0.5, 'l0/gamma': 0.75}
        """
        self._check_step(step)
        hyperparameters: Metrics = {}
        for name, term in self.terms.items():
            hyperparameters |= under(name, term._hyperparameters(name, step))
        return hyperparameters

    def grad_norms(
        self, outputs: Outputs, *, wrt: Sequence[str], step: ArrayLike | None = None
    ) -> Metrics:
        """The 2-norms of the gradients of all that a call reports, under the same names.

        To compare terms, take logits or hidden states. With respect to log-probabilities a
        divergence has a part that the softmax before them takes out again: KL(P||Q) has
        p (log p - log q + 1), which is not 0 where P = Q.

        Args:
            outputs, step: As in a call; so are errors.
            wrt: The keys of the outputs to differentiate with respect to, together; at least one.

        Examples:
            >>> objective = pj.Objective(terms={"l2": pj.Term(pj.L2(), on="x", weight=0.5)})
            >>> norms = objective.grad_norms({"x": jnp.array([3.0, 4.0])}, wrt=("x",))
            >>> {name: round(float(norm), 4) for name, norm in sorted(norms.items())}
            {'l2': 10.0, 'l2/weighted': 5.0, 'loss': 0.0, 'total': 5.0}
        """
        keys = (wrt,) if isinstance(wrt, str) else wrt
        if not keys:
            raise ValueError("wrt needs at least one key of the outputs")
        inputs = {key: pick("wrt", outputs, key) for key in keys}
        return self.grad_norms_of(lambda inputs: replace_named(outputs, inputs), inputs, step=step)

    def grad_norms_of(
        self,
        outputs_of: Callable[[Any], Outputs],
        inputs: PyTree,
        *,
        step: ArrayLike | None = None,
    ) -> Metrics:
        """The same with respect to a pytree from which a function makes the outputs.

        Args:
            outputs_of: The function.
            inputs: What it takes.
            step: As in a call.

        Examples:
            >>> objective = pj.Objective(terms={"l2": pj.Term(pj.L2(), on="y", weight=0.5)})
            >>> norms = objective.grad_norms_of(lambda x: {"y": 2 * x}, jnp.array([3.0, 4.0]))
            >>> round(float(norms["total"]), 4)
            20.0
        """
        # A term of weight 0 passes no gradient on, so that its own comes from one of weight 1.
        unweighted = dataclasses.replace(
            self,
            terms={
                name: dataclasses.replace(term, weight=1.0, enabled=1.0)
                for name, term in self.terms.items()
            },
        )

        def gradient_norms(objective, names):
            values, pullback = jax.vjp(
                lambda inputs: objective._metrics(outputs_of(inputs), step), inputs
            )
            for name in names:
                one_hot = {other: jnp.full_like(v, other == name) for other, v in values.items()}
                norms = [
                    norm(promote(leaf)[0])
                    for leaf in jax.tree.leaves(pullback(one_hot))
                    if leaf.dtype != jax.dtypes.float0
                ]
                yield name, norm(jnp.array(promote(*norms)))

        weighted = [f"{name}/weighted" for name in self.terms]
        return {
            **dict(gradient_norms(unweighted, ["loss", *self.terms])),
            **dict(gradient_norms(self, [*weighted, "total"])),
        }

    def _check_step(self, step):
        if step is None and has_schedule(self):
            raise TypeError("the objective holds a schedule: pass step=")

    def _metrics(self, outputs, step, detail=False):
        self._check_step(step)
        loss = 0.0 if self.loss is None else self.loss(outputs)
        metrics = {"loss": check_scalar("the loss", loss)}
        for name, term in self.terms.items():
            metrics |= term._evaluate(name, outputs, step, detail)
        weighted = [metrics[f"{name}/weighted"] for name in self.terms]
        with standard_promotion():
            metrics["total"] = sum(weighted, start=metrics["loss"])
            if detail:
                metrics["penalties"] = sum(weighted, start=jnp.zeros_like(metrics["loss"]))
        return metrics

    def with_weight(self, name: str, weight: Numeric) -> "Objective":
        """The same objective with another weight for one term."""
        return self.replace(name, weight=weight)

    def enable(self, name: str) -> "Objective":
        """The same objective with one term switched on, at the weight it had."""
        return self._with_term(name, enabled=1.0)

    def disable(self, name: str) -> "Objective":
        """The same objective with one term switched off; its value is still reported."""
        return self._with_term(name, enabled=0.0)

    def replace(
        self, name: str, *, weight: Numeric | None = None, **hyperparameters: Any
    ) -> "Objective":
        """The same objective with another weight for one term, or others in its penalty.

        Args:
            name: The term.
            weight: Its weight; None for the one that it has.
            **hyperparameters: Fields of its penalty, or of what that scales or adds up, if one
                part alone has them: `gamma=` of `0.1 * pj.SmoothL0(gamma=1.0) + pj.L1()`.
        """
        changes: dict[str, Any] = {} if weight is None else {"weight": weight}
        if hyperparameters:
            changes["penalty"] = self._term(name).penalty.replace(**hyperparameters)
        return self._with_term(name, **changes)

    def _term(self, name):
        if name not in self.terms:
            raise KeyError(f"no term {name!r}; there are {sorted(self.terms)}")
        return self.terms[name]

    def _with_term(self, name, **changes):
        term = dataclasses.replace(self._term(name), **changes)
        return dataclasses.replace(self, terms={**self.terms, name: term})


def under(name: str, metrics: Metrics) -> Metrics:
    """Metrics by names that begin with another."""
    return {f"{name}/{metric}": value for metric, value in metrics.items()}


@jax.custom_jvp
def _gated(weight, x):
    return x


@_gated.defjvp
def _(primals, tangents):
    weight, x = primals
    return x, jnp.where(weight != 0, tangents[1], 0)


def _gate(weight, x):
    """The identity, which at weight 0 passes no gradient on: not even 0 times inf."""
    array = isinstance(x, (jax.Array, np.ndarray, np.generic))
    return _gated(weight, x) if array and jnp.issubdtype(x.dtype, jnp.floating) else x


def named(outputs: Outputs) -> dict[str, Any]:
    """What outputs hold, by name; a TypeError if they have no names."""
    if dataclasses.is_dataclass(outputs):
        return {field.name: getattr(outputs, field.name) for field in dataclasses.fields(outputs)}
    if isinstance(outputs, Mapping):
        return dict(outputs)
    if hasattr(outputs, "_asdict"):
        return outputs._asdict()
    if isinstance(outputs, (jax.Array, np.ndarray)) or not hasattr(outputs, "__dict__"):
        raise TypeError(
            "outputs must be a mapping, a dataclass, a NamedTuple or a module with attributes, "
            f"got a {type(outputs).__name__}"
        )
    return {name: value for name, value in vars(outputs).items() if not name.startswith("_")}


def _check_not_a_count(outputs):
    """Raises TypeError for what `optax.inject_hyperparams` gives to all that it can call."""
    if isinstance(outputs, jax.Array) and outputs.shape == () and outputs.dtype == jnp.int32:
        raise TypeError(
            "an objective was called as a schedule; in inject_hyperparams, write "
            "optax.inject_hyperparams(pj.add_objective, "
            'static_args=("objective", "forward"))'
        )


def replace_named(outputs: Outputs, values: Mapping[str, Any]) -> Outputs:
    """The same outputs with other values, of a type from which they can be read as before."""
    if hasattr(outputs, "_replace"):
        return outputs._replace(**values)
    # Some dataclasses are mappings too, and a dict has no attributes.
    if isinstance(outputs, Mapping) and not dataclasses.is_dataclass(outputs):
        return {**outputs, **values}
    # Neither a frozen dataclass, nor one that makes its fields itself, nor a module of another
    # trace takes them otherwise. What the original holds is not changed.
    outputs = copy.copy(outputs)
    for name, value in values.items():
        object.__setattr__(outputs, name, value)
    return outputs


def pick(label: str, outputs: Outputs, key: str) -> Any:
    """One of the outputs; a KeyError that names who needs it, the key and the keys there are.

    A property is computed from the others, whose gradients it passes on.
    """
    values = named(outputs)
    if isinstance(getattr(type(outputs), key, None), property):
        return getattr(outputs, key)
    if key not in values:
        raise KeyError(f"{label} needs {key!r}; the outputs have {sorted(values)}")
    return values[key]


def pick_inputs(label: str, outputs: Outputs, on: Any) -> tuple[Any, ...]:
    """The inputs of a term: by a key, by several keys, or by a function of the outputs."""
    if callable(on):
        picked = on(outputs)
        return picked if isinstance(picked, tuple) else (picked,)
    return tuple(pick(label, outputs, key) for key in ((on,) if isinstance(on, str) else on))


def _pick_optional(label, outputs, key) -> Any:
    """What a key stands for, or a function of the outputs returns; None for None."""
    if key is None:
        return None
    return key(outputs) if callable(key) else pick(label, outputs, key)


def _by_position(label, penalty, inputs, mask):
    """The values of a penalty, which have to be [batch, time]; an error names the term."""
    try:
        unreduced = penalty.unreduced()
    except ValueError as error:
        raise ValueError(f"{label} can't be aggregated: {error}") from error
    values = unreduced(*inputs, where=mask)
    if not isinstance(values, jax.Array) or values.ndim != 2:
        raise ValueError(
            f"{label} can't be aggregated: {penalty!r} has values of shape "
            f"{jax.tree.map(jnp.shape, values)}, not one for each position [batch, time]"
        )
    return values


def check_scalar(label: str, value: Any) -> Array:
    """Raises ValueError for what is not a single number; returns it in float32 or wider."""
    return promote(as_scalar(label, value))[0]


def as_scalar(label: str, value: Any) -> Any:
    """As `check_scalar`, of a number that takes the dtype of what it meets."""
    value = bare(value)
    if jax.tree.structure(value) != jax.tree.structure(0) or jnp.ndim(value):
        shapes = jax.tree.map(jnp.shape, value)
        raise ValueError(f"{label} must be a scalar, got {shapes}; reduce it by 'sum' or 'mean'")
    return value
