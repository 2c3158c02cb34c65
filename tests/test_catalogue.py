"""Nothing is forgotten: the catalogue against what introspection of the public names finds."""

import dataclasses
import inspect
from pathlib import Path

import numpy as np
import pytest
from scipy import special, stats
from scipy.spatial import distance

import penalties_jax as pj
import penalties_jax.functional as F  # noqa: N812
from benchmarks import penalties as benchmark
from tests.catalogue import (
    CASES,
    CONSTRAINTS,
    DIVERGENCES,
    EXAMPLES,
    GATES,
    OTHERS,
    PENALTIES,
    SEPARABLE,
    choices_of,
    every,
)
from tests.oracles import assert_close, lattice

ENTRIES = [*PENALTIES, *DIVERGENCES, *CONSTRAINTS, *GATES]
CLASSES = [x for x in map(pj.__dict__.get, pj.__all__) if dataclasses.is_dataclass(x)]
ADD = (
    "add an entry to PENALTIES, DIVERGENCES, CONSTRAINTS or GATES of tests/catalogue.py, "
    "or to OTHERS there, with the test that it has and the reason"
)


def operator_of(entry):
    return getattr(F, f"prox_{entry.function.__name__}", None)


def test_every_public_function_has_an_entry():
    public = {name for name in F.__all__ if inspect.isfunction(getattr(F, name))}
    tested = {case.function for entry in ENTRIES for case in entry.cases()}
    tested |= {entry.of_hidden for entry in DIVERGENCES}
    tested |= {operator_of(entry) for entry in PENALTIES}
    tested = {function.__name__ for function in tested if function}
    missing = public - tested - OTHERS.keys()
    assert not missing, f"{sorted(missing)} is tested by nothing: {ADD}"
    assert not tested & OTHERS.keys(), "an entry, and of another kind"
    assert tested <= public, f"{sorted(tested - public)} is not public"


def test_a_function_its_config_and_its_operator_have_the_same_defaults():
    compared = set()
    for entry in ENTRIES:
        callables = entry.function, entry.config, operator_of(entry)
        signatures = [inspect.signature(x).parameters for x in callables if x]
        for name, parameter in signatures[0].items():
            others = [own[name].default for own in signatures[1:] if name in own]
            # A center of None is 0.
            if inspect.Parameter.empty not in (parameter.default, *others):
                assert {other or None for other in others} <= {parameter.default or None}, name
                compared |= {name} if others else set()
    assert {"l1_ratio", "delta", "reduction"} <= compared


def test_every_config_has_an_entry():
    missing = {x.__name__ for x in CLASSES} - {
        *(entry.config.__name__ for entry in ENTRIES if entry.config),
        *OTHERS,
    }
    assert not missing, f"{sorted(missing)} is tested by nothing: {ADD}"


def test_every_penalty_has_an_example():
    """What pytrees and serialisation are tested with, where it holds no function."""
    others = {"GradientPenalty", "InterpolatedGradientPenalty", "Separable"}
    penalties = {x.__name__ for x in CLASSES if hasattr(x, "prox")} - others
    missing = penalties - {type(config).__name__ for config in EXAMPLES.values()}
    assert not missing, f"{sorted(missing)} has no config in an entry of tests/catalogue.py"


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_of_another_kind_has_its_test(name):
    file, _ = OTHERS[name]
    assert hasattr(pj, name)
    assert name in (Path(__file__).parent / file).read_text(encoding="utf-8")


@pytest.mark.parametrize("entry", PENALTIES, ids=lambda entry: entry.function.__name__)
def test_a_proximal_operator_is_claimed_if_there_is_one(entry):
    claimed = any(case.is_a("proximal") for case in entry.cases())
    assert claimed == (operator_of(entry) is not None)


@every(SEPARABLE)
def test_a_penalty_is_convex_if_it_is_claimed_to_be(case):
    slopes = case.slopes(np.linspace(-4, 4, 401) + 1e-3)
    rises = np.diff(slopes) >= -1e-12 * np.abs(slopes).max()
    assert rises.all() == case.is_a("convex")


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.function.__name__)
def test_an_oracle_takes_hyperparameters_of_the_function(entry):
    for case in entry.cases():
        wanted = list(inspect.signature(entry.oracle).parameters)[case.inputs :]
        assert {*wanted, *case.settings} <= {*case.parameters}


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.function.__name__)
def test_variants_have_every_option(entry):
    for name, words in choices_of(entry.function).items():
        # The gradient of an estimate may be another than that of its value: test_estimators.py.
        if name not in ("reduction", "gradient"):
            settings = [case.parameters[name].default for case in entry.cases()]
            settings += [case.settings.get(name) for case in entry.cases()]
            missing = {*words} - {*settings}
            assert not missing, f"no variant has {name}={sorted(missing)}"


# The oracles themselves, where others have the same formula.
PEERS = {
    "huber": lambda x: special.huber(1.0, x),
    "lp-bare": lambda x: np.linalg.norm(x[..., None], 0.4, axis=-1) ** 0.4,
    "log_sum-default": lambda x: special.log1p(abs(x)),
    "smooth_l0-1": lambda x: 1 - np.pi * stats.cauchy.pdf(x),
    "kl_divergence": lambda p, q: stats.entropy(*map(softmax, (p, q)), axis=-1),
    "js_divergence-even": lambda p, q: distance.jensenshannon(*map(softmax, (p, q)), axis=-1) ** 2,
    "entropy": lambda p: stats.entropy(softmax(p), axis=-1),
    "consistency-cosine": np.vectorize(distance.cosine, signature="(n),(n)->()"),
}


def softmax(x):
    return special.softmax(x, axis=-1)


@pytest.mark.parametrize("name", PEERS)
def test_oracles_are_those_of_peers(name):
    inputs = CASES[name].data()
    assert_close(CASES[name].entries(*inputs), PEERS[name](*inputs), rtol=1e-10)


def test_every_separable_penalty_is_measured():
    missing = {case.function.__name__ for case in SEPARABLE.values()} - {*benchmark.CASES}
    assert not missing, f"{sorted(missing)} has no case in benchmarks/penalties.py"


@pytest.mark.parametrize("name", benchmark.CASES)
def test_what_is_measured_is_the_textbook_of_the_penalty(name):
    ours, textbook, number, _ = benchmark.CASES[name]
    x = np.float32(lattice(0, 50))
    assert_close(ours(x, number), textbook(x, number), rtol=1e-4)
