"""Every idiom of NNX on every module: a table, and what is set, saved and counted."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import penalties_jax as pj
from tests.oracles import assert_close, lattice
from tests.programs import quick_jit

X = jnp.asarray(lattice(0, 2, 6, 4), jnp.float32)
RISE = pj.anneal(0.0, 1.0, start=0, end=4)


def objective():
    penalty = 0.5 * (pj.L1() + 2 * pj.SmoothL0(gamma=1.0))
    return pj.Objective(terms={"l1": pj.Term(penalty, on="x", weight=RISE)})


class Loss(pj.nnx.Loss):
    """The same of one array, which is what all modules here are called with."""

    def __init__(self, rngs):
        super().__init__(objective())

    def __call__(self, x):
        return x * super().__call__({"x": x})[0]


MODULES = {
    "Loss": Loss,
    "ActivityPenalty": lambda rngs: pj.nnx.ActivityPenalty(pj.L1() + pj.L2(), weight=RISE),
    "SparsityGate": lambda rngs: pj.nnx.SparsityGate(4, target=RISE, rngs=rngs),
    "SparseMoEResNetBKLayer": lambda rngs: pj.nnx.SparseMoEResNetBKLayer(
        4, 6, num_experts=2, sparsity_loss_weight=RISE, rngs=rngs
    ),
    "gathered SparseMoEResNetBKLayer": lambda rngs: pj.nnx.SparseMoEResNetBKLayer(
        4, 6, num_experts=2, compute="gather", capacity=3, rngs=rngs
    ),
    "SparseBKCore": lambda rngs: pj.nnx.SparseBKCore(6, rngs=rngs),
    "AdaptiveDepth": lambda rngs: pj.nnx.AdaptiveDepth(
        nnx.Linear(4, 4, rngs=rngs), 3, 4, weight=RISE, rngs=rngs
    ),
    "PonderNet": lambda rngs: pj.nnx.AdaptiveDepth(
        nnx.Linear(4, 4, rngs=rngs), 3, 4, penalty=pj.PonderDivergence(RISE), rngs=rngs
    ),
}


class Model(nnx.Module):
    """A layer with parameters, and one of ours."""

    def __init__(self, name, rngs):
        self.linear = nnx.Linear(4, 4, rngs=rngs)
        self.ours = MODULES[name](rngs)

    def __call__(self, x):
        x = self.linear(x)
        if isinstance(self.ours, pj.nnx.SparseBKCore):
            return x + jnp.mean(self.ours(x[..., 0], jnp.ones(x.shape[:2])), -1, keepdims=True)
        y = self.ours(x)
        return x * jnp.reshape(y, (*y.shape, *(1,) * (x.ndim - y.ndim)))


def make(name):
    model = Model(name, nnx.Rngs(0))
    pj.nnx.set_step(model, 2)
    return model


def values(module):
    """All that its variables hold, random keys as numbers."""
    flat = nnx.to_flat_state(nnx.state(module))
    held = {path: variable[...] for path, variable in flat}
    return {
        path: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        for path, x in held.items()
    }


def assert_same(module, other):
    held, expected = values(module), values(other)
    assert held.keys() == expected.keys()
    for path, x in expected.items():
        assert np.array_equal(held[path], x, equal_nan=True), path


def total(model, x):
    return jnp.sum(model(x) ** 2) + pj.nnx.collect_penalties(model)


# The table. Each is an idiom, of a model that it may change, and of one like it to compare with.


def update(name, model, same):
    nnx.update(model, jax.tree.map(jnp.copy, nnx.state(model)))
    assert_same(model, same)


def split_and_merge(name, model, same):
    definition, params, ours, rest = nnx.split(model, nnx.Param, pj.nnx.Number, ...)
    merged = nnx.merge(definition, params, ours, rest)
    assert_same(merged, same)
    assert definition == nnx.split(same)[0]
    assert hash(definition) == hash(nnx.split(same)[0])
    assert not jax.tree.leaves(nnx.filter_state(ours, nnx.Param))


def clone_and_iter_graph(name, model, same):
    copy = nnx.clone(model)
    kinds = {type(node) for _, node in nnx.iter_graph(copy)}
    assert type(copy.ours) in kinds
    if name != "SparseBKCore":
        assert {pj.nnx.Number, pj.nnx.Step} < kinds
    pj.nnx.advance(copy)
    assert_same(model, same)


def no_array_outside_of_variables(name, model, same):
    leaves = jax.tree.leaves(model, is_leaf=lambda node: isinstance(node, nnx.Variable))
    assert all(isinstance(leaf, nnx.Variable) for leaf in leaves)


def cached_partial_and_optimizer(name, model, same):
    """As trainers do: jit, gradients by parameters, and a step of nothing else."""
    optimizer = nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param)
    traces = []

    @nnx.jit
    def train_step(model, optimizer, x):
        traces.append(None)
        pj.nnx.set_step(model, optimizer.step[...])
        value, gradient = nnx.value_and_grad(total)(model, x)
        assert {type(variable) for _, variable in nnx.to_flat_state(gradient)} == {nnx.Param}
        optimizer.update(model, gradient)
        return value

    cached = nnx.cached_partial(train_step, model, optimizer)
    for _ in range(2):
        cached(X)
    assert len(traces) == 1
    for kind in (pj.nnx.Number, pj.nnx.PenaltyValue):
        before, after = (nnx.to_flat_state(nnx.state(m, kind)) for m in (same, model))
        for (path, x), (_, y) in zip(before, after, strict=True):
            assert np.array_equal(x[...], y[...]), path
    assert not np.array_equal(model.linear.kernel[...], same.linear.kernel[...])


def remat(name, model, same):
    def gradient(model):
        return nnx.grad(lambda model: jnp.sum(nnx.remat(Model.__call__)(model, X) ** 2))(model)

    shapes = jax.tree.map(jnp.shape, nnx.eval_shape(gradient, model))
    assert shapes == jax.tree.map(jnp.shape, nnx.state(same, nnx.Param))


def scan_over_a_stack(name, model, same):
    @nnx.split_rngs(splits=2)
    @nnx.vmap
    def stack(rngs):
        return Model(name, rngs)

    def run():
        layers = stack(nnx.Rngs(0))
        pj.nnx.set_step(layers, 2)
        scan = nnx.scan(lambda x, one: one(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        each = nnx.vmap(lambda one, x: one(x), in_axes=(0, None))(layers, scan(X, layers))
        return layers, each

    layers, each = nnx.eval_shape(run)
    assert each.shape == (2, *X.shape)
    ours = nnx.to_flat_state(nnx.state(layers, (pj.nnx.Number, pj.nnx.Step)))
    assert all(variable.shape == (2,) for _, variable in ours)


def save_and_restore(name, model, same, folder):
    """Into an abstract model, as on another mesh."""
    abstract = nnx.eval_shape(lambda: Model(name, nnx.Rngs(0)))
    definition, state = nnx.split(abstract)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "state", nnx.state(model))
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(folder / "state", state)
    nnx.update(abstract, restored)
    for module in (abstract, nnx.merge(definition, restored)):
        assert_same(module, same)
        assert nnx.split(module)[0] == nnx.split(same)[0]


def sharded_initialisation(name, model, same):
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))

    def create():
        model = make(name)
        state = nnx.state(model)
        specs = nnx.get_partition_spec(state)
        nnx.update(model, jax.lax.with_sharding_constraint(state, specs))
        return model

    with jax.set_mesh(mesh):
        abstract = nnx.eval_shape(create)
        shardings = nnx.get_named_sharding(nnx.state(abstract), mesh)
        nnx.update(abstract, jax.device_put(nnx.state(model), shardings))
        pj.nnx.advance(abstract)
    pj.nnx.advance(same)
    assert_same(abstract, same)
    assert {len(x.sharding.device_set) for x in jax.tree.leaves(nnx.state(abstract))} == {2}


def lora(name, model, same):
    model.linear = nnx.LoRA(4, 2, 4, base_module=model.linear, rngs=nnx.Rngs(1))
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.LoRAParam)

    def train_step(model, optimizer):
        gradient = nnx.grad(total, argnums=nnx.DiffState(0, nnx.LoRAParam))(model, X)
        optimizer.update(model, gradient)
        return gradient

    gradient = nnx.eval_shape(train_step, model, optimizer)
    assert gradient.keys() == {"linear"}
    assert gradient["linear"].keys() == {"lora_a", "lora_b"}
    kept = nnx.state(model, (pj.nnx.Number, pj.nnx.Step))
    assert kept == nnx.state(same, (pj.nnx.Number, pj.nnx.Step))


def evaluation(name, model, same):
    model.eval()
    definition, state = nnx.split(model)

    @quick_jit
    def call(state):
        model = nnx.merge(definition, state)
        model(X)
        return nnx.state(model)

    nnx.update(model, call(state))
    model.train()
    assert nnx.split(model)[0] == nnx.split(same)[0]
    before, after = values(same), values(model)
    changed = {path[-1] for path, x in before.items() if not np.array_equal(x, after[path])}
    assert changed <= {"computed", "depth", "dropped", "rate"}


def with_debug_nans(name, model, same):
    with jax.debug_nans(True):
        nnx.jit(total)(Model(name, nnx.Rngs(0)), X)


IDIOMS = [
    update,
    split_and_merge,
    clone_and_iter_graph,
    no_array_outside_of_variables,
    cached_partial_and_optimizer,
    remat,
    scan_over_a_stack,
    save_and_restore,
    sharded_initialisation,
    lora,
    evaluation,
    with_debug_nans,
]


def cells():
    """One each; a compiled gradient of the whole layer is left to make test-slow."""
    for idiom, name in itertools.product(IDIOMS, MODULES):
        slow = idiom in (cached_partial_and_optimizer, with_debug_nans) and "SparseMoE" in name
        marks = pytest.mark.slow if slow else ()
        yield pytest.param(idiom, name, id=f"{idiom.__name__}-{name}", marks=marks)


@pytest.mark.parametrize(("idiom", "name"), [*cells()])
def test_idiom(idiom, name, tmp_path):
    more = {"folder": tmp_path} if idiom is save_and_restore else {}
    idiom(name, make(name), make(name), **more)


# What is set.


def test_numbers_are_set_in_place():
    """In range, and without a new program."""
    gate = pj.nnx.SparsityGate(4, rngs=nnx.Rngs(0))
    layer = pj.nnx.SparseMoEResNetBKLayer(4, 6, num_experts=2, rngs=nnx.Rngs(0))
    penalised = pj.nnx.ActivityPenalty(pj.L1())
    for module, name, wrong in [
        (gate, "target", 1.5),
        (gate, "weight", -1.0),
        (gate, "temperature", 0),
        (gate, "temperature", pj.anneal(1.0, 0.0, start=0, end=1)),
        (layer, "target_sparsity", -0.5),
        (layer, "sparsity_loss_weight", -1.0),
        (layer, "temperature", 0.0),
        (penalised, "weight", jnp.nan),
    ]:
        definition, state = nnx.split(module)
        for value in (0.25, jnp.float32(0.75), np.float32(0.5), 1):
            setattr(module, name, value)
            assert float(getattr(module, name)) == value
        shown = "target" if name == "target_sparsity" else name
        with pytest.raises(ValueError, match=f"{shown} must be"):
            setattr(module, name, wrong)
        assert float(getattr(module, name)) == 1
        assert nnx.split(module)[0] == definition
        types = (jax.tree.map(jax.typeof, nnx.state(module)), jax.tree.map(jax.typeof, state))
        assert types[0] == types[1]


def test_a_schedule_in_place_of_a_number():
    gate = pj.nnx.SparsityGate(4, kind="l2", weight=2.0, rngs=nnx.Rngs(0))
    gate.target = RISE
    assert gate.target == RISE
    for options, target in (({}, 0.0), ({"step": 4}, 1.0), ({"step": jnp.int32(2)}, 0.5)):
        gate(X, **options)
        rate = float(gate.rate[...])
        assert_close(pj.nnx.collect_penalties(gate), 2 * (rate - target) ** 2, atol=1e-6)
    pj.nnx.set_step(gate, 3)
    gate(X)
    rate = float(gate.rate[...])
    assert_close(pj.nnx.collect_penalties(gate), 2 * (rate - 0.75) ** 2)
    gate.target = 0.5
    assert float(gate.target) == 0.5
    layer = MODULES["SparseMoEResNetBKLayer"](nnx.Rngs(0))
    layer.target_sparsity = RISE
    layer.rate[...] = jnp.float32(0.75)
    pj.nnx.set_step(layer, 2)
    assert float(layer.get_sparsity_stats()["target_sparsity"]) == 0.5
    assert_close(layer.get_sparsity_loss(), pj.sparsity_target_loss(0.75, 0.5, kind="adaptive"))
    assert float(layer.get_balanced_loss(jnp.float32(1))[1]["sparsity_weight"]) == 0.5


def test_another_config_in_place_of_one():
    penalised = pj.nnx.ActivityPenalty(pj.L1(), weight=0.5)
    penalised.penalty = pj.L2() + pj.L1()
    penalised(jnp.array([1.0, -3.0]))
    assert float(pj.nnx.collect_penalties(penalised)) == 0.5 * (10 + 4)
    with pytest.raises(TypeError, match="one input"):
        penalised.penalty = pj.KLDivergence()
    loss = pj.nnx.Loss(objective())
    loss.objective = loss.objective.with_weight("l1", 2.0).replace("l1", scale=1.0)
    assert_close(loss({"x": jnp.ones(3)})[0], 2 * (3 + 2 * 1.5))


def test_numbers_of_a_stack_are_set_together():
    gates = nnx.vmap(lambda weight: pj.nnx.ActivityPenalty(pj.L1(), weight))(jnp.arange(3.0))
    assert gates.weight.tolist() == [0, 1, 2]
    gates.weight = 0.5
    assert gates.weight.tolist() == [0.5, 0.5, 0.5]


# The step.


def test_the_step_is_that_of_all_modules():
    model = nnx.List([make("Loss"), make("ActivityPenalty"), make("SparsityGate")])
    pj.nnx.advance(model)
    pj.nnx.advance(model)
    assert [int(one.ours.step[...]) for one in model] == [4, 4, 4]
    nnx.jit(pj.nnx.set_step)(model, jnp.int32(7))
    assert [int(one.ours.step[...]) for one in model] == [7, 7, 7]
    shared = nnx.List([model[0], model[0]])
    pj.nnx.advance(shared)
    assert int(model[0].ours.step[...]) == 8
    pj.nnx.advance(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))


def test_a_loss_counts_in_training_only():
    loss = pj.nnx.Loss(pj.Objective(terms={"l1": pj.Term(pj.L1(), on="x", weight=RISE)}))
    outputs = {"x": jnp.ones(4)}
    values = []
    for _ in range(3):
        values.append(float(loss(outputs)[0]))
        loss.eval()
        assert float(loss(outputs)[0]) == float(loss(outputs)[0]) == values[-1] + 1
        loss.train()
        loss(outputs, advance=False)
        loss(outputs, step=100)
    assert values == [0, 1, 2]


def test_a_module_owns_its_numbers():
    """So that giving it away leaves what it was made of."""
    reference = jnp.ones(3)
    penalised = pj.nnx.ActivityPenalty(pj.Consistency().against(reference))
    nnx.jit(lambda module, x: module(x), donate_argnums=0)(penalised, jnp.zeros(3))
    assert not reference.is_deleted()


def test_schedules_are_set_on_stacked_modules():
    stacked = nnx.vmap(lambda _: pj.nnx.ActivityPenalty(pj.L1(), weight=0.5))(jnp.arange(3))
    stacked.weight = pj.anneal(0.0, 1.0, start=0, end=2)
    pj.nnx.set_step(stacked, 1)
    nnx.scan(lambda m, x: m(x), in_axes=(0, nnx.Carry), out_axes=nnx.Carry)(stacked, jnp.ones(4))
    assert float(pj.nnx.collect_penalties(stacked)) == 6.0


def test_a_threshold_that_has_learned_does_not_widen():
    with jax.enable_x64():
        gate = pj.nnx.SparsityGate(4, gate=pj.JumpReLUGate(0.1), rngs=nnx.Rngs(0))
        x = jnp.ones((2, 4), jnp.float32)
        optimizer = nnx.Optimizer(gate, optax.sgd(0.1), wrt=nnx.Param)
        optimizer.update(gate, nnx.grad(lambda gate: jnp.mean(gate(x)))(gate))
        assert gate(x).dtype == gate.gate.threshold.dtype == jnp.float32
