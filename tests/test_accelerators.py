"""The bytes that `benchmarks.accelerators` counts, in programs compiled for the CPU."""

import jax
import jax.numpy as jnp
import pytest

from benchmarks import accelerators

X = jax.ShapeDtypeStruct((64, 1000), jnp.float32)
BYTES = 4 * 64_000


def moved(function, *arguments):
    return accelerators.moved(jax.jit(function).lower(*arguments).compile().as_text())


def test_a_kernel_reads_its_operand_and_writes_its_result():
    assert moved(lambda x: 2 * x, X) == 2 * BYTES
    assert moved(lambda x, y: x + y, X, X) == 3 * BYTES


def test_half_the_bits_are_half_the_bytes():
    half = jax.ShapeDtypeStruct(X.shape, jnp.bfloat16)
    assert moved(lambda x: x.astype(jnp.float32), half) == 1.5 * BYTES


def test_a_loop_counts_its_body_once_a_trip():
    def loop(trips):
        return moved(lambda x: jax.lax.fori_loop(0, trips, lambda _, y: jnp.sin(y) * 3, x), X)

    body = loop(9) - loop(5)
    assert body == pytest.approx(4 * 2 * BYTES, rel=0.001)


def test_a_slice_of_an_array_is_what_is_read_of_it():
    row = jax.ShapeDtypeStruct((), jnp.int32)
    read = moved(lambda x, i: 2 * jax.lax.dynamic_slice(x, (i, 0), (1, 1000)), X, row)
    assert read == pytest.approx(2 * 4000, abs=64)


def test_rows_that_a_scan_writes_count_once():
    read_and_written = moved(lambda x: jax.lax.scan(lambda c, y: (c, jnp.sin(y)), 0.0, x)[1], X)
    assert 2 * BYTES <= read_and_written <= 6 * BYTES


PROGRAM = """
HloModule jit_f, is_scheduled=true

%body (p: (s32[], f32[8,1000])) -> (s32[], f32[8,1000]) {
  %p = (s32[], f32[8,1000]{1,0:T(8,128)}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[8,1000]{1,0:T(8,128)} get-tuple-element(%p), index=1
  %sum = f32[8,1000]{1,0:T(8,128)} all-reduce(%x), replica_groups={{0,1}}, to_apply=%add
  ROOT %t = (s32[], f32[8,1000]{1,0:T(8,128)}) tuple(%i, %sum)
}

ENTRY %main (x: (s32[], f32[8,1000])) -> (s32[], f32[8,1000]) {
  %x = (s32[], f32[8,1000]{1,0:T(8,128)}) parameter(0)
  ROOT %w = (s32[], f32[8,1000]) while(%x), condition=%c, body=%body, \
backend_config={"known_trip_count":{"n":"3"}}
}
"""


def test_collectives_count_once_a_trip():
    assert accelerators.collectives(PROGRAM) == {"all-reduce": 3 * 32_000}
    assert accelerators.moved(PROGRAM) == 3 * 2 * 32_000


ASYNCHRONOUS = """
HloModule jit_f, is_scheduled=true

%rows (a: f32[64,1000], i: s32[]) -> f32[1,1000] {
  %a = f32[64,1000]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %s = f32[1,1000]{1,0} dynamic-slice(%a, %i, %zero), dynamic_slice_sizes={1,1000}
}

ENTRY %main (x: f32[64,1000], n: s32[]) -> f32[1,1000] {
  %x = f32[64,1000]{1,0} parameter(0)
  %n = s32[] parameter(1)
  %start = ((f32[64,1000]{1,0}, s32[]), f32[1,1000]{1,0}, u32[]) fusion-start(%x, %n), \
kind=kLoop, calls=%rows
  ROOT %done = f32[1,1000]{1,0} fusion-done(%start)
}
"""


def test_an_asynchronous_kernel_is_one_kernel():
    assert accelerators.moved(ASYNCHRONOUS) == 2 * 4000 + 4
