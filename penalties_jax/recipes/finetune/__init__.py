"""Fine-tune a small language model on new text, kept near where it started by a KL penalty.

A byte-level transformer is pretrained on the base text. Low-rank adapters then learn the target
text under `loss + kl_weight * KL(model || base model)`, for several KL weights, or budgets that
learn theirs, in one compiled program. What comes out is the trade: how much of the target text is
learnt (adaptation), and how much of the base text is lost (forgetting).
"""

from penalties_jax.recipes.finetune.config import FinetuneConfig as FinetuneConfig
from penalties_jax.recipes.finetune.job import finetune as finetune
from penalties_jax.recipes.finetune.results import Result as Result
