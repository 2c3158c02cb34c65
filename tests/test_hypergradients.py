"""The hypergradients of an objective's weights against differences of the validation loss."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from scipy import special
from sklearn import linear_model

import penalties_jax as pj
from tests.oracles import assert_close, gradient, lattice
from tests.programs import doubles, jit_once, quick_jit

WEIGHTS = {"ridge": 0.3, "lasso": 0.2, "kl": 0.7}
# Exact in float32.
TRAIN = {"x": np.float32(lattice(0, 12, 4)), "y": np.arange(12) % 3}
VALIDATION = {"x": np.float32(lattice(1, 9, 4)), "y": np.arange(9) % 3}
START = {"kernel": np.float32(lattice(2, 4, 3)) / 4, "bias": np.float32(lattice(3, 3)) / 4}
REFERENCE = np.float32(lattice(4, 4, 3))

OPTIMIZERS = {
    "sgd": optax.sgd(0.1),
    "momentum": optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adam": optax.adam(0.05, eps=1e-2),
    "adamw": optax.chain(
        optax.clip_by_global_norm(0.5), optax.adamw(0.05, eps=1e-2, weight_decay=0.1)
    ),
    "proximal": optax.chain(optax.sgd(0.1), pj.proximal(pj.L2(), 0.1, 0.5)),
}
every_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)


def cross_entropy(outputs):
    chosen = jnp.take_along_axis(outputs["logprobs"], outputs["y"][:, None], axis=-1)
    return -jnp.mean(chosen)


def forward(params, batch):
    x = jnp.asarray(batch["x"], jnp.result_type(params["kernel"]))
    return {
        "kernel": params["kernel"],
        "logprobs": jax.nn.log_softmax(x @ params["kernel"] + params["bias"]),
        "reference": jax.nn.log_softmax(x @ jnp.asarray(REFERENCE)),
        "y": batch["y"],
    }


def objective_of(weights):
    """With a term beside whose weight is a schedule, and one that is disabled."""
    terms = {
        "ridge": pj.Term(pj.L2(), on="kernel", weight=weights["ridge"]),
        "lasso": pj.Term(0.5 * pj.L1(), on="kernel", weight=weights["lasso"]),
        "kl": pj.Term(pj.KLDivergence(), on=("logprobs", "reference"), weight=weights["kl"]),
        "annealed": pj.Term(pj.L2(), on="kernel", weight=pj.anneal(0.0, 0.5, start=0, end=4)),
        "off": pj.Term(pj.L2(), on="kernel", weight=0.5, enabled=0.0),
    }
    return pj.Objective(cross_entropy, terms)


def gradients_by_hand(params, weights):
    """Of the total at step 2, in NumPy."""
    x, kernel = np.float64(TRAIN["x"]), params["kernel"]
    logits, others = x @ kernel + params["bias"], x @ REFERENCE
    p, log_p, log_q = (
        special.softmax(logits, -1),
        *(special.log_softmax(z, -1) for z in (logits, others)),
    )
    ratio = log_p - log_q
    kl = p * (ratio - np.sum(p * ratio, -1, keepdims=True))
    of_logits = (p - np.eye(3)[TRAIN["y"]] + weights["kl"] * kl) / len(x)
    of_kernel = 2 * (weights["ridge"] + 0.25) * kernel + 0.5 * weights["lasso"] * np.sign(kernel)
    return {"kernel": x.T @ of_logits + of_kernel, "bias": of_logits.sum(0)}


def validation_by_hand(params):
    logits = VALIDATION["x"] @ np.asarray(params["kernel"]) + np.asarray(params["bias"])
    log_p = special.log_softmax(logits, -1)
    return -np.mean(log_p[np.arange(len(log_p)), VALIDATION["y"]])


def after_some_steps(optimizer, steps):
    """Parameters and state that are not those of the start."""
    params = jax.tree.map(jnp.float64, START)
    state = optimizer.init(params)
    for _ in range(steps):
        updates, state = optimizer.update(gradients_by_hand(params, WEIGHTS), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def step_of(objective, optimizer, params, state, **options):
    options = {"learning_rate": 2.0, "step": 2} | options

    @jax.jit
    def run(objective, params, state):
        return pj.hypergradient_step(
            objective, forward, optimizer, params, state, TRAIN, VALIDATION, **options
        )

    return run(objective, params, state)


@every_optimizer
@pytest.mark.parametrize("steps", [0, 3])
def test_hypergradients_are_differences_of_the_validation_loss(optimizer, steps, x64):
    """For every weight at once, in float64; what is by hand has no part of ours."""
    params, state = after_some_steps(optimizer, steps)

    def loss(weights):
        gradients = gradients_by_hand(params, dict(zip(WEIGHTS, weights, strict=True)))
        updates, _ = optimizer.update(gradients, state, params)
        return validation_by_hand(optax.apply_updates(params, updates))

    weights = {name: jnp.float64(weight) for name, weight in WEIGHTS.items()}
    objective, metrics = step_of(objective_of(weights), optimizer, params, state)
    slopes = gradient(loss, np.array([*WEIGHTS.values()]), step=2e-5)
    assert np.all(np.abs(slopes) > 1e-5)
    assert_close(metrics["loss"], loss([*WEIGHTS.values()]), rtol=1e-12)
    for slope, (name, weight) in zip(slopes, WEIGHTS.items(), strict=True):
        assert metrics[f"{name}/hypergradient"].dtype == jnp.float64
        assert_close(metrics[f"{name}/hypergradient"], slope, rtol=1e-6)
        expected = weight * np.exp(-2 * weight * slope)
        assert_close(metrics[f"{name}/weight"], expected, rtol=1e-6)
        assert float(objective.terms[name].weight) == float(metrics[f"{name}/weight"])


def test_what_stays_as_it_is():
    """Schedules, what is disabled, weights of 0, and all but the weights."""
    optimizer = OPTIMIZERS["sgd"]
    before = objective_of(WEIGHTS | {"lasso": 0.0})
    after, metrics = step_of(before, optimizer, START, optimizer.init(START))
    assert after.terms["annealed"] == before.terms["annealed"]
    assert float(after.terms["off"].weight) == 0.5
    assert float(after.terms["lasso"].weight) == 0
    assert metrics["off/hypergradient"] == metrics["lasso/hypergradient"] == 0
    assert metrics.keys() == {"loss"} | {
        f"{name}/{what}"
        for name in ("ridge", "lasso", "kl", "off")
        for what in ("hypergradient", "weight")
    }
    assert float(after.terms["ridge"].weight) != 0.3
    restored = after
    for name, term in before.terms.items():
        restored = restored.replace(name, weight=term.weight)
    assert restored == before


def test_a_validation_loss_of_its_own():
    optimizer = OPTIMIZERS["sgd"]
    state = optimizer.init(START)
    objective = pj.Objective(terms=objective_of(WEIGHTS).terms)
    _, theirs = step_of(objective_of(WEIGHTS), optimizer, START, state)

    def twice(outputs):
        return 2 * cross_entropy(outputs)

    _, with_loss = step_of(objective_of(WEIGHTS), optimizer, START, state, validation=twice)
    assert_close(with_loss["loss"], 2 * np.asarray(theirs["loss"]))
    assert_close(
        with_loss["kl/hypergradient"], 2 * np.asarray(theirs["kl/hypergradient"]), rtol=1e-5
    )
    _, without = step_of(objective, optimizer, START, state, validation=cross_entropy)
    assert float(without["kl/hypergradient"]) != float(theirs["kl/hypergradient"])
    with pytest.raises(ValueError, match="the objective has no loss: pass validation="):
        step_of(objective, optimizer, START, state)


def test_a_parameter_without_a_gradient():
    """Adam divides by the root of a sum of its squares, whose derivative at 0 is infinite.

    So it is where the squares are 0 in float32.
    """
    objective = pj.Objective(
        lambda outputs: (outputs["w"][0] - outputs["target"]) ** 2,
        {"l2": pj.Term(pj.L2(), on="w", weight=0.1)},
    )
    optimizer = optax.adam(0.1, eps=0.1)

    @jax.jit
    def hypergradient(w):
        _, metrics = pj.hypergradient_step(
            objective,
            lambda w, target: {"w": w, "target": target},
            optimizer,
            w,
            optimizer.init(w),
            1.999,
            1.0,
            learning_rate=1.0,
        )
        return metrics["l2/hypergradient"]

    alone, beside = hypergradient(jnp.array([2.0])), hypergradient(jnp.array([2.0, 0.0, 1e-20]))
    assert_close(beside, float(alone), rtol=1e-6)
    assert abs(alone) > 1e-3


def test_steps_are_bounded_and_need_finite_hypergradients():
    optimizer = OPTIMIZERS["sgd"]
    state = optimizer.init(START)
    far, metrics = step_of(objective_of(WEIGHTS), optimizer, START, state, learning_rate=1e9)
    for name, weight in WEIGHTS.items():
        sign = np.sign(metrics[f"{name}/hypergradient"])
        assert_close(far.terms[name].weight, weight * np.exp(-sign), rtol=1e-6)
    for value in (math.nan, math.inf):
        same, metrics = step_of(
            objective_of(WEIGHTS),
            optimizer,
            START,
            state,
            validation=lambda outputs, value=value: value * jnp.sum(outputs["logprobs"]),
        )
        assert not np.isfinite(metrics["kl/hypergradient"])
        assert [float(same.terms[name].weight) for name in WEIGHTS] == [
            float(np.float32(weight)) for weight in WEIGHTS.values()
        ]


def test_nothing_retraces_and_stacks_are_mapped():
    optimizer = OPTIMIZERS["adam"]
    state = optimizer.init(START)

    @jit_once
    def one(objective):
        return step_of(objective, optimizer, START, state)

    several = [
        jax.tree.map(jnp.float32, objective_of({n: factor * w for n, w in WEIGHTS.items()}))
        for factor in (1.0, 0.5, 3.0)
    ]
    alone = [one(objective) for objective in several]
    one(alone[0][0])
    stacked, metrics = jax.jit(
        jax.vmap(lambda objective: step_of(objective, optimizer, START, state))
    )(pj.stack(several))
    for i, (objective, own) in enumerate(alone):
        for name in WEIGHTS:
            assert_close(stacked.terms[name].weight[i], objective.terms[name].weight, rtol=1e-5)
            slopes = metrics[f"{name}/hypergradient"][i], own[f"{name}/hypergradient"]
            assert_close(slopes[0], np.asarray(slopes[1]), rtol=1e-4, atol=1e-7)


def test_the_weights_are_carried_by_a_scan():
    """From Python's numbers, with the parameters, as a training loop does."""
    optimizer = OPTIMIZERS["sgd"]
    params = jax.tree.map(jnp.asarray, START)

    def body(carry, step):
        objective, params, state = carry
        objective, metrics = step_of(objective, optimizer, params, state, step=step)
        gradients = jax.grad(lambda p: objective(forward(p, TRAIN), step=step)[0])(params)
        updates, state = optimizer.update(gradients, state, params)
        return (objective, optax.apply_updates(params, updates), state), metrics["loss"]

    carry = objective_of(WEIGHTS), params, optimizer.init(params)
    (objective, _, _), losses = jax.lax.scan(body, carry, jnp.arange(5))
    assert losses[-1] < losses[0]
    assert all(float(objective.terms[name].weight) != weight for name, weight in WEIGHTS.items())


def test_the_weights_never_widen(x64):
    optimizer = OPTIMIZERS["adam"]
    state = optimizer.init(START)
    result = step_of(objective_of(WEIGHTS), optimizer, START, state)
    assert doubles(result[1]) == []
    assert {result[0].terms[name].weight.dtype for name in WEIGHTS} == {jnp.dtype("float32")}


def test_a_model_of_flax():
    """Its parameters are Variables."""
    model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    model.kernel[...], model.bias[...] = START["kernel"], START["bias"]
    definition, params = nnx.split(model, nnx.Param)

    def of_model(params, batch):
        model = nnx.merge(definition, params)
        return forward({"kernel": model.kernel[...], "bias": model.bias[...]}, batch)

    optimizer = OPTIMIZERS["adam"]
    expected = step_of(objective_of(WEIGHTS), optimizer, START, optimizer.init(START))[1]

    @jax.jit
    def run(objective, params, state):
        return pj.hypergradient_step(
            objective,
            of_model,
            optimizer,
            params,
            state,
            TRAIN,
            VALIDATION,
            learning_rate=2.0,
            step=2,
        )[1]

    metrics = run(objective_of(WEIGHTS), params, optimizer.init(params))
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        assert_close(metrics[name], float(value), rtol=1e-5, atol=1e-7)


def test_a_divergence_that_is_streamed():
    """In blocks, whose derivative is in reverse mode and is differentiated again."""

    def slopes(penalty, on):
        term = pj.Term(penalty, on=on, weight=0.5)
        objective = pj.Objective(cross_entropy, {"kl": term})

        def with_logits(params, batch):
            logits = {"logits": batch["x"] @ params["kernel"], "others": batch["x"] @ REFERENCE}
            return (
                forward(params, batch)
                | logits
                | {f"log_{name}": jax.nn.log_softmax(x) for name, x in logits.items()}
            )

        optimizer = OPTIMIZERS["sgd"]
        state = optimizer.init(START)

        @quick_jit
        def run(params):
            return pj.hypergradient_step(
                objective, with_logits, optimizer, params, state, TRAIN, VALIDATION, learning_rate=1
            )[1]

        return run(START)["kl/hypergradient"]

    streamed = slopes(pj.KLDivergence(inputs="logits", block_size=5), ("logits", "others"))
    plain = slopes(pj.KLDivergence(), ("log_logits", "log_others"))
    assert_close(streamed, np.asarray(plain), rtol=1e-4)


def test_what_a_step_costs():
    """In operations, beside an update alone, with which it shares a gradient."""
    params = [jnp.asarray(lattice(seed, 64, 64)) / 64 for seed in range(3)]
    batches = [jnp.asarray(lattice(seed, 128, 64)) for seed in (3, 4)]
    objective = pj.Objective(
        lambda outputs: jnp.mean(jnp.square(outputs["y"])),
        {"l1": pj.Term(pj.L1(reduction="mean"), on="hidden", weight=0.1)},
    )

    def mlp(params, x):
        *inner, last = params
        for kernel in inner:
            x = jnp.tanh(x @ kernel)
        return {"hidden": x, "y": x @ last}

    for optimizer in (optax.sgd(0.1), optax.adam(0.1)):

        def update(objective, params, state, optimizer=optimizer):
            slopes = jax.grad(lambda params: objective(mlp(params, batches[0]))[0])(params)
            return optimizer.update(slopes, state, params)

        def both(objective, params, state, optimizer=optimizer, update=update):
            moved, _ = pj.hypergradient_step(
                objective, mlp, optimizer, params, state, *batches, learning_rate=1.0
            )
            return moved, update(objective, params, state)

        arguments = objective, params, optimizer.init(params)
        alone, with_it = (
            jax.jit(run).lower(*arguments).compile().cost_analysis()["flops"]
            for run in (update, both)
        )
        assert with_it < 2.5 * alone


# A sweep.


def regression(seed, n, features=30):
    """Noisy observations of a linear function of four of the features."""
    random = np.random.default_rng(seed)
    truth = np.zeros(features)
    truth[:4] = 2.0, -1.5, 1.0, 1.0
    x = random.normal(size=(n, features))
    return {"x": x, "y": x @ truth + random.normal(size=n)}


def squares(outputs):
    return jnp.mean(jnp.square(outputs["error"]))


def solution(batch, validation, ridge, lasso):
    """The validation loss at scikit-learn's minimum of the objective."""
    alpha = ridge + lasso / 2
    net = linear_model.ElasticNet(
        alpha=alpha, l1_ratio=lasso / 2 / alpha, fit_intercept=False, max_iter=100_000, tol=1e-6
    ).fit(batch["x"], batch["y"])
    return np.mean((net.predict(validation["x"]) - validation["y"]) ** 2)


@pytest.mark.parametrize("optimizer", [optax.sgd(0.02), optax.adam(0.02)], ids=["sgd", "adam"])
def test_the_best_of_a_sweep_is_found(optimizer):
    """From weights far off, of two penalties at once, in one run each."""
    batch, validation = regression(0, 40), regression(1, 200)
    train, held_out = jax.tree.map(jnp.float32, (batch, validation))
    starts = [(1e-3, 1e-3), (1.0, 1.0), (3.0, 1e-3)]

    def linear(w, batch):
        return {"w": w, "error": batch["x"] @ w - batch["y"]}

    def step(carry, _):
        objective, w, state = carry
        objective, metrics = pj.hypergradient_step(
            objective, linear, optimizer, w, state, train, held_out, learning_rate=10.0
        )
        slopes = jax.grad(lambda w: objective(linear(w, train))[0])(w)
        updates, state = optimizer.update(slopes, state, w)
        return (objective, optax.apply_updates(w, updates), state), metrics["loss"]

    @jax.jit
    @jax.vmap
    def learn(objective):
        w = jnp.zeros(30)
        (objective, *_), _ = jax.lax.scan(step, (objective, w, optimizer.init(w)), length=3000)
        return [objective.terms[name].weight for name in ("ridge", "lasso")]

    found = learn(
        pj.stack(
            [
                pj.Objective(
                    squares,
                    {
                        "ridge": pj.Term(pj.L2(), on="w", weight=ridge),
                        "lasso": pj.Term(pj.L1(), on="w", weight=lasso),
                    },
                )
                for ridge, lasso in starts
            ]
        )
    )
    sizes = np.logspace(-3.5, 1, 10)
    best = min(solution(batch, validation, ridge, lasso) for ridge in sizes for lasso in sizes)
    for start, weights in zip(starts, np.transpose(found), strict=True):
        assert solution(batch, validation, *start) > 1.4 * best
        assert solution(batch, validation, *weights) < 1.1 * best


def test_bad_input_of_a_hypergradient():
    optimizer = OPTIMIZERS["sgd"]
    state = optimizer.init(START)
    for objective in (pj.L1(), pj.Term(pj.L1(), on="x"), None):
        with pytest.raises(TypeError, match=r"takes a pj\.Objective, got"):
            step_of(objective, optimizer, START, state)
    for rate, error in (
        (-1.0, ValueError),
        (math.nan, ValueError),
        ("1", TypeError),
        (len, TypeError),
    ):
        with pytest.raises(error, match="learning_rate"):
            step_of(objective_of(WEIGHTS), optimizer, START, state, learning_rate=rate)
    with pytest.raises(TypeError, match="pass step="):
        step_of(objective_of(WEIGHTS), optimizer, START, state, step=None)
    with pytest.raises(ValueError, match=r"the validation loss must be a scalar, got \(9, 3\)"):
        step_of(objective_of(WEIGHTS), optimizer, START, state, validation=lambda x: x["logprobs"])
    with pytest.raises(ValueError, match=r"the weight of term 'ridge' must be a scalar"):
        step_of(objective_of(WEIGHTS | {"ridge": jnp.ones(2)}), optimizer, START, state)
