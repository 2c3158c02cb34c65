"""Penalties of a router, which sends each token to some of the experts of a layer."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.tree_util import Partial
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Real

from penalties_jax.functional.checks import check_classes, check_same_shape, public
from penalties_jax.functional.divergences.logits import z_loss
from penalties_jax.functional.importance import ImportanceStats
from penalties_jax.functional.reduction import AxisName, Reduction, promote

__all__ = ["LoadStats", "load_balance", "router_z_loss"]


class _Itself(NamedTuple):
    """What is summed over positions as it is."""

    def elementwise(self, x):
        return x


class LoadStats(NamedTuple):
    r"""What `pj.load_balance` needs of a batch: sums over its tokens, and their number.

    Those of microbatches and of shards merge to those of all of their tokens, as
    `pj.ImportanceStats` do, whose sums they are; the losses of microbatches average to something
    else, since f of a few tokens is far from that of many. Exact are:

    - differentiating through a scan whose carry are the statistics, with a checkpointed step;
    - two passes: the first merges the statistics of all microbatches without gradients, the second
      adds up the gradients of `linear(LoadStats.from_batch(...))` of each with
      `linear = stats.linearized()`.

    Attributes:
        batch: The statistics of the probabilities and of the assignments.

    References:
        Qiu et al. (2025), Demons in the detail: on implementing load balancing loss for training
        specialized mixture-of-expert models.

    Examples:
        >>> probabilities = jnp.array([[0.75, 0.25], [0.5, 0.5]])
        >>> assigned = jnp.array([[1, 0], [0, 1]])
        >>> pairs = zip(probabilities, assigned)
        >>> first, second = (pj.LoadStats.from_batch(p, a) for p, a in pairs)
        >>> float(first.merge(second).loss()), float(first.loss() + second.loss()) / 2
        (1.0, 1.25)
    """

    batch: ImportanceStats

    @classmethod
    @public
    def from_batch(
        cls,
        probabilities: Real[ArrayLike, "*tokens E"],
        assigned: Real[ArrayLike, "*tokens E"] | Bool[ArrayLike, "*tokens E"],
        *,
        where: Bool[ArrayLike, "..."] | None = None,
    ) -> "LoadStats":
        """The statistics of one batch, of arguments as in `pj.load_balance`."""
        check_classes(probabilities=probabilities)
        check_same_shape(probabilities=probabilities, assigned=assigned)
        (load,) = promote(lax.stop_gradient(assigned))
        pair = probabilities, load
        return cls(ImportanceStats.from_batch(pair, _Itself(), where=where))

    @classmethod
    def empty(cls, probabilities: Array) -> "LoadStats":
        """The statistics of no tokens, as `pj.ImportanceStats.empty`, of an array like others."""
        return cls(ImportanceStats.empty((probabilities, probabilities)))

    def merge(self, other: "LoadStats") -> "LoadStats":
        """The statistics of the tokens of both."""
        return LoadStats(self.batch.merge(other.batch))

    def psum(self, axis_name: AxisName) -> "LoadStats":
        """The statistics of all members of mapped axes."""
        return LoadStats(self.batch.psum(axis_name))

    def loss(self) -> Float[Array, ""]:
        """The loss on all tokens that were merged."""
        return _loss(self)

    def linearized(self) -> Callable[["LoadStats"], Float[Array, ""]]:
        """What the second of two passes differentiates: gradients that add up to the loss's.

        Returns:
            A function, and pytree, of the statistics of a microbatch. Its value there is its share
            of the loss.
        """
        return Partial(_share, lax.stop_gradient(self))


@jax.jit
def _loss(stats):
    return _share(stats, stats)


def _share(whole, part):
    """The sum over experts of their load in a whole batch, times a part of the probabilities."""
    (probability, _), (_, load) = part.batch.sums, whole.batch.sums
    tokens = whole.batch.counts[0].positions(probability.dtype)
    return load.size * jnp.sum((probability / tokens) * (load / tokens))


@public
def load_balance(
    probabilities: Real[ArrayLike, "*tokens E"],
    assigned: Real[ArrayLike, "*tokens E"] | Bool[ArrayLike, "*tokens E"],
    *,
    where: Bool[ArrayLike, "..."] | None = None,
    axis_name: AxisName | None = None,
) -> Float[Array, ""]:
    r"""Switch Transformer's auxiliary loss: $E \sum_e f_e P_e$ of E experts.

    $f_e$ is the mean number of times that a token is sent to expert e, $P_e$ the mean of the
    router's probability of e, both over all tokens of the global batch. Where each token goes to k
    experts, the loss is k if all are used alike, and larger where what is likely is used more. The
    gradient flows through the probabilities only: with f as it is, those of experts in much use
    fall.

    Switch has k = 1. For k > 1 conventions differ: Mixtral's loss in transformers is this one;
    Megatron's is divided by k, as is `pj.load_balance(probabilities, assigned / k)`. The
    probabilities are those of the softmax over all experts, before the k largest are taken.

    Under `jax.jit` on sharded arrays the batch is the global one by itself; in `jax.shard_map` name
    the axes; over microbatches use `pj.LoadStats`. Layers have losses of their own: map over their
    axis by `jax.vmap`.

    Args:
        probabilities: The router's, experts last, of any number of axes of tokens.
        assigned: How often each token is sent to each expert, before tokens are dropped: a mask of
            the same shape, or numbers. Of ids [..., k] it is
            `jax.nn.one_hot(ids, experts).sum(-2)`.
        where: Mask of the tokens that count, which broadcasts to their shape.
        axis_name: Mapped axes that the batch is sharded over.

    Returns:
        A scalar; 0 without tokens.

    Raises:
        ValueError: If the shapes differ, or `where` does not fit.
        TypeError: If an input is not an array, or `where` is not boolean.

    References:
        Fedus, Zoph & Shazeer (2021), Switch Transformers: scaling to trillion parameter models
        with simple and efficient sparsity.

    Examples:
        >>> probabilities = jnp.array([[0.75, 0.25], [0.5, 0.5]])
        >>> float(pj.load_balance(probabilities, jnp.array([[1, 0], [1, 0]])))
        1.25
        >>> ids = jnp.array([[0], [1]])
        >>> float(pj.load_balance(probabilities, jax.nn.one_hot(ids, 2).sum(-2)))
        1.0
    """
    stats = LoadStats.from_batch(probabilities, assigned, where=where)
    return (stats if axis_name is None else stats.psum(axis_name)).loss()


@public
def router_z_loss(
    logits: Real[ArrayLike, "*positions C"],
    *,
    weights: ArrayLike = 1.0,
    reduction: Reduction = "mean",
    where: Bool[ArrayLike, "..."] | None = None,
    axis_name: AxisName | None = None,
    class_axis_name: AxisName | None = None,
) -> Float[Array, "..."]:
    r"""ST-MoE's penalty of a router's logits: the mean of $\log^2 \sum_e e^{z_e}$ over tokens.

    `pj.z_loss` of what a router has before its softmax; it holds logits near 0, where half
    precision rounds them less. ST-MoE's weight is 1e-3. Several layers add up.

    Args:
        logits: The z, experts last.
        weights, reduction, where, axis_name: As in `pj.kl_divergence`; so are result and errors.
        class_axis_name: Axes of `jax.shard_map` over which the experts are sharded.

    References:
        Zoph et al. (2022), ST-MoE: designing stable and transferable sparse expert models.

    Examples:
        >>> round(float(pj.router_z_loss(jnp.log(jnp.array([[1.0, 2.0]])))), 4)
        1.2069
    """
    return z_loss(
        logits,
        weights=weights,
        reduction=reduction,
        where=where,
        axis_name=axis_name,
        class_axis_name=class_axis_name,
    )
