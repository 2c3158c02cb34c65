"""What all configs share: leaves and options, equality, copies, stacks, bare schedules."""

import copy
import pickle

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import penalties_jax as pj
from tests.catalogue import EXAMPLES, GATE_CONFIGS
from tests.oracles import assert_close

CONFIGS = (
    EXAMPLES
    | GATE_CONFIGS
    | {
        "scaled": 0.1 * pj.L1(),
        "sum": pj.L1() + 2.0 * pj.SmoothL0(gamma=pj.anneal(1.0, 0.1, start=0, end=10)),
        "schedule": pj.anneal(1.0, 0.1, start=0, end=10, shape="cosine"),
        "arrays": pj.L2(center={"a": jnp.ones(3), "b": np.zeros(2)}, weights=np.ones((2, 3))),
        "term": pj.Term(pj.L1(), on=("x", "y"), where="mask", weight=0.5),
        "objective": pj.Objective(
            terms={"a": pj.Term(pj.L1(), on="x"), "b": pj.Term(pj.L2(), "y")}
        ),
    }
)
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


def closure(step):
    return 0.5 + 0.25 * step


@every_config
@pytest.mark.parametrize(
    "change",
    [lambda x: object(), lambda x: None, lambda x: "name", lambda x: -np.ones(2)],
    ids=["objects", "None", "strings", "arrays"],
)
def test_anything_can_be_mapped_into_a_config(config, change):
    mapped = jax.tree.map(change, config)
    assert type(mapped) is type(config)
    changed = jax.tree.leaves(mapped, is_leaf=lambda x: x is None)
    originals = jax.tree.leaves(config, is_leaf=lambda x: x is None)
    assert len(changed) == len(originals)
    for original, new in zip(originals, changed, strict=True):
        assert type(new) is type(None if original is None else change(original))


@every_config
def test_the_same_again(config):
    leaves, structure = jax.tree.flatten(config)
    again = structure.unflatten(leaves)
    doubled = jax.tree.map(lambda x: 2 * x + 1, config)
    assert again == config
    assert hash(again) == hash(config)
    assert (doubled == config) is (not leaves)
    assert (doubled != config) is bool(leaves)


@every_config
@pytest.mark.parametrize(
    "copied",
    [copy.copy, copy.deepcopy, lambda config: pickle.loads(pickle.dumps(config))],
    ids=["copy", "deepcopy", "pickle"],
)
def test_copies_are_equal(config, copied):
    assert copied(config) == config
    assert jax.tree.structure(copied(config)) == jax.tree.structure(config)


@every_config
def test_equal_configs_look_equal(config):
    assert repr(pickle.loads(pickle.dumps(config))) == repr(config)
    assert repr(jax.tree.map(lambda x: x, config)) == repr(config)


def test_equality_sees_type_options_shapes_and_values():
    ones = pj.L1(weights=np.ones(2))
    assert ones == pj.L1(weights=jnp.ones(2))
    different = [
        pj.L1(weights=np.ones(3)),
        pj.L1(weights=np.ones((1, 2))),
        pj.L1(weights=np.array([1.0, 2.0])),
        pj.L1(weights=np.ones(2), reduction="mean"),
        pj.L2(weights=np.ones(2)),
        pj.L1(),
        None,
        1.0,
    ]
    for other in different:
        assert (ones == other) is False
        assert (ones != other) is True
    assert pj.L2(center="mean") != pj.L2(center=0.0) != pj.L2()
    assert pj.Lp(p=1) == pj.Lp(p=1.0)
    assert len({pj.L1(), pj.L1(), pj.L1(weights=0.5), pj.L2()}) == 3


def test_configs_are_frozen():
    with pytest.raises(AttributeError, match="weights"):
        pj.L1().weights = 2.0


def test_repr_is_short_and_complete():
    assert repr(pj.L1()) == repr(pj.L1(weights=1, reduction="sum")) == "L1()"
    assert repr(pj.SmoothL0(gamma=1, reduction="mean")) == "SmoothL0(reduction='mean', gamma=1.0)"
    assert "gamma=Anneal(init=1.0" in repr(pj.SmoothL0(gamma=pj.anneal(1, 2, start=0, end=1)))
    names = {name: getattr(pj, name) for name in pj.__all__}
    for config in (pj.Lp(p=0.5), pj.GroupLasso(axis=(0, 1)), pj.Entropy(maximize=True)):
        assert eval(repr(config), names) == config


def test_leaves_are_named_by_their_fields():
    config = pj.Term(pj.SmoothL0(gamma=pj.anneal(1, 2, start=0, end=1)), on="x")
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(config)]
    assert ".penalty.gamma.init" in paths
    assert ".weight" in paths


def test_structure_only_transformations():
    config = pj.SmoothL0(gamma=jnp.ones(3))
    shapes = jax.eval_shape(lambda config: config, config)
    assert shapes.gamma == jax.ShapeDtypeStruct((3,), jnp.float32)
    assert shapes.reduction == "sum"


# Stacks.

SHAPES = ("linear", "cubic")


def test_a_stack_maps_like_its_members():
    configs = [pj.Lp(p=p, weights=weight) for p, weight in [(0.5, 1), (1, 2.0), (2.0, 0.5)]]
    x = jnp.array([0.5, -2.0, 1.5])
    values = jax.jit(jax.vmap(lambda config: config(x)))(pj.stack(configs))
    assert_close(values, [config(x) for config in configs])


def test_a_stack_of_trees_with_schedules():
    objectives = [
        pj.Objective(terms={"l1": pj.Term(pj.L1(), "x", weight=pj.anneal(0, w, start=0, end=2))})
        for w in (1.0, 2.0)
    ]
    stacked = pj.stack(objectives)
    assert stacked.terms["l1"].weight.final.tolist() == [1, 2]
    arrays = pj.stack([pj.L1(weights=np.ones(2)), pj.L1(weights=np.zeros(2))])
    assert arrays.weights.tolist() == [[1, 1], [0, 0]]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_number_and_a_schedule_in_a_stack(shape):
    """The number stays what it is, at every step."""
    schedule = pj.anneal(4.0, 2.0, start=1, end=3, shape=shape)
    terms = [pj.Term(w * pj.SmoothL0(gamma=w), on="x", weight=w) for w in (0.5, schedule)]
    terms.append(pj.Term(schedule * pj.SmoothL0(gamma=1.5), on="x", weight=0))
    stacked = pj.stack([pj.Objective(terms={"l0": term}) for term in terms])
    steps = jnp.arange(5)
    values = jax.jit(
        jax.vmap(jax.vmap(lambda o, step: o.hyperparameters(step), (None, 0)), (0, None))
    )(stacked, steps)
    annealed = [float(schedule(step)) for step in steps]
    assert_close(values["l0/weight"], [[0.5] * 5, annealed, [0] * 5])
    assert_close(values["l0/scale"], [[0.5] * 5, annealed, annealed])
    assert_close(values["l0/gamma"], [[0.5] * 5, annealed, [1.5] * 5])
    assert len(jax.tree.leaves(pj.stack([pj.Orthogonality()] * 2))) == 0


@pytest.mark.parametrize(
    ("configs", "named"),
    [
        ([], "at least one"),
        ([pj.L1(), pj.L2()], "L1.*L2"),
        ([pj.L1(), pj.L1(reduction="mean")], r"L1\.reduction is 'sum' and 'mean'"),
        ([pj.L2(center=0.0), pj.L2(center="mean")], r"L2\.center is 0\.0 and 'mean'"),
        ([pj.L2(center="mean"), pj.L2(center=0.0)], r"L2\.center is 'mean' and 0\.0"),
        ([pj.L2(), pj.L2(center=0.0)], r"L2\.center is None and 0\.0"),
        ([pj.L2(clip=1.0), pj.L2()], r"L2\.clip is 1\.0 and None"),
        ([0.1 * pj.GroupLasso(axis=0), 0.1 * pj.GroupLasso(axis=1)], r"penalty\.axis is 0 and 1"),
        ([pj.L1() + pj.L2(), pj.L1() + pj.L1()], "Sum"),
        (
            [pj.L1(weights=pj.anneal(0, 1, start=0, end=1, shape=shape)) for shape in SHAPES],
            r"L1\.weights\.shape is 'linear' and 'cubic'",
        ),
        (
            [pj.L1(weights=pj.anneal(0, 1, start=0, end=1)), pj.L1(weights={"a": 1.0})],
            r"L1\.weights is Anneal.* and {'a': 1\.0}",
        ),
        (
            [pj.Objective(terms={name: pj.Term(pj.L1(), on="x")}) for name in "ab"],
            r"Objective\.terms",
        ),
        (
            [pj.Objective(terms={"a": pj.Term(pj.L1(), on=on)}) for on in "xy"],
            r"terms\['a'\]\.on is 'x' and 'y'",
        ),
    ],
)
def test_what_cannot_be_stacked(configs, named):
    with pytest.raises(ValueError, match=named):
        pj.stack(configs)


# Bare schedules: callables that are not pytrees.


@pytest.mark.parametrize(
    "schedule",
    [closure, optax.linear_schedule(0.5, 1.0, 2), optax.join_schedules([closure], [])],
    ids=["function", "optax", "joined"],
)
def test_a_bare_schedule_is_a_schedule(schedule):
    config = pj.L1(weights=schedule)
    assert jax.tree.leaves(config) == []
    value = jax.jit(lambda config, step: config.at(step)(jnp.ones(2)))
    assert float(value(config, 1)) == 1.5
    assert float((schedule * pj.L1()).at(1)(jnp.ones(2))) == 1.5
    with pytest.raises(TypeError, match=r"call \.at\(step\)"):
        config(jnp.ones(2))


def test_a_bare_schedule_is_compared_by_identity():
    other = optax.linear_schedule(0.5, 1.0, 2)
    same = optax.linear_schedule(0.5, 1.0, 2)
    assert pj.L1(weights=other) == pj.L1(weights=other)
    assert pj.L1(weights=other) != pj.L1(weights=same)


def test_a_bare_schedule_retraces_for_each_new_object():
    @jax.jit
    @chex.assert_max_traces(n=2)
    def value(config, step):
        return config.at(step)(jnp.ones(2))

    first, second, third = (optax.constant_schedule(value) for value in (1.0, 2.0, 3.0))
    for schedule, expected in [(first, 2), (second, 4), (first, 2), (second, 4)]:
        assert float(value(pj.L1(weights=schedule), 0)) == expected
    with pytest.raises(AssertionError, match="traced"):
        value(pj.L1(weights=third), 0)


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: pj.SmoothL0(gamma=closure), r"SmoothL0\.gamma"),
        (lambda: pj.L1() * closure, r"Scaled\.scale"),
        (lambda: pj.Term(pj.L1(weights=closure), on="x"), r"L1\.weights"),
        (lambda: pj.Objective(terms={"a": pj.Term(pj.L1(), "x", weight=closure)}), r"Term\.weight"),
    ],
)
@pytest.mark.parametrize(
    "operation",
    [lambda config: pj.stack([config, config]), pickle.dumps, pj.to_dict, pj.to_json, pj.to_yaml],
    ids=["stack", "pickle", "to_dict", "to_json", "to_yaml"],
)
def test_what_a_bare_schedule_cannot_do(make, field, operation):
    with pytest.raises(TypeError, match=rf"{field}.*use pj\.anneal"):
        operation(make())


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_a_copy_keeps_a_bare_schedule(copied):
    config = pj.Term(pj.L1(), on="x", weight=closure)
    assert copied(config) == config
