"""How hard the attacks here try: a little in `make test`, hard in `make test-reliability`.

A little is the same each time; hard is new each time, and what fails says how to repeat it.
"""

import os
from collections.abc import Callable

import hypothesis

HARD = os.environ.get("PENALTIES_JAX_ATTACKS") == "hard"
# Seeds of what is tried again and again, for `pytest.mark.parametrize`.
SEEDS = range(20 if HARD else 2)


def examples(little: int, hard: int) -> Callable:
    """Settings of a `hypothesis.given`, a decorator: how many examples are tried."""
    return hypothesis.settings(
        max_examples=hard if HARD else little,
        deadline=None,
        database=None,
        derandomize=not HARD,
        print_blob=HARD,
    )
