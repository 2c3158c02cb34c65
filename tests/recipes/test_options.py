import dataclasses
import math
from pathlib import Path

import numpy as np
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
        (Weighted(seed=2**32), "--seed must be at most 4294967295, not 4294967296"),
        (Weighted(steps=2**31), "--steps must be at most 2147483647, not 2147483648"),
        (Weighted(steps=10**400), "--steps must be at most"),
        (Weighted(log_every=-(10**400)), "--log-every must be a finite number"),
        (Weighted(layers=1001), "--layers must be at most 1000"),
        (Weighted(weights=(1e39,)), r"--weights must be at most 3.40\d*e\+38, not 1e\+39"),
        (Weighted(weights=(1e-39,)), r"--weights must be at least 1.17\d*e-38, not 1e-39"),
        (Weighted(out=Path("a\0b")), "can't write to the folder a\0b: .*embedded null"),
        (Weighted(out=Path("a\udcffb")), "can't write to the folder .* surrogates"),
        (Weighted(out=Path("x" * 256)), "can't write .* File name too long"),
        (Weighted(out=Path("missing", "x" * 256)), "can't write .* File name too long"),
        (Weighted(out=Path("/".join(["x" * 250] * 16))), "can't write .* File name too long"),
        (Weighted(out=Path(__file__)), "can't write .* Not a directory"),
        (Weighted(width=10, heads=4), "--width must be a multiple of --heads, not 10 of 4"),
        (Weighted(resume=True, overwrite=True), "--resume continues .* --overwrite starts over"),
    ],
)
def test_options_that_cannot_be_run(options, problem):
    check_options(Weighted(), members=1, may_be_zero=["weights"])
    with pytest.raises(UsageError, match=problem):
        check_options(options, members=1, may_be_zero=["weights"])


def test_zero_is_allowed_by_name_only():
    check_options(Weighted(weights=(1.0,)), members=1)
    with pytest.raises(UsageError, match="--weights must be a finite number above 0, not 0"):
        check_options(Weighted(), members=1)


def test_members_are_bounded():
    options = Weighted(weights=(1.0,))
    check_options(options, members=10_000)
    with pytest.raises(UsageError, match="at most 10000 members train at once, not 10001"):
        check_options(options, members=10_001)


def test_the_last_number_of_a_range_is_in_it():
    float32 = np.finfo(np.float32)
    weights = (float(float32.tiny), float(float32.max))
    options = Weighted(seed=2**32 - 1, steps=2**31 - 1, layers=1000, weights=weights)
    check_options(options, members=1)
