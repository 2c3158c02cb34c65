"""Penalties of one's own: functions, classes, and references that are bound."""

import functools
import inspect
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import TypeCheckError

import penalties_jax as pj
from tests.catalogue import saturating, squared_distance
from tests.oracles import assert_close, lattice

X = jnp.asarray(lattice(0, 8, 3), jnp.float32)
MASK = jnp.asarray(np.random.default_rng(0).random((8, 3)) < 0.5)
GAMMA = pj.anneal(1.0, 0.1, start=0, end=10)
OWN = pj.Elementwise(saturating, gamma=GAMMA)
OURS = pj.SmoothL0(gamma=GAMMA)


@pj.config
class TanhPower(pj.Separable):
    """A class of one's own, with an option."""

    gamma: float = pj.number(default=1.0, valid=pj.Range("above 0", lambda value: value > 0))
    power: int = pj.option(default=1)

    @staticmethod
    def formula(x, gamma, power):
        return jnp.tanh(jnp.abs(x) / gamma) ** power


# The same as one of ours.


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reduction": "mean"},
        {"reduction": "none"},
        {"weights": lattice(1, 3) ** 2},
        {"weights": pj.anneal(0, 1, start=0, end=10)},
    ],
)
@pytest.mark.parametrize("where", [None, MASK])
def test_elementwise_is_what_the_library_has(options, where):
    def everything(penalty):
        def total(x):
            return jnp.sum(penalty.at(5)(x, where=where))

        values = penalty.at(5)(X, where=where)
        return values, jax.grad(total)(X), penalty.at(5).elementwise(X)

    own = everything(pj.Elementwise(saturating, gamma=GAMMA, **options))
    ours = everything(pj.SmoothL0(gamma=GAMMA, **options))
    for actual, desired in zip(own, ours, strict=True):
        assert_close(actual, desired, rtol=1e-5, atol=1e-7)


def test_elementwise_over_thirty_orders_of_magnitude():
    sizes = 10.0 ** np.arange(-15, 16)
    with jax.enable_x64():
        x = jnp.asarray(np.concatenate([-sizes, sizes]))
        own, ours = (jax.value_and_grad(penalty.at(10)) for penalty in (OWN, OURS))
        assert own(x)[0].dtype == jnp.float64
        assert_close(own(x)[0], ours(x)[0], rtol=1e-12)
        assert_close(own(x)[1], ours(x)[1], rtol=1e-9, atol=1e-18)


def test_trees_have_numbers_of_their_own():
    tree = {"a": X, "b": [None, X[0]]}
    gammas = {"a": 0.5, "b": [None, 2.0]}
    own = pj.Elementwise(saturating, gamma=gammas, reduction="mean")
    ours = pj.SmoothL0(gamma=gammas, reduction="mean")
    assert_close(own(tree), ours(tree))


def test_what_is_excluded_is_replaced_before_the_function():
    def reciprocal(x):
        return 1 / x

    penalty = pj.Elementwise(reciprocal, fill=1.0)
    x = jnp.array([jnp.nan, 0.0, 4.0])
    value, slope = jax.value_and_grad(penalty)(x, where=jnp.array([False, False, True]))
    assert_close(value, 0.25)
    assert_close(slope, [0, 0, -1 / 16])


def test_a_number_that_changes_does_not_retrace():
    traced = []

    def counted(x, gamma):
        traced.append(x)
        return saturating(x, gamma)

    @jax.jit
    def step(penalty, count):
        return jax.grad(penalty.at(count))(X)

    for count in range(3):
        step(pj.Elementwise(counted, gamma=pj.anneal(1.0 + count, 0.1, start=0, end=10)), count)
        first = len(traced) if count == 0 else first
    assert len(traced) == first > 0


def test_what_a_function_closes_over_may_change():
    model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
    penalties = (
        pj.Function(lambda x: jnp.sum(model(x) ** 2)),
        pj.Elementwise(lambda x: jnp.sum(model.kernel[...]) * x**2),
    )
    for kernel in (jnp.ones((3, 1)), 2 * jnp.ones((3, 1))):
        model.kernel[...] = kernel
        expected = jnp.sum((X @ kernel) ** 2), jnp.sum(kernel) * jnp.sum(X**2)
        for penalty, desired in zip(penalties, expected, strict=True):
            for run in (penalty, jax.jit(lambda x, f=penalty: f(x))):
                assert_close(run(X), desired, rtol=1e-5)


def test_sharded_values_stay_where_they_are():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    x = jax.device_put(X, NamedSharding(mesh, PartitionSpec("data")))
    program = jax.jit(jax.grad(OWN.at(3))).lower(x).compile()
    assert "all-gather" not in program.as_text()
    assert_close(program(x), jax.grad(OURS.at(3))(X), rtol=1e-5)

    mean = pj.Elementwise(saturating, gamma=0.5, reduction="mean", axis_name="data")
    of_shards = jax.shard_map(
        mean, mesh=mesh, in_specs=PartitionSpec("data"), out_specs=PartitionSpec()
    )
    assert_close(of_shards(x), pj.SmoothL0(gamma=0.5, reduction="mean")(X))


# Everywhere a penalty goes.


OWN_PENALTIES = {
    "elementwise": (OWN, lambda x, step: OURS.at(step)(x)),
    "function": (
        pj.Function(squared_distance, center=GAMMA),
        lambda x, step: pj.L2(center=GAMMA(step))(x),
    ),
    "class": (
        TanhPower(gamma=GAMMA, power=2),
        lambda x, step: jnp.sum(jnp.tanh(x / GAMMA(step)) ** 2),
    ),
    "against": (
        pj.Consistency("mse").against(0.5 * X),
        lambda x, step: jnp.mean((x - 0.5 * X) ** 2),
    ),
    "sum": (2 * OWN + pj.L1(), lambda x, step: 2 * OURS.at(step)(x) + jnp.sum(jnp.abs(x))),
}
every_own = pytest.mark.parametrize(("own", "by_hand"), OWN_PENALTIES.values(), ids=OWN_PENALTIES)


@every_own
def test_in_an_objective_and_in_a_chain(own, by_hand):
    step = 4
    slope = jax.grad(by_hand)(X, step)
    objective = pj.Objective(terms={"own": pj.Term(own, on="x", weight=0.5)})
    total, metrics = jax.jit(objective)({"x": X}, step=step)
    assert_close(total, 0.5 * by_hand(X, step), rtol=1e-5)
    assert_close(metrics["own"], by_hand(X, step), rtol=1e-5)

    transform = pj.add_penalty(own, weight=0.5)
    state = transform.init(X)._replace(count=jnp.asarray(step))
    updates, _ = jax.jit(transform.update)(jnp.zeros_like(X), state, X)
    assert_close(updates, 0.5 * slope, rtol=1e-5, atol=1e-7)


@every_own
def test_in_a_flax_module(own, by_hand):
    penalised = pj.nnx.ActivityPenalty(own, weight=0.5)
    assert penalised(X, step=4) is X
    assert_close(pj.nnx.collect_penalties(penalised), 0.5 * by_hand(X, 4), rtol=1e-5)


def test_numbers_are_swept_and_differentiated():
    sweep = pj.stack([pj.Elementwise(saturating, gamma=gamma) for gamma in (0.5, 2.0)])
    values = jax.vmap(lambda penalty: penalty(X))(sweep)
    assert_close(values, [pj.SmoothL0(gamma=gamma)(X) for gamma in (0.5, 2.0)])
    slope = jax.grad(lambda penalty: penalty(X))(pj.Function(squared_distance, center=0.5))
    assert_close(slope.numbers["center"], jnp.sum(1.0 - 2 * X), rtol=1e-5)


def test_a_function_of_several_inputs():
    def dot(x, y, *, scale):
        return scale * jnp.vdot(x, y)

    penalty = pj.Function(dot, scale=-2.0)
    assert_close(penalty(X, X), -2 * np.sum(np.square(X)))
    with pytest.raises(TypeError, match=r"Function takes 2 input\(s\), got 1"):
        penalty(X)


def test_importance_minimality_of_a_function_with_numbers():
    own = pj.ImportanceMinimality(pj.Elementwise(saturating, gamma=0.5), beta=0.5)
    ours = pj.ImportanceMinimality(pj.SmoothL0(gamma=0.5), beta=0.5)
    assert_close(own(jnp.abs(X)), ours(jnp.abs(X)))


def test_names_that_are_arguments_have_a_way_round():
    def weighted(x, weights):
        return weights * jnp.abs(x)

    assert_close(pj.Elementwise(weighted, numbers={"weights": 2.0})(X), 2 * np.sum(np.abs(X)))
    assert_close(
        pj.Elementwise(weighted, numbers={"weights": 2.0}, weights=3.0)(X[0]),
        (6 * np.sum(np.abs(X[0]))),
    )


# References.


LOG_P, LOG_Q = (
    jax.nn.log_softmax(jnp.asarray(lattice(seed, 4, 5), jnp.float32)) for seed in (1, 2)
)
COMPARING = {
    "kl": pj.KLDivergence("reverse"),
    "js": pj.JSDivergence(),
    "estimate": pj.KLEstimate("k2"),
    "consistency": pj.Consistency("cosine"),
    "wasserstein": pj.Wasserstein(),
    "mmd": pj.MMD(),
    "sum": pj.KLDivergence() + 0.5 * pj.JSDivergence(),
}


@pytest.mark.parametrize("penalty", COMPARING.values(), ids=COMPARING)
def test_a_bound_reference_has_no_gradient_unless_asked(penalty):
    def value(p, q, **options):
        return penalty.against(q, **options)(p)

    assert_close(value(LOG_P, LOG_Q), penalty(LOG_P, LOG_Q), rtol=1e-6)
    by_p, by_q = jax.grad(penalty, (0, 1))(LOG_P, LOG_Q)
    bound_p, bound_q = jax.grad(value, (0, 1))(LOG_P, LOG_Q)
    assert_close(bound_p, by_p, rtol=1e-6, atol=1e-8)
    assert_close(bound_q, 0)
    assert jnp.any(by_q != 0)
    asked = jax.grad(functools.partial(value, stop_gradient=False), 1)(LOG_P, LOG_Q)
    assert_close(asked, by_q, rtol=1e-6, atol=1e-8)


def test_a_bound_reference_takes_masks_and_trees():
    where = jnp.array([True, False, True, True])
    assert_close(
        pj.KLDivergence().against(LOG_Q)(LOG_P, where=where),
        pj.KLDivergence()(LOG_P, LOG_Q, where=where),
    )
    start = {"kernel": X, "bias": None}
    towards = pj.Consistency("l1").against(start)
    assert float(towards(start)) == 0
    with pytest.raises(ValueError, match="takes no where"):
        pj.MMD().against(X)(X, where=MASK)


def test_params_stay_near_a_reference():
    start = {"w": jnp.ones(3)}
    anchored = pj.add_penalty(pj.Consistency("mse").against(start), weight=1.0)
    optimizer = optax.chain(anchored, optax.sgd(0.5))
    params = {"w": jnp.array([0.0, 1.0, 4.0])}
    state = optimizer.init(params)
    for _ in range(100):
        updates, state = optimizer.update(jax.tree.map(jnp.zeros_like, params), state, params)
        params = optax.apply_updates(params, updates)
    assert_close(params["w"], 1.0, rtol=1e-5)


def test_a_reference_leaves_out_what_an_optimizer_does():
    params = {"w": jnp.array([1.0, 3.0]), "step": jnp.int32(3), "frozen": jnp.ones(2)}
    reference = jax.tree.map(jnp.zeros_like, params)
    mask = {"w": True, "step": True, "frozen": False}
    transform = pj.add_penalty(pj.Consistency("mse").against(reference), mask=mask)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = transform.update(zeros, transform.init(params), params)
    assert_close(updates["w"], [1.0, 3.0])
    assert_close(updates["frozen"], 0)


def test_a_head_without_a_bias_beside_one_that_has_one():
    hidden, kernel, bias = X[:, :2], X[:2], X[2]
    kl = pj.KLDivergence(inputs="hidden")
    desired = pj.linear_kl(hidden, kernel, hidden, kernel, bias_q=bias)
    assert_close(kl(hidden, kernel, hidden, kernel, None, bias), desired)
    assert_close(kl(hidden, kernel, hidden, kernel, None, None), 0)


def test_outputs_that_are_a_module():
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    objective = pj.Objective(terms={"l2": pj.Term(pj.L2(), on="kernel", weight=0.5)})
    assert_close(objective(model)[0], 0.5 * jnp.sum(model.kernel[...] ** 2))


# What is refused, in one line.


def lines(error):
    return len(str(error.value).splitlines())


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: pj.Elementwise(0.5), TypeError, "Elementwise.function must be a function"),
        (lambda: pj.Elementwise(saturating, where=MASK), TypeError, r"numbers=\{'where': \.\.\.\}"),
        (
            lambda: pj.Elementwise(lambda x, weights: x * weights, weights=0.1),
            TypeError,
            r"numbers=\{'weights': \.\.\.\}",
        ),
        (lambda: pj.Function(squared_distance, reduction="sum"), TypeError, "'reduction'"),
        (
            lambda: pj.Elementwise(saturating, gamma="a"),
            TypeError,
            r"Elementwise.numbers\['gamma'\]",
        ),
        (lambda: pj.Elementwise(jnp.sum)(X), ValueError, r"shape \(8, 3\), got shape \(\)"),
        (lambda: pj.Function(jnp.abs)(X), ValueError, r"must return a scalar, got \(8, 3\)"),
        (lambda: pj.Function(lambda x: {"a": 1.0})(X), ValueError, "must return a scalar"),
        (lambda: pj.Elementwise(max), TypeError, "must have a signature"),
        (lambda: type("Bare", (pj.Separable,), {})(), TypeError, "Bare is no config: decorate"),
        (lambda: OWN(X), TypeError, r"holds a schedule: call \.at\(step\)"),
        (lambda: TanhPower(gamma=0.0), ValueError, "TanhPower.gamma must be above 0"),
        (lambda: TanhPower(power="two"), TypeError, "TanhPower.power must be of type int"),
        (lambda: pj.L1().against(X), TypeError, r"takes 1 input\(s\): against binds one of 2"),
        (lambda: pj.KLDivergence().against("x"), TypeError, "Against.reference must be an array"),
        (lambda: pj.KLDivergence().against(LOG_Q)(LOG_P[0]), ValueError, r"\(5,\) and \(4, 5\)"),
        (
            lambda: pj.Consistency().against({"a": X})({"b": X}),
            ValueError,
            "must be a tree like the input",
        ),
        (
            lambda: pj.config(type("L1", (pj.Penalty,), {})),
            ValueError,
            "config called L1 already, in penalties_jax.terms.penalties",
        ),
        (lambda: pj.to_dict(pj.Elementwise(lambda x: x)), TypeError, "Elementwise.function is"),
        (lambda: pj.from_dict({"type": "Function"}), TypeError, "missing field 'function'"),
        (
            lambda: pj.from_dict({"type": "Function", "function": "a:b"}, functions={"a:c": abs}),
            TypeError,
            r"Function.function is 'a:b', and functions= has \['a:c'\]",
        ),
    ],
)
def test_bad_input_is_one_clear_line(make, error, message):
    with pytest.raises(error, match=message) as raised:
        make()
    assert lines(raised) <= 2 or isinstance(raised.value, TypeCheckError)


def test_functions_are_stored_by_name_and_nothing_is_imported():
    penalty = pj.Elementwise(saturating, gamma=0.5)
    data = json.loads(json.dumps(pj.to_dict(penalty)))
    assert data["function"] == "tests.catalogue:saturating"
    assert pj.from_dict(data, functions={data["function"]: saturating}) == penalty
    with pytest.raises(TypeError, match="functions= has nothing"):
        pj.from_dict(data)
    objective = pj.Objective(loss=squared_distance)
    name = pj.to_dict(objective)["loss"]
    assert pj.from_dict(pj.to_dict(objective), functions={name: squared_distance}) == objective
    importance = pj.ImportanceMinimality(jnp.abs)
    name = pj.to_dict(importance)["penalty"]
    assert pj.from_dict(pj.to_dict(importance), functions={name: jnp.abs}) == importance


@every_own
def test_metrics_hyperparameters_and_replacement(own, by_hand):
    term = pj.Term(own, on="x", weight=pj.anneal(0.0, 1.0, start=0, end=8))
    objective = pj.Objective(terms={"own": term})
    _, metrics = objective({"x": X}, step=4, detail=True)
    assert_close(metrics["own/weight"], 0.5)
    assert_close(metrics["own"], by_hand(X, 4), rtol=1e-5)
    names = {name.rpartition("/")[2] for name in metrics}
    scheduled = dict(own.scheduled())
    assert {name.rpartition("/")[2] for name in scheduled} <= names
    for name in {name.rpartition("/")[2] for name in scheduled}:
        fixed = objective.replace("own", **{name: 0.25}).terms["own"].penalty
        assert not dict(fixed.scheduled())


def test_a_class_of_one_s_own_is_twelve_lines():
    assert len(inspect.getsource(TanhPower).splitlines()) <= 12
