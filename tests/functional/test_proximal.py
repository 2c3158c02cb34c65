"""Proximal operators against a numerical minimiser and the optimality condition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

import penalties_jax as pj
import penalties_jax.functional as F  # noqa: N812
from tests.catalogue import PROXIMAL, every, first_of_each, only
from tests.oracles import as_float32, assert_close, lattice

pytestmark = pytest.mark.cheap
SEPARABLE = only(lambda case: case.is_a("separable"), PROXIMAL)
every_prox = every(SEPARABLE)
every_structure = every(first_of_each(lambda case: case.structure, PROXIMAL))


def minimiser(objective, v):
    """Where an objective is least, over a grid around v and 0 and then nearby: to about 1e-7."""
    grid = np.linspace(-abs(v) - 2, abs(v) + 2, 4001)
    best, step = grid[np.argmin(objective(grid))], grid[1] - grid[0]
    return optimize.minimize_scalar(
        objective, bounds=(best - step, best + step), method="bounded", options={"xatol": 1e-12}
    ).x


@every_prox
def test_is_the_minimiser(case, x64):
    """The global one, of any that tie; and where the objective is smooth, or bent, it is level."""
    v = np.array([0.0, -1.0, -0.5, *np.linspace(0.04, 1.2, 30), *(1.5 * lattice(0, 15))])
    # Where the objective is no longer convex, too.
    bends = [case.numbers[name] - (name == "a") for name in ("gamma", "a") if name in case.numbers]
    for t in (0.25, 1.0, 1.5, 2.5, 3.5, 5.0, *bends):
        z = np.asarray(case.prox(v, t))
        assert z.dtype == np.float64
        for point, nearest in zip(v, z, strict=True):

            def objective(z, point=point, t=t):
                return 0.5 * (z - point) ** 2 + t * case.formula(z)

            exact = minimiser(objective, point)
            assert objective(nearest) <= objective(exact) + 1e-14
            if case.is_a("convex"):
                assert_close(nearest, exact, atol=2e-7)
        level = (v - z) / t
        assert np.all(level >= case.slopes(z, side=-1) - 1e-12)
        assert np.all(level <= case.slopes(z, side=1) + 1e-12)


@every_prox
def test_steps_edges_and_derivatives(case):
    """A step may be an array; 0 is the identity; 1e30 and 1e-30 are nothing special."""
    v = as_float32([0.0, -0.0, 1e-30, -1e-30, 1e30, -1e30, 3.0, -3.0])
    call = jax.jit(lambda v, t: (case.prox(v, t), jax.grad(lambda v: case.prox(v, t).sum())(v)))
    z, slope = call(jnp.asarray(v, jnp.float32), 0.0)
    assert_close(z, v, rtol=1e-6, atol=1e-7 if case.numbers.get("center") else 0.0)
    assert_close(slope[4:], 1.0)
    z, slope = call(jnp.asarray(v, jnp.float32), 0.5)
    assert np.isfinite(z).all()
    assert np.isfinite(slope).all()
    level = (v[:4] - np.asarray(z, np.float64)[:4]) / 0.5
    assert np.all(level >= case.slopes(z[:4], side=-1) - 1e-6)
    assert np.all(level <= case.slopes(z[:4], side=1) + 1e-6)
    steps = np.linspace(0.1, 2.0, len(v)).astype(np.float32)
    one_by_one = [case.prox(entry, step) for entry, step in zip(v, steps, strict=True)]
    assert_close(case.prox(v.astype(np.float32), steps), one_by_one, rtol=1e-6)
    assert_close(jax.vmap(case.prox)(v.astype(np.float32), steps), one_by_one, rtol=1e-6)
    matrix = np.stack([v, v]).astype(np.float32)
    assert_close(case.prox(matrix, steps), np.stack([one_by_one] * 2), rtol=1e-6)
    assert case.prox(matrix, steps).dtype == jnp.float32


@every_prox
def test_derivatives_in_the_value_and_the_step(case, x64):
    v, t = np.array([0.11, -0.4, 1.7, -2.9]), np.array([0.3, 0.7, 0.45, 1.1])
    slopes = jax.grad(lambda v, t: case.prox(v, t).sum(), (0, 1))(v, t)
    for index, slope in enumerate(slopes):
        h = 1e-6 * np.eye(2)[index]
        ahead, behind = (case.prox(v + s * h[0], t + s * h[1]) for s in (1, -1))
        assert_close(slope, (np.asarray(ahead) - behind) / 2e-6, rtol=1e-6, atol=1e-8)


@every(first_of_each(lambda case: case.structure, SEPARABLE))
def test_hyperparameters_as_arrays(case):
    """One for each row of points."""
    v, around = np.float32([2.0, -2.0, 0.3]), np.float32([0.5, 1.0, 1.5])
    for name, number in case.numbers.items():
        array = jnp.clip(number * around, None, 1 if name == "l1_ratio" else None)
        desired = [case.prox(v, 0.5, **{name: each}) for each in array]
        rows = case.prox(np.stack([v, v, v]), 0.5, **{name: array[:, None]})
        assert_close(rows, desired, rtol=1e-6)


@every_prox
def test_is_nonexpansive_if_the_penalty_is_convex(case):
    """No two points move apart; of a penalty that is not convex, some do."""
    v = np.linspace(-4, 4, 801, dtype=np.float32)
    moved = [np.diff(np.asarray(case.prox(v, t), np.float64)) for t in (0.25, 1.0, 2.5)]
    assert np.all(np.stack(moved) >= -1e-6)
    together = np.stack(moved).max() <= np.diff(v.astype(np.float64)).max() + 1e-6
    assert together == case.is_a("convex")


def test_where_scad_jumps(x64):
    """From the soft threshold to v, once steps leave no line between them."""
    a, lam, formula = 3.7, 0.8, PROXIMAL["scad"].formula
    for t in (a - 1, a - 0.5, a, a + 0.5, a + 1, a + 1.5, a + 4):
        edge = lam * ((a + 1 + t) / 2 if t <= a + 1 else np.sqrt(t * (a + 1)))
        below, above = edge - 1e-9, edge + 1e-9
        soft = min(max(below - t * lam, 0), lam)
        assert_close(F.prox_scad(np.array([below, above]), t, a=a, lam=lam), [soft, above])
        # There both are as good.
        costs = [0.5 * (z - edge) ** 2 + t * formula(z, a=a, lam=lam) for z in (soft, edge)]
        assert_close(*costs, rtol=1e-7)


def test_exact_zeros():
    v = jnp.asarray([0.5, -0.5, 0.49999, -0.2, 0.0, -0.0])
    assert np.all(np.asarray(F.prox_l1(v, 0.5)) == 0)
    assert np.all(np.asarray(F.prox_elastic_net(v, 1.0, l1_ratio=0.5)) == 0)
    assert np.all(np.asarray(F.prox_group_lasso(v[:, None], 0.5, axis=-1)) == 0)


def test_group_lasso(x64):
    """The minimiser lies along v, and (v - z)/t is a subgradient of the norm at z."""
    v = np.array([[3.0, -4.0, 12.0], [0.3, 0.1, 0.2], [0.0, 0.0, 0.0], [0.0, -2.0, 0.0]])
    for t in (0.0, 0.5, 2.0):
        z = np.asarray(F.prox_group_lasso(v, t, axis=-1))
        for row, result in zip(v, z, strict=True):
            norm = np.linalg.norm(row)
            unit = row / norm if norm else row
            length = minimiser(lambda z, v=norm, t=t: 0.5 * (z - v) ** 2 + t * np.abs(z), norm)
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


@every_structure
def test_dtypes(case):
    """Half precision is float32 inside, whatever dtype comes out; integers become float32."""
    v = np.asarray(lattice(3, 4, 5))
    single = case.prox(v.astype(np.float32), 0.3)
    assert single.dtype == jnp.float32
    for dtype in (jnp.float16, jnp.bfloat16):
        half = case.prox(jnp.asarray(v, dtype), 0.3)
        assert half.dtype == jnp.float32
        assert_close(half, single, rtol=1e-5, atol=1e-6)
    integers = case.prox(jnp.asarray([[3, -3, 0, 1]], jnp.int32), 0.3)
    assert integers.dtype == jnp.float32
    assert_close(integers, case.prox(jnp.asarray([[3.0, -3.0, 0.0, 1.0]]), 0.3))


@every_structure
def test_a_step_that_does_not_fit_shows_both_shapes(case):
    with pytest.raises(ValueError, match=r"(?s)(?=.*\(7,\))(?=.*\(2,)"):
        case.prox(jnp.ones((2, 3)), jnp.ones(7))


@every_structure
def test_another_step_compiles_nothing(case):
    v = jnp.ones((2, 3))
    case.prox(v, 0.5)
    with jax.no_tracing():
        case.prox(v, 0.25, **{name: 0.9 * x for name, x in case.numbers.items()})


def test_prox_huber_does_not_cancel_at_large_steps():
    t = jnp.asarray([1e4, 1e6, 1e30])
    assert_close(F.prox_huber(jnp.full(3, 0.7), t), 0.7 / (1 + np.asarray(t, np.float64)))


EXTREMES = np.float32([0.0, -0.0, 1e-45, -1e-40, 1e-30, -1e-8, 0.3, -1.0, 2.5, 1e30, -3e38, np.inf])


def assert_same_bits(actual, desired):
    assert actual.dtype == desired.dtype == np.float32
    np.testing.assert_array_equal(np.asarray(actual).view(np.int32), desired.view(np.int32))


@every(PROXIMAL)
def test_a_step_or_a_weight_of_0_changes_no_bit(case):
    """Of a function, of its config, of multiples and sums, also where only some weights are 0."""
    v = np.stack([EXTREMES, -EXTREMES, np.roll(EXTREMES, 5)])
    some = np.float32([[0], [1], [0]])[:, 0 if case.is_a("grouped") else slice(None)]
    for t in (0, 0.0, np.zeros_like(some)):
        assert_same_bits(case.prox(v, t), v)
    kept = np.asarray(case.prox(v, some))
    assert_same_bits(kept[::2], v[::2])
    assert_same_bits(jax.jit(case.prox)(v, 0.0), v)

    config = case.config()
    of_sums = [config + pj.L2(center=1.0), config + pj.L1()]
    for penalty in (config, case.config(reduction="mean"), 0.5 * config, *of_sums):
        assert_same_bits(penalty.prox(v, 0.0), v)
        assert_same_bits((0.0 * penalty).prox(v, 0.5), v)
    assert_same_bits(case.config(weights=0.0).prox(v, 0.5), v)
    assert_same_bits(np.asarray(case.config(weights=some).prox(v, 0.5))[::2], v[::2])


@every_structure
def test_the_derivatives_at_a_step_of_0(case):
    """1 in the point, at 0 too, and in the step the negative slope of the penalty."""
    v = np.float32([[0.0, -1e-30, 0.3, -1.1, 2.5, 1e30]])

    def moved(v, t):
        return case.prox(v, t)

    slopes = jax.grad(lambda v: moved(v, 0.0).sum())(v)
    assert np.all(np.asarray(slopes) == 1)
    if case.is_a("separable"):
        along = jax.jvp(lambda t: moved(v, t), (0.0,), (1.0,))[1]
        inside = slice(2, 5)  # off the kinks
        assert_close(
            along[0, inside], -case.slopes(v.astype(float))[0, inside], rtol=1e-5, atol=1e-6
        )
