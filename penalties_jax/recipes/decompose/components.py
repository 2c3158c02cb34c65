"""Stochastic parameter decomposition: weight matrices as sums of rank-one components.

Each matrix W is written as the sum of C components v_j u_j^T; a small network gives each
component's causal importance for an input, and the model has to stay what it is when components are
scaled down, at random, as far as their importance allows. Bushnaq, Braun & Sharkey (2025),
"Stochastic parameter decomposition".
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

import penalties_jax as pj
from penalties_jax.recipes.decompose.targets import Target

HIDDEN = 16
LEAK = 0.01
FAITHFUL_STEPS, FAITHFUL_RATE = 200, 1e-2
ADVERSARY_STEPS, ADVERSARY_RATE = 20, 0.1


class Site(NamedTuple):
    """The components of one matrix, and the network of each that says how important it is.

    Attributes:
        v: The v_j as columns.
        u: The u_j as rows.
        gate_in: The weights from v_j . x to the hidden units of component j's network.
        gate_bias: The biases of those units.
        gate_out: The weights from them to the importance, before it is clipped.
        gate_offset: The bias of that.
    """

    v: Float[Array, "d_in C"]
    u: Float[Array, "C d_out"]
    gate_in: Float[Array, "C hidden"]
    gate_bias: Float[Array, "C hidden"]
    gate_out: Float[Array, "C hidden"]
    gate_offset: Float[Array, " C"]


Sites = dict[str, Site]


class Losses(NamedTuple):
    """What a decomposition is trained by, unweighted.

    Reconstruction is the distance of the output under random masks from the clean one.
    """

    faithfulness: Float[Array, ""]
    reconstruction: Float[Array, ""]
    importances: dict[str, Float[Array, "*positions C"]]


def start(key: Array, target: Target, components: int) -> Sites:
    """Return random components, then trained until they add up to the matrices."""
    sites = {}
    for i, (name, weight) in enumerate(sorted(target.weights.items())):
        d_in, d_out = weight.shape
        v_key, u_key, in_key, out_key = jax.random.split(jax.random.fold_in(key, i), 4)
        sites[name] = Site(
            v=jax.random.normal(v_key, (d_in, components)) / d_in**0.5,
            u=jax.random.normal(u_key, (components, d_out)) / components**0.5,
            gate_in=jax.random.normal(in_key, (components, HIDDEN)),
            gate_bias=jnp.zeros((components, HIDDEN)),
            gate_out=jax.random.normal(out_key, (components, HIDDEN)) / HIDDEN**0.5,
            gate_offset=jnp.full((components,), 0.5),
        )
    optimizer = optax.adamw(FAITHFUL_RATE)

    def step(_: Array, carry: Any) -> Any:
        sites, state = carry
        gradient = jax.grad(faithfulness)(sites, target)
        updates, state = optimizer.update(gradient, state, sites)
        return optax.apply_updates(sites, updates), state

    return jax.lax.fori_loop(0, FAITHFUL_STEPS, step, (sites, optimizer.init(sites)))[0]


def faithfulness(sites: Sites, target: Target) -> Float[Array, ""]:
    """Return the mean square of W - sum of v_j u_j^T over all entries of all matrices."""
    weights = target.weights
    missed = [weights[name] - site.v @ site.u for name, site in sites.items()]
    squares = jnp.stack([jnp.sum(jnp.square(x)) for x in missed])
    return jnp.sum(squares) / sum(x.size for x in missed)


def clean_run(target: Target, inputs: Array) -> tuple[Array, dict[str, Array]]:
    """Return the target's output, and what each of its matrices is applied to."""
    seen, weights = {}, target.weights

    def apply(name: str, x: Array) -> Array:
        seen[name] = x
        return x @ weights[name]

    return target.forward(apply, inputs), seen


def gates(sites: Sites, seen: dict[str, Array]) -> dict[str, Array]:
    """Return the importances of each site before they are clipped."""

    def gate(site: Site, x: Array) -> Array:
        # Components first: both products, and their gradients, are then batched over them.
        hidden = jnp.einsum("...c,ch->c...h", x @ site.v, site.gate_in)
        bias = jnp.expand_dims(site.gate_bias, range(1, x.ndim))
        raw = jnp.einsum("c...h,ch->...c", jax.nn.gelu(hidden + bias), site.gate_out)
        return raw + site.gate_offset

    return {name: gate(site, seen[name]) for name, site in sites.items()}


def masked_run(
    target: Target, sites: Sites, inputs: Array, masks: dict[str, Array], rest: dict[str, Array]
) -> Array:
    """Return the output with components scaled by their masks.

    Args:
        target: The network.
        sites: Its components.
        inputs: What it is run on.
        masks: Of the components, [*positions, C]; a site without masks is left as it is.
        rest: Of what the components of a site miss of its matrix, [*positions].
    """
    weights = target.weights

    def apply(name: str, x: Array) -> Array:
        if name not in masks:
            return x @ weights[name]
        site = sites[name]
        missed = x @ (weights[name] - site.v @ site.u)
        return ((x @ site.v) * masks[name]) @ site.u + rest[name][..., None] * missed

    return target.forward(apply, inputs)


def losses(key: Array, target: Target, sites: Sites, inputs: Array) -> Losses:
    """Return the losses on a batch: reconstruction on all sites at once, and one at a time."""
    clean, seen = clean_run(target, inputs)
    raw = gates(sites, seen)
    lower = {name: lower_leaky(x) for name, x in raw.items()}
    names = sorted(sites)
    distances = []
    for i, chosen in enumerate([names, *([name] for name in names)]):
        masks, rest = {}, {}
        for j, name in enumerate(chosen):
            mask_key, rest_key = jax.random.split(jax.random.fold_in(key, i * len(names) + j))
            g = lower[name]
            masks[name] = g + (1 - g) * jax.random.uniform(mask_key, g.shape)
            rest[name] = jax.random.uniform(rest_key, g.shape[:-1])
        distances.append(target.distance(masked_run(target, sites, inputs, masks, rest), clean))
    return Losses(
        faithfulness=faithfulness(sites, target),
        reconstruction=jnp.mean(jnp.stack(distances)),
        importances={name: upper_leaky(x) for name, x in raw.items()},
    )


class Scores(NamedTuple):
    """What a decomposition is judged by, on one batch; as in the `Result` of the job."""

    l0: Float[Array, ""]
    distance: Float[Array, ""]
    adversarial: Float[Array, ""]
    faithfulness: Float[Array, ""]


def score(key: Array, target: Target, sites: Sites, inputs: Array, *, threshold: float) -> Scores:
    """Judge a decomposition on a batch; a component is in use where its importance is higher."""
    clean, seen = clean_run(target, inputs)
    g = {name: jnp.clip(x, 0, 1) for name, x in gates(sites, seen).items()}
    nothing = {name: jnp.zeros(x.shape[:-1]) for name, x in g.items()}
    distance = target.distance(masked_run(target, sites, inputs, g, nothing), clean)

    def attacked(noise: Any) -> Array:
        masks = {name: g[name] + (1 - g[name]) * noise[0][name] for name in g}
        return target.distance(masked_run(target, sites, inputs, masks, noise[1]), clean)

    def ascend(_: Array, noise: Any) -> Any:
        slope = jax.grad(attacked)(noise)
        return jax.tree.map(
            lambda x, s: jnp.clip(x + ADVERSARY_RATE * jnp.sign(s), 0, 1), noise, slope
        )

    keys = dict(zip(sorted(g), jax.random.split(key, len(g)), strict=True))
    noise = ({name: jax.random.uniform(keys[name], x.shape) for name, x in g.items()}, nothing)
    noise = jax.lax.fori_loop(0, ADVERSARY_STEPS, ascend, noise)
    metrics = pj.importance_metrics(g, {}, thresholds=(threshold,))
    return Scores(
        l0=metrics[f"importance/ci_l0_{threshold:g}"] / len(g),
        distance=distance,
        adversarial=attacked(noise),
        faithfulness=faithfulness(sites, target),
    )


@jax.custom_vjp
def lower_leaky(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """clip(x, 0, 1) for masks; its gradient leaks below 0 where it would raise x."""
    return jnp.clip(x, 0, 1)


def _lower_leaky_backward(x: Array, cotangent: Array) -> tuple[Array]:
    inside = (x > 0) & (x < 1)
    leaking = (x <= 0) & (cotangent < 0)
    return (cotangent * jnp.where(inside, 1.0, jnp.where(leaking, LEAK, 0.0)),)


lower_leaky.defvjp(lambda x: (lower_leaky(x), x), _lower_leaky_backward)


def upper_leaky(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """clip(x, 0, 1) with slope 0.01 above 1: what the penalty sees."""
    return jnp.where(x > 1, 1 + LEAK * (x - 1), jnp.maximum(x, 0))


def recovery(target: Target, sites: Sites) -> Float[Array, ""]:
    """Return how well a toy model's features are found: the mean maximal cosine similarity.

    Feature i's part of the first matrix is its row i alone. Each is compared with every component,
    as matrices, and the best is taken.
    """
    weight, site = target.weights["encode"], sites["encode"]
    # The inner product of row i with component j is v_ij (w_i . u_j).
    inner = site.v * (weight @ site.u.T)
    lengths = jnp.linalg.norm(site.v, axis=0) * jnp.linalg.norm(site.u, axis=1)
    # A component that has shrunk to nothing is like no feature.
    lengths = jnp.where(lengths > 0, lengths, jnp.inf)
    cosine = jnp.abs(inner) / (jnp.linalg.norm(weight, axis=1)[:, None] * lengths)
    return jnp.mean(jnp.max(cosine, axis=1))
