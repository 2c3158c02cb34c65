"""Penalties for training services: batches of records, and the Tinker SDK."""

from penalties_jax.adapters import datum, tinker

__all__ = ["datum", "tinker"]
