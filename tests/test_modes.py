"""The same values whatever comes in, in every mode of jax: each public function, called.

Where what is computed is the same program, its values are the same, and nothing has to run.
"""

import inspect
from functools import partial
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental import checkify

import penalties_jax as pj
from penalties_jax.schedules import Shape
from tests.calls import CALLS, PUBLIC, is_floating
from tests.catalogue import EXAMPLES, every, inputs_of
from tests.programs import operations, quick_jit

every_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
# The streamed ones but KL take long to compile: make test-slow has them.
quick_calls = every(
    CALLS,
    "call",
    slow=lambda call: (
        "block_size" in inspect.signature(call.function).parameters
        and call.function not in (pj.kl_from_logits, pj.linear_kl)
    ),
)
every_config = pytest.mark.parametrize("config", EXAMPLES.values(), ids=EXAMPLES)


def test_every_public_function_is_called():
    missing = {*PUBLIC} - {call.function.__name__ for call in CALLS.values()}
    assert not missing, f"{sorted(missing)} has no call in tests/calls.py"


def cast(tree, dtype):
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)


def with_first(call, dtype):
    """The arrays of a call, the first of them in another dtype."""
    first = next(iter(call.floating))
    return call.arrays | {first: cast(call.arrays[first], dtype)}


def held_by(holder, tree):
    return jax.tree.map(lambda x: holder(jnp.asarray(x)), tree)


class Holder:
    """What holds an array, as a Keras variable does; no pytree."""

    def __init__(self, array):
        self.array = array

    def __jax_array__(self):
        return self.array

    def __call__(self):
        raise AssertionError("a variable is no schedule")


def is_variable(node):
    return isinstance(node, (nnx.Variable, Holder))


# Strict promotion.


@quick_calls
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_function_under_strict_promotion(call, dtype):
    """Masks and weights have fewer axes than what they meet, and numbers are Python's."""

    def everything(arrays):
        return call(**arrays), call.slopes(**arrays)

    usual = operations(everything, with_first(call, dtype))
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        assert operations(everything, with_first(call, dtype)) == usual


@pytest.mark.parametrize(
    "strict",
    [partial(jax.numpy_dtype_promotion, "strict"), partial(jax.numpy_rank_promotion, "raise")],
    ids=["dtypes", "ranks"],
)
def test_either_mode_alone(strict):
    x, weights = jnp.ones((2, 3), jnp.bfloat16), jnp.arange(3, dtype=jnp.float32)
    with strict():
        assert float(pj.l1(x, weights=weights)) == 6


@every_config
def test_a_config_under_strict_promotion(config):
    def everything(inputs):
        scaled = np.float64(0.5) * config
        slopes = jax.grad(jax.jit(lambda inputs: scaled(*inputs)), allow_int=True)
        return scaled(*inputs), slopes(inputs)

    inputs = inputs_of(config)
    usual = operations(everything, inputs)
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        assert operations(everything, inputs) == usual


def _anneal(count, shape):
    return pj.anneal(1.0, 0.1, start=1, end=9, shape=shape)(count)


def _controlled(count):
    adaptive = pj.AdaptiveSparsityScheduler(remember=True)
    others = pj.DualAscent(target=0.5), pj.Budget(limit=0.5), pj.AdaptiveKL(0.5, horizon=9.0)
    weights = [each(each.update(each.init(), value=count, rate=count)) for each in others]
    return adaptive(adaptive.update(adaptive.init(), value=count), value=count), weights


def _objective(count):
    term = pj.Term(pj.L2(), on="x", weight=pj.anneal(0.0, 1.0, start=0, end=9))
    objective = pj.Objective(loss=lambda outputs: jnp.sum(outputs["x"]), terms={"l2": term})
    return jax.grad(jax.jit(lambda x: objective({"x": x}, step=count)[0]))(jnp.ones(3))


def _step(count):
    params = {"a": jnp.ones(3, jnp.bfloat16), "frozen": jnp.ones(2, jnp.float8_e4m3fn)}
    weight = pj.anneal(0.0, 1.0, start=0, end=9)
    transforms = (
        pj.add_penalty(pj.L2(), weight),
        pj.proximal(pj.L1(), np.float64(0.5), weight),
        pj.scale_by_sparsity(weight),
    )
    updates = jax.tree.map(jnp.zeros_like, params)
    for transform in transforms:
        state = transform.init(params)._replace(count=count)
        updates, _ = transform.update(updates, state, params, rate=0.5)
    return updates


COUNTED = {shape: partial(_anneal, shape=shape) for shape in get_args(Shape)} | {
    "controllers": _controlled,
    "objective": _objective,
    "transforms": _step,
}


@pytest.mark.parametrize("function", COUNTED.values(), ids=COUNTED)
def test_what_counts_steps_under_strict_promotion(function):
    usual = operations(function, jnp.int32(3))
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        assert operations(function, jnp.int32(3)) == usual


# What holds an array.


@every_call
@pytest.mark.parametrize("holder", [nnx.Param, Holder])
def test_what_holds_an_array_is_that_array(call, holder):
    """In the position of every array and of every number; no result is a variable."""
    bare = jax.tree.map(jnp.asarray, call.arrays | call.numbers)

    def held(arguments):
        return call(**held_by(holder, arguments))

    assert operations(held, bare) == operations(lambda arguments: call(**arguments), bare)
    result = jax.eval_shape(held, bare)
    assert not any(map(is_variable, jax.tree.leaves(result, is_leaf=is_variable)))


@every_config
def test_a_config_may_hold_variables(config):
    held, inputs = held_by(nnx.Param, config), inputs_of(config)
    bare = jax.tree.map(jnp.asarray, config)
    assert operations(lambda x: held(*held_by(nnx.Param, x)), inputs) == operations(
        lambda x: bare(*x), inputs
    )


def test_a_config_holds_what_a_variable_held():
    """As it was when the config was made: a centre does not move along with the model."""
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    weight = nnx.Param(jnp.float32(2.0))
    penalty = weight * pj.L2(center=nnx.state(model))
    for variable in (model.kernel, model.bias, weight):
        variable[...] += 1
    assert float(penalty(nnx.state(model))) == pytest.approx(18.0)
    slope = jax.grad(lambda x: pj.Lp(p=nnx.Param(x))(jnp.array([2.0])))(1.0)
    assert float(slope) == pytest.approx(2 * np.log(2), rel=1e-6)


def test_trees_match_by_their_names():
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    center = nnx.state(model)
    pure = nnx.to_pure_dict(center)
    moved = jax.tree.map(lambda x: x + 1.0, pure)
    for tree in (pure, jax.tree.map(jnp.asarray, center), center):
        penalty = pj.L2(center=tree)
        assert float(penalty(moved)) == 9.0
        assert float(pj.nnx.param_penalty(model, penalty)) == 0.0
        optimizer = nnx.Optimizer(model, pj.add_penalty(penalty), wrt=nnx.Param)
        optimizer.update(model, jax.tree.map(jnp.zeros_like, nnx.state(model)))
        np.testing.assert_array_equal(model.kernel[...], pure["kernel"])


@every_call
def test_what_is_no_array_is_named(call):
    for name in (*call.arrays, *call.numbers):
        annotation = str(inspect.signature(call.function).parameters[name].annotation)
        of_several = "PyTree" in annotation or "tuple" in annotation
        wrong = ["text"] if of_several else [[1.0], (1.0,), "text", jnp.sum]
        for value in wrong:
            with pytest.raises((TypeError, ValueError), match=name) as caught:
                call(**{name: value})
            assert caught.type is TypeError or "Literal" in annotation


# Dtypes.


@quick_calls
def test_python_numbers_never_widen(call, x64):
    """A float32 result of float32 arrays, that is no weakly typed carry; of float64, float64."""
    for dtype in (jnp.float32, jnp.float64):
        arrays = {name: cast(x, dtype) if is_floating(x) else x for name, x in call.arrays.items()}
        results = jax.eval_shape(lambda arrays: call(**arrays), arrays)
        slopes = jax.eval_shape(lambda arrays: call.slopes(**arrays), arrays)
        results = (results, {name: slopes[name] for name in call.floating})
        for leaf in filter(is_floating, jax.tree.leaves(results)):
            assert jnp.finfo(leaf.dtype).dtype == dtype
            assert not leaf.weak_type


@every_call
def test_numbers_of_any_dtype(call):
    """Also of those that don't promote by themselves."""
    for dtype in (jnp.float8_e4m3fn, jnp.int4):
        narrow = {name: jnp.asarray(x, dtype) for name, x in call.numbers.items() if name != "z"}
        result = jax.eval_shape(lambda numbers: call(**numbers), narrow)
        inexact = [x for x in jax.tree.leaves(result) if jnp.issubdtype(x.dtype, jnp.inexact)]
        assert inexact
        assert all(x.dtype in (jnp.float32, jnp.complex64) for x in inexact)


@every_config
def test_a_config_never_widens(config, x64):
    result = jax.eval_shape(config, *inputs_of(config))
    assert [leaf.dtype for leaf in jax.tree.leaves(result)] == [jnp.float32]
    assert not result.weak_type


@quick_calls
def test_narrow_dtypes_are_upcast(call):
    """Quantised values are what they are in float32."""
    if call.function in (pj.gather_active, pj.scatter_active):
        pytest.skip("what is moved keeps its dtype")

    def differences(arrays):
        for dtype in (jnp.float8_e4m3fn, jnp.int4):
            narrow = {name: cast(x, dtype) if is_floating(x) else x for name, x in arrays.items()}
            wide = {
                name: cast(x, jnp.float32) if is_floating(arrays[name]) else x
                for name, x in narrow.items()
            }
            yield call(**narrow), call(**wide)

    for ours, expected in quick_jit(lambda arrays: tuple(differences(arrays)))(call.arrays):
        for a, b in zip(*map(jax.tree.leaves, (ours, expected)), strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_allclose(a, b, rtol=1e-6)


# NaN on the way.


@pytest.mark.slow
@every_call
def test_no_false_alarm(call):
    """No operation makes a NaN or divides by 0, in what is selected or not: at every edge.

    So `jax.debug_nans` and `checkify.float_checks` have nothing to find.
    """

    def everything(arrays):
        return call(**arrays), call.slopes(**arrays)

    checked = quick_jit(checkify.checkify(everything, errors=checkify.float_checks))
    error, results = checked(call.edges)
    error.throw()
    with jax.debug_nans(True):
        jax.block_until_ready(results)
    assert not any(np.isnan(leaf).any() for leaf in jax.tree.leaves(results))


# Sizes that are not known.


@quick_calls
def test_exported_for_any_batch(call):
    """Value and gradient are one program for whatever the first axis may be."""
    (batch,) = jax.export.symbolic_shape("b")
    sizes = {x.shape[0] for x in jax.tree.leaves(call.arrays) if np.ndim(x) > 1}

    def of_any_batch(x):
        shape = jnp.shape(x)
        shape = (batch, *shape[1:]) if len(sizes) == 1 and {*shape[:1]} == sizes else shape
        return jax.ShapeDtypeStruct(shape, x.dtype)

    def everything(arrays):
        return call(**arrays), call.slopes(**arrays)

    jax.export.export(jax.jit(everything))(jax.tree.map(of_any_batch, call.arrays))
