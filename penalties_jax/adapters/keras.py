"""Keras 3 on JAX: a penalty as the regularizer of a layer."""

from typing import Any

import keras
from jaxtyping import Array, Float

from penalties_jax._pytree import has_schedule
from penalties_jax.objective import check_scalar
from penalties_jax.serialization import from_dict, to_dict
from penalties_jax.terms.base import Penalty, check_one_input

__all__ = ["Regularizer"]

if keras.backend.backend() != "jax":
    raise ImportError(
        "penalties_jax.adapters.keras needs the JAX backend of Keras, which has "
        f"{keras.backend.backend()!r}: set KERAS_BACKEND=jax before anything imports keras"
    )


@keras.saving.register_keras_serializable(package="penalties_jax")
class Regularizer(keras.regularizers.Regularizer):
    r"""A penalty $f(x)$ of a kernel, a bias or an activity, of any shape, for Keras to add.

    Keras divides that of an activity by the size of the batch, as it does with its own. A model
    that is saved or cloned keeps its regularizers; whoever loads it in another process imports this
    module first.

    Args:
        penalty: The $f$: a config of one input, whose value is of shape [].

    Raises:
        TypeError: If it is no config, compares two inputs, holds a function, which Keras would not
            find when it loads a model, or a schedule: Keras tells regularizers no step.
        ValueError: When called, if the value is not a scalar.

    Examples:
        >>> regularizer = pj.adapters.keras.Regularizer(0.5 * pj.L1() + pj.SmoothL0(gamma=1.0))
        >>> float(regularizer(jnp.array([1.0, -1.0])))
        2.0
    """

    def __init__(self, penalty: Penalty):
        if not isinstance(penalty, Penalty):
            raise TypeError(f"Regularizer takes a config, such as pj.L1(), got {penalty!r}")
        check_one_input("Regularizer", penalty)
        if has_schedule(penalty):
            raise TypeError(
                f"{penalty!r} holds a schedule, and Keras tells regularizers no step: call "
                ".at(step), or penalise in a layer that counts its steps, as the guide to "
                "adapters has it"
            )
        try:
            from_dict(to_dict(penalty))
        except TypeError as error:
            raise TypeError(
                f"{error}; a model is saved with its regularizers: make the function a class, by "
                "pj.config and pj.Separable"
            ) from error
        self.penalty = penalty

    def __call__(self, x: Any) -> Float[Array, ""]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The penalty of an array or of a Keras variable."""
        return check_scalar("penalty", self.penalty(x))

    def get_config(self) -> dict[str, Any]:
        """The penalty as `pj.to_dict` has it."""
        return {"penalty": to_dict(self.penalty)}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Regularizer":
        """The regularizer that `get_config` was called on."""
        return cls(from_dict(config["penalty"]))
