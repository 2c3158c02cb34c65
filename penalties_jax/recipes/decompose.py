"""Decompose a small network's parameters, and see which importance penalty does it better.

The matrices of a trained network become sums of rank-one components, of which few should be needed
at each position (`recipes/decomposition.py`). That is asked for by an L_p penalty, whose p is
annealed from 2 to 0.4, and by smooth L0, whose gamma is annealed from 1 to 0.1. The losses have
different scales, so what is compared are the frontiers of sparsity against faithfulness that a
sweep of coefficients gives, with several seeds. All members train in one compiled program, on the
same batches.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

import penalties_jax as pj
from penalties_jax.recipes import plots
from penalties_jax.recipes.decomposition import Scores, Sites, losses, recovery, score, start
from penalties_jax.recipes.pretraining import Pretraining, pretrained_model
from penalties_jax.recipes.report import Section, format_table, write_report
from penalties_jax.recipes.runs import (
    UsageError,
    append_log,
    check_model,
    check_numbers,
    open_run,
    read_log,
    write_file,
)
from penalties_jax.recipes.targets import Target, TextModel, ToyModel, train_toy_model
from penalties_jax.recipes.text import Corpus, check_length, help_topics, read_text
from penalties_jax.recipes.training import Metrics, Step, train_run

PRODUCTS = ("frontier.png", "adversarial.png", "curves.png", "report.html")
LP, SMOOTH_L0 = "lp", "smooth_l0"
PENALTIES = (LP, SMOOTH_L0)
TITLES = {LP: "L_p", SMOOTH_L0: "smooth L0"}
PROBABILITY = 0.05


@dataclasses.dataclass(frozen=True)
class DecomposeConfig:
    """Decompose a small network's parameters under two importance penalties, and compare them.

    Options that are not given take the target's usual value, which `--full` raises.
    """

    out: Path = Path("runs/decompose")
    """The folder that the run writes to."""

    resume: bool = False
    """Continue the run in that folder, made with the same options, from its last checkpoint."""

    seed: int = 0
    """The seed of the network and of the batches; members count up from it."""

    target: Literal["lm", "tms"] = "lm"
    """The feed-forward matrices of a byte-level transformer, or a toy model of superposition."""

    full: bool = False
    """Five coefficients and three seeds for each penalty, and more steps."""

    text: Path | None = None
    """A UTF-8 file for the transformer; by default Python's own help topics."""

    lp_coefficients: tuple[float, ...] | None = None
    """The coefficients of the L_p penalty."""

    smooth_l0_coefficients: tuple[float, ...] | None = None
    """The coefficients of the smooth L0 penalty."""

    p_final: float = 0.4
    """The p of L_p at the end of its anneal from 2."""

    gamma_final: float = 0.1
    """The gamma of smooth L0 at the end of its anneal from 1."""

    seeds: int | None = None
    """The number of decompositions at each coefficient."""

    beta: float = 0.5
    """The weight of the frequency term, relative to the first term of either penalty."""

    faithfulness_weight: float | None = None
    """The weight of the faithfulness loss."""

    components: int | None = None
    """The number of components of each matrix."""

    steps: int | None = None
    """Optimiser steps of the decomposition."""

    batch_size: int | None = None
    """Sequences, or inputs of the toy model, in a batch: of all devices together."""

    learning_rate: float | None = None
    """Adam's learning rate at the first step; it falls to 0 along a cosine."""

    threshold: float = 0.1
    """The importance above which a component counts as in use."""

    features: int = 5
    """The number of features of the toy model."""

    hidden: int = 2
    """The number of its hidden units."""

    pretrain_steps: int = 600
    """Optimiser steps of the transformer before it is decomposed."""

    width: int = 64
    """The size of the transformer's residual stream, a multiple of the number of heads."""

    layers: int = 2
    """The number of transformer blocks."""

    heads: int = 4
    """The number of attention heads in each block."""

    context: int = 64
    """The length of a sequence, in bytes."""

    log_every: int = 20
    """Steps between two lines of the log, and two checkpoints."""


class Size(NamedTuple):
    """How much work a run is; what the config leaves open is filled in by `size_of`."""

    lp_coefficients: tuple[float, ...]
    smooth_l0_coefficients: tuple[float, ...]
    seeds: int
    components: int
    steps: int
    batch_size: int
    learning_rate: float
    faithfulness_weight: float


LM = Size(
    lp_coefficients=(3e-4, 1e-3, 3e-3),
    smooth_l0_coefficients=(3e-4, 1e-3, 3e-3),
    seeds=1,
    components=64,
    steps=500,
    batch_size=4,
    learning_rate=1e-3,
    faithfulness_weight=30.0,
)
# What a toy model's components miss is a component too: a heavy faithfulness freezes them.
TMS = Size(
    lp_coefficients=(3e-4, 5e-4, 8e-4),
    smooth_l0_coefficients=(3e-4, 5e-4, 8e-4),
    seeds=1,
    components=20,
    steps=2000,
    batch_size=512,
    learning_rate=3e-3,
    faithfulness_weight=0.1,
)
FIVE = {
    "lm": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
    "tms": (1e-4, 2e-4, 4e-4, 8e-4, 1.6e-3),
}


def size_of(config: DecomposeConfig) -> Size:
    """Return the usual size of a run, but for what the config asks for."""
    size = {"lm": LM, "tms": TMS}[config.target]
    if config.full:
        five = FIVE[config.target]
        size = size._replace(lp_coefficients=five, smooth_l0_coefficients=five, seeds=3)
    given = {name: getattr(config, name) for name in Size._fields}
    return size._replace(**{name: value for name, value in given.items() if value is not None})


class Member(NamedTuple):
    """One decomposition of a sweep."""

    penalty: str
    coefficient: float
    seed: int


class State(NamedTuple):
    """What training changes; leaves have the members as their first axis.

    Attributes:
        sites: The components and their importance networks.
        optimizer: The state of their optimiser.
    """

    sites: Sites
    optimizer: optax.OptState


class Shared(NamedTuple):
    """What training reads.

    Attributes:
        target: The network.
        penalties: Of each name the weighted penalties of its members, stacked.
        keys: The random keys of the members.
        key: The random key of the batches.
    """

    target: Target
    penalties: dict[str, Any]
    keys: Array
    key: Array


class Result(NamedTuple):
    """How one decomposition did on inputs it was not trained on.

    Attributes:
        penalty: "lp" or "smooth_l0".
        coefficient: What the penalty was multiplied with.
        seed: The seed of its initial components and masks.
        l0: CI-L0, the mean number of components in use at a position, averaged over matrices.
        distance: The distance of the output with components scaled by their importance.
        adversarial: The same under 20 steps of adversarial masks.
        faithfulness: The mean squared error of the summed components.
        recovery: Of the toy model, the mean maximal cosine similarity with its features.
    """

    penalty: str
    coefficient: float
    seed: int
    l0: float
    distance: float
    adversarial: float
    faithfulness: float
    recovery: float | None


def decompose(config: DecomposeConfig) -> list[Result]:
    """Run the job: train or load the network, decompose it, evaluate, write everything.

    Raises:
        UsageError: If an option, the text or the folder can't be used. Nothing is written then.
    """
    size = size_of(config)
    config = dataclasses.replace(config, **size._asdict())
    check(config)
    text = read_text(config.text) if config.text else help_topics()
    if config.target == "lm":
        check_length(text, batch_size=size.batch_size, context=config.context)
    settings = open_run(config, PRODUCTS, text=text.describe())
    target = make_target(config, text)
    state, shared = train_sweep(config, target)
    results = evaluate(config, state.sites, shared)
    _write_results(config, settings, results)
    return results


def check(config: DecomposeConfig) -> None:
    """Refuse options that can't be run.

    Raises:
        UsageError: If a number is out of range, or there is no coefficient.
    """
    check_numbers(
        config,
        positive=[
            "lp_coefficients", "smooth_l0_coefficients", "p_final", "gamma_final", "seeds",
            "faithfulness_weight", "components", "steps", "batch_size", "learning_rate",
            "features", "hidden", "pretrain_steps", "width", "layers", "heads", "context",
            "log_every",
        ],
        nonnegative=["seed", "beta", "threshold"],
    )  # fmt: skip
    if config.threshold >= 1:
        raise UsageError(f"--threshold must be below 1, got {config.threshold:g}")
    check_model(config)
    size = size_of(config)
    for name, coefficients in (
        (LP, size.lp_coefficients),
        (SMOOTH_L0, size.smooth_l0_coefficients),
    ):
        if not coefficients or len(set(coefficients)) < len(coefficients):
            option = name.replace("_", "-")
            raise UsageError(f"--{option}-coefficients needs at least one, all different")


def make_target(config: DecomposeConfig, text: Corpus) -> Target:
    """Train or load the network to decompose."""
    if config.target == "tms":
        return train_toy_model(
            features=config.features,
            hidden=config.hidden,
            probability=PROBABILITY,
            seed=config.seed,
        )
    pretraining = Pretraining(
        seed=config.seed,
        width=config.width,
        layers=config.layers,
        heads=config.heads,
        context=config.context,
        steps=config.pretrain_steps,
        batch_size=8,
        learning_rate=3e-3,
    )
    model = pretrained_model(pretraining, text, config.out / "pretrained")
    graph, parameters = nnx.split(model)
    train, held_out = jnp.asarray(text.train), jnp.asarray(text.held_out)
    return TextModel(parameters, train, held_out, graph, config.context)


def members(config: DecomposeConfig) -> list[Member]:
    """Return the members of the sweep, penalty after penalty."""
    size = size_of(config)
    return [
        Member(name, coefficient, config.seed + i)
        for name, coefficients in (
            (LP, size.lp_coefficients),
            (SMOOTH_L0, size.smooth_l0_coefficients),
        )
        for coefficient in coefficients
        for i in range(size.seeds)
    ]


def penalties(config: DecomposeConfig) -> dict[str, pj.ImportanceMinimality]:
    """Return the two penalties, without a coefficient, annealed over the steps."""
    steps = size_of(config).steps
    per_value = {
        LP: pj.Lp(p=pj.anneal_fraction(2.0, config.p_final, total_steps=steps)),
        SMOOTH_L0: pj.SmoothL0(
            gamma=pj.anneal_fraction(1.0, config.gamma_final, total_steps=steps)
        ),
    }
    return {
        name: pj.ImportanceMinimality(penalty, beta=config.beta)
        for name, penalty in per_value.items()
    }


def train_sweep(config: DecomposeConfig, target: Target) -> tuple[State, Shared]:
    """Train all members; return their last state, and what they shared."""
    size = size_of(config)
    everyone = members(config)
    plain = penalties(config)
    placement = NamedSharding(
        jax.make_mesh((jax.device_count(),), ("batch",), axis_types=(AxisType.Auto,)), P()
    )
    shared = Shared(
        target=target,
        penalties={
            name: pj.stack(
                [member.coefficient * plain[name] for member in everyone if member.penalty == name]
            )
            for name in PENALTIES
        },
        keys=jnp.stack([jax.random.key(member.seed) for member in everyone]),
        key=jax.random.key(config.seed),
    )
    optimizer = optax.adam(optax.cosine_decay_schedule(size.learning_rate, size.steps))

    @jax.jit
    def begin(shared: Shared) -> State:
        def one(key: Array) -> State:
            sites = start(key, shared.target, size.components)
            return State(sites, optimizer.init(sites))

        return jax.vmap(one)(shared.keys)

    def records(metrics: Metrics) -> list[dict[str, Any]]:
        return [
            {"member": f"{TITLES[member.penalty]} {member.coefficient:g}"}
            | member._asdict()
            | {name: float(values[i]) for name, values in metrics.items()}
            for i, member in enumerate(everyone)
        ]

    shared = jax.device_put(shared, placement)
    state = train_run(
        make_step(config, optimizer),
        begin(shared),
        shared,
        folder=config.out,
        steps=size.steps,
        every=config.log_every,
        title="decompose",
        records=records,
        placement=placement,
    )
    return state, shared


def make_step(config: DecomposeConfig, optimizer: optax.GradientTransformation) -> Step:
    """Return `step(state, shared, index) -> (state, metrics)`, one step of every member.

    The batch is that of all devices, sharded over them if their number divides it. Each metric has
    one value for each member.
    """
    size = size_of(config)
    counts = [sum(member.penalty == name for member in members(config)) for name in PENALTIES]
    starts = np.cumsum(counts)[:-1]
    # Both penalties' sparsities, at the end of their anneals, read every member on one axis.
    final = {name: penalty.at(size.steps).penalty for name, penalty in penalties(config).items()}

    def by_penalty(tree: Any) -> dict[str, Any]:
        parts = [
            jax.tree.map(lambda x, i=i: jnp.split(x, starts)[i], tree)
            for i in range(len(PENALTIES))
        ]
        return dict(zip(PENALTIES, parts, strict=True))

    def step(state: State, shared: Shared, index: Array) -> tuple[State, Metrics]:
        inputs = _over_devices(
            shared.target.sample(jax.random.fold_in(shared.key, index), size.batch_size)
        )
        keys = jax.vmap(lambda key: jax.random.fold_in(key, index))(shared.keys)

        def total(sites: Sites) -> Any:
            """A sum over members, whose gradient is that of each."""
            parts = jax.vmap(losses, (0, None, 0, None))(keys, shared.target, sites, inputs)
            importances = by_penalty(parts.importances)
            minimality = jnp.concatenate(
                [
                    jax.vmap(lambda penalty, c: penalty.at(index)(c))(
                        shared.penalties[name], importances[name]
                    )
                    for name in PENALTIES
                ]
            )
            weighted = size.faithfulness_weight * parts.faithfulness + parts.reconstruction
            return jnp.sum(weighted + minimality), parts

        gradient, parts = jax.grad(total, has_aux=True)(state.sites)
        updates, optimizer_state = jax.vmap(optimizer.update)(
            gradient, state.optimizer, state.sites
        )
        logged = jax.vmap(
            lambda c: pj.importance_metrics(
                c, final, beta=config.beta, thresholds=(config.threshold,)
            )
        )(parts.importances)
        metrics = {"loss": parts.reconstruction, "faithfulness": parts.faithfulness, **logged}
        sites = jax.tree.map(jnp.add, state.sites, updates)
        return State(sites, optimizer_state), metrics

    return step


def _over_devices(batch: Array) -> Array:
    if batch.shape[0] % jax.device_count():
        return batch
    mesh = jax.make_mesh((jax.device_count(),), ("batch",), axis_types=(AxisType.Auto,))
    return jax.lax.with_sharding_constraint(batch, NamedSharding(mesh, P("batch")))


def evaluate(config: DecomposeConfig, sites: Sites, shared: Shared) -> list[Result]:
    """Judge every member on a batch of inputs that nothing was trained on.

    Raises:
        UsageError: If none of them has a finite score.
    """
    key = jax.random.fold_in(shared.key, 2**31)
    count = 16 * size_of(config).batch_size

    @jax.jit
    def judged(sites: Sites, shared: Shared) -> tuple[Scores, Any]:
        inputs = shared.target.unseen.sample(key, count)

        def one(member: tuple[Array, Sites]) -> tuple[Scores, Any]:
            key, sites = member
            scores = score(key, shared.target, sites, inputs, threshold=config.threshold)
            found = recovery(shared.target, sites) if isinstance(shared.target, ToyModel) else None
            return scores, found

        # One after another: side by side, the adversaries' activations take gigabytes.
        return jax.lax.map(one, (shared.keys, sites))

    scores, found = judged(sites, shared)
    if not np.isfinite(scores.distance).any():
        raise UsageError("every decomposition has diverged: lower --learning-rate")
    return [
        Result(
            penalty=member.penalty,
            coefficient=member.coefficient,
            seed=member.seed,
            l0=float(scores.l0[i]),
            distance=float(scores.distance[i]),
            adversarial=float(scores.adversarial[i]),
            faithfulness=float(scores.faithfulness[i]),
            recovery=None if found is None else float(found[i]),
        )
        for i, member in enumerate(members(config))
    ]


def frontier(
    results: Sequence[Result], penalty: str, metric: str
) -> list[list[tuple[float, float]]]:
    """Return (CI-L0, metric) of a penalty's members: a list for each coefficient, over seeds.

    Members that have diverged are left out.
    """
    own = [
        result
        for result in results
        if result.penalty == penalty and np.isfinite((result.l0, getattr(result, metric))).all()
    ]
    return [
        [
            (result.l0, getattr(result, metric))
            for result in own
            if result.coefficient == coefficient
        ]
        for coefficient in sorted({result.coefficient for result in own})
    ]


def matched(results: Sequence[Result], metric: str, count: int = 5) -> list[tuple[float, ...]]:
    """Return rows of (CI-L0, metric under L_p, under smooth L0) where both frontiers reach.

    Means over seeds, between which log(metric) is interpolated linearly in CI-L0.
    """
    curves = []
    for name in PENALTIES:
        means = sorted(tuple(np.mean(points, axis=0)) for points in frontier(results, name, metric))
        curves.append(np.array([mean for mean in means if mean[1] > 0]).T)
    if not all(curve.size for curve in curves):
        return []
    low, high = max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves)
    if not low < high:
        return []
    grid = np.linspace(low, high, count)
    columns = [np.exp(np.interp(grid, x, np.log(y))) for x, y in curves]
    return [tuple(map(float, row)) for row in zip(grid, *columns, strict=True)]


def _write_results(
    config: DecomposeConfig, settings: Mapping[str, Any], results: list[Result]
) -> None:
    """Log the evaluation, and write the plots, the report and the table on the terminal."""
    records = read_log(config.out)
    append_log(
        config.out,
        [{"kind": "evaluation", "step": config.steps} | result._asdict() for result in results],
    )
    unit = "KL, nats per byte" if config.target == "lm" else "mean squared error"
    images = {
        f"{name}.png": plots.pareto(
            {TITLES[penalty]: frontier(results, penalty, metric) for penalty in PENALTIES},
            axes=(f"CI-L0 (importance above {config.threshold:g}), per matrix", f"{label}: {unit}"),
        )
        for name, metric, label in (
            ("frontier", "distance", "importance-masked model"),
            ("adversarial", "adversarial", "adversarial masks"),
        )
    }
    images["curves.png"] = plots.curves(
        [record for record in records if record["seed"] == config.seed],
        panels={
            "loss": f"stochastic reconstruction: {unit}",
            f"importance/ci_l0_{config.threshold:g}": "CI-L0, all matrices together",
            "importance/smooth_l0_no_beta": f"smooth L0, gamma {config.gamma_final:g}",
            "importance/lp_no_beta": f"L_p, p = {config.p_final:g}",
        },
        by="member",
        legend="penalty, coefficient",
    )
    for name, image in images.items():
        write_file(config.out / name, image)
    headers = ("penalty", "coefficient", "seed", "CI-L0", "masked", "adversarial", "faithfulness")
    rows = [
        [TITLES[result.penalty], f"{result.coefficient:g}", f"{result.seed}"]
        + [f"{value:.4g}" for value in result[3:7]]
        for result in results
    ]
    if config.target == "tms":
        headers = (*headers, "recovery")
        rows = [[*row, f"{result.recovery:.3f}"] for row, result in zip(rows, results, strict=True)]
    compared = [[f"{value:.4g}" for value in row] for row in matched(results, "distance")]
    write_report(
        config.out / "report.html",
        title="L_p against smooth L0",
        sections=[
            Section("Result", RESULT_TEXT.format(unit=unit), table=(headers, rows)),
            Section("Frontiers", FRONTIER_TEXT, image=images["frontier.png"]),
            Section(
                "At matched CI-L0",
                MATCHED_TEXT if compared else "The frontiers share no range of CI-L0.",
                table=(("CI-L0", *TITLES.values()), compared),
            ),
            Section("Adversarial masks", ADVERSARIAL_TEXT, image=images["adversarial.png"]),
            Section("Curves", CURVES_TEXT, image=images["curves.png"]),
            Section(
                "Settings",
                "Everything that decides these numbers; the same as in config.yaml.",
                table=(("option", "value"), [[name, str(v)] for name, v in settings.items()]),
            ),
        ],
    )
    print(format_table(headers, rows))
    print(f"masked and adversarial in {unit}; report: {config.out / 'report.html'}")


RESULT_TEXT = (
    "On inputs that were not trained on. CI-L0 is the mean number of components in use at a "
    "position, averaged over the matrices; masked is the {unit} from the clean output with every "
    "component scaled by its importance, adversarial the same after 20 steps of gradient ascent on "
    "the masks; faithfulness is the mean squared error of the summed components."
)
FRONTIER_TEXT = (
    "Lower and further left is better. Small points are single seeds, crosses the mean and the "
    "range over seeds at a coefficient, lines the Pareto fronts. Coefficients of the two penalties "
    "have different scales: only the fronts can be compared."
)
MATCHED_TEXT = "Means over seeds, interpolated between coefficients where both penalties reach."
ADVERSARIAL_TEXT = "The same under the masks that hurt most within what the importances allow."
CURVES_TEXT = (
    "The first seed, means over the steps between two lines of the log. The last two panels show "
    "both penalties' sparsity of every member, at the end of their anneals, whatever it trains on."
)
