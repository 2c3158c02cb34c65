"""The command line and texts: a run may begin, or one line says why not, and nothing is written."""

import contextlib
import dataclasses
import io
import os
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penalties_jax.recipes import text
from penalties_jax.recipes.cli import RECIPES, main
from penalties_jax.recipes.decompose import job as decompose_job
from penalties_jax.recipes.finetune import job as finetune_job
from penalties_jax.recipes.options import Options, UsageError, flag
from penalties_jax.recipes.sparsify import job as sparsify_job
from tests.reliability.attacks import HARD, examples

TRAINS = (
    (finetune_job, "pretrained"),
    (sparsify_job, "pretrained"),
    (decompose_job, "pretrained"),
    (decompose_job, "train_toy_model"),
)
CONFIGS = {name: kind for name, (kind, _) in RECIPES.items() if issubclass(kind, Options)}
LIMIT = 5


class BegunError(Exception):
    """Every check was passed: what trains was called."""


def files(folder):
    """What paths may lead to, in a folder that is the working directory of `outcome`."""
    (folder / "good").write_text("some words of a text\n" * 20_000)
    (folder / "short").write_text("not enough")
    (folder / "empty").touch()
    (folder / "binary").write_bytes(bytes(range(256)) * 100)
    (folder / "surrogates").write_bytes(b"\xed\xa0\x80" * 10_000)
    with open(folder / "huge", "wb") as file:
        file.truncate(10**12)
    (folder / "folder").mkdir()
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "dangling").symlink_to(folder / "nowhere" / "below")
    os.mkfifo(folder / "pipe")


def outcome(arguments):
    """Runs the command up to where it would train: None if it would, else the line it ends with."""
    begin = time.monotonic()
    out, errors = io.StringIO(), io.StringIO()
    with (
        tempfile.TemporaryDirectory() as folder,
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(errors),
    ):
        files(Path(folder))
        before = sorted(os.listdir(folder))
        patch.chdir(folder)
        for module, name in TRAINS:
            patch.setattr(module, name, _begin)
        code = "returned"
        try:
            main(arguments)
        except BegunError:
            code = "begun"
        except SystemExit as stop:
            code = stop.code
        after = sorted(os.listdir(folder))
    assert time.monotonic() - begin < LIMIT
    if code == "begun":
        return None
    if not code and ("-h" in arguments or "--help" in arguments):
        return None
    line = errors.getvalue()
    assert code == 2
    assert not out.getvalue()
    assert line.startswith("penalties-jax: error: ")
    assert line.endswith("\n")
    assert line[:-1].isprintable()
    assert len(line) < 1000
    assert after == before
    return line


def _begin(*args, **kwargs):
    raise BegunError


FAR = [str(2**31), str(2**32), str(2**63), "9" * 30, "9" * 4300, "9" * 5000]
BAD_WHOLE = ["-1", "1.5", "nan", "inf", "x", "\0", "\ud800", "0x10", *FAR[1:]]
BAD_NUMBER = ["-1", "nan", "inf", "-inf", "1e999", "1e39", "9" * 5000, "x", "\0"]
BAD_FOLDER = [
    *(
        "good",
        "good/below",
        "loop",
        "loop/below",
        "dangling",
        "/dev/null",
        "/dev/null/x",
        "/proc/x",
    ),
    *("", "a\0b", "a\ud800b", "a\udcffb", "x" * 256, "x" * 5000, "/".join(["y" * 200] * 30)),
    "new/" + "x" * 256,
    # It fits, and a checkpoint below would not.
    "/".join(["y" * 200] * 20),
]
BAD_TEXT = [
    *("missing", "folder", "loop", "dangling", "pipe", "/dev/zero", "/dev/null", "/dev/tty"),
    *("short", "empty", "binary", "surrogates", "huge"),
    *("", "a\0b", "a\ud800b", "x" * 256, "x" * 5000),
]
TOO_LARGE = [
    ("width", "1000000"),
    ("width", "2147483644"),
    ("context", "1000000000"),
    ("batch-size", "100000000"),
    ("layers", "1000000"),
]
OF_ONE = {
    "finetune": [
        *("--rank 1000000000", "--pretrain-batch-size 100000000", "--on x", "--kl-weights"),
        *("--evaluation-windows 1000000000000", "--kl-weights 0 -0.0"),
        "--kl-weights " + " ".join(map(str, range(100_000))),
    ],
    "sparsify": [
        *("--targets", "--targets 1.1", "--kind x", "--sparsity-weight 1e-40"),
        *("--evaluation-windows 1000000000000", "--warmup-fraction 2"),
    ],
    "decompose": [
        *("--seeds 1000000000", f"--seed {2**32 - 1} --seeds 2", "--components 1000000000"),
        *("--gamma-final 1e-300", "--threshold 1", "--target x", "--target lm --seeds 100000"),
        *("--target tms --features 1000000000", "--target tms --hidden 1000000000"),
        "--target tms --batch-size 100000000",
    ],
}
OF_NONE = [
    *([], [""], ["\0"], ["\ud800"], ["unknown"], ["x" * 10**6], ["finetune", *["x"] * 10**6]),
    *(["finetune", "--unknown"], ["finetune", "--a\nb\x1b[31m"], ["finetune", "--steps"]),
]


def grid(kind):
    """Options of a job, each with every value that it can't have."""
    types = {field.name: str(field.type) for field in dataclasses.fields(kind)}
    whole = [name for name, type_ in types.items() if "int" in type_]
    real = [name for name, type_ in types.items() if "float" in type_]
    texts = [name for name in types if name.endswith("text")]
    pairs = (whole, BAD_WHOLE), (real, BAD_NUMBER), (texts, BAD_TEXT), (["out"], BAD_FOLDER)
    for names, values in pairs:
        assert names
        yield from ([flag(name), value] for name in names for value in values)


@pytest.mark.parametrize("job", CONFIGS)
def test_what_cannot_be_run_is_one_line(job):
    """All of the grid where hard is tried, else some, by a prime, so evenly."""
    tried = list(grid(CONFIGS[job]))[:: 1 if HARD else 7]
    tried += [[f"--{name}", value] for name, value in TOO_LARGE]
    tried += [options.split(" ") for options in OF_ONE[job]]
    begun = [words for words in tried if outcome([job, *words]) is None]
    assert not begun


def test_what_is_no_command_is_one_line():
    assert not [words for words in OF_NONE if outcome(words) is None]


ODD = st.text(st.characters(), max_size=20).map(lambda word: word.replace("/", "_"))
NUMBERS = st.one_of(
    st.sampled_from([*FAR, *BAD_WHOLE, *BAD_NUMBER]),
    st.integers(1, 100).map(str),
    st.integers().map(str),
    st.floats().map(repr),
)
PATHS = st.one_of(st.sampled_from([*BAD_TEXT, "good"]), ODD)
# Never one that leads out of the folder that the test runs in.
FOLDERS = st.one_of(st.sampled_from([*BAD_FOLDER, "new"]), ODD.map(lambda word: f"x{word}"))


@st.composite
def commands(draw):
    job, kind = draw(st.sampled_from(sorted(CONFIGS.items())))
    words = [job]
    for field in draw(st.lists(st.sampled_from(dataclasses.fields(kind)), max_size=5)):
        words.append(flag(field.name))
        if field.name == "out":
            words.append(draw(FOLDERS))
        elif "Path" in str(field.type):
            words.append(draw(PATHS))
        elif "tuple" in str(field.type):
            words.extend(draw(st.lists(NUMBERS, max_size=4)))
        elif "bool" not in str(field.type):
            words.append(draw(st.one_of(NUMBERS, st.sampled_from(["lm", "tms", "probs", "l1"]))))
    return words + draw(st.lists(ODD, max_size=1))


@examples(little=60, hard=1_000)
@given(commands())
def test_any_command_begins_or_is_one_line(words):
    outcome(words)


CONTENTS = st.one_of(
    st.binary(max_size=200),
    st.text(max_size=100).map(lambda words: words.encode("utf-8")),
    st.lists(
        st.sampled_from(
            [
                *(b"\xef\xbb\xbf", b"\0", b"\r\n", b"\r", b"words", "\u2028\U0010ffff".encode()),
                *(b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xc3"),
            ]
        ),
        max_size=20,
    ).map(b"".join),
)


@examples(little=60, hard=1_000)
@given(CONTENTS)
def test_any_file_is_its_bytes_or_is_refused(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "fuzzed"
    path.write_bytes(content)
    try:
        content.decode("utf-8")
        valid = bool(content)
    except UnicodeDecodeError:
        valid = False
    if valid:
        corpus = text.read_text(path, text.help_topics)
        assert corpus.train.tobytes() + corpus.held_out.tobytes() == content
    else:
        with pytest.raises(UsageError, match=r"is empty|is not UTF-8"):
            text.read_text(path, text.help_topics)


@pytest.mark.parametrize("job", CONFIGS)
def test_names_that_are_odd_and_fine(job):
    for out in ("new", "a b", "a?b#c%20", "-.-", "é", "a\nb", "x" * 255):
        assert outcome([job, f"--out={out}"]) is None
    assert "must be at most" in outcome([job, "--steps", str(2**31)])
    assert "GB: lower --width" in outcome([job, "--width", "200000"])
