"""Fine-tune a small language model on new text, kept near where it started by a KL penalty.

A byte-level transformer is pretrained on the base text. Low-rank adapters then learn the target
text under `loss + kl_weight * KL(model || base model)`, for several KL weights in one compiled
program. What comes out is the trade: how much of the target text is learnt (adaptation), and how
much of the base text is lost (forgetting).
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

import penalties_jax as pj
from penalties_jax.recipes import plots
from penalties_jax.recipes.language_model import mean_loss
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
from penalties_jax.recipes.sweep import (
    Member,
    Shared,
    evaluate,
    start_sweep,
    sweep_step,
)
from penalties_jax.recipes.text import (
    Corpus,
    check_length,
    help_topics,
    read_text,
    spread_windows,
    standard_library,
    unigram_loss,
)
from penalties_jax.recipes.training import Metrics, adam, train_run

PRODUCTS = ("adaptation.png", "curves.png", "report.html")


@dataclasses.dataclass(frozen=True)
class FinetuneConfig:
    """Fine-tune a small language model on new text under a KL penalty, for several weights at once.

    Losses and KL are in nats per byte.
    """

    out: Path = Path("runs/finetune")
    """The folder that the run writes to."""

    resume: bool = False
    """Continue the run in that folder, made with the same options, from its last checkpoint."""

    seed: int = 0
    """The seed of the initial parameters and of the batches."""

    base_text: Path | None = None
    """A UTF-8 file to pretrain on; by default Python's own help topics."""

    target_text: Path | None = None
    """A UTF-8 file to fine-tune on; by default the source of the standard library."""

    steps: int = 300
    """Optimiser steps of fine-tuning."""

    batch_size: int = 4
    """Sequences in a batch of fine-tuning."""

    learning_rate: float = 3e-3
    """Adam's highest learning rate in fine-tuning."""

    rank: int = 8
    """The rank of the adapters."""

    kl_weights: tuple[float, ...] = (0.0, 0.01, 0.1, 0.5, 1.0)
    """The weights of KL(model || base model) to compare."""

    l1_weight: float = 0.0
    """The weight of an L1 term, the mean of abs(x)."""

    l2_weight: float = 0.0
    """The weight of an L2 term, the mean of x ** 2."""

    on: Literal["logprobs", "probs"] = "logprobs"
    """What the L1 and L2 terms act on (the L1 of probabilities is constant)."""

    entropy_weight: float = 0.0
    """The weight of a term that rewards the entropy of the predictions."""

    pretrain_steps: int = 900
    """Optimiser steps of pretraining."""

    pretrain_batch_size: int = 8
    """Sequences in a batch of pretraining."""

    pretrain_learning_rate: float = 3e-3
    """Adam's highest learning rate in pretraining."""

    width: int = 96
    """The size of the model's residual stream, a multiple of the number of heads."""

    layers: int = 2
    """The number of transformer blocks."""

    heads: int = 4
    """The number of attention heads in each block."""

    context: int = 128
    """The length of a sequence, in bytes."""

    log_every: int = 20
    """Steps between two lines of the log, and two checkpoints."""

    evaluation_windows: int = 128
    """Sequences of each held-out text to evaluate on, at most."""


class Result(NamedTuple):
    """What fine-tuning with one KL weight did, on held-out text, in nats per byte.

    Attributes:
        kl_weight: The weight of KL(model || base model).
        target_before: The loss of the base model on the target text.
        target_after: The loss of the fine-tuned model there.
        base_before: The loss of the base model on the base text.
        base_after: The loss of the fine-tuned model there; its increase is the forgetting.
        kl: KL(fine-tuned model || base model) on the base text.
    """

    kl_weight: float
    target_before: float
    target_after: float
    base_before: float
    base_after: float
    kl: float


def finetune(config: FinetuneConfig) -> list[Result]:
    """Run the job: pretrain or load, fine-tune, evaluate, write everything under `config.out`.

    Raises:
        UsageError: If an option, a text or the folder can't be used. Nothing is written then.
    """
    check(config)
    base_text = read_text(config.base_text) if config.base_text else help_topics()
    target_text = read_text(config.target_text) if config.target_text else standard_library()
    check_length(base_text, batch_size=config.pretrain_batch_size, context=config.context)
    check_length(target_text, batch_size=config.batch_size, context=config.context)

    settings = open_run(
        config,
        PRODUCTS,
        base_text=base_text.describe(),
        target_text=target_text.describe(),
    )

    results = _train_and_evaluate(config, base_text, target_text)
    _write_results(config, settings, results, base_text)
    return results


def check(config: FinetuneConfig) -> None:
    """Refuse options that can't be run.

    Raises:
        UsageError: If a number is out of range, or no KL weight is given.
    """
    sizes = [
        "steps", "batch_size", "rank", "pretrain_steps", "pretrain_batch_size", "width", "layers",
        "heads", "context", "log_every", "evaluation_windows",
    ]  # fmt: skip
    check_numbers(
        config,
        positive=[*sizes, "learning_rate", "pretrain_learning_rate"],
        nonnegative=["seed", "kl_weights", "l1_weight", "l2_weight", "entropy_weight"],
    )
    check_model(config)
    if not config.kl_weights:
        raise UsageError("--kl-weights needs at least one weight")
    if len(set(config.kl_weights)) < len(config.kl_weights):
        raise UsageError(f"--kl-weights must differ from each other: {config.kl_weights}")


def make_objective(config: FinetuneConfig) -> pj.Objective:
    """Return the objective with the terms that the config asks for, and the KL weight at 0."""
    on = {"logprobs": log_probabilities, "probs": probabilities}[config.on]
    optional = {
        "l1": pj.Term(pj.L1(reduction="mean"), on=on, weight=config.l1_weight),
        "l2": pj.Term(pj.L2(reduction="mean"), on=on, weight=config.l2_weight),
        "entropy": pj.Term(
            pj.Entropy(inputs="logits", maximize=True), on="logits", weight=config.entropy_weight
        ),
    }
    kl = pj.KLDivergence(inputs="logits")
    return pj.Objective(
        loss=cross_entropy,
        terms={"kl": pj.Term(kl, on=("logits", "reference_logits"), weight=0.0)}
        | {name: term for name, term in optional.items() if term.weight},
    )


def cross_entropy(outputs: Mapping[str, Array]) -> Array:
    """Return the model's mean loss, in nats per byte."""
    return mean_loss(outputs["logits"], outputs["targets"])


def log_probabilities(outputs: Mapping[str, Array]) -> Array:
    """Return the model's log-probabilities."""
    return jax.nn.log_softmax(outputs["logits"])


def probabilities(outputs: Mapping[str, Array]) -> Array:
    """Return the model's probabilities."""
    return jax.nn.softmax(outputs["logits"])


def _train_and_evaluate(
    config: FinetuneConfig, base_text: Corpus, target_text: Corpus
) -> list[Result]:
    pretraining = Pretraining(
        seed=config.seed,
        width=config.width,
        layers=config.layers,
        heads=config.heads,
        context=config.context,
        steps=config.pretrain_steps,
        batch_size=config.pretrain_batch_size,
        learning_rate=config.pretrain_learning_rate,
    )
    base = pretrained_model(pretraining, base_text, config.out / "pretrained")
    optimizer = adam(config.learning_rate, config.steps)
    objective = make_objective(config)
    members, shared = start_sweep(
        base,
        [objective.with_weight("kl", weight) for weight in config.kl_weights],
        jnp.asarray(target_text.train),
        optimizer=optimizer,
        rank=config.rank,
        seed=config.seed,
    )

    def records(metrics: Metrics) -> list[dict[str, Any]]:
        return [
            {"kl_weight": weight}
            | {name: float(values[member]) for name, values in metrics.items()}
            for member, weight in enumerate(config.kl_weights)
        ]

    members = train_run(
        sweep_step(optimizer, batch_size=config.batch_size, length=config.context + 1),
        members,
        shared,
        folder=config.out,
        steps=config.steps,
        every=config.log_every,
        title="fine-tune",
        records=records,
    )
    return _evaluate(config, members, shared, base_text, target_text)


def _evaluate(
    config: FinetuneConfig, members: Member, shared: Shared, base_text: Corpus, target_text: Corpus
) -> list[Result]:
    target, base = (
        evaluate(
            members,
            shared,
            spread_windows(
                text.held_out, count=config.evaluation_windows, length=config.context + 1
            ),
        )
        for text in (target_text, base_text)
    )
    columns = (target.base_loss, target.loss, base.base_loss, base.loss, base.kl)
    return [
        Result(weight, *(float(column[member]) for column in columns))
        for member, weight in enumerate(config.kl_weights)
    ]


def _write_results(
    config: FinetuneConfig, settings: Mapping[str, Any], results: list[Result], base_text: Corpus
) -> None:
    """Log the evaluation, and write the plots, the report and the table on the terminal."""
    records = read_log(config.out)
    append_log(
        config.out,
        [{"kind": "evaluation", "step": config.steps} | result._asdict() for result in results],
    )
    by_weight = sorted(results)
    adaptation = plots.frontier(
        [result.base_after - result.base_before for result in by_weight],
        [result.target_before - result.target_after for result in by_weight],
        labels=[f"KL weight {result.kl_weight:g}" for result in by_weight],
        axes=(
            "forgetting: rise of the loss on the base text, nats per byte",
            "adaptation: fall of the loss on the target text, nats per byte",
        ),
    )
    curves = plots.curves(
        records,
        panels={
            "loss": "loss on the target text, nats per byte",
            "kl": "KL to the base model, nats per byte",
            "gradient/kl/weighted": "norm of the gradient of the weighted KL, in the logits",
        },
        by="kl_weight",
        legend="KL weight",
    )
    write_file(config.out / "adaptation.png", adaptation)
    write_file(config.out / "curves.png", curves)

    headers = (
        "KL weight",
        "target before",
        "target after",
        "base before",
        "base after",
        "KL to base",
    )
    rows = [
        [f"{result.kl_weight:g}", *(f"{value:.4f}" for value in result[1:])] for result in results
    ]
    last = [record for record in records if record["step"] == config.steps]
    norms = [name for name in last[0] if name.startswith("gradient/")]
    write_report(
        config.out / "report.html",
        title="Fine-tuning under a KL penalty",
        sections=[
            Section(
                "Result",
                SUMMARY.format(unigram=unigram_loss(base_text)),
                table=(headers, rows),
            ),
            Section("Adaptation against forgetting", FRONTIER_TEXT, image=adaptation),
            Section("Curves", CURVES_TEXT, image=curves),
            Section(
                "Gradient norms",
                NORMS_TEXT,
                table=(
                    ("KL weight", *(name.removeprefix("gradient/") for name in norms)),
                    [
                        [f"{record['kl_weight']:g}", *(f"{record[name]:.3g}" for name in norms)]
                        for record in last
                    ],
                ),
            ),
            Section(
                "Settings",
                SETTINGS_TEXT,
                table=(
                    ("option", "value"),
                    [[name, str(value)] for name, value in settings.items()],
                ),
            ),
        ],
    )
    print(format_table(headers, rows))
    print(f"losses and KL in nats per byte, on held-out text; report: {config.out / 'report.html'}")


SUMMARY = (
    "For each KL weight, the loss on held-out text before and after fine-tuning, and KL(fine-tuned "
    "model || base model) on held-out base text, all in nats per byte. Before is the base model, "
    "the same in every row. For scale: byte frequencies alone score {unigram:.2f} on the base text."
)
FRONTIER_TEXT = (
    "Up is better adapted, left is less forgotten; each point is labelled with its KL weight. A "
    "larger weight holds the model nearer the base model: it forgets less, and large weights also "
    "learn less."
)
CURVES_TEXT = (
    "Means over the steps between two lines of the log, on the batches of target text that the "
    "members train on; all members see the same batches."
)
NORMS_TEXT = (
    "The norm of each term's gradient with respect to the model's logits, as it is and times its "
    "weight; a mean over the last steps. Where a weighted term's norm is far below the loss's, the "
    "term hardly acts."
)
SETTINGS_TEXT = "Everything that decides these numbers; the same as in config.yaml."
