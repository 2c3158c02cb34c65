"""Eight host devices, short notebooks, and one copy of the package for the doctests."""

import os

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

# For the kernels of notebooks: fewer steps, and figures that are made but not drawn.
os.environ["PENALTIES_JAX_QUICK"] = "1"
os.environ["MPLBACKEND"] = "agg"

# Pytest would load a second copy of a module whose doctests it collects before the package.
import penalties_jax  # noqa: F401
