"""Proximal operators against a numerical minimiser and the optimality condition."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

import penalties_jax.functional as F  # noqa: N812
from tests.oracles import as_float32, assert_close, lattice


class Prox(NamedTuple):
    """A proximal operator, its penalty h, and the ends of the subdifferential of h."""

    call: Callable[..., Any]
    penalty: Callable[[np.ndarray], np.ndarray]
    subdifferential: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


def sign_interval(z):
    """The subdifferential of the absolute value, as (low, high)."""
    return np.where(z > 0, 1.0, -1.0), np.where(z < 0, -1.0, 1.0)


def square(center):
    def both(z):
        return 2 * (z - center), 2 * (z - center)

    return Prox(partial(F.prox_l2, center=center), lambda z: (z - center) ** 2, both)


def elastic_net(ratio):
    return Prox(
        partial(F.prox_elastic_net, l1_ratio=ratio),
        lambda z: ratio * np.abs(z) + (1 - ratio) * z * z,
        lambda z: tuple(ratio * end + 2 * (1 - ratio) * z for end in sign_interval(z)),
    )


def huber(delta):
    return Prox(
        partial(F.prox_huber, delta=delta),
        lambda z: np.where(np.abs(z) < delta, z * z / 2, delta * (np.abs(z) - delta / 2)),
        lambda z: (np.clip(z, -delta, delta), np.clip(z, -delta, delta)),
    )


PROXES = {
    "l1": Prox(F.prox_l1, np.abs, sign_interval),
    "l2": square(0.0),
    "l2-center": square(0.6),
    **{f"elastic_net-{ratio}": elastic_net(ratio) for ratio in (0.0, 0.3, 1.0)},
    **{f"huber-{delta}": huber(delta) for delta in (1.0, 0.2)},
}
every_prox = pytest.mark.parametrize("prox", PROXES.values(), ids=PROXES.keys())


def minimiser(penalty, v, t):
    """Where 0.5 (z - v)^2 + t h(z) is least, by bounded search: to about 1e-7."""
    found = optimize.minimize_scalar(
        lambda z: 0.5 * (z - v) ** 2 + t * penalty(z),
        bounds=(-abs(v) - 2, abs(v) + 2),
        method="bounded",
        options={"xatol": 1e-12},
    )
    return found.x


@every_prox
def test_is_the_minimiser(prox, x64):
    v = np.array([0.0, 1.0, -1.0, 0.5, -0.5, *(1.5 * lattice(0, 15))])
    for t in (0.25, 1.0, 2.5):
        z = np.asarray(prox.call(v, t))
        assert z.dtype == np.float64
        assert_close(z, [minimiser(prox.penalty, entry, t) for entry in v], atol=2e-7)
        low, high = prox.subdifferential(z)
        assert np.all((v - z) / t >= low - 1e-12)
        assert np.all((v - z) / t <= high + 1e-12)


@every_prox
def test_steps_edges_and_derivatives(prox):
    """A step may be an array; 0 is the identity; 1e30 and 1e-30 are nothing special."""
    v = as_float32([0.0, -0.0, 1e-30, -1e-30, 1e30, -1e30, 3.0, -3.0])
    call = jax.jit(lambda v, t: (prox.call(v, t), jax.grad(lambda v: prox.call(v, t).sum())(v)))
    z, slope = call(jnp.asarray(v, jnp.float32), 0.0)
    assert_close(z, v, rtol=1e-6, atol=1e-7 if prox is PROXES["l2-center"] else 0.0)
    assert_close(slope[4:], 1.0)
    z, slope = call(jnp.asarray(v, jnp.float32), 0.5)
    assert np.isfinite(z).all()
    assert np.isfinite(slope).all()
    low, high = prox.subdifferential(np.asarray(z, np.float64)[:4])
    optimal = (v[:4] - np.asarray(z, np.float64)[:4]) / 0.5
    assert np.all((optimal >= low - 1e-6) & (optimal <= high + 1e-6))
    steps = np.linspace(0.1, 2.0, len(v)).astype(np.float32)
    one_by_one = [prox.call(entry, step) for entry, step in zip(v, steps, strict=True)]
    assert_close(prox.call(v.astype(np.float32), steps), one_by_one, rtol=1e-6)
    assert_close(jax.vmap(prox.call)(v.astype(np.float32), steps), one_by_one, rtol=1e-6)
    matrix = np.stack([v, v]).astype(np.float32)
    assert_close(prox.call(matrix, steps), np.stack([one_by_one] * 2), rtol=1e-6)
    assert prox.call(matrix, steps).dtype == jnp.float32


@every_prox
def test_derivatives_in_the_value_and_the_step(prox, x64):
    v, t = np.array([0.11, -0.4, 1.7, -2.9]), np.array([0.3, 0.7, 0.45, 1.1])
    slopes = jax.grad(lambda v, t: prox.call(v, t).sum(), (0, 1))(v, t)
    for index, slope in enumerate(slopes):
        h = 1e-6 * np.eye(2)[index]
        ahead, behind = (prox.call(v + s * h[0], t + s * h[1]) for s in (1, -1))
        assert_close(slope, (np.asarray(ahead) - behind) / 2e-6, rtol=1e-6, atol=1e-8)


def test_exact_zeros():
    v = jnp.asarray([0.5, -0.5, 0.49999, -0.2, 0.0, -0.0])
    assert np.all(np.asarray(F.prox_l1(v, 0.5)) == 0)
    assert np.all(np.asarray(F.prox_elastic_net(v, 1.0, l1_ratio=0.5)) == 0)
    assert np.all(np.asarray(F.prox_group_lasso(v[:, None], 0.5, axis=-1)) == 0)


def test_hyperparameters_as_arrays():
    v = np.float32([2.0, -2.0, 0.3])
    center, ratio, delta = np.float32([[0.5, 1.0, -1.0], [0.2, 0.9, 0.0], [0.1, 1.0, 5.0]])
    each = range(3)
    assert_close(
        F.prox_l2(v, 0.5, center=center), [F.prox_l2(v[i], 0.5, center=center[i]) for i in each]
    )
    assert_close(
        F.prox_elastic_net(v, 0.5, l1_ratio=ratio),
        [F.prox_elastic_net(v[i], 0.5, l1_ratio=ratio[i]) for i in each],
    )
    assert_close(
        F.prox_huber(v, 0.5, delta=delta), [F.prox_huber(v[i], 0.5, delta=delta[i]) for i in each]
    )


def test_group_lasso(x64):
    """The minimiser lies along v, and (v - z)/t is a subgradient of the norm at z."""
    v = np.array([[3.0, -4.0, 12.0], [0.3, 0.1, 0.2], [0.0, 0.0, 0.0], [0.0, -2.0, 0.0]])
    for t in (0.0, 0.5, 2.0):
        z = np.asarray(F.prox_group_lasso(v, t, axis=-1))
        for row, result in zip(v, z, strict=True):
            norm = np.linalg.norm(row)
            unit = row / norm if norm else row
            length = minimiser(np.abs, norm, t)
            assert_close(result, unit * length, rtol=1e-6, atol=1e-6)
            subgradient = row - result
            if np.linalg.norm(result) > 0:
                along = t * result / np.linalg.norm(result)
                assert_close(subgradient, along, rtol=1e-12, atol=1e-12)
            else:
                assert np.linalg.norm(subgradient) <= t + 1e-12
        assert_close(F.prox_group_lasso(v.T, t, axis=0), z.T, rtol=1e-12)
    # One step a group.
    steps = np.array([1.0, 0.1, 0.5, 3.0])
    assert_close(
        F.prox_group_lasso(v, steps, axis=-1),
        [F.prox_group_lasso(row, step, axis=-1) for row, step in zip(v, steps, strict=True)],
        rtol=1e-12,
    )


def test_group_lasso_edges():
    v = jnp.asarray([[1e30, 1e30], [1e-30, -1e-30], [0.0, 0.0], [3.0, 4.0], [1e-30, 0.0]])
    z, slope = jax.jit(
        lambda v, t: (
            F.prox_group_lasso(v, t, axis=-1),
            jax.grad(lambda v: F.prox_group_lasso(v, t, axis=-1).sum())(v),
        )
    )(v, jnp.asarray([1.0, 1.0, 1.0, 1.0, 0.0]))
    assert_close(z, [[1e30, 1e30], [0, 0], [0, 0], [2.4, 3.2], [1e-30, 0]], rtol=1e-5)
    assert np.isfinite(slope).all()
    assert_close(slope[0], 1.0, rtol=1e-5)
    assert np.all(np.asarray(slope)[1:3] == 0)


CALLS = {
    **{name: prox.call for name, prox in PROXES.items()},
    "group_lasso": partial(F.prox_group_lasso, axis=-1),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_dtypes(call):
    """Half precision is float32 inside, whatever dtype comes out; integers become float32."""
    v = np.asarray(lattice(3, 4, 5))
    single = call(v.astype(np.float32), 0.3)
    assert single.dtype == jnp.float32
    for dtype in (jnp.float16, jnp.bfloat16):
        half = call(jnp.asarray(v, dtype), 0.3)
        assert half.dtype == jnp.float32
        assert_close(half, single, rtol=1e-5, atol=1e-6)
    integers = call(jnp.asarray([[3, -3, 0, 1]], jnp.int32), 0.3)
    assert integers.dtype == jnp.float32
    assert_close(integers, call(jnp.asarray([[3.0, -3.0, 0.0, 1.0]]), 0.3))


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_a_step_that_does_not_fit_shows_both_shapes(call):
    with pytest.raises(ValueError, match=r"(?s)(?=.*\(7,\))(?=.*\(2,)"):
        call(jnp.ones((2, 3)), jnp.ones(7))


def test_prox_huber_does_not_cancel_at_large_steps():
    t = jnp.asarray([1e4, 1e6, 1e30])
    assert_close(F.prox_huber(jnp.full(3, 0.7), t), 0.7 / (1 + np.asarray(t, np.float64)))
