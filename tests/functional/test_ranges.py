"""A plain number out of its range raises in the function and in the config, in the same words."""

import dataclasses
import math
import re
from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest

import penalties_jax.functional as F  # noqa: N812
from penalties_jax.functional import checks
from tests.calls import CALLS
from tests.catalogue import CASES, PROXIMAL, every, first_of_each, numbers_of, only

NUMBERS = (-1, -0.5, 0, 0.0, 1, 1.5, 2.0, math.nan, np.float32(-2), np.int8(-1), np.float32([-2]))


# What is just inside of each range, and just outside.
LEAST, INF, NAN = 1e-300, math.inf, math.nan
ABOVE = np.nextafter
ENDS = {
    "above 0": ([LEAST, INF], [0.0, -LEAST, -INF, NAN]),
    "at least 0": ([0.0, -0.0, INF], [-LEAST, -INF, NAN]),
    "below 0": ([-LEAST, -INF], [0.0, LEAST, INF, NAN]),
    "above 1": ([ABOVE(1, 2), INF], [1.0, 0.0, NAN]),
    "above 2": ([ABOVE(2, 3), INF], [2.0, 0.0, NAN]),
    "at least 1": ([1.0, INF], [ABOVE(1, 0), NAN]),
    "in [0, 1]": ([0.0, 0.5, 1.0], [-LEAST, ABOVE(1, 2), -INF, INF, NAN]),
    "ascending": ([[1.0], [0.0, 0.0, 1.0]], [[1.0, 0.0], [0.0, 2.0, 1.0], [0.0, NAN, 1.0]]),
    "finite": ([0.0, -1e300, 1e300], [INF, -INF, NAN]),
    "not NaN": ([0.0, INF, -INF], [NAN]),
}


def test_the_ends_of_every_range():
    ranges = {x.description: x for x in vars(checks).values() if isinstance(x, checks.Range)}
    assert ranges.keys() == ENDS.keys()
    for name, (inside, outside) in ENDS.items():
        for values, valid in (inside, True), (outside, False):
            assert [bool(np.all(ranges[name].contains(np.array(x)))) for x in values] == [
                valid
            ] * len(values), name


def ranges_of(case, function):
    """The ranges that the config's fields have, of the numbers that a function takes."""
    ranges = {
        field.name: field.metadata["valid"]
        for field in dataclasses.fields(case.entry.config)
        if "valid" in field.metadata
    }
    return {name: ranges[name] for name in numbers_of(function) if name in ranges}


def assert_checked(call, name, valid):
    """Raises for plain numbers that are out of range, and reads no array."""
    for number in NUMBERS:
        if not np.all(valid.contains(number)):
            message = re.escape(f"{name} must be {valid.description}, got {number!r}")
            with pytest.raises(ValueError, match=message):
                call(**{name: number})
            call(**{name: jnp.asarray(number, jnp.float32)})


@every(first_of_each(lambda case: case.function, only(lambda case: case.entry.config, CASES)))
def test_functions_and_configs_have_the_same_ranges(case):
    inputs = [np.float32(case.prepare(x)) for x in case.data(shape=(2, 2, 3)[-len(case.shape) :])]
    for name, valid in ranges_of(case, case.function).items():
        assert_checked(partial(case.raw, *inputs), name, valid)
        assert_checked(case.config, name, valid)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_every_number_of_every_function_is_checked(call):
    """What no range takes."""
    for name in call.numbers:
        for number in (math.nan, np.float32(math.nan)):
            with pytest.raises(ValueError, match=f"{name} must be .*got .*nan"):
                call(**{name: number})


@every(first_of_each(lambda case: case.function, PROXIMAL))
def test_proximal_operators_have_the_ranges_of_their_penalties(case):
    """And the step, which is times the weight, that of the weight."""
    ranges = ranges_of(case, getattr(F, f"prox_{case.function.__name__}"))
    for name, valid in ranges.items():
        assert_checked(partial(case.prox, jnp.ones((2, 3)), 0.5), name, valid)
    nonnegative = ranges_of(case, case.function)["weights"]
    assert_checked(partial(case.prox, jnp.ones((2, 3))), "t", nonnegative)
