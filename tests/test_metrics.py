"""What configs report beside their value: against the catalogue's oracles, and by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import penalties_jax as pj
from tests.catalogue import FUNCTIONS, every, numbers_of, only, streamed_again
from tests.oracles import assert_close, lattice
from tests.programs import quick_jit

NOTHING = {"raw": 0, "mean": 0, "max": 0, "min": 0}


def scalars(metrics):
    assert all(isinstance(x, jax.Array) and x.shape == () for x in metrics.values())
    return {name: float(value) for name, value in metrics.items()}


def summary(values):
    return {"raw": values.sum(), "mean": values.mean(), "max": values.max(), "min": values.min()}


def measured(config, *inputs, where=None):
    return quick_jit(lambda config, inputs: config.metrics(*inputs, where=where))(config, inputs)


@every(only(lambda case: case.entry.config, FUNCTIONS), slow=streamed_again)
def test_metrics_are_of_the_included_values_whatever_the_reduction(case):
    """Of arrays and of a tree, of which they are together, and with weights."""
    weight = {"weights": 0.5} if "weights" in numbers_of(case.function) else {}
    data, mask = case.data(), case.mask()
    values = weight.get("weights", 1.0) * case.entries(*data, where=mask)
    inputs = [np.float32(case.prepare(x)) for x in data]
    config = case.config(reduction="mean", **weight)
    metrics = measured(config, *inputs, where=case.where(mask))
    for name, expected in summary(values[mask]).items():
        assert_close(metrics[name], expected, rtol=1e-4, atol=1e-6)
    if case.is_a("separable"):
        halves = [{"a": x[:3], "b": None, "c": [x[3:], optax.MaskedNode()]} for x in inputs]
        metrics = measured(config, *halves)
        values = weight.get("weights", 1.0) * case.entries(*data)
        for name, expected in summary(values).items():
            assert_close(metrics[name], expected, rtol=1e-4, atol=1e-6)


X = jnp.array([[3.0, 4.0], [0.0, 0.0], [6.0, 8.0]])
LEFT = np.array([[True], [True], [False]])


@pytest.mark.parametrize(
    ("config", "inputs", "where", "expected"),
    [
        # Groups and matrices count, not entries.
        (pj.GroupLasso(axis=1), X, None, {"raw": 15, "mean": 5, "max": 10, "min": 0}),
        (pj.GroupLasso(axis=1), X, LEFT, {"raw": 5, "mean": 2.5, "max": 5, "min": 0}),
        (pj.SpectralNorm(), {"a": X[:1], "b": X[2:], "c": None}, None, summary(np.array([5, 10]))),
        # One number.
        (pj.Orthogonality(normalize=False), jnp.ones((2, 3)), None, {"raw": 18}),
        (pj.MMD(), (X, X), None, {"raw": 0}),
        # Rates, and of masks.
        (
            pj.SparsityTarget(0.5, "l1", reduction="sum"),
            {"a": jnp.array([0.75, 0.5]), "b": None, "c": jnp.array([1.0])},
            {"a": np.array([True, False]), "b": None, "c": None},
            {"raw": 0.75, "mean": 0.375, "max": 0.5, "min": 0.25, "rate": 0.875, "target": 0.5},
        ),
        (
            pj.SparsityTarget(jnp.array([0.5, 0.75, 1]), "l1", from_mask=True, axis=1),
            jnp.array([[1, 0], [1, 1], [0, 0]]),
            LEFT,
            {"raw": 0.75, "mean": 0.375, "max": 0.75, "min": 0, "rate": 0.25, "target": 0.625},
        ),
        # Importances [4, 2]: |x|**2 averaged over positions, summed over components.
        (
            pj.ImportanceMinimality(pj.Lp(p=2.0, eps=0.0), beta=0.5),
            jnp.full((4, 2), 0.5),
            None,
            {"total": 0.5 + 0.5 * 0.5, "sparsity": 0.5, "frequency": 0.5},
        ),
        # Multiples and sums.
        (0.1 * (2.0 * pj.L1()), X, None, {"raw": 21, "mean": 3.5, "max": 8, "min": 0}),
        (
            pj.L1() + 0.5 * (pj.L1(weights=2.0) + pj.GroupLasso(axis=1)) + 3.0 * pj.L1(),
            X[:1],
            None,
            {"l1/raw": 7, "l1/mean": 3.5, "l1/max": 4, "l1/min": 3}
            | {"sum/l1/raw": 14, "sum/l1/mean": 7, "sum/l1/max": 8, "sum/l1/min": 6}
            | {f"sum/grouplasso/{name}": 5 for name in NOTHING}
            | {"l1_2/raw": 7, "l1_2/mean": 3.5, "l1_2/max": 4, "l1_2/min": 3},
        ),
        # Nothing, and what is not finite.
        (pj.L1(), X, np.zeros((3, 2), bool), NOTHING),
        (pj.L1(), {"a": None}, None, NOTHING),
        (pj.L1(), jnp.zeros((0, 2)), None, NOTHING),
        (pj.L1(), np.array([-np.inf, 1]), None, dict.fromkeys(NOTHING, np.inf) | {"min": 1}),
        (
            pj.SampledEntropy(maximize=True),
            np.array([-np.inf, -1]),
            None,
            dict.fromkeys(NOTHING, -np.inf) | {"max": -1},
        ),
    ],
)  # fmt: skip
def test_metrics_by_hand(config, inputs, where, expected):
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    metrics = scalars(config.metrics(*inputs, where=where))
    assert metrics == pytest.approx(expected, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("check_vma", [True, False])
def test_metrics_are_of_the_global_batch(check_vma):
    """And with Explicit axes of arrays that lie anyhow."""
    x, y = (jax.nn.log_softmax(np.float32(lattice(seed, 16, 4))) for seed in (0, 1))
    mask = np.arange(16) % 5 > 1

    def metrics(x, y, mask, axis_name=None):
        of_entries = (
            pj.L1(axis_name=axis_name) + 2.0 * pj.GroupLasso(axis=1, axis_name=axis_name),
            pj.SparsityTarget(0.4, "l1", axis_name=axis_name),
            pj.SparsityTarget(0.4, "l1", from_mask=True, axis_name=axis_name),
        )
        kl = pj.KLDivergence(axis_name=axis_name)
        found = [config.metrics(jnp.exp(x), where=mask[:, None]) for config in of_entries]
        return [*found, kl.metrics(x, y, where=mask)]

    expected = quick_jit(metrics)(x, y, mask)
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(AxisType.Auto,))
    sharded = jax.shard_map(
        lambda *inputs: metrics(*inputs, axis_name="batch"),
        mesh=mesh, in_specs=P("batch"), out_specs=P(), check_vma=check_vma,
    )  # fmt: skip
    results = [quick_jit(sharded)(x, y, mask)]
    if check_vma:
        mesh = jax.make_mesh((8,), ("batch",), axis_types=(AxisType.Explicit,))
        with jax.set_mesh(mesh):
            placed = jax.device_put(x, NamedSharding(mesh, P("batch")))
            results.append(quick_jit(metrics)(placed, y, mask))
    for result in results:
        jax.tree.map(lambda a, b: assert_close(a, b, rtol=1e-5, atol=1e-6), result, expected)


def test_metrics_carry_no_gradient():
    """Not even where one would be infinite, nor of what a user's function holds."""

    def loss(x, power):
        own = pj.ImportanceMinimality(lambda c: jnp.abs(c) ** power)
        metrics = [pj.Lp(p=power, eps=0.0).metrics(x), own.metrics(x[None])]
        return jnp.sum(x) + sum(jnp.sum(value) for each in metrics for value in each.values())

    slopes = jax.grad(loss, argnums=(0, 1))(jnp.array([0.0, 1.0]), 0.5)
    assert slopes[0].tolist() == [1, 1]
    assert float(slopes[1]) == 0
    _, tangent = jax.jvp(lambda x: pj.Entropy(inputs="logits").metrics(x)["raw"], [X], [X])
    assert float(tangent) == 0


def test_metrics_keep_float32_and_are_one_program(x64):
    metrics = pj.SmoothL0(gamma=0.5).metrics(jnp.ones((3, 2), jnp.bfloat16))
    assert {x.dtype for x in metrics.values()} == {np.dtype("float32")}
    (whole,) = jax.make_jaxpr(lambda x: (pj.L1() + 2.0 * pj.L2()).metrics(x))(X).jaxpr.eqns
    assert whole.params["name"] == "_measure"


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: pj.L1(weights=lambda step: 1.0).metrics(X), TypeError, r"\.at\(step"),
        (lambda: pj.L1().metrics(X, X), TypeError, r"takes 1 input\(s\), got 2"),
        (lambda: pj.MMD().metrics(X, X, where=LEFT), ValueError, "takes no where"),
        (lambda: pj.L1().metrics(X, where=np.ones(3, bool)), ValueError, "where must broadcast"),
        (lambda: pj.L1().metrics("x"), TypeError, "an input must be an array"),
    ],
)  # fmt: skip
def test_bad_input_is_that_of_a_call(call, error, message):
    with pytest.raises(error, match=message):
        call()
