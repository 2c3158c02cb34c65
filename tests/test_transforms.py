"""The optax transformations against chains computed by hand, in optax's wrappers, and sharded."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from optax._src.base import NO_PARAMS_MSG
from sklearn import linear_model
from sklearn.datasets import load_diabetes

import penalties_jax as pj
from tests.oracles import assert_close, lattice
from tests.programs import doubles, jit_once

PARAMS = {
    "kernel": lattice(0, 4, 3).astype(np.float32),
    "bias": lattice(1, 3).astype(np.float32),
    "absent": None,
}
GRADIENTS = jax.tree.map(lambda x: 0.25 * x[::-1] + 1, PARAMS)


def updates_of(optimizer, params=PARAMS, gradients=GRADIENTS, steps=1):
    """The updates of the last of some steps at the same parameters."""

    def step(state, _):
        updates, state = optimizer.update(gradients, state, params)
        return state, updates

    def run(params):
        return jax.lax.scan(step, optimizer.init(params), length=steps)[1]

    updates = jax.jit(run)(params)
    return jax.tree.map(lambda x: np.asarray(x[-1]), updates)


def assert_trees_close(actual, desired, **tolerances):
    assert jax.tree.structure(actual) == jax.tree.structure(desired)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(desired), strict=True):
        assert_close(a, np.asarray(b, np.float64), **tolerances)


def plus(factor, term=np.sign):
    """The gradients, and a gradient of a penalty by hand."""
    return jax.tree.map(lambda g, p: g + factor * term(p), GRADIENTS, PARAMS)


# Chains by hand.


def test_after_and_before_a_learning_rate():
    chain = optax.chain(pj.add_penalty(pj.L1(), weight=0.5), optax.scale_by_learning_rate(0.1))
    expected = jax.tree.map(lambda g: -0.1 * g, plus(0.5))
    assert_trees_close(updates_of(chain), expected)


@pytest.mark.parametrize(
    ("penalty", "factor", "term"),
    [
        (pj.L1(reduction="mean"), 0.5 / 15, np.sign),
        (3 * pj.L2(), 3.0, lambda p: p),
        (pj.SmoothL0(gamma=0.5), 0.5 * 0.5, lambda p: p / (p**2 + 0.25) ** 2),
        (pj.L2(weights={"kernel": 1.0, "bias": 1.0, "absent": None}), 1.0, lambda p: p),
    ],
    ids=["mean over all parameters", "scaled", "smooth l0", "tree of weights"],
)
def test_the_gradient_of_the_penalty(penalty, factor, term):
    assert_trees_close(updates_of(pj.add_penalty(penalty, weight=0.5)), plus(factor * 1.0, term))


def test_l2_is_weight_decay():
    for before, after in [
        (optax.identity(), optax.scale_by_adam()),
        (optax.scale_by_adam(), optax.identity()),
    ]:
        ours = optax.chain(before, pj.add_penalty(pj.L2(), weight=0.05), after, optax.scale(-0.1))
        theirs = optax.chain(before, optax.add_decayed_weights(0.1), after, optax.scale(-0.1))
        assert_trees_close(updates_of(ours, steps=3), updates_of(theirs, steps=3), rtol=1e-6)


def test_coupled_and_decoupled():
    adam = optax.scale_by_adam()
    coupled = optax.chain(pj.add_penalty(pj.L1(), weight=0.5), adam)
    assert_trees_close(
        updates_of(coupled, steps=3), updates_of(adam, gradients=plus(0.5), steps=3), rtol=1e-6
    )
    decoupled = optax.chain(adam, pj.add_penalty(pj.L1(), weight=0.5))
    plain = updates_of(adam, steps=3)
    expected = jax.tree.map(lambda u, p: u + 0.5 * np.sign(p), plain, PARAMS)
    assert_trees_close(updates_of(decoupled, steps=3), expected, rtol=1e-6)


def test_a_center_of_parameters():
    start = jax.tree.map(lambda p: p - 0.5, PARAMS)
    assert_trees_close(
        updates_of(pj.add_penalty(pj.L2(center=start), weight=2.0)), plus(2.0, np.ones_like)
    )


@pytest.mark.parametrize("factor", [1.0, 0.25])
def test_proximal_is_a_proximal_step(factor):
    penalty, weight = factor * pj.L1(weights={"kernel": 1.0, "bias": 2.0, "absent": None}), 3.0
    chain = optax.chain(optax.sgd(0.1), pj.proximal(penalty, 0.1, weight))
    after = optax.apply_updates(PARAMS, updates_of(chain))
    for name, strength in [("kernel", 1.0), ("bias", 2.0)]:
        moved = PARAMS[name] - 0.1 * GRADIENTS[name]
        threshold = 0.1 * weight * factor * strength
        expected = np.sign(moved) * np.maximum(np.abs(moved) - threshold, 0)
        assert_close(after[name], expected, rtol=1e-5, atol=1e-7)
        assert (np.asarray(after[name])[expected == 0] == 0).all()


# Schedules and counts.


@pytest.mark.parametrize("schedule", [pj.anneal(0, 1, start=0, end=4), lambda count: count / 4])
def test_schedules_count_the_steps(schedule):
    for steps, weight in [(1, 0), (2, 0.25), (4, 0.75)]:
        by_weight = pj.add_penalty(pj.L1(), weight=schedule)
        by_penalty = pj.add_penalty(schedule * pj.L1())
        for optimizer in (by_weight, by_penalty):
            assert_trees_close(updates_of(optimizer, steps=steps), plus(weight))


def test_schedules_of_the_proximal_step():
    optimizer = pj.proximal(
        pj.L1() * pj.anneal(1, 3, start=0, end=2),
        learning_rate=pj.anneal(0.1, 0.2, start=0, end=1),
        weight=pj.anneal(1.0, 0.0, start=2, end=3),
    )
    zero = jnp.zeros(1)
    shrinkage = [
        float(-updates_of(optimizer, jnp.full(1, 8.0), zero, steps)[0]) for steps in (1, 2, 3, 4)
    ]
    assert_close(shrinkage, [0.1, 0.4, 0.6, 0], rtol=1e-5)


def test_the_state_is_a_count():
    for optimizer in (pj.add_penalty(pj.L1()), pj.proximal(pj.L1(), 0.1)):
        state = optimizer.init(PARAMS)
        assert [leaf.dtype for leaf in jax.tree.leaves(state)] == [jnp.int32]
        update = jax.jit(lambda state, one=optimizer: one.update(GRADIENTS, state, PARAMS)[1])
        for expected in range(3):
            assert int(state.count) == expected
            state = update(state)
        last = state._replace(count=jnp.int32(2**31 - 1))
        assert int(update(last).count) == 2**31 - 1


# Masks.

ONLY_KERNEL = {"kernel": True, "bias": False, "absent": None}


@pytest.mark.parametrize(
    "masked",
    [
        lambda make: make(mask=ONLY_KERNEL),
        lambda make: make(mask=lambda params: jax.tree.map(lambda p: p.ndim == 2, params)),
        lambda make: optax.masked(make(), ONLY_KERNEL),
    ],
    ids=["tree", "callable", "optax.masked"],
)
def test_masks(masked):
    def coupled(**mask):
        return pj.add_penalty(pj.L1(reduction="mean"), 6.0, **mask)

    updates = updates_of(masked(coupled))
    assert_close(updates["kernel"], plus(0.5)["kernel"])
    np.testing.assert_array_equal(updates["bias"], GRADIENTS["bias"])

    def proximal(**mask):
        return pj.proximal(pj.L1(), 1.0, weight=100.0, **mask)

    updates = updates_of(masked(proximal))
    np.testing.assert_array_equal(updates["kernel"], -PARAMS["kernel"])
    np.testing.assert_array_equal(updates["bias"], GRADIENTS["bias"])


def test_a_mask_and_a_tree_of_numbers():
    weights = {"kernel": 0.5, "bias": 7.0, "absent": None}
    center = {"kernel": PARAMS["kernel"] - 1, "bias": PARAMS["bias"], "absent": None}
    penalty = pj.L2(center=center, weights=weights)
    updates = updates_of(pj.add_penalty(penalty, mask=ONLY_KERNEL))
    assert_close(updates["kernel"], GRADIENTS["kernel"] + 1)
    np.testing.assert_array_equal(updates["bias"], GRADIENTS["bias"])


# Leaves of every kind.


@pytest.mark.parametrize("make", [pj.add_penalty, lambda penalty: pj.proximal(penalty, 1.0)])
def test_what_is_not_floating_passes_through(make):
    params = {
        "float": jnp.array([4.0, -4.0]),
        "int": jnp.array([3, -3]),
        "bool": jnp.array([True]),
        "key": jax.random.key(0),
        "none": None,
        "masked": optax.MaskedNode(),
    }
    gradients = {**params, "float": jnp.zeros(2), "int": jnp.array([1, 1])}
    optimizer = make(pj.L1(reduction="mean") * 4.0)
    updates, _ = jax.jit(optimizer.update)(gradients, optimizer.init(params), params)
    assert jax.tree.structure(updates) == jax.tree.structure(gradients)
    assert np.abs(updates["float"]).tolist() == [2, 2]
    assert updates["int"].tolist() == [1, 1]
    assert updates["bool"].tolist() == [True]
    assert updates["key"] == gradients["key"]


@pytest.mark.parametrize("make", [pj.add_penalty, lambda penalty: pj.proximal(penalty, 1.0)])
def test_updates_that_are_not_there(make):
    params = {"a": jnp.array([4.0]), "b": jnp.array([4.0])}
    optimizer = make(pj.L1())
    updates, _ = optimizer.update({"a": None, "b": jnp.zeros(1)}, optimizer.init(params), params)
    assert updates["a"] is None
    assert np.abs(updates["b"]).tolist() == [1]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("weight", [0.5, np.float32(0.5), pj.anneal(0.5, 1.0, start=5, end=9)])
def test_dtypes_are_kept(dtype, weight):
    params = jnp.array([2.0, -2.0, 0.0, 0.125], dtype)
    gradients = jnp.zeros(4, dtype)
    optimizer = optax.chain(pj.add_penalty(pj.L1(), weight), optax.sgd(1.0))
    updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    assert updates.dtype == dtype
    assert updates.tolist() == [-0.5, 0.5, 0, -0.5]
    optimizer = pj.proximal(pj.L1(), 1.0, weight)
    updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    assert updates.dtype == dtype
    assert optax.apply_updates(params, updates).tolist() == [1.5, -1.5, 0, 0]


@pytest.mark.parametrize("number", [0.5, pj.anneal(0.0, 1.0, start=0, end=4)])
def test_python_numbers_never_widen(number, x64):
    params = {"w": jnp.ones(3, jnp.float32)}
    for transformation in (
        pj.add_penalty(pj.Huber(delta=0.5), weight=number),
        pj.proximal(pj.L1(weights=0.5), number, weight=0.5, monitor=True),
        pj.add_objective(SLOPE, lambda params, batch: {"y": params["w"] * batch}, number),
    ):
        state = transformation.init(params)

        def step(carry, _, transformation=transformation):
            params, state = carry
            updates, state = transformation.update(params, state, params, batch=0.5)
            return (optax.apply_updates(params, updates), state), updates

        carry, updates = jax.lax.scan(step, (params, state), length=2)
        assert doubles((carry, updates)) == []


def test_float64():
    with jax.enable_x64(True):
        params = jnp.array([1 / 3])
        optimizer = pj.add_penalty(pj.L2(), weight=0.5)
        updates, _ = optimizer.update(jnp.zeros(1), optimizer.init(params), params)
        assert updates.dtype == jnp.float64
        assert float(updates[0]) == 1 / 3


# Optax's wrappers.


def test_multi_transform():
    optimizer = optax.multi_transform(
        {"l1": pj.add_penalty(pj.L1(), 0.5), "prox": pj.proximal(pj.L1(), 1.0, 100.0)},
        {"kernel": "l1", "bias": "prox", "absent": "l1"},
    )
    updates = updates_of(optimizer, steps=2)
    assert_close(updates["kernel"], plus(0.5)["kernel"])
    np.testing.assert_array_equal(updates["bias"], -PARAMS["bias"])


def test_multi_steps():
    chain = optax.chain(pj.add_penalty(pj.L1(), pj.anneal(1, 2, start=0, end=1)), optax.scale(-1.0))
    optimizer = optax.MultiSteps(chain, every_k_schedule=3)
    zeros = jax.tree.map(np.zeros_like, GRADIENTS)
    assert_trees_close(updates_of(optimizer, steps=2), zeros)
    assert_trees_close(updates_of(optimizer, steps=3), jax.tree.map(lambda g: -g, plus(1.0)))
    assert_trees_close(updates_of(optimizer, steps=6), jax.tree.map(lambda g: -g, plus(2.0)))
    proximal = optax.MultiSteps(pj.proximal(pj.L1(), 1.0, 100.0), every_k_schedule=2)
    assert_trees_close(updates_of(proximal, steps=1), zeros)
    assert_trees_close(updates_of(proximal, steps=2), jax.tree.map(lambda p: -p, PARAMS))


@pytest.mark.parametrize("make", [pj.add_penalty, lambda penalty: pj.proximal(penalty, 1.0)])
def test_apply_if_finite(make):
    optimizer = optax.apply_if_finite(make(pj.L1()), max_consecutive_errors=5)
    params = jnp.array([4.0, -4.0])
    update = jax.jit(optimizer.update)
    updates, state = update(jnp.array([jnp.nan, 0.0]), optimizer.init(params), params)
    assert updates.tolist() == [0, 0]
    assert int(state.inner_state.count) == 0
    updates, state = update(jnp.zeros(2), state, params)
    assert np.abs(updates).tolist() == [1, 1]
    assert int(state.inner_state.count) == 1


@pytest.mark.parametrize(
    "weight", [0.5, jnp.float32(0.5), pj.anneal(0.5, 1.0, start=0, end=4), lambda count: 0.5]
)
def test_inject_hyperparams(weight):
    make = optax.inject_hyperparams(pj.add_penalty, static_args=("penalty", "mask"))
    optimizer = make(penalty=pj.L1(), weight=weight, mask=ONLY_KERNEL)
    state = optimizer.init(PARAMS)
    update = jit_once(optimizer.update)
    updates, state = update(GRADIENTS, state, PARAMS)
    assert_close(updates["kernel"], plus(0.5)["kernel"])
    assert_close(updates["bias"], GRADIENTS["bias"])
    assert float(state.hyperparams["weight"]) == 0.5
    if not callable(weight):
        state.hyperparams["weight"] = jnp.float32(2)
        updates, state = update(GRADIENTS, state, PARAMS)
        assert_close(updates["kernel"], plus(2.0)["kernel"])
    else:
        updates, state = update(GRADIENTS, state, PARAMS)
        expected = 0.625 if isinstance(weight, type(pj.anneal(0, 1, start=0, end=1))) else 0.5
        assert_close(updates["kernel"], plus(expected)["kernel"])


def test_inject_hyperparams_of_the_proximal_step():
    make = optax.inject_hyperparams(pj.proximal, static_args=("penalty", "mask"))
    optimizer = make(pj.L1(), learning_rate=pj.anneal(1.0, 2.0, start=0, end=1), weight=0.125)
    params = {**PARAMS, "kernel": jnp.full((4, 3), 8.0)}
    for steps, expected in [(1, -0.125), (2, -0.25)]:
        updates = updates_of(optimizer, params, jax.tree.map(jnp.zeros_like, params), steps)
        assert_close(updates["kernel"], np.full((4, 3), expected))


@pytest.mark.parametrize("name", ["add_penalty", "proximal"])
@pytest.mark.parametrize(
    "penalty", [pj.l1, 0.5, None, jnp.ones(3), pj.L1, pj.anneal(1, 2, start=0, end=1)]
)
def test_what_is_not_a_config(name, penalty):
    settings = {"learning_rate": 0.1} if name == "proximal" else {}
    hint = re.escape(f'inject_hyperparams(pj.{name}, static_args=("penalty", "mask"))')
    with pytest.raises(TypeError, match=hint):
        getattr(pj, name)(penalty, **settings)


def test_inject_hyperparams_without_static_args():
    optimizer = optax.inject_hyperparams(pj.add_penalty)(penalty=pj.L1(), weight=0.5)
    with pytest.raises(TypeError, match=r'static_args=\("penalty", "mask"\)'):
        optimizer.update(GRADIENTS, optimizer.init(PARAMS), PARAMS)


@pytest.mark.parametrize("mask", [None, ONLY_KERNEL])
def test_parameters_are_required(mask):
    message = re.escape(NO_PARAMS_MSG)
    for optimizer in (pj.add_penalty(pj.L1(), mask=mask), pj.proximal(pj.L1(), 0.1, mask=mask)):
        with pytest.raises(ValueError, match=message):
            optimizer.update(GRADIENTS, optimizer.init(PARAMS))
    with pytest.raises(ValueError, match=message):
        optax.add_decayed_weights(0.1).update(GRADIENTS, optax.EmptyState(), None)


@pytest.mark.parametrize(
    "penalty", [pj.KLDivergence(), 0.1 * pj.Consistency(), pj.L1() + 2 * pj.KLEstimate()], ids=repr
)
def test_penalties_of_two_inputs(penalty):
    for make in (pj.add_penalty, lambda penalty: pj.proximal(penalty, 0.1)):
        with pytest.raises(TypeError, match=r"^pj\.\w+ takes a penalty of one input, and .* 2: "):
            make(penalty)
    for make in (pj.nnx.ActivityPenalty, pj.linen.ActivityPenalty):
        with pytest.raises(TypeError, match=r"^ActivityPenalty takes a penalty of one input"):
            make(penalty)


def test_no_proximal_operator():
    optimizer = pj.proximal(pj.SmoothL0(gamma=1.0), 0.1)
    with pytest.raises(NotImplementedError, match="proximal operator"):
        optimizer.update(GRADIENTS, optimizer.init(PARAMS), PARAMS)


def test_a_penalty_that_is_not_a_scalar():
    optimizer = pj.add_penalty(pj.L1(reduction="none"))
    with pytest.raises((TypeError, ValueError), match="scalar"):
        optimizer.update(GRADIENTS, optimizer.init(PARAMS), PARAMS)


# Objectives of outputs.

SLOPE = pj.Objective(loss=lambda outputs: jnp.sum(outputs["y"]))
SCALED = pj.Objective(
    terms={"y": pj.Term(pj.L2(), on="y", weight=pj.anneal(0.0, 8.0, start=0, end=8))}
)


def scaled(params, batch):
    return {"y": jax.tree.map(lambda p: p * batch, params)}


def kl_by_hand(kernel, batch):
    log_p, log_q = (jax.nn.log_softmax(batch @ w) for w in (kernel, lattice(9, 4, 5)))
    return jnp.mean(jnp.sum(jnp.exp(log_p) * (log_p - log_q), -1))


def model(kernel, batch):
    outputs = (jax.nn.log_softmax(batch @ w) for w in (kernel, lattice(9, 4, 5)))
    return dict(zip(("logprobs", "reference"), outputs, strict=True))


@pytest.mark.parametrize("microbatches", [1, 2])
def test_a_divergence_ends_where_it_does_in_the_loss(microbatches, x64):
    """Over 100 steps of SGD, whose microbatches' gradients differ in size."""
    sizes = np.array([1.0, 5.0])[:microbatches, None, None]
    batches = jnp.asarray(sizes * lattice(3, microbatches, 16, 4))
    start = jnp.asarray(lattice(4, 4, 5))

    def loss(kernel, batch):
        return -jnp.mean(jax.nn.log_softmax(batch @ kernel)[:, 0])

    def by_hand(kernel, step):
        weight = 0.1 + 0.9 * jnp.clip((step - 10) / 50, 0, 1)

        def total(kernel):
            parts = [loss(kernel, batch) + weight * kl_by_hand(kernel, batch) for batch in batches]
            return sum(parts) / microbatches

        return kernel - 0.02 * jax.grad(total)(kernel), None

    term = pj.Term(pj.KLDivergence(), on=("logprobs", "reference"), weight=2.0)
    accumulated = optax.MultiSteps(
        optax.sgd(0.02), every_k_schedule=microbatches, accumulator_dtype=jnp.float64
    )
    optimizer = optax.chain(
        pj.add_objective(
            pj.Objective(terms={"kl": term}),
            model,
            pj.anneal(0.05, 0.5, start=10, end=60),
            every=microbatches,
        ),
        accumulated.gradient_transformation(),
    )

    def step(carry, batch):
        kernel, state = carry
        gradients = jax.grad(loss)(kernel, batch)
        updates, state = optimizer.update(gradients, state, kernel, batch=batch)
        return (optax.apply_updates(kernel, updates), state), None

    def run(kernel):
        carry = kernel, optimizer.init(kernel)
        (ours, state), _ = jax.lax.scan(step, carry, jnp.tile(batches, (100, 1, 1)))
        return ours, pj.step_of(state), jax.lax.scan(by_hand, kernel, jnp.arange(100))[0]

    ours, steps, theirs = jax.jit(run)(start)
    assert int(steps) == 100
    assert ours.dtype == jnp.float64
    assert float(jnp.max(jnp.abs(theirs - start))) > 0.1
    # The schedule's weight is rounded to float32.
    assert_close(ours, theirs, rtol=1e-7)


def test_before_multi_steps_and_inside():
    term = pj.add_objective(SLOPE, scaled)
    before = optax.chain(term, optax.MultiSteps(optax.sgd(1.0), 2).gradient_transformation())
    inside = optax.MultiSteps(optax.chain(term, optax.sgd(1.0)), 2)
    for optimizer, expected in [(before, -5.5), (inside, -1.0)]:
        params = jnp.zeros(())
        state = optimizer.init(params)
        for batch in (10.0, 1.0):
            updates, state = optimizer.update(jnp.zeros(()), state, params, batch=batch)
        assert float(updates) == expected


def test_the_step_of_an_objective():
    """A slope of 2 w θ, at a weight that is the step."""
    weight = pj.anneal(1.0, 2.0, start=2, end=3)
    optimizer = pj.add_objective(SCALED, scaled, weight, every=2)
    params = jnp.array(0.5)
    update = jit_once(optimizer.update)
    state, slopes = optimizer.init(params), []
    for _ in range(8):
        updates, state = update(jnp.zeros(()), state, params, batch=1.0)
        slopes.append(float(updates))
    assert slopes == [0, 0, 1, 1, 2, 2, 6, 6]
    updates, state = optimizer.update(
        jnp.zeros(()), state, params, batch=1.0, step=5, value=jnp.inf, whole=None
    )
    assert float(updates) == 10
    assert int(state.count) == 9


@pytest.mark.parametrize(
    "mask",
    [
        {"a": {"w": True, "n": True}, "b": False, "c": False},
        {"a": True, "b": False, "c": False},
        lambda params: jax.tree.map(lambda p: p.ndim == 1, params),
    ],
    ids=["tree", "prefix", "callable"],
)
def test_a_mask_is_of_the_updates_and_not_of_the_outputs(mask):
    params = {
        "a": {"w": jnp.array([3.0], jnp.bfloat16), "n": jnp.array([7])},
        "b": {"w": jnp.array([[5.0]]), "none": None},
        "c": jnp.float32(1.0),
    }
    optimizer = pj.add_objective(
        SLOPE, lambda p, b: {"y": p["a"]["w"] * p["b"]["w"] * p["a"]["n"] * b}, 0.5, mask=mask
    )
    gradients = jax.tree.map(jnp.ones_like, params)
    updates, _ = optimizer.update(gradients, optimizer.init(params), params, batch=2.0)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    assert [x.dtype for x in jax.tree.leaves(updates)] == [x.dtype for x in jax.tree.leaves(params)]
    assert jax.tree.map(float, jax.tree.map(jnp.sum, updates)) == {
        "a": {"w": 1 + 0.5 * 5 * 7 * 2, "n": 1},
        "b": {"w": 1, "none": None},
        "c": 1,
    }


def test_an_objective_of_some_of_the_parameters():
    params = {"student": {"w": jnp.array(2.0)}, "probe": {"w": jnp.array(3.0)}}
    of_student = pj.add_objective(SLOPE, lambda params, x: {"y": params["student"]["w"] * x})
    optimizer = optax.multi_transform(
        {"student": of_student, "probe": optax.sgd(1.0)}, {"student": "student", "probe": "probe"}
    )
    ones = jax.tree.map(jnp.ones_like, params)
    updates, _ = optimizer.update(ones, optimizer.init(params), params, batch=4.0)
    assert jax.tree.map(float, updates) == {"student": {"w": 5}, "probe": {"w": -1}}


def test_inject_hyperparams_of_an_objective():
    make = optax.inject_hyperparams(pj.add_objective, static_args=("objective", "forward"))
    optimizer = optax.apply_if_finite(make(SLOPE, scaled, weight=0.5, every=2, monitor=True), 3)
    params = jnp.float32(2.0)
    update = jit_once(lambda *x: optimizer.update(*x, batch=4.0))
    updates, state = update(jnp.float32(0.0), optimizer.init(params), params)
    assert float(updates) == 2
    state.inner_state.hyperparams["weight"] = jnp.float32(2)
    updates, state = update(jnp.float32(0.0), state, params)
    assert float(updates) == 8
    assert float(optax.tree.get(state, "penalty_value")) == 8
    updates, state = update(jnp.float32(jnp.nan), state, params)
    assert float(updates) == 0
    assert int(pj.step_of(state)) == 2


@pytest.mark.parametrize("objective", [SLOPE, SCALED], ids=["a loss", "a term"])
def test_inject_hyperparams_of_an_objective_that_is_not_static(objective):
    optimizer = optax.inject_hyperparams(pj.add_objective)(objective, scaled)
    with pytest.raises(TypeError, match=r'static_args=\("objective", "forward"\)'):
        optimizer.init(PARAMS)


def test_optimizers_of_flax_take_a_batch():
    """Those of NNX do; linen's `TrainState` does in the subclass of the guide."""

    class State(TrainState):
        def apply_gradients(self, *, grads, batch):
            updates, opt_state = self.tx.update(grads, self.opt_state, self.params, batch=batch)
            params = optax.apply_updates(self.params, updates)
            return self.replace(step=self.step + 1, params=params, opt_state=opt_state)

    linear = nnx.Linear(1, 1, use_bias=False, kernel_init=nnx.initializers.ones, rngs=nnx.Rngs(0))
    definition, start = nnx.split(nnx.clone(linear), nnx.Param)
    batch = jnp.array([[3.0]])

    def forward(params, batch):
        return {"y": nnx.merge(definition, params)(batch)}

    chain = optax.chain(pj.add_objective(SLOPE, forward), optax.sgd(0.5))
    zeros = jax.tree.map(jnp.zeros_like, start)
    optimizer = nnx.Optimizer(linear, chain, wrt=nnx.Param)
    optimizer.update(linear, zeros, batch=batch)
    state = State.create(apply_fn=None, params=start, tx=chain)
    state = state.apply_gradients(grads=zeros, batch=batch)
    for kernel in (linear.kernel, state.params["kernel"]):
        assert kernel[...].tolist() == [[-0.5]]
    assert int(pj.step_of(optimizer)) == int(pj.step_of(state)) == 1


@pytest.mark.parametrize(
    ("objective", "forward"), [(pj.L1(), scaled), (scaled, SLOPE), (SLOPE, None), (SLOPE, {})]
)
def test_what_is_not_an_objective(objective, forward):
    hint = re.escape('inject_hyperparams(pj.add_objective, static_args=("objective", "forward"))')
    with pytest.raises(TypeError, match=f"takes a pj.Objective and a function.*{hint}$"):
        pj.add_objective(objective, forward)


def test_an_objective_lacks_what_it_needs():
    for mask in (None, True):
        optimizer = pj.add_objective(SLOPE, scaled, mask=mask)
        state = optimizer.init(jnp.zeros(()))
        with pytest.raises(TypeError, match=r"^pj\.add_objective needs the batch: .*batch\)$"):
            optimizer.update(jnp.zeros(()), state, jnp.zeros(()))
        with pytest.raises(ValueError, match=re.escape(NO_PARAMS_MSG)):
            optimizer.update(jnp.zeros(()), state, batch=1.0)
    with pytest.raises(ValueError, match="every must be at least 1, got 0"):
        pj.add_objective(SLOPE, scaled, every=0)


# What is monitored: 3 |θ| is of value 21 and of slope 3 in each of 2 coordinates.

TWO = jnp.array([3.0, -4.0], jnp.bfloat16)
MONITORED = {
    "add_penalty": lambda **mask: pj.add_penalty(3.0 * pj.L1(), 0.5, monitor=True, **mask),
    "proximal": lambda **mask: pj.proximal(3.0 * pj.L1(), 0.1, 0.5, monitor=True, **mask),
    "add_objective": lambda **mask: pj.add_objective(
        pj.Objective(terms={"l1": pj.Term(pj.L1(), on="y", weight=3.0)}),
        lambda params, batch: {"y": params["two"]},
        0.5,
        monitor=True,
        **mask,
    ),
}
ONLY_TWO = {"two": True, "other": False}
WRAPPED = {
    "mask": lambda make: make(mask=ONLY_TWO),
    "masked": lambda make: optax.masked(make(), ONLY_TWO),
    "chain in MultiSteps": lambda make: optax.MultiSteps(
        optax.chain(make(mask=ONLY_TWO), optax.adam(0.1)), 2
    ),
    "multi_transform": lambda make: optax.multi_transform(
        {True: make(), False: optax.sgd(0.1)}, ONLY_TWO
    ),
    "apply_if_finite": lambda make: optax.apply_if_finite(make(mask=ONLY_TWO), 2),
    "inject_hyperparams": lambda make: optax.inject_hyperparams(
        lambda weight: optax.chain(make(mask=ONLY_TWO), optax.scale(weight))
    )(0.5),
}


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED.keys())
@pytest.mark.parametrize("make", MONITORED.values(), ids=MONITORED.keys())
def test_what_is_monitored(make, wrap):
    optimizer = wrap(make)
    params = {"two": TWO, "other": jnp.array([100.0])}
    zeros = jax.tree.map(jnp.zeros_like, params)

    def step(state, _):
        return optimizer.update(zeros, state, params, batch=None)[1], None

    state = jax.jit(lambda state: jax.lax.scan(step, state, length=2)[0])(optimizer.init(params))
    for name, expected in [("value", 21), ("gradient_norm", 3 * np.sqrt(2))]:
        number = optax.tree.get(state, f"penalty_{name}")
        assert number.dtype == jnp.float32
        assert_close(number, expected)


def test_monitoring_changes_nothing():
    for name, make in MONITORED.items():
        if name != "add_objective":
            plain = getattr(pj, name)(3.0 * pj.L1(), *([0.1] if name == "proximal" else []), 0.5)
            assert_trees_close(updates_of(make()), updates_of(plain), rtol=0)


# Rates of skipped work.


@pytest.mark.parametrize(
    ("settings", "rate", "factor"),
    [
        ({}, 0.75, 0.5),
        ({}, 0.0, 1.0),
        ({}, 1.0, 0.1**0.5),
        ({"power": 1.0}, 0.75, 0.25),
        ({"power": -1}, 0.75, 4.0),
        ({"power": -1.0, "least": 0.5}, 0.75, 2.0),
        ({"power": 0.0}, 1.0, 1.0),
        ({"power": pj.anneal(0.0, 2.0, start=0, end=2)}, 0.5, 0.5),
        ({"power": 1.0, "least": lambda count: 0.25 * (count + 1)}, 1.0, 0.5),
    ],
)
def test_updates_by_the_share_that_is_computed(settings, rate, factor):
    """Those of the second step, of a number and of an array."""
    optimizer = pj.scale_by_sparsity(**settings)
    for own in (rate, np.float32(rate), jnp.float32(rate)):
        state = optimizer.init(PARAMS)
        for _ in range(2):
            updates, state = jax.jit(optimizer.update)(GRADIENTS, state, rate=own)
        assert_trees_close(updates, jax.tree.map(lambda g: factor * g, GRADIENTS), rtol=1e-6)
        assert int(pj.step_of(state)) == 2


def test_a_rate_scales_the_learning_rate_of_adam():
    """After it: before it the factor, if it stays the same, cancels."""
    adam, scale = optax.scale_by_adam(), pj.scale_by_sparsity(1.0)
    params = jnp.ones(3)
    gradients = jnp.array([0.5, -2.0, 3.0])

    def steps(*parts):
        optimizer = optax.chain(*parts)

        def step(state, rate):
            updates, state = optimizer.update(gradients, state, params, rate=rate)
            return state, updates

        return jax.lax.scan(step, optimizer.init(params), jnp.array([0.75, 0.75, 0.5]))[1]

    plain = np.asarray(steps(adam))
    assert_close(steps(adam, scale), np.array([[0.25], [0.25], [0.5]]) * plain, rtol=1e-6)
    assert_close(steps(scale, adam)[:2], plain[:2], rtol=1e-5)


RATED = {
    "chain": lambda make: optax.chain(optax.identity(), make()),
    "masked": lambda make: optax.masked(make(), ONLY_TWO),
    "multi_transform": lambda make: optax.multi_transform(
        {True: make(), False: optax.identity()}, ONLY_TWO
    ),
    "apply_if_finite": lambda make: optax.apply_if_finite(make(), 2),
    "inject_hyperparams": lambda make: optax.inject_hyperparams(make)(power=1.0, least=0.1),
    "MultiSteps": lambda make: optax.MultiSteps(make(), 2),
}


@pytest.mark.parametrize("wrap", RATED.values(), ids=RATED.keys())
def test_a_rate_in_wrappers(wrap):
    """The last of two updates has the last rate."""
    optimizer = wrap(lambda power=1.0, least=0.1: pj.scale_by_sparsity(power, least=least))
    params = {"two": TWO, "other": jnp.array([100.0])}
    state = optimizer.init(params)
    update = jit_once(optimizer.update)
    for rate in (0.25, 0.5):
        updates, state = update(params, state, params, rate=jnp.float32(rate), value=1.0)
    assert updates["two"].tolist() == [1.5, -2.0]
    assert updates["two"].dtype == jnp.bfloat16
    limited = isinstance(state, optax.MaskedState) or hasattr(state, "inner_states")
    assert float(updates["other"][0]) == (100.0 if limited else 50.0)


def test_the_power_that_is_injected():
    optimizer = optax.inject_hyperparams(pj.scale_by_sparsity)(
        power=pj.anneal(0.0, 2.0, start=0, end=2)
    )
    state, one = optimizer.init(jnp.ones(())), jnp.ones(())
    for expected in (1.0, 0.5, 0.25):
        updates, state = optimizer.update(one, state, rate=0.5)
        assert float(updates) == expected
        assert float(state.hyperparams["power"]) == -np.log2(expected)


def test_a_rate_passes_by_what_is_not_floating():
    gradients = {
        "half": jnp.array([4.0, -4.0], jnp.float16),
        "int": jnp.array([3, -3]),
        "bool": jnp.array([True]),
        "key": jax.random.key(0),
        "none": None,
        "masked": optax.MaskedNode(),
    }
    optimizer = pj.scale_by_sparsity()
    updates, _ = jax.jit(optimizer.update)(gradients, optimizer.init(gradients), rate=0.75)
    assert jax.tree.structure(updates) == jax.tree.structure(gradients)
    assert updates["half"].dtype == jnp.float16
    assert updates["half"].tolist() == [2, -2]
    for name in ("int", "bool", "key"):
        assert (updates[name] == gradients[name]).all()


def test_a_rate_never_widens(x64):
    optimizer = pj.scale_by_sparsity(pj.anneal(0.0, 1.0, start=0, end=4), least=0.5)
    ones = jnp.ones(3, jnp.float32)
    update = jax.jit(lambda state: optimizer.update(ones, state, rate=0.5))
    assert doubles(update(optimizer.init(ones))) == []


def test_a_rate_of_a_model_of_flax():
    linear = nnx.Linear(1, 1, use_bias=False, kernel_init=nnx.initializers.ones, rngs=nnx.Rngs(0))
    chain = optax.chain(pj.scale_by_sparsity(1.0), optax.sgd(1.0))
    optimizer = nnx.Optimizer(linear, chain, wrt=nnx.Param)
    ones = jax.tree.map(jnp.ones_like, nnx.state(linear, nnx.Param))
    optimizer.update(linear, ones, rate=nnx.Variable(jnp.float32(0.75)))
    assert linear.kernel[...].tolist() == [[0.75]]


def test_a_rate_that_is_none():
    optimizer = optax.chain(pj.scale_by_sparsity(), optax.sgd(1.0))
    state = optimizer.init(PARAMS)
    with pytest.raises(TypeError, match=r"^pj\.scale_by_sparsity needs the rate: .*rate=rate\)$"):
        optimizer.update(GRADIENTS, state, PARAMS)
    for rate, error, message in [
        (jnp.array([0.5, 0.25]), ValueError, r"rate must be a scalar, got \(2,\)"),
        ({"a": jnp.array(0.5)}, TypeError, "rate must be an array, got a dict"),
        ("0.5", TypeError, "rate must be an array, got a str"),
        ([0.5], TypeError, "rate must be an array, got a list"),
        (1.5, ValueError, r"rate must be in \[0, 1\], got 1.5"),
        (np.float32(np.nan), ValueError, r"rate must be in \[0, 1\], got .*nan"),
    ]:
        with pytest.raises(error, match=message):
            optimizer.update(GRADIENTS, state, PARAMS, rate=rate)
    for settings, message in [
        ({"power": np.nan}, "power must be finite"),
        ({"power": np.inf}, "power must be finite"),
        ({"least": 0.0}, "least must be above 0"),
        ({"least": -0.5}, "least must be above 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            pj.scale_by_sparsity(**settings)


# The solutions of scikit-learn.


@pytest.fixture(scope="module")
def diabetes():
    x, y = load_diabetes(return_X_y=True)
    return x - x.mean(0), y - y.mean()


def descend(x, y, penalty, weight, steps=20_000):
    """Proximal gradient descent on scikit-learn's objective in float32."""
    curvature = x.T @ x / len(y)
    lipschitz = np.linalg.eigvalsh(curvature)[-1]
    assert 100 < 1 / lipschitz < 120
    optimizer = optax.chain(optax.sgd(1 / lipschitz), pj.proximal(penalty, 1 / lipschitz, weight))
    curvature, slope = jnp.float32(curvature), jnp.float32(x.T @ y / len(y))

    def loss(w):
        return 0.5 * w @ curvature @ w - slope @ w

    def step(carry, _):
        w, state = carry
        updates, state = optimizer.update(jax.grad(loss)(w), state, w)
        return (optax.apply_updates(w, updates), state), None

    def run(w):
        return jax.lax.scan(step, (w, optimizer.init(w)), length=steps)[0][0]

    return np.asarray(jax.jit(run)(jnp.zeros(x.shape[1], jnp.float32)))


def assert_same_solution(ours, theirs):
    assert 0 < np.count_nonzero(theirs) < theirs.size
    np.testing.assert_array_equal(ours == 0, theirs == 0)
    assert_close(ours, theirs, rtol=1e-4)


@pytest.mark.parametrize("alpha", [0.1, 0.5, 1.5])
def test_the_lasso(diabetes, alpha):
    x, y = diabetes
    lasso = linear_model.Lasso(alpha=alpha, tol=1e-12, max_iter=100_000, fit_intercept=False)
    assert_same_solution(descend(x, y, pj.L1(), alpha), lasso.fit(x, y).coef_)


@pytest.mark.parametrize(("alpha", "ratio"), [(0.02, 0.9), (0.1, 0.98), (1.0, 0.999)])
def test_the_elastic_net(diabetes, alpha, ratio):
    x, y = diabetes
    net = linear_model.ElasticNet(
        alpha=alpha, l1_ratio=ratio, tol=1e-12, max_iter=100_000, fit_intercept=False
    )
    penalty = pj.ElasticNet(l1_ratio=2 * ratio / (1 + ratio))
    ours = descend(x, y, penalty, alpha * (1 + ratio) / 2)
    assert_same_solution(ours, net.fit(x, y).coef_)


# Programs.


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize(
    "transformation",
    [
        pj.add_penalty(pj.L1(), 0.5),
        pj.add_penalty(pj.SmoothL0(gamma=0.5, reduction="mean"), 0.5, monitor=True),
        pj.add_penalty(pj.L2(center="mean"), 0.5),
        pj.proximal(pj.ElasticNet(reduction="mean"), 0.5),
        pj.proximal(0.5 * pj.L1(), 0.5, monitor=True),
        pj.proximal(pj.GroupLasso(axis=1), 0.5),
        pj.add_penalty(pj.GroupLasso(axis=1), 0.5),
    ],
    ids=["l1", "smooth l0", "mean", "prox", "scaled prox", "group prox", "groups"],
)
def test_sharded_parameters(axis_type, transformation):
    optimizer = optax.chain(transformation, optax.scale(-1.0))
    params = {"a": lattice(0, 16, 4).astype(np.float32), "b": lattice(1, 8, 2).astype(np.float32)}
    expected, monitored = jax.jit(optimizer.update)(params, optimizer.init(params), params)
    mesh = jax.make_mesh((8,), ("shard",), axis_types=(axis_type,))
    with jax.set_mesh(mesh):
        sharding = NamedSharding(mesh, P("shard"))
        sharded = jax.device_put(params, sharding)
        update = jax.jit(optimizer.update)
        lowered = update.lower(sharded, optimizer.init(sharded), sharded)
        assert "all-gather" not in lowered.compile().as_text()
        updates, state = update(sharded, optimizer.init(sharded), sharded)
    assert_trees_close(state, monitored, rtol=1e-5)
    for update in jax.tree.leaves(updates):
        assert update.sharding.is_equivalent_to(sharding, 2)
    assert_trees_close(updates, expected, rtol=1e-5, atol=1e-7)


def test_donated_state_in_a_scan():
    optimizer = optax.chain(
        optax.sgd(0.1), pj.proximal(pj.L1(), 0.1, pj.anneal(0.0, 1.0, start=0, end=10))
    )

    def step(carry, _):
        params, state = carry
        updates, state = optimizer.update(params, state, params)
        return (optax.apply_updates(params, updates), state), None

    def run(params, state):
        return jax.lax.scan(step, (params, state), length=20)[0]

    params = jnp.array([4.0, -0.5])
    donated = jax.jit(run, donate_argnums=(0, 1))
    (after, state), (again, _) = (
        run(params, optimizer.init(params)),
        donated(jnp.array(params), optimizer.init(params)),
    )
    assert int(state[-1].count) == 20
    expected = np.array([4.0, -0.5])
    for index in range(20):
        moved = 0.9 * expected
        expected = np.sign(moved) * np.maximum(np.abs(moved) - 0.1 * min(index / 10, 1), 0)
    assert_close(after, expected, rtol=1e-5)
    assert_close(again, expected, rtol=1e-5)


def test_a_sweep_over_configs_in_one_trace():
    params, gradients = jnp.array([2.0, -2.0]), jnp.zeros(2)

    @jit_once
    def sweep(penalties, weights):
        def update(penalty, weight):
            optimizer = optax.chain(pj.add_penalty(penalty, weight), optax.scale(-1.0))
            return optimizer.update(gradients, optimizer.init(params), params)[0]

        return jax.vmap(update)(penalties, weights)

    penalties = pj.stack([pj.SmoothL0(gamma=gamma) for gamma in (1.0, 2.0)])
    slopes = np.array([2 * 2 * 1 / 25, 2 * 2 * 4 / 64])
    weights = np.array([0.5, 1.0])
    expected = -(slopes * weights)[:, None] * np.sign([2.0, -2.0])
    assert_close(sweep(penalties, weights), expected)
    assert_close(sweep(penalties, 2 * weights), 2 * expected)


def test_add_penalty_rounds_after_the_weight():
    params = jnp.full(3, 4e4, jnp.float16)
    optimizer = pj.add_penalty(pj.L2(), 1e-4)
    updates, _ = optimizer.update(jnp.zeros_like(params), optimizer.init(params), params)
    assert updates.dtype == jnp.float16
    assert updates.tolist() == [8.0, 8.0, 8.0]
