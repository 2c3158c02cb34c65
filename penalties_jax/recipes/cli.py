"""The command `penalties-jax`: one subcommand for each recipe, and one for bug reports."""

import contextlib
import io
import sys
from collections.abc import Callable, Sequence
from itertools import dropwhile, takewhile
from typing import Any, NoReturn

import tyro

from penalties_jax.recipes.decompose import DecomposeConfig, decompose
from penalties_jax.recipes.devices import connect
from penalties_jax.recipes.doctor import DoctorConfig, doctor
from penalties_jax.recipes.files import PROGRAM, tell
from penalties_jax.recipes.finetune import FinetuneConfig, finetune
from penalties_jax.recipes.options import RunError, UsageError
from penalties_jax.recipes.sparsify import SparsifyConfig, sparsify
from penalties_jax.recipes.stopping import StoppedError, ignore_signals, stoppable

# Of the words of a command together.
MOST_CHARACTERS = 20_000
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
        SystemExit: With code 0 after `--help`; else with one line on standard error and code 2 for
            bad input, 1 for a run that failed, 130 after an interrupt (SIGINT), 143 after SIGTERM.
    """
    config = _parse(arguments)
    run = dict(RECIPES.values())[type(config)]
    try:
        connect()
        with stoppable():
            run(config)
    except UsageError as error:
        _fail(str(error))
    except RunError as error:
        _end(str(error), 1)
    except OSError as error:
        what = ": ".join(map(str, filter(None, (error.filename, error.strerror or error))))
        _end(f"{what}; what is saved is whole: mend it, and --resume continues this run", 1)
    except StoppedError as stopped:
        if arguments is None:
            ignore_signals()
        _end(f"stopped by {stopped}; --resume continues this run", 128 + stopped.number)


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
    _end(f"error: {message}", 2)


def _end(message: str, code: int) -> NoReturn:
    tell(message)
    sys.exit(code)


if __name__ == "__main__":
    main()
