"""The count of optimiser steps in every kind of state, against the updates that were made."""

import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import penalties_jax as pj

PARAMS = {"a": jnp.ones(3), "b": {"count": jnp.full(2, 7.0)}}
OBJECTIVE = pj.Objective(loss=lambda outputs: jnp.sum(outputs["y"]))
UPDATES = 6

DUAL = pj.DualAscent(target=0.5)


def accumulated(optimizer, **settings):
    return optax.MultiSteps(optimizer, every_k_schedule=3, **settings).gradient_transformation()


def objective(**settings):
    return pj.add_objective(OBJECTIVE, lambda params, batch: {"y": params["a"] * batch}, **settings)


# Optimizers, and their steps after six updates, of which the fourth has a gradient of NaN.
COUNTED = {
    "adam": (optax.adam(0.1), 6),
    "a schedule": (optax.sgd(optax.constant_schedule(0.1)), 6),
    "momentum and a penalty": (optax.chain(pj.add_penalty(pj.L1()), optax.sgd(0.1, 0.9)), 6),
    "monitored": (pj.add_penalty(pj.L1(), monitor=True), 6),
    "proximal": (optax.chain(optax.sgd(0.1), pj.proximal(pj.L1(), 0.1)), 6),
    "objective": (optax.chain(objective(every=3), optax.sgd(0.1)), 6),
    "named chain": (optax.named_chain(("a", optax.adam(0.1)), ("b", pj.add_penalty(pj.L2()))), 6),
    "masked": (optax.masked(optax.adam(0.1), {"a": True, "b": False}), 6),
    "one branch counts": (
        optax.multi_transform({"a": optax.sgd(0.1), "b": optax.adam(0.1)}, {"a": "a", "b": "b"}),
        6,
    ),
    "both branches count": (
        optax.multi_transform({"a": optax.lion(0.1), "b": optax.adam(0.1)}, {"a": "a", "b": "b"}),
        6,
    ),
    "hyperparameters": (optax.inject_hyperparams(optax.adam)(optax.constant_schedule(0.1)), 6),
    "a controller": (optax.inject_hyperparams(optax.sgd)(DUAL.weight), 6),
    "MultiSteps": (accumulated(optax.adam(0.1)), 2),
    "MultiSteps of nothing that counts": (accumulated(optax.sgd(0.1)), 2),
    "before MultiSteps": (optax.chain(objective(every=3), accumulated(optax.adam(0.1))), 2),
    "MultiSteps that skips": (
        accumulated(optax.adam(0.1), should_skip_update_fn=optax.skip_not_finite),
        1,
    ),
    "MultiSteps in branches": (
        optax.multi_transform(
            {"a": accumulated(optax.sgd(0.1)), "b": accumulated(optax.adam(0.1))},
            {"a": "a", "b": "b"},
        ),
        2,
    ),
    "apply_if_finite": (optax.apply_if_finite(optax.adam(0.1), 9), 5),
    "counts that start again": (
        optax.chain(optax.adam(0.1), optax.contrib.reduce_on_plateau(accumulation_size=4)),
        6,
    ),
    "apply_every": (optax.chain(optax.adam(0.1), optax.apply_every(4)), 6),
    "schedule-free": (optax.contrib.schedule_free_adamw(0.1), 6),
}
EXTRA = {"batch": jnp.ones(3), "value": 1.0, "rate": 0.2}


def gradients(update):
    return jax.tree.map(lambda p: jnp.where(update == 3, jnp.nan, p), PARAMS)


@pytest.mark.parametrize(("optimizer", "steps"), COUNTED.values(), ids=COUNTED.keys())
def test_states_of_optax(optimizer, steps):
    optimizer = optax.with_extra_args_support(optimizer)

    def update(state, index):
        state = optimizer.update(gradients(index), state, PARAMS, **EXTRA)[1]
        return state, pj.step_of(state)

    @jax.jit
    def run(state):
        return jax.lax.scan(update, state, jnp.arange(UPDATES))

    state, traced = run(optimizer.init(PARAMS))
    step = pj.step_of(state)
    assert int(step) == int(traced[-1]) == steps
    assert step.shape == ()
    assert step.dtype == jnp.int32
    # A wrapper's own step is the last to be asked: it counts microbatches too.
    train_state = TrainState(step=99, apply_fn=None, params=PARAMS, tx=optimizer, opt_state=state)
    assert int(pj.step_of(train_state)) == steps


@pytest.mark.parametrize(
    ("transformation", "steps"),
    [
        (optax.MultiSteps(pj.add_penalty(pj.L1()), 3), 2),
        (optax.chain(pj.add_penalty(pj.L1(), monitor=True), optax.sgd(0.1)), 6),
        (optax.sgd(0.1), 6),
    ],
    ids=["MultiSteps", "chain", "the optimizer alone counts"],
)
def test_an_optimizer_of_nnx(transformation, steps):
    model = nnx.Linear(2, 1, use_bias=False, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, transformation, wrt=nnx.Param)

    @nnx.jit
    def train(model, optimizer):
        optimizer.update(model, nnx.state(model, nnx.Param))
        return pj.step_of(optimizer)

    for _ in range(UPDATES):
        traced = train(model, optimizer)
    step = pj.step_of(optimizer)
    assert int(step) == int(traced) == steps
    assert step.dtype == traced.dtype == jnp.int32


def test_a_train_state_that_alone_counts(x64):
    state = TrainState.create(apply_fn=None, params=PARAMS, tx=optax.sgd(0.1))
    assert int(pj.step_of(state)) == 0
    step = pj.step_of(state.apply_gradients(grads=PARAMS))
    assert int(step) == 1
    assert step.dtype == jnp.int32


def test_mapped_states():
    optimizer = optax.chain(pj.add_penalty(pj.L1()), optax.adam(0.1))
    state = jax.vmap(optimizer.init)({"a": jnp.ones((4, 3))})
    assert pj.step_of(state).tolist() == [0] * 4


class OwnState(NamedTuple):
    """Of a transformation that nobody knows."""

    count: jax.Array


@pytest.mark.parametrize(
    "state",
    [
        optax.sgd(0.1, momentum=0.9).init(PARAMS),
        {"count": jnp.ones(())},
        OwnState(jnp.ones(())),
        DUAL.init(),
        optax.apply_if_finite(optax.sgd(0.1), 3).init(PARAMS),
        optax.apply_every(3).init(PARAMS),
        None,
    ],
    ids=["sgd", "a dict", "unknown", "a controller", "failures", "modulo", "nothing"],
)
def test_nothing_counts(state):
    with pytest.raises(ValueError, match=r"^nothing in a \w+ counts optimizer steps: chain .*own$"):
        pj.step_of(state)


@pytest.mark.parametrize("wrapper", ["none", "nnx.Optimizer"])
def test_counts_that_differ(wrapper):
    optimizer = optax.chain(optax.identity(), optax.adam(0.1), pj.add_penalty(pj.L1()))
    if wrapper == "none":
        state = optimizer.init(PARAMS)
        state = (*state[:2], state[2]._replace(count=jnp.int32(2)))
        assert int(jax.jit(pj.step_of)(state)) == 0
    else:
        model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
        state = nnx.Optimizer(model, optimizer, wrt=nnx.Param)
        state.opt_state[2].count[...] = jnp.int32(2)
    message = "the counts of optimizer steps differ: [1][0].count is 0, [2].count is 2; pass"
    with pytest.raises(ValueError, match=re.escape(message)):
        pj.step_of(state)


def test_counts_of_numpy():
    """As a checkpoint may have them."""
    state = jax.tree.map(np.asarray, optax.adam(0.1).init(PARAMS))
    assert int(pj.step_of(state)) == 0
