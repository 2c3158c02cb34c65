"""One call of every public function: its arrays, its numbers and its options, by name.

Those of the catalogue's entries follow from it; the rest is given here. test_modes.py makes the
calls in every mode, and finds whatever has none.
"""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import special

import penalties_jax as pj
import penalties_jax.functional as F  # noqa: N812
from tests import oracles
from tests.catalogue import (
    CASES,
    DIVERGENCES,
    GATE_CASES,
    PENALTIES,
    SHAPE,
    arrays_of,
    first_of_each,
    numbers_of,
)

PUBLIC = {name: x for name in F.__all__ if inspect.isfunction(x := getattr(F, name))}


@dataclasses.dataclass(frozen=True, eq=False)
class Call:
    """A function and its arguments.

    Attributes:
        arrays: Of float32, integers or booleans.
        numbers: Python numbers.
        options: What is neither.
    """

    function: Callable[..., Any]
    arrays: dict[str, Any]
    numbers: dict[str, Any]
    options: dict[str, Any]

    def __call__(self, **changed):
        return self.function(**(self.arrays | self.numbers | self.options | changed))

    @property
    def floating(self):
        """What may be differentiated."""
        return {name: x for name, x in self.arrays.items() if is_floating(x)}

    def slopes(self, **changed):
        """The gradient of the sum of all that it returns, in its floating-point arguments.

        Of a compiled function, whose declared derivatives are asked for outside of it.
        """
        given = self.arrays | self.numbers | changed
        names = [*self.floating, *self.numbers]

        def total(arguments):
            leaves = jax.tree.leaves(self(**(changed | arguments)))
            return sum(jnp.sum(jnp.real(leaf)) for leaf in leaves if is_floating(leaf))

        return jax.grad(jax.jit(total))({name: given[name] for name in names})

    @property
    def edges(self):
        """Arrays with entries at the edges: 0, huge and tiny ones, classes that are masked out."""
        biases = {name: x for name, x in self.floating.items() if name.startswith("bias")}
        if biases:
            masked = np.float32(-np.inf)
            return self.arrays | {name: np.append(x[1:], masked) for name, x in biases.items()}
        arrays = {name: x.copy() for name, x in self.floating.items() if np.ndim(x) > 1}
        for i, x in enumerate(arrays.values()):
            if self.of_classes:
                x[0, ..., 0] = x[1, ..., (1 + i) % x.shape[-1]] = -np.inf
                x[2] = -np.inf
                x[2, ..., i] = 0
                if "where" in self.arrays:
                    # What is excluded may be no distribution.
                    x[~np.broadcast_to(self.arrays["where"], x.shape[:-1])] = -np.inf
            else:
                largest, least = (1, 0) if self.of_chances else (1e18, -1e18)
                x[..., 0], x[0, ..., 1], x[1, ..., 1], x[1, ..., 2] = 0, largest, least, 1e-30
        return self.arrays | arrays

    @property
    def of_chances(self):
        """Whether its arrays are of probabilities by themselves."""
        return self.function is F.ponder_divergence

    @property
    def of_classes(self):
        """Whether its arrays are of log-probabilities or logits, of which some may be -inf."""
        logs = all(name.startswith("log") for name in {*self.floating} - {"weights"})
        return logs and self.function is not F.kl_estimate


def is_floating(x):
    """Whether all arrays in a tree are of real or complex numbers with a point."""
    return all(jnp.issubdtype(jnp.result_type(leaf), jnp.inexact) for leaf in jax.tree.leaves(x))


def _lattice(*shape, seed=0):
    return np.float32(oracles.lattice(seed, *shape))


def of_case(case):
    """A case with a mask and weights, of fewer axes where they may have."""
    arrays = dict(
        zip(arrays_of(case.function), map(np.float32, case.data(shape=case.shape)), strict=True)
    )
    if case.normalised:
        arrays = {name: special.log_softmax(x, axis=-1) for name, x in arrays.items()}
    if case.of_chances:
        arrays = {name: special.expit(x) for name, x in arrays.items()}
    if "where" in case.parameters:
        arrays["where"] = case.where(case.mask())
    numbers = {
        name: value
        for name, value in (numbers_of(case.function) | case.settings).items()
        if isinstance(value, float)
    }
    if "weights" in numbers:
        arrays["weights"] = np.linspace(0.5, 1.5, case.mask_shape[-1], dtype=np.float32)
        del numbers["weights"]
    options = {name: x for name, x in case.settings.items() if name not in numbers}
    return Call(case.function, arrays, numbers, options | case.without_noise)


def _of_hidden(function, settings):
    rows, features, classes = (4, 3), 6, 5
    shapes = {"hidden": (*rows, features), "kernel": (features, classes), "bias": (classes,)}
    names = inspect.signature(function).parameters
    arrays = {
        name: _lattice(*shapes[kind], seed=i)
        for i, name in enumerate(names)
        if (kind := name.split("_")[0]) in shapes
    }
    for name in {"labels", "tokens"} & {*names}:
        arrays[name] = np.arange(12, dtype=np.int32).reshape(rows) % classes
    arrays["where"] = np.arange(12).reshape(rows) % 5 != 0
    defaults = {name: x for name, x in numbers_of(function).items() if isinstance(x, float)}
    numbers = defaults | {name: x for name, x in settings.items() if isinstance(x, float)}
    return Call(function, arrays, numbers | {"softcap": 3.0}, {"block_size": 5})


def _of_operator(case):
    operator = PUBLIC[f"prox_{case.function.__name__}"]
    names = numbers_of(operator)
    values = names | {"t": 0.4} | case.numbers
    numbers = {name: x for name, x in values.items() if name in names and isinstance(x, float)}
    options = {"axis": -1} if "axis" in inspect.signature(operator).parameters else {}
    return Call(operator, {"v": _lattice(*SHAPE)}, numbers, options)


def _given(function, *, arrays=None, numbers=None, **options):
    return Call(function, arrays or {}, numbers or {}, options)


X, RATES = _lattice(4, 6), np.float32([0.2, 0.4, 0.9])
IMPORTANCES = {"first": np.abs(X), "second": np.abs(_lattice(4, 2, seed=1))}

OTHERS = [
    _given(
        F.aggregate,
        arrays={
            "values": X,
            "where": X < 1,
            "segment_ids": np.arange(24, dtype=np.int32).reshape(4, 6) % 3,
        },
        numbers={"length": 5.0, "normalizer": 7.0},
        num_segments=2,
    ),
    _given(F.sparsity_rate, arrays={"mask": np.float32(X > 0), "where": X < 1}, axis=-1),
    _given(
        F.sparsity_target_loss,
        arrays={"rate": RATES, "where": RATES < 0.5},
        numbers={"target": 0.5, "delta": 0.1},
        kind="huber",
        reduction="mean",
    ),
    _given(
        F.balanced_loss,
        arrays={"accuracy_loss": np.float32(2.0), "sparsity_loss": np.float32(0.5)},
        numbers={"accuracy_weight": 1.0, "sparsity_weight": 0.25},
    ),
    _given(
        F.importance_minimality,
        arrays={"importances": IMPORTANCES, "where": np.arange(4) != 1},
        numbers={"beta": 0.5, "reference_count": 6.0},
        penalty=pj.SmoothL0(gamma=0.5),
    ),
    _given(
        F.importance_metrics,
        arrays={"importances": IMPORTANCES, "where": np.arange(4) != 1},
        numbers={"beta": 0.5, "reference_count": 6.0},
        penalties={"l1": pj.L1(), "lp": pj.Lp(p=0.5)},
    ),
    _given(
        F.load_balance,
        arrays={
            "probabilities": np.abs(X),
            "assigned": np.int32(X > 1),
            "where": np.arange(4) != 1,
        },
    ),
    _given(
        F.gradient_penalty,
        arrays={"x": X},
        numbers={"target_norm": 1.0},
        f=lambda x: jnp.sum(jnp.square(x)),
    ),
    _given(
        F.interpolated_gradient_penalty,
        arrays={"a": X, "b": _lattice(4, 6, seed=1)},
        numbers={"target_norm": 1.0},
        f=lambda x: jnp.sum(jnp.square(x)),
        key=jax.random.key(0),
    ),
    _given(F.halting_log_probabilities, arrays={"logits": X}),
    _given(F.halting_weights, arrays={"halting": np.abs(X)}, numbers={"epsilon": 0.01}),
    _given(
        F.resolvent_diagonal,
        arrays={"diagonal": X, "couplings": np.abs(_lattice(4, 5, seed=1))},
        numbers={"z": 1j},
    ),
    _given(
        F.cross_entropy_from_logits,
        arrays={
            "logits": X,
            "labels": np.arange(4, dtype=np.int32),
            "where": np.arange(4) != 1,
            "weights": np.linspace(0.5, 2.0, 4, dtype=np.float32),
        },
        numbers={"z_loss": 0.1, "temperature": 0.7},
        block_size=2,
    ),
    _given(
        F.kl_to_top_k,
        arrays={
            "logits": X,
            "log_q": np.log(np.full((4, 2), 0.3, np.float32)),
            "ids": np.int32([[0, 5], [1, 2], [4, 3], [2, 1]]),
            "log_rest": np.log(np.full(4, 0.4, np.float32)),
            "where": np.arange(4) != 1,
            "weights": np.linspace(0.5, 2.0, 4, dtype=np.float32),
        },
        numbers={"temperature": 0.7},
        direction="reverse",
        block_size=2,
    ),
    _given(
        F.linear_kl_to_top_k,
        arrays={
            "hidden": X,
            "kernel": _lattice(6, 5, seed=1),
            "bias": _lattice(5, seed=2),
            "log_q": np.log(np.full((4, 2), 0.3, np.float32)),
            "ids": np.int32([[0, 4], [1, 2], [4, 3], [2, 1]]),
            "log_rest": np.log(np.full(4, 0.4, np.float32)),
            "where": np.arange(4) != 1,
        },
        numbers={"temperature": 0.7, "softcap": 3.0},
        block_size=5,
    ),
    _given(
        F.gather_active,
        arrays={"x": _lattice(3, 5, 4), "scores": _lattice(3, 5, seed=1), "where": X[:3, :5] < 1},
        capacity=2,
    ),
    _given(
        F.scatter_active,
        arrays={
            "values": _lattice(3, 2, 4),
            "like": _lattice(3, 5, 4, seed=1),
            "gate": _lattice(3, 5, seed=2),
            "active": F.Active(
                np.int32([[0, 2], [1, 3], [3, 4]]),
                np.array([[True, True], [False, True], [True, True]]),
            ),
        },
    ),
    _given(
        F.token_targets,
        arrays={"scores": X, "where": X < 1},
        numbers={"mean": 0.3, "temperature": 0.25},
    ),
    _given(F.straight_through, arrays={"hard": np.float32(X > 0), "soft": X}),
]


def _calls():
    cases = first_of_each(lambda case: (case.function, case.by_row), CASES | GATE_CASES)
    calls = [(name, of_case(case)) for name, case in cases.items()]
    for entry in PENALTIES:
        name = f"prox_{entry.function.__name__}"
        if name in PUBLIC:
            calls.append((name, _of_operator(next(entry.cases()))))
    for entry in DIVERGENCES:
        if entry.of_hidden:
            settings = next(iter(entry.variants.values()))
            calls.append((entry.of_hidden.__name__, _of_hidden(entry.of_hidden, settings)))
    of_labels = (
        F.linear_cross_entropy,
        F.linear_distillation,
        F.linear_log_prob,
        F.linear_log_prob_and_entropy,
    )
    calls += [(function.__name__, _of_hidden(function, {})) for function in of_labels]
    calls += [(call.function.__name__, call) for call in OTHERS]
    return dict(calls)


CALLS = _calls()
