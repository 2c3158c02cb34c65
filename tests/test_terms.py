"""Configs: the same as their functions, on pytrees, with an algebra and proximal operators."""

import dataclasses
import re
from typing import get_args

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
from tests.catalogue import (
    CONFIGS,
    GATE_CASES,
    GATE_CONFIGS,
    Divergence,
    every,
    first_of_each,
    numbers_of,
    only,
)
from tests.oracles import assert_close, lattice
from tests.programs import jit_once, quick_jit

# One of each function; the rest of the options are in make test-slow, where they compile.
FEW = first_of_each(lambda case: (case.function, case.by_row), CONFIGS)
few_configs = every(CONFIGS, slow=lambda case: case.name not in FEW)
every_config = every(CONFIGS)
every_separable = every(only(lambda case: case.is_a("separable"), CONFIGS))
MASK = np.array([[1, 1, 0], [0, 0, 0], [1, 1, 1], [0, 1, 1]], bool)


def ramp(init, final):
    """A schedule that is halfway at step 1."""
    return pj.anneal(init, final, start=0, end=2)


def inputs_of(case, seed=0, shape=(4, 3)):
    """Inputs of its config, log-probabilities where it takes them."""
    return tuple(np.float32(case.prepare(x)) for x in case.data(seed, shape))


def weights_of(case):
    return {"weights": 0.5} if "weights" in numbers_of(case.function) else {}


# A config is its function.


@few_configs
def test_a_config_is_its_function(case):
    mask = {1: MASK[0, 0], 2: case.where(MASK[:, 1]), 3: MASK}[len(case.mask_shape)]

    def pairs(inputs):
        if not case.reduced:
            yield case.config()(*inputs), case.raw(*inputs)
            return
        for reduction, where in [("sum", None), ("mean", mask), ("none", mask)]:
            options = {"reduction": reduction} | weights_of(case)
            config = case.config(**options)
            assert config.reduction == reduction
            yield config(*inputs, where=where), case.raw(*inputs, **options, where=where)

    for actual, expected in quick_jit(lambda inputs: list(pairs(inputs)))(inputs_of(case)):
        assert_close(actual, expected, rtol=1e-6)


def test_options_of_divergences():
    def pairs(x):
        log_p, log_q = jax.nn.log_softmax(x), jax.nn.log_softmax(-x)
        inputs = (log_p.T, log_q.T)
        yield pj.KLDivergence(axis=0)(*inputs), pj.kl_divergence(log_p, log_q)
        yield pj.Entropy(maximize=True)(log_p), -pj.entropy(log_p)
        none = pj.Entropy(maximize=True, reduction="none")({"a": log_p, "b": None})
        yield none, {"a": -pj.entropy(log_p, reduction="none"), "b": None}

    x = lattice(0, 3, 4).astype(np.float32)
    for actual, expected in jax.jit(lambda x: list(pairs(x)))(x):
        chex.assert_trees_all_close(actual, expected, rtol=1e-6)


def test_sampled_entropy():
    log_p, mask = jnp.array([-1.0, -2.0, np.nan]), np.array([True, True, False])
    for maximize, sign in ((False, 1.0), (True, -1.0)):
        config = pj.SampledEntropy(maximize=maximize)
        value, slope = jax.value_and_grad(lambda x, c=config: c(x, where=mask))(log_p)
        assert_close(value, 1.5 * sign)
        assert_close(slope, [-0.5 * sign, -0.5 * sign, 0])


# Numbers are leaves, options are structure.


@every_config
def test_numbers_are_leaves_and_options_are_structure(case):
    config = case.config(**weights_of(case))
    settings = {name: x for name, x in case.settings.items() if isinstance(x, float)}
    leaves = {path[0].name: leaf for path, leaf in jax.tree.leaves_with_path(config)}
    assert (settings | weights_of(case)).items() <= leaves.items()
    assert all(isinstance(leaf, float) for leaf in leaves.values())
    options = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
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


@few_configs
def test_numbers_never_retrace_and_options_do(case):
    @jit_once
    def value(config, inputs):
        return config(*inputs)

    inputs, config = inputs_of(case), case.config(**weights_of(case))
    first = value(config, inputs)
    changed = jax.tree.map(lambda x: 0.75 * x, config)
    second = value(changed, inputs)
    assert_close(second, changed(*inputs), rtol=1e-5)
    if jax.tree.leaves(changed):
        assert first != second
    if case.reduced:
        option = {"reduction": "sum" if config.reduction == "mean" else "mean"}
    else:
        name = next(x.name for x in dataclasses.fields(config) if type(x.default) is bool)
        option = {name: not getattr(config, name)}
    with pytest.raises(AssertionError, match="traced"):
        value(dataclasses.replace(config, **option), inputs)


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


@few_configs
def test_derivative_with_respect_to_the_config(case, x64):
    """By differences, off the ends of the ranges."""
    inputs, step = case.data(5, (4, 3)), 1e-6
    config = jax.tree.map(lambda x: x + 1 / 16, case.config(**weights_of(case)))
    value = quick_jit(jax.value_and_grad(lambda config: config(*map(case.prepare, inputs))))
    slopes = value(config)[1]
    leaves, structure = jax.tree.flatten(config)
    for i, slope in enumerate(jax.tree.leaves(slopes)):
        ends = [
            float(value(structure.unflatten([*leaves[:i], leaf, *leaves[i + 1 :]]))[0])
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
def test_trees_are_their_values_together(case):
    """And their values; `elementwise` too, whatever the reduction."""
    where = tree_where()
    flat = np.concatenate([np.ravel(x) for x in jax.tree.leaves(TREE)])
    included = np.concatenate([np.ravel(x) for x in jax.tree.leaves(where)])

    @quick_jit
    def everything(tree):
        pairs = []
        for reduction in ("sum", "mean"):
            config = case.config(reduction=reduction)
            pairs.append((config(tree), case.raw(flat, reduction=reduction)))
            expected = case.raw(flat, reduction=reduction, where=included)
            pairs.append((config(tree, where=where), expected))
        none = case.config(reduction="none")
        trees = none(tree), none.elementwise(tree), config.elementwise(tree)
        return pairs, trees, jax.tree.map(lambda x: case.raw(x, reduction="none"), tree)

    pairs, trees, expected = everything(TREE)
    for actual, desired in pairs:
        assert_close(actual, desired)
    for actual in trees:
        assert jax.tree.structure(actual) == jax.tree.structure(TREE)
        assert isinstance(actual["nested"][1], optax.MaskedNode)
        chex.assert_trees_all_close(actual, expected, rtol=1e-6)


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
        (pj.SpectralNorm(), 15),
        (pj.SpectralNorm(reduction="mean", weights={"a": 3.0, "b": 0.5}), 10),
        (pj.Orthogonality(), 0),
    ]
    tree = {"a": jnp.array([[3.0, 4.0], [0.0, 0.0]]), "b": jnp.array([[6.0, 8.0]])}
    values = jax.jit(lambda configs, tree: [config(tree) for config in configs])
    for value, (_, expected) in zip(values([c for c, _ in cases], tree), cases, strict=True):
        if isinstance(expected, dict):
            expected = {name: np.float32(x) for name, x in expected.items()}
        chex.assert_trees_all_close(value, expected, rtol=1e-6)
    assert_close(pj.Orthogonality()({"a": jnp.ones((2, 2)), "b": None, "c": jnp.eye(3)}), 2)


@pytest.mark.parametrize("axis", ["rows", "vocabulary"])
@pytest.mark.parametrize("normalize", [True, False])
def test_orthogonality_without_rows_that_a_mask_excludes(axis, normalize):
    penalty = pj.Orthogonality(normalize=normalize, axis=axis)
    x = jnp.array([[1.0, 1.0], [jnp.nan, jnp.inf], [1.0, 2.0]])
    where = jnp.array([[True], [False], [True]])
    assert_close(penalty({"x": x}, where=where), penalty(x[::2]))
    slope = jax.grad(lambda x: penalty(x, where=where))(x)
    assert_close(slope[::2], jax.grad(penalty)(x[::2]))
    assert slope[1].tolist() == [0, 0]


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
        (lambda: pj.Orthogonality("hard")(jnp.eye(2), where=jnp.ones(2, bool)), "takes no where"),
        (lambda: pj.Orthogonality()(jnp.eye(2), where=jnp.ones(3, bool)), "where must broadcast"),
        (lambda: pj.L1()({"a": jnp.ones(3)}, where=[True]), "where must be a tree like the input"),
        (lambda: pj.L2(center={"b": 1.0})({"a": jnp.ones(3)}), "center must be a tree like"),
        (lambda: pj.Consistency()({"a": jnp.ones(3)}, {"b": jnp.ones(3)}), "an input must be a"),
        (lambda: pj.Consistency()({"a": jnp.ones(3)}, {"a": None}), "None in the other"),
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
        assert scaled.at(1) == scaled
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
    "l1, mean": pj.L1(reduction="mean"),
    "l1, adaptive": pj.L1(weights=WEIGHTS),
    "l1, scaled mean": 3 * pj.L1(weights=WEIGHTS, reduction="mean") * 2.0,
    "l2 about a tree": pj.L2(center=CENTER, weights=WEIGHTS),
    "elastic net": pj.ElasticNet(l1_ratio=0.7, weights=WEIGHTS),
    "huber, mean": pj.Huber(delta=0.25, weights=5.0, reduction="mean"),
    "group lasso, mean": pj.GroupLasso(axis=(-1,), weights=3.0, reduction="mean"),
    "group lasso over all axes": 0.5 * pj.GroupLasso(axis=(0, 1)),
    "l1 + l2": 0.5 * pj.L2(center=CENTER, reduction="mean") + 0.3 * pj.L1(weights=WEIGHTS),
    "several of each": pj.ElasticNet(l1_ratio=0.7, weights=WEIGHTS)
    + pj.L1(weights=0.2)
    + 2.0 * (pj.L2(weights=WEIGHTS) + pj.ElasticNet(l1_ratio=0.2, reduction="mean"))
    + pj.L2(center=CENTER, weights=0.3)
    + pj.L1(reduction="mean"),
    "huber + l1 + l2": pj.Huber(delta=0.25) + 0.2 * pj.L1() + pj.L2(center=0.4),
    "sparse group lasso": pj.GroupLasso(axis=-1, reduction="mean")
    + 0.3 * (pj.L1(weights=WEIGHTS) + pj.L2(center=CENTER)),
}
# Of which Powell's minimum is near.
SEPARABLE = {
    name: config
    for name, config in PROXIMAL.items()
    if not any(isinstance(part, pj.GroupLasso) for part in config.summands)
}


@every_config
def test_prox_is_that_of_the_function(case):
    """Of every array of a tree, times the weight; what has none says so."""
    config = case.config(**weights_of(case))
    point = jax.tree.map(np.float32, POINT)
    if not case.is_a("proximal"):
        with pytest.raises(NotImplementedError, match="proximal operator"):
            config.prox(point, 0.5)
        return
    nearest = (3 * config).prox(point, 0.25)
    expected = jax.tree.map(lambda v: case.prox(v, 0.75 * config.weights), point)
    assert jax.tree.structure(nearest) == jax.tree.structure(POINT)
    chex.assert_trees_all_close(nearest, expected, rtol=1e-6)


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
        if config in SEPARABLE.values():
            assert_close(nearest, found.x, rtol=0, atol=1e-3)


@pytest.mark.parametrize("last", [pj.MCP(gamma=1.5, lam=0.7), pj.SCAD(a=2.5, lam=0.5)])
def test_prox_of_a_sum_that_is_not_convex(last):
    """None of a fine grid is lower."""
    config, step_size = 0.5 * pj.L1() + last + pj.L2(center=-0.5, weights=0.1), 1.5
    points, grid = np.linspace(-4, 4, 81), np.linspace(-5, 5, 5001)
    with jax.enable_x64(True):
        nearest = np.asarray(config.prox(points, step_size))

        def total(z, v):
            return 0.5 * (z - v) ** 2 + step_size * np.asarray(config.elementwise(z))

        lowest = total(grid[:, None], points).min(0)
        assert (total(nearest, points) <= lowest + 1e-12).all()
    assert len(np.unique(nearest.round(6))) > 40


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
        2.0 * pj.SmoothL0(gamma=1.0),
        pj.L1() + pj.SmoothL0(gamma=1.0),
        pj.L1() + pj.L2(center="mean"),
        pj.Huber() + 0.5 * pj.MCP(gamma=2.0),
        pj.GroupLasso(axis=0) + pj.L2(weights=np.ones(2)),
    ],
    ids=repr,
)
def test_no_proximal_operator_of_a_whole(config):
    with pytest.raises(NotImplementedError, match="proximal operator"):
        config.prox(jnp.ones((2, 2)), 1.0)


@every(only(lambda case: not case.is_a("separable"), CONFIGS))
def test_not_elementwise(case):
    for config in (case.config(), 2.0 * case.config(), pj.L1() + case.config()):
        with pytest.raises(NotImplementedError, match="single values"):
            config.elementwise(jnp.ones((2, 2)))


# The constructor.


@every(first_of_each(lambda case: case.entry, CONFIGS))
def test_every_field_is_checked(case):
    """Numbers against their ranges, options against their choices; the error names both."""
    for field in dataclasses.fields(case.entry.config):
        name = f"{case.entry.config.__name__}.{field.name}"
        if "valid" in field.metadata:
            valid = field.metadata["valid"]
            for number in (-1, -0.5, 0, 0.0, 1.5, np.float32(-2), float("nan")):
                if not valid.contains(number):
                    message = re.escape(f"{name} must be {valid.description}, got {number!r}")
                    with pytest.raises(ValueError, match=message):
                        case.config(**{field.name: number})
        if choices := field.metadata.get("choices"):
            valid = ", ".join(map(repr, get_args(choices) or choices))
            with pytest.raises(ValueError, match=f"{name} must be one of {valid}, got 'x'"):
                case.config(**{field.name: "x"})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: pj.SmoothL0(gamma=float("nan")), r"SmoothL0\.gamma .*got nan"),
        (lambda: pj.SmoothL0(gamma=np.float32(-1)), r"SmoothL0\.gamma must be above 0.*-1"),
        (lambda: pj.Term(pj.L1(), "x", weight=float("nan")), r"Term\.weight .*got nan"),
        (lambda: pj.L2(center="median"), r"L2\.center must be one of 'mean', got 'median'"),
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
@every(only(lambda case: case.is_a("proximal") and case.is_a("convex"), FEW))
def test_prox_is_nonexpansive(case, a, b, step_size):
    config = case.config()
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
        (lambda: pj.KLDivergence(inputs="hidden")(1.0, 2.0), "takes 4 to 6 inputs, got 2"),
        (lambda: pj.GradientPenalty("f"), "GradientPenalty.f must be of type Callable"),
        (lambda: pj.GradientPenalty(jnp.sum)(), "GradientPenalty takes 1 to 2 inputs, got 0"),
        (lambda: pj.L1()(jnp.zeros(2), jnp.ones(2, bool)), "a mask is passed as where="),
        (lambda: pj.l1([1.0, 2.0]), "x must be an array, got a list"),
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


@every(only(lambda case: case.streamed and isinstance(case.entry, Divergence), FEW))
def test_divergences_from_logits(case):
    """Over one array and over trees of unlike positions, with a temperature and a mask."""
    case, mask = case.having(temperature=0.5), np.array([True, False, True])
    config = case.config()

    @quick_jit
    def pairs(x, y):
        joined = [jnp.concatenate(pair) for pair in zip(x, y, strict=True)]
        trees = [{"a": a, "b": b} for a, b in zip(x, y, strict=True)]
        masked = case.raw(*(a[mask] for a in x))
        return [
            (config(*x), case.raw(*x)),
            (config(*trees), case.raw(*joined)),
            (config(*x, where=mask), masked),
        ]

    for actual, expected in pairs(inputs_of(case, 0, (3, 5)), inputs_of(case, 7, (4, 5))):
        assert_close(actual, expected, rtol=1e-6)


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
        (lambda: pj.Entropy(softcap=2.0), "Entropy.softcap needs inputs='hidden', got 2.0"),
        (lambda: pj.CrossEntropy(inputs="logprobs"), "must be one of 'logits', 'hidden'"),
    ],
)
def test_options_of_logits(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# Of hidden states, and of labels.

NAMES = ("hidden_p", "kernel_p", "bias_p", "hidden_q", "kernel_q", "bias_q")


def heads():
    """Hidden states, kernels and biases of two heads by name, labels and a mask."""
    shapes = [(2, 6, 5), (5, 9), (9,), (2, 6, 4), (4, 9), (9,)]
    arrays = {
        n: np.float32(lattice(i, *s)) for i, (n, s) in enumerate(zip(NAMES, shapes, strict=True))
    }
    return arrays, np.arange(12).reshape(2, 6) % 9, np.arange(12).reshape(2, 6) % 5 != 0


OF_HIDDEN = [
    pj.KLDivergence("reverse"),
    pytest.param(pj.JSDivergence(0.3), marks=pytest.mark.slow),
    pytest.param(pj.AlphaDivergence(0.3), marks=pytest.mark.slow),
    pj.Entropy(maximize=True),
    pj.CrossEntropy(inputs="logits", z_loss=0.1),
]


@pytest.mark.parametrize("of_logits", OF_HIDDEN, ids=lambda config: type(config).__name__)
def test_of_hidden_states(of_logits):
    """With biases or without, as of the logits that they make; of trees of heads too."""
    weights = np.linspace(-0.5, 1, 6, dtype=np.float32)
    of_logits = dataclasses.replace(of_logits, inputs="logits", temperature=0.7, weights=weights)
    of_hidden = dataclasses.replace(of_logits, inputs="hidden", softcap=3.0)
    arrays, labels, mask = heads()
    pairs = [NAMES[:3], NAMES[3:]][: 1 if of_hidden.takes[0] < 4 else 2]
    extra = (labels,) if isinstance(of_logits, pj.CrossEntropy) else ()

    @quick_jit
    def values(arrays):
        def logits(hidden, kernel, bias):
            return 3 * jnp.tanh((arrays[hidden] @ arrays[kernel] + arrays[bias]) / 3)

        inputs = [arrays[name] for pair in pairs for name in pair[:2]] + [*extra]
        biases = [arrays[pair[2]] for pair in pairs]
        trees = [{"a": x} for x in (*inputs, *biases)]
        without = [0 * bias for bias in biases]
        return [
            (
                of_hidden(*inputs, *biases, where=mask),
                of_logits(*(logits(*p) for p in pairs), *extra, where=mask),
            ),
            (of_hidden(*trees, where=mask), of_hidden(*inputs, *biases, where=mask)),
            (of_hidden(*inputs), of_hidden(*inputs, *without)),
        ]

    for actual, expected in values(arrays):
        assert_close(actual, expected, rtol=1e-5)
    assert pj.from_json(pj.to_json(of_hidden)) == of_hidden


def test_a_distillation_is_two_terms():
    arrays, labels, mask = heads()
    of_both = {"inputs": "hidden", "softcap": (3.0, None)}
    objective = pj.Objective(
        terms={
            "ce": pj.Term(
                pj.CrossEntropy(inputs="hidden", z_loss=0.1, softcap=3.0),
                on=("hidden_p", "kernel_p", "labels", "bias_p"),
                where="mask",
                weight=0.7,
            ),
            "kl": pj.Term(
                pj.KLDivergence("reverse", temperature=2.0, **of_both),
                on=("hidden_p", "kernel_p", "hidden_q", "kernel_q", "bias_p", "bias_q"),
                where="mask",
                weight=pj.anneal(0.0, 0.6, start=0, end=2),
            ),
        }
    )

    def ours(arrays):
        return objective({**arrays, "labels": labels, "mask": mask}, step=1)

    def fused(arrays):
        biases = {name: arrays[name] for name in ("bias_p", "bias_q")}
        heads = (arrays[name] for name in NAMES if name not in biases)
        loss = pj.linear_distillation(
            *heads, labels, **biases, z_loss=0.1, temperature=2.0, softcap=(3.0, None),
            direction="reverse", cross_entropy_weight=0.7, kl_weight=0.3, where=mask,
        )  # fmt: skip
        return loss.total, {"ce": loss.cross_entropy, "kl": loss.kl}

    both = [quick_jit(jax.value_and_grad(f, has_aux=True))(arrays) for f in (ours, fused)]
    ((total, metrics), slopes), ((expected, parts), desired) = both
    assert_close(total, expected, rtol=1e-6)
    assert_close([metrics["ce"], metrics["kl"]], [parts["ce"], parts["kl"]], rtol=1e-6)
    chex.assert_trees_all_close(slopes, desired, rtol=1e-5, atol=1e-7)


# Magnitudes, gradients and gates.


def test_magnitudes_of_trees():
    tree = {"a": np.float32([[3.0, -3.0], [0.0, 0.0]]), "b": None, "c": np.float32([[1.0, 7.0]])}
    where = {"a": np.array([[True, True], [False, False]]), "b": None, "c": True}
    a, c = (3 - 1) ** 2, (5 - 1) ** 2
    everything = (np.sqrt(4.5) - 1) ** 2
    assert_close(pj.OutputMagnitude(axis=-1)(tree), (a + 1 + c) / 3)
    assert_close(pj.OutputMagnitude(axis=-1)(tree, where=where), (a + c) / 2)
    assert_close(pj.OutputMagnitude(axis=-1, reduction="sum")(tree, where=where), a + c)
    assert_close(pj.OutputMagnitude()(tree), (everything + c) / 2)
    assert_close(pj.OutputMagnitude()(tree, where=where), (a + c) / 2)
    none = pj.OutputMagnitude(target=pj.anneal(0.0, 2.0, start=0, end=2), reduction="none").at(1)
    chex.assert_trees_all_close(none(tree), {"a": everything, "b": None, "c": c}, rtol=1e-6)


@pytest.mark.parametrize("axis", [None, -1])
def test_magnitudes_are_of_the_global_batch(axis):
    """A tree in one go, and member by member, one of which has nothing included."""
    tree = {"a": np.float32(lattice(0, 4, 2, 3)), "b": np.float32(lattice(1, 4, 1, 3))}
    where = {"a": lattice(2, 4, 2, 3) > -0.3, "b": np.arange(4)[:, None, None] > 1}
    config = pj.OutputMagnitude(axis=axis)
    named = dataclasses.replace(config, axis_name="batch")
    values = jax.vmap(lambda x, m: named(x, where=m), axis_name="batch")(tree, where)
    assert_close(values, config(tree, where=where))


def linear(weights, x):
    return jnp.dot(weights["w"], x)


def test_gradient_penalties_in_an_objective():
    """Of a linear critic, whose gradient is its weights everywhere."""
    w, target = np.array([3.0, 4.0]), 2.0
    key = jax.random.key(0)
    outputs = {"critic": {"w": jnp.array(w)}, "real": jnp.ones((4, 2)), "fake": jnp.zeros((4, 2))}
    between = pj.InterpolatedGradientPenalty(linear, target_norm=ramp(0.0, 2 * target))
    terms = {
        "at": pj.Term(pj.GradientPenalty(linear), on=("critic", "real"), weight=0.5),
        "between": pj.Term(between, on=("critic", "real", "fake", "key")),
    }
    objective = pj.Objective(terms=terms)

    @jax.jit
    def value(critic, key):
        return objective({**outputs, "critic": critic, "key": key}, step=1)

    (total, metrics), slope = jax.value_and_grad(value, has_aux=True)(outputs["critic"], key)
    assert_close([metrics["at"], metrics["between"]], [(5 - 1) ** 2, (5 - target) ** 2])
    assert_close(total, 0.5 * 16 + 9)
    assert_close(slope["w"], (0.5 * 2 * 4 + 2 * 3) * w / 5)


def test_gradient_penalties_of_functions():
    def cube(x):
        return jnp.sum(x**3)

    a, b, key = np.float32(lattice(0, 4, 3)), np.float32(lattice(1, 4, 3)), jax.random.key(1)
    norms = np.linalg.norm(3 * np.float64(a) ** 2, axis=-1)
    assert_close(pj.GradientPenalty(cube, target_norm=0.5)(a), ((norms - 0.5) ** 2).mean())
    expected = pj.interpolated_gradient_penalty(cube, a, b, key)
    assert_close(pj.InterpolatedGradientPenalty(cube)(a, b, key), expected)
    assert pj.GradientPenalty(cube) == pj.GradientPenalty(cube) != pj.GradientPenalty(jnp.sum)
    with pytest.raises(ValueError, match="takes no where"):
        pj.GradientPenalty(cube)(a, where=np.ones(4, bool))
    with pytest.raises(TypeError, match=r"GradientPenalty\.f.*can't be serialised"):
        pj.to_dict(pj.GradientPenalty(cube))


@every(only(lambda case: case.name in GATE_CONFIGS, GATE_CASES))
def test_a_gate_is_its_function(case):
    logits, config = np.float32(lattice(0, 3, 5)), GATE_CONFIGS[case.name]
    keys = [None, jax.random.key(0)] if case.is_a("random") else [None]
    for key in keys:
        options = {"key": key} if case.is_a("random") else {}
        np.testing.assert_array_equal(config(logits, key), case.raw(logits, **options))
    assert np.asarray(config(logits)).shape == logits.shape
    assert config.at(3) == config


def test_gates_are_annealed():
    logits, key = np.float32(lattice(0, 3, 5)), jax.random.key(0)

    @jit_once
    def mask(gate, step):
        return gate.at(step)(logits, key)

    for final in (0.5, 1.5):
        gate = pj.LogisticGate(temperature=ramp(1.0, final), hard=False)
        expected = pj.logistic_gate(logits, key, temperature=(1 + final) / 2, hard=False)
        assert_close(mask(gate, 1), expected)
    with pytest.raises(TypeError, match=r"call \.at\(step\)"):
        gate(logits)
    step = pj.JumpReLUGate(threshold=ramp(0.0, 0.5)).at(1)
    np.testing.assert_array_equal(step(logits) * logits, pj.jump_relu(logits, 0.25))
    pushed = jax.grad(lambda gate: gate(logits).sum())(dataclasses.replace(step, bandwidth=1.0))
    assert_close(pushed.threshold, -(abs(logits - 0.25) < 0.5).sum())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: pj.LogisticGate(temperature=0), "LogisticGate.temperature must be above 0"),
        (lambda: pj.HardConcreteGate(low=0.1), "HardConcreteGate.low must be below 0, got 0.1"),
        (lambda: pj.HardConcreteL0(high=1.0), "HardConcreteL0.high must be above 1, got 1.0"),
        (lambda: pj.TopKGate(9)(jnp.ones(4)), "k must be from 1 to the size of the axis, 4, got 9"),
    ],
)
def test_gates_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_expected_open_gates():
    """The expectation of draws; separable, so that pytrees and masks are as of any penalty."""
    penalty = pj.HardConcreteL0(temperature=0.5, low=-0.2, high=1.3, reduction="mean")
    logits = np.float32([-1.0, 0.5, 2.0])
    gates = pj.HardConcreteGate(temperature=0.5, low=-0.2, high=1.3)
    drawn = gates(jnp.broadcast_to(logits, (100_000, 3)), jax.random.key(0))
    assert_close(penalty.elementwise(logits), (np.asarray(drawn) > 0).mean(0), atol=1e-2)
    halves = {"a": logits[:1], "b": np.append(logits[1:], np.float32(np.nan))}
    where = {"a": True, "b": np.array([True, True, False])}
    assert_close(penalty(halves, where=where), penalty.elementwise(logits).mean())
