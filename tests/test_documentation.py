"""The Python examples of the README and of the documentation run as they stand."""

import ast
import importlib.util
import inspect
import json
import re
from functools import reduce
from pathlib import Path

import optax
import pytest

import penalties_jax as pj

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^```python\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)
# Of extras, or of others: nothing that the examples of this library itself need.
OPTIONAL = {"equinox", "keras", "qwix", "tensorboardX", "torch", "tunix", "wandb"}


def examples(path):
    return BLOCK.findall(path.read_text(encoding="utf-8"))


README = examples(ROOT / "README.md")
CONTRIBUTING = examples(ROOT / "CONTRIBUTING.md")
PAGES = {str(path.relative_to(ROOT)): examples(path) for path in sorted(ROOT.glob("docs/**/*.md"))}


def imported(example):
    for node in ast.walk(ast.parse(example)):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.partition(".")[0]


def missing(example):
    """What an example needs that is of an extra, and not there."""
    return [x for x in OPTIONAL & set(imported(example)) if importlib.util.find_spec(x) is None]


def run(example, name, namespace):
    exec(compile(example, name, "exec"), namespace)


def test_readme_is_short_and_begins_with_an_example():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 200
    assert lines.index("```python") < 20
    assert len(README) == 2


@pytest.mark.parametrize("example", README)
def test_readme_example_runs(example, capsys):
    if lacking := missing(example):
        pytest.skip(f"the example needs {lacking}")
    run(example, "README.md", {"__name__": "__main__"})
    assert capsys.readouterr().out.strip()


def test_a_first_penalty_takes_less_than_ten_lines():
    assert len([line for line in README[0].splitlines() if line]) < 10


@pytest.mark.parametrize("page", [page for page, found in PAGES.items() if found])
def test_page_runs_from_top_to_bottom(page, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    found = [example for example in PAGES[page] if not missing(example)]
    if not found:
        pytest.skip(f"all examples need {missing(PAGES[page][0])}")
    for example in found:
        run(example, page, namespace)
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize(
    "page",
    ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "benchmarks/README.md", *PAGES],
)
def test_names_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    modules = {"pj": pj, "penalties_jax": pj, "optax": optax}
    for name, path in set(
        re.findall(r"\b(pj|penalties_jax|optax)((?:\.(?!md\b)[a-zA-Z]\w*)+)", text)
    ):
        reduce(getattr, path[1:].split("."), modules[name])


@pytest.mark.parametrize("page", ["README.md", *PAGES])
def test_no_example_is_passed_over(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert set(re.findall(r"^\s*```(\S+)", text, re.MULTILINE)) <= {"python", "sh"}
    assert not re.search(r"^[ \t]+```", text, re.MULTILINE), "an indented fence"


def test_every_public_name_is_in_the_reference():
    pages = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("docs/reference/*.md"))
    modules = set(re.findall(r"^::: (\S+)$", pages, re.MULTILINE))
    assert {"penalties_jax.nnx", "penalties_jax.linen"} <= modules
    public = {name: getattr(pj, name) for name in pj.__all__ if name != "functional"}
    assert {name: x for name, x in public.items() if x.__module__ not in modules} == {}


def test_every_public_name_has_an_example_in_a_guide_or_a_notebook():
    notebooks = (json.loads(path.read_text("utf-8")) for path in ROOT.glob("notebooks/*.ipynb"))
    cells = [cell for notebook in notebooks for cell in notebook["cells"]]
    examples = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    examples += [example for found in (README, *PAGES.values()) for example in found]
    shown = "\n".join(examples)
    rooms = {"": pj, ".nnx": pj.nnx, ".linen": pj.linen}
    rooms |= {f".adapters.{x}": getattr(pj.adapters, x) for x in ("datum", "tinker", "keras")}
    public = [f"pj{room}.{name}" for room, x in rooms.items() for name in all_of(x)]
    public.remove("pj.functional")
    assert [name for name in public if not re.search(rf"\b{re.escape(name)}\b", shown)] == []


def all_of(module):
    """Its public names: what it lists, or the functions that it defines."""
    functions = inspect.getmembers(module, inspect.isfunction)
    own = [name for name, x in functions if x.__module__ == module.__name__ and name[0] != "_"]
    return getattr(module, "__all__", own)


def test_walk_throughs_show_the_code_as_it_is():
    paths = [
        path for folder in ("penalties_jax", "tests") for path in ROOT.glob(f"{folder}/**/*.py")
    ]
    lines = {line.strip() for path in paths for line in path.read_text("utf-8").splitlines()}
    shown = [line.strip() for example in CONTRIBUTING for line in example.splitlines()]
    assert [line for line in shown if line not in lines | {"..."}] == []
