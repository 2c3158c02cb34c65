"""Which small faults would the tests not notice? `make mutation` puts some in, and counts.

The mutants are mutmut's. Its way of running them leaves out decorated functions, which most are
here: so each is a file in a copy of the repository, tested by a process that is forked from one
that has imported jax.
"""

import argparse
import difflib
import multiprocessing
import os
import queue
import random
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import libcst as cst
import pytest
from mutmut.mutation.mutators import mutation_operators

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "penalties_jax"
MUTATED = [
    *PACKAGE.glob("functional/**/*.py"),
    PACKAGE / "schedules.py",
    PACKAGE / "controllers.py",
]
# The share that has to be killed.
LEAST = 0.92

# Modules whose tests have other names. These go first, and with them a module's own examples.
NEAREST = {
    "blocks": ("streaming", "linear"),
    "checks": ("ranges", "reduction"),
    "controllers": ("controllers", "sparsity_target"),
    "derivatives": ("constraints", "penalties"),
    "formulas": ("divergences", "streaming"),
    "heads": ("linear", "softcap"),
    "hidden": ("linear",),
    "logits": ("streaming",),
    "logprobs": ("divergences", "transport"),
    "penalties": ("penalties", "proximal"),
    "platform": ("linear", "accelerator"),
    "reduction": ("reduction", "sharding", "metrics", "meshes"),
    "rows": ("streaming", "divergences"),
    "running": ("accelerator", "streaming"),
    "sparsity": ("sparsity", "sparsity_target"),
}
OTHERS = [
    *(ROOT / "tests/functional").glob("test_*.py"),
    *(ROOT / f"tests/test_{name}.py" for name in ("modes", "own", "terms", "metrics", "objective")),
]

# Names and types; and how many rows go by at once, a matter of time and memory, not of results.
NO_BEHAVIOUR = {"__all__", "AxisName", "Axis", "Softcap", "R", "T", "ROW_BYTES", "MOST_CLASSES"}
NO_BEHAVIOUR |= {"LEAST_ROWS", "CPU", "ACCELERATOR", "_rows", "rows_in_block", "rows_in_product"}

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["__main__", "jax", "flax.nnx", "optax", "scipy.special"])


class Mutant(NamedTuple):
    """A module with a fault: the function that it is in, and the whole text."""

    path: Path
    function: str
    text: str

    def __str__(self):
        texts = self.path.read_text().splitlines(), self.text.splitlines()
        _, _, *diff = difflib.unified_diff(*texts, n=0, lineterm="")
        return "\n".join([str(self.path.relative_to(ROOT)), *diff])

    def stages(self) -> list[list[Path]]:
        """The tests that are of its module, and then those that are not."""
        names = NEAREST.get(self.path.stem, (self.path.stem,))
        own = [path for name in names for path in ROOT.glob(f"tests/**/test_{name}.py")]
        return [[self.path, *own], [path for path in OTHERS if path not in own]]


def places(node: cst.CSTNode, function: str = "") -> Iterator[tuple]:
    """Where a fault may be: each node, what may stand in its place, and the function around it."""
    match node:
        case cst.Annotation() | cst.Raise() | cst.Expr(cst.SimpleString()):
            return
        case cst.Arg(keyword=cst.Name("strict")):
            return
        case cst.FunctionDef(cst.Name(name)) | cst.ClassDef(cst.Name(name)):
            function = name
        case cst.Assign([cst.AssignTarget(cst.Name(name))]) | cst.AugAssign(cst.Name(name)):
            pass
        case _:
            name = ""
    if name in NO_BEHAVIOUR:
        return
    operators = (*mutation_operators, (cst.Call, _unwrapped))
    faults = [new for kind, make in operators if isinstance(node, kind) for new in make(node)]
    if faults:
        yield node, faults, function
    for child in node.children:
        yield from places(child, function)


def _unwrapped(call):
    """`x` and `y` for `f(x, y)`: a bound, a cast or a mask that is forgotten."""
    arguments = [x.value for x in call.args[:2] if not x.star]
    return [x for x in arguments if not isinstance(x, cst.GeneratorExp)]


def drawn(size: int, seed: int) -> list[Mutant]:
    """Mutants of all modules: one for each of so many places, which are drawn evenly."""
    modules = [(path, cst.parse_module(path.read_text())) for path in sorted(MUTATED)]
    everywhere = [(path, module, *place) for path, module in modules for place in places(module)]
    draw = random.Random(seed)
    return [
        Mutant(path, function, module.deep_replace(node, draw.choice(faults)).code)
        for path, module, node, faults, function in draw.sample(everywhere, size)
    ]


def _test(tree, tests, function):
    os.setsid()
    os.chdir(tree)
    with open("output.txt", "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    # Mutants of one size and second would be taken for each other.
    sys.dont_write_bytecode = True
    options = ["-x", "-q", "-n", "0", "-p", "no:cacheprovider", "--no-header"]
    paths = [str(path.relative_to(ROOT)) for path in tests]
    code = pytest.main([*options, *paths], plugins=[NearestFirst(function)])
    # A module without examples, or tests of its own, is no failure.
    sys.exit(0 if code == pytest.ExitCode.NO_TESTS_COLLECTED else code)


class NearestFirst:
    """A plugin of pytest: first the tests that are named as a function is, then the others."""

    def __init__(self, function):
        self.words = [word for word in function.lower().split("_") if len(word) > 2]

    def pytest_collection_modifyitems(self, items):
        """Sorts them."""
        items.sort(key=lambda item: -sum(word in item.nodeid for word in self.words))


def outcome(tree: Path, tests: list[Path], function: str, seconds: float | None) -> str:
    """What tests in a copy of the repository say: "survived", "killed", or "slow" to do either."""
    process = SERVER.Process(target=_test, args=(tree, tests, function))
    process.start()
    process.join(seconds)
    if process.exitcode is None:
        os.killpg(process.pid, signal.SIGKILL)
        return "slow"
    return "killed" if process.exitcode else "survived"


def judge(mutant: Mutant, trees: queue.Queue, seconds: float) -> str:
    """What becomes of a mutant, which is said if it isn't killed."""
    tree = trees.get()
    place = tree / mutant.path.relative_to(ROOT)
    place.write_text(mutant.text)
    for tests in mutant.stages():
        verdict = outcome(tree, tests, mutant.function, seconds)
        if verdict != "survived":
            break
    shutil.copy2(mutant.path, place)
    trees.put(tree)
    print("." if verdict == "killed" else f"\n{verdict}: {mutant}\n", end="", flush=True)
    return verdict


def main() -> int:
    """Puts faults into copies of the package, and counts which of them the tests notice."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--sample", type=int, default=400, help="how many mutants")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--jobs", type=int, default=1, help="how many at once")
    parser.add_argument("--seconds", type=float, default=900, help="for the tests of one")
    options = parser.parse_args()
    mutants = drawn(options.sample, options.seed)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.jobs) as pool:
        # What is compiled for the code as it is, mutants don't compile again.
        os.environ |= {
            "JAX_COMPILATION_CACHE_DIR": f"{folder}/compiled",
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        trees = queue.Queue()
        for i in range(options.jobs):
            tree = Path(folder, str(i))
            shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".*", "runs", "site"))
            trees.put(tree)
        tests = {test for mutant in mutants for stage in mutant.stages() for test in stage}
        if outcome(tree, sorted(tests), "", None) == "killed":
            print((tree / "output.txt").read_text())
            return 1
        counts = Counter(pool.map(lambda x: judge(x, trees, options.seconds), mutants))
    share = counts["killed"] / len(mutants)
    print(f"\n{share:.1%} of {len(mutants)} are killed, with seed {options.seed}: {dict(counts)}")
    return int(share < LEAST)


if __name__ == "__main__":
    sys.exit(main())
