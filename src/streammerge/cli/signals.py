"""Stopping by signals: the first one unwinds the run, which cleans up; a second one ends the process at once."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Stopped(BaseException):
    """A signal stopped the command. ``exit_code``: that of a process killed by this signal; ``outcome``: the resulting
    state.

    It is not a KeyboardInterrupt, because click handles those itself.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.exit_code = 128 + number
        self.outcome = "nothing was written"
        self.word = "interrupted" if number == signal.SIGINT else "terminated"


_asked: list[Stopped] = []


def stop_if_asked() -> None:
    """Raises Stopped again if a signal came, because the running code may have swallowed it; some imports do."""
    if _asked:
        raise _asked[0]


@contextmanager
def stoppable() -> Iterator[None]:
    """Makes Ctrl-C, SIGTERM and SIGHUP raise Stopped in the main thread, inside the block."""

    def stop(number: int, frame: FrameType | None) -> None:
        if _asked:
            os._exit(128 + number)
        _asked.append(Stopped(number))
        raise _asked[0]

    # nohup ignores SIGHUP; ignored signals stay ignored
    wanted = [number for number in _SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, stop) for number in wanted}
    try:
        yield
    finally:
        _asked.clear()
        for number, handler in before.items():
            signal.signal(number, handler)
