"""Batches of records: padding, references, and the metrics of each penalty."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import penalties_jax as pj
from penalties_jax.adapters import datum

LENGTHS = (4, 1, 6)
CLASSES = 3


class Tensor:
    """Like the Tinker SDK's: an array behind a method."""

    def __init__(self, array):
        self._array = array

    def to_numpy(self):
        return self._array


def sampled(seed):
    rng = np.random.default_rng(seed)
    return [-rng.exponential(size=n).astype(np.float32) for n in LENGTHS]


def of_classes(seed):
    rng = np.random.default_rng(seed)
    rows = [rng.normal(size=(n, CLASSES)) for n in LENGTHS]
    return [(x - np.log(np.exp(x).sum(-1, keepdims=True))).astype(np.float32) for x in rows]


def batch(**fields):
    columns = zip(*fields.values(), strict=True)
    return [
        SimpleNamespace(loss_fn_inputs=dict(zip(fields, column, strict=True))) for column in columns
    ]


def flat(rows):
    return np.concatenate([np.ravel(x) for x in rows]).astype(np.float64)


def test_padding():
    logprobs = sampled(0)
    weights = [Tensor(np.full(n, i)) for i, n in enumerate(LENGTHS)]
    names = [np.zeros(2) for _ in LENGTHS]
    records = batch(weights=weights, other=names)
    result = datum.collate(records, [jnp.asarray(x) for x in logprobs], rows=4, length=8)
    assert set(result) == {"logprobs", "mask", "field/weights"}
    assert all(x.shape == (4, 8) for x in result.values())
    assert result["field/weights"].dtype == np.int32
    np.testing.assert_array_equal(result["mask"].sum(-1), [*LENGTHS, 0])
    np.testing.assert_array_equal(result["logprobs"][result["mask"]], np.concatenate(logprobs))
    assert not result["logprobs"][~result["mask"]].any()


def test_log_probabilities_from_the_records():
    logprobs = sampled(0)
    ours = datum.collate(batch(logprobs=logprobs))
    theirs = datum.collate(batch(logprobs=logprobs), logprobs)
    np.testing.assert_array_equal(ours["logprobs"], theirs["logprobs"])


@pytest.mark.parametrize("rows", [sampled, of_classes])
@pytest.mark.parametrize("how", ["reference_logprobs", "reference_field", "compute_reference"])
def test_a_reference_for_every_record(rows, how):
    logprobs, reference = rows(0), rows(1)
    records = batch(old=reference)
    given = {
        "reference_logprobs": reference,
        "reference_field": "old",
        "compute_reference": lambda records: [x.loss_fn_inputs["old"] for x in records],
    }
    _, metrics = datum.measure(pj.KLDivergence(), records, logprobs, **{how: given[how]})
    each = []
    for p, q in zip(logprobs, reference, strict=True):
        p, q = p.astype(np.float64), q.astype(np.float64)
        term = np.expm1(q - p) - (q - p)
        each.extend(term if p.ndim == 1 else (np.exp(p) * term).sum(-1))
    expected = {"kl_divergence": np.mean(each), "kl_max": max(each), "kl_min": min(each)}
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_estimators(estimator):
    logprobs, reference = sampled(0), sampled(1)
    value, metrics = datum.measure(
        pj.KLEstimate(estimator), batch(a=logprobs), logprobs, reference_logprobs=reference
    )
    p, q = (jnp.asarray(np.concatenate(x)) for x in (logprobs, reference))
    np.testing.assert_allclose(value, pj.kl_estimate(p, q, estimator=estimator), rtol=1e-5)
    np.testing.assert_allclose(metrics["kl_divergence"], value, rtol=1e-6)


@pytest.mark.parametrize("target", ["logprobs", "probs", ("field", "advantages")])
@pytest.mark.parametrize("rows", [sampled, of_classes])
def test_l1_and_l2(target, rows):
    logprobs, advantages = rows(0), sampled(2)
    x = {"logprobs": flat(logprobs), "probs": np.exp(flat(logprobs))}.get(target)
    x = flat(advantages) if x is None else x
    records = batch(advantages=advantages)
    value, metrics = datum.measure(pj.L1(weights=0.5), records, logprobs, target=target)
    np.testing.assert_allclose(value, 0.5 * np.abs(x).sum(), rtol=1e-5)
    assert metrics.keys() == {"l1_raw", "l1_mean"}
    np.testing.assert_allclose(metrics["l1_mean"], 0.5 * np.abs(x).mean(), rtol=1e-5)
    _, metrics = datum.measure(pj.L2(), records, logprobs, target=target)
    expected = {"l2_raw": (x**2).sum(), "l2_mean": (x**2).mean(), "l2_max": (x**2).max()}
    assert metrics.keys() == expected.keys()
    for name, number in expected.items():
        np.testing.assert_allclose(metrics[name], number, rtol=1e-5)


@pytest.mark.parametrize("center", [1.0, "mean", None])
@pytest.mark.parametrize("clip", [0.5, None])
def test_l2_is_logged_of_the_values_themselves(center, clip):
    """Not of what is left of them by a center or a clip, which the loss has."""
    logprobs, x = sampled(0), flat(sampled(0))
    penalty = pj.L2(center=center, clip=clip, weights=0.5)
    value, metrics = datum.measure(penalty, batch(a=logprobs), logprobs)
    moved = x - {"mean": x.mean(), None: 0.0}.get(center, center)
    moved = moved if clip is None else np.clip(moved, -clip, clip)
    np.testing.assert_allclose(value, 0.5 * (moved**2).sum(), rtol=1e-5)
    expected = {"l2_raw": (x**2).sum(), "l2_mean": (x**2).mean(), "l2_max": (x**2).max()}
    for name, number in expected.items():
        np.testing.assert_allclose(metrics[name], 0.5 * number, rtol=1e-5)


@pytest.mark.parametrize("rows", [sampled, of_classes])
@pytest.mark.parametrize(
    "penalty", [pj.L1(), pj.L2(center=1.0), pj.KLDivergence(), pj.Entropy(maximize=True)]
)
def test_a_multiple_has_the_metrics_of_what_is_multiplied(penalty, rows):
    measure = partial(
        datum.measure, records=batch(r=rows(1)), logprobs=rows(0), reference_field="r"
    )
    value, metrics = measure(penalty)
    for multiple in (0.1 * penalty, 0.5 * (0.2 * penalty), 0.04 * penalty + 0.06 * penalty):
        other, same = measure(multiple)
        np.testing.assert_allclose(other, 0.1 * value, rtol=1e-5)
        assert same == metrics


@pytest.mark.parametrize(
    "penalty", [pj.L1() + pj.L2(), pj.L1() + pj.L1(weights=2.0), 2 * pj.Huber()]
)
def test_what_has_no_metrics_of_its_own(penalty):
    with pytest.raises(TypeError, match=r"expected L1, .*measure each by itself"):
        datum.measure(penalty, RECORDS, LOGPROBS)


def top(rows, classes=2):
    return [x[:, :classes] for x in rows]


@pytest.mark.parametrize(
    "penalty", [pj.KLDivergence(), 0.1 * pj.JSDivergence(), pj.Consistency("kl")]
)
def test_divergences_need_all_classes(penalty):
    """Of the top ones only it is none, and has a gradient where the two are equal."""
    padded = datum.collate(batch(h=top(of_classes(0))), top(of_classes(0)), rows=4)
    padded["reference"] = np.log(np.full((4, 6, 2), 0.5))
    on = padded["mask"] & (padded["mask"].cumsum(1) > 2)
    with pytest.raises(
        ValueError, match=r"record 0: .*'logprobs' at position 2 sum to .* 2 classes"
    ):
        datum.check_distributions(penalty, padded, ["reference", "logprobs"], lambda: on)
    datum.check_distributions(penalty, padded, ["reference"], lambda: padded["mask"])
    datum.check_distributions(penalty, padded, ["logprobs"], lambda: np.zeros_like(on))
    for other in (pj.L1(), pj.Entropy(), pj.KLEstimate(), pj.KLDivergence(inputs="logits")):
        datum.check_distributions(other, padded, ["logprobs"], lambda: on)


def test_top_classes_are_measured_by_nothing_that_needs_all():
    p, q = top(of_classes(0)), top(of_classes(1))
    measure = partial(datum.measure, pj.KLDivergence(), batch(h=p))
    with pytest.raises(ValueError, match="a divergence needs all classes: renormalise"):
        measure(p, reference_logprobs=q)
    normalised = [[np.asarray(jax.nn.log_softmax(x)) for x in rows] for rows in (p, q)]
    value, _ = measure(normalised[0], reference_logprobs=normalised[1])
    a, b = (np.concatenate(x) for x in normalised)
    assert float(value) == pytest.approx((np.exp(a) * (a - b)).sum(-1).mean(), rel=1e-5)
    rounded = [np.log(np.exp(x).astype(np.float16)) for x in normalised[0]]
    assert np.isfinite(measure(rounded, reference_logprobs=normalised[1])[0])


def test_entropy():
    logprobs = of_classes(0)
    each = np.concatenate([-(np.exp(x) * x).sum(-1) for x in logprobs])
    records = batch(a=logprobs)
    for maximize in (False, True):
        value, metrics = datum.measure(pj.Entropy(maximize=maximize), records, logprobs)
        np.testing.assert_allclose(metrics["entropy"], each.mean(), rtol=1e-5)
        np.testing.assert_allclose(value, (-1) ** maximize * each.mean(), rtol=1e-5)
        tokens = sampled(0)
        value, metrics = datum.measure(pj.Entropy(maximize=maximize), batch(a=tokens), tokens)
        np.testing.assert_allclose(metrics["entropy"], -flat(tokens).mean(), rtol=1e-5)
        np.testing.assert_allclose(value, -((-1) ** maximize) * flat(tokens).mean(), rtol=1e-5)


def test_the_caller_says_what_a_shape_cannot():
    """[T, K] of the tokens of K samples, which are no distribution."""
    logprobs, reference = of_classes(0), of_classes(1)
    value, _ = datum.measure(
        pj.KLDivergence(),
        batch(a=logprobs),
        logprobs,
        reference_logprobs=reference,
        sampled=True,
    )
    p, q = (jnp.asarray(np.concatenate(x)) for x in (logprobs, reference))
    np.testing.assert_allclose(value, pj.kl_estimate(p, q), rtol=1e-5)


@pytest.mark.parametrize(
    "penalty",
    [
        pj.KLDivergence("reverse"),
        pj.KLDivergence(inputs="logits"),
        pj.JSDivergence(),
        pj.Entropy(temperature=2.0),
        pj.L1() + 0.5 * pj.Entropy(normalize=True),
    ],
)
def test_divergences_that_tokens_do_not_tell(penalty):
    with pytest.raises(ValueError, match="can't be estimated"):
        datum.penalty_for(penalty, sampled=True)
    assert datum.penalty_for(penalty, sampled=False) is penalty


def test_objectives_leave_out_padding():
    logprobs = of_classes(0)
    objective = pj.Objective(
        terms={
            "l2": pj.Term(pj.L2(reduction="mean"), on="logprobs"),
            "entropy": pj.Term(pj.Entropy(), on="logprobs"),
            "own": pj.Term(pj.L1(), on="logprobs", where=lambda batch: batch["mask"][..., None]),
        }
    )
    padded = datum.collate(batch(a=logprobs), logprobs, rows=8, length=16)
    _, metrics = datum.objective_for(objective, sampled=False)(padded)
    x = flat(logprobs)
    np.testing.assert_allclose(metrics["l2"], (x**2).mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["own"], np.abs(x).sum(), rtol=1e-5)
    each = np.concatenate([-(np.exp(x) * x).sum(-1) for x in logprobs])
    np.testing.assert_allclose(metrics["entropy"], each.mean(), rtol=1e-5)


LOGPROBS = sampled(0)
RECORDS = batch(old=LOGPROBS)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: datum.collate([], []), ValueError, "at least one record"),
        (lambda: datum.collate(RECORDS), KeyError, "record 0 has no field 'logprobs'.*old"),
        (lambda: datum.collate(RECORDS, LOGPROBS[:2]), ValueError, "3 records, but logprobs of 2"),
        (
            lambda: datum.collate(
                RECORDS, LOGPROBS, reference_logprobs=LOGPROBS, reference_field="old"
            ),
            ValueError,
            "not several",
        ),
        (
            lambda: datum.collate(RECORDS, LOGPROBS, reference_logprobs=LOGPROBS[::-1]),
            ValueError,
            r"record 0: logprobs of shape \(4,\), but a reference of shape \(6,\)",
        ),
        (
            lambda: datum.collate(RECORDS, [*of_classes(0)[:2], np.zeros((6, 5))]),
            ValueError,
            r"logprobs: records differ in their last axes, \[\(3,\), \(5,\)\]",
        ),
        (lambda: datum.measure(pj.KLDivergence(), RECORDS, LOGPROBS), ValueError, "reference"),
        (lambda: datum.measure(pj.Huber(), RECORDS, LOGPROBS), TypeError, "expected L1"),
        (
            lambda: datum.measure(
                pj.L1(), batch(w=[[1.0], [1.0, 2.0]]), [[0.0], [0.0] * 3], target=("field", "w")
            ),
            KeyError,
            r"here \[\]; field 'w' of record 1 has 2 entries for 3 positions",
        ),
        (
            lambda: datum.measure(pj.L1(), RECORDS, LOGPROBS, target=("field", "new")),
            KeyError,
            r"\('field', 'new'\).*\['old'\]",
        ),
    ],
)
def test_bad_input(call, error, match):
    with pytest.raises(error, match=match):
        call()


def test_the_first_record_does_not_decide_on_the_type():
    records = batch(integer=[[1, 2], [0.5, 1.5]], truth=[[True, False], [0.5, 2.0]])
    result = datum.collate(
        records, [[0, -1], [-0.5, -1.5]], reference_logprobs=[[0, -1], [-0.5, -1.5]]
    )
    for name in ("logprobs", "reference"):
        np.testing.assert_array_equal(result[name], [[0, -1], [-0.5, -1.5]])
    np.testing.assert_array_equal(result["field/integer"], [[1, 2], [0.5, 1.5]])
    np.testing.assert_array_equal(result["field/truth"], [[1, 0], [0.5, 2]])


def test_fields_that_do_not_stack_are_left_out():
    records = batch(top=[np.zeros((2, 3)), np.zeros((2, 4))], text=[["a", "b"], ["c", "d"]])
    assert set(datum.collate(records, [np.zeros(2)] * 2)) == {"logprobs", "mask"}


@pytest.mark.parametrize("make", [sampled, of_classes])
@pytest.mark.parametrize("where", [lambda outputs: outputs["field/on"] == 1, "field/on"])
def test_a_mask_of_a_term_leaves_out_padding_too(make, where):
    """A field of integers, as the Tinker SDK has masks, over positions."""
    logprobs = make(0)
    on = [np.arange(n) % 2 for n in LENGTHS]
    result = datum.collate(batch(on=on), logprobs, rows=4, length=16)
    term = pj.Term(pj.L1(reduction="mean"), on="logprobs", where=where)
    objective = pj.Objective(terms={"l1": term})
    total, _ = datum.objective_for(objective, sampled=make is sampled)(result)
    kept = [x[i == 1] for x, i in zip(logprobs, on, strict=True)]
    assert float(total) == pytest.approx(np.abs(flat(kept)).mean(), rel=1e-6)


def test_penalties_of_positions_and_of_entries_of_classes():
    p, q = of_classes(0), of_classes(1)
    heights = [np.arange(float(n)) for n in LENGTHS]
    result = datum.collate(batch(h=heights), p, reference_logprobs=q, rows=4, length=16)
    terms = {
        "consistency": pj.Term(pj.Consistency("kl"), on=("logprobs", "reference")),
        "entropy": pj.Term(2 * pj.Entropy() + pj.Entropy(), on="logprobs"),
        "field": pj.Term(pj.L2(), on="field/h"),
        "l1": pj.Term(pj.L1(), on="logprobs"),
    }
    adapted = datum.objective_for(pj.Objective(terms=terms), sampled=False)
    assert adapted == datum.objective_for(pj.Objective(terms=terms), sampled=False)
    assert hash(adapted.terms["l1"].where) == hash(adapted.terms["l1"].where)
    _, metrics = adapted(result)
    a, b = (np.concatenate(x).astype(np.float64) for x in (p, q))
    symmetric = ((np.exp(a) - np.exp(b)) * (a - b)).sum(-1).mean() / 2
    assert float(metrics["consistency"]) == pytest.approx(symmetric, rel=1e-5)
    assert float(metrics["entropy"]) == pytest.approx(-3 * (np.exp(a) * a).sum(-1).mean())
    assert float(metrics["field"]) == pytest.approx((flat(heights) ** 2).sum())
    assert float(metrics["l1"]) == pytest.approx(np.abs(flat(p)).sum())


def candidates(outputs):
    """Distributions over the entries of a row, of which the padding is none."""
    keys = ("logprobs", "reference")
    kept = [jnp.where(outputs["mask"], outputs[key], -jnp.inf) for key in keys]
    empty = ~jnp.any(outputs["mask"], axis=1, keepdims=True)
    return tuple(jax.nn.log_softmax(jnp.where(empty, 0, x)) for x in kept)


@pytest.mark.parametrize("sampled", [True, False])
def test_a_term_on_a_function_is_what_it_says(sampled):
    """Records [K] of candidates are one distribution each, whatever the rank seems to say."""
    p, q = (np.array(of_classes(seed)[0][:3]) for seed in (0, 1))
    own = pj.Term(pj.KLDivergence(), on=candidates)
    batch_of = partial(datum.collate, batch(h=p), p, reference_logprobs=q)
    expected = (np.exp(p) * (p - q)).sum(-1).mean()
    for padded in (batch_of(), batch_of(rows=4, length=16)):
        adapted = datum.objective_for(pj.Objective(terms={"kl": own}), sampled=sampled)
        assert adapted.terms["kl"].penalty == own.penalty
        assert float(adapted(padded)[0]) == pytest.approx(expected, rel=1e-5)
    records = batch(h=p[:, None])
    classes = datum.collate(records, list(p[:, None]), reference_logprobs=list(q[:, None]))
    by_key = pj.Objective(terms={"kl": pj.Term(own.penalty, on=("logprobs", "reference"))})
    total, _ = datum.objective_for(by_key, sampled=False)(classes)
    assert float(total) == pytest.approx(expected, rel=1e-5)


def test_what_is_left_out_of_what_a_function_returns():
    """Entries of positions, of rows, and of neither; with a mask of the term's own, and a tree."""
    logprobs = of_classes(0)
    padded = datum.collate(batch(on=[np.arange(n) % 2 for n in LENGTHS]), logprobs, rows=4)
    terms = {
        "positions": pj.Term(pj.L1(), on=lambda outputs: 0 * outputs["logprobs"][..., :2] + 1),
        "rows": pj.Term(pj.L1(), on=lambda outputs: jnp.ones((4, 5))),
        "neither": pj.Term(pj.L1(), on=lambda outputs: jnp.ones(7)),
        "number": pj.Term(pj.L1(), on=lambda outputs: jnp.ones(())),
        "own": pj.Term(pj.L1(), on=lambda outputs: jnp.ones((4, 6, 2)), where="field/on"),
        "own of neither": pj.Term(
            pj.L1(), on=lambda outputs: jnp.ones(7), where=lambda outputs: jnp.arange(7) < 3
        ),
        "tree": pj.Term(pj.L1(), on=lambda outputs: {"a": jnp.ones((4, 5)), "b": jnp.ones(7)}),
        "position": pj.Term(
            pj.Entropy(reduction="sum"), on=lambda outputs: jnp.log(jnp.ones((4, 6, 2)) / 2)
        ),
        "row": pj.Term(
            pj.Entropy(reduction="sum"), on=lambda outputs: jnp.log(jnp.ones((4, 2)) / 2)
        ),
        "one": pj.Term(pj.Entropy(reduction="sum"), on=lambda outputs: jnp.log(jnp.ones(2) / 2)),
    }
    _, metrics = datum.objective_for(pj.Objective(terms=terms), sampled=False)(padded)
    positions, on = sum(LENGTHS), sum(n // 2 for n in LENGTHS)
    assert {name: float(metrics[name]) for name in terms} == pytest.approx(
        {
            "positions": 2 * positions, "rows": 15, "neither": 7, "number": 1, "own": 2 * on,
            "own of neither": 3, "tree": 22, "position": positions * np.log(2),
            "row": 3 * np.log(2), "one": np.log(2),
        }
    )  # fmt: skip


@pytest.mark.parametrize("make", [sampled, of_classes])
@pytest.mark.parametrize("on", ["logprobs", lambda outputs: outputs["logprobs"]])
def test_orthogonality_leaves_out_padding(make, on):
    logprobs = make(0)
    padded = datum.collate(batch(h=logprobs), logprobs, rows=4, length=16)
    padded["logprobs"] = np.where(padded["logprobs"] == 0, np.nan, padded["logprobs"])
    objective = pj.Objective(terms={"gram": pj.Term(pj.Orthogonality(normalize=False), on=on)})
    total, _ = datum.objective_for(objective, sampled=make is sampled)(padded)
    padded_rows = [np.pad(x, (0, 6 - len(x))) for x in logprobs if x.ndim == 1]
    x = np.array(padded_rows) if padded_rows else np.concatenate(logprobs)
    gram = x @ x.T
    assert float(total) == pytest.approx((gram**2).sum() - (np.diag(gram) ** 2).sum(), rel=1e-4)


def test_a_penalty_that_takes_no_mask():
    """It would count padding; what a function returns is the function's own business."""
    hard = pj.Orthogonality("hard", normalize=False)
    objective = pj.Objective(terms={"o": pj.Term(2 * hard, on="logprobs")})
    with pytest.raises(ValueError, match=r"term 'o': Orthogonality\(.* takes no mask"):
        datum.objective_for(objective, sampled=True)
    objective = pj.Objective(terms={"o": pj.Term(hard, on=lambda outputs: 2 * jnp.eye(2))})
    padded = datum.collate(RECORDS, LOGPROBS, rows=4)
    assert float(datum.objective_for(objective, sampled=True)(padded)[0]) == 2 * 3**2


def test_classes_where_there_are_sampled_tokens():
    objective = pj.Objective(terms={"kl": pj.Term(pj.KLDivergence(), on=("logprobs", "reference"))})
    padded = datum.collate(RECORDS, LOGPROBS, reference_field="old")
    with pytest.raises(ValueError, match=r"term 'kl': sampled=False needs .* of classes, got"):
        datum.objective_for(objective, sampled=False)(padded)


def test_classes_that_are_alternatives_of_samples():
    """[T, K] with sampled=True: each entry is a token's."""
    p, q = of_classes(0), of_classes(1)
    result = datum.collate(batch(h=p), p, reference_logprobs=q, rows=4, length=16)
    term = pj.Term(pj.KLEstimate("k2"), on=("logprobs", "reference"))
    total, _ = datum.objective_for(pj.Objective(terms={"kl": term}), sampled=True)(result)
    assert float(total) == pytest.approx(((flat(p) - flat(q)) ** 2 / 2).mean(), rel=1e-5)


def test_no_positions_at_all():
    for penalty in (pj.L2(), pj.KLDivergence()):
        _, metrics = datum.measure(penalty, batch(r=[[]]), [[]], reference_field="r")
        assert {float(value) for value in metrics.values()} == {0.0}


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: datum.collate(batch(a=[[1], [2], [3]]), [[0.0]] * 3, rows=2), "rows=2"),
        (lambda: datum.collate(batch(a=[[1]]), [[0.0, 0.0]], length=1), "up to 2 positions"),
        (lambda: datum.collate(batch(a=[[2**40]]), [[0.0]]), "more than 32 bits"),
        (lambda: datum.is_sampled({"logprobs": np.zeros((1, 2))}, False), "got \\[T\\]"),
        (lambda: datum.penalty_for(2 * pj.KLEstimate(), sampled=False), "sampled tokens"),
        (
            lambda: datum.measure(pj.Entropy(), batch(a=[[1.0]]), [[0.0]], target="probs"),
            "target='probs'",
        ),
        (
            lambda: datum.objective_for(
                pj.Objective(terms={"both": pj.Term(pj.L1() + pj.Entropy(), on="logprobs")}),
                sampled=False,
            ),
            "term 'both' adds",
        ),
    ],
)
def test_more_bad_input(call, match):
    with pytest.raises(ValueError, match=match):
        call()
