"""Computing gathered positions alone: what it gives, what it drops, and how much work it is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import penalties_jax as pj
from tests.nnx.test_sparse_bk import core_by_hand, experts_by_hand
from tests.oracles import assert_close, lattice

BATCH, N, D = 3, 8, 4
X = jnp.asarray(lattice(0, BATCH, N, D), jnp.float32)
LAYERS = {"not causal": False, "causal": True}


def make_layer(seed=0, **settings):
    settings = {"dropout": 0.0, "top_k": 2, **settings}
    layer = pj.nnx.SparseMoEResNetBKLayer(D, N, **settings, rngs=nnx.Rngs(seed))
    layer.scale[...] = jnp.float32(0.5)
    return layer


def make_gate(seed=0, **settings):
    return pj.nnx.SparsityGate(D, **settings, rngs=nnx.Rngs(seed))


def block(x):
    return jnp.sin(3 * x) + 1


MODULES = {
    "layer": (make_layer, lambda layer, x, **options: layer(x, **options)),
    "gate": (make_gate, lambda gate, x, **options: gate.run(block, x, **options)),
}
every_module = pytest.mark.parametrize(("make", "call"), MODULES.values(), ids=MODULES)


def slopes(call, module, x, **options):
    """The output, and the gradients of the sum of its sines, with those of its rate."""

    @nnx.jit
    def compute(module, x):
        def loss(module, x):
            y = call(module, x, **options)
            return jnp.sum(jnp.sin(y)) + module.rate[...], y

        gradients, y = nnx.grad(loss, argnums=(0, 1), has_aux=True)(module, x)
        return y, jax.tree.leaves(gradients)

    return compute(module, x)


def first(count, scores):
    """Where the largest of each row are, of equal ones the first."""
    return np.argsort(np.argsort(-np.float64(scores), kind="stable")) < count


def assert_alike(actual, desired):
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(desired), strict=True):
        assert_close(a, b, rtol=1e-5, atol=1e-6)


# What it gives.


@every_module
def test_gathering_all_is_masking(make, call):
    """Through a gather of all positions but one, which is not there to be taken."""
    where = jnp.arange(N) < jnp.array([[N - 1], [N - 2], [N - 1]])
    outputs = [
        slopes(call, make(compute=compute, capacity=capacity), X, where=where)
        for compute, capacity in (("mask", None), ("gather", N), ("gather", N - 1))
    ]
    for output in outputs[1:]:
        assert_alike(output, outputs[0])


@every_module
def test_what_is_open_is_computed_where_there_is_room(make, call):
    masked, gathered = make(), make(compute="gather", capacity=N - 1)
    for module in (masked, gathered):
        module.eval()
        module.predictor.out.bias[...] -= 0.2
    outputs = [call(module, X) for module in (masked, gathered)]
    stats = gathered.get_sparsity_stats()
    assert 0 < float(stats["sparsity_ratio"]) < 1
    assert float(stats["dropped"]) == 0
    assert_alike(outputs[0], outputs[1])
    assert {k: float(v) for k, v in stats.items()} == {
        k: float(v) for k, v in masked.get_sparsity_stats().items()
    }


@pytest.mark.parametrize("capacity", [1, 3, 6])
@pytest.mark.parametrize("causal", LAYERS.values(), ids=LAYERS)
def test_a_layer_of_some_positions_is_that_of_a_loop(causal, capacity):
    layer = make_layer(causal=causal, compute="gather", capacity=capacity)
    layer.eval()
    logits = np.asarray(layer.predictor(X))
    mask = np.float32(first(5, logits))
    y = nnx.jit(lambda layer, x, mask: layer(x, mask=mask, capacity=capacity))(layer, X, mask)
    computed = first(min(capacity, 5), 10 * mask + logits)
    experts = experts_by_hand(layer.experts, X) * computed[..., None]
    potential = layer.potential(jnp.asarray(experts, jnp.float32))[..., 0]
    features = core_by_hand(layer.core, potential, computed)
    kernel, bias = (np.asarray(p[...], np.float64) for p in (layer.out.kernel, layer.out.bias))
    assert_close(y, experts + 0.5 * (features @ kernel + bias), rtol=1e-4, atol=1e-5)
    stats = layer.get_sparsity_stats()
    assert float(stats["num_computed"]) == min(capacity, 5)
    assert float(stats["dropped"]) == 5 - min(capacity, 5)
    assert_close(stats["sparsity_ratio"], 3 / 8)


def test_a_gate_runs_its_function_on_open_positions():
    gate = make_gate(compute="gather", capacity=3)
    gate.eval()
    mask, logits = np.asarray(gate(X)), np.asarray(gate.predictor(X))
    taken = []

    def seen(x):
        taken.append(x.shape)
        return block(x)

    like = jnp.full((BATCH, N, D), 7.0)
    y = gate.run(seen, X, like=like, capacity=3)
    computed = first(3, 10 * mask + logits) & (mask > 0)
    assert_close(y, np.where(computed[..., None], block(X), 7.0), atol=1e-6)
    assert taken == [(BATCH, 3, D)]


def test_closed_gates_learn_where_there_is_room():
    """Of the slots that open gates leave, and only of those."""
    layer = make_layer(compute="gather", capacity=4)
    mask = jnp.zeros((BATCH, N)).at[:, :2].set(1)

    graph, state = nnx.split(layer)

    def loss(mask):
        return jnp.sum(jnp.sin(nnx.merge(graph, state, copy=True)(X, mask=mask)))

    slope = jax.grad(loss)(mask)
    assert jnp.array_equal(jnp.sum(slope != 0, 1), jnp.full(BATCH, 4))


@every_module
def test_evaluation_has_room_for_all_open_gates(make, call):
    """In one program, whatever their number, and without more work than the next capacity."""
    masked, module = make(), make(compute="gather", capacity=2)
    traces = []

    @nnx.jit
    def evaluate(module, x):
        traces.append(None)
        return call(module, x)

    for m in (masked, module):
        m.eval()
    rates = set()
    for shift in (-2.0, -0.3, 0.0, 0.3, 2.0):
        for m in (masked, module):
            m.predictor.out.bias[...] = jnp.full(1, shift)
        assert_alike(evaluate(module, X), call(masked, X))
        stats = module.get_sparsity_stats()
        assert float(stats["dropped"]) == 0
        rates.add(float(stats["sparsity_ratio"]))
    assert len(rates) > 2
    assert len(traces) == 1


@every_module
def test_open_gates_come_first(make, call):
    """Before closed ones of higher importance, also where that is beyond what a sigmoid tells."""
    module = make(compute="gather", capacity=1)
    module.eval()
    module.predictor.out.kernel[...] *= 200
    logits = module.predictor(X)
    for gate in (0.05, 1.0):
        mask = gate * jax.nn.one_hot(jnp.argmin(logits, -1), N)
        taken = []

        def output(values, active, computed, taken=taken):
            taken.append(computed)
            return values

        module._compute(output, X, mask, mask, logits, None, 1)
        assert jnp.array_equal(taken[0], mask)


@every_module
@pytest.mark.parametrize("compute", ["mask", "gather"])
def test_what_does_not_exist_may_hold_anything(make, call, compute):
    where = jnp.arange(N) < jnp.array([[N], [N - 2], [3]])
    module = make(compute=compute, capacity=3 if compute == "gather" else None)
    desired = slopes(call, module, X, where=where)
    holed = jnp.where(where[..., None], X, jnp.nan)
    y, gradients = slopes(call, make(compute=compute, capacity=module.capacity), holed, where=where)
    assert_alike(jnp.where(where[..., None], y, 0), jnp.where(where[..., None], desired[0], 0))
    assert all(bool(jnp.all(jnp.isfinite(g))) for g in gradients[:-1])


def test_whether_to_gather_can_be_set():
    gate, shapes = make_gate(), []

    def seen(x):
        shapes.append(x.shape[1])
        return x

    for compute, capacity in (("gather", None), ("gather", 2), ("mask", 2)):
        gate.compute, gate.capacity = compute, capacity
        gate.run(seen, X)
    assert shapes == [5, 2, N]


# The work.


def flops(function, *arguments):
    """Of the program for a GPU: that for a CPU has a loop, whose trips are not counted."""
    lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",))
    return lowered.cost_analysis()["flops"]


@pytest.mark.parametrize(("experts", "top_k"), [(4, 1), (4, 2), (8, 2), (1, 1)])
@pytest.mark.parametrize("rows", [96, 512])
def test_only_experts_that_are_used_are_computed(experts, top_k, rows):
    features = 32
    layer = pj.nnx.SparseMoEResNetBKLayer(features, rows, experts, top_k, rngs=nnx.Rngs(0))
    graph, state = nnx.split(layer.experts)

    def run(state, x):
        module = nnx.merge(graph, state, copy=True)
        module.eval()
        return module(x)

    x = jnp.ones((rows, features))
    routed = 2 * 2 * rows * top_k * features * 4 * features
    others = 2 * rows * features * experts + 40 * rows * top_k * features
    assert flops(run, state, x) < 1.2 * routed + others


@pytest.mark.parametrize("rate", [0.5, 0.7])
def test_work_is_in_proportion_to_capacity(rate):
    features, length = 64, 128
    x = jnp.ones((4, length, features))

    def work(capacity):
        layer = pj.nnx.SparseMoEResNetBKLayer(features, length, dropout=0.0, rngs=nnx.Rngs(0))
        graph, state = nnx.split(layer)
        parts = {
            "predictor": lambda layer: layer.predictor(x),
            "interpolation": lambda layer: [
                c(jnp.ones((4, length, c.in_features))) for c in layer.core.interpolation
            ],
            "layer": lambda layer: layer(x, mask=jnp.ones((4, length)), capacity=capacity),
        }
        return {
            name: flops(lambda state, part=part: part(nnx.merge(graph, state, copy=True)), state)
            for name, part in parts.items()
        }

    capacity = int(np.ceil(1.1 * (1 - rate) * length))
    dense, gathered = work(length), work(capacity)
    fixed = dense["predictor"] + dense["interpolation"]
    expected = capacity / length * (dense["layer"] - fixed) + fixed
    assert abs(gathered["layer"] / expected - 1) < 0.15


# Where it runs.


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 4, 8])
@every_module
def test_batches_over_devices(make, call, devices):
    mesh = jax.make_mesh((devices,), ("data",), devices=jax.devices()[:devices])
    x = jnp.asarray(lattice(1, 8, N, D), jnp.float32)
    module = make(compute="gather", capacity=3)
    module.eval()
    expected = slopes(call, module, x, capacity=3)
    placed = jax.device_put(x, NamedSharding(mesh, P("data")))
    graph, state = nnx.split(module)
    module = nnx.merge(graph, jax.device_put(state, NamedSharding(mesh, P())))
    assert_alike(slopes(call, module, placed, capacity=3), expected)


def test_members_of_a_mapped_axis_choose_one_capacity():
    """Else the sum of their gradients, of what they share, would be in another branch of each."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    gate = make_gate(compute="gather", target=0.7)
    gate.eval()
    graph, weights, rest = nnx.split((gate, nnx.Linear(D, D, rngs=nnx.Rngs(1))), nnx.Param, ...)
    x = jnp.asarray(lattice(1, 4, N, D) + 2 * np.arange(4).reshape(4, 1, 1) - 3, jnp.float32)

    def loss(weights, x):
        gate, block = nnx.merge(graph, weights, rest, copy=True)
        return jnp.sum(jnp.sin(gate.run(block, x)))

    @jax.shard_map(mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
    def of_all(weights, x):
        return jax.lax.psum(loss(weights, x), "data")

    opened = np.sum(np.asarray(gate(x)), -1)
    assert opened.min() <= 3 < opened.max()
    assert_alike(jax.jit(jax.grad(of_all))(weights, x), jax.jit(jax.grad(loss))(weights, x))


@pytest.mark.slow
@every_module
def test_transformations(make, call):
    module = make(compute="gather", capacity=3)
    module.eval()
    graph, state = nnx.split(module)

    def apply(x):
        return call(nnx.merge(graph, state, copy=True), x, capacity=3)

    expected = apply(X)
    stacked = jnp.stack([X, X[::-1]])
    assert_alike(jax.vmap(apply)(stacked), jnp.stack([expected, expected[::-1]]))
    assert_alike(jax.checkpoint(apply)(X), expected)
    assert_alike(jax.lax.map(apply, stacked)[0], expected)
    tangents = jax.jvp(apply, (X,), (jnp.ones_like(X),))[1]
    assert jnp.all(jnp.isfinite(tangents))


# Bad input.


@every_module
@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"compute": "skip"}, ValueError, "compute must be one of 'mask', 'gather', got 'skip'"),
        ({"compute": "gather", "capacity": 0}, ValueError, "capacity must be .*got 0"),
        (
            {"compute": "gather", "capacity": N + 1},
            ValueError,
            f"capacity must be .*{N}, got {N + 1}",
        ),
        ({"compute": "gather", "capacity": 0.5}, TypeError, "capacity must be of type .*got 0.5"),
        ({"capacity": 3}, ValueError, "capacity is that of compute='gather', got 3"),
    ],
)
def test_bad_capacities(make, call, settings, error, message):
    with pytest.raises(error, match=message):
        call(make(**settings), X)


@every_module
def test_a_target_that_moves_needs_a_capacity(make, call):
    target = pj.anneal(0.0, 0.5, start=0, end=10)
    name = "target_sparsity" if make is make_layer else "target"
    with pytest.raises(ValueError, match="capacity= is needed where the target is no plain number"):
        make(compute="gather", **{name: target})
    module = make(compute="gather", capacity=4, **{name: target})
    assert call(module, X).shape == X.shape


@every_module
@pytest.mark.parametrize(("target", "room"), [(0.0, 8), (0.5, 5), (0.7, 3), (1.0, 1)])
def test_the_room_that_a_target_leaves(make, call, target, room):
    name = "target_sparsity" if make is make_layer else "target"
    module = make(compute="gather", **{name: target})
    assert module._room(N) == room
    assert call(module, X).shape == X.shape


@pytest.mark.parametrize("compute", ["mask", "gather"])
def test_bad_functions(compute):
    gate = make_gate(compute=compute)
    for function, like in (
        (lambda x: x.mean(1, keepdims=True), None),
        (lambda x: x[..., :1], None),
        (block, jnp.zeros(D)),
    ):
        with pytest.raises(ValueError, match=r"shape"):
            gate.run(function, X, like=like)
    with pytest.raises(ValueError, match=r"x must have the shape \[\*batch, positions, features\]"):
        gate.run(block, X[0, 0])


def test_bad_masks():
    layer = make_layer()
    with pytest.raises(ValueError, match=r"mask must be in \[0, 1\], got"):
        layer(X, mask=np.full((BATCH, N), 2.0))
    with pytest.raises(ValueError, match=r"same shape, got \(3,\) and \(3, 8\)"):
        layer(X, mask=jnp.ones(BATCH))
    with pytest.raises(ValueError, match="capacity must be from 1 to the number of positions"):
        layer(X, capacity=N + 1)
    mask = jnp.arange(N) % 2 == jnp.arange(BATCH)[:, None] % 2
    assert jnp.array_equal(layer(X, mask=mask), layer(X, mask=jnp.float32(mask)))
