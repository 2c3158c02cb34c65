"""What every penalty can do: be evaluated, resolved at a step, scaled and added."""

from typing import Any, ClassVar, Literal

import jax
import optax
from jax import lax
from jax.tree_util import Partial
from jax.typing import ArrayLike
from jaxtyping import PyTree

from penalties_jax._pytree import (
    TYPES,
    Pytree,
    Tree,
    arrays,
    config,
    has_schedule,
    number,
    option,
    resolve,
)
from penalties_jax.functional.checks import bare, let_in, public, standard_promotion

__all__ = ["Penalty"]

# A number, an array or a schedule; or a pytree of them like the input.
Numeric = Any


class Penalty(Pytree):
    """The base of all penalties, and of one of your own that is no sum over single values.

    A subclass is decorated with `pj.config`, has its hyperparameters as fields, and a method
    `_value(self, inputs, where)`: from the tuple of inputs, arrays or pytrees, and a mask or None
    to a scalar. For a sum over single values there is `pj.Separable`, for a function without a
    class `pj.Function`.

    Examples:
        >>> @pj.config
        ... class Range(pj.Penalty):
        ...     width: float = pj.number(default=1.0)
        ...
        ...     def _value(self, inputs, where):
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
    # The name of its metrics in a log.
    measured_as: ClassVar[str | None] = None

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
            *inputs: What is penalised: one pytree, or the two that are compared. None and
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
            if len(inputs) != node._inputs:
                raise TypeError(
                    f"{type(node).__name__} takes {node._inputs} input(s), got {len(inputs)}"
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

    def at(self: Tree, step: ArrayLike) -> Tree:
        """The same penalty with every schedule replaced by its value at `step`."""
        return resolve(self, step)

    def elementwise(self, x: PyTree) -> PyTree:
        """The penalty of each value; NotImplementedError if it is no sum over single values."""
        raise NotImplementedError(f"{self!r} is not a sum over single values")

    def prox(self, v: PyTree, step_size: ArrayLike) -> PyTree:
        r"""The proximal operator, $\arg\min_z \tfrac12 \lVert z - v \rVert^2 + t f(z)$.

        Args:
            v: The point: an array or a pytree of arrays.
            step_size: The $t$; weights, scale and reduction of the penalty come on top.

        Raises:
            NotImplementedError: If the penalty has none here.
            TypeError: If a hyperparameter still is a schedule.
            ValueError: If the penalty is not a scalar (reduction="none").
        """
        have = [name for name, cls in TYPES.items() if getattr(cls, "_prox", None)]
        raise NotImplementedError(
            f"{self!r} has no proximal operator here; {', '.join(have)} have one"
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
            if node._inputs != 2:
                raise TypeError(f"{node!r} takes {node._inputs} input(s): against binds one of two")
        return Against(self, reference, stop_gradient)

    def estimate(self) -> "Penalty":
        """What estimates it from log-probabilities of sampled tokens; itself if it is of entries.

        Raises:
            ValueError: If such tokens don't tell.
        """
        return self

    def _check_resolved(self):
        if has_schedule(self):
            raise TypeError(f"{self!r} holds a schedule: call .at(step) first")

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
        if node._inputs != 1:
            raise TypeError(
                f"{label} takes a penalty of one input, and {node!r} compares {node._inputs}: "
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

    @public
    def prox(self, v: PyTree, step_size: ArrayLike) -> PyTree:
        self._check_resolved()
        return self.penalty.prox(v, self.scale * step_size)

    def estimate(self) -> Penalty:
        return self._with(penalty=self.penalty.estimate())

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

    def _value(self, inputs, where):
        return _add(penalty(*inputs, where=where) for penalty in self.penalties)


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

    def estimate(self) -> Penalty:
        return self._with(penalty=self.penalty.estimate())

    def _value(self, inputs, where):
        stop = lax.stop_gradient if self.stop_gradient else lambda x: x
        return self.penalty(*inputs, stop(self.reference), where=where)


def _parts(penalty):
    return penalty.penalties if isinstance(penalty, Sum) else (penalty,)


def _add(trees):
    return jax.tree.map(lambda *values: sum(values[1:], start=values[0]), *trees)


def is_absent(node: Any) -> bool:
    """Whether a node of the input stands for nothing: None, or left out by `optax.masked`."""
    return node is None or isinstance(node, optax.MaskedNode)
