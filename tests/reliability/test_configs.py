"""What is read from a dict, JSON or YAML is right, or refused with the path, within bounds.

Random plain data and texts, most of them what `pj.to_dict` writes with something wrong in it. What
is accepted is compared with a reading of its own of the same data or text.
"""

import contextlib
import copy
import datetime
import decimal
import json
import math
import re
import signal
import time
import tracemalloc

import hypothesis.strategies as st
import jax
import numpy as np
import pytest
import yaml
from hypothesis import given
from jax.tree_util import Partial

import penalties_jax as pj
from penalties_jax._pytree import TYPES
from tests.catalogue import EXAMPLES, GATE_CONFIGS, saturating, squared_distance
from tests.reliability.attacks import HARD, examples

# Annotations would refuse what is attacked here, and take their time.
pytestmark = pytest.mark.untyped

SECONDS = 1.0
MEGABYTES = 100

FUNCTIONS = {
    f"tests.catalogue:{function.__name__}": function for function in (saturating, squared_distance)
}
CONFIGS = [
    *EXAMPLES.values(),
    *GATE_CONFIGS.values(),
    0.5 * (pj.L1() + 2.0 * (pj.L2() + pj.anneal(0, 1, start=0, end=3) * pj.Huber())),
    pj.L1(weights={"a": 1.0, "b": [0.5, None], "c": (2.0, 3.0)}),
    pj.L2(center=np.float32([[0.5, -1.0], [2.0, 0.0]]), weights=np.arange(3), axis_name=("a", "b")),
    pj.GroupLasso(axis=(0, -1), weights=np.ones((0, 3), np.float32)),
    pj.DualAscent(target=pj.anneal(0.1, 0.5, start=0, end=9)),
    pj.AdaptiveSparsityScheduler(remember=True).weight,
    pj.AdaptiveKL(target=pj.anneal(0.1, 0.5, start=0, end=9), horizon=9.0, measure="kl"),
    pj.Budget(limit=0.5).weight,
    pj.Objective(
        terms={
            "kl": pj.Term(pj.KLDivergence(), on=("p", "q"), where="mask", weight=0.1),
            "l1": pj.Term(0.5 * pj.L1(), on="x", weight=pj.anneal(0, 1, start=0, end=5)),
        }
    ).disable("kl"),
]
WRITTEN = [pj.to_dict(config) for config in CONFIGS]


def one_of(values):
    """As `st.sampled_from`, but fresh, and without a description of them all."""
    return st.integers(0, len(values) - 1).map(lambda i: copy.deepcopy(values[i]))


# The attacks: data.

DTYPES = [
    *("float32", "float64", "float16", "bfloat16", "float8_e4m3fn"),
    *("int4", "int32", "uint8", "bool"),
    *("object", "O", "U5", "S3", "datetime64[ns]", "complex64", "V8", "i4,f4", "f", "", "float33"),
]
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.floats(width=32)
    | st.sampled_from(["false", "true", "x", "mean", "1.5", "", "\0", "\ud800"])
    | st.integers(0, 10_000).map(lambda n: "a" * n)
    | st.sampled_from([math.inf, -math.inf, math.nan, 1e300, -0.0, 5e-324])
    | st.sampled_from([31, 53, 63, 64, 1_500, 14_000]).map(lambda bits: 2**bits)
    | st.sampled_from(
        [
            datetime.date(2020, 1, 1),
            datetime.datetime(2020, 1, 1, 12),
            b"bytes",
            frozenset({1.0}),
            1j,
            decimal.Decimal("0.1"),
            np.array(["a"]),
            np.array([None]),
            object(),
            len,
            pj.L1(),
        ]
    )
)
KEYS = st.sampled_from(
    ["type", "array", "dtype", "shape", "tuple", "namedtuple", "fields", "weights", "x", ""]
) | st.sampled_from([1, None, True, 0.5, ("a",), b"k"])
ARRAYS = st.fixed_dictionaries(
    {
        "array": st.recursive(SCALARS, lambda items: st.lists(items, max_size=3), max_leaves=5),
        "dtype": st.sampled_from(DTYPES) | SCALARS,
    },
    optional={"shape": st.lists(st.integers(-1, 3), max_size=3) | SCALARS},
)
DATA = st.recursive(
    SCALARS | ARRAYS | one_of(WRITTEN),
    lambda items: (
        st.lists(items, max_size=3)
        | st.dictionaries(KEYS, items, max_size=3)
        | st.fixed_dictionaries({"tuple": items})
        | st.fixed_dictionaries(
            {
                "namedtuple": st.sampled_from(["optax:EmptyState", "os:system", "a", ""]),
                "fields": items,
            }
        )
    ),
    max_leaves=6,
)


def places(data):
    """Every container and key in plain data."""
    pairs = data.items() if isinstance(data, dict) else enumerate(data)
    for key, value in pairs:
        yield data, key
        if isinstance(value, dict | list):
            yield from places(value)


@st.composite
def changed(draw):
    """What `pj.to_dict` writes, with up to three places that hold something else."""
    data = draw(one_of(WRITTEN))
    for _ in range(draw(st.integers(0, 3))):
        there = list(places(data))
        if not there:
            break
        container, key = draw(st.sampled_from(there))
        match draw(st.sampled_from(["replace", "quote", "wrap", "drop", "rename", "add"])):
            case "replace":
                container[key] = draw(DATA)
            case "quote":
                container[key] = str(container[key])
            case "wrap":
                container[key] = draw(st.sampled_from([list, dict, tuple, tuple]))([])
            case "drop":
                del container[key]
            case "rename" if isinstance(container, dict):
                container[draw(KEYS)] = container.pop(key)
            case _ if isinstance(container, dict):
                container[draw(KEYS)] = draw(DATA)
    return data


@st.composite
def of_any_type(draw):
    """Any type of config with any of its fields."""
    name = draw(st.sampled_from(sorted(name for name, cls in TYPES.items() if _is_ours(cls))))
    values = {
        field: draw(DATA) for field in TYPES[name].__dataclass_fields__ if draw(st.booleans())
    }
    return {"type": name, **values}


def _is_ours(cls):
    return cls.__module__.startswith("penalties_jax.")


def chain(depth, link, end=1.0):
    for _ in range(depth):
        end = link(end)
    return end


def laughs(levels, width=10):
    """A list of lists of one list, which is `width**levels` numbers."""
    return chain(levels, lambda data: [data] * width)


def itself():
    data = []
    data.append(data)
    return data


SCALED = {"type": "Scaled", "scale": 1.0}
DEPTHS = [10, 60, 64, 65, 300, 3_000, 100_000]
DEEP = [
    make(depth)
    for depth in DEPTHS
    for make in (
        lambda depth: {"type": "L1", "weights": chain(depth, lambda x: [x])},
        lambda depth: {"type": "L1", "weights": chain(depth, lambda x: {"a": x})},
        lambda depth: {"type": "L1", "weights": chain(depth, lambda x: {"tuple": [x]})},
        lambda depth: {
            "type": "L1",
            "weights": {"array": chain(depth, lambda x: [x]), "dtype": "float32"},
        },
        lambda depth: chain(depth, lambda x: SCALED | {"penalty": x}, {"type": "L1"}),
        lambda depth: chain(depth, lambda x: {"type": "L1", "weights": x}),
    )
]
LARGE = [
    *({"type": "L1", "weights": laughs(levels)} for levels in (2, 4, 6, 9, 30)),
    *(
        {"type": "L1", "weights": {"array": laughs(levels), "dtype": "float32"}}
        for levels in (2, 4, 6, 9, 30)
    ),
    {"type": "Sum", "penalties": chain(9, lambda x: {"type": "Sum", "penalties": [x] * 10})},
    {"type": "L1", "weights": itself()},
    {"type": "L1", "weights": {"array": itself(), "dtype": "float32"}},
    {"type": "L1", "weights": {"tuple": itself()}},
    {"type": "L1", "weights": {"array": [], "dtype": "float32", "shape": [0, 10**30]}},
    {"type": "L1", "weights": {"array": [], "dtype": "float32", "shape": [10**9, 10**9]}},
    {"type": "L1", "axis_name": itself()},
    {"type": "L1", "weights": {"array": ["a" * 1_000_000] + [""] * 100_000, "dtype": "float32"}},
    {"type": "L1", "weights": [0.5] * 1_000_000},
    {"type": "Sum", "penalties": [{"type": "L1"}] * 200_000},
]


# The attacks: texts.

SNIPPETS = [
    *("NaN", "Infinity", "-Infinity", "1e999", "-1e999", "9" * 5000, "0x1F", "1_000", "010", "09"),
    *("nan", ".inf", ".nan", "1:30:00", "2020-01-01", "2020-01-01T12:00:00Z", "~", "null"),
    *("'false'", '"false"', "yes", "FALSE", "1e-4", ".5", "5.", "+1", "0o17", "0b1", "=", "<<"),
    *("\0", "\ud800", '"\\ud800"', '"\\UFFFFFFFF"', "\ufeff", "\t", "\n", " ", "#", "|", ">", "?"),
    *("[", "]", "{", "}", ",", ":", '"', "'", "\\", "---", "...", "- ", "%YAML 1.1\n---\n"),
    *("a" * 5000, "[" * 200, "{a: " * 200, "&a ", "*a", "&a [*a]", "&a {b: *a}"),
    *("!!set {a}", "!!binary aGk=", "!!timestamp x", "!!bool x"),
    *("!!int x", "!!float x", "!!null x", "!!omap [a: 1]", "!!pairs [a: 1]", "!!str 5", "!!map []"),
    *("!!python/object/apply:os.system [ls]", "!!python/tuple [1]", "!x y", "! z", "!!seq {a: 1}"),
    *('"type": "L2"', '"weights": 2, "weights": 3', "<<: {weights: 2}", "weights: 2"),
    "{a: 1, a: 2}",
]


def with_snippets(draw, text):
    for _ in range(draw(st.integers(0, 3))):
        # Mostly in the place of a value.
        tokens = [match.span() for match in re.finditer(r"[^\s:,\[\]{}]+|.", text, re.DOTALL)]
        start, end = draw(st.sampled_from(tokens)) if tokens else (0, 0)
        end = draw(st.sampled_from([start, end]))
        text = text[:start] + draw(one_of(SNIPPETS) | st.text(max_size=3)) + text[end:]
    return text


def writable(data):
    """As a text can hold it."""
    if isinstance(data, dict):
        return {str(key): writable(value) for key, value in data.items()}
    if isinstance(data, list | tuple | frozenset):
        return list(map(writable, data))
    large = isinstance(data, int) and abs(data) > 10**4000
    return data if isinstance(data, int | float | str | None) and not large else str(type(data))


@st.composite
def json_texts(draw):
    return with_snippets(draw, json.dumps(writable(draw(changed()))))


@st.composite
def yaml_texts(draw):
    data = writable(draw(changed()))
    flow = draw(st.booleans())
    with contextlib.suppress(UnicodeEncodeError):
        return with_snippets(draw, yaml.safe_dump(data, default_flow_style=flow))
    return json.dumps(data)


def merges(levels, width=10):
    """Mappings that merge each other, `width` times each."""
    lines = ["a0: &a0 {k: 1}"]
    for i in range(levels):
        lines.append(f"a{i + 1}: &a{i + 1} {{<<: [{', '.join([f'*a{i}'] * width)}]}}")
    return "\n".join(lines)


def aliases(levels, width=10):
    lines = ["type: L1", "a0: &a0 1"]
    for i in range(levels):
        lines.append(f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * width)}]")
    return "\n".join([*lines, f"weights: *a{levels}"])


LARGE_JSON = [
    *("[" * depth for depth in (100, 1_000, 100_000, 3_000_000)),
    *('{"type": "L1", "weights": ' * depth for depth in (100, 1_000, 100_000)),
    '{"type": "L1", "weights": ' + "[" * 100_000 + "]" * 100_000 + "}",
    '{"type": "L1", "weights": ' + "9" * 5_000 + "}",
    '{"type": "L1", "weights": ' + "9" * 3_000_000 + "}",
    '{"type": "L1", "weights": [' + "0," * 1_500_000 + "0]}",
    '{"type": "L1", "weights": [' + "[]," * 1_000_000 + "0]}",
    '{"type": "L1", "weights": [' + "{}," * 3_000_000 + "0]}",
    '{"type": "L1", "reduction": "' + "a" * 3_000_000 + '"}',
    '{"type": "L1", "' + "a" * 3_000_000 + '": 1}',
]
LARGE_YAML = [
    *(aliases(levels) for levels in (2, 4, 6, 9, 20, 500)),
    *(merges(levels) for levels in (2, 4, 6, 9, 20, 500)),
    *("[" * depth for depth in (50, 100, 1_000, 100_000)),
    *("- " * depth for depth in (50, 100, 1_000, 100_000)),
    *("{a: " * depth for depth in (50, 100, 1_000, 100_000)),
    "{type: L1, weights: " + "[" * 3_000 + "]" * 3_000 + "}",
    "{type: L1, weights: &a [*a]}",
    "&a {type: L1, weights: *a}",
    "&a {<<: *a, type: L1}",
    "&a {type: Scaled, scale: 1, penalty: *a}",
    "\n".join(["a0: &a0 [1]", *(f"a{i + 1}: &a{i + 1} [*a{i}]" for i in range(3_000))]),
    "\n".join(["a0: &a0 {k: 1}", *(f"a{i + 1}: &a{i + 1} {{<<: *a{i}}}" for i in range(3_000))]),
    "{type: L1, weights: " + "9" * 5_000 + "}",
    "{type: L1, weights: " + "9" * 500_000 + "}",
    "{type: L1, weights: 0x" + "f" * 100_000 + "}",
    "{type: L1, weights: " + ":".join(["59"] * 100_000) + "}",
    "{type: L1, weights: [" + "1," * 200_000 + "1]}",
    "{type: L1, reduction: '" + "a " * 500_000 + "'}",
    "#" * 2_000_000,
    "#\n" * 1_000_000,
    "\n" * 2_000_000,
]


# What comes of them.


class HangError(BaseException):
    """Too long: no error that anything catches."""


@contextlib.contextmanager
def bounded():
    """Raises HangError after the seconds that are allowed, of the CPU."""

    def stop(number, frame):
        raise HangError

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, 10 * SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def outcome(read, given, meaning):
    """What comes of reading something: "right" and "refused" are well, all others are faults."""
    if HARD:
        tracemalloc.start()
    start = time.process_time()
    try:
        with bounded():
            config = read(given, functions=FUNCTIONS)
    except (ValueError, TypeError) as error:
        found = "refused" if _is_clear(error) else f"unclear: {error!s:.200}"
    except HangError:
        tracemalloc.stop()
        return "hang"
    except Exception as error:
        found = f"escaped: {type(error).__name__}: {error!s:.100}"
    else:
        found = ""
    seconds = time.process_time() - start
    megabytes = tracemalloc.get_traced_memory()[1] / 1e6
    tracemalloc.stop()
    # Which take several times as long while memory is traced.
    if seconds > (5 if HARD else 1) * SECONDS:
        return f"slow: {seconds:.1f} s"
    if megabytes > MEGABYTES:
        return f"large: {megabytes:.0f} MB"
    return found or ("right" if _is_right(config, meaning(given)) else f"wrong: {config!r:.200}")


def _is_clear(error):
    """Whether an error names a path or a place in a text."""
    root = re.match(r"type must be one of|the (config|text) |([A-Z]\w*)\b", str(error))
    known = root and (root[2] is None or root[2] in TYPES)
    return bool(known or re.search(r"line \d+", str(error)))


def _is_right(config, data):
    again = pj.from_dict(pj.to_dict(config), functions=FUNCTIONS)
    same = jax.tree.structure(again) == jax.tree.structure(config) and all(
        a is b or np.array_equal(a, b, equal_nan=True)
        for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(config), strict=True)
    )
    return same and says(data, config)


def says(data, value):
    """Whether data stands for a value of a config: by its words, not by how it is read."""
    # How a config holds a function.
    value = value.func if isinstance(value, Partial) else value
    if isinstance(data, dict) and all(isinstance(key, str) for key in data):
        if "type" in data:
            rest = {name: item for name, item in data.items() if name != "type"}
            return type(value).__name__ == data["type"] and all(
                says(item, getattr(value, name)) for name, item in rest.items()
            )
        if "array" in data:
            shape = tuple(data["shape"]) if "shape" in data else np.shape(data["array"])
            return (
                np.dtype(value.dtype).name == np.dtype(data["dtype"]).name
                and value.shape == shape
                and all(map(_is_number, _flat(data["array"]), _flat(value.tolist())))
            )
        if "tuple" in data:
            return type(value) is tuple and says(data["tuple"], list(value))
        if "namedtuple" in data:
            return says(data["fields"], value._asdict())
        return (
            isinstance(value, dict)
            and value.keys() == data.keys()
            and all(says(data[key], value[key]) for key in data)
        )
    if isinstance(data, list | tuple):
        same = isinstance(value, list | tuple) and len(value) == len(data)
        return same and all(map(says, data, value))
    if isinstance(data, str) and callable(value):
        return value is FUNCTIONS.get(data)
    # A controller's target is a view of the same number.
    if type(value).__name__ == "Setpoint":
        return says(data, value.target)
    return _stands_for(data, value)


def _stands_for(word, value):
    if isinstance(word, bool):
        return value is word or (type(value) is float and value == word)
    if isinstance(word, int | float | decimal.Decimal):
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        if math.isfinite(word) and math.isfinite(value):
            return math.isclose(decimal.Decimal(word), decimal.Decimal(value), rel_tol=0.07)
        return value == word or (value != value and word != word)
    return isinstance(word, str | None) and type(value) is type(word) and value == word


def _is_number(word, number):
    """Whether an entry of an array is what stands for it, where true may be 1 and 1 may be true."""
    return isinstance(word, bool | int | float | decimal.Decimal) and _stands_for(
        float(word), float(number)
    )


def _flat(items):
    return [x for item in items for x in _flat(item)] if isinstance(items, list) else [items]


def of_json(text):
    """What JSON says, with all digits; keys that come twice say nothing."""

    def pairs(items):
        keys = [key for key, _ in items]
        return dict(items) if len(keys) == len(set(keys)) else {1: "twice"}

    return json.loads(text, parse_float=decimal.Decimal, object_pairs_hook=pairs)


def of_yaml(text):
    """What YAML 1.2 says, node by node; what is merged is left out."""

    def data(node):
        if isinstance(node, yaml.MappingNode):
            pairs = [(data(key), data(value)) for key, value in node.value]
            keys = [key for key, _ in pairs]
            return dict(pairs) if len(keys) == len(set(keys)) else {1: "twice"}
        if isinstance(node, yaml.SequenceNode):
            return list(map(data, node.value))
        return node.value if node.style else _word(node.value)

    found = data(yaml.compose(text, yaml.SafeLoader))
    return {key: value for key, value in found.items() if key != "<<"}


def _word(text):
    if text in ("", "~", "null", "Null", "NULL"):
        return None
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if text.lower() in (".inf", "+.inf", "-.inf", ".nan"):
        return float(text.replace(".", ""))
    if re.fullmatch(r"0x[0-9a-fA-F]+|0o[0-7]+", text):
        return int(text, 0)
    digits = re.fullmatch(r"[-+.0-9eE]+", text)
    try:
        return decimal.Decimal(text) if digits else text
    except decimal.InvalidOperation:
        return text


def as_it_is(data):
    return data


ATTACKS = {
    "dicts, changed": (pj.from_dict, as_it_is, changed()),
    "dicts of any type": (pj.from_dict, as_it_is, of_any_type()),
    "JSON": (pj.from_json, of_json, json_texts()),
    "YAML": (pj.from_yaml, of_yaml, yaml_texts()),
}
TAILS = {
    "deep dicts": (pj.from_dict, as_it_is, DEEP),
    "large dicts": (pj.from_dict, as_it_is, LARGE),
    "large JSON": (pj.from_json, of_json, LARGE_JSON),
    "large YAML": (pj.from_yaml, of_yaml, LARGE_YAML),
}


def _slow(given):
    """Long texts, which take seconds to make and to compare."""
    return pytest.mark.slow if isinstance(given, str) and len(given) > 150_000 else ()


@pytest.mark.parametrize("attack", ATTACKS)
@examples(little=100, hard=10_000)
@given(data=st.data())
def test_what_is_read_is_right_or_refused(attack, data):
    read, meaning, strategy = ATTACKS[attack]
    assert outcome(read, data.draw(strategy), meaning) in ("right", "refused")


@pytest.mark.parametrize(
    ("read", "meaning", "given"),
    [
        pytest.param(read, meaning, given, id=f"{name}-{i}", marks=_slow(given))
        for name, (read, meaning, all_given) in TAILS.items()
        for i, given in enumerate(all_given)
    ],
)
def test_what_is_deep_or_large_is_right_or_refused(read, meaning, given):
    assert outcome(read, given, meaning) in ("right", "refused")
