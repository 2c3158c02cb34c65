"""The options of fine-tuning."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from penalties_jax.recipes.memory import COPIES, activations, check_memory, transformer
from penalties_jax.recipes.options import Options, UsageError, check_options, flag

KL_WEIGHTS = (0.0, 0.01, 0.1, 0.5, 1.0)
PROMPTS = ("The capital of France is", "A list in Python is", "def fibonacci(n):")
# What a model that comes with --model has no use for: its sizes are its own, and its logits, which
# some penalties act on, are never held.
OF_BYTES = (
    *("width", "layers", "heads", "pretrain_steps", "pretrain_learning_rate"),
    *("pretrain_batch_size", "l1_weight", "l2_weight", "on", "entropy_weight"),
)
OF_TOKENS = ("prompts", "prompt_tokens")


@dataclasses.dataclass(frozen=True)
class FinetuneConfig(Options):
    """Fine-tune a language model on new text under a KL penalty, for several weights at once.

    Losses and KL are in nats per byte; with --model, per token, as --context is then in tokens.
    """

    out: Path = Path("runs/finetune")
    width: int = 96

    model: str | None = None
    """A pretrained model of the Llama family, in place of a small one that is pretrained here: a
    folder as on Hugging Face, a GGUF file, or smollm2, which the extra llm brings. Its sizes are
    its own, and penalties of logits, which are never held, have no meaning with it."""

    base_text: Path | None = None
    """A UTF-8 file to pretrain on, and to tell by what is forgotten; by default Python's own help
    topics."""

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

    kl_weights: tuple[float, ...] | None = None
    """The weights of KL(model || base model) to compare; by default 0, 0.01, 0.1, 0.5 and 1."""

    kl_budget: tuple[float, ...] | None = None
    """In place of weights: limits of that KL on held-out base text, for which weights are learnt.
    It is measured on windows that evaluation leaves out."""

    budget_step_size: float = 0.02
    """What a step at twice its budget adds to a KL weight."""

    l1_weight: float = 0.0
    """The weight of an L1 term, the mean of abs(x)."""

    l2_weight: float = 0.0
    """The weight of an L2 term, the mean of x ** 2."""

    on: Literal["logprobs", "probs"] = "logprobs"
    """What the L1 and L2 terms act on (the L1 of probabilities is constant)."""

    entropy_weight: float = 0.0
    """The weight of a term that rewards the entropy of the predictions."""

    pretrain_batch_size: int = 8
    """Sequences in a batch of pretraining."""

    evaluation_windows: int = 128
    """Sequences of each held-out text to evaluate on, at most."""

    prompts: tuple[str, ...] = PROMPTS
    """What every member goes on from in the report, with --model."""

    prompt_tokens: int = 40
    """How many tokens they write after each."""

    def __post_init__(self):
        if self.kl_weights is None and self.kl_budget is None:
            object.__setattr__(self, "kl_weights", KL_WEIGHTS)


def members(config: FinetuneConfig) -> list[dict[str, float]]:
    """Return in what the members differ: one option each, by the name that the log has for it."""
    if config.kl_budget is not None:
        return [{"kl_budget": budget} for budget in config.kl_budget]
    return [{"kl_weight": weight} for weight in config.kl_weights or ()]


def check(config: FinetuneConfig) -> None:
    """Refuse options that can't be run, as `check_options` and `check_memory`."""
    weights = ("kl_weights", "l1_weight", "l2_weight", "entropy_weight")
    check_options(config, members=len(members(config)), may_be_zero=weights)
    if config.kl_weights is not None and config.kl_budget is not None:
        raise UsageError("--kl-budget takes the place of --kl-weights: give one of them")
    if config.kl_budget is None:
        _check_unused(config, ("budget_step_size",), "without --kl-budget")
    if config.model is None:
        _check_unused(config, OF_TOKENS, "without --model")
        check_memory(config, numbers)
    else:
        _check_unused(config, OF_BYTES, "with --model")


def _check_unused(config: FinetuneConfig, names: Sequence[str], where: str) -> None:
    usual = FinetuneConfig()
    for name in names:
        if getattr(config, name) != getattr(usual, name):
            raise UsageError(f"{flag(name)} has no meaning {where}")


def numbers(config: FinetuneConfig) -> int:
    """Return how many numbers pretraining or fine-tuning holds at once, about."""
    width, rank = config.width, config.rank
    base = transformer(config, block=12 * width**2)
    adapters = config.layers * 16 * width * rank

    def kept(batch_size: int) -> int:
        return activations(config, batch_size=batch_size, block=20 * width + 4 * rank)

    return max(
        COPIES * base + kept(config.pretrain_batch_size),
        2 * base + len(members(config)) * (COPIES * adapters + kept(config.batch_size)),
    )
