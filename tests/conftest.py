"""Fixtures of all tests."""

import jax
import pytest


@pytest.fixture
def x64():
    """Float64 arithmetic for one test."""
    with jax.enable_x64(True):
        yield
