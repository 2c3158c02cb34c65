"""The command `penalties-jax`: one subcommand for each recipe, and one for bug reports."""

import contextlib
import io
import sys
from collections.abc import Callable, Sequence
from itertools import dropwhile, takewhile
from typing import Any, NoReturn

import tyro

from penalties_jax.recipes.decompose import DecomposeConfig, decompose
from penalties_jax.recipes.doctor import DoctorConfig, doctor
from penalties_jax.recipes.finetune import FinetuneConfig, finetune
from penalties_jax.recipes.options import UsageError
from penalties_jax.recipes.sparsify import SparsifyConfig, sparsify

PROGRAM = "penalties-jax"
# Of the words of a command together, and of a line that says what is wrong with them.
MOST_CHARACTERS = 20_000
LONGEST_LINE = 600
RECIPES: dict[str, tuple[type, Callable[[Any], Any]]] = {
    "decompose": (DecomposeConfig, decompose),
    "doctor": (DoctorConfig, doctor),
    "finetune": (FinetuneConfig, finetune),
    "sparsify": (SparsifyConfig, sparsify),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the recipe that the command line asks for.

    Args:
        arguments: The words after the program's name; by default those of this process.

    Raises:
        SystemExit: With code 0 after `--help`, 2 and one line on standard error for bad input,
            130 after an interrupt.
    """
    config = _parse(arguments)
    run = dict(RECIPES.values())[type(config)]
    try:
        run(config)
    except UsageError as error:
        _fail(str(error))
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted; --resume continues this run", file=sys.stderr)
        sys.exit(130)


def _parse(arguments: Sequence[str] | None) -> Any:
    arguments = sys.argv[1:] if arguments is None else arguments
    # What no option takes, but a path would: the folder that one happens to be in.
    if "" in arguments:
        _fail("a word of the command is empty")
    if (length := sum(map(len, arguments))) > MOST_CHARACTERS:
        _fail(f"the command has {length} characters, and may have {MOST_CHARACTERS}")
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.extras.subcommand_cli_from_dict(
                {name: kind for name, (kind, _) in RECIPES.items()},
                prog=PROGRAM,
                description="Train with penalties: jobs with plots and a report.",
                args=arguments,
                config=(tyro.conf.FlagCreatePairsOff,),
            )
    except SystemExit as error:
        if error.code:
            _fail(f"{_first_paragraph(errors.getvalue())} (--help lists what there is)")
        raise


def _first_paragraph(box: str) -> str:
    """Return the text of tyro's error box up to its first rule, on one line.

    Under its title; tyro draws it in Unicode, or in ASCII where standard output has no other.
    """
    lines = [line.strip("│ ") for line in box.splitlines()[1:]]
    return " ".join(takewhile(_is_text, dropwhile(lambda line: not _is_text(line), lines)))


def _is_text(line: str) -> bool:
    return not set(line) <= set("╰─╯-")


def _fail(message: str) -> NoReturn:
    """Say what is wrong, on one line, whatever was typed: escaped, and cut in the middle."""
    words = " ".join(message.split())
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in words)
    if len(line) > LONGEST_LINE:
        line = f"{line[: LONGEST_LINE // 2]} ... {line[-LONGEST_LINE // 2 :]}"
    print(f"{PROGRAM}: error: {line}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
