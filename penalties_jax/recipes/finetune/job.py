"""Fine-tuning from beginning to end."""

import hashlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array
from tqdm import tqdm

import penalties_jax as pj
from penalties_jax.recipes import language_model, llama, text
from penalties_jax.recipes.devices import choose_mesh, is_main, make_mesh
from penalties_jax.recipes.finetune.config import FinetuneConfig, check, members
from penalties_jax.recipes.finetune.kinds import Bytes, Tokens
from penalties_jax.recipes.finetune.results import IMAGES, Result, Written, report
from penalties_jax.recipes.finetune.sweep import (
    Budgets,
    Shared,
    evaluate,
    kl_weights,
    start_sweep,
    sweep_step,
)
from penalties_jax.recipes.language_model import LanguageModel, mean_loss
from penalties_jax.recipes.memory import check_memory
from penalties_jax.recipes.options import UsageError
from penalties_jax.recipes.pretraining import pretrained
from penalties_jax.recipes.report import likely_cause, write_results
from penalties_jax.recipes.runs import Run, open_run
from penalties_jax.recipes.training import Trained, adam, train


def finetune(config: FinetuneConfig) -> list[Result]:
    """Run the job: pretrain or load, fine-tune, evaluate, write everything under `config.out`.

    Raises:
        UsageError: If an option, a text, a model or the folder can't be used. Nothing is written
            then.
        RunError: If every member has diverged; what there is, is written.
        StoppedError: If a signal asked for it.
    """
    check(config)
    config = choose_mesh(config, config.batch_size)
    base = text.read_text(config.base_text, text.help_topics)
    target = text.read_text(config.target_text, text.standard_library)
    loaded = load(config, config.model) if config.model else None
    described = {"model": f"Llama, sha256 {_digest(loaded.model)}"} if loaded else {}
    if loaded:
        base, target = (llama.in_tokens(corpus, loaded.tokenizer) for corpus in (base, target))
    base_windows = 1 if loaded else config.pretrain_batch_size
    text.check_length(base, batch_size=base_windows, context=config.context)
    text.check_length(target, batch_size=config.batch_size, context=config.context)
    budgets = make_budgets(config, base) if config.kl_budget else None
    described |= {"base_text": base.describe(), "target_text": target.describe()}
    with open_run(config, IMAGES, **described) as run:
        subject = _subject(config, run, base, loaded)
        trained, results, written = _train_and_evaluate(
            config, run, subject, (base, target), budgets
        )
        shown = report(results, trained.log.records, base, written)
        write_results(run, trained, results, shown, _cause(config, trained))
    return results


def load(config: FinetuneConfig, path: str) -> llama.Loaded:
    """Load the model that comes with --model, if it can be fine-tuned in the memory there is.

    Raises:
        UsageError: If not.
    """
    checkpoint = llama.open_checkpoint(path)
    encode = checkpoint.tokenizer.encode
    prompt = max(len(encode(each, add_special_tokens=False)) for each in config.prompts)
    if not prompt:
        raise UsageError("--prompts needs texts of at least one token")

    def numbers(config: FinetuneConfig) -> int:
        sizes = {"batch_size": config.batch_size, "context": config.context, "rank": config.rank}
        texts = {"texts": len(config.prompts), "length": prompt + config.prompt_tokens}
        return max(
            llama.fine_tuning(checkpoint.config, members=len(members(config)), **sizes),
            llama.writing(checkpoint.config, **texts),
        )

    check_memory(config, numbers)
    return llama.Loaded(llama.build(checkpoint), checkpoint.tokenizer)


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


def make_budgets(config: FinetuneConfig, base_text: text.Corpus) -> Budgets:
    """Return what holds the members to their budgets, on held-out windows of the base text.

    Raises:
        UsageError: If evaluation leaves no window to measure on.
    """
    size = {"count": config.evaluation_windows, "length": config.context + 1}
    measured = text.windows_between(base_text.held_out, **size)
    if not len(measured):
        raise UsageError(
            f"the text {base_text.name!r} is too short for --kl-budget: with fewer "
            "--evaluation-windows, some held-out ones are left to measure on"
        )
    controllers = [
        pj.Budget(budget, config.budget_step_size / budget, measure="kl")
        for budget in config.kl_budget or ()
    ]
    held_out = text.spread_windows(base_text.held_out, **size)
    return Budgets(pj.stack(controllers), text.Rounds(measured), text.Rounds(held_out))


def cross_entropy(outputs: Mapping[str, Array]) -> Array:
    """Return the model's mean loss, in nats per byte."""
    return mean_loss(outputs["logits"], outputs["targets"])


def log_probabilities(outputs: Mapping[str, Array]) -> Array:
    """Return the model's log-probabilities."""
    return jax.nn.log_softmax(outputs["logits"])


def probabilities(outputs: Mapping[str, Array]) -> Array:
    """Return the model's probabilities."""
    return jax.nn.softmax(outputs["logits"])


def _cause(config: FinetuneConfig, trained: Trained) -> str:
    of_kl = "budget_step_size" if config.kl_budget else "kl_weights"
    names = ("learning_rate", of_kl, "l1_weight", "l2_weight", "entropy_weight")
    swept = [{"kl_weights": member.get("kl_weight", 0.0)} for member in members(config)]
    return likely_cause(config, FinetuneConfig(), names, swept, trained.diverged)


def _digest(model: llama.Llama) -> str:
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(nnx.state(model)):
        digest.update(np.asarray(leaf).data)
    return digest.hexdigest()[:16]


class Subject(NamedTuple):
    """What is fine-tuned: a model with adapters, what is computed with it, and how it writes."""

    kind: Bytes | Tokens
    adapted: LanguageModel | llama.Llama
    tokenizer: Any = None


def _subject(
    config: FinetuneConfig, run: Run, base_text: text.Corpus, loaded: llama.Loaded | None
) -> Subject:
    rngs = nnx.Rngs(config.seed)
    if loaded:
        adapted = llama.with_adapters(loaded.model, config.rank, rngs=rngs)
        return Subject(Tokens(), adapted, loaded.tokenizer)
    batch_size = config.pretrain_batch_size
    base_model = pretrained(LanguageModel, config, base_text, batch_size=batch_size)
    adapted = language_model.with_adapters(base_model, config.rank, rngs=rngs)
    return Subject(Bytes(make_objective(config)), adapted)


def _train_and_evaluate(
    config: FinetuneConfig,
    run: Run,
    subject: Subject,
    texts: tuple[text.Corpus, text.Corpus],
    budgets: Budgets | None,
) -> tuple[Trained, list[Result], list[Written]]:
    base_text, target_text = texts
    optimizer = adam(config.learning_rate, config.steps)
    swept = members(config)
    state, shared = start_sweep(
        subject.kind,
        subject.adapted,
        [member.get("kl_weight", 0.0) for member in swept],
        text.batches(target_text, config.seed),
        budgets,
        optimizer=optimizer,
    )
    trained = train(
        run,
        sweep_step(optimizer, batch_size=config.batch_size, length=config.context + 1),
        state,
        shared,
        mesh=make_mesh(config),
        steps=config.steps,
        every=config.log_every,
        members=swept,
    )
    windows = [
        text.spread_windows(
            corpus.held_out, count=config.evaluation_windows, length=config.context + 1
        )
        for corpus in (target_text, base_text)
    ]
    target, base = (evaluate(trained.state.members, shared, each) for each in windows)
    columns = {
        "kl_weight": kl_weights(trained.state, shared),
        "target_before": target.base_loss,
        "target_after": target.loss,
        "base_before": base.base_loss,
        "base_after": base.loss,
        "kl": base.kl,
    }
    results = [
        Result(**{name: float(column[i]) for name, column in columns.items()} | member)
        for i, member in enumerate(swept)
    ]
    return trained, results, _written(config, subject, trained, shared)


def _written(
    config: FinetuneConfig, subject: Subject, trained: Trained, shared: Shared
) -> list[Written]:
    """Return what the base model and every member write after the prompts, if they can."""
    if subject.tokenizer is None:
        return []

    def written(adapters: nnx.State) -> list[str]:
        model = shared.with_adapters(adapters)
        return llama.write(model, subject.tokenizer, config.prompts, config.prompt_tokens)

    after = [
        jax.tree.map(lambda leaf, i=i: leaf[i], trained.state.members.parameters)
        for i in range(len(members(config)))
    ]
    progress = tqdm([shared.start, *after], desc="write", unit="model", disable=not is_main())
    texts = [written(adapters) for adapters in progress]
    return [
        Written(prompt, before, after)
        for prompt, before, *after in zip(config.prompts, *texts, strict=True)
    ]
