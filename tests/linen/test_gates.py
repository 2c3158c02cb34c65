"""The learned gate of linen, and that it is that of NNX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import penalties_jax as pj
from tests.oracles import assert_close, lattice
from tests.programs import doubles

X = jnp.asarray(lattice(0, 4, 8, 6), jnp.float32)
GATE = pj.linen.SparsityGate(target=0.75, weight=0.5)


def initial(gate=GATE):
    return gate.init({"params": jax.random.key(0), "gate": jax.random.key(1)}, X)


def train(gate, variables, seed=2, **options):
    """A training call: the mask and what it recorded."""
    mask, state = gate.apply(
        variables, X, **options, rngs={"gate": jax.random.key(seed)}, mutable=["penalties"]
    )
    return mask, pj.linen.collect_penalties(state)[0]


def settled(variables, **options):
    """The mask without noise, whose rate is penalised."""
    return GATE.apply(variables, X, **options, deterministic=True)


def expected(mask, target=0.75, weight=0.5, kind="huber", where=None):
    rate = pj.sparsity_rate(mask, where=where)
    return weight * pj.sparsity_target_loss(rate, target, kind=kind)


def test_init_records_nothing():
    assert initial().keys() == {"params"}
    assert GATE.init(jax.random.key(0), X, deterministic=True).keys() == {"params"}


@pytest.mark.parametrize("kind", ["l2", "l1", "kl", "huber", "adaptive"])
def test_records_the_loss_of_its_mask_without_noise(kind):
    gate = pj.linen.SparsityGate(target=0.75, weight=0.5, kind=kind)
    variables = initial(gate)
    mask, recorded = train(gate, variables)
    assert mask.shape == X.shape[:-1]
    assert set(np.unique(mask)) == {0, 1}
    assert_close(recorded, expected(settled(variables), kind=kind))
    if kind != "huber":
        return
    remat = nn.remat(pj.linen.SparsityGate)(target=0.75, weight=0.5, kind=kind)
    _, recorded = jax.jit(lambda variables: train(remat, variables))(variables)
    assert_close(recorded, expected(settled(variables), kind=kind))


def test_noise_and_evaluation():
    variables = initial()
    masks = [train(GATE, variables, seed)[0] for seed in (2, 3, 2)]
    assert not jnp.array_equal(masks[0], masks[1])
    assert jnp.array_equal(masks[0], masks[2])
    mask, state = GATE.apply(variables, X, deterministic=True, mutable=["penalties"])
    assert jnp.array_equal(mask, pj.linen.SparsityGate(deterministic=True).apply(variables, X))
    assert float(pj.linen.collect_penalties(state)[0]) == 0
    # Noise without a mutable collection: nothing to record, nothing to warn of.
    assert GATE.apply(variables, X, rngs={"gate": jax.random.key(2)}).shape == mask.shape


def test_control_where_and_temperature():
    variables = initial()
    control = pj.SparsityControl(jnp.float32(0.25), jnp.float32(2.0))
    where = jnp.broadcast_to(jnp.arange(8) < 3, (4, 8))

    @jax.jit
    def both(control, where):
        return train(GATE, variables, control=control), train(GATE, variables, where=where)

    (mask, controlled), (_, masked) = both(control, where)
    assert_close(controlled, expected(settled(variables), 0.25, 2.0))
    assert_close(masked, expected(settled(variables), where=where))
    assert jnp.array_equal(train(GATE, variables, temperature=4.0)[0], mask)


def test_gradient_reaches_the_predictor():
    gradient = jax.jit(jax.grad(lambda variables: train(GATE, variables)[1]))(initial())
    leaves = jax.tree.leaves(gradient)
    assert len(leaves) == 4
    assert all(jnp.any(leaf != 0) for leaf in leaves)


def test_python_numbers_never_widen(x64):
    gate = pj.linen.SparsityGate(target=0.25, temperature=0.5)
    x = jnp.ones((2, 5, 8), jnp.float32)
    variables = gate.init(jax.random.key(0), x, deterministic=True)
    rngs = {"gate": jax.random.key(1)}
    mask, state = gate.apply(variables, x, rngs=rngs, mutable=["penalties"])
    assert state["penalties"]
    assert doubles((variables, mask, state)) == []


def test_the_same_numbers_as_nnx():
    variables = initial()
    gate = pj.nnx.SparsityGate(6, target=0.75, weight=0.5, rngs=nnx.Rngs(0))
    params = variables["params"]
    for name in ("hidden", "out"):
        linear = getattr(gate.predictor, name)
        linear.kernel[...], linear.bias[...] = params[name]["kernel"], params[name]["bias"]

    gate(X)
    assert float(pj.nnx.collect_penalties(gate)) == float(train(GATE, variables)[1])
    gate.eval()
    assert jnp.array_equal(gate(X), GATE.apply(variables, X, deterministic=True))


def test_a_scan_over_layers():
    class Layers(nn.Module):
        @nn.compact
        def __call__(self, x):
            def layer(gate, x, _):
                gate(x)
                mask = gate(x, deterministic=True)
                return x * mask[..., None], mask

            return nn.scan(
                layer,
                variable_axes={"params": 0, "penalties": 0},
                split_rngs={"params": True, "gate": True},
                length=3,
            )(pj.linen.SparsityGate(target=0.75, weight=0.5), x, None)[1]

    model = Layers()
    variables = model.init({"params": jax.random.key(0), "gate": jax.random.key(1)}, X)
    masks, recorded = train(model, variables)
    assert masks.shape == (3, 4, 8)
    assert_close(recorded, sum(expected(mask) for mask in masks))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target": 1.5}, r"target must be in \[0, 1\]"),
        ({"target": -0.1}, r"target must be in \[0, 1\]"),
        ({"weight": -1}, "weight must be at least 0"),
        ({"kind": "l3"}, "kind must be .*huber"),
        ({"temperature": 0.0}, "temperature must be above 0"),
    ],
)
def test_bad_input(settings, message):
    with pytest.raises(ValueError, match=message):
        pj.linen.SparsityGate(**settings)


def test_an_array_is_refused():
    with pytest.raises(TypeError, match="target must hold Python numbers only"):
        pj.linen.SparsityGate(target=jnp.array(0.5))


def test_a_single_feature_is_refused():
    with pytest.raises(ValueError, match="at least 2 features, got 1"):
        pj.linen.SparsityGate().init(jax.random.key(0), jnp.ones((3, 1)), deterministic=True)


@pytest.mark.parametrize(
    "config",
    [pj.HardConcreteGate(), pj.TopKGate(3), pj.JumpReLUGate(0.1)],
    ids=lambda x: type(x).__name__,
)
def test_gates_of_other_kinds(config):
    gate = pj.linen.SparsityGate(gate=config)
    variables = gate.init(jax.random.key(0), X, deterministic=True)
    mask = gate.apply(variables, X, deterministic=True)
    logits = pj.linen.SparsityGate(gate=pj.LogisticGate(hard=False)).apply(
        variables, X, deterministic=True
    )
    assert_close(mask, config(jax.scipy.special.logit(logits)), atol=1e-5)
    assert ("threshold" in variables["params"]) == isinstance(config, pj.JumpReLUGate)


def test_a_gate_and_a_target_that_are_both_annealed():
    gate = pj.linen.SparsityGate(
        target=pj.anneal(0.0, 0.5, start=0, end=4),
        gate=pj.HardConcreteGate(pj.anneal(1.0, 0.1, start=0, end=4)),
    )
    variables = pj.linen.set_step(initial(gate), 2)
    mask, state = gate.apply(variables, X, rngs={"gate": jax.random.key(2)}, mutable=["penalties"])
    now = pj.linen.SparsityGate(target=0.25, gate=pj.HardConcreteGate(0.55))
    same, recorded = now.apply(
        variables, X, rngs={"gate": jax.random.key(2)}, mutable=["penalties"]
    )
    assert_close(mask, same)
    assert_close(pj.linen.collect_penalties(state)[0], pj.linen.collect_penalties(recorded)[0])
