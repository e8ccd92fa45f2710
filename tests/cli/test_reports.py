"""Which stream gets what, in each form of report."""

from __future__ import annotations

import json
from pathlib import Path

from conftest import Cli


def test_json_is_one_object_on_stdout_and_events_on_stderr(cli: Cli, voices: tuple[Path, Path]) -> None:
    done = cli("merge", *voices, "-o", "voice.pth", "--format", "json")
    result = json.loads(done.stdout)
    assert {"out", "read_bytes", "written_bytes", "seconds", "peak_bytes", "startup_bytes", "notes", "warnings"} <= set(
        result
    )
    events = [json.loads(line)["event"] for line in done.stderr.splitlines()]
    assert list(dict.fromkeys(events))[:3] == ["Told", "Preparing", "RunStarted"]
    assert events[-1] == "RunFinished"
    assert "TaskDone" in events


def test_quiet_says_nothing(cli: Cli, voices: tuple[Path, Path]) -> None:
    done = cli("merge", *voices, "-o", "voice.pth", "--format", "quiet")
    assert (done.stdout, done.stderr) == ("", "")
