"""The jobs that people run: each is a module with a config and one function that runs it."""

from penalties_jax.recipes import finetune as finetune
