import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from penalties_jax.recipes import pretraining
from penalties_jax.recipes.language_model import LanguageModel, mean_loss
from penalties_jax.recipes.options import Options
from penalties_jax.recipes.text import split

OPTIONS = Options(seed=0, width=8, layers=1, heads=2, context=8, pretrain_steps=40)
TEXT = split("abc", "abc" * 300)


def pretrained(folder, options=OPTIONS, text=TEXT, batch_size=8):
    options = dataclasses.replace(options, out=folder)
    return pretraining.pretrained(
        LanguageModel, options, text, batch_size=batch_size, learning_rate=0.03
    )


def leaves(model):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(model))]


@pytest.mark.slow
def test_pretraining_learns_and_its_checkpoint_is_reused(tmp_path, monkeypatch):
    model = pretrained(tmp_path)
    windows = np.frombuffer(b"abcabcabc", np.uint8)[None].astype(int)
    assert mean_loss(model(windows[:, :-1]), windows[:, 1:]) < 1

    monkeypatch.setattr(pretraining, "train", pytest.fail)
    for one, other in zip(leaves(model), leaves(pretrained(tmp_path)), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.slow
@pytest.mark.parametrize(
    "other",
    [
        {"options": dataclasses.replace(OPTIONS, pretrain_steps=41)},
        {"options": dataclasses.replace(OPTIONS, seed=1)},
        {"text": split("abc", "abd" * 300)},
        {"batch_size": 9},
    ],
)
def test_other_settings_or_text_train_again(tmp_path, monkeypatch, other):
    trained = []

    def train(chunk, state, data, **_):
        trained.append(data)
        return state

    monkeypatch.setattr(pretraining, "train", train)
    for inputs in ({}, other, {}):
        pretrained(tmp_path, **inputs)
    assert len(trained) == 2


def test_an_interrupted_pretraining_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(pretraining, "train", interrupt)
    with pytest.raises(KeyboardInterrupt):
        pretrained(tmp_path)
    assert list(tmp_path.iterdir()) == []
