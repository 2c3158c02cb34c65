"""The jobs that people run, a folder each: a config and one function that runs it."""

from penalties_jax.recipes import decompose as decompose
from penalties_jax.recipes import finetune as finetune
from penalties_jax.recipes import sparsify as sparsify
