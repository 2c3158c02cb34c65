import dataclasses
import math
from types import SimpleNamespace

import jax
import pytest
from flax import nnx

from penalties_jax.recipes import memory
from penalties_jax.recipes.decompose import config as decompose
from penalties_jax.recipes.finetune import config as finetune
from penalties_jax.recipes.language_model import LanguageModel, with_adapters
from penalties_jax.recipes.options import Options, UsageError
from penalties_jax.recipes.sparsify import config as sparsify
from penalties_jax.recipes.sparsify.model import SparseLanguageModel

JOBS = {
    "finetune": (finetune.FinetuneConfig(), finetune.numbers),
    "sparsify": (sparsify.SparsifyConfig(), sparsify.numbers),
    "decompose": (decompose.DecomposeConfig(), decompose.numbers),
    "decompose --full": (decompose.DecomposeConfig(full=True), decompose.numbers),
    "decompose --target tms": (decompose.DecomposeConfig(target="tms"), decompose.numbers),
}


@dataclasses.dataclass(frozen=True)
class Weighted(Options):
    weights: tuple[float, ...] = (0.0, 1.0, 2.0, 3.0)


def with_memory(patch, size, device=None):
    stats = None if device is None else {"bytes_limit": device}
    devices = [SimpleNamespace(memory_stats=lambda: stats)]
    patch.setattr(jax, "local_devices", lambda: devices)
    patch.setattr(memory, "host_memory", lambda: size)


@pytest.mark.parametrize(("options", "numbers"), JOBS.values(), ids=JOBS)
def test_the_usual_runs_fit_in_two_gigabytes(monkeypatch, options, numbers):
    with_memory(monkeypatch, 2e9)
    memory.check_memory(options, numbers)
    with_memory(monkeypatch, 2e6)
    with pytest.raises(UsageError, match=r"needs about .* MB of memory and there are 2 MB: lower"):
        memory.check_memory(options, numbers)


def count(make):
    return sum(x.size for x in jax.tree.leaves(nnx.state(nnx.eval_shape(make), nnx.Param)))


@pytest.mark.parametrize(
    ("kind", "block"), [(LanguageModel, 12), (SparseLanguageModel, 36.5)], ids=lambda x: str(x)
)
def test_parameters_are_those_of_the_model(kind, block):
    options = Options(width=64, layers=3, heads=4, context=100)
    sizes = {name: getattr(options, name) for name in ("width", "layers", "heads", "context")}
    expected = count(lambda: kind(**sizes, rngs=nnx.Rngs(0)))
    found = memory.transformer(options, block=int(block * options.width**2))
    assert found == pytest.approx(expected, rel=0.03)


def test_adapters_are_those_of_the_model():
    def make():
        model = LanguageModel(width=32, layers=2, heads=4, context=16, rngs=nnx.Rngs(0))
        return with_adapters(model, 3, rngs=nnx.Rngs(0))

    adapters = nnx.state(nnx.eval_shape(make), nnx.LoRAParam)
    assert sum(x.size for x in jax.tree.leaves(adapters)) == 2 * 16 * 32 * 3


def test_what_to_lower_is_what_saves_the_most(monkeypatch):
    with_memory(monkeypatch, 1e9)

    def refusal(numbers, **options):
        with pytest.raises(UsageError) as error:
            memory.check_memory(Weighted(**options), numbers)
        return str(error.value)

    assert refusal(lambda options: options.width**2, width=10**6) == (
        "this needs about 4 TB of memory and there are 1 GB: lower --width"
    )
    assert refusal(lambda x: x.width * x.context + x.layers, width=10**6, context=10**6).endswith(
        "lower --width, --context"
    )
    assert refusal(lambda options: len(options.weights) * 10**9).endswith("lower --weights")


def test_the_memory_is_the_devices_where_it_has_its_own(monkeypatch):
    with_memory(monkeypatch, 5, device=None)
    assert memory.device_memory() == 5
    with_memory(monkeypatch, 5, device=7)
    assert memory.device_memory() == 7
    monkeypatch.undo()
    assert 1e8 < memory.host_memory() < 1e14
    monkeypatch.delattr("os.sysconf")
    assert memory.host_memory() == math.inf


def test_a_machine_without_the_device_that_was_asked_for(monkeypatch):
    def fail():
        raise RuntimeError("no cuda here")

    monkeypatch.setattr(jax, "local_devices", fail)
    with pytest.raises(UsageError, match="jax finds no device: no cuda here"):
        memory.check_memory(Options(), lambda options: 1)


@pytest.mark.parametrize(
    ("size", "words"),
    [
        (12, "12 bytes"),
        (999e6, "999 MB"),
        (3.21e12, "3.21 TB"),
        (2e30, "2e+12 EB"),
        (999.9e6, "1 GB"),
        (math.inf, "inf EB"),
    ],
)
def test_bytes_in_words(size, words):
    assert memory.in_words(size) == words
