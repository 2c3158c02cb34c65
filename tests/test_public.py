"""The public face: names, docstrings, what an import costs, and which way imports run."""

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import penalties_jax as pj

PENALTIES = "l1 l2 elastic_net lp log_sum smooth_l0 huber group_lasso"
DIVERGENCES = """kl_divergence js_divergence entropy kl_estimate kl_from_logits js_from_logits
    entropy_from_logits linear_kl linear_js linear_cross_entropy linear_distillation"""
STRUCTURE = """orthogonality consistency gradient_penalty interpolated_gradient_penalty
    output_magnitude"""
SPARSITY = """sparsity_rate sparsity_target_loss balanced_loss logistic_gate hard_concrete_gate
    hard_concrete_l0 step_gate jump_relu top_k_gate straight_through resolvent_diagonal"""
IMPORTANCE = "importance_minimality importance_metrics"
STATS = "ImportanceLoss ImportanceStats DistillationLoss"
CONTROLLERS = "AdaptiveSparsityScheduler DualAscent SparsityControl"
CONFIGS = f"""{CONTROLLERS} {STATS} SparsityTarget ImportanceMinimality
    L1 L2 ElasticNet Lp LogSum SmoothL0 Huber GroupLasso KLDivergence JSDivergence Entropy
    KLEstimate Orthogonality Consistency Term Objective"""
TOOLS = "stack anneal anneal_fraction add_penalty proximal"
TEXT = "to_dict from_dict to_json from_json to_yaml from_yaml"
FUNCTIONS = f"{PENALTIES} {DIVERGENCES} {STRUCTURE} {SPARSITY} {IMPORTANCE}".split()
NAMES = {*FUNCTIONS, *f"{CONFIGS} {TOOLS} {TEXT}".split(), "functional"}
FLAX = {"ActivityPenalty", "Loss", "Penalty", "SparsityGate", "collect_penalties", "param_penalty"}
RECORDS = {"Record", "collate", "measure", "penalty_for", "objective_for", "is_sampled"}
# What has no formula, being about the form of things, and what is of no one's paper but our own.
PLUMBING = {*TEXT.split(), "stack", "Record", "collate", "objective_for", "is_sampled", "as_loss"}
OURS = {*TEXT.split(), *RECORDS, *FLAX - {"SparsityGate"}}
OURS |= {"stack", "Objective", "Term", "SparsityControl", "SampledEntropy"}

PACKAGE = Path(pj.__file__).parent
# A module imports from those before it only; modules in one row are apart.
ORDER = [
    ("functional",),
    ("pytree",),
    ("schedules",),
    ("terms",),
    ("objective",),
    ("transforms", "serialization", "nnx", "linen", "adapters"),
    ("recipes",),
]
RANKS = {room: rank for rank, row in enumerate(ORDER) for room in row}


def test_all_names():
    assert set(pj.__all__) == NAMES
    assert len(pj.__all__) == len(NAMES)
    by_kind = sorted(pj.__all__, key=lambda name: (not name.isupper(), name.islower(), name))
    assert pj.__all__ == by_kind
    assert set(dir(pj)) >= {*NAMES, "recipes", "__version__"}
    assert all(hasattr(pj, name) for name in dir(pj))


def test_functions_are_those_of_functional():
    assert set(pj.functional.__all__) >= {*FUNCTIONS, *STATS.split()}
    for name in set(pj.functional.__all__) - set(STATS.split()):
        assert inspect.isfunction(getattr(pj.functional, name))
    for name in (*FUNCTIONS, *STATS.split()):
        assert getattr(pj, name) is getattr(pj.functional, name)


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
"""


def test_an_import_loads_only_what_it_needs():
    subprocess.run([sys.executable, "-W", "error", "-c", LIGHT], check=True, cwd=PACKAGE.parent)


def public():
    """Every public class and function, by the first room that it is found in."""
    adapters = (pj.adapters.datum, pj.adapters.tinker)
    seen = {}
    for room in (pj, pj.functional, pj.nnx, pj.linen, *adapters):
        for name in getattr(room, "__all__", vars(room)):
            value = getattr(room, name)
            written_here = room not in adapters or getattr(value, "__module__", "") == room.__name__
            if not (inspect.ismodule(value) or name.startswith("_")) and written_here:
                seen.setdefault(value, f"{room.__name__.replace('penalties_jax', 'pj')}.{name}")
    return {name: value for value, name in seen.items()}


PUBLIC = public()


@pytest.mark.parametrize("name", PUBLIC)
def test_docstrings_are_complete(name):
    doc, short = inspect.getdoc(PUBLIC[name]) or "", name.rpartition(".")[-1]
    assert re.search(r"Examples:\n.*>>> ", doc, re.DOTALL), "has no example"
    prose = re.sub(r"`[^`]*`", "", doc)
    assert not re.search(r"<[a-z_]+>", prose), "a browser takes <name> for a tag: write `<name>`"
    assert "Raises:" in doc or "It raises nothing itself." in doc, "does not say what it raises"
    if short not in PLUMBING:
        assert re.search(r"\$[^$]+\$", doc), "has no formula"
    if short not in TEXT.split():
        assert re.search(r"\bshapes?\b|\[(\.\.\.|[a-zA-Z]\w*)[],]|scalar", doc), (
            "says nothing of shapes"
        )
    if short not in OURS:
        assert "References:" in doc, "names no source"


@pytest.mark.parametrize("name", [name for name in PUBLIC if inspect.isfunction(PUBLIC[name])])
def test_every_argument_is_documented(name):
    doc = inspect.getdoc(PUBLIC[name])
    parameters = set(inspect.signature(PUBLIC[name]).parameters) - {"config", "text"}
    assert all(f"{parameter}:" in doc for parameter in parameters)
    assert "Returns:" in doc or name.rpartition(".")[-1] not in FUNCTIONS


@pytest.mark.parametrize("name", sorted(set(pj.functional.__all__) - set(STATS.split())))
def test_functions_have_typed_signatures(name):
    signature = inspect.signature(getattr(pj.functional, name))
    assert signature.return_annotation is not inspect.Signature.empty
    for parameter in signature.parameters.values():
        assert parameter.annotation is not inspect.Parameter.empty, parameter


@pytest.mark.parametrize("name", sorted(NAMES & {name for name in NAMES if name[0].isupper()}))
def test_public_methods_are_documented(name):
    for method, value in inspect.getmembers(getattr(pj, name), inspect.isfunction):
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
        assert RANKS[other] < RANKS[room], f"{room} imports from {other}"


def test_every_module_has_its_place():
    rooms = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in MODULES}
    assert rooms <= RANKS.keys()
