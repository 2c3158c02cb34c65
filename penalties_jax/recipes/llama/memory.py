"""How many numbers a model of the Llama family takes, and how many to fine-tune adapters of it."""

from penalties_jax.recipes.llama.model import LlamaConfig
from penalties_jax.recipes.memory import COPIES

# Of a logit in a block of them: itself, the base model's, and the gradient.
LOGITS = 3


def parameters(config: LlamaConfig) -> int:
    """Return how many parameters a model has."""
    block = sum(inputs * outputs for inputs, outputs in _linear(config)) + 2 * config.width
    embeddings = (1 if config.tied else 2) * config.vocabulary * config.width
    return config.layers * block + embeddings + config.width


def adapters(config: LlamaConfig, rank: int) -> int:
    """Return how many parameters the adapters of a model have."""
    return config.layers * rank * sum(inputs + outputs for inputs, outputs in _linear(config))


def fine_tuning(
    config: LlamaConfig, *, members: int, rank: int, batch_size: int, context: int, rows: int = 256
) -> int:
    """Return how many numbers a step of fine-tuning adapters holds at once, about.

    The base model is there once, and the adapters of each member with their optimiser. Of one
    member at a time there is what goes into each layer, what a gradient keeps inside the one layer
    that is computed again, and a block of logits.

    Args:
        config: The sizes of the model.
        members: How many train at once.
        rank: Of the adapters.
        batch_size: The sequences in a batch.
        context: The positions of a sequence.
        rows: The positions whose logits are there at once.
    """
    positions = batch_size * context
    heads = (config.heads + 2 * config.key_heads) * config.head_width
    layer = 8 * config.width + 3 * heads + 6 * config.inner_width + 7 * rank
    scores = 4 * config.heads * context
    kept = positions * ((config.layers + 2) * config.width + layer + scores)
    logits = LOGITS * min(rows, positions) * config.vocabulary
    return parameters(config) + members * COPIES * adapters(config, rank) + kept + logits


def writing(config: LlamaConfig, *, texts: int, length: int) -> int:
    """Return how many numbers writing texts of that length holds at once: their keys and values."""
    position = 2 * config.layers * config.key_heads * config.head_width
    return parameters(config) + texts * (length * position + LOGITS * config.vocabulary)


def _linear(config: LlamaConfig) -> list[tuple[int, int]]:
    """Return the inputs and outputs of the linear layers of a block."""
    width, inner = config.width, config.inner_width
    queries, keys = config.heads * config.head_width, config.key_heads * config.head_width
    attention = [(width, queries), (width, keys), (width, keys), (queries, width)]
    return [*attention, (width, inner), (width, inner), (inner, width)]
