"""Teach a small language model to skip a stated share of its work; see what that costs and saves.

A byte-level transformer with sparse resolvent layers is trained dense. From there it goes on, once
dense and once for each target rate and each of two controllers: a schedule, which raises the target
and the weight of the sparsity loss, and dual ascent, which learns the weight. All of them train in
one compiled program, on the same batches.
"""

from penalties_jax.recipes.sparsify.config import SparsifyConfig as SparsifyConfig
from penalties_jax.recipes.sparsify.job import sparsify as sparsify
from penalties_jax.recipes.sparsify.results import Result as Result
