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
    "SECURITY.md": "security.md",
}
LINKS = {f"{path})": f"{uri})" for path, uri in PAGES.items()} | {"(docs/": "(", ".ipynb)": ".md)"}


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
    functions = {
        name: value
        for name, value in vars(module).items()
        if name in module.__all__ and inspect.isfunction(value) and not name.startswith("prox_")
    }
    configs = {name.lower(): name for name in pj.__all__ if isinstance(getattr(pj, name), type)}
    names = [configs.get(name.removesuffix("_loss").replace("_", "")) for name in functions]
    operators = [f"prox_{name}" in module.__all__ for name in functions]
    columns = {
        "function": [_link(name) for name in functions],
        "config": [name and _link(name) for name in names],
        "what it is": [_summary(function) for function in functions.values()],
        "proximal operator": [present and "yes" for present in operators],
    }
    columns = {header: column for header, column in columns.items() if any(column)}
    rows = [columns, ["---"] * len(columns), *zip(*columns.values(), strict=True)]
    return "\n".join(f"| {' | '.join(cell or '' for cell in row)} |" for row in rows)


def _link(name):
    """To its entry in the reference."""
    return f"[`pj.{name}`][{getattr(pj, name).__module__}.{name}]"


def _summary(function):
    """The first line of its docstring, with bars that don't end a cell of a table."""
    parts = inspect.getdoc(function).partition("\n\n")[0].replace("\n", " ").split("$")
    parts[::2] = [text.replace("|", r"\|") for text in parts[::2]]
    parts[1::2] = [formula.replace("|", r"{\vert}") for formula in parts[1::2]]
    return "$".join(parts)


def on_page_content(content, **_):
    """Formulas that every browser shows without a script."""
    return FORMULA.sub(_mathml, content)


def _mathml(match):
    display = "block" if match["kind"] == "[" else "inline"
    latex = html.unescape(match["latex"]).replace(r"\arg\min", r"\text{arg min}")
    return convert(latex, display=display)
