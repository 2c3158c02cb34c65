"""What a run ends with: images, a self-contained HTML report, and a table on the terminal."""

import base64
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jinja2

from penalties_jax.recipes.runs import REPORT, Run, append_log, write_file

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


def write_results(run: Run, results: Sequence[Any], report: Report) -> None:
    """Log the results, NamedTuples, and write the images, the report and the table.

    The report is one HTML file that holds everything it shows, images included. It is written last.
    """
    step = run.settings["steps"]
    append_log(run.folder, [{"kind": "evaluation", "step": step, **r._asdict()} for r in results])
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
        results=report.table,
        images=report.images,
        settings=(("option", "value"), [[name, str(v)] for name, v in run.settings.items()]),
    )
    write_file(run.folder / REPORT, page)
    print(format_table(*report.table))
    print(f"{report.units}; report: {run.folder / REPORT}")


def format_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay a table out in columns, aligned right."""
    widths = [max(map(len, column)) for column in zip(headers, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        return "  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))

    return "\n".join([line(headers), line(["-" * width for width in widths]), *map(line, rows)])
