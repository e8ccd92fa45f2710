"""The functions of the Python API: which arguments they take and refuse."""

from __future__ import annotations

from pathlib import Path

from conftest import trained

import streammerge as sm


def test_listeners_hear_what_happens(tmp_path: Path, voices: tuple[Path, Path]) -> None:
    heard: list[object] = []
    result = sm.merge(voices, tmp_path / "voice.pth", listener=heard.append)
    done = [event for event in heard if type(event).__name__ == "TaskDone"]
    assert sum(event.written_bytes for event in done) == sum(t.out.nbytes for t in result.plan.tasks)  # type: ignore[attr-defined]
    assert {event.tensor for event in done} == {f"xtts.{n}" for n, t in trained(1).items() if t.numel()}  # type: ignore[attr-defined]
