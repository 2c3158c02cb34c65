"""The batch on eight devices: named axes, the gradient table, and sharded arrays under jit."""

from functools import partial

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import penalties_jax.functional as F  # noqa: N812
from tests.catalogue import (
    FUNCTIONS,
    STRUCTURES,
    every,
    first_of_each,
    only,
    streamed_again,
)
from tests.oracles import assert_close, gradient, lattice
from tests.programs import quick_jit

MEMBERS = 8
# Those whose sum over the batch is more than a sum of members' sums, and one that is not.
SUMMED = only(lambda case: case.name in ("l1", "l2-mean", "kl_divergence"), FUNCTIONS)
# With one of each kind: of entries, rows and groups, of one input and of two.
KINDS = SUMMED | first_of_each(
    lambda case: (type(case.entry), case.by_row, case.inputs),
    only(lambda case: not case.streamed, FUNCTIONS),
)


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((MEMBERS,), ("batch",), axis_types=(AxisType.Auto,))


def uneven(case):
    """A mask with another count on each member, and none on one."""
    mask = case.mask(1)
    mask[0] = False
    mask[1] = True
    return mask


def exact(case, reduction, scale, inputs, mask):
    """The oracle's value, and its derivatives in each member's scale and in the first input."""

    def value(scales, first):
        scaled = [scales[:, None, None] * x for x in (first, *inputs[1:])]
        return case.reduced_entries(*scaled, reduction=reduction, where=mask)

    scales = np.full(MEMBERS, scale)
    return (
        value(scales, inputs[0]),
        gradient(lambda scales: value(scales, inputs[0]), scales),
        gradient(lambda first: value(scales, first), inputs[0]),
    )


@pytest.mark.parametrize(
    ("case", "reduction"),
    [
        *(
            pytest.param(
                case, "mean", id=name, marks=() if case in KINDS.values() else pytest.mark.slow
            )
            for name, case in FUNCTIONS.items()
        ),
        *(pytest.param(case, "sum", id=f"{name}-sum") for name, case in SUMMED.items()),
    ],
)
def test_gradient_table(case, reduction, mesh, x64):
    """Every row: outside, inside with and without check_vma, and vmap with a named axis.

    The scale is a replicated parameter; the inputs and their masks are sharded.
    """
    inputs, mask, scale = case.data(2), uneven(case), 0.75

    def loss(scale, first, rest, mask):
        scaled = (scale * x for x in (first, *rest))
        return case.call(*scaled, reduction=reduction, where=case.where(mask), axis_name="batch")

    slopes = jax.value_and_grad(loss, (0, 1))

    def slopes_and_mean(*arguments):
        value, (own, data) = slopes(*arguments)
        return value, own[None], jax.lax.pmean(own, "batch"), data

    def sharded(function, out_specs, check_vma):
        in_specs = (P(), P("batch"), P("batch"), P("batch"))
        return jax.shard_map(
            function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=check_vma
        )

    @quick_jit
    def everything(*arguments):
        return (
            jax.value_and_grad(sharded(loss, P(), True), (0, 1))(*arguments),
            jax.value_and_grad(sharded(loss, P(), False), (0, 1))(*arguments),
            sharded(slopes, (P(), (P(), P("batch"))), True)(*arguments),
            sharded(slopes_and_mean, (P(), P("batch"), P(), P("batch")), False)(*arguments),
            jax.vmap(slopes_and_mean, (None, 0, 0, 0), axis_name="batch")(*arguments),
        )

    *exact_rows, unchecked, mapped = everything(scale, inputs[0], inputs[1:], mask)
    desired, own, data = exact(case, reduction, scale, inputs, mask)
    close = {"rtol": 1e-6, "atol": 1e-8}
    for value, (parameter_slope, data_slope) in exact_rows:
        assert_close(value, desired, rtol=1e-11, atol=1e-13)
        assert_close(parameter_slope, own.sum(), **close)
        assert_close(data_slope, data, **close)
    for value, own_slopes, mean, data_slope in (unchecked, mapped):
        assert_close(value, desired, rtol=1e-11, atol=1e-13)
        assert_close(np.ravel(own_slopes), MEMBERS * own, **close)
        assert_close(mean, own.sum(), **close)
        assert_close(data_slope, MEMBERS * data, **close)


@every(FUNCTIONS, slow=streamed_again)
def test_sum_mean_and_none_are_of_the_global_batch(case, mesh):
    """With no mask, with one for each member, and with one that all share."""
    exact_inputs = case.data(3)
    inputs = tuple(x.astype(np.float32) for x in exact_inputs)
    shared = np.random.default_rng(5).random(case.mask_shape[1:]) < 0.6
    own = uneven(case)

    def everything(inputs, own, shared):
        def call(mask, reduction):
            where = None if mask is None else case.where(mask)
            return case.call(*inputs, reduction=reduction, where=where, axis_name="batch")

        reduced = [[call(mask, name) for mask in (None, own, shared)] for name in ("sum", "mean")]
        return reduced, call(own, "none")

    for check_vma in (True, False) if case.name in KINDS else (True,):
        sharded = jax.shard_map(
            everything,
            mesh=mesh,
            in_specs=(P("batch"), P("batch"), P()),
            out_specs=(P(), P("batch")),
            check_vma=check_vma,
        )
        reduced, entries = quick_jit(sharded)(inputs, own, shared)
        assert_close(
            entries, case.reduced_entries(*exact_inputs, reduction="none", where=own), atol=1e-6
        )
        for reduction, values in zip(("sum", "mean"), reduced, strict=True):
            for value, mask in zip(values, (None, own, shared), strict=True):
                full = mask if mask is None else np.broadcast_to(mask, case.mask_shape)
                desired = case.reduced_entries(*exact_inputs, reduction=reduction, where=full)
                assert_close(value, desired, rtol=1e-5, atol=1e-5)


def test_everything_replicated(mesh):
    """Members that hold the same batch are so many copies of it, masks and weights too."""
    x, mask = np.float32([1.0, -2.0, 3.0]), np.array([True, False, True])
    for check_vma in (True, False):
        run = partial(
            jax.shard_map,
            mesh=mesh,
            in_specs=(P(), P()),
            out_specs=P(),
            check_vma=check_vma,
        )
        sums = run(lambda x, mask: F.l1(x, where=mask, axis_name="batch"))(x, mask)
        means = run(lambda x, mask: F.l1(x, where=mask, reduction="mean", axis_name="batch"))(
            x, mask
        )
        centred = run(lambda x, mask: F.l2(x, center="mean", where=mask, axis_name="batch"))(
            x, mask
        )
        scalar = run(lambda x, _: F.l1(x, where=True, axis_name="batch"))(x, mask)
        assert_close(scalar, 8 * 6.0)
        assert_close(sums, 8 * 4.0)
        assert_close(means, 2.0)
        assert_close(centred, 8 * 2.0)


def test_two_named_axes():
    """A tuple of names reduces over both."""
    x, mask = lattice(4, 4, 2, 3), np.random.default_rng(6).random((4, 2, 3)) < 0.5

    def mean(x, mask):
        return F.l1(x, reduction="mean", where=mask, axis_name=("data", "model"))

    mapped = jax.vmap(jax.vmap(mean, axis_name="model"), axis_name="data")
    assert_close(mapped(x, mask), np.abs(x[mask]).mean(), rtol=1e-6)
    grid = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    spec = P("data", "model")
    for check_vma in (True, False):
        sharded = jax.shard_map(
            mean, mesh=grid, in_specs=(spec, spec), out_specs=P(), check_vma=check_vma
        )
        assert_close(sharded(x, mask), np.abs(x[mask]).mean(), rtol=1e-6)


def test_pmap():
    x, mask = lattice(5, MEMBERS, 3).astype(np.float32), lattice(6, MEMBERS, 3) > 0
    mask[0] = False

    def total(scale, x, mask):
        return F.l2(scale * x, reduction="mean", where=mask, axis_name="batch")

    slopes = jax.pmap(jax.value_and_grad(total), axis_name="batch", in_axes=(None, 0, 0))
    values, parameters = slopes(2.0, x, mask)
    mean = (x.astype(np.float64)[mask] ** 2).mean()
    assert_close(values, 4 * mean, rtol=1e-5)
    assert_close(np.mean(parameters), 4 * mean, rtol=1e-5)


def test_output_magnitude_of_everything_is_of_the_global_batch(mesh, x64):
    """With axis=None the root mean square itself is over all members; its gradients too."""
    x, mask = lattice(7, MEMBERS, 5), lattice(8, MEMBERS, 5) > -0.5

    def oracle(scale, x):
        return (np.sqrt(((scale * x)[mask] ** 2).mean()) - 0.3) ** 2

    def loss(scale, x, mask):
        return F.output_magnitude(scale * x, target=0.3, where=mask, axis_name="batch")

    def sharded(function, out_specs, check_vma):
        in_specs = (P(), P("batch"), P("batch"))
        return jax.shard_map(
            function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=check_vma
        )

    def slopes(scale, x, mask):
        return jax.value_and_grad(loss, (0, 1))(scale, x, mask)

    def mean_slopes(scale, x, mask):
        value, (own, data) = slopes(scale, x, mask)
        return value, (jax.lax.pmean(own, "batch"), data / MEMBERS)

    @quick_jit
    def everything(*arguments):
        out_specs = (P(), (P(), P("batch")))
        return (
            jax.value_and_grad(sharded(loss, P(), True), (0, 1))(*arguments),
            jax.value_and_grad(sharded(loss, P(), False), (0, 1))(*arguments),
            sharded(slopes, out_specs, True)(*arguments),
            sharded(mean_slopes, out_specs, False)(*arguments),
        )

    parameter = gradient(lambda scale: oracle(scale, x), np.array(0.75))
    data = gradient(lambda x: oracle(0.75, x), x)
    for value, (parameter_slope, data_slope) in everything(0.75, x, mask):
        assert_close(value, oracle(0.75, x), rtol=1e-11)
        assert_close(parameter_slope, parameter, rtol=1e-6)
        assert_close(data_slope, data, rtol=1e-6, atol=1e-9)


@every(KINDS)
def test_any_split_of_the_batch_gives_the_same_number(case):
    """Property: members' masks may be anything; the mean is never a mean of means."""
    inputs = tuple(x.astype(np.float32) for x in case.data(9))

    @quick_jit
    def both(mask):
        def call(*x, mask, **options):
            return case.call(*x, reduction="mean", where=case.where(mask), **options)

        members = jax.vmap(
            lambda x, mask: call(*x, mask=mask, axis_name="batch"), axis_name="batch"
        )
        return members(inputs, mask), call(*inputs, mask=mask)

    @hypothesis.settings(deadline=None, max_examples=10, derandomize=True, database=None)
    @hypothesis.given(st.integers(0, 2**24 - 1), st.integers(0, 2**8 - 1))
    def holds(bits, rows):
        by_row = np.unpackbits(np.uint8([rows]))[:, None].astype(bool)
        mask = np.unpackbits(np.frombuffer(bits.to_bytes(3, "big"), np.uint8)).reshape(8, 3)
        mask = (mask.astype(bool) & by_row).reshape((8, 3, 1)[: len(case.mask_shape)])
        members, whole = both(np.broadcast_to(mask, case.mask_shape))
        assert_close(members, np.full(MEMBERS, whole), rtol=1e-5, atol=1e-6)

    holds()


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@every(STRUCTURES, slow=lambda case: streamed_again(case) or case.name not in FUNCTIONS)
def test_sharded_arrays_are_never_gathered(case, kind):
    """Value and gradient of arrays sharded along two axes, masked, in one compiled program.

    Groups and classes lie along the axis that is not sharded, and matrices along two of them.
    """
    grid = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind,) * 2)
    spec = {1: P("data"), 2: P("data", "model"), 3: P("data", None, "model")}[len(case.mask_shape)]
    inputs = tuple(lattice(i, 8, 4, 6).astype(np.float32) for i in range(case.inputs))
    mask = np.random.default_rng(7).random((8, 4, 6)[: len(case.mask_shape)]) < 0.7

    def mean(inputs, mask):
        return case.call(*inputs, reduction="mean", where=case.where(mask))

    placed = jax.device_put((inputs, mask), NamedSharding(grid, spec))
    compiled = quick_jit(jax.value_and_grad(mean)).lower(*placed).compile()
    text = compiled.as_text()
    assert "all-reduce" in text  # it is a program of many devices
    assert "all-gather" not in text
    assert "all-to-all" not in text
    value, slopes = compiled(*placed)
    exact_inputs = [x.astype(np.float64) for x in inputs]
    assert_close(
        value, case.reduced_entries(*exact_inputs, reduction="mean", where=mask), atol=1e-6
    )
    assert all(s.sharding.is_equivalent_to(placed[0][0].sharding, 3) for s in slopes)


@pytest.mark.parametrize("spec", [P("data"), P(None, "model"), P("data", "model")], ids=str)
@pytest.mark.parametrize("function", [F.orthogonality, F.spectral_norm])
def test_matrices_sharded_along_explicit_axes(function, spec):
    """Whose products with themselves can't be sharded along both axes."""
    grid = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    x = np.float32(lattice(1, 8, 6))
    call = quick_jit(jax.value_and_grad(function))
    placed = jax.device_put(x, NamedSharding(grid, spec))
    value, slope = call(placed)
    desired, desired_slope = call(x)
    assert_close(value, desired, rtol=1e-5)
    assert_close(slope, desired_slope, rtol=1e-4, atol=1e-5)
    assert slope.sharding.is_equivalent_to(placed.sharding, 2)
