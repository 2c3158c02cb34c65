"""Signals ask a run to stop: it does so once what it has done is saved."""

import os
import signal
import threading
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
        _asked = _asked or number

    # What Python calls on a signal waits for a compiled program to end: a thread does not.
    heard, hear = os.pipe()
    os.set_blocking(hear, False)
    listener = threading.Thread(target=_end_at_the_second, args=(heard,), daemon=True)
    earlier = {number: signal.signal(number, note) for number in SIGNALS}
    wakes = signal.set_wakeup_fd(hear, warn_on_full_buffer=False)
    listener.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakes)
        for number, handler in earlier.items():
            signal.signal(number, handler)
        os.close(hear)
        listener.join()
        os.close(heard)
        _asked = 0


def _end_at_the_second(heard: int) -> None:
    """Read the numbers of signals from a pipe, until it is closed or it has heard two to stop."""
    asked = False
    while number := os.read(heard, 1):
        if number[0] in SIGNALS:
            if asked:
                os._exit(128 + number[0])
            asked = True


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
