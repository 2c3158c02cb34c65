"""Experts computed for the rows they have, in both forms, against a loop over the rows."""

import contextlib
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from penalties_jax.nnx.experts import SPARE, _sizes, routed
from tests.oracles import assert_close, lattice
from tests.programs import as_for_an_accelerator, quick_jit

FORMS = {"CPU": contextlib.nullcontext, "accelerator": as_for_an_accelerator}
EXPERTS, D, HIDDEN, MEMBERS = 4, 3, 5, 3
LOADS = {
    "even": (6, 6, 6, 6),
    "uneven": (1, 3, 18, 2),
    "one alone": (0, 0, 24, 0),
    "the last alone": (0, 0, 0, 24),
    "no rows": (0, 0, 0, 0),
}
pytestmark = pytest.mark.usefixtures("x64")


def row_by_row(x, routes, up, down):
    """The same by gathering the weights of each row's experts."""
    hidden = jax.nn.gelu(jnp.einsum("...d,...kdh->...kh", x, up[routes]))
    return jnp.einsum("...kh,...khd->...kd", hidden, down[routes])


def arguments(loads, top_k=1):
    """Rows in an order that mixes their experts; further experts of a row are the ones after."""
    first = np.random.default_rng(0).permutation(np.repeat(np.arange(EXPERTS), loads))
    routes = (first[:, None] + np.arange(top_k)) % EXPERTS
    sizes = ((len(first), D), (EXPERTS, D, HIDDEN), (EXPERTS, HIDDEN, D))
    x, up, down = (jnp.asarray(lattice(seed, *size)) for seed, size in enumerate(sizes))
    return x, jnp.asarray(routes), up, down


def objective(function):
    return lambda x, up, down, routes: jnp.sum(jnp.sin(2 * function(x, routes, up, down)))


def assert_alike(actual, desired):
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(desired), strict=True):
        assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("loads", LOADS.values(), ids=LOADS)
def test_values_and_gradients_are_those_of_a_loop(loads, top_k, form):
    x, routes, up, down = arguments(loads, top_k)
    slopes = [jax.grad(objective(f), (0, 1, 2)) for f in (routed, row_by_row)]
    with form():
        y = quick_jit(lambda *a: routed(*a))(x, routes, up, down)
        gradients = quick_jit(slopes[0])(x, up, down, routes)
    assert_alike(y, row_by_row(x, routes, up, down))
    assert_alike(gradients, slopes[1](x, up, down, routes))


def hessian_vector(function):
    slopes = jax.grad(objective(function), (0, 1, 2))

    def product(x, up, down, routes):
        def moved(*weights):
            return slopes(*weights, routes)

        return jax.jvp(moved, (x, up, down), (jnp.cos(x), up + 1, down - 1))[1]

    return product


def slope_of_slopes(function):
    slopes = jax.grad(objective(function), (0, 1, 2))

    def norm(*weights):
        return sum(jnp.sum(slope**2) for slope in slopes(*weights))

    return jax.grad(norm, (0, 1, 2))


TRANSFORMED = {
    "vmap of grad": lambda f: jax.vmap(jax.grad(objective(f), (0, 1, 2))),
    "grad of vmap": lambda f: jax.grad(
        lambda *a: jnp.sum(jax.vmap(objective(f))(*a)), argnums=(0, 1, 2)
    ),
    "vmap of vmap": lambda f: jax.vmap(
        jax.vmap(objective(f), (0, None, None, 0)), (None, 0, 0, None)
    ),
    "forward over reverse": lambda f: jax.vmap(hessian_vector(f)),
    "reverse over reverse": lambda f: jax.vmap(slope_of_slopes(f)),
}


@pytest.mark.parametrize("transformed", TRANSFORMED.values(), ids=TRANSFORMED)
def test_members_with_other_loads(transformed):
    each = [arguments(loads) for loads in itertools.islice(LOADS.values(), MEMBERS)]
    x, routes, up, down = (jnp.stack(leaves) for leaves in zip(*each, strict=True))
    shift = jnp.arange(MEMBERS).reshape(-1, 1, 1, 1) / 7
    given = (x, up + shift, down - shift, routes)
    assert_alike(quick_jit(transformed(routed))(*given), quick_jit(transformed(row_by_row))(*given))


def test_members_share_their_branches():
    """Under vmap, a branch of each member's own would be all of them and a choice of results."""
    given = arguments(LOADS["even"])
    members = [jnp.stack([a] * MEMBERS) for a in given]
    alone, together = (
        str(jax.make_jaxpr(f)(*x)).count("branches=")
        for f, x in ((routed, given), (jax.vmap(routed), members))
    )
    assert together == alone > 0


@pytest.mark.parametrize("experts", [1, 2, 8, 64])
@pytest.mark.parametrize("count", [1, 24, 172, 1000])
def test_few_more_rows_are_computed_than_there_are(count, experts):
    sizes = np.array(_sizes(count, experts))
    assert sizes[0] == 0
    assert sizes[-1] == count
    rng = np.random.default_rng(0)
    for concentration in (100, 1, 0.1):
        shares = rng.dirichlet(np.full(experts, concentration), size=50)
        for loads in (rng.multinomial(count, share) for share in shares):
            computed = sizes[np.searchsorted(sizes, loads)].sum()
            assert computed <= (1 + 2 * SPARE) * count + experts


@pytest.mark.parametrize("experts", [4, 8, 64])
def test_of_even_loads_a_sixth_more_at_most(experts):
    """That of the blocks is in test_skipping.py, as XLA counts it."""
    excess = []
    for load in range(16, 48):
        sizes = np.array(_sizes(load * experts, experts))
        excess.append(sizes[np.searchsorted(sizes, load)] / load)
    assert np.max(excess) <= 1 + SPARE
    assert np.mean(excess) <= 1.1
