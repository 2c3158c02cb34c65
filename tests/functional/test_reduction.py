"""What every function shares: reduction, masks, dtypes, transformations, signatures, errors."""

import dataclasses
import inspect
import pickle
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

import penalties_jax.functional as F  # noqa: N812
from tests.calls import CALLS
from tests.catalogue import (
    CASES,
    FUNCTIONS,
    GATE_CASES,
    SHAPE,
    STRUCTURES,
    Penalty,
    every,
    first_of_each,
    numbers_of,
    only,
    streamed_again,
)
from tests.oracles import assert_close, gradient, lattice
from tests.programs import quick_jit

every_case = every(STRUCTURES)
KINDS = first_of_each(lambda case: (type(case.entry), case.by_row, case.inputs), FUNCTIONS)
every_weighted = every(only(lambda case: "weights" in case.parameters, STRUCTURES))


def poisoned(case, inputs, mask):
    """What `case.raw` takes, with NaN, inf and -inf in turn wherever it is excluded."""
    poison = np.resize((np.nan, np.inf, -np.inf), SHAPE)
    return tuple(np.where(case.of_entries(mask), case.prepare(x), poison) for x in inputs)


def through(case, slope, x):
    """The gradient in what `prepare` took, from that in what it gave: the chain rule."""
    if case.normalised:
        return slope - special.softmax(x, axis=-1) * slope.sum(-1, keepdims=True)
    return slope * special.expit(x) * special.expit(-x) if case.of_chances else slope


def assert_is_gradient(case, slopes, inputs, where):
    """The gradient of the mean, against differences of the oracle's."""
    for position, (slope, x) in enumerate(zip(slopes, inputs, strict=True)):

        def total(x, position=position):
            moved = (*inputs[:position], x, *inputs[position + 1 :])
            return case.reduced_entries(*moved, reduction="mean", where=where)

        assert_close(slope, gradient(total, x), rtol=1e-6, atol=1e-9)


@every(STRUCTURES, slow=lambda case: case.streamed and case.name not in FUNCTIONS)
def test_value_and_gradient_under_a_mask(case, x64):
    """In float64, with NaN and infinities wherever the mask excludes."""
    inputs, mask = case.data(), case.mask()
    # Those of a sum over single values are in test_penalties.py, at the edges too.
    numbers = {} if case.is_a("separable") else case.numbers

    @quick_jit
    def everything(inputs, numbers):
        def call(inputs, numbers, reduction):
            return case.raw(*inputs, **numbers, where=case.where(mask), reduction=reduction)

        mean = jax.value_and_grad(partial(call, reduction="mean"), (0, 1))
        return call(inputs, numbers, "none"), mean(inputs, numbers)

    entries, (mean, (slopes, by_number)) = everything(poisoned(case, inputs, mask), numbers)
    slopes = tuple(map(np.asarray, slopes))
    assert entries.dtype == mean.dtype == slopes[0].dtype == np.float64
    close = {"rtol": 1e-12, "atol": 1e-14}
    assert_close(entries, case.reduced_entries(*inputs, reduction="none", where=mask), **close)
    assert_close(mean, case.reduced_entries(*inputs, reduction="mean", where=mask), **close)
    assert all(np.all(slope[~case.of_entries(mask)] == 0) for slope in slopes)
    chained = (through(case, slope, x) for slope, x in zip(slopes, inputs, strict=True))
    assert_is_gradient(case, chained, inputs, mask)
    for name, slope in by_number.items():

        def total(number, name=name):
            return case.reduced_entries(*inputs, reduction="mean", where=mask, **{name: number})

        assert_close(slope, gradient(total, np.array(numbers[name])), rtol=1e-7, atol=1e-10)


@every(FUNCTIONS, slow=streamed_again)
def test_nothing_included_is_exactly_zero(case):
    nowhere = np.zeros(case.mask_shape, bool)
    arguments = tuple(x.astype(np.float32) for x in poisoned(case, case.data(), nowhere))

    @quick_jit
    def everything(*arguments):
        call = partial(case.raw, where=case.where(nowhere))
        return (
            call(*arguments, reduction="none"),
            call(*arguments, reduction="sum"),
            jax.value_and_grad(partial(call, reduction="mean"), range(case.inputs))(*arguments),
        )

    for result in jax.tree.leaves(everything(*arguments)):
        assert np.all(np.asarray(result) == 0)


@every(KINDS)
def test_masks_of_broadcast_shapes(case):
    call = quick_jit(lambda *x, where: case.call(*x, reduction="mean", where=where))
    for shape in ((), (1,), (SHAPE[len(case.mask_shape) - 1],), (8,) + (1,) * len(SHAPE[1:])):
        mask = np.random.default_rng(3).random(shape[-len(case.mask_shape) :]) < 0.7
        full = np.broadcast_to(mask, case.mask_shape)
        actual = call(*case.data(), where=case.where(mask) if mask.shape else mask)
        desired = case.reduced_entries(*case.data(), reduction="mean", where=full)
        assert_close(actual, desired, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mask", [True, False])
def test_a_python_bool_is_a_mask(mask):
    assert F.l1(jnp.ones(3), where=mask) == 3.0 * mask


@every(FUNCTIONS, slow=streamed_again)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, pytest.param(jnp.float16, marks=pytest.mark.slow)])
def test_half_precision_is_float32_inside(case, dtype):
    """The value of half-precision input is that of the same numbers in float32."""
    calls = quick_jit(
        lambda *x: (
            case.raw(*x, reduction="none"),
            jax.value_and_grad(lambda *x: case.raw(*x, reduction="mean"))(*x),
        )
    )
    prepared = tuple(case.prepare(x.astype(np.float32)) for x in case.data())
    mean = calls(*prepared)[1][0]
    assert_close(mean, case.reduced_entries(*case.data(), reduction="mean"), atol=1e-6)
    half = tuple(x.astype(dtype) for x in prepared)
    entries, (mean, slope) = calls(*half)
    assert entries.dtype == mean.dtype == jnp.float32
    assert slope.dtype == dtype
    exact_entries, (exact_mean, exact_slope) = calls(*(x.astype(np.float32) for x in half))
    assert_close(entries, exact_entries, rtol=1e-6, atol=1e-7)
    assert_close(mean, exact_mean, rtol=1e-6, atol=1e-7)
    assert_close(slope, exact_slope, rtol=float(jnp.finfo(dtype).eps), atol=1e-7)


@every(FUNCTIONS, slow=streamed_again)
@pytest.mark.parametrize("dtype", ["int8", "int64"])
def test_integers_become_float32(case, dtype):
    """Log-probabilities and chances too, where they happen to be integers."""
    values = np.random.default_rng(0).integers(-3, 4, size=(case.inputs, *SHAPE))
    if case.normalised:
        values[:] = 0
    if case.of_chances:
        values %= 2
    with jax.enable_x64(dtype == "int64"):
        result = case.raw(*(jnp.asarray(x, dtype) for x in values), reduction="mean")
        assert result.dtype == jnp.float32
    exact = case.raw(*values.astype(np.float32), reduction="mean")
    assert_close(result, exact, rtol=1e-6)


def test_small_integers_do_not_wrap():
    assert F.l1(jnp.asarray([-128], jnp.int8)) == 128
    assert F.l2(jnp.asarray([3], jnp.uint8), center=5) == 4
    assert F.l2(jnp.asarray([200], jnp.uint8)) == 40_000


@pytest.mark.untyped
def test_booleans_are_numbers():
    assert F.l1(jnp.asarray([True, False])) == 1


def test_half_precision_accumulates_in_float32():
    for dtype in (jnp.bfloat16, jnp.float16):
        x = jnp.ones((300, 400), dtype)
        assert F.l1(x) == 120_000
        assert F.l1(x, reduction="mean") == 1
        assert F.l1(x, weights=jnp.asarray(0.5, dtype)) == 60_000


@every_weighted
def test_weights(case, x64):
    inputs, mask, weights = case.data(), case.mask(), lattice(9, *case.mask_shape)
    entries = case.reduced_entries(*inputs, reduction="none", where=mask)

    @quick_jit
    def everything(weights):
        def reduced(reduction):
            return lambda weights: case.call(
                *inputs, weights=weights, reduction=reduction, where=case.where(mask)
            )

        return (
            reduced("none")(weights),
            jax.value_and_grad(reduced("sum"))(weights),
            jax.value_and_grad(reduced("mean"))(weights),
        )

    for used in (weights, np.where(mask, weights, np.nan)):
        none, (total, slope), (mean, mean_slope) = everything(used)
        assert_close(none, weights * entries, rtol=1e-12)
        assert_close(total, (weights * entries).sum(), rtol=1e-11)
        assert_close(slope, entries, rtol=1e-12)
        # The mean divides by the count, not by the weights.
        assert_close(mean, (weights * entries).sum() / mask.sum(), rtol=1e-11)
        assert_close(mean_slope, entries / mask.sum(), rtol=1e-12)


@every(only(lambda case: case.name in ("l1", "group_lasso"), FUNCTIONS))
def test_weights_of_broadcast_shapes(case):
    weights, (x,) = np.abs(lattice(9, *case.mask_shape)), case.data()
    entries = case.reduced_entries(x, reduction="none")
    for shaped in (weights[:1], weights[:, :1], weights[0], weights.flat[0]):
        assert_close(case.call(x, weights=shaped), (shaped * entries).sum(), atol=1e-5)
    slope = jax.grad(lambda weight: case.call(x, weights=weight, reduction="mean"))(1.0)
    assert_close(slope, entries.mean())


@every(KINDS)
def test_composes_with_transformations(case, x64):
    """Jit, vmap, scan, remat, jvp and second derivatives, in one compiled program."""

    def total(*inputs):
        return case.call(*inputs, reduction="mean")

    inputs, tangent = case.data(), lattice(7, *SHAPE)
    pair = tuple(np.stack([x, x + 0.0625]) for x in inputs)
    value_and_slopes = quick_jit(jax.value_and_grad(total, range(case.inputs)))

    @quick_jit
    def everything(inputs, pair):
        def along(x):
            return total(x, *inputs[1:])

        def scanned(pair):
            def step(carry, element):
                return carry + jax.checkpoint(total)(*element), None

            return jax.lax.scan(step, 0.0, pair)[0]

        return (
            jax.value_and_grad(scanned)(pair),
            jax.vmap(jax.value_and_grad(total))(*pair),
            twice(along),
        )

    def twice(along):
        return (
            jax.jvp(jax.value_and_grad(along), (inputs[0],), (tangent,))[1],
            jax.grad(lambda x: (jax.grad(along)(x) * tangent).sum())(inputs[0]),
        )

    scanned, mapped, second = everything(inputs, pair)
    values, slopes = zip(
        *(value_and_slopes(*(x[index] for x in pair)) for index in range(2)), strict=True
    )
    assert_close(values[0], case.reduced_entries(*inputs, reduction="mean"), rtol=1e-12, atol=1e-14)
    assert_is_gradient(case, slopes[0], inputs, None)
    slopes = [slope for slope, *_ in slopes]
    tight = {"rtol": 1e-9, "atol": 1e-12}
    assert_close(scanned[0], sum(values), **tight)
    assert_close(scanned[1][0], slopes, **tight)
    assert_close(mapped[0], values, **tight)
    assert_close(mapped[1], slopes, **tight)
    (forward, forward_over_reverse), reverse_over_reverse = second
    assert_close(forward, (slopes[0] * tangent).sum(), **tight)
    ahead, behind = (
        value_and_slopes(inputs[0] + distance * tangent, *inputs[1:])[1][0]
        for distance in (1e-5, -1e-5)
    )
    # L_p bends hardest, at the smallest values: five digits of its differences are true.
    close = {"rtol": 1e-5, "atol": 1e-8}
    assert_close(forward_over_reverse, (ahead - behind) / 2e-5, **close)
    assert_close(reverse_over_reverse, (ahead - behind) / 2e-5, **close)


@every_case
def test_an_unknown_reduction_lists_the_valid_ones(case):
    with pytest.raises(ValueError, match="reduction must be one of 'sum', 'mean', 'none', got"):
        case.call(*case.data(), reduction="avg")


@every_case
@pytest.mark.parametrize("shape", [(2,), (7, 3, 5), (4, 8, 3, 5)], ids=str)
def test_a_mask_that_does_not_fit_shows_both_shapes(case, shape):
    own, other, masks = (re.escape(str(x)) for x in (SHAPE, shape, case.mask_shape))
    with pytest.raises(ValueError, match=f"where(?=.*{other})(?=.*({own}|{masks}))"):
        case.call(*case.data(), where=np.ones(shape, bool))
    with pytest.raises(ValueError, match=r"where"):
        jax.jit(lambda *x: case.call(*x, where=jnp.ones(shape, bool)))(*case.data())


MASKED = {
    name: call
    for name, call in CALLS.items()
    if "where" in inspect.signature(call.function).parameters
}


@pytest.mark.parametrize("call", MASKED.values(), ids=MASKED)
def test_every_mask_is_checked(call):
    with pytest.raises(TypeError, match="where must be boolean"):
        call(where=np.ones(()))
    with pytest.raises(ValueError, match="where must"):
        call(where=np.ones((7,) * 6, bool))


@every_weighted
@pytest.mark.parametrize("shape", [(2,), (4, 8, 3, 5)], ids=str)
def test_weights_that_do_not_fit_show_both_shapes(case, shape):
    own, masks = (re.escape(str(x)) for x in (shape, case.mask_shape))
    with pytest.raises(ValueError, match=f"weights(?=.*{own})(?=.*{masks})"):
        case.call(*case.data(), weights=np.ones(shape))


@every(only(lambda case: case.inputs == 2, FUNCTIONS))
def test_inputs_that_disagree_show_both_shapes(case):
    with pytest.raises(ValueError, match=r"(?=.*\(2, 5\))(?=.*\(2, 4\))"):
        case.call(jnp.zeros((2, 5)), jnp.zeros((2, 4)))
    # Shapes that would broadcast do not agree either.
    with pytest.raises(ValueError, match=r"\(1, 5\)"):
        case.call(jnp.zeros((2, 5)), jnp.zeros((1, 5)))


# Signatures.

SHARED = {"reduction": "mean", "where": None, "axis_name": None}


@every(first_of_each(lambda case: case.function, CASES | GATE_CASES))
def test_signatures(case):
    """Plain functions, whose options are keywords, the shared ones the same everywhere."""
    assert inspect.isfunction(case.function)
    assert pickle.loads(pickle.dumps(case.function)) is case.function
    shared = SHARED | ({"weights": 1.0} if "weights" in case.parameters else {})
    if isinstance(case.entry, Penalty):
        shared = {"weights": 1.0} | SHARED | {"reduction": "sum"}
    found = {name: case.parameters[name] for name in shared if case.reduced}
    for name, parameter in found.items():
        assert parameter.kind is parameter.KEYWORD_ONLY
        assert parameter.default == shared[name], name
    assert set(case.parameters) & {*SHARED, "weights"} == set(found)


@every(first_of_each(lambda case: case.function, only(lambda case: case.entry.config, CASES)))
def test_a_config_has_what_its_functions_take(case):
    """By the same names, in the same order, with the same defaults; inputs are those of a call."""
    fields = {field.name: field for field in dataclasses.fields(case.entry.config)}
    inputs = {"where", "importance"}
    options = [name for name in list(case.parameters)[case.inputs :] if name not in inputs]
    assert {*options} <= {*fields}
    positional = [name for name, field in fields.items() if not field.kw_only]
    assert [name for name in options if name in positional] == positional
    for name in options:
        ours, theirs = fields[name].default, case.parameters[name].default
        unset = inspect.Parameter.empty if ours is dataclasses.MISSING else ours
        # A config of log-probabilities has None for an option of logits.
        assert unset == theirs or (unset is None and case.streamed), name


@every(first_of_each(lambda case: (case.function, *case.numbers), CASES | GATE_CASES))
def test_hyperparameters_are_traced(case, caplog):
    """A new number compiles nothing new, also when the function is called outside jit."""
    inputs = [np.float32(x) for x in case.data(shape=(2, 3))]
    weights = {"weights": 1.0} if "weights" in numbers_of(case.function) else {}

    def call(factor):
        numbers = {name: factor * number for name, number in (case.numbers | weights).items()}
        return case.raw(*inputs, **case.without_noise, **numbers)

    call(1.0)
    with jax.log_compiles(), caplog.at_level("WARNING"):
        call(0.9)
    assert not caplog.records
