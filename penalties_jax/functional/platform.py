"""What differs between a CPU and an accelerator, and why."""

from collections.abc import Mapping

import jax
from jax.export import is_symbolic_dim

from penalties_jax.functional.checks import Size

# Of one array in a block, as float32: within the cache of a CPU's core, and enough to fill a GPU.
ROW_BYTES = {"cpu": 2**21, "gpu": 2**26}

# A block of products has so many bytes of each head's logits, but at least so many rows: a product
# has to be worth its reading of the kernel, and its adding to the kernel's gradient.
PRODUCT_BYTES = {"cpu": 2**26, "gpu": 2**28}
PRODUCT_ROWS = 240

# What stands for a number of classes that is not known yet: a large vocabulary.
MOST_CLASSES = 2**17


def rows_in_block(classes: Size) -> int:
    """How many rows of float32 logits make a block on this backend."""
    return _rows(classes, ROW_BYTES)


def rows_in_product(classes: Size) -> int:
    """How many rows of hidden states make a block on this backend."""
    return max(PRODUCT_ROWS, _rows(classes, PRODUCT_BYTES))


def _rows(classes: Size, block_bytes: Mapping[str, int]) -> int:
    classes = MOST_CLASSES if is_symbolic_dim(classes) else max(classes, 1)
    size = block_bytes.get(jax.default_backend(), block_bytes["gpu"])
    return max(1, size // (4 * classes))
