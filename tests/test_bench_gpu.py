"""The benchmark for a GPU, on a CPU and small: its peers compute the same, and may fail."""

import json
from importlib.util import find_spec

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import gpu
from tests.programs import quick_jit


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(gpu, "SMALLER", 256)
    monkeypatch.setattr(gpu, "ROUNDS", 3)


@pytest.fixture
def one_row(monkeypatch):
    """A benchmark of the sum of squares alone, where there is no PyTorch."""

    def with_peer(peer):
        monkeypatch.setattr(gpu, "ROWS", {"`l2`": gpu.Row(2, peer)})
        monkeypatch.setattr(gpu, "torch_peers", None)

    return with_peer


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name == "`linear_kl`" else pytest.mark.slow)
        for name in gpu.ROWS
    ],
)
def test_peers_compute_the_same(name):
    row, case = gpu.ROWS[name], gpu.cases()[name]
    arguments = gpu.drawn(row.draw, case.arguments)
    wanted, found = gpu.norms(quick_jit(case.textbook)(*arguments)), {}
    if not row.of:
        found["ours"] = gpu.norms(quick_jit(case.ours)(*arguments))
    if row.optax:
        found["optax"] = gpu.norms(quick_jit(gpu.differentiated(row))(*arguments))
    if find_spec("torch"):
        from benchmarks import torch_peers

        call = torch_peers.peers(name, arguments, row.of)[torch_peers.EAGER]()
        found["torch"] = torch_peers.norms(call())
    for peer, norms in found.items():
        np.testing.assert_allclose(norms, wanted, rtol=gpu.AGREEMENT, err_msg=peer)


def test_a_program_is_called_often_and_waited_for_once():
    calls, waits = [], []
    program = gpu.Enqueued(lambda: calls.append(0) or len(calls), waits.append, list, None, 5)
    program()
    assert (len(calls), waits) == (5, [5])


def test_what_is_measured(one_row, tmp_path):
    one_row(lambda x: 1e-3 * jnp.sum(x**2))
    text = gpu.run(tmp_path)
    head, _, cells = (line.split("|")[1:-1] for line in text.split("\n\n")[1].splitlines())
    assert [x.strip() for x in head[1:]] == ["limit", "reached", gpu.OURS, gpu.PLAIN, gpu.OPTAX]
    assert cells[0].strip() == "`l2`"
    assert float(cells[3]) > 0
    assert "Without PyTorch" in text
    (result,) = json.loads((tmp_path / "gpu.json").read_text())["results"]
    assert result["seconds"].keys() == {gpu.OURS, gpu.PLAIN, gpu.OPTAX}
    assert len(result["least"]) == gpu.ROUNDS
    assert (tmp_path / "gpu.md").read_text().strip() == text
    assert (tmp_path / "gpu.png").stat().st_size < 200_000


def _fails(*_):
    raise MemoryError("no | room\nfor this")


@pytest.mark.parametrize(
    ("peer", "words"),
    [
        (_fails, "| MemoryError: no \\| room |"),
        (lambda x: 2e-3 * jnp.sum(x**2), "| ValueError: norms"),
    ],
)
def test_a_peer_that_fails_is_a_cell(one_row, tmp_path, peer, words):
    one_row(peer)
    text = gpu.run(tmp_path)
    assert words in text
    assert "for this" not in text


def test_a_row_that_fails_is_a_cell(one_row, tmp_path, monkeypatch):
    one_row(None)
    monkeypatch.setattr(gpu, "compiled", _fails)
    assert "MemoryError: no" in gpu.run(tmp_path)


def test_peers_are_left_out_when_their_time_has_gone(one_row, tmp_path, monkeypatch):
    one_row(_fails)
    monkeypatch.setattr(gpu, "PEERS_UNTIL", 0)
    text = gpu.run(tmp_path)
    assert "Without peers of `l2`: 0 seconds had gone" in text
    assert "MemoryError" not in text
