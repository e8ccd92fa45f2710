"""Memory and throughput while a run goes on, from its events."""

from __future__ import annotations

import time

from streammerge.events import Event, Listener, Resumed, RunStarted, Spooled, TaskDone
from streammerge.reporting.facts import Sample
from streammerge.running.process import resident_bytes

_MOST = 400


class Recorder:
    """A listener that keeps a few hundred samples of memory and bytes, and tells another listener."""

    def __init__(self, listener: Listener) -> None:
        self._listener = listener
        self.samples: list[Sample] = []
        self._began = time.perf_counter()
        self._done = self._startup = 0
        self._step = self._next = 0.0

    def __call__(self, event: Event) -> None:
        self._listener(event)
        if isinstance(event, TaskDone):  # nearly all events are
            self._done += event.read_bytes + event.written_bytes
            if time.perf_counter() >= self._next:
                self._take(max(event.memory_bytes - self._startup, 0))
        elif isinstance(event, RunStarted):
            self.samples, self._began, self._done, self._step = [Sample(0.0, 0, 0)], time.perf_counter(), 0, 0.0
            self._next = 0.0
            self._startup = resident_bytes()
        elif isinstance(event, Spooled):
            self._done += event.nbytes
        elif isinstance(event, Resumed):
            self._step = self._next = 0.0

    def _take(self, memory_bytes: int) -> None:
        now = time.perf_counter()
        self.samples.append(Sample(now - self._began, memory_bytes, self._done))
        if len(self.samples) > _MOST:
            self.samples = self.samples[::2]
            self._step = max(2 * self._step, self.samples[-1].seconds / _MOST)
        self._next = now + self._step
