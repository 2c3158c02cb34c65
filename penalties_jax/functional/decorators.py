"""How a formula becomes a compiled function, and how it gets its derivatives."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array

Function = TypeVar("Function", bound=Callable[..., Array])


def compiled(*static: str) -> Callable[[Function], Function]:
    """Makes a call one compiled program, and the function still a plain, picklable function.

    Args:
        *static: The names of arguments that change the program.
    """

    def declare(function: Any) -> Any:
        program = jax.jit(function, static_argnames=static)

        @functools.wraps(function)
        def call(*args, **kwargs):
            return program(*args, **kwargs)

        return call

    return declare


def elementwise_derivatives(
    *partials: Callable[..., Array],
) -> Callable[[Callable[..., Array]], Callable[..., Array]]:
    """Declares the partial derivatives of an elementwise function, one for each argument.

    For formulas whose automatic derivative overflows, cancels or is NaN at an edge. A partial
    derivative is only computed if its argument is differentiated, and may itself be
    differentiated again.
    """

    def declare(function):
        declared = jax.custom_jvp(function)

        @functools.partial(declared.defjvp, symbolic_zeros=True)
        def _(primals, tangents):
            value = declared(*primals)
            tangent = sum(
                (
                    derivative(*primals) * t
                    for derivative, t in zip(partials, tangents, strict=True)
                    if not isinstance(t, SymbolicZero)
                ),
                start=jnp.zeros_like(value),
            )
            return value, tangent

        return declared

    return declare
