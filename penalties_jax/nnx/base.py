"""How NNX modules hold configs: numbers in Variables, the rest as structure, and a step."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from penalties_jax._pytree import resolve, with_learned
from penalties_jax.functional.checks import bare
from penalties_jax.functional.reduction import wide


class Number(nnx.Variable[Array]):
    """A number of a config that a module holds, such as a weight or an end of a schedule.

    Of any shape. It is saved with the model; it is no parameter, so that neither `nnx.grad` nor an
    optimizer that is made with `wrt=nnx.Param` moves it.

    Examples:
        >>> from flax import nnx
        >>> penalised = pj.nnx.ActivityPenalty(pj.L1(), weight=0.5)
        >>> float(nnx.state(penalised, pj.nnx.Number)["numbers"]["weight"][...])
        0.5
    """


class Step(nnx.Variable[Int[Array, "..."]]):
    """The step at which a module reads its schedules, from 0.

    Of shape [], or [layers] for modules that a scan or a vmap has stacked. `pj.nnx.set_step` and
    `pj.nnx.advance` write it.

    Examples:
        >>> int(pj.nnx.ActivityPenalty(pj.L1()).step[...])
        0
    """


class Measurement(nnx.Variable[Float[Array, ""]]):
    """What a module measured at its last call; NaN before the first."""

    @classmethod
    def none_yet(cls) -> "Measurement":
        """With a dtype: a weakly typed NaN would be traced again once a number takes its place.

        It is put on the device, not computed there: `jax_debug_nans` would refuse it.
        """
        return cls(jax.device_put(np.float32(np.nan)))


class Configured(nnx.Module):
    """A module that holds configs and numbers by name, any of which may depend on its step.

    NNX visits them as pytrees whose leaves are Variables, which it writes in place: the node itself
    is frozen.
    """

    def __init__(self):
        self.numbers = nnx.data({})
        self.step = Step(jnp.zeros((), jnp.int32))
        self.deterministic = False

    # NNX would note down the name of a property as an attribute, and trace the module again.
    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(getattr(type(self), name, None), property):
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def _at(self, config: Any, step: ArrayLike | None = None) -> Any:
        """A config of its own at a step, or at its own step if none is given."""
        return resolve(config, self.step[...] if step is None else step)

    def _hold(self, name: str, config: Any) -> None:
        """Writes the numbers of a config, or holds one of another structure in its place."""
        variables, structure = jax.tree.flatten(self.numbers.get(name), is_leaf=_is_variable)
        leaves, wanted = jax.tree.flatten(config)
        if structure == wanted and all(map(_fits, variables, leaves)):
            for variable, leaf in zip(variables, leaves, strict=True):
                write(variable, leaf)
        else:
            layers = self.step[...].shape

            # A copy, whose buffer nobody else gives away; one for each of stacked layers.
            def own(kind, leaf, dtype=None):
                leaf = jnp.array(leaf, dtype)
                return kind(jnp.broadcast_to(leaf, layers + leaf.shape) if layers else leaf)

            parts = with_learned(config, lambda _, x: own(nnx.Param, x, wide(x)))
            held = jax.tree.map(
                lambda leaf: leaf if _is_variable(leaf) else own(Number, leaf),
                parts,
                is_leaf=_is_variable,
            )
            self.numbers = nnx.data(self.numbers | {name: held})


def write(variable: nnx.Variable[Array], value: ArrayLike) -> None:
    """Sets all entries of a variable, which keeps its dtype, weak or not, and its sharding."""
    variable[...] = variable[...].at[...].set(value)


def count(step: Step) -> None:
    """Moves a step on by one; at the largest integer it stays."""
    step[...] = jnp.asarray(optax.safe_increment(step[...]))


def held(name: str, check: Callable[[Any], Any] = lambda value: value) -> Any:
    """A property: what a module holds by this name, and how it comes in."""

    def read(module):
        return bare(module.numbers[name])

    def write(module, value):
        module._hold(name, check(value))

    return property(read, write)


def field_of(name: str, field: str, doc: str) -> Any:
    """A property: a field of a config that a module holds by a name."""

    def read(module):
        return getattr(getattr(module, name), field)

    def write(module, value):
        setattr(module, name, dataclasses.replace(getattr(module, name), **{field: value}))

    return property(read, write, doc=doc)


def _is_variable(node):
    return isinstance(node, nnx.Variable)


def _fits(variable, leaf):
    leaf = jnp.asarray(leaf)
    return leaf.dtype == variable.dtype and leaf.shape in ((), variable.shape)


def set_step(model: nnx.Module, step: ArrayLike) -> None:
    """Sets the step of every module of ours in a model, at which they read their schedules.

    Call it at the start of a training step, inside or outside of jit, with the count of optimiser
    steps: then accumulation, evaluation and a restored checkpoint need no more.

    Args:
        model: The module that they are in, at any depth; without any, nothing happens.
        step: An integer, or an array of one.

    Examples:
        >>> from flax import nnx
        >>> weight = pj.anneal(0.0, 1.0, start=0, end=4)
        >>> model = nnx.Sequential(nnx.relu, pj.nnx.ActivityPenalty(pj.L1(), weight=weight))
        >>> pj.nnx.set_step(model, 2)
        >>> y = model(jnp.ones(4))
        >>> float(pj.nnx.collect_penalties(model))
        2.0
    """
    for variable in _steps(model):
        write(variable, step)


def advance(model: nnx.Module) -> None:
    """Moves the step of every module of ours in a model on by one, that of a `pj.nnx.Loss` too.

    So a model with a `Loss` calls it with `advance=False`, or it would count twice.

    Args:
        model: As in `pj.nnx.set_step`.

    Examples:
        >>> penalised = pj.nnx.ActivityPenalty(pj.L1())
        >>> pj.nnx.advance(penalised)
        >>> int(penalised.step[...])
        1
    """
    for variable in _steps(model):
        count(variable)


def _steps(model):
    return [node for _, node in nnx.iter_graph(model) if isinstance(node, Step)]
