"""What penalties and divergences cost on an H100 and on TPUs, compiled where there is neither.

XLA's compilers for NVIDIA GPUs and for TPUs are ordinary wheels, and compile for a machine that is
not there. The compiled program says which kernels would run, what each reads and writes, how much
temporary memory there is and which collectives. It says nothing of time, but what is bound by
memory costs the bytes that it moves: those are counted, beside the textbook's expression under
automatic differentiation, in arrays of the size of the first argument.

    python -m benchmarks.accelerators [--quick] [--out DIRECTORY]

The exit status is 1 if a bar is missed that is not in `KNOWN_MISSES`.

`make bench-accelerators` installs what this needs.
"""

import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from tqdm import tqdm

import penalties_jax as pj
from benchmarks import harness, penalties
from benchmarks.harness import ratio, spread, table, verdict, write_json

# What keeps the compilers from looking for a machine, and from having it for themselves.
ENVIRONMENT = {
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
}
DESCRIPTION = Path(__file__).parent / "h100.txtpb"
SINGLE = {"H100": "h100", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
MESHES = {"8 H100": "h100x8", "8 v5e": "v5e:2x4"}
# All programs are compiled for these, and those of `--quick` for the others too in a full run.
MAIN = ("H100", "v5e")

VALUES, LOGITS, BATCHES = (16, 1024, 4096), (4096, 131072), (4, 1024, 131072)
TOKENS, FEATURES, CLASSES = 4096, 2048, 131072
SOFTCAP = 30.0
# A batch of sequences, of whose tokens the log-probabilities are wanted, and what that may hold
# beside the kernel's gradient, which is summed in float32.
SEQUENCES, HELD = (8, 1024), 600_000_000
BETA, EXPONENT, WEIGHT = 0.5, 0.9, 0.1
# Of a teacher's tokens, what may be moved: scatters in place are counted as whole copies.
TOP, TOP_BAR = 64, 8.1
# Of the bytes of a device's logits: what collectives may send.
COLLECTIVES_BAR = 0.01

# Whose time to compile for an H100 is told, and how many textbooks' it may be.
COMPILED, COMPILE_BAR = ("`kl_from_logits`, float32, forward", "`linear_kl`"), 2

# (program, machine): bars that are missed, as README.md says. In a scan the value takes a pass of
# its own, which otherwise is the gradient's: two arrays more. On an H100, XLA fills the stack of
# the gradients with zeros before: one more, for the textbook too.
SCAN = "`kl_from_logits`, bfloat16, in a `scan`"
# A TPU scatters into copies, the textbook too.
KNOWN_MISSES = {(SCAN, "H100"), (SCAN, "v5e")} | {
    (f"`kl_to_top_k`, {dtype}", machine)
    for dtype in ("float32", "bfloat16")
    for machine in ("v5e", "v5p", "v6e")
}
# A row that weighs nothing may have an infinite slope, which a choice keeps out of the products: in
# that the backend holds one block of logits more.
KNOWN_MISSES |= {("`linear_log_prob`", "v5e")}


@cache
def target(machine: str) -> list[Any]:
    """The devices of a machine that need not be there.

    Args:
        machine: "h100", "h100x8", or the name of a TPU topology: "v5e:2x2", "v5p:2x2x1".
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if not machine.startswith("h100"):
        return topologies.get_topology_desc(platform="tpu", topology_name=machine).devices
    return topologies.get_topology_desc(
        platform="cuda",
        topology_name=machine,
        topology=f"1x1x{machine.partition('x')[2] or 1}",
        target_config=DESCRIPTION.read_text(),
    ).devices


def compile_for(
    machine: str,
    function: Callable[..., Any],
    *arguments: jax.ShapeDtypeStruct,
    spec: PartitionSpec | None = None,
) -> Any:
    """Compiles a function for a machine that need not be there.

    Args:
        machine: As in `target`.
        function: What to compile.
        *arguments: Shapes and dtypes of its arguments; pytrees of them too.
        spec: How arguments are sharded over all devices of the machine, on an axis "devices", and
            with them the gradient of a value and gradient; None for a program of one device.
    """
    devices = target(machine)
    if spec is None:
        one = SingleDeviceSharding(devices[0])
        program = jax.jit(function, in_shardings=one, out_shardings=one)
    else:
        mesh = Mesh(np.array(devices).reshape(-1), ("devices",))
        sharded, whole = (NamedSharding(mesh, s) for s in (spec, PartitionSpec()))
        program = jax.jit(function, in_shardings=sharded, out_shardings=(whole, sharded))
    return program.lower(*arguments).compile()


class Instruction(NamedTuple):
    """A line of a compiled program in XLA's text: `name = shape operation(inputs), attributes`."""

    name: str
    shape: str
    operation: str
    inputs: str
    attributes: str
    root: bool

    @property
    def operands(self) -> list[str]:
        """The names of its operands."""
        return re.findall(r"%([\w.\-]+)", self.inputs)

    @property
    def size(self) -> int:
        """The bytes of its result, all parts of a tuple together."""
        return sum(
            int(np.prod([int(n) for n in lengths.split(",") if n])) * _bits(dtype) // 8
            for dtype, lengths in re.findall(r"\b([a-z]\w*)\[([\d,]*)\]", self.shape)
        )

    def attribute(self, name: str) -> str:
        """The computation that an attribute names."""
        found = re.search(rf"\b{name}=%?([\w.\-]+)", self.attributes)
        return found[1] if found else ""


Computation = dict[str, Instruction]
ENTRY = "the entry"
_HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{\s*$")
_INSTRUCTION = re.compile(
    r"\s+(?P<root>ROOT )?%?(?P<name>[\w.\-]+) = (?P<shape>\(.*?\)|\S+) (?P<operation>[\w\-]+)"
    r"\((?P<inputs>.*?)\)(?:, (?P<attributes>\w+=.*))?$"
)
_COLLECTIVE = re.compile(
    r"(all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute)(-done)?$"
)
# Of an asynchronous kernel its start counts. What is copied ahead counts where it is used.
_FREE = re.compile(
    r"parameter|tuple|get-tuple-element|bitcast|constant|iota|after-all|partition-id|replica-id"
    r"|opt-barrier|(copy|slice)-start|.*-done"
)
_VIEWS = {"bitcast", "copy", "convert", "reshape", "transpose"}
_SLICES = {"slice", "dynamic-slice", "gather"}


def moved(text: str) -> int:
    """Bytes that the kernels of a compiled program read from memory and write to it.

    Each kernel reads its operands and writes its results once; of what is sliced or updated in
    place, the slice counts; a loop's body counts once a trip, and of branches the dearest. What
    stays in a kernel is not counted.

    Args:
        text: `as_text()` of the compiled program. That of a program on several devices is that of
            each of them.
    """
    program = _parse(text)
    return sum(
        trips * _traffic(program, computation, kernel)
        for trips, computation, kernel in _kernels(program, program[ENTRY])
    )


def collectives(text: str) -> dict[str, int]:
    """The collectives of a compiled program: bytes of their results, loops by their trips."""
    found: Counter[str] = Counter()
    program = _parse(text)
    for trips, _, kernel in _kernels(program, program[ENTRY]):
        if name := _COLLECTIVE.match(kernel.operation):
            found[name[1]] += trips * kernel.size
    return dict(found)


def _bits(dtype):
    if dtype in ("token", "opaque"):
        return 0
    digits = re.search(r"\d+", dtype)
    return int(digits[0]) if digits else 8


def _parse(text):
    program, computation = {}, {}
    for line in text.splitlines():
        if head := _HEAD.match(line):
            computation = program[ENTRY if head[1] else head[2]] = {}
        elif found := _INSTRUCTION.match(line):
            computation[found["name"]] = Instruction(
                found["name"],
                found["shape"],
                found["operation"],
                found["inputs"],
                found["attributes"] or "",
                root=bool(found["root"]),
            )
    return program


def _kernels(
    program: Mapping[str, Computation], computation: Computation, trips: int = 1
) -> Iterator[tuple[int, Computation, Instruction]]:
    """What a program runs: how often, where it stands, and the instruction."""
    for instruction in computation.values():
        match instruction.operation:
            case "while":
                inside = trips * _trips(program, instruction)
                yield from _kernels(program, program[instruction.attribute("body")], inside)
            case "call":
                yield from _kernels(program, program[instruction.attribute("to_apply")], trips)
            case "async-start":
                yield from _kernels(program, program[instruction.attribute("calls")], trips)
            case "conditional":
                names = re.findall(r"%([\w.\-]+)", instruction.attributes)
                branches = [list(_kernels(program, program[n], trips)) for n in names]
                yield from max(
                    branches, key=lambda runs: sum(n * _traffic(program, c, k) for n, c, k in runs)
                )
            case _:
                yield trips, computation, instruction


def _trips(program, loop):
    if known := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes):
        return int(known[1])
    condition = program[loop.attribute("condition")].values()
    bounds = [int(i.inputs) for i in condition if i.operation == "constant" and i.inputs.isdigit()]
    if not bounds:
        raise ValueError(f"the loop {loop.name} does not say how often it runs")
    return max(bounds)


def _traffic(program, computation, kernel):
    """The bytes that one run of a kernel moves."""
    if _FREE.fullmatch(kernel.operation) or "AllocateBuffer" in kernel.attributes:
        return 0
    if kernel.operation in ("fusion", "fusion-start"):
        body = program[kernel.attribute("calls")]
        read = sum(
            _part_read(program, body, i) * i.size
            for i in body.values()
            if i.operation == "parameter"
        )
        return round(read) + _written(program, body)
    if kernel.operation in _SLICES:
        return 2 * kernel.size
    if kernel.operation == "dynamic-update-slice":
        return 2 * computation[kernel.operands[1]].size
    return sum(computation[name].size for name in kernel.operands) + kernel.size


def _part_read(program, body, source):
    """How much of an instruction's result the rest of a fusion reads: from 0 to 1."""
    part = float(source.root)
    for user in body.values():
        for position, name in enumerate(user.operands):
            if name != source.name:
                continue
            if user.operation in _VIEWS:
                part += _part_read(program, body, user)
            elif user.operation in _SLICES and position == 0:
                part += user.size / source.size
            elif user.operation == "fusion":
                inner = program[user.attribute("calls")]
                part += _part_read(program, inner, _parameter(inner, position))
            elif user.operation != "dynamic-update-slice" or position:
                part += 1
    return min(part, 1.0)


def _parameter(body, position):
    return next(
        i for i in body.values() if i.operation == "parameter" and i.inputs == str(position)
    )


def _written(program, body):
    """The bytes that a fusion writes."""
    root = next(i for i in body.values() if i.root)
    outputs = [body[name] for name in root.operands] if root.operation == "tuple" else [root]
    total = 0
    for output in outputs:
        while output.operation == "bitcast":
            output = body[output.operands[0]]
        if output.operation == "fusion":
            total += _written(program, program[output.attribute("calls")])
        elif output.operation == "dynamic-update-slice":
            total += body[output.operands[1]].size
        else:
            total += output.size
    return total


class Case(NamedTuple):
    """What is compiled.

    Attributes:
        ours: A program of this package.
        textbook: The same in plain JAX; None to leave it out.
        arguments: Shapes and dtypes.
        bar: What may be moved: in arrays, or times what the textbook moves.
        quick: Whether `--quick` runs it.
        relative: Whether the bar is the textbook; then bytes are told in GB.
        held: Bytes of temporaries that there may be.
        spec: How the arguments are sharded; then `MESHES` is what it is compiled for.
    """

    ours: Callable[..., Any]
    textbook: Callable[..., Any] | None
    arguments: tuple[Any, ...]
    bar: float | None
    quick: bool = False
    relative: bool = False
    held: int | None = None
    spec: PartitionSpec | None = None


def kl(a, b, *, direction="forward", temperature=1.0, where=None):
    """Sum of p (log p - log q), by `jax.nn.log_softmax` in float32."""
    p, q = (jax.nn.log_softmax(z.astype(jnp.float32) / temperature) for z in (a, b))
    if direction == "reverse":
        p, q = q, p
    expected = jnp.exp(p) - jnp.exp(q) if direction == "symmetric" else jnp.exp(p)
    scale = 0.5 if direction == "symmetric" else 1.0
    return jnp.mean(scale * jnp.sum(expected * (p - q), -1), where=where)


def js(a, b):
    """The divergence of Jensen and Shannon, by the logarithm of the mixture."""
    p, q = (jax.nn.log_softmax(z.astype(jnp.float32)) for z in (a, b))
    m = jnp.logaddexp(p, q) - jnp.log(2.0)
    return jnp.mean(jnp.sum(jnp.exp(p) * (p - m) + jnp.exp(q) * (q - m), -1)) / 2


def entropy(a):
    """Minus the sum of p log p."""
    p = jax.nn.log_softmax(a.astype(jnp.float32))
    return -jnp.mean(jnp.sum(jnp.exp(p) * p, -1))


def kl_of_log_probabilities(a, b):
    """`pj.kl_divergence` of `jax.nn.log_softmax` of logits."""
    p, q = (jax.nn.log_softmax(z.astype(jnp.float32)) for z in (a, b))
    return pj.kl_divergence(p, q)


def linear_kl(hidden_p, kernel_p, hidden_q, kernel_q):
    """KL of all the logits."""
    return kl(hidden_p @ kernel_p, hidden_q @ kernel_q)


def linear_cross_entropy(hidden, kernel, labels):
    """Cross entropy of all the logits."""
    log_p = jax.nn.log_softmax((hidden @ kernel).astype(jnp.float32))
    return -jnp.mean(jnp.take_along_axis(log_p, labels[:, None], -1))


def linear_peers() -> dict[str, tuple[Callable[..., Any], tuple[int, int]]]:
    """The cross entropies of the packages that are here, and their kernels' shapes."""
    found = {}
    if find_spec("jax_cce"):
        peer = import_module("jax_cce").linear_cross_entropy
        found["jax-cce"] = peer, (CLASSES, FEATURES)
    if find_spec("tokamax"):
        loss = import_module("tokamax").linear_softmax_cross_entropy_loss

        def chunked(hidden, kernel, labels):
            return loss(hidden, labels, kernel, reduction="mean", implementation="chunked_xla")

        found["tokamax"] = chunked, (FEATURES, CLASSES)
    return found


def kl_to_top_k(logits, ids, log_q):
    """KL(teacher||student) with a bucket, whose probability is what the tokens leave of 1."""
    log_p = jnp.take_along_axis(jax.nn.log_softmax(logits.astype(jnp.float32)), ids, -1)
    p, q = (jnp.log1p(-jnp.sum(jnp.exp(x), -1)) for x in (log_p, log_q))
    return jnp.mean(jnp.sum(jnp.exp(log_q) * (log_q - log_p), -1) + jnp.exp(q) * (q - p))


def capped_linear_kl(hidden_p, kernel_p, hidden_q, kernel_q):
    """KL of all the logits, each within the cap."""
    return kl(*(_capped(h @ w) for h, w in ((hidden_p, kernel_p), (hidden_q, kernel_q))))


def _capped(z):
    return SOFTCAP * jnp.tanh(z.astype(jnp.float32) / SOFTCAP)


def weighted_log_prob(hidden, kernel, tokens, weights):
    """What a policy gradient differentiates, from all the logits."""
    log_p = jax.nn.log_softmax((hidden @ kernel).astype(jnp.float32))
    return jnp.sum(weights * jnp.take_along_axis(log_p, tokens[..., None], -1)[..., 0])


def z_loss(z):
    """The mean square of the log-normalisers."""
    return jnp.mean(jnp.square(jax.nn.logsumexp(z.astype(jnp.float32), -1)))


def minimality(c):
    """The sum over components of the p-th power of importances, and of its logarithm."""
    sums = jnp.sum((c + 1e-12) ** EXPONENT, (0, 1))
    means = sums / (c.size // c.shape[-1])
    return jnp.sum(means + BETA * means * jnp.log2(1 + sums))


def coupled(updates, parameters):
    """Adds the gradient of the sum of squares to updates."""
    return updates + WEIGHT * jax.grad(lambda x: jnp.sum(x**2))(parameters)


def added(updates, parameters):
    """`pj.add_penalty`, with the number of steps as a constant."""
    transform = pj.add_penalty(pj.L2(), WEIGHT)
    return transform.update(updates, transform.init(parameters), parameters)[0]


def coupled_and_measured(updates, parameters):
    """The same as `coupled`, with the sum of squares and the norm of its gradient."""
    value, gradient = jax.value_and_grad(lambda x: jnp.sum(x**2))(parameters)
    return updates + WEIGHT * gradient, value, jnp.sqrt(jnp.sum(gradient**2))


def monitored(updates, parameters):
    """`pj.add_penalty` with what it keeps in its state, which is nothing of the step before."""
    transform = pj.add_penalty(pj.L2(), WEIGHT, monitor=True)
    return transform.update(updates, transform.init(parameters), parameters)


def in_a_scan(divergence):
    """Value and gradient of each microbatch, inside a scan over them."""

    def accumulated(a, b):
        def step(total, batch):
            value, gradient = jax.value_and_grad(divergence)(*batch)
            return total + value, gradient

        return jax.lax.scan(step, 0.0, (a, b))

    return accumulated


def saturating(x, gamma):
    return x**2 / (x**2 + gamma**2)


def cases() -> dict[str, Case]:
    """Everything that is compiled, by name."""
    result = {
        **{f"`{name}`": _penalty(name) for name in ("l1", "l2", "lp", "huber", "smooth_l0")},
        "`Elementwise`": _differentiated(
            pj.Elementwise(saturating, gamma=EXPONENT),
            lambda x: jnp.sum(saturating(x, EXPONENT)),
            (_values(),),
            2.1,
        ),
        "`importance_minimality`": Case(
            jax.value_and_grad(
                lambda c: pj.importance_minimality({"a": c}, pj.Lp(p=EXPONENT), beta=BETA).total
            ),
            jax.value_and_grad(minimality),
            (_values(),),
            3.1,
        ),
        "`add_penalty`": Case(added, coupled, (_values(), _values()), 3.1),
        "`add_penalty`, monitored": Case(
            monitored, coupled_and_measured, (_values(), _values()), 3.1
        ),
    }
    for dtype in (jnp.float32, jnp.bfloat16):
        name, pair = jnp.dtype(dtype).name, (_logits(dtype),) * 2
        result[f"`kl_divergence`, {name}"] = _differentiated(
            kl_of_log_probabilities, kl, pair, 9.1, quick=dtype == jnp.float32
        )
        for direction in ("forward", "reverse", "symmetric"):
            ours, textbook = (partial(f, direction=direction) for f in (pj.kl_from_logits, kl))
            label = f"`kl_from_logits`, {name}, {direction}"
            quick = direction == "forward"
            result[label] = _differentiated(ours, textbook, pair, 5.3, quick=quick)
        result[f"`kl_from_logits`, {name}, value alone"] = Case(pj.kl_from_logits, kl, pair, 4.3)
    pair, batches = (_logits(jnp.bfloat16),) * 2, (_struct(BATCHES, jnp.bfloat16),) * 2
    rows = _struct(LOGITS[:1], jnp.bool_)

    def masked(divergence):
        return jax.value_and_grad(lambda a, b, where: divergence(a, b, where=where))

    for label, form, arguments, bar in (
        ("temperature 2", lambda f: jax.value_and_grad(partial(f, temperature=2.0)), pair, 5.3),
        ("`where`", masked, (*pair, rows), 5.3),
        ("both gradients", lambda f: jax.value_and_grad(f, (0, 1)), pair, 6.3),
        ("`vmap`", lambda f: jax.vmap(jax.value_and_grad(f)), batches, 5.3),
        ("in a `scan`", in_a_scan, batches, 5.3),
    ):
        both = form(pj.kl_from_logits), form(kl)
        result[f"`kl_from_logits`, bfloat16, {label}"] = Case(
            *both, arguments, bar, quick=form is masked
        )
    for dtype in (jnp.float32, jnp.bfloat16):
        name, one = jnp.dtype(dtype).name, (_logits(dtype),)
        result[f"`js_from_logits`, {name}"] = _differentiated(
            pj.js_from_logits, js, 2 * one, 7.3, quick=dtype == jnp.bfloat16
        )
        result[f"`entropy_from_logits`, {name}"] = _differentiated(
            pj.entropy_from_logits, entropy, one, 3.3, quick=dtype == jnp.bfloat16
        )
        result[f"`z_loss`, {name}"] = _differentiated(pj.z_loss, z_loss, one, 3.3)
    hidden, kernel = (
        _struct(shape, jnp.bfloat16) for shape in ((TOKENS, FEATURES), (FEATURES, CLASSES))
    )
    labels = _struct((TOKENS,), jnp.int32)
    result["`linear_kl`"] = Case(
        jax.value_and_grad(pj.linear_kl, (0, 1)),
        jax.value_and_grad(linear_kl, (0, 1)),
        (hidden, kernel, hidden, kernel),
        1.6,
        quick=True,
        relative=True,
    )
    result["`linear_cross_entropy`"] = Case(
        jax.value_and_grad(pj.linear_cross_entropy, (0, 1)),
        jax.value_and_grad(linear_cross_entropy, (0, 1)),
        (hidden, kernel, labels),
        1.6,
        relative=True,
    )
    result["`linear_kl`, capped"] = Case(
        jax.value_and_grad(partial(pj.linear_kl, softcap=SOFTCAP), (0, 1)),
        jax.value_and_grad(capped_linear_kl, (0, 1)),
        (hidden, kernel, hidden, kernel),
        1.6,
        relative=True,
    )
    result["`linear_log_prob`"] = Case(
        jax.value_and_grad(lambda h, w, y, by: jnp.sum(by * pj.linear_log_prob(h, w, y)), (0, 1)),
        jax.value_and_grad(weighted_log_prob, (0, 1)),
        (
            _struct((*SEQUENCES, FEATURES), jnp.bfloat16),
            kernel,
            _struct(SEQUENCES, jnp.int32),
            _struct(SEQUENCES, jnp.float32),
        ),
        1.8,
        relative=True,
        held=HELD + 4 * FEATURES * CLASSES,
    )
    teacher = _struct((TOKENS, TOP), jnp.int32), _struct((TOKENS, TOP), jnp.float32)
    for dtype in (jnp.float32, jnp.bfloat16):
        logits = _logits(dtype)
        result[f"`kl_to_top_k`, {jnp.dtype(dtype).name}"] = _differentiated(
            partial(pj.kl_to_top_k, direction="reverse"),
            kl_to_top_k,
            (logits, *teacher),
            TOP_BAR,
            quick=dtype == jnp.float32,
        )._replace(held=logits.size * logits.dtype.itemsize // 20)
    for package, (peer, shape) in linear_peers().items():
        result[f"`linear_cross_entropy` of {package}"] = Case(
            jax.value_and_grad(peer, (0, 1)),
            None,
            (hidden, _struct(shape, jnp.bfloat16), labels),
            None,
            relative=True,
        )
    for label, spec in (
        ("rows", PartitionSpec("devices", None)),
        ("classes", PartitionSpec(None, "devices")),
    ):
        result[f"`kl_from_logits`, float32, {label} sharded"] = _differentiated(
            pj.kl_from_logits, kl, (_logits(jnp.float32),) * 2, 5.3, quick=True
        )._replace(spec=spec)
    return result


def _struct(shape, dtype):
    return jax.ShapeDtypeStruct(shape, dtype)


def _values():
    return _struct(VALUES, jnp.float32)


def _logits(dtype):
    return _struct(LOGITS, dtype)


def _differentiated(ours, textbook, arguments, bar, quick=False):
    return Case(jax.value_and_grad(ours), jax.value_and_grad(textbook), arguments, bar, quick)


def _penalty(name):
    case = penalties.CASES[name]
    ours, textbook = (lambda x, f=f: f(x, case.number) for f in (case.ours, case.textbook))
    return _differentiated(ours, textbook, (_values(),), 2.1, quick=name == "smooth_l0")


class Result(NamedTuple):
    """What a program moves on one machine; bytes, on each device."""

    name: str
    machine: str
    unit: int
    moved: int
    temporaries: int
    sent: int | None
    textbook_moved: int | None
    textbook_temporaries: int | None
    bar: float | None
    relative: bool
    held: int | None

    @property
    def met(self) -> bool:
        """Whether the program is within its bars."""
        base = self.textbook_moved if self.relative else self.unit
        few = self.bar is None or base is None or self.moved <= self.bar * base
        few &= self.held is None or self.temporaries <= self.held
        return few and (self.sent or 0) <= COLLECTIVES_BAR * self.unit


def measure(name: str, case: Case, machine: str, *, textbook: bool) -> Result:
    """Compiles a case for a machine, and the textbook's program if asked to."""
    kind = (MESHES if case.spec else SINGLE)[machine]
    ours = compile_for(kind, case.ours, *case.arguments, spec=case.spec)
    text = ours.as_text()
    first = case.arguments[0]
    unit = first.size * first.dtype.itemsize
    peer = None
    if textbook and case.textbook:
        peer = compile_for(kind, case.textbook, *case.arguments, spec=case.spec)
    return Result(
        name=name,
        machine=machine,
        unit=unit // len(target(kind)) if case.spec else unit,
        moved=moved(text),
        temporaries=ours.memory_analysis().temp_size_in_bytes,
        sent=sum(collectives(text).values()) if case.spec else None,
        textbook_moved=peer and moved(peer.as_text()),
        textbook_temporaries=peer and peer.memory_analysis().temp_size_in_bytes,
        bar=case.bar,
        relative=case.relative,
        held=case.held,
    )


def _row(result):
    if result.relative:
        bar = f"{result.bar} textbooks"
        unit, digits, name = 1e9, 1, " GB"
    else:
        bar, unit, digits, name = f"{result.bar}", result.unit, 2, ""
    if result.bar is None:
        bar, word = "", ""
    elif (result.name, result.machine) in KNOWN_MISSES and not result.met:
        word = "missed, as known"
    else:
        word = verdict(met=result.met)

    def cell(number, unit, digits, suffix=""):
        return "" if number is None else f"{number / unit:.{digits}f}{suffix}"

    return {
        "program": result.name,
        "machine": result.machine,
        "moved": cell(result.moved, unit, digits, name),
        "textbook": cell(result.textbook_moved, unit, digits, name),
        "bar": bar,
        "verdict": word,
        "temporaries, MB": cell(result.temporaries, 1e6, 1),
        "textbook's": cell(result.textbook_temporaries, 1e6, 1),
        "collectives, KB": cell(result.sent, 1e3, 1),
    }


def compile_times() -> list[dict[str, str]]:
    """A table of the seconds that programs take to be traced and compiled for an H100."""

    def compiling(function, arguments):
        def once():
            jax.clear_caches()
            compile_for(SINGLE["H100"], lambda *xs: function(*xs), *arguments)

        return once

    rows = []
    for name in COMPILED:
        case = cases()[name]
        programs = {
            side: compiling(function, case.arguments)
            for side, function in (("ours", case.ours), ("textbook", case.textbook))
        }
        times = harness.measure(programs, rounds=7, label=f"compiling {name}")
        over = ratio(times["ours"], times["textbook"])
        rows.append(
            {
                "program": name,
                "seconds": spread(times["ours"]).text(),
                "textbook": spread(times["textbook"]).text(),
                "over the textbook": over.text(),
                "bar": f"{COMPILE_BAR}",
                "verdict": verdict(met=over.median <= COMPILE_BAR),
            }
        )
    return rows


def main(quick: bool = False, out: Path = Path(__file__).parent / "results") -> None:
    """Counts the bytes that programs for an H100 and for TPUs move, and prints a table.

    Args:
        quick: The programs that are checked for every commit, without the textbook's where it is
            not the bar.
        out: Where accelerators.json goes.
    """
    jax.config.update("jax_platforms", "cpu")
    runs = []
    for name, case in cases().items():
        machines = MESHES if case.spec else SINGLE if case.quick and not quick else MAIN
        if case.quick or not quick:
            runs += [(name, case, machine) for machine in machines]
    results = []
    for name, case, machine in (progress := tqdm(runs, unit="program")):
        progress.set_postfix_str(f"{name} on {machine}")
        textbook = not quick or case.relative
        results.append(measure(name, case, machine, textbook=textbook))
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "accelerators.json", {"results": [result._asdict() for result in results]})
    print(", ".join(f"{name} {version(name)}" for name in ("jax", "libtpu", "jax-cuda13-plugin")))
    print("\n" + table([_row(result) for result in results]))
    if not quick:
        print("\n" + table(compile_times()))
    missed = {(r.name, r.machine) for r in results if not r.met}
    if missed - KNOWN_MISSES:
        print("\nMissed: " + "; ".join(f"{n} on {m}" for n, m in sorted(missed - KNOWN_MISSES)))
        sys.exit(1)


if __name__ == "__main__":
    # Here, as `benchmarks.gpu` runs where it may be missing.
    import tyro

    tyro.cli(main)
