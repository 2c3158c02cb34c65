"""The resolvent's diagonal: time beside the textbook recursion, growth with n, and errors.

The matrices have the diagonal -2 + v, v a normal draw clipped to [-3, 3], and couplings of 1; z is
i. A time of ours is that of the value and of the gradient with respect to diagonal and couplings,
in float32, compiled. The peer is the recursion of determinants
theta_k = (a_k - z) theta_{k-1} - b_{k-1} c_{k-1} theta_{k-2}, phi_k the same from the other end and
G_kk = theta_{k-1} phi_{k+1} / theta_n, as a Python loop in torch, in complex128, without gradient:
as it is usually written, filling tensors entry by entry, and as fast as we could make the loop,
with lists, the indexing hoisted and in inference mode.
"""

import importlib
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex, Float

import penalties_jax as pj
from benchmarks.harness import (
    BAR,
    OURS,
    PEER,
    Spread,
    compiled,
    figure,
    measure,
    ratio,
    save,
    spread,
    table,
    verdict,
    write_json,
)

BATCH, Z = 8, 1j
SIZE = 1024
SIZES, QUICK_SIZES = [2**k for k in range(9, 18)], [2**k for k in range(9, 14)]
METHODS = ("scan", "associative_scan")
# The associative scan is timed at every fourth size: XLA takes most of a minute to compile each.
TREE_EVERY = 4
ROUNDS = 25
NO_PEER = "torch is not installed (it comes with the extra `bench` on Python 3.11): no peer."

# How often our value and gradient fit into the peer's value, at least; the growth of their time
# with n, as the slope in logarithms, at most.
SPEED_BAR, SLOPE_BAR = 100, 1.1

# Where errors are measured: beside a dense inverse, and beside the ratios in float64.
PEER_DENSE, DENSE, LONG = 256, 512, 100_000


class Timing(NamedTuple):
    """The time of the value and the gradient of one method at one size."""

    size: int
    method: str
    milliseconds: Spread
    over_scan: Spread


class Check(NamedTuple):
    """What of one result is finite, and the largest error of it relative to a reference."""

    what: str
    size: int
    reference: str
    error: float | None
    lost: int
    values: int


def run(*, quick: bool, out: Path) -> str:
    """Measures times and errors; writes resolvent.json and resolvent.png; returns the tables."""
    try:
        torch = importlib.import_module("torch")
    except ImportError:
        torch = None
    rival, rivals = _rival(torch) if torch else (None, {})
    timings, seconds = _timings(QUICK_SIZES if quick else SIZES)
    scan = [timing for timing in timings if timing.method == "scan"]
    slope, offset = np.polyfit(
        np.log([timing.size for timing in scan]),
        np.log([timing.milliseconds.median for timing in scan]),
        1,
    )
    checks = [*_checks(), *(_peer_checks(torch) if torch else [])]
    write_json(
        out / "resolvent.json",
        {
            "torch": torch and {"version": torch.__version__, "threads": torch.get_num_threads()},
            "peer": rival,
            "slope": slope,
            "timings": [timing._asdict() for timing in timings],
            "checks": [check._asdict() for check in checks],
            "seconds": {"peer": rivals, **seconds},
        },
    )
    _plot(timings, rival, slope, offset, out / "resolvent.png")
    return "\n\n".join(
        [
            f"value and gradient of `resolvent_diagonal`, batch {BATCH}, float32",
            table(_rival_rows(rival, torch)) if rival else NO_PEER,
            table(_timing_rows(timings)),
            f"time of the scan in proportion to n^{slope:.2f}; "
            f"bar {SLOPE_BAR:g}: {verdict(met=slope <= SLOPE_BAR)}",
            table([_check_row(check) for check in checks]),
        ]
    )


def problem(
    n: int,
) -> tuple[
    Float[np.ndarray, "batch n"],
    Float[np.ndarray, "batch n-1"],
    Complex[np.ndarray, "batch n"],
]:
    """A diagonal, couplings and a cotangent, all in float32 or complex64."""
    rng = np.random.default_rng(n)
    diagonal = -2 + np.clip(rng.standard_normal((BATCH, n)), -3, 3)
    cotangent = rng.standard_normal((BATCH, n)) + 1j * rng.standard_normal((BATCH, n))
    couplings = np.ones((BATCH, n - 1), np.float32)
    return diagonal.astype(np.float32), couplings, cotangent.astype(np.complex64)


def value_and_gradient(
    diagonal: Float[Array, "batch n"],
    couplings: Float[Array, "batch n-1"],
    cotangent: Complex[Array, "batch n"],
    *,
    method: Any = "auto",
) -> tuple[Complex[Array, "batch n"], Float[Array, "batch n"], Float[Array, "batch n-1"]]:
    """G, and what the cotangent is pulled back to."""
    function = partial(pj.resolvent_diagonal, z=Z, method=method)
    value, pull = jax.vjp(function, diagonal, couplings)
    return value, *pull(cotangent)


def determinants(torch: Any, diagonal: Any, couplings: Any) -> Any:
    """The peer: G from the determinants of leading and trailing blocks, filled in a loop over k."""
    batch, n = diagonal.shape
    theta = torch.zeros(batch, n + 1, dtype=torch.complex128)
    phi = torch.zeros(batch, n + 1, dtype=torch.complex128)
    d = diagonal - Z
    theta[:, 0], theta[:, 1] = 1, d[:, 0]
    for k in range(1, n):
        theta[:, k + 1] = d[:, k] * theta[:, k] - couplings[:, k - 1] * theta[:, k - 1]
    phi[:, n], phi[:, n - 1] = 1, d[:, n - 1]
    for k in range(n - 2, -1, -1):
        phi[:, k] = d[:, k] * phi[:, k + 1] - couplings[:, k] * phi[:, k + 2]
    return theta[:, :-1] * phi[:, 1:] / theta[:, -1:]


def hoisted(torch: Any, diagonal: Any, couplings: Any) -> Any:
    """The same from lists, with every index outside of the loop and nothing kept for autograd."""
    with torch.inference_mode():
        d, products = (diagonal - Z).unbind(-1), couplings.unbind(-1)
        theta = _determinants(torch, d, products)
        phi = _determinants(torch, d[::-1], products[::-1])[::-1]
        return torch.stack(theta[:-1], -1) * torch.stack(phi[1:], -1) / theta[-1][:, None]


def _determinants(torch, d, products):
    """1, theta_1, ..., theta_n."""
    theta = [torch.ones_like(d[0]), d[0]]
    for entry, product in zip(d[1:], products, strict=True):
        theta.append(entry * theta[-1] - product * theta[-2])
    return theta


def _peer(torch, n, function=determinants):
    """The peer on the matrices of size n, as a function without arguments."""
    diagonal, couplings = (torch.from_numpy(x).to(torch.complex128) for x in problem(n)[:2])
    return partial(function, torch, diagonal, couplings)


@cache
def _ours(n, method="auto"):
    return compiled(partial(value_and_gradient, method=method), *map(jnp.asarray, problem(n)))


def _rival(torch):
    """Value and gradient of ours beside the value of the peer, in the same rounds."""
    programs: dict[str, Callable[[], Any]] = {
        "ours": _ours(SIZE),
        "peer": _peer(torch, SIZE),
        "peer, hoisted": _peer(torch, SIZE, hoisted),
    }
    seconds = measure(programs, rounds=ROUNDS, label=f"n = {SIZE}", warmup=5)
    result = {name: spread(1e3 * times) for name, times in seconds.items()}
    speed = {name: ratio(times, seconds["ours"]) for name, times in seconds.items()}
    return {**result, "speed": speed}, seconds


def _timings(sizes):
    timings, seconds = [], {}
    for i, n in enumerate(sizes):
        methods = METHODS if i % TREE_EVERY == 0 else METHODS[:1]
        programs = {method: _ours(n, method) for method in methods}
        times = measure(programs, rounds=ROUNDS, label=f"n = {n}")
        seconds[str(n)] = times
        timings += [
            Timing(n, method, spread(1e3 * times[method]), ratio(times[method], times["scan"]))
            for method in methods
        ]
    return timings, seconds


def _checks():
    """Errors of ours: of either method beside the dense inverse, of the scan at the large size."""
    checks = []
    for n, name, reference in ((DENSE, "dense inverse", _dense), (LONG, "ratios", _ratios)):
        diagonal, _, cotangent = problem(n)
        expected = reference(diagonal, cotangent)
        for method in METHODS if n == DENSE else METHODS[:1]:
            program = _ours(n, method)
            results = program.call(*program.arguments)
            for what, result, wanted in zip(
                ("value", "gradient, diagonal", "gradient, couplings"),
                results,
                expected,
                strict=False,
            ):
                label = f"ours, {method}: {what}"
                # A gradient has zeros: its errors are relative to its largest entry.
                checks.append(_check(label, n, name, result, wanted, entrywise=what == "value"))
            if len(expected) < len(results):
                flat = np.concatenate([np.ravel(x) for x in results[len(expected) :]])
                checks.append(_check(f"ours, {method}: gradient", n, "", flat, None))
    return checks


def _peer_checks(torch):
    diagonal, _, cotangent = problem(PEER_DENSE)
    value = _dense(diagonal, cotangent)[0]
    small, large = _peer(torch, PEER_DENSE)().numpy(), _peer(torch, SIZE)().numpy()
    return [
        _check("peer: value", PEER_DENSE, "dense inverse", small, value),
        _check("peer: value", SIZE, "", large, None),
    ]


def _check(what, size, reference, result, expected, *, entrywise=True):
    result = np.asarray(result)
    lost = int(np.sum(~np.isfinite(result)))
    error = None
    if expected is not None:
        scale = np.abs(expected) if entrywise else np.max(np.abs(expected))
        error = float(np.max(np.abs(result - expected) / scale))
    return Check(what, size, reference, error, lost, result.size)


def _dense(diagonal, cotangent):
    """G_kk and its gradients, from numpy's dense inverse in complex128; the couplings are 1."""
    n = diagonal.shape[-1]
    off = np.eye(n, k=1) + np.eye(n, k=-1)
    inverse = np.linalg.inv(
        diagonal.astype(np.float64)[:, :, None] * np.eye(n) + off - Z * np.eye(n)
    )
    value = np.diagonal(inverse, axis1=-2, axis2=-1)
    # dG_kk / da_j = -G_kj G_jk, and dG_kk / d(b_j c_j) = -G_kj G_{j+1,k}: G is symmetric.
    by_diagonal = -np.einsum("bk,bkj->bj", cotangent, inverse**2).real
    by_couplings = -np.einsum("bk,bkj->bj", cotangent, inverse[..., :-1] * inverse[..., 1:]).real
    return value, by_diagonal, by_couplings


def _ratios(diagonal, _):
    """G_kk by the recursion of ratios in complex128, a numpy loop; the couplings are 1."""
    shifted = diagonal.astype(np.float64).T - Z

    def ratios(shifted):
        result = shifted.copy()
        for k in range(1, len(result)):
            result[k] -= 1 / result[k - 1]
        return result

    return ((1 / (ratios(shifted) + ratios(shifted[::-1])[::-1] - shifted)).T,)


def _rival_rows(rival, torch):
    texts = {
        "ours": "ours: value and gradient, float32",
        "peer": f"peer: value alone, complex128, torch {torch.__version__}",
        "peer, hoisted": "the same, lists, indexing hoisted, inference mode",
    }
    return [
        {
            f"n = {SIZE:,}": text,
            "ms": rival[name].text(2 if name == "ours" else 1),
            "over ours": "1" if name == "ours" else rival["speed"][name].text(0),
            "bar": f"{SPEED_BAR}: {verdict(met=rival['speed'][name].median >= SPEED_BAR)}"
            if name == "peer"
            else "",
        }
        for name, text in texts.items()
    ]


def _timing_rows(timings):
    trees = {timing.size: timing for timing in timings if timing.method != "scan"}
    return [
        {
            "n": f"{scan.size:,}",
            "scan, ms": scan.milliseconds.text(),
            "associative scan, ms": tree.milliseconds.text(1) if tree else "",
            "over the scan": tree.over_scan.text(1) if tree else "",
        }
        for scan in timings
        if scan.method == "scan"
        for tree in [trees.get(scan.size)]
    ]


def _check_row(check):
    return {
        "result": check.what,
        "n": f"{check.size:,}",
        "not finite": f"{check.lost:,} of {check.values:,}",
        "largest relative error": "" if check.error is None else f"{check.error:.1e}",
        "reference": check.reference,
    }


def _plot(timings, rival, slope, offset, path):
    drawing, (ax,) = figure(1, width=7, height=3.6)
    for method, colour, marker in zip(METHODS, (OURS, PEER), ("o", "s"), strict=True):
        chosen = [timing for timing in timings if timing.method == method]
        ax.errorbar(
            [timing.size for timing in chosen],
            [timing.milliseconds.median for timing in chosen],
            yerr=np.hstack([timing.milliseconds.error for timing in chosen]),
            fmt=marker,
            markersize=6,
            color=colour,
            label=f'method="{method}"',
        )
    sizes = np.array([timings[0].size, timings[-1].size])
    ax.plot(
        sizes,
        np.exp(offset) * sizes**slope,
        color=OURS,
        linewidth=1,
        zorder=1,
        label=f"fit to the scan: slope {slope:.2f}",
    )
    if rival:
        ax.errorbar(
            [SIZE],
            [rival["peer"].median],
            yerr=rival["peer"].error,
            fmt="D",
            markersize=6,
            color=BAR,
            label="determinants in torch,\nvalue alone",
        )
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ticks = sorted({timing.size for timing in timings})
    ax.set_xticks(ticks, [f"{n:,}" if n < 1024 else f"{n // 1024}K" for n in ticks])
    ax.set_xlabel("n")
    ax.set_ylabel("ms")
    ax.yaxis.set_major_formatter("{x:g}")
    ax.set_title(f"value and gradient of resolvent_diagonal, batch {BATCH}, float32", fontsize=11)
    ax.grid(color="#dddddd", linewidth=0.6)
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=9)
    save(drawing, path)
