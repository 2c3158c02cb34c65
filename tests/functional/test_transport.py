"""The Wasserstein distance against SciPy, quantiles in float64, and itself at its edges."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify
from scipy import special, stats

import penalties_jax as pj
import penalties_jax.functional as F  # noqa: N812
from tests.catalogue import INF
from tests.oracles import assert_close, gradient, lattice
from tests.programs import quick_jit

ORDERS = (1, 1.5, 2, 3)
every_order = pytest.mark.parametrize("order", ORDERS)
POSITIONS = np.array([-1.0, -0.5, 0.25, 3.0, 3.5])


def quantiles(p, q, x, order):
    """The integral of |F^-1 - G^-1|^order, one step of either after another."""
    i = j = total = 0
    p, q = p.copy(), q.copy()
    while i < len(p) and j < len(q):
        mass = min(p[i], q[j])
        total += mass * abs(x[i] - x[j]) ** order
        p[i], q[j] = p[i] - mass, q[j] - mass
        i, j = (i + 1, j) if p[i] <= q[j] else (i, j + 1)
    return total


def distributions(seed, *shape):
    return tuple(special.log_softmax(lattice(seed + i, *shape), axis=-1) for i in (0, 1))


@every_order
def test_value_and_gradients(order, x64):
    """Through a softmax, and in the positions, which may be those of each row."""
    logits = lattice(0, 6, 5), lattice(1, 6, 5)
    rows = POSITIONS * np.linspace(1, 2, 6)[:, None]

    def exact(a, b, x):
        p, q = special.softmax(a, axis=-1), special.softmax(b, axis=-1)
        return sum(
            quantiles(*row, order) for row in zip(p, q, np.broadcast_to(x, p.shape), strict=True)
        )

    def total(a, b, x):
        logs = jax.nn.log_softmax(a), jax.nn.log_softmax(b)
        return F.wasserstein(*logs, positions=x, order=order, reduction="sum")

    for x in (POSITIONS, rows):
        value, slopes = quick_jit(jax.value_and_grad(total, (0, 1, 2)))(*logits, x)
        assert_close(value, exact(*logits, x), rtol=1e-12)
        for i, slope in enumerate(slopes):

            def moved(y, i=i, x=x):
                return exact(*(y if i == k else z for k, z in enumerate((*logits, x))))

            assert_close(slope, gradient(moved, (*logits, x)[i], 1e-5), rtol=1e-7, atol=1e-8)
    if order == 1:
        p, q = (special.softmax(x[0]) for x in logits)
        peer = stats.wasserstein_distance(POSITIONS, POSITIONS, p, q)
        logs = (np.log(p), np.log(q))
        assert_close(F.wasserstein(*logs, positions=POSITIONS), peer, rtol=1e-12)
        assert_close(F.wasserstein(*logs, positions=POSITIONS, order=1 + 1e-9), peer, rtol=1e-6)


@every_order
def test_along_another_axis(order):
    log_p, log_q = map(np.float32, distributions(2, 2, 5, 3))
    call = partial(F.wasserstein, order=order, positions=POSITIONS, reduction="none")
    moved = call(log_p.swapaxes(1, 2), log_q.swapaxes(1, 2))
    config = pj.Wasserstein(order=order, positions=POSITIONS, axis=1, reduction="none")
    assert_close(call(log_p, log_q, axis=1), moved, rtol=1e-6)
    assert_close(config(log_p, log_q), moved, rtol=1e-6)


EDGES = {
    "equal": ([0.0, -1.0, 2.0, -3.0], [0.0, -1.0, 2.0, -3.0]),
    "equal, with absent classes": ([0.0, -INF, -INF, -3.0], [0.0, -INF, -INF, -3.0]),
    "equal one-hot": ([-INF, 0.0, -INF, -INF], [-INF, 0.0, -INF, -INF]),
    "disjoint": ([0.0, -INF, -INF, -INF], [-INF, -INF, 0.0, 0.0]),
    "ties": ([0.0, 0.0, -INF, -INF], [0.0, 0.0, 0.0, 0.0]),
    "underflow": ([0.0, -200.0, -1e30, -INF], [-1e30, -200.0, -INF, 0.0]),
}


@every_order
def test_at_the_edges(order):
    """No NaN on the way either; where P = Q all gradients are 0."""
    log_p, log_q = special.log_softmax(np.array([*EDGES.values()]), axis=-1).swapaxes(0, 1)
    x = np.tile(np.arange(4.0), (len(EDGES), 1))

    def values(p, q, x):
        return F.wasserstein(p, q, positions=x, order=order, reduction="none")

    def everything(*inputs):
        return values(*inputs), jax.grad(lambda *x: values(*x).sum(), (0, 1, 2))(*inputs)

    checked = checkify.checkify(jax.jit(everything), errors=checkify.float_checks)
    error, (found, slopes) = checked(*map(np.float32, (log_p, log_q, x)))
    error.throw()
    rows = zip(np.exp(log_p), np.exp(log_q), x, strict=True)
    assert_close(found, [quantiles(*row, order) for row in rows], rtol=1e-6, atol=1e-30)
    for slope in slopes:
        assert np.isfinite(slope).all()
        assert np.all(np.asarray(slope)[["equal" in name for name in EDGES]] == 0)


@every_order
def test_of_many_classes_in_float32(order):
    """Far apart, and so near that the cumulative probabilities agree in all but one digit."""
    classes = 10_000
    x = np.linspace(0, 1, classes)
    a, b = lattice(3, classes), lattice(4, classes)
    for other in (b, a + 1e-4 * b):
        log_p, log_q = (np.float32(special.log_softmax(z)) for z in (a, other))
        exact = quantiles(*(np.exp(np.float64(z)) for z in (log_p, log_q)), x, order)
        value = F.wasserstein(log_p, log_q, positions=np.float32(x), order=order)
        assert_close(value, exact, rtol=1e-5)


ERRORS = {
    "order": ({"order": 0.5}, "order must be at least 1, and finite, got 0.5"),
    "descending": ({"positions": np.array([0.0, 2.0, 1.0])}, "positions must be ascending"),
    "classes": ({"positions": np.arange(4)}, r"positions must have the 3 classes .* \(4,\)"),
    "rows": ({"positions": np.ones((4, 3))}, r"positions must .* \(2, 3\).* \(4, 3\)"),
}


@pytest.mark.parametrize(("options", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_errors(options, message):
    log_p = jnp.zeros((2, 3))
    for call in (F.wasserstein, lambda *x, **options: pj.Wasserstein(**options)(*x)):
        with pytest.raises(ValueError, match=message):
            call(log_p, log_p, **options)


def test_an_order_is_structure():
    with pytest.raises(TypeError, match="order must be of type float, got"):
        F.wasserstein(jnp.zeros(3), jnp.zeros(3), order=jnp.float32(2))


def test_positions_that_jax_holds_are_not_read():
    descending = jnp.array([0.0, 2.0, 1.0])
    assert np.isfinite(F.wasserstein(jnp.zeros(3), jnp.ones(3), positions=descending))
