"""The sparse Birman-Krein layer against dense inverses, loops over experts, and its contract."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from scipy import special

import penalties_jax as pj
from tests.oracles import assert_close, lattice
from tests.programs import carried, doubles

N, D = 6, 4
X = jnp.asarray(lattice(0, 2, N, D), jnp.float32)


def make(seed=0, **settings):
    settings = {"dropout": 0.0, **settings}
    return pj.nnx.SparseMoEResNetBKLayer(D, N, **settings, rngs=nnx.Rngs(seed))


@nnx.jit
def call(layer, x):
    return layer(x)


@nnx.jit
def call_core(core, potential, mask):
    return core(potential, mask)


# Oracles.


def dense_features(potential, mask, causal):
    """The diagonal of the inverse of one example's dense matrix, without the skipped couplings."""
    coupled = mask[:-1] * mask[1:]
    h = np.diag(np.clip(potential, -3, 3) - 2 - 1j) + np.diag(coupled, 1) + np.diag(coupled, -1)
    if causal:
        g = np.array([np.linalg.inv(h[: k + 1, : k + 1])[k, k] for k in range(len(h))])
    else:
        g = np.diagonal(np.linalg.inv(h))
    return mask[:, None] * np.stack([g.real, g.imag], -1)


def convolved(x, convolution, causal):
    """A convolution of width 3."""
    kernel, bias = (np.asarray(p[...], np.float64) for p in (convolution.kernel, convolution.bias))
    padded = np.pad(x, ((2, 0) if causal else (1, 1), (0, 0)))
    return bias + sum(padded[i : i + len(x)] @ kernel[i] for i in range(3))


def core_by_hand(core, potential, mask):
    result = []
    for v, m in zip(np.asarray(potential, np.float64), np.asarray(mask, np.float64), strict=True):
        features = dense_features(v, m, core.causal)
        x = convolved(features, core.interpolation[0], core.causal)
        for convolution in list(core.interpolation)[1:]:
            x = convolved(np.maximum(x, 0), convolution, core.causal)
        result.append(np.where(m[:, None] == 1, features, x))
    return np.stack(result)


def experts_by_hand(experts, x):
    """A loop over tokens and their chosen experts."""
    router, up, down = (
        np.asarray(p[...], np.float64) for p in (experts.router.kernel, experts.up, experts.down)
    )
    flat = np.asarray(x, np.float64).reshape(-1, x.shape[-1])
    result = np.zeros_like(flat)
    for token, y in zip(flat, result, strict=True):
        probability = special.softmax(token @ router)
        chosen = np.argsort(-probability)[: experts.top_k]
        whole = probability[chosen].sum() if experts.top_k > 1 else 1
        for e in chosen:
            h = token @ up[e]
            h = h / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
            y += probability[e] / whole * (h @ down[e])
    return result.reshape(x.shape)


# The core.

POTENTIAL = jnp.asarray(2 * lattice(1, 3, N), jnp.float32)
MASKS = {
    "ones": np.ones((3, N)),
    "zeros": np.zeros((3, N)),
    "mixed": np.array([[1, 1, 0, 1, 1, 1], [0, 1, 1, 0, 0, 1], [1, 1, 1, 1, 0, 0]]),
}


def make_core(causal):
    core = pj.nnx.SparseBKCore(N, causal=causal, rngs=nnx.Rngs(0))
    for i, convolution in enumerate(core.interpolation):
        convolution.bias[...] = jnp.asarray(lattice(i, *convolution.bias.shape), jnp.float32)
    return core


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("causal", [False, True])
def test_features_are_those_of_dense_inverses(causal, mask):
    core, mask = make_core(causal), jnp.asarray(MASKS[mask], jnp.float32)
    assert bool(jnp.any(jnp.abs(POTENTIAL) > 3))
    features = call_core(core, POTENTIAL, mask)
    assert features.shape == (3, N, 2)
    assert_close(features, core_by_hand(core, POTENTIAL, mask), rtol=1e-4, atol=1e-5)


def test_masks_of_other_examples_do_not_matter():
    core, mask = make_core(False), jnp.asarray(MASKS["mixed"], jnp.float32)
    features = call_core(core, POTENTIAL, mask)
    other = call_core(core, POTENTIAL, mask.at[1:].set(1 - mask[1:]))
    assert jnp.array_equal(features[0], other[0])
    assert not jnp.array_equal(features[1], other[1])


def test_a_skipped_position_cuts_the_chain():
    core, mask = make_core(False), jnp.asarray(MASKS["mixed"][:1], jnp.float32)
    jacobian = jax.jit(jax.jacobian(lambda v: core(v, mask)[0]))(POTENTIAL[:1])[:, :, 0]
    computed = jnp.flatnonzero(mask[0])
    coupling = jnp.any(jacobian[computed] != 0, 1)
    assert not jnp.any(coupling[:2, 2:])
    assert not jnp.any(coupling[2:, :3])


# Causality.


@pytest.mark.slow
@pytest.mark.parametrize("causal", [False, True])
def test_causal_layers_look_back_only(causal):
    layer = make(causal=causal, top_k=2)
    layer.potential.kernel[...] *= 4
    layer.eval()
    mask = layer.gate(X)[0]
    assert 0 < float(jnp.sum(mask)) < N
    graph, state = nnx.split(layer)
    jacobian = jax.jit(jax.jacobian(lambda x: nnx.merge(graph, state, copy=True)(x)[0]))(X)
    assert not jnp.any(jacobian[:, :, 1])
    depends = np.asarray(jnp.any(jacobian[:, :, 0] != 0, (1, 3)))
    assert depends.diagonal()[np.asarray(mask) > 0].all()
    assert np.tril(depends, -1).any()
    assert np.triu(depends, 1).any() == (not causal)


# The mixture of experts and the layer.


@pytest.mark.parametrize("top_k", [1, 2])
def test_experts_are_those_of_a_loop(top_k):
    layer = make(num_experts=3, top_k=top_k)
    experts = layer.experts(X)
    assert_close(experts, experts_by_hand(layer.experts, X), rtol=1e-4, atol=1e-5)
    layer.scale[...] = jnp.float32(0.5)
    layer.eval()
    mask = layer.gate(X)
    assert 0 < float(jnp.mean(mask)) < 1
    features = core_by_hand(layer.core, layer.potential(experts)[..., 0], mask)
    kernel, bias = (np.asarray(p[...], np.float64) for p in (layer.out.kernel, layer.out.bias))
    kept = np.asarray(mask[..., None] * experts, np.float64)
    expected = kept + 0.5 * (features @ kernel + bias)
    assert_close(call(layer, X), expected, rtol=1e-4, atol=1e-5)


def test_half_precision_input():
    layer = make()
    layer.eval()
    half = X.astype(jnp.bfloat16)
    y = call(layer, half)
    assert y.shape == X.shape
    assert_close(y, call(layer, half.astype(jnp.float32)), rtol=2e-2, atol=2e-2)
    assert layer.get_sparsity_loss().dtype == jnp.float32


def test_noise_and_evaluation():
    one, same = make(dropout=0.5), make(dropout=0.5)
    outputs = [call(one, X) for _ in range(2)]
    assert not jnp.array_equal(*outputs)
    assert jnp.array_equal(outputs[0], call(same, X))
    one.eval()
    assert jnp.array_equal(one.gate(X), one.predictor(X) > 0)


# The rate.


@pytest.mark.parametrize("kind", ["l2", "l1", "kl", "huber", "adaptive"])
def test_sparsity_loss(kind):
    layer = make(target_sparsity=0.9, sparsity_loss_type=kind)

    @nnx.jit
    @nnx.value_and_grad
    def loss(layer):
        layer(X)
        return layer.get_sparsity_loss()

    value, gradient = loss(layer)
    rate = layer.get_sparsity_stats()["sparsity_ratio"]
    assert_close(value, pj.sparsity_target_loss(rate, 0.9, kind=kind))
    assert_close(layer.get_sparsity_loss(), value)
    assert_close(layer.get_sparsity_loss(0.25), pj.sparsity_target_loss(rate, 0.25, kind=kind))
    leaves = jax.tree.leaves(gradient["predictor"])
    assert len(leaves) == 4
    assert all(jnp.any(leaf != 0) for leaf in leaves)
    assert not any(jnp.any(leaf != 0) for leaf in jax.tree.leaves(gradient["experts"]))


NAMES = {
    *("total_loss", "accuracy_loss", "sparsity_loss", "accuracy_weight", "sparsity_weight"),
    *("current_sparsity", "target_sparsity"),
}


def test_balanced_loss():
    layer = make(target_sparsity=0.75)
    call(layer, X)
    rate = float(layer.get_sparsity_stats()["sparsity_ratio"])
    for settings, (target, accuracy, weight) in (
        ((), (0.75, 1, 20)),
        ((0.5, 2.0), (0.75, 2, 0.5)),
        ((None, 1.0, 0.25), (0.25, 1, 20)),
        ((0.5, 2.0, 0.25), (0.25, 2, 0.5)),
        ((0,), (0.75, 1, 0)),
    ):
        total, parts = layer.get_balanced_loss(jnp.float32(3), *settings)
        assert parts.keys() == NAMES
        sparsity = float(layer.get_sparsity_loss(target))
        expected = [accuracy * 3 + weight * sparsity, 3, sparsity, accuracy, weight, rate, target]
        names = ["total_loss", "accuracy_loss", "sparsity_loss", "accuracy_weight"]
        names += ["sparsity_weight", "current_sparsity", "target_sparsity"]
        for name, value in zip(names, expected, strict=True):
            assert_close(parts[name], value)
        assert_close(total, expected[0])


def test_stats_are_those_of_the_mask():
    layer = make()
    stats = layer.get_sparsity_stats()
    assert np.isnan(stats["sparsity_ratio"])
    assert np.isnan(stats["num_computed"])
    layer.eval()
    mask = np.asarray(layer.gate(X))
    where = jnp.broadcast_to(jnp.arange(N) < 4, mask.shape)

    @nnx.jit
    def inside(layer, x, where):
        layer(x, where=where)
        return layer.get_sparsity_stats()

    for included, options in ((mask, None), (mask[:, :4], where)):
        for stats in (inside(layer, X, options), layer.get_sparsity_stats()):
            assert stats.keys() == {"sparsity_ratio", "num_computed", "dropped", "target_sparsity"}
            assert float(stats["num_computed"]) == included.sum() / len(mask)
            assert_close(stats["sparsity_ratio"], 1 - included.mean())
            assert float(stats["target_sparsity"]) == 0.5


def test_the_rate_is_that_without_noise():
    layer = make()
    layer.eval()
    wanted = float(pj.sparsity_rate(layer.gate(X)))
    layer.train()
    computed = []
    for _ in range(3):
        layer(X)
        stats = layer.get_sparsity_stats()
        assert_close(stats["sparsity_ratio"], wanted)
        computed.append(float(stats["num_computed"]))
    assert len(set(computed)) > 1


def test_a_target_and_a_weight_are_set_inside_of_a_step():
    """What is traced is written in place; a step of new numbers is no new program."""
    layer = make(sparsity_loss_type="l1")
    scheduler = pj.AdaptiveSparsityScheduler(0.25, 0.75, 1.0, 2.0, 4, "step")
    traces = []

    @nnx.jit
    def step(layer, progress):
        traces.append(None)
        state = scheduler(progress)
        layer.target_sparsity = state.target
        layer.sparsity_loss_weight = state.weight
        layer(X)
        settled = layer.get_balanced_loss(jnp.float32(1))
        given = layer.get_balanced_loss(jnp.float32(1), state.weight, 1.0, state.target)
        return settled, given, scheduler.update(progress)

    progress = scheduler.init()
    for i, target in enumerate((0.25, 0.25 + 0.5 * 0.33, 0.25 + 0.5 * 0.67, 0.75, 0.75)):
        settled, given, progress = step(layer, progress)
        assert_close(settled[0], given[0])
        for parts in (settled[1], given[1]):
            assert_close(parts["target_sparsity"], target)
            assert_close(parts["sparsity_weight"], min(1 + i / 4, 2))
            distance = abs(float(parts["current_sparsity"]) - target)
            assert_close(parts["sparsity_loss"], distance, atol=1e-6)
        assert_close(layer.target_sparsity, target)
        assert_close(layer.get_sparsity_stats()["target_sparsity"], target)
    assert len(traces) == 1


def test_computed_positions_are_those_of_an_example():
    layer = make()
    layer(X, mask=jnp.ones(X.shape[:2]))
    assert float(layer.get_sparsity_stats()["num_computed"]) == N
    layer(X, mask=jnp.zeros(X.shape[:2]).at[0, :3].set(1))
    assert float(layer.get_sparsity_stats()["num_computed"]) == 3 / len(X)
    layer(X[:0])
    assert float(layer.get_sparsity_stats()["num_computed"]) == 0


@pytest.mark.slow
def test_python_numbers_never_widen(x64):
    layer = make()
    parameters = nnx.state(layer, nnx.Param)
    layer = carried(layer, lambda layer: layer(X))
    balanced = [
        layer.get_balanced_loss(jnp.float32(1), *weights) for weights in ((), (0.5, 2.0, 0.25))
    ]
    losses = (layer.get_sparsity_loss(), layer.get_sparsity_loss(0.25))
    outputs = (layer(X), layer(X, temperature=0.5))
    assert doubles((parameters, balanced, losses, outputs, layer.get_sparsity_stats())) == []


@pytest.mark.slow
def test_training_brings_the_rate_nearer():
    layer = make(target_sparsity=0.5, sparsity_loss_type="l2")
    layer.predictor.out.bias[...] += 4.0
    optimizer = nnx.Optimizer(layer, optax.adam(0.2), wrt=nnx.Param)
    traces = []

    @nnx.jit
    def step(layer, optimizer, x):
        traces.append(None)

        def loss(layer):
            y = layer(x)
            total, parts = layer.get_balanced_loss(jnp.mean(y**2), sparsity_weight=10.0)
            return total, parts

        gradient, parts = nnx.grad(loss, has_aux=True)(layer)
        optimizer.update(layer, gradient)
        return parts["current_sparsity"]

    x = jnp.asarray(lattice(0, 16, N, D), jnp.float32)
    rates = [float(step(layer, optimizer, x)) for _ in range(40)]
    assert len(traces) == 1
    assert rates[0] < 0.2
    assert abs(np.mean(rates[-10:]) - 0.5) < 0.15
    assert_close(layer.get_sparsity_stats()["sparsity_ratio"], rates[-1])


@pytest.mark.slow
def test_remat():
    def plain(layer, x):
        return layer(x)

    def gradient(layer, call):
        return nnx.jit(nnx.value_and_grad(lambda layer: jnp.sum(call(layer, X) ** 2)))(layer)

    layers = [make(dropout=0.5), make(dropout=0.5)]
    (value, one), (other, two) = map(gradient, layers, (plain, nnx.remat(plain)))
    assert_close(value, other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        assert_close(a, b, rtol=1e-4, atol=1e-5)
    for name, value in layers[0].get_sparsity_stats().items():
        assert float(value) == float(layers[1].get_sparsity_stats()[name])
    # The accuracy alone teaches every part, the predictor among them.
    for name in ("predictor", "experts", "potential", "core", "out"):
        assert any(jnp.any(leaf != 0) for leaf in jax.tree.leaves(one[name])), name


# Bad input.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_sparsity": 1.5}, r"target must be in \[0, 1\]"),
        ({"target_sparsity": -0.5}, r"target must be in \[0, 1\]"),
        ({"sparsity_loss_weight": -1.0}, "sparsity_loss_weight must be at least 0"),
        ({"sparsity_loss_type": "l3"}, "sparsity_loss_type must be one of .*l2.*kl.*adaptive"),
        ({"top_k": 0}, "top_k must be from 1 to num_experts, 4, got 0"),
        ({"top_k": 5}, "top_k must be from 1 to num_experts, 4, got 5"),
        ({"num_experts": 0}, "num_experts must be at least 1, got 0"),
        ({"dropout": 1.5}, "dropout must be from 0 to 1, got 1.5"),
        ({"temperature": -1.0}, "temperature must be above 0"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        make(**settings)


def test_bad_calls():
    layer = make()
    with pytest.raises(ValueError, match=rf"x must have the shape \[batch, {N}, d\], got \(2, 3"):
        layer(X[:, :3])
    with pytest.raises(ValueError, match="x must have the shape"):
        layer(X[0])
    core = make_core(False)
    with pytest.raises(ValueError, match="mask must have the shape"):
        core(jnp.zeros((2, N)), jnp.zeros((2, N + 1)))
    with pytest.raises(ValueError, match="n_seq must be at least 1"):
        pj.nnx.SparseBKCore(0, rngs=nnx.Rngs(0))
    for weights in ((-1.0,), (None, -1.0)):
        with pytest.raises(ValueError, match="weight must be at least 0"):
            layer.get_balanced_loss(jnp.float32(1), *weights)
    with pytest.raises(ValueError, match=r"target must be in \[0, 1\]"):
        layer.get_sparsity_loss(1.5)
    with pytest.raises(ValueError, match=r"target must be in \[0, 1\]"):
        layer.get_balanced_loss(jnp.float32(1), target_sparsity=1.5)
