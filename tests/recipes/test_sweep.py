import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import penalties_jax as pj
from penalties_jax.recipes.finetune import FinetuneConfig
from penalties_jax.recipes.finetune.job import make_objective
from penalties_jax.recipes.finetune.kinds import Bytes
from penalties_jax.recipes.finetune.sweep import (
    Budgets,
    evaluate,
    kl_weights,
    start_sweep,
    sweep_step,
)
from penalties_jax.recipes.language_model import LanguageModel, with_adapters
from penalties_jax.recipes.text import Batches, Rounds
from penalties_jax.recipes.training import adam, compile_chunk

pytestmark = pytest.mark.slow

WEIGHTS = (0.0, 0.5, 5.0)
OBJECTIVE = make_objective(FinetuneConfig(l1_weight=1e-3, entropy_weight=1e-2))
OPTIMIZER = adam(0.03, 12)
CHUNK = compile_chunk(sweep_step(OPTIMIZER, batch_size=2, length=9))


WINDOWS = jnp.arange(36).reshape(4, 9) % 7


def start(weights, budgets=None):
    base = LanguageModel(width=16, layers=1, heads=2, context=8, rngs=nnx.Rngs(3))
    return start_sweep(
        Bytes(OBJECTIVE),
        with_adapters(base, 2, rngs=nnx.Rngs(0)),
        weights,
        Batches(jnp.arange(200, dtype=jnp.uint8) % 7, jax.random.key(0)),
        budgets,
        optimizer=OPTIMIZER,
    )


def run(weights):
    state, shared = start(weights)
    state, metrics = CHUNK(state, shared, 0, 12)
    return state.members, shared, metrics


@pytest.fixture(scope="module")
def sweep():
    return run(WEIGHTS)


def test_every_member_is_what_it_is_alone(sweep):
    members, _, metrics = sweep
    for index, weight in enumerate(WEIGHTS):
        alone, _, alone_metrics = run((weight,))
        for together, single in zip(jax.tree.leaves(members), jax.tree.leaves(alone), strict=True):
            np.testing.assert_allclose(together[index], single[0], rtol=1e-4, atol=1e-4)
        for name, values in alone_metrics.items():
            np.testing.assert_allclose(metrics[name][index], values[0], rtol=1e-4, atol=1e-6)
    assert CHUNK._cache_size() == 2, "one program for a sweep, and one for any single weight"


def test_metrics_and_gradients_of_every_term(sweep):
    *_, metrics = sweep
    names = {"loss", "total"}
    names |= {f"{term}{of}" for term in OBJECTIVE.terms for of in ("", "/weighted")}
    assert set(metrics) == names | {f"gradient/{name}" for name in names}
    for values in metrics.values():
        assert values.shape == (len(WEIGHTS),)
        assert jnp.isfinite(values).all()
    np.testing.assert_allclose(
        metrics["kl/weighted"], metrics["kl"] * jnp.array(WEIGHTS), rtol=1e-5
    )
    assert metrics["gradient/kl/weighted"][0] == 0
    assert metrics["gradient/kl/weighted"][2] > 0


def test_a_larger_kl_weight_stays_nearer_and_learns_less(sweep):
    members, shared, _ = sweep
    scores = evaluate(members, shared, WINDOWS)
    assert (jnp.diff(scores.kl) < 0).all()
    assert scores.loss[-1] > scores.loss[0]
    assert (scores.loss < scores.base_loss).all()


def test_evaluation_before_training_is_that_of_the_base_model():
    state, shared = start(WEIGHTS)
    scores = evaluate(state.members, shared, WINDOWS)
    np.testing.assert_allclose(scores.loss, scores.base_loss, rtol=1e-5)
    np.testing.assert_allclose(scores.kl, 0, atol=1e-6)


def test_the_weight_of_a_step_is_what_the_steps_before_have_measured():
    made = [pj.Budget(limit, 0.5, measure="kl") for limit in (1e-6, 9.0)]
    budgets = Budgets(pj.stack(made), Rounds(WINDOWS[:2]), Rounds(WINDOWS[2:]))
    state, shared = start((0.0, 0.0), budgets)
    expected = np.zeros(2)
    for index in range(3):
        state, metrics = CHUNK(state, shared, index, index + 1)
        for name, windows in (("kl/measured", WINDOWS[:2]), ("kl/held_out", WINDOWS[2:])):
            kl = evaluate(state.members, shared, windows).kl
            np.testing.assert_allclose(metrics[name], kl, rtol=1e-4)
        np.testing.assert_allclose(metrics["kl/weight"], expected, rtol=1e-4)
        np.testing.assert_allclose(metrics["kl/weighted"], expected * metrics["kl"], rtol=1e-4)
        excess = np.asarray(metrics["kl/measured"]) - [1e-6, 9.0]
        expected = np.maximum(expected + 0.5 * excess, 0)
        np.testing.assert_allclose(kl_weights(state, shared), expected, rtol=1e-4)
    assert expected[0] > 0
    assert expected[1] == 0
