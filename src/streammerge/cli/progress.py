"""Progress on stderr: a bar on a terminal, a line every half minute in a log, JSON lines with ``--format json``."""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from dataclasses import asdict
from types import TracebackType
from typing import Any

from streammerge.cli.flags import as_flags
from streammerge.cli.signals import Stopped, stop_if_asked
from streammerge.cli.terminal import say
from streammerge.errors import printable
from streammerge.events import (
    Event,
    Hashed,
    Preparing,
    Published,
    Resumed,
    RunFinished,
    RunStarted,
    Spooled,
    Suspended,
    Syncing,
    TaskDone,
    Told,
)
from streammerge.running.process import resident_bytes
from streammerge.units import binary_bytes, decimal_bytes

_LOG_SECONDS = 30.0


class _Log:
    """Replaces the bar in logs: prints the progress every half minute."""

    def __init__(self, total: int) -> None:
        self._total, self._done, self._skipped, self._more = total, 0, 0, ""
        self._began = self._said = time.monotonic()

    def update(self, nbytes: int) -> None:
        self._done, now = self._done + nbytes, time.monotonic()
        if now - self._said >= _LOG_SECONDS:
            share, read = self._done / max(self._total, 1), self._done - self._skipped
            rate = read / max(now - self._began, 1e-9)
            say(f"{share:4.0%} of {decimal_bytes(self._total)} read, {decimal_bytes(rate)}/s{self._more}", err=True)
            self._said = now

    def skip(self, nbytes: int) -> None:
        """Counts bytes that an earlier run has read: as done, not in the rate."""
        self._done += nbytes
        self._skipped += nbytes

    def set_postfix_str(self, text: str, refresh: bool = True) -> None:  # noqa: ARG002 - same signature as tqdm's
        self._more = f", {text}"

    def set_description_str(self, text: str, refresh: bool = True) -> None:
        pass

    def clear(self) -> None:
        pass

    def close(self) -> None:
        pass


class Progress:
    """A listener that shows bytes, rate, remaining time, and current memory against the budget."""

    def __init__(self, form: str, enabled: bool = True) -> None:
        self._json = form == "json" and enabled
        self._said = form == "human"
        self._bar_wanted = form == "human" and enabled
        self._bar: Any = None
        self._startup = 0
        self._budget = ""
        self._outcome: str | None = None
        self._status_shown = ""
        self.told: set[tuple[str, str]] = set()
        """What was said already: kind and text."""

    def __enter__(self) -> Progress:
        self._status("reading headers")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._status("")
        if self._bar is not None:
            self._bar.close()
        if self._outcome is not None and isinstance(error, Stopped):
            error.outcome = self._outcome
        elif self._outcome is not None and error is not None and self._said:
            say(f"note: {self._outcome}", err=True)

    def __call__(self, event: Event) -> None:
        if isinstance(event, Suspended):
            kept = f"{decimal_bytes(event.kept_bytes)} of {decimal_bytes(event.write_bytes)} are kept"
            self._outcome = f"{kept}; the same command goes on from there:\n  {_command()}"
        elif isinstance(event, Published):
            self._outcome = "the output is there, whole"
        else:
            # a conversion may run before the merge
            self._outcome = None if isinstance(event, RunStarted) else self._outcome
            stop_if_asked()
        if isinstance(event, Told) and self._said:
            self._tell(event)
        if self._json:
            print(json.dumps({"event": type(event).__name__, **asdict(event)}), file=sys.stderr, flush=True)
        if self._bar_wanted:
            self._draw(event)

    def _status(self, text: str) -> None:
        """Shows what is done before the bar is there, on a line of a terminal that the next one replaces."""
        if self._bar_wanted and sys.stderr.isatty() and (text or self._status_shown):
            blank = " " * len(self._status_shown)
            sys.stderr.write(f"\r{blank}\r{text}")
            sys.stderr.flush()
            self._status_shown = text

    def _tell(self, event: Told) -> None:
        self.told.add((event.kind, event.text))
        self._status("")
        if self._bar is not None:
            self._bar.clear()
        say(f"{event.kind}: {as_flags(event.text)}", err=True)

    def _draw(self, event: Event) -> None:
        if isinstance(event, Preparing):
            self._status(f"loading {event.what}")
        elif isinstance(event, RunStarted):
            self._status("")
            self._startup, self._budget = resident_bytes(), binary_bytes(event.memory_bytes)
            self._bar = _bar(event.read_bytes) if sys.stderr.isatty() else _Log(event.read_bytes)
        elif self._bar is None:
            return
        elif isinstance(event, Resumed):
            self._bar.skip(event.read_bytes)
        elif isinstance(event, Hashed):
            self._bar.set_description_str(f"hashing {printable(event.name, 40)}")
        elif isinstance(event, TaskDone):
            held = binary_bytes(max(event.memory_bytes - self._startup, 0))
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


def _bar(total: int) -> Any:
    from tqdm import tqdm

    class Bar(tqdm):  # type: ignore[type-arg]
        def skip(self, nbytes: int) -> None:
            """Counts bytes that an earlier run has read: as done, not in the rate."""
            self.initial += nbytes
            self.n += nbytes
            self.refresh()

    return Bar(total=total, unit="B", unit_scale=True, leave=False, dynamic_ncols=True, smoothing=0.1)


def _command() -> str:
    """Returns this command as typed in a shell, without characters that a terminal would execute."""
    return " ".join(map(_quoted, ["streammerge", *sys.argv[1:]]))


def _quoted(argument: str) -> str:
    if argument.isprintable():
        return shlex.quote(argument)
    octets = os.fsencode(argument)
    return "$'" + "".join(chr(o) if 32 <= o < 127 and o not in b"'\\" else f"\\x{o:02x}" for o in octets) + "'"
