"""Teach a small language model to skip a stated share of its work, and see what that costs.

A byte-level transformer with sparse resolvent layers is trained dense. From there it goes on, once
dense and once for each target rate and each of two controllers: a schedule, which raises the target
and the weight of the sparsity loss, and dual ascent, which learns the weight. All of them train in
one compiled program, on the same batches.
"""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, UInt8

import penalties_jax as pj
from penalties_jax.functional.sparsity import Kind
from penalties_jax.recipes import plots
from penalties_jax.recipes.language_model import mean_loss
from penalties_jax.recipes.pretraining import Pretraining, pretrained
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
from penalties_jax.recipes.sparse_language_model import SparseLanguageModel
from penalties_jax.recipes.text import (
    Corpus,
    check_length,
    help_topics,
    read_text,
    sample_windows,
    spread_windows,
    unigram_loss,
)
from penalties_jax.recipes.training import Metrics, Step, adam, train_run

PRODUCTS = ("frontier.png", "curves.png", "skipped.png", "report.html")
LARGEST_GRADIENT = 1.0
GROUPS = DENSE, SCHEDULE, DUAL = "dense", "schedule", "dual ascent"


@dataclasses.dataclass(frozen=True)
class SparsifyConfig:
    """Train a small language model to skip a share of its work, by a schedule and by dual ascent.

    Losses are in nats per byte.
    """

    out: Path = Path("runs/sparsify")
    """The folder that the run writes to."""

    resume: bool = False
    """Continue the run in that folder, made with the same options, from its last checkpoint."""

    seed: int = 0
    """The seed of the initial parameters and of the batches."""

    text: Path | None = None
    """A UTF-8 file to train on; by default Python's own help topics."""

    targets: tuple[float, ...] = (0.2, 0.5, 0.7)
    """The shares of positions to skip."""

    kind: Kind = "adaptive"
    """The sparsity loss of the schedule; dual ascent uses l1, the Lagrangian's own."""

    sparsity_weight: float = 3.0
    """The weight of the sparsity loss at the end of the schedule."""

    warmup_fraction: float = 0.5
    """The part of the steps in which the schedule raises target and weight."""

    dual_step_size: float = 0.02
    """What dual ascent adds to the weight in a step, times how far the rate is off its target."""

    steps: int = 300
    """Optimiser steps towards the targets."""

    batch_size: int = 4
    """Sequences in a batch."""

    learning_rate: float = 2e-3
    """Adam's highest learning rate towards the targets."""

    pretrain_steps: int = 900
    """Optimiser steps of the dense model before."""

    pretrain_learning_rate: float = 3e-3
    """Adam's highest learning rate of the dense model before."""

    width: int = 64
    """The size of the model's residual stream, a multiple of the number of heads."""

    layers: int = 2
    """The number of transformer blocks."""

    heads: int = 4
    """The number of attention heads in each block."""

    context: int = 128
    """The length of a sequence, in bytes."""

    log_every: int = 10
    """Steps between two lines of the log, and two checkpoints."""

    evaluation_windows: int = 128
    """Sequences of the held-out text to evaluate on, at most."""


class State(NamedTuple):
    """What training changes. Leaves have the members as their first axis, group after group.

    Attributes:
        parameters: The parameters of the models.
        optimizer: The states of their optimiser.
        controllers: The states of the controllers of each group.
    """

    parameters: Any
    optimizer: optax.OptState
    controllers: dict[str, Any]


class Shared(NamedTuple):
    """What training reads.

    Attributes:
        rest: What of the model is no parameter.
        dense: Which members skip nothing.
        controllers: The controllers of each group, stacked.
        text: The bytes to learn.
        key: The random key of the batches.
    """

    rest: Any
    dense: Bool[Array, " members"]
    controllers: dict[str, pj.AdaptiveSparsityScheduler | pj.DualAscent]
    text: UInt8[Array, " bytes"]
    key: Array


class Result(NamedTuple):
    """What one member does on held-out text.

    Attributes:
        controller: "dense", "schedule" or "dual ascent".
        target: The share of positions that it was to skip.
        rate: The share that it skips.
        loss: Its loss, in nats per byte.
        excess: Its loss above that of the dense model that was trained for as long.
        spread: The standard deviation, over positions, of the probability that the gate is open.
    """

    controller: str
    target: float
    rate: float
    loss: float
    excess: float
    spread: float


def sparsify(config: SparsifyConfig) -> list[Result]:
    """Run the job: train dense or load, train towards the targets, evaluate, write everything.

    Raises:
        UsageError: If an option, the text or the folder can't be used. Nothing is written then.
    """
    check(config)
    text = read_text(config.text) if config.text else help_topics()
    check_length(text, batch_size=config.batch_size, context=config.context)
    settings = open_run(config, PRODUCTS, text=text.describe())
    parameters, graph, shared = _train(config, text)
    windows = spread_windows(
        text.held_out, count=config.evaluation_windows, length=config.context + 1
    )
    # The picture is of prose: of the window with the most letters.
    shown = int(jnp.argmax(jnp.sum((windows >= ord("a")) & (windows <= ord("z")), axis=1)))
    results, masks = _evaluate(config, parameters, graph, shared, windows, shown)
    _write_results(config, settings, results, masks, windows[shown], text)
    return results


def check(config: SparsifyConfig) -> None:
    """Refuse options that can't be run.

    Raises:
        UsageError: If a number is out of range, or the targets are none, or not distinct.
    """
    check_numbers(
        config,
        positive=[
            "steps", "batch_size", "learning_rate", "pretrain_steps", "pretrain_learning_rate",
            "width", "layers", "heads", "context", "log_every", "evaluation_windows",
            "sparsity_weight", "warmup_fraction", "dual_step_size",
        ],
        nonnegative=["seed", "targets"],
    )  # fmt: skip
    check_model(config)
    if config.kind not in get_args(Kind):
        raise UsageError(f"--kind must be one of {', '.join(get_args(Kind))}, not {config.kind}")
    if not config.targets or len(set(config.targets)) < len(config.targets):
        raise UsageError(f"--targets needs at least one, all different, not {config.targets}")
    if config.width < 2:
        raise UsageError(f"--width must be at least 2, not {config.width}")
    if max(config.targets) > 1 or config.warmup_fraction > 1:
        raise UsageError("--targets and --warmup-fraction must be at most 1")


def controllers(config: SparsifyConfig) -> dict[str, list[Any]]:
    """Return the controllers of each group; the dense model's asks for nothing."""
    return {
        DENSE: [pj.DualAscent(target=0.0)],
        SCHEDULE: [
            pj.AdaptiveSparsityScheduler(
                initial_sparsity=0.0,
                final_sparsity=target,
                initial_weight=config.sparsity_weight / 10,
                final_weight=config.sparsity_weight,
                warmup_steps=max(1, round(config.warmup_fraction * config.steps)),
            )
            for target in config.targets
        ],
        DUAL: [
            pj.DualAscent(target=target, step_size=config.dual_step_size)
            for target in config.targets
        ],
    }


def _members(config: SparsifyConfig) -> list[tuple[str, float]]:
    """The group and the target of each member."""
    return [
        (name, target)
        for name in GROUPS
        for target in ((0.0,) if name == DENSE else config.targets)
    ]


@functools.partial(nnx.jit, static_argnums=0)
def make_model(settings: Pretraining) -> SparseLanguageModel:
    """Return a model with initial parameters, whose gates are without noise."""
    model = SparseLanguageModel(
        width=settings.width,
        layers=settings.layers,
        heads=settings.heads,
        context=settings.context,
        rngs=nnx.Rngs(settings.seed),
    )
    model.eval()
    return model


def make_step(graph: nnx.GraphDef, optimizer: Any, config: SparsifyConfig) -> Step:
    """Return `step(state, shared, index) -> (state, metrics)`, one step of every member.

    The gates are deterministic and straight-through, so the rate of training is that of
    evaluation. All members see the same batch. Each metric has one value for each member.
    """
    kinds: dict[str, Kind] = {DENSE: "l1", SCHEDULE: config.kind, DUAL: "l1"}
    starts = np.cumsum([len(group) for group in controllers(config).values()])[:-1]

    def by_group(values: Array) -> dict[str, Array]:
        return dict(zip(GROUPS, jnp.split(values, starts), strict=True))

    def balanced(kind: Kind, loss: Array, rates: Array, control: pj.SparsityControl) -> Array:
        penalty = pj.SparsityTarget(control.target, kind)(rates)
        return pj.balanced_loss(loss, penalty, sparsity_weight=control.weight)[0]

    def step(state: State, shared: Shared, index: Array) -> tuple[State, Metrics]:
        windows = sample_windows(
            shared.text,
            jax.random.fold_in(shared.key, index),
            batch_size=config.batch_size,
            length=config.context + 1,
        )
        controls = {
            name: jax.vmap(lambda controller, state: controller(state))(
                shared.controllers[name], state.controllers[name]
            )
            for name in GROUPS
        }

        def of_member(parameters: Any, dense: Array) -> tuple[Array, Array]:
            model = nnx.merge(graph, parameters, shared.rest, copy=True)
            loss = mean_loss(model(windows[:, :-1], dense=dense), windows[:, 1:])
            return loss, jnp.stack([layer.rate[...] for layer in model.layers()])

        def total(parameters: Any) -> tuple[Array, tuple[Array, Array]]:
            """A sum over members, whose gradient is that of each."""
            losses, rates = jax.vmap(of_member)(parameters, shared.dense)
            loss, rate = by_group(losses), by_group(rates)
            totals = [
                jax.vmap(functools.partial(balanced, kinds[name]))(
                    loss[name], rate[name], controls[name]
                )
                for name in GROUPS
            ]
            return jnp.sum(jnp.concatenate(totals)), (losses, jnp.mean(rates, 1))

        gradients, (losses, rates) = jax.grad(total, has_aux=True)(state.parameters)
        updates, optimizer_state = jax.vmap(optimizer.update)(
            gradients, state.optimizer, state.parameters
        )
        loss, rate = by_group(losses), by_group(rates)
        controller_states = {
            name: jax.vmap(
                lambda controller, state, rate, loss: controller.update(
                    state, rate=rate, value=loss
                )
            )(shared.controllers[name], state.controllers[name], rate[name], loss[name])
            for name in GROUPS
        }
        control = jax.tree.map(
            lambda *values: jnp.concatenate(values), *(controls[name] for name in GROUPS)
        )
        return (
            State(
                optax.apply_updates(state.parameters, updates), optimizer_state, controller_states
            ),
            {"loss": losses, "rate": rates, **control._asdict()},
        )

    return step


def _train(config: SparsifyConfig, text: Corpus) -> tuple[Any, Any, Shared]:
    pretraining = Pretraining(
        seed=config.seed,
        width=config.width,
        layers=config.layers,
        heads=config.heads,
        context=config.context,
        steps=config.pretrain_steps,
        batch_size=config.batch_size,
        learning_rate=config.pretrain_learning_rate,
    )
    model = pretrained(
        make_model(pretraining),
        lambda model, windows: model(windows, dense=True),
        pretraining,
        text,
        config.out / "pretrained",
    )
    graph, parameters, rest = nnx.split(model, nnx.Param, ...)
    # At a rate of 0, where the gates start, the derivative of "kl" is as large as 1e8.
    optimizer = optax.chain(
        optax.clip_by_global_norm(LARGEST_GRADIENT), adam(config.learning_rate, config.steps)
    )
    groups = controllers(config)
    members = _members(config)
    parameters = pj.stack([parameters] * len(members))
    state = State(
        parameters,
        jax.vmap(optimizer.init)(parameters),
        {name: pj.stack([controller.init() for controller in groups[name]]) for name in GROUPS},
    )
    shared = Shared(
        rest=rest,
        dense=jnp.array([name == DENSE for name, _ in members]),
        controllers={name: pj.stack(groups[name]) for name in GROUPS},
        text=jnp.asarray(text.train),
        key=jax.random.key(config.seed),
    )

    def records(metrics: Metrics) -> list[dict[str, Any]]:
        return [
            {"member": f"{name} {target:g}"}
            | {metric: float(values[i]) for metric, values in metrics.items()}
            for i, (name, target) in enumerate(members)
        ]

    state = train_run(
        make_step(graph, optimizer, config),
        state,
        shared,
        folder=config.out,
        steps=config.steps,
        every=config.log_every,
        title="sparsify",
        records=records,
    )
    return state.parameters, graph, shared


def _evaluate(
    config: SparsifyConfig,
    parameters: Any,
    graph: Any,
    shared: Shared,
    windows: Int[Array, "windows length"],
    shown: int,
) -> tuple[list[Result], dict[tuple[str, float], Float[np.ndarray, "layers time"]]]:
    """Score every member on held-out windows; and say what it computes of the window `shown`."""

    @jax.jit
    def scores(parameters: Any) -> Any:
        def of_window(window: Int[Array, " length"]) -> Any:
            inputs, targets = window[None, :-1], window[None, 1:]

            def of_member(parameters: Any, dense: Array) -> Any:
                model = nnx.merge(graph, parameters, shared.rest, copy=True)
                logits, masks, probabilities = model.with_gates(inputs, dense=dense)
                return mean_loss(logits, targets), masks[:, 0], probabilities[:, 0]

            return jax.vmap(of_member)(parameters, shared.dense)

        return jax.lax.map(of_window, windows, batch_size=8)

    losses, masks, probabilities = map(np.asarray, scores(parameters))
    loss = losses.mean(axis=0)
    rate = 1 - masks.mean(axis=(0, 2, 3))
    spread = probabilities.std(axis=(0, 3)).mean(axis=1)
    results, shown_masks = [], {}
    for i, (name, target) in enumerate(_members(config)):
        scored = (rate[i], loss[i], loss[i] - loss[0], spread[i])
        results.append(Result(name, target, *map(float, scored)))
        if name != DENSE:
            shown_masks[name, target] = masks[shown, i]
    return results, shown_masks


def _write_results(
    config: SparsifyConfig,
    settings: Mapping[str, Any],
    results: list[Result],
    masks: Mapping[tuple[str, float], Float[np.ndarray, "layers time"]],
    window: Int[Array, " length"],
    text: Corpus,
) -> None:
    """Log the evaluation, and write the plots, the report and the table on the terminal."""
    records = read_log(config.out)
    append_log(
        config.out,
        [{"kind": "evaluation", "step": config.steps} | result._asdict() for result in results],
    )
    frontier = plots.frontiers(
        {
            name: [(result.rate, result.loss) for result in results if result.controller == name]
            for name in GROUPS
        },
        axes=("share of positions skipped, held-out text", "loss, nats per byte, held-out text"),
    )
    curves = plots.curves(
        [record for record in records if not record["member"].startswith(DENSE)],
        panels={
            "target": "target share of skipped positions",
            "rate": "realised share of skipped positions",
            "weight": "weight of the sparsity loss",
            "loss": "loss, nats per byte",
        },
        by="member",
        legend="controller, target",
    )
    line = bytes(np.asarray(window[:-1], np.uint8)).decode("latin-1")
    skipped = plots.highlighted(
        line,
        {f"{name}, target {target:g}": mask.mean(axis=0) for (name, target), mask in masks.items()},
        scale="share of layers that compute the position",
    )
    images = {"frontier.png": frontier, "curves.png": curves, "skipped.png": skipped}
    for name, image in images.items():
        write_file(config.out / name, image)
    headers = ("controller", "target", "rate", "loss", "above dense", "spread of the gate")
    rows = [
        [result.controller, f"{result.target:g}", *(f"{value:.4f}" for value in result[2:])]
        for result in results
    ]
    write_report(
        config.out / "report.html",
        title="Learning to skip",
        sections=[
            Section("Result", SUMMARY.format(unigram=unigram_loss(text)), table=(headers, rows)),
            Section("Loss against rate", FRONTIER_TEXT, image=frontier),
            Section("Curves", CURVES_TEXT, image=curves),
            Section("What is skipped", SKIPPED_TEXT, image=skipped),
            Section(
                "Settings",
                "Everything that decides these numbers; the same as in config.yaml.",
                table=(("option", "value"), [[name, str(v)] for name, v in settings.items()]),
            ),
        ],
    )
    print(format_table(headers, rows))
    print(f"losses in nats per byte, on held-out text; report: {config.out / 'report.html'}")


SUMMARY = (
    "On held-out text: the share of positions that the sparse layers skip, the loss in nats per "
    "byte, and how far it is above that of the dense model, which was trained for as many steps. "
    "The spread is the standard deviation over positions of the probability that a gate is open: a "
    "constant gate has 0. For scale: byte frequencies alone score {unigram:.2f}."
)
FRONTIER_TEXT = "Lower is better, further right skips more."
CURVES_TEXT = (
    "Means over the steps between two lines of the log. The schedule raises its target and its "
    "weight; dual ascent has its target from the start, and its weight rises while the rate is off "
    "it. All members see the same batches."
)
SKIPPED_TEXT = (
    "A window of the held-out text. Dark positions are computed by every sparse layer, "
    "white ones by none."
)
