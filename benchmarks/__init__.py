"""Measurements of penalties-jax beside its peers: `python -m benchmarks`."""
