"""Numbers at the ends of their ranges, and logits beyond those of floats, against all digits."""

import contextlib
import functools

import hypothesis.strategies as st
import jax
import mpmath
import numpy as np
import pytest
from hypothesis import given

import penalties_jax.functional as F  # noqa: N812
from tests.oracles import as_float32
from tests.programs import as_for_an_accelerator
from tests.reliability.attacks import examples

CLASSES = 3
LARGEST = float(np.finfo(np.float32).max)
SIZES = st.sampled_from([1.0, 50.0, 1e6, 1e30, 1e35, 1e38])
# Of one size, whose differences are exact: of others some digits are lost before T divides them.
MULTIPLES = st.lists(st.integers(-2, 2), min_size=CLASSES, max_size=CLASSES)
TEMPERATURES = st.sampled_from([1e-30, 1e-3, 1.0, 1e3])


def log_softmax(z, temperature):
    """Of mpmath's numbers, with as many digits as the largest of them needs."""
    scaled = [x / temperature for x in z]
    total = mpmath.log(sum(map(mpmath.exp, scaled)))
    return [x - total for x in scaled]


def mean(log_p, values):
    return sum(mpmath.exp(log) * x for log, x in zip(log_p, values, strict=True))


def kl(log_p, log_q):
    """And its derivatives through the logits over T."""
    ratio = [a - b for a, b in zip(log_p, log_q, strict=True)]
    value = mean(log_p, ratio)
    p, q = ([*map(mpmath.exp, x)] for x in (log_p, log_q))
    return value, [
        [a * (d - value) for a, d in zip(p, ratio, strict=True)],
        [b - a for a, b in zip(p, q, strict=True)],
    ]


def reverse_kl(log_p, log_q):
    value, slopes = kl(log_q, log_p)
    return value, slopes[::-1]


def js(log_p, log_q, b=0.25):
    m = [
        mpmath.log(b * mpmath.exp(x) + (1 - b) * mpmath.exp(y))
        for x, y in zip(log_p, log_q, strict=True)
    ]
    (first, (through_p, _)), (second, (through_q, _)) = kl(log_p, m), kl(log_q, m)
    return b * first + (1 - b) * second, [
        [b * x for x in through_p],
        [(1 - b) * x for x in through_q],
    ]


def entropy(log_p):
    value = -mean(log_p, log_p)
    return value, [[-mpmath.exp(x) * (x + value) for x in log_p]]


def cross_entropy(log_p):
    p = [*map(mpmath.exp, log_p)]
    return -log_p[0], [[p[0] - 1, *p[1:]]]


FORMULAS = {
    "kl": (F.kl_from_logits, kl),
    "reverse": (functools.partial(F.kl_from_logits, direction="reverse"), reverse_kl),
    "js": (functools.partial(F.js_from_logits, mixture=0.25), js),
    "entropy": (F.entropy_from_logits, entropy),
    "cross_entropy": (
        functools.partial(F.cross_entropy_from_logits, labels=np.int32(0)),
        cross_entropy,
    ),
}


@pytest.mark.parametrize("form", [contextlib.nullcontext, as_for_an_accelerator])
@pytest.mark.parametrize("name", FORMULAS)
def test_logits_over_temperature_beyond_all_floats(name, form):
    """The value and every derivative, infinite where the true ones have no float."""
    function, formula = FORMULAS[name]
    inputs = 1 if name in ("entropy", "cross_entropy") else 2

    def of(logits, temperature):
        return function(*logits, temperature=temperature)

    run = jax.jit(jax.value_and_grad(of, (0, 1)))

    @examples(little=40, hard=3_000)
    @given(st.tuples(*[MULTIPLES] * inputs), SIZES, TEMPERATURES)
    def attack(rows, size, temperature):
        rows, t = np.float32(size) * np.float32(rows), np.float32(temperature)
        value, (slopes, by_temperature) = run(tuple(rows), t)
        with mpmath.workdps(300):
            t = mpmath.mpf(float(t))
            z = [[mpmath.mpf(float(x)) for x in row] for row in rows]
            exact, through = formula(*(log_softmax(row, t) for row in z))
            along = -sum(mpmath.fdot(g, x) for g, x in zip(through, z, strict=True)) / t**2
            exact = as_float32(float(exact))
            through = [[float(g / t) for g in row] for row in through]
            along = as_float32(float(along))
        np.testing.assert_allclose(value, exact, rtol=1e-5, atol=1e-6)
        assert not np.isnan(slopes).any()
        assert not np.isnan(by_temperature)
        if np.isfinite(exact):
            # The log-ratio is rounded as the largest is.
            rounding = 2e-6 * max(1.0, exact) / temperature
            found, through = (np.clip(np.float64(x), -LARGEST, LARGEST) for x in (slopes, through))
            np.testing.assert_allclose(found, through, rtol=1e-4, atol=rounding)
        if np.isfinite(along):
            np.testing.assert_allclose(by_temperature, along, rtol=1e-4, atol=1e-5 / temperature)

    with form():
        attack()
