"""Ways to compile a function in a test."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
from flax import nnx

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
