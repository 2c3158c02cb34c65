"""Float64 oracles: numpy, scipy, mpmath and finite differences. Nothing here uses jax."""

import mpmath
import numpy as np
from scipy import special


def lattice(seed, *shape):
    """Random odd multiples of 1/64 within 2: exact in every dtype, and off every kink."""
    return (2 * np.random.default_rng(seed).integers(-64, 64, size=shape) + 1) / 64


def assert_close(actual, desired, *, rtol=1e-5, atol=0.0):
    """Agree within the tolerances, infinities exactly, and hold no NaN anywhere."""
    actual = np.asarray(actual).astype(np.float64)
    np.testing.assert_allclose(
        actual, np.broadcast_to(desired, actual.shape), rtol=rtol, atol=atol, equal_nan=False
    )


def as_float32(values):
    """The float32 neighbours of float64 values: infinite beyond 3.4e38."""
    with np.errstate(over="ignore"):
        return np.asarray(values, np.float64).astype(np.float32).astype(np.float64)


def gradient(function, x, step=2e-4):
    """Gradient of a scalar function by five-point differences, in float64."""
    x = np.asarray(x, np.float64)
    result = np.empty_like(x)
    for index in np.ndindex(x.shape):

        def shifted(distance, index=index):
            moved = x.copy()
            moved[index] += distance
            return function(moved)

        near = shifted(step) - shifted(-step)
        far = shifted(2 * step) - shifted(-2 * step)
        result[index] = (8 * near - far) / (12 * step)
    return result


# Formulas of numpy's arrays, in float64 or with as many digits as it takes.

DIGITS = 200
# The exponent of 2 in what stands for infinity and, negative, for a probability of 0.
BEYOND = 10**60


def precise(x):
    """An array of mpmath's numbers, where infinity is a number beyond those of every dtype."""
    numbers = [
        mpmath.sign(value) * mpmath.ldexp(1, BEYOND) if np.isinf(value) else mpmath.mpf(value)
        for value in np.ravel(np.asarray(x, np.float64)).tolist()
    ]
    return np.reshape(np.array(numbers, object), np.shape(x))


def precisely(formula, *arrays):
    """The values of a formula, in float64."""
    with mpmath.workdps(DIGITS):
        return np.asarray(formula(*map(precise, arrays))).astype(np.float64)


def slope(formula, *arrays, argument=0, side=0):
    """The derivative of an elementwise formula in one argument, by differences.

    At a kink it is the mean of both sides', or the left (side = -1) or right (side = 1) one.
    """
    with mpmath.workdps(DIGITS):
        arrays = [precise(x) for x in arrays]
        x = arrays[argument]
        h = mpmath.mpf(10) ** -40 * np.where(x == 0, mpmath.mpf(10) ** -40, abs(x))
        ends = x - (h if side <= 0 else 0), x + (h if side >= 0 else 0)
        below, above = (formula(*arrays[:argument], end, *arrays[argument + 1 :]) for end in ends)
        return np.asarray((above - below) / (ends[1] - ends[0])).astype(np.float64)


def probabilities(x, temperature=None):
    """Those of log-probabilities, or of logits at a temperature; of -inf the least there is."""

    def probability(x):
        least = mpmath.ldexp(1, -BEYOND)
        return least if x < -(mpmath.mpf(10) ** 40) else mpmath.exp(x / (temperature or 1))

    p = np.frompyfunc(probability, 1, 1)(x)
    return p if temperature is None else p / p.sum(-1, keepdims=True)


def log(x):
    """The natural logarithm of floats or of mpmath's numbers."""
    return np.frompyfunc(mpmath.log, 1, 1)(x) if np.asarray(x).dtype == object else np.log(x)


def expm1(x):
    """Exp(x) - 1 of floats or of mpmath's numbers, for which infinity is 2^(10^60)."""
    return np.frompyfunc(_expm1, 1, 1)(x) if np.asarray(x).dtype == object else np.expm1(x)


def _expm1(x):
    if x > mpmath.mpf(10) ** 40:
        raise OverflowError("an oracle's exponential grows without bound at infinity: rearrange it")
    return mpmath.expm1(x) if x > -(mpmath.mpf(10) ** 40) else mpmath.mpf(-1)


def floored(p, q, floor):
    """P, and max(q, e^floor) over its sum, on the classes of which either has something.

    Where Q is not normalised, over 1 and what is added to it.
    """
    nothing = mpmath.ldexp(1, -(BEYOND // 10)) if np.asarray(q).dtype == object else 1e-299
    # A class that is stepped along the imaginary axis is as large as it was.
    least = expm1(np.asarray(floor)) + 1
    raised = np.atleast_1d(np.where(abs(q) > least, q, least))
    raised = np.where((abs(p) <= nothing) & (abs(q) <= nothing), q, raised)
    return p, raised / (1 + (raised - q).sum(-1, keepdims=True))


# Divergences of one or many rows of log-probabilities, classes on the last axis.


def kl(log_p, log_q):
    """The generalised KL divergence, sum p log(p/q) - p + q."""
    return special.kl_div(np.exp(log_p), np.exp(log_q)).sum(-1)


def js(log_p, log_q, mixture=0.5):
    """The generalised Jensen-Shannon divergence."""
    p, q = np.exp(log_p), np.exp(log_q)
    m = mixture * p + (1 - mixture) * q
    return (mixture * special.rel_entr(p, m) + (1 - mixture) * special.rel_entr(q, m)).sum(-1)


def entropy(log_p, temperature=1.0):
    """Shannon entropy of softmax(log p / T)."""
    return special.entr(special.softmax(np.asarray(log_p) / temperature, axis=-1)).sum(-1)


def exact_kl(log_p, log_q):
    """The generalised KL of one row, with 60 digits and any exponent."""
    with mpmath.workdps(60):
        total = mpmath.mpf(0)
        for log_a, log_b in zip(log_p, log_q, strict=True):
            a, b = mpmath.exp(mpmath.mpf(float(log_a))), mpmath.exp(mpmath.mpf(float(log_b)))
            if a == 0:
                total += b
            elif b == 0:
                return np.inf
            else:
                total += a * (mpmath.mpf(float(log_a)) - mpmath.mpf(float(log_b))) - a + b
        return float(total)


def exact_js_parts(log_p, log_q, mixture):
    """For each class of one row, b p log(p/m) and (1-b) q log(q/m): also the gradient of JS."""
    with mpmath.workdps(60):
        b = mpmath.mpf(float(mixture))
        parts = []
        for log_one, log_two in zip(log_p, log_q, strict=True):
            one, two = (mpmath.exp(mpmath.mpf(float(value))) for value in (log_one, log_two))
            m = b * one + (1 - b) * two
            through_p = b * one * mpmath.log(one / m) if b * one else mpmath.mpf(0)
            through_q = (1 - b) * two * mpmath.log(two / m) if (1 - b) * two else mpmath.mpf(0)
            parts.append((through_p, through_q))
        total = float(sum(one + two for one, two in parts))
        gradients = np.array([[float(one), float(two)] for one, two in parts]).T
        return total, gradients[0], gradients[1]


def kl_gradient(log_p, log_q):
    """The declared gradient of KL(P||Q) through log_p and through log_q, with its edges."""
    log_p, log_q = np.asarray(log_p, np.float64), np.asarray(log_q, np.float64)
    p = np.exp(log_p)
    present = np.isfinite(log_p) & np.isfinite(log_q)
    difference = np.where(present, log_p, 0.0) - np.where(present, log_q, 0.0)
    return np.where(present, p * (difference + 1), 0.0), -p
