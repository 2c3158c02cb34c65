"""What every penalty can do: be evaluated, resolved at a step, scaled and added."""

import dataclasses
import inspect
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.tree_util import Partial
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PyTree

from penalties_jax._pytree import (
    TYPES,
    Pytree,
    Schedule,
    Tree,
    arrays,
    checked,
    config,
    fields,
    has_schedule,
    is_schedule,
    number,
    option,
    resolve,
)
from penalties_jax.functional.checks import bare, let_in, public, standard_promotion
from penalties_jax.functional.reduction import leaves_by_name

__all__ = ["Penalty"]

# A number, an array or a schedule; or a pytree of them like the input.
Numeric = Any


# Where a proximal operator stands in that of a sum.
FIRST, BETWEEN, LAST = range(3)


class ProximalPart(NamedTuple):
    """What the proximal operator of a sum is made of, for one penalty and one array.

    Attributes:
        operator: The penalty's own, of a point and a step.
        step: The step, with the penalty's weights.
        order: `FIRST`, `BETWEEN` or `LAST`.
        curvature: The second derivative of what is quadratic in step x penalty.
        by_group: Whether the operator acts on groups of entries together.
    """

    operator: Callable[[Any, Any], Array]
    step: Any
    order: int
    curvature: Any
    by_group: bool


class Config(Pytree):
    """The base of what has hyperparameters that depend on the step."""

    def at(self: Tree, step: ArrayLike) -> Tree:
        """The same with every schedule replaced by its value at `step`."""
        return resolve(self, step)

    def _check_resolved(self):
        if has_schedule(self):
            raise TypeError(f"{self!r} holds a schedule: call .at(step) first")


class Penalty(Config):
    """The base of all penalties, and of one of your own that is no sum over single values.

    A subclass is decorated with `pj.config`, has its hyperparameters as fields, and a method
    `value(self, inputs, where)`: from the tuple of inputs, arrays or pytrees, and a mask or None
    to a scalar. For a sum over single values there is `pj.Separable`, for a function without a
    class `pj.Function`.

    Examples:
        >>> @pj.config
        ... class Range(pj.Penalty):
        ...     width: float = pj.number(default=1.0)
        ...
        ...     def value(self, inputs, where):
        ...         (x,) = inputs
        ...         return jnp.maximum(jnp.ptp(x) - self.width, 0)
        >>> float(0.5 * Range(width=2.0)(jnp.array([-1.0, 4.0])))
        1.5
    """

    # NumPy's arrays and scalars leave `array * config` to the config.
    __array_ufunc__ = None

    # How many inputs it takes.
    _inputs: ClassVar[int] = 1
    # Whether it is of log-probabilities of sampled tokens, [..., T], not of classes.
    of_samples: ClassVar[bool] = False
    # Whether it is a user's function.
    of_function: ClassVar[bool] = False
    # The name of its metrics in a log.
    measured_as: ClassVar[str | None] = None

    @property
    def takes(self) -> range:
        """How many inputs it may be given."""
        return range(self._inputs, self._inputs + 1)

    @property
    def class_axis(self) -> int | None:
        """The axis that its values and its mask don't have; None where they are of entries."""
        return None

    @property
    def of_distributions(self) -> bool:
        """Whether it needs log-probabilities of all classes, whose probabilities sum to 1."""
        return False

    @property
    def takes_where(self) -> bool:
        """Whether it can leave out what a mask excludes."""
        return True

    @property
    def has_reduction(self) -> bool:
        """Whether it is a reduction, which can be left out, of values that it has."""
        return False

    @property
    def summands(self) -> tuple["Penalty", ...]:
        """The penalties that it is a sum, or a multiple, of."""
        return (self,)

    def __call__(self, *inputs: PyTree, where: PyTree | None = None) -> PyTree:
        """The penalty on arrays or pytrees of arrays.

        Args:
            *inputs: What is penalised: one pytree, or those that are compared. None and
                `optax.MaskedNode` leaves are skipped.
            where: A mask for every array, or a pytree of masks like the first input.

        Returns:
            A scalar over all arrays; for reduction="none" a pytree of values like the first input.

        Raises:
            TypeError: If a hyperparameter still is a schedule, or inputs are too few or too many.
            ValueError: As the function of the same name; if it takes no `where` and is given one.
        """
        return self._run(_evaluate, inputs, where)

    def metrics(self, *inputs: PyTree, where: PyTree | None = None) -> dict[str, Float[Array, ""]]:
        """What people log of it, by name: scalars that carry no gradient.

        Of a penalty of values, groups or positions "raw", their sum whatever the reduction, and
        "mean", "max" and "min", all over those that `where` includes, with weights, and over the
        global batch with `axis_name`. Each is 0 if there is none. Of one that is a single number
        "raw", which is that number. The docstring of a config says so where it has others.

        Of a multiple they are those of what is multiplied, before that; of a sum those of each
        part, as in `"l1/raw"`: under the name of its class, with a number from the second of one
        class on, `"l1_2/raw"`.

        Args:
            *inputs, where: As in a call; so are errors.

        Examples:
            >>> metrics = (0.5 * pj.L1(weights=2.0)).metrics(jnp.array([1.0, -3.0]))
            >>> {name: float(value) for name, value in sorted(metrics.items())}
            {'max': 6.0, 'mean': 4.0, 'min': 2.0, 'raw': 8.0}
        """
        return self._run(_measure, inputs, where)

    def _run(self, program, inputs, where):
        self._check_resolved()
        for node in self.summands:
            if len(inputs) not in node.takes:
                raise TypeError(
                    f"{type(node).__name__} takes {node._inputs_in_words()}, got {len(inputs)}"
                    + "; a mask is passed as where=" * node.takes_where
                )
            if where is not None and not node.takes_where:
                raise ValueError(f"{node!r} takes no where: leave rows out of its inputs")
        penalty = bare(self)
        inputs = tuple(let_in("an input", x) for x in inputs)
        where = let_in("where", where)
        with standard_promotion():
            run = inspect.unwrap(program) if _has_function(self) else program
            return run(penalty, inputs, where)

    def elementwise(self, x: PyTree) -> PyTree:
        """The penalty of each value; NotImplementedError if it is no sum over single values."""
        raise NotImplementedError(f"{self!r} is not a sum over single values")

    @public
    def prox(self, v: PyTree, step_size: ArrayLike) -> PyTree:
        r"""The proximal operator, $\arg\min_z \tfrac12 \lVert z - v \rVert^2 + t f(z)$.

        A sum has one if its parts have, of which at most one is neither L1, L2 nor ElasticNet: that
        of the others comes first. Beside a GroupLasso an L2 weighs all entries alike.

        Args:
            v: The point: an array or a pytree of arrays.
            step_size: The $t$; weights, scale and reduction of the penalty come on top.

        Raises:
            NotImplementedError: If the penalty has none here.
            TypeError: If a hyperparameter still is a schedule.
            ValueError: If the penalty is not a scalar (reduction="none").

        References:
            Yu (2013), On decomposing the proximal map.
        """
        self._check_resolved()
        leaves, structure = jax.tree.flatten(v, is_leaf=is_absent)
        parts = bare(self)._proximal_parts(leaves, structure, step_size)
        return structure.unflatten(
            leaf if is_absent(leaf) else self._composed(leaf, own)
            for leaf, own in zip(leaves, parts, strict=True)
        )

    def against(self, reference: PyTree, *, stop_gradient: bool = True) -> "Penalty":
        """This penalty of two inputs, the second of which is bound: one of a single input.

        Args:
            reference: The second input: a frozen model's outputs, or parameters to stay near.
            stop_gradient: Whether no gradient goes to the reference.

        Raises:
            TypeError: If this is no penalty of two inputs, or the reference holds no arrays.
            ValueError: In a call, if the input is not like the reference.

        Examples:
            >>> reference = jnp.log(jnp.array([0.5, 0.5]))
            >>> penalty = 0.1 * pj.KLDivergence().against(reference)
            >>> float(penalty(reference))
            0.0
        """
        for node in self.summands:
            if 2 not in node.takes:
                raise TypeError(f"{node!r} takes {node._inputs_in_words()}: against binds one of 2")
        return Against(self, reference, stop_gradient)

    def _proximal_parts(self, leaves, structure, step_size):
        """For each array those of the penalties that are added."""
        raise self._without_prox()

    def _without_prox(self):
        have = ", ".join(name for name, cls in TYPES.items() if getattr(cls, "_prox", None))
        return NotImplementedError(
            f"{self!r} has no proximal operator here; {have} have one, and sums of L1, L2, "
            "ElasticNet and at most one other"
        )

    def _composed(self, v, parts):
        if sum(part.order == LAST for part in parts) > 1:
            raise self._without_prox()
        # With q = a/2 (z - c)^2 the operator of q + f is that of f / (1 + a), after that of q. And
        # where f is even and grows with |z|, as norms of groups do, that of |z| + f is that of f,
        # after that of |z|.
        growth: Any = 1.0
        for part in sorted(parts, key=lambda part: part.order):
            if part.by_group and jnp.ndim(growth):
                raise self._without_prox()
            v = part.operator(v, part.step / growth)
            growth = growth + part.curvature
        return v

    def estimate(self) -> "Penalty":
        """What estimates it from log-probabilities of sampled tokens; itself if it is of entries.

        Raises:
            ValueError: If such tokens don't tell.
        """
        return self

    def replace(self: Tree, **hyperparameters: Any) -> Tree:
        """The same penalty with other hyperparameters, its own or those of a part.

        Args:
            **hyperparameters: Fields, which the penalty has or exactly one part of it: what it
                scales, or a summand.

        Raises:
            TypeError: If none has such a field.
            ValueError: If several parts have it; if a value is out of range.

        Examples:
            >>> (0.1 * pj.SmoothL0(gamma=1.0) + pj.L1()).replace(gamma=0.5).penalties[0]
            Scaled(penalty=SmoothL0(gamma=0.5), scale=0.1)
        """
        return _replaced(self, hyperparameters)

    def unreduced(self) -> "Penalty":
        """The same with its values as they are, if all parts have a reduction; else ValueError."""
        for node in self.summands:
            if not node.has_reduction:
                raise ValueError(f"{node!r} is one number, and has no values by position")
        return _with_those_it_has(self, {"reduction": "none"})

    @property
    def label(self) -> str:
        """What it is called among the metrics of a sum."""
        return type(self).__name__.lower()

    def scheduled(self) -> Iterator[tuple[str, Schedule]]:
        """Its schedules and those of its parts, by the names of their values in a log."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        parts = {name: value for name, value in values.items() if isinstance(value, Penalty)}
        own = {name: value for name, value in values.items() if name not in parts}
        for path, node in jax.tree.leaves_with_path(own, is_leaf=is_schedule):
            if is_schedule(node):
                yield jax.tree_util.keystr(path, simple=True, separator="/"), node
        for part in parts.values():
            yield from part.scheduled()

    def _hyperparameters(self):
        return {field.name for field in fields(self)}

    def _inputs_in_words(self):
        least, most = self.takes[0], self.takes[-1]
        return f"{least} input(s)" if least == most else f"{least} to {most} inputs"

    def value(self, inputs: tuple[PyTree, ...], where: PyTree | None) -> PyTree:
        """What a subclass is: the penalty of its inputs, as `__call__` hands them on."""
        raise NotImplementedError

    def _metrics(self, inputs, where):
        return {"raw": self.value(inputs, where)}

    def __mul__(self, scale: Numeric) -> "Scaled":
        return NotImplemented if isinstance(scale, Penalty) else Scaled(self, scale)

    __rmul__ = __mul__

    def __add__(self, other: "Penalty") -> "Penalty":
        if not isinstance(other, Penalty):
            return NotImplemented
        return Sum((*_parts(self), *_parts(other)))

    def __radd__(self, other: Literal[0]) -> "Penalty":
        return self if other == 0 else NotImplemented


def check_one_input(label: str, penalty: Penalty) -> None:
    """Raises TypeError for what is no penalty, or one that compares two inputs, of which is one."""
    checked(f"the penalty of {label}", penalty, Penalty)
    for node in penalty.summands:
        if 1 not in node.takes:
            raise TypeError(
                f"{label} takes a penalty of one input, and {node!r} compares {node.takes[0]}: "
                "make it a term of an objective, pj.Term(..., on=(..., ...))"
            )


@jax.jit
def _evaluate(penalty, inputs, where):
    return penalty.value(inputs, where)


@jax.jit
def _measure(penalty, inputs, where):
    # Before the formula, so that nothing of a derivative is computed, and after it, because a
    # user's function may hold what is differentiated.
    penalty, inputs = lax.stop_gradient((penalty, inputs))
    return lax.stop_gradient(penalty._metrics(inputs, where))


def _has_function(penalty):
    """Whether it holds a user's function, by whose identity a compiled program would go stale."""

    def holds_one(node):
        return isinstance(node, Partial) or getattr(node, "of_function", False)

    return any(map(holds_one, jax.tree.leaves(penalty, is_leaf=holds_one)))


def distinct(names: Iterable[str], taken: Collection[str] = ()) -> list[str]:
    """The names, each with a number if it is taken by then: l1, l2, l1_2."""
    found: list[str] = []
    for name in names:
        numbered = itertools.chain([name], (f"{name}_{i}" for i in itertools.count(2)))
        found.append(next(x for x in numbered if x not in taken and x not in found))
    return found


def _replaced(penalty, hyperparameters):
    for name in hyperparameters:
        owners = _owners(penalty, name)
        if not owners:
            nodes = (penalty, *penalty.summands)
            there = sorted({name for node in nodes for name in node._hyperparameters()})
            raise TypeError(f"{penalty!r} has no hyperparameter {name!r}; there are {there}")
        if len(owners) > 1:
            raise ValueError(
                f"{name!r} is a hyperparameter of several parts, {', '.join(map(repr, owners))}: "
                "make each a term of its own"
            )
    return _with_those_it_has(penalty, hyperparameters)


def _owners(penalty, name):
    """The outermost penalties that have a field of a name."""
    if name in penalty._hyperparameters():
        return [penalty]
    parts = jax.tree.leaves(penalty, is_leaf=lambda node: _is_part(node, penalty))
    return [x for part in parts if isinstance(part, Penalty) for x in _owners(part, name)]


def _with_those_it_has(penalty, hyperparameters):
    own = {
        name: value for name, value in hyperparameters.items() if name in penalty._hyperparameters()
    }
    others = {name: value for name, value in hyperparameters.items() if name not in own}

    def change(node):
        return _with_those_it_has(node, others) if isinstance(node, Penalty) else node

    changed = jax.tree.map(change, penalty, is_leaf=lambda node: _is_part(node, penalty))
    return dataclasses.replace(changed, **own) if own else changed


def _is_part(node, whole):
    return isinstance(node, Penalty) and node is not whole


@config
class Scaled(Penalty):
    """`scale * penalty`."""

    penalty: Penalty
    scale: Numeric = number(single=True)

    @property
    def summands(self) -> tuple[Penalty, ...]:
        return self.penalty.summands

    @property
    def label(self) -> str:
        return self.penalty.label

    @public
    def elementwise(self, x: PyTree) -> PyTree:
        self._check_resolved()
        return self._times(self.penalty.elementwise(x))

    def estimate(self) -> Penalty:
        return self._with(penalty=self.penalty.estimate())

    def _proximal_parts(self, leaves, structure, step_size):
        return self.penalty._proximal_parts(leaves, structure, self.scale * step_size)

    def value(self, inputs, where):
        return self._times(self.penalty(*inputs, where=where))

    def _metrics(self, inputs, where):
        return self.penalty._metrics(inputs, where)

    def _times(self, values):
        return jax.tree.map(lambda value: self.scale * value, values)


@config
class Sum(Penalty):
    """A sum of penalties on the same inputs."""

    penalties: tuple[Penalty, ...]

    def __post_init__(self):
        super().__post_init__()
        if not self.penalties:
            raise ValueError("Sum.penalties must be at least one penalty, got none")

    @property
    def summands(self) -> tuple[Penalty, ...]:
        return tuple(part for penalty in self.penalties for part in penalty.summands)

    def scheduled(self) -> Iterator[tuple[str, Schedule]]:
        for label, penalty in self._labelled():
            yield from ((f"{label}/{name}", schedule) for name, schedule in penalty.scheduled())

    @public
    def elementwise(self, x: PyTree) -> PyTree:
        return _add(penalty.elementwise(x) for penalty in self.penalties)

    def estimate(self) -> Penalty:
        return self._with(penalties=tuple(penalty.estimate() for penalty in self.penalties))

    def _proximal_parts(self, leaves, structure, step_size):
        columns = (p._proximal_parts(leaves, structure, step_size) for p in self.penalties)
        return [list(itertools.chain(*parts)) for parts in zip(*columns, strict=True)]

    def value(self, inputs, where):
        return _add(penalty(*inputs, where=where) for penalty in self.penalties)

    def _metrics(self, inputs, where):
        return {
            f"{label}/{name}": value
            for label, penalty in self._labelled()
            for name, value in penalty._metrics(inputs, where).items()
        }

    def _labelled(self):
        labels = distinct(penalty.label for penalty in self.penalties)
        return zip(labels, self.penalties, strict=True)


@config
class Against(Penalty):
    """A penalty of two inputs, the second of which is bound; made by `against`."""

    penalty: Penalty
    reference: PyTree = arrays()
    stop_gradient: bool = option(default=True)

    @property
    def class_axis(self) -> int | None:
        return self.penalty.class_axis

    @property
    def takes_where(self) -> bool:
        return all(node.takes_where for node in self.penalty.summands)

    @property
    def has_reduction(self) -> bool:
        return all(node.has_reduction for node in self.penalty.summands)

    def estimate(self) -> Penalty:
        return self._with(penalty=self.penalty.estimate())

    def value(self, inputs, where):
        return self.penalty(*self._both(inputs), where=where)

    def _metrics(self, inputs, where):
        return self.penalty._metrics(self._both(inputs), where)

    def _both(self, inputs):
        """The input and the reference, without what the input leaves out."""
        (x,) = inputs
        leaves, structure = jax.tree.flatten(x, is_leaf=is_absent)
        bound = lax.stop_gradient(self.reference) if self.stop_gradient else self.reference
        if any(map(is_absent, leaves)):
            own = leaves_by_name("the reference", bound, structure)
            pairs = zip(leaves, own, strict=True)
            bound = structure.unflatten(x if is_absent(x) else other for x, other in pairs)
        return x, bound


def _parts(penalty):
    return penalty.penalties if isinstance(penalty, Sum) else (penalty,)


def _add(trees):
    return jax.tree.map(lambda *values: sum(values[1:], start=values[0]), *trees)


def is_absent(node: Any) -> bool:
    """Whether a node of the input stands for nothing: None, or left out by `optax.masked`."""
    return node is None or isinstance(node, optax.MaskedNode)
