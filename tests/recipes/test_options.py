import dataclasses
import math

import pytest

from penalties_jax.recipes.options import Options, UsageError, check_options


@dataclasses.dataclass(frozen=True)
class Weighted(Options):
    steps: int | None = None
    name: str = "a"
    weights: tuple[float, ...] = (0.0, 1.0)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (Weighted(steps=0), "--steps must be a finite number above 0, not 0"),
        (Weighted(log_every=-1), "--log-every must be a finite number above 0, not -1"),
        (Weighted(weights=(0.0, -1.0)), "--weights must be .* 0 or above, not -1.0"),
        (Weighted(weights=(math.nan,)), "--weights .* not nan"),
        (Weighted(weights=(math.inf,)), "--weights .* not inf"),
        (Weighted(weights=()), "--weights needs at least one value, all different"),
        (Weighted(weights=(1.0, 1.0)), "--weights needs at least one value, all different"),
        (Weighted(seed=-1), "--seed must be .* 0 or above"),
        (Weighted(seed=2**32), "--seed must be below"),
        (Weighted(width=10, heads=4), "--width must be a multiple of --heads, not 10 of 4"),
        (Weighted(resume=True, overwrite=True), "--resume continues .* --overwrite starts over"),
    ],
)
def test_options_that_cannot_be_run(options, problem):
    check_options(Weighted(), may_be_zero=["weights"])
    with pytest.raises(UsageError, match=problem):
        check_options(options, may_be_zero=["weights"])


def test_zero_is_allowed_by_name_only():
    check_options(Weighted(weights=(1.0,)))
    with pytest.raises(UsageError, match="--weights must be a finite number above 0, not 0"):
        check_options(Weighted())
