"""The Tinker SDK's own custom loss, run on its own records, without a server."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import penalties_jax as pj

torch = pytest.importorskip("torch", reason="the Tinker SDK's custom losses are torch functions")
tinker = pytest.importorskip("tinker", reason="needs the extra 'tinker'")

LENGTHS = (5, 3, 17)
CLASSES = 4


def rows(seed, classes=None):
    """Log-probabilities of each record: of sampled tokens, or of all classes."""
    rng = np.random.default_rng(seed)
    if classes is None:
        return [-rng.exponential(size=n).astype(np.float32) for n in LENGTHS]
    logits = [rng.normal(size=(n, classes)) for n in LENGTHS]
    return [(x - np.log(np.exp(x).sum(-1, keepdims=True))).astype(np.float32) for x in logits]


def records(reference):
    return [
        tinker.Datum(
            model_input=tinker.ModelInput.from_ints(list(range(len(x)))),
            loss_fn_inputs={
                "target_tokens": tinker.TensorData.from_numpy(np.zeros(x.shape, np.int64)),
                "reference": tinker.TensorData.from_numpy(x),
            },
        )
        for x in reference
    ]


def sent(loss, data, logprobs):
    """What the SDK's client computes from a loss: the weights that it would send, and the rest."""
    outputs = [{"logprobs": tinker.TensorData.from_numpy(x)} for x in logprobs]
    result = tinker.TrainingClient._compute_custom_loss(
        data,
        loss,
        tinker.types.ForwardBackwardOutput(
            loss_fn_output_type="logprobs", loss_fn_outputs=outputs, metrics={}
        ),
    )
    weights = [datum.loss_fn_inputs["weights"].to_numpy() for datum in result.data]
    return weights, result.loss_sum, result.metrics


def differences(function, logprobs, step=1e-6):
    """The gradient of a function of lists of float64 arrays, by central differences."""
    logprobs = [x.astype(np.float64) for x in logprobs]
    gradients = [np.empty_like(x) for x in logprobs]
    for x, gradient in zip(logprobs, gradients, strict=True):
        for index in np.ndindex(x.shape):
            kept = x[index]
            x[index] = kept + step
            above = function(logprobs)
            x[index] = kept - step
            gradient[index] = (above - function(logprobs)) / (2 * step)
            x[index] = kept
    return gradients


def mean(values):
    return sum(x.sum() for x in values) / sum(x.size for x in values)


def ratios(reference, logprobs):
    return [q - p for p, q in zip(logprobs, reference, strict=True)]


def entropy(x):
    """Of the softmax of rows, which normalised rows are the logarithms of already."""
    x = x - np.log(np.exp(x).sum(-1, keepdims=True))
    return -(np.exp(x) * x).sum(-1)


ORACLES = {
    "l1": (pj.L1(reduction="mean"), lambda p, q: mean([np.abs(x) for x in p])),
    "l2": (pj.L2(), lambda p, q: sum((x**2).sum() for x in p)),
    "k1": (pj.KLEstimate("k1"), lambda p, q: mean([-r for r in ratios(q, p)])),
    "k2": (pj.KLEstimate("k2"), lambda p, q: mean([r**2 / 2 for r in ratios(q, p)])),
    "k3": (pj.KLEstimate("k3"), lambda p, q: mean([np.expm1(r) - r for r in ratios(q, p)])),
    "kl": (pj.KLDivergence(), lambda p, q: mean([np.expm1(r) - r for r in ratios(q, p)])),
    "entropy": (pj.Entropy(), lambda p, q: mean([-x for x in p])),
    "max entropy": (pj.Entropy(maximize=True), lambda p, q: mean(p)),
}
OF_CLASSES = {
    "l1": (pj.L1(), lambda p, q: sum(np.abs(x).sum() for x in p)),
    "kl": (
        pj.KLDivergence(),
        lambda p, q: mean([(np.exp(a) * (a - b)).sum(-1) for a, b in zip(p, q, strict=True)]),
    ),
    "entropy": (pj.Entropy(), lambda p, q: mean([entropy(x) for x in p])),
}


def term(penalty, weight=1.0):
    inputs = penalty.takes[0]
    return pj.Term(penalty, on=("logprobs", "reference")[:inputs], weight=weight)


@pytest.mark.parametrize("name", ORACLES)
def test_weights_of_sampled_tokens(name):
    penalty, oracle = ORACLES[name]
    check(pj.Objective(terms={"term": term(penalty)}), oracle)


@pytest.mark.parametrize("name", OF_CLASSES)
def test_weights_of_classes(name):
    penalty, oracle = OF_CLASSES[name]
    check(pj.Objective(terms={"term": term(penalty)}), oracle, CLASSES)


def test_weights_of_a_sum():
    weights = dict(zip(ORACLES, np.linspace(0.1, 1.0, len(ORACLES)), strict=True))
    terms = {name: term(ORACLES[name][0], weight) for name, weight in weights.items()}

    def oracle(p, q):
        return sum(weight * ORACLES[name][1](p, q) for name, weight in weights.items())

    metrics = check(pj.Objective(terms=terms), oracle)
    assert set(metrics) >= {*terms, "total", "k3/weighted"}


def check(objective, oracle, classes=None):
    logprobs, reference = rows(0, classes), rows(1, classes)
    loss = pj.adapters.tinker.as_loss(objective, reference_field="reference")
    weights, total, metrics = sent(loss, records(reference), logprobs)
    expected = differences(lambda p: oracle(p, reference), logprobs)
    for weight, gradient in zip(weights, expected, strict=True):
        assert weight.shape == gradient.shape
        np.testing.assert_allclose(weight, -gradient, rtol=2e-4, atol=2e-6)
    double = [x.astype(np.float64) for x in logprobs]
    assert total == pytest.approx(oracle(double, reference), rel=1e-5)
    assert all(isinstance(value, float) for value in metrics.values())
    return metrics


def test_references_given_computed_or_in_a_field_are_the_same():
    objective = pj.Objective(terms={"kl": term(pj.KLEstimate())})
    logprobs, reference = rows(0), rows(1)
    data = records(reference)
    as_loss = partial(pj.adapters.tinker.as_loss, objective)
    losses = [
        as_loss(reference_field="reference"),
        as_loss(reference_logprobs=reference),
        as_loss(compute_reference=lambda data: [d.loss_fn_inputs["reference"] for d in data]),
    ]
    totals = {sent(loss, data, logprobs)[1] for loss in losses}
    assert len(totals) == 1
    assert totals.pop() > 0


def test_one_program_for_each_bucket():
    traces = []

    def counted(outputs):
        traces.append(outputs["logprobs"].shape)
        return 0.0 * outputs["logprobs"].sum()

    loss = pj.adapters.tinker.as_loss(pj.Objective(loss=counted, terms={"l1": term(pj.L1())}))
    for lengths in ((3, 9), (16, 2), (1, 1), (17, 3), (31, 32)):
        data = [np.full(n, -1.0, np.float32) for n in lengths]
        assert sent(loss, records(data), data)[1] == pytest.approx(sum(lengths))
    assert set(traces) == {(2, 16), (2, 32)}
    assert len(traces) == 2


def test_schedules_take_the_step():
    schedule = pj.anneal(0.0, 1.0, start=0, end=10)
    loss = pj.adapters.tinker.as_loss(pj.Objective(terms={"l1": term(pj.L1(), schedule)}))
    data = [np.full(n, -1.0, np.float32) for n in LENGTHS]
    totals = [sent(partial(loss, step=step), records(data), data)[1] for step in (0, 5, 20)]
    assert totals == pytest.approx([0.0, sum(LENGTHS) / 2, sum(LENGTHS)])


def test_fields_and_probabilities():
    objective = pj.Objective(
        terms={
            "probs": pj.Term(pj.L1(), on="probs"),
            "field": pj.Term(pj.L1(), on="field/reference", weight=2.0),
        }
    )
    logprobs, reference = rows(0), rows(1)
    loss = pj.adapters.tinker.as_loss(objective)
    weights, total, _ = sent(loss, records(reference), logprobs)
    expected = sum(np.exp(x).sum() for x in logprobs) - 2 * sum(x.sum() for x in reference)
    assert total == pytest.approx(expected, rel=1e-5)
    for weight, x in zip(weights, logprobs, strict=True):
        np.testing.assert_allclose(weight, -np.exp(x), rtol=1e-5)


def test_norms_of_the_gradients_of_every_term():
    """Of what is on "probs" too, which are made of the log-probabilities; and of no padding."""
    objective = pj.Objective(
        loss=lambda outputs: jnp.sum(outputs["logprobs"], where=outputs["mask"]),
        terms={"k2": term(pj.KLEstimate("k2"), 0.5), "l1": pj.Term(pj.L1(), "probs", weight=2.0)},
    )
    logprobs, reference = rows(0), rows(1)
    loss = partial(pj.adapters.tinker.as_loss, objective, reference_field="reference")
    *_, plain = sent(loss(), records(reference), logprobs)
    *_, metrics = sent(loss(grad_norms=True), records(reference), logprobs)
    slopes = {
        "loss": np.ones(sum(LENGTHS)),
        "k2": np.concatenate(ratios(logprobs, reference)) / sum(LENGTHS),
        "l1": np.exp(np.concatenate(logprobs)),
    }
    slopes |= {"k2/weighted": 0.5 * slopes["k2"], "l1/weighted": 2.0 * slopes["l1"]}
    slopes["total"] = slopes["loss"] + slopes["k2/weighted"] + slopes["l1/weighted"]
    expected = plain | {f"{x}/grad_norm": np.linalg.norm(slope) for x, slope in slopes.items()}
    assert metrics == pytest.approx(expected, rel=1e-5)


def test_a_log_probability_of_minus_infinity():
    objective = pj.Objective(terms={"kl": term(pj.KLEstimate("k1"))})
    data = [np.array([-1.0, -2.0], np.float32)]
    logprobs = [np.array([-1.0, -math.inf], np.float32)]
    loss = pj.adapters.tinker.as_loss(objective, reference_logprobs=data)
    weights, _, _ = sent(loss, records(data), logprobs)
    assert weights[0][0] == -0.5


def test_bad_input():
    objective = pj.Objective(terms={"kl": term(pj.KLDivergence("reverse"))})
    logprobs = rows(0)
    loss = pj.adapters.tinker.as_loss(objective, reference_field="reference")
    with pytest.raises(ValueError, match="can't be estimated"):
        sent(loss, records(logprobs), logprobs)
    loss = pj.adapters.tinker.as_loss(objective, reference_field="other")
    with pytest.raises(KeyError, match="record 0 has no field 'other'"):
        sent(loss, records(logprobs), logprobs)


@pytest.mark.parametrize("sampled", [None, False])
def test_a_term_on_a_function_keeps_its_penalty(sampled):
    """Records [K] of candidates, padded to more of them in rows of more."""

    def candidates(outputs):
        kept = [jnp.where(outputs["mask"], outputs[key], -1e9) for key in ("logprobs", "reference")]
        return tuple(map(jax.nn.log_softmax, kept))

    logprobs, reference = (np.concatenate(rows(seed, CLASSES))[:3] for seed in (0, 1))
    objective = pj.Objective(terms={"kl": pj.Term(pj.KLDivergence(), on=candidates)})
    loss = pj.adapters.tinker.as_loss(
        objective, sampled=sampled, reference_logprobs=list(reference)
    )
    weights, total, _ = sent(loss, records(reference), list(logprobs))

    def oracle(p):
        p = [x - np.log(np.exp(x).sum()) for x in p]
        return np.mean([(np.exp(a) * (a - b)).sum() for a, b in zip(p, reference, strict=True)])

    assert total == pytest.approx(oracle(logprobs), rel=1e-5)
    expected = differences(oracle, list(logprobs))
    np.testing.assert_allclose(weights, -np.array(expected), rtol=2e-4, atol=2e-6)


def test_orthogonality_is_that_of_the_rows_there_are():
    logprobs = rows(0, CLASSES)
    objective = pj.Objective(
        terms={
            "logprobs": term(pj.Orthogonality(normalize=False)),
            "probs": pj.Term(pj.Orthogonality(normalize=False), on="probs"),
        }
    )
    loss = pj.adapters.tinker.as_loss(objective)
    _, _, metrics = sent(loss, records(logprobs), logprobs)
    positions = np.concatenate(logprobs)
    for name, x in {"logprobs": positions, "probs": np.exp(positions)}.items():
        gram = x @ x.T
        expected = (gram**2).sum() - (np.diag(gram) ** 2).sum()
        assert metrics[name] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("where", ["field/on", lambda outputs: outputs["field/on"] == 1])
def test_a_divergence_needs_all_classes_where_it_is_taken(where):
    logprobs = [x[:, :3] for x in rows(0, CLASSES)]
    data = records(logprobs)
    on = pj.Term(pj.KLDivergence(), on=("logprobs", "reference"), where=where)
    loss = pj.adapters.tinker.as_loss(pj.Objective(terms={"kl": on}), reference_field="reference")

    def total(first):
        for datum in data:
            mask = np.arange(len(datum.loss_fn_inputs["reference"].to_numpy())) >= first
            datum.loss_fn_inputs["on"] = tinker.TensorData.from_numpy(mask.astype(np.int64))
        return sent(loss, data, logprobs)[1]

    assert total(100) == 0
    with pytest.raises(ValueError, match=r"record 0: .*'logprobs' at position 4 sum to 0\."):
        total(4)


@pytest.mark.parametrize(
    "on", ["field/weights", lambda outputs: outputs["field/weights"]], ids=["key", "function"]
)
@pytest.mark.parametrize(
    ("weights", "reason"),
    [
        ([[1.0] * 5, [1.0] * 2, [1.0] * 17], "'weights' of record 1 has 2 entries for 3 positions"),
        ([[1.0] * 5, [1.0] * 3, None], "record 2 has no field 'weights'"),
    ],
)
def test_a_field_that_is_left_out_is_missed_with_the_reason(on, weights, reason):
    logprobs = rows(0)
    data = records(logprobs)
    for datum, values in zip(data, weights, strict=True):
        if values is not None:
            datum.loss_fn_inputs["weights"] = tinker.TensorData.from_numpy(np.array(values))
    loss = pj.adapters.tinker.as_loss(pj.Objective(terms={"l1": pj.Term(pj.L1(), on=on)}))
    with pytest.raises(KeyError, match=f"field/weights.*; .*{reason}"):
        sent(loss, data, logprobs)


def test_fields_that_are_not_read_are_no_part_of_the_program():
    logprobs = rows(0)
    loss = pj.adapters.tinker.as_loss(pj.Objective(terms={"l1": term(pj.L1())}))
    before = pj.adapters.tinker._value_and_gradient._cache_size()
    for name in ("a", "b", "c"):
        data = records(logprobs)
        for datum in data:
            datum.loss_fn_inputs[name] = datum.loss_fn_inputs["reference"]
        sent(loss, data, logprobs)
    assert pj.adapters.tinker._value_and_gradient._cache_size() <= before + 1


def test_half_precision_and_second_derivatives():
    loss = pj.adapters.tinker.as_loss(pj.Objective(terms={"l1": term(pj.L1())}))
    x = torch.full((4,), -30000.0, dtype=torch.float16, requires_grad=True)
    total, _ = loss(records([np.ones(4, np.float32)]), [x])
    assert total.item() == 120000.0
    (slope,) = torch.autograd.grad(total, x, create_graph=True)
    assert slope.dtype == torch.float16
    with pytest.raises(RuntimeError, match="does not require grad"):
        slope.sum().backward()


def test_as_loss_takes_an_objective():
    with pytest.raises(TypeError, match=r"takes a pj\.Objective, got L1"):
        pj.adapters.tinker.as_loss(pj.L1())
