"""Eight host devices, short notebooks, a backend for Keras, and names for docstrings."""

import os
import zlib

import pytest

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

# For the kernels of notebooks: fewer steps, and figures that are made but not drawn.
os.environ["PENALTIES_JAX_QUICK"] = "1"
os.environ["MPLBACKEND"] = "agg"

# Keras takes another unless it is told before it is imported.
os.environ["KERAS_BACKEND"] = "jax"

# Before any doctest: pytest would load a second copy of a module that it collects from.
import jax
import jax.numpy as jnp
from jaxtyping import TypeCheckError

import penalties_jax as pj


class RefusedFirst(pytest.RaisesExc):
    """`pytest.raises` where annotations are checked: they may refuse what a function would."""

    def matches(self, exception):
        """As for any of the errors that were asked for."""
        refused = isinstance(exception, TypeCheckError) or isinstance(
            exception.__cause__, TypeCheckError
        )
        return refused or super().matches(exception)


def pytest_configure(config):
    """With --jaxtyping-packages, as make test-types has it."""
    if config.getoption("--jaxtyping-packages"):
        pytest.raises = RefusedFirst


def pytest_addoption(parser):
    """Says which quarters of the cases of each test a run has: all of them, or some, as in "13"."""
    parser.addoption("--cases", default="1234")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Leaves notebooks to make test-slow, and to other runs what isn't for this one."""
    typed = config.getoption("--jaxtyping-packages")
    for item in items:
        if item.path.suffix == ".ipynb":
            item.add_marker(pytest.mark.slow)
        if typed and item.get_closest_marker("untyped"):
            item.add_marker(pytest.mark.skip("takes more than its annotations say"))
    left_out = {item for item in items if _quarter(item) not in config.getoption("--cases")}
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=list(left_out))


def _quarter(item):
    """Which quarter of its test's cases one is in; a cheap or the first case is in all of them."""
    case = getattr(item, "callspec", None)
    if case is None or not any(case.indices.values()) or item.get_closest_marker("cheap"):
        return ""
    return "1234"[zlib.crc32(item.nodeid.encode()) % 4]


@pytest.fixture(autouse=True)
def names_in_examples(doctest_namespace):
    """What every example in a docstring begins with."""
    doctest_namespace |= {"jax": jax, "jnp": jnp, "pj": pj}
