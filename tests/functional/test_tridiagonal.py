"""The diagonal of the resolvent against dense inverses, closed-form derivatives, long scans."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import penalties_jax.functional as F  # noqa: N812
from tests.oracles import assert_close, gradient, lattice

# The third, "auto", is one of them.
METHODS = ("scan", "associative_scan")
every_method = pytest.mark.parametrize("method", METHODS)


@pytest.fixture(scope="module", autouse=True)
def quick_compiles():
    """Unoptimised programs, which compile in a fraction of the time."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def dense(a, products, z=1j):
    """(H - z I)^-1 in complex128, with ones below the diagonal and the products above it."""
    h = np.diag(np.asarray(a, np.complex128) - z)
    if len(a) > 1:
        h += np.diag(products, 1) + np.diag(np.ones(len(a) - 1), -1)
    return np.linalg.inv(h)


def exact(a, products, z=1j, causal=False):
    """The diagonals for a batch [..., n]; for causal, the last entry of each leading block's."""
    result = np.empty(a.shape, np.complex128)
    for index in np.ndindex(a.shape[:-1]):
        row, own = a[index], products[index]
        if causal:
            blocks = range(1, len(row) + 1)
            result[index] = [dense(row[:k], own[: k - 1], z)[-1, -1] for k in blocks]
        else:
            result[index] = np.diag(dense(row, own, z))
    return result


def assert_near(actual, desired, rtol):
    """Agree as complex numbers, relative to their size."""
    actual = np.asarray(actual)
    assert actual.shape == desired.shape
    error = np.abs(actual.astype(np.complex128) - desired) / np.abs(desired)
    assert error.max() <= rtol, error.max()


def data(seed, *shape, couplings="some"):
    """Diagonals in [-5, 1], and couplings of 0, 1 or both."""
    random = np.random.default_rng(seed)
    a = (-2 + random.uniform(-3, 3, shape)).astype(np.float32)
    share = {"none": 0, "some": 0.6, "all": 1}[couplings]
    kept = random.random((*shape[:-1], shape[-1] - 1)) < share
    return a, kept.astype(np.float32)


@pytest.mark.parametrize(
    ("method", "n"),
    [
        *((method, n) for method in METHODS for n in (1, 2, 3)),
        ("scan", 64),
        ("scan", 512),
        pytest.param("associative_scan", 512, marks=pytest.mark.slow),
    ],
)
def test_against_dense_inverses(method, n):
    @jax.jit
    def both(*x):
        return [F.resolvent_diagonal(*x, causal=causal, method=method) for causal in (False, True)]

    for couplings in ("none", "some", "all"):
        a, products = data(n, 2, n, couplings=couplings)
        full, leading = both(a, products)
        assert full.dtype == leading.dtype == jnp.complex64
        a, products = a.astype(float), products.astype(float)
        assert_near(full, exact(a, products), 5e-6)
        # The leading blocks of a long one are its own first 64.
        block = exact(a[:, :64], products[:, :63], causal=True)
        assert_near(leading[:, :64], block, 5e-6)


@every_method
@pytest.mark.parametrize("z", [0.5j, 2 - 1j, -1 + 0.25j])
def test_other_couplings_and_z(method, z, x64):
    random = np.random.default_rng(0)
    a, products = random.normal(0, 3, (3, 2, 20)), random.uniform(0, 9, (3, 2, 19))
    for causal in (False, True):
        g = F.resolvent_diagonal(
            jnp.asarray(a), jnp.asarray(products), z=z, causal=causal, method=method
        )
        assert g.dtype == jnp.complex128
        assert_near(g, exact(a, products, z, causal), 1e-11)
        assert np.all(np.abs(g) <= (1 + 1e-12) / abs(z.imag))


def test_without_couplings_it_is_the_reciprocal():
    a = lattice(0, 9)
    for method in METHODS:
        g = F.resolvent_diagonal(jnp.asarray(a, jnp.float32), jnp.zeros(8), method=method)
        assert_near(g, 1 / (a - 1j), 1e-6)


def test_auto_is_the_scan_on_a_cpu():
    a, products = data(1, 3, 50)
    if jax.default_backend() == "cpu":
        auto, scan = (F.resolvent_diagonal(a, products, method=name) for name in ("auto", "scan"))
        assert np.array_equal(auto, scan)
        assert np.array_equal(auto, F.resolvent_diagonal(a, products))


@pytest.mark.untyped
def test_any_real_dtype():
    a, products = np.array([1, -2, 0, 3]), np.array([True, False, True])
    desired = exact(a.astype(float), products.astype(float))
    for dtype in (jnp.int32, jnp.bfloat16):
        g = F.resolvent_diagonal(jnp.asarray(a, dtype), jnp.asarray(products))
        assert g.dtype == jnp.complex64
        assert_near(g, desired, 1e-6)


def weighted(weights, **options):
    """A real function of the diagonal in which each real and imaginary part has its weight."""

    def total(a, products):
        g = F.resolvent_diagonal(a, products, **options)
        return (weights[0] * g.real + weights[1] * g.imag).sum()

    return total


@every_method
@pytest.mark.parametrize("causal", [False, True])
def test_gradients_against_differences(method, causal, x64):
    a, products = lattice(2, 2, 5), np.array([[1.0, 0.0, 1.5, 0.25], [1.0, 1.0, 1.0, 1.0]])
    weights = lattice(3, 2, 2, 5)

    def total(a, products):
        g = exact(a, products, causal=causal)
        return (weights[0] * g.real + weights[1] * g.imag).sum()

    slopes = jax.grad(weighted(weights, causal=causal, method=method), (0, 1))(
        jnp.asarray(a), jnp.asarray(products)
    )
    close = {"rtol": 1e-8, "atol": 1e-10}
    assert_close(slopes[0], gradient(lambda x: total(x, products), a), **close)
    assert_close(slopes[1], gradient(lambda x: total(a, x), products), **close)


@every_method
@pytest.mark.parametrize("n", [1, 2, 16])
def test_gradients_against_the_closed_form(method, n):
    """G changes by -G dH G: -G_kj G_jk for a_j, and -G_kj G_{j+1,k} for the product at j."""
    a, products = data(n, n)
    g = dense(a, products.astype(float))
    weights = lattice(4, 2, n)
    slopes = jax.grad(weighted(weights.astype(np.float32), method=method), (0, 1))(
        jnp.asarray(a), jnp.asarray(products)
    )
    by_a = -g * g.T
    by_product = -g[:, :-1] * g.T[:, 1:]
    for slope, parts in zip(slopes, (by_a, by_product), strict=True):
        desired = weights[0] @ parts.real + weights[1] @ parts.imag
        assert_close(slope, desired, rtol=1e-5, atol=5e-6)


def test_a_hundred_thousand_positions():
    n, method = 100_000, "scan"
    a, products = data(5, n, couplings="all")
    products[::1000] = 0
    d, w = a.astype(complex) - 1j, products.astype(float)

    def ratios(d, w):
        result = [d[0]]
        for entry, product in zip(d[1:].tolist(), w.tolist(), strict=True):
            result.append(entry - product / result[-1])
        return np.array(result)

    left, right = ratios(d, w), ratios(d[::-1], w[::-1])[::-1]

    @jax.jit
    def both(*x):
        return [F.resolvent_diagonal(*x, causal=causal, method=method) for causal in (False, True)]

    full, leading = both(a, products)
    assert np.all(np.abs(full) <= 1 + 1e-6)
    assert_near(full, 1 / (left + right - d), 1e-5)
    assert_near(leading, 1 / left, 1e-5)
    for slope in jax.grad(weighted((1.0, 1.0), method=method), (0, 1))(
        jnp.asarray(a), jnp.asarray(products)
    ):
        assert np.all(np.isfinite(slope))
        assert np.any(np.asarray(slope) != 0)


@every_method
@pytest.mark.parametrize("causal", [False, True])
def test_examples_do_not_touch_each_other(method, causal):
    a, products = data(6, 4, 9)
    other_a, other_products = data(7, 4, 9)
    call = jax.jit(lambda *x: F.resolvent_diagonal(*x, causal=causal, method=method))
    changed_a, changed_products = a.copy(), products.copy()
    changed_a[1], changed_products[1] = other_a[1], other_products[1]
    before, after = np.asarray(call(a, products)), np.asarray(call(changed_a, changed_products))
    others = np.array([0, 2, 3])
    assert np.array_equal(before[others], after[others])
    assert not np.any(before[1] == after[1])
    only = np.zeros((2, 4, 9), np.float32)
    only[:, 1] = 1
    for slope in jax.grad(weighted(only, causal=causal, method=method), (0, 1))(a, products):
        assert_close(np.asarray(slope)[others], 0)
        assert np.any(np.asarray(slope)[1] != 0)


@every_method
def test_a_causal_diagonal_sees_no_later_entry(method):
    n, cut = 10, 6
    a, products = data(8, n, couplings="all")

    def call(a, products, causal=True):
        return F.resolvent_diagonal(a, products, causal=causal, method=method)

    changed_a, changed_products = a.copy(), products.copy()
    changed_a[cut:] += 1
    changed_products[cut - 1 :] /= 2
    before, after = (np.asarray(call(*x)) for x in ((a, products), (changed_a, changed_products)))
    assert np.array_equal(before[:cut], after[:cut])
    assert not np.any(before[cut:] == after[cut:])
    both = np.asarray(call(changed_a, changed_products, causal=False))
    assert not np.any(both[cut - 2 : cut] == before[cut - 2 : cut])
    by_a, by_product = jax.jacobian(lambda *x: call(*x).imag, (0, 1))(
        jnp.asarray(a), jnp.asarray(products)
    )
    assert_close(np.triu(by_a, 1), 0)
    assert_close(np.triu(by_product), 0)
    assert np.all(np.diag(by_a) != 0)


def test_a_zero_coupling_separates_blocks():
    a, products = data(9, 12, couplings="all")
    products[4] = 0
    for method in METHODS:
        g = F.resolvent_diagonal(a, products, method=method)
        parts = ((a[:5], products[:4]), (a[5:], products[5:]))
        alone = [F.resolvent_diagonal(*part, method=method) for part in parts]
        assert_near(g, np.concatenate(alone), 1e-6)


@pytest.mark.slow
@every_method
def test_jvp_and_vmap(method, x64):
    a, products, direction = lattice(10, 3, 8), np.abs(lattice(11, 3, 7)), lattice(12, 3, 8)

    def call(a, products):
        return F.resolvent_diagonal(a, products, method=method)

    value, change = jax.vmap(
        lambda a, products, direction: jax.jvp(lambda a: call(a, products), (a,), (direction,))
    )(a, products, direction)
    assert_near(value, exact(a, products), 1e-12)
    desired = []
    for row, own, step in zip(a, products, direction, strict=True):
        g = dense(row, own)
        desired.append(-(g * g.T) @ step)
    assert_near(change, np.array(desired), 1e-10)
    shared = jax.vmap(call, (0, None))(a, products[0])
    assert_near(shared, exact(a, np.broadcast_to(products[0], (3, 7))), 1e-12)


@pytest.mark.slow
@every_method
def test_second_derivatives(method, x64):
    """Two changes of the diagonal, j and l: G_kj G_jl G_lk + G_kl G_lj G_jk."""
    a, products, weights = lattice(13, 6), np.abs(lattice(14, 5)), lattice(15, 2, 6)
    hessian = jax.hessian(weighted(weights, method=method))(jnp.asarray(a), jnp.asarray(products))
    g = dense(a, products)
    one_way = np.einsum("kj,jl,lk->kjl", g, g, g)
    parts = one_way + one_way.swapaxes(1, 2)
    desired = np.tensordot(weights[0], parts.real, 1) + np.tensordot(weights[1], parts.imag, 1)
    assert_close(hessian, desired, rtol=1e-9, atol=1e-11)


def test_a_traced_z_has_a_derivative(x64):
    """In z, G changes by its own square: (G^2)_kk."""
    a, products = lattice(16, 6), np.abs(lattice(17, 5))
    _, change = jax.jvp(lambda z: F.resolvent_diagonal(a, products, z=z), (1j,), (1 + 0j,))
    g = dense(a, products)
    assert_near(change, np.diag(g @ g), 1e-11)


@pytest.mark.parametrize(
    ("a", "products"),
    [((5,), (5,)), ((5,), (3,)), ((2, 5), (4,)), ((2, 5), (3, 4)), ((), ()), ((0,), (0,))],
)
def test_shapes_that_do_not_fit(a, products):
    with pytest.raises(ValueError, match=r"(?s)diagonal and couplings.*got"):
        F.resolvent_diagonal(jnp.zeros(a), jnp.zeros(products))


@pytest.mark.parametrize("z", [0, 1.0, -2, 1 + 0j])
def test_a_real_z(z):
    with pytest.raises(ValueError, match="real axis"):
        F.resolvent_diagonal(jnp.zeros(3), jnp.ones(2), z=z)


def test_an_unknown_method_lists_the_valid_ones():
    with pytest.raises(ValueError, match=r"(?s)(?=.*'tree')(?=.*auto)(?=.*scan)(?=.*associative)"):
        F.resolvent_diagonal(jnp.zeros(3), jnp.ones(2), method="tree")
