"""Sums of formulas of what heads predict: hidden states times kernels, a block of rows at a time.

Blocks of rows are multiplied by the kernels, and their logits become values and, where a gradient
is wanted, gradients of hidden states and kernels right there: no product is computed twice. For
that the weight of each row has to be known in the forward pass, as it is for a sum or a mean. With
`reduction="none"` it comes with the cotangents, and the backward pass computes the logits anew.
"""

import functools
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.sharding import AxisType
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Real

from penalties_jax.functional.checks import (
    POSITIVE,
    check_classes,
    check_fits,
    check_labels,
    check_where,
    standard_promotion,
)
from penalties_jax.functional.divergences.blocks import map_rows, sum_rows
from penalties_jax.functional.divergences.formulas import Computed
from penalties_jax.functional.divergences.rows import (
    Options,
    Rows,
    Walk,
    Wanted,
    by_position,
    check_parameters,
    gradients_of,
    statistics_of,
    sum_to,
    times,
    with_axis,
)
from penalties_jax.functional.divergences.softcap import Softcap, slope, slope_of_cap
from penalties_jax.functional.platform import apart, by_platform
from penalties_jax.functional.reduction import lie_alike, vary_alike, wide


class Head(NamedTuple):
    """What logits are made of: hidden @ kernel + bias, within the softcap."""

    hidden: Real[ArrayLike, "*positions D"]
    kernel: Real[ArrayLike, "D C"]
    bias: Real[ArrayLike, " C"] | None
    softcap: ArrayLike | None = None


def capped_by(softcap: Softcap, *heads: Head) -> tuple[Head, ...]:
    """Heads with their softcaps: one for all, or a tuple of that of each.

    Raises:
        TypeError: If they are neither.
        ValueError: If one is not a number above 0.
    """
    caps: Any = (softcap,) * len(heads)
    if isinstance(softcap, tuple) and len(softcap) == len(heads) > 1:
        caps = softcap
    for cap in caps:
        if isinstance(cap, tuple | list | dict):
            words = "a number" if len(heads) == 1 else "a number or a pair of them"
            raise TypeError(f"softcap must be {words}, got {softcap!r}")
        if cap is not None:
            check_fits((), softcap=cap)
            POSITIVE.check(softcap=cap)
    return tuple(head._replace(softcap=cap) for head, cap in zip(heads, caps, strict=True))


class Part(NamedTuple):
    """A formula of the first heads, as many as it compares, its weight and its parameters."""

    formula: Computed
    weight: ArrayLike
    parameters: Mapping[str, ArrayLike]


class Inputs(NamedTuple):
    """What a sum is computed from; all but the labels may be differentiated.

    Attributes:
        heads: The heads.
        parameters: Of each part, by position.
        labels: The class of a cross entropy, or the tokens by which a teacher is known.
    """

    heads: tuple[Head, ...]
    parameters: tuple[tuple[Float[Array, "*positions n"], ...], ...]
    labels: Int[Array, "*positions k"] | None


def divergence_of_heads(
    formula: Computed,
    heads: Sequence[Head],
    options: Options,
    *,
    ids: Int[ArrayLike, "*positions k"] | None = None,
    **parameters: ArrayLike,
) -> Float[Array, "..."]:
    """A formula of what heads predict, reduced."""
    return sum_of_parts([Part(formula, 1.0, parameters)], heads, options, ids=ids)[0]


def sum_of_parts(
    parts: Sequence[Part],
    heads: Sequence[Head],
    options: Options,
    *,
    ids: Int[ArrayLike, "*positions k"] | None = None,
    **labels: Int[ArrayLike, "*positions"],
) -> tuple[Float[Array, "..."], list[Float[Array, "..."]]]:
    """The weighted sum of the parts, and the parts, each reduced.

    Args:
        parts: What is summed.
        heads: One or two.
        options: Of the function.
        ids: The tokens by which a teacher is known, which the caller has checked.
        **labels: The classes of a cross entropy, by the name that errors give them.

    Raises:
        TypeError: If an input is not an array, or labels are not integers.
        ValueError: If shapes don't fit each other, or a parameter or an option is bad.
    """
    _check_heads(heads)
    check_labels(jnp.shape(heads[0].hidden)[:-1], **labels)
    formulas, shares, parameters = zip(*parts, strict=True)
    for formula, numbers in zip(formulas, parameters, strict=True):
        check_parameters(formula, numbers)
    options.check()
    classes = next(iter(labels.values()), ids)
    return _evaluate(formulas, shares, parameters, tuple(heads), classes, **options._asdict())


def _check_heads(heads):
    """Errors name the arguments, with a suffix where there are two."""
    for head, suffix in zip(heads, ("_p", "_q") if len(heads) == 2 else ("",), strict=True):
        hidden, kernel, bias, _ = head
        arrays = {"hidden": hidden, "kernel": kernel, "bias": bias}
        names = [name + suffix for name in arrays]
        pairs = zip(names, arrays.values(), strict=True)
        check_classes(**{name: x for name, x in pairs if x is not None})
        if kernel.ndim != 2 or hidden.shape[-1] != kernel.shape[0]:
            raise ValueError(
                f"{names[1]} must be [{hidden.shape[-1]}, classes] for {names[0]} of shape "
                f"{hidden.shape}, got {kernel.shape}"
            )
        if bias is not None and bias.shape != kernel.shape[1:]:
            raise ValueError(f"{names[2]} must have shape {kernel.shape[1:]}, got {bias.shape}")
    first, last = heads[0], heads[-1]
    if first.hidden.shape[:-1] != last.hidden.shape[:-1]:
        raise ValueError(
            "hidden_p and hidden_q must have the same positions, got shapes "
            f"{first.hidden.shape} and {last.hidden.shape}"
        )
    if first.kernel.shape[1] != last.kernel.shape[1]:
        raise ValueError(
            "kernel_p and kernel_q must have the same classes, got shapes "
            f"{first.kernel.shape} and {last.kernel.shape}"
        )


@partial(
    jax.jit, static_argnames=("formulas", "block_size", "reduction", "axis_name", "class_axis_name")
)
def _evaluate(
    formulas,
    shares,
    parameters,
    heads,
    labels,
    *,
    where,
    block_size,
    reduction,
    axis_name,
    class_axis_name,
    weights,
):
    positions = heads[0].hidden.shape[:-1]
    check_where(where, positions)
    check_fits(positions, weights=weights)
    dtype = wide(*(head.hidden for head in heads))
    heads = tuple(
        jax.tree.map(_as_factor, head)._replace(
            softcap=jax.tree.map(lambda cap: jnp.asarray(cap, dtype), head.softcap)
        )
        for head in heads
    )
    numbers = tuple(
        by_position(formula, own, positions, dtype)
        for formula, own in zip(formulas, parameters, strict=True)
    )
    included = jnp.broadcast_to(True if where is None else where, positions)
    weights = jnp.broadcast_to(jnp.asarray(weights, dtype), positions)
    labels = with_axis(labels, positions)
    (hidden, numbers, labels), (shares, included, weights), shared = lie_alike(
        ([head.hidden for head in heads], numbers, labels),
        (shares, included, weights),
        [_of_all_rows(head) for head in heads],
        axis=-1,
    )
    heads = tuple(head._replace(hidden=h) for head, h in zip(shared, hidden, strict=True))
    if where is not None:
        entries = included[..., None]
        heads = tuple(head._replace(hidden=jnp.where(entries, head.hidden, 0)) for head in heads)
        numbers = jax.tree.map(lambda x: x if x.size == 1 else jnp.where(entries, x, 1), numbers)
    walk = Walk(block_size, class_axis_name)
    inputs = Inputs(heads, numbers, labels)
    each = jnp.where(included, weights, 0)
    if reduction == "none":
        values: Any = _values_by_position(formulas, walk, vary_alike(inputs))
        if class_axis_name is not None:
            values = lax.psum(values, class_axis_name)
        values = [each * jnp.where(included, v, 0) for v in values]
        return sum(w * v for w, v in zip(shares, values, strict=True)), values
    if reduction == "mean":
        count = jnp.sum(included, dtype=jnp.int32)
        count = count if axis_name is None else lax.psum(count, axis_name)
        each = each / jnp.maximum(count, 1)
    shares = tuple(jnp.asarray(w, dtype) for w in shares)
    result = _total(formulas, walk, *vary_alike((inputs, shares, each)))
    for name in (class_axis_name, axis_name):
        result = result if name is None else lax.psum(result, name)
    return result


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _values_by_position(
    formulas: tuple[Computed, ...], walk: Walk, inputs: Inputs
) -> list[Float[Array, "*positions"]]:
    """Each part's values, whose gradient computes the products again."""
    return _values(formulas, walk, inputs)


def _values_by_position_forward(formulas, walk, inputs):
    return _values(formulas, walk, inputs), inputs


@standard_promotion()
def _values_by_position_backward(formulas, walk, inputs, cotangents):
    everything = jax.tree.map(lambda _: True, inputs)
    weights = jnp.stack(cotangents, -1)
    _, gradients = _values_and_gradients(formulas, walk, everything, inputs, weights)
    return (_like(inputs, 1, gradients),)


_values_by_position.defvjp(_values_by_position_forward, _values_by_position_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _total(
    formulas: tuple[Computed, ...],
    walk: Walk,
    inputs: Inputs,
    shares: tuple[Float[Array, ""], ...],
    each: Float[Array, "*positions"],
) -> tuple[Float[Array, ""], list[Float[Array, ""]]]:
    """The sum by shares of the parts, and these, summed over positions by `each`.

    Only the former has a gradient.
    """
    return _weigh(_values(formulas, walk, inputs), shares, each)[:2]


def _weigh(values, shares, each):
    """The sum, its parts, and the derivative of the sum in `each`."""
    # What `each` excludes may be infinite.
    values = [jnp.where((each != 0) | jnp.isfinite(v), v, 0) for v in values]
    parts = [jnp.sum(each * v) for v in values]
    total, by_each = (
        functools.reduce(jnp.add, map(jnp.multiply, shares, x)) for x in (parts, values)
    )
    return total, parts, by_each


@standard_promotion()
def _total_forward(formulas, walk, inputs, shares, each):
    def value(tree):
        return jax.tree.map(lambda x: x.value, tree)

    perturbed = jax.tree.map(lambda x: x.perturbed, inputs)
    inputs, shares, each = value(inputs), value(shares), value(each)
    by = jnp.stack([w * each for w in shares], -1)
    values, gradients = _values_and_gradients(formulas, walk, perturbed, inputs, by)
    total, parts, by_each = _weigh(values, shares, each)
    # Empty arrays, for the types of the inputs without the inputs.
    empty = jax.tree.map(lambda x: jnp.zeros(0, x.dtype), inputs)
    return (total, parts), (empty, gradients, parts, by_each)


@standard_promotion()
def _total_backward(formulas, walk, residuals, cotangents):
    inputs, gradients, parts, by_each = residuals
    cotangent, _ = cotangents
    if isinstance(cotangent, SymbolicZero):
        return None, None, None
    by_inputs = _like(inputs, cotangent, gradients)
    return by_inputs, tuple(cotangent * part for part in parts), cotangent * by_each


_total.defvjp(_total_forward, _total_backward, symbolic_zeros=True)


def _like(inputs, factor, gradients):
    """Gradients of heads and parameters times a factor, of the types of the inputs."""
    heads, parameters = jax.tree.map(
        lambda x, g: None if g is None else (factor * g).astype(x.dtype),
        (inputs.heads, inputs.parameters),
        gradients,
    )
    return Inputs(heads, parameters, None)


def _values(formulas, walk, inputs):
    """Each part's values, [*positions]; with sharded classes, what this member adds to them."""
    wanted = _wanted(formulas, jax.tree.map(lambda _: False, inputs))

    def on(platform, inputs):
        rows, shared = _by_row(inputs)

        def block(rows, shared):
            return _parts(platform, formulas, walk, wanted, _of_rows(rows, shared))[1]

        return map_rows(block, rows, _block_size(platform, walk, inputs), shared)

    return by_platform(on, inputs)


def _values_and_gradients(formulas, walk, perturbed, inputs, weights):
    """The values, and the gradient of their sum by weights [*positions, parts], not yet rounded.

    The gradients of what is not perturbed are None.
    """
    of_both = partial(_values_and_gradients_on, formulas, walk, perturbed)
    return by_platform(of_both, inputs, weights)


def _values_and_gradients_on(formulas, walk, perturbed, platform, inputs, weights):
    rows, shared = _by_row(inputs)
    wanted = _wanted(formulas, perturbed)

    def block(rows_and_weights, fresh):
        rows, by = rows_and_weights
        own = _of_rows(rows, shared)
        logits, values, through_logits, through_parameters = _parts(
            platform, formulas, walk, wanted, own
        )

        def through(i, want):
            if not any(want):
                return jax.tree.map(lambda _: None, want)
            gradient = _weighted(by, through_logits, i)
            return _through(own.heads[i], logits[i], gradient, want, fresh)

        gradients = [through(i, want) for i, want in enumerate(perturbed.heads)]
        numbers = tuple(
            tuple(
                times(by[..., j], x) if want else None for x, want in zip(part, flags, strict=True)
            )
            for j, (part, flags) in enumerate(
                zip(through_parameters, perturbed.parameters, strict=True)
            )
        )
        kept = values, [head.hidden for head in gradients], numbers
        return kept, [_of_all_rows(head) for head in gradients]

    kept, sums = sum_rows(block, (rows, weights), _block_size(platform, walk, inputs))
    values, hidden, by_rows = kept
    heads = tuple(head._replace(hidden=h) for head, h in zip(sums, hidden, strict=True))
    parameters = jax.tree.map(
        lambda x, rows: None if rows is None else sum_to(x, rows), inputs.parameters, by_rows
    )
    return values, (heads, parameters)


def _by_row(inputs):
    """The inputs that belong to rows, and what all rows of a head share."""
    heads = tuple(head.hidden for head in inputs.heads)
    return inputs._replace(heads=heads), [_of_all_rows(head) for head in inputs.heads]


def _of_all_rows(head):
    return head._replace(hidden=None)


def _of_rows(rows, shared):
    """The inverse of `_by_row`, of a block of rows."""
    pairs = zip(shared, rows.heads, strict=True)
    return rows._replace(heads=tuple(head._replace(hidden=hidden) for head, hidden in pairs))


def _wanted(formulas, perturbed):
    """What each part's statistics are asked for."""
    heads = [any(head) for head in perturbed.heads]
    return [
        Wanted(tuple(heads[: len(formula.slopes)]), parameters)
        for formula, parameters in zip(formulas, perturbed.parameters, strict=True)
    ]


def _block_size(platform, walk, inputs):
    return walk.block_size or platform.rows_in_product(inputs.heads[0].kernel.shape[1])


def _parts(platform, formulas, walk, wanted, inputs):
    """Of the rows in a block the logits, and each part's value and its gradients.

    These are through the logits, after they are capped, and in the parameters.
    """
    # Of heads that are mapped over, each may have rows of its own where others share theirs.
    logits = tuple(jnp.broadcast_arrays(*(_logits(platform, head) for head in inputs.heads)))
    softcaps = tuple(
        None if head.softcap is None else jnp.expand_dims(head.softcap, range(logits[0].ndim))
        for head in inputs.heads
    )
    walk = walk._replace(block_size=None, platform=platform)
    values, through_logits, through_parameters = [], [], []
    for formula, want, parameters in zip(formulas, wanted, inputs.parameters, strict=True):
        n = len(formula.slopes)
        rows = Rows(logits[:n], parameters, inputs.labels, softcaps=softcaps[:n])
        value, statistics = statistics_of(formula, walk, want, rows)
        values.append(value)
        through_logits.append(
            gradients_of(formula, walk, rows, statistics) if any(want.logits) else []
        )
        through_parameters.append(statistics.parameters)
    return logits, values, through_logits, through_parameters


def _as_factor(x):
    """What is narrower than half precision in it, which holds the same numbers."""
    x = jnp.asarray(x)
    if x.dtype.itemsize == 1:
        return x.astype(jnp.bfloat16)
    return x if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(jnp.float32)


def _logits(platform, head):
    hidden, kernel, bias, _ = head
    dtype = (jnp.result_type if platform.halves else wide)(hidden, kernel)
    z = jnp.einsum("...d,dc->...c", hidden, kernel, preferred_element_type=dtype)
    return z if bias is None else z + bias


def _weighted(by, through_logits, i):
    """The gradient in the logits of head i, of the sum of parts by weights [*rows, parts]."""

    def weighted(weight, slope):
        # As of the value: what weighs nothing may be infinite.
        return jnp.where(weight != 0, weight * slope, 0)

    parts = ((by[..., j : j + 1], part) for j, part in enumerate(through_logits) if i < len(part))
    return functools.reduce(jnp.add, (weighted(weight, part[i]) for weight, part in parts))


def _through(head, logits, gradient, want, fresh):
    """The gradients of a head from that of its logits; None for what is not wanted."""
    hidden, kernel, bias, softcap = head
    by_hidden = by_kernel = by_bias = by_softcap = None
    if softcap is not None:
        z, softcap = logits.astype(gradient.dtype), apart(softcap)
        if want.softcap:
            by_softcap = jnp.sum(fresh[..., None] * gradient * slope_of_cap(z, softcap))
        gradient *= slope(z, softcap)
    dtype, accumulated = jnp.result_type(hidden, kernel), wide(hidden, kernel)
    scale = _scale(gradient, dtype)
    narrow = (gradient / scale).astype(dtype)
    if want.hidden:
        by_hidden = jnp.einsum(
            "...c,dc->...d",
            narrow,
            kernel,
            preferred_element_type=accumulated,
            out_sharding=_explicit_sharding(hidden),
        )
        by_hidden *= scale
    if want.kernel:
        most = jnp.max(scale, initial=jnp.finfo(scale.dtype).tiny)
        by_kernel = jnp.einsum(
            "...d,...c->dc",
            jnp.where(fresh[..., None], hidden * (scale / most).astype(hidden.dtype), 0),
            narrow,
            preferred_element_type=accumulated,
            out_sharding=_explicit_sharding(kernel),
        )
        by_kernel *= most
    if want.bias:
        by_bias = jnp.einsum(
            "...,...c->c",
            fresh.astype(gradient.dtype),
            gradient,
            out_sharding=_explicit_sharding(bias),
        )
    return head._replace(hidden=by_hidden, kernel=by_kernel, bias=by_bias, softcap=by_softcap)


def _scale(slope, dtype):
    """Powers of two [*rows, 1] that bring slopes into the range of a narrower dtype."""
    exact = jnp.finfo(slope.dtype)
    if jnp.finfo(dtype).minexp <= exact.minexp:
        return jnp.ones((1,) * slope.ndim, slope.dtype)
    largest = jnp.max(jnp.abs(lax.stop_gradient(slope)), -1, keepdims=True)
    return lax.reduce_precision(jnp.clip(largest, exact.tiny, 1 / exact.tiny), exact.nexp, 0)


def _explicit_sharding(x):
    """The sharding of an array on a mesh with Explicit axes: that of its gradient, too."""
    sharding = jax.typeof(x).sharding
    return sharding if AxisType.Explicit in sharding.mesh.axis_types else None
