"""Adaptive depth: the steps by hand, what is recorded, evaluation that ends; early exit."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import penalties_jax as pj
from tests.oracles import assert_close, lattice
from tests.programs import carried, doubles, quick_jit

DEPTH, FEATURES = 5, 6
X = jnp.asarray(lattice(0, 8, 7, FEATURES), jnp.float32)
WHERE = jnp.asarray(np.random.default_rng(0).random((8, 7)) < 0.6)
PENALTIES = {"act": pj.PonderCost(), "ponder": pj.PonderDivergence(0.3)}
every_penalty = pytest.mark.parametrize("penalty", PENALTIES.values(), ids=PENALTIES)

every_mesh = pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])


class Block(nnx.Module):
    """Mixes the positions, and moves the state."""

    def __init__(self, rngs):
        self.mix = nnx.Linear(FEATURES, FEATURES, rngs=rngs)

    def __call__(self, x):
        return x + jnp.tanh(self.mix(x)) + 0.1 * jnp.mean(x, -2, keepdims=True)


def make(penalty=None, *, spread=3.0, **settings):
    """A layer whose positions halt at different steps."""
    layer = pj.nnx.AdaptiveDepth(
        Block(nnx.Rngs(0)), DEPTH, FEATURES, penalty=penalty, rngs=nnx.Rngs(1), **settings
    )
    layer.unit.kernel[...] *= spread
    layer.unit.bias[...] -= 1.0
    return layer


def by_hand(layer, x):
    """The states and logits of all steps, in float64."""
    w, b, v, c = (
        np.float64(p[...])
        for p in (
            layer.block.mix.kernel,
            layer.block.mix.bias,
            layer.unit.kernel,
            layer.unit.bias,
        )
    )
    x, states = np.float64(x), []
    for _ in range(DEPTH):
        x = x + np.tanh(x @ w + b) + 0.1 * x.mean(-2, keepdims=True)
        states.append(x)
    states = np.stack(states)
    return states, np.moveaxis((states @ v + c)[..., 0], 0, -1)


def act_by_hand(logits):
    """The weights of all steps, and the depth, by Graves' loop."""
    chances = 1 / (1 + np.exp(-logits))
    weights, depth = np.zeros(logits.shape), np.zeros(logits.shape[:-1], int)
    for i in np.ndindex(depth.shape):
        rest = 1.0
        for n in range(DEPTH):
            if 1 - rest + chances[i][n] >= 0.99 or n == DEPTH - 1:
                weights[i][n], depth[i] = rest, n + 1
                break
            weights[i][n] = chances[i][n]
            rest -= chances[i][n]
    return weights, depth


def ponder_by_hand(logits):
    """The probabilities of halting, and their median, from 1."""
    chances = 1 / (1 + np.exp(-logits))
    chances[..., -1] = 1
    reached = np.cumprod(1 - chances, -1)
    p = chances * np.concatenate([np.ones_like(reached[..., :1]), reached[..., :-1]], -1)
    return p, 1 + (np.cumsum(p, -1) >= 0.5).argmax(-1)


HALTED = {"act": act_by_hand, "ponder": ponder_by_hand}


@pytest.mark.parametrize("name", PENALTIES)
def test_training(name):
    """Weighted means of the states, and the penalty of the halting that led to them."""
    layer = make(PENALTIES[name], weight=0.5)
    states, logits = by_hand(layer, X)
    weights, depth = HALTED[name](logits)
    assert len({*depth.ravel()}) >= 3
    steps = layer.steps(X)
    assert_close(steps.states, states, rtol=1e-4, atol=1e-5)
    assert_close(steps.weights, weights, rtol=1e-4, atol=1e-5)
    assert np.array_equal(steps.depth, depth)
    value = PENALTIES[name](1 / (1 + np.exp(-logits)))
    assert_close(pj.nnx.collect_penalties(layer), 0.5 * value, rtol=1e-4)
    mean = (np.moveaxis(states, 0, -2) * weights[..., None]).sum(-2)
    assert_close(layer(X), mean, rtol=1e-4, atol=1e-4)
    assert_close(layer.depth[...], depth.mean(), rtol=1e-6)


def in_full(name, layer, x):
    """What evaluation gives, from all steps."""
    states, weights, depth = layer.steps(x)
    if name == "ponder":
        weights = jax.nn.one_hot(depth - 1, DEPTH)
    return jnp.einsum("n...d,...n->...d", states, weights), depth


@pytest.mark.parametrize("name", PENALTIES)
@pytest.mark.parametrize("spread", [0.0, 3.0, 30.0])
def test_evaluation_is_that_of_all_steps(name, spread):
    layer = make(PENALTIES[name], spread=spread)
    layer.eval()
    desired, depth = in_full(name, layer, X)
    assert_close(nnx.jit(lambda layer: layer(X))(layer), desired, rtol=1e-5, atol=1e-5)
    assert_close(layer.depth[...], np.mean(depth), rtol=1e-6)
    assert float(layer.recorded[...]) == 0


class Counted(nnx.Module):
    """A block that counts its calls, and whose positions are apart."""

    def __init__(self):
        self.calls = nnx.BatchStat(jnp.zeros((), jnp.int32))

    def __call__(self, x):
        self.calls[...] += 1
        return x + 1.0


def counting(penalty, max_depth=6):
    """Halts a position at once where its features are positive, and else never by itself."""
    layer = pj.nnx.AdaptiveDepth(Counted(), max_depth, 2, penalty=penalty, rngs=nnx.Rngs(0))
    layer.unit.kernel[...] = jnp.full((2, 1), 50.0)
    layer.unit.bias[...] = jnp.full(1, -50.0)
    layer.eval()
    return layer


@pytest.mark.slow
@every_penalty
def test_steps_end_when_all_have_halted(penalty):
    """Steps are counted by the block; padding waits for nobody, and nobody for padding."""
    for starts, where, steps in [
        ([1.0, 1.0], None, 1),
        ([1.0, -2.0], None, 3),
        ([1.0, -9.0], None, 6),
        ([1.0, -9.0], [True, False], 1),
        ([-2.0, -9.0], [True, False], 3),
        ([-1.0, -9.0], [False, False], 0),
    ]:
        layer = counting(penalty)
        x = jnp.broadcast_to(jnp.array(starts)[:, None], (2, 2))
        mask = None if where is None else jnp.array(where)
        y = nnx.jit(lambda layer, x, mask: layer(x, where=mask))(layer, x, mask)
        assert int(layer.block.calls[...]) == steps, starts
        if mask is None or mask[0]:
            assert_close(y[0, 0], starts[0] + (1 if starts[0] > 0 else 3), rtol=1e-4)


@every_penalty
def test_positions_that_do_not_exist_cost_nothing(penalty):
    layer = make(penalty, weight=1.0)
    held = jnp.where(WHERE[..., None], X, 0)
    layer(held, where=WHERE)
    value = pj.nnx.collect_penalties(layer)
    depth = layer.steps(held).depth
    pj.nnx.collect_penalties(layer)
    logits = by_hand(layer, held)[1]
    assert_close(value, penalty(1 / (1 + np.exp(-logits[WHERE]))), rtol=1e-4)
    for training in (True, False):
        (layer.train if training else layer.eval)()
        layer(held, where=WHERE)
        assert_close(layer.depth[...], np.asarray(depth)[WHERE].mean(), rtol=1e-6)


@every_penalty
def test_what_learns(penalty):
    """The halting unit learns from the penalty and from the loss, the block from the loss."""
    layer = make(penalty, weight=0.0)

    def loss(layer):
        return jnp.mean(layer(X) ** 2) + pj.nnx.collect_penalties(layer)

    gradient = nnx.grad(loss)(layer)
    assert all(jnp.any(x != 0) for x in jax.tree.leaves(gradient))
    layer.weight = 2.0
    of_penalty = nnx.grad(lambda layer: (layer(X), pj.nnx.collect_penalties(layer))[1])(layer)
    assert jnp.any(of_penalty["unit"]["kernel"][...] != 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", PENALTIES)
def test_a_weight_shortens_the_depth(name):
    """More of it, fewer steps, on a job that gains from steps."""
    penalty = pj.PonderCost() if name == "act" else pj.PonderDivergence(0.9)

    @nnx.jit
    def train(layer, optimizer):
        def loss(layer):
            error = jnp.mean((layer(X) - jnp.roll(X, 1, -1)) ** 2)
            return error + pj.nnx.collect_penalties(layer)

        optimizer.update(layer, nnx.grad(loss)(layer))

    depths = []
    for weight in (0.0, 1.0):
        layer = make(penalty, spread=0.1, weight=weight)
        optimizer = nnx.Optimizer(layer, optax.adam(0.03), wrt=nnx.Param)
        for _ in range(60):
            train(layer, optimizer)
        depths.append(float(layer.depth[...]))
    assert depths[1] < depths[0] - 0.5


def test_logits_are_what_a_divergence_is_of_whatever_it_says():
    """Also where a sigmoid would be 1, and would pass on no gradient."""

    def slope(inputs):
        penalty = pj.PonderDivergence(0.3, inputs=inputs)
        layer = make(penalty, spread=0.0, weight=1.0)
        layer.unit.bias[...] = 20.0
        gradient = nnx.grad(lambda layer: (layer(X), pj.nnx.collect_penalties(layer))[1])(layer)
        assert layer.penalty.inputs == inputs
        return gradient["unit"]["bias"][...]

    assert slope("probabilities") > 0
    assert_close(slope("probabilities"), slope("logits"), rtol=0)


def test_the_expected_loss():
    """Of each step's output, with its probability: as a user writes it, and by hand."""
    layer = make(pj.PonderDivergence(0.3))
    states, weights, _ = layer.steps(X)
    losses = jnp.mean(states**2, -1)
    expected = jnp.mean(jnp.sum(jnp.moveaxis(losses, 0, -1) * weights, -1))
    states, logits = by_hand(layer, X)
    p = ponder_by_hand(logits)[0]
    desired = (np.moveaxis((states**2).mean(-1), 0, -1) * p).sum(-1).mean()
    assert_close(expected, desired, rtol=1e-4)


def test_schedules_and_numbers():
    layer = make(pj.PonderCost(), weight=pj.anneal(0.0, 1.0, start=0, end=4))
    layer(X)
    assert float(pj.nnx.collect_penalties(layer)) == 0
    layer(X, step=4)
    whole = float(pj.nnx.collect_penalties(layer))
    pj.nnx.set_step(layer, 1)
    layer(X)
    assert_close(pj.nnx.collect_penalties(layer), whole / 4, rtol=1e-6)
    layer.penalty = pj.PonderCost(epsilon=1.0)
    layer(X)
    assert float(layer.depth[...]) == 1
    layer.penalty = pj.PonderDivergence(0.5)
    assert layer.penalty == pj.PonderDivergence(0.5)
    with pytest.raises(ValueError, match="weight must be at least 0, got -1"):
        layer.weight = -1.0


def test_a_function_is_a_block():
    layer = pj.nnx.AdaptiveDepth(jnp.tanh, 3, FEATURES, rngs=nnx.Rngs(0))
    desired = layer.steps(X)
    layer.eval()
    actual = nnx.jit(lambda layer: layer(X))(layer)
    assert_close(actual, jnp.einsum("n...d,...n->...d", *desired[:2]), rtol=1e-5, atol=1e-6)


def test_a_block_with_noise_and_statistics():
    """Dropout and batch norms write what they write, in training and in evaluation."""

    class Noisy(nnx.Module):
        def __init__(self, rngs):
            self.norm = nnx.BatchNorm(FEATURES, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            return self.dropout(self.norm(x))

    layer = pj.nnx.AdaptiveDepth(Noisy(nnx.Rngs(0)), 3, FEATURES, rngs=nnx.Rngs(1))
    one, two = layer(X), layer(X)
    assert not np.array_equal(one, two)
    mean = layer.block.norm.mean[...]
    assert jnp.any(mean != 0)
    layer.eval()
    assert np.array_equal(layer(X), layer(X))
    assert np.array_equal(layer.block.norm.mean[...], mean)


def test_half_precision():
    block = nnx.Linear(FEATURES, FEATURES, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    layer = pj.nnx.AdaptiveDepth(block, DEPTH, FEATURES, rngs=nnx.Rngs(1))
    x = X.astype(jnp.bfloat16)
    for evaluating in (False, True):
        (layer.eval if evaluating else layer.train)()
        y = nnx.jit(lambda layer: layer(x))(layer)
        assert y.dtype == jnp.bfloat16
        assert layer.depth[...].dtype == jnp.float32


def test_nothing_widens(x64):
    layer = make(pj.PonderDivergence(0.3))
    for evaluating in (False, True):
        (layer.eval if evaluating else layer.train)()
        assert nnx.jit(lambda layer: layer(X))(layer).dtype == jnp.float32
        assert doubles(nnx.state(layer, (pj.nnx.PenaltyValue, type(layer.depth)))) == []


@every_penalty
def test_in_a_scan_that_carries_it(penalty):
    layer = make(penalty)
    for evaluating in (False, True):
        (layer.eval if evaluating else layer.train)()
        again = carried(layer, lambda layer: layer(X))
        layer(X)
        assert_close(again.depth[...], layer.depth[...], rtol=1e-6)


@pytest.mark.slow
@every_penalty
@every_mesh
def test_over_devices(penalty, axis_type):
    """A batch that is sharded halts when the last of all its positions does."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
    layer = make(penalty)
    for evaluating in (False, True):
        (layer.eval if evaluating else layer.train)()
        call = nnx.jit(lambda layer, x: (layer(x), pj.nnx.collect_penalties(layer)))
        desired = call(layer, X)
        with jax.set_mesh(mesh):
            actual = call(layer, jax.device_put(X, NamedSharding(mesh, P("data"))))
        assert len(actual[0].sharding.device_set) == 8
        jax.tree.map(partial(assert_close, rtol=1e-5, atol=1e-6), actual, desired)


def test_bad_input():
    rngs = nnx.Rngs(0)
    with pytest.raises(ValueError, match="max_depth must be at least 1, got 0"):
        pj.nnx.AdaptiveDepth(jnp.tanh, 0, 4, rngs=rngs)
    with pytest.raises(TypeError, match="must be a PonderCost or a PonderDivergence, got L1"):
        pj.nnx.AdaptiveDepth(jnp.tanh, 2, 4, penalty=pj.L1(), rngs=rngs)
    with pytest.raises(ValueError, match="weight must be at least 0"):
        pj.nnx.AdaptiveDepth(jnp.tanh, 2, 4, weight=-1.0, rngs=rngs)
    with pytest.raises(TypeError, match="max_depth must be of type int"):
        pj.nnx.AdaptiveDepth(jnp.tanh, 2.5, 4, rngs=rngs)
    layer = pj.nnx.AdaptiveDepth(lambda x: x[..., :2], 2, FEATURES, rngs=rngs)
    with pytest.raises(ValueError, match=re.escape("block must give what it is given")):
        layer(X)
    of_rows = pj.PonderCost(reduction="none")
    layer = pj.nnx.AdaptiveDepth(jnp.tanh, 2, FEATURES, penalty=of_rows, rngs=rngs)
    with pytest.raises(ValueError, match="penalty"):
        layer(X)


# Early exit.

CLASSES, LAYERS = 4, 5


def kernels(seed=0):
    random = np.random.default_rng(seed)
    return (
        jnp.asarray(random.normal(size=(LAYERS, FEATURES, FEATURES)) / 2, jnp.float32),
        jnp.asarray(random.normal(size=(LAYERS, FEATURES, CLASSES)) * 2, jnp.float32),
    )


def stacked():
    hidden, out = kernels()
    return lambda x, i: x + jnp.tanh(x @ hidden[i]), lambda x, i: x @ out[i]


def in_turn():
    """The same layers, one a function."""
    hidden, out = kernels()
    blocks = [lambda x, kernel=kernel: x + jnp.tanh(x @ kernel) for kernel in hidden]
    return lambda x, i: jax.lax.switch(i, blocks, x), lambda x, i: x @ out[i]


def shared():
    """One module for all."""
    block, head = Block(nnx.Rngs(0)), nnx.Linear(FEATURES, CLASSES, rngs=nnx.Rngs(1))
    return lambda x, i: block(x), lambda x, i: head(3.0 * x)


def without_exit(block, head, x):
    """The logits of every exit, and their entropies in float64."""
    logits = []
    for i in range(LAYERS):
        x = block(x, jnp.int32(i))
        logits.append(np.asarray(head(x, jnp.int32(i)), np.float64))
    logits = np.stack(logits)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    return logits, -(p * np.log(p)).sum(-1)


MODELS = {"stacked": stacked, "in turn": in_turn, "shared": shared}


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.7, 100.0])
def test_early_exit(model, threshold):
    """Each element has the result of running to its own depth, and exits are counted."""
    block, head = model()
    logits, entropies = without_exit(block, head, X)
    certain = entropies < threshold
    certain[-1] = True
    depth = 1 + certain.argmax(0)
    run = partial(pj.nnx.early_exit, block, head, max_depth=LAYERS)
    actual = jax.jit(run)(X, threshold=threshold)
    assert np.array_equal(actual.depth, depth)
    desired = np.take_along_axis(logits, depth[None, ..., None] - 1, 0)[0]
    assert_close(actual.logits, desired, rtol=1e-5, atol=1e-5)
    assert actual.exits.tolist() == [(depth == n + 1).sum() for n in range(LAYERS)]
    if threshold in (0.3, 0.7):
        assert len({*depth.ravel()}) > 2


def test_examples_leave_as_a_whole():
    """By logits of a pooled state, beside a state of tokens, in a pytree."""
    hidden, out = kernels()

    def block(state, i):
        return {"x": state["x"] + jnp.tanh(state["x"] @ hidden[i])}

    def head(state, i):
        return jnp.mean(state["x"], 1) @ out[i]

    exit = pj.nnx.early_exit(block, head, {"x": X}, max_depth=LAYERS, threshold=0.5)
    assert exit.logits.shape == (8, CLASSES)
    assert exit.depth.shape == (8,)
    assert int(exit.exits.sum()) == 8


def test_blocks_end_when_all_have_left():
    """They are counted by the state itself; padding waits for nobody, and nobody for padding."""
    runs = []

    def block(x, i):
        jax.debug.callback(runs.append, i)
        return 2 * x

    x = jnp.array([[8.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    run = partial(pj.nnx.early_exit, block, lambda x, i: x, max_depth=6, threshold=0.1)
    for where, depth in (
        (None, [1, 2, 6]),
        ([True, True, False], [1, 2, 0]),
        ([True, False, False], [1, 0, 0]),
        ([False, False, False], [0, 0, 0]),
    ):
        runs.clear()
        exit = run(x, where=None if where is None else jnp.array(where))
        jax.effects_barrier()
        assert exit.depth.tolist() == depth
        assert len(runs) == max(depth)
        assert np.all(np.asarray(exit.logits)[np.array(depth) == 0] == 0)


def test_thresholds_of_elements_and_normalised_entropies():
    block, head = stacked()
    _, entropies = without_exit(block, head, X)
    thresholds = np.linspace(0, 1, 7, dtype=np.float32)
    certain = entropies / np.log(CLASSES) < thresholds
    certain[-1] = True
    exit = quick_jit(
        lambda x, t: pj.nnx.early_exit(
            block, head, x, max_depth=LAYERS, threshold=t, normalize=True
        )
    )(X, thresholds)
    assert np.array_equal(exit.depth, 1 + certain.argmax(0))


@every_mesh
def test_early_exit_over_devices(axis_type):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
    block, head = stacked()
    run = jax.jit(partial(pj.nnx.early_exit, block, head, max_depth=LAYERS, threshold=0.5))
    desired = run(X)
    with jax.set_mesh(mesh):
        actual = run(jax.device_put(X, NamedSharding(mesh, P("data"))))
    assert len(actual.logits.sharding.device_set) == 8
    assert np.array_equal(actual.depth, desired.depth)
    assert_close(actual.logits, desired.logits, rtol=1e-5, atol=1e-5)


def test_bad_exits():
    block, head = stacked()
    run = partial(pj.nnx.early_exit, block, head, X)
    with pytest.raises(ValueError, match="max_depth must be at least 1, got 0"):
        run(max_depth=0, threshold=0.5)
    with pytest.raises(ValueError, match=r"threshold must be at least 0, got -0\.5"):
        run(max_depth=2, threshold=-0.5)
    with pytest.raises(ValueError, match=re.escape("threshold must broadcast to shape (8, 7)")):
        run(max_depth=2, threshold=jnp.ones(3))
    with pytest.raises(TypeError, match="where must be boolean"):
        run(max_depth=2, threshold=0.5, where=jnp.ones(7))
    with pytest.raises(ValueError, match="classes on its last axis"):
        pj.nnx.early_exit(block, lambda x, i: 0.0 * x[0, 0, 0], X, max_depth=2, threshold=0.5)


def test_states_after_halting_may_overflow():
    """Of a position that has halted, while another goes on."""
    layer = pj.nnx.AdaptiveDepth(lambda x: 1e20 * x, 4, 4, rngs=nnx.Rngs(0))
    layer.unit.kernel[...] = jnp.array([[1.0], [0.0], [0.0], [0.0]])
    x = jnp.array([[1.0, 1, 1, 1], [-1.0, 1, 1, 1]])
    layer.eval()
    assert_close(layer(x)[0], jnp.full(4, 1e20))


@pytest.mark.parametrize("penalty", [pj.PonderCost(), pj.PonderDivergence(0.5)])
def test_loops_inside_of_shard_map(penalty):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    block = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
    layer = pj.nnx.AdaptiveDepth(block, 3, 4, penalty=penalty, rngs=nnx.Rngs(1))
    layer.eval()
    graph, state = nnx.split(layer)

    def both(x):
        deep = nnx.merge(graph, state, copy=True)(x)
        exits = pj.nnx.early_exit(lambda x, _: 2 * x, lambda x, _: x, x, max_depth=4, threshold=0.5)
        return deep, exits.logits

    x = jax.random.normal(jax.random.key(0), (8, 2, 4))
    cut = jax.sharding.PartitionSpec("data")
    mapped = jax.shard_map(both, mesh=mesh, in_specs=cut, out_specs=(cut, cut))
    for actual, desired in zip(jax.jit(mapped)(x), both(x), strict=True):
        assert_close(actual, desired, rtol=1e-5, atol=1e-6)
