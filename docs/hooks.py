"""What MkDocs does not do by itself: pages from outside of docs/, tables, formulas as MathML."""

import html
import importlib
import inspect
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.structure.files import File
from nbconvert import MarkdownExporter
from nbconvert.preprocessors import CoalesceStreamsPreprocessor

import penalties_jax as pj

ROOT = Path(__file__).parent.parent
FORMULA = re.compile(
    r'<(?:span|div) class="arithmatex">\\(?P<kind>[(\[])(?P<latex>.*?)\\[)\]]</(?:span|div)>',
    flags=re.DOTALL,
)
TABLE = re.compile(r"^<!-- table: (?P<module>\S+) -->$", flags=re.MULTILINE)

# Pages that lie outside of docs/, and where links that hold in the repository lead to on the site.
PAGES = {
    "benchmarks/README.md": "benchmarks.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
}
LINKS = {**PAGES, "(docs/": "(", ".ipynb)": ".md)"}


def on_files(files, config):
    """Adds the notebooks with their outputs, and the pages that lie at the root."""

    def add(uri, content):
        if isinstance(content, str):
            for link, target in {**LINKS, "../docs/": "../" * uri.count("/")}.items():
                content = content.replace(link, target)
        files.append(File.generated(config, uri, content=content))

    for name, uri in PAGES.items():
        add(uri, (ROOT / name).read_text(encoding="utf-8"))
    exporter = MarkdownExporter(preprocessors=[CoalesceStreamsPreprocessor])
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        names = {"unique_key": path.stem, "output_files_dir": path.stem}
        page, extracted = exporter.from_filename(str(path), resources=names)
        add(f"notebooks/{path.stem}.md", page)
        for name, content in extracted["outputs"].items():
            add(f"notebooks/{name}", content)
    return files


def on_page_markdown(markdown, **_):
    """Tables of what is in a module."""
    return TABLE.sub(_table, markdown)


def _table(match):
    module = importlib.import_module(match["module"])
    configs = {name.lower(): name for name in pj.__all__ if isinstance(getattr(pj, name), type)}
    columns = {"function": [], "config": [], "what it is": [], "proximal operator": []}
    for name, function in vars(module).items():
        if name not in pj.functional.__all__ or not inspect.isfunction(function):
            continue
        if function.__module__ != module.__name__ or name.startswith("prox_"):
            continue
        config = configs.get(name.removesuffix("_loss").replace("_", ""))
        cells = (
            f"`pj.{name}`",
            config and f"`pj.{config}`",
            inspect.getdoc(function).partition("\n\n")[0].replace("\n", " "),
            hasattr(pj.functional, f"prox_{name}") and "yes",
        )
        for column, cell in zip(columns.values(), cells, strict=True):
            column.append(cell or "")
    columns = {header: column for header, column in columns.items() if any(column)}
    rows = [columns, ["---"] * len(columns), *zip(*columns.values(), strict=True)]
    return "\n".join(f"| {' | '.join(map(_cell, row))} |" for row in rows)


def _cell(text):
    """Bars of a formula, and others, that don't end the cell."""
    parts = text.split("$")
    parts[::2] = [part.replace("|", r"\|") for part in parts[::2]]
    parts[1::2] = [part.replace("|", r"{\vert}") for part in parts[1::2]]
    return "$".join(parts)


def on_page_content(content, **_):
    """Formulas that every browser shows without a script."""
    return FORMULA.sub(_mathml, content)


def _mathml(match):
    display = "block" if match["kind"] == "[" else "inline"
    latex = html.unescape(match["latex"]).replace(r"\arg\min", r"\text{arg min}")
    return convert(latex, display=display)
