"""Values and gradients on the default device, a GPU where there is one, beside float64.

Of everything in the catalogue and of every public function; and at a real vocabulary, where the
platform walks the rows as it likes. `make bench-gpu` runs these on a GPU; `python -m pytest -m gpu`
on whatever there is. A function's variants share a program: most of the time goes into compiling.
"""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.calls import CALLS, is_floating
from tests.catalogue import CASES, DIVERGENCE_CASES, grouped, only
from tests.oracles import assert_close, lattice
from tests.programs import quick_jit

pytestmark = pytest.mark.gpu

CLASSES, MASKED = 131_072, 1_000
# Beside the largest entry of an array, or beside its norm.
TOLERANCES = {jnp.float32: 1e-4, jnp.bfloat16: 2e-2}
every_dtype = pytest.mark.parametrize("dtype", TOLERANCES)


def by_function(cases):
    """Parametrises a test by the cases of each function."""
    groups = grouped(lambda case: case.function, cases)
    return pytest.mark.parametrize("cases", groups, ids=lambda group: group[0].function.__name__)


@pytest.fixture(autouse=True)
def whole_products():
    """Products of float32 in float32, which a GPU by itself rounds to 10 bits."""
    with jax.default_matmul_precision("highest"):
        yield


def cast(tree, dtype):
    return jax.tree.map(lambda x: np.asarray(x).astype(dtype) if is_floating(x) else x, tree)


def on_the_cpu(function, arrays, *numbers, dtype=np.float64):
    """What a function gives on the CPU."""
    with jax.enable_x64(dtype == np.float64), jax.default_device(jax.devices("cpu")[0]):
        return quick_jit(function)(cast(arrays, dtype), *numbers)


def in_numpy(x):
    x = np.asarray(x)
    return x.astype(np.complex128 if np.iscomplexobj(x) else np.float64)


def assert_entries_agree(found, wanted):
    """Every entry, to its own size and to that of the largest one in its array, or to 1."""
    for (path, x), y in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(wanted), strict=True):
        x, y = in_numpy(x), in_numpy(y)
        np.testing.assert_allclose(
            *(x, y, 1e-4, 1e-6 * np.abs(y).max(initial=1)),
            equal_nan=False,
            err_msg=jax.tree_util.keystr(path),
        )


def assert_arrays_agree(found, wanted, tolerance):
    """Every array as a whole: the norm of the error beside its own."""
    for (path, x), y in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(wanted), strict=True):
        x, y = in_numpy(x), in_numpy(y)
        error, size = np.linalg.norm(x - y), np.linalg.norm(y)
        assert error <= tolerance * size, (jax.tree_util.keystr(path), error, size)


@by_function(CASES)
def test_the_catalogue(cases):
    """Every variant: its value against the oracle, its gradient beside float64."""
    data = {case.name: case.data(shape=case.shape) for case in cases}

    def total(case, *inputs):
        masked = {"reduction": "sum", "where": case.where(case.mask())} if case.reduced else {}
        return case.call(*inputs, **masked)

    def everything(data):
        return {
            case.name: jax.value_and_grad(lambda x, case=case: total(case, *x))(data[case.name])
            for case in cases
        }

    found = jax.jit(everything)(cast(data, np.float32))
    assert_entries_agree(found, on_the_cpu(everything, data))
    for case in cases:
        inputs = data[case.name]
        wanted = (
            case.reduced_entries(*inputs, reduction="sum", where=case.mask())
            if case.reduced
            else case.formula(*inputs)
        )
        assert_close(found[case.name][0], wanted, rtol=1e-5)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_every_public_function(call):
    """All that it returns, and gradients in all its arrays and numbers."""

    def everything(arrays, numbers):
        return call(**arrays, **numbers), call.slopes(**arrays, **numbers)

    found = jax.jit(everything)(call.arrays, call.numbers)
    # A key gives other points in another dtype.
    dtype = np.float64 if call.options.get("key") is None else np.float32
    assert_entries_agree(found, on_the_cpu(everything, call.arrays, call.numbers, dtype=dtype))


@every_dtype
@by_function(only(lambda case: case.streamed, DIVERGENCE_CASES))
def test_divergences_at_a_real_vocabulary(cases, dtype):
    """Against oracles; some classes masked in both, and a row left out that is not a number."""
    random = np.random.default_rng(0)
    p = 2 * random.normal(size=(3, CLASSES))
    both = np.stack([p, p + random.normal(size=p.shape)])
    both[..., -MASKED:], both[:, 1], kept = -np.inf, np.nan, np.array([True, False, True])
    logits = cast(tuple(both[: cases[0].inputs]), dtype)

    def everything(logits):
        def total(logits, case):
            return case.raw(*logits, block_size=None, where=kept, reduction="sum")

        return {case.name: jax.value_and_grad(total)(logits, case) for case in cases}

    found = jax.jit(everything)(logits)
    logits = [x[kept] for x in cast(logits, np.float64)]
    for case in cases:
        value, slopes = found[case.name]
        assert_close(value, case.entries(*logits).sum(), rtol=1e-5)
        for slope, wanted in zip(slopes, case.gradients(*logits), strict=True):
            assert not np.any(slope[1])
            # A gradient has the dtype of its logits.
            assert_arrays_agree(slope[kept], wanted, TOLERANCES[dtype])


WIDE = only(lambda call: "block_size" in inspect.signature(call.function).parameters, CALLS)


@every_dtype
@pytest.mark.parametrize("call", WIDE.values(), ids=WIDE)
def test_heads_at_a_real_vocabulary(call, dtype):
    """As in `test_every_public_function`, from logits and from hidden states."""
    arrays = dict(call.arrays)
    for i, (name, x) in enumerate(arrays.items()):
        kind = name.split("_")[0]
        if kind in ("logits", "kernel", "bias"):
            arrays[name] = lattice(i, *x.shape[:-1], CLASSES)
            if kind != "kernel":
                arrays[name][..., -MASKED:] = -np.inf
    arrays = cast(arrays, dtype)

    def everything(arrays, numbers):
        wide = {"block_size": None}
        return call(**arrays, **numbers, **wide), call.slopes(**arrays, **numbers, **wide)

    found = jax.jit(everything)(arrays, call.numbers)
    wanted = on_the_cpu(everything, arrays, call.numbers)
    assert_arrays_agree(found, wanted, TOLERANCES[dtype])
