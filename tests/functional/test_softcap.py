"""Logits that are bounded smoothly, beside float64 and beside divergences of capped logits."""

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest

import penalties_jax.functional as F  # noqa: N812
from penalties_jax.functional.divergences.softcap import capped
from tests import oracles
from tests.oracles import assert_close

CAP = 30.0
TANH = np.frompyfunc(mpmath.tanh, 1, 1)


@pytest.mark.parametrize("bound", [CAP, 1e-5])
def test_values_and_slopes_of_any_size(bound):
    """From the least of logits to where the tanh is rounded to 1, and z / cap is infinite."""
    z = np.float32([0, 1e-30, 1e-3, 0.5, 29, 100, 400, 1000, 1e30, 3e38])
    z = np.concatenate([z, -z[1:]])
    both = jax.vmap(jax.value_and_grad(capped, (0, 1)), (0, None))
    value, slopes = both(jnp.asarray(z), jnp.float32(bound))

    def exact(z, cap):
        return cap * TANH(z / cap)

    given = z.astype(np.float64), np.full(z.shape, np.float32(bound))
    assert_close(value, oracles.precisely(exact, *given), rtol=1e-6)
    # The slope in the cap is a difference of what is up to 1.
    for argument, least in ((0, 1e-37), (1, 1e-8)):
        desired = oracles.slope(exact, *given, argument=argument)
        assert_close(slopes[argument], desired, rtol=1e-5, atol=least)


@pytest.mark.slow
def test_the_same_of_logits_that_were_capped(x64):
    random = np.random.default_rng(0)
    shapes = [(4, 3, 6), (6, 40)] * 2
    arrays = [jnp.asarray(random.normal(size=shape)) for shape in shapes]
    tokens = random.integers(0, 40, size=(4, 3))
    caps = p, q = 2.5, None

    def logits(hidden, kernel, cap):
        z = hidden @ kernel
        return z if cap is None else cap * jnp.tanh(z / cap)

    def ours(arrays):
        yield F.linear_kl(*arrays, softcap=caps, temperature=0.7, block_size=5)
        yield F.linear_js(*arrays, softcap=caps, temperature=0.7, block_size=5)
        yield F.linear_entropy(*arrays[:2], softcap=p, temperature=0.7, block_size=5)
        yield F.linear_log_prob(*arrays[:2], tokens, softcap=p, block_size=5).sum()
        yield F.linear_cross_entropy(*arrays[:2], tokens, softcap=p, z_loss=1.0, block_size=5)

    def desired(arrays):
        z, r = logits(*arrays[:2], p), logits(*arrays[2:], q)
        chosen = jnp.take_along_axis(jax.nn.log_softmax(z), tokens[..., None], -1)
        yield F.kl_from_logits(z, r, temperature=0.7)
        yield F.js_from_logits(z, r, temperature=0.7)
        yield F.entropy_from_logits(z, temperature=0.7)
        yield chosen.sum()
        yield F.z_loss(z) - chosen.mean()

    values, slopes = (jax.jit(f)(arrays) for f in (_stacked(ours), jax.jacrev(_stacked(ours))))
    exact, others = (jax.jit(f)(arrays) for f in (_stacked(desired), jax.jacrev(_stacked(desired))))
    assert_close(values, exact, rtol=1e-11)
    for slope, other in zip(slopes, others, strict=True):
        assert_close(slope, other, rtol=1e-9, atol=1e-11)


def _stacked(function):
    return lambda arrays: jnp.stack([*function(arrays)])


def test_a_class_that_is_excluded_stays_so():
    hidden, kernel = np.ones((2, 3), np.float32), np.ones((3, 4), np.float32)
    bias = np.float32([0, 1, 2, -np.inf])

    def entropy(bias, cap):
        return F.linear_entropy(hidden, kernel[:, : len(bias)], bias=bias, softcap=cap)

    value, slopes = jax.value_and_grad(entropy, (0, 1))(bias, CAP)
    without, others = jax.value_and_grad(entropy, (0, 1))(bias[:3], CAP)
    assert_close(value, without, rtol=1e-6)
    assert_close(slopes[0], np.append(others[0], 0), rtol=1e-5, atol=1e-8)
    assert_close(slopes[1], others[1], rtol=1e-5, atol=1e-8)


def test_half_precision_saturates_as_float32_does():
    """The slope where a cap saturates is that of the logits before they are capped."""
    random = np.random.default_rng(0)
    shapes = [(8, 16), (16, 40)]
    half = [jnp.asarray(9 * random.normal(size=shape), jnp.bfloat16) for shape in shapes]
    hidden, kernel = (np.asarray(x).astype(np.float64) for x in half)
    tokens = np.arange(8)

    def exact(hidden):
        z = CAP * np.tanh(hidden @ kernel / CAP)
        z -= z.max(-1, keepdims=True)
        return (np.log(np.exp(z).sum(-1)) - z[tokens, tokens]).mean()

    slope = jax.grad(lambda h: F.linear_cross_entropy(h, half[1], tokens, softcap=CAP))(half[0])
    desired = oracles.gradient(exact, hidden)
    assert np.linalg.norm(slope - desired) <= 1e-2 * np.linalg.norm(desired)


@pytest.mark.parametrize(
    ("softcap", "message"),
    [
        (0.0, "softcap must be above 0, got 0.0"),
        ((30.0, -1), "softcap must be above 0, got -1"),
        (np.ones(2), r"softcap must broadcast to shape \(\), got shape \(2,\)"),
    ],
)
def test_bad_caps(softcap, message):
    hidden, kernel = np.ones((2, 3), np.float32), np.ones((3, 4), np.float32)
    with pytest.raises(ValueError, match=message):
        F.linear_kl(hidden, kernel, hidden, kernel, softcap=softcap)


@pytest.mark.parametrize(
    "softcap", [[30.0, 30.0], (30.0,), (30.0, [30.0]), (1.0, 2.0, 3.0), {"p": 30.0}], ids=str
)
def test_what_is_no_pair(softcap):
    hidden, kernel = np.ones((2, 3), np.float32), np.ones((3, 4), np.float32)
    with pytest.raises(TypeError, match="softcap must be a number or a pair"):
        F.linear_kl(hidden, kernel, hidden, kernel, softcap=softcap)
    with pytest.raises(TypeError, match="softcap must be a number, got"):
        F.linear_entropy(hidden, kernel, softcap=softcap)


def test_an_infinite_cap_is_none():
    random = np.random.default_rng(0)
    hidden, kernel = (jnp.asarray(random.normal(size=shape)) for shape in ((2, 3), (3, 4)))
    slopes = jax.value_and_grad(lambda h, cap: F.linear_entropy(h, kernel, softcap=cap), (0, 1))
    value, (slope, of_cap) = slopes(hidden, jnp.inf)
    without, desired = jax.value_and_grad(lambda h: F.linear_entropy(h, kernel))(hidden)
    assert_close(value, without)
    assert_close(slope, desired)
    assert of_cap == 0
