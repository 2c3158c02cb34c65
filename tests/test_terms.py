"""Configs: the same as their functions, on pytrees, with an algebra and proximal operators."""

import dataclasses

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import strategies as st
from scipy import optimize

import penalties_jax as pj
from penalties_jax.terms.base import Penalty
from tests.configs import EXAMPLES, jit_once
from tests.oracles import assert_close, lattice

every_example = pytest.mark.parametrize("example", EXAMPLES.values(), ids=EXAMPLES.keys())
REDUCED = {name: example for name, example in EXAMPLES.items() if example.reduced}
every_reduced = pytest.mark.parametrize("example", REDUCED.values(), ids=REDUCED.keys())
SEPARABLE = {
    name: example
    for name, example in EXAMPLES.items()
    if example.separable and example.config != pj.L2(center="mean")
}
every_separable = pytest.mark.parametrize("example", SEPARABLE.values(), ids=SEPARABLE.keys())
MASK = np.array([[1, 1, 0], [0, 0, 0], [1, 1, 1], [0, 1, 1]], bool)


def ramp(init, final):
    """A schedule that is halfway at step 1."""
    return pj.anneal(init, final, start=0, end=2)


def mask_of(example, values):
    """A mask of the entries, or of the positions of a function that sums over the classes."""
    return MASK if values.ndim == 2 or example.make is pj.GroupLasso else MASK[:, 1]


# A config is its function.


@every_reduced
def test_a_config_is_its_function(example):
    inputs = example.data()
    values = jax.eval_shape(lambda: example.function(*inputs, **example.settings, reduction="none"))
    where = mask_of(example, values)

    def pairs(inputs):
        for reduction, mask in [("sum", None), ("mean", where), ("none", where)]:
            settings = {**example.settings, "reduction": reduction}
            config = example.make(**settings)
            assert config.reduction == reduction
            expected = example.function(*inputs, **settings, where=mask)
            yield config(*inputs, where=mask), expected

    for actual, expected in jax.jit(lambda inputs: list(pairs(inputs)))(inputs):
        assert_close(actual, expected, rtol=1e-6)


def test_options_without_a_number():
    def pairs(x):
        log_p, log_q = jax.nn.log_softmax(x), jax.nn.log_softmax(-x)
        for mode in ("soft", "hard", "spectral"):
            options = {"mode": mode, "normalize": False, "axis": "vocabulary"}
            yield pj.Orthogonality(**options)(x), pj.orthogonality(x, **options)
        for direction in ("forward", "reverse", "symmetric"):
            options = {"direction": direction, "axis": 0}
            inputs = (log_p.T, log_q.T)
            yield pj.KLDivergence(**options)(*inputs), pj.kl_divergence(*inputs, **options)
        yield pj.Entropy(maximize=True)(log_p), -pj.entropy(log_p)
        none = pj.Entropy(maximize=True, reduction="none")({"a": log_p, "b": None})
        yield none, {"a": -pj.entropy(log_p, reduction="none"), "b": None}

    x = lattice(0, 3, 4).astype(np.float32)
    for actual, expected in jax.jit(lambda x: list(pairs(x)))(x):
        chex.assert_trees_all_close(actual, expected, rtol=1e-6)


def test_defaults():
    sums = [pj.L1, pj.L2, pj.ElasticNet, pj.Huber]
    assert {make().reduction for make in sums} == {"sum"}
    assert pj.Lp(p=1).reduction == pj.SmoothL0(gamma=1).reduction == "sum"
    means = [pj.KLDivergence, pj.JSDivergence, pj.Entropy, pj.Consistency]
    assert {make().reduction for make in means} == {"mean"}


# Numbers are leaves, options are structure.


@every_example
def test_numbers_are_leaves_and_options_are_structure(example):
    numbers = {name: x for name, x in example.settings.items() if isinstance(x, float)}
    leaves = {
        path[0].name: leaf for path, leaf in jax.tree.leaves_with_path(example.config, is_leaf=None)
    }
    assert numbers.items() <= leaves.items()
    assert all(isinstance(leaf, float) for leaf in leaves.values())
    options = {
        field.name: getattr(example.config, field.name)
        for field in dataclasses.fields(example.config)
        if field.name not in leaves
    }
    assert not any(isinstance(x, float) for x in options.values())


def test_integers_become_floats():
    configs = [
        pj.L1(weights=2),
        pj.L2(center=np.int64(1), clip=3),
        pj.ElasticNet(l1_ratio=1),
        pj.Lp(p=1, eps=0),
        pj.SmoothL0(gamma=1),
        pj.Huber(delta=2),
        pj.JSDivergence(mixture=1),
        pj.Entropy(temperature=2),
        2 * pj.L1(),
        pj.Term(pj.L1(), on="x", weight=1),
        pj.anneal(1, 2, start=3, end=4),
    ]
    for config in configs:
        leaves = jax.tree.leaves(config)
        assert leaves
        assert {type(leaf) for leaf in leaves} <= {float, bool}, config
    assert configs[4] == pj.SmoothL0(gamma=1.0)


@every_example
def test_numbers_never_retrace_and_options_do(example):
    @jit_once
    def value(config, inputs):
        return config(*inputs)

    inputs = example.data()
    first = value(example.config, inputs)
    changed = jax.tree.map(lambda x: 0.75 * x, example.config)
    second = value(changed, inputs)
    assert_close(second, changed(*inputs), rtol=1e-5)
    if jax.tree.leaves(changed):
        assert first != second
    option = (
        {"reduction": "sum" if example.config.reduction == "mean" else "mean"}
        if (example.reduced)
        else {"normalize": False}
    )
    with pytest.raises(AssertionError, match="traced"):
        value(dataclasses.replace(example.config, **option), inputs)


def test_algebra_and_schedules_never_retrace():
    @jit_once
    def value(config, step):
        return config.at(step)(jnp.array([0.5, -1.0]))

    for weight, gamma, final in [(1, 1, 2), (0.25, 0.5, 0.1), (3.0, 2, 1)]:
        config = weight * pj.SmoothL0(gamma=ramp(gamma, final)) + ramp(0, weight) * pj.L1()
        assert_close(value(config, 1), config.at(1)(jnp.array([0.5, -1.0])), rtol=1e-6)


def test_a_sweep_is_one_program():
    gammas, x = np.linspace(0.1, 2, 16), jnp.array([0.5, -1.0, 2.0])

    @jit_once
    def sweep(configs):
        return jax.vmap(lambda config: jax.value_and_grad(config)(x))(configs)

    values, slopes = sweep(pj.stack([0.5 * pj.SmoothL0(gamma=gamma) for gamma in gammas]))
    square, g = np.square(np.asarray(x, float)), gammas[:, None] ** 2
    assert_close(values, 0.5 * (square / (square + g)).sum(-1))
    assert_close(slopes, np.asarray(x) * g / (square + g) ** 2, rtol=1e-4)


@every_example
def test_derivative_with_respect_to_the_config(example):
    inputs = example.data(seed=5)
    step = 1e-6
    with jax.enable_x64(True):
        value = jax.jit(lambda config: config(*(jnp.asarray(x, float) for x in inputs)))
        slopes = jax.grad(value)(example.config)
        leaves, structure = jax.tree.flatten(example.config)
        for i, slope in enumerate(jax.tree.leaves(slopes)):
            ends = [
                float(value(structure.unflatten([*leaves[:i], leaf, *leaves[i + 1 :]])))
                for leaf in (leaves[i] + step, leaves[i] - step)
            ]
            assert_close(slope, (ends[0] - ends[1]) / (2 * step), rtol=1e-6, atol=1e-8)


def test_derivative_with_respect_to_schedules_and_scales():
    config = 3 * pj.L1(weights=ramp(1, 2)) + pj.L2()
    slopes = jax.jit(jax.grad(lambda config: config.at(0.5)(jnp.array([1.0, -2.0]))))(config)
    scaled = slopes.penalties[0]
    assert_close(scaled.scale, 1.25 * 3)
    assert_close([scaled.penalty.weights.init, scaled.penalty.weights.final], [6.75, 2.25])
    assert_close(slopes.penalties[1].weights, 5)


# Pytrees of arrays.

TREE = {
    "kernel": lattice(1, 4, 3).astype(np.float32),
    "absent": None,
    "nested": [lattice(2, 5).astype(np.float32), optax.MaskedNode()],
    "scalar": np.float32(0.5),
}


def tree_where(seed=0):
    """One mask for each array of the tree."""
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda x: random.random(np.shape(x)) < 0.5, TREE)


@every_separable
def test_trees_are_their_values_together(example):
    where = tree_where()
    flat = np.concatenate([np.ravel(x) for x in jax.tree.leaves(TREE)])
    included = np.concatenate([np.ravel(x) for x in jax.tree.leaves(where)])
    for reduction in ("sum", "mean"):
        config = example.make(**example.settings, reduction=reduction)
        values = jax.jit(lambda c, tree: (c(tree), c(tree, where=where), c(flat, where=included)))
        whole, masked, expected = values(config, TREE)
        assert_close(whole, config(flat))
        assert_close(masked, expected)


@every_separable
def test_trees_of_values(example):
    none = example.make(**example.settings, reduction="none")
    values, elementwise = jax.jit(lambda c: (c(TREE), c.elementwise(TREE)))(none)
    expected = jax.tree.map(lambda x: np.asarray(none(x)), TREE)
    for actual in (values, elementwise):
        assert jax.tree.structure(actual) == jax.tree.structure(TREE)
        assert isinstance(actual["nested"][1], optax.MaskedNode)
        chex.assert_trees_all_close(actual, expected, rtol=1e-6)
    mean = example.make(**example.settings, reduction="mean")
    chex.assert_trees_all_close(mean.elementwise(TREE), expected, rtol=1e-6)


def test_a_mask_for_every_array():
    tree = {"a": jnp.ones((2, 3)), "b": 2 * jnp.ones((4, 3)), "c": None}
    where = jnp.array([True, False, True])
    assert float(pj.L1()(tree, where=where)) == 4 + 16
    assert_close(pj.L1(reduction="mean")(tree, where=where), 20 / 12)
    none = pj.L1(reduction="none")(tree, where=where)
    assert none["a"].tolist() == [[1, 0, 1]] * 2
    partly = {"a": where, "b": None, "c": None}
    assert_close(pj.L1(reduction="mean")(tree, where=partly), (4 + 24) / 16)


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_what_a_mask_excludes_is_not_seen(poison):
    tree = {"a": jnp.array([1.0, poison]), "b": jnp.full(3, poison)}
    where = {"a": np.array([True, False]), "b": False}
    config = pj.SmoothL0(gamma=1.0, reduction="mean") + pj.L2(reduction="mean")
    value, slopes = jax.jit(jax.value_and_grad(lambda tree: config(tree, where=where)))(tree)
    assert_close(value, 1.5)
    assert_close(slopes["a"], [2.5, 0])
    assert_close(slopes["b"], [0, 0, 0])


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("tree", [{}, None, {"a": None}, {"a": optax.MaskedNode()}, jnp.ones(0)])
def test_nothing_costs_nothing(reduction, tree):
    for config in (pj.L1(reduction=reduction), pj.L1(reduction=reduction) + pj.L2()):
        value, slopes = jax.value_and_grad(config)(tree)
        assert float(value) == 0
        assert jax.tree.structure(slopes) == jax.tree.structure(tree)


def test_numbers_as_pytrees():
    tree = {"a": jnp.array([1.0, -2.0]), "b": jnp.array([3.0]), "c": None}
    weights = {"a": jnp.array([1.0, 0.5]), "b": 2.0, "c": None}
    assert float(pj.L1(weights=weights)(tree)) == 1 + 1 + 6
    assert_close(pj.L1(weights=weights, reduction="mean")(tree), 8 / 3)
    scheduled = pj.L1(weights={"a": 1.0, "b": ramp(0, 2), "c": None})
    assert float(scheduled.at(1)(tree)) == 3 + 3
    center = {"a": jnp.array([1.0, 0.0]), "b": jnp.array([5.0]), "c": None}
    assert float(pj.L2(center=center)(tree)) == 4 + 4
    assert float(pj.L2(center=center, clip=1.0)(tree)) == 1 + 1
    slopes = jax.grad(lambda weights: pj.L1(weights=weights)(tree))(weights)
    assert slopes["a"].tolist() == [1, 2]
    assert float(slopes["b"]) == 3


def test_leaf_by_leaf():
    weights = {"a": jnp.array([2.0, 1.0]), "b": 0.5}
    cases = [
        (pj.L2(center="mean", reduction="mean"), (12.75 + 2) / 6),
        (pj.GroupLasso(axis=1), 15),
        (pj.GroupLasso(axis=1, reduction="mean"), 5),
        (pj.GroupLasso(axis=1, weights=weights), 15),
        (pj.GroupLasso(axis=1, reduction="none"), {"a": [5, 0], "b": [10]}),
        (pj.Orthogonality(), 0),
    ]
    tree = {"a": jnp.array([[3.0, 4.0], [0.0, 0.0]]), "b": jnp.array([[6.0, 8.0]])}
    values = jax.jit(lambda configs, tree: [config(tree) for config in configs])
    for value, (_, expected) in zip(values([c for c, _ in cases], tree), cases, strict=True):
        if isinstance(expected, dict):
            expected = {name: np.float32(x) for name, x in expected.items()}
        chex.assert_trees_all_close(value, expected, rtol=1e-6)
    assert_close(pj.Orthogonality()({"a": jnp.ones((2, 2)), "b": None, "c": jnp.eye(3)}), 2)


def test_two_trees_are_compared():
    logits = {"a": lattice(0, 4, 3), "b": lattice(1, 2, 3)}
    log_p = jax.tree.map(lambda x: jax.nn.log_softmax(x.astype(np.float32)), logits)
    log_q = jax.tree.map(lambda x: jax.nn.log_softmax(-x), log_p)
    joined = [jnp.concatenate([x["a"], x["b"]]) for x in (log_p, log_q)]
    assert_close(pj.KLDivergence()(log_p, log_q), pj.kl_divergence(*joined))
    assert_close(pj.Consistency("mse")(log_p, log_q), pj.consistency(*joined))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pj.L1()(jnp.ones(3), where=jnp.ones(2, bool)), r"\(3,\).*\(2,\)"),
        (lambda: pj.L1(weights=jnp.ones(2))(jnp.ones(3)), r"weights.*\(3,\).*\(2,\)"),
        (lambda: pj.L2(center=jnp.ones(2))({"a": jnp.ones(3)}), r"\(3,\).*\(2,\)"),
        (lambda: pj.KLDivergence()(jnp.zeros((2, 3)), jnp.zeros((3, 2))), r"\(2, 3\).*\(3, 2\)"),
        (lambda: pj.Orthogonality()(jnp.ones(3)), r"two axes.*\(3,\)"),
        (lambda: pj.Orthogonality()(jnp.eye(2), where=jnp.ones(2, bool)), "where"),
    ],
)
def test_what_does_not_fit(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# Schedules.


@pytest.mark.parametrize(
    "config",
    [
        pj.L1(weights=ramp(0, 1)),
        pj.L1() * ramp(0, 1),
        2.0 * (pj.L1() * ramp(0, 0.5)),
        pj.L1(weights={"a": ramp(0, 1)}),
    ],
    ids=["field", "scale", "nested", "tree"],
)
def test_an_unresolved_schedule(config):
    tree = {"a": jnp.array([1.0, -1.0])}
    for call in (config, config.elementwise, lambda tree: config.prox(tree, 1.0)):
        with pytest.raises(TypeError, match=r"call \.at\(step\)"):
            call(tree)
    with pytest.raises(TypeError, match=r"call \.at\(step\)"):
        (config + pj.L2())(tree)
    resolved = config.at(1)
    assert float(resolved(tree)) == 1
    assert resolved.elementwise(tree)["a"].tolist() == [0.5, 0.5]
    assert resolved.prox(tree, 1.0)["a"].tolist() == [0.5, -0.5]
    assert resolved.at(2) == resolved


def test_at_resolves_every_field():
    config = ramp(0, 2) * pj.Lp(p=ramp(1, 3), eps=ramp(0, 1), weights=ramp(4, 2))
    assert [float(x) for x in jax.tree.leaves(config.at(1))] == [3, 2, 0.5, 1]
    assert pj.L1(weights=0.5).at(3) == pj.L1(weights=0.5)


# Algebra.

SCALES = [0.5, 2, np.float32(0.5), np.float64(0.5), np.int64(2), jnp.float32(0.5), np.array(0.5)]


@pytest.mark.parametrize("scale", SCALES, ids=lambda scale: type(scale).__name__)
def test_scaling(scale):
    x, config = jnp.array([1.0, -3.0]), pj.L1(reduction="mean")
    for scaled in (scale * config, config * scale):
        assert isinstance(scaled, Penalty)
        assert_close(scaled(x), 2 * float(scale))
        assert_close(scaled.elementwise(x), np.array([1, 3]) * float(scale))


def test_scaling_inside_jit():
    x = jnp.array([1.0, -3.0])
    assert float(jax.jit(lambda scale: (scale * pj.L1() * scale)(x))(3.0)) == 36
    assert float(jax.grad(lambda scale: (scale * pj.L1())(x))(3.0)) == 4


def test_adding():
    x = jnp.array([1.0, -3.0])
    a, b, c = pj.L1(), pj.L2(), pj.Huber()
    for config in (a + b + c, a + (b + c), sum([a, b, c]), sum([a + b, c])):
        assert isinstance(config, Penalty)
        assert config == a + b + c
        assert float(config(x)) == 4 + 10 + 3
        assert config.elementwise(x).tolist() == [2.5, 14.5]
    assert sum([a]) == a
    nested = 0.5 * (a + 2 * b)
    assert float(nested(x)) == 0.5 * (4 + 20)
    tree = {"a": x, "b": None}
    values = (0.5 * pj.L1(reduction="none") + pj.L2(reduction="none"))(tree)
    assert values["a"].tolist() == [1.5, 10.5]
    assert values["b"] is None


@pytest.mark.parametrize(
    "make",
    [
        lambda: pj.L1() + 1,
        lambda: 1.0 + pj.L1(),
        lambda: pj.L1() + pj.l2,
        lambda: pj.L1() * "a",
        lambda: pj.L1() * None,
        lambda: pj.L1() * pj.L2(),
    ],
)
def test_what_the_algebra_refuses(make):
    with pytest.raises(TypeError):
        make()


# Proximal operators.

POINT = {"a": lattice(3, 2, 3), "b": {"c": lattice(4, 2, 2), "d": None}, "e": optax.MaskedNode()}
WEIGHTS = {"a": np.array([0.0, 1.0, 4.0]), "b": {"c": 2.0, "d": None}, "e": 1.0}
CENTER = {"a": np.full((2, 3), 0.5), "b": {"c": -1.0, "d": None}, "e": 0.0}
PROXIMAL = {
    "l1": pj.L1(),
    "l1, mean": pj.L1(reduction="mean"),
    "l1, adaptive": pj.L1(weights=WEIGHTS),
    "l1, scaled mean": 3 * pj.L1(weights=WEIGHTS, reduction="mean") * 2.0,
    "l2": pj.L2(weights=0.5),
    "l2 about a number": pj.L2(center=0.5, reduction="mean"),
    "l2 about a tree": pj.L2(center=CENTER, weights=WEIGHTS),
    "elastic net": pj.ElasticNet(l1_ratio=0.7, weights=WEIGHTS),
    "huber": 0.5 * pj.Huber(delta=0.5),
    "huber, mean": pj.Huber(delta=0.25, weights=5.0, reduction="mean"),
    "group lasso": pj.GroupLasso(axis=1),
    "group lasso, mean": pj.GroupLasso(axis=(-1,), weights=3.0, reduction="mean"),
    "group lasso over all axes": 0.5 * pj.GroupLasso(axis=(0, 1)),
}


@pytest.mark.parametrize("config", PROXIMAL.values(), ids=PROXIMAL.keys())
def test_prox_is_the_minimum(config):
    step_size = 0.5
    with jax.enable_x64(True):
        flat, unflatten = jax.flatten_util.ravel_pytree(jax.tree.map(jnp.asarray, POINT))

        @jax.jit
        def objective(z):
            return 0.5 * jnp.sum(jnp.square(z - flat)) + step_size * config(unflatten(z))

        nearest = jax.jit(lambda config: config.prox(POINT, step_size))(config)
        assert jax.tree.structure(nearest) == jax.tree.structure(POINT)
        nearest, _ = jax.flatten_util.ravel_pytree(nearest)
        lowest = float(objective(nearest))

        # Strongly convex, so that no point around may be lower, at any distance.
        directions = np.random.default_rng(0).normal(size=(200, flat.size))
        directions = np.concatenate([directions, np.eye(flat.size), -np.eye(flat.size)])
        for distance in (1e-1, 1e-3, 1e-5):
            around = jax.jit(jax.vmap(objective))(nearest + distance * directions)
            assert (around >= lowest + 0.4 * np.sum((distance * directions) ** 2, -1)).all()

        found = optimize.minimize(objective, flat, method="Powell", options={"xtol": 1e-8})
        assert lowest <= found.fun + 1e-12
        if not isinstance(config, pj.GroupLasso):
            assert_close(nearest, found.x, rtol=0, atol=1e-3)


def test_prox_about_a_numpy_center():
    prox = pj.L2(center=np.array([1.0, 2.0])).prox(jnp.zeros(2), 0.5)
    assert prox.tolist() == [0.5, 1]
    assert pj.L2(center=np.array([1.0, 2.0])).elementwise(jnp.zeros(2)).tolist() == [1, 4]


def test_prox_under_transformations():
    points, steps = jnp.array([[2.0, -0.5], [1.0, 3.0]]), jnp.array([0.5, 1.0])
    config = 2 * pj.L1()
    values = jax.jit(jax.vmap(config.prox))(points, steps)
    assert values.tolist() == [[1, 0], [0, 1]]
    stacked = pj.stack([scale * pj.L1() for scale in (0.5, 1.0)])
    values = jax.vmap(lambda config, v: config.prox(v, 1.0))(stacked, points)
    assert values.tolist() == [[1.5, 0], [0, 2]]
    slopes = jax.grad(lambda step: jnp.sum(pj.L1().prox(points, step)))(0.25)
    assert float(slopes) == -1 + 1 - 1 - 1


def test_prox_of_the_mean_over_an_axis():
    x = jnp.array([[2.0, -0.5], [1.0, 3.0]])
    mean = pj.L1(reduction="mean", axis_name="batch")
    actual = jax.vmap(lambda v: mean.prox(v, 2.0), axis_name="batch")(x)
    assert_close(actual, pj.L1(reduction="mean").prox(x, 2.0))


@pytest.mark.parametrize(
    "config",
    [
        pj.Lp(p=0.4),
        pj.SmoothL0(gamma=1.0),
        pj.L2(center="mean"),
        pj.L2(clip=1.0),
        pj.L1() + pj.L2(),
        2.0 * pj.SmoothL0(gamma=1.0),
        pj.Orthogonality(),
        pj.KLDivergence(),
        pj.Entropy(),
        pj.Consistency(),
    ],
    ids=repr,
)
def test_no_proximal_operator(config):
    with pytest.raises(NotImplementedError, match="proximal operator"):
        config.prox(jnp.ones((2, 2)), 1.0)


@pytest.mark.parametrize(
    "config",
    [
        pj.L2(center="mean"),
        pj.GroupLasso(axis=0),
        pj.KLDivergence(),
        pj.Orthogonality(),
        pj.L1() + pj.GroupLasso(axis=0),
        2.0 * pj.L2(center="mean"),
    ],
    ids=repr,
)
def test_not_elementwise(config):
    with pytest.raises(NotImplementedError, match="single values"):
        config.elementwise(jnp.ones((2, 2)))


# The constructor.


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: pj.SmoothL0(gamma=0), r"SmoothL0\.gamma must be above 0, got 0"),
        (lambda: pj.SmoothL0(gamma=-1.5), r"SmoothL0\.gamma must be above 0, got -1\.5"),
        (lambda: pj.SmoothL0(gamma=float("nan")), r"SmoothL0\.gamma .*got nan"),
        (lambda: pj.SmoothL0(gamma=np.float32(-1)), r"SmoothL0\.gamma must be above 0.*-1"),
        (lambda: pj.Lp(p=0.0), r"Lp\.p must be above 0"),
        (lambda: pj.Lp(p=1.0, eps=-1e-3), r"Lp\.eps must be at least 0, got -0\.001"),
        (lambda: pj.ElasticNet(l1_ratio=1.5), r"ElasticNet\.l1_ratio must be in \[0, 1\].*1\.5"),
        (lambda: pj.ElasticNet(l1_ratio=-1), r"ElasticNet\.l1_ratio must be in \[0, 1\], got -1"),
        (lambda: pj.JSDivergence(mixture=2), r"JSDivergence\.mixture must be in \[0, 1\], got 2"),
        (lambda: pj.Huber(delta=0), r"Huber\.delta must be above 0"),
        (lambda: pj.L2(clip=0.0), r"L2\.clip must be above 0"),
        (lambda: pj.Entropy(temperature=0), r"Entropy\.temperature must be above 0"),
        (lambda: pj.L1(weights=-1), r"L1\.weights must be at least 0, got -1"),
        (lambda: pj.Term(pj.L1(), "x", weight=float("nan")), r"Term\.weight .*got nan"),
        (lambda: pj.L1(reduction="avg"), r"L1\.reduction .*'sum', 'mean', 'none', got 'avg'"),
        (lambda: pj.L2(center="median"), r"L2\.center must be one of 'mean', got 'median'"),
        (
            lambda: pj.KLDivergence("backward"),
            r"KLDivergence\.direction .*'forward', 'reverse', 'symmetric', got 'backward'",
        ),
        (lambda: pj.Orthogonality("weak"), r"Orthogonality\.mode .*'soft', 'hard', 'spectral'"),
        (lambda: pj.Orthogonality(axis="columns"), r"Orthogonality\.axis .*'rows'.*'columns'"),
        (lambda: pj.Consistency("cos"), r"Consistency\.metric .*'mse', .*got 'cos'"),
        (lambda: dataclasses.replace(pj.L1(), weights=-1.0), r"L1\.weights must be at least 0"),
    ],
)
def test_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: pj.SmoothL0(gamma="big"), r"SmoothL0\.gamma must be a number.*'big'"),
        (lambda: pj.SmoothL0(gamma=None), r"SmoothL0\.gamma must be a number.*None"),
        (lambda: pj.SmoothL0(), "gamma"),
        (lambda: pj.Lp(), "'p'"),
        (lambda: pj.GroupLasso(), "axis"),
        (lambda: pj.L1(gamma=1.0), "gamma"),
        (lambda: pj.Entropy(True), "positional"),
    ],
)
def test_wrong_arguments(make, message):
    with pytest.raises(TypeError, match=message):
        make()


def test_only_plain_numbers_are_checked():
    assert pj.SmoothL0(gamma=jnp.float32(-1)).gamma == -1
    assert jax.jit(lambda gamma: pj.SmoothL0(gamma=gamma).gamma)(-1.0) == -1
    assert jax.vmap(lambda gamma: pj.SmoothL0(gamma=gamma)(jnp.ones(1)))(jnp.ones(2)).shape == (2,)


# What always holds.

values = st.floats(-8, 8, width=32)
arrays = st.lists(values, min_size=6, max_size=6).map(lambda x: np.asarray(x, np.float32))


@jax.jit
def _split_and_scaled(config, x, scale):
    halves = {"a": x[:2], "b": [x[2:], None]}
    return (
        (config(x), config(halves)),
        ((scale * config)(x), scale * config(x)),
        ((config + scale * config)(x), (1 + scale) * config(x)),
        (jnp.sum(config.elementwise(x)), config(x)),
        (config(x, where=x > 0), config(jnp.where(x > 0, x, 0))),
    )


@hypothesis.settings(deadline=None, max_examples=25, derandomize=True, database=None)
@hypothesis.given(x=arrays, scale=st.floats(0, 4, width=32))
@pytest.mark.parametrize("config", [pj.L1(), pj.SmoothL0(gamma=0.5), pj.Huber(delta=2.0)])
def test_identities(config, x, scale):
    for actual, expected in _split_and_scaled(config, x, scale):
        assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@jax.jit
def _prox_pair(config, a, b, step_size):
    return config.prox(a, step_size), config.prox(b, step_size)


@hypothesis.settings(deadline=None, max_examples=25, derandomize=True, database=None)
@hypothesis.given(a=arrays, b=arrays, step_size=st.floats(0, 8, width=32))
@pytest.mark.parametrize("config", [pj.L1(), pj.ElasticNet(), pj.Huber(), pj.GroupLasso(axis=0)])
def test_prox_is_nonexpansive(config, a, b, step_size):
    near_a, near_b = _prox_pair(config, a, b, step_size)
    assert np.linalg.norm(near_a - near_b) <= np.linalg.norm(a - b) * (1 + 1e-6) + 1e-6


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: pj.SmoothL0(gamma=pj.anneal(1.0, 0.0, start=0, end=9)), "gamma must be above 0"),
        (lambda: pj.Lp(p=pj.anneal(-1.0, 1.0, start=0, end=9)), "p must be above 0"),
        (lambda: pj.proximal(pj.L1(), -0.1), "learning_rate must be at least 0, got -0.1"),
    ],
)
def test_the_ends_of_a_schedule_are_in_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pj.KLDivergence()(jnp.zeros(2)), r"KLDivergence takes 2 input\(s\), got 1"),
        (lambda: pj.L1()(jnp.zeros(2), jnp.ones(2, bool)), "a mask is passed as where="),
        (lambda: pj.l1([1.0, 2.0]), "expected an array, got a list"),
        (
            lambda: pj.smooth_l0(jnp.zeros(2), pj.anneal(1.0, 0.1, start=0, end=9)),
            "gamma is a schedule",
        ),
    ],
)
def test_wrong_inputs_are_named(call, message):
    with pytest.raises(TypeError, match=message):
        call()


def test_configs_keep_float32_under_x64():
    with jax.enable_x64(True):
        assert pj.L1()(jnp.ones(3, jnp.float32)).dtype == jnp.float32
        assert pj.L1(reduction="mean")(jnp.ones(3, jnp.bfloat16)).dtype == jnp.float32
        assert pj.L1()(jnp.ones(3, jnp.float64)).dtype == jnp.float64


STREAMED = {
    "kl": (pj.KLDivergence, pj.kl_from_logits, 2, {"direction": "reverse"}),
    "js": (pj.JSDivergence, pj.js_from_logits, 2, {"mixture": 0.3}),
    "entropy": (pj.Entropy, pj.entropy_from_logits, 1, {"normalize": True}),
}


@pytest.mark.parametrize(
    ("make", "function", "inputs", "settings"), STREAMED.values(), ids=STREAMED.keys()
)
def test_divergences_from_logits(make, function, inputs, settings):
    """Over one array and over trees of unlike positions, with a temperature and a mask."""
    config = make(inputs="logits", temperature=0.5, block_size=2, **settings)
    x, y = (
        [lattice(i + j, n, 5).astype(np.float32) for j in range(inputs)]
        for i, n in ((0, 3), (7, 4))
    )
    assert_close(config(*x), function(*x, temperature=0.5, **settings))
    joined = [np.concatenate(pair) for pair in zip(x, y, strict=True)]
    trees = [{"a": a, "b": b} for a, b in zip(x, y, strict=True)]
    assert_close(config(*trees), function(*joined, temperature=0.5, **settings), rtol=1e-6)
    mask = np.array([True, False, True])
    masked = function(*(a[mask] for a in x), temperature=0.5, **settings)
    assert_close(config(*x, where=mask), masked, rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: pj.KLDivergence(temperature=2.0),
            "KLDivergence.temperature needs inputs",
        ),
        (lambda: pj.JSDivergence(block_size=8), "JSDivergence.block_size needs inputs='logits'"),
        (lambda: pj.Entropy(class_axis_name="c"), "Entropy.class_axis_name needs inputs='logits'"),
        (
            lambda: pj.KLDivergence(inputs="logits", axis=0),
            "KLDivergence.axis needs inputs=.logprobs.",
        ),
        (lambda: pj.KLDivergence(inputs="probs"), "KLDivergence.inputs .*'logprobs', 'logits'"),
        (lambda: pj.KLDivergence(inputs="logits", temperature=0), "KLDivergence.temperature"),
    ],
)
def test_options_of_logits(make, message):
    with pytest.raises(ValueError, match=message):
        make()
