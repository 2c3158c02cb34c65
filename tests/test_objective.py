"""Objectives: what they report, how they change, and how they run in a train step."""

import dataclasses
import pickle
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, struct
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import penalties_jax as pj
from penalties_jax._pytree import config, is_schedule, number
from tests.catalogue import EXAMPLES
from tests.oracles import assert_close, lattice
from tests.programs import doubles, jit_once

MASK = np.arange(8) % 3 != 0
OUTPUTS = {
    "logits": lattice(0, 8, 5).astype(np.float32),
    "reference": lattice(1, 8, 5).astype(np.float32),
    "hidden": lattice(2, 8, 3).astype(np.float32),
    "mask": MASK,
}


def squares(outputs):
    """A loss that sees the logits alone."""
    return 0.25 * jnp.sum(outputs["logits"] ** 2)


def log_probabilities(outputs):
    """The two inputs of a divergence."""
    return jax.nn.log_softmax(outputs["logits"]), jax.nn.log_softmax(outputs["reference"])


def example():
    """An objective with a term of each kind."""
    return pj.Objective(
        loss=squares,
        terms={
            "kl": pj.Term(pj.KLDivergence(), on=log_probabilities, where="mask", weight=0.5),
            "l1": pj.Term(pj.L1(), on="hidden", weight=pj.anneal(0.0, 1.0, start=0, end=4)),
            "both": pj.Term(pj.Consistency(), on=("logits", "reference"), weight=2),
        },
    )


def one_term(penalty=None, loss=None, **settings):
    """An objective of one term, "term", on "x"."""
    settings = {"on": "x", **settings}
    return pj.Objective(loss, {"term": pj.Term(penalty or pj.L2(), **settings)})


def scalars(metrics):
    return {name: float(value) for name, value in metrics.items()}


# Values.


def test_names_and_values():
    total, metrics = jax.jit(example())(OUTPUTS, step=1)
    log_p, log_q = (np.asarray(x, np.float64) for x in log_probabilities(OUTPUTS))
    logits, reference, hidden = (
        np.asarray(OUTPUTS[name], np.float64) for name in ("logits", "reference", "hidden")
    )
    kl = (np.exp(log_p) * (log_p - log_q)).sum(-1)[MASK].mean()
    expected = {
        "loss": 0.25 * (logits**2).sum(),
        "kl": kl,
        "kl/weighted": 0.5 * kl,
        "l1": np.abs(hidden).sum(),
        "l1/weighted": 0.25 * np.abs(hidden).sum(),
        "both": ((logits - reference) ** 2).mean(),
        "both/weighted": 2 * ((logits - reference) ** 2).mean(),
    }
    expected["total"] = sum(expected[name] for name in expected if "/" in name or name == "loss")
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        assert isinstance(metrics[name], jax.Array)
        assert metrics[name].shape == ()
        assert_close(metrics[name], value, rtol=1e-5)
    assert total is not None
    assert float(total) == float(metrics["total"])


def test_without_loss_or_terms():
    assert scalars(pj.Objective()({})[1]) == {"loss": 0, "total": 0}
    metrics = one_term(pj.L1())({"x": jnp.array([1.0, -2.0])})[1]
    assert scalars(metrics) == {"loss": 0, "term": 3, "term/weighted": 3, "total": 3}


X = jnp.array([1.0, -2.0, 4.0])
KEEP = jnp.array([True, True, False])


@pytest.mark.parametrize(
    ("settings", "value"),
    [
        ({"on": "x"}, 7),
        ({"on": ("x",)}, 7),
        pytest.param({"on": ["x"]}, 7, marks=pytest.mark.untyped),
        ({"on": lambda outputs: 2 * outputs["x"]}, 14),
        ({"on": lambda outputs: (outputs["x"],)}, 7),
        ({"on": lambda outputs: {"a": outputs["x"], "b": None}}, 7),
        ({"on": "x", "where": "keep"}, 3),
        ({"on": "x", "where": lambda outputs: ~outputs["keep"]}, 4),
        ({"on": "x", "where": lambda outputs: None}, 7),
        ({"on": "tree", "where": "keep"}, 6),
    ],
)
def test_inputs_and_masks(settings, value):
    outputs = {"x": X, "keep": KEEP, "tree": {"a": X, "b": X}}
    assert float(one_term(pj.L1(), **settings)(outputs)[0]) == value


@dataclasses.dataclass(frozen=True)
class Frozen:
    x: Any
    keep: Any


@dataclasses.dataclass(slots=True)
class Slots:
    x: Any
    keep: Any


@dataclasses.dataclass
class Derived:
    """A dataclass whose constructor does not take what it holds."""

    tree: dataclasses.InitVar[Any]
    x: Any = dataclasses.field(init=False)
    keep: Any = dataclasses.field(init=False)

    def __post_init__(self, tree):
        self.x, self.keep = tree


@struct.dataclass
class Registered:
    x: Any
    keep: Any


class Named(NamedTuple):
    x: Any
    keep: Any


class Module(nnx.Module):
    def __init__(self, x, keep):
        self.x = nnx.Intermediate(x)
        self.keep = nnx.data(keep)


@chex.dataclass
class Mappable:
    """A dataclass that is a mapping too."""

    x: Any
    keep: Any


class Inside(nnx.Module):
    """A module whose outputs are properties of what a module in it holds."""

    def __init__(self, x, keep):
        self.inner = Module(x, keep)
        self.name = "static"
        self.layers = nnx.List([nnx.Linear(2, 2, rngs=nnx.Rngs(0))])

    @property
    def x(self):
        return self.inner.x

    @property
    def keep(self):
        return self.inner.keep


@pytest.mark.parametrize("weight", [0.5, 0.0])
@pytest.mark.parametrize(
    "make",
    [
        Frozen,
        lambda x, keep: Mappable(x=x, keep=keep),
        Inside,
        Slots,
        lambda x, keep: Derived((x, keep)),
        Registered,
        Named,
        Module,
        lambda x, keep: SimpleNamespace(x=x, keep=keep),
    ],
)
def test_outputs_with_named_fields(make, weight):
    """By key and by function, and with the gradients of a mapping's."""
    by_key = pj.Term(pj.L2(), on="x", where="keep", weight=weight)
    by_function = pj.Term(
        pj.L1(), on=lambda outputs: 1 * outputs.x, where=lambda outputs: outputs.keep
    )
    objective = pj.Objective(
        lambda outputs: jnp.sum(jnp.asarray(outputs.x)), {"l2": by_key, "l1": by_function}
    )

    def metrics(x):
        return objective(make(x, KEEP))[1]

    assert scalars(metrics(X)) == {
        "loss": 3, "l2": 5, "l2/weighted": 5 * weight, "l1": 3, "l1/weighted": 3,
        "total": 6 + 5 * weight,
    }  # fmt: skip
    slopes = jax.jacobian(metrics)(X)
    assert slopes["total"].tolist() == [2 + 2 * weight, -4 * weight, 1]
    held = "inner" if make is Inside else "x"
    norms = objective.grad_norms(make(X, KEEP), wrt=(held,))
    for name in ("loss", "l1", "l2/weighted", "total"):
        assert_close(norms[name], np.linalg.norm(slopes[name]), rtol=1e-6)


@pytest.mark.parametrize("outputs", [X, np.ones(3), [X], (X,), 3.0, "x", None])
def test_outputs_without_names(outputs):
    objective = one_term()
    for call in (objective, partial(objective.grad_norms, wrt=("x",)), pj.nnx.Loss(objective)):
        with pytest.raises(TypeError, match=r"outputs must be a mapping, a dataclass, .* got a"):
            call(outputs)


@pytest.mark.parametrize("jit", [jax.jit, nnx.jit])
def test_a_module_is_an_argument_and_stays_as_it_is(jit):
    module = Inside(X, KEEP)
    objective = one_term(pj.L2(), where="keep", weight=2.0)

    @jit
    def both(module):
        norms = objective.grad_norms(module, wrt=("inner",))
        slopes = nnx.grad(
            lambda module: objective(module)[0], argnums=nnx.DiffState(0, nnx.Intermediate)
        )(module)
        return objective(module)[0], norms["total"], slopes["inner"]["x"][...]

    total, norm, slopes = both(module)
    assert float(total) == 10
    assert_close(norm, 4 * np.sqrt(5))
    assert slopes.tolist() == [4, -8, 0]
    assert module.inner.x[...].tolist() == X.tolist()


def test_a_missing_field():
    with pytest.raises(KeyError, match=r"term 'term' needs 'y'; the outputs have \['keep', 'x'\]"):
        one_term(on="y")(Named(X, KEEP))


def test_half_precision_and_integers_are_promoted():
    outputs = {"x": jnp.ones(3, jnp.bfloat16), "loss": jnp.int32(2)}
    total, metrics = one_term(loss=lambda outputs: outputs["loss"])(outputs)
    assert total.dtype == jnp.float32
    assert {value.dtype for value in metrics.values()} == {jnp.dtype("float32")}
    with jax.enable_x64(True):
        total, _ = one_term()({"x": jnp.ones(3)})
    assert total.dtype == jnp.float64


@pytest.mark.parametrize("loss", [None, lambda outputs: 2.0])
def test_python_numbers_never_widen(loss, x64):
    """Nor do those that a schedule or a weight makes arrays of."""
    weight = pj.anneal(0.0, 1.0, start=0, end=4)
    terms = {
        "l1": pj.Term(pj.L1(weights=0.5), on="x", weight=weight),
        "sum": pj.Term(0.5 * pj.Huber(delta=0.3) + pj.L2(center=1.0), on="x", weight=0.25),
    }
    outputs = {"x": jnp.ones(4, jnp.float32)}
    objective = pj.Objective(loss, terms).disable("sum")
    for step in (2, jnp.int32(2)):
        assert doubles(objective(outputs, step=step)) == []
    assert doubles(objective.grad_norms(outputs, wrt=("x",), step=2)) == []
    (total, _), _ = jax.lax.scan(
        lambda carry, step: (objective(outputs, step=step), None),
        objective(outputs, step=0),
        jnp.arange(3),
    )
    assert float(total) == (0 if loss is None else 2) + 0.5 * 2


# Schedules.


def test_schedules_follow_the_step():
    objective = one_term(
        pj.SmoothL0(gamma=pj.anneal(2.0, 1.0, start=0, end=2)),
        weight=pj.anneal(0, 1, start=0, end=2),
    )

    @jit_once
    def shares(step):
        return objective({"x": jnp.ones(1)}, step=step)[1]["term/weighted"]

    assert_close([shares(step) for step in range(4)], [0, 0.5 / 3.25, 0.5, 0.5])


@pytest.mark.parametrize(
    "objective",
    [
        one_term(weight=pj.anneal(0, 1, start=0, end=2)),
        one_term(weight=lambda step: step),
        one_term(pj.L1() * pj.anneal(0, 1, start=0, end=2)),
    ],
)
def test_schedules_need_the_step(objective):
    with pytest.raises(TypeError, match="step="):
        objective({"x": jnp.ones(1)})
    with pytest.raises(TypeError, match="step="):
        objective.hyperparameters()
    with pytest.raises(TypeError, match="step="):
        objective.grad_norms({"x": jnp.ones(1)}, wrt=("x",))
    assert float(objective({"x": jnp.ones(1)}, step=1)[0]) in (0.5, 1)


# Details.


def test_details():
    objective = example()
    plain, detailed = (
        jax.jit(partial(objective, detail=detail))(OUTPUTS, step=1) for detail in (False, True)
    )
    for name, value in plain[1].items():
        assert_close(detailed[1][name], value, rtol=1e-6)
    log_p, log_q = (np.asarray(x, np.float64) for x in log_probabilities(OUTPUTS))
    kl = (np.exp(log_p) * (log_p - log_q)).sum(-1)[MASK]
    hidden = np.abs(OUTPUTS["hidden"].astype(float))
    both = (OUTPUTS["logits"] - OUTPUTS["reference"]).astype(float) ** 2
    expected = {"kl/weight": 0.5, "l1/weight": 0.25, "both/weight": 2} | {
        f"{name}/{metric}": value
        for name, x in {"kl": kl, "l1": hidden, "both": both}.items()
        for metric, value in {
            "raw": x.sum(), "mean": x.mean(), "max": x.max(), "min": x.min()
        }.items()
    }  # fmt: skip
    expected["penalties"] = 0.5 * kl.mean() + 0.25 * hidden.sum() + 2 * both.mean()
    assert detailed[1].keys() - plain[1].keys() == expected.keys()
    for name, value in expected.items():
        assert_close(detailed[1][name], value, rtol=1e-5, atol=1e-7)
        assert detailed[1][name].shape == ()
    assert pj.Objective()({}, detail=True)[1].keys() == {"loss", "penalties", "total"}


def ramp(init, final):
    """A schedule that is halfway at step 1."""
    return pj.anneal(init, final, start=0, end=2)


@pytest.mark.parametrize(
    ("penalty", "expected"),
    [
        (pj.L1(), {}),
        (pj.SmoothL0(gamma=ramp(1, 2)), {"gamma": 1.5}),
        (ramp(0, 1) * (ramp(4, 0) * pj.Lp(p=ramp(2, 1))), {"scale": 0.5, "scale_2": 2, "p": 1.5}),
        (pj.L1(weights=ramp(np.zeros(3), np.array([0.0, 2.0, 4.0]))), {"weights": 1}),
        (
            pj.L1(weights={"a": ramp(0, 1), "b": [1.0, lambda step: 3 * step]}),
            {"weights/a": 0.5, "weights/b/1": 3},
        ),
        (
            0.5 * pj.L1() + ramp(0, 1) * pj.L1(weights=ramp(2, 4)) + pj.L2(clip=ramp(1, 3)),
            {"l1_2/scale": 0.5, "l1_2/weights": 3, "l2/clip": 2},
        ),
        (
            pj.L1(weights=ramp(0, 1)) + ramp(4, 0) * (pj.L1(weights=ramp(2, 4)) + pj.L1()),
            {"l1/weights": 0.5, "sum/scale": 2, "sum/l1/weights": 3},
        ),
        (
            pj.ImportanceMinimality(ramp(0, 1) * pj.Lp(p=ramp(2, 1)), beta=ramp(0, 8)),
            {"scale": 0.5, "p": 1.5, "beta": 4},
        ),
    ],
)
def test_hyperparameters(penalty, expected):
    objective = one_term(penalty, weight=ramp(0.5, 1.5))
    found = jax.jit(objective.hyperparameters)(1)
    assert scalars(found) == {"term/weight": 1} | {f"term/{k}": v for k, v in expected.items()}
    off = objective.disable("term").hyperparameters(1)
    assert scalars(off) == scalars(found) | {"term/weight": 0}


@config
class Awkward(pj.L1):
    """A penalty whose hyperparameters and metrics are called as others are."""

    weight: Any = number(default=2.0)
    weighted: Any = number(default=3.0)
    raw: Any = number(default=4.0)

    def _metrics(self, inputs, where):
        return {"raw": jnp.float32(5), "weight": jnp.float32(6), "weighted": jnp.float32(7)}


@pytest.mark.parametrize(
    "penalty", [*EXAMPLES.values(), 2.0 * EXAMPLES["l1"] + EXAMPLES["SparsityTarget"], Awkward()]
)
def test_no_metric_hides_another(penalty):
    """Of every config, with all of its numbers scheduled."""
    penalty = jax.tree.map(lambda x: ramp(x, x), penalty)
    objective = one_term(penalty, on=("x", "y")[: penalty.summands[0].takes[0]], weight=ramp(0, 1))
    x = jnp.full((8, 3, 5), -0.5)[(0,) * (isinstance(penalty, pj.Orthogonality | pj.MMD))]
    y = jnp.zeros((8, 3), jnp.int32) if isinstance(penalty, pj.CrossEntropy) else x

    def measure(x):
        inputs = (x, y)[: len(objective.terms["term"].on)]
        metrics = objective({"x": x, "y": y}, step=1, detail=True)[1]
        return metrics, objective.hyperparameters(1), penalty.at(1).metrics(*inputs)

    metrics, hyperparameters, measured = jax.eval_shape(measure, x)
    assert metrics.keys() >= hyperparameters.keys()
    assert len(hyperparameters) == 1 + len(jax.tree.leaves(penalty, is_leaf=is_schedule))
    usual = {"loss", "total", "penalties", "term", "term/weighted"}
    assert usual <= metrics.keys()
    assert len(metrics) == len(usual) + len(hyperparameters) + len(measured)


def test_an_objective_that_is_detailed_says_so_wherever_it_is_called():
    outputs = {"x": jnp.ones(3)}
    terms = {"term": pj.Term(pj.L2(), on="x", weight=ramp(0, 1))}
    detailed, plain = pj.Objective(terms=terms, detail=True), pj.Objective(terms=terms)
    asked = plain(outputs, step=1, detail=True)[1]
    for metrics in (detailed(outputs, step=1)[1], pj.nnx.Loss(detailed)(outputs, step=1)[1]):
        assert scalars(metrics) == scalars(asked)
    assert detailed(outputs, step=1, detail=False)[1].keys() == plain(outputs, step=1)[1].keys()
    assert pj.from_json(pj.to_json(detailed)) == detailed


def test_names_that_others_have_get_a_number():
    penalty = Awkward(weight=ramp(1, 3), weighted=ramp(2, 4), raw=ramp(3, 5))
    metrics = scalars(one_term(penalty, weight=0.5)({"x": jnp.ones(3)}, step=1, detail=True)[1])
    assert metrics == {
        "loss": 0, "total": 1.5, "penalties": 1.5, "term": 3, "term/weighted": 1.5,
        "term/weight": 0.5, "term/weight_2": 2, "term/weighted_2": 3, "term/raw": 4,
        "term/raw_2": 5, "term/weight_3": 6, "term/weighted_3": 7,
    }  # fmt: skip


# A weight of 0.

POISONED = [
    (pj.L2(), [np.inf, 1.0], np.inf),
    (pj.L2(), [np.nan, 1.0], np.nan),
    (pj.L1(), [-np.inf, 1.0], np.inf),
    (pj.SmoothL0(gamma=1.0), [np.nan, 1.0], np.nan),
    (pj.Lp(p=0.5, eps=0.0), [1e-45, 1.0], None),
]


@pytest.mark.parametrize(("penalty", "x", "value"), POISONED)
@pytest.mark.parametrize(
    "off",
    [
        lambda penalty: one_term(penalty, weight=0),
        lambda penalty: one_term(penalty, weight=0.5).disable("term"),
        lambda penalty: one_term(penalty, weight=jnp.zeros(())),
        lambda penalty: one_term(penalty, weight=pj.anneal(0, 1, start=5, end=9)),
    ],
    ids=["0", "disabled", "array", "schedule"],
)
def test_a_weight_of_zero_adds_exactly_nothing(penalty, x, value, off):
    objective = off(penalty).replace("term")
    objective = pj.Objective(lambda outputs: jnp.float32(3), objective.terms)

    @partial(jax.value_and_grad, has_aux=True)
    def total(x):
        return objective({"x": x}, step=0, detail=True)

    (result, metrics), slopes = jax.jit(total)(jnp.array(x))
    assert float(result) == 3
    for name in ("term/weighted", "term/weight", "penalties"):
        assert float(metrics[name]) == 0
    assert slopes.tolist() == [0, 0]
    if value is not None:
        np.testing.assert_array_equal(metrics["term"], np.float32(value))


def test_a_term_that_counts_may_be_infinite():
    x = jnp.array([jnp.inf, 1.0])
    assert float(one_term(weight=0.1)({"x": x})[0]) == np.inf
    nan = one_term(weight=0.1)({"x": x * jnp.nan})[1]
    assert np.isnan(nan["term/weighted"])


def test_disabled_terms_in_a_stack():
    objectives = [one_term(weight=w) for w in (0, 1)] + [one_term().disable("term")]
    x = jnp.array([jnp.inf, 1.0])

    def slopes(objective):
        return jax.grad(lambda x: objective({"x": x})[0])(x)

    slopes = jax.jit(jax.vmap(slopes))(pj.stack(objectives))
    assert slopes.tolist() == [[0, 0], [np.inf, 2], [0, 0]]


# Changes.


def test_changes_return_new_objectives():
    x = {"x": jnp.array([1.0, -3.0])}
    objective = one_term(pj.Huber(delta=1), weight=0.5)
    before = pickle.dumps(objective)
    changes = {
        4.0 * 3: objective.with_weight("term", 4),
        0.0: objective.disable("term"),
        0.5 * 3: objective.disable("term").enable("term"),
        0.5 * 5: objective.replace("term", delta=10.0),
        2.0 * 5: objective.replace("term", weight=2, delta=10.0),
        0.25 * 3: objective.replace("term", reduction="mean"),
        1.0 * 3: objective.disable("term")
        .replace("term", weight=7)
        .with_weight("term", 1)
        .enable("term"),
    }
    for value, changed in changes.items():
        assert float(changed(x)[0]) == value
        assert changed.terms["term"].on == "x"
    assert pickle.dumps(objective) == before
    assert objective.disable("term").terms["term"].weight == 0.5
    assert float(objective.disable("term")(x)[1]["term"]) == 3
    assert objective.replace("term", delta=2.0) != objective == pickle.loads(before)


def test_other_terms_stay():
    objective = example()
    changed = objective.with_weight("l1", 3.0).disable("both")
    assert changed.terms["kl"] == objective.terms["kl"]
    assert changed.loss is objective.loss
    assert list(changed.terms) == list(objective.terms)


@pytest.mark.parametrize(
    "change",
    [
        lambda objective: objective.with_weight("l2", 1.0),
        lambda objective: objective.enable("l2"),
        lambda objective: objective.disable("l2"),
        lambda objective: objective.replace("l2", weight=1.0),
        lambda objective: objective.replace("l2", delta=1.0),
    ],
)
def test_a_term_that_is_not_there(change):
    with pytest.raises(KeyError, match=r"'l2'.*'term'"):
        change(one_term())


def test_changes_reach_into_multiples_and_sums():
    x = {"x": jnp.array([1.0, -3.0])}
    objective = one_term(0.5 * (0.1 * pj.Huber(delta=1) + ramp(2, 4) * pj.L1()))
    for changes, value in [
        ({"delta": 10.0}, 0.05 * 5 + 4),
        ({"delta": 10.0, "scale": 3.0}, 0.3 * 5 + 24),
        ({"weight": 2.0, "delta": 10.0}, 2 * (0.05 * 5 + 4)),
    ]:
        assert_close(objective.replace("term", **changes)(x, step=0)[0], value)
    nested = pj.ImportanceMinimality(0.1 * pj.Lp(p=1.0), beta=0.5)
    changed = one_term(nested).replace("term", p=2.0, beta=1.0, axis_name="batch").terms["term"]
    assert changed.penalty == pj.ImportanceMinimality(
        0.1 * pj.Lp(p=2.0), beta=1.0, axis_name="batch"
    )
    # What is checked together is changed together.
    logits = one_term(2.0 * pj.KLDivergence()).replace("term", inputs="logits", temperature=2.0)
    assert logits.terms["term"].penalty.penalty.temperature == 2.0


def test_bad_changes():
    with pytest.raises(TypeError, match=r"no hyperparameter 'gamma'; there are .*'delta'"):
        one_term(pj.Huber()).replace("term", gamma=1.0)
    with pytest.raises(TypeError, match="no hyperparameter 'gamma'"):
        one_term(0.1 * pj.Huber() + pj.L1()).replace("term", gamma=1.0)
    several = 0.1 * pj.Huber() + pj.L1(weights=3.0)
    with pytest.raises(ValueError, match=r"'weights' is .* parts, Huber\(\), L1\(weights=3\.0\)"):
        one_term(several).replace("term", weights=1.0)
    with pytest.raises(ValueError, match=r"Huber\.delta must be above 0"):
        one_term(several).replace("term", delta=-1.0)
    with pytest.raises(ValueError, match=r"Huber\.delta must be above 0"):
        one_term(pj.Huber()).replace("term", delta=-1.0)
    with pytest.raises(ValueError, match=r"Term\.weight"):
        one_term().with_weight("term", float("nan"))


# Errors.


@pytest.mark.parametrize("name", ["loss", "total", "penalties", "a/b", "/", "kl/weighted"])
def test_names_that_are_taken(name):
    with pytest.raises(ValueError, match=f"{name!r}.*'loss', 'total'"):
        pj.Objective(terms={name: pj.Term(pj.L1(), on="x")})


def test_terms_must_be_terms():
    with pytest.raises(TypeError, match=r"terms\['l1'\] must be of type Term"):
        pj.Objective(terms={"l1": pj.L1()})


@pytest.mark.parametrize(
    ("settings", "key"),
    [({"on": "missing"}, "missing"), ({"on": ("x", "y")}, "y"), ({"where": "mask"}, "mask")],
)
def test_a_missing_input(settings, key):
    with pytest.raises(KeyError) as error:
        one_term(**settings)({"x": X, "other": X})
    for name in ("'term'", f"'{key}'", "'other'", "'x'"):
        assert name in str(error.value)


def test_a_missing_input_of_grad_norms():
    with pytest.raises(KeyError, match=r"'y'.*'x'"):
        one_term().grad_norms({"x": X}, wrt=("y",))
    with pytest.raises(KeyError, match=r"'term'.*'x'.*'z'"):
        one_term().grad_norms({"z": X}, wrt=("z",))


@pytest.mark.parametrize(
    ("objective", "label"),
    [
        (one_term(pj.L1(reduction="none")), r"'term' must be a scalar, got \(3,\)"),
        (pj.Objective(lambda outputs: outputs["x"]), r"loss must be a scalar, got \(3,\)"),
        (pj.Objective(lambda outputs: (outputs["x"].sum(), {})), "loss must be a scalar"),
        (pj.Objective(lambda outputs: None), "loss must be a scalar"),
    ],
)
def test_what_is_not_a_scalar(objective, label):
    with pytest.raises(ValueError, match=label):
        objective({"x": X})
    with pytest.raises(ValueError, match=label):
        jax.jit(objective)({"x": X})


# Gradient norms.


@pytest.mark.parametrize("wrt", [("logits",), ("hidden", "reference")])
def test_gradient_norms(wrt):
    objective = example()
    alone = {"total": objective, "loss": pj.Objective(objective.loss)}
    for name, term in objective.terms.items():
        alone[f"{name}/weighted"] = pj.Objective(terms={name: term})
        alone[name] = pj.Objective(terms={name: term}).with_weight(name, 1.0)

    @jax.jit
    def both(outputs):
        inputs = {name: outputs[name] for name in wrt}
        gradients = {
            name: jax.grad(lambda x, one=one: one({**outputs, **x}, step=1)[0])(inputs)
            for name, one in alone.items()
        }
        return objective.grad_norms(outputs, step=1, wrt=wrt), gradients

    with jax.enable_x64(True):
        norms, gradients = both(jax.tree.map(lambda x: x.astype(float), OUTPUTS) | {"mask": MASK})
    assert norms.keys() == gradients.keys()
    for name, parts in gradients.items():
        assert norms[name].shape == ()
        expected = np.linalg.norm([np.linalg.norm(part) for part in parts.values()])
        assert_close(norms[name], expected, rtol=1e-12, atol=1e-12)


def test_gradient_norms_of_a_disabled_term():
    objective = one_term(weight=3).disable("term")
    norms = scalars(jax.jit(lambda x: objective.grad_norms({"x": x}, wrt=("x",)))(X))
    assert_close(norms["term"], 2 * np.sqrt(21))
    assert norms["term/weighted"] == norms["total"] == norms["loss"] == 0


def test_gradient_norms_at_the_edges():
    norms = jax.jit(lambda x: one_term().grad_norms({"x": x}, wrt=("x",)))
    assert scalars(norms(jnp.zeros(3))) == {"loss": 0, "term": 0, "term/weighted": 0, "total": 0}
    assert_close(norms(jnp.full(3, 1e30))["term"], np.sqrt(12) * 1e30)
    tree = norms({"a": X, "b": None, "c": X.astype("bfloat16")})
    assert_close(tree["term"], 2 * np.sqrt(42))


# In a train step.


def test_an_argument_of_a_jitted_step():
    @jit_once
    def total(objective, outputs, step):
        return objective(outputs, step=step)[0]

    objective = example()
    for step, changed in enumerate(
        [
            objective,
            objective.with_weight("kl", 2),
            objective.disable("kl"),
            objective.disable("both").enable("both"),
            objective.replace("l1", weight=pj.anneal(1, 0.5, start=1, end=3)),
        ]
    ):
        assert_close(total(changed, OUTPUTS, step), changed(OUTPUTS, step=step)[0], rtol=1e-6)


def test_a_sweep_in_one_trace():
    weights = [0, 0.01, 0.1, 0.5, 1.0]

    @jit_once
    def sweep(objectives):
        def value(objective):
            def total(hidden):
                return objective({**OUTPUTS, "hidden": hidden}, step=4)

            return jax.value_and_grad(total, has_aux=True)(OUTPUTS["hidden"])

        return jax.vmap(value)(objectives)

    objectives = pj.stack([example().with_weight("l1", weight) for weight in weights])
    (totals, metrics), slopes = sweep(objectives)
    magnitude = np.abs(OUTPUTS["hidden"]).sum(dtype=float)
    assert_close(metrics["l1"], np.full(5, magnitude))
    assert_close(metrics["l1/weighted"], magnitude * np.array(weights))
    assert_close(totals, totals[0] + magnitude * np.array(weights), rtol=1e-5)
    assert_close(slopes, np.array(weights)[:, None, None] * np.sign(OUTPUTS["hidden"]))


def test_gradient_with_respect_to_an_objective():
    slopes = jax.jit(jax.grad(lambda objective: objective({"x": X})[0]))(one_term(weight=2))
    assert_close(slopes.terms["term"].weight, 21)
    assert_close(slopes.terms["term"].penalty.weights, 42)


def test_scan_and_remat():
    objective = pj.Objective(
        lambda outputs: jnp.sum((outputs["x"] - 1) ** 2),
        {"l1": pj.Term(pj.L1(), on="x", weight=pj.anneal(0, 2, start=0, end=10))},
    )
    optimizer = optax.sgd(0.1)

    def train(call):
        def step(carry, index):
            x, state = carry
            slopes, metrics = jax.grad(lambda x: call(x, index), has_aux=True)(x)
            updates, state = optimizer.update(slopes, state, x)
            return (optax.apply_updates(x, updates), state), metrics

        x = jnp.array([3.0, -2.0])
        return jax.lax.scan(step, (x, optimizer.init(x)), jnp.arange(5))

    def call(x, index):
        return objective({"x": x}, step=index)

    (x, _), metrics = jax.jit(lambda: train(call))()
    (checkpointed, _), _ = jax.jit(lambda: train(jax.checkpoint(call)))()
    expected = np.array([3.0, -2.0])
    for index in range(5):
        slopes = 2 * (expected - 1) + 0.2 * index * np.sign(expected)
        expected = expected - 0.1 * slopes
    assert_close(x, expected, rtol=1e-5)
    assert_close(checkpointed, expected, rtol=1e-5)
    assert metrics["l1/weighted"].shape == (5,)


@pytest.mark.parametrize("check_vma", [True, False])
def test_eight_devices_equal_one(check_vma):
    def objective(axis_name):
        settings = {"reduction": "mean", "axis_name": axis_name}

        def loss(outputs):
            value = jnp.mean(outputs["logits"] ** 2)
            return value if axis_name is None else jax.lax.pmean(value, axis_name)

        return pj.Objective(
            loss,
            {
                "kl": pj.Term(pj.KLDivergence(**settings), log_probabilities, "mask", weight=0.5),
                "l2": pj.Term(pj.L2(center="mean", **settings), "hidden", weight=2.0),
                "l0": pj.Term(pj.SmoothL0(gamma=0.5, axis_name=axis_name), "hidden", weight=0.1),
            },
        )

    mesh = jax.make_mesh((8,), ("batch",), axis_types=(AxisType.Auto,))
    sharded = jax.shard_map(
        objective("batch"), mesh=mesh, in_specs=P("batch"), out_specs=P(), check_vma=check_vma
    )

    def with_gradient(call):
        def total(hidden):
            return call({**OUTPUTS, "hidden": hidden})

        return jax.jit(jax.value_and_grad(total, has_aux=True))(OUTPUTS["hidden"])

    (total, metrics), slopes = with_gradient(sharded)
    (expected, expected_metrics), expected_slopes = with_gradient(objective(None))
    assert_close(total, expected)
    assert metrics.keys() == expected_metrics.keys()
    for name, value in expected_metrics.items():
        assert_close(metrics[name], value)
    assert_close(slopes, expected_slopes, rtol=1e-5, atol=1e-7)


def test_weight_zero_passes_nothing_to_hyperparameters():
    objective = pj.Objective(terms={"a": pj.Term(pj.Lp(p=2.0), on="x", weight=0.0)})
    gradient = jax.grad(lambda o: o({"x": jnp.array([jnp.inf, 1.0])})[0])(objective)
    assert all(np.isfinite(leaf) for leaf in jax.tree.leaves(gradient))
