"""One of two processes of two devices each: `python two_processes.py PORT RANK`."""

import sys
from functools import partial

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import penalties_jax as pj
from tests.functional.test_importance import lopsided, oracle, smooth_l0, value_and_gradient
from tests.oracles import assert_close


def main(port, rank):
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=int(rank))
    assert (jax.process_count(), len(jax.local_devices()), len(jax.devices())) == (2, 2, 4)
    mesh = jax.make_mesh((4,), ("batch",), axis_types=(AxisType.Auto,))
    for dtype, tolerance in ((np.float64, 1e-6), (np.float32, 1e-5)):
        with jax.enable_x64(True):
            check(mesh, dtype, tolerance)
    print("same on 4 devices of 2 processes")


def check(mesh, dtype, tolerance):
    """Each process holds half of the batch; the loss and its own gradients are the oracle's."""
    data, mask = lopsided(dtype)
    desired, [slope] = oracle([data], smooth_l0, beta=0.5, masks=[mask])
    sharding = NamedSharding(mesh, P("batch"))
    x, m = (
        jax.make_array_from_callback(a.shape, sharding, lambda index, a=a: a[index])
        for a in (data, mask)
    )
    call = partial(value_and_gradient, penalty=pj.SmoothL0(gamma=0.5), beta=0.5)
    mapped = jax.shard_map(
        lambda x, m: call(x, where=m, axis_name="batch"),
        mesh=mesh,
        in_specs=P("batch"),
        out_specs=(P(), P("batch")),
    )
    for function in (lambda x, m: call(x, where=m), mapped):
        loss, gradient = jax.jit(function)(x, m)
        assert_close(
            jax.tree.map(lambda part: part.addressable_data(0), loss), desired, rtol=tolerance
        )
        for shard in gradient.addressable_shards:
            own = slope[shard.index]
            assert_close(shard.data, own, rtol=tolerance, atol=tolerance * np.abs(slope).max())


if __name__ == "__main__":
    main(*sys.argv[1:])
