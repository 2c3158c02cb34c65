"""The tables of the guide to migrating: both columns are the same on the same arrays."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.special import log_softmax, xlogy

import penalties_jax as pj

GUIDE = Path(__file__).parent.parent / "docs/guides/migrating.md"
SECTION = re.compile(r"^## From (.*?)\n(.*?)(?=^## |\Z)", re.DOTALL | re.MULTILINE)
ROW = re.compile(r"^\| `([^`]+)` \| `([^`]+)` \| .*\|$", re.MULTILINE)
TABLES = {name: ROW.findall(text) for name, text in SECTION.findall(GUIDE.read_text("utf-8"))}
TABLES.pop("penalties written by hand")
ROWS = [(name, *row) for name, rows in TABLES.items() for row in rows]

RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


X, A, B, HIDDEN, PRE = normal(4, 6), normal(4, 6), normal(4, 6), normal(4, 3), normal(4, 6)
LOG_P, LOG_Q = log_softmax(A, axis=-1), log_softmax(B, axis=-1)
ARRAYS = {
    "x": X,
    "a": A,
    "b": B,
    "p": np.exp(LOG_P),
    "q": np.exp(LOG_Q),
    "log_p": LOG_P,
    "log_q": LOG_Q,
    "hidden": HIDDEN,
    "kernel": normal(3, 6),
    "tokens": np.array([0, 5, 2, 2]),
    "pre": PRE,
    "z": np.maximum(PRE, 0),
    "norms": np.abs(normal(6)),
    "dead": np.array([True, False, True, False, False, True]),
}
W, D = 0.3, 0.7
CI = {"site": np.abs(normal(5, 3)), "other": np.abs(normal(2, 5, 4))}
DELTAS = {"first": normal(3, 2), "second": normal(5, 4)}
OBJECTIVE = pj.Objective(
    terms={"l1": pj.Term(pj.L1(), on="x", weight=W), "l2": pj.Term(pj.L2(), on="x", weight=D)}
)


def f(x):
    return jnp.sum(x**3)


def here():
    numbers = {"w": W, "d": D, "ci": CI, "deltas": DELTAS, "objective": OBJECTIVE, "f": f}
    arrays = {name: jnp.asarray(x) for name, x in ARRAYS.items()}
    return {"pj": pj, "jax": jax, "jnp": jnp, "key": jax.random.key(0), **numbers, **arrays}


def of_torch():
    torch = pytest.importorskip("torch")
    torch_tensors = {name: torch.as_tensor(x) for name, x in ARRAYS.items()}
    functions = {"F": torch.nn.functional, "Categorical": torch.distributions.Categorical}
    return {"torch": torch, "w": W, "d": D, **functions, **torch_tensors}


def of_keras():
    return here() | {"keras": pytest.importorskip("keras")}


# What tells the other column: a package that runs here, or else NumPy by the package's source.
PACKAGES = {"optax": lambda: here() | {"optax": optax}, "Keras": of_keras, "torch": of_torch}


def kl(log_p, log_q):
    return np.sum(np.exp(log_p) * (log_p - log_q), -1).mean()


def entropy(p):
    return -np.sum(xlogy(p, p), -1).mean()


def off_diagonal(x):
    rows = x / np.linalg.norm(x, axis=1, keepdims=True)
    return np.sum((rows @ rows.T) ** 2) - len(x)


def terms(per_value):
    sums = {name: per_value(c).reshape(-1, c.shape[-1]).sum(0) for name, c in CI.items()}
    means = {name: sums[name] / c[..., 0].size for name, c in CI.items()}
    frequency = sum(np.sum(means[name] * np.log2(1 + sums[name])) for name in CI)
    return sum(map(np.sum, means.values())), frequency


def slope_norm(at):
    return np.linalg.norm(3 * at**2)


def generalised_js(a, b, beta):
    student, teacher = (log_softmax(x, axis=-1) for x in (a, b))
    mixture = np.log((1 - beta) * np.exp(student) + beta * np.exp(teacher))
    return beta * kl(teacher, mixture) + (1 - beta) * kl(student, mixture)


MIXTURE = np.log((np.exp(LOG_P) + np.exp(LOG_Q)) / 2)
CENTERED = np.clip(X - X.mean(), -D, D)
# What the same key draws for one example.
EPSILON = np.asarray(jax.random.uniform(jax.random.key(0), (1, 1, 1)))[0]
ACTIVE = (PRE > D).sum(-1)
STEPS = np.arange(0, 100, 7)
TOTAL = W * np.abs(X).sum() + D * np.sum(X**2)
Z, NORMS, DEAD = (ARRAYS[name] for name in ("z", "norms", "dead"))
EXPECTED = {
    "generalized_jsd_loss(a, b, beta=0.3)": generalised_js(A, B, 0.3),
    "generalized_jsd_loss(a, b, beta=0)": kl(LOG_Q, LOG_P),
    "generalized_jsd_loss(a, b, beta=1)": kl(LOG_P, LOG_Q),
    "generalized_jsd_loss(a, b, beta=0.3, temperature": generalised_js(A / 2, B / 2, 0.3),
    "NxPenalties.l1": W * np.abs(X).sum(),
    "NxPenalties.l2": np.sum(CENTERED**2),
    "NxPenalties.elastic_net": 0.3 * np.abs(X).sum() + 0.7 * np.sum(X**2),
    "NxPenalties.kl_divergence": kl(LOG_P, LOG_Q),
    "NxPenalties.js_divergence": (kl(LOG_P, MIXTURE) + kl(LOG_Q, MIXTURE)) / 2,
    "NxPenalties.entropy(log_p, mode: :bonus)": entropy(np.exp(LOG_P)),
    "NxPenalties.entropy(log_p, mode: :penalty)": -entropy(np.exp(LOG_P)),
    "NxPenalties.orthogonality": off_diagonal(X),
    "NxPenalties.consistency": np.mean((A - B) ** 2),
    "NxPenalties.gradient_penalty": (slope_norm(X) - 1) ** 2,
    "NxPenalties.interpolated_gradient_penalty": (slope_norm(EPSILON * A + (1 - EPSILON) * B) - 1)
    ** 2,
    "NxPenalties.output_magnitude_penalty": (np.sqrt(np.mean(X**2)) - D) ** 2,
    "NxPenalties.pipeline": TOTAL,
    "Pipeline.update_weight": TOTAL + (2 - W) * np.abs(X).sum(),
    "Pipeline.set_enabled": D * np.sum(X**2),
    "GradientTracker.total_grad_norm": np.linalg.norm(W * np.sign(X) + 2 * D * X),
    "Polaris.add_l1_decay": W * np.sign(X),
    "Polaris.add_l2_decay": W * X,
    "Polaris.add_elastic_net_decay": W * (0.3 * np.sign(X) + 0.7 * X),
    "importance_minimality_terms": terms(lambda c: (c + 1e-12) ** 0.9),
    "smooth_l0_importance_minimality_terms": terms(lambda c: c**2 / (c**2 + D**2)),
    "fraction_importance_minimality_terms": terms(lambda c: c / (c + D)),
    "mcp_importance_minimality_terms": terms(lambda c: np.where(c < D, c / D * (2 - c / D), 1.0)),
    "arctan_importance_minimality_terms": terms(lambda c: np.arctan(c / D) / (np.pi / 2)),
    "annealed_pnorm": 2.0 - 1.6 * np.clip((STEPS / 100 - 0.2) / 0.6, 0, 1),
    "kl_per_position": kl(LOG_Q, LOG_P),
    "faithfulness_loss": sum(np.sum(x**2) for x in DELTAS.values()) / 26,
    "l1_coefficient": W * np.mean(np.sum(Z * NORMS, -1)),
    "lp_norm=2": W * np.mean(np.linalg.norm(Z * NORMS, axis=-1)),
    "l1_warm_up_steps": W * np.minimum(STEPS / 50, 1),
    'jumprelu_sparsity_loss_mode="step"': W * ACTIVE.mean(),
    'jumprelu_sparsity_loss_mode="quadratic"': np.mean(W * 2 / 3 * (ACTIVE - 3) ** 2),
    'jumprelu_sparsity_loss_mode="tanh"': W * np.mean(np.sum(np.tanh(4 * Z * NORMS), -1)),
    "pre_act_loss_coefficient": W * np.mean(np.sum(np.maximum(D - PRE, 0) * DEAD * NORMS, -1)),
}


def value(result, *, is_schedule):
    """What an entry of a table is: of a schedule, its values; of a transform, its updates."""
    if is_schedule:
        return np.stack([result(int(step)) for step in STEPS])
    if isinstance(result, optax.GradientTransformation):
        return result.update(jnp.zeros_like(X), result.init(X), jnp.asarray(X))[0]
    if isinstance(result, pj.Objective):
        return result({"x": jnp.asarray(X)})[0]
    return result(jnp.asarray(X)) if callable(result) else result


def test_every_table_is_read():
    packages = ["optax", "Keras", "torch", "TRL"]
    assert list(TABLES) == [*packages, "NxPenalties and Tinkex", "param-decomp", "SAELens"]
    lines = re.findall(r"^\| `", GUIDE.read_text("utf-8").split("## From optax")[1], re.MULTILINE)
    assert len(lines) == len(ROWS)
    ours = {theirs for name, theirs, _ in ROWS if name not in PACKAGES}
    assert len(ours) == len(EXPECTED)


@pytest.mark.parametrize(("name", "theirs", "ours"), ROWS, ids=lambda text: text[:40])
def test_both_columns_are_the_same(name, theirs, ours):
    is_schedule = ours.startswith("pj.anneal")
    if name in PACKAGES:
        expected = value(eval(theirs, PACKAGES[name]()), is_schedule=is_schedule)
    else:
        expected = next(x for key, x in EXPECTED.items() if theirs.startswith(key))
    found = value(eval(ours, here()), is_schedule=is_schedule)
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-6)
