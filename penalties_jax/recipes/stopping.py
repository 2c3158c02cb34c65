"""Signals ask a run to stop: it does so once what it has done is saved."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from penalties_jax.recipes.devices import any_process

SIGNALS = signal.SIGINT, signal.SIGTERM


class StoppedError(Exception):
    """A signal asked the run to stop, and what it has done is saved."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


# The signal that has come, or 0. Signals are the process's: so is this.
_asked = 0


@contextmanager
def stoppable() -> Iterator[None]:
    """Within, a signal is noted for `stop_if_asked`, and a second one ends the process at once."""
    global _asked

    def note(number: int, _: object) -> None:
        global _asked
        if _asked:
            os._exit(128 + number)
        _asked = number

    earlier = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
        _asked = 0


def ignore_signals() -> None:
    """Hear no more signals: the process is about to end."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def stop_if_asked() -> None:
    """Stop here if any process of the run was asked to.

    Raises:
        StoppedError: If one was.
    """
    if asked := any_process(_asked):
        raise StoppedError(asked)
