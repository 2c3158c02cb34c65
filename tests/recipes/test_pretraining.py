import jax
import numpy as np
import pytest
from flax import nnx

from penalties_jax.recipes import pretraining
from penalties_jax.recipes.text import split

SETTINGS = pretraining.Pretraining(
    seed=0, width=8, layers=1, heads=2, context=8, steps=40, batch_size=8, learning_rate=0.03
)
TEXT = split("abc", "abc" * 300)


def leaves(model):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(model))]


@pytest.mark.slow
def test_pretraining_learns_and_its_checkpoint_is_reused(tmp_path, monkeypatch):
    model = pretraining.pretrained_model(SETTINGS, TEXT, tmp_path)
    windows = np.frombuffer(b"abcabcabc", np.uint8)[None].astype(int)
    assert pretraining.mean_loss(model(windows[:, :-1]), windows[:, 1:]) < 1

    monkeypatch.setattr(pretraining, "_train", pytest.fail)
    again = pretraining.pretrained_model(SETTINGS, TEXT, tmp_path)
    for one, other in zip(leaves(model), leaves(again), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (SETTINGS._replace(steps=41), TEXT),
        (SETTINGS._replace(seed=1), TEXT),
        (SETTINGS, split("abc", "abd" * 300)),
    ],
)
def test_other_settings_or_text_train_again(tmp_path, monkeypatch, settings, text):
    trained = []

    def train(graph, parameters, *inputs):
        trained.append(inputs)
        return parameters

    monkeypatch.setattr(pretraining, "_train", train)
    for inputs in ((SETTINGS, TEXT), (settings, text), (SETTINGS, TEXT)):
        pretraining.pretrained_model(*inputs, tmp_path)
    assert trained == [(SETTINGS, TEXT), (settings, text)]


def test_an_interrupted_pretraining_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(pretraining, "_train", interrupt)
    with pytest.raises(KeyboardInterrupt):
        pretraining.pretrained_model(SETTINGS, TEXT, tmp_path)
    assert list(tmp_path.iterdir()) == []
