import io
import re
import subprocess
import sys

import pytest

from penalties_jax.recipes.cli import main


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--help"], ["decompose", "doctor", "finetune", "sparsify"]),
        (["sparsify", "--help"], ["--targets", "--kind", "--resume", "--out"]),
        (
            ["finetune", "--help"],
            ["--kl-weights", "--resume", "--overwrite", "--base-text", "--on", "--out"],
        ),
    ],
)
def test_help(capsys, arguments, words):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert not stop.value.code
    printed = capsys.readouterr().out
    for word in words:
        assert word in printed


@pytest.mark.parametrize("arguments", [[], ["unknown"]])
def test_a_missing_or_unknown_recipe_is_one_line(capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_the_module_is_a_program():
    done = subprocess.run(
        [sys.executable, "-m", "penalties_jax.recipes.cli", "finetune", "--steps", "0"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == "penalties-jax: error: --steps must be a finite number above 0, not 0\n"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["finetune", "--out", ""], "a word of the command is empty"),
        (["x" * 20_001], "the command has 20001 characters, and may have 20000"),
        (["finetune", "--base-text", "\x1b[31m\n\0"], r".*\\x1b\[31m \\x00.*"),
        (["decompose", "--text", "x" * 10_000], "can't read the text file x* ... x*: File name .*"),
    ],
)
def test_one_line_whatever_was_typed(capsys, arguments, line):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    printed = capsys.readouterr().err
    assert re.fullmatch(f"penalties-jax: error: {line}\n", printed)
    assert len(printed) < 700


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
def test_what_tyro_refuses_is_one_paragraph(capsys, monkeypatch, encoding):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding))
    with pytest.raises(SystemExit):
        main(["finetune", "--steps", "x"])
    assert capsys.readouterr().err == (
        "penalties-jax: error: Error parsing --steps: invalid literal for int() with base 10: 'x' "
        "(--help lists what there is)\n"
    )
