"""Divergences from the last hidden states: the logits are never held all at once.

Blocks of rows are multiplied by the kernels, and their logits become values and, where a gradient
is wanted, gradients of hidden states and kernels right there: no product is computed twice. For
that the weight of each row has to be known in the forward pass, as it is for a sum or a mean. With
`reduction="none"` it comes with the cotangents, and the backward pass computes the logits anew.
"""

import functools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.sharding import AxisType
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from penalties_jax.functional import streaming
from penalties_jax.functional.blocks import map_rows, sum_rows, vary_alike
from penalties_jax.functional.divergences import DIRECTIONS, Direction
from penalties_jax.functional.gates import check_unit
from penalties_jax.functional.reduction import (
    AxisName,
    Reduction,
    check_broadcast,
    check_choice,
    check_where,
)
from penalties_jax.functional.streaming import (
    JS,
    KL,
    Formula,
    Options,
    Wanted,
    arrays_of_classes,
    by_position,
    gradients_of,
    log_probabilities_of,
    normaliser_of,
    probabilities_of,
    rows_in_block,
    sum_to,
)

# A block has so many bytes of each head's logits, but at least so many rows: a product has to be
# worth its reading of the kernel, and its adding to the kernel's gradient.
BLOCK_BYTES = {"cpu": 2**26, "gpu": 2**28}
BLOCK_ROWS = 240


class Head(NamedTuple):
    """What logits are made of: hidden @ kernel + bias."""

    hidden: Float[Array, "*positions D"]
    kernel: Float[Array, "D C"]
    bias: Float[Array, " C"] | None


class DistillationLoss(NamedTuple):
    r"""What `linear_distillation` returns: only the total has a gradient.

    Each is of shape [], or has that of the positions with reduction="none".

    Attributes:
        total: $w_{\mathrm{ce}}\,\mathrm{CE} + w_{\mathrm{kl}}\,\mathrm{KL}$.
        cross_entropy: The CE, unweighted, for the log.
        kl: The KL, likewise.

    It raises nothing itself.

    References:
        Hinton, Vinyals & Dean (2015), Distilling the knowledge in a neural network.

    Examples:
        >>> import jax.numpy as jnp
        >>> import penalties_jax as pj
        >>> hidden, kernel = jnp.ones((1, 1)), jnp.zeros((1, 2))
        >>> loss = pj.linear_distillation(hidden, kernel, hidden, kernel, jnp.array([0]))
        >>> float(loss.kl), round(float(loss.cross_entropy), 4)
        (0.0, 0.6931)
    """

    total: Float[Array, "..."]
    cross_entropy: Float[Array, "..."]
    kl: Float[Array, "..."]


def linear_kl(
    hidden_p: Float[Array, "*positions D"],
    kernel_p: Float[Array, "D C"],
    hidden_q: Float[Array, "*positions E"],
    kernel_q: Float[Array, "E C"],
    *,
    bias_p: Float[Array, " C"] | None = None,
    bias_q: Float[Array, " C"] | None = None,
    direction: Direction = "forward",
    temperature: ArrayLike = 1.0,
    block_size: int | None = None,
    reduction: Reduction = "mean",
    where: Bool[Array, "*positions"] | None = None,
    axis_name: AxisName | None = None,
    class_axis_name: AxisName | None = None,
) -> Float[Array, "..."]:
    r"""The Kullback-Leibler divergence from hidden states, in nats, without all the logits.

    `pj.kl_from_logits` of $h_p W_p + b_p$ and $h_q W_q + b_q$, whose logits exist a block of rows
    at a time. In value and gradient together each product is computed once; beside the gradients
    themselves, of which the kernel's is accumulated in float32, a few blocks are in memory.

    Half-precision factors are multiplied as they are, and accumulated in float32. Differentiable
    once, in reverse mode. In a loop over microbatches take gradients inside of the loop:
    differentiating through it stores a kernel's gradient for each step. Means of microbatches that
    are masked unevenly don't average to the mean: use reduction="sum" there, and divide by the
    number of included positions of the whole batch. Under `jit` on sharded rows the kernel's
    gradient is summed over devices once a block; in `shard_map` once in all.

    Args:
        hidden_p: The last hidden states. By convention the model's.
        kernel_p: The output kernel, classes last.
        hidden_q: Those of the reference, at the same positions.
        kernel_q: Its kernel, for the same classes.
        bias_p: Added to the model's logits.
        bias_q: Added to the reference's.
        direction: "forward" is KL(P||Q), "reverse" KL(Q||P), "symmetric" the mean of the two.
        temperature: The $T$ by which logits are divided, above 0: for all, or one for each
            position.
        block_size: Rows that are processed at once, for each device that JAX sees; if None, 64 MiB
            of each head's logits on a CPU and 256 MiB on a GPU, but at least 240 rows.
        reduction: "mean" or "sum" over the positions, or "none", which computes the products again
            in the backward pass.
        where: Mask of positions, which broadcasts to their shape.
        axis_name: Mapped axes over whose members to sum or average.
        class_axis_name: Axes of `jax.shard_map` over which the classes, of kernels and biases, are
            sharded.

    Returns:
        A scalar, or an array of the shape of the positions for "none".

    Raises:
        TypeError: If an input is not an array.
        ValueError: If shapes don't fit each other, `block_size` is below 1, the temperature is a
            number not above 0, or an option is unknown.

    References:
        Hsu et al. (2024), Liger Kernel: efficient Triton kernels for LLM training.

    Examples:
        >>> import jax.numpy as jnp
        >>> import penalties_jax as pj
        >>> kernel = jnp.array([[0.0, 1.0]])
        >>> round(float(pj.linear_kl(jnp.ones((3, 1)), kernel, jnp.zeros((3, 1)), kernel)), 4)
        0.1109
    """
    check_choice("direction", direction, DIRECTIONS)
    heads = _heads(p=(hidden_p, kernel_p, bias_p), q=(hidden_q, kernel_q, bias_q))
    options = Options(block_size, reduction, where, axis_name, class_axis_name)
    return _reduced((KL[direction],), heads, None, (temperature,), (1.0,), options)[0]


def linear_js(
    hidden_p: Float[Array, "*positions D"],
    kernel_p: Float[Array, "D C"],
    hidden_q: Float[Array, "*positions E"],
    kernel_q: Float[Array, "E C"],
    *,
    bias_p: Float[Array, " C"] | None = None,
    bias_q: Float[Array, " C"] | None = None,
    mixture: ArrayLike = 0.5,
    temperature: ArrayLike = 1.0,
    block_size: int | None = None,
    reduction: Reduction = "mean",
    where: Bool[Array, "*positions"] | None = None,
    axis_name: AxisName | None = None,
    class_axis_name: AxisName | None = None,
) -> Float[Array, "..."]:
    r"""The generalised Jensen-Shannon divergence from hidden states, in nats.

    `pj.js_from_logits` of $h_p W_p + b_p$ and $h_q W_q + b_q$; streamed, and differentiable, as
    `pj.linear_kl`.

    Args:
        hidden_p: The last hidden states of one model.
        kernel_p: Its output kernel, classes last.
        hidden_q: Those of the other, at the same positions.
        kernel_q: Its kernel, for the same classes.
        bias_p: Added to the logits of the first.
        bias_q: Added to those of the other.
        mixture: The $b$ of $M = b P + (1 - b) Q$, in [0, 1].
        temperature: The $T$ by which logits are divided, above 0.
        block_size: Rows that are processed at once, for each device that JAX sees; if None, 64 MiB
            of each head's logits on a CPU and 256 MiB on a GPU, but at least 240 rows.
        reduction: "mean" or "sum" over the positions, or "none".
        where: Mask of positions, which broadcasts to their shape.
        axis_name: Mapped axes over whose members to sum or average.
        class_axis_name: Axes of `jax.shard_map` over which the classes, of kernels and biases, are
            sharded.

    Returns:
        A scalar, or an array of the shape of the positions for "none".

    Raises:
        ValueError: As `pj.linear_kl`.

    References:
        Lin (1991), Divergence measures based on the Shannon entropy.

    Examples:
        >>> import jax.numpy as jnp
        >>> import penalties_jax as pj
        >>> kernel = jnp.array([[0.0, 200.0]])
        >>> round(float(pj.linear_js(jnp.ones((3, 1)), kernel, -jnp.ones((3, 1)), kernel)), 4)
        0.6931
    """
    heads = _heads(p=(hidden_p, kernel_p, bias_p), q=(hidden_q, kernel_q, bias_q))
    options = Options(block_size, reduction, where, axis_name, class_axis_name)
    check_unit("mixture", mixture)
    return _reduced((JS,), heads, None, (temperature, mixture), (1.0,), options)[0]


def linear_cross_entropy(
    hidden: Float[Array, "*positions D"],
    kernel: Float[Array, "D C"],
    labels: Int[Array, "*positions"],
    *,
    bias: Float[Array, " C"] | None = None,
    block_size: int | None = None,
    reduction: Reduction = "mean",
    where: Bool[Array, "*positions"] | None = None,
    axis_name: AxisName | None = None,
    class_axis_name: AxisName | None = None,
) -> Float[Array, "..."]:
    r"""The cross entropy of labels from hidden states, in nats, without all the logits.

    $-\log\mathrm{softmax}(h W + b)_y$; streamed, and differentiable, as `pj.linear_kl`. The
    derivative is softmax - onehot(y) through the logits.

    Args:
        hidden: The last hidden states.
        kernel: The output kernel, classes last.
        labels: The classes y. One outside of [0, C) has loss 0, but counts in a mean: exclude
            padding by `where=labels >= 0`.
        bias: Added to the logits.
        block_size: Rows that are processed at once, for each device that JAX sees; if None, 64 MiB
            of each head's logits on a CPU and 256 MiB on a GPU, but at least 240 rows.
        reduction: "mean" or "sum" over the positions, or "none".
        where: Mask of positions, which broadcasts to their shape.
        axis_name: Mapped axes over whose members to sum or average.
        class_axis_name: Axes of `jax.shard_map` over which the classes, of kernel and bias, are
            sharded; labels count over all of them.

    Returns:
        A scalar, or an array of the shape of the positions for "none".

    Raises:
        TypeError: If labels are not integers.
        ValueError: As `pj.linear_kl`.

    References:
        Wijmans et al. (2024), Cut your losses in large-vocabulary language models.

    Examples:
        >>> import jax.numpy as jnp
        >>> import penalties_jax as pj
        >>> kernel = jnp.array([[0.0, 1.0]])
        >>> round(float(pj.linear_cross_entropy(jnp.ones((1, 1)), kernel, jnp.array([1]))), 4)
        0.3133
    """
    heads = _heads(**{"": (hidden, kernel, bias)})
    _check_labels(labels, hidden)
    options = Options(block_size, reduction, where, axis_name, class_axis_name)
    return _reduced((_cross_entropy,), heads, labels, (), (1.0,), options)[0]


def linear_distillation(
    hidden_p: Float[Array, "*positions D"],
    kernel_p: Float[Array, "D C"],
    hidden_q: Float[Array, "*positions E"],
    kernel_q: Float[Array, "E C"],
    labels: Int[Array, "*positions"],
    *,
    kl_weight: ArrayLike = 1.0,
    cross_entropy_weight: ArrayLike = 1.0,
    bias_p: Float[Array, " C"] | None = None,
    bias_q: Float[Array, " C"] | None = None,
    direction: Direction = "forward",
    temperature: ArrayLike = 1.0,
    block_size: int | None = None,
    reduction: Reduction = "mean",
    where: Bool[Array, "*positions"] | None = None,
    axis_name: AxisName | None = None,
    class_axis_name: AxisName | None = None,
) -> DistillationLoss:
    r"""Cross entropy and divergence from a reference, in one pass over the model's logits.

    $w_{\mathrm{ce}}\,\mathrm{CE}(P, y) + w_{\mathrm{kl}}\,\mathrm{KL}(P \| Q)$, the sum of
    `pj.linear_cross_entropy` and `pj.linear_kl` by their weights: the model's products are computed
    once for both. Only the total has a gradient: that of its parts, which are for the log, is 0.

    The temperature is that of the divergence alone; multiply `kl_weight` by $T^2$ for gradients
    that don't depend on it. Hinton's distillation is KL(Q||P), direction="reverse".

    Args:
        hidden_p: The last hidden states of the model.
        kernel_p: Its output kernel, classes last.
        hidden_q: The last hidden states of the reference, at the same positions.
        kernel_q: Its kernel, for the same classes.
        labels: The classes y, as for `pj.linear_cross_entropy`.
        kl_weight: The weight of the divergence; for reduction="none" also one for each position.
        cross_entropy_weight: The weight of the cross entropy, likewise.
        bias_p: Added to the model's logits.
        bias_q: Added to the reference's.
        direction: "forward" is KL(P||Q), "reverse" KL(Q||P), "symmetric" the mean of the two.
        temperature: The $T$ of the divergence, above 0.
        block_size: Rows that are processed at once, for each device that JAX sees; if None, 64 MiB
            of each head's logits on a CPU and 256 MiB on a GPU, but at least 240 rows.
        reduction: "mean" or "sum" over the positions, or "none".
        where: Mask of positions, which broadcasts to their shape.
        axis_name: Mapped axes over whose members to sum or average.
        class_axis_name: Axes of `jax.shard_map` over which the classes, of kernels and biases, are
            sharded.

    Returns:
        A `DistillationLoss(total, cross_entropy, kl)`. Only the total has a gradient.

    Raises:
        TypeError: If labels are not integers.
        ValueError: As `pj.linear_kl`.

    References:
        Hinton, Vinyals & Dean (2015), Distilling the knowledge in a neural network.

    Examples:
        >>> import jax.numpy as jnp
        >>> import penalties_jax as pj
        >>> hidden, kernel = jnp.ones((1, 1)), jnp.array([[0.0, 1.0]])
        >>> loss = pj.linear_distillation(hidden, kernel, 0 * hidden, kernel, jnp.array([1]))
        >>> round(float(loss.total), 4)
        0.4242
    """
    check_choice("direction", direction, DIRECTIONS)
    heads = _heads(p=(hidden_p, kernel_p, bias_p), q=(hidden_q, kernel_q, bias_q))
    _check_labels(labels, hidden_p)
    shape = jnp.shape(labels) if reduction == "none" else ()
    check_broadcast("kl_weight", kl_weight, shape)
    check_broadcast("cross_entropy_weight", cross_entropy_weight, shape)
    options = Options(block_size, reduction, where, axis_name, class_axis_name)
    total, (cross_entropy, kl) = _reduced(
        (_cross_entropy, KL[direction]),
        heads,
        labels,
        (temperature,),
        (cross_entropy_weight, kl_weight),
        options,
    )
    return DistillationLoss(total, lax.stop_gradient(cross_entropy), lax.stop_gradient(kl))


def _heads(**parts):
    """The heads, by the suffixes of their arguments."""
    heads = []
    for name, values in parts.items():
        names = [f"{part}_{name}" if name else part for part in Head._fields]
        given = {n: x for n, x in zip(names, values, strict=True) if x is not None}
        head = Head(*arrays_of_classes(**given), *([] if values[2] is not None else [None]))
        hidden, kernel, bias = head
        if kernel.ndim != 2 or hidden.shape[-1] != kernel.shape[0]:
            raise ValueError(
                f"{names[1]} must be [{hidden.shape[-1]}, classes] for {names[0]} of shape "
                f"{hidden.shape}, got {kernel.shape}"
            )
        if bias is not None and bias.shape != kernel.shape[1:]:
            raise ValueError(f"{names[2]} must have shape {kernel.shape[1:]}, got {bias.shape}")
        heads.append(head)
    for head in heads[1:]:
        if head.hidden.shape[:-1] != heads[0].hidden.shape[:-1]:
            raise ValueError(
                "hidden_p and hidden_q must have the same positions, got shapes "
                f"{heads[0].hidden.shape} and {head.hidden.shape}"
            )
        if head.kernel.shape[1] != heads[0].kernel.shape[1]:
            raise ValueError(
                "kernel_p and kernel_q must have the same classes, got shapes "
                f"{heads[0].kernel.shape} and {head.kernel.shape}"
            )
    return tuple(heads)


def _check_labels(labels, hidden):
    if not jnp.issubdtype(jnp.result_type(labels), jnp.integer):
        raise TypeError(f"labels must be integers, got {jnp.result_type(labels)}")
    if jnp.shape(labels) != jnp.shape(hidden)[:-1]:
        raise ValueError(
            f"labels must have shape {jnp.shape(hidden)[:-1]}, that of the positions, got "
            f"{jnp.shape(labels)}"
        )


class Static(NamedTuple):
    """What changes the program; the parts of a loss are `Formula`s, or `_cross_entropy`."""

    parts: tuple[Formula | Callable[..., Any], ...]
    block_size: int
    class_axis_name: AxisName | None


class Inputs(NamedTuple):
    """What a loss is computed from; all but the labels may be differentiated."""

    heads: tuple[Head, ...]
    parameters: tuple[Float[Array, "*positions 1"], ...]
    labels: Int[Array, "*positions"] | None


def _reduced(parts, heads, labels, parameters, weights, options):
    options.check(*parameters[:1])
    return _evaluate(parts, heads, labels, parameters, weights, **options._asdict())


@partial(
    jax.jit, static_argnames=("parts", "block_size", "reduction", "axis_name", "class_axis_name")
)
def _evaluate(
    parts,
    heads,
    labels,
    parameters,
    weights,
    *,
    where,
    block_size,
    reduction,
    axis_name,
    class_axis_name,
):
    """The weighted sum of the parts, and the parts."""
    positions = heads[0].hidden.shape[:-1]
    check_where(where, positions)
    dtype = jnp.result_type(jnp.float32, *(head.hidden for head in heads))
    parameters = by_position(parameters, positions, dtype)
    included = jnp.ones(positions, bool)
    if where is not None:
        included = jnp.broadcast_to(where, positions)
        entries = included[..., None]
        heads = tuple(head._replace(hidden=jnp.where(entries, head.hidden, 0)) for head in heads)
        parameters = tuple(x if x.size == 1 else jnp.where(entries, x, 1) for x in parameters)
    rows = block_size or max(BLOCK_ROWS, rows_in_block(heads[0].kernel.shape[1], BLOCK_BYTES))
    static = Static(parts, rows, class_axis_name)
    inputs = Inputs(heads, parameters, labels)
    if reduction == "none":
        values: Any = _rows(static, vary_alike(inputs))
        if class_axis_name is not None:
            values = lax.psum(values, class_axis_name)
        values = [jnp.where(included, v, 0) for v in values]
        return sum(w * v for w, v in zip(weights, values, strict=True)), values
    each = included.astype(dtype)
    if reduction == "mean":
        count = jnp.sum(included, dtype=jnp.int32)
        count = count if axis_name is None else lax.psum(count, axis_name)
        each = each / jnp.maximum(count, 1)
    weights = tuple(jnp.asarray(w, dtype) for w in weights)
    result = _total(static, *vary_alike((inputs, weights, each)))
    for name in (class_axis_name, axis_name):
        result = result if name is None else lax.psum(result, name)
    return result


def _cross_entropy(z, labels, class_axis_name):
    """The cross entropy, or this member's part of it, and its gradient through the logits."""
    classes = every = z.shape[-1]
    own = labels
    if class_axis_name is not None:
        every *= lax.axis_size(class_axis_name)
        own = labels - lax.axis_index(class_axis_name) * classes

    def rows(z, own):
        normaliser = normaliser_of(z, 1.0, class_axis_name)
        log_probabilities = log_probabilities_of(z, 1.0, normaliser)
        return -jnp.sum(jnp.where(own == jnp.arange(classes), log_probabilities, 0), -1), normaliser

    value, normaliser = map_rows(rows, (z, own), rows_in_block(classes))
    slope = probabilities_of(z, 1.0, normaliser) - (own == jnp.arange(classes))
    return value, jnp.where((labels >= 0) & (labels < every), slope, 0)


def _block(static, wanted, heads, parameters, labels):
    """Each part's value of the rows in a block, and its gradients in logits and parameters."""
    logits = tuple(_logits(head) for head in heads)
    values, gradients, slopes = [], [], []
    for part in static.parts:
        if part is _cross_entropy:
            value, gradient = part(logits[0], labels, static.class_axis_name)
            by_logits = [gradient, *[jnp.zeros_like(z) for z in logits[1:]]]
            by_parameters = [jnp.zeros_like(value) for _ in parameters]
        else:
            rows = rows_in_block(logits[0].shape[-1])
            walk = streaming.Static(part, rows, static.class_axis_name)
            value, statistics = streaming.statistics_of(walk, wanted, logits, parameters)
            by_logits = gradients_of(part, logits, parameters, statistics)
            by_parameters = list(statistics.parameters)
        values.append(value)
        gradients.append(by_logits)
        slopes.append(by_parameters)
    return values, gradients, slopes


def _logits(head):
    hidden, kernel, bias = head
    z = jnp.einsum("...d,dc->...c", hidden, kernel, preferred_element_type=_wide(hidden, kernel))
    return z if bias is None else z + bias


def _wide(*arrays):
    return jnp.result_type(jnp.float32, *arrays)


def _as_rows(inputs):
    """The arrays that have positions, those that have none, and how to put blocks together."""
    heads, parameters, labels = inputs
    arrays = [head.hidden for head in heads] + list(parameters)
    arrays += [] if labels is None else [labels[..., None]]
    weights = [(head.kernel, head.bias) for head in heads]
    first, last = len(heads), len(heads) + len(parameters)

    def rebuild(blocks, weights):
        heads = tuple(Head(h, *own) for h, own in zip(blocks[:first], weights, strict=True))
        return heads, blocks[first:last], blocks[last] if blocks[last:] else None

    return arrays, weights, rebuild


def _values(static, inputs):
    """Each part's values, [*positions]; with sharded classes, what this member adds to them."""
    arrays, weights, rebuild = _as_rows(inputs)
    nothing = Wanted((False,) * len(inputs.heads), (False,) * len(inputs.parameters))

    def rows(*blocks):
        *blocks, weights = blocks
        return _block(static, nothing, *rebuild(blocks, weights))[0]

    return map_rows(rows, arrays, static.block_size, (weights,))


def _values_and_gradients(static, perturbed, inputs, weights):
    """The values, and the gradient of their sum by weights [*positions, parts].

    Where nothing is perturbed it is a scalar 0.
    """
    arrays, kernels, rebuild = _as_rows(inputs)
    wanted = Wanted(
        tuple(any(jax.tree.leaves(head)) for head in perturbed.heads), perturbed.parameters
    )

    def rows(*blocks, fresh):
        *blocks, by = blocks
        heads, parameters, labels = rebuild(blocks, kernels)
        values, through_logits, through_parameters = _block(
            static, wanted, heads, parameters, labels
        )
        slopes = [_weighted(by, parts) for parts in zip(*through_logits, strict=True)]
        gradients = list(map(_through, heads, slopes, perturbed.heads, [fresh] * len(heads)))
        by_parameters = [
            _weighted(by, [part[..., None] for part in parts])[..., 0] if want else None
            for parts, want in zip(
                zip(*through_parameters, strict=True), perturbed.parameters, strict=True
            )
        ]
        hidden = [head.hidden for head in gradients]
        return (values, hidden, by_parameters), [h._replace(hidden=None) for h in gradients]

    (values, hidden, by_rows), sums = sum_rows(rows, [*arrays, weights], static.block_size)
    heads = tuple(head._replace(hidden=h) for head, h in zip(sums, hidden, strict=True))
    parameters = tuple(
        None if each is None else sum_to(parameter, each)
        for parameter, each in zip(inputs.parameters, by_rows, strict=True)
    )
    return values, jax.tree.map(
        lambda x, own: jnp.zeros(()) if own is None else own.astype(x.dtype),
        (inputs.heads, inputs.parameters),
        (heads, parameters),
    )


def _weighted(weights: Array, parts: Sequence[Array]) -> Array:
    """The sum of parts [*rows, n] by weights [*rows, parts]."""
    weighted = (weights[..., i : i + 1] * part for i, part in enumerate(parts))
    return functools.reduce(jnp.add, weighted)


def _through(head, slope, want, fresh):
    """The gradients of a head from those of its logits; None for what is not wanted."""
    hidden, kernel, bias = head
    wide = _wide(hidden, kernel)
    narrow = slope.astype(jnp.result_type(hidden, kernel))
    by_hidden = by_kernel = by_bias = None
    if want.hidden:
        by_hidden = jnp.einsum(
            "...c,dc->...d",
            narrow,
            kernel,
            preferred_element_type=wide,
            out_sharding=_explicit_sharding(hidden),
        )
        by_hidden = by_hidden.astype(hidden.dtype)
    if want.kernel:
        first = jnp.where(fresh[..., None], hidden, 0)
        by_kernel = jnp.einsum(
            "...d,...c->dc",
            first,
            narrow,
            preferred_element_type=wide,
            out_sharding=_explicit_sharding(kernel),
        )
    if want.bias:
        by_bias = jnp.einsum(
            "...,...c->c",
            fresh.astype(slope.dtype),
            slope,
            out_sharding=_explicit_sharding(bias),
        )
    return head._replace(hidden=by_hidden, kernel=by_kernel, bias=by_bias)


def _explicit_sharding(x):
    """The sharding of an array on a mesh with Explicit axes: that of its gradient, too."""
    sharding = jax.typeof(x).sharding
    return sharding if AxisType.Explicit in sharding.mesh.axis_types else None


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rows(static: Static, inputs: Inputs) -> list[Float[Array, "*positions"]]:
    """Each part's values, whose gradient computes the products again."""
    return _values(static, inputs)


def _rows_forward(static, inputs):
    return _values(static, inputs), inputs


def _rows_backward(static, inputs, cotangents):
    everything = jax.tree.map(lambda _: True, inputs)
    weights = jnp.stack(cotangents, -1)
    _, (heads, parameters) = _values_and_gradients(static, everything, inputs, weights)
    return (Inputs(heads, parameters, None),)


_rows.defvjp(_rows_forward, _rows_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _total(
    static: Static,
    inputs: Inputs,
    weights: tuple[Float[Array, ""], ...],
    each: Float[Array, "*positions"],
) -> tuple[Float[Array, ""], list[Float[Array, ""]]]:
    """The parts, summed over positions by `each`, and their sum by weights.

    Only the latter has a gradient.
    """
    return _weigh(_values(static, inputs), weights, each)


def _weigh(values, weights, each):
    # What `each` excludes may be infinite.
    parts = [jnp.sum(jnp.where(each > 0, each * v, 0)) for v in values]
    return functools.reduce(jnp.add, map(jnp.multiply, weights, parts)), parts


def _total_forward(static, inputs, weights, each):
    def value(tree):
        return jax.tree.map(lambda x: x.value, tree)

    perturbed = jax.tree.map(lambda x: x.perturbed, inputs)
    inputs, weights, each = value(inputs), value(weights), value(each)
    by = jnp.stack([w * each for w in weights], -1)
    values, gradients = _values_and_gradients(static, perturbed, inputs, by)
    total, parts = _weigh(values, weights, each)
    return (total, parts), (gradients, parts)


def _total_backward(static, residuals, cotangents):
    (heads, parameters), parts = residuals
    cotangent, _ = cotangents
    if isinstance(cotangent, SymbolicZero):
        return None, None, None

    def scaled(gradient):
        return None if gradient.ndim == 0 else (cotangent * gradient).astype(gradient.dtype)

    heads, parameters = jax.tree.map(scaled, (heads, parameters))
    return Inputs(heads, parameters, None), tuple(cotangent * part for part in parts), None


_total.defvjp(_total_forward, _total_backward, symbolic_zeros=True)
