"""The listener that shows progress: lines in a log, a bar in Python. cli/test_main.py shows the bar on a terminal."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

import streammerge as sm
from streammerge import progress
from streammerge.events import Event, Resumed, RunFinished, RunStarted, Syncing, TaskDone
from streammerge.progress import ProgressBar

RUN: list[Event] = [
    RunStarted(6_000_000_000, 2_000_000_000, 512 << 20, 3),
    TaskDone("a", 1_200_000_000, 400_000_000, 300 << 20),
    TaskDone("b", 1_800_000_000, 600_000_000, 300 << 20),
    Syncing(),
    RunFinished(1.0),
]


def logged(events: list[Event]) -> list[str]:
    lines: list[str] = []
    with ProgressBar(lines.append) as bar:
        for event in events:
            bar(event)
    return lines


def test_a_log_has_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    assert logged(RUN) == [], "of what is over in half a minute nothing is said"
    monkeypatch.setattr(progress, "_LOG_SECONDS", 0.0)
    lines = logged(RUN)
    assert [line.partition(",")[0].strip() for line in lines] == ["20% of 6.0 GB read", "50% of 6.0 GB read"]
    assert all(re.search(r", [\d.]+ [kMGT]?B/s, memory [\d.]+ \w+ of 512 MiB$", line) for line in lines)


def test_after_a_resume_the_rate_of_a_log_counts_what_is_read_now(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_LOG_SECONDS", 0.0)
    monkeypatch.setattr(progress.time, "monotonic", iter(range(0, 100, 10)).__next__)
    lines = logged([RUN[0], Resumed(1_000_000_000, 3_000_000_000), TaskDone("a", 1_200_000_000, 1, 300 << 20)])
    assert lines == [" 70% of 6.0 GB read, 120 MB/s, memory " + lines[0].rpartition("memory ")[2]]


def test_after_a_resume_the_rate_of_the_bar_counts_what_is_read_now(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """3 GB are skipped after a check of 20 s, then 100 MB are read in each of 10 seconds."""
    clock = [1000.0]
    monkeypatch.setattr("time.time", lambda: clock[0])
    monkeypatch.setattr("tqdm.std.time", lambda: clock[0])
    with ProgressBar() as bar:
        bar(RUN[0])
        clock[0] += 20
        bar(Resumed(1_000_000_000, 3_000_000_000))
        for _ in range(10):
            clock[0] += 1
            bar(TaskDone("a", 100_000_000, 1, 300 << 20))
        shown = capsys.readouterr().err.split("\r")[-1]
    assert " 67%|" in shown
    assert "| 4.00G/6.00G [00:10<00:20, 100MB/s, memory " in shown


@pytest.mark.parametrize("failing", [False, True])
def test_a_program_that_asks_for_progress_sees_a_bar(
    failing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    tensors = {f"layer.{number}.weight": torch.randn(100, 100) for number in range(20)}
    if failing:
        tensors["layer.9.weight"][0, 0] = float("nan")
    for name in ("a.safetensors", "b.safetensors"):
        save_file(tensors if name[0] == "a" else {name: torch.zeros(100, 100) for name in tensors}, name)
    heard: list[Event] = []
    if failing:
        with pytest.raises(sm.VerifyError):
            sm.merge(["a.safetensors", "b.safetensors"], "out.safetensors", progress=True, listener=heard.append)
    else:
        sm.merge(["a.safetensors", "b.safetensors"], "out.safetensors", progress=True, listener=heard.append)
        assert isinstance(heard[-1], RunFinished)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "0%|" in shown.err
    assert "/1.60M [" in shown.err
    assert shown.err.endswith("\r"), "the bar is gone, and the next line begins at the left"
    if not failing:
        sm.convert("out.safetensors", "out.pth", progress=True)
        assert "/800k [" in capsys.readouterr().err
        sm.merge(["a.safetensors", "b.safetensors"], "quiet.safetensors")
        assert capsys.readouterr() == ("", "")
        monkeypatch.setattr(sys, "stderr", None)  # as in pythonw
        sm.merge(["a.safetensors", "b.safetensors"], "silent.safetensors", progress=True)
    with pytest.raises(sm.RecipeError, match="`progress` takes True or False, not yes"):
        sm.merge(["a.safetensors"], "x.safetensors", progress="yes")  # type: ignore[arg-type]


def test_a_terminal_has_a_word_from_the_first_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = os.openpty()
    with os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr("sys.stderr", terminal)
        with ProgressBar() as bar:
            assert os.read(ours, 100) == b"\r\rreading headers"
            with bar.aside():
                assert os.read(ours, 100) == b"\r               \r"
            assert os.read(ours, 100) == b"\r\rreading headers"
    os.close(ours)


@pytest.mark.parametrize(
    ("columns", "shown"),
    [
        (100, r" 17%\|█+.* +\| 1\.00G/6\.00G \[00:10<00:50, 100MB/s, memory [\d.]+ \w+ of 512 MiB\]"),
        (76, r" 17%\|.* *\| 1\.00G/6\.00G \[00:10<00:50, 100MB/s, memory [\d.]+ \w+ of 512 MiB\]"),
        (60, r" 17%\|█+.* +\| 1\.00G/6\.00G \[00:10<00:50, 100MB/s\]"),
        (40, r" 17%\|█+.* +\| 00:50, 100MB/s"),
        (24, r" 17%\|.*\| 00:50, 100MB/s"),
    ],
)
def test_the_bar_fits_the_terminal(
    columns: int, shown: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [1000.0]
    monkeypatch.setattr("tqdm.std.time", lambda: clock[0])
    monkeypatch.setattr("tqdm.std._screen_shape_wrapper", lambda: lambda stream: (columns, 24))
    with ProgressBar() as bar:
        bar(RUN[0])
        for _ in range(10):
            clock[0] += 1
            bar(TaskDone("a", 100_000_000, 1, 900 << 30))
        with bar.aside():
            assert capsys.readouterr().err.endswith("\r")
        drawn = capsys.readouterr().err.split("\r")[-1]
        assert re.fullmatch(shown, drawn.rstrip()), drawn
        assert len(drawn) <= columns


def test_a_notebook_has_one_output_that_is_updated(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the kernel: what it would be asked to show."""
    shown: list[dict[str, str]] = []

    class Handle:
        def update(self, data: dict[str, str], raw: bool) -> None:
            assert raw
            shown.append(data)

    def display(data: dict[str, str], raw: bool, display_id: bool) -> Handle:
        assert raw
        assert display_id
        assert not shown
        shown.append(data)
        return Handle()

    shell = SimpleNamespace(kernel=object())
    notebook = SimpleNamespace(get_ipython=lambda: shell, display=SimpleNamespace(display=display))
    monkeypatch.setitem(sys.modules, "IPython", notebook)  # type: ignore[arg-type]
    monkeypatch.setattr(progress, "_CELL_SECONDS", 0.0)
    with ProgressBar() as bar:
        for event in [RUN[0], Resumed(1_000_000_000, 1_000_000_000), *RUN[1:]]:
            bar(event)
    texts = [each["text/plain"] for each in shown]
    assert texts[0] == "0 bytes of 6.0 GB read"
    assert re.fullmatch(r"2.2 GB of 6.0 GB read, [\d.]+ [kMGTP]*B/s, memory .* of 512 MiB, 0:00:00 left", texts[1]), texts
    assert texts[-2].startswith("syncing, 4.0 GB of 6.0 GB read")
    assert re.fullmatch(r"4.0 GB read in [\d.]+ s, .* of 512 MiB", texts[-1])
    assert '<progress value="0.367"' in shown[1]["text/html"]
    shell.kernel = None  # IPython on a terminal
    shown.clear()
    with ProgressBar() as bar:
        bar(RUN[0])
    assert not shown
