"""A self-contained HTML report, and the same tables for the terminal."""

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jinja2

from penalties_jax.recipes.runs import write_file

Table = tuple[Sequence[str], Sequence[Sequence[str]]]


class Section(NamedTuple):
    """A part of a report.

    Attributes:
        heading: Its title.
        text: A paragraph that says how to read it.
        table: Column headers and rows of cells.
        image: A PNG.
    """

    heading: str
    text: str
    table: Table | None = None
    image: bytes | None = None


def write_report(path: Path, *, title: str, sections: Sequence[Section]) -> None:
    """Write one HTML file that holds everything it shows, images included."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("penalties_jax.recipes", ""),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["base64"] = lambda data: base64.b64encode(data).decode("ascii")
    template = environment.get_template("report.html.jinja")
    write_file(path, template.render(title=title, sections=sections))


def format_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay a table out in columns, aligned right."""
    widths = [max(map(len, column)) for column in zip(headers, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        return "  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))

    return "\n".join([line(headers), line(["-" * width for width in widths]), *map(line, rows)])
