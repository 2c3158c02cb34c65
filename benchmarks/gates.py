"""Which weight of the sparsity loss brings gates to their target, on three quite different jobs.

- "regression": the sum of four normal numbers, as in the guide on skipping; a gate skips rows.
- "digits": scikit-learn's 8 x 8 digits in 16 patches; a gate skips patches.
- "language": the byte-level model of `penalties-jax sparsify`, whose gates start open and have no
  noise; two layers skip positions.

Every job is trained towards each target, with each weight, from each seed in one compiled program.
Then the gates are evaluated without noise on what nothing was trained on.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float
from sklearn.datasets import load_digits
from tqdm import tqdm

import penalties_jax as pj
from benchmarks.harness import BAR as BAR_COLOUR
from benchmarks.harness import OURS, figure, save, table, verdict, write_json
from penalties_jax.functional.sparsity import DEFAULT_WEIGHT, Kind
from penalties_jax.recipes import text
from penalties_jax.recipes.language_model import mean_loss
from penalties_jax.recipes.sparsify.model import SparseLanguageModel

TARGETS = (0.2, 0.5, 0.7)
BAR = 0.05
CONTEXT = 64
LAST = 50


class Rows(nnx.Module):
    """A regression on rows of four numbers that computes the rows which its gate leaves open."""

    def __init__(self, kind: Kind, *, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(4, 16, rngs=rngs)
        self.gate = pj.nnx.SparsityGate(16, kind=kind, rngs=rngs)
        self.out = nnx.Linear(16, 1, rngs=rngs)

    def __call__(self, x: Array) -> tuple[Array, Array]:
        """The prediction of each row, and the mask."""
        x = nnx.relu(self.hidden(x))
        mask = self.gate(x)
        return self.out(x * mask[..., None])[..., 0], mask


class Patches(nnx.Module):
    """A classifier of images in 16 patches that computes those which its gate leaves open."""

    def __init__(self, kind: Kind, *, rngs: nnx.Rngs):
        self.pixels = nnx.Linear(4, 32, rngs=rngs)
        self.positions = nnx.Embed(16, 32, rngs=rngs)
        self.gate = pj.nnx.SparsityGate(32, kind=kind, rngs=rngs)
        self.hidden = nnx.Linear(32, 32, rngs=rngs)
        self.out = nnx.Linear(16 * 32, 10, rngs=rngs)

    def __call__(self, x: Array) -> tuple[Array, Array]:
        """The logits of each image, and the mask."""
        x = nnx.relu(self.pixels(x) + self.positions(jnp.arange(16)))
        mask = self.gate(x)
        x = nnx.relu(self.hidden(x)) * mask[..., None]
        return self.out(x.reshape(len(x), -1)), mask


class Bytes(nnx.Module):
    """The language model; the mask is the shares of its layers that are computed."""

    def __init__(self, kind: Kind, *, rngs: nnx.Rngs):
        self.model = SparseLanguageModel(width=32, layers=2, heads=4, context=CONTEXT, rngs=rngs)
        for layer in self.model.layers():
            layer.sparsity = pj.SparsityTarget(0.5, kind)
        self.eval()

    def __call__(self, text: Array) -> tuple[Array, Array]:
        """The logits of each byte, and the mask."""
        logits = self.model(text)
        rates = [layer.rate[...] for layer in self.model.layers()]
        return logits, 1 - jnp.stack(rates)


class Job(NamedTuple):
    """What is learnt: a model of a kind of loss, batches by key, what is held out, the loss."""

    model: Callable[..., Any]
    batch: Callable[[Array], tuple[Array, Array]]
    held_out: tuple[Array, Array]
    loss: Callable[[Array, Array], Array]
    seeds: int


class Runs(NamedTuple):
    """What was measured of runs, of shape [weights, targets, seeds]."""

    rate: Float[np.ndarray, "..."]
    training_rate: Float[np.ndarray, "..."]
    loss: Float[np.ndarray, "..."]

    @property
    def miss(self) -> Float[np.ndarray, " weights"]:
        """How far the rate in evaluation is from a target, at most."""
        return np.max(np.abs(self.rate - np.array(TARGETS)[:, None]), (1, 2))


def run(*, quick: bool, out: Path) -> str:
    """Trains every job; writes gates.json and gates-benchmark.png; returns the tables."""
    names = ("regression",) if quick else tuple(JOBS)
    studies = [(name, *study) for name in names for study in (QUICK if quick else STUDIES)[name]]
    results = {}
    for name, kind, rate, steps, weights in tqdm(studies, desc="gates", unit="study", leave=False):
        runs = train(JOBS[name](), kind, rate, steps, weights)
        results[name, kind, rate, steps, weights] = runs
    rows = [_row(study, runs, i) for study, runs in results.items() for i in range(len(study[-1]))]
    write_json(
        out / "gates.json",
        {"targets": TARGETS, "runs": [[*study, runs._asdict()] for study, runs in results.items()]},
    )
    _draw(results, out / "gates-benchmark.png")
    return f"rates in evaluation (in training), and losses held out\n\n{table(rows)}"


def train(
    job: Job, kind: Kind, learning_rate: float, steps: int, weights: tuple[float, ...]
) -> Runs:
    """Trains a model for every weight, target and seed, by Adam; its rate falls along a cosine."""
    optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, steps))

    def one(weight: Array, target: Array, seed: Array) -> tuple[Array, Array, Array]:
        key = jax.random.key(seed)
        model = job.model(kind, rngs=nnx.Rngs(key))
        graph, start, rest = nnx.split(model, nnx.Param, ...)

        def step(carry: Any, index: Array) -> Any:
            parameters, moments, rest = carry
            inputs, wanted = job.batch(jax.random.fold_in(key, index))

            def total(parameters: Any) -> Any:
                model = nnx.merge(graph, parameters, rest, copy=True)
                _aim(model, target, weight)
                outputs, mask = model(inputs)
                value = job.loss(outputs, wanted) + _sparsity(model)
                return value, (pj.sparsity_rate(mask), nnx.state(model, nnx.Not(nnx.Param)))

            gradient, (rate, rest) = jax.grad(total, has_aux=True)(parameters)
            updates, moments = optimizer.update(gradient, moments)
            return (optax.apply_updates(parameters, updates), moments, rest), rate

        carry = start, optimizer.init(start), rest
        (parameters, _, rest), rates = jax.lax.scan(step, carry, jnp.arange(steps))
        model = nnx.merge(graph, parameters, rest, copy=True)
        model.eval()
        inputs, wanted = job.held_out
        outputs, mask = model(inputs)
        return pj.sparsity_rate(mask), jnp.mean(rates[-LAST:]), job.loss(outputs, wanted)

    grid = jnp.meshgrid(
        jnp.array(weights), jnp.array(TARGETS), jnp.arange(job.seeds), indexing="ij"
    )
    measured = jax.jit(jax.vmap(one))(*(axis.ravel() for axis in grid))
    return Runs(*(np.asarray(x).reshape(grid[0].shape) for x in measured))


def _aim(model: Any, target: Array, weight: Array) -> None:
    if isinstance(model, Bytes):
        for layer in model.model.layers():
            layer.target_sparsity, layer.sparsity_loss_weight = target, weight
    else:
        model.gate.target, model.gate.weight = target, weight


def _sparsity(model: Any) -> Array:
    """The weighted sparsity loss of the last call: of layers, the mean."""
    if not isinstance(model, Bytes):
        return pj.nnx.collect_penalties(model)
    losses = [layer.get_balanced_loss(jnp.float32(0))[0] for layer in model.model.layers()]
    return jnp.mean(jnp.stack(losses))


def regression() -> Job:
    """Rows of four normal numbers, and half their sum, whose variance is 1."""

    def rows(key: Array, count: int = 256) -> tuple[Array, Array]:
        x = jax.random.normal(key, (count, 4))
        return x, jnp.sum(x, -1) / 2

    return Job(Rows, rows, rows(jax.random.key(1_000), 4_096), _squared, seeds=3)


def digits() -> Job:
    """Patches of 2 x 2 pixels; a fifth of the images is held out."""
    found: Any = load_digits()
    order = np.random.default_rng(0).permutation(len(found.target))
    pixels = (found.data / 16).astype(np.float32).reshape(-1, 4, 2, 4, 2)
    patches = pixels.transpose(0, 1, 3, 2, 4).reshape(-1, 16, 4)[order]
    classes = found.target[order]
    cut = len(order) * 4 // 5
    images, labels = jnp.asarray(patches[:cut]), jnp.asarray(classes[:cut])

    def batch(key: Array) -> tuple[Array, Array]:
        chosen = jax.random.randint(key, (64,), 0, cut)
        return images[chosen], labels[chosen]

    held_out = jnp.asarray(patches[cut:]), jnp.asarray(classes[cut:])
    return Job(Patches, batch, held_out, _cross_entropy, seeds=3)


def language() -> Job:
    """Python's help topics, in windows."""
    corpus = text.help_topics()
    data = jnp.asarray(corpus.train)
    windows = text.spread_windows(corpus.held_out, count=64, length=CONTEXT + 1)

    def batch(key: Array) -> tuple[Array, Array]:
        drawn = text.sample_windows(data, key, batch_size=4, length=CONTEXT + 1)
        return drawn[:, :-1], drawn[:, 1:]

    return Job(Bytes, batch, (windows[:, :-1], windows[:, 1:]), mean_loss, seeds=2)


def _squared(outputs: Array, wanted: Array) -> Array:
    return jnp.mean((outputs - wanted) ** 2)


def _cross_entropy(logits: Array, classes: Array) -> Array:
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, classes))


JOBS = {"regression": regression, "digits": digits, "language": language}
# The kind, the learning rate, the steps and the weights of each program.
ADVICE = (1e-2, 300), (3e-3, 600), (1e-3, 1_000)
STUDIES: dict[str, list[tuple[Kind, float, int, tuple[float, ...]]]] = {
    "regression": [
        *(("huber", *pace, (0.01, 3.0, 10.0, DEFAULT_WEIGHT, 50.0)) for pace in ADVICE),
        ("l1", 1e-2, 300, (0.01, 0.3, 1.0, 3.0)),
        ("l2", 1e-2, 300, (0.01, 1.0, 10.0)),
        ("kl", 1e-2, 300, (0.01, 1.0, 10.0)),
    ],
    "digits": [("huber", 1e-2, 300, (0.01, 10.0, DEFAULT_WEIGHT))],
    "language": [("huber", 3e-3, 300, (0.01, DEFAULT_WEIGHT))],
}
QUICK: dict[str, list[tuple[Kind, float, int, tuple[float, ...]]]] = {
    "regression": [("huber", 1e-2, 300, (0.01, DEFAULT_WEIGHT))]
}


def _row(study: Any, runs: Runs, i: int) -> dict[str, str]:
    name, kind, learning_rate, steps, weights = study
    rates, training, losses = (np.mean(x[i], -1) for x in runs)
    row = {
        "job": name,
        "kind": f"`{kind}`",
        "weight": f"{weights[i]:g}",
        "Adam": f"{learning_rate:g}, {steps:,} steps",
    }
    for target, rate, noisy, loss in zip(TARGETS, rates, training, losses, strict=True):
        row[f"target {target:g}"] = f"{rate:.2f} ({noisy:.2f}), {loss:.3f}"
    miss = runs.miss[i]
    default = kind == "huber" and weights[i] == DEFAULT_WEIGHT
    return row | {
        "farthest": f"{miss:.3f}",
        "bar": f"{BAR:g}: {verdict(met=bool(miss <= BAR))}" if default else "",
    }


def _draw(results: dict[Any, Runs], path: Path) -> None:
    """The rate in evaluation against the target, in the first study of each job."""
    first: dict[str, Any] = {}
    for study in results:
        first.setdefault(study[0], study)
    drawing, axes = figure(len(first), width=3.4 * len(first), height=3.2, sharey=True)
    for ax, study in zip(axes, first.values(), strict=True):
        ax.plot([0, 0.8], [0, 0.8], color="0.8", zorder=0)
        for weight, colour in ((0.01, BAR_COLOUR), (DEFAULT_WEIGHT, OURS)):
            rates = results[study].rate[study[-1].index(weight)]
            lines = ax.plot(TARGETS, rates, "o", color=colour, markersize=4)
            lines[0].set_label(f"weight {weight:g}")
        ax.set(title=study[0], xlabel="target")
        ax.legend(frameon=False, fontsize=8)
    axes[0].set_ylabel("rate in evaluation")
    save(drawing, path)
