"""Being stopped: the first signal unwinds the run, which then leaves nothing behind; a second one ends it at once."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Stopped(BaseException):
    """A signal asked for the end. ``exit_code`` is that of a process which died of it; ``outcome``: what there is now.

    It is no KeyboardInterrupt, of which click would make something of its own.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.exit_code = 128 + number
        self.outcome = "nothing was written"
        self.word = "interrupted" if number == signal.SIGINT else "terminated"


_asked: list[Stopped] = []


def stop_if_asked() -> None:
    """Raises Stopped once more, for what was running when the signal came may have swallowed it: some imports do."""
    if _asked:
        raise _asked[0]


@contextmanager
def stoppable() -> Iterator[None]:
    """Meanwhile Ctrl-C, SIGTERM and SIGHUP raise Stopped in the main thread."""

    def stop(number: int, frame: FrameType | None) -> None:
        if _asked:
            os._exit(128 + number)
        _asked.append(Stopped(number))
        raise _asked[0]

    wanted = [number for number in _SIGNALS if signal.getsignal(number) != signal.SIG_IGN]  # nohup wants none of them
    before = {number: signal.signal(number, stop) for number in wanted}
    try:
        yield
    finally:
        _asked.clear()
        for number, handler in before.items():
            signal.signal(number, handler)
