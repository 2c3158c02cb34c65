"""What a bug report needs: versions, devices, settings, and how right compiled functions are."""

import dataclasses
import os
import platform
import sys
from collections import Counter
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

import jax
import jax.numpy as jnp
import numpy as np

import penalties_jax as pj
from penalties_jax.recipes.memory import device_memory, host_memory, in_words

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")
FLAGS = (
    "jax_enable_x64",
    "jax_default_matmul_precision",
    "jax_default_prng_impl",
    "jax_numpy_dtype_promotion",
    "jax_disable_jit",
    "jax_debug_nans",
)
# Compiled float32, and the transcendental functions of accelerators, stay well within.
TOLERANCE = 1e-4
# Of five-point differences in float64: small beside the distance of every input from a kink.
STEP = 1e-4


@dataclasses.dataclass(frozen=True)
class DoctorConfig:
    """Print what a bug report needs, and check that compiled functions are right on this machine.

    Exit code 1 if one is not.
    """


@dataclasses.dataclass(frozen=True)
class Check:
    """A function as it is compiled, the same in NumPy's float64, and the shape of its input."""

    ours: Callable[[jax.Array], jax.Array]
    oracle: Callable[[np.ndarray], np.ndarray | np.floating]
    shape: tuple[int, ...] = (4, 6)


def _log_softmax(x: np.ndarray) -> np.ndarray:
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def _kl(p: np.ndarray, q: np.ndarray) -> np.floating:
    log_p, log_q = _log_softmax(p), _log_softmax(q)
    return (np.exp(log_p) * (log_p - log_q)).sum(-1).mean()


def _js(p: np.ndarray, q: np.ndarray) -> np.floating:
    p, q = np.exp(_log_softmax(p)), np.exp(_log_softmax(q))
    m = (p + q) / 2
    return (p * np.log(p / m) + q * np.log(q / m)).sum(-1).mean() / 2


def _importance(c: np.ndarray) -> np.floating:
    total = (c**2 / (c**2 + 0.3**2)).sum(0)
    return (total / len(c) * (1 + 0.5 * np.log2(1 + total))).sum()


def _resolvent(diagonal: np.ndarray, off_diagonal: np.ndarray) -> np.ndarray:
    matrix = np.diag(diagonal - 1j) + np.diag(off_diagonal, 1) + np.diag(off_diagonal, -1)
    inverse = np.linalg.inv(matrix).diagonal()
    return np.stack([inverse.real, inverse.imag])


def _split_complex(x: jax.Array) -> jax.Array:
    return jnp.stack([x.real, x.imag])


# Of hidden states [4, 3] and a kernel [3, 6] in one array, beside a fixed reference.
REFERENCE = np.linspace(-1, 1, 30)
STEPS = np.arange(0, 100, 9)

CHECKS = {
    "l1": Check(pj.l1, lambda x: abs(x).sum()),
    "lp": Check(lambda x: pj.lp(x, 0.5), lambda x: np.sqrt(abs(x)).sum()),
    "smooth_l0": Check(lambda x: pj.smooth_l0(x, 0.3), lambda x: (x**2 / (x**2 + 0.09)).sum()),
    "kl_divergence": Check(
        lambda x: pj.kl_divergence(*jax.nn.log_softmax(x)), lambda x: _kl(*x), (2, 4, 6)
    ),
    "kl_from_logits": Check(lambda x: pj.kl_from_logits(*x), lambda x: _kl(*x), (2, 4, 6)),
    "js_from_logits": Check(lambda x: pj.js_from_logits(*x), lambda x: _js(*x), (2, 4, 6)),
    "entropy_from_logits": Check(
        pj.entropy_from_logits,
        lambda x: -(np.exp(_log_softmax(x)) * _log_softmax(x)).sum(-1).mean(),
    ),
    "linear_kl": Check(
        lambda x: pj.linear_kl(
            x[:12].reshape(4, 3),
            x[12:].reshape(3, 6),
            jnp.asarray(REFERENCE[:12].reshape(4, 3), x.dtype),
            jnp.asarray(REFERENCE[12:].reshape(3, 6), x.dtype),
        ),
        lambda x: _kl(
            x[:12].reshape(4, 3) @ x[12:].reshape(3, 6),
            REFERENCE[:12].reshape(4, 3) @ REFERENCE[12:].reshape(3, 6),
        ),
        (30,),
    ),
    "importance_minimality": Check(
        lambda x: pj.importance_minimality(x**2, pj.SmoothL0(gamma=0.3), beta=0.5).total,
        lambda x: _importance(x**2),
    ),
    "resolvent_diagonal": Check(
        lambda x: _split_complex(pj.resolvent_diagonal(x[0], x[1, :-1] ** 2)),
        lambda x: _resolvent(x[0], x[1, :-1]),
        (2, 8),
    ),
    "prox of group_lasso": Check(
        lambda x: pj.GroupLasso(axis=-1).prox(x, 0.3),
        lambda x: x * np.maximum(0, 1 - 0.3 / np.sqrt((x**2).sum(-1, keepdims=True))),
    ),
    "anneal": Check(
        lambda x: pj.anneal(x[0], x[1], start=0, end=90, shape="cosine")(jnp.asarray(STEPS)),
        lambda x: x[0] + (x[1] - x[0]) * (1 - np.cos(np.pi * np.minimum(STEPS / 90, 1))) / 2,
        (2,),
    ),
}


def doctor(config: DoctorConfig) -> None:
    """Print ten lines: what is installed, on what it runs, and how the checks went.

    Raises:
        SystemExit: With code 1 if a check has failed.
    """
    del config  # It has no options.
    errors = {name: _outcome(check) for name, check in CHECKS.items()}
    failed = [name for name, error in errors.items() if not _passed(error)]
    lines = {
        "penalties-jax": pj.__version__,
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "packages": ", ".join(f"{name} {_version(name)}" for name in PACKAGES),
        "platform": ", ".join(
            [platform.platform(), f"{os.cpu_count()} processors", in_words(host_memory())]
        ),
        "devices": _devices(),
        "dtypes": f"{jnp.result_type(float)} by default",
        "config": ", ".join(f"{name}={getattr(jax.config, name)}" for name in FLAGS),
        "environment": ", ".join(
            f"{name}={value!r}"
            for name, value in sorted(os.environ.items())
            if name == "XLA_FLAGS" or name.startswith("JAX_")
        )
        or "no XLA_FLAGS, no JAX_*",
        "errors": ", ".join(
            f"{name} {error if isinstance(error, str) else format(error, '.0e')}"
            for name, error in errors.items()
        ),
        "verdict": (
            f"FAILED: {', '.join(failed)}"
            if failed
            else f"ok: value and gradient of {len(errors)} compiled functions are those of NumPy"
        ),
    }
    for name, line in lines.items():
        print(f"{name:14}{' '.join(line.split())}")
    if failed:
        sys.exit(1)


def largest_error(check: Check) -> float:
    """Return how far value and gradient are from the oracle's, relative to the largest of each.

    Of what has several values the gradient is that of a weighted sum.
    """
    # Odd multiples of 1/64: exact in float32, and off every kink.
    x = (2 * np.random.default_rng(0).integers(-64, 64, check.shape) + 1) / 64

    def weigh(values):
        return (values * np.cos(np.arange(values.size)).reshape(values.shape)).sum()

    @jax.jit
    def ours(x):
        return check.ours(x), jax.grad(lambda x: weigh(check.ours(x)))(x)

    with jax.default_matmul_precision("highest"):
        found = ours(jnp.asarray(x, jnp.result_type(float)))
    expected = check.oracle(x), _gradient(lambda x: weigh(np.asarray(check.oracle(x))), x)
    return max(
        float(np.max(abs(np.asarray(a, np.float64) - b)) / np.max(abs(b)))
        for a, b in zip(found, expected, strict=True)
    )


def _gradient(function: Callable[[np.ndarray], float], x: np.ndarray) -> np.ndarray:
    """The gradient by five-point differences."""

    def difference(index: tuple[int, ...], steps: int) -> float:
        ahead, behind = x.copy(), x.copy()
        ahead[index] += steps * STEP
        behind[index] -= steps * STEP
        return function(ahead) - function(behind)

    slopes = [(8 * difference(i, 1) - difference(i, 2)) / (12 * STEP) for i in np.ndindex(x.shape)]
    return np.reshape(slopes, x.shape)


def _outcome(check: Check) -> float | str:
    try:
        return largest_error(check)
    except Exception as error:  # Whatever is wrong with this machine, the report says it.
        return _in_short(error)


def _passed(outcome: float | str) -> bool:
    return not isinstance(outcome, str) and outcome <= TOLERANCE


def _devices() -> str:
    try:
        devices = jax.local_devices()
    except RuntimeError as error:
        return f"none: {_in_short(error)}"
    kinds = Counter((device.platform, device.device_kind) for device in devices)
    named = [f"{count} x {platform} ({kind})" for (platform, kind), count in kinds.items()]
    return f"{', '.join(named)}, {in_words(device_memory())} each"


def _in_short(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:200]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
