"""The guide to post-training: its step of GRPO against the same from logits."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from tests.oracles import assert_close
from tests.programs import quick_jit

GUIDE = Path(__file__).parent.parent / "docs/guides/post_training.md"
EXAMPLES = re.findall(r"^```python\n(.*?)^```$", GUIDE.read_text("utf-8"), re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def guide():
    """The names that the examples of the step define."""
    names = {"__name__": "__main__"}
    for example in EXAMPLES[:2]:
        exec(compile(example, str(GUIDE), "exec"), names)
    return names


def from_logits(policy, reference, batch):
    """The loss of a loop over the sequences, from all the logits."""
    tokens, chosen = batch["tokens"][:, :-1], batch["tokens"][:, 1:]
    log_p = jax.nn.log_softmax(policy.out(policy.hidden(tokens)))
    log_q = jax.nn.log_softmax(reference.out(reference.hidden(tokens)))
    kept = jax.lax.stop_gradient
    gain, kl, entropy = [], [], []
    for row, count in enumerate(batch["mask"].sum(1)):
        at = np.arange(count), chosen[row, :count]
        p, q, sampler = log_p[row][at], log_q[row][at], batch["log_sampler"][row, :count]
        ratio, advantage = jnp.exp(p - sampler), batch["advantages"][row]
        gain.append(jnp.minimum(ratio * advantage, jnp.clip(ratio, 0.8, 1.2) * advantage))
        # The value of k3 with the gradient of KL: p's score times the log-ratio, weighted.
        slope = kept(ratio * (p - q)) * p
        kl.append(kept(ratio * (jnp.expm1(q - p) - q + p)) + slope - kept(slope))
        classes = log_p[row, :count]
        entropy.append(-(jnp.exp(classes) * classes).sum(-1))
    gain, kl, entropy = (
        sum(x.mean() for x in parts if x.size) / batch["sequences"] for parts in (gain, kl, entropy)
    )
    return 0.04 * kl - 0.01 * entropy - gain, {"gain": gain, "kl": kl, "entropy": entropy}


def test_a_step_of_grpo_is_that_from_logits(guide):
    """The total, what it is made of, and the parameters after a step of gradient descent."""
    made = [guide["Policy"](nnx.Rngs(1)) for _ in range(2)]
    reference, batch = guide["Policy"](nnx.Rngs(2)), guide["batch"]
    optimizer = nnx.Optimizer(made[0], optax.sgd(1.0), wrt=nnx.Param)
    total, means = guide["grpo_step"](made[0], reference, optimizer, batch)

    graph, before = nnx.split(made[1])

    def loss(state):
        return from_logits(nnx.merge(graph, state), reference, batch)

    (expected, parts), slopes = quick_jit(jax.value_and_grad(loss, has_aux=True))(before)
    assert_close(total, expected, atol=1e-5, rtol=1e-5)
    for name, part in parts.items():
        assert_close(means[name], part, atol=1e-5, rtol=1e-5)
    after = nnx.state(made[0])
    jax.tree.map(lambda a, b, s: assert_close(a, b - s, atol=1e-5), after, before, slopes)
    assert max(abs(slope).max() for slope in jax.tree.leaves(slopes)) > 1e-2


def test_a_step_of_grpo_is_short():
    step = EXAMPLES[1].partition("\n\n\n")[0]
    assert step.startswith("@nnx.jit\ndef grpo_step")
    assert len([line for line in step.splitlines() if line]) <= 25
