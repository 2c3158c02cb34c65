import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from penalties_jax.recipes import pretraining, training
from penalties_jax.recipes.language_model import LanguageModel, mean_loss
from penalties_jax.recipes.options import Options, RunError
from penalties_jax.recipes.text import split
from penalties_jax.recipes.training import Trained

OPTIONS = Options(
    seed=0, width=8, layers=1, heads=2, context=8, pretrain_steps=40, pretrain_learning_rate=0.03
)
TEXT = split("abc", "abc" * 300)


def pretrained(folder, options=OPTIONS, text=TEXT, batch_size=8):
    options = dataclasses.replace(options, out=folder)
    return pretraining.pretrained(LanguageModel, options, text, batch_size=batch_size)


def leaves(model):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(model))]


@pytest.mark.slow
def test_pretraining_learns_and_its_checkpoint_is_reused(tmp_path, monkeypatch):
    model = pretrained(tmp_path)
    windows = np.frombuffer(b"abcabcabc", np.uint8)[None].astype(int)
    assert mean_loss(model(windows[:, :-1]), windows[:, 1:]) < 1

    monkeypatch.setattr(training, "compile_chunk", lambda step: pytest.fail)
    for one, other in zip(leaves(model), leaves(pretrained(tmp_path)), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    "other",
    [
        {"options": dataclasses.replace(OPTIONS, pretrain_steps=41)},
        {"options": dataclasses.replace(OPTIONS, seed=1)},
        {"text": split("abc", "abd" * 300)},
        {"batch_size": 9},
        {"options": dataclasses.replace(OPTIONS, pretrain_learning_rate=0.02)},
    ],
)
def test_other_settings_or_text_have_a_folder_of_their_own(tmp_path, monkeypatch, other):
    started = []

    def train(run, step, state, data, *, members, **_):
        """As if it had been done."""
        started.append(run.folder)
        return Trained(state, 0, None, {})

    monkeypatch.setattr(pretraining, "train", train)
    for inputs in ({}, other, {}):
        pretrained(tmp_path, **inputs)
    assert started[0] == started[2] != started[1]


def test_a_model_that_diverges_is_one_line(tmp_path):
    options = dataclasses.replace(OPTIONS, pretrain_learning_rate=1e38)
    for _ in range(2):
        with pytest.raises(RunError, match="diverged: lower --pretrain-learning-rate"):
            pretrained(tmp_path, options)
