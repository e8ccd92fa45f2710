"""A listener that shows the progress of a run: a bar on stderr, a line every half minute in a log, or one output of a
notebook's cell."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import TracebackType
from typing import Any

from streammerge.errors import printable
from streammerge.events import (
    Checked,
    Event,
    Hashed,
    Preparing,
    Resumed,
    RunFinished,
    RunStarted,
    Spooled,
    Syncing,
    TaskDone,
)
from streammerge.running.process import resident_bytes
from streammerge.units import binary_bytes, decimal_bytes

_LOG_SECONDS = 30.0
_WIDE, _NARROW = 76, 56
"""Columns below which the memory, or the bytes, have no room beside the bar."""
_CTRL_C = 2
"""Columns that stay free at the right, where a terminal shows ^C: the bar would be torn if that went to the next line."""
_FILE_SECONDS = 1.0
"""The least time between two states of a bar that is written into a file."""
_CELL_SECONDS = 0.25
"""The same in a notebook."""


class ProgressBar:
    """Shows bytes, rate, remaining time, and current memory against the budget, while its ``with`` block runs.

    ``log``: prints one line of a log. If it is given, lines take the place of the bar where stderr is no terminal.
    """

    def __init__(self, log: Callable[[str], None] | None = None) -> None:
        self._log, self._word = log, ""
        self._startup_bytes, self._budget = 0, ""
        self._bar: Any = None

    def __enter__(self) -> ProgressBar:
        self._say("reading headers")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._say("")
        if self._bar is not None:
            self._bar.close()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Takes the bar away while the block prints a line, and brings it back below that line."""
        word = self._word
        self._say("")
        if self._bar is not None:
            self._bar.clear()
        yield
        self._say(word)
        if self._bar is not None:
            self._bar.refresh()

    def __call__(self, event: Event) -> None:
        if isinstance(event, Preparing):
            self._say(f"loading {event.what}")
        elif isinstance(event, RunStarted):
            self._say("")
            self._startup_bytes, self._budget = resident_bytes(), binary_bytes(event.memory_bytes)
            if self._bar is not None:
                self._bar.close()
            log = None if sys.stderr.isatty() else self._log
            if log is not None:
                self._bar = _Lines(event.read_bytes, log)
            else:
                self._bar = _Cell(event.read_bytes) if _in_notebook() else _tqdm(event.read_bytes)
        elif self._bar is None:
            return
        elif isinstance(event, Resumed):
            self._bar.skip(event.read_bytes)
        elif isinstance(event, Hashed):
            self._bar.set_description_str(f"hashing {printable(event.name, 40)}")
        elif isinstance(event, TaskDone | Checked):
            held = binary_bytes(max(event.memory_bytes - self._startup_bytes, 0))
            self._bar.set_description_str("", refresh=False)
            self._bar.set_postfix_str(f"memory {held} of {self._budget}", refresh=False)
            self._bar.update(event.read_bytes)
        elif isinstance(event, Spooled):
            self._bar.set_description_str("spooling", refresh=False)
            self._bar.update(event.nbytes)
        elif isinstance(event, Syncing):
            self._bar.set_description_str("syncing")
        elif isinstance(event, RunFinished):
            self._bar.close()

    def _say(self, word: str) -> None:
        """Shows what is done before the bar is there, on a line of a terminal that the next one replaces."""
        if sys.stderr.isatty() and (word or self._word):
            blank = " " * len(self._word)
            sys.stderr.write(f"\r{blank}\r{word}")
            sys.stderr.flush()
            self._word = word


class _Lines:
    """Replaces the bar in logs: a line every half minute."""

    def __init__(self, total: int, log: Callable[[str], None]) -> None:
        self._total, self._log, self._done, self._skipped, self._more = total, log, 0, 0, ""
        self._began = self._said = time.monotonic()

    def update(self, nbytes: int) -> None:
        self._done, now = self._done + nbytes, time.monotonic()
        if now - self._said >= _LOG_SECONDS:
            share, read = self._done / max(self._total, 1), self._done - self._skipped
            rate = read / max(now - self._began, 1e-9)
            self._log(f"{share:4.0%} of {decimal_bytes(self._total)} read, {decimal_bytes(rate)}/s{self._more}")
            self._said = now

    def skip(self, nbytes: int) -> None:
        """Counts bytes that an earlier run has read: as done, not in the rate."""
        self._done += nbytes
        self._skipped += nbytes
        self._began = time.monotonic()  # the time before was for the check of what is kept

    def set_postfix_str(self, text: str, refresh: bool = True) -> None:  # noqa: ARG002 - same signature as tqdm's
        self._more = f", {text}"

    def set_description_str(self, text: str, refresh: bool = True) -> None:
        pass

    def clear(self) -> None:
        pass

    def refresh(self) -> None:
        pass

    def close(self) -> None:
        pass


def _in_notebook() -> bool:
    """Whether this is the kernel of a notebook, and no terminal of IPython."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return getattr(shell, "kernel", None) is not None


class _Cell(_Lines):
    """Replaces the bar in notebooks: one output that is updated. A bar on stderr would be an output for each state, where a
    notebook is run by a program."""

    def __init__(self, total: int) -> None:
        super().__init__(total, lambda text: None)
        self._word = ""
        self._closed = False
        display = sys.modules["IPython"].display.display  # the kernel has imported it
        self._handle = display(self._shown(), raw=True, display_id=True)

    def update(self, nbytes: int) -> None:
        self._done += nbytes
        if time.monotonic() - self._said >= _CELL_SECONDS:
            self.refresh()

    def set_description_str(self, text: str, refresh: bool = True) -> None:
        self._word = f"{text}, " if text else ""
        if refresh:
            self.refresh()

    def refresh(self) -> None:
        self._said = time.monotonic()
        self._handle.update(self._shown(), raw=True)

    def close(self) -> None:
        if not self._closed:
            self._closed, self._word = True, ""
            self.refresh()

    def _shown(self) -> dict[str, str]:
        """Returns the state as text, and with a bar as HTML."""
        from html import escape  # here, since most runs are in no notebook

        read, seconds = self._done - self._skipped, max(time.monotonic() - self._began, 1e-9)
        left = max(self._total - self._done, 0)
        text = f"{decimal_bytes(self._done)} of {decimal_bytes(self._total)} read"
        if self._closed:
            text = f"{decimal_bytes(self._done)} read in {seconds:.1f} s"
        if read:
            text += f", {decimal_bytes(read / seconds)}/s{self._more}"
        if read and not self._closed:
            text += f", {timedelta(seconds=round(left * seconds / read))} left"
        text = self._word + text
        share = f'<progress value="{min(self._done / max(self._total, 1), 1):.3f}" style="max-width:100%"></progress>'
        return {"text/plain": text, "text/html": f"<div>{share} {escape(text)}</div>"}


def _tqdm(total: int) -> Any:
    from tqdm import tqdm

    class Bar(tqdm):  # type: ignore[type-arg]
        @property
        def format_dict(self) -> dict[str, Any]:
            """What is shown fits the terminal: the memory is left out of a narrow one, and the bytes of a small one."""
            made = dict(super().format_dict)
            columns = made["ncols"] or _WIDE
            made["ncols"] = made["ncols"] and columns - _CTRL_C
            if columns < _WIDE:
                made["postfix"] = None
            if columns < _NARROW:
                made["bar_format"] = "{desc}{percentage:3.0f}%|{bar}| {remaining}, {rate_fmt}"
            return made

        def skip(self, nbytes: int) -> None:
            """Counts bytes that an earlier run has read: as done, not in the rate."""
            self.n += nbytes
            self.initial = self.last_print_n = self.n
            self.start_t = self.last_print_t = time.time()
            self.refresh()

    pause = 0.1 if sys.stderr.isatty() else _FILE_SECONDS
    return Bar(total=total, unit="B", unit_scale=True, leave=False, dynamic_ncols=True, smoothing=0.1, mininterval=pause)
