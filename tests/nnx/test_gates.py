"""The learned gate of NNX: its noise, what it records, and what learns from it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import penalties_jax as pj
from benchmarks import gates as study
from tests.oracles import assert_close, lattice
from tests.programs import carried, doubles

X = jnp.asarray(lattice(0, 4, 8, 6), jnp.float32)
SETTINGS = {"target": 0.75, "weight": 0.5}


def make(seed=0, **settings):
    return pj.nnx.SparsityGate(6, **SETTINGS, **settings, rngs=nnx.Rngs(seed))


def expected(mask, target=0.75, weight=0.5, kind="huber", where=None):
    rate = pj.sparsity_rate(mask, where=where)
    return weight * pj.sparsity_target_loss(rate, target, kind=kind)


def settled(gate):
    """The mask without noise, whose rate is penalised."""
    quiet = nnx.clone(gate)
    quiet.eval()
    return quiet(X)


def train(gate, x):
    """A training call: the mask and what it recorded."""
    mask = gate(x)
    return mask, pj.nnx.collect_penalties(gate)


@pytest.mark.parametrize("kind", ["l2", "l1", "kl", "huber", "adaptive"])
def test_records_the_loss_of_its_mask_without_noise(kind):
    gate = make(kind=kind)
    for transform in (lambda f: f, nnx.jit, nnx.remat) if kind == "huber" else (lambda f: f,):
        mask, recorded = transform(train)(gate, X)
        assert mask.shape == X.shape[:-1]
        assert set(np.unique(mask)) == {0, 1}
        assert_close(recorded, expected(settled(gate), kind=kind))
        assert_close(gate.rate[...], pj.sparsity_rate(settled(gate)))
        assert not jnp.array_equal(mask, settled(gate))
    assert float(gate.recorded[...]) == 0


def test_noise():
    gate, same, other = make(), make(), make(1)
    masks = [np.asarray(gate(X)) for _ in range(3)]
    assert not np.array_equal(masks[0], masks[1])
    jitted = nnx.jit(lambda gate, x: gate(x))
    again = [np.asarray(jitted(same, X)) for _ in range(3)]
    assert np.array_equal(masks, again)
    assert not np.array_equal(masks[0], other(X))


def test_noise_of_a_stream_of_its_own():
    x = X[:1]
    one, two = (
        pj.nnx.SparsityGate(6, rngs=nnx.Rngs(params=seed, gate=3)).rngs() for seed in (0, 1)
    )
    assert jnp.array_equal(jax.random.key_data(one), jax.random.key_data(two))
    rngs = nnx.Rngs(0)
    pair = [pj.nnx.SparsityGate(6, rngs=rngs) for _ in range(2)]
    nnx.update(pair[1].predictor, nnx.state(pair[0].predictor))
    assert any(not np.array_equal(pair[0](x), pair[1](x)) for _ in range(4))


def test_evaluation():
    gate = make()
    gate.eval()
    mask, recorded = nnx.jit(train)(gate, X)
    assert jnp.array_equal(mask, gate(X))
    assert jnp.array_equal(mask, gate.predictor(X) > 0)
    assert float(recorded) == 0
    gate.train()
    assert float(train(gate, X)[1]) > 0


def test_gradient_reaches_the_predictor():
    gate = make()

    def loss(predictor):
        logits = predictor(X)
        return expected(pj.logistic_gate(logits, None))

    wanted = nnx.grad(loss)(gate.predictor)
    got = nnx.jit(nnx.grad(lambda gate: train(gate, X)[1]))(gate)["predictor"]
    leaves = jax.tree.leaves(got)
    assert len(leaves) == 4
    for leaf, other in zip(leaves, jax.tree.leaves(wanted), strict=True):
        assert jnp.any(leaf != 0)
        assert_close(leaf, other, rtol=1e-4, atol=1e-7)


def test_control():
    gate = make()
    traces = []

    @nnx.jit
    def controlled(gate, x, control):
        traces.append(None)
        mask = gate(x, control=control)
        return mask, pj.nnx.collect_penalties(gate)

    for target, weight in ((0.25, 2.0), (1.0, 0.125), (0.5, 0.0)):
        control = pj.SparsityControl(jnp.float32(target), jnp.float32(weight))
        _, recorded = controlled(gate, X, control)
        assert_close(recorded, expected(settled(gate), target, weight))
    assert len(traces) == 1
    _, recorded = train(gate, X)
    assert_close(recorded, expected(settled(gate)))


@pytest.mark.parametrize("weight", [0, 0.0, 1, 1.0])
def test_control_of_a_gate_of_any_weight(weight):
    gate = pj.nnx.SparsityGate(6, weight=weight, rngs=nnx.Rngs(0))
    mask = settled(gate)
    gate(X, control=pj.SparsityControl(jnp.float32(0.25), jnp.float32(2.0)))
    assert_close(pj.nnx.collect_penalties(gate), expected(mask, 0.25, 2.0))
    gate(X)
    assert_close(pj.nnx.collect_penalties(gate), expected(mask, 0.5, weight))


@pytest.mark.parametrize(
    "controller",
    [pj.DualAscent(target=pj.anneal(0.1, 0.5, start=0, end=4)), pj.AdaptiveSparsityScheduler()],
)
def test_python_numbers_never_widen(controller, x64):
    gate = pj.nnx.SparsityGate(8, target=0.5, rngs=nnx.Rngs(0))
    x = jnp.ones((2, 5, 8), jnp.float32)
    state, _ = jax.lax.scan(
        lambda state, _: (controller.update(state, rate=0.2, value=2.0), controller(state)),
        controller.init(),
        length=3,
    )
    control = controller(state)
    gate = carried(gate, lambda gate: (gate(x), gate(x, control=control, temperature=0.5)))
    assert doubles((state, control, gate(x), nnx.state(gate, pj.nnx.PenaltyValue))) == []
    assert float(pj.nnx.collect_penalties(gate)) > 0


def test_where_leaves_padding_out():
    gate = make()
    where = jnp.broadcast_to(jnp.arange(8) < 3, (4, 8))
    mask = settled(gate)
    gate(X, where=where)
    assert_close(gate.rate[...], pj.sparsity_rate(mask, where=where))
    assert_close(pj.nnx.collect_penalties(gate), expected(mask, where=where))
    assert_close(expected(mask, where=where), expected(mask[:, :3]))
    gate(X, where=jnp.zeros((4, 8), bool))
    assert float(pj.nnx.collect_penalties(gate)) == 0


def test_temperature_scales_the_derivative_only():
    gate = make()
    gate.eval()

    @nnx.jit
    @nnx.value_and_grad
    def rate(gate, temperature):
        return jnp.mean(gate(X, temperature=temperature))

    (one, slope), (two, other) = rate(gate, 1.0), rate(gate, 4.0)
    assert float(one) == float(two)
    bias = slope["predictor"]["out"]["bias"][...]
    assert not np.allclose(bias, other["predictor"]["out"]["bias"][...])


def test_a_stack_of_models():
    @nnx.split_rngs(splits=3)
    @nnx.vmap
    def stack(rngs):
        return pj.nnx.SparsityGate(6, **SETTINGS, rngs=rngs)

    gates = stack(nnx.Rngs(0))

    @nnx.jit
    @nnx.value_and_grad(has_aux=True)
    def total(gates):
        masks = nnx.vmap(lambda gate, x: gate(x), in_axes=(0, None))(gates, X)
        return pj.nnx.collect_penalties(gates), masks

    (value, masks), gradient = total(gates)
    assert masks.shape == (3, 4, 8)
    assert not jnp.array_equal(masks[0], masks[1])
    gates.eval()
    quiet = nnx.vmap(lambda gate, x: gate(x), in_axes=(0, None))(gates, X)
    assert_close(value, sum(expected(mask) for mask in quiet))
    bias = gradient["predictor"]["out"]["bias"][...]
    assert bias.shape == (3, 1)
    assert jnp.all(bias != 0)
    assert float(pj.nnx.collect_penalties(gates)) == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target": 1.5}, r"target must be in \[0, 1\]"),
        ({"target": -0.1}, r"target must be in \[0, 1\]"),
        ({"weight": -1}, "weight must be at least 0"),
        ({"kind": "l3"}, "kind must be .*huber"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"temperature": np.float32(0)}, "temperature must be above 0"),
    ],
)
def test_bad_input(settings, message):
    with pytest.raises(ValueError, match=message):
        pj.nnx.SparsityGate(6, **settings, rngs=nnx.Rngs(0))


def test_bad_temperature():
    with pytest.raises(ValueError, match="temperature must be above 0"):
        make()(X, temperature=0.0)


def test_a_single_feature_is_refused():
    with pytest.raises(ValueError, match="features must be at least 2, got 1"):
        pj.nnx.SparsityGate(1, rngs=nnx.Rngs(0))


GATES = {
    "logistic": pj.LogisticGate(0.5),
    "hard concrete": pj.HardConcreteGate(),
    "jump relu": pj.JumpReLUGate(0.1, bandwidth=1.0),
    "top k": pj.TopKGate(3),
}


@pytest.mark.parametrize("config", GATES.values(), ids=GATES)
def test_gates_of_other_kinds(config):
    gate = make(gate=config)
    gate.eval()
    assert_close(gate(X), config(gate.predictor(X)))
    gate.train()
    _, recorded = train(gate, X)
    assert_close(recorded, expected(settled(gate)))
    assert type(gate.gate) is type(config)

    def total(gate):
        return jnp.sum(gate(X)) + pj.nnx.collect_penalties(gate)

    slopes = nnx.to_pure_dict(nnx.grad(total)(gate))
    learned = (
        jax.tree.leaves(slopes["predictor"])
        if config != GATES["jump relu"]
        else [slopes["numbers"]["gate"]["threshold"]]
    )
    assert any(np.any(np.asarray(leaf) != 0) for leaf in learned)


def test_a_gate_that_is_annealed_and_one_that_is_set():
    gate = make(gate=pj.HardConcreteGate(pj.anneal(2.0, 0.5, start=0, end=4)))
    gate.deterministic = True
    gate.gate = pj.LogisticGate(pj.anneal(2.0, 0.5, start=0, end=4), hard=False)
    for step, temperature in ((0, 2.0), (2, 1.25), (9, 0.5)):
        pj.nnx.set_step(gate, step)
        assert_close(gate(X), jax.nn.sigmoid(gate.predictor(X) / temperature))
    gate.temperature = 1.5
    assert_close(gate(X), jax.nn.sigmoid(gate.predictor(X) / 1.5))
    with pytest.raises(ValueError, match="leave temperature= out"):
        make(gate=pj.TopKGate(3), temperature=1.0)
    with pytest.raises(TypeError, match="gate must be a config"):
        make(gate=pj.L1())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["regression", "digits"])
def test_the_defaults_reach_their_targets(name):
    """Rates of 0.2, 0.5 and 0.7 within 0.05 in evaluation, from each of three seeds."""
    gate = pj.nnx.SparsityGate(6, rngs=nnx.Rngs(0))
    runs = study.train(study.JOBS[name](), gate.penalty.kind, 1e-2, 300, (float(gate.weight),))
    assert runs.rate.shape == (1, 3, 3)
    assert runs.miss <= 0.05


@pytest.mark.slow
def test_the_same_defaults_everywhere():
    gate, layer = (
        pj.nnx.SparsityGate(6, rngs=nnx.Rngs(0)),
        pj.nnx.SparseMoEResNetBKLayer(6, 8, num_experts=1, rngs=nnx.Rngs(0)),
    )
    weights = float(gate.weight), float(layer.sparsity_loss_weight), pj.linen.SparsityGate().weight
    assert {*weights, pj.AdaptiveSparsityScheduler().final_weight} == {20.0}
    kinds = gate.penalty.kind, layer.sparsity.kind, pj.linen.SparsityGate().kind
    assert set(kinds) <= {"huber", "adaptive"}
