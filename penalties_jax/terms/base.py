"""What every penalty can do: be evaluated, resolved at a step, scaled and added."""

from collections.abc import Callable
from itertools import chain
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import Partial
from jax.typing import ArrayLike
from jaxtyping import Array, PyTree

from penalties_jax._pytree import TYPES, Pytree, Tree, config, has_schedule, number, resolve
from penalties_jax.functional.checks import bare, let_in, public, standard_promotion

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
    """The base of all penalties."""

    # NumPy's arrays and scalars leave `array * config` to the config.
    __array_ufunc__ = None

    # How many inputs it takes.
    _inputs: ClassVar[int] = 1
    # Whether it is of log-probabilities of sampled tokens, [..., T], not of classes.
    of_samples: ClassVar[bool] = False
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
            evaluate = type(self)._value if _has_function(self) else _evaluate
            return evaluate(penalty, inputs, where)

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

    def _inputs_in_words(self):
        least, most = self.takes[0], self.takes[-1]
        return f"{least} input(s)" if least == most else f"{least} to {most} inputs"

    def _value(self, inputs, where):
        raise NotImplementedError

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
    """Raises TypeError for a penalty that compares two inputs, where there is only one."""
    for node in penalty.summands:
        if 1 not in node.takes:
            raise TypeError(
                f"{label} takes a penalty of one input, and {node!r} compares {node.takes[0]}: "
                "make it a term of an objective, pj.Term(..., on=(..., ...))"
            )


@jax.jit
def _evaluate(penalty, inputs, where):
    return penalty._value(inputs, where)


def _has_function(penalty):
    """Whether it holds a user's function, by whose identity a compiled program would go stale."""
    nodes = jax.tree.leaves(penalty, is_leaf=lambda node: isinstance(node, Partial))
    return any(isinstance(node, Partial) for node in nodes)


@config
class Scaled(Penalty):
    """`scale * penalty`."""

    penalty: Penalty
    scale: Numeric = number(single=True)

    @property
    def summands(self) -> tuple[Penalty, ...]:
        return self.penalty.summands

    @public
    def elementwise(self, x: PyTree) -> PyTree:
        self._check_resolved()
        return self._times(self.penalty.elementwise(x))

    def estimate(self) -> Penalty:
        return self._with(penalty=self.penalty.estimate())

    def _proximal_parts(self, leaves, structure, step_size):
        return self.penalty._proximal_parts(leaves, structure, self.scale * step_size)

    def _value(self, inputs, where):
        return self._times(self.penalty(*inputs, where=where))

    def _times(self, values):
        return jax.tree.map(lambda value: self.scale * value, values)


@config
class Sum(Penalty):
    """A sum of penalties on the same inputs."""

    penalties: tuple[Penalty, ...]

    @property
    def summands(self) -> tuple[Penalty, ...]:
        return tuple(part for penalty in self.penalties for part in penalty.summands)

    @public
    def elementwise(self, x: PyTree) -> PyTree:
        return _add(penalty.elementwise(x) for penalty in self.penalties)

    def estimate(self) -> Penalty:
        return self._with(penalties=tuple(penalty.estimate() for penalty in self.penalties))

    def _proximal_parts(self, leaves, structure, step_size):
        columns = (p._proximal_parts(leaves, structure, step_size) for p in self.penalties)
        return [list(chain(*parts)) for parts in zip(*columns, strict=True)]

    def _value(self, inputs, where):
        return _add(penalty(*inputs, where=where) for penalty in self.penalties)


def _parts(penalty):
    return penalty.penalties if isinstance(penalty, Sum) else (penalty,)


def _add(trees):
    return jax.tree.map(lambda *values: sum(values[1:], start=values[0]), *trees)


def is_absent(node: Any) -> bool:
    """Whether a node of the input stands for nothing: None, or left out by `optax.masked`."""
    return node is None or isinstance(node, optax.MaskedNode)
