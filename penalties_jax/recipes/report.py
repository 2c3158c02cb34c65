"""What a run ends with: images, a self-contained HTML report, and a table on the terminal."""

import base64
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jinja2

from penalties_jax.recipes.devices import is_main
from penalties_jax.recipes.files import tell, write_file
from penalties_jax.recipes.options import RunError, flag
from penalties_jax.recipes.runs import REPORT, Run
from penalties_jax.recipes.stopping import stop_if_asked
from penalties_jax.recipes.training import Trained

Table = tuple[Sequence[str], Sequence[Sequence[str]]]


class Report(NamedTuple):
    """What a job has to show of its results; the words are in its template.

    The table, and a line with its units, are for the terminal too; `values` is what else the
    template asks for.
    """

    template: str
    table: Table
    units: str
    images: Mapping[str, bytes]
    values: Mapping[str, Any]


def write_results(
    run: Run, trained: Trained, results: Sequence[Any], report: Report, cause: str
) -> None:
    """Log the results, NamedTuples, and write the images, the report and the table.

    A field that is None is not logged.
    The report is one HTML file that holds everything it shows, images included. It is written last.

    Raises:
        RunError: If every member has diverged, by what is the likely cause.
        StoppedError: If a signal asked for it before anything was written.
    """
    stop_if_asked()
    diverged = {i: trained.step for i, result in enumerate(results) if not _is_finite(result)}
    diverged |= trained.diverged
    trained.log.append(
        {"kind": "evaluation", "step": trained.step, **_fields(result)}
        | ({"diverged": diverged[i]} if i in diverged else {})
        for i, result in enumerate(results)
    )
    table = _with_steps(report.table, diverged)
    advice = f"{len(diverged)} of {len(results)} members diverged: {cause}" if diverged else ""
    if is_main():
        _write(run, table, report, advice)
        print(format_table(*table))
        print(f"{report.units}; report: {run.folder / REPORT}")
    if len(diverged) == len(results):
        raise RunError(advice)
    if diverged:
        tell(advice)


def _fields(result: Any) -> dict[str, Any]:
    return {name: value for name, value in result._asdict().items() if value is not None}


def _is_finite(result: Sequence[Any]) -> bool:
    return all(math.isfinite(value) for value in result if isinstance(value, float))


def _write(run: Run, table: Table, report: Report, advice: str) -> None:
    for name, png in report.images.items():
        write_file(run.folder / name, png)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("penalties_jax.recipes", ""),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["base64"] = lambda data: base64.b64encode(data).decode("ascii")
    page = environment.get_template(report.template).render(
        report.values,
        results=table,
        advice=advice,
        images=report.images,
        settings=(("option", "value"), [[name, str(v)] for name, v in run.settings.items()]),
    )
    write_file(run.folder / REPORT, page)


def _with_steps(table: Table, diverged: Mapping[int, int]) -> Table:
    """Add a column that says which member has diverged, and when, if any has."""
    headers, rows = table
    if not diverged:
        return table
    ends = [f"by step {diverged[i]}" if i in diverged else "" for i in range(len(rows))]
    return (*headers, "diverged"), [[*row, end] for row, end in zip(rows, ends, strict=True)]


def likely_cause(
    config: Any,
    usual: Any,
    names: Sequence[str],
    swept: Sequence[Mapping[str, float]],
    diverged: Collection[int],
) -> str:
    """Return which option most likely had members diverge, and what to do.

    An option that they have more of than all the others, else the one that is furthest above what
    is usual.

    Args:
        config: The options as they were.
        usual: What they are by default.
        names: The options that may be the cause, first those that it is more often.
        swept: The values in which members differ, by option.
        diverged: The numbers of the members that have diverged.
    """

    def most(name: str, members: Iterable[int]) -> float:
        return max((swept[i][name] for i in members if name in swept[i]), default=-math.inf)

    others = set(range(len(swept))) - set(diverged)
    for name in names:
        if others and all(swept[i].get(name, -math.inf) > most(name, others) for i in diverged):
            return f"lower {flag(name)}"

    def excess(name: str) -> float:
        # A weight that is 0 by default is beside a loss of weight 1.
        return _largest(getattr(config, name)) / (_largest(getattr(usual, name)) or 1.0)

    return f"lower {flag(max(names, key=excess))}"


def _largest(value: float | Sequence[float]) -> float:
    return max(value) if isinstance(value, Sequence) else value


def format_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay a table out in columns, aligned right."""
    widths = [max(map(len, column)) for column in zip(headers, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        return "  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))

    return "\n".join([line(headers), line(["-" * width for width in widths]), *map(line, rows)])
