"""The two kinds of model that are fine-tuned: of bytes, by its logits; of tokens, without any."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float, Int

import penalties_jax as pj
from penalties_jax.recipes.language_model import LanguageModel, mean_loss
from penalties_jax.recipes.llama import Llama
from penalties_jax.recipes.training import Metrics

Windows = Int[Array, "windows length"]


class Scores(NamedTuple):
    """Means over windows of text, in nats: two cross-entropies, and KL(model || base model)."""

    base_loss: Float[Array, "*members"]
    loss: Float[Array, "*members"]
    kl: Float[Array, "*members"]


class Bytes(NamedTuple):
    """A small model of bytes, and an objective of "logits", "reference_logits" and "targets"."""

    objective: pj.Objective

    def reference(self, base: LanguageModel, windows: Windows) -> Array:
        """Return the base model's logits, which all members are compared with."""
        return base(windows[:, :-1])

    def total(
        self, model: LanguageModel, kl_weight: Array, reference: Array, windows: Windows
    ) -> tuple[Array, Metrics]:
        """Return what is minimised, and the objective's metrics.

        And under "gradient/<name>" the norm of the gradient of each with respect to the logits,
        where a divergence has gradient 0 at its minimum.
        """
        objective = self.objective.with_weight("kl", kl_weight)
        outputs = {
            "logits": model(windows[:, :-1]),
            "reference_logits": reference,
            "targets": windows[:, 1:],
        }
        value, metrics = objective(outputs)
        norms = objective.grad_norms(jax.lax.stop_gradient(outputs), wrt=("logits",))
        return value, metrics | {f"gradient/{name}": norm for name, norm in norms.items()}

    def score(self, model: LanguageModel, reference: Array, windows: Windows) -> Scores:
        """Return the means over the windows."""
        logits, targets = model(windows[:, :-1]), windows[:, 1:]
        return Scores(
            base_loss=mean_loss(reference, targets),
            loss=mean_loss(logits, targets),
            kl=pj.kl_from_logits(logits, reference),
        )

    def over_members(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Map a function over the first axis of its arguments, at once."""
        return jax.vmap(function)(*arguments)


class Tokens(NamedTuple):
    """A pretrained model of tokens: too many for their logits to be held.

    The output kernel has no adapter, so it is the base model's too.
    """

    def reference(self, base: Llama, windows: Windows) -> Array:
        """Return the base model's hidden states, which all members are compared with."""
        return base.hidden(windows[:, :-1])

    def total(
        self, model: Llama, kl_weight: Array, reference: Array, windows: Windows
    ) -> tuple[Array, Metrics]:
        """Return what is minimised, and the metrics."""
        loss = self._distillation(model, kl_weight, reference, windows)
        return loss.total, {
            "loss": loss.cross_entropy,
            "kl": loss.kl,
            "kl/weighted": kl_weight * loss.kl,
            "total": jax.lax.stop_gradient(loss.total),
        }

    def score(self, model: Llama, reference: Array, windows: Windows) -> Scores:
        """Return the means over the windows."""
        loss = self._distillation(model, 0.0, reference, windows)
        base_loss = pj.linear_cross_entropy(reference, model.kernel, windows[:, 1:])
        return Scores(base_loss, loss.cross_entropy, loss.kl)

    def _distillation(self, model, kl_weight, reference, windows):
        hidden, kernel = model.hidden(windows[:, :-1]), model.kernel
        return pj.linear_distillation(
            hidden, kernel, reference, kernel, windows[:, 1:], kl_weight=kl_weight
        )

    def over_members(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Map a function over the first axis of its arguments, one by one: one is large."""
        return jax.lax.map(lambda each: function(*each), arguments)
