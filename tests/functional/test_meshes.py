"""Arrays that lie differently on a mesh with Explicit axes give the numbers of one device.

What a function takes is read from its signature and its entries in the catalogue, so that one that
is added is tested by itself; if it needs more than arrays, SETTINGS has to say what.
"""

import contextlib
import functools
import inspect
import itertools
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import penalties_jax as pj
import penalties_jax.functional as F  # noqa: N812
from tests.catalogue import CONSTRAINTS, DIVERGENCES, GATES, PENALTIES
from tests.oracles import assert_close, lattice
from tests.programs import quick_jit

MESHES = {"4": {"data": 4}, "2x4": {"data": 2, "model": 4}}
SHARDED, REPLICATED, UNPLACED = range(3)

POSITIONS = (8, 4)
SIZES = {"C": 6, "D": 3, "E": 5, "T": 6, "d": 3, "k": 2, "m": 4, "n": 8, "n-1": 7}
# Where an annotation names no axes, the largest that fits is taken.
SHAPES = ((*POSITIONS, SIZES["C"]), POSITIONS, POSITIONS[:1], ())

# Axes that jaxtyping has no words for.
OTHER_SHAPES = {
    "*batch_n_rest": (*POSITIONS, SIZES["n"], SIZES["d"]),
    "*batch_capacity_rest": (*POSITIONS, SIZES["k"], SIZES["d"]),
}

# On no mesh, since none is around here.
KEY = jax.random.key(0)

SLOTS = (*POSITIONS, SIZES["k"])
ACTIVE = F.Active(
    np.sort(np.arange(np.prod(SLOTS)).reshape(SLOTS) * 3 % SIZES["n"], axis=-1),
    np.arange(np.prod(SLOTS)).reshape(SLOTS) % 5 != 0,
)

# What is needed beside arrays, where no entry of the catalogue says so.
# None stands for an array that is left out.
SETTINGS = {
    "aggregate": {"segment_ids": None},
    "gather_active": {"capacity": SIZES["k"]},
    "gradient_penalty": {"f": lambda x: jnp.sum(x**3)},
    "importance_metrics": {"penalties": {"l0": pj.SmoothL0(gamma=0.5)}},
    "importance_minimality": {"penalty": pj.SmoothL0(gamma=0.5)},
    "interpolated_gradient_penalty": {"f": lambda x: jnp.sum(x**3)},
    "mmd": {"scales": (0.5, 1.0)},
    "scatter_active": {"active": ACTIVE},
    "sparsity_rate": {"axis": -1},
    "sparsity_target_loss": {"kind": "huber"},
}
# What arrays and hyperparameters are near to, where neither a setting nor a default is a number.
NUMBERS = {
    "center": 0.3,
    "clip": 0.7,
    "floor": -3.0,
    "halting": 0.5,
    "log_rest": -1.0,
    "mean": 0.5,
    "rate": 0.3,
    "reference_count": 8.0,
    "skew": 0.3,
    "t": 0.5,
    "target": 0.5,
}


class Call(NamedTuple):
    """A function, its options, and its arrays by name."""

    function: Callable[..., Any]
    options: dict[str, Any]
    arrays: dict[str, Any]

    def result(self, arrays):
        return self.function(**(self.options | arrays))

    def slopes(self, arrays):
        """The result, and the gradients of the sum of its squares."""
        floats = {name: x for name, x in arrays.items() if jnp.issubdtype(x.dtype, jnp.floating)}

        def loss(floats):
            result = self.result(arrays | floats)
            return sum(jnp.sum(jnp.square(abs(x))) for x in jax.tree.leaves(result)), result

        gradients, result = jax.grad(loss, has_aux=True)(floats)
        return result, gradients

    def placed(self, mesh, row):
        """The arrays where a row of `rows` wants them."""
        return {
            k: place(x, mesh, level) for (k, x), level in zip(self.arrays.items(), row, strict=True)
        }

    def rows(self, few=False):
        """Placements of the arrays, in which every pair of arrays has every pair of placements.

        If few, every pair with the first.
        """
        count = len(self.arrays)
        digits = 2 if few or count <= 4 else 3
        vectors = [v for v in itertools.product(range(3), repeat=digits) if any(v)]
        columns = [v for v in vectors if next(filter(None, v)) == 1]
        first, rest = columns[0], itertools.cycle(columns[1:])
        columns = [first, *itertools.islice(rest, count - 1)]
        every = itertools.product(range(3), repeat=digits)
        return [tuple(int(np.dot(v, row)) % 3 for v in columns) for row in every]


def place(x, mesh, level):
    """An array that is sharded along positions, if it has them, or replicated, or unplaced."""
    if level == UNPLACED:
        return jnp.asarray(x)
    names = mesh.axis_names[: x.ndim] if level == SHARDED else ()
    names = names if x.shape[: len(names)] == POSITIONS[: len(names)] else ()
    return jax.device_put(x, NamedSharding(mesh, P(*names)))


@functools.cache
def mesh_of(name):
    axes = MESHES[name]
    return jax.make_mesh(
        (*axes.values(),),
        (*axes,),
        axis_types=(AxisType.Explicit,) * len(axes),
        devices=jax.devices()[: math.prod(axes.values())],
    )


# Calls, from signatures.


@functools.cache
def kind_of(annotation):
    """The kind and the axes of what is an array, a tree of arrays or a number; else None."""
    annotation = str(annotation)
    named = re.search(r"(\w+)\[[\w.]*Array, '([^']*)'", annotation)
    if named:
        return named.groups()
    numeric = "numpy.ndarray" in annotation and not annotation.startswith("tuple")
    return ("Number", "...") if numeric else None


def shapes_of(axes):
    """The shapes that named axes may have."""
    if axes == "...":
        return SHAPES
    if axes in OTHER_SHAPES:
        return (OTHER_SHAPES[axes],)
    names = axes.split()
    sizes = tuple(SIZES[name] for name in names if name in SIZES)
    positions = POSITIONS if len(sizes) < len(names) else ()
    return ((*positions, *sizes, *((SIZES["C"],) if "..." in names and not sizes else ())),)


def array_of(name, kind, number, shape):
    seed = sum(map(ord, name))
    if kind == "Bool":
        return np.random.default_rng(seed).random(shape) < 0.6
    if kind == "Int":
        return np.random.default_rng(seed).integers(0, SIZES["C"], shape, np.int32)
    return np.float32(number + lattice(seed, *shape) / (64 if number else 1))


def settings_of(function):
    """Those of the function's variants, one for each choice of words."""
    if function.__name__ in SETTINGS:
        return [SETTINGS[function.__name__]]
    found = {}
    for entry in (*PENALTIES, *DIVERGENCES, *CONSTRAINTS, *GATES):
        operator = getattr(F, f"prox_{entry.function.__name__}", None)
        for case in entry.cases():
            if function in (case.function, getattr(entry, "of_hidden", None), operator):
                words = [x for x in case.settings.values() if isinstance(x, str)]
                found.setdefault(tuple(words), case.settings)
    return [*found.values()] or [{}]


@functools.cache
def calls_of(function, **options):
    """One call for each choice of words, of as many arrays as it takes."""
    return [_call(function, settings | options) for settings in settings_of(function)]


def _call(function, settings):
    options: dict[str, Any] = {}
    numbers, arrays, required = {}, {}, {}
    parameters = inspect.signature(function).parameters
    for name, parameter in parameters.items():
        value, kind = settings.get(name, parameter.default), kind_of(parameter.annotation)
        if name == "key":
            options[name] = KEY
        elif name in settings and value is None:
            continue
        elif kind is None:
            options |= {name: value} if name in settings else {}
        elif kind[0] != "Number" and parameter.default is parameter.empty:
            arrays[name] = array_of(name, kind[0], NUMBERS.get(name, 0.0), shapes_of(kind[1])[0])
        elif isinstance(value, tuple) or (
            value == "mean" and "Literal" in str(parameter.annotation)
        ):
            options[name] = value
        elif not isinstance(value, complex):
            numbers[name] = value if isinstance(value, float) else NUMBERS.get(name, 1.0)
            required |= {name: numbers[name]} if parameter.default is parameter.empty else {}
    for name, number in numbers.items():
        kind, axes = kind_of(parameters[name].annotation)
        for shape in shapes_of(axes):
            own = array_of(name, kind, number if kind == "Number" else 0.0, shape)
            call = Call(function, options | required, arrays | {name: own})
            with contextlib.suppress(TypeError, ValueError):
                jax.eval_shape(call.result, call.arrays)
                arrays[name] = own
                break
        else:
            pytest.fail(f"{function.__name__} takes no array as {name}: say why in SETTINGS")
    return Call(function, options, arrays)


def takes_arrays(function):
    kinds = (kind_of(p.annotation) for p in inspect.signature(function).parameters.values())
    return sum(kind is not None for kind in kinds) > 1


FUNCTIONS = {
    name: function
    for name, function in ((name, getattr(F, name)) for name in F.__all__)
    if inspect.isfunction(function) and takes_arrays(function)
}


def is_streamed(function):
    return "block_size" in inspect.signature(function).parameters


# Of what is streamed, which takes long to trace, those that stand for all.
SHOWN = (F.kl_from_logits, F.linear_distillation)


def reductions_of(function):
    taken = "reduction" in inspect.signature(function).parameters
    return [{"reduction": name} for name in ("none", "mean", "sum")] if taken else [{}]


def assert_as_on_one_device(call, placed):
    desired = quick_jit(call.slopes)(call.arrays)
    for actual in quick_jit(lambda placed: [call.slopes(arrays) for arrays in placed])(placed):
        jax.tree.map(assert_near, actual, desired)


def assert_near(actual, desired):
    for part in (np.real, np.imag):
        assert_close(part(np.asarray(actual)), part(np.asarray(desired)), rtol=2e-5, atol=2e-6)


# One for each way in which arrays meet.
WAYS = [
    F.l2,
    F.kl_divergence,
    F.entropy_from_logits,
    F.linear_cross_entropy,
    F.top_k_gate,
    F.jump_relu,
]
every_way = pytest.mark.parametrize("function", WAYS, ids=lambda function: function.__name__)


# The tests.


@every_way
def test_any_pair_with_the_first_array(function):
    """Of nine placements all are traced, which is where they would fail, and one is computed."""
    mesh, call = mesh_of("2x4"), calls_of(function)[0]
    variants = itertools.cycle(calls_of(function, **own)[0] for own in reductions_of(function))
    with jax.set_mesh(mesh):
        for row in call.rows(few=True):
            variant = next(variants)
            jax.jit(variant.slopes).trace(variant.placed(mesh, row))
        assert_as_on_one_device(call, [call.placed(mesh, call.rows(few=True)[1])])


PAIRS = {
    f"{own}-{name}": (function, name)
    for own, function in FUNCTIONS.items()
    for name in MESHES
    if name == "2x4" or function in WAYS
}


@pytest.mark.slow
@pytest.mark.parametrize(("function", "name"), PAIRS.values(), ids=PAIRS)
def test_any_pair(function, name):
    """All variants are traced, and the first is computed.

    In all placements it is on the larger mesh, if it is not streamed, or stands for what is; of
    what is streamed, the other variants are traced in one reduction.
    """
    mesh = mesh_of(name)
    fewer = name == "4" or (is_streamed(function) and function not in SHOWN)
    first, *others = (calls_of(function, **own) for own in reductions_of(function))
    others = [calls[:1] if is_streamed(function) else calls for calls in others]
    with jax.set_mesh(mesh):
        for calls in (first, *others):
            for call in calls:
                for row in call.rows(few=fewer or call is not first[0]):
                    jax.jit(call.slopes).trace(call.placed(mesh, row))
        rows = first[0].rows(few=True)[:: 4 if fewer else 1]
        assert_as_on_one_device(first[0], [first[0].placed(mesh, row) for row in rows])


@every_way
def test_placements_alone_are_enough(function):
    """In jit with no mesh around, where what is unplaced follows what is placed."""
    call, mesh = calls_of(function)[-1], mesh_of("4")
    levels = [UNPLACED, SHARDED, REPLICATED, *[UNPLACED] * len(call.arrays)][: len(call.arrays)]
    assert_as_on_one_device(call, [call.placed(mesh, levels)])


@every_way
def test_called_in_a_notebook(function):
    """Eagerly, with the mesh around, and without it where all arrays are placed."""
    call, mesh = calls_of(function)[-1], mesh_of("4")
    rest = len(call.arrays) - 1
    desired = quick_jit(call.result)(call.arrays)
    with jax.set_mesh(mesh):
        actual = call.result(call.placed(mesh, [UNPLACED, *[SHARDED] * rest]))
    jax.tree.map(assert_near, actual, desired)
    actual = call.result(call.placed(mesh, [SHARDED, *[REPLICATED] * rest]))
    jax.tree.map(assert_near, actual, desired)


@pytest.mark.parametrize("function", WAYS[:-2], ids=lambda function: function.__name__)
def test_what_is_cut_is_never_gathered(function):
    """What is whole is cut instead."""
    mesh = mesh_of("2x4")
    call = calls_of(function, reduction="mean")[-1]
    whole = [UNPLACED if i % 2 else REPLICATED for i in range(len(call.arrays))]
    with jax.set_mesh(mesh):
        arrays = call.placed(mesh, [SHARDED, *whole[1:]])
        name, first = next(iter(arrays.items()))
        slope = jax.value_and_grad(lambda x: call.result(arrays | {name: x}))
        text = quick_jit(slope).lower(first).compile().as_text()
    assert "all-reduce" in text
    assert "all-gather" not in text
    assert "all-to-all" not in text


@pytest.mark.parametrize("function", WAYS[:-1], ids=lambda function: function.__name__)
def test_what_broadcasts(function):
    """Masks, weights and numbers that have no batch, beside arrays that are cut along it."""
    call, mesh = calls_of(function)[-1], mesh_of("2x4")
    kinds = {n: kind_of(p.annotation) for n, p in inspect.signature(function).parameters.items()}
    arrays = {
        name: x[0] if x.ndim > 1 and kinds[name][0] in ("Bool", "Number") else x
        for name, x in call.arrays.items()
    }
    call = call._replace(arrays=arrays)

    def placed(name, x):
        spec = P("data", "model") if x.shape[:2] == POSITIONS else P()
        spec = P("model") if name == "where" and x.shape[0] == POSITIONS[1] else spec
        return jax.device_put(x, NamedSharding(mesh, spec))

    with jax.set_mesh(mesh):
        assert_as_on_one_device(call, [{name: placed(name, x) for name, x in arrays.items()}])


def test_configs_of_trees():
    """Weights and centres that match a tree, each array somewhere else."""
    mesh = mesh_of("4")
    tree = {"a": np.float32(lattice(0, 8, 3)), "b": np.float32(lattice(1, 8, 5))}
    numbers = jax.tree.map(lambda x: np.float32(1 + abs(x)), tree)
    masks = jax.tree.map(lambda x: x > -1, tree)

    def losses(tree, numbers, masks):
        configs = [
            pj.L2(center=numbers, weights=numbers, reduction="mean"),
            pj.L2(clip=numbers) + 0.5 * pj.L1(weights=numbers),
            pj.GroupLasso(axis=-1, reduction="mean"),
            pj.ImportanceMinimality(pj.SmoothL0(gamma=0.5), beta=0.5),
            pj.SparsityTarget(target=0.5, from_mask=True),
        ]
        wheres = [masks, masks, masks, jax.tree.map(lambda x: x[:, 0], masks), masks]
        values = [config(tree, where=where) for config, where in zip(configs, wheres, strict=True)]
        return sum(values) + pj.Consistency()(tree, numbers, where=masks), values

    slopes = quick_jit(jax.value_and_grad(losses, (0, 1), has_aux=True))
    desired = slopes(tree, numbers, masks)
    for levels in ((SHARDED, REPLICATED, UNPLACED), (UNPLACED, SHARDED, REPLICATED)):
        with jax.set_mesh(mesh):
            placed = [
                {"a": place(part["a"], mesh, level), "b": place(part["b"], mesh, other)}
                for part, level, other in zip(
                    (tree, numbers, masks), levels, levels[::-1], strict=True
                )
            ]
            jax.tree.map(assert_near, slopes(*placed), desired)
