import subprocess
import sys

import pytest

from penalties_jax.recipes.cli import main


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--help"], ["finetune", "sparsify"]),
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
