"""A plain number out of its range raises in the function and in the config, in the same words."""

import dataclasses
import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

import penalties_jax.functional as F  # noqa: N812
from penalties_jax.functional import checks
from tests import oracles
from tests.calls import CALLS
from tests.catalogue import (
    CASES,
    EDGE_ROWS,
    PENALTY_CASES,
    PROXIMAL,
    every,
    first_of_each,
    numbers_of,
    only,
)
from tests.oracles import as_float32, assert_close

pytestmark = pytest.mark.cheap
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
    "at least 1, and finite": ([1.0, 1e300], [ABOVE(1, 0), INF, NAN]),
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


# Within the numbers of a float32 that hardware does not take for 0.
SIZES = np.float32([0.0, 1e-30, 1e-20, 1.0, 1.5, 2.5, 1e10])
VALUES = np.float32([0.0, 1e-20, 0.5, -0.75, 3.0])


@every(
    first_of_each(
        lambda case: case.structure, only(lambda case: case.is_a("separable"), PENALTY_CASES)
    )
)
def test_derivatives_in_a_number_at_the_ends_of_its_range(case):
    """Those of the formula, one-sided at an end, whatever the value: finite where they exist."""
    for name, valid in ranges_of(case, case.function).items():
        if name not in case.numbers:
            continue

        @jax.jit
        @partial(jax.vmap, in_axes=(0, None))
        @partial(jax.vmap, in_axes=(None, 0))
        def of_each(number, x, name=name):
            return jax.value_and_grad(lambda number: case.raw(x, **{name: number}))(number)

        ends = np.array([end for end in SIZES if valid.contains(end)])
        for end, *found in zip(ends, *of_each(ends, VALUES), strict=True):
            side = 1 if end == 0 else -1 if name == "l1_ratio" and end == 1 else 0
            exact = case.slopes(VALUES.astype(float), name, side=side, **{name: float(end)})
            values = case.values(VALUES.astype(float), **{name: float(end)})
            # Of what is beyond all floats for one argument, the derivative at 0 is 0.
            exact = np.where((VALUES == 0) & (np.abs(exact) > 1e38), 0, exact)
            finite = np.nan_to_num(as_float32(values), posinf=0)
            scale = np.maximum(1, np.abs(finite)) / (abs(end) or 1)
            for actual, desired in zip(found, (values, exact), strict=True):
                near = np.isclose(actual, as_float32(desired), rtol=1e-5, atol=1e-6 * scale)
                assert near.all(), (name, end, actual, desired)


def test_derivatives_in_a_mixture_at_both_ends():
    """They are KL divergences there, infinite where these are, and 0 for equal distributions."""
    # A probability that no float holds is 0, and what is infinite times it.
    rows = EDGE_ROWS[np.all(np.isneginf(EDGE_ROWS) | (EDGE_ROWS > -1e30), (1, 2))]
    log_p, log_q = (np.float32(special.log_softmax(rows[:, i], -1)) for i in (0, 1))

    def slopes(function, *inputs):
        def of_row(p, q):
            return jax.vmap(jax.grad(lambda b: function(p, q, mixture=b)))(jnp.array([0.0, 1.0]))

        return jax.jit(jax.vmap(of_row))(*inputs)

    forward, reverse = (
        [oracles.exact_kl(*pair) for pair in zip(*pairs, strict=True)]
        for pairs in ((log_p, log_q), (log_q, log_p))
    )
    exact = np.stack([forward, -np.array(reverse)], -1)
    for function in (F.js_divergence, F.js_from_logits):
        assert_close(slopes(function, log_p, log_q), exact, rtol=1e-5, atol=2e-6)


def test_a_gate_of_no_logit_at_all():
    """Equal gates are equally open, at every temperature, which has no part in it."""
    excluded = jnp.full((2, 4), -jnp.inf)
    for temperature in (1e-30, 1e-3, 1.0, 1e30):
        for hard in (False, True):

            def total(logits, temperature, hard=hard):
                gates = F.top_k_gate(logits, 2, None, temperature=temperature, hard=hard)
                return jnp.sum(gates * jnp.arange(4.0)), gates

            run = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))
            (_, gates), slopes = run(excluded, temperature)
            assert gates.tolist() == [[1, 1, 0, 0] if hard else [0.5] * 4] * 2
            assert not any(np.any(slope) for slope in slopes)


@pytest.mark.parametrize("temperature", [1e-30, 1e-3, 1e30])
def test_gates_that_are_always_open_or_never(temperature):
    """Their derivatives are 0, not 0 times infinity."""
    logits = jnp.array([-jnp.inf, -1e18, -3.0, 2.0, 1e18, jnp.inf])
    for gate in (F.logistic_gate, F.hard_concrete_gate):

        def total(logits, temperature, gate=gate):
            return gate(logits, jax.random.key(0), temperature=temperature).sum()

        assert np.isfinite(jax.grad(total, 1)(logits, temperature))
        assert np.isfinite(jax.grad(total)(logits, temperature)).all()


def test_scales_of_a_kernel_of_any_size():
    x, y = jnp.array([[0.0], [1.0]]), jnp.array([[0.0], [3.0]])
    for scale, value in ((1e-30, 0.5), (1e-10, 0.5), (1e10, 0.0)):
        found, slope = jax.jit(jax.value_and_grad(lambda s: F.mmd(x, y, scales=s)))(scale)
        assert_close([found, slope], [value, 0], atol=1e-6)
