"""The programs of `benchmarks.gpu` in PyTorch and by Liger-Kernel, under the same names.

Tensors share memory with the arrays of jax that they are of, and a call gives the value and the
gradients, in the order of the arguments. To be imported only where PyTorch is installed.
"""

import gc
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from shutil import which
from typing import Any

import jax

from benchmarks import accelerators, penalties

torch: Any = import_module("torch")

EAGER, COMPILED, LIGER = "torch, eager", "torch.compile", "Liger-Kernel"


def kl(p: Any, q: Any) -> Any:
    """Sum of p (log p - log q) of logits, by `kl_div`."""
    log_p, log_q = _log_softmax(p, q)
    return torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="batchmean")


def js(p: Any, q: Any) -> Any:
    """The divergence of Jensen and Shannon, by the logarithm of the mixture."""
    log_p, log_q = _log_softmax(p, q)
    log_m = torch.logaddexp(log_p, log_q) - torch.log(torch.tensor(2.0))
    terms = log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)
    return terms.sum(-1).mean() / 2


def entropy(x: Any) -> Any:
    """Minus the sum of p log p."""
    (log_p,) = _log_softmax(x)
    return -(log_p.exp() * log_p).sum(-1).mean()


def linear_kl(hidden_p: Any, kernel_p: Any, hidden_q: Any, kernel_q: Any) -> Any:
    """KL of all the logits."""
    return kl(hidden_p @ kernel_p, hidden_q @ kernel_q)


def linear_cross_entropy(hidden: Any, kernel: Any, labels: Any) -> Any:
    """Cross entropy of all the logits."""
    return torch.nn.functional.cross_entropy((hidden @ kernel).float(), labels)


def minimality(c: Any) -> Any:
    """The formula of `accelerators.minimality`."""
    sums = ((c + penalties.EPS) ** accelerators.EXPONENT).sum((0, 1))
    means = sums / (c.shape[0] * c.shape[1])
    return (means + accelerators.BETA * means * torch.log2(1 + sums)).sum()


def _log_softmax(*logits):
    return [torch.log_softmax(x.float(), -1) for x in logits]


def _coupled(updates, parameters):
    return updates.add(parameters, alpha=2 * accelerators.WEIGHT)


def _proximal(updates, parameters):
    stepped = torch.nn.functional.softshrink(parameters + updates, accelerators.WEIGHT)
    return stepped - parameters


def _penalty(name, function):
    return partial(function, number=penalties.CASES[name].number)


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "`l1`": _penalty("l1", lambda x, number: number * x.abs().sum()),
    "`l2`": _penalty("l2", lambda x, number: number * x.square().sum()),
    "`lp`": _penalty("lp", lambda x, number: ((x.abs() + penalties.EPS) ** number).sum()),
    "`smooth_l0`": _penalty("smooth_l0", lambda x, number: (x**2 / (x**2 + number**2)).sum()),
    "`huber`": _penalty(
        "huber",
        lambda x, number: torch.nn.functional.huber_loss(
            x, torch.zeros_like(x), reduction="sum", delta=number
        ),
    ),
    "`importance_minimality`": minimality,
    "`add_penalty`": _coupled,
    "`proximal`": _proximal,
    "`kl_divergence`, float32": kl,
    "`kl_from_logits`, float32, forward": kl,
    "`kl_from_logits`, bfloat16, forward": kl,
    "`kl_from_logits`, float32, reverse": lambda p, q: kl(q, p),
    "`js_from_logits`, float32": js,
    "`entropy_from_logits`, float32": entropy,
    "`linear_kl`": linear_kl,
    "`linear_cross_entropy`": linear_cross_entropy,
}


# Liger's student is what is differentiated, our first argument; its beta = 1 is KL(student || q).


def _liger_js(beta, p, q):
    return _of_liger("LigerJSD", beta=beta)(*_log_softmax(p, q))


def _liger_kl(p, q):
    return _of_liger("LigerKLDIVLoss", reduction="batchmean", log_target=True)(*_log_softmax(p, q))


def _liger_linear_kl(hidden_p, kernel_p, hidden_q, kernel_q):
    loss = _of_liger("LigerFusedLinearJSD", jsd_beta=1.0, accum_dtype=torch.float32)
    return loss(hidden_p, kernel_p, hidden_q, kernel_q, None)


def _liger_cross_entropy(hidden, kernel, labels):
    loss = _of_liger("LigerFusedLinearCrossEntropyLoss", accum_dtype=torch.float32)
    return loss(kernel, hidden, labels)


def _of_liger(name, **options):
    return getattr(import_module("liger_kernel.transformers"), name)(**options)


# And which of the arguments are kernels, that it has with the classes first.
LIGER_FUNCTIONS: dict[str, tuple[Callable[..., Any], tuple[int, ...]]] = {
    "`kl_from_logits`, float32, forward": (partial(_liger_js, 1.0), ()),
    "`kl_from_logits`, bfloat16, forward": (partial(_liger_js, 1.0), ()),
    "`kl_from_logits`, float32, reverse": (_liger_kl, ()),
    "`js_from_logits`, float32": (partial(_liger_js, 0.5), ()),
    "`linear_kl`": (_liger_linear_kl, (1, 3)),
    "`linear_cross_entropy`": (_liger_cross_entropy, (1,)),
}


def missing() -> dict[str, str]:
    """Which columns there are not on this machine, and why."""
    on_gpu = jax.default_backend() == "gpu"
    if on_gpu and not torch.cuda.is_available():
        return dict.fromkeys((EAGER, COMPILED, LIGER), "this build of PyTorch finds no GPU")
    reasons = {}
    if not (on_gpu or which("g++")):
        reasons[COMPILED] = "there is no C++ compiler"
    if not on_gpu:
        reasons[LIGER] = "its kernels are for GPUs"
    elif absent := [name for name in ("liger_kernel", "triton") if not find_spec(name)]:
        reasons[LIGER] = f"{' and '.join(absent)} not installed"
    return reasons


def peers(
    name: str, arguments: Sequence[jax.Array], of: int
) -> dict[str, Callable[[], Callable[[], Any]]]:
    """What makes the call of each column that a program has; it raises what PyTorch raises.

    Args:
        name: Of the program.
        arguments: Arrays of jax.
        of: How many of the leading ones are differentiated; 0 for the result itself.
    """
    function, absent = FUNCTIONS[name], missing()
    made = {
        EAGER: lambda: _call(function, arguments, of),
        COMPILED: lambda: _call(torch.compile(function, dynamic=False), arguments, of),
    }
    if name in LIGER_FUNCTIONS:
        liger, kernels = LIGER_FUNCTIONS[name]
        made[LIGER] = lambda: _call(liger, arguments, of, kernels)
    return {column: make for column, make in made.items() if column not in absent}


def _call(function, arguments, of, turned=()):
    tensors = [torch.from_dlpack(x) for x in arguments]
    tensors = [x if x.is_floating_point() else x.long() for x in tensors]
    tensors = [x.T.contiguous() if i in turned else x for i, x in enumerate(tensors)]
    tensors = [x.detach().requires_grad_(i < of) for i, x in enumerate(tensors)]

    def call():
        value = function(*tensors)
        return (value, *torch.autograd.grad(value, tensors[:of])) if of else (value,)

    return call


def norms(results: Sequence[Any]) -> list[float]:
    """The norm of each result, in float32."""
    return [float(torch.linalg.vector_norm(x.detach(), dtype=torch.float32)) for x in results]


def wait(_: Any = None) -> None:
    """Waits for all that has been started on the GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def temporaries(call: Callable[[], Any]) -> int | None:
    """Bytes of a call at its peak, beside arguments and results; None on a CPU."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = call()
    return torch.cuda.max_memory_allocated() - before - sum(x.nbytes for x in results)


def clear() -> None:
    """Gives memory back, so that others can have it."""
    gc.collect()
    torch.cuda.empty_cache()
