"""Progress on stderr: a bar on a terminal, JSON lines for ``--format json``, silence otherwise."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from types import TracebackType
from typing import Any

from streammerge.events import Event, RunFinished, RunStarted, Staged, Syncing, TaskDone
from streammerge.memory import resident_bytes
from streammerge.units import binary_bytes


class Progress:
    """A listener: bytes, rate, time left, and the memory held now against the budget."""

    def __init__(self, form: str, enabled: bool = True) -> None:
        self._json = form == "json" and enabled
        self._bar_wanted = form == "human" and enabled and sys.stderr.isatty()
        self._bar: Any = None
        self._startup = 0
        self._budget = ""

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()

    def __call__(self, event: Event) -> None:
        if self._json:
            print(json.dumps({"event": type(event).__name__, **asdict(event)}), file=sys.stderr, flush=True)
        if self._bar_wanted:
            self._draw(event)

    def _draw(self, event: Event) -> None:
        if isinstance(event, RunStarted):
            from tqdm import tqdm

            self._startup, self._budget = resident_bytes(), binary_bytes(event.memory_bytes)
            self._bar = tqdm(
                total=event.read_bytes, unit="B", unit_scale=True, leave=False, dynamic_ncols=True, smoothing=0.1
            )
        elif self._bar is None:
            return
        elif isinstance(event, TaskDone):
            held = binary_bytes(max(event.memory_bytes - self._startup, 0))
            self._bar.set_postfix_str(f"memory {held} of {self._budget}", refresh=False)
            self._bar.update(event.read_bytes)
        elif isinstance(event, Staged):
            self._bar.set_description_str("staging", refresh=False)
            self._bar.update(event.nbytes)
        elif isinstance(event, Syncing):
            self._bar.set_description_str("syncing")
        elif isinstance(event, RunFinished):
            self._bar.close()
