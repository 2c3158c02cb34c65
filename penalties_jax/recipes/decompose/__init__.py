"""Decompose a small network's parameters, and see which importance penalty does it better.

The matrices of a trained network become sums of rank-one components, of which few should be needed
at each position (`components.py`). That is asked for by an L_p penalty, whose p is annealed from
2 to 0.4, and by smooth L0, whose gamma is annealed from 1 to 0.1. The losses have different scales,
so what is compared are the frontiers of sparsity against faithfulness that a sweep of coefficients
gives, with several seeds. All members train in one compiled program, on the same batches.
"""

from penalties_jax.recipes.decompose.config import DecomposeConfig as DecomposeConfig
from penalties_jax.recipes.decompose.job import decompose as decompose
from penalties_jax.recipes.decompose.results import Result as Result
