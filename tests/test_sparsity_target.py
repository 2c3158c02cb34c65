"""SparsityTarget against float64 oracles: on rates, on masks, sharded, and as a config."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import penalties_jax as pj
from tests.catalogue import choices_of
from tests.oracles import assert_close, gradient
from tests.programs import jit_once, quick_jit

KINDS = choices_of(pj.sparsity_target_loss)["kind"]
REDUCTIONS = {"none": lambda x: x, "sum": np.sum, "mean": np.mean}

every_kind = pytest.mark.parametrize("kind", KINDS)
every_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)


def loss_of(rate, target, kind, delta=0.1):
    """The formulas of the kinds in float64, inside (0, 1)."""
    s, t = np.float64(rate), np.float64(target)
    off = np.abs(s - t)
    match kind:
        case "l2":
            return off**2
        case "l1":
            return off
        case "kl":
            return t * np.log(t / s) + (1 - t) * np.log((1 - t) / (1 - s))
        case _:
            return np.where(off < delta, 0.5 * off**2, delta * (off - 0.5 * delta))


def rates_of(masks, wheres):
    return [
        1 - np.mean(mask if where is None else mask[np.broadcast_to(where, mask.shape)])
        for mask, where in zip(masks, wheres, strict=True)
    ]


def data(seed=0, *, batch=4):
    """The masks of two layers, and which of their positions exist."""
    rng = np.random.default_rng(seed)
    masks = {"a": rng.random((batch, 6)), "b": rng.random((batch, 3, 2))}
    where = {"a": rng.random((batch, 6)) < 0.6, "b": rng.random((batch, 1, 2)) < 0.7}
    return masks, where


def as_float32(tree):
    return jax.tree.map(np.float32, tree)


# Every kind and every reduction, without their product: most of the time is compilation.
some_of_both = pytest.mark.parametrize(
    ("kind", "reduction"), [*((kind, "mean") for kind in KINDS), ("kl", "none"), ("huber", "sum")]
)


@some_of_both
def test_on_rates(kind, reduction):
    rates = {"a": np.float32([0.05, 0.45, 0.8]), "b": np.float32(0.3)}
    penalty = pj.SparsityTarget(0.4, kind, reduction=reduction)
    values = penalty(rates)
    same = pj.sparsity_target_loss(rates, 0.4, kind=kind, reduction=reduction)
    jax.tree.map(np.testing.assert_array_equal, values, same)
    losses = np.concatenate([np.ravel(loss_of(rate, 0.4, kind)) for rate in rates.values()])
    actual = np.concatenate([np.ravel(x) for x in jax.tree.leaves(values)])
    assert_close(actual, REDUCTIONS[reduction](losses), rtol=1e-5)


def test_on_rates_with_a_mask_targets_and_a_delta():
    rates = {"a": np.float32([0.1, 0.9]), "b": np.float32([0.25])}
    targets = {"a": np.float32([0.5, 0.8]), "b": 0.75}
    where = {"a": np.array([True, False]), "b": np.array([True])}
    penalty = pj.SparsityTarget(targets, "huber", delta=0.25, reduction="sum")
    expected = loss_of([0.1, 0.25], [0.5, 0.75], "huber", 0.25)
    assert_close(penalty(rates, where=where), expected.sum())
    assert_close(pj.SparsityTarget(targets, "l1")(rates, where=where), 0.45)


@some_of_both
def test_from_masks(kind, reduction):
    masks, where = data()
    evaluated = quick_jit(lambda penalty, masks, where: penalty(masks, where=where))
    for targets, mask in [({"a": 0.3, "b": 0.75}, None), (0.4, where)]:
        penalty = pj.SparsityTarget(targets, kind, from_mask=True, reduction=reduction)
        values = evaluated(penalty, as_float32(masks), mask)
        wanted = [targets] * 2 if isinstance(targets, float) else list(targets.values())
        rates = rates_of(masks.values(), [None] * 2 if mask is None else mask.values())
        losses = [loss_of(rate, target, kind) for rate, target in zip(rates, wanted, strict=True)]
        expected = REDUCTIONS[reduction](losses)
        assert_close(jax.tree.leaves(values), expected, rtol=2e-5, atol=1e-6)
        assert jax.tree.structure(values) == jax.tree.structure(
            masks if reduction == "none" else 0.0
        )


@pytest.mark.parametrize("dtype", [bool, np.int32, np.float16, np.float32])
def test_masks_of_every_kind(dtype):
    mask = np.array([[1, 0, 0, 1], [1, 1, 1, 1]], dtype)
    penalty = pj.SparsityTarget(0.5, "l1", from_mask=True)
    assert float(penalty(mask)) == 0.25
    assert penalty(mask).dtype == np.float32


@every_reduction
def test_a_rate_along_an_axis(reduction):
    masks, _ = data(1)
    mask, where = masks["a"], np.arange(6) < np.array([6, 2, 0, 3])[:, None]
    penalty = pj.SparsityTarget(0.4, "kl", from_mask=True, axis=-1, reduction=reduction)
    losses = loss_of(1 - mask.mean(-1), 0.4, "kl")
    assert_close(penalty(np.float32(mask)), REDUCTIONS[reduction](losses), rtol=2e-5)
    kept = np.array([mask[i][where[i]].mean() for i in (0, 1, 3)])
    losses = loss_of(1 - kept, 0.4, "kl")
    values = penalty(np.float32(mask), where=where)
    if reduction == "none":
        assert values.shape == (4,)
        assert float(values[2]) == 0
        values = np.delete(values, 2)
    assert_close(values, REDUCTIONS[reduction](losses), rtol=2e-5)


def test_targets_along_an_axis():
    mask, target = np.float32(data(1)[0]["a"]), np.float32([0.1, 0.2, 0.5, 0.9])
    penalty = pj.SparsityTarget(target, "l1", from_mask=True, axis=1, reduction="none")
    assert_close(penalty(mask), loss_of(1 - np.float64(mask).mean(1), target, "l1"))


@pytest.mark.parametrize(("kind", "axis"), [("l2", None), ("kl", None), ("kl", -1)])
def test_padding_changes_nothing(kind, axis):
    masks, _ = data(2)
    mask = np.float32(masks["a"])
    padded = np.concatenate([mask, np.float32([[np.nan, np.inf, 0.0]] * 4)], 1)
    exists = np.arange(9) < 6
    penalty = pj.SparsityTarget(0.4, kind, from_mask=True, axis=axis)
    slopes = quick_jit(jax.value_and_grad(lambda mask, where: penalty(mask, where=where)))
    value, slope = slopes(mask, np.ones(6, bool))
    padded_value, padded_slope = slopes(padded, exists)
    assert_close(padded_value, value, rtol=1e-6)
    assert_close(padded_slope[:, :6], slope, rtol=1e-5)
    assert (padded_slope[:, 6:] == 0).all()


@every_reduction
def test_a_layer_without_entries_adds_nothing(reduction):
    masks, where = as_float32(data(3)[0]), {"a": np.ones(6, bool), "b": np.zeros((3, 2), bool)}
    penalty = pj.SparsityTarget(0.4, "kl", from_mask=True, reduction=reduction)

    def total(masks):
        values = penalty(masks, where=where)
        return sum(jax.tree.leaves(values)), values

    (value, values), slopes = quick_jit(jax.value_and_grad(total, has_aux=True))(masks)
    assert_close(value, loss_of(1 - np.float64(masks["a"]).mean(), 0.4, "kl"), rtol=2e-5)
    assert reduction != "none" or float(values["b"]) == 0
    assert np.isfinite(slopes["a"]).all()
    assert (slopes["b"] == 0).all()


def test_nothing_at_all():
    penalty = pj.SparsityTarget(0.4, "kl", from_mask=True)
    assert float(penalty({})) == 0
    assert float(penalty(np.ones((2, 3), np.float32), where=np.zeros(3, bool))) == 0
    masks = {"a": np.float32([1, 0]), "b": None}
    assert_close(pj.SparsityTarget(0.25, "l1", from_mask=True)(masks), 0.25)


@every_kind
@pytest.mark.parametrize(("axis", "reduction"), [(None, "sum"), (0, "mean")])
def test_gradient_in_the_mask(kind, axis, reduction):
    masks, where = data(4)
    targets = {"a": 0.3, "b": 0.8}
    penalty = pj.SparsityTarget(targets, kind, from_mask=True, axis=axis, reduction=reduction)

    def value(masks):
        losses = []
        for name, mask in masks.items():
            exists = np.broadcast_to(where[name], mask.shape)
            count = exists.sum(axis)
            rate = 1 - (mask * exists).sum(axis) / np.maximum(count, 1)
            losses.append(loss_of(rate[count > 0], targets[name], kind).ravel())
        return REDUCTIONS[reduction](np.concatenate(losses))

    with jax.enable_x64(True):
        slopes_of = quick_jit(jax.value_and_grad(lambda masks: penalty(masks, where=where)))
        actual, slopes = slopes_of(jax.tree.map(jnp.asarray, masks))
    assert_close(actual, value(masks), rtol=1e-12)
    for name, mask in masks.items():
        expected = gradient(lambda mask, name=name: value(masks | {name: mask}), mask)
        assert_close(slopes[name], expected, rtol=1e-6, atol=1e-9)


# Eight devices


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((8,), ("batch",), axis_types=(AxisType.Auto,))


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize(
    ("kind", "masked", "reduction"),
    [("l2", True, "sum"), ("kl", True, "mean"), ("l1", False, "mean")],
)
def test_the_global_batch_under_shard_map(kind, masked, reduction, check_vma, mesh):
    masks, where = as_float32(data(5, batch=16)[0]), data(5, batch=16)[1]
    where["a"][:2] = False
    where["b"][:] = masked and where["b"]
    where["b"][2:6] = False
    scale = np.float32(0.75)

    def loss(penalty):
        def value(scale, masks, where):
            scaled = jax.tree.map(lambda mask: scale * mask, masks)
            return penalty(scaled, where=where if masked else None)

        return value

    settings = {"from_mask": True, "reduction": reduction}
    targets = {"a": 0.3, "b": 0.8}
    inside = loss(pj.SparsityTarget(targets, kind, axis_name="batch", **settings))
    outside = loss(pj.SparsityTarget(targets, kind, **settings))
    sharded = jax.shard_map(
        inside,
        mesh=mesh,
        in_specs=(P(), P("batch"), P("batch")),
        out_specs=P(),
        check_vma=check_vma,
    )
    value, slopes = quick_jit(jax.value_and_grad(sharded, (0, 1)))(scale, masks, where)
    desired, expected = quick_jit(jax.value_and_grad(outside, (0, 1)))(scale, masks, where)
    assert_close(value, desired, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(slopes), jax.tree.leaves(expected), strict=True):
        assert_close(a, b, rtol=2e-5, atol=1e-7)
    rates = rates_of(
        [0.75 * np.float64(mask) for mask in masks.values()],
        where.values() if masked else [None] * 2,
    )
    losses = [loss_of(rate, t, kind) for rate, t in zip(rates, targets.values(), strict=True)]
    assert_close(value, REDUCTIONS[reduction](losses), rtol=2e-5)


def test_a_layer_without_entries_on_any_device(mesh):
    masks, where = as_float32(data(6, batch=8)[0]), data(6, batch=8)[1]
    where["b"][:] = False
    penalty = pj.SparsityTarget(0.4, "kl", from_mask=True, axis_name="batch")
    sharded = jax.shard_map(
        lambda masks, where: penalty(masks, where=where),
        mesh=mesh,
        in_specs=P("batch"),
        out_specs=P(),
    )
    value, slopes = quick_jit(jax.value_and_grad(sharded))(masks, where)
    (rate,) = rates_of([masks["a"]], [where["a"]])
    assert_close(value, loss_of(rate, 0.4, "kl"), rtol=2e-5)
    assert (slopes["b"] == 0).all()


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_rates_of_the_global_batch(reduction, mesh):
    """Rates that differ from device to device each count."""
    rates = np.random.default_rng(7).random((16, 3)).astype(np.float32)
    penalty = pj.SparsityTarget(0.4, "l2", axis_name="batch", reduction=reduction)
    sharded = jax.shard_map(penalty, mesh=mesh, in_specs=P("batch"), out_specs=P())
    value, slopes = quick_jit(jax.value_and_grad(sharded))(rates)
    losses = loss_of(rates, 0.4, "l2")
    assert_close(value, REDUCTIONS[reduction](losses))
    count = 1 if reduction == "sum" else rates.size
    assert_close(slopes, 2 * (np.float64(rates) - 0.4) / count, rtol=1e-5, atol=1e-8)


# As a config


def test_a_scheduled_target():
    penalty = pj.SparsityTarget(pj.anneal(0.2, 0.6, start=0, end=4), "l1", from_mask=True)
    mask = np.zeros(3, np.float32)
    values = jax.jit(jax.vmap(lambda step: penalty.at(step)(mask)))(np.arange(6))
    assert_close(values, [0.8, 0.7, 0.6, 0.5, 0.4, 0.4])
    with pytest.raises(TypeError, match=r"\.at\(step\)"):
        penalty(mask)


@jit_once
def evaluated(objective, outputs, step):
    return objective(outputs, step=step)


def test_as_a_term_of_an_objective():
    masks, where = data(8)
    target = pj.anneal(0.2, 0.6, start=0, end=4)
    objective = pj.Objective(
        loss=lambda outputs: outputs["accuracy"],
        terms={
            "sparsity": pj.Term(
                pj.SparsityTarget(target, "l1", from_mask=True),
                on="masks",
                where="exists",
                weight=pj.anneal(0.0, 2.0, start=0, end=4),
            )
        },
    )
    outputs = {"accuracy": jnp.float32(3), "masks": as_float32(masks), "exists": where}
    rates = rates_of(masks.values(), where.values())
    for step, wanted, weight in [(0, 0.2, 0), (1, 0.3, 0.5), (4, 0.6, 2.0), (9, 0.6, 2.0)]:
        total, metrics = evaluated(objective, outputs, step)
        expected = np.mean(loss_of(rates, wanted, "l1"))
        assert_close(metrics["sparsity"], expected, rtol=1e-5)
        assert_close(metrics["sparsity/weighted"], weight * expected, rtol=1e-5)
        assert_close(total, 3 + weight * expected)


def test_a_stack_of_targets():
    targets = [0.1, 0.5, 1]
    rate = np.float32(0.4)
    sweep = pj.stack([pj.SparsityTarget(t, "l1") for t in targets])
    values = jax.jit(jax.vmap(lambda penalty: penalty(rate)))(sweep)
    assert_close(values, loss_of(0.4, targets, "l1"), rtol=1e-6)


def test_new_targets_never_retrace():
    @jit_once
    def value(penalty, masks):
        return penalty(masks)

    for target, delta in [(0.5, 0.1), (1, 1), (0, 0.25)]:
        penalty = pj.SparsityTarget(target, "huber", delta=delta, from_mask=True)
        assert_close(value(penalty, np.float32([1, 0, 0])), loss_of(2 / 3, target, "huber", delta))


@pytest.mark.parametrize(
    "penalty",
    [
        pj.SparsityTarget(0.5),
        pj.SparsityTarget(pj.anneal(0, 1, start=0, end=3), "kl", from_mask=True, axis=(0, -1)),
        pj.SparsityTarget({"a": 0.5, "b": 1}, "huber", delta=0.2, axis_name=("x", "y")),
        pj.SparsityTarget(np.float32([0.1, 0.9]), "adaptive", reduction="none"),
        0.01 * pj.SparsityTarget(0.5, from_mask=True),
    ],
)
def test_round_trips(penalty):
    for again in (
        pj.from_dict(pj.to_dict(penalty)),
        pj.from_json(pj.to_json(penalty)),
        pj.from_yaml(pj.to_yaml(penalty)),
        pickle.loads(pickle.dumps(penalty)),
    ):
        assert again == penalty
        assert jax.tree.structure(again) == jax.tree.structure(penalty)


def test_defaults_and_equality():
    assert pj.SparsityTarget(0.5) == pj.SparsityTarget(
        target=0.5, kind="l2", delta=0.1, from_mask=False, axis=None, reduction="mean"
    )
    assert pj.SparsityTarget(0.5) != pj.SparsityTarget(0.25)
    assert pj.SparsityTarget(0.5) != pj.SparsityTarget(0.5, "l1")
    assert pj.SparsityTarget(0.5) != pj.SparsityTarget(0.5, from_mask=True)
    assert jax.tree.leaves(pj.SparsityTarget(1)) == [1.0, 0.1]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: pj.SparsityTarget(0.5, "l0"),
            "kind must be one of 'l2', 'l1', 'kl', 'huber', 'adaptive', got 'l0'",
        ),
        (lambda: pj.SparsityTarget(1.5), r"SparsityTarget\.target must be in \[0, 1\], got 1\.5"),
        (lambda: pj.SparsityTarget(-0.1), r"target must be in \[0, 1\], got -0\.1"),
        (lambda: pj.SparsityTarget({"a": 0.5, "b": 2}), r"target must be in \[0, 1\], got 2"),
        (
            lambda: pj.SparsityTarget(pj.anneal(0, 2, start=0, end=1)),
            r"target must be in \[0, 1\], got Anneal",
        ),
        (lambda: pj.SparsityTarget(0.5, delta=0), "delta must be above 0, got 0"),
        (lambda: pj.SparsityTarget(0.5, reduction="avg"), "reduction must be one of"),
        (
            lambda: pj.SparsityTarget(0.5, from_mask=True)(np.ones(3), where=np.ones(2, bool)),
            "broadcast",
        ),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_mask_of_numbers_is_refused():
    with pytest.raises(TypeError, match="boolean"):
        pj.SparsityTarget(0.5, from_mask=True)(np.ones(3, np.float32), where=np.ones(3))


def test_an_array_of_targets_is_none_for_a_tree_of_rates():
    rates = {"a": jnp.array(0.1), "b": jnp.array(0.9)}
    with pytest.raises(ValueError, match="target must broadcast"):
        pj.SparsityTarget(jnp.array([0.1, 0.9]), "l1")(rates)
    with pytest.raises(ValueError, match="target must broadcast"):
        pj.sparsity_target_loss([rates["a"]], jnp.array([0.1, 0.9]))
    with pytest.raises(ValueError, match="target must broadcast"):
        pj.SparsityTarget(jnp.array([0.1, 0.9]), from_mask=True)({"a": jnp.ones(4)})
    assert float(pj.SparsityTarget({"a": 0.1, "b": 0.9}, "l1")(rates)) == 0
