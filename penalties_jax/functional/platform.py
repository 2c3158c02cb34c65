"""What differs between a CPU and an accelerator, and why: chosen when a program is lowered."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, TypeVar

import jax
from jax import lax
from jax.export import is_symbolic_dim

from penalties_jax.functional.checks import Size

T = TypeVar("T")

# Of one array of float32 logits in a block of rows: within the cache of a CPU's core.
ROW_BYTES = 2**21

# Of a mask of rows: within an H100's cache, and 3% of bfloat16 logits [4096, 131072].
MASK_BYTES = 2**25

# What stands for a number of classes that is not known yet: a large vocabulary.
MOST_CLASSES = 2**17

# A block of products has at least so many rows: a product has to be worth its reading of the
# kernel, and its adding to the kernel's gradient.
LEAST_ROWS = 240


class Platform(NamedTuple):
    """How to compute on a kind of machine.

    Attributes:
        fuses: Whether XLA makes one kernel of what is computed from an array, however much that is:
            then whole arrays are computed at once, and elsewhere blocks that stay in cache.
        product_bytes: Of each head's logits in a block of products, as float32.
        halves: Whether logits that are products of half precision are kept in it: they go through
            memory, and half as many bytes in half the time.
    """

    fuses: bool
    product_bytes: int
    halves: bool

    def rows_in_mask(self, classes: Size) -> int:
        """How many rows of logits make a block, where some classes of each are masked."""
        return _rows(classes, 4 * MASK_BYTES) if self.fuses else rows_in_block(classes)

    def rows_in_product(self, classes: Size) -> int:
        """How many rows of hidden states make a block."""
        return max(LEAST_ROWS, _rows(classes, self.product_bytes))


CPU = Platform(fuses=False, product_bytes=2**26, halves=False)

# 2,048 rows of 131,072 classes, for a bfloat16 kernel of 2,048 features: with half as many, a block
# moves more bytes of the kernel and its gradient than of the logits.
ACCELERATOR = Platform(fuses=True, product_bytes=2**30, halves=True)


def rows_in_block(classes: Size) -> int:
    """How many rows of logits make a block that stays in cache."""
    return _rows(classes, ROW_BYTES)


def _rows(classes, size):
    classes = MOST_CLASSES if is_symbolic_dim(classes) else max(classes, 1)
    return max(1, size // (4 * classes))


def by_platform(function: Callable[..., T], *arguments: object, known: Platform | None = None) -> T:
    """A function of the platform and of arguments, for the platform of the program.

    Both are traced, unless that is known, as it is within such a function.
    """
    if known is not None:
        return function(known, *arguments)
    return lax.platform_dependent(
        *arguments, cpu=partial(function, CPU), default=partial(function, ACCELERATOR)
    )


def apart(numbers: T) -> T:
    """Numbers of rows as they are, but what follows from them is computed anew.

    What several sums over the classes share XLA's GPU backend writes to memory, [rows, classes],
    where one kernel could compute it for each of them.
    """

    def on(platform, numbers):
        return jax.tree.map(lax.optimization_barrier, numbers) if platform.fuses else numbers

    return by_platform(on, numbers)


def recomputed(function: Callable[..., T]) -> Callable[..., T]:
    """A function whose backward pass computes it again, and keeps nothing but its arguments.

    XLA's CPU backend would find the expressions that both passes share and keep those in memory,
    5 to 10 arrays moved for 3; there barriers part them. On accelerators it fuses both passes into
    one kernel that reads the arguments once, which a barrier would prevent: 3 for 2.
    """
    # Traced once for both.
    traced = jax.jit(function, inline=True)

    def on(platform, *arguments):
        return jax.checkpoint(traced, prevent_cse=not platform.fuses)(*arguments)

    @jax.jit
    def placed(*arguments):
        return by_platform(on, *arguments)

    # Around both platforms, so that what is kept is an argument itself: out of a choice between
    # them it would be a copy, which a call outside jit would make.
    return jax.checkpoint(placed, prevent_cse=False)
