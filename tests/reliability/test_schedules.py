"""Schedules between any two ends, over any steps: a property for each thing that is promised."""

from functools import partial

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from hypothesis import given

import penalties_jax as pj
from tests.catalogue import choices_of
from tests.reliability.attacks import examples

SHAPES = choices_of(pj.anneal)["shape"]

sizes = st.one_of(
    st.floats(-30, 30).map(lambda power: 10.0**power),
    st.sampled_from([0.1, 1.0, 0.9999999, 1 + 2.0**-23, 1e-30, 1e30]),
)
signs = st.sampled_from([-1.0, 1.0])
durations = st.one_of(st.integers(1, 40), st.integers(1, 2**31 - 1))


def oracle(shape, init, final, u):
    """The formula of a shape at the fraction u of the steps, of mpmath's numbers."""
    if shape == "exponential":
        return init * (final / init) ** u
    share = {
        "linear": u,
        "cosine": (1 - mpmath.cos(mpmath.pi * u)) / 2,
        "cubic": 1 - (1 - u) ** 3,
        "quarters": [mpmath.mpf(x) for x in ("0", "0.33", "0.67", "1")][min(int(4 * u), 3)],
    }["quarters" if shape == "step" else shape]
    return init * (1 - share) + final * share


@partial(jax.jit, static_argnames=("shape", "dtype"))
def values(ends, steps, counts, *, shape, dtype):
    init, final = ends.astype(dtype)
    return pj.anneal(init, final, start=steps[0], end=steps[1], shape=shape)(counts)


@partial(jax.jit, static_argnames="shape")
@jax.grad
def slopes(numbers, count, *, shape):
    return pj.anneal(*numbers[:2], start=numbers[2], end=numbers[3], shape=shape)(count)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", SHAPES)
@examples(little=15, hard=1_000)
@given(data=st.data())
def test_between_any_two_ends(shape, dtype, data):
    """Within them, never back, exactly at both, and what the formula says to rounding."""
    init = data.draw(signs, "sign") * data.draw(sizes, "init")
    nearly = st.sampled_from([0.0, 1e-7, -1e-7, 3e-7]).map(lambda by: init * (1 + by))
    final = data.draw(st.one_of(nearly, sizes.map(lambda size: np.sign(init) * size)), "final")
    if shape != "exponential":
        final *= data.draw(signs, "other sign")
    duration = data.draw(durations, "duration")
    start = data.draw(st.integers(-(2**31), 2**31 - 1 - duration), "start")
    inside = st.integers(0, duration)
    offsets = sorted({0, 1, duration - 1, duration, *data.draw(st.lists(inside, max_size=20))})
    counts = np.array([start + x for x in offsets])
    counts = np.pad(counts, (0, 24 - len(counts)), mode="edge").astype(np.int32)
    with jax.enable_x64(dtype is np.float64):
        ends = np.array([init, final], dtype)
        steps = np.array([start, start + duration], np.int32)
        found = np.asarray(values(ends, steps, counts, shape=shape, dtype=dtype))
    assert found.dtype == dtype
    init, final = ends
    assert found[0] == init
    assert found[-1] == final
    assert np.all(found >= ends.min())
    assert np.all(found <= ends.max())
    assert np.all(np.diff(found) * np.sign(final - init) >= 0)
    eps = np.finfo(dtype).eps
    with mpmath.workdps(50):
        exact_ends = [mpmath.mpf(float(x)) for x in ends]
        for value, offset in zip(found, offsets, strict=False):
            quarter = 4 * offset / duration
            if shape in ("quarters", "step") and 0 < abs(quarter - round(quarter)) < 4 * eps:
                continue  # not told from a switch
            exact = oracle(shape, *exact_ends, mpmath.mpf(offset) / duration)
            if shape == "exponential":
                # A logarithm of so many units has lost as many units in the last place.
                assert abs(value / exact - 1) <= 300 * eps
            else:
                assert abs(value - exact) <= 8 * eps * np.abs(ends).max()
                if np.sign(init) == np.sign(final) and abs(final) < abs(init):
                    # Of the smaller end no digit is lost on the way there.
                    assert abs(value / exact - 1) <= 24 * eps


@pytest.mark.parametrize("shape", SHAPES)
@examples(little=15, hard=1_000)
@given(data=st.data())
def test_gradients_between_any_two_ends(shape, data):
    """In both ends and both steps, as the formula's, also where the ends are equal."""
    init = data.draw(signs, "sign") * data.draw(sizes, "init")
    final = data.draw(st.one_of(st.just(init), sizes.map(lambda x: np.sign(init) * x)), "final")
    duration = data.draw(st.integers(2, 1_000), "duration")
    count = data.draw(st.integers(1, duration - 1), "count")

    with jax.enable_x64():
        point = jnp.asarray([init, final, 0.0, duration], jnp.float64)
        found = np.asarray(slopes(point, jnp.asarray(count), shape=shape))
    if shape in ("quarters", "step") and 4 * count % duration == 0:
        return  # at a switch
    with mpmath.workdps(150):
        numbers = [mpmath.mpf(x) for x in (init, final, 0, duration)]

        def exact(*numbers):
            a, b, start, end = numbers
            return oracle(shape, a, b, (count - start) / (end - start))

        for i, (slope, number) in enumerate(zip(found, numbers, strict=True)):
            h = mpmath.mpf(10) ** -40 * (abs(number) or 1)
            ends = ([*numbers[:i], number + by, *numbers[i + 1 :]] for by in (h, -h))
            above, below = (exact(*end) for end in ends)
            desired = (above - below) / (2 * h)
            scale = 1 if i < 2 else max(abs(init), abs(final)) / duration
            assert abs(slope - desired) <= 1e-11 * max(scale, abs(desired))
