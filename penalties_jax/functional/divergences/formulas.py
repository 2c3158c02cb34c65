"""One formula a divergence: its term, its slopes, its parameters, whatever it is computed from."""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from penalties_jax.functional.checks import BELOW_ZERO, FINITE, NONNEGATIVE, UNIT, Range
from penalties_jax.functional.derivatives import elementwise_derivatives

Direction = Literal["forward", "reverse", "symmetric"]

# A log-ratio whose exponential still is a number, one that still may be multiplied, and one that
# is of a probability of 0, also after it was divided by a temperature.
LARGE, MOST, INFINITE = 60.0, 1e18, 3e38

# Divergences below which a third power of the log-ratio is below the rounding of normalisers.
NEAR = 1e-6


class Distributions(NamedTuple):
    """What a divergence is made of, class by class.

    Attributes:
        probabilities: Of each distribution.
        logs: Their logarithms.
        ratio: Of two, log q - log p, by `log_ratio`.
        label: Of one, which class is the label, for a cross entropy.
        log_normaliser: Of one from logits, their logsumexp.
        under: Of two with a floor under Q, what they are without it.
    """

    probabilities: tuple[Float[Array, "*rows C"], ...]
    logs: tuple[Float[Array, "*rows C"], ...]
    ratio: Any = None
    label: Bool[Array, "*rows C"] | None = None
    log_normaliser: Float[Array, "*rows 1"] | None = None
    under: Any = None


# What logits are scaled by, so that neither a difference of large ones nor a sum of many overflows.
DOWN = 2.0**-24


def log_ratio(log_p: Float[Array, "..."], log_q: Float[Array, "..."]) -> Float[Array, "..."]:
    """log_q - log_p, 0 where both are -inf, and beyond `INFINITE` where one of them is."""
    lowest = jnp.finfo(log_p.dtype).min
    return jnp.maximum(log_q, lowest) - jnp.maximum(log_p, lowest)


class Mean(NamedTuple):
    """A mean under a distribution.

    Attributes:
        ratio: Of the log-ratio where it is finite; of one distribution alone, of its own log.
        lone: How probable it is that the ratio is infinite.
    """

    ratio: Any
    lone: Any


class Parameter(NamedTuple):
    """A number in a formula: its name, the term of the derivative in it, and its range.

    The derivative of what is no sum over classes has no term. There may be `several` of it at each
    position, along an axis of their own.
    """

    name: str
    slope: Any
    valid: Range
    several: bool = False


@runtime_checkable
class Computed(Protocol):
    """What can be computed of rows: a `Formula`, or what has functions of its own for them."""

    @property
    def slopes(self) -> tuple[Any, ...]:
        """One for each distribution."""
        ...

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """The numbers in it."""
        ...

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all that it takes."""
        ...

    def check(self, parameters: Mapping[str, Any]) -> None:
        """Raises ValueError for a plain number out of range."""
        ...


class Formula(NamedTuple):
    """A divergence of one or two distributions: a sum over the classes.

    All functions take `Distributions` and the parameters.

    Attributes:
        term: The summand.
        slopes: The derivatives of the sum through each distribution's log-probabilities, which may
            be differentiated again.
        parameters: The numbers in it.
        centred: The slopes but for a multiple of each distribution's probabilities, which a softmax
            cancels, in a form that is accurate where P is near Q; if None, the slopes are.
        slope_sums: The sums of those, from the `Mean` under each distribution, if these tell.
        of_normaliser: Of one distribution from logits, a function of its log-normaliser that is
            added to the sum: it changes where all logits do.
        floored: Whether the last of its numbers is a floor under log q, and Q what that makes of
            it, by `floors`: the other fields know nothing of it.
    """

    term: Callable[..., Array]
    slopes: tuple[Callable[..., Array], ...]
    parameters: tuple[Parameter, ...] = ()
    centred: tuple[Callable[..., Array], ...] | None = None
    slope_sums: Callable[..., tuple[Array, ...]] | None = None
    of_normaliser: Callable[..., Array] | None = None
    floored: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """The names of its numbers."""
        return (*(parameter.name for parameter in self.parameters), *["floor"][: self.floored])

    @property
    def slopes_of_logits(self) -> tuple[Callable[..., Array], ...]:
        """The slopes s of which s - p sum(s) is the derivative through the logits."""
        return self.centred or self.slopes

    def check(self, parameters: Mapping[str, Any]) -> None:
        """Raises ValueError for a plain number out of range."""
        for parameter in self.parameters:
            parameter.valid.check(**{parameter.name: parameters[parameter.name]})
        if self.floored:
            BELOW_ZERO.check(floor=parameters["floor"])


@elementwise_derivatives(jnp.expm1)
def expm1_minus(d: Float[Array, "..."]) -> Float[Array, "..."]:
    """expm1(d) - d, which is at least 0, without cancellation near 0."""
    far = jnp.expm1(d) - jnp.minimum(d, jnp.finfo(d.dtype).max)
    return jnp.where(jnp.abs(d) < 1, _expm1_minus_near(d), far)


def _expm1_minus_near(d):
    """The same for |d| < 1, by its Taylor series up to terms below rounding at |d| = 1."""
    d = jnp.where(jnp.abs(d) < 1, d, 0)
    series = jnp.zeros_like(d)
    for k in reversed(range(18 if d.dtype == jnp.float64 else 11)):
        series = series * d + 1 / math.factorial(k + 2)
    return jnp.square(d) * series


def _generalised_term(p, q, d):
    """The term p (expm1(d) - d) = q - p - p d, d = log q - log p; q at p = 0, inf at only q = 0."""
    far = jnp.where(d < -INFINITE, jnp.inf, q - p - p * jnp.minimum(d, MOST))
    return jnp.where(jnp.abs(d) < 1, p * _expm1_minus_near(d), far)


# Kullback-Leibler.


def _kl_term(x):
    p, q = x.probabilities
    return _generalised_term(p, q, x.ratio)


def _kl_slope_p(x):
    """The textbook's p (log p - log q + 1); 0 where only one of them is 0."""
    p, _ = x.probabilities
    return p * (1 - jnp.where(jnp.abs(x.ratio) > INFINITE, 1, x.ratio))


def _kl_slope_q(x):
    p, _ = x.probabilities
    return -p


def _kl_centred_p(x):
    """-p d: where only q is 0, the derivative through log p is 0, as if d were 1."""
    p, _ = x.probabilities
    return -p * jnp.where(x.ratio < -INFINITE, 1, jnp.minimum(x.ratio, MOST))


def _kl_centred_q(x):
    p, q = x.probabilities
    near = p * (jnp.clip(x.ratio, -1, 1) + _expm1_minus_near(x.ratio))
    return jnp.where(jnp.abs(x.ratio) < 1, near, q - p)


def _kl_slope_sums(p, q):
    """Q's would be 0 but for the rounding of the normalisers, by which all ratios are too large.

    Where P is near Q, that is what the means under both are too large by on average: KL(P||Q) and
    KL(Q||P), by which they differ from 0, differ by a third power.
    """
    near = jnp.abs(p.ratio) + jnp.abs(q.ratio) < NEAR
    return -p.ratio - p.lone, jnp.where(near, (p.ratio + q.ratio) / 2, 0)


def _swapped(function):
    def swapped(x, *numbers):
        return function(Distributions(x.probabilities[::-1], x.logs[::-1], -x.ratio), *numbers)

    return swapped


def _mean(f, g):
    return lambda x, *numbers: (f(x, *numbers) + g(x, *numbers)) / 2


def _directions(forward: Formula) -> dict[Direction, Formula]:
    """A divergence of P and Q, that of Q and P, and the mean of the two."""
    reverse = _reversed(forward)
    return {"forward": forward, "reverse": reverse, "symmetric": _mean_of(forward, reverse)}


def _reversed(formula: Formula) -> Formula:
    sums = formula.slope_sums
    return Formula(
        _swapped(formula.term),
        tuple(map(_swapped, reversed(formula.slopes))),
        tuple(x._replace(slope=_swapped(x.slope)) for x in formula.parameters),
        tuple(map(_swapped, reversed(formula.slopes_of_logits))),
        sums and (lambda p, q: sums(*(x._replace(ratio=-x.ratio) for x in (q, p)))[::-1]),
    )


def _mean_of(one: Formula, other: Formula) -> Formula:
    parameters = zip(one.parameters, other.parameters, strict=True)
    return Formula(
        _mean(one.term, other.term),
        tuple(map(_mean, one.slopes, other.slopes)),
        tuple(x._replace(slope=_mean(x.slope, y.slope)) for x, y in parameters),
        tuple(map(_mean, one.slopes_of_logits, other.slopes_of_logits)),
        one.slope_sums and other.slope_sums and _mean_of_each(one.slope_sums, other.slope_sums),
    )


def _mean_of_each(f, g):
    return lambda *x: tuple((a + b) / 2 for a, b in zip(f(*x), g(*x), strict=True))


KL = _directions(
    Formula(
        _kl_term,
        (_kl_slope_p, _kl_slope_q),
        (),
        (_kl_centred_p, _kl_centred_q),
        _kl_slope_sums,
    )
)


# Jensen-Shannon, of the mixture m = b p + c q with c = 1 - b.


def _mixture_share(d, b, c):
    """The share of Q in the mixture, c q / m."""
    return lax.logistic(jnp.clip(d, -MOST, MOST) + jnp.log(c) - jnp.log(b))


def _over_mixture(d, b, c):
    """P / m, which is p / q where the mixture is Q."""
    none = b == 0
    return jnp.where(none, jnp.exp(-d), _mixture_share(-d, c, b) / jnp.where(none, 1, b))


@elementwise_derivatives(_mixture_share, _over_mixture, lambda d, b, c: _over_mixture(-d, c, b))
def _log_mixture(d, b, c):
    """Log m - log p, where d = log q - log p."""
    to_q = jnp.where(d < -INFINITE, -jnp.inf, jnp.minimum(d, MOST))
    near = jnp.log1p(c * jnp.expm1(jnp.minimum(d, LARGE)))
    # Where the former would overflow, or cancel: elsewhere the log of b may be too near to 0.
    far = (d > LARGE) | ((d < -1) & (c > 0.5))
    at_p, at_q = jnp.log(b), jnp.log(c) + jnp.clip(d, -MOST, MOST)
    sum_of_both = jnp.maximum(at_p, at_q) + jnp.log(1 + jnp.exp(-jnp.abs(at_p - at_q)))
    ratio = jnp.where(b == 0, to_q, jnp.where(far, sum_of_both, near))
    return jnp.where(c == 0, 0, ratio)


def _js_term(x, b):
    (p, q), d, c = x.probabilities, x.ratio, 1 - b
    m = b * p + c * q
    term_p = _generalised_term(p, m, _log_mixture(d, b, c))
    term_q = _generalised_term(q, m, _log_mixture(-d, c, b))
    return jnp.where((b == 0) | (b == 1), 0, b * term_p + c * term_q)


def _to_mixture(weight, p, d, b, c):
    """Weight x p log(m / p), 0 at p = 0, where the ratio may be infinite."""
    return jnp.where(p > 0, weight * p * _log_mixture(d, b, c), 0)


def _js_slope_p(x, b):
    p, _ = x.probabilities
    return jnp.where(b == 0, 0, _to_mixture(-b, p, x.ratio, b, 1 - b))


def _js_slope_q(x, b):
    _, q = x.probabilities
    return jnp.where(b == 1, 0, _to_mixture(b - 1, q, -x.ratio, 1 - b, b))


def _js_slope_b(x, b):
    """The term of KL(P||M) - KL(Q||M): what m gains cancels in the sum over classes."""
    p, q = x.probabilities
    return _to_mixture(1, q, -x.ratio, 1 - b, b) - _to_mixture(1, p, x.ratio, b, 1 - b)


JS = Formula(_js_term, (_js_slope_p, _js_slope_q), (Parameter("mixture", _js_slope_b, UNIT),))


# Skewed Kullback-Leibler, from P to the mixture m = b p + c q with c = 1 - b; at b = 0, to the bit,
# that to Q.


def _skewed_term(x, b):
    p, q = x.probabilities
    return _generalised_term(p, b * p + (1 - b) * q, _log_mixture(x.ratio, b, 1 - b))


def _skewed_slope_p(x, b):
    p, _ = x.probabilities
    ratio = _log_mixture(x.ratio, b, 1 - b)
    share = _mixture_share(x.ratio, b, 1 - b)
    return p * (share - jnp.where(jnp.abs(ratio) > INFINITE, share, ratio))


def _skewed_slope_q(x, b):
    p, _ = x.probabilities
    return -p * _mixture_share(x.ratio, b, 1 - b)


def _skewed_centred_p(x, b):
    to_mixture = Distributions(x.probabilities, x.logs, _log_mixture(x.ratio, b, 1 - b))
    share = _mixture_share(-x.ratio, 1 - b, b)
    return (1 - b) * share * _kl_centred_q(x) + _kl_centred_p(to_mixture)


def _skewed_centred_q(x, b):
    return (1 - b) * _mixture_share(x.ratio, b, 1 - b) * _kl_centred_q(x)


def _skewed_slope_b(x, b):
    """-c (q - p)^2 / m; 0 where it is infinite."""
    d, c = x.ratio, 1 - b
    # Of the two forms the one that does not cancel.
    at_p = jnp.expm1(jnp.minimum(d, 0)) * _over_mixture(jnp.minimum(d, 0), b, c)
    at_q = -jnp.expm1(-jnp.maximum(d, 0)) * _over_mixture(-jnp.maximum(d, 0), c, b)
    over_mixture = at_p + at_q
    return -c * _kl_centred_q(x) * jnp.where(jnp.isinf(over_mixture), 0, over_mixture)


SKEWED_KL = _directions(
    Formula(
        _skewed_term,
        (_skewed_slope_p, _skewed_slope_q),
        (Parameter("skew", _skewed_slope_b, UNIT),),
        (_skewed_centred_p, _skewed_centred_q),
    )
)


def kl_formula(
    direction: Direction, skew: ArrayLike | None, floor: ArrayLike | None
) -> tuple[Formula, dict[str, ArrayLike]]:
    """The formula of a Kullback-Leibler divergence, and its numbers; plain without options."""
    if skew is None or (isinstance(skew, (int, float)) and skew == 0):
        return with_floor(KL[direction], floor)
    return with_floor(SKEWED_KL[direction], floor, skew=skew)


def with_floor(
    formula: Formula, floor: ArrayLike | None, **numbers: ArrayLike
) -> tuple[Formula, dict[str, ArrayLike]]:
    """A formula and its numbers, with a floor if there is one."""
    if floor is None:
        return formula, numbers
    return formula._replace(floored=True), numbers | {"floor": floor}


def _alpha_near(d, b):
    """The term over p d^2, and its derivative in b: d^k goes with the sum of b^j up to j = k."""
    power, each, each_slope, total, slope = 1.0, 1.0, 0.0, 0.0, 0.0
    for k in range(18):
        total += each * (1 / math.factorial(k + 2))
        slope += each_slope * (1 / math.factorial(k + 2))
        power *= d
        each, each_slope = power + b * d * each, d * (each + b * each_slope)
    return total, slope


def _moved_b(log_p, d, b):
    t = b * d
    small = jnp.abs(t) < 1
    near = jnp.exp(log_p + t) * jnp.square(d) * _alpha_near(jnp.where(small, -t, 0), 0.0)[0]
    far = jnp.exp(log_p) + jnp.exp(log_p + t) * (t - 1)
    return jnp.where(small, near, far / jnp.square(jnp.where(small, 1, b)))


@elementwise_derivatives(lambda *x: -_alpha_slope(*x), lambda l, d, b: jnp.exp(l + b * d), _moved_b)
def _moved(log_p, d, b):
    """What p^a q^b is above p, over b; it tends to p d."""
    p, t, divisor = jnp.exp(log_p), b * d, jnp.where(b == 0, 1, b)
    small = jnp.abs(t) < 1
    near = p * jnp.where(b == 0, d, jnp.expm1(jnp.where(small, t, 0)) / divisor)
    return jnp.where(small, near, (jnp.exp(log_p + t) - p) / divisor)


def _finite(ratio):
    return jnp.where(jnp.abs(ratio) > INFINITE, jnp.sign(ratio) * MOST, ratio)


def _alpha(x, a):
    """The term of (a p + b q - p^a q^b) / (a b), and its derivative in a; swapped for a < 1/2."""
    swap = a < 0.5
    p, q = (jnp.where(swap, *pair) for pair in (x.probabilities[::-1], x.probabilities))
    log_p, ratio = jnp.where(swap, *x.logs[::-1]), jnp.where(swap, -x.ratio, x.ratio)
    a, b = (jnp.where(swap, *pair) for pair in ((1 - a, a), (a, 1 - a)))
    d = _finite(ratio)
    near = jnp.maximum(1, jnp.abs(b)) * jnp.abs(d) < 1
    size, size_slope = (p * jnp.square(d) * y for y in _alpha_near(jnp.where(near, d, 0), b))
    lone = (ratio < -INFINITE) & (b <= 0)
    far = (q - p - jnp.where(lone, -jnp.inf, _moved(log_p, d, b))) / a
    far_slope = jnp.where(jnp.isinf(far), 0, (_moved_b(log_p, d, b) - far) / a)
    return jnp.where(near, size, far), (1 - 2 * swap) * jnp.where(near, -size_slope, far_slope)


def _alpha_slope(log_p, ratio, b) -> Array:
    """-p times e^(b d) - 1 over b, which is taken to be 1 where it is infinite: as for KL."""
    d = _finite(ratio)
    infinite = ((ratio < -INFINITE) & (b <= 0)) | jnp.isinf(_moved(log_p, d, b))
    return -jnp.where(infinite, jnp.exp(log_p), _moved(log_p, jnp.where(infinite, 0, d), b))


ALPHA = Formula(
    lambda x, a: _alpha(x, a)[0],
    (
        lambda x, a: _alpha_slope(x.logs[0], x.ratio, 1 - a),
        lambda x, a: _alpha_slope(x.logs[1], -x.ratio, a),
    ),
    (Parameter("alpha", lambda x, a: _alpha(x, a)[1], FINITE),),
)


# Of one distribution.


def _surprise(x):
    (p,), (log_p,) = x.probabilities, x.logs
    # Where logits are computed again for each pass over them, a normaliser may be below its own.
    return -p * jnp.where(log_p < -MOST, 0, jnp.minimum(log_p, 0))


def _surprise_slope(x):
    (p,), (log_p,) = x.probabilities, x.logs
    return -p * (jnp.where(log_p < -MOST, 0, log_p) + 1)


ENTROPY = Formula(
    _surprise, (_surprise_slope,), (), (_surprise,), slope_sums=lambda mean: (-mean.ratio,)
)


def _surprise_of_label(x, _):
    return jnp.where(x.label, -x.logs[0], 0)


def _surprise_of_label_slope(x, _):
    return jnp.where(x.label, -jnp.ones_like(x.logs[0]), 0)


def _z_loss_slope(x, _):
    """The square of the log-normaliser, shared out among the classes."""
    return x.probabilities[0] * jnp.square(x.log_normaliser)


CROSS_ENTROPY = Formula(
    _surprise_of_label,
    (_surprise_of_label_slope,),
    (Parameter("z_loss", _z_loss_slope, NONNEGATIVE),),
    # Without a z-loss a normaliser may be as large as it likes.
    of_normaliser=lambda log, z_loss: z_loss * jnp.square(jnp.where(z_loss == 0, 0, log)),
)


def _nothing(x):
    return jnp.zeros_like(x.logs[0])


Z_LOSS = Formula(_nothing, (_nothing,), of_normaliser=jnp.square)
