"""The same penalised regression in every framework: all end where NumPy's own loop does."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from flax.training.train_state import TrainState

import penalties_jax as pj

STEPS, RATE, L1, L2 = 40, 0.1, 0.3, 0.05
RNG = np.random.default_rng(0)
X = RNG.normal(size=(64, 8))
Y = X[:, :2] @ np.array([[1.0, -2.0], [0.5, 1.5]]) + 0.1 * RNG.normal(size=(64, 2))
KERNEL = RNG.normal(size=(8, 2))

OBJECTIVE = pj.Objective(
    loss=lambda outputs: jnp.mean((outputs["y"] - outputs["target"]) ** 2),
    terms={"scale": pj.Term(pj.L2(reduction="mean"), on="y", weight=0.01)},
)


def kernels(params):
    return jax.tree.map(lambda p: jnp.ndim(p) == 2, params)


def optimizer():
    return optax.chain(
        pj.add_penalty(pj.L2(), weight=L2, mask=kernels),
        optax.sgd(RATE),
        pj.proximal(pj.L1(), RATE, weight=L1, mask=kernels),
    )


def expected():
    """Proximal gradient descent by hand, in float64."""
    kernel, bias = KERNEL.copy(), np.zeros(2)
    for _ in range(STEPS):
        y = X @ kernel + bias
        slope = 2 * (y - Y + 0.01 * y) / y.size
        moved = kernel - RATE * (X.T @ slope + 2 * L2 * kernel)
        kernel = np.sign(moved) * np.maximum(np.abs(moved) - RATE * L1, 0)
        bias -= RATE * slope.sum(0)
    return kernel, bias


EXPECTED = expected()


def loss_of(y, dtype=jnp.float32):
    return OBJECTIVE({"y": y, "target": jnp.asarray(Y, dtype)})[0]


def check(kernel, bias, **tolerance):
    assert np.count_nonzero(EXPECTED[0]) < 8
    np.testing.assert_array_equal(np.asarray(kernel) == 0, EXPECTED[0] == 0)
    np.testing.assert_allclose(kernel, EXPECTED[0], **tolerance)
    np.testing.assert_allclose(bias, EXPECTED[1], **tolerance)


def dicts(dtype=jnp.float32):
    """As Haiku has its parameters: plain dicts, by module and name."""
    return {"linear": {"w": jnp.asarray(KERNEL, dtype), "b": jnp.zeros(2, dtype)}}


def apply(params, x):
    return x @ params["linear"]["w"] + params["linear"]["b"]


def train(params, loss):
    transformation = optimizer()

    @jax.jit
    def step(params, state):
        updates, state = transformation.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state = transformation.init(params)
    for _ in range(STEPS):
        params, state = step(params, state)
    return params["linear"]["w"], params["linear"]["b"]


def test_plain_dicts():
    x = jnp.asarray(X, jnp.float32)
    check(*train(dicts(), lambda params: loss_of(apply(params, x))), rtol=1e-4, atol=1e-6)


def test_float64():
    with jax.enable_x64(True):
        x, params = jnp.asarray(X), dicts(jnp.float64)
        kernel, bias = train(params, lambda params: loss_of(apply(params, x), jnp.float64))
        assert kernel.dtype == jnp.float64
        check(kernel, bias, rtol=1e-12, atol=1e-14)


def test_half_precision_parameters_with_float32_masters():
    x = jnp.asarray(X, jnp.bfloat16)

    def loss(masters):
        params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), masters)
        assert params["linear"]["w"].dtype == jnp.bfloat16
        return loss_of(apply(params, x))

    kernel, bias = train(dicts(), loss)
    assert kernel.dtype == jnp.float32
    check(kernel, bias, rtol=2e-2, atol=1e-2)


def test_nnx():
    model = nnx.Linear(8, 2, rngs=nnx.Rngs(0))
    model.kernel[...] = jnp.asarray(KERNEL, jnp.float32)
    state = nnx.Optimizer(model, optimizer(), wrt=nnx.Param)
    x = jnp.asarray(X, jnp.float32)

    @nnx.jit
    def step(model, state):
        state.update(model, nnx.grad(lambda model: loss_of(model(x)))(model))

    for _ in range(STEPS):
        step(model, state)
    check(model.kernel[...], model.bias[...], rtol=1e-4, atol=1e-6)


def test_nnx_with_modules_for_the_penalties():
    """The L2 terms come from an activity penalty and from `param_penalty`, not from the chain."""
    layer = nnx.Linear(8, 2, rngs=nnx.Rngs(0))
    layer.kernel[...] = jnp.asarray(KERNEL, jnp.float32)
    activity = pj.nnx.ActivityPenalty(pj.L2(reduction="mean"), weight=0.01)
    model = nnx.Sequential(layer, activity)
    chain = optax.chain(optax.sgd(RATE), pj.proximal(pj.L1(), RATE, weight=L1, mask=kernels))
    state = nnx.Optimizer(model, chain, wrt=nnx.Param)
    x, target = jnp.asarray(X, jnp.float32), jnp.asarray(Y, jnp.float32)

    @nnx.jit
    def step(model, state):
        def loss(model):
            error = jnp.mean((model(x) - target) ** 2)
            kernel = pj.nnx.param_penalty(model, L2 * pj.L2(), nnx.PathContains("kernel"))
            return error + kernel + pj.nnx.collect_penalties(model)

        state.update(model, nnx.grad(loss, argnums=nnx.DiffState(0, nnx.Param))(model))

    for _ in range(STEPS):
        step(model, state)
    check(layer.kernel[...], layer.bias[...], rtol=1e-4, atol=1e-6)


def test_linen():
    model = linen.Dense(2)
    params = {"kernel": jnp.asarray(KERNEL, jnp.float32), "bias": jnp.zeros(2)}
    state = TrainState.create(apply_fn=model.apply, params=params, tx=optimizer())
    x = jnp.asarray(X, jnp.float32)

    @jax.jit
    def step(state):
        def loss(params):
            return loss_of(state.apply_fn({"params": params}, x))

        return state.apply_gradients(grads=jax.grad(loss)(state.params))

    for _ in range(STEPS):
        state = step(state)
    check(state.params["kernel"], state.params["bias"], rtol=1e-4, atol=1e-6)


def test_equinox():
    eqx = pytest.importorskip("equinox", reason="of the extra 'test'")
    model = eqx.nn.Linear(8, 2, key=jax.random.key(0))
    weight, bias = jnp.asarray(KERNEL.T, jnp.float32), jnp.zeros(2)
    model = eqx.tree_at(lambda model: (model.weight, model.bias), model, (weight, bias))
    transformation, x = optimizer(), jnp.asarray(X, jnp.float32)

    @eqx.filter_jit
    def step(model, state):
        gradient = eqx.filter_grad(lambda model: loss_of(jax.vmap(model)(x)))(model)
        params = eqx.filter(model, eqx.is_inexact_array)
        updates, state = transformation.update(gradient, state, params)
        return eqx.apply_updates(model, updates), state

    state = transformation.init(eqx.filter(model, eqx.is_inexact_array))
    for _ in range(STEPS):
        model, state = step(model, state)
    check(model.weight.T, model.bias, rtol=1e-4, atol=1e-6)


def test_metrics_of_an_objective_in_nnx_metrics():
    averages = nnx.MultiMetric(
        total=nnx.metrics.Average("total"), scale=nnx.metrics.Average("scale")
    )
    outputs = [{"y": jnp.full(2, value), "target": jnp.zeros(2)} for value in (1.0, 3.0)]
    for batch in outputs:
        averages.update(**OBJECTIVE(batch)[1])
    computed = averages.compute()
    assert float(computed["scale"]) == pytest.approx(5.0)
    assert float(computed["total"]) == pytest.approx(5.05)
