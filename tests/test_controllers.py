"""Controllers of the target and the weight of a loss, against float64 oracles."""

import math
import pickle
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import penalties_jax as pj
from penalties_jax.controllers import Controller, Setpoint, View
from tests.catalogue import choices_of
from tests.oracles import assert_close
from tests.programs import jit_once, quick_jit

FRACTIONS = {
    "linear": lambda u: u,
    "cosine": lambda u: 0.5 * (1 - np.cos(np.pi * u)),
    "cubic": lambda u: 1 - (1 - u) ** 3,
    "quarters": lambda u: np.select([u < 0.25, u < 0.5, u < 0.75], [0, 0.33, 0.67], 1.0),
}
FRACTIONS["step"] = FRACTIONS["quarters"]
SHAPES = choices_of(pj.anneal)["shape"]
STEPS = np.arange(1_000)

Adaptive = pj.AdaptiveSparsityScheduler


def target_of(shape, init, final, warmup, step):
    u = np.minimum(1, np.asarray(step, float) / warmup)
    if shape == "exponential":
        return init * (final / init) ** u
    return init + (final - init) * FRACTIONS[shape](u)


def control_of(controller, step, level=0.0):
    """The target and the weight of an adaptive controller, in float64."""
    c, step = controller, np.asarray(step)
    target = target_of(c.schedule_type, c.initial_sparsity, c.final_sparsity, c.warmup_steps, step)
    weight = target_of("linear", c.initial_weight, c.final_weight, c.warmup_steps, step)
    return target * 0.9**level, weight * 0.5**level


def controls(controller, measurements, name="value", state=None):
    """What a controller asks for at each step of a scan, and its last state."""

    def body(state, measured):
        control = controller(state, **{name: measured})
        return controller.update(state, **{name: measured}), control

    return jax.lax.scan(body, controller.init() if state is None else state, measurements)


def measure_of(controller):
    """The name of the measurement that it reads."""
    return getattr(controller, "measure", "value")


adaptive_run = quick_jit(controls)
kl_run = quick_jit(partial(controls, name="kl"))
dual_run = quick_jit(partial(controls, name="rate"))


def assert_control(actual, desired, **tolerances):
    assert isinstance(actual, pj.SparsityControl)
    for one, other in zip(actual, desired, strict=True):
        assert_close(one, other, **tolerances)


def assert_same(actual, desired):
    jax.tree.map(np.testing.assert_array_equal, actual, desired)


CONTROLLERS = {
    "adaptive": Adaptive(accuracy_threshold=2.0),
    "remembering": Adaptive(
        0.1, 0.6, 0.5, 1.0, 20, "cubic", 1.5, remember=True, hold_steps=2, recovery_steps=4
    ),
    "dual": pj.DualAscent(0.5, 0.1, tolerance=0.01, initial_weight=0.2, max_weight=0.5),
    "dual, scheduled": pj.DualAscent(pj.anneal(0.2, 0.5, start=0, end=9)),
    "dual, of layers": pj.DualAscent(np.float32([0.1, 0.5, 0.9])),
    "budget": pj.Budget(1.0, 0.1, measure="kl", initial_weight=0.2, max_weight=0.5),
    "budgets": pj.Budget(np.float32([0.5, 2, 4]), np.float32([0.1, 0.2, 0.4])),
    "adaptive KL": pj.AdaptiveKL(1.0, 10, samples=2, measure="kl"),
    "adaptive KL, scheduled": pj.AdaptiveKL(pj.anneal(0.2, 0.5, start=0, end=9), 5.0),
}
every_controller = pytest.mark.parametrize(
    "controller", CONTROLLERS.values(), ids=CONTROLLERS.keys()
)
every_shape = pytest.mark.parametrize("shape", SHAPES)


# AdaptiveSparsityScheduler


@every_shape
def test_every_step_of_a_run(shape):
    made = [
        Adaptive(*numbers, warmup_steps=warmup, schedule_type=shape)
        for numbers in [(0.2, 0.5, 0.001, 0.01), (0.9, 0.1, 1.0, 0.3), (1 / 3, 1.0, 0.0, 0.7)]
        for warmup in (1_000, 700, 1, 333.5)
    ]
    losses = np.zeros(len(STEPS), np.float32)
    stacked = pj.stack(made)
    _, runs = quick_jit(jax.vmap(controls, (0, None)))(stacked, losses)
    for i, controller in enumerate(made):
        target, weight = runs.target[i], runs.weight[i]
        assert_control(
            pj.SparsityControl(target, weight), control_of(controller, STEPS), rtol=0, atol=1e-6
        )
        after = controller.warmup_steps <= STEPS
        assert (target[after] == np.float32(controller.final_sparsity)).all()
        assert (weight[after] == np.float32(controller.final_weight)).all()


def test_the_defaults():
    controller = Adaptive()
    assert controller == Adaptive(0.2, 0.5, 2.0, 20.0, 1_000, "cosine", math.inf)
    state, run = adaptive_run(controller, np.full(1_001, 1e30, np.float32))
    assert run.target[-1] == np.float32(0.5)
    assert run.weight[-1] == 20
    assert int(state.count) == 1_001


@every_shape
def test_backs_off_in_the_steps_above_the_threshold_only(shape):
    controller = Adaptive(schedule_type=shape, warmup_steps=300, accuracy_threshold=2.0)
    losses = np.random.default_rng(0).choice(
        np.float32([-np.inf, 1, 2, np.nextafter(np.float32(2), 3), 3, np.inf]), len(STEPS)
    )
    _, plain = adaptive_run(controller, np.zeros_like(losses))
    _, run = adaptive_run(controller, losses)
    above = losses > 2
    assert 300 < above.sum() < 700
    assert_same(run.target[~above], plain.target[~above])
    assert_same(run.weight[~above], plain.weight[~above])
    assert_close(run.target[above], np.float64(plain.target[above]) * 0.9, rtol=2e-7)
    assert_same(run.weight[above], plain.weight[above] * np.float32(0.5))


def test_the_last_value_where_none_is_given():
    controller = Adaptive(0.5, 0.5, 1.0, 1.0, accuracy_threshold=2.0)
    read, update = jax.jit(type(controller).__call__), jax.jit(type(controller).update)
    state = controller.init()
    assert float(state.value) == -math.inf
    assert_control(read(controller, state), (0.5, 1.0))
    assert_control(read(controller, state, value=3.0), (0.45, 0.5))
    state = update(controller, state)
    assert float(state.value) == -math.inf
    state = update(controller, state, value=3.0)
    assert_control(read(controller, state), (0.45, 0.5))
    assert_control(read(controller, state, value=2.0), (0.5, 1.0))
    state = update(controller, state)
    assert float(state.value) == 3
    assert_control(read(controller, state), (0.45, 0.5))
    state = update(controller, state, value=1.0)
    assert_control(read(controller, state), (0.5, 1.0))
    assert int(state.count) == 4


def test_every_value_backs_off_above_a_threshold_of_minus_infinity():
    controller = Adaptive(0.5, 0.5, 1.0, 1.0, accuracy_threshold=-math.inf)
    assert_control(controller(controller.init()), (0.5, 1.0))
    assert_control(controller(controller.init(), value=-1e30), (0.45, 0.5))


# Holds for 2 steps, recovers over 4: the loss, and by hand the level in that step.
TRACE = [
    *[(1, 0), (9, 1), (9, 1), (1, 1), (1, 0.75), (1, 0.5), (1, 0.25), (1, 0), (1, 0)],
    *[(9, 1), (9, 1), (9, 1), (9, 2), (1, 2), (1, 2), (1, 1.75), (9, 2.75), (1, 2.75)],
]


@pytest.mark.parametrize("warmup", [1, 12])
def test_remembers(warmup):
    losses, levels = np.float32(TRACE).T
    controller = Adaptive(
        *(0.2, 0.5, 0.25, 1.0, warmup, "linear", 5.0),
        remember=True,
        hold_steps=2,
        recovery_steps=4,
    )
    state, run = adaptive_run(controller, losses)
    assert_control(run, control_of(controller, np.arange(len(TRACE)), levels), rtol=1e-6)
    assert float(state.level) == 2.75
    assert_close(run.target[12], 0.5 * 0.81)


def test_remembers_between_whole_levels():
    """A recovery over 3 steps ends at 0 and not below."""
    controller = Adaptive(
        0.5, 0.5, 1.0, 1.0, 1, remember=True, hold_steps=0, recovery_steps=3, accuracy_threshold=5
    )
    _, run = adaptive_run(controller, np.float32([9, 1, 1, 1, 1, 9, 9]))
    levels = np.array([1, 2 / 3, 1 / 3, 0, 0, 1, 2])
    assert_control(run, (0.5 * 0.9**levels, 0.5**levels), rtol=1e-6)


@pytest.mark.parametrize("remember", [False, True])
def test_new_numbers_never_retrace(remember):
    @jit_once
    def step(controller, state, value):
        return controller(state, value=value), controller.update(state, value=value)

    back_off = [1, 1, 2] if remember else [1, 1, 1]
    runs = [(0.5, 10, 2, [0, 0, 0]), (0.7, 3.5, math.inf, [0, 0, 0]), (1, 1, -1.0, back_off)]
    for final, warmup, threshold, levels in runs:
        controller = Adaptive(
            *(0.25, final, 0.5, 1, warmup, "linear", threshold),
            remember=remember,
            hold_steps=warmup,
        )
        state = controller.init()
        for count, level in enumerate(levels):
            control, state = step(controller, state, jnp.float32(1))
            assert_control(control, control_of(controller, count, level), rtol=1e-6)


def test_dual_numbers_never_retrace():
    @jit_once
    def step(controller, state, rate):
        return controller.update(state, rate=rate)

    for target, step_size, tolerance in [(0.5, 0.1, 0.005), (0.25, 1, 0), (1, 2, 0.5)]:
        controller = pj.DualAscent(target, step_size, tolerance=tolerance, max_weight=9 * step_size)
        state = step(controller, step(controller, controller.init(), 0.0), 0.0)
        assert_close(state.weight, 2 * step_size * (target - tolerance), rtol=1e-6)


# Both


@every_controller
def test_the_same_by_hand_in_jit_and_in_scan(controller):
    name = measure_of(controller)
    measured = np.random.default_rng(1).random(6).astype(np.float32) * 4
    last, run = jax.jit(partial(controls, name=name))(controller, measured)
    state = controller.init()
    jitted = jax.jit(lambda c, state, m: (c(state, **{name: m}), c.update(state, **{name: m})))
    for i, value in enumerate(measured):
        settings = {name: float(value), "another": 1}
        eager = controller(state, **settings), controller.update(state, **settings)
        compiled = jitted(controller, state, value)
        for a, b in zip(jax.tree.leaves(eager), jax.tree.leaves(compiled), strict=True):
            assert_close(a, b, rtol=1e-6, atol=1e-7)
            assert a.dtype == b.dtype
        state = compiled[1]
        assert_control(compiled[0], [x[i] for x in run], rtol=1e-6, atol=1e-7)
    assert jax.tree.structure(last) == jax.tree.structure(state)
    for a, b in zip(jax.tree.leaves(last), jax.tree.leaves(state), strict=True):
        assert_close(a, b, rtol=1e-6, atol=1e-7)


@every_controller
def test_a_call_and_an_update_change_nothing(controller):
    state = controller.init()
    before = jax.tree.map(np.array, state)
    controller(state, value=9.0, rate=0.9, kl=0.9)
    controller.update(state, value=9.0, rate=0.9, kl=0.9)
    assert_same(state, before)


@every_controller
def test_a_state_that_comes_from_the_host_will_do(controller):
    state = jax.tree.map(np.asarray, controller.init())
    measured = {measure_of(controller): 0.5}
    for made in (controller(state, **measured), controller.update(state, **measured)):
        assert all(isinstance(leaf, jax.Array) for leaf in made)


@every_controller
def test_round_trips(controller):
    for again in (
        pj.from_dict(pj.to_dict(controller)),
        pj.from_json(pj.to_json(controller)),
        pj.from_yaml(pj.to_yaml(controller)),
        pickle.loads(pickle.dumps(controller)),
    ):
        assert again == controller
        assert type(again) is type(controller)
        assert jax.tree.structure(again) == jax.tree.structure(controller)
    view = controller.weight
    assert isinstance(view, View)
    assert pj.from_dict(pj.to_dict(view)) == view == pickle.loads(pickle.dumps(view))


def test_from_plain_data():
    assert pj.from_dict({"type": "DualAscent", "target": 0.5}) == pj.DualAscent(0.5)
    data = {"type": "Budget", "limit": 0.5, "measure": "kl"}
    assert pj.from_dict(data) == pj.Budget(0.5, measure="kl")
    data = {"type": "AdaptiveKL", "target": 0.5, "horizon": 9}
    assert pj.from_dict(data) == pj.AdaptiveKL(0.5, 9)
    data = {"type": "AdaptiveSparsityScheduler", "final_sparsity": 0.75}
    assert pj.from_dict(data) == Adaptive(final_sparsity=0.75)


def test_equality():
    assert Adaptive() == Adaptive(warmup_steps=1_000.0) != Adaptive(warmup_steps=999)
    assert Adaptive() != Adaptive(schedule_type="linear")
    assert Adaptive() != Adaptive(remember=True)
    assert pj.DualAscent(0.5) == pj.DualAscent(target=0.5) != pj.DualAscent(0.25)
    assert pj.Budget(0.5) == pj.Budget(limit=0.5) != pj.Budget(0.5, measure="kl")
    assert Adaptive().weight != Adaptive().target
    assert hash(Adaptive()) == hash(Adaptive(0.25))
    assert "final_sparsity=0.75" in repr(Adaptive(final_sparsity=0.75))
    assert repr(pj.DualAscent(0.25)) == "DualAscent(target=0.25)"
    assert repr(pj.Budget(0.25, measure="kl")) == "Budget(limit=0.25, measure='kl')"
    assert repr(pj.AdaptiveKL(6, 9)) == "AdaptiveKL(target=6.0, horizon=9.0)"


def test_numbers_are_leaves_and_options_are_structure():
    assert jax.tree.leaves(Adaptive()) == [0.2, 0.5, 2, 20, 1e3, math.inf, 100, 100]
    assert jax.tree.leaves(pj.DualAscent(1)) == [1, 0.01, 0.005, 0, math.inf]
    assert jax.tree.leaves(pj.Budget(1)) == [1, 0.01, 0, math.inf]
    assert jax.tree.leaves(pj.AdaptiveKL(6, 9)) == [6, 9, 0.2, 1]
    assert jax.tree.structure(pj.Budget(1)) != jax.tree.structure(pj.Budget(1, measure="kl"))
    assert jax.tree.structure(Adaptive()) != jax.tree.structure(Adaptive(remember=True))
    assert jax.tree.structure(Adaptive()) != jax.tree.structure(Adaptive(schedule_type="linear"))


@pytest.mark.parametrize("name", ["remembering", "dual, of layers", "budget", "adaptive KL"])
def test_a_checkpoint_of_the_state_continues(name, tmp_path):
    controller = CONTROLLERS[name]
    run = {"value": adaptive_run, "rate": dual_run, "kl": kl_run}[measure_of(controller)]
    measured = np.random.default_rng(2).random(12).astype(np.float32) * 3
    _, whole = run(controller, measured)
    state, first = run(controller, measured[:7])
    saved = {"state": state, "controller": controller}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", saved)
        checkpointer.wait_until_finished()
        blank = jax.tree.map(lambda x: 0 * x if isinstance(x, float) else jnp.zeros_like(x), saved)
        restored = checkpointer.restore(tmp_path / "state", blank)
    assert jax.tree.structure(restored) == jax.tree.structure(saved)
    restored_controller, restored_state = restored["controller"], restored["state"]
    assert restored_controller == controller
    pickled = pickle.loads(pickle.dumps(state))
    for again in (restored_state, pickled):
        assert type(again) is type(state)
        assert_same(again, state)
        _, rest = run(restored_controller, measured[7:], state=again)
        joined = jax.tree.map(lambda a, b: np.concatenate([a, b]), first, rest)
        assert_same(joined, whole)


# Views


def injected(target, weight):
    @optax.inject_hyperparams
    def scaled(target, weight):
        return optax.chain(optax.scale(target), optax.scale(weight))

    return optax.MultiSteps(scaled(target, weight), every_k_schedule=2)


def updates_of(optimizer, measurements, name):
    """The update and the hyperparameters at every mini-step."""

    def body(state, measured):
        extra = {name: measured, "unused": 1.0}
        updates, state = optimizer.update(jnp.ones(()), state, params, **extra)
        return state, (updates, state.inner_opt_state.hyperparams)

    params = jnp.zeros(())
    scan = jax.jit(lambda m: jax.lax.scan(body, optimizer.init(params), m)[1])
    return scan(np.float32(measurements))


@pytest.mark.parametrize("remember", [False, True])
def test_views_in_inject_hyperparams(remember):
    """Of two mini-steps the second is measured, and acts in the very step it is measured in."""
    controller = Adaptive(
        0.2, 0.5, 0.25, 1.0, 3, "linear", 5.0, remember=remember, hold_steps=1, recovery_steps=2
    )
    assert isinstance(controller.target, optax.schedules.StatefulSchedule)
    optimizer = injected(controller.target, controller.weight)
    state = optimizer.init(jnp.zeros(())).inner_opt_state.hyperparams
    assert_close([state["target"], state["weight"]], [0.2, 0.25])
    losses = [9, 1, 1, 9, 9, 1, 9, 1, 1, 1]
    updates, hyperparams = updates_of(optimizer, losses, "value")
    levels = np.array([0, 1, 1, 0.5, 0] if remember else [0, 1, 0, 0, 0])
    target, weight = control_of(controller, np.arange(5), levels)
    assert_close(hyperparams["target"][1::2], target, rtol=1e-6)
    assert_close(hyperparams["weight"][1::2], weight, rtol=1e-6)
    assert_close(updates[1::2], target * weight, rtol=1e-6)
    assert (updates[::2] == 0).all()


def test_views_of_dual_ascent_in_inject_hyperparams():
    """The rate of a step moves the weight of the next."""
    controller = pj.DualAscent(
        pj.anneal(0.25, 0.75, start=0, end=4), 0.5, tolerance=0.0, initial_weight=1.0
    )
    assert isinstance(controller.target, optax.schedules.StatefulSchedule)
    optimizer = injected(controller.target, controller.weight)
    rates = [0, 0.5, 0, 1, 0, 0, 0, 0.625, 0, 0]
    updates, hyperparams = updates_of(optimizer, rates, "rate")
    target = np.array([0.25, 0.375, 0.5, 0.625, 0.75])
    weight = np.array([1, 1.125, 1.4375, 1.6875, 1.6875])
    assert_close(hyperparams["target"][1::2], target)
    assert_close(hyperparams["weight"][1::2], weight)
    assert_close(updates[1::2], target * weight)


def test_two_controllers_in_one_optimizer_read_their_own_measurements():
    budget = pj.Budget(0.5, 0.25, measure="kl", initial_weight=1.0)
    adaptive = pj.AdaptiveKL(2.0, 4.0, measure="length", initial_weight=1.0)
    optimizer = optax.chain(
        optax.inject_hyperparams(optax.scale)(budget.weight),
        optax.inject_hyperparams(optax.scale)(adaptive.weight),
    )
    params = jnp.zeros(())

    @jax.jit
    def run(kl, length):
        def body(state, measured):
            kl, length = measured
            updates, state = optimizer.update(jnp.ones(()), state, params, kl=kl, length=length)
            return state, (updates, [each.hyperparams["step_size"] for each in state])

        return jax.lax.scan(body, optimizer.init(params), (kl, length))[1]

    updates, (first, second) = run(np.float32([1.5, 0.5, 0.0, 9]), np.float32([9, 1.9, 0, 9]))
    budget_weight, adaptive_weight = [1, 1.25, 1.25, 1.125], [1, 1.05, 1.036875, 0.98503125]
    assert_close(first, budget_weight, rtol=1e-6)
    assert_close(second, adaptive_weight, rtol=1e-6)
    assert_close(updates, np.multiply(budget_weight, adaptive_weight), rtol=1e-6)


def test_a_view_is_one_of_the_two_numbers():
    controller = CONTROLLERS["remembering"]
    target, weight = controller.target, controller.weight
    state = controller.init()
    for value in (1.0, 9.0, 9.0, 1.0):
        control = controller(state, value=value)
        assert float(target(state, value=value)) == float(control.target)
        assert float(weight(state, value=value)) == float(control.weight)
        assert_same(target.update(state, value=value), controller.update(state, value=value))
        state = weight.update(state, value=value)
    assert_same(target.init(), controller.init())


def test_the_setpoint_is_a_view_of_itself():
    dual = pj.DualAscent(pj.anneal(0, 1, start=0, end=4))
    assert isinstance(dual.target, Setpoint)
    state, values = dual.target.init(), []
    assert state.count.dtype == jnp.int32
    for _ in range(6):
        values.append(float(dual.target(state, rate=0.1)))
        state = dual.target.update(state, rate=0.1)
    assert values == [0, 0.25, 0.5, 0.75, 1, 1]
    assert pj.DualAscent(dual.target) == dual
    scheduled = pj.anneal(0, 1, start=0, end=4)
    for made in (pj.Budget(scheduled), pj.AdaptiveKL(pj.anneal(1, 2, start=0, end=4), 9.0)):
        assert isinstance(made.target, optax.schedules.StatefulSchedule)
        assert made.target.update(made.target.init()).count == 1
    assert float(pj.Budget(scheduled).target(made.init()._replace(count=jnp.int32(2)))) == 0.5
    assert pj.AdaptiveKL(made.target, 9.0) == made


@pj.config
class Ruleless(Controller):
    """A controller without a rule."""


def test_the_protocol_has_no_rule_of_its_own():
    controller = Ruleless()
    for call in (controller.init, lambda: controller.update(None), lambda: controller(None)):
        with pytest.raises(NotImplementedError):
            call()


# DualAscent


def weights_of(rates, targets, step_size, tolerance, initial, highest):
    """The weight before each step and after the last, in float64."""
    weights = [np.float64(initial)]
    for rate, target in zip(rates, targets, strict=True):
        moved = weights[-1] + step_size * (abs(rate - target) - tolerance)
        weights.append(np.minimum(np.maximum(moved, 0), highest))
    return np.array(weights)


@pytest.mark.parametrize("highest", [math.inf, 0.75])
@pytest.mark.parametrize(
    "target", [0.5, 0.0, 1.0, pj.anneal(0.2, 0.8, start=3, end=30)], ids=["1/2", "0", "1", "anneal"]
)
def test_the_update(target, highest):
    rates = np.random.default_rng(3).random(60).astype(np.float32)
    rates[20:40] = 0.5
    step = np.arange(60)
    targets = (
        np.full(60, target)
        if isinstance(target, float)
        else 0.2 + 0.6 * np.clip((step - 3) / 27, 0, 1)
    )
    controller = pj.DualAscent(target, 0.1, tolerance=0.2, initial_weight=0.125, max_weight=highest)
    state, run = dual_run(controller, rates)
    expected = weights_of(np.float64(rates), targets, 0.1, 0.2, 0.125, highest)
    assert_control(run, (targets, expected[:-1]), rtol=2e-6, atol=2e-6)
    assert_close(state.weight, expected[-1], rtol=2e-6, atol=2e-6)
    assert int(state.count) == 60


def test_rises_off_the_target_and_falls_on_it():
    controller = pj.DualAscent(0.5, 0.1, tolerance=0.0625, initial_weight=0.5)
    update = jax.jit(lambda rate: controller.update(controller.init(), rate=rate).weight)
    for rate in (0.0, 0.375, 0.625, 1.0):
        assert float(update(rate)) > 0.5, rate
    for rate in (0.453125, 0.5, 0.546875):
        assert float(update(rate)) < 0.5, rate
    for rate in (0.4375, 0.5625):
        assert float(update(rate)) == 0.5, rate
    assert float(update(0.0)) == float(update(1.0))


def test_the_weight_stays_in_its_range():
    controller = pj.DualAscent(0.5, 5.0, tolerance=0.25, initial_weight=1.0, max_weight=2.0)
    _, run = dual_run(controller, np.float32([1, 1, 0.5, 0.5, 0.5, 0.5, 0]))
    assert_close(run.weight, [1, 2, 2, 0.75, 0, 0, 0])
    _, run = dual_run(controller, np.float32([0, 0]))
    assert run.weight.tolist() == [1, 2]


@pytest.mark.parametrize("extra", [{}, {"value": 1.0}, {"rate": None}])
def test_the_rate_is_required(extra):
    controller = pj.DualAscent(0.5)
    with pytest.raises(TypeError, match="rate="):
        controller.update(controller.init(), **extra)
    with pytest.raises(TypeError, match="rate="):
        controller.weight.update(controller.weight.init(), **extra)


def test_one_weight_for_each_layer():
    targets = np.float32([0.25, 0.5, 0.75])
    controller = pj.DualAscent(targets, 0.5, tolerance=0.0, max_weight=0.3)
    assert controller.init().weight.shape == (3,)
    rates = np.float32([[0.25, 0, 1], [0.5, 0.5, 0.5], [0, 1, 0.75]])
    state, run = dual_run(controller, rates)
    assert_close(run.target, np.tile(targets, (3, 1)))
    assert_close(run.weight, [[0, 0, 0], [0, 0.25, 0.125], [0.125, 0.25, 0.25]])
    assert_close(state.weight, [0.25, 0.3, 0.25])
    scheduled = pj.DualAscent(pj.anneal(np.zeros(3, np.float32), targets, start=0, end=2))
    assert_close(dual_run(scheduled, rates)[1].target, np.outer([0, 0.5, 1], targets))


def test_a_stack_of_dual_controllers():
    rates = np.random.default_rng(4).random(9).astype(np.float32)
    settings = [(0.25, 0.5), (0.5, 0.1), (1, 1)]
    made = [pj.DualAscent(target, size, tolerance=0.125) for target, size in settings]
    _, runs = jax.jit(jax.vmap(partial(controls, name="rate"), (0, None)))(pj.stack(made), rates)
    for i, (target, size) in enumerate(settings):
        expected = weights_of(np.float64(rates), [target] * 9, size, 0.125, 0, math.inf)
        assert_close(runs.weight[i], expected[:-1], rtol=1e-6, atol=1e-6)
        assert (runs.target[i] == target).all()


def test_a_closed_loop_settles_on_the_target():
    """An accuracy that wants a rate of 0.1 meets the target from both sides, untuned."""
    controller = pj.DualAscent(0.5)

    def loss(x, control):
        rate = jax.nn.sigmoid(x)
        sparsity = pj.sparsity_target_loss(rate, control.target, kind="l1")
        return (rate - 0.1) ** 2 + control.weight * sparsity, rate

    def body(carry, _):
        x, state = carry
        slope, rate = jax.grad(loss, has_aux=True)(x, controller(state))
        return (x - 0.1 * slope, controller.update(state, rate=rate)), (rate, state.weight)

    @jax.jit
    @jax.vmap
    def train(start):
        x = jnp.log(start / (1 - start))
        return jax.lax.scan(body, (x, controller.init()), length=6_000)[1]

    rates, weights = train(jnp.float32([0.1, 0.9]))
    assert_close(rates[:, 0], [0.1, 0.9], rtol=1e-5)
    assert_close(rates[:, -1_000:], 0.5, rtol=0, atol=0.02)
    assert (weights[:, -1] > 0.8 - 0.1).all()
    assert (weights[:, -1] < 10).all()


# Budget and AdaptiveKL


def moves(controller, values, moved, weight):
    """The weight before each step and after the last, by a rule in float64."""
    weights = [np.float64(weight)]
    for value in np.float64(values):
        weights.append(weights[-1] if np.isnan(value) else moved(weights[-1], value))
    state, run = kl_run(controller, np.float32(values))
    assert_close(run.weight, np.array(weights[:-1]), rtol=2e-6, atol=1e-7)
    assert_close(state.weight, weights[-1], rtol=2e-6, atol=1e-7)
    assert int(state.count) == len(values)
    return run


# What is far above, far below, about the limit, and nothing.
VALUES = np.random.default_rng(5).lognormal(-1, 1.5, 60).astype(np.float32)
VALUES[30:40] = 1e-3
VALUES[[3, 33, 50]] = np.nan


@pytest.mark.parametrize("highest", [math.inf, 0.75])
@pytest.mark.parametrize("limit", [0.3, 0.0, -1.0])
def test_every_step_of_a_budget(limit, highest):
    controller = pj.Budget(limit, 0.2, measure="kl", initial_weight=0.25, max_weight=highest)

    def moved(weight, value):
        return min(max(weight + 0.2 * (value - limit), 0), highest)

    run = moves(controller, VALUES, moved, 0.25)
    assert (run.target == np.float32(limit)).all()


@pytest.mark.parametrize("samples", [1, 64])
def test_every_step_of_adaptive_kl(samples):
    controller = pj.AdaptiveKL(0.3, 100, samples=samples, measure="kl")

    def moved(weight, value):
        return weight * (1 + min(max(value / 0.3 - 1, -0.2), 0.2) * samples / 100)

    moves(controller, VALUES, moved, 0.2)


def test_a_budget_is_one_sided_and_dual_ascent_is_not():
    """Far below, the budget's weight falls to 0, exactly, and the other's rises."""
    below = np.full(30, 0.01, np.float32)
    _, run = kl_run(pj.Budget(0.1, 0.1, measure="kl", initial_weight=0.1), below)
    assert (np.diff(run.weight) <= 0).all()
    assert run.weight[-1] == 0
    _, run = dual_run(pj.DualAscent(0.1, 0.1, initial_weight=0.1), below)
    assert (np.diff(run.weight) > 0).all()


def test_budgets_of_n_values():
    controller = CONTROLLERS["budgets"]
    values = np.random.default_rng(6).random((9, 3)).astype(np.float32) * 8
    state, run = adaptive_run(controller, values)
    assert run.weight.shape == (9, 3)
    for i, (limit, size) in enumerate([(0.5, 0.1), (2, 0.2), (4, 0.4)]):
        alone, alone_run = adaptive_run(pj.Budget(limit, size), values[:, i])
        assert_close(run.weight[:, i], alone_run.weight, rtol=1e-6, atol=1e-7)
        assert_close(state.weight[i], alone.weight, rtol=1e-6, atol=1e-7)


def test_a_stack_of_budgets_is_each_of_them():
    values = VALUES[:12]
    for made in (
        [pj.Budget(limit, 0.1, measure="kl") for limit in (0.1, 0.5)],
        [pj.AdaptiveKL(target, 9.0, measure="kl") for target in (0.1, 0.5)],
    ):
        stacked = jax.vmap(partial(controls, name="kl"), (0, None))
        _, runs = quick_jit(stacked)(pj.stack(made), values)
        for i, controller in enumerate(made):
            assert_close(runs.weight[i], kl_run(controller, values)[1].weight, rtol=1e-6, atol=1e-7)


def test_a_budget_finds_the_multiplier_of_karush_kuhn_and_tucker():
    """Of min |x - a|^2 with |x|^2 <= b: |a| / sqrt(b) - 1 where b < |a|^2, else 0."""
    a = np.array([0.6, 0.8, 2.4])  # |a|^2 = 6.76
    limits = np.float32([0.25, 1.0, 4.0, 6.76, 9.0])

    @jax.jit
    @jax.vmap
    def solve(budget):
        def body(carry, _):
            x, state = carry
            weight = budget(state).weight
            x = x - 0.02 * (2 * (x - a) + weight * 2 * x)
            return (x, budget.update(state, norm=jnp.sum(x**2))), None

        start = jnp.zeros(3), budget.init()
        (x, state), _ = jax.lax.scan(body, start, length=4_000)
        return x, state.weight

    made = [pj.Budget(limit, 0.05, measure="norm") for limit in limits.tolist()]
    x, weights = solve(pj.stack(made))
    shrunk = np.maximum(np.linalg.norm(a) / np.sqrt(limits), 1)
    assert_close(weights, shrunk - 1, rtol=2e-3, atol=2e-3)
    assert weights[-1] == 0
    assert_close(x, a / shrunk[:, None], rtol=2e-3)
    assert (np.sum(np.square(x), axis=1) <= limits * 1.002).all()


def test_adaptive_kl_settles_on_its_target():
    """Of a KL that the weight w divides by 1 + w, from both sides."""
    controllers = [
        pj.AdaptiveKL(0.5, 10.0, initial_weight=weight, measure="kl") for weight in (0.01, 100.0)
    ]

    @jax.jit
    @jax.vmap
    def settle(controller):
        def body(state, _):
            weight = controller(state).weight
            return controller.update(state, kl=2 / (1 + weight)), weight

        return jax.lax.scan(body, controller.init(), length=3_000)[1]

    assert_close(settle(pj.stack(controllers))[:, -1], 3.0, rtol=1e-3)


def test_new_numbers_of_a_budget_never_retrace():
    @jit_once
    def step(controller, state, kl):
        return controller.update(state, kl=kl)

    for limit, size in [(0.5, 0.1), (0.25, 1), (3, 2)]:
        controller = pj.Budget(limit, size, measure="kl")
        state = step(controller, controller.init(), 4.0)
        assert_close(state.weight, size * (4 - limit), rtol=1e-6)


@pytest.mark.parametrize(
    "controller", [pj.Budget(0.5, measure="kl"), pj.AdaptiveKL(0.5, 9.0, measure="kl")]
)
def test_the_measurement_that_is_named_is_required(controller):
    for extra in ({}, {"value": 1.0}, {"kl": None}, {"rate": 1.0}):
        with pytest.raises(TypeError, match=r"update needs kl=, the measurement"):
            controller.update(controller.init(), **extra)
        with pytest.raises(TypeError, match="kl="):
            controller.weight.update(controller.weight.init(), **extra)
    with pytest.raises(ValueError, match=r"kl must broadcast to shape \(\), got shape \(3,\)"):
        controller.update(controller.init(), kl=jnp.ones(3))
    for wrong in ([1.0], "1.0"):
        with pytest.raises(TypeError, match="kl must be an array"):
            controller.update(controller.init(), kl=wrong)


# Errors


scheduler_errors = [
    ({"initial_sparsity": 1.5}, r"initial_sparsity must be in \[0, 1\], got 1\.5"),
    ({"final_sparsity": -0.1}, r"final_sparsity must be in \[0, 1\], got -0\.1"),
    ({"final_sparsity": math.nan}, r"final_sparsity must be in \[0, 1\], got nan"),
    ({"initial_weight": -1}, "initial_weight must be at least 0, got -1"),
    ({"final_weight": -0.5}, r"final_weight must be at least 0, got -0\.5"),
    ({"warmup_steps": 0}, "warmup_steps must be above 0, got 0"),
    ({"warmup_steps": -10}, "warmup_steps must be above 0, got -10"),
    ({"accuracy_threshold": math.nan}, "accuracy_threshold must be not NaN, got nan"),
    ({"hold_steps": -1}, "hold_steps must be at least 0, got -1"),
    ({"recovery_steps": 0}, "recovery_steps must be above 0, got 0"),
    (
        {"schedule_type": "sine"},
        "schedule_type must be one of 'linear', 'cosine', 'exponential', 'cubic', 'quarters', "
        "'step', got 'sine'",
    ),
    (
        {"schedule_type": "exponential", "initial_sparsity": 0.0},
        "nonzero and of one sign, got init=0.0, final=0.5",
    ),
    (
        {"schedule_type": "exponential", "final_sparsity": 0},
        "nonzero and of one sign, got init=0.2, final=0.0",
    ),
]


@pytest.mark.parametrize(("settings", "message"), scheduler_errors)
def test_errors_of_the_adaptive_scheduler(settings, message):
    with pytest.raises(ValueError, match=message):
        Adaptive(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target": 1.5}, r"target must be in \[0, 1\], got 1\.5"),
        ({"target": -1}, r"target must be in \[0, 1\], got -1"),
        ({"target": pj.anneal(0.5, 1.5, start=0, end=1)}, r"target must be in \[0, 1\]"),
        ({"step_size": 0}, "step_size must be above 0, got 0"),
        ({"tolerance": -0.1}, r"tolerance must be at least 0, got -0\.1"),
        ({"initial_weight": -1}, "initial_weight must be at least 0, got -1"),
        ({"max_weight": 0}, "max_weight must be above 0, got 0"),
    ],
)
def test_errors_of_dual_ascent(settings, message):
    with pytest.raises(ValueError, match=message):
        pj.DualAscent(**{"target": 0.5} | settings)


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (pj.Budget, {"limit": math.nan}, "limit must be not NaN, got nan"),
        (pj.Budget, {"step_size": 0}, "step_size must be above 0, got 0"),
        (pj.Budget, {"initial_weight": -1}, "initial_weight must be at least 0, got -1"),
        (pj.Budget, {"max_weight": 0}, "max_weight must be above 0, got 0"),
        (pj.AdaptiveKL, {"target": 0}, "target must be above 0, got 0"),
        (pj.AdaptiveKL, {"horizon": -1}, "horizon must be above 0, got -1"),
        (pj.AdaptiveKL, {"initial_weight": 0}, "initial_weight must be above 0, got 0"),
        (pj.AdaptiveKL, {"samples": 0}, "samples must be above 0, got 0"),
        (pj.AdaptiveKL, {"samples": 50}, r"samples must be below 5 times the horizon of 10\.0"),
        (pj.AdaptiveKL, {"target": pj.anneal(1, 0, start=0, end=1)}, "target must be above 0"),
    ],
)
def test_errors_of_a_budget_and_of_adaptive_kl(make, settings, message):
    usual = {"limit": 0.5} if make is pj.Budget else {"target": 0.5, "horizon": 10}
    with pytest.raises(ValueError, match=message):
        make(**usual | settings)


def test_only_the_target_can_be_a_schedule():
    schedule = pj.anneal(0.1, 0.5, start=0, end=1)
    for make in (
        lambda: pj.Budget(0.5, schedule),
        lambda: pj.AdaptiveKL(0.5, schedule),
        lambda: pj.DualAscent(0.5, schedule),
    ):
        with pytest.raises(TypeError, match="can't be a schedule"):
            make()


def test_an_exponential_weight_from_zero_is_no_error():
    """The weight is linear whatever the shape of the target."""
    controller = Adaptive(initial_weight=0.0, schedule_type="exponential")
    assert float(controller(controller.init()).weight) == 0


def test_a_rate_of_another_shape_is_refused():
    """It would change the shape of the state, and a scan would fail far from here."""
    controller = pj.DualAscent(0.5)
    with pytest.raises(ValueError, match=r"rate must broadcast to shape \(\), got shape \(3,\)"):
        controller.update(controller.init(), rate=jnp.ones(3))


@pytest.mark.parametrize(("highest", "weight"), [(np.inf, 0.5), (5.0, 5.0)])
def test_an_infinite_measurement_is_not_for_ever(highest, weight):
    budget = pj.Budget(0.5, 1.0, max_weight=highest)
    state = budget.update(budget.update(budget.init(), value=1.0), value=np.inf)
    np.testing.assert_allclose(state.weight, weight)
    np.testing.assert_allclose(budget.update(state, value=0.25).weight, weight - 0.25)


@pytest.mark.parametrize("measure", ["", "state", "self", "kl div"])
def test_a_measure_is_the_name_of_an_argument(measure):
    with pytest.raises(ValueError, match="measure must be the name of an argument of update, got"):
        pj.Budget(0.1, measure=measure)
