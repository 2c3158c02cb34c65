"""Ways to compile a function in a test."""

from functools import partial

import chex
import jax

# Unoptimised programs compile in half the time; for what does not depend on optimisation.
quick_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def jit_once(function):
    """Jits a function so that a second trace of it raises AssertionError."""
    chex.clear_trace_counter()
    return jax.jit(chex.assert_max_traces(function, n=1))
