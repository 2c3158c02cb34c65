"""Divergences from logits: accuracy, edges, blocks, devices and memory."""

import itertools
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from scipy import special

import penalties_jax.functional as F  # noqa: N812
from penalties_jax.functional.divergences import formulas
from penalties_jax.functional.divergences.rows import Rows, Wanted, _at_once, _in_passes
from tests import oracles
from tests.catalogue import (
    DIVERGENCE_CASES,
    EDGE_ROWS,
    INF,
    every,
    first_of_each,
    only,
    streamed_again,
)
from tests.oracles import as_float32, assert_close, gradient
from tests.programs import as_for_an_accelerator, quick_jit

STREAMED = only(lambda case: case.streamed, DIVERGENCE_CASES)
STRUCTURES = first_of_each(lambda case: case.structure, STREAMED)
FUNCTIONS = first_of_each(lambda case: case.function, STREAMED)
KL = STREAMED["kl_from_logits"]
every_structure = every(STRUCTURES)


def rows(classes, noise, count=4, seed=0):
    """Nearby float32 logits; some classes masked in both, some in one."""
    random = np.random.default_rng(seed)
    p = 2 * random.normal(size=(count, classes))
    q = p + noise * random.normal(size=p.shape)
    p[:, 3], q[:, 3] = -INF, -INF
    return p.astype(np.float32), q.astype(np.float32)


@every_structure
@pytest.mark.parametrize(("temperature", "block_size"), [(1.0, None), (0.5, 3), (3.0, 1)])
def test_value_and_gradients(case, temperature, block_size):
    """Weighted row by row, at temperatures and in blocks that don't divide the rows."""
    case = case.having(temperature=temperature, block_size=block_size)
    logits = rows(1_000, 1.0)[: case.inputs]
    weights = np.linspace(-1, 2, 4).astype(np.float32)

    @quick_jit
    def everything(*logits):
        value, pullback = jax.vjp(partial(case.raw, reduction="none"), *logits)
        return value, pullback(weights)

    ours, found = everything(*logits)
    logits = [x.astype(np.float64) for x in logits]
    assert_close(ours, case.entries(*logits), rtol=3e-6)
    for slope, desired in zip(found, case.gradients(*logits), strict=True):
        assert_close(slope, weights[:, None] * desired, rtol=1e-4, atol=1e-8)


def required(value):
    """The relative error that float32 may have at a divergence of this size."""
    return np.select(
        [value >= 1e-2, value >= 1e-6, value >= 1e-8, value >= 1e-10],
        [1e-6, 1e-5, 1e-4, 2e-3],
        2e-2,
    )


@pytest.mark.parametrize(
    ("dtype", "classes", "count"),
    [
        (jnp.float32, 1_000, 8),
        (jnp.bfloat16, 1_000, 8),
        pytest.param(jnp.float32, 262_144, 1, marks=pytest.mark.slow),
        pytest.param(jnp.bfloat16, 262_144, 1, marks=pytest.mark.slow),
    ],
)
def test_accuracy_by_the_true_divergence(classes, count, dtype):
    """Nearby logits, rounded to the dtype: values never negative, gradients as good."""
    noises = np.array([1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0])
    random = np.random.default_rng(classes)
    a = random.normal(size=(len(noises), count, classes))
    b = a + noises[:, None, None] * random.normal(size=a.shape)
    a, b = (jnp.asarray(x, dtype) for x in (a, b))
    logits = [np.asarray(x).astype(np.float64) for x in (a, b)]
    for name, case in only(lambda case: case.inputs == 2, STRUCTURES).items():
        value, slopes = case.entries(*logits), case.gradients(*logits)
        ours = np.asarray(case.raw(a, b, block_size=None, reduction="none"))
        assert np.all(ours >= 0)
        some = value > 0
        error = np.abs(ours[some] / value[some] - 1)
        assert np.all(error <= required(value[some])), (name, error, value[some])
        # With a floor the oracle moves one class at a time.
        if dtype == jnp.float32 and "floor" not in case.settings:
            total = partial(case.raw, block_size=None, reduction="sum")
            found = jax.grad(total, (0, 1))
            for slope, desired in zip(found(a, b), slopes, strict=True):
                size = np.linalg.norm(desired, axis=-1)
                error = np.linalg.norm(np.asarray(slope) - desired, axis=-1) / size
                assert error.max() < 1e-4, (name, error)


EDGES = {
    "masked in both": ([0.0, 1.0, -INF], [2.0, 0.0, -INF]),
    "p = 0": ([0.0, -INF, 1.0], [0.5, 0.5, 0.0]),
    "q = 0": ([0.0, 1.0, 2.0], [0.0, -INF, 1.0]),
    "disjoint": ([0.0, -INF, -INF], [-INF, 0.0, 1.0]),
    "far apart": ([0.0, 500.0, -500.0], [500.0, -500.0, 0.0]),
    "large": ([1e30, 0.0, -1e30], [1e30, 0.0, 0.0]),
    "the same": ([0.3, 1.7, -2.0], [0.3, 1.7, -2.0]),
}


@every_structure
def test_edges_are_those_of_the_log_probability_functions(case):
    """Value and pullback, also where the value is infinite; no NaN anywhere."""
    others = zip(*EDGES.values(), strict=True)
    logits = [
        np.vstack([rows, np.pad(np.array(other), ((0, 0), (0, 1)), constant_values=-INF)])
        for rows, other in zip(EDGE_ROWS.swapaxes(0, 1), others, strict=True)
    ][: case.inputs]

    def everything(function, *logits):
        value, pullback = jax.vjp(partial(function, reduction="none"), *logits)
        return value, pullback(jnp.ones(len(value)))

    @quick_jit
    def both(*logits):
        return everything(case.raw, *logits), everything(case.of_log_probabilities.call, *logits)

    (value, slopes), (desired, pulled) = both(*(jnp.asarray(x, jnp.float32) for x in logits))
    exact = case.exact_values(*logits)
    assert_close(value, as_float32(exact), rtol=1e-5, atol=1e-7)
    assert_close(value, desired, rtol=2e-6, atol=1e-7)
    finite = np.isfinite(exact)
    for slope, expected, true in zip(slopes, pulled, case.exact_gradients(*logits), strict=True):
        assert_close(slope, expected, rtol=1e-5, atol=1e-6)
        assert_close(np.asarray(slope)[finite], as_float32(true)[finite], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 1.3, 7.0])
def test_a_row_of_the_least_numbers(temperature):
    """As one finds it where all classes are masked out."""
    x = jnp.full((2, 8), jnp.finfo(jnp.float32).min / 2).at[1].set(jnp.arange(8.0))
    kl, entropy = quick_jit(
        lambda x: (
            F.kl_from_logits(x, x, temperature=temperature, reduction="none"),
            F.entropy_from_logits(x, temperature=temperature, reduction="none"),
        )
    )(x)
    assert_close(kl, [0, 0], atol=0)
    assert_close(entropy[0], math.log(8))


@pytest.mark.parametrize("mixture", [1e-8, 1e-6, 1e-3, 0.5])
def test_slopes_of_extreme_mixtures(mixture):
    """Of P, whose share it is, and of Q, whose derivative vanishes with it."""
    p, q = np.array([0.0, 1.0, 2.0, -1.0]), np.array([1.0, 0.0, 0.5, 3.0])
    mixture = float(np.float32(mixture))

    log_p, log_q = (special.log_softmax(x) for x in (p, q))
    to_p = np.log1p((1 - mixture) * np.expm1(log_q - log_p))
    to_q = np.log1p(mixture * np.expm1(log_p - log_q))
    slopes = [
        -mixture * np.exp(log_p) * (to_p - (np.exp(log_p) * to_p).sum()),
        -(1 - mixture) * np.exp(log_q) * (to_q - (np.exp(log_q) * to_q).sum()),
    ]
    found = jax.grad(partial(F.js_from_logits, mixture=mixture), (0, 1))(
        *(jnp.asarray(x, jnp.float32) for x in (p, q))
    )
    for slope, expected in zip(found, slopes, strict=True):
        assert_close(slope, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize("mixture", [0.0, 1.0])
def test_ends_of_the_mixture(mixture):
    """There it is one of the two, whatever they are, and neither has a derivative."""
    logits = EDGE_ROWS.swapaxes(0, 1).astype(np.float32)
    value, slopes = jax.jit(
        jax.value_and_grad(
            lambda *x: F.js_from_logits(*x, mixture=mixture, reduction="sum"), (0, 1)
        )
    )(*logits)
    assert value == 0
    assert all(np.all(np.asarray(slope) == 0) for slope in slopes)


def test_a_temperature_for_each_position_and_a_sweep(x64):
    p, q = (x.astype(np.float64) for x in rows(7, 1.0, count=3))
    each = jnp.array([0.5, 1.0, 2.0])

    def swept(p, q, each):
        slope = jax.grad(lambda t: F.kl_from_logits(p, q, temperature=t, block_size=2))
        return F.kl_from_logits(p, q, temperature=each), jax.vmap(slope)(each)

    logs = [special.log_softmax(x / np.array(each)[:, None], axis=-1) for x in (p, q)]
    value, slopes = quick_jit(swept)(p, q, each)
    assert_close(value, oracles.kl(*logs).mean(), rtol=1e-12)
    for t, slope in zip(each, slopes, strict=True):
        along = gradient(lambda t: KL.entries(p, q, temperature=t).mean(), t)
        assert_close(slope, along, rtol=1e-7)


@every(FUNCTIONS, slow=streamed_again)
def test_an_accelerator_computes_the_same_in_one_pass(case):
    """Without a loop over blocks; test_accelerator.py has the rest."""
    logits = rows(50, 1.0)[: case.inputs]
    function = jax.value_and_grad(case.raw, range(case.inputs))
    value, slopes = quick_jit(function)(*logits)
    with as_for_an_accelerator():
        assert "while" not in str(jax.make_jaxpr(function)(*logits))
        found, others = quick_jit(function)(*logits)
    assert_close(found, value, rtol=1e-6)
    for slope, desired in zip(others, slopes, strict=True):
        assert_close(slope, desired, rtol=1e-4, atol=1e-7)


def test_sums_of_slopes_that_means_tell(x64):
    """As one pass finds them, in which the largest logits come late or early."""
    orders = np.sort, lambda x: np.sort(x)[:, ::-1]
    for formula, order in itertools.product((*formulas.KL.values(), formulas.ENTROPY), orders):
        logits = (jnp.asarray(order(x), float) for x in rows(9, 1.0)[: len(formula.slopes)])
        of_rows = Rows(tuple(logits), (jnp.full((4, 1), 0.7),))
        wanted = Wanted((True,) * len(formula.slopes), (False,))
        (_, found), (_, desired) = (
            function(formula, None, wanted, of_rows) for function in (_at_once, _in_passes)
        )
        for each, other in zip(found.slope_sums, desired.slope_sums, strict=True):
            assert_close(each, other, rtol=1e-12, atol=1e-14)


@every(FUNCTIONS, slow=streamed_again)
def test_an_excluded_position_may_hold_anything(case):
    inputs = range(case.inputs)
    logits = [np.array(x) for x in rows(6, 1.0, count=3)[: case.inputs]]
    mask = np.array([True, False, True])
    kept = [x[mask] for x in logits]
    value, slopes = quick_jit(jax.value_and_grad(case.raw, inputs))(*kept)
    for x in logits:
        x[1] = [np.nan, INF, -INF, 0, 1, np.nan]
    excluding = jax.value_and_grad(partial(case.raw, where=mask), inputs)
    masked, found = quick_jit(excluding)(*logits)
    assert_close(masked, value, rtol=1e-6)
    # The derivative in the temperature, of all positions and of each.
    at = quick_jit(jax.grad(lambda t, where, *x: case.raw(*x, where=where, temperature=t)))
    by_kept = at(np.float32([2.0, 0.5]), None, *kept)
    by_each = at(np.float32([2.0, np.nan, 0.5]), mask, *logits)
    assert_close(by_each, np.insert(by_kept, 1, 0), rtol=1e-5, atol=1e-7)
    assert_close(at(0.7, mask, *logits), at(0.7, None, *kept), rtol=1e-5, atol=1e-7)
    for slope, desired in zip(found, slopes, strict=True):
        assert_close(slope[mask], desired, rtol=1e-5, atol=1e-8)
        assert_close(slope[1], 0)


def test_the_temperature_of_an_excluded_position_may_be_0():
    """In a second reverse pass too, and where NaNs that are made are refused."""
    p, q = (x[:, :3] for x in rows(6, 1.0, count=3))
    mask, scales = np.array([True, False, True]), np.float32([1.0, 0.0, 2.0])

    def value(temperature, p, q, scales, where=None):
        return KL.raw(p, q, temperature=temperature * scales, where=where)

    twice = jax.grad(jax.grad(value))
    desired = twice(1.5, p[mask], q[mask], scales[mask])
    with jax.debug_nans(True):
        found = jax.grad(value)(1.5, p, q, scales, where=mask)
    assert_close(found, jax.grad(value)(1.5, p[mask], q[mask], scales[mask]), rtol=1e-5)
    assert_close(twice(1.5, p, q, scales, where=mask), desired, rtol=1e-5)


@every(FUNCTIONS, slow=streamed_again)
def test_a_position_that_the_caller_leaves_out_may_hold_anything(case):
    """By `jnp.where` on the values of all positions: no derivative sees it."""
    mask = np.array([True, False, True])
    logits = [np.where(mask[:, None], x, np.nan) for x in rows(6, 1.0, count=3)[: case.inputs]]

    def total(t, where, *logits):
        values = case.raw(*logits, temperature=t, reduction="none")
        return jnp.sum(jnp.where(where, values, 0))

    slopes = quick_jit(jax.grad(total, (0, *range(2, 2 + case.inputs))))
    by_temperature, *found = slopes(0.7, mask, *logits)
    desired, *others = slopes(0.7, True, *(x[mask] for x in logits))
    assert_close(by_temperature, desired, rtol=1e-5, atol=1e-7)
    for slope, other in zip(found, others, strict=True):
        assert_close(slope, np.insert(np.asarray(other), 1, 0, axis=0), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("shape", [(5,), (1, 5), (7, 5), (2, 3, 5), (3, 2, 7, 5)])
@pytest.mark.parametrize("block_size", [None, 2])
def test_positions_of_any_number_and_blocks_that_do_not_divide_them(shape, block_size):
    random = np.random.default_rng(0)
    p, q = (random.normal(size=shape).astype(np.float32) for _ in range(2))
    ours = F.kl_from_logits(p, q, block_size=block_size, reduction="none")
    assert_close(ours, KL.entries(*(x.astype(np.float64) for x in (p, q))), rtol=1e-5)


def test_mapped_over_one_input_only():
    """A frozen reference is not copied for each member; a mapped axis is one more of positions."""
    random = np.random.default_rng(0)
    p = random.normal(size=(3, 512, 32)).astype(np.float32)
    q = random.normal(size=(512, 32)).astype(np.float32)
    value = jax.value_and_grad(partial(F.kl_from_logits, block_size=4))
    members = jax.jit(jax.vmap(value, (0, None)))
    apart = [value(row, q) for row in p]
    values, slopes = members(p, q)
    assert_close(values, [v for v, _ in apart])
    assert_close(slopes, [s for _, s in apart], atol=1e-9)
    temporaries = members.lower(p, q).compile().memory_analysis().temp_size_in_bytes
    assert temporaries < p.nbytes / 4


def test_mapped_twice_along_any_axis():
    random = np.random.default_rng(0)
    p = random.normal(size=(4, 3, 5)).astype(np.float32)
    q = random.normal(size=(4, 5, 6)).astype(np.float32)
    pairs = jax.vmap(jax.vmap(F.kl_from_logits, (None, 2)), (1, None))
    found = pairs(p, q)
    p, q = p[:, :, None].astype(np.float64), np.moveaxis(q, 2, 1)[:, None].astype(np.float64)
    desired = KL.entries(*np.broadcast_arrays(p, q)).mean(0)
    assert_close(found, desired, rtol=1e-5)


@pytest.mark.parametrize("block_size", [1, 4, 16, 32, None])
def test_mapped_twice_over_what_one_map_shares(block_size):
    """Members of a sweep and examples: blocks may cut the axis along which q is one for all."""
    random = np.random.default_rng(0)
    p = random.normal(size=(4, 3, 8, 6)).astype(np.float32)
    q = random.normal(size=(4, 8, 6)).astype(np.float32)
    divergence = partial(F.kl_from_logits, block_size=block_size)
    found = jax.jit(jax.vmap(jax.vmap(divergence, (0, None))))(p, q)
    p, q = np.broadcast_arrays(p.astype(np.float64), q[:, None].astype(np.float64))
    assert_close(found, KL.entries(p, q).mean(-1), rtol=1e-5)


@every(FUNCTIONS, slow=streamed_again)
def test_temporaries_are_a_few_blocks(case):
    """In blocks of 4 rows, however many devices the process has."""
    shape = jax.ShapeDtypeStruct((4096, 1024), jnp.float32)
    for function in (case.raw, jax.grad(case.raw)):
        program = jax.jit(partial(function, block_size=4)).lower(*[shape] * case.inputs).compile()
        assert program.memory_analysis().temp_size_in_bytes < 0.02 * 4096 * 1024 * 4


@pytest.mark.parametrize(
    ("function", "shapes"),
    [(F.kl_from_logits, [(3, 504, 16)] * 2), (F.linear_kl, [(3, 504, 16), (16, 50)] * 2)],
)
def test_shardings_that_only_the_compiled_program_has(function, shapes):
    """Rows are cut so that each block has some of each device: nothing is gathered."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows, whole = (NamedSharding(mesh, spec) for spec in (P(None, "data"), P()))
    shardings = tuple(rows if len(shape) == 3 else whole for shape in shapes)
    random = np.random.default_rng(0)
    arrays = [random.normal(size=shape).astype(np.float32) for shape in shapes]
    loss = jax.value_and_grad(partial(function, block_size=48))
    program = quick_jit(loss, in_shardings=shardings, out_shardings=(whole, rows))
    text = program.lower(*arrays).compile().as_text()
    assert "while" in text
    assert "all-gather" not in text
    for ours, desired in zip(program(*arrays), quick_jit(loss)(*arrays), strict=True):
        assert_close(ours, desired, rtol=1e-5, atol=1e-8)


def test_no_price_for_a_gradient_that_is_not_asked_for():
    """The gradient for the model alone takes less work than that for the reference as well."""
    shape = jax.ShapeDtypeStruct((64, 128), jnp.float32)

    def work(arguments):
        program = jax.jit(jax.grad(F.kl_from_logits, arguments)).lower(shape, shape)
        return program.compile().cost_analysis()["flops"]

    assert 0 < work(0) < 0.8 * work((0, 1))


def test_a_half_precision_gradient_has_the_dtype_of_the_logits():
    p, q = (jnp.asarray(x, jnp.bfloat16) for x in rows(50, 1.0))
    value, slope = jax.value_and_grad(F.kl_from_logits)(p, q)
    assert (value.dtype, slope.dtype) == (jnp.float32, jnp.bfloat16)
    wide = [np.asarray(x).astype(np.float64) for x in (p, q)]
    assert_close(slope, next(KL.gradients(*wide)) / 4, rtol=1e-2, atol=1e-9)


@every(STRUCTURES, slow=lambda case: case.name not in FUNCTIONS)
def test_classes_sharded_over_devices(case):
    """Rows over one mesh axis, classes over another: the numbers of one device."""
    mesh = jax.make_mesh((2, 4), ("rows", "classes"), axis_types=(AxisType.Auto,) * 2)
    logits = rows(64, 1.0, count=6)[: case.inputs]
    mask = np.array([True, True, False, True, False, True])
    named = partial(case.raw, axis_name="rows", class_axis_name="classes")
    arguments = range(1, case.inputs + 2)
    whole = jax.value_and_grad(
        lambda mask, t, *x: case.raw(*x, where=mask, temperature=t), arguments
    )
    desired, slopes = quick_jit(whole)(mask, 1.3, *logits)
    for check_vma in (True, False) if case is KL else (True,):
        sharded = jax.shard_map(
            lambda mask, t, *x: named(*x, where=mask, temperature=t),
            mesh=mesh,
            in_specs=(P("rows"), P(), *[P("rows", "classes")] * case.inputs),
            out_specs=P(),
            check_vma=check_vma,
        )
        ours, found = quick_jit(jax.value_and_grad(sharded, arguments))(mask, 1.3, *logits)
        assert_close(ours, desired, rtol=1e-5)
        for slope, expected in zip(found, slopes, strict=True):
            assert_close(slope, expected, rtol=1e-4, atol=1e-7)


def test_normalised_entropy_of_sharded_classes():
    mesh = jax.make_mesh((8,), ("classes",), axis_types=(AxisType.Auto,))
    sharded = jax.shard_map(
        partial(F.entropy_from_logits, normalize=True, class_axis_name="classes"),
        mesh=mesh,
        in_specs=P(None, "classes"),
        out_specs=P(),
    )
    assert_close(sharded(jnp.zeros((3, 64))), 1.0)
    assert float(F.entropy_from_logits(jnp.zeros((3, 1)), normalize=True)) == 0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"direction": "both"}, ValueError, "'forward', 'reverse', 'symmetric', got 'both'"),
        ({"reduction": "avg"}, ValueError, "'sum', 'mean', 'none', got 'avg'"),
        ({"block_size": 0}, ValueError, "block_size must be at least 1, got 0"),
        ({"block_size": 2.0}, TypeError, r"block_size must be of type int \| None, got 2\.0"),
        ({"temperature": 0.0}, ValueError, "temperature must be above 0, got 0.0"),
        ({"temperature": -1}, ValueError, "temperature must be above 0, got -1"),
        ({"temperature": np.ones(3)}, ValueError, r"temperature must broadcast to shape \(2,\)"),
        ({"where": np.ones(2)}, TypeError, "where must be boolean"),
        ({"where": np.ones(3, bool)}, ValueError, r"where must broadcast to shape \(2,\)"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        F.kl_from_logits(jnp.zeros((2, 4)), jnp.zeros((2, 4)), **options)


def test_shapes_that_differ():
    for function in (F.kl_from_logits, F.js_from_logits):
        with pytest.raises(ValueError, match=r"\(2, 4\) and \(2, 5\)"):
            function(jnp.zeros((2, 4)), jnp.zeros((2, 5)))


def test_inputs_without_classes():
    with pytest.raises(TypeError, match="logits_q must be an array, got a NoneType"):
        F.kl_from_logits(jnp.zeros((2, 4)), None)
    with pytest.raises(ValueError, match=r"logits needs classes on its last axis, got shape \(\)"):
        F.entropy_from_logits(jnp.zeros(()))
    with pytest.raises(ValueError, match=r"got shape \(2, 0\)"):
        F.js_from_logits(jnp.zeros((2, 0)), jnp.zeros((2, 0)))


@pytest.mark.parametrize("mixture", [-1, 1.5, math.nan])
def test_a_mixture_out_of_range(mixture):
    x = jnp.zeros((2, 4))
    for function in (F.js_from_logits, F.js_divergence):
        with pytest.raises(ValueError, match=r"mixture must be in \[0, 1\]"):
            function(x, x, mixture=mixture)
    assert np.isnan(F.js_divergence(x, x, mixture=jnp.asarray(math.nan)))


@every(FUNCTIONS, slow=streamed_again)
def test_hessians(case, x64):
    """Forward over reverse mode, and reverse over reverse, also where classes are masked out."""
    logits = [jnp.asarray(x, jnp.float64) for x in rows(5, 1.0, count=3)][: case.inputs]
    if case.inputs == 2:
        # P = Q in one row, and one class of it in another.
        p, q = logits
        logits = [p, q.at[0].set(p[0]).at[1, 2].set(p[1, 2])]
    arguments = tuple(range(case.inputs))

    @quick_jit
    def both(*logits):
        slope = jax.grad(partial(case.raw, block_size=2), arguments)
        return tuple(jacobian(slope, arguments)(*logits) for jacobian in (jax.jacfwd, jax.jacrev))

    def exact(i, row, *logits):
        return list(case.gradients(*logits))[i][row, 0] / 3

    for found in both(*logits):
        for i, row in itertools.product(arguments, range(3)):
            for j in arguments:
                others = [np.asarray(x) for x in logits]
                finite = np.isfinite(others[j])

                def slope_of(x, i=i, row=row, j=j, others=others, finite=finite):
                    moved = [*others]
                    moved[j] = np.where(finite, x, -INF)
                    return exact(i, row, *moved)

                desired = gradient(slope_of, np.where(finite, others[j], 0))
                assert_close(found[i][j][row, 0], desired, rtol=1e-8, atol=1e-10)


@every(FUNCTIONS, slow=streamed_again)
def test_exported_for_any_number_of_positions(case):
    """One program for two shapes, whose axes of unknown size are not cut into blocks."""
    both = quick_jit(jax.value_and_grad(partial(case.raw, block_size=2)))
    shape = jax.ShapeDtypeStruct((*jax.export.symbolic_shape("b, c"), 3, 5), jnp.float32)
    program = jax.export.export(both)(*[shape] * case.inputs)
    again = quick_jit(program.call)
    for sizes in ((2, 4), (1, 3)):
        logits = [jnp.asarray(x) for x in case.data(shape=(*sizes, 3, 5))]
        (value, slope), (desired, slopes) = again(*logits), both(*logits)
        assert_close(value, desired)
        assert_close(slope, slopes, atol=1e-7)


def test_one_program_for_all_platforms():
    """Lowered where only a CPU is, it runs on whichever it finds."""
    both = jax.jit(jax.value_and_grad(F.kl_from_logits))
    logits = rows(50, 1.0)
    program = jax.export.export(both, platforms=("cpu", "cuda", "tpu"))(*logits)
    for found, desired in zip(jax.jit(program.call)(*logits), both(*logits), strict=True):
        np.testing.assert_array_equal(found, desired)


def test_forward_mode_is_refused():
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(F.entropy_from_logits, (jnp.ones(3),), (jnp.ones(3),))


# A cross entropy, which takes labels too.


def surprise(z, labels, weights, z_loss, temperature):
    """The weighted cross entropy and z-loss of each row; a label that is no class has none."""
    z = z / temperature
    normaliser = special.logsumexp(z, axis=-1)
    chosen = np.take_along_axis(z, np.maximum(labels, 0)[..., None], -1)[..., 0]
    return weights * (np.where(labels < 0, 0, normaliser - chosen) + z_loss * normaliser**2)


def test_cross_entropy_from_logits(x64):
    """Value and gradients, by differences, in blocks that don't divide the rows."""
    random = np.random.default_rng(0)
    z, labels = random.normal(size=(2, 3, 7)), np.array([[0, 6, 2], [-1, 3, 3]])
    mask, numbers = np.array([[True, False, True], [True, True, True]]), (0.3, 0.7)
    spoilt, weights = np.where(mask[..., None], z, np.nan), np.array([-0.5, 0.0, 2.0])

    def value(z, labels, weights, numbers):
        options = {"where": mask, "block_size": 2, "weights": weights}
        z_loss, temperature = numbers
        return F.cross_entropy_from_logits(
            z, labels, z_loss=z_loss, temperature=temperature, **options
        )

    def exact(z, weights, numbers):
        return surprise(z, labels, weights, *numbers)[mask].sum() / mask.sum()

    both = quick_jit(jax.value_and_grad(value, (0, 2, 3)))
    ours, slopes = both(spoilt, labels, weights, numbers)
    assert_close(ours, exact(z, weights, numbers), rtol=1e-12)
    assert_close(
        slopes[0], gradient(lambda z: exact(z, weights, numbers), z), rtol=1e-7, atol=1e-10
    )
    assert_close(
        slopes[1], gradient(lambda w: exact(z, w, numbers), weights), rtol=1e-8, atol=1e-10
    )
    assert_close(slopes[2], gradient(lambda n: exact(z, weights, n), np.array(numbers)), rtol=1e-7)
    assert float(F.cross_entropy_from_logits(np.float32([-1e30, 1e30]), np.int8(1))) == 0


def test_cross_entropy_of_classes_sharded_over_devices():
    mesh = jax.make_mesh((2, 4), ("rows", "classes"), axis_types=(AxisType.Auto,) * 2)
    z, labels = rows(64, 1.0, count=6)[0], np.array([0, 17, 33, 63, -1, 32])
    weights = np.linspace(0.5, 2, 6, dtype=np.float32)

    def value(z, labels, weights, **names):
        return F.cross_entropy_from_logits(z, labels, weights=weights, z_loss=0.1, **names)

    sharded = jax.shard_map(
        partial(value, axis_name="rows", class_axis_name="classes"),
        mesh=mesh,
        in_specs=(P("rows", "classes"), P("rows"), P("rows")),
        out_specs=P(),
    )
    ours, slopes = quick_jit(jax.value_and_grad(sharded, (0, 2)))(z, labels, weights)
    exact = surprise(np.float64(z), labels, np.float64(weights), 0.1, 1.0)
    assert_close(ours, exact.mean())
    assert_close(slopes[1], exact / weights / 6)
    assert_close(slopes[0], jax.grad(value)(z, labels, weights), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (np.ones(2), TypeError, "labels must be integers, got float"),
        (np.ones((2, 4), int), ValueError, r"labels must have shape \(2,\).*\(2, 4\)"),
    ],
)
def test_bad_labels(labels, error, message):
    with pytest.raises(error, match=message):
        F.cross_entropy_from_logits(jnp.zeros((2, 4)), labels)


def test_entropies_are_never_negative():
    """Also where the logits are computed again for each pass over them."""
    x = jnp.asarray(3 * np.random.default_rng(0).normal(size=(64, 8)), jnp.float32)
    entropies = jax.jit(lambda x: F.entropy_from_logits(x * 50, reduction="none"))(x)
    assert float(jnp.min(entropies)) >= 0
