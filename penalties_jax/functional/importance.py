"""Importance minimality: how many components a decomposed network uses, and how often each."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.tree_util import Partial
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, PyTree, Real

from penalties_jax.functional.checks import (
    AT_LEAST_ONE,
    NONNEGATIVE,
    bare,
    check_fits,
    check_same_shape,
    check_where,
    public,
)
from penalties_jax.functional.reduction import AxisName, lie_alike, promote, spread, vary_alike

__all__ = ["ImportanceLoss", "ImportanceStats", "importance_metrics", "importance_minimality"]

# A config, which has `elementwise`, or a function from an array to the penalty of each value.
PerValue = Any

# The base of the two digits of a count: the lower digits of 2**15 devices can be added in int32.
BASE = 2**16


class ImportanceLoss(NamedTuple):
    r"""The importance minimality loss and what it is made of, all of shape [].

    Attributes:
        total: The sparsity plus $\beta$ times the frequency.
        sparsity: $\sum_j f_j$, the sum over components of their mean penalty; comparable between
            values of $\beta$.
        frequency: $\sum_j f_j \log_2(1 + S_j)$, with the penalty of a component summed in $S_j$.

    Examples:
        >>> loss = pj.importance_minimality(jnp.ones((3, 1)), pj.L1(), beta=0.5)
        >>> loss.total == loss.sparsity + 0.5 * loss.frequency
        Array(True, dtype=bool)
    """

    total: Float[Array, ""]
    sparsity: Float[Array, ""]
    frequency: Float[Array, ""]


class Count(NamedTuple):
    """A number of positions, `high * 2**16 + low`, exact beyond what a float32 can count."""

    high: Int[Array, ""]
    low: Int[Array, ""]

    def positions(self, dtype: Any) -> Float[Array, ""]:
        """The number in a dtype, or 1 for none: what a mean divides by."""
        return jnp.maximum(self.high.astype(dtype) * BASE + self.low, 1)


class ImportanceStats(NamedTuple):
    r"""What the loss needs of a batch: $S_j$ of every component and the number of positions.

    Statistics of shards, of microbatches or of evaluation batches merge to those of all their
    positions, in any order, to float32 rounding: what rounding takes from the sums is kept beside
    them. Losses and gradients don't merge, since $S \log_2(1 + S)$ is no sum over positions. Two
    ways of accumulating gradients over microbatches are exact, where one pass that averages the
    losses of microbatches, or uses running sums, is not:

    - differentiate through a scan whose carry are the statistics, with a checkpointed step:
      `lax.scan(jax.checkpoint(step), ImportanceStats.empty(example), microbatches)`, where the step
      merges `ImportanceStats.from_batch(...)` into the carry, and then `.loss(beta).total`;
    - in two passes: the first merges the statistics without gradients, the second adds up, over the
      same microbatches with the same random keys, the gradients of
      `linear(ImportanceStats.from_batch(...))` with `linear = stats.linearized(beta)`.

    On shards of `jax.shard_map`, `.psum(axis_name)` makes local statistics global: before the loss,
    and between the two passes. The second pass then is the sum over members of what each adds up:
    with check_vma=False, or in `jax.pmap`, psum the gradients of replicated parameters.

    Arguments, and what is raised, are as in `pj.importance_minimality`; to merge statistics of
    different sites is a ValueError.

    Attributes:
        sums: The $S_j$ of each site, of shape [C], in a pytree like the importances.
        residuals: What rounding has taken from them.
        counts: The number of positions of each site.

    References:
        Neumaier (1974), Rundungsfehleranalyse einiger Verfahren zur Summation endlicher Summen.

    Examples:
        >>> a, b = jnp.array([[1.0, 0.0]]), jnp.array([[1.0, 1.0], [1.0, 0.0]])
        >>> stats = [pj.ImportanceStats.from_batch(c, pj.L1()) for c in (a, b)]
        >>> loss = stats[0].merge(stats[1]).loss(beta=1.0)
        >>> round(float(loss.sparsity), 4), round(float(loss.frequency), 4)
        (1.3333, 2.3333)
    """

    sums: PyTree[Float[Array, " _"]]
    residuals: PyTree[Float[Array, " _"]]
    counts: PyTree[Count]

    @classmethod
    @public
    def from_batch(
        cls,
        importances: PyTree[Real[ArrayLike, "... _"]],
        penalty: PerValue,
        *,
        where: PyTree[Bool[ArrayLike, "..."]] | None = None,
    ) -> "ImportanceStats":
        """The statistics of one batch, which can be differentiated."""
        sites, structure = jax.tree.flatten(importances)
        _check_sites(sites)
        masks = spread("where", where, structure)
        for site, mask in zip(sites, masks, strict=True):
            check_where(mask, jnp.shape(site)[:-1])
        if hasattr(penalty, "elementwise"):
            sums = _compiled_sums(sites, masks, bare(penalty))
        elif callable(penalty):
            # A compiled program would be found again by the function's identity, and be stale.
            sums = _sums(sites, masks, penalty)
        else:
            raise TypeError(
                "penalty must be a config such as pj.Lp(p=0.4), or a function of each value, got "
                f"{penalty!r}"
            )
        return cls(
            sums=structure.unflatten(sums),
            residuals=structure.unflatten(map(jnp.zeros_like, sums)),
            counts=structure.unflatten(
                _count(mask, jnp.shape(site)[:-1]) for site, mask in zip(sites, masks, strict=True)
            ),
        )

    @classmethod
    def empty(cls, importances: PyTree[Any]) -> "ImportanceStats":
        """The statistics of no positions, where merging starts.

        Args:
            importances: Arrays like those to come, or `jax.ShapeDtypeStruct` of them. Inside of
                `jax.shard_map` arrays: the carry of a scan has to vary as they do.
        """
        sites, structure = jax.tree.flatten(bare(importances))
        _check_sites(sites)
        doubles = [site.dtype == jnp.float64 for site in sites]
        sums = [
            jnp.zeros(site.shape[-1], jnp.float64 if double else jnp.float32)
            for site, double in zip(sites, doubles, strict=True)
        ]
        zero = jnp.zeros((), jnp.int32)
        stats = cls(
            sums=structure.unflatten(sums),
            residuals=structure.unflatten(sums),
            counts=structure.unflatten([Count(zero, zero)] * len(sites)),
        )
        return vary_alike((stats, [site for site in sites if isinstance(site, jax.Array)]))[0]

    def merge(self, other: "ImportanceStats") -> "ImportanceStats":
        """The statistics of the positions of both, which are of the same sites."""
        jax.tree.map(lambda own, its: check_same_shape(own=own, other=its), self.sums, other.sums)
        sums = jax.tree.map(jnp.add, self.sums, other.sums)
        lost = jax.tree.map(_lost, self.sums, other.sums)
        residuals = jax.tree.map(lambda *parts: sum(parts), self.residuals, other.residuals, lost)
        # Residuals that grew would themselves be rounded: the sums take what they can hold.
        return ImportanceStats(
            sums=jax.tree.map(jnp.add, sums, residuals),
            residuals=jax.tree.map(_lost, sums, residuals),
            counts=_carried(jax.tree.map(jnp.add, self.counts, other.counts)),
        )

    def psum(self, axis_name: AxisName) -> "ImportanceStats":
        """The statistics of all members of mapped axes, such as those of a `jax.shard_map`."""
        merged = lax.psum(self, axis_name)
        return merged._replace(counts=_carried(merged.counts))

    @public
    def loss(
        self, beta: ArrayLike = 0.0, *, reference_count: ArrayLike | None = None
    ) -> ImportanceLoss:
        """The loss on all positions that were merged."""
        _check_numbers(beta, reference_count)
        return _loss(self, beta, reference_count)

    @public
    def linearized(
        self, beta: ArrayLike = 0.0, *, reference_count: ArrayLike | None = None
    ) -> Callable[["ImportanceStats"], Float[Array, ""]]:
        r"""The loss, linearised at these statistics: what the second of two passes differentiates.

        Returns:
            A function, and pytree, from the statistics of a microbatch to
            $\sum_j \frac{\partial L}{\partial S_j} S_j$ of that microbatch, whose gradients add up
            to that of the loss on all of them. Its value is not the loss.
        """
        slopes = jax.grad(
            lambda sums: self._replace(sums=sums).loss(beta, reference_count=reference_count).total
        )(self.sums)
        return Partial(_linear, lax.stop_gradient(slopes))


@public
def importance_minimality(
    importances: PyTree[Real[ArrayLike, "... _"]],
    penalty: PerValue,
    *,
    beta: ArrayLike = 0.0,
    reference_count: ArrayLike | None = None,
    where: PyTree[Bool[ArrayLike, "..."]] | None = None,
    axis_name: AxisName | None = None,
) -> ImportanceLoss:
    r"""The importance minimality loss: $\sum_j f_j + \beta f_j \log_2(1 + S_j)$.

    Here $S_j = \sum_i \psi(c_{ij})$ sums the penalty $\psi$ of component j's importance over the
    positions i, $f_j = S_j / N$ is its mean over the N positions, and the sum runs over the
    components of all sites. The first part asks for few components at each position; the second
    for components that are used at few positions.

    $S_j$ is that of the global batch. Under `jax.jit` on sharded arrays it is so by itself; in
    `jax.shard_map` name the axes; over microbatches use `pj.ImportanceStats`.

    Args:
        importances: The $c \ge 0$ of each site (layer): a pytree of arrays [..., C] of positions
            and components, of any real dtype; C and the number of positions may differ. A negative
            importance is an error upstream and is not clipped: the penalties of this package take
            its magnitude.
        penalty: The $\psi$: a separable config such as `pj.SmoothL0(gamma=0.1)` or
            `pj.Lp(p=0.4)`, whose reduction plays no part, or a function from an array to the
            penalty of each value.
        beta: The $\beta$, at least 0; 0.5 is usual.
        reference_count: An $a \ge 1$ that replaces $S_j$ in the logarithm by $a f_j$, which makes
            the loss independent of the number of positions.
        where: Mask of the positions that count, which broadcasts to [...], or a pytree of masks.
        axis_name: Mapped axes that the batch is sharded over.

    Returns:
        An `ImportanceLoss(total, sparsity, frequency)` of scalars, float32 or wider.

    Raises:
        ValueError: If there is no array or one has no axis of components, `where` does not fit, a
            number is out of range, or the penalty does not keep the shape of its input.
        TypeError: If `where` is not boolean, a number is a schedule or the config holds one, or
            the penalty is neither a config nor a function.

    References:
        Bushnaq, Braun & Sharkey (2025), Stochastic parameter decomposition.

    Examples:
        >>> loss = pj.importance_minimality(jnp.ones((2, 2)), pj.SmoothL0(gamma=1.0), beta=1.0)
        >>> [float(part) for part in loss]
        [2.0, 1.0, 1.0]
    """
    stats = ImportanceStats.from_batch(importances, penalty, where=where)
    if axis_name is not None:
        stats = stats.psum(axis_name)
    return stats.loss(beta, reference_count=reference_count)


@public
def importance_metrics(
    importances: PyTree[Real[ArrayLike, "... _"]],
    penalties: Mapping[str, PerValue],
    *,
    beta: ArrayLike = 0.0,
    reference_count: ArrayLike | None = None,
    thresholds: Sequence[float] = (0.0,),
    where: PyTree[Bool[ArrayLike, "..."]] | None = None,
    axis_name: AxisName | None = None,
) -> dict[str, Float[Array, ""]]:
    r"""What to log of importances: every penalty's loss, CI-L0 and the share of dead components.

    CI-L0 at a threshold $t$ is $\sum_j [c_{ij} > t]$, averaged over the positions $i$.
    A run that is driven by one penalty so also logs the others', on the same importances.

    Args:
        importances, beta, reference_count, where, axis_name: As in `pj.importance_minimality`; so
            are errors.
        penalties: Per-value penalties by name.
        thresholds: Above which importances a component counts as used, at least one.

    Returns:
        A flat dict of scalars:

        - `"importance/<name>"`, the total of that penalty;
        - `"importance/<name>_no_beta"`, its sparsity;
        - `"importance/ci_l0_<threshold>"`, the mean number of components in use at a position;
        - `"importance/ci_l0_<threshold>/<site>"`, the same of one site;
        - "importance/dead", the share of components never above the lowest threshold.

    Examples:
        >>> importances = {"mlp": jnp.array([[0.5, 0.0], [1.0, 0.0]])}
        >>> for name, value in sorted(pj.importance_metrics(importances, {"l1": pj.L1()}).items()):
        ...     print(name.removeprefix("importance/"), value)
        ci_l0_0 1.0
        ci_l0_0/mlp 1.0
        dead 0.5
        l1 0.75
        l1_no_beta 0.75
    """
    if isinstance(thresholds, int | float):
        raise TypeError(f"thresholds must be a sequence of numbers, got {thresholds!r}")
    if not thresholds:
        raise ValueError("thresholds must hold at least one number, got none")

    def stats(penalty: PerValue) -> ImportanceStats:
        local = ImportanceStats.from_batch(importances, penalty, where=where)
        return local if axis_name is None else local.psum(axis_name)

    metrics = {}
    for name, penalty in penalties.items():
        loss = stats(penalty).loss(beta, reference_count=reference_count)
        metrics[f"importance/{name}"] = loss.total
        metrics[f"importance/{name}_no_beta"] = loss.sparsity
    for threshold in thresholds:
        used = stats(_Above(threshold))
        label = f"importance/ci_l0_{threshold:g}"
        metrics[label] = used.loss().sparsity
        paths, sums, counts = _by_site(used)
        for path, total, count in zip(paths, sums, counts, strict=True):
            if path:
                site = jax.tree_util.keystr(path, simple=True, separator="/")
                metrics[f"{label}/{site}"] = jnp.sum(_mean(total, count))
    _, sums, _ = _by_site(stats(_Above(min(thresholds))))
    dead = sum(jnp.sum(total == 0, dtype=total.dtype) for total in sums)
    metrics["importance/dead"] = dead / sum(total.size for total in sums)
    return metrics


def _check_sites(sites):
    if not sites:
        raise ValueError("importances must hold at least one array, got none")
    for site in sites:
        if not jnp.ndim(site):
            raise ValueError("importances must have the shape [..., C], got a scalar")


def _check_numbers(beta, reference_count):
    check_fits((), beta=beta)
    if reference_count is not None:
        check_fits((), reference_count=reference_count)
    NONNEGATIVE.check(beta=beta)
    AT_LEAST_ONE.check(reference_count=reference_count)


def _sums(sites, masks, penalty):
    def per_value(site):
        values = getattr(penalty, "elementwise", penalty)(site)
        if jnp.shape(values) != jnp.shape(site):
            raise ValueError(
                "penalty must return a value for each importance, of shape "
                f"{jnp.shape(site)}, got shape {jnp.shape(values)}"
            )
        return values

    # Recomputed in the backward pass: a residual of the size of the input costs more than that.
    @jax.checkpoint
    def total(site, mask):
        (site,) = promote(site)
        positions = range(site.ndim - 1)
        if mask is None:
            return jnp.sum(per_value(site), positions)
        included = jnp.broadcast_to(mask, site.shape[:-1])[..., None]
        (site, included), *_ = lie_alike((site, included))
        values = per_value(jnp.where(included, site, 0))
        return jnp.sum(jnp.where(included, values, 0), positions)

    return [total(site, mask) for site, mask in zip(sites, masks, strict=True)]


_compiled_sums = jax.jit(_sums)


def _count(mask, shape):
    size = math.prod(shape)
    if mask is None:
        high, low = (jnp.asarray(digit, jnp.int32) for digit in divmod(size, BASE))
        return Count(high, low)
    repeats = size // max(jnp.size(mask), 1)
    return Count(*jnp.divmod(jnp.sum(mask, dtype=jnp.int32) * repeats, BASE))


def _carried(counts):
    def carry(count):
        high, low = jnp.divmod(count.low, BASE)
        return Count(count.high + high, low)

    return jax.tree.map(carry, counts, is_leaf=lambda node: isinstance(node, Count))


def _lost(a, b):
    """What rounding takes from a + b."""
    total = a + b
    shadow = total - a
    lost = (a - (total - shadow)) + (b - shadow)
    return lax.stop_gradient(jnp.where(jnp.isfinite(total), lost, 0))


def _mean(total, count):
    return total / count.positions(total.dtype)


def _by_site(stats):
    paths, sums = zip(*jax.tree.leaves_with_path(stats.sums), strict=True)
    return paths, sums, jax.tree.structure(stats.sums).flatten_up_to(stats.counts)


@jax.jit
def _loss(stats, beta, reference_count):
    _, sums, counts = _by_site(stats)
    sparsity = frequency = jnp.zeros((), jnp.float32)
    for total, count in zip(sums, counts, strict=True):
        mean = _mean(total, count)
        scale = total if reference_count is None else reference_count * mean
        sparsity += jnp.sum(mean)
        frequency += jnp.sum(mean * jnp.log1p(scale)) / math.log(2)
    # At beta = 0 the frequency may be infinite.
    total = jnp.where(beta == 0, sparsity, sparsity + beta * frequency)
    return ImportanceLoss(total, sparsity, frequency)


def _linear(slopes, stats):
    products = jax.tree.map(lambda slope, total: jnp.sum(slope * total), slopes, stats.sums)
    return sum(jax.tree.leaves(products))


class _Above(NamedTuple):
    """1 for importances above a threshold, 0 for the others, NaN for NaN."""

    threshold: float

    def elementwise(self, c):
        return jnp.where(jnp.isnan(c), c, (c > self.threshold).astype(c.dtype))
