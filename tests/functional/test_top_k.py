"""Teachers known by their likeliest tokens, beside the whole vocabulary in float64."""

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

import penalties_jax as pj
from tests.oracles import assert_close, gradient
from tests.programs import as_for_an_accelerator, quick_jit

DIRECTIONS, TAILS = ("forward", "reverse", "symmetric"), ("bucket", "truncate")
EVERY = list(itertools.product(DIRECTIONS, TAILS))
slow = partial(pytest.param, marks=pytest.mark.slow)
# Of these the gradients hold those of all.
SYMMETRIC = [("symmetric", tail) for tail in TAILS]


def kl(log_p, log_q):
    """Term by term, from what the logarithms are of; 0 where both have nothing."""
    with np.errstate(invalid="ignore"):
        ratio = np.where(np.isneginf(log_p), 0, log_p - log_q)
    return (np.exp(log_p) * ratio - np.exp(log_p) + np.exp(log_q)).sum(-1)


def rest_of(log_p, ids):
    """The log-probability of all classes but some."""
    others = np.array(log_p)
    np.put_along_axis(others, ids, -np.inf, -1)
    return special.logsumexp(others, axis=-1)


def truth(z, ids, log_q, log_rest, direction="forward", tail="bucket", temperature=1.0):
    """The divergence at each position, from the student's log-probabilities of all classes."""
    log_p = special.log_softmax(z / temperature, axis=-1)
    p, q = np.take_along_axis(log_p, ids, -1), log_q
    if tail == "bucket":
        p = np.concatenate([p, rest_of(log_p, ids)[..., None]], -1)
        q = np.concatenate([q, log_rest[..., None]], -1)
    both = {"forward": [kl(p, q)], "reverse": [kl(q, p)], "symmetric": [kl(p, q), kl(q, p)]}
    return np.mean(both[direction], axis=0)


def teacher(z, k):
    """The k likeliest tokens of logits, their log-probabilities and that of the rest."""
    log_q = special.log_softmax(z, axis=-1)
    ids = np.argsort(-log_q, axis=-1)[..., :k]
    return ids, np.take_along_axis(log_q, ids, -1), rest_of(log_q, ids)


def data(classes, k, *, scale=2.0, positions=(3,), seed=0):
    """A student's logits and a teacher, float32 and in it exactly what the oracle is given."""
    random = np.random.default_rng(seed)
    z, other = (scale * random.normal(size=(*positions, classes)) for _ in range(2))
    ids, log_q, log_rest = teacher(other + z / 2, k)
    return ids, *(x.astype(np.float32) for x in (z, log_q, log_rest))


def wide(*arrays):
    return [np.asarray(x).astype(np.float64) for x in arrays]


# Values.


def of_every(function, *arrays, kinds=EVERY, log_rest=None, **options):
    """What a transform of the loss gives for several directions and tails, by one program."""

    def run(arrays, log_rest, options):
        named = {"log_rest": log_rest, **options}
        return {
            (direction, tail): function(
                partial(pj.kl_to_top_k, direction=direction, tail=tail, **named)
            )(*arrays)
            for direction, tail in kinds
        }

    return quick_jit(run)(arrays, log_rest, options)


@pytest.mark.parametrize(
    ("classes", "k", "scale"),
    [
        (50, 48, 2.0),
        (50_000, 64, 1.0),
        slow(50, 1, 0.1),
        slow(3_000, 64, 8.0),
    ],
)
def test_the_whole_vocabulary(classes, k, scale):
    """At several temperatures: flat and peaked ones, of which little is left for the rest."""
    ids, z, log_q, log_rest = data(classes, k, scale=scale)
    temperature = np.float32([0.5, 1.0, 3.0])

    def each(loss):
        return partial(loss, reduction="none")

    found = of_every(each, z, ids, log_q, log_rest=log_rest, temperature=temperature)
    z, log_q, log_rest = wide(z, log_q, log_rest)
    for kind, ours in found.items():
        desired = truth(z, ids, log_q, log_rest, *kind, temperature[:, None])
        assert_close(ours, desired, rtol=3e-6)


def test_a_rest_that_one_minus_a_sum_does_not_tell():
    """Of a probability of 1e-30, and below all of float32."""
    z = np.float32([[70.0, 69.0, *[0.0] * 8], [200.0, 199.0, *[0.0] * 8]])
    ids, log_q = np.array([[0, 1], [0, 1]]), np.log(np.float32([[0.5, 0.5]] * 2))
    log_rest = np.float32([-69.0, -200.0])

    def each(loss):
        return partial(loss, reduction="none")

    for kind, ours in of_every(each, z, ids, log_q, log_rest=log_rest).items():
        assert_close(ours, truth(z, ids, *wide(log_q, log_rest), *kind), rtol=1e-6)


@pytest.mark.parametrize(("classes", "k"), [(3_000, 64), slow(50, 8)])
def test_agreement(classes, k):
    """Value and gradient are 0, exactly with the rest, and to its floor without."""
    z = np.float32(3 * np.random.default_rng(0).normal(size=(4, classes)))
    ids, log_q, log_rest = teacher(z.astype(np.float64), k)
    for rest, small, slight in ((np.float32(log_rest), 1e-12, 1e-8), (None, 1e-10, 1e-6)):
        found = of_every(jax.value_and_grad, z, ids, np.float32(log_q), log_rest=rest)
        for value, slope in found.values():
            assert 0 <= value < small
            assert_close(slope, 0, atol=slight)


def test_accurate_near_agreement():
    """Of 1e-5, where the textbook's difference has few digits left."""
    random = np.random.default_rng(0)
    z = 2 * random.normal(size=(64, 200))
    ids, log_q, log_rest = teacher(z + 3e-3 * random.normal(size=z.shape), 16)
    z, log_q, log_rest = (x.astype(np.float32) for x in (z, log_q, log_rest))
    found = of_every(lambda loss: loss, z, ids, log_q, log_rest=log_rest)
    for kind, ours in found.items():
        desired = truth(*wide(z), ids, *wide(log_q, log_rest), *kind).mean()
        assert 1e-7 < desired < 1e-4
        assert_close(ours, desired, rtol=2e-3)


@pytest.mark.parametrize(
    ("k", "probability", "dtype", "rest"),
    [
        (4, 0.25, jnp.float32, 16 * 2.0**-23),
        (2, 0.25, jnp.bfloat16, 0.5),
        (4, 0.25, jnp.bfloat16, 16 * 2.0**-7),
        (4, 0.25, jnp.float16, 16 * 2.0**-10),
        (16, 0.0625, jnp.bfloat16, 0.5),
        (32, 0.03125, jnp.bfloat16, 0.5),
    ],
)
def test_the_floor_of_the_rest(k, probability, dtype, rest):
    """Probabilities that sum to 1 leave 4 k eps, and never more than a half."""
    z, ids = np.zeros((1, 40), np.float32), np.arange(k)[None]
    log_q = jnp.log(jnp.full((1, k), probability * (1 + 2e-6), jnp.float32)).astype(dtype)
    desired = truth(*wide(z), ids, *wide(log_q), np.log([rest]))[0]
    assert_close(pj.kl_to_top_k(z, ids, log_q), desired, rtol=1e-5 if k != 2 else 1e-2)


def test_padding():
    """An entry of -inf is none, whatever its token, which belongs to the rest."""
    ids, z, log_q, _ = data(20, 3)
    padded = np.concatenate([ids, np.int64([[-1, 99]] * 3), ids[:, :1]], -1)
    logs = np.concatenate([log_q, np.full((3, 3), -np.inf, np.float32)], -1)

    def both(loss):
        return jax.value_and_grad(loss, (0, 2))

    found, others = (
        of_every(both, z, *own, kinds=SYMMETRIC) for own in ((padded, logs), (ids, log_q))
    )
    for kind, (value, (slope, by_teacher)) in found.items():
        desired, (expected, other) = others[kind]
        assert_close(value, desired, rtol=1e-6)
        assert_close(slope, expected, atol=1e-8)
        assert_close(by_teacher, np.pad(other, ((0, 0), (0, 3))), atol=1e-8)
    assert_close(pj.kl_to_top_k(z, padded, logs), pj.kl_to_top_k(z, ids, log_q), rtol=1e-6)
    nothing = np.full((3, 3), -np.inf, np.float32)
    assert_close(pj.kl_to_top_k(z, ids, nothing), 0, atol=1e-12)


def test_masked_classes():
    """A class without a logit is none; a position of such alone has no probability for any."""
    log_q = np.log(np.float32([[0.5, 0.25]]))
    z, ids = np.float32([[1.0, -np.inf, 0.5, -np.inf, 0.0]]), np.array([[0, 2]])
    found, others = (
        of_every(jax.value_and_grad, *own, log_q, kinds=SYMMETRIC)
        for own in ((z, ids), (z[:, [0, 2, 4]], np.array([[0, 1]])))
    )
    for kind, (value, slope) in found.items():
        desired, expected = others[kind]
        assert_close(value, desired, rtol=1e-6)
        assert_close(slope[0, [0, 2, 4]], expected[0], atol=1e-7)
        assert_close(slope[0, [1, 3]], 0)
    assert_close(pj.kl_to_top_k(np.full((1, 5), -np.inf, np.float32), ids, log_q), 1.0, rtol=1e-6)


def test_edges():
    """No rest at all, what one of the two excludes, and a token that is no class."""
    ids, log_q = np.array([[1, 0]]), np.log(np.float32([[0.5, 0.5]]))
    both, three = np.float32([[1.0, 1.0]]), np.float32([[1.0, 1.0, 0.0]])

    def values(z, log_rest, ids=ids):
        kinds = [("forward", "bucket"), ("reverse", "bucket")]
        run = of_every(
            jax.value_and_grad, z, ids, log_q, kinds=kinds, log_rest=np.float32(log_rest)
        )
        for _, slope in run.values():
            assert np.isfinite(slope).all()
        return {kind: float(value) for kind, (value, _) in run.items()}

    assert max(values(both, -np.inf).values()) < 1e-12
    assert math.isinf(values(both, np.log(0.1))["reverse", "bucket"])
    assert math.isinf(values(three, -np.inf)["forward", "bucket"])
    outside = values(three, np.log(0.1), ids=np.array([[1, 99]]))
    assert math.isinf(outside["reverse", "bucket"])
    assert math.isfinite(outside["forward", "bucket"])


# Derivatives.


@pytest.mark.parametrize(
    ("direction", "tail", "known"),
    [
        ("symmetric", "bucket", True),
        slow("symmetric", "truncate", True),
        ("reverse", "bucket", False),
        slow("forward", "bucket", False),
    ],
)
def test_every_derivative_by_differences(direction, tail, known, x64):
    """In blocks that don't divide the rows, by weights and temperatures of each."""
    random = np.random.default_rng(1)
    z, weights = random.normal(size=(5, 9)), np.linspace(-1, 2, 5)
    ids, log_q, log_rest = teacher(random.normal(size=(5, 9)), 3)
    numbers = (z, log_q, log_rest, np.linspace(0.5, 2, 5))

    def ours(z, log_q, log_rest, temperature):
        return pj.kl_to_top_k(
            z, ids, log_q, log_rest=log_rest if known else None, temperature=temperature,
            direction=direction, tail=tail, weights=weights, block_size=2,
        )  # fmt: skip

    def exact(z, log_q, log_rest, temperature):
        rest = log_rest if known else np.log1p(-np.exp(log_q).sum(-1))
        args = (z, ids, log_q, rest, direction, tail, temperature[:, None])
        return (weights * truth(*args)).mean()

    value, slopes = quick_jit(jax.value_and_grad(ours, (0, 1, 2, 3)))(*numbers)
    assert_close(value, exact(*numbers), rtol=1e-12)
    for i, slope in enumerate(slopes):
        moved = partial(_with, exact, numbers, i)
        assert_close(slope, gradient(moved, numbers[i]), rtol=1e-7, atol=1e-10)


def _with(function, arguments, i, x):
    return function(*arguments[:i], x, *arguments[i + 1 :])


@pytest.mark.slow
def test_hessians(x64):
    ids, z, log_q, log_rest = data(6, 2)
    z, log_q, log_rest = wide(z, log_q, log_rest)

    def slope(z):
        return jax.grad(pj.kl_to_top_k)(z, ids, log_q, log_rest=log_rest, block_size=2)

    found = [quick_jit(jacobian(slope))(z) for jacobian in (jax.jacfwd, jax.jacrev)]
    for i in range(6):
        desired = gradient(lambda z, i=i: float(slope(z)[1, i]), z)
        for hessian in found:
            assert_close(hessian[1, i], desired, rtol=1e-7, atol=1e-9)


def cosine(a, b):
    return (a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b)


def test_what_renormalising_costs():
    """The cosines of the docstring: of gradients beside that of the divergence over all classes."""
    random = np.random.default_rng(0)
    other = np.float32(2.5 * random.normal(size=(256, 1_000)))
    z = np.float32(2.5 * random.normal(size=other.shape))
    ids, log_q, _ = teacher(other.astype(np.float64), 64)
    log_q = np.float32(log_q)
    assert_close(np.exp(log_q).sum(-1).mean(), 0.82, atol=0.005)

    def renormalised(z):
        p = jax.nn.log_softmax(jnp.take_along_axis(z, ids, -1))
        return pj.kl_divergence(p, jax.nn.log_softmax(log_q), direction="reverse")

    losses = {
        0.99: partial(pj.kl_to_top_k, ids=ids, log_q=log_q, direction="reverse"),
        0.98: partial(pj.kl_to_top_k, ids=ids, log_q=log_q, direction="reverse", tail="truncate"),
        0.47: renormalised,
    }
    full = jax.grad(lambda z: pj.kl_from_logits(z, other, direction="reverse"))(z)
    for told, loss in losses.items():
        assert_close(cosine(full, jax.grad(loss)(z)), told, atol=0.006)


# Forms.


def hidden_of(ids, log_q, *, classes, dtype=np.float32):
    random = np.random.default_rng(3)
    hidden, kernel = random.normal(size=(*ids.shape[:-1], 6)), random.normal(size=(6, classes))
    return [x.astype(dtype) for x in (hidden, kernel, random.normal(size=classes))]


@pytest.mark.parametrize(
    ("direction", "tail", "reduction"),
    [("reverse", "bucket", "mean"), slow("forward", "truncate", "none")],
)
def test_hidden_states(direction, tail, reduction, x64):
    """Value and every gradient are those of the capped logits, and no logits are held."""
    ids, _, log_q, log_rest = data(30, 4, positions=(7, 2))
    log_q, log_rest = wide(log_q, log_rest)
    arrays = hidden_of(ids, log_q, classes=30, dtype=np.float64)
    mask, weights = np.arange(14).reshape(7, 2) % 3 != 0, np.linspace(0.5, 2, 2)
    options = {"direction": direction, "tail": tail, "where": mask, "reduction": reduction}

    def ours(hidden, kernel, bias, log_q, log_rest, temperature, softcap):
        value = pj.linear_kl_to_top_k(
            hidden, kernel, ids, log_q, bias=bias, log_rest=log_rest, temperature=temperature,
            softcap=softcap, block_size=3, weights=weights, **options,
        )  # fmt: skip
        return jnp.sum(value)

    def of_logits(hidden, kernel, bias, log_q, log_rest, temperature, softcap):
        z = softcap * jnp.tanh((hidden @ kernel + bias) / softcap)
        value = pj.kl_to_top_k(
            z, ids, log_q, log_rest=log_rest, temperature=temperature, weights=weights, **options
        )
        return jnp.sum(value)

    arguments = (*arrays, log_q, log_rest, 0.7, 3.0)
    (value, found), (desired, expected) = (
        quick_jit(jax.value_and_grad(f, range(7)))(*arguments) for f in (ours, of_logits)
    )
    assert_close(value, desired, rtol=1e-12)
    for slope, other in zip(found, expected, strict=True):
        assert_close(slope, other, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_halves():
    """Logits of half precision have gradients in it; so have hidden states and kernels."""
    ids, z, log_q, log_rest = data(50, 4)
    z = jnp.asarray(z, jnp.bfloat16)
    value, slope = jax.value_and_grad(pj.kl_to_top_k)(z, ids, log_q, log_rest=log_rest)
    exact = jax.grad(pj.kl_to_top_k)(jnp.float32(z), ids, log_q, log_rest=log_rest)
    assert (value.dtype, slope.dtype) == (jnp.float32, jnp.bfloat16)
    assert_close(value, truth(*wide(z), ids, *wide(log_q, log_rest)).mean(), rtol=1e-5)
    assert_close(slope, exact, rtol=1e-2, atol=1e-9)
    hidden, kernel, _ = hidden_of(ids, log_q, classes=50)
    halves = [jnp.asarray(x, jnp.bfloat16) for x in (hidden, kernel)]
    both = jax.value_and_grad(partial(pj.linear_kl_to_top_k), (0, 1))
    value, slopes = both(*halves, ids, log_q)
    desired, expected = both(*map(jnp.float32, halves), ids, log_q)
    assert_close(value, desired, rtol=1e-5)
    for slope, other in zip(slopes, expected, strict=True):
        assert slope.dtype == jnp.bfloat16
        assert_close(slope, other, rtol=3e-2, atol=1e-3)


@pytest.mark.parametrize("function", ["logits", "hidden"])
@pytest.mark.slow
def test_an_accelerator_computes_the_same(function):
    ids, z, log_q, _ = data(50, 4, positions=(5,))
    arrays = [z] if function == "logits" else hidden_of(ids, log_q, classes=50)[:2]
    call = pj.kl_to_top_k if function == "logits" else pj.linear_kl_to_top_k

    def loss(t, log_q, *arrays):
        return call(*arrays, ids, log_q, temperature=t, direction="symmetric", block_size=2)

    both = jax.value_and_grad(loss, range(2 + len(arrays)))
    value, slopes = quick_jit(both)(0.7, log_q, *arrays)
    with as_for_an_accelerator():
        found, others = quick_jit(both)(0.7, log_q, *arrays)
    assert_close(found, value, rtol=1e-6)
    for slope, desired in zip(others, slopes, strict=True):
        assert_close(slope, desired, rtol=1e-4, atol=1e-7)


@pytest.mark.slow
def test_an_excluded_position_may_hold_anything():
    """In logits, tokens and the teacher; by `where`, and by the caller's `jnp.where`."""
    ids, z, log_q, log_rest = data(9, 2)
    mask = np.array([True, False, True])

    def loss(z, log_q, log_rest, ids=ids, where=None):
        return pj.kl_to_top_k(z, ids, log_q, log_rest=log_rest, where=where, direction="symmetric")

    def left_out(z, log_q, log_rest):
        values = pj.kl_to_top_k(
            z, jnp.asarray(ids), log_q, log_rest=log_rest, reduction="none", direction="symmetric"
        )
        return jnp.sum(jnp.where(mask, values, 0)) / 2

    value, slopes = jax.value_and_grad(loss, (0, 1, 2))(
        z[mask], log_q[mask], log_rest[mask], ids[mask]
    )
    z, log_q, log_rest, ids = (np.array(x) for x in (z, log_q, log_rest, ids))
    z[1], log_q[1], log_rest[1], ids[1] = np.nan, 3.0, np.nan, -100
    for other in (partial(loss, ids=ids, where=mask), left_out):
        found, others = jax.value_and_grad(other, (0, 1, 2))(z, log_q, log_rest)
        assert_close(found, value, rtol=1e-6)
        for slope, desired in zip(others, slopes, strict=True):
            assert_close(slope[mask], desired, rtol=1e-5, atol=1e-8)
            assert_close(slope[1], 0)


@pytest.mark.slow
def test_mapped():
    """Over a sweep of temperatures and of students, whose teacher they share."""
    ids, z, log_q, log_rest = data(12, 3, positions=(4, 5))
    shared = ids[0], log_q[0], log_rest[0]

    def loss(z, t):
        return pj.kl_to_top_k(
            z, shared[0], shared[1], log_rest=shared[2], temperature=t, block_size=2
        )

    grid = jax.vmap(jax.vmap(jax.value_and_grad(loss), (0, None)), (None, 0))
    temperatures = np.float32([0.5, 2.0])
    values, slopes = quick_jit(grid)(z, temperatures)
    for (i, t), (j, own) in itertools.product(enumerate(temperatures), enumerate(z)):
        value, slope = jax.value_and_grad(loss)(own, t)
        assert_close(values[i, j], value)
        assert_close(slopes[i, j], slope, atol=1e-7)
    one = jax.vmap(lambda ids, log_q: pj.kl_to_top_k(z[0, 0], ids, log_q), 0)
    each = one(jnp.asarray(ids[0]), log_q[0])
    desired = [pj.kl_to_top_k(z[0, 0], i, q) for i, q in zip(ids[0], log_q[0], strict=True)]
    assert_close(each, desired)


# Devices.


@pytest.mark.parametrize("function", ["logits", slow("hidden")])
def test_rows_and_classes_sharded_over_devices(function):
    """In `shard_map`: the numbers of one device, and of gradients of what is whole too."""
    mesh = jax.make_mesh((2, 4), ("rows", "classes"), axis_types=(AxisType.Auto,) * 2)
    ids, z, log_q, _ = data(64, 4, positions=(6,))
    arrays, specs = [z], [P("rows", "classes")]
    call = pj.kl_to_top_k
    if function == "hidden":
        arrays, specs = hidden_of(ids, log_q, classes=64)[:2], [P("rows"), P(None, "classes")]
        call = pj.linear_kl_to_top_k
    ids = jnp.asarray(ids)

    def loss(t, ids, log_q, *arrays, **names):
        return call(*arrays, ids, log_q, temperature=t, direction="symmetric", **names)

    sharded = jax.shard_map(
        partial(loss, axis_name="rows", class_axis_name="classes"),
        mesh=mesh,
        in_specs=(P(), P("rows"), P("rows"), *specs),
        out_specs=P(),
    )
    arguments = (0, *range(2, 3 + len(arrays)))
    ours, slopes = quick_jit(jax.value_and_grad(sharded, arguments))(0.7, ids, log_q, *arrays)
    desired, others = quick_jit(jax.value_and_grad(loss, arguments))(0.7, ids, log_q, *arrays)
    assert_close(ours, desired)
    for slope, other in zip(slopes, others, strict=True):
        assert_close(slope, other, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("spec", [slow(P("data")), P(None, "data")])
def test_logits_are_not_gathered(spec):
    """Where only the compiled program is sharded, by rows or by classes."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    whole, rows, own = (NamedSharding(mesh, s) for s in (P(), P(spec[0]), spec))
    ids, z, log_q, _ = data(512, 3, positions=(64,))
    program = quick_jit(
        jax.value_and_grad(partial(pj.kl_to_top_k, block_size=16)),
        in_shardings=(own, rows, rows),
        out_shardings=(whole, own),
    )
    text = program.lower(z, ids, log_q).compile().as_text()
    gathered = [line for line in text.splitlines() if "all-gather(" in line and "512]" in line]
    assert not gathered
    desired = jax.value_and_grad(pj.kl_to_top_k)(z, ids, log_q)
    for ours, other in zip(program(z, ids, log_q), desired, strict=True):
        assert_close(ours, other, rtol=1e-5, atol=1e-8)


@pytest.mark.slow
def test_temporaries_are_a_few_blocks():
    arrays = [
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in (
            ((4096, 1024), jnp.float32),
            ((4096, 8), jnp.int32),
            ((4096, 8), jnp.float32),
        )
    ]
    for function in (pj.kl_to_top_k, jax.grad(pj.kl_to_top_k)):
        program = jax.jit(partial(function, block_size=4)).lower(*arrays).compile()
        small = 4096 * 8 * 4 * 6
        assert program.memory_analysis().temp_size_in_bytes < 0.05 * 4096 * 1024 * 4 + small


@pytest.mark.slow
def test_exported_for_any_number_of_positions():
    both = quick_jit(jax.value_and_grad(partial(pj.kl_to_top_k, block_size=2)))
    (b,) = jax.export.symbolic_shape("b")
    shapes = [
        jax.ShapeDtypeStruct((b, n), dtype)
        for n, dtype in ((9, jnp.float32), (2, jnp.int32), (2, jnp.float32))
    ]
    program = quick_jit(jax.export.export(both)(*shapes).call)
    for n in (2, 3):
        ids, z, log_q, _ = data(9, 2, positions=(n,))
        arguments = z, jnp.int32(ids), log_q
        for ours, desired in zip(program(*arguments), both(*arguments), strict=True):
            assert_close(ours, desired, atol=1e-7)


# As a config, and what is refused.


@pytest.mark.parametrize("inputs", [slow("logits"), "hidden"])
def test_config(inputs):
    """With a bias or none, and a rest or none."""
    ids, z, log_q, log_rest = data(9, 2)
    config = pj.KLToTopK("reverse", tail="truncate", temperature=0.7, inputs=inputs)
    bucket = config.replace(tail="bucket")
    options = {"direction": "reverse", "temperature": 0.7}
    if inputs == "logits":
        assert_close(
            config(z, ids, log_q), pj.kl_to_top_k(z, ids, log_q, tail="truncate", **options)
        )
        desired = pj.kl_to_top_k(z, ids, log_q, log_rest=log_rest, **options)
        assert_close(bucket(z, ids, log_q, log_rest), desired)
    else:
        hidden, kernel, bias = hidden_of(ids, log_q, classes=9)
        for own in (bias, None):
            desired = pj.linear_kl_to_top_k(
                hidden, kernel, ids, log_q, bias=own, log_rest=log_rest, **options
            )
            assert_close(bucket(hidden, kernel, ids, log_q, own, log_rest), desired)
        desired = pj.linear_kl_to_top_k(hidden, kernel, ids, log_q, bias=bias, **options)
        assert_close(bucket(hidden, kernel, ids, log_q, bias), desired)
    assert pj.from_json(pj.to_json(config)) == config


@pytest.mark.parametrize(
    ("ids", "log_q", "error", "message"),
    [
        ([[0, 5]], [[0.5, 0.2]], ValueError, r"ids must be in \[0, 5\), got 5"),
        ([[0, -1]], [[0.5, 0.2]], ValueError, r"ids must be in \[0, 5\), got -1"),
        ([[3, 3]], [[0.5, 0.2]], ValueError, "ids must name each token once, got 3 twice"),
        ([[0, 1]], [[0.9, 0.2]], ValueError, "log_q must be log-probabilities.*got 1.1"),
        ([[0.0, 1.0]], [[0.5, 0.2]], TypeError, "ids must be integers, got float"),
        ([[0]], [[0.5, 0.2]], ValueError, r"ids and log_q .* same shape, got \(1, 1\) and \(1, 2"),
        ([0, 1], [0.5, 0.2], ValueError, r"ids must .*positions, \(1,\), got shape \(2,\)"),
        ([[]], [[]], ValueError, r"ids must have an axis of tokens.*got shape \(1, 0\)"),
    ],
)
@pytest.mark.parametrize("function", ["logits", "hidden"])
@pytest.mark.untyped
def test_bad_input(function, ids, log_q, error, message):
    ids, log_q = np.array(ids), np.log(np.float32(log_q))
    ids = ids if ids.size else ids.astype(int)
    of_hidden = partial(pj.linear_kl_to_top_k, np.ones((1, 2)), np.ones((2, 5)))
    call = of_hidden if function == "hidden" else partial(pj.kl_to_top_k, np.zeros((1, 5)))
    with pytest.raises(error, match=message):
        call(ids, log_q)


def test_what_is_refused_by_its_values():
    """By how much probabilities are above 1; nothing where a mask leaves it out; no `jax.Array`."""
    z, ids = np.zeros((1, 5), np.float32), np.array([[0, 1]])

    def call(total, dtype=np.float32, **options):
        return pj.kl_to_top_k(z, ids, np.log(np.full((1, 2), total / 2)).astype(dtype), **options)

    for dtype, little, more in (
        (np.float32, 5e-5, 2e-4), (np.float16, 1e-2, 3e-2), (jnp.bfloat16, 1e-3, 4e-2),
    ):  # fmt: skip
        assert math.isfinite(call(1 + little, dtype))
        with pytest.raises(ValueError, match="log_q must be log-probabilities"):
            call(1 + more, dtype)
    assert call(2.0, where=np.array([False])) == 0
    with pytest.raises(ValueError, match="log_q must be log-probabilities"):
        call(2.0, where=np.array([True]))
    assert call(2.0, where=jnp.array([False])) == 0
    assert math.isfinite(pj.kl_to_top_k(z, ids[:, :1], np.array([[0]])))
    bad = np.array([[7, 7]])
    assert pj.kl_to_top_k(z, bad, np.zeros((1, 2)), where=np.array([False])) == 0
    assert math.isfinite(pj.kl_to_top_k(z, jnp.asarray(bad), jnp.log(jnp.full((1, 2), 0.25))))
    with pytest.raises(ValueError, match=r"ids must be in \[0, 5\), got 7"):
        pj.kl_to_top_k(z, bad, jnp.log(jnp.full((1, 2), 0.25)))
    with pytest.raises(ValueError, match="'bucket', 'truncate', got 'cut'"):
        call(0.5, tail="cut")
