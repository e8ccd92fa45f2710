"""A merge that converts its inputs first, and keeps what it has converted."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

import streammerge as sm
from streammerge.events import Event, RunStarted


def test_inputs_are_converted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(("a.pth", "b.pth")):
        torch.save({"model": {"w": torch.full((5, 3), number + 0.5)}, "step": 3}, name)
    runs: list[Event] = []

    def count(event: Event) -> None:
        runs.extend([event] if isinstance(event, RunStarted) else [])

    sm.merge(["a.pth", "b.pth"], "one.safetensors", convert_first="kept", listener=count)
    assert len(runs) == 3
    assert {path.suffix for path in (tmp_path / "kept").iterdir()} == {".safetensors"}
    sm.merge(["a.pth", "b.pth"], "two.safetensors", convert_first="kept", listener=count)
    assert len(runs) == 4, "both conversions are current"
    torch.save({"model": {"w": torch.full((5, 3), 7.0)}}, "b.pth")
    os.utime("b.pth", (1, 1))
    sm.merge(["a.pth", "b.pth"], "three.safetensors", convert_first="kept", listener=count)
    assert len(runs) == 6, "one input is another file now"
    with pytest.raises(sm.FormatError, match="text"):
        Path("text.pth").write_text("text")
        sm.merge(["a.pth", "text.pth"], "four.safetensors", convert_first="kept")
