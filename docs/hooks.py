"""What MkDocs does not do by itself: pages from outside of docs/, and formulas as MathML."""

import html
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.structure.files import File
from nbconvert import MarkdownExporter
from nbconvert.preprocessors import CoalesceStreamsPreprocessor

ROOT = Path(__file__).parent.parent
FORMULA = re.compile(
    r'<(?:span|div) class="arithmatex">\\(?P<kind>[(\[])(?P<latex>.*?)\\[)\]]</(?:span|div)>',
    flags=re.DOTALL,
)


# Where links that hold in the repository lead to on the site.
LINKS = {
    "../docs/": "",
    "(docs/": "(",
    "benchmarks/README.md": "benchmarks.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "README.md": "readme.md",
    ".ipynb)": ".md)",
}


def on_files(files, config):
    """Adds the notebooks with their outputs, and the pages that lie at the root."""

    def add(uri, content):
        if isinstance(content, str):
            for link, target in LINKS.items():
                content = content.replace(link, target)
        files.append(File.generated(config, uri, content=content))

    for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md"):
        add(LINKS[name], (ROOT / name).read_text(encoding="utf-8"))
    exporter = MarkdownExporter(preprocessors=[CoalesceStreamsPreprocessor])
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        names = {"unique_key": path.stem, "output_files_dir": path.stem}
        page, extracted = exporter.from_filename(str(path), resources=names)
        add(f"notebooks/{path.stem}.md", page)
        for name, content in extracted["outputs"].items():
            add(f"notebooks/{name}", content)
    return files


def on_page_content(content, **_):
    """Formulas that every browser shows without a script."""
    return FORMULA.sub(_mathml, content)


def _mathml(match):
    display = "block" if match["kind"] == "[" else "inline"
    latex = html.unescape(match["latex"]).replace(r"\arg\min", r"\text{arg min}")
    return convert(latex, display=display)
