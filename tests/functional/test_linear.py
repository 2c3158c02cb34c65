"""Divergences from hidden states, beside the same from logits in float64 and on one device."""

import re
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from scipy import special

import penalties_jax.functional as F  # noqa: N812
from penalties_jax.functional.divergences import heads
from penalties_jax.functional.platform import ACCELERATOR, CPU
from penalties_jax.functional.reduction import reduce
from tests import oracles
from tests.catalogue import DIVERGENCE_CASES, every, first_of_each
from tests.oracles import assert_close
from tests.programs import quick_jit

ROWS, WIDTH, OTHER, CLASSES = (16, 3), 6, 4, 40


def data(dtype=np.float32):
    """The model's and the reference's hidden states, kernels and biases, labels and a mask."""
    random = np.random.default_rng(0)
    shapes = [
        (*ROWS, WIDTH), (WIDTH, CLASSES), (CLASSES,), (*ROWS, OTHER), (OTHER, CLASSES), (CLASSES,),
    ]  # fmt: skip
    arrays = [random.normal(size=shape).astype(dtype) for shape in shapes]
    return arrays, random.integers(0, CLASSES, size=ROWS), random.random(ROWS) < 0.7


class Head(NamedTuple):
    """A function of hidden states and kernels, its value for each position, and its numbers."""

    call: Callable[..., Any]
    oracle: Callable[..., np.ndarray]
    numbers: dict[str, float]


def head(case):
    """That of a divergence, which has one pair of hidden states and a kernel for each input."""

    def call(arrays, labels, **options):
        pairs = [x for i in range(case.inputs) for x in arrays[3 * i : 3 * i + 2]]
        names = ("bias_p", "bias_q") if case.inputs == 2 else ("bias",)
        biases = {name: arrays[3 * i + 2] for i, name in enumerate(names)}
        settings = case.settings | {"block_size": None}
        return case.entry.of_hidden(*pairs, **biases, **(settings | options))

    def oracle(arrays, labels, **numbers):
        return case.entries(*logits(arrays)[: case.inputs], **numbers)

    return Head(call, oracle, case.numbers)


def logits(arrays, softcap=(None, None)):
    pairs = zip((arrays[:3], arrays[3:]), softcap, strict=True)
    both = [(hidden @ kernel + bias, cap) for (hidden, kernel, bias), cap in pairs]
    return [z if cap is None else cap * np.tanh(z / cap) for z, cap in both]


def logs(arrays, temperature=1.0, softcap=(None, None)):
    return [special.log_softmax(z / temperature, axis=-1) for z in logits(arrays, softcap)]


def chosen(log_p, labels):
    return -np.take_along_axis(log_p, labels[..., None], -1)[..., 0]


# Numbers at which all that they do is seen.
ENTROPIC = {"temperature": 0.7, "softcap": 2.5}
CAPS = (2.5, None)


def cross_entropy(arrays, labels, **options):
    hidden, kernel, bias, *_ = arrays
    return F.linear_cross_entropy(
        hidden, kernel, labels, bias=bias, **({"z_loss": 0.05} | ENTROPIC | options)
    )


def surprised(arrays, labels, *, z_loss=0.05, temperature=0.7, softcap=2.5):
    z = logits(arrays, (softcap, None))[0] / temperature
    normaliser = special.logsumexp(z, axis=-1)
    return chosen(z - normaliser[..., None], labels) + z_loss * normaliser**2


def distillation(arrays, labels, **options):
    hidden_p, kernel_p, bias_p, hidden_q, kernel_q, bias_q = arrays
    weights = {"kl_weight": 0.3, "cross_entropy_weight": 0.7}
    return F.linear_distillation(
        *(hidden_p, kernel_p, hidden_q, kernel_q, labels),
        bias_p=bias_p, bias_q=bias_q, temperature=2.0, direction="symmetric", z_loss=0.05,
        softcap=CAPS,
        **(weights | options),
    ).total  # fmt: skip


def distilled(arrays, labels):
    p, q = logs(arrays, 2.0, CAPS)
    both = (oracles.kl(p, q) + oracles.kl(q, p)) / 2
    return 0.7 * surprised(arrays, labels, temperature=1.0) + 0.3 * both


def policy(arrays, labels, reduction="mean", where=None, axis_name=None, **options):
    """What reinforcement learning makes of both: a log-probability and a bonus of entropy."""
    hidden, kernel, bias, *_ = arrays
    where = None if where is None else jnp.asarray(where)
    both = F.linear_log_prob_and_entropy(
        hidden, kernel, labels, bias=bias, where=where, **(ENTROPIC | options)
    )
    values = both.log_prob + 0.3 * both.entropy
    return reduce(values, reduction=reduction, where=where, axis_name=axis_name)


def rewarded(arrays, labels, *, temperature=0.7, softcap=2.5):
    log_p, _ = logs(arrays, temperature, (softcap, None))
    return -chosen(log_p, labels) - 0.3 * (np.exp(log_p) * log_p).sum(-1)


DIVERGENCES = {
    case.entry.of_hidden.__name__: head(case)
    for case in first_of_each(lambda case: case.function, DIVERGENCE_CASES).values()
    if case.streamed and case.entry.of_hidden
}
HEADS = DIVERGENCES | {
    "linear_cross_entropy": Head(cross_entropy, surprised, {"z_loss": 0.05} | ENTROPIC),
    "linear_distillation": Head(distillation, distilled, {}),
    "linear_log_prob_and_entropy": Head(policy, rewarded, ENTROPIC),
}
kl = DIVERGENCES["linear_kl"].call
every_head = every(HEADS, "head")
# What takes long to compile is the one that is made of both kinds, and in make test-slow all.
BOTH, *OTHERS = sorted(HEADS, key=lambda name: name != "linear_distillation")


def most(names, *ways, others):
    """Every way with the first head, and one way with the others."""
    params = [pytest.param(HEADS[BOTH], *way, id="-".join([BOTH, *map(str, way)])) for way in ways]
    params += [pytest.param(HEADS[x], *others, id=x, marks=pytest.mark.slow) for x in OTHERS]
    return pytest.mark.parametrize(("head", *names), params)


def reduced(values, mask, reduction):
    kept = np.where(mask, values, 0)
    if reduction == "none":
        return kept
    return kept.sum() / (mask.sum() if reduction == "mean" else 1)


def directional(function, arrays, directions, step=1e-5):
    """The derivative along directions, one array at a time, by differences."""
    result = []
    for i, direction in enumerate(directions):
        ends = [
            function([x + (s * direction if i == j else 0) for j, x in enumerate(arrays)])
            for s in (step, -step)
        ]
        result.append((ends[0] - ends[1]) / (2 * step))
    return result


@every_head
@pytest.mark.parametrize(
    ("block_size", "reduction"),
    [
        (2, "mean"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((2, "none"), (None, "sum"))),
    ],
)
def test_value_and_gradients(head, reduction, block_size, x64):
    """Of hidden states, kernels and biases, with a mask, in blocks that don't divide the rows."""
    arrays, labels, mask = data(np.float64)
    weights = np.random.default_rng(1).normal(size=ROWS)

    def total(values):
        return (weights * values).sum() if reduction == "none" else values

    def ours(arrays, numbers):
        options = {"where": mask, "reduction": reduction, "block_size": block_size}
        return total(head.call(arrays, labels, **options, **numbers))

    def exact(arrays, **numbers):
        return total(reduced(head.oracle(arrays, labels, **numbers), mask, reduction))

    value, (slopes, by_number) = quick_jit(jax.value_and_grad(ours, (0, 1)))(
        [jnp.asarray(x) for x in arrays], head.numbers
    )
    assert_close(value, exact(arrays), rtol=1e-10)
    directions = [np.random.default_rng(2).normal(size=x.shape) for x in arrays]
    along = [(slope * d).sum() for slope, d in zip(slopes, directions, strict=True)]
    assert_close(along, directional(exact, arrays, directions), rtol=1e-6, atol=1e-9)
    for name, slope in by_number.items():
        desired = oracles.gradient(
            lambda number, name=name: exact(arrays, **{name: number}), np.array(head.numbers[name])
        )
        assert_close(slope, desired, rtol=1e-7, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("head", "reduction"),
    [
        (HEADS[BOTH], "mean"),
        (HEADS["linear_log_prob_and_entropy"], "none"),
    ],
    ids=["mean", "none"],
)
def test_second_derivatives(head, reduction, x64):
    """Forward over reverse mode, mapped over directions, and reverse over reverse."""
    arrays, labels, mask = data(np.float64)
    weights = np.random.default_rng(1).normal(size=ROWS)

    def ours(arrays):
        values = head.call(arrays, labels, where=mask, reduction=reduction, block_size=7)
        return (weights * values**2).sum() if reduction == "none" else values

    def exact(arrays):
        values = reduced(head.oracle(arrays, labels), mask, reduction)
        return (weights * values**2).sum() if reduction == "none" else values

    def along(trees, direction):
        return sum(jnp.vdot(x, d) for x, d in zip(trees, direction, strict=True))

    def moved(*directions):
        return exact([x + 1e-4 * sum(ds) for x, *ds in zip(arrays, *directions, strict=True)])

    @quick_jit
    def everything(arrays, directions):
        slope, first = jax.grad(ours), [d[0] for d in directions]
        pushed = jax.vmap(lambda d: jax.jvp(slope, (arrays,), (d,))[1])(directions)
        return pushed, jax.grad(lambda arrays: along(slope(arrays), first))(arrays)

    random = np.random.default_rng(2)
    u, v, w = ([random.normal(size=x.shape) for x in arrays] for _ in range(3))
    pushed, pulled = everything(
        [jnp.asarray(x) for x in arrays], [jnp.stack(pair) for pair in zip(v, w, strict=True)]
    )
    minus = [-x for x in u]
    for i, direction in enumerate((v, w)):
        back = [-x for x in direction]
        differences = moved(u, direction) - moved(minus, direction)
        differences += moved(minus, back) - moved(u, back)
        assert_close(along([x[i] for x in pushed], u), differences / 4e-8, rtol=1e-5, atol=1e-6)
    assert_close(along(pulled, u), along([x[0] for x in pushed], u), rtol=1e-9)


@pytest.mark.slow
def test_a_gradient_for_one_argument_is_that_of_all():
    """Whatever is differentiated, alone or together, in any order, inside of scan and remat."""
    arrays, labels, _ = data()
    arrays = [jnp.asarray(x) for x in arrays]

    def loss(*arrays):
        return distillation(arrays, labels, block_size=2)

    everything = quick_jit(jax.grad(loss, range(6)))(*arrays)
    for i in (3, 1, 0):
        assert_close(quick_jit(jax.grad(loss, i))(*arrays), everything[i], rtol=1e-5, atol=1e-8)

    def scanned(hidden):
        def step(carry, part):
            return carry + jax.checkpoint(loss)(part, *arrays[1:]), None

        return jax.lax.scan(step, 0.0, jnp.stack([hidden, hidden]))[0] / 2

    assert_close(quick_jit(jax.grad(scanned))(arrays[0]), everything[0], rtol=1e-5, atol=1e-8)


def test_mapped_over_models():
    arrays, *_ = data()

    def loss(kernel, hidden):
        return F.linear_kl(hidden, kernel, *arrays[3:5], block_size=2)

    kernels = jnp.stack([arrays[1], 2 * arrays[1]])
    values, slopes = quick_jit(jax.vmap(jax.value_and_grad(loss), (0, None)))(kernels, arrays[0])
    for i, kernel in enumerate(kernels):
        value, slope = quick_jit(jax.value_and_grad(loss))(kernel, arrays[0])
        assert_close(values[i], value)
        assert_close(slopes[i], slope, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("argument", "reduction"),
    [
        (1, "mean"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((0, "none"), (5, "mean"))),
    ],
)
def test_mapped_over_one_argument(argument, reduction):
    """Values, and gradients whose weights come later; a kernel can't be cut into rows."""
    arrays, labels, _ = data()
    arrays = [jnp.asarray(x) for x in arrays]

    def loss(x):
        given = [*arrays[:argument], x, *arrays[argument + 1 :]]
        return jnp.square(distillation(given, labels, block_size=5, reduction=reduction)).sum()

    stack = jnp.stack([arrays[argument], 2 * arrays[argument]])
    both = jax.vmap(lambda x: (loss(x), *jax.value_and_grad(loss)(x)))
    values, again, slopes = quick_jit(both)(stack)
    for i, x in enumerate(stack):
        value, slope = quick_jit(jax.value_and_grad(loss))(x)
        assert_close([values[i], again[i]], [value, value])
        assert_close(slopes[i], slope, rtol=1e-4, atol=1e-6)


def test_derivatives_in_weights_and_temperature(x64):
    arrays, labels, mask = data(np.float64)
    p = [jnp.asarray(x) for x in arrays]

    def ours(numbers):
        loss = F.linear_distillation(
            *(p[0], p[1], p[3], p[4], labels),
            cross_entropy_weight=numbers[0], kl_weight=numbers[1], temperature=numbers[2],
            where=mask, block_size=2,
        )  # fmt: skip
        return loss.total, loss

    def exact(numbers):
        bare = [*arrays[:2], 0, *arrays[3:5], 0]
        parts = chosen(logs(bare)[0], labels), oracles.kl(*logs(bare, numbers[2]))
        return reduced(numbers[0] * parts[0] + numbers[1] * parts[1], mask, "mean")

    numbers = np.array([0.7, 0.3, 1.5])
    (total, loss), slopes = quick_jit(jax.value_and_grad(ours, has_aux=True))(jnp.array(numbers))
    assert_close(total, exact(numbers), rtol=1e-12)
    assert_close(slopes, oracles.gradient(exact, numbers), rtol=1e-8)
    assert_close(total, 0.7 * loss.cross_entropy + 0.3 * loss.kl, rtol=1e-12)


@pytest.mark.parametrize("name", ["linear_kl", "linear_cross_entropy"])
def test_weights_of_positions(name, x64):
    """Of either sign, 0 or left out; each gets the gradient that is its value."""
    head = HEADS[name]
    arrays, labels, mask = data(np.float64)
    weights = np.where(mask, np.linspace(-1, 2, mask.size).reshape(mask.shape).round(1), np.nan)
    direction, entries = oracles.lattice(3, *arrays[0].shape), head.oracle(arrays, labels)

    def ours(weights, distance, reduction):
        moved = [arrays[0] + distance * direction, *arrays[1:]]
        values = head.call(moved, labels, weights=weights, where=mask, reduction=reduction)
        return jnp.sum(values), values

    def exact(distance):
        moved = [arrays[0] + distance * direction, *arrays[1:]]
        return np.sum((weights * head.oracle(moved, labels))[mask])

    both = quick_jit(jax.value_and_grad(ours, (0, 1), has_aux=True), static_argnums=2)
    for reduction, count in (("none", 1), ("sum", 1), ("mean", mask.sum())):
        (total, values), (by_weights, along) = both(weights, 0.0, reduction)
        assert_close(total, exact(0) / count, rtol=1e-11)
        assert_close(by_weights, np.where(mask, entries, 0) / count, rtol=1e-11)
        assert_close(along, (exact(1e-5) - exact(-1e-5)) / 2e-5 / count, rtol=1e-7)
        if reduction == "none":
            assert_close(values, np.where(mask, weights * entries, 0), rtol=1e-11)


def test_an_excluded_position_may_hold_anything():
    arrays, labels, mask = data()
    kept, slopes = jax.value_and_grad(lambda h: kl([h, *arrays[1:]], labels, where=mask))(
        jnp.asarray(arrays[0])
    )
    spoilt = np.where(mask[..., None], arrays[0], np.nan)
    temperature = jnp.where(mask, 1, jnp.nan)
    value, (found, by_temperature) = jax.value_and_grad(
        lambda arrays, t: kl(arrays, labels, where=mask, temperature=t), (0, 1)
    )([jnp.asarray(x) for x in (spoilt, *arrays[1:])], temperature)
    assert_close(value, kept)
    assert_close(found[0], np.where(mask[..., None], slopes, 0), rtol=1e-5, atol=1e-9)
    assert all(np.isfinite(x).all() for x in (*found, by_temperature))


@most(("kind",), (AxisType.Auto,), (AxisType.Explicit,), others=(AxisType.Explicit,))
def test_rows_sharded_under_jit(head, kind):
    """The numbers of one device, with nothing gathered."""
    arrays, labels, mask = data()
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))

    def loss(arrays, labels, mask):
        return head.call(arrays, labels, where=mask, block_size=2)

    value, slopes = quick_jit(jax.value_and_grad(loss))(arrays, labels, mask)
    specs = [P("data"), P(), P(), P("data"), P(), P()]
    placed = [jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip(arrays, specs, strict=True)]
    others = jax.device_put((labels, mask), NamedSharding(mesh, P("data")))
    program = quick_jit(jax.value_and_grad(loss)).lower(placed, *others).compile()
    assert "all-gather" not in program.as_text()
    ours, found = program(placed, *others)
    assert_close(ours, value)
    for slope, desired in zip(found, slopes, strict=True):
        assert_close(slope, desired, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    "kernel",
    [
        P("data", "model"),
        *(pytest.param(spec, marks=pytest.mark.slow) for spec in (P(None, "model"), P("model"))),
    ],
    ids=str,
)
def test_kernels_sharded_on_explicit_axes(kernel):
    arrays, labels, _ = data()
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    bias = P(kernel[1] if len(kernel) > 1 else None)
    loss = quick_jit(jax.value_and_grad(partial(distillation, block_size=2)))
    value, slopes = loss(arrays, labels)
    specs = [P("data"), kernel, bias] * 2
    placed = [jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip(arrays, specs, strict=True)]
    ours, found = loss(placed, jax.device_put(labels, NamedSharding(mesh, P("data"))))
    assert_close(ours, value)
    for slope, desired in zip(found, slopes, strict=True):
        assert_close(slope, desired, rtol=1e-4, atol=1e-7)


@most(("reduction", "check_vma"), ("mean", False), ("mean", True), others=("none", True))
def test_rows_and_classes_sharded(head, reduction, check_vma):
    """Rows over one mesh axis, the classes of kernels and biases over another."""
    arrays, labels, mask = data()
    mesh = jax.make_mesh((2, 4), ("rows", "classes"), axis_types=(AxisType.Auto,) * 2)
    options = {"reduction": reduction, "block_size": 2}
    names = {"class_axis_name": "classes"} | ({"axis_name": "rows"} if reduction == "mean" else {})
    kernels = [P("rows"), P(None, "classes"), P("classes")]
    sharded = jax.shard_map(
        lambda arrays, labels, mask: head.call(arrays, labels, where=mask, **options, **names),
        mesh=mesh,
        in_specs=(kernels * 2, P("rows"), P("rows")),
        out_specs=P() if reduction == "mean" else P("rows"),
        check_vma=check_vma,
    )

    def total(function, arrays):
        return jnp.sum(jnp.sin(function(arrays, labels, mask)))

    plain = partial(total, lambda arrays, labels, mask: head.call(
        arrays, labels, where=mask, **options
    ))  # fmt: skip
    value, slopes = quick_jit(jax.value_and_grad(plain))(arrays)
    ours, found = quick_jit(jax.value_and_grad(partial(total, sharded)))(arrays)
    assert_close(ours, value)
    for slope, desired in zip(found, slopes, strict=True):
        assert_close(slope, desired, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_exported_for_any_number_of_positions():
    """Of the one that is made of both kinds; test_modes.py exports them all, for any batch."""
    arrays, labels, _ = data()

    @quick_jit
    @jax.value_and_grad
    def both(arrays, labels):
        return distillation(arrays, labels, block_size=2)

    (batch,) = jax.export.symbolic_shape("b")

    def of_any_batch(x):
        shape = (batch, *x.shape[1:]) if x.ndim > 1 and x.shape[:2] == ROWS else x.shape
        return jax.ShapeDtypeStruct(shape, jnp.asarray(x).dtype)

    program = jax.export.export(both)(*jax.tree.map(of_any_batch, (arrays, labels)))
    again = quick_jit(program.call)
    for size in (ROWS[0], 5):
        fewer = [x[:size] if x.shape[:2] == ROWS else x for x in arrays]
        given = [jnp.asarray(x) for x in fewer], jnp.asarray(labels[:size])
        (value, slopes), (desired, expected) = again(*given), both(*given)
        assert_close(value, desired)
        for slope, exact in zip(slopes, expected, strict=True):
            assert_close(slope, exact, rtol=1e-4, atol=1e-7)


def test_memory():
    """Beside the kernel's gradient there are a few blocks, not the logits."""
    rows, width, classes = 2048, 16, 4096
    shapes = [(rows, width), (width, classes)] * 2
    inputs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    loss = jax.value_and_grad(partial(F.linear_kl, block_size=4), (0, 1))
    temporaries = jax.jit(loss).lower(*inputs).compile().memory_analysis().temp_size_in_bytes
    assert temporaries < 4 * (width * classes + 0.15 * rows * classes)


def test_a_block_is_traced_once_for_each_platform(monkeypatch):
    traced, statistics_of = [], heads.statistics_of

    def counted(formula, walk, *arguments):
        traced.append(walk.platform)
        return statistics_of(formula, walk, *arguments)

    monkeypatch.setattr(heads, "statistics_of", counted)
    loss = jax.value_and_grad(partial(F.linear_kl, block_size=8))
    shapes = [jax.ShapeDtypeStruct(n, jnp.float32) for n in ((64, 2), (2, 3), (64, 2), (2, 3))]
    jax.jit(loss).trace(*shapes)
    # For the value, and for the value with its gradient, which takes that one's place.
    assert Counter(traced) == {CPU: 2, ACCELERATOR: 2}


def test_half_precision_multiplies_as_it_is_and_accumulates_in_float32():
    arrays, labels, _ = data()
    half = [jnp.asarray(x, jnp.bfloat16) for x in arrays]
    value, slopes = quick_jit(jax.value_and_grad(lambda a: kl(a, labels)))(half)
    assert value.dtype == jnp.float32
    assert {x.dtype for x in slopes} == {jnp.dtype(jnp.bfloat16)}
    rounded = [np.asarray(x).astype(np.float64) for x in half]
    assert_close(value, oracles.kl(*logs(rounded)).mean(), rtol=1e-5)
    text = jax.jit(jax.value_and_grad(kl)).lower(half, labels).as_text()
    # A bias's gradient is a sum, of one axis.
    products = re.findall(r"dot_general.* : (\(.*\) -> tensor<\d+x\d.*>)", text)
    assert products
    for product in products:
        assert re.fullmatch(r"\(tensor<[\dx]+xbf16>, tensor<[\dx]+xbf16>\) -> .*xf32>", product)


@pytest.mark.parametrize(
    ("head", "dtype", "reduction"),
    [
        pytest.param(
            *(HEADS[name], dtype, reduction),
            id=f"{name}-{dtype.__name__}-{reduction}",
            marks=() if (dtype, reduction) == (jnp.float16, "mean") else pytest.mark.slow,
        )
        for name in ("linear_kl", "linear_js", "linear_cross_entropy", BOTH)
        for dtype in (jnp.float16, jnp.bfloat16)
        for reduction in ("mean", "sum", "none")
    ],
)
def test_half_precision_gradients_under_small_weights_and_loss_scales(head, dtype, reduction):
    """As exact as the dtype: a gradient is rounded to it once, and after everything else."""
    arrays, labels, mask = data()
    half = [jnp.asarray(x, dtype) for x in arrays]
    exact = [np.asarray(x).astype(np.float64) for x in half]
    # The mean in three ways, but that each position has a weight of its own in the last.
    count = mask.sum()
    by_position = np.ones(ROWS)
    if reduction == "none":
        by_position = np.logspace(-4, 0, by_position.size).reshape(ROWS)
    distilling = head is HEADS["linear_distillation"]

    @quick_jit
    @jax.grad
    def ours(arrays, weight, scale):
        small = {"kl_weight": 0.3 * weight, "cross_entropy_weight": 0.7 * weight}
        options = {"where": mask, "reduction": reduction, "block_size": 5}
        values = head.call(arrays, labels, **options, **(small if distilling else {}))
        factor = (scale if distilling else scale * weight) / (1 if reduction == "mean" else count)
        return factor * ((by_position * values).sum() if reduction == "none" else values)

    def total(x, i):
        values = head.oracle([*exact[:i], x, *exact[i + 1 :]], labels)
        return (by_position * values)[mask].sum() / count

    desired = [oracles.gradient(partial(total, i=i), exact[i]) for i in range(3)]
    least = float(jnp.finfo(dtype).smallest_subnormal)
    for weight, scale in ((1.0, 1.0), (1.0, 2.0**15), (1e-6, 1.0), (1e-6, 2.0**15)):
        found = ours(half, jnp.float32(weight), jnp.float32(scale))
        for slope, slopes in zip(found, desired, strict=False):
            assert slope.dtype == dtype
            error = np.linalg.norm(np.asarray(slope).astype(np.float64) - weight * scale * slopes)
            size = weight * scale * np.linalg.norm(slopes)
            assert error <= 1e-2 * size + least * slopes.size**0.5, (weight, scale, error / size)


@pytest.mark.slow
def test_a_loss_scale_of_as_many_rows_as_classes():
    """Where each slope times 1 / N is below the least number of float16."""
    n, width, scale = 4096, 16, 2.0**15
    random = np.random.default_rng(0)
    shapes = [(n, width), (width, n)] * 2
    half = [jnp.asarray(0.3 * random.normal(size=shape), jnp.float16) for shape in shapes]
    hidden, kernel, *other = [np.asarray(x).astype(np.float64) for x in half]
    labels = random.integers(0, n, size=n)
    log_p, log_q = (special.log_softmax(h @ k, axis=-1) for h, k in ((hidden, kernel), other))
    p, ratio = np.exp(log_p), log_p - log_q
    losses = {
        F.linear_kl: (half, p * (ratio - (p * ratio).sum(-1, keepdims=True))),
        F.linear_cross_entropy: ([*half[:2], labels], p - np.eye(n)[labels]),
    }
    for function, (inputs, slope) in losses.items():

        def loss(*inputs, function=function):
            return scale * function(*inputs)

        found = jax.jit(jax.grad(loss, (0, 1)))(*inputs)
        for ours, desired in zip(found, (slope @ kernel.T, hidden.T @ slope), strict=True):
            desired = scale / n * desired
            error = np.linalg.norm(np.asarray(ours).astype(np.float64) - desired)
            assert error <= 1e-3 * np.linalg.norm(desired)


def test_labels_outside_of_the_classes_have_no_loss():
    arrays, labels, _ = data()
    labels[0, 0] = -100
    labels[0, 1] = CLASSES

    def loss(hidden):
        values = F.linear_cross_entropy(hidden, arrays[1], labels, reduction="none")
        return values.sum(), values

    slope, values = jax.grad(loss, has_aux=True)(jnp.asarray(arrays[0]))
    for each in (values, jnp.abs(slope).sum(-1)):
        assert float(each[0, 0]) == float(each[0, 1]) == 0
        assert (each.ravel()[2:] > 0).all()


HIDDEN, KERNEL = np.ones((2, 3), np.float32), np.ones((3, 4), np.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_q": np.ones((2, 5))}, r"kernel_q must be \[5, classes\]"),
        ({"hidden_q": np.ones((3, 3))}, r"got shapes \(2, 3\) and \(3, 3\)"),
        ({"kernel_q": np.ones((3, 5))}, r"got shapes \(3, 4\) and \(3, 5\)"),
        ({"bias_p": np.ones(3)}, r"bias_p must have shape \(4,\), got \(3,\)"),
        ({"block_size": 0}, "block_size must be at least 1, got 0"),
        ({"temperature": 0}, "temperature must be above 0, got 0"),
        ({"direction": "up"}, "'forward', 'reverse', 'symmetric', got 'up'"),
        ({"reduction": "avg"}, "'sum', 'mean', 'none', got 'avg'"),
    ],
)
def test_bad_input(change, message):
    names = {"hidden_p": HIDDEN, "kernel_p": KERNEL, "hidden_q": HIDDEN, "kernel_q": KERNEL}
    with pytest.raises(ValueError, match=message):
        F.linear_kl(**(names | change))


def test_bad_inputs_of_other_kinds():
    with pytest.raises(TypeError, match="hidden_q must be an array, got a list"):
        F.linear_kl(HIDDEN, KERNEL, [[1.0]], KERNEL)
    with pytest.raises(ValueError, match=r"mixture must be in \[0, 1\], got 2"):
        F.linear_js(HIDDEN, KERNEL, HIDDEN, KERNEL, mixture=2)
    with pytest.raises(ValueError, match=r"^kernel must be \[3, classes\] for hidden of shape"):
        F.linear_entropy(HIDDEN, KERNEL.T)
    with pytest.raises(ValueError, match=r"kl_weight .* shape \(\), got shape \(2,\)"):
        F.linear_distillation(
            *(HIDDEN, KERNEL, HIDDEN, KERNEL, np.zeros(2, int)), kl_weight=np.ones(2)
        )


def test_variables_of_flax():
    """Inside of a gradient, too, where they can't be told from arrays by their types."""
    kernel = nnx.Param(jnp.asarray(KERNEL))

    def loss(hidden, kernel):
        return F.linear_kl(hidden, kernel, 2 * HIDDEN, kernel)

    ours, desired = (jax.grad(loss)(jnp.asarray(HIDDEN), k) for k in (kernel, KERNEL))
    assert_close(ours, desired)


def test_bad_labels():
    with pytest.raises(TypeError, match="labels must be integers, got float"):
        F.linear_cross_entropy(HIDDEN, KERNEL, np.ones(2))
    with pytest.raises(ValueError, match=r"labels must have shape \(2,\)"):
        F.linear_cross_entropy(HIDDEN, KERNEL, np.arange(3))
    with pytest.raises(TypeError, match="tokens must be integers, got float"):
        F.linear_log_prob(HIDDEN, KERNEL, np.ones(2))


@pytest.mark.parametrize(
    ("dtype", "size"), [("int8", 100), ("uint8", 200), ("int16", 300), ("int32", 60_000)]
)
def test_products_of_integers_do_not_wrap(dtype, size):
    kernel = np.array([[size, size - 1], [0, 0]], dtype)
    hidden = np.array([[size, 1]], dtype)
    assert_close(F.linear_log_prob(hidden, kernel, np.array([1])), -size, rtol=1e-2)


def test_logits_as_large_as_float32_holds():
    kernel = np.float32([[0, 1], [0, 1]])
    value = F.linear_cross_entropy(np.full((1, 2), 1e20, np.float32), kernel, np.array([0]))
    assert_close(value, 2e20, rtol=1e-6)


@pytest.mark.parametrize(
    ("linear", "of_logits", "options"),
    [
        (F.linear_kl, F.kl_from_logits, {"floor": -2.0, "skew": 0.1, "direction": "reverse"}),
        pytest.param(
            *(F.linear_js, F.js_from_logits, {"floor": -2.0, "mixture": 0.3}),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["kl", "js"],
)
def test_a_skew_and_a_floor(linear, of_logits, options):
    """Value and all gradients are those from logits, of classes that one or both exclude."""
    shapes = {"hidden_p": (7, 3), "kernel_p": (3, 5), "hidden_q": (7, 3), "kernel_q": (3, 5)}
    arrays = {
        name: np.float32(oracles.lattice(i, *shape))
        for i, (name, shape) in enumerate(shapes.items())
    }
    bias_p, bias_q = np.zeros((2, 5), np.float32)
    bias_p[0] = bias_q[[0, 3]] = -np.inf
    numbers = {name: x for name, x in options.items() if name != "direction"}
    words = {name: x for name, x in options.items() if name == "direction"}
    words["temperature"] = 1.5

    def streamed(arrays, numbers):
        biases = {"bias_p": bias_p, "bias_q": bias_q}
        return linear(**arrays, **biases, block_size=3, **numbers, **words)

    def whole(arrays, numbers):
        p = arrays["hidden_p"] @ arrays["kernel_p"] + bias_p
        q = arrays["hidden_q"] @ arrays["kernel_q"] + bias_q
        return of_logits(p, q, **numbers, **words)

    (found, slopes), (desired, expected) = (
        quick_jit(jax.value_and_grad(f, (0, 1)))(arrays, numbers) for f in (streamed, whole)
    )
    assert_close(found, desired, rtol=1e-6)
    jax.tree.map(lambda x, y: assert_close(x, y, rtol=1e-4, atol=1e-6), slopes, expected)
