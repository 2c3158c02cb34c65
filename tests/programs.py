"""Ways to compile a function in a test."""

import contextlib
from functools import partial

import chex
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax import lax

# Unoptimised programs compile in half the time; for what does not depend on optimisation.
quick_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def jit_once(function):
    """Jits a function so that a second trace of it raises AssertionError."""
    chex.clear_trace_counter()
    return jax.jit(chex.assert_max_traces(function, n=1))


def operations(function, *arguments):
    """What a function computes, an operation a line: equal programs have equal values."""
    return list(_operations(jax.make_jaxpr(function)(*arguments).jaxpr))


def _operations(jaxpr):
    names = {id(x): f"in{i}" for i, x in enumerate((*jaxpr.constvars, *jaxpr.invars))}

    def shown(x):
        return names.get(id(x), f"{x}:{x.aval}")

    for i, equation in enumerate(jaxpr.eqns):
        yield " ".join((equation.primitive.name, *map(shown, equation.invars)))
        names |= {id(x): f"{i}.{j}:{x.aval}" for j, x in enumerate(equation.outvars)}
        for parameter in equation.params.values():
            for inner in jax.tree.leaves(parameter, is_leaf=lambda x: hasattr(x, "jaxpr")):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from _operations(inner)
    yield " ".join(("return", *map(shown, jaxpr.outvars)))


def doubles(tree):
    """The paths of the float64 arrays in a tree, weakly typed ones and Python's floats included."""
    leaves = jax.tree.leaves_with_path(tree)
    return [jax.tree_util.keystr(path) for path, x in leaves if jnp.result_type(x) == jnp.float64]


def carried(module, call, length=2):
    """A module after a scan that carries all its variables through calls."""
    definition, state = nnx.split(module)

    def body(state, _):
        module = nnx.merge(definition, state)
        call(module)
        return nnx.state(module), None

    return nnx.merge(definition, jax.lax.scan(body, state, None, length=length)[0])


@contextlib.contextmanager
def as_for_an_accelerator():
    """Every program as it is lowered for an accelerator, on a CPU."""
    reduce = lax.reduce

    def in_a_tree(operands, *rest):
        return (_reduce_in_a_tree if isinstance(operands, tuple) else reduce)(operands, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lax, "platform_dependent", lambda *x, default, **_: default(*x))
        patch.setattr(lax, "reduce", in_a_tree)
        jax.clear_caches()
        yield
    jax.clear_caches()


def _reduce_in_a_tree(operands, initial, computation, dimensions):
    """As a GPU does it. XLA's CPU backend takes one class after the other, and rounds as often."""
    (axis,) = dimensions
    leaves, structure = jax.tree.flatten(operands)
    starts = jax.tree.leaves(initial)
    while leaves[0].shape[axis] > 1:
        half = (leaves[0].shape[axis] + 1) // 2
        filled = [
            jnp.concatenate([x, jnp.full_like(x[..., :1], start)], -1)
            for x, start in zip(leaves, starts, strict=True)
        ]
        sides = [x[..., :half] for x in filled], [x[..., half : 2 * half] for x in filled]
        leaves = jax.tree.leaves(computation(*map(structure.unflatten, sides)))
    return structure.unflatten(x[..., 0] for x in leaves)
