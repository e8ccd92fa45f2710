"""Samples of memory and bytes while a run goes on."""

from __future__ import annotations

from streammerge.events import RunStarted, Spooled, TaskDone
from streammerge.reporting.recorded import Recorder


def test_samples_stay_few_and_every_event_is_passed_on() -> None:
    told: list[object] = []
    recorder = Recorder(told.append)
    recorder(RunStarted(10, 10, 1, 1))
    recorder(Spooled("x", 5))
    for _ in range(5000):
        recorder(TaskDone("x", 1, 2, 1 << 40))
    assert len(told) == 5002
    assert 1 < len(recorder.samples) <= 400
    assert recorder.samples[-1].done_bytes <= 5 + 5000 * 3
    assert [each.seconds for each in recorder.samples] == sorted(each.seconds for each in recorder.samples)
    recorder(RunStarted(10, 10, 1, 1))
    assert [each.done_bytes for each in recorder.samples] == [0]
