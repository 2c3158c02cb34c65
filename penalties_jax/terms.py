"""The penalties as configs: what a penalty is, apart from what it is applied to."""

from collections.abc import Callable
from typing import Any, ClassVar, Literal, Self

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.tree_util import Partial
from jax.typing import ArrayLike
from jaxtyping import Array, PyTree

from penalties_jax import functional
from penalties_jax.functional.constraints import METRICS, MODES, ROWS, Metric, Mode, Rows
from penalties_jax.functional.divergences import DIRECTIONS, Direction
from penalties_jax.functional.estimators import ESTIMATORS, Estimator
from penalties_jax.functional.reduction import (
    REDUCTIONS,
    Axis,
    AxisName,
    Reduction,
    Sums,
    add_up,
    check_broadcast,
    spread,
)
from penalties_jax.functional.sparsity import KINDS, Kind
from penalties_jax.functional.streaming import check_block_size
from penalties_jax.pytree import (
    AT_LEAST_ONE,
    NONNEGATIVE,
    POSITIVE,
    UNIT,
    Pytree,
    abstract,
    fields,
    has_schedule,
    number,
    option,
    pytree,
    resolve,
)

# A number, an array or a schedule; or a pytree of them like the input.
Numeric = Any

Inputs = Literal["logprobs", "logits"]
INPUTS = ("logprobs", "logits")


class Penalty(Pytree):
    """What every penalty can do: be evaluated, resolved at a step, scaled and added."""

    # NumPy's arrays and scalars leave `array * config` to the config.
    __array_ufunc__ = None

    def __call__(self, *inputs: PyTree[Array], where: PyTree | None = None) -> PyTree[Array]:
        """The penalty on arrays or pytrees of arrays.

        Args:
            *inputs: What is penalised: one pytree, or the two that are compared. None and
                `optax.MaskedNode` leaves are skipped.
            where: A mask for every array, or a pytree of masks like the first input.

        Returns:
            A scalar over all arrays; for reduction="none" a pytree of values like the first input.

        Raises:
            TypeError: If a hyperparameter still is a schedule.
            ValueError: As the function of the same name.
        """
        self._check_resolved()
        if _has_function(self):
            return self._value(inputs, where)
        return _evaluate(self, inputs, where)

    def at(self, step: ArrayLike) -> Self:
        """The same penalty with every schedule replaced by its value at `step`."""
        return resolve(self, step)

    def elementwise(self, x: PyTree[Array]) -> PyTree[Array]:
        """The penalty of each value, unreduced.

        Raises:
            NotImplementedError: If the penalty is not a sum over single values.
            TypeError: If a hyperparameter still is a schedule.
        """
        self._check_resolved()
        return self._elementwise(x)

    def prox(self, v: PyTree[Array], step_size: ArrayLike) -> PyTree[Array]:
        r"""The proximal operator, $\arg\min_z \tfrac12 \lVert z - v \rVert^2 + t f(z)$.

        Args:
            v: The point: an array or a pytree of arrays.
            step_size: The $t$; weights, scale and reduction of the penalty come on top.

        Raises:
            NotImplementedError: If the penalty has none here.
            TypeError: If a hyperparameter still is a schedule.
            ValueError: If the penalty is not a scalar (reduction="none").
        """
        self._check_resolved()
        return self._proximal(v, step_size)

    def _check_resolved(self):
        if has_schedule(self):
            raise TypeError(f"{self!r} holds a schedule: call .at(step) first")

    def _value(self, inputs, where):
        raise NotImplementedError

    def _elementwise(self, x):
        raise NotImplementedError(f"{self!r} is not a sum over single values")

    def _proximal(self, v, step_size):
        raise NotImplementedError(
            f"{self!r} has no proximal operator here; L1, L2 (of a fixed center, not clipped), "
            "ElasticNet, Huber and GroupLasso have one"
        )

    def __mul__(self, scale: Numeric) -> "Scaled":
        return NotImplemented if isinstance(scale, Penalty) else Scaled(self, scale)

    __rmul__ = __mul__

    def __add__(self, other: "Penalty") -> "Penalty":
        if not isinstance(other, Penalty):
            return NotImplemented
        return Sum((*_summands(self), *_summands(other)))

    def __radd__(self, other: Literal[0]) -> "Penalty":
        return self if other == 0 else NotImplemented


@jax.jit
def _evaluate(penalty, inputs, where):
    return penalty._value(inputs, where)


def _has_function(penalty):
    """Whether it holds a user's function, by whose identity a compiled program would go stale."""
    nodes = jax.tree.leaves(penalty, is_leaf=lambda node: isinstance(node, Partial))
    return any(isinstance(node, Partial) for node in nodes)


@pytree
class Scaled(Penalty):
    """`scale * penalty`."""

    penalty: Penalty
    scale: Numeric = number()

    def _value(self, inputs, where):
        return jax.tree.map(lambda value: self.scale * value, self.penalty(*inputs, where=where))

    def _elementwise(self, x):
        return jax.tree.map(lambda value: self.scale * value, self.penalty.elementwise(x))

    def _proximal(self, v, step_size):
        return self.penalty.prox(v, self.scale * step_size)


@pytree
class Sum(Penalty):
    """A sum of penalties on the same inputs."""

    penalties: tuple[Penalty, ...]

    def _value(self, inputs, where):
        return _add(penalty(*inputs, where=where) for penalty in self.penalties)

    def _elementwise(self, x):
        return _add(penalty.elementwise(x) for penalty in self.penalties)


def _summands(penalty):
    return penalty.penalties if isinstance(penalty, Sum) else (penalty,)


def _add(trees):
    return jax.tree.map(lambda *values: sum(values[1:], start=values[0]), *trees)


@abstract
class Reduced(Penalty):
    """A penalty that is one pure function, reduced over the arrays of a pytree."""

    reduction: Reduction = option(default="sum", choices=REDUCTIONS, kw_only=True)
    axis_name: AxisName | None = option(default=None, kw_only=True)

    # The pure function of one array of each input, with this config's hyperparameters.
    _function: ClassVar[Callable[..., Any]]
    _inputs: ClassVar[int] = 1

    def _value(self, inputs, where):
        if len(inputs) != self._inputs:
            raise TypeError(
                f"{type(self).__name__} takes {self._inputs} input(s), got {len(inputs)}; "
                "a mask is passed as where="
            )
        structure = jax.tree.structure(inputs[0], is_leaf=is_absent)
        rows = zip(*(structure.flatten_up_to(tree) for tree in inputs), strict=True)
        options = {
            "reduction": "none" if self.reduction == "none" else "sums",
            "axis_name": self.axis_name,
        }
        values = [
            row[0] if is_absent(row[0]) else config._function(*row, where=mask, **options)
            for config, row, mask in zip(
                self._members(structure), rows, spread(where, structure), strict=True
            )
        ]
        if self.reduction == "none":
            return structure.unflatten(values)
        return add_up([value for value in values if isinstance(value, Sums)], self.reduction)

    def _members(self, structure):
        """One config for each array: numbers given as pytrees like the input are dealt out."""
        columns = {
            field.name: spread(getattr(self, field.name), structure)
            for field in fields(self)
            if "valid" in field.metadata
        }
        return [
            self._with(**{name: column[i] for name, column in columns.items()})
            for i in range(structure.num_leaves)
        ]


def is_absent(node: Any) -> bool:
    """Whether a node of the input stands for nothing: None, or left out by `optax.masked`."""
    return node is None or isinstance(node, optax.MaskedNode)


@abstract
class Weighted(Reduced):
    """A weighted sum over values or groups, which may have a proximal operator."""

    weights: Numeric = number(default=1.0, valid=NONNEGATIVE, kw_only=True)

    def _prox(self, v, t):
        return super()._proximal(v, t)

    def _count(self, v):
        return jnp.size(v)

    def _proximal(self, v, step_size):
        if self.reduction == "none":
            raise ValueError('prox needs a scalar penalty: reduction must be "sum" or "mean"')
        leaves, structure = jax.tree.flatten(v, is_leaf=is_absent)
        if self.reduction == "mean":
            count = sum(self._count(leaf) for leaf in leaves if not is_absent(leaf))
            members = 1 if self.axis_name is None else lax.psum(1, self.axis_name)
            step_size = step_size / max(count * members, 1)
        return structure.unflatten(
            leaf if is_absent(leaf) else config._prox(leaf, step_size * config.weights)
            for config, leaf in zip(self._members(structure), leaves, strict=True)
        )


class Separable(Weighted):
    """A sum over single values."""

    def _elementwise(self, x):
        return self._with(reduction="none", axis_name=None)(x)


@pytree
class L1(Separable):
    r"""The L1 norm, $\sum_i w_i |x_i|$: `pj.l1` as a config.

    Of an array of any shape, or of every array of a pytree. `prox` soft-thresholds.

    Attributes:
        weights, reduction, axis_name: As of `pj.l1`; `weights` may be a pytree like the input.

    Raises:
        ValueError: If a plain number is out of its range, or an option is unknown.

    References:
        Tibshirani (1996), Regression shrinkage and selection via the lasso. Zou (2006), The
        adaptive lasso and its oracle properties.

    Examples:
        >>> import jax.numpy as jnp
        >>> import penalties_jax as pj
        >>> penalty = 0.5 * pj.L1()
        >>> float(penalty(jnp.array([1.0, -3.0])))
        2.0
        >>> penalty.prox(jnp.array([1.0, -3.0]), 1.0).tolist()
        [0.5, -2.5]
    """

    def _function(self, x, **options):
        return functional.l1(x, weights=self.weights, **options)

    def _prox(self, v, t):
        return functional.prox_l1(v, t)


@pytree
class L2(Separable):
    r"""The squared L2 norm, $\sum_i w_i (x_i - c_i)^2$: `pj.l2` as a config.

    Of an array of any shape, or of every array of a pytree. `prox` shrinks towards the center,
    unless that is "mean" or the distance is clipped.

    Attributes:
        center: The $c$: None for 0, a number, an array, a pytree like the input, or "mean" for that
            of each array.
        clip: Bound on $|x_i - c_i|$, above 0, or None.
        weights, reduction, axis_name: As of `pj.l2`; `weights` may be a pytree like the input.

    Raises:
        ValueError: If a plain number is out of its range, or an option is unknown.

    References:
        Hoerl & Kennard (1970), Ridge regression: biased estimation for nonorthogonal problems.

    Examples:
        >>> import jax.numpy as jnp
        >>> import penalties_jax as pj
        >>> pretrained = {"kernel": jnp.ones(2), "bias": jnp.zeros(1)}
        >>> float(pj.L2(center=pretrained)({"kernel": jnp.zeros(2), "bias": jnp.ones(1)}))
        3.0
    """

    center: Numeric | Literal["mean"] | None = number(default=None, choices=("mean",))
    clip: Numeric | None = number(default=None, valid=POSITIVE)

    def _function(self, x, **options):
        return functional.l2(x, center=self.center, clip=self.clip, weights=self.weights, **options)

    def _elementwise(self, x):
        if isinstance(self.center, str):
            return Penalty._elementwise(self, x)
        return super()._elementwise(x)

    def _prox(self, v, t):
        if isinstance(self.center, str) or self.clip is not None:
            return super()._prox(v, t)
        return functional.prox_l2(v, t, center=0.0 if self.center is None else self.center)


@pytree
class ElasticNet(Separable):
    r"""The elastic net, $\sum_i w_i (a |x_i| + (1 - a) x_i^2)$: `pj.elastic_net` as a config.

    Of an array of any shape, or of every array of a pytree. It has a `prox`.

    Attributes:
        l1_ratio: The $a$, in [0, 1].
        weights, reduction, axis_name: As of `pj.elastic_net`; `weights` may be a pytree like the
            input.

    Raises:
        ValueError: If a plain number is out of its range, or an option is unknown.

    References:
        Zou & Hastie (2005), Regularization and variable selection via the elastic net.

    Examples:
        >>> import jax.numpy as jnp
        >>> import penalties_jax as pj
        >>> float(pj.ElasticNet(l1_ratio=0.5)(jnp.array([-2.0, 1.0])))
        4.0
    """

    l1_ratio: Numeric = number(default=0.5, valid=UNIT)

    def _function(self, x, **options):
        return functional.elastic_net(x, l1_ratio=self.l1_ratio, weights=self.weights, **options)

    def _prox(self, v, t):
        return functional.prox_elastic_net(v, t, l1_ratio=self.l1_ratio)


@pytree
class Lp(Separable):
    r"""The L_p penalty, $\sum_i w_i (|x_i| + \epsilon)^p$: `pj.lp` as a config.

    Of an array of any shape, or of every array of a pytree. It has no proximal operator in closed
    form.

    Attributes:
        p: The power, above 0; below 1 the penalty is not convex.
        eps: The $\epsilon$, at least 0.
        weights, reduction, axis_name: As of `pj.lp`; `weights` may be a pytree like the input.

    Raises:
        ValueError: If a plain number is out of its range, or an option is unknown.

    References:
        Frank & Friedman (1993), A statistical view of some chemometrics regression tools.

    Examples:
        >>> import jax.numpy as jnp
        >>> import penalties_jax as pj
        >>> penalty = pj.Lp(p=pj.anneal(2.0, 1.0, start=0, end=100))
        >>> float(penalty.at(100)(jnp.array([-2.0, 1.0])))
        3.0
    """

    p: Numeric = number(valid=POSITIVE)
    eps: Numeric = number(default=1e-12, valid=NONNEGATIVE)

    def _function(self, x, **options):
        return functional.lp(x, self.p, eps=self.eps, weights=self.weights, **options)


@pytree
class SmoothL0(Separable):
    r"""Smooth L0 (Geman-McClure), $\sum_i w_i\, x_i^2 / (x_i^2 + \gamma^2)$.

    The config of `pj.smooth_l0`. Of an array of any shape, or of every array of a pytree. It has no
    proximal operator here.

    Attributes:
        gamma: The $\gamma$, above 0, in the units of `x`: where a value counts half.
        normalize_at_one: Whether to multiply by $1 + \gamma^2$, so that a value of 1 counts 1.
        weights, reduction, axis_name: As of `pj.smooth_l0`; `weights` may be a pytree like the
            input.

    Raises:
        ValueError: If a plain number is out of its range, or an option is unknown.

    References:
        Geman & McClure (1985), Bayesian image analysis: an application to single photon emission
        tomography.

    Examples:
        >>> import jax.numpy as jnp
        >>> import penalties_jax as pj
        >>> float(pj.SmoothL0(gamma=1.0)(jnp.array([0.0, 1.0, 1e6])))
        1.5
    """

    gamma: Numeric = number(valid=POSITIVE)
    normalize_at_one: bool = option(default=False, kw_only=True)

    def _function(self, x, **options):
        return functional.smooth_l0(
            x,
            self.gamma,
            normalize_at_one=self.normalize_at_one,
            weights=self.weights,
            **options,
        )


@pytree
class LogSum(Separable):
    r"""The log-sum penalty, $\sum_i w_i \ln(1 + |x_i| / \epsilon)$: `pj.log_sum` as a config.

    Of an array of any shape, or of every array of a pytree. It has no proximal operator here.

    Attributes:
        eps: The $\epsilon$, above 0, in the units of `x`.
        weights, reduction, axis_name: As of `pj.log_sum`; `weights` may be a pytree like the input.

    Raises:
        ValueError: If a plain number is out of its range, or an option is unknown.

    References:
        Candès, Wakin & Boyd (2008), Enhancing sparsity by reweighted l1 minimization.

    Examples:
        >>> import jax.numpy as jnp
        >>> import penalties_jax as pj
        >>> round(float(pj.LogSum(eps=0.5)(jnp.array([0.5, 0.0]))), 4)
        0.6931
    """

    eps: Numeric = number(default=1.0, valid=POSITIVE)

    def _function(self, x, **options):
        return functional.log_sum(x, self.eps, weights=self.weights, **options)


@pytree
class Huber(Separable):
    r"""The Huber penalty: `pj.huber` as a config.

    $x_i^2 / 2$ where $|x_i| \le \delta$, else $\delta (|x_i| - \delta / 2)$, summed. Of an array of
    any shape, or of every array of a pytree. It has a `prox`.

    Attributes:
        delta: The $\delta$, above 0, in the units of `x`.
        weights, reduction, axis_name: As of `pj.huber`; `weights` may be a pytree like the input.

    Raises:
        ValueError: If a plain number is out of its range, or an option is unknown.

    References:
        Huber (1964), Robust estimation of a location parameter.

    Examples:
        >>> import jax.numpy as jnp
        >>> import penalties_jax as pj
        >>> float(pj.Huber(delta=1.0)(jnp.array([1.0, -3.0])))
        3.0
    """

    delta: Numeric = number(default=1.0, valid=POSITIVE)

    def _function(self, x, **options):
        return functional.huber(x, self.delta, weights=self.weights, **options)

    def _prox(self, v, t):
        return functional.prox_huber(v, t, delta=self.delta)


@pytree
class GroupLasso(Weighted):
    r"""The group lasso, $\sum_g w_g \lVert x_g \rVert_2$: `pj.group_lasso` as a config.

    A group is what an array [...] holds along `axis`. Of one array or of every array of a pytree,
    each by itself. `prox` shrinks a group's norm.

    Attributes:
        axis: The axis or axes of a group: 0 for the columns of a kernel [in, out].
        weights, reduction, axis_name: As of `pj.group_lasso`; `weights` may be a pytree like the
            input.

    Raises:
        ValueError: If a plain number is out of its range, or an option is unknown.

    References:
        Yuan & Lin (2006), Model selection and estimation in regression with grouped variables.

    Examples:
        >>> import jax.numpy as jnp
        >>> import penalties_jax as pj
        >>> float(pj.GroupLasso(axis=1)(jnp.array([[3.0, 4.0], [0.0, 0.0]])))
        5.0
    """

    axis: Axis = option()

    def _function(self, x, **options):
        return functional.group_lasso(x, axis=self.axis, weights=self.weights, **options)

    def _prox(self, v, t):
        return functional.prox_group_lasso(v, t, axis=self.axis)

    def _count(self, v):
        return jnp.size(v) // max(jnp.size(v, self.axis), 1)


@abstract
class Divergence(Reduced):
    """What divergences share: of log-probabilities, or streamed from logits."""

    inputs: Inputs = option(default="logprobs", choices=INPUTS, kw_only=True)
    temperature: Numeric | None = number(default=None, valid=POSITIVE, kw_only=True)
    axis: int = option(default=-1, kw_only=True)
    block_size: int | None = option(default=None, kw_only=True)
    class_axis_name: AxisName | None = option(default=None, kw_only=True)
    reduction: Reduction = option(default="mean", choices=REDUCTIONS, kw_only=True)

    _of_logits: ClassVar[tuple[str, ...]] = ("temperature", "block_size", "class_axis_name")

    def __post_init__(self):
        super().__post_init__()
        name = type(self).__name__
        if self.inputs == "logits" and self.axis != -1:
            raise ValueError(f"{name}.axis must be -1 for logits, got {self.axis}")
        check_block_size(self.block_size)
        for field in self._of_logits:
            value = getattr(self, field)
            if self.inputs != "logits" and value is not None:
                raise ValueError(f"{name}.{field} needs inputs='logits', got {value!r}")

    @property
    def _streaming(self):
        return {
            "temperature": 1.0 if self.temperature is None else self.temperature,
            "block_size": self.block_size,
            "class_axis_name": self.class_axis_name,
        }


@pytree
class KLDivergence(Divergence):
    r"""KL(P||Q), $\sum_c p_c (\log p_c - \log q_c)$: `pj.kl_divergence` as a config.

    Of two arrays of log-probabilities [..., C], or two pytrees of them; a mask has the shape of the
    positions [...]. P, the first, is the model.

    Attributes:
        direction: "forward" is KL(P||Q), "reverse" KL(Q||P), "symmetric" their mean.
        inputs: "logprobs", or "logits" for `pj.kl_from_logits`: streamed, block by block.
        temperature, block_size, class_axis_name: As of `pj.kl_from_logits`, and for logits only.
        axis, reduction, axis_name: As of `pj.kl_divergence`.

    Raises:
        ValueError: If an option is unknown, a plain number is out of its range, or an option of
            logits is given for log-probabilities.

    References:
        Kullback & Leibler (1951), On information and sufficiency.

    Examples:
        >>> import jax.numpy as jnp
        >>> import penalties_jax as pj
        >>> log_p, log_q = jnp.log(jnp.array([0.75, 0.25])), jnp.log(jnp.array([0.5, 0.5]))
        >>> round(float(pj.KLDivergence()(log_p, log_q)), 4)
        0.1308
        >>> round(float(pj.KLDivergence(inputs="logits")(log_p + 1, log_q - 2)), 4)
        0.1308
    """

    _inputs: ClassVar[int] = 2

    direction: Direction = option(default="forward", choices=DIRECTIONS)

    def _function(self, p, q, **options):
        if self.inputs == "logits":
            return functional.kl_from_logits(
                p, q, direction=self.direction, **self._streaming, **options
            )
        return functional.kl_divergence(p, q, direction=self.direction, axis=self.axis, **options)


@pytree
class JSDivergence(Divergence):
    r"""Jensen-Shannon, $b\,\mathrm{KL}(P \| M) + (1 - b)\,\mathrm{KL}(Q \| M)$.

    The config of `pj.js_divergence`. With $M = b P + (1 - b) Q$. Of two arrays of log-probabilities
    [..., C], or two pytrees of them; a mask has the shape of the positions [...].

    Attributes:
        mixture: The $b$, in [0, 1]; 0.5 is the usual divergence.
        inputs: "logprobs", or "logits" for `pj.js_from_logits`: streamed, block by block.
        temperature, block_size, class_axis_name: As of `pj.js_from_logits`, and for logits only.
        axis, reduction, axis_name: As of `pj.js_divergence`.

    Raises:
        ValueError: If an option is unknown, a plain number is out of its range, or an option of
            logits is given for log-probabilities.

    References:
        Lin (1991), Divergence measures based on the Shannon entropy.

    Examples:
        >>> import jax.numpy as jnp
        >>> import penalties_jax as pj
        >>> log_p, log_q = jnp.log(jnp.array([1.0, 0.0])), jnp.log(jnp.array([0.0, 1.0]))
        >>> round(float(pj.JSDivergence()(log_p, log_q)), 4)
        0.6931
    """

    _inputs: ClassVar[int] = 2

    mixture: Numeric = number(default=0.5, valid=UNIT)

    def _function(self, p, q, **options):
        if self.inputs == "logits":
            return functional.js_from_logits(
                p, q, mixture=self.mixture, **self._streaming, **options
            )
        return functional.js_divergence(p, q, mixture=self.mixture, axis=self.axis, **options)


@pytree
class Entropy(Divergence):
    r"""Shannon's entropy in nats, $H = -\sum_c \pi_c \log \pi_c$: `pj.entropy` as a config.

    With $\pi = \operatorname{softmax}(\log p / T)$. Of log-probabilities [..., C], or a pytree of
    them; a mask has the shape of the positions [...]. As a term of a loss it sharpens; with
    `maximize` it is $-H$.

    Attributes:
        temperature: The $T$, above 0.
        maximize: Whether it is $-H$, whose minimum is the uniform distribution.
        normalize: Whether to divide by $\ln C$.
        inputs: "logprobs", or "logits" for `pj.entropy_from_logits`: streamed, block by block.
        block_size, class_axis_name: As of `pj.entropy_from_logits`, and for logits only.
        axis, reduction, axis_name: As of `pj.entropy`.

    Raises:
        ValueError: If an option is unknown, a plain number is out of its range, or an option of
            logits is given for log-probabilities.

    References:
        Shannon (1948), A mathematical theory of communication.

    Examples:
        >>> import jax.numpy as jnp
        >>> import penalties_jax as pj
        >>> round(float(pj.Entropy(maximize=True)(jnp.log(jnp.array([0.5, 0.5])))), 4)
        -0.6931
    """

    _of_logits: ClassVar[tuple[str, ...]] = ("block_size", "class_axis_name")

    temperature: Numeric = number(default=1.0, valid=POSITIVE, kw_only=True)
    maximize: bool = option(default=False, kw_only=True)
    normalize: bool = option(default=False, kw_only=True)

    def _function(self, x, **options):
        if self.inputs == "logits":
            return functional.entropy_from_logits(
                x, normalize=self.normalize, **self._streaming, **options
            )
        return functional.entropy(
            x,
            temperature=self.temperature,
            normalize=self.normalize,
            axis=self.axis,
            **options,
        )

    def _value(self, inputs, where):
        value = super()._value(inputs, where)
        return jax.tree.map(jnp.negative, value) if self.maximize else value


@pytree
class KLEstimate(Reduced):
    r"""KL(P||Q) estimated from sampled tokens: `pj.kl_estimate` as a config.

    With $r = \log q - \log p$ of each token, drawn from P: k1 is $-r$, k2 is $r^2 / 2$ and k3 is
    $e^r - 1 - r$. Of two arrays of the tokens' log-probabilities, of any shape, or two pytrees.

    Attributes:
        estimator: "k1", "k2" or "k3".
        reduction, axis_name: As of `pj.kl_estimate`, which also says what the gradients are of.

    Raises:
        ValueError: If an option is unknown.

    References:
        Schulman (2020), Approximating KL divergence.

    Examples:
        >>> import jax.numpy as jnp
        >>> import penalties_jax as pj
        >>> log_p, log_q = jnp.log(jnp.array([0.5, 0.2])), jnp.log(jnp.array([0.25, 0.4]))
        >>> round(float(pj.KLEstimate("k2")(log_p, log_q)), 4)
        0.2402
    """

    _inputs: ClassVar[int] = 2

    estimator: Estimator = option(default="k3", choices=ESTIMATORS)
    reduction: Reduction = option(default="mean", choices=REDUCTIONS, kw_only=True)

    def _function(self, log_p, log_q, **options):
        return functional.kl_estimate(log_p, log_q, estimator=self.estimator, **options)


@pytree
class Consistency(Reduced):
    """How far two outputs for one input differ, such as the mean of $(a - b)^2$.

    The config of `pj.consistency`. Of two arrays of one shape [...], or two pytrees of them;
    "cosine" and "kl" compare along the last axis.

    Attributes:
        metric: "mse", "l1", "cosine" or "kl".
        reduction, axis_name: As of `pj.consistency`.

    Raises:
        ValueError: If an option is unknown.

    References:
        Laine & Aila (2017), Temporal ensembling for semi-supervised learning.

    Examples:
        >>> import jax.numpy as jnp
        >>> import penalties_jax as pj
        >>> float(pj.Consistency("l1")(jnp.zeros(2), jnp.array([1.0, 3.0])))
        2.0
    """

    _inputs: ClassVar[int] = 2

    metric: Metric = option(default="mse", choices=METRICS)
    reduction: Reduction = option(default="mean", choices=REDUCTIONS, kw_only=True)

    def _function(self, a, b, **options):
        return functional.consistency(a, b, metric=self.metric, **options)


@pytree
class SparsityTarget(Reduced):
    """How far rates $s$ of skipped work are from a target $t$, such as $(s - t)^2$.

    The config of `pj.sparsity_target_loss`. Takes rates of any shape or, with `from_mask`, masks
    [...] of which it takes one rate an array: of the whole array, or along `axis`. `where` then
    says which entries of a mask exist.

    Attributes:
        target: The $t$, in [0, 1].
        kind: "l2", "l1", "kl", "huber" or its alias "adaptive".
        delta: That of "huber", above 0.
        from_mask: Whether inputs are masks: 1 is computed, 0 is skipped.
        axis: With `from_mask`, the axes that a rate runs over; all if None.
        reduction, axis_name: As of `pj.sparsity_target_loss`.

    Raises:
        ValueError: If a plain number is out of its range, or an option is unknown.

    References:
        Huber (1964), Robust estimation of a location parameter.

    Examples:
        >>> import jax.numpy as jnp
        >>> import penalties_jax as pj
        >>> masks = {"first": jnp.array([1.0, 0.0]), "second": jnp.array([1.0, 1.0])}
        >>> float(pj.SparsityTarget(target=0.5, kind="l1", from_mask=True)(masks))
        0.25
    """

    target: Numeric = number(valid=UNIT)
    kind: Kind = option(default="l2", choices=KINDS)
    delta: Numeric = number(default=0.1, valid=POSITIVE, kw_only=True)
    from_mask: bool = option(default=False, kw_only=True)
    axis: Axis | None = option(default=None, kw_only=True)
    reduction: Reduction = option(default="mean", choices=REDUCTIONS, kw_only=True)

    def _function(self, rate, *, where, axis_name, **options):
        if self.from_mask:
            mask = rate
            rate = functional.sparsity_rate(mask, axis=self.axis, where=where, axis_name=axis_name)
            # A rate over the global batch is the same on every member: its loss counts once.
            where, axis_name = _any_included(mask, where, self.axis, axis_name), None
        # Else every rate of a tree would be compared with the targets of all of them.
        check_broadcast("target", self.target, jnp.shape(rate))
        return functional.sparsity_target_loss(
            rate,
            self.target,
            kind=self.kind,
            delta=self.delta,
            where=where,
            axis_name=axis_name,
            **options,
        )


def _any_included(x, where, axis, axis_name):
    if where is None:
        return None
    included = jnp.any(jnp.broadcast_to(where, jnp.shape(x)), axis)
    return included if axis_name is None else lax.psum(included.astype(jnp.int32), axis_name) > 0


@pytree
class ImportanceMinimality(Penalty):
    r"""How many components are used and how often, $\sum_j f_j + \beta f_j \log_2(1 + S_j)$.

    The config of `pj.importance_minimality`. Takes a pytree of importances [..., C], one array a
    site. Its value is the total; `parts` has the rest.

    Attributes:
        penalty: That of each value: a config that has `elementwise`, or a function.
        beta: The $\beta$, at least 0.
        reference_count: What $S_j$ is rescaled to, at least 1, or None.
        axis_name: As of `pj.importance_minimality`.

    Raises:
        TypeError: If `penalty` is neither a config nor a function.
        ValueError: If a plain number is out of its range, or an option is unknown.

    References:
        Bushnaq, Braun & Sharkey (2025), Stochastic parameter decomposition.

    Examples:
        >>> import jax.numpy as jnp
        >>> import penalties_jax as pj
        >>> penalty = pj.ImportanceMinimality(pj.SmoothL0(gamma=1.0), beta=1.0)
        >>> float(penalty({"mlp": jnp.ones((2, 2))}))
        2.0
        >>> float(penalty.parts({"mlp": jnp.ones((2, 2))}).sparsity)
        1.0
    """

    penalty: Penalty | Callable[[Array], Array]
    beta: Numeric = number(default=0.0, valid=NONNEGATIVE)
    reference_count: Numeric | None = number(default=None, valid=AT_LEAST_ONE)
    axis_name: AxisName | None = option(default=None, kw_only=True)

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.penalty, Penalty):
            if not callable(self.penalty):
                raise TypeError(
                    "ImportanceMinimality.penalty must be a config such as pj.Lp(p=0.4), or a "
                    f"function of each value, got {self.penalty!r}"
                )
            # A function is structure, as an option is.
            object.__setattr__(self, "penalty", Partial(self.penalty))

    def parts(
        self, importances: PyTree[Array], *, where: PyTree | None = None
    ) -> functional.ImportanceLoss:
        """The total and the two parts that it is made of.

        Args:
            importances: What is penalised.
            where: A mask of positions for every site, or a pytree of masks.

        Raises:
            TypeError: If a hyperparameter still is a schedule.
            ValueError: As `pj.importance_minimality`.
        """
        self._check_resolved()
        return functional.importance_minimality(
            importances,
            self.penalty,
            beta=self.beta,
            reference_count=self.reference_count,
            where=where,
            axis_name=self.axis_name,
        )

    def _value(self, inputs, where):
        if len(inputs) != 1:
            raise TypeError(
                f"ImportanceMinimality takes 1 input, got {len(inputs)}; a mask is where="
            )
        (importances,) = inputs
        return self.parts(importances, where=where).total

    def _elementwise(self, x):
        raise TypeError("ImportanceMinimality is no per-value penalty: pass its .penalty")


@pytree
class Orthogonality(Penalty):
    r"""How far rows are from orthogonal, such as $\sum_{i \ne j} G_{ij}^2$ of their Gram matrix.

    The config of `pj.orthogonality`. Of one array [n, d] or [batch, seq, vocab], or of every array
    of a pytree, summed.

    Attributes:
        mode: "soft", "hard" or "spectral".
        normalize: Whether rows are scaled to norm 1 first.
        axis: What a row is, of an array with three axes.

    Raises:
        ValueError: If an option is unknown; in a call, if there is a `where`.

    References:
        Brock et al. (2017), Neural photo editing with introspective adversarial networks. Bansal,
        Chen & Wang (2018), Can we gain more from orthogonality regularizations?

    Examples:
        >>> import jax.numpy as jnp
        >>> import penalties_jax as pj
        >>> float(pj.Orthogonality()({"a": jnp.eye(2), "b": jnp.eye(2, 3)}))
        0.0
    """

    mode: Mode = option(default="soft", choices=MODES)
    normalize: bool = option(default=True, kw_only=True)
    axis: Rows = option(default="rows", choices=ROWS, kw_only=True)

    def _value(self, inputs, where):
        if where is not None:
            raise ValueError("Orthogonality takes no where: leave rows out of its input")
        (tree,) = inputs
        values = [
            functional.orthogonality(x, mode=self.mode, normalize=self.normalize, axis=self.axis)
            for x in jax.tree.leaves(tree)
        ]
        return sum(values, start=jnp.zeros((), jnp.float32))
