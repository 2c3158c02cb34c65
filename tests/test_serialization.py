"""Configs through dicts, JSON, YAML, pickle and an Orbax checkpoint."""

import json
import pickle
import sys
from collections import OrderedDict
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import yaml

import penalties_jax as pj
from tests.catalogue import EXAMPLES, GATE_CONFIGS, choices_of, saturating, squared_distance
from tests.oracles import assert_close


class Pair(NamedTuple):
    kernel: Any
    bias: Any


SHAPES = choices_of(pj.anneal)["shape"]
CONFIGS = (
    EXAMPLES
    | GATE_CONFIGS
    | {
        **{shape: pj.anneal(1.0, 0.1, start=0, end=10, shape=shape) for shape in SHAPES},
        "fraction": pj.anneal_fraction(2, 0.4, total_steps=100, start_frac=0.1),
        "every option": pj.L2(
            center=1, clip=2.0, weights=3, reduction="mean", axis_name=("a", "b")
        ),
        "axes": pj.GroupLasso(axis=(0, -1), reduction="none"),
        "scheduled": pj.SmoothL0(gamma=pj.anneal(1.0, 0.1, start=0, end=10), normalize_at_one=True),
        "of hidden states": pj.KLDivergence(inputs="hidden", softcap=(30.0, None), weights=0.5),
        "scaled": 0.1 * pj.L1(),
        "nested": 0.5 * (pj.L1() + 2.0 * (pj.L2() + pj.anneal(0, 1, start=0, end=3) * pj.Huber())),
        "tree": pj.L1(weights={"a": 1.0, "b": [0.5, None], "c": (2.0, 3.0)}),
        "named tuple": pj.L2(
            center=Pair(np.float32([0.5]), {"b": Pair(1.0, (2.0, optax.EmptyState()))})
        ),
        "a list that is bound": pj.Consistency().against([0.5, (np.ones(2), None)]),
        "a function that is a config": pj.GradientPenalty(pj.Huber()),
        "term": pj.Term(pj.L1(), on=("x", "y"), where="mask", weight=0.5),
        "objective": pj.Objective(
            terms={
                "kl": pj.Term(pj.KLDivergence(), on=("p", "q"), where="mask", weight=0.1),
                "l1": pj.Term(0.5 * pj.L1(), on="x", weight=pj.anneal(0, 1, start=0, end=5)),
            }
        ).disable("kl"),
    }
)
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())

ARRAYS = {
    "float32": np.float32([[0.1, 1e30], [1e-30, -0.0]]),
    "float64": np.array([0.1, 1e300, 1 / 3]),
    "float16": np.float16([0.1, 6e4]),
    "bfloat16": np.array([0.1, 1e30], ml_dtypes.bfloat16),
    "int32": np.int32([1, -(2**31)]),
    "int64": np.array([2**40]),
    "uint8": np.uint8([0, 255]),
    "bool": np.array([True, False]),
    "a scalar": np.float32(0.1),
    "a 0-d array": np.array(0.1, np.float32),
    "no rows": np.zeros((0, 3), np.float32),
    "no columns": np.zeros((2, 0, 3), ml_dtypes.bfloat16),
    "inf and nan": np.float32([np.inf, -np.inf, np.nan]),
    "jax": jnp.array([0.1, 0.2]),
    "jax, bfloat16": jnp.array([0.1, 0.2], jnp.bfloat16),
}

FUNCTIONS = {
    f"tests.catalogue:{function.__name__}": function for function in (saturating, squared_distance)
}
from_dict = partial(pj.from_dict, functions=FUNCTIONS)
ROUTES = {
    "dict": (pj.to_dict, from_dict),
    "json": (pj.to_json, partial(pj.from_json, functions=FUNCTIONS)),
    "yaml": (pj.to_yaml, partial(pj.from_yaml, functions=FUNCTIONS)),
    "json of dict": (lambda c: json.dumps(pj.to_dict(c)), lambda s: from_dict(json.loads(s))),
    "yaml of dict": (lambda c: yaml.dump(pj.to_dict(c)), lambda s: from_dict(yaml.safe_load(s))),
    "pickle": (pickle.dumps, pickle.loads),
}
every_route = pytest.mark.parametrize(("there", "back"), ROUTES.values(), ids=ROUTES.keys())


def plain(data):
    """Whether data is made of plain Python values only."""
    if isinstance(data, dict):
        return all(type(key) is str and plain(value) for key, value in data.items())
    if isinstance(data, list):
        return all(map(plain, data))
    return data is None or type(data) in (bool, int, float, str)


@every_config
@every_route
def test_round_trip(config, there, back):
    again = back(there(config))
    assert again == config
    assert type(again) is type(config)
    assert jax.tree.structure(again) == jax.tree.structure(config)


@pytest.mark.parametrize("array", ARRAYS.values(), ids=ARRAYS.keys())
@every_route
def test_arrays_keep_dtype_shape_and_values(array, there, back):
    center = back(there(pj.L2(center=array))).center
    assert np.asarray(center).dtype == np.asarray(array).dtype
    np.testing.assert_array_equal(np.asarray(center), np.asarray(array))


@pytest.mark.parametrize("config", [*CONFIGS.values(), pj.L1(weights=ARRAYS["bfloat16"])])
def test_a_dict_is_plain(config):
    data = pj.to_dict(config)
    assert plain(data)
    assert data["type"] == type(config).__name__


@pytest.mark.untyped
@every_route
def test_options_of_numpy(there, back):
    config = pj.GroupLasso(axis=(np.int64(0), np.int8(-1)), axis_name=[np.str_("a")])
    assert back(there(config)) == config == pj.GroupLasso(axis=(0, -1), axis_name=("a",))


def test_the_format():
    config = 2 * pj.L1(weights=np.float32([0.5, 1]), axis_name=("a", "b"))
    assert pj.to_dict(config) == {
        "type": "Scaled",
        "penalty": {
            "type": "L1",
            "reduction": "sum",
            "axis_name": ["a", "b"],
            "weights": {"array": [0.5, 1.0], "dtype": "float32"},
        },
        "scale": 2.0,
    }
    assert pj.from_yaml("{type: GroupLasso, axis: [0, 1]}") == pj.GroupLasso(axis=(0, 1))
    assert pj.from_json('{"type": "Lp", "p": 1}') == pj.Lp(p=1.0)


def test_a_round_trip_works_the_same():
    config = CONFIGS["nested"]
    again = pj.from_json(pj.to_json(config))
    x = jnp.array([0.5, -2.0])
    value = jax.jit(lambda config: config.at(2)(x))
    assert float(value(again)) == float(value(config))
    data = pj.to_dict(config)
    pj.from_dict(data)
    assert data == pj.to_dict(config)


loss = lambda outputs: outputs["x"]  # noqa: E731


@pytest.mark.parametrize(
    ("config", "field"),
    [
        (pj.Objective(loss=loss), r"Objective\.loss"),
        (pj.Term(pj.L1(), on=loss), r"Term\.on"),
        (pj.Term(pj.L1(), on="x", where=loss), r"Term\.where"),
        (pj.L1(weights=loss), r"L1\.weights.*pj\.anneal"),
        (pj.L1(weights={"a": OrderedDict(b=1.0)}), r"L1\.weights\['a'\]"),
        (pj.L1(weights={"array": 1.0}), r"L1\.weights"),
        (pj.L1(weights={1: 1.0}), r"L1\.weights"),
    ],
)
def test_what_is_not_data(config, field):
    for there in (pj.to_dict, pj.to_json, pj.to_yaml):
        with pytest.raises(TypeError, match=field):
            there(config)


@pytest.mark.parametrize("value", [None, 1.0, {}, [pj.L1()], pj.L1, pj.l1])
def test_what_is_not_a_config(value):
    with pytest.raises(TypeError, match="to_dict takes a config"):
        pj.to_dict(value)


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ({"type": "L3"}, ValueError, "type must be one of .*'L1'.*got 'L3'"),
        ({"type": "Penalty"}, ValueError, "got 'Penalty'"),
        ({"weights": 1.0}, ValueError, "got None"),
        ({}, ValueError, "got None"),
        ({"type": ["L1"]}, ValueError, r"got \['L1'\]"),
        (None, ValueError, "got None"),
        ("L1", ValueError, "got 'L1'"),
        ([{"type": "L1"}], ValueError, "type must be one of"),
        ({"type": "L1", "gamma": 1.0}, TypeError, "L1.*'gamma'"),
        ({"type": "SmoothL0"}, TypeError, "SmoothL0.*'gamma'"),
        ({"type": "SmoothL0", "gamma": -1}, ValueError, r"SmoothL0\.gamma must be above 0, got -1"),
        ({"type": "L1", "reduction": "avg"}, ValueError, r"L1\.reduction must be one of"),
        ({"type": "L1", "weights": "much"}, TypeError, r"L1\.weights must be a number"),
        ({"type": "Scaled", "penalty": {"type": "?"}, "scale": 1}, ValueError, "got '\\?'"),
    ],
)
def test_bad_data(data, error, message):
    with pytest.raises(error, match=message):
        pj.from_dict(data)


PENALTY = {"type": "SmoothL0", "gamma": 0.1}


@pytest.mark.parametrize(
    ("penalty", "error", "message"),
    [
        ({"type": "L3"}, ValueError, r": type must be one of .*'L1'.* got 'L3'"),
        (PENALTY | {"gama": 1.0}, TypeError, r": unknown field 'gama'; fields are .*gamma"),
        ({"type": "SmoothL0"}, TypeError, ": missing field 'gamma'"),
        (PENALTY | {"gamma": -1}, ValueError, r"\.gamma must be above 0, got -1"),
        (PENALTY | {"gamma": "1"}, TypeError, r"\.gamma must be a number, .* got '1'"),
        (PENALTY | {"reduction": "avg"}, ValueError, r"\.reduction must be one of 'sum'"),
        (
            PENALTY | {"normalize_at_one": "yes"},
            TypeError,
            r"\.normalize_at_one must be of type bool, got 'yes'",
        ),
        ({"type": "GroupLasso", "axis": "rows"}, TypeError, r"\.axis must be of type int \| tuple"),
        (
            PENALTY | {"weights": {"array": ["a"], "dtype": "float32"}},
            TypeError,
            r"\.weights: must be a number, or lists of numbers of one length",
        ),
        (
            {"type": "Sum", "penalties": [PENALTY, PENALTY | {"gamma": 0}]},
            ValueError,
            r"\.penalties\[1\]\.gamma must be above 0",
        ),
        (
            {"type": "Sum", "penalties": [PENALTY, 3]},
            TypeError,
            r"\.penalties\[1\] must be of type Penalty, got 3",
        ),
        (
            {"type": "Scaled", "scale": 1.0, "penalty": 3},
            TypeError,
            r"\.penalty must be of type Penalty, got 3",
        ),
        (3, TypeError, r" must be a config such as pj\.L1\(\), got 3"),
    ],
)
def test_what_is_wrong_is_named_by_its_path(penalty, error, message):
    data = {"type": "Objective", "terms": {"kl": {"type": "Term", "on": "x", "penalty": penalty}}}
    for read in (
        lambda: pj.from_dict(data),
        lambda: pj.from_json(json.dumps(data)),
        lambda: pj.from_yaml(yaml.dump(data)),
    ):
        whole = rf"^Objective\.terms\['kl'\]\.penalty{message}.*\Z"
        with pytest.raises(error, match=whole):
            read()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"terms": 3}, r"Objective\.terms must be of type Mapping\[str, Term\], got 3"),
        ({"terms": {"kl": 3}}, r"Objective\.terms\['kl'\] must be of type Term, got 3"),
        ({"terms": {"kl": {"type": "Term", "penalty": PENALTY, "on": 3}}}, r"\['kl'\]\.on must be"),
    ],
)
def test_an_objective_of_something_else(change, message):
    with pytest.raises(TypeError, match=message):
        pj.from_dict({"type": "Objective"} | change)


def test_yaml_as_it_is_written_by_hand():
    """Numbers with an exponent, and the key `on`, which YAML 1.1 takes for true."""
    text = "{type: Term, on: hidden, weight: 1e-4, penalty: {type: SmoothL0, gamma: -.5E1}}"
    with pytest.raises(ValueError, match=r"Term\.penalty\.gamma must be above 0, got -5\.0"):
        pj.from_yaml(text)
    term = pj.Term(pj.SmoothL0(gamma=5.0), on="hidden", weight=1e-4)
    assert pj.from_yaml(text.replace("-.5E1", "+.5E1")) == term
    for on in ("1e-4", "on", "true", "1.0", "~"):
        again = pj.Term(pj.L1(), on=on)
        assert pj.from_yaml(pj.to_yaml(again)) == again
    for weight in (1e-4, 1e-5, 1e300):
        written = pj.to_yaml(pj.L1(weights=weight))
        assert pj.from_yaml(written).weights == yaml.safe_load(written)["weights"] == weight


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        ({"array": [1.5], "dtype": "int32"}, ValueError, "must be of what int32 can hold, got"),
        ({"array": [300], "dtype": "uint8"}, ValueError, "must be of what uint8 can hold"),
        ({"array": [2**63], "dtype": "int64"}, ValueError, "must be of what int64 can hold"),
        ({"array": [1e300], "dtype": "float32"}, ValueError, "must be of what float32 can hold"),
        ({"array": [1e9], "dtype": "float8_e4m3fn"}, ValueError, "what float8_e4m3fn can hold"),
        ({"array": [2**70], "dtype": "float32"}, ValueError, "integers of up to 64 bits"),
        ({"array": ["1.5"], "dtype": "float32"}, TypeError, "must be a number, or lists of"),
        ({"array": ["false"], "dtype": "bool"}, TypeError, "must be a number, or lists of"),
        ({"array": [None], "dtype": "float32"}, TypeError, "must be a number, or lists of"),
        ({"array": [[1], [1, 2]], "dtype": "int32"}, TypeError, "must be a number, or lists of"),
        ({"array": [1], "dtype": "object"}, TypeError, "dtype must be one of real .* 'object'"),
        ({"array": [1], "dtype": "i4,f4"}, TypeError, "dtype must be one of real .* 'void64'"),
        ({"array": [1], "dtype": "complex64"}, TypeError, "dtype must be one of real"),
        ({"array": [1], "dtype": "float33"}, TypeError, "float33"),
        ({"array": [], "dtype": "float32", "shape": [0, -1]}, TypeError, "shape must be a list of"),
        ({"array": [1], "dtype": "int8", "shape": [0, 3]}, ValueError, "cannot reshape"),
        ({"array": [1]}, TypeError, 'a dict with .array. must be {"array": numbers'),
        ({"array": [1], "dtype": "int8", "x": 1}, TypeError, "a dict with 'array' must be"),
        ({"tuple": 1}, TypeError, "a dict with 'tuple' must be"),
        ({"namedtuple": "a:b", "fields": []}, TypeError, "a dict with 'namedtuple' must be"),
        ({"namedtuple": "a:b", "fields": {}}, TypeError, "'a:b' is no NamedTuple .* imported"),
        ({"namedtuple": "os:system", "fields": {}}, TypeError, "'os:system' is no NamedTuple"),
        (
            {"namedtuple": f"{Pair.__module__}:Pair", "fields": {"kernel": 1}},
            TypeError,
            r"the fields of .*:Pair are \('kernel', 'bias'\), got \['kernel'\]",
        ),
        ({"namedtuple": "a:b", "fields": {"type": "L1"}}, TypeError, "'a:b' is no NamedTuple"),
        ({1: 1.0}, TypeError, "keys must be strings, got 1"),
        ({"a": [{"type": "L2"}]}, TypeError, r"must be a number, an array or a schedule"),
        (10**400, ValueError, "must be a number that floats reach"),
    ],
)
def test_what_stands_for_nothing(weights, error, message):
    data = {"type": "Scaled", "scale": 1.0, "penalty": {"type": "L1", "weights": weights}}
    with pytest.raises(error, match=rf"^Scaled\.penalty\.weights(:|\['\w+'\]:)? .*{message}"):
        pj.from_dict(data)


def test_nothing_is_imported():
    data = {"type": "L1", "weights": {"namedtuple": "this:Zen", "fields": {}}}
    with pytest.raises(TypeError, match="nothing is imported here"):
        pj.from_dict(data)
    assert "this" not in sys.modules


@pytest.mark.parametrize(
    ("text", "weights"),
    [
        *(("1_0", None), ("1:30", None), ("2020-01-01", None), ("yes", None), ("'1'", None)),
        *(("010", 10), ("09", 9), ("0x1F", 31), ("0o17", 15), ("+1", 1), (".5", 0.5), ("5.", 5)),
        *(("1e3", 1000), ("1E-3", 0.001), (".inf", np.inf), ("1e999", None), ("9" * 400, None)),
        *(("!!float 1", None), ("!!timestamp x", None), ("!x 1", None), ("! 1", None)),
        *(("0x" + "f" * 400, None), ('"\\UFFFFFFFF"', None), ("!!python/name:os.system", None)),
    ],
)
def test_numbers_of_yaml(text, weights):
    """They are those of YAML 1.2; other words are no numbers, and there are no tags."""
    if weights is None:
        with pytest.raises((TypeError, ValueError), match=r"L1\.weights must be a number|YAML"):
            pj.from_yaml(f"{{type: L1, weights: {text}}}")
    else:
        assert pj.from_yaml(f"{{type: L1, weights: {text}}}").weights == weights


@pytest.mark.parametrize("digits", ["1e999", "-" + "9" * 5000])
def test_numbers_that_floats_do_not_reach(digits):
    for field in ("weights", "axis_name", "reduction"):
        for read in (pj.from_json, pj.from_yaml):
            with pytest.raises(
                (TypeError, ValueError), match=rf"^L1\.{field} must .* {digits[:40]}$"
            ):
                read(f'{{"type": "L1", "{field}": {digits}}}')


def test_aliases_and_merges_of_yaml():
    text = "{type: Sum, penalties: [&a {type: L1, weights: &w [1, 2]}, {<<: *a, weights: [3, *w]}]}"
    assert pj.from_yaml(text) == pj.L1(weights=[1, 2]) + pj.L1(weights=[3, [1, 2]])


def nested(penalty, levels):
    for _ in range(levels):
        penalty = 1.0 * penalty
    return penalty


@pytest.mark.parametrize("there", [pj.to_dict, pj.to_json, pj.to_yaml])
def test_what_is_too_much_is_not_written(there):
    """What is written can be read."""
    read = {pj.to_dict: pj.from_dict, pj.to_json: pj.from_json, pj.to_yaml: pj.from_yaml}[there]
    deepest = nested(pj.L1(), 63)
    assert read(there(deepest)) == deepest
    with pytest.raises(ValueError, match="the config is nested more than 64 levels deep"):
        there(1.0 * deepest)
    with pytest.raises(ValueError, match=r"the config has more than .*,000 keys and values"):
        there(pj.L1(weights=np.zeros(300_001)))
    if there is not pj.to_dict:
        most = 4_000_000 if there is pj.to_json else 300_000
        with pytest.raises(ValueError, match=rf"the text has .* characters, more than {most:,}"):
            there(pj.Term(pj.L1(), on="x" * most))


def test_keys_that_come_twice():
    with pytest.raises(ValueError, match="key 'p' twice"):
        pj.from_json('{"type": "Lp", "p": 1, "p": 2}')
    with pytest.raises(ValueError, match=r"key 'p' comes twice\n.* line 1, column 1"):
        pj.from_yaml("{type: Lp, p: 1, p: 2}")


def test_bad_text():
    with pytest.raises(ValueError, match="Expecting"):
        pj.from_json("{type: L1}")
    with pytest.raises(ValueError, match="type must be one of"):
        pj.from_json("[]")
    with pytest.raises(ValueError, match="type must be one of"):
        pj.from_yaml("")
    with pytest.raises(ValueError, match=r"no YAML.*(?s:.*) line 1, column 1") as raised:
        pj.from_yaml("{type: L1")
    assert isinstance(raised.value.__cause__, yaml.YAMLError)
    for read in (pj.from_json, pj.from_yaml):
        with pytest.raises((TypeError, ValueError), match="the text must be a string, got None"):
            read(None)


def test_an_orbax_checkpoint(tmp_path):
    params = {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}
    optimizer = optax.chain(pj.add_penalty(pj.L2(), weight=1e-3), optax.adam(1e-2))
    state = {
        "params": params,
        "optimizer": optimizer.init(params),
        "penalty": 0.5 * pj.SmoothL0(gamma=pj.anneal(1.0, 0.1, start=0, end=10)) + pj.L1(),
        "center": pj.L2(center=params, weights=jnp.float32(2)),
        "objective": CONFIGS["objective"],
        "step": jnp.int32(7),
    }
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        blank = jax.tree.map(lambda x: 0 * x if isinstance(x, float) else jnp.zeros_like(x), state)
        restored = checkpointer.restore(tmp_path / "state", blank)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    for name in ("penalty", "center", "objective"):
        assert restored[name] == state[name], name
    x = jnp.array([0.5, -1.0])
    value = jax.jit(lambda penalty: penalty.at(5)(x))
    assert_close(value(restored["penalty"]), value(state["penalty"]))


@pytest.mark.parametrize(
    ("config", "options"),
    [
        (pj.Wasserstein, {"order": 2}),
        pytest.param(pj.GroupLasso, {"axis": np.int64(0)}, marks=pytest.mark.untyped),
        (pj.KLDivergence, {"inputs": "logits", "block_size": 8}),
        pytest.param(pj.L1, {"axis_name": ["a", "b"]}, marks=pytest.mark.untyped),
    ],
)
def test_options_of_a_type_that_will_do(config, options):
    """An integer is a real number, and a list of names a tuple of them."""
    ((name, value),) = list(options.items())[-1:]
    assert getattr(config(**options), name) == (tuple(value) if name == "axis_name" else value)
