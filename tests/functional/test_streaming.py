"""Divergences from logits: accuracy, edges, blocks, devices and memory; the rest is in cases.py."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from scipy import special

import penalties_jax.functional as F  # noqa: N812
from tests import oracles
from tests.functional.cases import quick_jit
from tests.oracles import assert_close, gradient

INF = math.inf
DIRECTIONS = ("forward", "reverse", "symmetric")

CALLS = {
    **{d: (partial(F.kl_from_logits, direction=d), 2) for d in DIRECTIONS},
    "js": (F.js_from_logits, 2),
    "js-mixture": (partial(F.js_from_logits, mixture=0.2), 2),
    "entropy": (F.entropy_from_logits, 1),
}
every_call = pytest.mark.parametrize(("call", "inputs"), CALLS.values(), ids=CALLS.keys())


def exact(name, *logits, temperature=1.0):
    """Each row's divergence in float64, and its gradients in the logits, by formula."""
    logs = [special.log_softmax(np.asarray(z, np.float64) / temperature, axis=-1) for z in logits]
    p = [np.exp(log) for log in logs]

    def kl(a, b):
        value = oracles.kl(logs[a], logs[b])
        gap = np.where(p[a] > 0, logs[a] - np.where(p[a] > 0, logs[b], 0), 0)
        slopes = {a: p[a] * (gap - value[..., None]), b: p[b] - p[a]}
        return value, [slopes[0], slopes[1]]

    if name == "entropy":
        value = oracles.entropy(logs[0])
        slopes = [-p[0] * (np.where(p[0] > 0, logs[0], 0) + value[..., None])]
    elif name in ("forward", "reverse"):
        value, slopes = kl(0, 1) if name == "forward" else kl(1, 0)
    elif name == "symmetric":
        sides = kl(0, 1), kl(1, 0)
        value = (sides[0][0] + sides[1][0]) / 2
        slopes = [(x + y) / 2 for x, y in zip(sides[0][1], sides[1][1], strict=True)]
    else:
        b = 0.2 if name == "js-mixture" else 0.5
        value = oracles.js(*logs, b)
        m = b * p[0] + (1 - b) * p[1]
        parts = [
            weight * x * np.where(x > 0, np.log(np.where(x > 0, x, 1) / np.where(x > 0, m, 1)), 0)
            for weight, x in zip((b, 1 - b), p, strict=True)
        ]
        slopes = [s - x * s.sum(-1, keepdims=True) for s, x in zip(parts, p, strict=True)]
    return value, [s / temperature for s in slopes]


def rows(classes, noise, count=4, seed=0):
    """Nearby float32 logits; some classes masked in both, some in one."""
    random = np.random.default_rng(seed)
    p = 2 * random.normal(size=(count, classes))
    q = p + noise * random.normal(size=p.shape)
    p[:, 3], q[:, 3] = -INF, -INF
    return p.astype(np.float32), q.astype(np.float32)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize(("temperature", "block_size"), [(1.0, None), (0.5, 3), (3.0, 1)])
def test_value_and_gradients(name, temperature, block_size):
    call, inputs = CALLS[name]
    logits = rows(1_000, 1.0)[:inputs]
    weights = np.linspace(-1, 2, 4).astype(np.float32)
    options = {"temperature": temperature, "block_size": block_size, "reduction": "none"}

    @quick_jit
    def everything(*logits):
        value, pullback = jax.vjp(partial(call, **options), *logits)
        return value, pullback(weights)

    value, slopes = exact(name, *logits, temperature=temperature)
    ours, found = everything(*logits)
    assert_close(ours, value, rtol=3e-6)
    for slope, desired in zip(found, slopes, strict=True):
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
        (jnp.float32, 131_072, 2),
        (jnp.bfloat16, 1_000, 8),
        pytest.param(jnp.float32, 1_000, 8, marks=pytest.mark.slow),
        pytest.param(jnp.bfloat16, 131_072, 2, marks=pytest.mark.slow),
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
    for name in (*DIRECTIONS, "js"):
        value, slopes = exact(name, *logits)
        ours = np.asarray(CALLS[name][0](a, b, reduction="none"))
        assert np.all(ours >= 0)
        some = value > 0
        error = np.abs(ours[some] / value[some] - 1)
        assert np.all(error <= required(value[some])), (name, error, value[some])
        if dtype == jnp.float32:
            found = jax.grad(lambda *x, name=name: CALLS[name][0](*x, reduction="sum"), (0, 1))
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


@every_call
def test_edges_are_those_of_the_log_probability_functions(call, inputs):
    """Value and pullback, also where the value is infinite; no NaN anywhere."""
    logits = [jnp.array(x) for x in zip(*EDGES.values(), strict=True)][:inputs]
    plain = {F.kl_from_logits: F.kl_divergence, F.js_from_logits: F.js_divergence}
    function = getattr(call, "func", call)
    from_logs = partial(plain.get(function, F.entropy), **getattr(call, "keywords", {}))

    def ours(*logits):
        return call(*logits, reduction="none")

    def theirs(*logits):
        return from_logs(*map(jax.nn.log_softmax, logits), reduction="none")

    def everything(function, *logits):
        value, pullback = jax.vjp(function, *logits)
        return value, pullback(jnp.ones(len(EDGES)))

    value, slopes = quick_jit(partial(everything, ours))(*logits)
    desired, pulled = quick_jit(partial(everything, theirs))(*logits)
    assert_close(value, desired, rtol=2e-6, atol=1e-7)
    for slope, expected in zip(slopes, pulled, strict=True):
        assert_close(slope, expected, rtol=1e-5, atol=1e-6)


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


def test_derivatives_in_temperature_and_mixture(x64):
    p, q = (x.astype(np.float64) for x in rows(7, 1.0, count=3))

    def ours(numbers):
        temperature, mixture = numbers
        js = F.js_from_logits(p, q, mixture=mixture, temperature=temperature, block_size=2)
        kl = F.kl_from_logits(p, q, temperature=temperature)
        return js + kl + F.entropy_from_logits(p, temperature=temperature)

    def oracle(numbers):
        logs = [special.log_softmax(x / numbers[0], axis=-1) for x in (p, q)]
        rows = oracles.js(*logs, numbers[1]) + oracles.kl(*logs) + oracles.entropy(logs[0])
        return rows.mean()

    numbers = np.array([1.7, 0.3])
    assert_close(quick_jit(jax.grad(ours))(numbers), gradient(oracle, numbers), rtol=1e-7)
    # One temperature for each position, and a sweep of temperatures.
    each = jnp.array([0.5, 1.0, 2.0])

    def swept(p, q, each):
        slope = jax.grad(lambda t: F.kl_from_logits(p, q, temperature=t, block_size=2))
        return F.kl_from_logits(p, q, temperature=each), jax.vmap(slope)(each)

    logs = [special.log_softmax(x / np.array(each)[:, None], axis=-1) for x in (p, q)]
    value, slopes = quick_jit(swept)(p, q, each)
    assert_close(value, oracles.kl(*logs).mean(), rtol=1e-12)
    for t, slope in zip(each, slopes, strict=True):
        along = gradient(lambda t: exact("forward", p, q, temperature=t[0])[0].mean(), [t])
        assert_close(slope, along[0], rtol=1e-7)


@every_call
def test_an_excluded_position_may_hold_anything(call, inputs):
    logits = [np.array(x) for x in rows(6, 1.0, count=3)[:inputs]]
    mask = np.array([True, False, True])
    kept = [x[mask] for x in logits]
    value, slopes = quick_jit(jax.value_and_grad(call, range(inputs)))(*kept)
    for x in logits:
        x[1] = [np.nan, INF, -INF, 0, 1, np.nan]
    excluding = jax.value_and_grad(partial(call, where=mask, block_size=2), range(inputs))
    masked, found = quick_jit(excluding)(*logits)
    assert_close(masked, value, rtol=1e-6)
    for slope, desired in zip(found, slopes, strict=True):
        assert_close(slope[mask], desired, rtol=1e-5, atol=1e-8)
        assert_close(slope[1], 0)


@pytest.mark.parametrize("shape", [(5,), (1, 5), (7, 5), (2, 3, 5), (3, 2, 7, 5)])
@pytest.mark.parametrize("block_size", [None, 2])
def test_positions_of_any_number_and_blocks_that_do_not_divide_them(shape, block_size):
    random = np.random.default_rng(0)
    p, q = (random.normal(size=shape).astype(np.float32) for _ in range(2))
    ours = F.kl_from_logits(p, q, block_size=block_size, reduction="none")
    assert_close(ours, exact("forward", p, q)[0], rtol=1e-5)


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
    desired = exact("forward", p[:, :, None], np.moveaxis(q, 2, 1)[:, None])[0].mean(0)
    assert_close(pairs(p, q), desired, rtol=1e-5)


@every_call
def test_temporaries_are_a_few_blocks(call, inputs):
    """At most a tenth of the logits, in blocks of 4 rows on each of the devices there may be."""
    shape = jax.ShapeDtypeStruct((4096, 1024), jnp.float32)
    for function in (call, jax.grad(call)):
        program = jax.jit(partial(function, block_size=4)).lower(*[shape] * inputs).compile()
        assert program.memory_analysis().temp_size_in_bytes < 0.1 * 4096 * 1024 * 4


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
    assert_close(slope, exact("forward", *wide)[1][0] / 4, rtol=1e-2, atol=1e-9)


SHARDED = [(name, True) for name in ("forward", "symmetric", "js", "entropy")]


@pytest.mark.parametrize(("name", "check_vma"), [*SHARDED, ("forward", False)])
def test_classes_sharded_over_devices(name, check_vma):
    """Rows over one mesh axis, classes over another: the numbers of one device."""
    call, inputs = CALLS[name]
    mesh = jax.make_mesh((2, 4), ("rows", "classes"), axis_types=(AxisType.Auto,) * 2)
    logits = rows(64, 1.0, count=6)[:inputs]
    mask = np.array([True, True, False, True, False, True])
    named = partial(call, block_size=2, axis_name="rows", class_axis_name="classes")
    whole = jax.value_and_grad(lambda t, *x: call(*x, where=mask, temperature=t), range(inputs + 1))
    sharded = jax.shard_map(
        lambda mask, t, *x: named(*x, where=mask, temperature=t),
        mesh=mesh,
        in_specs=(P("rows"), P(), *[P("rows", "classes")] * inputs),
        out_specs=P(),
        check_vma=check_vma,
    )
    desired, slopes = quick_jit(whole)(1.3, *logits)
    ours, found = quick_jit(jax.value_and_grad(sharded, range(1, inputs + 2)))(mask, 1.3, *logits)
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
        ({"block_size": 0}, ValueError, "block_size must be an integer of at least 1, got 0"),
        ({"block_size": 2.0}, ValueError, "block_size must be an integer of at least 1, got 2.0"),
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


def test_forward_mode_is_refused():
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(F.entropy_from_logits, (jnp.ones(3),), (jnp.ones(3),))
