"""Nothing that is read may run: no pickle is loaded, and no name in a file is imported."""

import ast
from pathlib import Path

import pytest

import penalties_jax as pj

PACKAGE = Path(pj.__file__).parent
RUN = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
# Of arrays: numpy's and torch's loaders may find a pickle, and its loaders of YAML any object.
LOADERS = {("np", "load"), ("jnp", "load"), ("numpy", "load"), ("torch", "load")} | {
    ("yaml", name) for name in ("unsafe_load", "full_load", "Loader", "FullLoader", "UnsafeLoader")
}
CALLED = {"eval", "exec", "compile", "__import__"}


def what_may_run(source):
    """Names in a module's source that load what may run."""
    tree = ast.parse(source)
    refusing = {node.func for node in ast.walk(tree) if _refuses_pickle(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = {alias.name.split(".")[0] for alias in node.names}
            yield from (names | {(getattr(node, "module", None) or "").split(".")[0]}) & RUN
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if (node.value.id, node.attr) in LOADERS and node not in refusing:
                yield f"{node.value.id}.{node.attr}"
        elif isinstance(node, ast.Name) and node.id in CALLED:
            yield node.id


def _refuses_pickle(node):
    """Whether it is a call with allow_pickle=False."""
    words = node.keywords if isinstance(node, ast.Call) else []
    return any(word.arg == "allow_pickle" and ast.unparse(word.value) == "False" for word in words)


MODULES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_that_is_read_may_run(path):
    assert not list(what_may_run(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from joblib import load",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "torch.load(path)",
        "yaml.load(text, yaml.Loader)",
        "eval(text)",
    ],
)
def test_what_would_run_is_found(line):
    assert list(what_may_run(line))


def test_what_refuses_a_pickle_is_not():
    assert not list(what_may_run("np.load(path, allow_pickle=False)"))
