"""Averages per sequence against loops over the sequences, in float64."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import penalties_jax as pj
from penalties_jax.functional.averages import Sequences, Tokens
from tests.oracles import assert_close, gradient, lattice
from tests.programs import operations, quick_jit

BATCH, TIME, SEGMENTS = 8, 6, 3
VALUES = lattice(0, BATCH, TIME) + 0.25
# A row without a token, one with all, and others.
MASK = np.random.default_rng(1).random((BATCH, TIME)) < 0.6
MASK[0], MASK[1] = False, True
# Packed rows: without the third sequence, in no order, of padding alone.
IDS = np.sort(np.random.default_rng(2).integers(0, SEGMENTS + 1, (BATCH, TIME)), 1)[:, ::-1]
IDS = np.ascontiguousarray(IDS)
IDS[2], IDS[3], IDS[4] = (1, 1, 2, 2, 2, 0), (3, 1, 3, 1, 0, 2), 0

MODES = [
    {"tokens": tokens, "sequences": sequences, **length, **normalizer}
    for tokens, sequences in itertools.product(Tokens.__args__, Sequences.__args__)
    for length in ({}, {"length": 7.5})
    for normalizer in ({}, {"normalizer": 11.0})
    if not (tokens == "sum" and (length or sequences == "tokens"))
    if not (sequences == "tokens" and length) and not (sequences == "sum" and normalizer)
]
ROWS = {"rows": {}, "packed": {"segment_ids": IDS, "num_segments": SEGMENTS}}

every_kind = pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)


def split(mode):
    """The options and the numbers of a mode."""
    numbers = {name: x for name, x in mode.items() if isinstance(x, float)}
    return {name: x for name, x in mode.items() if name not in numbers}, numbers


def loops(
    values,
    where=None,
    tokens="mean",
    sequences="mean",
    segment_ids=None,
    num_segments=None,
    length=None,
    normalizer=None,
):
    """The average, a sequence after the other."""
    found = []
    for row, x in enumerate(values):
        for segment in range(1, (num_segments or 1) + 1):
            own = [
                x[t]
                for t in range(len(x))
                if (where is None or where[row, t])
                and (segment_ids is None or segment_ids[row, t] == segment)
            ]
            if own:
                found.append(own)
    if sequences == "tokens":
        everything = [x for own in found for x in own]
        return sum(everything) / (normalizer or max(len(everything), 1))
    each = [sum(own) / ((length or len(own)) if tokens == "mean" else 1) for own in found]
    return sum(each) / (1 if sequences == "sum" else normalizer or max(len(each), 1))


def test_there_is_every_mode():
    assert len(MODES) == 11


@every_kind
def test_value_and_gradient(rows, x64):
    """Of every mode, with NaN and infinities wherever a token does not count."""
    counted = MASK & (rows["segment_ids"] > 0) if rows else MASK
    poisoned = np.where(counted, VALUES, np.resize((np.nan, np.inf, -np.inf), VALUES.shape))
    modes = [split(mode) for mode in MODES]

    @quick_jit
    def everything(values, numbers):
        def call(values, numbers, options):
            return pj.aggregate(values, where=MASK, **rows, **options, **numbers)

        both = jax.value_and_grad(call, (0, 1))
        return [both(values, own, mode) for own, (mode, _) in zip(numbers, modes, strict=True)]

    found = everything(poisoned, [numbers for _, numbers in modes])
    for (value, (slope, by_number)), (options, numbers) in zip(found, modes, strict=True):
        oracle = partial(loops, where=MASK, **rows, **options)
        assert value.dtype == slope.dtype == np.float64
        assert_close(value, oracle(VALUES, **numbers), rtol=1e-13)
        desired = gradient(partial(oracle, **numbers), VALUES)
        assert_close(slope, desired, rtol=1e-7, atol=1e-10)
        assert np.all(np.asarray(slope)[~counted] == 0)
        for name, own in by_number.items():
            others = {other: x for other, x in numbers.items() if other != name}
            call = partial(oracle, VALUES, **others)
            desired = gradient(lambda n, call=call, name=name: call(**{name: n}), numbers[name])
            assert_close(own, desired, rtol=1e-7)


@every_kind
def test_no_token_at_all(rows):
    nowhere = np.zeros_like(MASK)

    @quick_jit
    def everything(values):
        calls = [partial(pj.aggregate, where=nowhere, **rows, **mode) for mode in MODES]
        return [jax.value_and_grad(call)(values) for call in calls]

    found = everything(np.full((BATCH, TIME), np.nan, np.float32))
    assert all(np.all(np.asarray(x) == 0) for x in jax.tree.leaves(found))


def test_a_batch_without_a_token_has_a_normalizer_of_zero():
    """As `where.sum()` is then, traced."""
    x, nowhere = jnp.ones((2, 3)), jnp.zeros((2, 3), bool)

    def loss(x, where):
        return pj.aggregate(x, where=where, sequences="tokens", normalizer=jnp.sum(where))

    value, slope = jax.value_and_grad(loss)(x, nowhere)
    assert value == 0
    assert np.all(slope == 0)
    assert pj.aggregate(jnp.zeros((0, 3))) == pj.aggregate(jnp.zeros((3, 0))) == 0


@pytest.mark.parametrize("shape", [(), (1,), (TIME,), (BATCH, 1), (1, TIME)])
def test_masks_of_broadcast_shapes(shape):
    mask = np.random.default_rng(3).random(shape) < 0.7
    full = np.broadcast_to(mask, VALUES.shape)
    actual = pj.aggregate(np.float32(VALUES), where=mask, **ROWS["packed"])
    assert_close(actual, loops(VALUES, full, **ROWS["packed"]), rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.int32])
def test_half_precision_is_summed_in_float32(dtype):
    """4,099 ones are 4,096 in half precision, and less."""
    ones = jnp.ones((1, 4099), dtype)
    for rows in ({}, {"segment_ids": np.ones((1, 4099), np.int8), "num_segments": 1}):
        total = pj.aggregate(ones, tokens="sum", **rows)
        assert total.dtype == jnp.float32
        assert total == 4099
        assert pj.aggregate(ones, **rows) == 1


def test_ids_out_of_range_are_padding_where_they_cannot_be_read():
    ids = np.where(IDS == 0, -5, IDS)
    ids[3, 0] = SEGMENTS + 4
    desired = loops(VALUES, segment_ids=ids, num_segments=SEGMENTS)
    actual = pj.aggregate(np.float32(VALUES), segment_ids=jnp.asarray(ids), num_segments=SEGMENTS)
    assert_close(actual, desired, rtol=1e-5)


def test_nothing_is_as_large_as_tokens_times_sequences():
    def slopes(x, ids):
        return jax.grad(lambda x: pj.aggregate(x, segment_ids=ids, num_segments=SEGMENTS))(x)

    found = operations(slopes, np.float32(VALUES), jnp.asarray(IDS))
    assert any(f"[{BATCH},{SEGMENTS + 1}]" in operation for operation in found)
    assert not any(f"[{BATCH},{TIME},{SEGMENTS}" in operation for operation in found)


# The batch in parts.


def assert_all_are_those_of_the_batch(found, rows):
    for (value, slope), mode in zip(found, MODES, strict=True):
        oracle = partial(loops, where=MASK, **rows, **mode)
        assert_close(value, oracle(VALUES), rtol=1e-5)
        assert_close(slope, gradient(oracle, VALUES), rtol=1e-4, atol=1e-6)


@every_kind
@pytest.mark.parametrize("check_vma", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_over_eight_devices(rows, check_vma):
    """Every mode by a named axis inside shard_map, one row on each device."""
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(AxisType.Auto,))
    ids = {"segment_ids": IDS} if rows else {}

    def loss(values, where, ids, mode):
        given = ids | {"num_segments": SEGMENTS} if rows else {}
        return pj.aggregate(values, where=where, **given, **mode, axis_name="batch")

    def sharded(mode):
        return jax.shard_map(
            partial(loss, mode=mode),
            mesh=mesh,
            in_specs=(P("batch"), P("batch"), P("batch")),
            out_specs=P(),
            check_vma=check_vma,
        )

    @quick_jit
    def everything(*arguments):
        return [jax.value_and_grad(sharded(mode))(*arguments) for mode in MODES]

    assert_all_are_those_of_the_batch(everything(np.float32(VALUES), MASK, ids), rows)


@every_kind
def test_over_microbatches(rows):
    """Of uneven counts, and one of none: the global normalizer, and the losses added up."""
    parts = slice(0, 1), slice(1, 4), slice(4, 8)
    ones = partial(loops, np.ones_like(VALUES), MASK, **rows, sequences="sum")
    counts = {"mean": np.float32(ones()), "tokens": np.float32(ones(tokens="sum"))}

    def total(values, counts, mode):
        if mode["sequences"] in counts and "normalizer" not in mode:
            mode = mode | {"normalizer": counts[mode["sequences"]]}
        return sum(
            pj.aggregate(
                values[part],
                where=MASK[part],
                **rows and {"segment_ids": IDS[part], "num_segments": SEGMENTS},
                **mode,
            )
            for part in parts
        )

    @quick_jit
    def everything(values, counts):
        return [jax.value_and_grad(total)(values, counts, mode) for mode in MODES]

    assert_all_are_those_of_the_batch(everything(np.float32(VALUES), counts), rows)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("spec", [P("data"), P("data", "model")], ids=str)
@every_kind
def test_a_sharded_batch_is_never_gathered(rows, spec, kind):
    """Along the batch; ids of a row that is cut have to meet."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind,) * 2)
    place = partial(jax.device_put, device=NamedSharding(mesh, spec))

    def loss(values, where, ids):
        given = {"segment_ids": ids, "num_segments": SEGMENTS} if rows else {}
        return pj.aggregate(values, where=where, **given)

    arguments = place(np.float32(VALUES)), place(MASK), place(IDS)
    compiled = quick_jit(jax.value_and_grad(loss)).lower(*arguments).compile()
    text = compiled.as_text()
    assert "all-reduce" in text  # it is a program of many devices
    if spec == P("data"):
        assert "all-gather" not in text
    assert "all-to-all" not in text
    value, slope = compiled(*arguments)
    assert_close(value, loops(VALUES, MASK, **rows), rtol=1e-5)
    assert slope.sharding.is_equivalent_to(arguments[0].sharding, 2)


def test_mapped_over_batches():
    x = np.float32(np.stack([VALUES, 2 * VALUES]))
    ids = np.stack([IDS, IDS[::-1]])
    call = partial(pj.aggregate, num_segments=SEGMENTS)
    mapped = jax.vmap(lambda x, ids: call(x, segment_ids=ids))(x, ids)
    pairs = zip(x, ids, strict=True)
    desired = [loops(a, segment_ids=b, num_segments=SEGMENTS) for a, b in pairs]
    assert_close(mapped, desired, rtol=1e-5)


# What is refused.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sequences": "sum", "normalizer": 2.0}, "normalizer.*'?mean'?.*sum"),
        ({"tokens": "sum", "length": 2.0}, "length"),
        ({"sequences": "tokens", "length": 2.0}, "length"),
        ({"sequences": "tokens", "tokens": "sum"}, "tokens"),
        ({"tokens": "max"}, "tokens must be one of 'mean', 'sum'"),
        ({"sequences": "rows"}, "sequences must be one of 'mean', 'sum', 'tokens'"),
        ({"segment_ids": IDS}, "num_segments"),
        ({"num_segments": 2}, "segment_ids"),
        ({"segment_ids": IDS, "num_segments": 0}, "num_segments must be at least 1"),
        ({"segment_ids": IDS, "num_segments": 2}, r"segment_ids must be in \[0, 2\]"),
        ({"segment_ids": -IDS, "num_segments": 3}, r"segment_ids must be in \[0, 3\]"),
        ({"length": 0}, "length must be above 0"),
        ({"length": -1.0}, "length must be above 0"),
        ({"normalizer": 0.0}, "normalizer must be above 0"),
        ({"normalizer": jnp.ones(8)}, "normalizer must be one number"),
        ({"length": np.ones((8, 1))}, "length must be one number"),
        ({"where": np.ones((8, 5), bool)}, r"where must broadcast to shape \(8, 6\)"),
        ({"segment_ids": IDS[:, :5], "num_segments": 3}, r"segment_ids must have shape \(8, 6\)"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        pj.aggregate(np.float32(VALUES), **options)


@pytest.mark.untyped
@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4)])
def test_values_of_other_shapes(shape):
    with pytest.raises(ValueError, match=r"values must be of shape \[batch, time\]"):
        pj.aggregate(np.zeros(shape, np.float32))


@pytest.mark.untyped
def test_masks_and_ids_of_other_types():
    with pytest.raises(TypeError, match="where must be boolean"):
        pj.aggregate(np.float32(VALUES), where=IDS)
    with pytest.raises(TypeError, match="segment_ids must be integers"):
        pj.aggregate(np.float32(VALUES), segment_ids=np.float32(IDS), num_segments=3)


def test_ids_that_are_excluded_may_be_anything():
    ids = np.where(MASK, IDS, 99)
    actual = pj.aggregate(np.float32(VALUES), where=MASK, segment_ids=ids, num_segments=SEGMENTS)
    assert_close(actual, loops(VALUES, MASK, **ROWS["packed"]), rtol=1e-5)


def test_a_number_of_tokens_beyond_int32():
    assert_close(pj.aggregate(np.ones((2, 4)), normalizer=2**31), 2.0**-30, rtol=1e-6)
