"""The devices of a run: those that share a batch, and the processes that they belong to."""

import dataclasses
import hashlib
import os
import re
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from penalties_jax.recipes.options import Options, UsageError

Tree = TypeVar("Tree")
AnyOptions = TypeVar("AnyOptions", bound=Options)

# How many processes there are, for what starts them: `srun`, `mpirun`.
LAUNCHERS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")


def connect() -> None:
    """Join the other processes of a job, if the environment says that there are some.

    By JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, or under `srun` or `mpirun`.

    Raises:
        UsageError: If one of these is missing, no number, or not what jax can start with.
    """
    try:
        if "JAX_COORDINATOR_ADDRESS" in os.environ:
            count, number = map(_number, ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"))
            jax.distributed.initialize(num_processes=count, process_id=number)
        elif any(_number(name) > 1 for name in LAUNCHERS if name in os.environ):
            jax.distributed.initialize()
    # What jax raises for addresses and numbers that it can't read, and where nobody answers.
    except (IndexError, TypeError, ValueError, RuntimeError) as error:
        raise UsageError(f"can't join the other processes: {error}") from error


def _number(name: str) -> int:
    value = os.environ.get(name, "")
    if not value.isdecimal():
        raise UsageError(f"several processes need a number in {name}, not {value!r}")
    return int(value)


def is_main() -> bool:
    """Whether this is the process that writes and prints."""
    return not _several() or jax.process_index() == 0


def any_process(flag: int) -> int:
    """Return the largest flag of all processes, which meet here."""
    return int(multihost_utils.process_allgather(np.int32(flag)).max()) if _several() else flag


def agree(name: str, value: Any) -> None:
    """Make sure that all processes, which meet here, have the same.

    Raises:
        UsageError: If not.
    """
    if _several():
        digest = np.frombuffer(hashlib.sha256(repr(value).encode("utf-8")).digest(), np.uint8)
        everyone = multihost_utils.process_allgather(digest)
        if (everyone != everyone[0]).any():
            raise UsageError(f"the processes differ in {name}")


def _several() -> bool:
    # Without asking for devices, of which there may be none.
    return jax.distributed.is_initialized()


def choose_mesh(options: AnyOptions, batch_size: int) -> AnyOptions:
    """Return the options with the mesh that there will be, by default over all devices.

    Raises:
        UsageError: If the mesh is no data=N, there are fewer devices than N, N doesn't divide the
            batch, or N leaves out a process.
    """
    there = jax.device_count()
    if options.mesh is None:
        count = there if batch_size % there == 0 or jax.process_count() > 1 else 1
    elif match := re.fullmatch(r"data=(\d{1,9})", options.mesh):
        count = int(match[1])
    else:
        raise UsageError(f"--mesh must be data=N, N the number of devices, not {options.mesh}")
    if not 0 < count <= there:
        raise UsageError(f"--mesh data={count} is not possible with {there} devices")
    if batch_size % count:
        raise UsageError(f"--batch-size {batch_size} can't be split over {count} devices")
    if jax.process_count() > 1 and count < there:
        raise UsageError(f"--mesh must have all devices of all processes: data={there}")
    return dataclasses.replace(options, mesh=f"data={count}")


def make_mesh(options: Options) -> Mesh:
    """Return the mesh that the options ask for: the first devices, or the first alone."""
    count = int((options.mesh or "data=1").removeprefix("data="))
    return Mesh(jax.devices()[:count], ("data",), axis_types=(AxisType.Auto,))


def to_every_device(tree: Tree, mesh: Mesh) -> Tree:
    """Have each device of a mesh hold all of a pytree, which every process has."""
    placement = NamedSharding(mesh, P())

    # device_put would compare what the processes have, and finds NaN different from NaN.
    def place(leaf: Any) -> Array:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            data = place(jax.random.key_data(leaf))
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, placement, lambda index: host[index])

    return jax.tree.map(place, tree)


def split_over_devices(batch: Array) -> Array:
    """In a program: have each device of the mesh that is set compute a share of a batch.

    A batch that their number doesn't divide is not split.
    """
    return _placed(batch, P("data")) if batch.shape[0] % _count() == 0 else batch


def kept_on_every_device(tree: Tree) -> Tree:
    """In a program: have each device of the mesh that is set hold all of a pytree."""
    return jax.tree.map(lambda leaf: _placed(leaf, P()), tree)


def _count() -> int:
    return jax.sharding.get_abstract_mesh().shape.get("data", 1)


def _placed(leaf: Array, spec: P) -> Array:
    return jax.lax.with_sharding_constraint(leaf, spec) if _count() > 1 else leaf
