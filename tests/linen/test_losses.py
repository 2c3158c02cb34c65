"""Linen objectives and penalties, and that they are those of NNX."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import penalties_jax as pj
from tests.oracles import assert_close, lattice
from tests.programs import doubles, jit_once

X = jnp.asarray(lattice(0, 2, 3), jnp.float32)


class Block(nn.Module):
    """A layer whose activations are penalised."""

    @nn.compact
    def __call__(self, x):
        return pj.linen.ActivityPenalty(pj.L2(), weight=0.5)(jnp.tanh(nn.Dense(3)(x)))


class Model(nn.Module):
    """Layers put together in one of several ways."""

    case: str

    @nn.compact
    def __call__(self, x):
        if self.case == "once":
            return Block()(x)
        if self.case == "twice":
            block = Block()
            return block(block(x))
        if self.case == "two":
            return Block()(Block()(x))
        if self.case == "remat":
            return nn.remat(Block)()(x)
        block = nn.remat(Block) if self.case == "scan of remat" else Block
        return nn.scan(
            lambda block, x, _: (block(x), None),
            variable_axes={"params": 0, "penalties": 0},
            split_rngs={"params": True},
            length=3,
        )(block(), x, None)[0]


CASES = {
    "once": [0],
    "twice": [0, 0],
    "two": [1, 0],
    "remat": [0],
    "scan": [0, 1, 2],
    "scan of remat": [0, 1, 2],
}


def layers(params):
    """The kernels and biases of a tree of parameters, layers first."""
    flat = jax.tree.leaves_with_path(params)
    return {
        name: jnp.concatenate(
            [jnp.reshape(x, (-1, *shape)) for path, x in flat if path[-1].key == name]
        )
        for name, shape in (("kernel", (3, 3)), ("bias", (3,)))
    }


def by_hand(params, order):
    """The penalty and the sum of the outputs."""
    weights, x, total = layers(params), X, 0.0
    for i in order:
        x = jnp.tanh(x @ weights["kernel"][i] + weights["bias"][i])
        total += 0.5 * jnp.sum(x**2)
    return total + jnp.sum(x)


# What is collected.


@pytest.mark.parametrize("case", CASES)
def test_each_penalty_counts_once_a_call(case):
    model, order = Model(case), CASES[case]
    variables = model.init(jax.random.key(0), X)
    assert variables.keys() == {"params"}

    def total(params, others):
        y, state = model.apply({"params": params, **others}, X, mutable=["penalties"])
        penalty, state = pj.linen.collect_penalties(state)
        return jnp.sum(y) + penalty, state

    expected, gradient = jax.value_and_grad(by_hand)(variables["params"], order)
    assert_close(total(variables["params"], {})[0], expected)
    others = {}

    @jit_once
    def step(params, others):
        return jax.value_and_grad(total, has_aux=True)(params, others)

    for _ in range(3):
        (value, others), got = step(variables["params"], others)
        assert others == {}
        assert_close(value, expected)
        jax.tree.map(lambda a, b: assert_close(a, b, rtol=1e-4, atol=1e-6), got, gradient)


def lifted(transform, **axes):
    """A model with a block under a transform, whose variables have these axes."""
    axes = {"params": 0, **axes}
    options = {"variable_axes": axes, "split_rngs": {"params": True}}

    class Lifted(nn.Module):
        @nn.compact
        def __call__(self, x):
            if transform is nn.vmap:
                return nn.vmap(Block, **options)()(x)
            scan = nn.scan(lambda block, x, _: (block(x), None), length=3, **options)
            return scan(Block(), x, None)[0]

    return Lifted()


@pytest.mark.parametrize("transform", [nn.scan, nn.vmap])
def test_a_transform_that_drops_what_is_recorded(transform):
    model = lifted(transform)
    variables = model.init(jax.random.key(0), X)
    assert variables.keys() == {"params"}
    for options in ({"mutable": ["penalties"]}, {"mutable": True}):
        with pytest.raises(ValueError, match=r"Block_0/ActivityPenalty_0 is under .* an axis"):
            model.apply(variables, X, **options)
    y = model.apply(variables, X)
    with_axis = lifted(transform, penalties=0)
    same, state = with_axis.apply(variables, X, mutable=["penalties"])
    assert_close(y, same)
    assert float(pj.linen.collect_penalties(state)[0]) > 0


@pytest.mark.parametrize(
    "teacher",
    [
        lifted(nn.scan),
        lifted(nn.vmap, penalties=0),
        nn.vmap(Model, variable_axes={"params": 0}, split_rngs={"params": True})("scan"),
    ],
)
def test_a_model_that_is_applied_inside_another_records_nothing(teacher):
    """Such as a teacher, whose own call asked for no penalties."""
    variables = teacher.init(jax.random.key(0), X)

    class Student(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Block()(x) - teacher.apply(variables, x)

    student = Student()
    _, state = student.apply(student.init(jax.random.key(1), X), X, mutable=["penalties"])
    assert len(jax.tree.leaves(state)) == 1


def test_what_is_not_collected_adds_up():
    model = Model("twice")
    variables = model.init(jax.random.key(0), X)
    _, state = model.apply(variables, X, mutable=["penalties"])
    one = pj.linen.collect_penalties(state)[0]
    _, state = model.apply(variables | state, X, mutable=["penalties"])
    assert_close(pj.linen.collect_penalties(state)[0], 2 * one)


def test_nothing_is_recorded_unless_asked():
    model = Model("twice")
    variables = model.init(jax.random.key(0), X)
    y = model.apply(variables, X)
    assert isinstance(y, jax.Array)
    _, state = model.apply(variables, X, mutable=["batch_stats"])
    assert "penalties" not in state
    assert float(pj.linen.collect_penalties(state)[0]) == 0
    _, recorded = model.apply(variables, X, mutable=["penalties"])
    _, state = model.apply(variables | recorded, X, mutable=["batch_stats"])
    assert "penalties" not in state


def test_python_numbers_never_widen(x64):
    penalised = pj.linen.ActivityPenalty(0.5 * pj.SmoothL0(gamma=1.0), weight=0.5)
    x = jnp.ones(4, jnp.float32)

    def apply(state, _):
        return penalised.apply(state, x, mutable=["penalties"])[1], None

    state, _ = jax.lax.scan(apply, apply({}, None)[0], length=2)
    total, _ = pj.linen.collect_penalties(state)
    assert float(total) == 3 * 0.5
    assert doubles((state, total, pj.linen.collect_penalties({})[0])) == []


def test_other_collections_are_kept():
    state = {"penalties": {"a": {"recorded": jnp.ones(2)}}, "batch_stats": {"mean": 1.0}}
    total, rest = pj.linen.collect_penalties(state)
    assert float(total) == 2
    assert rest == {"batch_stats": {"mean": 1.0}}
    assert "penalties" in state


def test_activity_penalty_options():
    weight = pj.anneal(0.0, 1.0, start=0, end=2)
    linen = pj.linen.ActivityPenalty(pj.L1(), weight=weight)
    x = {"a": jnp.array([1.0, -3.0]), "b": jnp.array([5.0])}
    where = {"a": jnp.array([True, False]), "b": jnp.array([True])}
    for options in ({"step": 1}, {"step": jnp.int32(2), "where": where}):
        nnx = pj.nnx.ActivityPenalty(pj.L1(), weight=weight)
        nnx(x, **options)
        y, state = linen.apply({}, x, **options, mutable=["penalties"])
        assert y.keys() == x.keys()
        total = pj.linen.collect_penalties(state)[0]
        assert float(total) == float(pj.nnx.collect_penalties(nnx)) > 0
    with pytest.raises(TypeError, match="holds a schedule: pass step="):
        linen.apply({}, x, mutable=["penalties"])
    assert linen.apply({}, x) is x


@pytest.mark.parametrize(
    "penalty",
    [pj.L1(), pj.L2(center="mean"), pj.Huber(delta=0.5), pj.L1() + 2 * pj.Lp(p=0.5, eps=1e-3)],
    ids=repr,
)
def test_the_same_numbers_as_nnx(penalty):
    nnx = pj.nnx.ActivityPenalty(penalty, weight=0.25)
    nnx(X)
    linen = pj.linen.ActivityPenalty(penalty, weight=0.25)
    state = linen.apply({}, X, mutable=["penalties"])[1]
    assert float(pj.linen.collect_penalties(state)[0]) == float(pj.nnx.collect_penalties(nnx))


# The step of an objective.


def annealed():
    weight = pj.anneal(0.0, 1.0, start=0, end=4)
    return pj.Objective(terms={"l1": pj.Term(pj.L1(), on="x", weight=weight)})


OUTPUTS = {"x": jnp.ones(4)}


def test_loss_counts_its_steps_as_nnx_does():
    linen, nnx = pj.linen.Loss(annealed()), pj.nnx.Loss(annealed())
    state = linen.init({}, OUTPUTS)
    assert int(state["schedule"]["step"]) == 0

    @jit_once
    def step(state):
        return linen.apply(state, OUTPUTS, mutable=["schedule"])

    for i in range(6):
        (value, metrics), state = step(state)
        expected, other = nnx(OUTPUTS)
        assert float(value) == float(expected) == min(i, 4)
        assert {name: float(x) for name, x in metrics.items()} == {
            name: float(x) for name, x in other.items()
        }
    assert int(state["schedule"]["step"]) == 6


def test_outputs_with_named_fields():
    outputs = SimpleNamespace(x=jnp.ones(4))
    for loss in (pj.nnx.Loss(annealed()), partial(pj.linen.Loss(annealed()).apply, {})):
        assert float(loss(outputs, step=4)[0]) == 4


def test_loss_that_only_looks():
    loss = pj.linen.Loss(annealed())
    state = {"schedule": {"step": jnp.int32(2)}}
    assert float(loss.apply(state, OUTPUTS, advance=False)[0]) == 2
    assert float(loss.apply(state, OUTPUTS, step=3)[0]) == 3
    assert float(loss.apply({}, OUTPUTS, step=3)[0]) == 3
    for options in ({"advance": False}, {"step": 3}):
        _, after = loss.apply(state, OUTPUTS, **options, mutable=["schedule"])
        assert int(after["schedule"]["step"]) == 2


def test_modules_are_static():
    for make in (
        lambda: pj.linen.Loss(annealed()),
        lambda: pj.linen.ActivityPenalty(pj.L1(), weight=0.5),
    ):
        assert make() == make()
        assert hash(make()) == hash(make())
    assert pj.linen.ActivityPenalty(pj.L1()) != pj.linen.ActivityPenalty(2 * pj.L1())


@pytest.mark.parametrize("leaf", [jnp.ones(()), np.ones(2)], ids=["jax", "numpy"])
def test_arrays_are_no_part_of_a_static_module(leaf):
    with pytest.raises(TypeError, match="penalty must hold Python numbers"):
        pj.linen.ActivityPenalty(leaf * pj.L1())
    with pytest.raises(TypeError, match="weight must hold Python numbers"):
        pj.linen.ActivityPenalty(pj.L1(), weight=leaf)
    with pytest.raises(TypeError, match="objective must hold Python numbers"):
        pj.linen.Loss(pj.Objective(terms={"a": pj.Term(leaf * pj.L1(), on="x")}))


# Penalties on parameters.

PARAMS = {
    "dense": {"kernel": jnp.asarray(lattice(1, 3, 2)), "bias": jnp.ones(2)},
    "norm": {"scale": jnp.full(2, 3.0)},
}
FILTERS = {
    "all": (None, {"kernel", "bias", "scale"}),
    "path": (lambda path, value: path[-1] == "kernel", {"kernel"}),
    "first name": (lambda path, value: path[0] == "dense", {"kernel", "bias"}),
    "value": (lambda path, value: value.ndim == 1, {"bias", "scale"}),
}


@pytest.mark.parametrize("case", FILTERS)
def test_param_penalty(case):
    filter, names = FILTERS[case]
    options = {} if filter is None else {"filter": filter}
    value, gradient = jax.jit(
        jax.value_and_grad(lambda params: pj.linen.param_penalty(params, 2 * pj.L2(), **options))
    )(PARAMS)
    flat = dict(jax.tree.leaves_with_path(PARAMS))
    selected = [np.asarray(x, np.float64) for path, x in flat.items() if path[-1].key in names]
    assert_close(value, 2 * sum((x**2).sum() for x in selected))
    for path, leaf in jax.tree.leaves_with_path(gradient):
        assert_close(leaf, 4 * flat[path] if path[-1].key in names else 0)


def test_param_penalty_that_selects_nothing():
    with pytest.raises(ValueError, match="filter selects no parameter"):
        pj.linen.param_penalty(PARAMS, pj.L1(), lambda path, value: False)
    with pytest.raises(ValueError, match="filter selects no parameter"):
        pj.linen.param_penalty({}, pj.L1())
    with pytest.raises(TypeError, match="schedule"):
        pj.linen.param_penalty(PARAMS, pj.anneal(0.0, 1.0, start=0, end=2) * pj.L1())


def test_a_penalty_that_is_no_scalar():
    with pytest.raises(ValueError, match=r"penalty must be a scalar, got .*reduce it"):
        pj.linen.ActivityPenalty(pj.L1(reduction="none")).apply(
            {}, jnp.ones(3), mutable=["penalties"]
        )
    with pytest.raises(ValueError, match="penalty must be a scalar"):
        pj.linen.param_penalty(PARAMS, pj.L2(reduction="none"))


def test_a_bare_schedule_as_weight():
    penalised = pj.linen.ActivityPenalty(pj.L1(), lambda step: 0.5 * step)
    _, state = penalised.apply({}, jnp.ones(3), step=4, mutable=["penalties"])
    assert float(pj.linen.collect_penalties(state)[0]) == 6


# The step of all modules.


class Scheduled(nn.Module):
    """Modules with schedules, stacked."""

    @nn.compact
    def __call__(self, x):
        rise = pj.anneal(0.0, 1.0, start=0, end=4)

        class Layer(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                x = pj.linen.ActivityPenalty(pj.L1(), weight=rise)(x)
                gate = pj.linen.SparsityGate(target=rise, weight=rise, kind="l2")
                gate(x)
                return x, gate(x, deterministic=True)

        axes = {"params": 0, "penalties": 0, "schedule": 0}
        rngs = {"params": True, "gate": True}
        return nn.scan(Layer, variable_axes=axes, split_rngs=rngs, length=2)()(x, None)[1]


def test_the_step_is_that_of_all_modules():
    model, x = Scheduled(), jnp.ones((2, 3, 4))
    rngs = {"params": jax.random.key(0), "gate": jax.random.key(1)}
    variables = model.init(rngs, x)
    steps = jax.tree.leaves(variables["schedule"])
    assert [step.tolist() for step in steps] == [[0, 0], [0, 0]]
    apply = jit_once(lambda variables: model.apply(variables, x, rngs=rngs, mutable=["penalties"]))
    other = {"schedule": {"learning_rate": jnp.float32(0.5)}}
    for step in (0, 1, 4):
        variables = pj.linen.advance(pj.linen.set_step(variables, step - 1))
        masks, state = apply(variables)
        weight = step / 4
        rates = 1 - np.mean(masks, (1, 2))
        expected = weight * sum(24 + (rate - weight) ** 2 for rate in rates)
        assert_close(pj.linen.collect_penalties(state)[0], expected)
    assert pj.linen.set_step(other, 3) == pj.linen.advance(other) == other
    assert pj.linen.set_step({"params": {}}, 3) == {"params": {}}


def test_a_gate_at_a_step():
    gate = pj.linen.SparsityGate(temperature=pj.anneal(2.0, 1.0, start=0, end=4))
    x = jnp.asarray(lattice(0, 2, 3, 4), jnp.float32)
    variables = gate.init(jax.random.key(0), x, deterministic=True)
    assert variables.keys() == {"params", "schedule"}
    only = {"params": variables["params"]}
    gate.apply(only, x, deterministic=True, step=1)
    gate.apply(only, x, deterministic=True, temperature=1.0)
    with pytest.raises(TypeError, match="holds a schedule"):
        gate.apply(only, x, deterministic=True)
    with pytest.raises(ValueError, match="temperature must be above 0"):
        pj.linen.SparsityGate(temperature=pj.anneal(1.0, 0.0, start=0, end=4))
