"""NNX objectives and penalties: nothing is counted twice, kept too long, or traced again."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import penalties_jax as pj
from tests.oracles import assert_close, lattice
from tests.programs import carried, doubles

X = jnp.asarray(lattice(0, 2, 3), jnp.float32)


class Block(nnx.Module):
    """A layer whose activations are penalised."""

    def __init__(self, rngs):
        self.linear = nnx.Linear(3, 3, rngs=rngs)
        self.penalty = pj.nnx.ActivityPenalty(pj.L2(), weight=0.5)

    def __call__(self, x):
        return self.penalty(jnp.tanh(self.linear(x)))


class Pair(nnx.Module):
    """Two layers, one of which is in two places."""

    def __init__(self, rngs):
        first = Block(rngs)
        self.blocks = nnx.List([first, Block(rngs), first])

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def stack(axes=0):
    """Makes three stacked layers."""

    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=0, out_axes=axes)
    def make(rngs):
        return Block(rngs)

    return lambda rngs: make(rngs)


def call(block, x):
    return block(x)


def scanned(axes=0, call=call):
    return nnx.scan(call, in_axes=(axes, nnx.Carry), out_axes=nnx.Carry)


STATE_AXES = nnx.StateAxes({nnx.Param: 0, pj.nnx.PenaltyValue: 0, ...: 0})

# How to make a model, how to call it, and the layers that one call goes through.
CASES = {
    "once": (Block, call, [0]),
    "twice": (Block, lambda block, x: block(block(x)), [0, 0]),
    "shared": (Pair, call, [0, 1, 0]),
    "remat": (Block, nnx.remat(call), [0]),
    "jit inside": (Block, lambda block, x: nnx.jit(call)(block, nnx.jit(call)(block, x)), [0, 0]),
    "scan": (stack(), scanned(), [0, 1, 2]),
    "scan, state axes": (stack(STATE_AXES), scanned(STATE_AXES), [0, 1, 2]),
    "scan of remat": (stack(), scanned(call=nnx.remat(call)), [0, 1, 2]),
}


def layers(params):
    """The kernels and biases of a state of parameters, layers first."""
    flat = {path: np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(params)}
    return {
        name: np.concatenate(
            [np.reshape(x, (-1, *shape)) for path, x in flat.items() if path[-1] == name]
        )
        for name, shape in (("kernel", (3, 3)), ("bias", (3,)))
    }


def by_hand(weights, x, order):
    """The penalty and the sum of the outputs."""
    total = 0.0
    for i in order:
        x = jnp.tanh(x @ weights["kernel"][i] + weights["bias"][i])
        total += 0.5 * jnp.sum(x**2)
    return total + jnp.sum(x)


def total(forward):
    def total(model, x):
        y = forward(model, x)
        return jnp.sum(y) + pj.nnx.collect_penalties(model)

    return total


def recorded(model):
    """What every variable holds: arrays, never tracers."""
    held = [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(model, pj.nnx.PenaltyValue))]
    assert held
    return sum(x.sum() for x in held)


# What is collected.


@pytest.mark.parametrize(
    ("case", "transform"),
    [(case, lambda f: f) for case in CASES] + [("twice", nnx.jit), ("scan of remat", nnx.jit)],
)
def test_each_penalty_counts_once_a_call(case, transform):
    make, forward, order = CASES[case]
    model = make(nnx.Rngs(0))
    expected = by_hand(layers(nnx.state(model, nnx.Param)), X, order)
    function = transform(total(forward))
    for _ in range(2):
        assert_close(function(model, X), expected)
        assert recorded(model) == 0
    assert float(pj.nnx.collect_penalties(model)) == 0


@pytest.mark.parametrize("case", CASES)
def test_gradient_is_that_of_the_penalty_by_hand(case):
    make, forward, order = CASES[case]
    model = make(nnx.Rngs(0))
    params = nnx.state(model, nnx.Param)
    weights = jax.tree.map(jnp.asarray, layers(params))
    expected = jax.grad(by_hand)(weights, X, order)

    value, gradient = nnx.jit(nnx.value_and_grad(total(forward)))(model, X)
    assert recorded(model) == 0

    graph, params, rest = nnx.split(model, nnx.Param, ...)

    @jax.jit
    @jax.grad
    def functional(params):
        return total(forward)(nnx.merge(graph, params, rest, copy=True), X)

    assert_close(value, by_hand(weights, X, order))
    for gradients in (gradient, functional(params)):
        for name, leaf in layers(gradients).items():
            assert_close(leaf, expected[name], rtol=1e-4, atol=1e-6)
    assert recorded(model) == 0


def test_what_is_recorded_waits_until_it_is_collected():
    model = Block(nnx.Rngs(0))
    one = 0.5 * float(jnp.sum(model(X) ** 2))
    nnx.jit(call)(model, X)
    assert_close(recorded(model), 2 * one)
    assert_close(pj.nnx.collect_penalties(model), 2 * one)
    assert float(pj.nnx.collect_penalties(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))) == 0


@pytest.mark.parametrize("case", ["twice", "scan of remat"])
def test_nothing_accumulates_over_training(case):
    make, forward, order = CASES[case]
    model = make(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.sgd(0.01), wrt=nnx.Param)
    traces = []

    @nnx.jit
    def step(model, optimizer, x):
        traces.append(None)
        value, gradient = nnx.value_and_grad(total(forward))(model, x)
        optimizer.update(model, gradient)
        return value

    values = [float(step(model, optimizer, X)) for _ in range(20)]
    weights = layers(nnx.state(model, nnx.Param))
    assert_close(step(model, optimizer, X), by_hand(weights, X, order))
    assert recorded(model) == 0
    assert values[-1] < values[0]
    assert len(traces) == 1


def test_no_tracer_leaks():
    model = Block(nnx.Rngs(0))
    with jax.checking_leaks():
        nnx.jit(nnx.value_and_grad(total(nnx.remat(call))))(model, X)
    assert recorded(model) == 0


def test_python_numbers_never_widen(x64):
    weight = pj.anneal(0.0, 1.0, start=0, end=4)
    penalised = pj.nnx.ActivityPenalty(0.5 * pj.SmoothL0(gamma=1.0), weight=weight)
    x = jnp.ones(4, jnp.float32)
    penalised = carried(penalised, lambda penalised: penalised(x, step=2))
    recorded = nnx.state(penalised, pj.nnx.PenaltyValue)
    total = pj.nnx.collect_penalties(penalised)
    assert float(total) == 2 * 0.5 * 0.5 * 2
    assert doubles((recorded, total, nnx.state(penalised, pj.nnx.PenaltyValue))) == []
    linear = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    loss = pj.nnx.Loss(pj.Objective(terms={"l1": pj.Term(pj.L1(), on="x", weight=weight)}))
    assert doubles((pj.nnx.param_penalty(linear, 0.1 * pj.L1()), loss({"x": x}))) == []


@pytest.mark.parametrize("transform", [lambda f: f, nnx.jit], ids=["plain", "jit"])
def test_nothing_is_recorded_in_evaluation(transform):
    model = Pair(nnx.Rngs(0))
    model.eval()
    transform(call)(model, X)
    assert recorded(model) == 0
    model.train()
    transform(call)(model, X)
    assert recorded(model) > 0


def test_activity_penalty_options():
    penalised = pj.nnx.ActivityPenalty(pj.L1(), weight=pj.anneal(0.0, 1.0, start=0, end=2))
    x = {"a": jnp.array([1.0, -3.0]), "b": jnp.array([5.0])}
    where = {"a": jnp.array([True, False]), "b": jnp.array([True])}
    assert penalised(x, step=1) is x
    assert float(pj.nnx.collect_penalties(penalised)) == 4.5
    penalised(x, where=where, step=jnp.int32(2))
    assert float(pj.nnx.collect_penalties(penalised)) == 6
    pj.nnx.set_step(penalised, 1)
    penalised(x)
    assert float(pj.nnx.collect_penalties(penalised)) == 4.5
    half = pj.nnx.ActivityPenalty(pj.L2())
    half(jnp.ones(3, jnp.bfloat16))
    assert half.recorded[...].dtype == jnp.float32


# The step of an objective.


def annealed():
    weight = pj.anneal(0.0, 1.0, start=0, end=4)
    return pj.Objective(terms={"l1": pj.Term(pj.L1(), on="x", weight=weight)})


OUTPUTS = {"x": jnp.ones(4)}


def test_loss_counts_its_steps():
    loss = pj.nnx.Loss(annealed())
    for i in range(6):
        value, metrics = loss(OUTPUTS)
        assert float(value) == min(i, 4)
        assert metrics.keys() == annealed()(OUTPUTS, step=0)[1].keys()
    assert int(loss.step[...]) == 6


def test_loss_that_only_looks():
    loss = pj.nnx.Loss(annealed())
    loss(OUTPUTS)
    assert float(loss(OUTPUTS, step=3)[0]) == 3
    assert float(loss(OUTPUTS, advance=False)[0]) == 1
    assert float(nnx.jit(lambda loss: loss(OUTPUTS, advance=False)[0])(loss)) == 1
    assert float(nnx.jit(lambda loss, step: loss(OUTPUTS, step=step)[0])(loss, 3)) == 3
    assert int(loss.step[...]) == 1


def test_annealing_is_traced_once():
    loss = pj.nnx.Loss(annealed())
    traces = []

    @nnx.jit
    def step(loss, outputs):
        traces.append(None)
        return nnx.value_and_grad(lambda x, loss: loss({"x": x})[0])(outputs["x"], loss)

    for i in range(6):
        value, gradient = step(loss, OUTPUTS)
        assert float(value) == min(i, 4)
        assert_close(gradient, min(i, 4) / 4)
    # A change of the schedule's numbers is no change of the program.
    weight = pj.anneal(1.0, 2.0, start=0, end=8)
    objective = pj.Objective(terms={"l1": pj.Term(pj.L1(), on="x", weight=weight)})
    other = pj.nnx.Loss(objective)
    assert float(step(other, OUTPUTS)[0]) == 4
    assert len(traces) == 1


def test_loss_is_a_part_of_what_is_differentiated():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.block = Block(rngs)
            self.loss = pj.nnx.Loss(annealed())

        def __call__(self, x):
            return self.loss({"x": self.block(x)})[0] + pj.nnx.collect_penalties(self)

    model = Model(nnx.Rngs(0))
    for _ in range(2):
        nnx.jit(nnx.grad(lambda model, x: model(x)))(model, X)
    assert int(model.loss.step[...]) == 2
    assert recorded(model) == 0


# Penalties on parameters.


def two_layers():
    rngs = nnx.Rngs(0)
    return nnx.Sequential(nnx.Linear(3, 3, rngs=rngs), nnx.LayerNorm(3, rngs=rngs))


FILTERS = {
    "all": (nnx.Param, {"kernel", "bias", "scale"}),
    "path": (nnx.PathContains("kernel"), {"kernel"}),
    "function": (lambda path, value: path[-1] == "scale", {"scale"}),
    "both": (nnx.Any(nnx.PathContains("kernel"), nnx.PathContains("scale")), {"kernel", "scale"}),
    "not": (nnx.All(nnx.Param, nnx.Not(nnx.PathContains("bias"))), {"kernel", "scale"}),
}


@pytest.mark.parametrize("case", FILTERS)
def test_param_penalty(case):
    filter, names = FILTERS[case]
    model = two_layers()

    @nnx.jit
    @nnx.value_and_grad
    def penalty(model):
        return pj.nnx.param_penalty(model, 2 * pj.L2(), filter)

    value, gradient = penalty(model)
    params = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
    selected = [np.asarray(x[...]) for path, x in params.items() if path[-1] in names]
    assert_close(value, 2 * sum((x.astype(np.float64) ** 2).sum() for x in selected))
    for path, leaf in nnx.to_flat_state(gradient):
        expected = 4 * params[path][...] if path[-1] in names else 0
        assert_close(leaf[...], expected)


def test_param_penalty_that_selects_nothing():
    with pytest.raises(ValueError, match="filter selects no parameter"):
        pj.nnx.param_penalty(two_layers(), pj.L1(), nnx.PathContains("nothing"))
    with pytest.raises(ValueError, match="filter selects no parameter"):
        pj.nnx.param_penalty(nnx.Dropout(0.5), pj.L1())
    with pytest.raises(TypeError, match="schedule"):
        pj.nnx.param_penalty(two_layers(), pj.anneal(0.0, 1.0, start=0, end=2) * pj.L1())


def test_a_penalty_that_is_no_scalar():
    with pytest.raises(ValueError, match=r"penalty must be a scalar, got .*reduce it"):
        pj.nnx.ActivityPenalty(pj.L1(reduction="none"))(jnp.ones(3))
