"""What MkDocs does not do by itself: pages from outside of docs/, and formulas as MathML."""

import html
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.structure.files import File
from nbconvert import MarkdownExporter

ROOT = Path(__file__).parent.parent
FORMULA = re.compile(
    r'<(?:span|div) class="arithmatex">\\(?P<kind>[(\[])(?P<latex>.*?)\\[)\]]</(?:span|div)>',
    flags=re.DOTALL,
)


def on_files(files, config):
    """Adds the notebooks with their outputs, the benchmarks, and the changelog."""

    def add(uri, content):
        files.append(File.generated(config, uri, content=content))

    benchmarks = (ROOT / "benchmarks/README.md").read_text(encoding="utf-8")
    add("benchmarks.md", benchmarks.replace("../docs/", ""))
    add("changelog.md", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"))
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        names = {"unique_key": path.stem, "output_files_dir": path.stem}
        page, extracted = MarkdownExporter().from_filename(str(path), resources=names)
        page = page.replace(".ipynb)", ".md)").replace("benchmarks/README.md", "benchmarks.md")
        add(f"notebooks/{path.stem}.md", page)
        for name, content in extracted["outputs"].items():
            add(f"notebooks/{name}", content)
    return files


def on_page_content(content, **_):
    """Formulas that every browser shows without a script."""
    return FORMULA.sub(_mathml, content)


def _mathml(match):
    display = "block" if match["kind"] == "[" else "inline"
    return convert(html.unescape(match["latex"]), display=display)
