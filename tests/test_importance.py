"""Importance minimality as a config: schedules, sweeps, objectives, serialisation."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import penalties_jax as pj
from tests.oracles import assert_close
from tests.programs import jit_once

SITES = {
    "a": np.random.default_rng(0).random((6, 5, 4)).astype(np.float32),
    "b": np.random.default_rng(1).random((7, 3)).astype(np.float32),
}


def total(gamma, beta=0.5):
    result = 0.0
    for site in SITES.values():
        c = site.astype(np.float64).reshape(-1, site.shape[-1])
        sums = (c**2 / (c**2 + gamma**2)).sum(0)
        result += np.sum(sums / len(c) * (1 + beta * np.log2(1 + sums)))
    return result


def test_value_and_parts():
    penalty = pj.ImportanceMinimality(pj.SmoothL0(gamma=0.3), beta=0.5)
    value, parts = penalty(SITES), penalty.parts(SITES)
    assert_close(value, total(0.3))
    assert_close(parts.sparsity, total(0.3, beta=0.0))
    assert_close(parts.total, float(value), rtol=1e-7)
    assert_close(parts.total, float(parts.sparsity + 0.5 * parts.frequency), rtol=1e-7)


def test_the_value_is_that_of_an_accumulated_evaluation():
    penalty = pj.ImportanceMinimality(pj.Lp(p=0.4), beta=0.5)
    stats = [
        pj.ImportanceStats.from_batch(
            jax.tree.map(lambda x, i=i: x[i : i + 1], SITES), penalty.penalty
        )
        for i in range(6)
    ]
    whole = pj.ImportanceStats.empty(SITES)
    for part in stats:
        whole = whole.merge(part)
    first_six = jax.tree.map(lambda x: x[:6], SITES)
    assert_close(whole.loss(0.5).total, float(penalty(first_six)), rtol=1e-6)


def test_gamma_before_during_and_after_its_anneal_without_a_new_trace():
    penalty = pj.ImportanceMinimality(
        pj.SmoothL0(
            gamma=pj.anneal_fraction(1.0, 0.1, total_steps=100, start_frac=0.2, end_frac=0.8)
        ),
        beta=0.5,
    )
    value = jit_once(lambda penalty, step: penalty.at(step)(SITES))
    for step, gamma in ((0, 1.0), (20, 1.0), (50, 0.55), (80, 0.1), (100, 0.1), (1000, 0.1)):
        assert_close(value(penalty, step), total(gamma))
    constant = pj.ImportanceMinimality(pj.Lp(p=pj.anneal_fraction(2.0, None, total_steps=100)))
    assert_close(constant.at(70)(SITES), float(pj.ImportanceMinimality(pj.Lp(p=2.0))(SITES)))


def test_a_sweep_is_one_program():
    gammas, betas = (0.1, 0.5, 1.0), (0.0, 0.25, 2.0)
    sweep = pj.stack(
        [
            pj.ImportanceMinimality(pj.SmoothL0(gamma=gamma), beta=beta)
            for gamma, beta in zip(gammas, betas, strict=True)
        ]
    )
    values = jit_once(lambda sweep: jax.vmap(lambda penalty: penalty(SITES))(sweep))(sweep)
    assert_close(values, [total(*pair) for pair in zip(gammas, betas, strict=True)])


def test_as_a_term_of_an_objective():
    term = pj.Term(
        2.0 * pj.ImportanceMinimality(pj.SmoothL0(gamma=0.3), beta=0.5),
        on="importances",
        weight=3.0,
    )
    value, metrics = pj.Objective(terms={"importance": term})({"importances": SITES})
    assert_close(value, 6 * total(0.3))
    assert_close(metrics["importance"], 2 * total(0.3))


def test_a_function_of_each_value():
    penalty = pj.ImportanceMinimality(jnp.square, beta=0.5)
    desired = pj.ImportanceMinimality(pj.L2(), beta=0.5)(SITES)
    assert_close(jax.jit(lambda penalty: penalty(SITES))(penalty), float(desired), rtol=1e-6)
    with pytest.raises(TypeError, match="can't be serialised"):
        pj.to_dict(pj.ImportanceMinimality(lambda x: x**2))


def test_leaves_that_are_left_out():
    penalty = pj.ImportanceMinimality(pj.SmoothL0(gamma=0.3), beta=0.5)
    assert_close(penalty({**SITES, "c": None}), total(0.3))


@pytest.mark.parametrize(
    "penalty",
    [
        pj.ImportanceMinimality(pj.SmoothL0(gamma=0.3), beta=0.5, reference_count=100),
        pj.ImportanceMinimality(pj.Lp(p=pj.anneal(2.0, 0.4, start=0, end=10)), axis_name="data"),
        pj.ImportanceMinimality(0.5 * pj.L1() + pj.LogSum(eps=0.1)),
    ],
)
def test_written_and_read_back(penalty):
    assert pj.from_json(pj.to_json(penalty)) == penalty
    assert pickle.loads(pickle.dumps(penalty)) == penalty
    assert jax.tree.unflatten(*reversed(jax.tree.flatten(penalty))) == penalty


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: pj.ImportanceMinimality(pj.SmoothL0(gamma=0)),
            ValueError,
            "gamma must be above 0",
        ),
        (lambda: pj.ImportanceMinimality(pj.Lp(p=0)), ValueError, "p must be above 0"),
        (lambda: pj.ImportanceMinimality(pj.L1(), beta=-1), ValueError, "beta must be at least 0"),
        (
            lambda: pj.ImportanceMinimality(pj.L1(), reference_count=0),
            ValueError,
            "reference_count must be at least 1",
        ),
        (lambda: pj.ImportanceMinimality(0.4), TypeError, "must be a config such as"),
        (
            lambda: pj.anneal_fraction(1.0, 0.1, total_steps=9, start_frac=0.8, end_frac=0.2),
            ValueError,
            "start_frac",
        ),
        (lambda: pj.ImportanceMinimality(pj.L1())({}), ValueError, "at least one array"),
        (
            lambda: pj.ImportanceMinimality(pj.SmoothL0(gamma=pj.anneal(1, 0.1, start=0, end=9)))(
                SITES
            ),
            TypeError,
            "step",
        ),
    ],
)
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()
