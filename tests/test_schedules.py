"""Schedules against a float64 oracle, as pytrees, and inside optax."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import penalties_jax as pj
from tests.catalogue import choices_of
from tests.oracles import assert_close, gradient
from tests.programs import jit_once

FRACTIONS = {
    "linear": lambda u: u,
    "cosine": lambda u: 0.5 * (1 - np.cos(np.pi * u)),
    "cubic": lambda u: 1 - (1 - u) ** 3,
    "quarters": lambda u: np.array([0, 0.33, 0.67, 1])[np.minimum((4 * u).astype(int), 3)],
}
FRACTIONS["step"] = FRACTIONS["quarters"]
SHAPES = choices_of(pj.anneal)["shape"]
STEPS = np.arange(1_001)

every_shape = pytest.mark.parametrize("shape", SHAPES)


def oracle(shape, init, final, start, end, step):
    """The formulas of the shapes in float64."""
    u = np.clip((np.asarray(step, float) - start) / (end - start), 0, 1)
    if shape == "exponential":
        return init * (final / init) ** u
    return init + (final - init) * FRACTIONS[shape](u)


RUNS = [
    (init, final, start, end)
    for init, final in [(1.0, 0.1), (2, 7), (0.7, 1 / 3)]
    for start, end in [(0, 1_000), (100, 900), (-8, 1_504), (12.5, 800.25), (990, 991)]
]


@every_shape
def test_every_step_of_a_run(shape):
    schedules = [
        pj.anneal(init, final, start=start, end=end, shape=shape)
        for init, final, start, end in RUNS
    ]
    runs = jax.jit(jax.vmap(lambda schedule: jax.vmap(schedule)(STEPS)))(pj.stack(schedules))
    for values, (init, final, start, end) in zip(np.asarray(runs), RUNS, strict=True):
        expected = oracle(shape, init, final, start, end, STEPS)
        assert_close(values, expected, rtol=0, atol=1e-6 * max(init, final))
        assert (values[start >= STEPS] == np.float32(init)).all()
        assert (values[end <= STEPS] == np.float32(final)).all()


@every_shape
def test_the_end_is_exact(shape):
    finals = [0.1, 0.7, 1e-3, 1 / 3, 1e30]

    @jax.jit
    def after(final):
        return pj.anneal(1.0, final, start=3, end=70, shape=shape)(jnp.arange(70, 80))

    for final in finals:
        np.testing.assert_array_equal(after(final), np.float32(final))
    constant = jax.jit(pj.anneal(1.0, 0.1, start=3, end=70, shape=shape))
    assert float(constant(70)) == np.float32(0.1)


@every_shape
def test_one_step_when_start_is_end(shape):
    @jax.jit
    def values(init, final):
        return pj.anneal(init, final, start=10, end=10, shape=shape)(jnp.array([0, 9, 10, 11]))

    assert values(4.0, 1.0).tolist() == [4, 4, 1, 1]
    slopes = jax.jit(jax.jacobian(values, (0, 1)))(4.0, 1.0)
    assert np.transpose(slopes).tolist() == [[1, 0], [1, 0], [0, 1], [0, 1]]


@pytest.mark.parametrize("dtype", [np.int8, np.int32, np.uint8, np.uint32, np.float32])
def test_every_kind_of_count(dtype):
    steps = np.array([0, 5, 10, 15, 20, 25], dtype)
    values = jax.jit(pj.anneal(1.0, 3.0, start=10, end=20))(steps)
    assert values.tolist() == [1, 1, 1, 2, 3, 3]


def test_late_steps_are_told_apart():
    start = 2**24
    schedule = pj.anneal(0.0, 1.0, start=start, end=start + 8)
    assert_close(jax.jit(schedule)(start + np.arange(0, 9, 2)), [0, 0.25, 0.5, 0.75, 1])


@pytest.mark.parametrize("first", [2**24, 2**31 - 4, -(2**31)])
def test_steps_that_a_float32_does_not_hold(first):
    """As plain numbers and as integers that are traced, whatever the count."""
    expected = [1, 0.7, 0.4, 0.1]
    counts = np.int32([first, first + 1, first + 2, first + 3])

    def values(start, end, counts):
        return pj.anneal(1.0, 0.1, start=start, end=end)(counts)

    ends = first, first + 3
    for found in (
        values(*ends, counts),
        jax.jit(partial(values, *ends))(counts),
        jax.jit(values)(*map(jnp.int32, ends), counts),
        [values(*ends, int(count)) for count in counts],
    ):
        assert_close(found, expected, rtol=1e-6)


def test_the_whole_range_of_counts_and_no_end():
    whole = pj.anneal(0.0, 1.0, start=-(2**31), end=2**31 - 1)
    assert_close(jax.jit(whole)(np.int32([-(2**31), 0, 2**31 - 1])), [0, 0.5, 1])
    unsigned = pj.anneal(0.0, 1.0, start=0, end=2**32 - 1)
    assert_close(jax.jit(unsigned)(np.uint32([0, 2**31, 2**32 - 1])), [0, 0.5, 1])
    for_ever = pj.anneal(0.5, 1.0, start=0, end=np.inf)
    assert jax.jit(for_ever)(np.int32([0, 1, 2**31 - 1])).tolist() == [0.5] * 3


@every_shape
@pytest.mark.parametrize("final", [1.0, 0.9999999, 1e-8, 1e-30, 1e30])
def test_never_leaves_its_ends_nor_turns_back(shape, final):
    for ends in ((1.0, final), (final, 1.0)):
        values = np.asarray(jax.jit(pj.anneal(*ends, start=0, end=1_000, shape=shape))(STEPS))
        assert values[0] == np.float32(ends[0])
        assert values[-1] == np.float32(ends[1])
        assert np.all(np.diff(values) * np.sign(ends[1] - ends[0]) >= 0)
        assert values.min() == np.float32(min(ends))
        assert values.max() == np.float32(max(ends))


@every_shape
def test_what_must_not_be_0_is_not_on_the_way(shape):
    gamma = pj.anneal(1.0, 1e-8, start=0, end=1_000, shape=shape)

    @jax.jit
    @jax.vmap
    def losses(step):
        return jax.value_and_grad(pj.SmoothL0(gamma=gamma).at(step))(jnp.array([0.0, 0.1, -3.0]))

    values, slopes = losses(STEPS)
    assert np.isfinite(values).all()
    assert np.isfinite(slopes).all()
    assert_close(values[-1], 2, rtol=1e-6)


@every_shape
def test_gradient_between_equal_ends(shape):
    """Each has its part, though their order tells nothing."""

    def value(init, final):
        return pj.anneal(init, final, start=0, end=10, shape=shape)(3)

    share = oracle("linear" if shape == "exponential" else shape, 0, 1, 0, 10, 3)
    assert_close(jax.grad(value, (0, 1))(0.1, 0.1), [1 - share, share], rtol=1e-6)


def test_a_call_is_one_small_program():
    trace = jax.make_jaxpr(pj.anneal(1.0, 0.1, start=0, end=100))(jnp.int32(3))
    assert len(trace.eqns) <= 3


def test_arrays_as_endpoints():
    init, final = np.float32([0, 1, 2]), np.float32([1, 1, -2])
    schedule = pj.anneal(init, final, start=0, end=4)
    values = jax.jit(jax.vmap(schedule))(jnp.array([1, 4]))
    assert_close(values[0], [0.25, 1, 1])
    np.testing.assert_array_equal(values[1], final)


def test_arrays_as_endpoints_of_an_exponential():
    init, final = np.float32([1.0, -4.0]), np.float32([0.01, -1.0])
    value = pj.anneal(init, final, start=0, end=10, shape="exponential")(5)
    assert_close(value, [0.1, -2.0], rtol=1e-6)
    with pytest.raises(ValueError, match="nonzero and of one sign"):
        pj.anneal(init, final[::-1], start=0, end=10, shape="exponential")
    with pytest.raises(ValueError, match="start must be at most end"):
        pj.anneal(init, final, start=np.array([0, 11]), end=10)


@pytest.mark.parametrize("name", ["init", "final", "start", "end"])
@every_shape
def test_one_number_may_be_traced(name, shape):
    numbers = {"init": 1.0, "final": 0.1, "start": 2.0, "end": 10.0}
    traced = jax.jit(lambda x: pj.anneal(**numbers | {name: x}, shape=shape)(5))
    assert_close(traced(numbers[name]), pj.anneal(**numbers, shape=shape)(5), rtol=1e-6)


def test_fractions_of_training():
    settings = {"init": 2.0, "final": 0.4, "shape": "cosine"}
    by_fraction = pj.anneal_fraction(**settings, total_steps=400, start_frac=0.25, end_frac=0.75)
    by_step = pj.anneal(**settings, start=100, end=300)
    values = jax.jit(lambda schedule: schedule(STEPS))
    np.testing.assert_array_equal(values(by_fraction), values(by_step))
    whole = pj.anneal_fraction(0.0, 1.0, total_steps=1_000)
    assert_close(values(whole), STEPS / 1_000, rtol=1e-6)


@every_shape
def test_gradient_with_respect_to_everything(shape):
    numbers = np.array([2.0, 0.5, 3.0, 17.0])

    def value(init, final, start, end):
        return pj.anneal(init, final, start=start, end=end, shape=shape)(9)

    def at_nine(numbers):
        return oracle(shape, *numbers, np.array(9.0))

    with jax.enable_x64(True):
        slopes = jax.jit(jax.grad(lambda numbers: value(*numbers)))(jnp.asarray(numbers))
    assert_close(slopes, gradient(at_nine, numbers), rtol=1e-8, atol=1e-9)


def test_gradient_with_respect_to_a_schedule():
    slopes = jax.jit(jax.grad(lambda schedule: schedule(5)))(pj.anneal(2, 4, start=0, end=20))
    assert_close(jax.tree.leaves(slopes), [0.75, 0.25, -0.075, -0.025])


@every_shape
def test_gradient_outside_is_that_of_an_endpoint(shape):
    def values(init, final):
        return pj.anneal(init, final, start=2, end=10, shape=shape)(jnp.array([0, 2, 10, 12]))

    slopes = jax.jit(jax.jacobian(values, (0, 1)))(1.0, 4.0)
    assert np.transpose(slopes).tolist() == [[1, 0], [1, 0], [0, 1], [0, 1]]


def test_numbers_are_leaves_and_the_shape_is_structure():
    schedule = pj.anneal(1, 2, start=0, end=5)
    assert jax.tree.leaves(schedule) == [1.0, 2.0, 0, 5]
    assert all(isinstance(leaf, float) for leaf in jax.tree.leaves(schedule))
    other = pj.anneal(1, 2, start=0, end=5, shape="cubic")
    assert jax.tree.structure(schedule) != jax.tree.structure(other)
    assert schedule == pj.anneal(1.0, 2.0, start=0.0, end=5.0) != other


def test_endpoints_never_retrace_and_the_shape_does():
    @jit_once
    def value(schedule, step):
        return schedule(step)

    for init, final, start, end in [(0, 1, 0, 10), (0.5, 2, 1, 4), (1, 1, 0.5, 2.5)]:
        schedule = pj.anneal(init, final, start=start, end=end)
        assert_close(value(schedule, 2), oracle("linear", init, final, start, end, 2))
    fraction = pj.anneal_fraction(0.0, 1.0, total_steps=10, end_frac=0.3)
    assert_close(value(fraction, 2), 2 / 3)
    with pytest.raises(AssertionError, match="traced"):
        value(pj.anneal(0, 1, start=0, end=10, shape="cosine"), 2)


def test_a_stack_of_schedules():
    endpoints = [(0.0, 1.0, 0, 10), (2.0, 0.5, 5, 7), (1.0, 1.0, 0, 1)]
    schedules = [pj.anneal(a, b, start=start, end=end) for a, b, start, end in endpoints]
    values = jax.jit(jax.vmap(lambda schedule: schedule(STEPS)))(pj.stack(schedules))
    expected = [oracle("linear", *numbers, STEPS) for numbers in endpoints]
    assert_close(values, expected, rtol=1e-6)


def test_inside_scan():
    schedule = pj.anneal(1.0, 0.0, start=2, end=6)

    def body(step, _):
        return step + 1, schedule(step)

    values = jax.lax.scan(body, 0, length=8)[1]
    assert_close(values, [1, 1, 1, 0.75, 0.5, 0.25, 0, 0])


def run(optimizer, steps=6):
    """Parameters of plain descent on gradients of 1."""

    def step(carry, _):
        params, state = carry
        updates, state = optimizer.update(jnp.ones(()), state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    params = jnp.zeros(())
    return jax.jit(lambda: jax.lax.scan(step, (params, optimizer.init(params)), length=steps)[1])()


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.sgd,
        optax.scale_by_learning_rate,
        optax.inject_hyperparams(optax.sgd),
        lambda schedule: optax.sgd(optax.join_schedules([schedule], [])),
    ],
    ids=["sgd", "scale_by_learning_rate", "inject_hyperparams", "join_schedules"],
)
def test_is_an_optax_schedule(optimizer):
    learning_rates = pj.anneal(1.0, 0.0, start=1, end=5)
    assert_close(run(optimizer(learning_rates)), -np.cumsum([1, 1, 0.75, 0.5, 0.25, 0]))


anneal = partial(pj.anneal, 1.0, 2.0, start=0, end=1)
fraction = partial(pj.anneal_fraction, 1.0, 2.0, total_steps=10)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: anneal(shape="sine"), "shape must be one of 'linear', .*'step', got 'sine'"),
        (lambda: anneal(start=3, end=2), "start=3.*end=2"),
        (lambda: pj.anneal(0.0, 1, start=0, end=1, shape="exponential"), "init=0.*final=1"),
        (lambda: pj.anneal(1, -1, start=0, end=1, shape="exponential"), "final=-1"),
        (lambda: pj.anneal(float("nan"), 1, start=0, end=1), "init must be not NaN, got nan"),
        (lambda: fraction(total_steps=0), "total_steps must be at least 1, got 0"),
        (lambda: fraction(start_frac=-0.1), r"start_frac=-0\.1"),
        (lambda: fraction(end_frac=1.5), r"end_frac=1\.5"),
        (lambda: fraction(start_frac=0.6, end_frac=0.5), r"start_frac=0\.6, end_frac=0\.5"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_step_is_another_name_of_quarters():
    ends = {"start": 3, "end": 103}
    one, other = (pj.anneal(0.2, 0.9, **ends, shape=shape) for shape in ("step", "quarters"))
    assert np.array_equal(one(STEPS), other(STEPS))
    assert pj.from_dict(pj.to_dict(one)) == one
