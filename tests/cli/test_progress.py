"""Progress without a terminal. test_main.py shows the bar on a terminal."""

from __future__ import annotations

import json
import re

import pytest

from streammerge.cli import progress
from streammerge.cli.progress import Progress
from streammerge.events import Event, Resumed, RunFinished, RunStarted, Syncing, TaskDone, Told

RUN: list[Event] = [
    RunStarted(6_000_000_000, 2_000_000_000, 512 << 20, 3),
    TaskDone("a", 1_200_000_000, 400_000_000, 300 << 20),
    TaskDone("b", 1_800_000_000, 600_000_000, 300 << 20),
    Syncing(),
    RunFinished(1.0),
]


def shown(form: str, enabled: bool, capsys: pytest.CaptureFixture[str]) -> list[str]:
    with Progress(form, enabled) as listener:
        for event in RUN:
            listener(event)
    return capsys.readouterr().err.splitlines()


def test_a_log_has_a_line_now_and_then(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown("human", True, capsys) == [], "of what is over in half a minute nothing is said"
    monkeypatch.setattr(progress, "_LOG_SECONDS", 0.0)
    lines = shown("human", True, capsys)
    assert [line.partition(",")[0].strip() for line in lines] == ["20% of 6.0 GB read", "50% of 6.0 GB read"]
    assert all(re.search(r", [\d.]+ [kMGT]?B/s, memory [\d.]+ \w+ of 512 MiB$", line) for line in lines)
    assert shown("human", False, capsys) == shown("quiet", True, capsys) == []


def test_other_programs_get_every_event(capsys: pytest.CaptureFixture[str]) -> None:
    lines = [json.loads(line) for line in shown("json", True, capsys)]
    assert [line["event"] for line in lines] == [type(event).__name__ for event in RUN]
    assert lines[1]["read_bytes"] == 1_200_000_000


def test_what_a_run_tells_is_said_at_once_and_once(capsys: pytest.CaptureFixture[str]) -> None:
    told = Told("warning", '`on_missing="base"`: something')
    with Progress("human", enabled=False) as listener:
        listener(told)
        assert capsys.readouterr().err == "warning: --on-missing base: something\n"
    assert listener.told == {("warning", told.text)}
    with Progress("quiet") as listener:
        listener(told)
    assert capsys.readouterr().err == ""


def test_after_a_resume_the_rate_counts_what_is_read_now(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_LOG_SECONDS", 0.0)
    monkeypatch.setattr(progress.time, "monotonic", iter(range(0, 100, 10)).__next__)
    with Progress("human") as listener:
        for event in (RUN[0], Resumed(1_000_000_000, 3_000_000_000), TaskDone("a", 1_200_000_000, 1, 300 << 20)):
            listener(event)
    assert capsys.readouterr().err.startswith(" 70% of 6.0 GB read, 120 MB/s")
