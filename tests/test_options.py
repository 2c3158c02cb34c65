"""What is of a wrong type is refused by name: every field of every config, every option there is.

What a right type is, beartype says from the annotation.
"""

import dataclasses
import datetime
import decimal
import inspect
import re

import jax.numpy as jnp
import numpy as np
import pytest
from beartype import BeartypeConf
from beartype.door import is_bearable
from flax import nnx

import penalties_jax as pj
import penalties_jax.functional as F  # noqa: N812
from penalties_jax._pytree import TYPES
from tests.catalogue import EXAMPLES, GATE_CONFIGS

TOWER = BeartypeConf(is_pep484_tower=True)
OTHERS = [
    pj.anneal(1.0, 0.1, start=0, end=10),
    0.5 * pj.L1(),
    pj.L1() + pj.L2(),
    pj.GradientPenalty(jnp.sum),
    pj.InterpolatedGradientPenalty(jnp.sum),
    pj.Aggregate(),
    pj.Term(pj.L1(), on="x"),
    pj.Objective(terms={"a": pj.Term(pj.L1(), on="x")}),
    pj.AdaptiveSparsityScheduler(),
    pj.AdaptiveKL(target=0.5, horizon=9.0),
    pj.Budget(limit=0.5),
    pj.DualAscent(target=0.5),
    pj.DualAscent(target=0.5).weight,
    pj.DualAscent(target=0.5).target,
]
CONFIGS = {
    type(config).__name__: config
    for config in [*EXAMPLES.values(), *GATE_CONFIGS.values(), *OTHERS]
}
FIELDS = [
    pytest.param(config, field, id=f"{name}-{field.name}")
    for name, config in CONFIGS.items()
    for field in dataclasses.fields(config)
]

OPTIONS = [
    "false",
    "",
    b"sum",
    0,
    1,
    -1,
    1.5,
    True,
    False,
    None,
    (),
    (1,),
    (True,),
    ("x",),
    (1, "x"),
]
OPTIONS += [{}, {"x": 1}, {1}, 1j, np.ones(2), jnp.zeros(()), datetime.date(2020, 1, 1), object()]
OPTIONS += [decimal.Decimal(1), len, int, pj.L1()]
NUMBERS = ["1.0", "", b"1", {1.0}, object(), 1j, decimal.Decimal(1), datetime.date(2020, 1, 1)]
NUMBERS += [
    np.array(["a"]),
    np.array([None]),
    np.array([b"a"]),
    np.ones(2, complex),
    jnp.ones(2) * 1j,
]
NUMBERS += [np.array(["2020-01-01"], "M8[D]"), np.zeros(2, "i4,f4"), 10**400, -(10**400)]
NUMBERS += [pj.L1(), {"a": pj.L1()}, [pj.L1()], {"a": "1.0"}, ["1.0"], ("1.0", 1.0), {"a": b"1"}]
NODES = [5, "x", None, [5], ["x"], {"a": 5}, {5: pj.Term(pj.L1(), on="x")}, object(), np.ones(2)]


def is_of(value, annotation):
    """Whether a value is of a type, where no bool is a number."""
    if isinstance(value, bool):
        return is_bearable(value, annotation) and not is_bearable(
            int(value), annotation, conf=TOWER
        )
    if isinstance(value, tuple) and any(isinstance(item, bool) for item in value):
        return False
    return is_bearable(value, annotation, conf=TOWER)


def test_every_config_is_here():
    ours = {name for name, cls in TYPES.items() if cls.__module__.startswith("penalties_jax.")}
    assert ours <= CONFIGS.keys()


@pytest.mark.parametrize(("config", "field"), FIELDS)
def test_a_field_of_a_wrong_type(config, field):
    name = rf"{type(config).__name__}\.{field.name}\b"
    for value in _wrong(config, field):
        with pytest.raises((TypeError, ValueError), match=name):
            dataclasses.replace(config, **{field.name: value})


def _wrong(config, field):
    if field.metadata.get("option"):
        return [value for value in OPTIONS if not is_of(value, field.type)]
    if field.name == "numbers":
        return [*NODES[:2], *({"a": value} for value in NUMBERS), {5: 1.0}, [("a", 1.0)]]
    if field.name == "reference":
        return [value for value in NUMBERS if not _may_be_an_input(value)]
    if "valid" in field.metadata:
        wrong = [*NUMBERS, *([None] if field.default is not None else [])]
        wrong += [[1.0], (1.0,), {"a": 1.0}] if field.metadata["single"] else []
        return wrong + ["mean"] * (field.metadata["choices"] is None)
    return [value for value in NODES if not is_of(value, field.type)]


def _may_be_an_input(value):
    """Which a number can't be: an input may be complex, a large integer or a penalty's leaves."""
    return np.iscomplexobj(value) or isinstance(value, int)


@pytest.mark.untyped
@pytest.mark.parametrize("field", ["maximize", "normalize"])
def test_what_numpy_has_for_a_bool(field):
    """A comparison of its numbers is one."""
    entropy = dataclasses.replace(pj.Entropy(), **{field: np.float32(2) > 1})
    assert getattr(entropy, field) is True
    assert pj.from_dict(pj.to_dict(entropy)) == entropy


# Functions.


def _options(function):
    """The parameters of a function that are no arrays, numbers of a formula or functions."""
    for name, parameter in inspect.signature(function).parameters.items():
        words = str(parameter.annotation)
        if not re.search(
            r"array|PyTree|Callable|Any|Sequence|Mapping|Active", words, re.IGNORECASE
        ):
            yield name, parameter.annotation


FUNCTIONS = {name: getattr(F, name) for name in F.__all__ if inspect.isfunction(getattr(F, name))}
FUNCTION_OPTIONS = [
    pytest.param(function, option, kind, id=f"{name}-{option}")
    for name, function in FUNCTIONS.items()
    for option, kind in _options(function)
]


@pytest.mark.untyped
@pytest.mark.parametrize(("function", "option", "kind"), FUNCTION_OPTIONS)
def test_an_option_of_a_wrong_type(function, option, kind):
    """It is refused before anything else is looked at."""
    for value in OPTIONS:
        if not is_of(value, kind):
            with pytest.raises((TypeError, ValueError), match=rf"^{option} must be (one )?of"):
                function(**{option: value})


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: pj.nnx.SparseBKCore(4, causal="false", rngs=nnx.Rngs(0)), "causal"),
        (lambda: pj.nnx.SparseBKCore("4", rngs=nnx.Rngs(0)), "n_seq"),
        (lambda: pj.nnx.SparseMoEResNetBKLayer(8, 4, causal=1, rngs=nnx.Rngs(0)), "causal"),
        (lambda: pj.nnx.SparseMoEResNetBKLayer(8, 4, top_k="1", rngs=nnx.Rngs(0)), "top_k"),
        (lambda: pj.nnx.SparseMoEResNetBKLayer(8, 4, dropout="0", rngs=nnx.Rngs(0)), "dropout"),
        (lambda: pj.nnx.SparsityGate(8, kind="l3", rngs=nnx.Rngs(0)), "kind"),
        (lambda: pj.nnx.SparsityGate(8.0, rngs=nnx.Rngs(0)), "features"),
        (lambda: pj.nnx.ActivityPenalty("l1"), "penalty of ActivityPenalty"),
        (lambda: pj.nnx.Loss(pj.L1()), "objective"),
        (lambda: pj.linen.SparsityGate(deterministic="false"), "deterministic"),
        (lambda: pj.linen.SparsityGate(kind="l3"), "kind"),
        (lambda: pj.linen.ActivityPenalty(1.0), "penalty of ActivityPenalty"),
        (lambda: pj.linen.Loss(pj.L1()), "objective"),
    ],
)
def test_a_module_with_an_option_of_a_wrong_type(make, name):
    with pytest.raises((TypeError, ValueError), match=rf"{name} must be"):
        make()
