"""Importance minimality against float64, over microbatches and over devices."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import penalties_jax as pj
from tests.oracles import assert_close
from tests.programs import quick_jit

GAMMA, POWER, EPS = 0.5, 0.4, 1e-12


def smooth_l0(c):
    return c**2 / (c**2 + GAMMA**2), 2 * c * GAMMA**2 / (c**2 + GAMMA**2) ** 2


def lp(c):
    base = c + EPS
    return base**POWER, np.where(c > 0, POWER * base ** (POWER - 1), 0)


# What each per-value penalty is, and its value and slope in numpy.
PENALTIES = {
    "smooth l0": (pj.SmoothL0(gamma=GAMMA), smooth_l0),
    "lp": (pj.Lp(p=POWER, eps=EPS), lp),
    "function": (lambda c: c**3, lambda c: (c**3, 3 * c**2)),
    "sum": (0.5 * pj.L1() + pj.L2(), lambda c: (0.5 * c + c**2, np.where(c > 0, 0.5 + 2 * c, 0))),
}
every_penalty = pytest.mark.parametrize("name", PENALTIES)


def importances(seed, *shape):
    """Importances in [0, 1], a third of them 0, some components busy and some dead."""
    random = np.random.default_rng(seed)
    busy = random.permutation(np.linspace(0, 1, shape[-1]))
    return np.where(random.random(shape) < busy, random.random(shape), 0)


def oracle(sites, per_value, *, beta=0.0, reference_count=None, masks=None):
    """The loss and its gradient at every site, in float64."""
    masks = [None] * len(sites) if masks is None else masks
    sparsity = frequency = 0.0
    gradients = []
    for site, mask in zip(sites, masks, strict=True):
        site = np.asarray(site, np.float64)
        included = np.ones(site.shape[:-1], bool) if mask is None else mask
        values, slopes = per_value(np.where(included[..., None], site, 0))
        values, slopes = values * included[..., None], slopes * included[..., None]
        total = values.reshape(-1, site.shape[-1]).sum(0)
        n = max(included.sum(), 1)
        scale = 1 if reference_count is None else reference_count / n
        sparsity += (total / n).sum()
        frequency += (total / n * np.log2(1 + scale * total)).sum()
        through_log = np.log1p(scale * total) + scale * total / (1 + scale * total)
        gradients.append(slopes * (1 + beta * through_log / np.log(2)) / n)
    return (sparsity + beta * frequency, sparsity, frequency), gradients


def value_and_gradient(sites, penalty, **options):
    def total(sites):
        loss = pj.importance_minimality(sites, penalty, **options)
        return loss.total, loss

    (_, loss), gradients = jax.value_and_grad(total, has_aux=True)(sites)
    return loss, gradients


@pytest.mark.parametrize("reference_count", [None, 30.0])
@every_penalty
def test_value_and_gradient(name, reference_count, x64):
    penalty, per_value = PENALTIES[name]
    options = {"beta": 0.7, "reference_count": reference_count}
    sites = {"a": importances(0, 6, 5, 4), "b": importances(1, 7, 9), "c": importances(2, 3)}
    desired, slopes = oracle(sites.values(), per_value, **options)
    for dtype, tolerance in ((np.float64, 1e-12), (np.float32, 1e-5)):
        cast = {key: jnp.asarray(site, dtype) for key, site in sites.items()}
        loss, gradients = jax.jit(partial(value_and_gradient, penalty=penalty, **options))(cast)
        assert loss.total.dtype == dtype
        assert_close(loss, desired, rtol=tolerance)
        for key, slope in zip(sites, slopes, strict=True):
            assert gradients[key].dtype == dtype
            assert_close(gradients[key], slope, rtol=10 * tolerance, atol=1e-7)


def test_worked_values():
    gamma_one = pj.SmoothL0(gamma=1.0)
    loss = pj.importance_minimality(jnp.array([0.0, 1.0, 1e6]), gamma_one)
    assert_close(loss, [1.5, 1.5, 0.5 * np.log2(1.5) + 1], rtol=1e-6)
    for beta, total in ((0.0, 1.0), (1.0, 2.0)):
        assert (
            float(pj.importance_minimality(jnp.ones((2, 2)), gamma_one, beta=beta).total) == total
        )


@every_penalty
def test_low_precision_is_upcast(name):
    penalty, per_value = PENALTIES[name]
    exact = importances(3, 64, 5).astype(np.float16)
    for dtype in (jnp.float16, jnp.bfloat16):
        site = jnp.asarray(exact, dtype)
        desired, [slope] = oracle([np.asarray(site, np.float64)], per_value, beta=0.5)
        loss, gradient = value_and_gradient(site, penalty, beta=0.5)
        assert loss.total.dtype == jnp.float32
        assert gradient.dtype == dtype
        assert_close(loss, desired, rtol=1e-6)
        assert_close(gradient, slope, rtol=2e-2, atol=1e-6)


def test_integers_count():
    loss = pj.importance_minimality(jnp.array([[0, 1], [1, 1]]), pj.L1())
    assert float(loss.sparsity) == 1.5


def test_gradient_at_zero_at_its_peak_and_beyond(x64):
    """One component at one position: the slope of smooth L0 itself."""
    slope = jax.vmap(
        jax.grad(lambda c: pj.importance_minimality(c[None], pj.SmoothL0(gamma=GAMMA)).total)
    )
    grid = np.linspace(0, 10 * GAMMA, 100_001)
    slopes = np.asarray(slope(jnp.asarray(grid)))
    assert slopes[0] == 0
    assert_close(slopes.max(), 3 * 3**0.5 / (8 * GAMMA), rtol=1e-8)
    assert abs(grid[slopes.argmax()] - GAMMA / 3**0.5) < 1e-4
    steep = jax.grad(lambda c: pj.importance_minimality(c, pj.Lp(p=0.4)).total)(jnp.zeros((3, 2)))
    assert_close(steep, np.zeros((3, 2)))


def test_saturates_to_the_number_of_active_components():
    c = jnp.where(jnp.arange(10) < 3, 5.0, 0.0) * jnp.ones((7, 1))
    assert_close(pj.importance_minimality(c, pj.SmoothL0(gamma=1e-4)).sparsity, 3.0, rtol=1e-6)


@every_penalty
def test_importances_of_every_size(name):
    penalty, per_value = PENALTIES[name]
    c = np.logspace(-12, 8, 61).astype(np.float32)[:, None]
    desired, [slope] = oracle([c], per_value, beta=0.5)
    loss, gradient = value_and_gradient(jnp.asarray(c), penalty, beta=0.5)
    assert_close(loss, desired, rtol=1e-5)
    assert_close(gradient, slope, rtol=2e-5, atol=1e-30)


def test_small_sums_are_not_lost():
    """log2(1 + S) in float32 is 0 for S below 6e-8; log1p keeps it."""
    loss = pj.importance_minimality(jnp.full((1, 1), 1e-9), pj.L1())
    assert_close(loss.frequency, 1e-18 / np.log(2), rtol=1e-5)


@pytest.mark.parametrize("shared", [True, False])
def test_padding_positions(shared, x64):
    """Values and gradients are those of the positions that exist, whatever padding holds."""
    a, b = importances(4, 6, 5, 4), importances(5, 6, 5, 3)
    mask = np.random.default_rng(6).random((6, 5)) < 0.6
    masks = [mask, mask if shared else ~mask]
    spoiled = [np.where(m[..., None], x, np.nan) for x, m in zip((a, b), masks, strict=True)]
    where = mask if shared else masks
    desired, slopes = oracle([a, b], lp, beta=0.5, masks=masks)
    loss, gradients = value_and_gradient(
        list(map(jnp.asarray, spoiled)), pj.Lp(p=POWER, eps=EPS), beta=0.5, where=where
    )
    assert_close(loss, desired, rtol=1e-12)
    for actual, slope in zip(gradients, slopes, strict=True):
        assert_close(actual, slope, rtol=1e-9, atol=1e-12)
    rows = pj.importance_minimality(jnp.asarray(a), pj.L1(), where=mask[:1])
    assert_close(
        rows.sparsity, oracle([a], lambda c: (c, c), masks=[mask[:1] & np.ones((6, 1), bool)])[0][1]
    )
    whole, _ = oracle([a], lambda c: (c, c))
    for everything in (True, np.ones((1, 1), bool)):
        loss = pj.importance_minimality(jnp.asarray(a), pj.L1(), where=everything)
        assert_close(loss.sparsity, whole[1])
    nothing = value_and_gradient(jnp.asarray(a), pj.L1(), beta=1.0, where=np.zeros((6, 5), bool))
    assert_close(jnp.stack(nothing[0]), np.zeros(3))
    assert_close(nothing[1], np.zeros(a.shape))


def test_hyperparameters_have_gradients(x64):
    """Through gamma, beta and the reference count, by differences."""
    c = importances(7, 40, 6)

    def total(gamma, beta, count):
        psi = c**2 / (c**2 + gamma**2)
        f = psi.mean(0)
        return float(np.sum(f + beta * f * np.log2(1 + count * f)))

    point, step = (0.3, 0.5, 20.0), 1e-5
    actual = jax.grad(
        lambda gamma, beta, count: (
            pj.importance_minimality(
                jnp.asarray(c), pj.SmoothL0(gamma=gamma), beta=beta, reference_count=count
            ).total
        ),
        (0, 1, 2),
    )(*point)
    for i, slope in enumerate(actual):
        moved = [np.array(point) + sign * step * np.eye(3)[i] for sign in (1, -1)]
        assert_close(slope, (total(*moved[0]) - total(*moved[1])) / (2 * step), rtol=1e-7)


# Statistics.


def batches(sizes, components=5):
    return [importances(100 + i, size, components) for i, size in enumerate(sizes)]


@every_penalty
def test_statistics_merge_to_those_of_everything(name, x64):
    penalty, per_value = PENALTIES[name]
    parts = batches((5, 1, 17, 3))
    stats = [pj.ImportanceStats.from_batch(jnp.asarray(part), penalty) for part in parts]
    desired, _ = oracle([np.concatenate(parts)], per_value, beta=0.5)
    first, second, third, fourth = stats
    for merged in (
        first.merge(second).merge(third).merge(fourth),
        fourth.merge(second.merge(pj.ImportanceStats.empty(parts[0]))).merge(third.merge(first)),
    ):
        assert_close(merged.loss(0.5), desired, rtol=1e-13)


def test_sums_over_thousands_of_batches_keep_float32():
    """A plain float32 sum of 20,000 of these is off by 1e-4."""
    batch = {"a": jnp.full((1, 2), 0.1), "b": jnp.array([[1e4, 0.3]])}
    stats = pj.ImportanceStats.from_batch(batch, pj.L1())
    empty = pj.ImportanceStats.empty(jax.eval_shape(lambda: batch))
    merged, _ = jax.jit(
        lambda stats: jax.lax.scan(lambda s, _: (s.merge(stats), None), empty, length=20_000)
    )(stats)
    plain = np.add.accumulate(np.full(20_000, 0.1, np.float32))[-1]
    assert abs(plain / 2e3 - 1) > 1e-5
    total = sum(np.float32(x).astype(float) for x in (0.1, 0.1, 1e4, 0.3))
    loss = merged.loss()
    assert_close(loss.sparsity, total, rtol=1e-7)
    assert int(merged.counts["a"].high) * 2**16 + int(merged.counts["a"].low) == 20_000


@pytest.mark.parametrize("value", [0.1, 0.7, 1e-3])
def test_what_rounding_takes_from_sums_is_kept(value):
    """Over 100,000 merges, a plain float32 sum of which is off by 1e-5 and more."""
    one = pj.ImportanceStats.from_batch(jnp.full((1, 1), value, jnp.float32), pj.L1())

    @jax.jit
    def merged(one):
        empty = pj.ImportanceStats.empty(jnp.zeros((1, 1)))
        left, _ = jax.lax.scan(lambda all, _: (all.merge(one), None), empty, length=100_000)
        right, _ = jax.lax.scan(lambda all, _: (one.merge(all), None), empty, length=100_000)
        return left, right, left.merge(empty), empty.merge(left), left.merge(right)

    exact = float(np.float32(value))
    plain = np.add.accumulate(np.full(100_000, value, np.float32))[-1]
    assert abs(plain / 1e5 / exact - 1) > 1e-5
    for stats, count in zip(merged(one), (1e5, 1e5, 1e5, 1e5, 2e5), strict=True):
        kept = np.float64(stats.sums) + np.float64(stats.residuals)
        assert_close(kept, count * exact, rtol=1e-10)
        loss = stats.loss()
        assert_close(loss.sparsity, exact, rtol=2e-7)
        assert_close(loss.frequency, exact * np.log2(1 + count * exact), rtol=5e-7)


def test_counts_are_exact_beyond_float32():
    one = pj.ImportanceStats.from_batch(jnp.ones((1, 1)), pj.L1())
    merged = one
    for _ in range(30):
        merged = merged.merge(merged)
    for _ in range(3):
        merged = merged.merge(one)
    assert int(merged.counts.high) * 2**16 + int(merged.counts.low) == 2**30 + 3
    assert_close(merged.loss().sparsity, 1.0, rtol=1e-7)


def microbatches(count, rows=96, components=6):
    """Rows in microbatches of unequal sizes, padded to the longest, with their masks."""
    data = importances(8, rows, components)
    random = np.random.default_rng(9)
    cuts = np.sort(random.choice(np.arange(1, rows), count - 1, replace=False))
    pieces = np.split(data, cuts)
    longest = max(map(len, pieces))
    padded = np.stack([np.pad(p, ((0, longest - len(p)), (0, 0))) for p in pieces])
    mask = np.stack([np.arange(longest) < len(p) for p in pieces])
    return data, pieces, padded, mask


@pytest.mark.parametrize(
    ("name", "count"),
    [*(("smooth l0", count) for count in (1, 2, 8, 32)), ("lp", 8), ("function", 8)],
)
def test_both_routes_over_microbatches_are_exact(name, count, x64):
    """The gradient in a shared scale, which every importance is a function of."""
    penalty, per_value = PENALTIES[name]
    data, _, padded, mask = microbatches(count)
    scale = np.linspace(0.5, 1.5, data.shape[-1])
    desired, [slope] = oracle([scale * data], per_value, beta=0.5)
    desired_slope = (slope * data).sum(0)

    def stats(scale, batch):
        part, included = batch
        return pj.ImportanceStats.from_batch(scale * part, penalty, where=included)

    def merged(scale, data, mask):
        @jax.checkpoint
        def step(carry, batch):
            return carry.merge(stats(scale, batch)), None

        empty = pj.ImportanceStats.empty(data[0])
        return jax.lax.scan(step, empty, (data, mask))[0]

    @jax.jit
    def through_a_scan(scale, data, mask):
        return jax.value_and_grad(lambda scale: merged(scale, data, mask).loss(0.5).total)(scale)

    @jax.jit
    def in_two_passes(scale, data, mask):
        whole = merged(scale, data, mask)
        linear = whole.linearized(0.5)

        def step(total, batch):
            slope = jax.grad(lambda scale: linear(stats(scale, batch)))(scale)
            return total + slope, None

        return whole.loss(0.5).total, jax.lax.scan(step, jnp.zeros_like(scale), (data, mask))[0]

    for dtype, tolerance in ((np.float64, 1e-11), (np.float32, 1e-5)):
        arguments = (jnp.asarray(scale, dtype), jnp.asarray(padded, dtype), mask)
        for route in (through_a_scan, in_two_passes):
            total, gradient = route(*arguments)
            assert_close(total, desired[0], rtol=tolerance)
            assert_close(gradient, desired_slope, rtol=10 * tolerance, atol=1e-6)


def test_one_pass_is_off(x64):
    """By how much: the mean of microbatches' losses, and running sums, at 32 microbatches."""
    data, pieces, _, _ = microbatches(32)
    desired, [slope] = oracle([data], smooth_l0, beta=0.5)
    penalty = pj.SmoothL0(gamma=GAMMA)
    losses, slopes = zip(
        *(value_and_gradient(jnp.asarray(piece), penalty, beta=0.5) for piece in pieces),
        strict=True,
    )
    mean = np.mean([loss.total for loss in losses])
    assert mean < 0.9 * desired[0]
    averaged = np.concatenate(slopes) / len(pieces)
    assert np.linalg.norm(averaged - slope) > 0.1 * np.linalg.norm(slope)


# Devices.


def on_devices(count, kind=AxisType.Auto):
    return jax.make_mesh((count,), ("batch",), axis_types=(kind,), devices=jax.devices()[:count])


def lopsided(dtype):
    """A batch whose activity is nearly all in its first eighth, with a mask that thins others."""
    data = importances(10, 16, 3, 5)
    data[2:] *= 0.1
    mask = np.random.default_rng(11).random((16, 3)) < np.linspace(1, 0.3, 16)[:, None]
    return data.astype(dtype), mask


@pytest.mark.parametrize(
    ("count", "dtype"),
    [
        (8, np.float32),
        (8, np.float64),
        (1, np.float32),
        *(pytest.param(count, np.float32, marks=pytest.mark.slow) for count in (2, 4)),
    ],
)
def test_sharded(count, dtype, x64):
    """Under jit on sharded arrays, and in shard_map with the axis named; both kinds of mesh."""
    tolerance = 1e-6 if dtype == np.float64 else 1e-5
    data, mask = lopsided(dtype)
    per_value = {"smooth l0": smooth_l0, "lp": lp}
    for name in per_value:
        penalty = PENALTIES[name][0]
        desired, [slope] = oracle([data], per_value[name], beta=0.5, masks=[mask])

        def call(data, mask, axis_name=None, penalty=penalty):
            return value_and_gradient(data, penalty, beta=0.5, where=mask, axis_name=axis_name)

        for kind in (AxisType.Auto, AxisType.Explicit):
            mesh = on_devices(count, kind)
            with jax.set_mesh(mesh):
                sharding = NamedSharding(mesh, P("batch"))
                x, m = (jax.device_put(a, sharding) for a in (data, mask))
                inside = jax.shard_map(
                    partial(call, axis_name="batch"),
                    mesh=mesh,
                    in_specs=P("batch"),
                    out_specs=(P(), P("batch")),
                )
                for function in (call, inside):
                    loss, gradient = quick_jit(function)(x, m)
                    assert_close(loss, desired, rtol=tolerance)
                    assert_close(
                        gradient, slope, rtol=tolerance, atol=tolerance * np.abs(slope).max()
                    )


def test_no_gather_when_sharded():
    mesh = on_devices(8)
    data = jax.ShapeDtypeStruct((16, 3, 5), jnp.float32, sharding=NamedSharding(mesh, P("batch")))
    program = jax.jit(
        partial(value_and_gradient, penalty=pj.SmoothL0(gamma=GAMMA), beta=0.5)
    ).lower(data)
    assert "all-gather" not in program.compile().as_text()


def test_how_far_off_the_usual_forms_are(x64):
    """On eight shards: the local sum times their number, and the mean of local losses."""
    data, _ = lopsided(np.float64)
    desired, _ = oracle([data], smooth_l0, beta=0.5)
    shards = np.split(data, 8)
    busy = []
    for shard in shards:
        total = smooth_l0(shard)[0].reshape(-1, 5)
        mean = total.mean(0)
        busy.append(np.sum(mean + 0.5 * mean * np.log2(1 + 8 * total.sum(0))))
    local = [oracle([shard], smooth_l0, beta=0.5)[0][0] for shard in shards]
    assert np.mean(busy) > 1.2 * desired[0]
    assert np.mean(local) < 0.9 * desired[0]


TWO_PROCESSES = Path(__file__).parent / "two_processes.py"


def test_two_processes_of_two_devices(tmp_path):
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    port = 20_000 + os.getpid() % 20_000
    processes = [
        subprocess.Popen(
            [sys.executable, str(TWO_PROCESSES), str(port), str(rank)],
            cwd=TWO_PROCESSES.parents[2],
            env=environment | {"PYTHONPATH": str(TWO_PROCESSES.parents[2])},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output
        assert "same on 4 devices of 2 processes" in output


# Metrics.


def test_metrics_of_a_run():
    sites = {"mlp": importances(12, 30, 6), "attention": importances(13, 30, 4)}
    sites["mlp"][:, 0] = 0
    penalties = {"smooth_l0": pj.SmoothL0(gamma=GAMMA), "lp": pj.Lp(p=POWER, eps=EPS)}
    metrics = jax.jit(
        lambda sites: pj.importance_metrics(sites, penalties, beta=0.5, thresholds=(0.0, 0.25))
    )(jax.tree.map(jnp.asarray, sites))
    for name, per_value in (("smooth_l0", smooth_l0), ("lp", lp)):
        (total, sparsity, _), _ = oracle(sites.values(), per_value, beta=0.5)
        assert_close(metrics.pop(f"importance/{name}"), total)
        assert_close(metrics.pop(f"importance/{name}_no_beta"), sparsity)
    for threshold in (0.0, 0.25):
        counts = {key: (site > threshold).sum() / 30 for key, site in sites.items()}
        assert_close(metrics.pop(f"importance/ci_l0_{threshold:g}"), sum(counts.values()))
        for key, count in counts.items():
            assert_close(metrics.pop(f"importance/ci_l0_{threshold:g}/{key}"), count)
    dead = sum((site <= 0).all(0).sum() for site in sites.values())
    assert dead >= 1
    assert_close(metrics.pop("importance/dead"), dead / 10)
    assert not metrics


@pytest.mark.parametrize("thresholds", [(0.5, 0.1), (0.1, 0.5)])
def test_a_component_is_dead_if_it_is_never_above_the_lowest_threshold(thresholds):
    c = jnp.array([[0.05, 0.3, 0.9, 0.0], [0.1, 0.0, 0.0, 0.0]])
    metrics = pj.importance_metrics(c, {}, thresholds=thresholds)
    assert_close(metrics["importance/dead"], 2 / 4)
    assert_close(metrics["importance/ci_l0_0.1"], 2 / 2)
    assert_close(metrics["importance/ci_l0_0.5"], 1 / 2)


def test_metrics_leave_out_masked_positions():
    """They are those of the other positions, whatever padding holds."""
    kept = importances(15, 9, 4)
    mask = np.arange(12) % 4 > 0
    padded = np.full((12, 4), np.nan)
    padded[mask] = kept
    metrics = pj.importance_metrics(
        {"a": jnp.asarray(padded)},
        {"l0": pj.SmoothL0(gamma=GAMMA)},
        beta=0.5,
        reference_count=30.0,
        where=mask,
    )
    (total, sparsity, _), _ = oracle([kept], smooth_l0, beta=0.5, reference_count=30.0)
    used, dead = (kept > 0).sum() / 9, (kept == 0).all(0).mean()
    assert 0 < dead < 1
    desired = {"l0": total, "l0_no_beta": sparsity, "ci_l0_0": used, "ci_l0_0/a": used} | {
        "dead": dead
    }
    assert metrics.keys() == {f"importance/{name}" for name in desired}
    for name, value in desired.items():
        assert_close(metrics[f"importance/{name}"], value)


def test_metrics_are_of_the_global_batch(x64):
    data, mask = lopsided(np.float64)
    call = partial(pj.importance_metrics, penalties={"l1": pj.L1()}, beta=0.5)
    sharded = jax.jit(
        jax.shard_map(
            lambda data, mask: call({"a": data}, where=mask, axis_name="batch"),
            mesh=on_devices(8),
            in_specs=P("batch"),
            out_specs=P(),
        )
    )(data, mask)
    whole = call({"a": jnp.asarray(data)}, where=mask)
    assert sharded.keys() == whole.keys()
    for name, value in whole.items():
        assert_close(sharded[name], value, rtol=1e-12)
    bare = pj.importance_metrics(jnp.asarray(data), {"l1": pj.L1()})
    assert "importance/ci_l0_0" in bare
    assert not any(name.startswith("importance/ci_l0_0/") for name in bare)


# Bad input.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (({}, pj.L1()), "at least one array, got none"),
        ((None, pj.L1()), "at least one array, got none"),
        ((np.float32(1), pj.L1()), r"shape \[\.\.\., C\], got a scalar"),
    ],
)
def test_what_is_no_importances(arguments, message):
    with pytest.raises(ValueError, match=message):
        pj.importance_minimality(*arguments)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"beta": -0.5}, ValueError, "beta must be at least 0, got -0.5"),
        ({"reference_count": 0.5}, ValueError, "reference_count must be at least 1, got 0.5"),
        ({"where": np.ones(4, bool)}, ValueError, "where must broadcast"),
        ({"where": np.ones(3)}, TypeError, "where must be boolean"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        pj.importance_minimality(jnp.ones((3, 2)), pj.L1(), **options)


def test_penalties_that_do_not_fit():
    with pytest.raises(NotImplementedError, match="not a sum over single values"):
        pj.importance_minimality(jnp.ones((3, 2)), pj.GroupLasso(axis=-1))
    with pytest.raises(TypeError, match=r"call \.at\(step\) first"):
        pj.importance_minimality(
            jnp.ones((3, 2)), pj.SmoothL0(gamma=pj.anneal(1.0, 0.1, start=0, end=9))
        )
    with pytest.raises(ValueError, match="at least one number"):
        pj.importance_metrics(jnp.ones((3, 2)), {}, thresholds=())


def test_negative_importances_count_by_their_size():
    c = importances(14, 5, 3)
    for penalty in (pj.SmoothL0(gamma=0.2), pj.Lp(p=0.5), pj.L1()):
        positive, negative = (pj.importance_minimality(jnp.asarray(x), penalty) for x in (c, -c))
        assert_close(jnp.stack(negative), np.asarray(positive), rtol=1e-6)


def test_a_function_is_never_stale():
    """What it closes over may change between calls: nothing is cached by its identity."""
    slope = 1.0

    def scaled(c):
        return slope * c

    c = jnp.array([[0.5, 1.0], [0.25, 0.0]])
    config = pj.ImportanceMinimality(scaled)
    for slope in (1.0, 2.0):
        assert_close(pj.importance_minimality(c, scaled).total, slope * 0.875)
        assert_close(config(c), slope * 0.875)
        assert_close((3 * config)(c), slope * 2.625)


def test_without_beta_an_infinite_frequency_plays_no_part():
    value, slope = jax.value_and_grad(lambda c: pj.importance_minimality(c, pj.L1()).total)(
        jnp.array([[1e37]])
    )
    assert_close(value, 1e37)
    assert_close(slope, 1.0)


def test_metrics_of_a_diverged_run_are_nan():
    metrics = pj.importance_metrics(jnp.array([[jnp.nan, 1.0]]), {"l1": pj.L1()})
    assert np.isnan(metrics["importance/ci_l0_0"])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda c: pj.importance_minimality(c, pj.l1),
            ValueError,
            r"shape \(2, 3\), got shape \(\)",
        ),
        (lambda c: pj.importance_minimality(c, "lp"), TypeError, "a config such as pj.Lp"),
        (
            lambda c: pj.importance_minimality(c, pj.ImportanceMinimality(pj.L1())),
            TypeError,
            "pass its .penalty",
        ),
        (
            lambda c: pj.importance_minimality(c, pj.L1(), beta=pj.anneal(0, 1, start=0, end=9)),
            TypeError,
            "beta is a schedule",
        ),
        (lambda c: pj.importance_minimality(c, pj.L1(), beta=c[0]), ValueError, "beta must broad"),
        (lambda c: pj.importance_metrics(c, {}, thresholds=0.1), TypeError, "must be a sequence"),
        (lambda c: pj.ImportanceMinimality(pj.L1())(c, c), TypeError, r"takes 1 input\(s\), got 2"),
        (
            lambda c: pj.ImportanceStats.empty(c).merge(pj.ImportanceStats.empty(c[:, :1])),
            ValueError,
            r"\(3,\) and \(1,\)",
        ),
    ],
)
def test_misuse(call, error, message):
    with pytest.raises(error, match=message):
        call(jnp.ones((2, 3)))


@pytest.mark.parametrize("check_vma", [True, False])
def test_microbatches_of_a_shard(check_vma):
    """Both exact ways, inside of shard_map."""
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(AxisType.Auto,))
    c = jnp.asarray(np.random.default_rng(0).random((8, 4, 3)), jnp.float32)

    def loss(scale, c):
        return pj.importance_minimality(scale * c, pj.L1(), beta=0.5).total

    def scanned(scale, c):
        def step(stats, part):
            return stats.merge(pj.ImportanceStats.from_batch(scale * part, pj.L1())), None

        stats, _ = jax.lax.scan(jax.checkpoint(step), pj.ImportanceStats.empty(c[0]), c)
        return stats.psum("batch").loss(0.5).total

    def twice(scale, c):
        def stats(scale):
            return pj.ImportanceStats.from_batch(scale * c, pj.L1())

        linear = stats(scale).psum("batch").linearized(0.5)
        slope = jax.grad(lambda scale: linear(stats(scale)))(scale)
        return slope if check_vma else jax.lax.psum(slope, "batch")

    over = partial(
        jax.shard_map, mesh=mesh, in_specs=(P(), P("batch")), out_specs=P(), check_vma=check_vma
    )
    value, slope = jax.value_and_grad(loss)(1.5, c)
    ours, gradient = jax.value_and_grad(jax.jit(over(scanned)))(1.5, c)
    assert_close(ours, value)
    assert_close(gradient, slope)
    assert_close(jax.jit(over(twice))(jnp.float32(1.5), c), slope)
