"""Penalties of routers: against loops in float64, over devices and microbatches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import penalties_jax as pj
from tests.oracles import assert_close

TOKENS, EXPERTS = (8, 4), 5
RANDOM = np.random.default_rng(0)
LOGITS = RANDOM.normal(size=(*TOKENS, EXPERTS)).astype(np.float32)
PROBABILITIES = np.exp(LOGITS) / np.exp(LOGITS).sum(-1, keepdims=True)
IDS = np.argsort(-LOGITS, -1)[..., :2]
ASSIGNED = np.eye(EXPERTS, dtype=np.int32)[IDS].sum(-2)
WHERE = RANDOM.random(TOKENS) < 0.6


def by_loops(probabilities, ids, where):
    """E sum f P, and its gradient in the probabilities, token by token."""
    count, share, mean = 0, np.zeros(EXPERTS), np.zeros(EXPERTS)
    for token in zip(*np.nonzero(where), strict=True):
        count += 1
        mean += probabilities[token]
        for expert in ids[token]:
            share[expert] += 1
    total = EXPERTS * sum(f * p for f, p in zip(share / count, mean / count, strict=True))
    slope = np.zeros(probabilities.shape)
    for token in zip(*np.nonzero(where), strict=True):
        slope[token] = EXPERTS * share / count**2
    return total, slope


@pytest.mark.parametrize("where", [None, WHERE])
def test_load_balance(where):
    included = np.ones(TOKENS, bool) if where is None else where
    desired, slopes = by_loops(np.float64(PROBABILITIES), IDS, included)
    call = jax.value_and_grad(lambda p: pj.load_balance(p, ASSIGNED, where=where))
    value, slope = call(PROBABILITIES)
    assert_close(value, desired, rtol=1e-6)
    assert_close(slope, slopes, rtol=1e-5)
    assert_close(pj.LoadBalance()(PROBABILITIES, ASSIGNED, where=where), desired, rtol=1e-6)


def test_load_balance_at_its_ends():
    """It is k where experts are used alike, E k where one is used alone; 0 without tokens."""
    alike, alone = np.eye(4), np.eye(4)[[0] * 4]
    assert pj.load_balance(np.full((4, 4), 0.25), alike) == 1
    assert pj.load_balance(alone, alone) == 4
    assert pj.load_balance(alone, alone > 0) == 4
    assert pj.load_balance(np.full((4, 4), 0.25), np.ones((4, 4))) == 4
    nowhere = np.zeros(4, bool)
    value, slope = jax.value_and_grad(lambda p: pj.load_balance(p, alike, where=nowhere))(alone)
    assert value == 0
    assert np.all(np.asarray(slope) == 0)
    held = np.where(nowhere[:, None], alone, np.nan)
    assert pj.load_balance(held, alike, where=nowhere) == 0


def test_the_gradient_is_of_the_probabilities_alone():
    assigned = jnp.asarray(ASSIGNED, jnp.float32)
    slope = jax.grad(lambda a: pj.load_balance(PROBABILITIES, a))(assigned)
    assert np.all(np.asarray(slope) == 0)


def test_a_pytree_of_layers_adds_up():
    p = {"first": PROBABILITIES, "last": PROBABILITIES[:2]}
    a = {"first": ASSIGNED, "last": ASSIGNED[:2]}
    each = sum(pj.load_balance(p[name], a[name]) for name in p)
    assert_close(pj.LoadBalance()(p, a), each, rtol=1e-6)


def test_over_devices():
    """Loads and probabilities are of the global batch: uneven masks are no bias."""
    mesh = Mesh(np.array(jax.devices()[:8]), ("data",))
    desired, slopes = by_loops(np.float64(PROBABILITIES), IDS, WHERE)

    @jax.jit
    def inside(p, a, where):
        return jax.shard_map(
            lambda p, a, where: pj.load_balance(p, a, where=where, axis_name="data"),
            mesh=mesh,
            in_specs=P("data"),
            out_specs=P(),
        )(p, a, where)

    outside = jax.jit(lambda p, a, where: pj.load_balance(p, a, where=where))
    lie = NamedSharding(mesh, P("data"))
    arrays = [jax.device_put(x, lie) for x in (PROBABILITIES, ASSIGNED, WHERE)]
    for function in (inside, outside):
        value, slope = jax.value_and_grad(function)(*arrays)
        assert_close(value, desired, rtol=1e-6)
        assert_close(slope, slopes, rtol=1e-5)


def test_over_microbatches():
    """By a scan that merges statistics, and by two passes; the mean of losses is another number."""
    desired, _ = by_loops(np.float64(PROBABILITIES), IDS, WHERE)
    kernel = jnp.asarray(RANDOM.normal(size=(EXPERTS, EXPERTS)), jnp.float32)
    batches = (LOGITS, ASSIGNED, WHERE)

    def stats(kernel, batch):
        logits, assigned, where = batch
        return pj.LoadStats.from_batch(jax.nn.softmax(logits @ kernel), assigned, where=where)

    def scanned(kernel):
        empty = pj.LoadStats.empty(jnp.asarray(LOGITS[0]))
        step = jax.checkpoint(lambda carry, batch: (carry.merge(stats(kernel, batch)), None))
        return jax.lax.scan(step, empty, batches)[0]

    def whole(kernel):
        return pj.load_balance(jax.nn.softmax(LOGITS @ kernel), ASSIGNED, where=WHERE)

    def in_two_passes(kernel):
        linear = scanned(kernel).linearized()
        parts = [
            jax.value_and_grad(lambda kernel, batch=batch: linear(stats(kernel, batch)))(kernel)
            for batch in zip(*batches, strict=True)
        ]
        return jax.tree.map(lambda *x: sum(x), *parts)

    assert_close(scanned(jnp.eye(EXPERTS)).loss(), desired, rtol=1e-6)
    value, slope = jax.jit(jax.value_and_grad(whole))(kernel)
    for found in (
        jax.jit(jax.value_and_grad(lambda kernel: scanned(kernel).loss()))(kernel),
        jax.jit(in_two_passes)(kernel),
    ):
        assert_close(found[0], value, rtol=1e-6)
        assert_close(found[1], slope, rtol=1e-5, atol=1e-7)
    losses = [stats(kernel, batch).loss() for batch in zip(*batches, strict=True)]
    assert abs(np.mean(losses) / value - 1) > 0.001


def test_router_z_loss():
    desired = np.mean([np.log(np.exp(row).sum()) ** 2 for row in np.float64(LOGITS)[WHERE]])
    assert_close(pj.router_z_loss(LOGITS, where=WHERE), desired, rtol=1e-6)
    assert_close(pj.RouterZLoss()(LOGITS, where=WHERE), desired, rtol=1e-6)


@pytest.mark.parametrize(
    ("arrays", "where", "error", "words"),
    [
        ((PROBABILITIES, IDS), None, ValueError, "probabilities and assigned must have the same"),
        ((PROBABILITIES, ASSIGNED), np.ones(3, bool), ValueError, "where must broadcast"),
        ((PROBABILITIES, ASSIGNED), np.ones(4), TypeError, "where must be boolean"),
        (([1.0], ASSIGNED), None, TypeError, "probabilities must be an array"),
        ((1.0, 1.0), None, ValueError, "probabilities needs classes on its last axis"),
    ],
)
@pytest.mark.untyped
def test_bad_inputs(arrays, where, error, words):
    with pytest.raises(error, match=words):
        pj.load_balance(*arrays, where=where)
