"""Keras' own trainer with our regularizers, beside the regularizers of Keras."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import penalties_jax as pj
from tests.test_documentation import PAGES

keras = pytest.importorskip("keras", reason="needs the extra 'keras'")
own = keras.regularizers
Regularizer = pj.adapters.keras.Regularizer

RNG = np.random.default_rng(0)
X = RNG.normal(size=(24, 3)).astype(np.float32)
Y = RNG.normal(size=(24, 2)).astype(np.float32)

PAIRS = {
    "L1": (own.L1(0.1), 0.1 * pj.L1()),
    "L2": (own.L2(0.1), 0.1 * pj.L2()),
    "L1L2": (own.L1L2(l1=0.1, l2=0.03), 0.1 * pj.L1() + 0.03 * pj.L2()),
}
MIXED = 0.1 * pj.L1() + pj.SmoothL0(gamma=0.3, weights=jnp.array([1.0, 2.0]))


def model(**regularizers):
    keras.utils.set_random_seed(0)
    net = keras.Sequential(
        [
            keras.Input((3,)),
            keras.layers.Dense(4, activation="tanh"),
            keras.layers.Dense(2, name="head", bias_initializer="ones", **regularizers),
        ]
    )
    net.compile(optimizer=keras.optimizers.Adam(0.05), loss="mse")
    return net


def fit(net, epochs=2):
    return net.fit(X, Y, batch_size=8, epochs=epochs, shuffle=False, verbose=0).history["loss"]


def test_values_and_histories_are_those_of_keras():
    histories = {}
    for which, wrap in ((0, lambda theirs: theirs), (1, Regularizer)):
        l1, l2, l1l2 = (wrap(pair[which]) for pair in PAIRS.values())
        net = model(kernel_regularizer=l1l2, bias_regularizer=l2, activity_regularizer=l1)
        histories[which] = fit(net)
        assert sum(net.losses) > 0.1
    np.testing.assert_allclose(histories[1], histories[0], rtol=1e-6)
    for theirs, penalty in PAIRS.values():
        assert float(Regularizer(penalty)(Y)) == pytest.approx(float(theirs(Y)), rel=1e-6)


def test_l1_has_no_slope_at_zero_where_that_of_keras_has():
    slopes = [jax.grad(f)(jnp.zeros(())) for f in (own.L1(1.0), Regularizer(pj.L1()))]
    assert slopes == [1.0, 0.0]


def test_orthogonality_of_two_rows_is_that_of_keras_squared():
    """Keras averages absolute cosines over pairs, of which two rows have one; we add squares."""
    theirs = own.OrthogonalRegularizer(factor=1.0)(X[:2])
    assert float(Regularizer(0.5 * pj.Orthogonality())(X[:2])) == pytest.approx(
        float(theirs) ** 2, rel=1e-5
    )


def test_a_saved_model_continues_as_if_it_had_not_stopped(tmp_path):
    def penalised():
        regularizer = Regularizer(MIXED)
        return model(kernel_regularizer=regularizer, bias_regularizer=regularizer)

    whole = fit(penalised(), epochs=3)
    net = penalised()
    first = fit(net, epochs=1)
    net.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.get_layer("head").kernel_regularizer.penalty == MIXED
    np.testing.assert_allclose(first + fit(loaded, epochs=2), whole, rtol=1e-6)


def test_a_clone_has_the_penalty():
    net = model(kernel_regularizer=Regularizer(MIXED))
    clone = keras.models.clone_model(net)
    clone.set_weights(net.get_weights())
    kernel = np.asarray(net.get_layer("head").kernel, np.float64)
    weighted = (kernel**2 / (kernel**2 + 0.3**2)) * [1.0, 2.0]
    (loss,) = clone.losses
    assert float(loss) == pytest.approx(0.1 * np.abs(kernel).sum() + weighted.sum(), rel=1e-5)


def test_the_layer_of_the_guide_counts_steps(tmp_path):
    """Learning nothing, so that the penalty of each epoch is a mean over the schedule alone."""
    namespace = {}
    for example in PAGES["docs/guides/adapters.md"]:
        if "keras.Sequential" in example:
            exec(example, namespace)
    keras.utils.set_random_seed(0)
    layer = namespace["Annealed"](pj.anneal(0.0, 6.0, start=0, end=6) * pj.L1())
    net = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2), layer])
    net.compile(optimizer=keras.optimizers.SGD(0.0), loss="mse")
    history = fit(net)
    y = X @ np.asarray(net.layers[0].kernel, np.float64)
    totals, error = np.abs(y).reshape(3, -1).sum(1), np.mean((y - Y) ** 2)
    expected = [error + np.mean(totals * weights) for weights in ([0, 1, 2], [3, 4, 5])]
    np.testing.assert_allclose(history, expected, rtol=1e-5)
    net.evaluate(X, Y, verbose=0)
    assert int(layer.step.value) == 6 == int(net.optimizer.iterations.value)
    net.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert int(loaded.layers[-1].step.value) == 6
    assert loaded.layers[-1].penalty == layer.penalty


@pytest.mark.parametrize(
    ("penalty", "error"),
    [
        (pj.KLDivergence(), "compares 2: make it a term"),
        (0.1, r"takes a config, such as pj.L1\(\), got 0.1"),
        (own.L1(0.1), "takes a config"),
        (pj.SmoothL0(pj.anneal(1.0, 0.1, start=0, end=9)), r"no step: call .at\(step\)"),
        (pj.ImportanceMinimality(jnp.abs), "make the function a class"),
        (pj.ImportanceMinimality(lambda x: x), "can't be serialised.*make the function a class"),
    ],
)
def test_what_is_no_penalty_of_one_input(penalty, error):
    with pytest.raises(TypeError, match=error):
        Regularizer(penalty)


def test_a_value_of_each_entry_is_refused_when_called():
    with pytest.raises(ValueError, match="must be a scalar"):
        Regularizer(pj.L1(reduction="none"))(X)


def test_another_backend_is_one_clear_error(monkeypatch):
    monkeypatch.setattr(keras.backend, "backend", lambda: "numpy")
    with pytest.raises(ImportError, match="has 'numpy': set KERAS_BACKEND=jax before"):
        importlib.reload(pj.adapters.keras)
