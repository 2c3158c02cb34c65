"""Averages of what tokens have, by token and by sequence."""

from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec, reshard
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, Real

from penalties_jax.functional.checks import (
    AT_LEAST_ONE,
    POSITIVE,
    Range,
    check_labels,
    check_where,
    public,
)
from penalties_jax.functional.reduction import AxisName, lie_alike, promote

__all__ = ["aggregate"]

Tokens = Literal["mean", "sum"]
Sequences = Literal["mean", "sum", "tokens"]


@public
def aggregate(
    values: Real[ArrayLike, "batch time"],
    *,
    where: Bool[ArrayLike, "..."] | None = None,
    tokens: Tokens = "mean",
    sequences: Sequences = "mean",
    segment_ids: Int[ArrayLike, "batch time"] | None = None,
    num_segments: int | None = None,
    length: ArrayLike | None = None,
    normalizer: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> Float[Array, ""]:
    r"""The average of what tokens have, over the tokens of a sequence and over the sequences.

    $\frac{1}{N} \sum_s \frac{1}{n_s} \sum_{t \in s} x_t$ over the included tokens t of each
    sequence s, with $n_s$ their number, or 1 for tokens="sum", and N the number of sequences, or 1
    for sequences="sum". With sequences="tokens" all tokens of the batch count alike: every $n_s$ is
    1, and N is the number of tokens. A sequence without an included token does not count, and the
    average of none is 0.

    Args:
        values: What each token has: a loss, an estimate, an entropy. Half precision is summed up in
            float32.
        where: Mask of the tokens that count, which broadcasts to [batch, time]; None is all. What
            the others hold, NaN or inf, matters neither to the value nor to the gradient.
        tokens: "mean" or "sum" over the tokens of a sequence.
        sequences: "mean" or "sum" over the sequences, or "tokens"; the last has tokens="mean".
        segment_ids: Of packed rows, the sequence that each token belongs to: 1 to `num_segments`,
            counted anew in each row; tokens of 0 are padding. None if each row is one sequence.
        num_segments: The most sequences that a row has; with `segment_ids`, and only then.
        length: What stands for every $n_s$, above 0, such as the longest length that there may be.
        normalizer: What stands for N, above 0: a number of sequences, or of tokens with
            sequences="tokens". For microbatches it is that of all of them, and the results are
            added up; so are those of devices, or `axis_name` does it.
        axis_name: As in `pj.l1`: sums, and the N that is not given, are of the global batch.
            Sequences end with their row, and with what a device has of it.

    Returns:
        A scalar.

    Raises:
        ValueError: For an option that is not one of these; for a `length` that nothing is divided
            by (tokens="sum", or sequences="tokens"), or a `normalizer` (sequences="sum"); if one of
            `segment_ids` and `num_segments` is there without the other; if `values` is not
            [batch, time], a shape does not fit, or a plain number or id is out of its range. Ids of
            a `jax.Array` that are out of range count as padding.
        TypeError: If a mask is not boolean, or ids are not integers.

    What others call it, and the arguments for it. Sequences without a token count in TRL (in all
    but bnpo, dapo, cispo and vespo, which have none) and in MaxText's own trainer, so that N is
    there the number of rows, `normalizer=len(values)`, or of the sequences in packed ones. In verl
    and Tunix they don't, unless they are in a number that verl is given, `global_batch_size`.

    | library | its name | tokens | sequences | length | normalizer |
    | --- | --- | --- | --- | --- | --- |
    | TRL 1.16.0 | grpo, sapo | "mean" | "mean" | | rows |
    | | bnpo | "mean" | "tokens" | | |
    | | dr_grpo | "mean" | "mean" | `max_completion_length` | rows |
    | | dapo, cispo, vespo | "mean" | "tokens" | | tokens of the step |
    | | luspo | "sum" | "mean" | | rows |
    | verl 0.9.1 | token-mean | "mean" | "tokens" | | `batch_num_tokens` |
    | | token-sum | "sum" | "sum" | | |
    | | seq-mean-token-sum | "sum" | "mean" | | `global_batch_size` |
    | | seq-mean-token-sum-norm | "mean" | "mean" | `loss_scale_factor`, else T | the same |
    | | seq-mean-token-mean | "mean" | "mean" | | the same |
    | Tunix 0.1.7 | token-mean | "mean" | "tokens" | | |
    | | sequence-mean-token-mean | "mean" | "mean" | | |
    | | sequence-mean-token-scale | "mean" | "mean" | `norm`, else T | |
    | | seq-mean-token-sum | "sum" | "mean" | | |
    | | sequence-mean-token-sum-norm | "sum" | "mean" | | `norm` |
    | MaxText 0.2.5 | token-mean | "mean" | "tokens" | | |
    | | sequence-mean-token-mean | "mean" | "mean" | | |
    | | experimental GRPO | "mean" | "mean" | | rows |

    T is the number of positions. verl divides by $n_s + 10^{-8}$. MaxText's first two go to Tunix;
    its third, sequence-mean, Tunix 0.1.7 refuses.

    References:
        Liu et al. (2025), Understanding R1-Zero-like training (Dr. GRPO); Yu et al. (2025), DAPO.

    Examples:
        >>> losses = jnp.array([[1.0, 3.0, 9.0], [4.0, 9.0, 9.0]])
        >>> mask = jnp.array([[True, True, False], [True, False, False]])
        >>> float(pj.aggregate(losses, where=mask))
        3.0
        >>> round(float(pj.aggregate(losses, where=mask, sequences="tokens")), 4)
        2.6667
        >>> packed = jnp.array([[1, 1, 2], [1, 0, 0]])
        >>> float(pj.aggregate(losses, segment_ids=packed, num_segments=2))
        5.0
    """
    check_divisors(tokens, sequences, length=length, normalizer=normalizer)
    shape = jnp.shape(values)
    if len(shape) != 2:
        raise ValueError(f"values must be of shape [batch, time], got {shape}")
    check_where(where, shape)
    if (segment_ids is None) != (num_segments is None):
        raise ValueError(
            "segment_ids and num_segments, the most sequences of a row, need each other; got "
            f"segment_ids={segment_ids!r} and num_segments={num_segments!r}"
        )
    if num_segments is not None:
        AT_LEAST_ONE.check(num_segments=num_segments)
        check_labels(shape, segment_ids=segment_ids)
        _check_ids(segment_ids, where, num_segments)
    return _aggregate(
        values,
        where,
        segment_ids,
        length,
        normalizer,
        tokens=tokens,
        sequences=sequences,
        num_segments=num_segments,
        axis_name=axis_name,
    )


def check_divisors(tokens: Tokens, sequences: Sequences, *, length: Any, normalizer: Any) -> None:
    """Raises ValueError for a divisor that is no number above 0, or that nothing is divided by."""
    if sequences == "tokens" and tokens != "mean":
        raise ValueError(f'sequences="tokens" needs tokens="mean", got {tokens!r}')
    if length is not None and (tokens == "sum" or sequences == "tokens"):
        raise ValueError(
            'length stands for the number of tokens in tokens="mean" of sequences="mean" or "sum", '
            f"got tokens={tokens!r} and sequences={sequences!r}"
        )
    if normalizer is not None and sequences == "sum":
        raise ValueError('normalizer needs sequences="mean" or "tokens", got "sum"')
    for name, divisor in {"length": length, "normalizer": normalizer}.items():
        if divisor is not None:
            POSITIVE.check(**{name: divisor})
            if jnp.ndim(divisor):
                raise ValueError(f"{name} must be one number, got shape {jnp.shape(divisor)}")


def _check_ids(segment_ids, where, num_segments):
    """Those that are included, where they can be read."""
    if isinstance(segment_ids, np.ndarray) and not isinstance(where, jax.Array):
        ids = segment_ids if where is None else np.where(where, segment_ids, 0)
        valid = Range(f"in [0, {num_segments}]", lambda x: (x >= 0) & (x <= num_segments))
        valid.check(segment_ids=ids)


@partial(jax.jit, static_argnames=("tokens", "sequences", "num_segments", "axis_name"))
def _aggregate(
    values, where, segment_ids, length, normalizer, *, tokens, sequences, num_segments, axis_name
):
    divisors = {"length": length, "normalizer": normalizer}
    given = [name for name, divisor in divisors.items() if divisor is not None]
    values, *numbers = promote(values, *map(divisors.get, given))
    divisors |= zip(given, numbers, strict=True)
    included = jnp.broadcast_to(True if where is None else where, values.shape)
    (values, included, segment_ids), _, _ = lie_alike((values, included, segment_ids))
    if segment_ids is not None:
        included = included & (segment_ids >= 1) & (segment_ids <= num_segments)
    own, there = _lengths(included, segment_ids, num_segments)

    values = jnp.where(included, values, 0)
    if sequences == "tokens":
        there = included
    elif length is not None:
        values = values / divisors["length"]
    elif tokens == "mean":
        values, own = lie_alike((values, own))[0]
        values = values / jnp.maximum(own, 1).astype(values.dtype)

    total, number = jnp.sum(values), jnp.sum(there, dtype=jnp.int32)
    if axis_name is not None:
        total, number = lax.psum((total, number), axis_name)
    if sequences == "sum":
        return total
    divisor = number.astype(total.dtype) if normalizer is None else divisors["normalizer"]
    return total / jnp.where(number > 0, divisor, 1)


def _lengths(included, segment_ids, num_segments):
    """The included tokens of each token's sequence, and which sequences have any.

    Tokens are divided by the length of their sequence before they are added up, so that what is
    summed by sequence is their numbers, which have no gradient and are the same in every order. An
    indexed sum of [batch, time] to [batch, num_segments] does it with nothing as large as their
    product, which comparing each token with each sequence would compute, if not keep.
    """
    if segment_ids is None:
        own = jnp.sum(included, 1, keepdims=True, dtype=jnp.int32)
        return own, own > 0
    ids = jnp.where(included, segment_ids, 0)
    # Whole along the row, because every sequence meets every token of it.
    included, ids = map(_with_whole_rows, (included, ids))
    of_row = partial(jax.ops.segment_sum, num_segments=num_segments + 1)
    lengths = jax.vmap(of_row)(included.astype(jnp.int32), ids)
    return jnp.take_along_axis(lengths, ids, 1), lengths > 0


def _with_whole_rows(x):
    """On a mesh with Explicit axes; XLA sees to others."""
    sharding = jax.typeof(x).sharding
    batch, time = sharding.spec
    if time is None:
        return x
    return reshard(x, NamedSharding(sharding.mesh, PartitionSpec(batch, None)))
