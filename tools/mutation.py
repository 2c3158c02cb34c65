"""Which small faults would the tests not notice? `make mutation` puts some in, and counts.

The mutants are mutmut's. Its way of running them leaves out decorated functions, which most are
here: so each is a file in a copy of the repository, tested by a process that is forked from one
that has imported jax. First all tests have to pass, and are seen to trace this function or that:
a mutant meets the tests that trace what it changes.

With JAX_COMPILATION_CACHE_DIR the next call need not compile what this one did.
"""

import argparse
import ast
import difflib
import multiprocessing
import os
import queue
import random
import shutil
import signal
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import coverage
import jax
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
OTHERS = sorted(ROOT.glob("tests/**/test_*.py"))

# Names and types; and how many rows go by at once, a matter of time and memory, not of results.
NO_BEHAVIOUR = {"__all__", "AxisName", "Axis", "Softcap", "R", "T", "CPU", "ACCELERATOR"}
NO_BEHAVIOUR |= {"ROW_BYTES", "MASK_BYTES", "MOST_CLASSES", "LEAST_ROWS"}
NO_BEHAVIOUR |= {"_rows", "rows_in_block", "rows_in_product", "rows_in_mask"}

# Of each test's cases those that CI runs, in quarters on one Python and another.
CASES = "12"
TRACES = "traces"

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

    def lines(self) -> set[int]:
        """Those of the module that it changes, and all of the functions that these are in."""
        before = self.path.read_text()
        match = difflib.SequenceMatcher(None, before.splitlines(), self.text.splitlines(), False)
        changed = [
            line
            for kind, first, last, *_ in match.get_opcodes()
            if kind != "equal"
            for line in range(first + 1, max(last, first + 1) + 1)
        ]
        bodies = [
            range(node.body[0].lineno, node.end_lineno + 1)
            for node in ast.walk(ast.parse(before))
            if isinstance(node, ast.FunctionDef)
        ]
        around = [body for body in bodies if any(line in body for line in changed)]
        return {*changed, *(line for body in around for line in body)}

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


def _run(tree, tests, plugin):
    os.setsid()
    os.chdir(tree)
    with open("output.txt", "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    # Mutants of one size and second would be taken for each other.
    sys.dont_write_bytecode = True
    options = ["-x", "-q", "-n", "0", "-p", "no:cacheprovider", "--no-header", "--cases", CASES]
    code = pytest.main([*options, *(str(path.relative_to(ROOT)) for path in tests)], [plugin])
    # A module without examples, or tests of its own, is no failure.
    return 0 if code == pytest.ExitCode.NO_TESTS_COLLECTED else code


def _test(tree, tests, chosen, function):
    sys.exit(_run(tree, tests, Chosen(chosen, function)))


def _trace(tree, tests):
    seen = coverage.Coverage(
        data_file=tree / TRACES, config_file=False, include=[f"{tree}/penalties_jax/*"]
    )
    with seen.collect():
        code = _run(tree, tests, Traced(seen))
    seen.save()
    sys.exit(code)


class Chosen:
    """A plugin of pytest: of the tests only these, first those that are named as a function is."""

    def __init__(self, chosen, function):
        self.chosen = chosen
        self.words = [word for word in function.lower().split("_") if len(word) > 2]

    def pytest_collection_modifyitems(self, items):
        """Leaves out and sorts."""
        if self.chosen is not None:
            items[:] = [item for item in items if item.nodeid in self.chosen]
        items.sort(key=lambda item: -sum(word in item.nodeid for word in self.words))


class Traced:
    """A plugin of pytest: what is run is told apart by the test that runs it."""

    def __init__(self, seen):
        self.seen = seen

    def pytest_runtest_setup(self, item):
        """Forgets what other tests traced, which would not be traced again."""
        jax.clear_caches()
        self.seen.switch_context(item.nodeid)


def outcome(target: Callable, *arguments: object, seconds: float | None = None) -> str:
    """What tests in a copy of the repository say: "survived", "killed", or "slow" to do either."""
    process = SERVER.Process(target=target, args=arguments)
    process.start()
    process.join(seconds)
    if process.exitcode is None:
        os.killpg(process.pid, signal.SIGKILL)
        return "slow"
    return "killed" if process.exitcode else "survived"


def traces(trees: list[Path]) -> dict[Path, dict[int, set[str]]]:
    """The tests that trace each line of the modules, from copies of the repository."""
    found = {path: defaultdict(set) for path in MUTATED}
    for tree in trees:
        data = coverage.CoverageData(tree / TRACES)
        data.read()
        for path, lines in found.items():
            own = tree / path.relative_to(ROOT)
            for line, tests in data.contexts_by_lineno(str(own)).items():
                # What is run on import is of no test.
                lines[line] |= {*tests} - {""}
    return found


def judge(mutant: Mutant, trees: queue.Queue, tests: dict, seconds: float) -> str:
    """What becomes of a mutant, which is said if it isn't killed."""
    tree = trees.get()
    place = tree / mutant.path.relative_to(ROOT)
    place.write_text(mutant.text)
    # All of them, of what is run on import alone.
    chosen = set().union(*(tests[mutant.path][line] for line in mutant.lines())) or None
    for stage in mutant.stages():
        verdict = outcome(_test, tree, stage, chosen, mutant.function, seconds=seconds)
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
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", f"{folder}/compiled")
        os.environ |= {
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        trees = [Path(folder, str(i)) for i in range(options.jobs)]
        for tree in trees:
            shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".*", "runs", "site"))
        files = sorted({x for mutant in mutants for stage in mutant.stages() for x in stage})
        shares = [files[i :: options.jobs] for i in range(options.jobs)]
        verdicts = pool.map(lambda tree, share: outcome(_trace, tree, share), trees, shares)
        for tree, verdict in zip(trees, verdicts, strict=True):
            if verdict == "killed":
                print((tree / "output.txt").read_text())
                return 1
        tests, free = traces(trees), queue.Queue()
        for tree in trees:
            free.put(tree)
        counts = Counter(pool.map(lambda x: judge(x, free, tests, options.seconds), mutants))
    share = counts["killed"] / len(mutants)
    print(f"\n{share:.1%} of {len(mutants)} are killed, with seed {options.seed}: {dict(counts)}")
    return int(share < LEAST)


if __name__ == "__main__":
    sys.exit(main())
