"""How long a step of one model takes at each target, in training and in evaluation."""

import functools
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int
from tqdm import tqdm

from penalties_jax.recipes.devices import is_main
from penalties_jax.recipes.sparsify.config import DENSE, DUAL, SparsifyConfig, capacity, members
from penalties_jax.recipes.sparsify.sweep import (
    Member,
    Shared,
    State,
    controls,
    member_loss,
    member_step,
    together,
)
from penalties_jax.recipes.stopping import stop_if_asked


class Times(NamedTuple):
    """What steps of one model take, on one device: medians.

    Attributes:
        target: The share of positions that it is to skip; 0 of the dense model too.
        capacity: How many positions of a sequence its layers compute.
        training: The seconds of a step of training: value, gradient and update.
        training_tokens: The tokens a second there.
        evaluation: The seconds of a step of evaluation: the loss of a batch of that size.
        evaluation_tokens: The tokens a second there.
    """

    target: float
    capacity: int
    training: float
    training_tokens: float
    evaluation: float
    evaluation_tokens: float


def measure(config: SparsifyConfig, state: State, shared: Shared) -> list[Times]:
    """Time the dense model and one of each target, in turns; none if no steps are to be timed.

    Raises:
        StoppedError: If a signal asked for it.
    """
    if not config.timing_steps:
        return []
    # Dual ascent's members run the programs of the schedule's.
    timed = [i for i, (name, _) in enumerate(members(config)) if name != DUAL]
    programs = _programs(config, state, shared, timed)
    seconds = np.empty((config.timing_steps, len(programs)))
    with tqdm(seconds, desc="time", unit="step", disable=not is_main()) as rounds:
        for row in rounds:
            stop_if_asked()
            for column, program in enumerate(programs):
                start = time.perf_counter()
                jax.block_until_ready(program())
                row[column] = time.perf_counter() - start
    tokens = config.batch_size * config.context
    results = []
    for i, medians in zip(timed, np.median(seconds, axis=0).reshape(-1, 2).tolist(), strict=True):
        _, target = members(config)[i]
        each = [value for median in medians for value in (median, tokens / median)]
        results.append(Times(target, capacity(config, target), *each))
    return results


def _programs(
    config: SparsifyConfig, state: State, shared: Shared, timed: Sequence[int]
) -> list[Callable[[], Any]]:
    """Return a step of training and one of evaluation of each member, compiled."""

    @functools.cache
    def of_one(dense: bool, size: int) -> tuple[Callable[..., Any], Callable[..., Any]]:
        # Of a single model the program knows whether it is dense: such a one needs no gates.
        member = Member(dense=dense, scheduled=not dense)
        step, loss = member_step(config, shared.model, size), member_loss(shared.model, size)
        return (
            jax.jit(lambda model, control: step(model, member, control, windows)),
            jax.jit(lambda parameters: loss(parameters, dense, windows)),
        )

    windows = _batch(shared, config)
    control, programs = controls(shared, state.controllers), []
    for number in timed:
        name, target = members(config)[number]
        size = capacity(config, target)
        place = together(config)[size].index(number)
        model = jax.tree.map(lambda leaf, i=place: jnp.asarray(leaf[i]), state.models[size])
        own = jax.tree.map(lambda leaf, i=number: leaf[i], control)
        training, evaluation = of_one(name == DENSE, size)
        programs += [partial(training, model, own), partial(evaluation, model.parameters)]
    for program in programs:
        jax.block_until_ready(program())
    return programs


@partial(jax.jit, static_argnums=1)
def _batch(shared: Shared, config: SparsifyConfig) -> Int[Array, "batch length"]:
    return shared.batches(jnp.asarray(config.steps), config.batch_size, config.context + 1)
