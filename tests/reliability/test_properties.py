"""What holds of every public function and every config, whatever values come in.

Values are drawn, a few for each example, and a seed that lays them out in the arrays of
tests/calls.py: so that one program serves all examples.
"""

import copy
import dataclasses
import functools
import inspect
import itertools
from collections.abc import Callable
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from scipy import special

import penalties_jax as pj
import penalties_jax.functional as F  # noqa: N812
from penalties_jax.functional.checks import FINITE
from tests.calls import CALLS, is_floating, of_case
from tests.catalogue import (
    CASES,
    CONFIGS,
    GATE_CASES,
    PENALTY_CASES,
    PROXIMAL,
    by_structure,
    every,
    only,
    streamed_again,
)
from tests.programs import quick_jit
from tests.reliability.attacks import HARD, examples

# What is tried hard is compiled as users have it, in every dtype.
compiled = jax.jit if HARD else quick_jit
DTYPES = ["float32", "bfloat16", "float16", "float64"] if HARD else ["float32"]
EPS = np.finfo(np.float32).eps
REDUCTIONS = ("none", "sum", "mean")

# Subnormal numbers, those where exponentials and their half-precision kin end, and the largest.
SPECIAL = [0.0, 1e-45, 1e-40, 1.2e-38, 1e-30, 1e-12, 0.25, 1.0, 1.0000001, 88.8, 104.0, 65504.0]
SPECIAL = [float(np.float32(sign * x)) for x in (*SPECIAL, 1e15) for sign in (1, -1)]
moderate = st.floats(-8, 8, width=16, allow_subnormal=False)
ordinary = moderate | st.sampled_from([x for x in SPECIAL if abs(x) <= 1])
below_1e15 = ordinary | st.sampled_from(SPECIAL) | st.floats(-(2.0**49), 2.0**49, width=32)
extreme = below_1e15 | st.sampled_from([1e30, -1e30, 3e38, -3e38])


@dataclasses.dataclass(frozen=True)
class Draw:
    """What the arrays of an example are made of."""

    values: list[float]
    seed: int
    dtype: str
    # Of calls that differ in numbers.
    which: int
    # Whether some classes are absent, where there are classes.
    absent: bool


def draws(values, dtypes=DTYPES, absent=(False, True)):
    return st.builds(
        Draw,
        st.lists(values, min_size=1, max_size=8),
        st.integers(0, 2**32 - 1),
        st.sampled_from(dtypes),
        st.integers(0, 7),
        st.sampled_from(absent),
    )


class Subject:
    """Calls of one function that one program serves, since they differ in numbers alone."""

    def __init__(self, name, calls, normalised=False):
        self.name = name
        self.calls = calls
        self.normalised = normalised
        self.everything = compiled(self.of_everything)
        self.mapped = compiled(jax.vmap(self.once, (0, None)))
        self.along = compiled(self.derivative)

    def __repr__(self):
        return self.name

    @property
    def function(self):
        return self.calls[0].function

    @property
    def parameters(self):
        return inspect.signature(self.function).parameters

    @property
    def streamed(self):
        return "block_size" in self.parameters

    @property
    def masked(self):
        return "where" in self.calls[0].arrays

    def arrays(self, draw, lay_out=None):
        """Arrays that hold what is drawn, or what of it the function may be given."""
        rng = np.random.default_rng(draw.seed)
        lay_out = lay_out or (lambda shape: rng.choice(np.float64(draw.values), shape))

        def laid_out(name, x):
            if name == "where":
                return rng.random(x.shape) < rng.choice([0.0, 0.5, 0.9, 1.0])
            if not is_floating(x):
                return x
            return self.valid(name, lay_out(np.shape(x)), draw, rng)

        return {
            name: jax.tree.map(functools.partial(laid_out, name), x)
            for name, x in self.calls[0].arrays.items()
        }

    def valid(self, name, x, draw, rng):
        """Distributions, rates and weights, of any numbers."""
        largest = min(float(jnp.finfo(draw.dtype).max), LARGEST.get(self.function, np.inf))
        if name != "weights" and (self.normalised or self.calls[0].of_classes):
            if draw.absent:
                x = np.where(rng.random(x.shape) < 0.3, -np.inf, x)
                x[..., 0] = np.where(np.isneginf(x).all(-1), 0, x[..., 0])
            x = special.log_softmax(x, axis=-1) if self.normalised else x
            return np.where(np.isneginf(x), x, np.clip(x, -largest, largest)).astype(draw.dtype)
        if self.function is F.kl_estimate and name != "weights":
            x = -abs(x)
        return np.clip(RANGES.get(name, lambda x: x)(x), -largest, largest).astype(draw.dtype)

    def numbers(self, draw):
        return self.calls[draw.which % len(self.calls)].numbers

    def once(self, arrays, numbers):
        """The value, and the gradient in every array and number."""
        call = self.calls[0]
        return {"value": call(**arrays, **numbers), "slopes": call.slopes(**arrays, **numbers)}

    def of_everything(self, arrays, numbers):
        """The same, and the value by every reduction."""
        reductions = REDUCTIONS if "reduction" in self.parameters else ()
        return self.once(arrays, numbers) | {
            name: self.calls[0](**arrays, **numbers, reduction=name) for name in reductions
        }

    def derivative(self, arrays, numbers, tangents):
        """That of the sum of all that it returns, along tangents."""

        def total(floating):
            leaves = jax.tree.leaves(self.calls[0](**(arrays | floating), **numbers))
            return sum(jnp.sum(jnp.real(x)) for x in leaves if is_floating(x))

        floating = {name: arrays[name] for name in tangents}
        return jax.jvp(total, (floating,), (tangents,))[1]

    def run(self, draw, arrays=None):
        """Everything, of what is drawn or of other arrays, by path."""
        with jax.enable_x64(draw.dtype == "float64"):
            results = self.everything(
                self.arrays(draw) if arrays is None else arrays, self.numbers(draw)
            )
        return by_path(results)


# Whose gradient is a cube, which is infinite, and infinities of both signs add up to NaN.
LARGEST = {F.orthogonality: 1e11}

# What an argument of a name may hold.
RANGES: dict[str, Callable[[Any], Any]] = {
    "couplings": abs,
    "halting": lambda x: abs(x) / (1 + abs(x)),
    "importances": abs,
    "mask": lambda x: abs(x) / (1 + abs(x)),
    "rate": lambda x: abs(x) / (1 + abs(x)),
    "weights": lambda x: np.clip(abs(x), 0.25, 4),
}


def by_path(tree):
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def with_weights_of_entries(case):
    """A call whose weights have all the axes that they may have, so that a mask excludes some."""
    call = of_case(case)
    if "weights" not in call.arrays:
        return call
    return dataclasses.replace(
        call, arrays=call.arrays | {"weights": np.ones(case.mask_shape, np.float32)}
    )


def _subjects():
    groups = by_structure(CASES | GATE_CASES)
    subjects = {
        name: Subject(name, [with_weights_of_entries(case) for case in group], group[0].normalised)
        for name, group in groups.items()
    }
    functions = {subject.function for subject in subjects.values()}
    others = {name: call for name, call in CALLS.items() if call.function not in functions}
    return subjects | {name: Subject(name, [call]) for name, call in others.items()}


SUBJECTS = _subjects()


def of_subjects(subjects):
    """Parametrises by subjects: one of each function in make test, if it compiles in a second."""
    return every(
        subjects,
        "subject",
        slow=lambda subject: subject.name not in CALLS or streamed_again(subject),
    )


every_subject = of_subjects(SUBJECTS)
# What is mapped over in different ways; the others are of the same kinds.
KINDS = ("l2-mean", "group_lasso", "spectral_norm", "kl_divergence", "kl_from_logits", "mmd")


@every_subject
@examples(little=15, hard=400)
@hypothesis.given(draw=draws(below_1e15))
def test_finite_values_never_make_a_nan(subject, draw):
    """Of up to 1e15, and of distributions: neither in a value nor in a gradient."""
    for path, result in subject.run(draw).items():
        assert not np.isnan(result).any(), path


# Masks.


def excluded(where, x):
    """The entries of an array that a mask excludes: those at its positions, if it has them."""
    shape = np.shape(x)
    fits = len(shape) >= where.ndim and all(
        n in (1, size) for n, size in zip(where.shape, shape, strict=False)
    )
    if not fits:
        return np.zeros(shape, bool)
    return np.broadcast_to(~where.reshape(where.shape + (1,) * (len(shape) - where.ndim)), shape)


@of_subjects(only(lambda subject: subject.masked, SUBJECTS))
@examples(little=15, hard=400)
@hypothesis.given(draw=draws(extreme), poison=st.sampled_from([np.nan, np.inf, -np.inf, 3e38]))
def test_what_a_mask_excludes_is_not_seen(subject, draw, poison):
    """Values and gradients are the same bit for bit, and the gradient there is 0."""
    arrays = subject.arrays(draw)
    where = arrays.pop("where")

    def poisoned(x):
        own = poison if is_floating(x) else np.iinfo(x.dtype).max
        with np.errstate(over="ignore"):
            return np.where(excluded(where, x), np.asarray(own).astype(x.dtype), x)

    seen = subject.run(draw, arrays | {"where": where})
    unseen = subject.run(draw, jax.tree.map(poisoned, arrays) | {"where": where})
    for path, result in seen.items():
        assert result.tobytes() == unseen[path].tobytes(), path
    floating = {name: arrays[name] for name in subject.calls[0].floating if name in arrays}
    for path, x in by_path({"slopes": floating}).items():
        assert np.all(unseen[path][excluded(where, x)] == 0), path


# Reductions.


@of_subjects(only(lambda subject: "reduction" in subject.parameters, SUBJECTS))
@examples(little=15, hard=400)
@hypothesis.given(draw=draws(below_1e15))
def test_reductions_agree(subject, draw):
    """To the rounding of a sum of n values one after the other: n / 2 ulps of their sizes."""
    arrays = subject.arrays(draw)
    results = subject.run(draw, arrays)
    for path in results:
        if path.startswith("['none']"):
            part = path.removeprefix("['none']")
            none, total, mean = (results[f"['{name}']{part}"] for name in REDUCTIONS)
            count = arrays["where"].sum() if "where" in arrays else none.size
            assert_agree(none, float(total), float(mean), max(count, 1))


def assert_agree(none, total, mean, count):
    limits = np.finfo(none.dtype)
    values = none.astype(np.float64)
    size = abs(values).sum()
    if size > limits.max / 2:
        assert np.isinf(total) or abs(total) > size / 4
    else:
        assert abs(total - values.sum()) <= none.size * limits.eps * size
        assert abs(mean * count - total) <= 2 * limits.eps * abs(total) + count * limits.tiny


# Order.

# What the last axis of is an order, by its size; labels are classes by their number.
ORDERED = {
    F.wasserstein: {5},
    F.resolvent_diagonal: {5, 6},
    F.ponder_cost: {5},
    F.ponder_divergence: {5},
    F.ponder_divergence_from_logits: {5},
    F.halting_log_probabilities: {6},
    F.halting_weights: {6},
    F.top_k_gate: {5},
    F.gather_active: {5},
    # The slots are those of examples and positions as they stand.
    F.scatter_active: {2, 3, 5},
    F.cross_entropy_from_logits: {6},
    F.linear_cross_entropy: {5},
    F.linear_distillation: {5},
    F.linear_log_prob: {5},
    F.linear_log_prob_and_entropy: {5},
    # Every example has its own random number.
    F.interpolated_gradient_penalty: {4},
}


def sizes(subject):
    """The axes, told apart by their sizes, whose order means nothing."""
    arrays = jax.tree.leaves(subject.calls[0].arrays)
    every_size = {size for x in arrays for size in np.shape(x)} - {1}
    return sorted(every_size - ORDERED.get(subject.function, set()))


def assert_near(actual, desired, ulps):
    """Each to some ulps of the mean size of its array; a sum, of all that may be added up."""

    def sizes(x):
        return np.where(np.isfinite(x), abs(x), 0).astype(np.float64)

    everything = sum(sizes(x).sum() for x in desired.values() if x.ndim)
    for path, x in desired.items():
        rtol = 0.0 if x.dtype.kind in "bui" else ulps * np.finfo(x.dtype).eps
        atol = rtol * (1 + (sizes(x).mean() if x.ndim else everything))
        np.testing.assert_allclose(actual[path], x, rtol=rtol, atol=atol, err_msg=path)


@of_subjects(only(sizes, SUBJECTS))
@examples(little=15, hard=400)
@hypothesis.given(draw=draws(ordinary), axis=st.integers(0, 3))
def test_order_does_not_matter(subject, draw, axis):
    """To 64 ulps: sums of up to 120 terms are rounded in another order."""
    size = sizes(subject)[axis % len(sizes(subject))]
    order = np.random.default_rng(draw.seed).permutation(size)

    def permuted(tree):
        def along(x):
            axes = [a for a, n in enumerate(x.shape) if n == size]
            return np.take(x, order, axes[0]) if axes else x

        return jax.tree.map(along, tree)

    arrays = subject.arrays(draw)
    actual = subject.run(draw, permuted(arrays))
    desired = permuted(subject.run(draw, arrays))
    if subject.function is F.spectral_norm:
        # Of equal singular values any may lead.
        actual, desired = ({"value": x["['value']"]} for x in (actual, desired))
    assert_near(actual, desired, ulps=64)


# Transformations.


@every(SUBJECTS, "subject", slow=lambda subject: subject.name not in KINDS)
@examples(little=4, hard=200)
@hypothesis.given(draw=draws(ordinary, ["float32"]))
def test_vmap_is_a_loop(subject, draw):
    """To 64 ulps, as in another order."""
    arrays = [subject.arrays(dataclasses.replace(draw, seed=draw.seed ^ i)) for i in range(2)]
    stacked = jax.tree.map(lambda *x: np.stack(x), *arrays)
    results = by_path(subject.mapped(stacked, subject.numbers(draw)))
    for i, one in enumerate(arrays):
        each = {path: x[i] for path, x in results.items()}
        desired = subject.run(draw, one)
        assert_near(each, {path: desired[path] for path in each}, ulps=64)


@of_subjects(only(lambda subject: not subject.streamed, SUBJECTS))
@examples(little=4, hard=200)
@hypothesis.given(draw=draws(moderate, ["float32"], absent=[False]))
def test_jvp_is_vjp(subject, draw):
    """To 8 ulps of all that is added up, slopes of order 1 that cancel included."""
    arrays = subject.arrays(draw)
    floating = {name: arrays[name] for name in subject.calls[0].floating}
    rng = np.random.default_rng(draw.seed)
    tangents = jax.tree.map(lambda x: rng.integers(-4, 5, x.shape).astype(x.dtype), floating)
    slopes = subject.run(draw, arrays)
    total = size = 0.0
    for path, tangent in by_path({"slopes": tangents}).items():
        slope = slopes[path].astype(np.float64)
        total += (slope * tangent).sum()
        size += ((1 + abs(slope)) * abs(tangent)).sum()
    forward = subject.along(arrays, subject.numbers(draw), tangents)
    assert abs(forward - total) <= 8 * EPS * size


@pytest.mark.slow
@every_subject
@examples(little=1, hard=5)
@hypothesis.given(draw=draws(ordinary, ["float32"]))
def test_jit_is_eager(subject, draw):
    """One operation after the other, none of them fused: to 64 ulps."""
    arrays = subject.arrays(draw)
    with jax.disable_jit():
        eager = by_path(subject.once(arrays, subject.numbers(draw)))
    desired = subject.run(draw, arrays)
    assert_near(eager, {path: desired[path] for path in eager}, ulps=64)


# Shapes.


def shrunk(arrays, size):
    """The arrays with nothing along the axis of a size; for size None, the first entry of each."""

    def of(x):
        x = np.asarray(x)
        if size is None:
            return x.ravel()[0]
        return np.take(x, [], next((a for a, n in enumerate(x.shape) if n == size), None) or 0)

    return jax.tree.map(lambda x: of(x) if size is None or size in np.shape(x) else x, arrays)


def accepted(subject):
    """Arrays of fewer entries or axes that the function does not refuse."""
    arrays = subject.calls[0].arrays
    every_size = {size for x in jax.tree.leaves(arrays) for size in np.shape(x)} - {1}
    for size in (None, *sorted(every_size)):
        fewer = shrunk(arrays, size)
        try:
            jax.eval_shape(subject.of_everything, fewer, subject.calls[0].numbers)
        # Where annotations are checked, they may refuse it first.
        except (ValueError, TypeCheckError):
            continue
        yield fewer


@every_subject
def test_without_entries_or_axes(subject):
    """What is not refused is a number, and 0 if it is the sum or the mean of nothing."""
    inputs = [*itertools.islice(accepted(subject), None if HARD else 2)]
    # The shapes of what is scattered are tied to those of its slots.
    assert inputs or subject.function is F.scatter_active
    numbers = subject.calls[0].numbers
    results = quick_jit(lambda inputs: [subject.of_everything(x, numbers) for x in inputs])
    for result in results(inputs):
        for path, leaf in by_path(result).items():
            assert not np.isnan(leaf).any(), path
        if "none" in result and not any(leaf.size for leaf in jax.tree.leaves(result["none"])):
            assert result["sum"] == result["mean"] == 0


# Proximal operators.


def numbers_within(case):
    """Draws the hyperparameters of a penalty from their ranges, where they are of order 1."""
    near = {"center": (-2, 2), "l1_ratio": (0, 1), "delta": (0.01, 4), "gamma": (1.01, 5)}
    near |= {"a": (2.01, 6), "lam": (0, 2)}
    return st.fixed_dictionaries({name: st.floats(*near[name]) for name in case.numbers})


PROXIMAL_STRUCTURES = by_structure(only(lambda case: case.is_a("separable"), PROXIMAL))


@every({name: group[0] for name, group in PROXIMAL_STRUCTURES.items()})
@examples(little=25, hard=2000)
@hypothesis.given(data=st.data(), w=st.floats(0, 6), v=st.lists(ordinary, min_size=4, max_size=4))
def test_prox_is_the_argmin(case, data, w, v):
    """No point of a grid, refined around its best ones, has a lower w f(z) + (z - v)^2 / 2."""
    numbers = data.draw(numbers_within(case), "numbers")
    with jax.enable_x64(True):
        nearest = np.asarray(case.prox(np.array(v), w, **numbers))

    def objective(z, v):
        return w * case.formula(z, **numbers) + (z - v) ** 2 / 2

    for z, point in zip(nearest, v, strict=True):
        ends = [0, point, numbers.get("center", 0)]
        low, high = min(ends) - 0.1, max(ends) + 0.1
        for _ in range(5):
            grid = np.linspace(low, high, 401)
            best = grid[np.argmin(objective(grid, point))]
            low, high = best - (high - low) / 200, best + (high - low) / 200
        least = min(objective(best, point), objective(0, point), objective(point, point))
        assert objective(z, point) <= least + 1e-14 * (1 + least)


# Round trips.


def number(valid):
    """What a field that is a number may hold: a number, an array of float32, a schedule."""
    plain = st.floats(-4, 4, width=32).filter(valid.contains)
    arrays = st.lists(plain, min_size=1, max_size=3).map(np.float32)
    ends = st.integers(0, 10**6)
    schedules = st.builds(functools.partial(pj.anneal, start=0), plain, plain, end=ends)
    return plain | arrays | schedules


def configs_of(case):
    config = case.config()
    fields = {
        field.name: number(field.metadata["valid"])
        for field in dataclasses.fields(config)
        if isinstance(getattr(config, field.name), float)
    }
    return st.fixed_dictionaries(fields).map(lambda x: dataclasses.replace(config, **x))


def terms(config):
    names = [f"input {i}" for i in range(config.takes[0])]
    on = st.just(names[0] if len(names) == 1 else tuple(names))
    return st.builds(pj.Term, st.just(config), on=on, weight=number(FINITE), enabled=st.booleans())


simple = st.sampled_from([*CONFIGS]).flatmap(lambda name: configs_of(CONFIGS[name]))
of_one_input = st.sampled_from([*PENALTY_CASES]).flatmap(lambda name: configs_of(CASES[name]))
made = st.recursive(
    of_one_input,
    lambda part: (
        st.builds(lambda scale, x: scale * x, number(FINITE), part)
        | st.builds(lambda a, b: a + b, part, part)
    ),
    max_leaves=4,
)
named_terms = st.dictionaries(st.sampled_from("abc"), (simple | made).flatmap(terms), min_size=1)
configs = simple | made | st.builds(pj.Objective, st.none(), named_terms)


# Checks of annotations draw random numbers, and hypothesis has nothing random in what it draws.
@pytest.mark.untyped
@examples(little=40, hard=2000)
@hypothesis.given(config=configs)
def test_round_trips(config):
    leaves, structure = jax.tree.flatten(config)
    for again in (
        pj.from_dict(pj.to_dict(config)),
        pj.from_json(pj.to_json(config)),
        pj.from_yaml(pj.to_yaml(config)),
        structure.unflatten(leaves),
        copy.copy(config),
        copy.deepcopy(config),
    ):
        assert type(again) is type(config)
        assert again == config
        assert jax.tree.structure(again) == structure
        for a, b in zip(jax.tree.leaves(again), leaves, strict=True):
            assert np.asarray(a).dtype == np.asarray(b).dtype
            assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
