"""The maximum mean discrepancy against loops over pairs, and what it keeps in memory."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import penalties_jax as pj
import penalties_jax.functional as F  # noqa: N812
from penalties_jax.functional import platform
from tests.catalogue import CASES, every, only
from tests.oracles import assert_close, gradient, lattice
from tests.programs import quick_jit

MMD = CASES["mmd"]
X, Y = lattice(0, 7, 3), lattice(1, 5, 3)


@every(only(lambda case: case.function is F.mmd, CASES))
@pytest.mark.parametrize("scales", [1.3, (0.5, 2.0), np.array([0.25, 1.0, 4.0])], ids=str)
def test_value_and_gradients(case, scales, x64, monkeypatch):
    """In one block, and in blocks that don't divide the rows."""

    def exact(x, y, scales):
        return case.formula(x, y, scales=scales)

    def total(x, y, scales):
        return case.raw(x, y, scales=scales)

    inputs = (X, Y, scales)
    desired = [
        gradient(lambda z, i=i: exact(*inputs[:i], z, *inputs[i + 1 :]), np.asarray(inputs[i]))
        for i in range(3)
    ]
    for rows in (1000, 5):
        monkeypatch.setattr(platform.Platform, "rows_in_product", lambda *_, r=rows: r)
        jax.clear_caches()
        value, slopes = quick_jit(jax.value_and_grad(total, (0, 1, 2)))(*inputs)
        assert_close(value, exact(*inputs), rtol=1e-12, atol=1e-14)
        for slope, wanted in zip(slopes, desired, strict=True):
            assert_close(
                np.stack(jax.tree.leaves(slope)).reshape(wanted.shape), wanted, rtol=1e-6, atol=1e-9
            )


def test_far_from_the_origin():
    """In float32, where the squares of the samples hide their distances."""
    x, y = np.float32(1e4 + X), np.float32(1e4 + Y)
    value, slope = jax.value_and_grad(F.mmd)(x, y)
    exact = partial(MMD.having(scales=1.0).formula)
    assert_close(value, exact(np.float64(x), np.float64(y)), rtol=1e-5)
    wanted = gradient(lambda x: exact(x, np.float64(y)), np.float64(x))
    assert_close(slope, wanted, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("unbiased", [False, True])
def test_equal_points(unbiased):
    """The same sample twice, all points of which are one: no NaN, no slope."""
    x = np.float32(np.tile(X[:1], (4, 1)))
    call = jax.jit(jax.value_and_grad(partial(F.mmd, unbiased=unbiased), (0, 1)))
    error, (value, slopes) = checkify.checkify(call, errors=checkify.float_checks)(x, x)
    error.throw()
    assert_close(value, 0, atol=1e-6)
    assert_close(np.stack(slopes), 0, atol=1e-6)
    value, slopes = call(np.float32(X), np.float32(X))
    if not unbiased:
        assert_close(value, 0, atol=1e-6)
    assert np.isfinite(slopes).all()


def test_without_bias():
    """Over samples of one distribution the mean is 0, within four standard errors."""
    keys = jax.random.split(jax.random.key(0), 2000)
    x, y = jax.vmap(lambda key: jax.random.normal(key, (2, 12, 2)))(keys).swapaxes(0, 1)
    values, biased = (
        jax.jit(jax.vmap(partial(F.mmd, unbiased=unbiased)))(x, y) for unbiased in (True, False)
    )
    error = np.std(values) / np.sqrt(len(values))
    assert abs(np.mean(values)) < 4 * error
    assert np.mean(biased) > 10 * error


def test_memory_grows_with_the_samples_not_with_the_pairs():
    """Forward and backward at 20,000 samples each: a few blocks, where one matrix takes 1.6 GB."""
    sample = jax.ShapeDtypeStruct((20_000, 64), jnp.float32)
    slopes = jax.jit(jax.value_and_grad(partial(F.mmd, scales=(0.5, 1.0, 2.0)), (0, 1)))
    memory = slopes.lower(sample, sample).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 10 * platform.CPU.product_bytes


def test_sharded_samples():
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((8,), ("batch",), axis_types=(kind,))
        x, y = np.float32(lattice(2, 16, 3)), np.float32(lattice(3, 8, 3))
        placed = jax.device_put((x, y), NamedSharding(mesh, PartitionSpec("batch")))
        call = jax.jit(jax.value_and_grad(F.mmd, (0, 1)))
        (value, slopes), (wanted, wanted_slopes) = call(*placed), call(x, y)
        assert_close(value, wanted, rtol=1e-5)
        for slope, other in zip(slopes, wanted_slopes, strict=True):
            assert_close(slope, other, rtol=1e-4, atol=1e-6)


def test_half_precision_and_trees():
    x, y = jnp.asarray(X, jnp.bfloat16), jnp.asarray(Y, jnp.bfloat16)
    value, slope = jax.value_and_grad(F.mmd)(x, y)
    assert value.dtype == jnp.float32
    assert slope.dtype == jnp.bfloat16
    assert_close(value, F.mmd(np.float32(X), np.float32(Y)), rtol=1e-5)
    config = 0.5 * pj.MMD((1.0,))
    assert_close(config({"a": x, "b": None, "c": y}, {"a": y, "b": None, "c": x}), value)


ERRORS = {
    "columns": (lambda: F.mmd(X, Y[:, :2]), r"\(7, 3\) and \(5, 2\)"),
    "axes": (lambda: F.mmd(X[0], Y), r"\[n, d\] and \[m, d\].*\(3,\)"),
    "rows": (lambda: F.mmd(X, Y[:1], unbiased=True), "y needs at least 2 rows, got 1"),
    "none": (lambda: F.mmd(X[:0], Y), "x needs at least 1 rows, got 0"),
    "scale": (lambda: F.mmd(X, Y, scales=(1.0, 0.0)), "scales must be above 0, got 0.0"),
    "no scale": (lambda: F.mmd(X, Y, scales=()), "scales must hold at least one number"),
    "where": (lambda: pj.MMD()(X, Y, where=True), r"MMD.* takes no where"),
}


@pytest.mark.parametrize(("call", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
