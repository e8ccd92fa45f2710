"""What a run tells: a bar on a terminal, a line every half minute in a log, JSON lines with ``--format json``."""

from __future__ import annotations

import contextlib
import json
import sys
from dataclasses import asdict
from functools import partial
from types import TracebackType

from streammerge.cli.failures import add_note
from streammerge.cli.flags import as_flags
from streammerge.cli.signals import Stopped, stop_if_asked
from streammerge.cli.terminal import put, quoted, say
from streammerge.errors import StreammergeError
from streammerge.events import Event, Published, RunStarted, Suspended, Told
from streammerge.progress import ProgressBar
from streammerge.units import decimal_bytes


class Progress:
    """A listener that shows the progress of a command, and says in the end what is kept. ``out``: the output's name."""

    def __init__(self, form: str, enabled: bool = True) -> None:
        self._json = form == "json" and enabled
        self._said = form == "human"
        self._bar = ProgressBar(partial(say, err=True)) if form == "human" and enabled else None
        self._outcome: str | None = None
        self.out: str | None = None
        self.told: set[tuple[str, str]] = set()
        """What was said already: kind and text."""

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.__exit__(kind, error, trace)
        if isinstance(error, Stopped):
            error.outcome = self._outcome or _left_before(self.out) or error.outcome
        elif self._outcome is not None and error is not None:
            if self._said:
                say(f"note: {self._outcome}", err=True)
            add_note(error, self._outcome)

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
            self.told.add((event.kind, event.text))
            self.say(f"{event.kind}: {as_flags(event.text)}")
        if self._json:
            put(json.dumps({"event": type(event).__name__, **asdict(event)}), err=True)
        if self._bar is not None:
            self._bar(event)

    def say(self, text: str) -> None:
        """Prints a line for people, above the bar."""
        if self._said:
            with self._bar.aside() if self._bar is not None else contextlib.nullcontext():
                say(text, err=True)


def _left_before(out: str | None) -> str:
    """Returns what an earlier run has left for this output, "" if it is nothing. This run has written nothing."""
    if out is None:
        return ""
    from streammerge.stores.leftovers import leftover_of
    from streammerge.stores.locations import parse

    with contextlib.suppress(StreammergeError, OSError):
        found = leftover_of(parse(out))
        if found is not None and found.owner is None and found.kept_bytes:
            return (
                f"nothing new was written; {decimal_bytes(found.kept_bytes)} of an earlier run are kept, and the command "
                "of that run goes on from there"
            )
    return ""


def _command() -> str:
    """Returns this command as typed in a shell, without characters that a terminal would execute, and without the queries
    of addresses, which may be secrets."""
    from streammerge.stores.locations import without_queries

    return " ".join(map(quoted, ["streammerge", *map(without_queries, sys.argv[1:])]))
