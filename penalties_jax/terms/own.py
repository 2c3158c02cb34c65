"""Penalties that are a function of one's own."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from penalties_jax._pytree import Schedule, abstract, checked, config, numbers_by_name, option
from penalties_jax.functional.reduction import AxisName, Reduction, promote, spread
from penalties_jax.terms.base import Numeric, Penalty
from penalties_jax.terms.reduced import PerValue, Separable

__all__ = ["Elementwise", "Function"]

# Of a function of `*inputs`.
MOST_INPUTS = 256

# What a penalty takes itself, so that a function's numbers can't be given by these names.
TAKEN = ("where", "weights", "reduction", "axis_name", "fill")


@abstract
class OfFunction(Penalty):
    """A penalty that is a function of one's own, and its numbers by name."""

    function: Callable[..., Any] = option()
    numbers: Mapping[str, Numeric] = numbers_by_name()

    of_function = True

    def scheduled(self) -> Iterator[tuple[str, Schedule]]:
        for name, schedule in super().scheduled():
            yield name.removeprefix("numbers/"), schedule

    def _hyperparameters(self):
        return super()._hyperparameters() | self.numbers.keys()


@config
class Elementwise(OfFunction, Separable):
    r"""A function of one's own of each value, as a penalty: $\sum_i w_i f(x_i; \theta)$.

    All else, pytrees, masks, weights, reductions, meshes and schedules, is as in `pj.L1`; the
    gradient is that of automatic differentiation, so that f has to be differentiable where values
    are, at 0 too: there `jnp.sqrt` is not, and `jnp.abs` has derivative 1 where `x * jnp.sign(x)`
    has 0. f is part of a jitted program by its identity: define it once, as a new lambda is a new
    program. Outside of `jax.jit` it is called each time.

    Args:
        function: The f: from an array, and its numbers by name, to an array of the same shape. It
            is given float32, or float64.
        numbers: The $\theta$, each a number, an array that broadcasts to the input, a schedule, or
            a pytree of these like the input. Those whose names are none of a penalty's own
            arguments can be given by name, as in `pj.Elementwise(f, gamma=0.1)`.
        fill: What f is given where `where` excludes an entry: a value at which it is finite.
        weights, reduction, axis_name: As in `pj.L1`.

    Raises:
        TypeError: If `function` is not callable, or takes a number by the name of an argument
            above that is not given in `numbers`.
        ValueError: In a call, if f returns another shape.

    Examples:
        >>> def tanh(x, gamma):
        ...     return jnp.tanh(x * jnp.sign(x) / gamma)
        >>> penalty = pj.Elementwise(tanh, gamma=pj.anneal(1.0, 0.1, start=0, end=100))
        >>> round(float(penalty.at(0)(jnp.array([0.0, -1.0]))), 4)
        0.7616
    """

    fill: float = option(default=0.0, kw_only=True)

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        numbers: Mapping[str, Numeric] | None = None,
        fill: float = 0.0,
        weights: Numeric = 1.0,
        reduction: Reduction = "sum",
        axis_name: AxisName | None = None,
        **named: Numeric,
    ):
        own = {"fill": fill, "weights": weights, "reduction": reduction, "axis_name": axis_name}
        _construct(self, function, numbers, named, **own)

    def _per_value(self) -> tuple[PerValue, Mapping[str, Any], float]:
        return PerValue(self.function), self.numbers, self.fill

    def _members(self, structure):
        columns = {name: spread(name, value, structure) for name, value in self.numbers.items()}
        return [
            member._with(numbers={name: column[i] for name, column in columns.items()})
            for i, member in enumerate(super()._members(structure))
        ]


@config
class Function(OfFunction):
    r"""A function of one's own of whole inputs, as a penalty: $f(x; \theta)$, of any sign.

    f is part of the program by its identity, as in `pj.Elementwise`. It is given its inputs as they
    are, arrays or pytrees, and takes no `where`: a mask can be one of its inputs.

    Args:
        function: The f: from one or several inputs, and its numbers by name, to a scalar.
        numbers: The $\theta$, as in `pj.Elementwise`.

    Raises:
        TypeError: If `function` is not callable, or takes a number by the name of a penalty's own
            argument that is not given in `numbers`.
        ValueError: In a call, if f returns no scalar.

    Examples:
        >>> def spread(x, target):
        ...     return (jnp.std(x) - target) ** 2
        >>> float(pj.Function(spread, target=0.5)(jnp.array([1.0, 3.0])))
        0.25
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        numbers: Mapping[str, Numeric] | None = None,
        **named: Numeric,
    ):
        _construct(self, function, numbers, named)

    @property
    def takes(self) -> range:
        parameters = inspect.signature(self.function).parameters.values()
        positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        inputs = [x for x in parameters if x.kind in positional and x.name not in self.numbers]
        needed = sum(x.default is x.empty for x in inputs)
        more = any(x.kind is inspect.Parameter.VAR_POSITIONAL for x in parameters)
        return range(needed, MOST_INPUTS if more else len(inputs) + 1)

    @property
    def takes_where(self) -> bool:
        return False

    def value(self, inputs, where):
        del where  # none
        value = self.function(*inputs, **self.numbers)
        if jax.tree.structure(value) != jax.tree.structure(0) or jnp.ndim(value):
            raise ValueError(
                f"{self.function!r} must return a scalar, got "
                f"{jax.tree.map(jnp.shape, value)}; a function of each value is a pj.Elementwise"
            )
        return promote(value)[0]


def _construct(penalty, function, numbers, named, **own):
    """What the generated constructor does, of a penalty that takes numbers by any name."""
    kind = type(penalty).__name__
    numbers = checked(f"{kind}.numbers", {} if numbers is None else numbers, Mapping[str, Any])
    if not callable(function):
        raise TypeError(f"{kind}.function must be a function, got {function!r}")
    try:
        others = list(inspect.signature(function).parameters)[1:]
    except ValueError as error:
        raise TypeError(f"{kind}.function must have a signature, got {function!r}") from error
    # An own argument of that name would be taken for the function's number in silence.
    for name in TAKEN:
        if name in named or (name in own and name in others and name not in numbers):
            raise TypeError(
                f"{name!r} is an argument of penalties: give the number of {function!r} that is "
                f"called so by numbers={{{name!r}: ...}}"
            )
    for name, value in {"function": function, "numbers": {**numbers, **named}, **own}.items():
        object.__setattr__(penalty, name, value)
    penalty.__post_init__()
