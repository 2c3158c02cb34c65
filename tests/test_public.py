"""The public face: names, docstrings, what an import costs, and which way imports run."""

import ast
import dataclasses
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import penalties_jax as pj
from tests.catalogue import CONSTRAINTS, DIVERGENCES, GATES, PENALTIES

PACKAGE = Path(pj.__file__).parent
CONTRIBUTING = (PACKAGE.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
# A room imports from those to its left; those in braces are apart, but for `this <- that`.
(CHAIN,) = re.findall(r"^`*(functional <- .* <- recipes)`*$", CONTRIBUTING, re.MULTILINE)
RANKS = {
    room: rank
    for rank, rooms in enumerate(CHAIN.split(" <- "))
    for room in re.findall(r"\w+", rooms)
}
EXCEPTIONS = re.findall(r"`(\w+) <- (\w+)`", CONTRIBUTING)


def test_all_names():
    assert len(pj.__all__) == len({*pj.__all__})
    assert {*dir(pj)} >= {*pj.__all__, "recipes", "__version__"}
    assert all(hasattr(pj, name) for name in dir(pj))
    ours = {
        name
        for name, value in vars(pj).items()
        if not name.startswith("_") and getattr(value, "__module__", "").startswith("penalties_jax")
    }
    assert ours <= {*pj.__all__}


def test_functions_are_those_of_functional():
    for name in pj.functional.__all__:
        value = getattr(pj.functional, name)
        assert inspect.isfunction(value) or issubclass(value, tuple)
        # Proximal operators are there for configs, which have `prox`.
        assert getattr(pj, name, value if name.startswith("prox_") else None) is value


def test_an_unknown_name():
    with pytest.raises(AttributeError, match="'penalties_jax' has no attribute 'l3'"):
        pj.l3  # noqa: B018


LIGHT = """
import sys
import jax, optax, jaxtyping
before = {name.split(".")[0] for name in sys.modules}
import penalties_jax as pj
loaded = {name.split(".")[0] for name in sys.modules} - before - sys.stdlib_module_names
assert loaded <= {"penalties_jax", "wadler_lindig"}, loaded  # the second is of jaxtyping
assert not {"flax", "torch", "matplotlib"} & before
rooms = {f"penalties_jax.{room}" for room in ("adapters", "linen", "nnx", "recipes")}
assert not rooms & set(sys.modules), rooms & set(sys.modules)
assert "recipes" in dir(pj) and "recipes" not in vars(pj)
assert pj.recipes.__name__ == "penalties_jax.recipes"
assert "recipes" in vars(pj)
assert "keras" in dir(pj.adapters) and "keras" not in sys.modules
"""


def test_an_import_loads_only_what_it_needs():
    subprocess.run([sys.executable, "-W", "error", "-c", LIGHT], check=True, cwd=PACKAGE.parent)


def public():
    """Every public class and function, by the first room that it is found in."""
    adapters = (pj.adapters.datum, pj.adapters.keras, pj.adapters.tinker)
    seen = {}
    for room in (pj, pj.functional, pj.nnx, pj.linen, *adapters):
        for name in getattr(room, "__all__", vars(room)):
            value = getattr(room, name)
            written_here = room not in adapters or getattr(value, "__module__", "") == room.__name__
            if not (inspect.ismodule(value) or name.startswith("_")) and written_here:
                seen.setdefault(value, f"{room.__name__.replace('penalties_jax', 'pj')}.{name}")
    return {name: value for value, name in seen.items()}


PUBLIC = public()
FUNCTIONS = {name: x for name, x in PUBLIC.items() if inspect.isfunction(x)}
# What computes a formula; the rest are tools, such as serialisation and transformations.
FORMULAS = {
    name: x for name, x in FUNCTIONS.items() if x.__module__.startswith(pj.functional.__name__)
}
# What the catalogue has entries for is of the literature, but for one that is ours. Proximal
# operators, and the same of logits and of hidden states, need not name their source again.
ENTRIES = [*PENALTIES, *DIVERGENCES, *CONSTRAINTS, *GATES]
WITH_CONFIG = [entry for entry in ENTRIES if entry.config]
OF_A_PAPER = {entry.function for entry in ENTRIES} - {pj.output_magnitude}
CONFIGS = {name: x for name in pj.__all__ if dataclasses.is_dataclass(x := getattr(pj, name))}
RESULTS = {name: x for name, x in PUBLIC.items() if hasattr(x, "_fields")}


def prose(doc):
    """The sentences of a docstring, without its example and what is quoted or short."""
    text = " ".join(doc.split("Examples:")[0].split())
    return {sentence for sentence in re.split(r"(?<=[.:;]) ", text) if len(sentence.split()) > 7}


def named(parameter, values):
    return pytest.mark.parametrize(parameter, values.values(), ids=values.keys())


def entries(doc):
    """What a docstring says of each argument or attribute; one entry may be of several."""
    found = re.findall(r"^    (\w+(?:, \w+)*): (.*(?:\n {8}.*)*)", doc, re.MULTILINE)
    return {name: text for names, text in found for name in names.split(", ")}


def pointed(text):
    """What a docstring leaves the rest to, by its whole name or by the last part of it."""
    for path in re.findall(r"As (?:in|of) `([\w.]+)`", text):
        yield PUBLIC.get(path) or next(x for name, x in PUBLIC.items() if name.endswith(f".{path}"))


def whole(value):
    """A docstring, with those that it points to."""
    doc = inspect.getdoc(value) or ""
    return "\n".join([doc, *(whole(other) for other in pointed(doc))])


@named("value", PUBLIC)
def test_a_docstring_has_an_example_and_no_tags(value):
    doc = inspect.getdoc(value) or ""
    assert re.match(r".+[.:]$", doc.split("\n\n")[0], re.DOTALL), "has no summary"
    if value not in RESULTS.values():
        assert re.search(r"Examples:\n.*>>> ", doc, re.DOTALL), "has no example"
    prose = re.sub(r"`[^`]*`", "", doc)
    assert not re.search(r"<[a-z_]+>", prose), "a browser takes <name> for a tag: write `<name>`"


@named("value", PUBLIC)
def test_a_docstring_points_to_what_there_is(value):
    for name, text in entries(inspect.getdoc(value) or "").items():
        for other in pointed(text):
            assert name in entries(whole(other)), f"{other.__name__} does not say what {name} is"


@named("function", FORMULAS)
def test_what_computes_a_formula_says_all_of_it(function):
    assert re.search(r"\$[^$]+\$", inspect.getdoc(function)), "has no formula"
    doc = whole(function)
    assert re.search(r"\bshapes?\b|\[(\.\.\.|[a-zA-Z]\w*)[],]|scalar", doc), "has no shapes"
    assert "Raises:" in doc, "does not say what it raises"
    if function in OF_A_PAPER:
        assert "References:" in doc, "names no source"


@named("function", FUNCTIONS)
def test_every_argument_is_documented(function):
    parameters = inspect.signature(function).parameters.keys() - {"config", "text"}
    missing = parameters - entries(inspect.getdoc(function)).keys()
    assert not missing, f"says nothing of {sorted(missing)}"


@named("config", CONFIGS | RESULTS)
def test_every_field_is_documented(config):
    fields = config._fields if issubclass(config, tuple) else dataclasses.fields(config)
    missing = {getattr(x, "name", x) for x in fields} - entries(inspect.getdoc(config)).keys()
    assert not missing, f"says nothing of {sorted(missing)}"


@named("function", FORMULAS)
def test_functions_have_typed_signatures(function):
    signature = inspect.signature(function)
    assert signature.return_annotation is not inspect.Signature.empty
    for parameter in signature.parameters.values():
        assert parameter.annotation is not inspect.Parameter.empty, parameter


@pytest.mark.parametrize("entry", WITH_CONFIG, ids=lambda entry: entry.config.__name__)
def test_a_config_repeats_nothing_of_its_function(entry):
    repeated = prose(inspect.getdoc(entry.config)) & prose(inspect.getdoc(entry.function))
    assert not repeated, f"pj.{entry.function.__name__} says so: {repeated}"


@named("value", PUBLIC)
def test_no_sentence_is_there_for_a_test(value):
    assert "raises nothing itself" not in (inspect.getdoc(value) or "")


@named("config", CONFIGS | RESULTS)
def test_public_methods_are_documented(config):
    for method, value in inspect.getmembers(config, inspect.isfunction):
        if not method.startswith("_"):
            assert inspect.getdoc(value), method


def imported_rooms(path):
    """The rooms of the package that a module imports from."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "penalties_jax":
                yield parts[1] if len(parts) > 1 else "penalties_jax"


MODULES = [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_one_way(path):
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    rooms = set(imported_rooms(path)) - {room}
    if room != "recipes":
        assert "penalties_jax" not in rooms, "imports the public face"
    for other in rooms & RANKS.keys():
        allowed = RANKS[other] < RANKS[room] or (other, room) in EXCEPTIONS
        assert allowed, f"{room} imports from {other}, against the line in CONTRIBUTING.md"


def test_every_module_has_its_place():
    rooms = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in MODULES}
    assert rooms == RANKS.keys()
