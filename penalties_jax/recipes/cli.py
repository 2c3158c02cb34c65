"""The command `penalties-jax`: one subcommand for each recipe."""

import contextlib
import io
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import tyro

from penalties_jax.recipes.decompose import DecomposeConfig, decompose
from penalties_jax.recipes.finetune import FinetuneConfig, finetune
from penalties_jax.recipes.options import UsageError
from penalties_jax.recipes.sparsify import SparsifyConfig, sparsify

PROGRAM = "penalties-jax"
RECIPES: dict[str, tuple[type, Callable[[Any], Any]]] = {
    "decompose": (DecomposeConfig, decompose),
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
    """Return the text of tyro's error box up to its first rule, on one line."""
    lines = (line.strip("│ ") for line in box.splitlines()[1:])
    words = []
    for line in lines:
        if line.startswith(("─", "╰")):
            break
        words.append(line)
    return " ".join(words)


def _fail(message: str) -> NoReturn:
    print(f"{PROGRAM}: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
