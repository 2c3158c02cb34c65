"""Files of pretrained models, damaged: a model is loaded, or one line says what is wrong."""

import contextlib
import shutil

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from penalties_jax.recipes import llama
from penalties_jax.recipes.options import UsageError
from tests.recipes.models import write_folder, write_gguf
from tests.reliability.attacks import examples


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    write_gguf(folder / "model.gguf")
    write_folder(folder / "folder")
    return folder


def damaged(data, draw):
    """Cut, or with some bytes changed, most often in the first part, which says what follows."""
    data = bytearray(data)
    ends = [100, 1000, len(data)]
    if draw(st.booleans()):
        return data[: draw(st.integers(0, draw(st.sampled_from(ends))))]
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, min(len(data), draw(st.sampled_from(ends))) - 1))
        data[at] = draw(st.integers(0, 255))
    return data


FILES = ["model.gguf", "config.json", "tokenizer.json", "model.safetensors"]


@pytest.mark.parametrize("name", FILES)
@examples(little=20, hard=2000)
@hypothesis.given(data=st.data())
def test_a_damaged_file_is_refused_in_one_line(good, tmp_path_factory, name, data):
    copy = tmp_path_factory.mktemp("damaged") / "model.gguf"
    if name == "model.gguf":
        copy.write_bytes(damaged((good / name).read_bytes(), data.draw))
    else:
        shutil.copytree(good / "folder", copy)
        (copy / name).write_bytes(damaged((good / "folder" / name).read_bytes(), data.draw))
    with contextlib.suppress(UsageError):
        assert llama.load(copy).model.kernel.dtype == np.float32
