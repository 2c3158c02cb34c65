import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from penalties_jax.recipes import text
from penalties_jax.recipes.options import UsageError


@pytest.mark.parametrize(
    ("corpus", "words"),
    [(text.help_topics, "the expression"), (text.standard_library, "def __init__(self")],
)
def test_default_corpora_are_real_and_the_same_each_time(corpus, words):
    first, second = corpus(), corpus()
    assert len(first.train) > 300_000
    assert words.encode() in first.train.tobytes()
    assert words.encode() in first.held_out.tobytes()
    assert first.describe() == second.describe()


def test_split_holds_out_the_last_tenth():
    corpus = text.split("numbers", "".join(map(str, range(1000))))
    joined = corpus.train.tobytes() + corpus.held_out.tobytes()
    assert joined.decode() == "".join(map(str, range(1000)))
    assert len(corpus.held_out) == len(joined) // 10


def test_standard_library_is_bounded():
    corpus = text.standard_library()
    assert len(corpus.train) + len(corpus.held_out) < 1.01 * text.LARGEST_CORPUS


def test_describe_tells_texts_of_one_name_apart():
    assert text.split("a", "x" * 50).describe() != text.split("a", "x" * 49 + "y").describe()


def test_sampled_windows_are_in_the_text_and_reach_both_ends():
    data = np.arange(20, dtype=np.uint8)
    windows = np.asarray(
        text.sample_windows(jax.numpy.asarray(data), jax.random.key(0), batch_size=500, length=5)
    )
    np.testing.assert_array_equal(windows, windows[:, :1] + np.arange(5))
    assert set(windows[:, 0]) == set(range(16))


def test_spread_windows_do_not_overlap():
    data = np.arange(100, dtype=np.uint8)
    windows = np.asarray(text.spread_windows(data, count=4, length=10))
    assert windows.shape == (4, 10)
    assert len(set(windows.ravel())) == windows.size
    assert windows[0, 0] == 0
    assert windows[-1, -1] == 99
    assert text.spread_windows(data, count=100, length=30).shape == (3, 30)
    between = np.asarray(text.windows_between(data, count=4, length=10))
    together = np.sort(np.concatenate([windows, between]), axis=0)
    np.testing.assert_array_equal(together, data[: len(together) * 10].reshape(-1, 10))
    assert text.windows_between(data, count=100, length=30).shape == (0, 30)


def test_rounds_read_every_window_in_turn():
    windows = np.arange(10).reshape(5, 2)
    rounds = text.Rounds(jnp.asarray(windows))
    read = [np.asarray(rounds(jnp.int32(index), 2)) for index in range(5)]
    np.testing.assert_array_equal(np.concatenate(read), np.tile(windows, (2, 1)))


def test_unigram_loss_of_uniform_bytes():
    corpus = text.Corpus("uniform", np.arange(256, dtype=np.uint8), np.arange(9, dtype=np.uint8))
    assert text.unigram_loss(corpus) == pytest.approx(np.log(256))


@pytest.mark.parametrize(
    ("content", "problem"),
    [(None, "can't read"), (b"", "is empty"), (b"ab\xff", r"not UTF-8 \(byte 2\)")],
)
def test_read_text_refuses(tmp_path, content, problem):
    path = tmp_path / "text"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=problem):
        text.read_text(path, text.help_topics)


def test_check_length_names_the_part_that_is_short():
    text.check_length(text.split("t", "x" * 100), batch_size=9, context=9)
    with pytest.raises(UsageError, match="training part has 90 bytes and needs 100"):
        text.check_length(text.split("t", "x" * 100), batch_size=10, context=9)
    with pytest.raises(UsageError, match="held-out part has 10 bytes and needs 11"):
        text.check_length(text.split("t", "x" * 100), batch_size=1, context=10)


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("/dev/zero", "not a regular file"),
        ("/dev/null", "not a regular file"),
        (".", "not a regular file"),
        ("x" * 256, "File name too long"),
        ("a\0b", "null"),
        ("a\ud800b", "surrogates not allowed"),
    ],
)
def test_read_text_opens_regular_files_only(path, problem):
    with pytest.raises(UsageError, match=f"can't read the text file .*{problem}"):
        text.read_text(Path(path), text.help_topics)


def test_read_text_waits_for_no_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match="not a regular file"):
        text.read_text(tmp_path / "pipe", text.help_topics)


def test_read_text_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "LARGEST_TEXT", 2_000_000)
    (tmp_path / "text").write_bytes(b"x" * 2_000_000)
    assert len(text.read_text(tmp_path / "text", text.help_topics).train) == 1_800_000
    (tmp_path / "text").write_bytes(b"x" * 2_000_001)
    with pytest.raises(UsageError, match="is larger than 2 MB"):
        text.read_text(tmp_path / "text", text.help_topics)


def test_read_text_keeps_every_byte(tmp_path):
    content = b"\xef\xbb\xbfone\r\ntwo\rthree\0four"
    (tmp_path / "text").write_bytes(content)
    corpus = text.read_text(tmp_path / "text", text.help_topics)
    assert corpus.train.tobytes() + corpus.held_out.tobytes() == content


def test_a_name_that_is_not_utf8_can_be_written(tmp_path):
    path = tmp_path / os.fsdecode(b"a\xff")
    path.write_bytes(b"words")
    assert text.read_text(path, text.help_topics).name == "a\\udcff"
