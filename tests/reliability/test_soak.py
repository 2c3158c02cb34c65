"""Everything together for a long time: one program, flat memory, finite numbers; and counters."""

import itertools
import resource
from pathlib import Path
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import penalties_jax as pj
from penalties_jax.functional.importance import Count
from penalties_jax.schedules import Shape
from tests.catalogue import CONFIGS, EXAMPLES, SHAPE, inputs_of
from tests.oracles import lattice
from tests.programs import quick_jit
from tests.reliability.attacks import HARD

STEPS = 100_000 if HARD else 300
LARGEST = 2**31 - 1
PARAMS = {name: np.float32(lattice(seed, *SHAPE)) for seed, name in enumerate(("a", "b"))}
X, FEATURES = jnp.asarray(PARAMS["a"]), SHAPE[-1]


def annealed(first, last):
    return pj.anneal(first, last, start=0, end=STEPS, shape="cosine")


# Everything.

# In make test a term of each kind: to compile them all takes half a minute.
KINDS = ("l2-mean", "huber", "group_lasso", "kl_divergence", "Against", "SparsityTarget")
TERMS = {name: config for name, config in EXAMPLES.items() if HARD or name in KINDS}
INPUTS = {name: inputs_of(config) for name, config in TERMS.items()}


def forward(params, noise):
    """The inputs of every term, each moved by the parameters."""

    def moved(name, i, x):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        shift = (params["ab"[i]] + noise)[(0,) * (3 - x.ndim)]
        return CONFIGS[name].prepare(x + shift) if name in CONFIGS else x + shift

    return {
        f"{name} {i}": moved(name, i, x)
        for name, inputs in INPUTS.items()
        for i, x in enumerate(inputs)
    }


def term(name, penalty):
    keys = tuple(f"{name} {i}" for i in range(len(INPUTS[name])))
    return pj.Term(penalty, on=keys if len(keys) > 1 else keys[0], weight=annealed(0.01, 0.001))


def distance(outputs):
    return jnp.mean(jnp.square(outputs["huber 0"] - 1))


OBJECTIVE = pj.Objective(distance, {name: term(name, x) for name, x in TERMS.items()}, detail=True)
FROZEN = pj.Objective(
    terms={"kl": pj.Term(pj.KLDivergence(), on=("kl_divergence 0", "kl_divergence 1"))}
)


class Model(nnx.Module):
    """Modules of ours that count steps or record."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.gate = pj.nnx.SparsityGate(FEATURES, target=annealed(0.1, 0.6), rngs=rngs)
        self.activity = pj.nnx.ActivityPenalty(pj.SmoothL0(gamma=annealed(1.0, 0.1)))
        self.layer = pj.nnx.SparseMoEResNetBKLayer(FEATURES, SHAPE[1], dropout=0.0, rngs=rngs)
        self.loss = pj.nnx.Loss(pj.Objective(terms={"l2": pj.Term(pj.L2(), on="x")}))

    def __call__(self, x):
        x = self.activity(self.layer(x) * self.gate(x)[..., None])
        total, _ = self.loss({"x": x})
        return total + pj.nnx.collect_penalties(self)


class Linen(nn.Module):
    """The same for linen."""

    @nn.compact
    def __call__(self, x):
        x = pj.linen.SparsityGate(target=annealed(0.1, 0.6))(x)
        x = pj.linen.ActivityPenalty(pj.L1(), weight=annealed(1.0, 0.1))(x)
        return pj.linen.Loss(pj.Objective(terms={"l2": pj.Term(pj.L2(), on="x")}))({"x": x})[0]


LINEN = Linen()
DEFINITION, _ = nnx.split(Model())
ADAPTIVE = pj.AdaptiveSparsityScheduler(accuracy_threshold=2.0, remember=True)
ASCENT = pj.DualAscent(target=annealed(0.1, 0.6))
OPTIMIZER = optax.chain(
    pj.add_objective(FROZEN, forward, weight=annealed(0.1, 0.01), every=2, monitor=True),
    pj.add_penalty(pj.SmoothL0(gamma=annealed(1.0, 0.1)), 1e-3, mask={"a": True, "b": False}),
    optax.clip_by_global_norm(1.0),
    optax.scale_by_adam(),
    optax.inject_hyperparams(pj.add_penalty, static_args=("penalty", "mask"))(
        pj.L2(), weight=ASCENT.weight
    ),
    optax.scale_by_learning_rate(1e-3),
    pj.proximal(0.5 * pj.L1() + pj.L2(), 1e-3, weight=annealed(0.0, 1e-2), monitor=True),
)


def start():
    rngs = {"params": jax.random.key(0), "gate": jax.random.key(1)}
    return jax.tree.map(
        jnp.array,
        {
            "key": jax.random.key(2),
            "params": PARAMS,
            "optimizer": OPTIMIZER.init(PARAMS),
            "adaptive": ADAPTIVE.init(),
            "ascent": ASCENT.init(),
            "stats": pj.ImportanceStats.empty(PARAMS),
            "nnx": nnx.split(Model())[1],
            "linen": LINEN.init(rngs, X),
        },
    )


def step(state):
    """One step of training, and what is logged of it."""
    key, of_noise, of_gate = jax.random.split(state["key"], 3)
    noise = 0.1 * jax.random.normal(of_noise, SHAPE)
    count = state["adaptive"].count
    params = state["params"]

    def loss(params):
        return OBJECTIVE(forward(params, noise), step=count)

    (total, metrics), gradients = jax.value_and_grad(loss, has_aux=True)(params)
    rate = jnp.mean(jnp.abs(params["a"]) < 0.1)
    updates, optimizer = OPTIMIZER.update(
        gradients, state["optimizer"], params, batch=noise, rate=rate
    )
    model = nnx.merge(DEFINITION, state["nnx"])
    recorded = model(noise)
    pj.nnx.advance(model)
    linen, collections = LINEN.apply(
        state["linen"], noise, rngs={"gate": of_gate}, mutable=["penalties", "schedule"]
    )
    penalties, collections = pj.linen.collect_penalties(collections)
    batch = pj.ImportanceStats.from_batch(jax.tree.map(jnp.abs, params), pj.Lp(p=0.5))
    stats = state["stats"].merge(batch)
    control = ADAPTIVE(state["adaptive"], value=total)
    logged = {
        "metrics": metrics,
        "updates": optax.tree.norm(updates),
        "modules": (recorded, linen, penalties),
        "control": (control, ASCENT(state["ascent"])),
        "importance": stats.loss(beta=0.5),
    }
    return {
        "key": key,
        "params": optax.apply_updates(params, updates),
        "optimizer": optimizer,
        "adaptive": ADAPTIVE.update(state["adaptive"], value=total),
        "ascent": ASCENT.update(state["ascent"], rate=rate),
        "stats": stats,
        "nnx": nnx.state(model),
        "linen": state["linen"] | pj.linen.advance(collections),
    }, logged


def resident():
    """The bytes of memory that the process holds."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def test_every_step_is_as_the_first():
    """One trace; no array and no memory is kept; and what is logged is finite."""
    traces = []

    def traced(state):
        traces.append(None)
        return step(state)

    run = (jax.jit if HARD else quick_jit)(traced, donate_argnums=0)
    state, arrays, memory = start(), [], []
    for i in range(STEPS):
        state, logged = run(state)
        if i % (STEPS // 20) == STEPS // 20 - 1:
            for path, x in jax.tree.leaves_with_path((state["params"], logged)):
                assert np.isfinite(x).all(), jax.tree_util.keystr(path)
            arrays.append(len(jax.live_arrays()))
            memory.append(resident())
    assert len(traces) == 1
    assert pj.step_of(state["optimizer"]) == STEPS
    # From the fifth sample on: before, whatever is cached may still be on its way.
    assert max(arrays[4:]) == min(arrays[4:])
    assert max(memory[-4:]) - min(memory[4:8]) < 8 * 2**20


# Counters, at the largest integer.


def near_the_end(tree):
    """The tree with its steps at two before the largest one."""
    return jax.tree.map(
        lambda x: jnp.full_like(x, LARGEST - 2) if jnp.result_type(x) == jnp.int32 else x, tree
    )


def assert_at_the_end(tree):
    counts = [x for x in jax.tree.leaves(tree) if jnp.result_type(x) == jnp.int32]
    assert counts
    for count in counts:
        assert np.all(np.asarray(count) == LARGEST)


def is_finite(tree):
    return all(np.isfinite(x).all() for x in jax.tree.leaves(tree))


def test_transforms_count_up_to_the_end():
    gradients = jax.tree.map(jnp.ones_like, PARAMS)
    state = near_the_end(OPTIMIZER.init(PARAMS))
    update = quick_jit(OPTIMIZER.update)
    for _ in range(4):
        updates, state = update(
            gradients, state, PARAMS, batch=jnp.zeros(SHAPE), rate=jnp.float32(0.5)
        )
        assert is_finite(updates)
    assert_at_the_end(state)
    assert pj.step_of(state) == LARGEST


@pytest.mark.parametrize("controller", [ADAPTIVE, ASCENT, ASCENT.weight, ASCENT.target], ids=repr)
def test_controllers_count_up_to_the_end(controller):
    state = near_the_end(controller.init())
    for _ in range(4):
        state = controller.update(state, value=1.0, rate=0.5)
        assert is_finite(controller(state, value=1.0))
    assert_at_the_end(state)


@pytest.mark.parametrize("shape", get_args(Shape))
def test_schedules_at_the_end(shape):
    """Between two steps that are the last ones, or with all steps in between."""
    steps = jnp.int32([LARGEST - 2, LARGEST - 1, LARGEST])
    for start, end in itertools.pairwise([-(2**31), 0, LARGEST - 2, LARGEST]):
        values = pj.anneal(1.0, 0.5, start=start, end=end, shape=shape)(steps)
        assert np.all((values >= 0.5) & (values <= 1.0))
        assert np.all(np.diff(values) <= 0)
        assert values[-1] == 0.5


def test_nnx_modules_count_up_to_the_end():
    model = Model()
    pj.nnx.set_step(model, LARGEST - 2)
    for _ in range(4):
        assert is_finite(model(X))
        pj.nnx.advance(model)
    assert_at_the_end(nnx.state(model, pj.nnx.Step))


def test_linen_modules_count_up_to_the_end():
    rngs = {"params": jax.random.key(0), "gate": jax.random.key(1)}
    variables = pj.linen.set_step(LINEN.init(rngs, X), LARGEST - 2)
    for _ in range(4):
        total, changed = LINEN.apply(variables, X, rngs=rngs, mutable=["penalties", "schedule"])
        assert is_finite((total, changed))
        variables |= pj.linen.advance(changed)
    assert_at_the_end(variables["schedule"])


def test_positions_are_counted_beyond_the_end():
    stats = pj.ImportanceStats.from_batch(jnp.ones((10, 1)), pj.L1())
    high, low = divmod(LARGEST, 2**16)
    many = stats._replace(
        sums=jnp.float32([LARGEST]), counts=Count(jnp.int32(high), jnp.int32(low))
    )
    merged = many.merge(stats)
    assert int(merged.counts.high) * 2**16 + int(merged.counts.low) == LARGEST + 10
    assert float(merged.loss().sparsity) == pytest.approx(1.0)
