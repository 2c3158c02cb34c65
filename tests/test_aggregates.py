"""Terms that average their penalty by token and by sequence."""

import dataclasses
import itertools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import special

import penalties_jax as pj
import penalties_jax.functional as F  # noqa: N812
from tests.catalogue import CASES, EXAMPLES, every, first_of_each, inputs_of, only
from tests.functional.test_averages import loops
from tests.oracles import assert_close, lattice
from tests.programs import jit_once, quick_jit

BATCH, TIME, CLASSES, FEATURES = 4, 3, 5, 2
MASK = np.arange(12).reshape(BATCH, TIME) % 5 > 1
MASK[3] = False
IDS = np.array([[1, 2, 1], [0, 2, 2], [2, 0, 1], [1, 1, 0]])
PACKED = pj.Aggregate("sum", "mean", num_segments=2)

OF_ROWS = first_of_each(
    lambda case: case.function,
    only(lambda case: case.entry.config and case.by_row and not case.is_a("grouped"), CASES),
)


def objective_of(penalty, on=("a", "b"), **settings):
    return pj.Objective(terms={"name": pj.Term(penalty, on=on, **settings)})


def distributions():
    """A batch of log-probabilities, logits, hidden states with their heads, and samples."""
    logits = {name: lattice(i, BATCH, TIME, CLASSES) for i, name in enumerate("pq")}
    hidden = {name: lattice(i + 2, BATCH, TIME, FEATURES) for i, name in enumerate("pq")}
    return {
        "mask": MASK,
        "ids": IDS,
        "labels": np.arange(12).reshape(BATCH, TIME) % CLASSES,
        **{f"log_{name}": special.log_softmax(x, -1) for name, x in logits.items()},
        **{f"logits_{name}": x for name, x in logits.items()},
        **{f"hidden_{name}": x for name, x in hidden.items()},
        "kernel": lattice(5, FEATURES, CLASSES),
        "chosen_p": -np.abs(lattice(6, BATCH, TIME)),
        "chosen_q": -np.abs(lattice(7, BATCH, TIME)),
        "chosen_s": -np.abs(lattice(8, BATCH, TIME)),
    }


OUTPUTS = {
    name: np.float32(x) if x.dtype == np.float64 else x for name, x in distributions().items()
}
LOGS = "log_p", "log_q"
OF_HIDDEN = "hidden_p", "kernel", "hidden_q", "kernel"


def kl(log_p, log_q):
    return (np.exp(log_p) * (log_p - log_q)).sum(-1)


def entropy(log_p):
    return -(np.exp(log_p) * log_p).sum(-1)


def normalised(hidden):
    return special.log_softmax(hidden @ distributions()["kernel"], -1)


# Penalties of positions, what they are on, and their values in float64.
PENALTIES = {
    "kl": (pj.KLDivergence(), LOGS, lambda x: kl(x["log_p"], x["log_q"])),
    "reverse": (
        pj.KLDivergence("reverse", inputs="logits", temperature=2.0, reduction="sum"),
        ("logits_p", "logits_q"),
        lambda x: kl(*(special.log_softmax(x[name] / 2, -1) for name in ("logits_q", "logits_p"))),
    ),
    "hidden": (
        pj.KLDivergence(inputs="hidden"),
        OF_HIDDEN,
        lambda x: kl(normalised(x["hidden_p"]), normalised(x["hidden_q"])),
    ),
    "entropy": (
        pj.Entropy(inputs="hidden", maximize=True),
        ("hidden_p", "kernel"),
        lambda x: -entropy(normalised(x["hidden_p"])),
    ),
    "cross entropy": (
        pj.CrossEntropy(),
        ("logits_p", "labels"),
        lambda x: -np.take_along_axis(x["log_p"], x["labels"][..., None], -1)[..., 0],
    ),
    "estimate": (
        pj.KLEstimate("k2"),
        ("chosen_p", "chosen_q"),
        lambda x: (x["chosen_p"] - x["chosen_q"]) ** 2 / 2,
    ),
    "off policy": (
        pj.KLEstimate("k1", gradient="kl", log_ratio_clip=0.5),
        ("chosen_p", "chosen_q", "chosen_s"),
        lambda x: (
            np.exp(x["chosen_p"] - x["chosen_s"])
            * np.clip(x["chosen_p"] - x["chosen_q"], -0.5, 0.5)
        ),
    ),
    "sampled": (pj.SampledEntropy(), "chosen_p", lambda x: -x["chosen_p"]),
    "l1": (pj.L1(weights=0.5), "chosen_p", lambda x: abs(x["chosen_p"]) / 2),
    "sum": (
        0.5 * pj.KLDivergence() + 2.0 * pj.JSDivergence(mixture=1.0) + pj.KLDivergence("reverse"),
        LOGS,
        lambda x: kl(x["log_p"], x["log_q"]) / 2 + kl(x["log_q"], x["log_p"]),
    ),
    "against": (
        pj.KLDivergence().against(OUTPUTS["log_q"]),
        "log_p",
        lambda x: kl(x["log_p"], x["log_q"]),
    ),
}


@pytest.mark.parametrize(("penalty", "on", "oracle"), PENALTIES.values(), ids=PENALTIES)
def test_any_penalty_of_positions(penalty, on, oracle):
    """In rows and packed, whatever its own reduction, over a mask that is for both."""
    values = oracle(distributions())
    poisoned = {
        name: np.where(MASK.reshape(BATCH, TIME, *[1] * (x.ndim - 2)), x, np.nan)
        if x.dtype == np.float32 and x.shape[:2] == MASK.shape
        else x
        for name, x in OUTPUTS.items()
    }
    if "against" in repr(penalty).lower():
        poisoned["log_q"] = OUTPUTS["log_q"]
    modes = [
        ({"aggregate": pj.Aggregate(sequences="tokens")}, {"sequences": "tokens"}),
        (
            {"aggregate": PACKED, "segments": "ids"},
            {"tokens": "sum", "segment_ids": IDS, "num_segments": 2},
        ),
    ]
    for settings, mode in modes:
        objective = objective_of(penalty, on, where="mask", weight=0.5, **settings)
        total, metrics = objective(poisoned)
        desired = loops(values, MASK, **mode)
        assert_close(metrics["name"], desired, rtol=1e-5, atol=1e-6)
        assert_close(total, desired / 2, rtol=1e-5, atol=1e-6)


@every({type(config).__name__: config for config in EXAMPLES.values()}, "config")
def test_every_penalty_is_aggregated_or_refused(config):
    """By an error that names the term."""
    inputs = inputs_of(config)
    names = [f"x{i}" for i in range(len(inputs))]
    objective = objective_of(config, tuple(names), aggregate=pj.Aggregate())
    outputs = dict(zip(names, inputs, strict=True))
    unreduced = config.unreduced()(*inputs) if config.has_reduction else None
    if getattr(unreduced, "ndim", 0) == 2:
        assert_close(objective(outputs)[0], pj.aggregate(unreduced), rtol=1e-6)
    else:
        with pytest.raises(ValueError, match=r"term 'name' can't be aggregated"):
            objective(outputs)


@pytest.mark.slow
@every(OF_ROWS)
def test_every_penalty_of_rows_has_positions(case):
    """Of [batch, time, classes], by the catalogue's oracles."""
    objective = objective_of(case.config(), tuple("ab")[: case.inputs], aggregate=pj.Aggregate())
    inputs = case.data()
    prepared = [np.asarray(case.prepare(np.float32(x))) for x in inputs]
    total, _ = objective(dict(zip("ab", prepared, strict=False)))
    assert_close(total, loops(case.entries(*inputs)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "penalty",
    [
        pj.MMD(),
        pj.KLDivergence() + pj.MMD(),
        2.0 * pj.MMD().against(np.ones((2, 2))),
        pj.Function(lambda x: jnp.sum(x)),
        pj.L2(),
    ],
    ids=["of samples", "a sum", "bound", "a function", "summed"],
)
def test_a_penalty_without_positions(penalty):
    on = ("log_p", "log_q")[: penalty.summands[0].takes[0]]
    with pytest.raises(ValueError, match=r"term 'name' can't be aggregated"):
        objective_of(penalty, on, aggregate=pj.Aggregate())(OUTPUTS)


def test_a_tree_has_no_positions():
    outputs = {"x": {"a": np.ones((2, 3)), "b": np.ones((2, 3))}}
    with pytest.raises(ValueError, match=r"term 'name' can't be aggregated"):
        objective_of(pj.L1(), "x", aggregate=pj.Aggregate())(outputs)


# What comes with the batch.


def test_a_normalizer_of_the_global_batch():
    """Microbatches, each by the same compiled step, add up to the whole."""
    term = pj.Term(
        pj.KLEstimate(),
        on=("chosen_p", "chosen_q"),
        where="mask",
        aggregate=pj.Aggregate(sequences="tokens"),
    )
    whole, _ = pj.Objective(terms={"kl": term})(OUTPUTS)
    for normalizer in ("tokens", lambda outputs: outputs["tokens"]):
        part = pj.Objective(terms={"kl": dataclasses.replace(term, normalizer=normalizer)})

        @jit_once
        def step(outputs, part=part):
            return part(outputs)[0]

        count = jnp.asarray(MASK.sum())
        halves = [
            {name: x[rows] for name, x in OUTPUTS.items() if x.shape[:2] == MASK.shape}
            | {"tokens": count}
            for rows in (slice(0, 2), slice(2, 4))
        ]
        assert_close(sum(map(step, halves)), whole, rtol=1e-6)


def test_functions_of_the_outputs():
    term = pj.Term(
        pj.L1(),
        on=lambda outputs: outputs["chosen_p"],
        where=lambda outputs: outputs["mask"],
        aggregate=PACKED,
        segments=lambda outputs: outputs["ids"],
    )
    total, _ = pj.Objective(terms={"l1": term})(OUTPUTS)
    values = abs(distributions()["chosen_p"])
    desired = loops(values, MASK, tokens="sum", segment_ids=IDS, num_segments=2)
    assert_close(total, desired, rtol=1e-6)


@pytest.mark.parametrize("name", ["segments", "normalizer", "where"])
def test_a_missing_input(name):
    term = objective_of(
        pj.L1(), "chosen_p", aggregate=pj.Aggregate(num_segments=None), **{name: "absent"}
    )
    with pytest.raises(KeyError, match=r"term 'name' needs 'absent'"):
        term(OUTPUTS)


def test_bad_terms():
    for name in ("segments", "normalizer"):
        with pytest.raises(ValueError, match=f"Term.{name} needs Term.aggregate, got 'x'"):
            pj.Term(pj.L1(), on="x", **{name: "x"})
    with pytest.raises(ValueError, match=r"Term.normalizer is 'n', and its aggregate has one"):
        pj.Term(pj.L1(), on="x", normalizer="n", aggregate=pj.Aggregate(normalizer=3))
    with pytest.raises(TypeError, match=r"Term.aggregate must be of type"):
        pj.Term(pj.L1(), on="x", aggregate="mean")


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"tokens": "max"}, ValueError, "Aggregate.tokens must be one of"),
        ({"sequences": "rows"}, ValueError, "Aggregate.sequences must be one of"),
        ({"sequences": "tokens", "tokens": "sum"}, ValueError, "tokens"),
        ({"sequences": "sum", "normalizer": 3}, ValueError, "normalizer"),
        ({"tokens": "sum", "length": 3}, ValueError, "length"),
        ({"length": 0}, ValueError, "Aggregate.length must be above 0"),
        ({"num_segments": 0}, ValueError, "Aggregate.num_segments must be at least 1"),
        ({"num_segments": 1.5}, TypeError, "Aggregate.num_segments must be"),
        ({"length": pj.anneal(1, 2, start=0, end=1)}, TypeError, "can't be a schedule"),
        ({"normalizer": optax.constant_schedule(1)}, TypeError, "can't be a schedule"),
    ],
)
def test_bad_options(settings, error, message):
    with pytest.raises(error, match=message):
        pj.Aggregate(**settings)


# As any term.


def aggregated(**settings):
    average = pj.Aggregate(length=7.0, num_segments=2, normalizer=3)
    options = {"where": "mask", "segments": "ids", "aggregate": average, **settings}
    return objective_of(pj.KLEstimate("k2"), ("chosen_p", "chosen_q"), **options)


def test_it_is_serialised_pickled_and_stacked():
    objective = aggregated(weight=pj.anneal(0.0, 1.0, start=0, end=4))
    assert pj.from_dict(pj.to_dict(objective)) == objective
    assert pj.from_json(pj.to_json(objective)) == objective
    assert pickle.loads(pickle.dumps(objective)) == objective
    assert pj.from_dict(pj.to_dict(PACKED)) == PACKED
    plain = objective_of(pj.L1(), "x")
    assert pj.from_dict(pj.to_dict(plain)) == plain
    stacked = pj.stack([aggregated(weight=weight) for weight in (0.0, 1.0)])
    totals = jax.vmap(lambda objective: objective(OUTPUTS)[0])(stacked)
    assert_close(totals, [0, aggregated()(OUTPUTS)[0]], rtol=1e-6)


def test_metrics_and_gradient_norms():
    objective = aggregated(weight=0.5)
    total, metrics = quick_jit(lambda outputs: objective(outputs, detail=True))(OUTPUTS)
    values = (distributions()["chosen_p"] - distributions()["chosen_q"]) ** 2 / 2
    desired = loops(values, MASK, segment_ids=IDS, num_segments=2, length=7, normalizer=3)
    assert_close(metrics["name"], desired, rtol=1e-5)
    assert_close(metrics["name/mean"], values[MASK & (IDS > 0)].mean(), rtol=1e-5)
    assert_close([total, metrics["name/weighted"]], desired / 2, rtol=1e-5)
    norms = quick_jit(lambda outputs: objective.grad_norms(outputs, wrt=("chosen_p",)))(OUTPUTS)
    difference = distributions()["chosen_p"] - distributions()["chosen_q"]
    slope = np.where(MASK & (IDS > 0), difference, 0) / 7 / 3
    assert_close(norms["name"], np.linalg.norm(slope), rtol=1e-5)
    assert_close(norms["total"], np.linalg.norm(slope) / 2, rtol=1e-5)


def test_a_weight_of_zero_adds_nothing():
    """Whatever the values, their normalizer and its gradient are."""
    objective = objective_of(pj.L2(), "x", aggregate=pj.Aggregate(), normalizer="n", weight=0.0)
    outputs = {"x": jnp.full((2, 3), jnp.inf), "n": jnp.float32(0)}
    total, slopes = jax.value_and_grad(lambda outputs: objective(outputs)[0])(outputs)
    assert total == 0
    assert all(np.all(np.asarray(slope) == 0) for slope in jax.tree.leaves(slopes))


def test_numbers_are_leaves():
    """Of an argument of a jitted step they change without another trace, and have a gradient."""

    @jit_once
    def slopes(objective):
        return jax.grad(lambda objective: objective(OUTPUTS)[0])(objective)

    for length, normalizer in itertools.product((2.0, 7.0), (1.0, 3.0)):
        average = pj.Aggregate(length=length, num_segments=2, normalizer=normalizer)
        objective = aggregated(aggregate=average)
        slope = slopes(objective).terms["name"].aggregate
        value = objective(OUTPUTS)[0]
        assert_close(slope.length, -value / length, rtol=1e-5)
        assert_close(slope.normalizer, -value / normalizer, rtol=1e-5)


def test_aggregate_is_the_function():
    x = np.float32(lattice(1, BATCH, TIME))
    assert PACKED(x, where=MASK, segment_ids=IDS) == F.aggregate(
        x, where=MASK, tokens="sum", segment_ids=IDS, num_segments=2
    )


@pytest.mark.parametrize("held", [np.nan, -np.inf], ids=str)
def test_padding_may_hold_anything(held):
    ids = jnp.array([[1, 1, 2, 0], [1, 0, 0, 0]])
    log_q = jnp.where(ids == 0, held, -jnp.ones(ids.shape))
    penalty, average = pj.KLEstimate(gradient="kl"), pj.Aggregate(num_segments=2)
    term = pj.Term(penalty, on=("log_p", "log_q"), aggregate=average, segments="ids")

    def total(log_p):
        outputs = {"log_p": log_p, "log_q": log_q, "ids": ids}
        return pj.Objective(terms={"kl": term})(outputs)[0]

    value, slopes = jax.value_and_grad(total)(jnp.full(ids.shape, -2.0))
    np.testing.assert_allclose(value, np.e - 2, rtol=1e-6)
    np.testing.assert_allclose(slopes, [[-1 / 6, -1 / 6, -1 / 3, 0], [-1 / 3, 0, 0, 0]], rtol=1e-6)
