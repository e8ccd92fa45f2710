"""What a command tells while it runs, and what it says of kept work in the end. main's tests show a whole run."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import streammerge as sm
from streammerge.cli.failures import notes_of
from streammerge.cli.progress import Progress
from streammerge.cli.signals import Stopped
from streammerge.events import Event, Published, RunFinished, RunStarted, Suspended, Syncing, TaskDone, Told

RUN: list[Event] = [
    RunStarted(6_000_000_000, 2_000_000_000, 512 << 20, 3),
    TaskDone("a", 1_200_000_000, 400_000_000, 300 << 20),
    Syncing(),
    RunFinished(1.0),
]


def shown(form: str, enabled: bool, capsys: pytest.CaptureFixture[str]) -> list[str]:
    with Progress(form, enabled) as listener:
        for event in RUN:
            listener(event)
    return capsys.readouterr().err.splitlines()


def test_a_short_run_needs_no_line_in_a_log(capsys: pytest.CaptureFixture[str]) -> None:
    assert shown("human", True, capsys) == shown("human", False, capsys) == shown("quiet", True, capsys) == []


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


@pytest.mark.parametrize("form", ["human", "json"])
def test_an_error_says_what_is_kept(form: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(OSError, match="full") as caught, Progress(form, enabled=False) as listener:
        listener(Suspended(1_000_000, 4_000_000))
        raise OSError("full")
    said = "1.0 MB of 4.0 MB are kept; the same command goes on from there:\n  streammerge"
    assert notes_of(caught.value)[0].startswith(said)
    assert capsys.readouterr().err.startswith(f"note: {said}" if form == "human" else "\0") == (form == "human")


def test_a_signal_says_what_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of this run, or of an earlier one if this run had not begun to write."""
    monkeypatch.chdir(tmp_path)
    for name in ("a.safetensors", "b.safetensors"):
        save_file({f"w{number}": torch.randn(200, 300) for number in range(8)}, name)

    def outcome(*events: Event, out: str | None = "sub/../out.safetensors") -> str:
        with pytest.raises(Stopped) as caught, Progress("human") as listener:
            listener.out = out
            for event in events:
                listener(event)
            raise Stopped(signal.SIGINT)
        return caught.value.outcome

    (tmp_path / "sub").mkdir()
    assert outcome() == outcome(out=None) == outcome(out="memory://x") == "nothing was written"
    assert outcome(Published()) == "the output is there, whole"
    assert outcome(Suspended(1, 2)).startswith("1 bytes of 2 bytes are kept; the same command goes on")
    assert outcome(Suspended(1, 2), RUN[0]) == "nothing was written", "a conversion was interrupted, a merge was not"

    def stop(event: Event) -> None:
        if isinstance(event, TaskDone):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sm.merge(["a.safetensors", "b.safetensors"], "out.safetensors", workers=1, listener=stop)
    kept = outcome()
    assert kept.startswith("nothing new was written; 240 kB of an earlier run are kept, and the command of that run")
    assert outcome(out="other.safetensors") == "nothing was written"
