import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from penalties_jax.recipes.checkpoints import Checkpoints
from penalties_jax.recipes.options import UsageError


def tree(step):
    """Arrays of several dtypes and ranks, which tell the step."""
    return {
        "kernel": jnp.arange(6.0).reshape(2, 3) + step,
        "half": [jnp.full(3, step, jnp.bfloat16)],
        "count": jnp.int32(step),
        "empty": jnp.zeros((0, 3)),
    }


def same(ours, theirs):
    return jax.tree.structure(ours) == jax.tree.structure(theirs) and all(
        a.dtype == b.dtype and np.array_equal(a, b)
        for a, b in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True)
    )


@pytest.fixture
def saved(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", "a run")
    for step in (3, 6, 9):
        checkpoints.save(step, tree(step), f"log to {step}\n".encode())
    return checkpoints


def latest(checkpoints):
    step, restored, log = checkpoints.latest(tree(0))
    assert same(restored, tree(step))
    assert log == (f"log to {step}\n".encode() if step else b"")
    return step


def newest(checkpoints):
    return max(checkpoints.folder.glob("*.npz"), key=lambda path: int(path.name.split("-")[0]))


def test_the_two_latest_are_kept(saved):
    assert latest(saved) == 9
    assert sorted(path.name.split("-")[0] for path in saved.folder.iterdir()) == ["6", "9"]


def test_without_any_it_is_what_was_given(tmp_path):
    assert latest(Checkpoints(tmp_path / "checkpoints", "a run")) == 0
    assert list(tmp_path.iterdir()) == []


DAMAGES = {
    "emptied": lambda data, random: b"",
    "halved": lambda data, random: data[: len(data) // 2],
    "overwritten": lambda data, random: random.randbytes(len(data)),
    "longer": lambda data, random: data + b"\0",
    "a flipped bit": lambda data, random: flipped(data, random.randrange(8 * len(data))),
}


def flipped(data, bit):
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_one_is_named_and_the_one_before_is_used(saved, capsys, damage):
    path = newest(saved)
    path.write_bytes(DAMAGES[damage](path.read_bytes(), random.Random(0)))
    assert latest(saved) == 6
    assert capsys.readouterr().err == f"penalties-jax: {path} is damaged, and not used\n"

    saved.save(9, tree(9), b"log to 9\n")
    assert latest(saved) == 9
    assert not capsys.readouterr().err


def test_every_bit_counts(saved, capsys):
    path = newest(saved)
    data = path.read_bytes()
    for bit in range(0, 8 * len(data), 101):
        path.write_bytes(flipped(data, bit))
        assert latest(saved) == 6


def test_with_all_damaged_it_starts_over(saved, capsys):
    for path in saved.folder.iterdir():
        path.write_bytes(b"")
    assert latest(saved) == 0
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_what_else_is_there_is_left_alone(saved):
    newest(saved).rename(saved.folder / "9-backup.npz")
    (saved.folder / "99").mkdir()
    (saved.folder / "99" / "data").touch()
    (saved.folder / "100-0123.npz").touch()
    (saved.folder / "300.npz").touch()
    (saved.folder / "13-0123456789abcdef.npz").mkdir()
    assert latest(saved) == 6
    saved.save(9, tree(9), b"log to 9\n")
    assert len(list(saved.folder.iterdir())) == 7


def test_one_of_another_step_or_run_is_damaged(saved, capsys):
    path = newest(saved)
    path.rename(path.with_name(path.name.replace("9-", "12-", 1)))
    assert latest(saved) == 6
    assert latest(Checkpoints(saved.folder, "another run")) == 0
    assert len(capsys.readouterr().err.splitlines()) == 3


def test_other_arrays_are_refused(saved):
    with pytest.raises(UsageError, match=r"9-.*npz is of another version of this job"):
        saved.latest(tree(0) | {"more": jnp.zeros(2)})
    with pytest.raises(UsageError, match="another version"):
        saved.latest(tree(0) | {"count": jnp.zeros(2, jnp.int32)})
