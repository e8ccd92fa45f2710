"""Results as text and as JSON."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from conftest import Cli


def test_merge_reports_in_the_promised_order(cli: Cli, tmp_path: Path, voices: tuple[Path, Path]) -> None:
    done = cli("merge", "news.pth", "audiobook.pth", "--weights", "0.6,0.4", "-o", "voice.pth")
    wrote, speed, memory = done.stdout.splitlines()
    assert wrote.startswith("wrote voice.pth (9 tensors, ")
    assert re.fullmatch(r"read [\d.]+ [kM]B, wrote [\d.]+ kB in [\d.]+ s \([\d.]+ [kM]B/s\)", speed)
    assert re.fullmatch(
        r"peak memory [\d.]+ (bytes|[KM]iB) of 512 MiB \(above the \d+ MiB start-up footprint; \d+ MiB resident in all\)",
        memory,
    )
    assert "note: left out of the output: optimizer, scheduler, scaler" in done.stderr


def test_names_from_files_are_escaped(cli: Cli, tmp_path: Path) -> None:
    torch.save({"model": {"w\x1b[31m\nred": torch.ones(2)}, "note\x1b[2J": "\x1b]0;title\x07"}, tmp_path / "in.pth")
    torch.save({"model": {"v\x1b[31m": torch.ones(2)}}, tmp_path / "other.pth")
    for done in (
        cli("inspect", "in.pth", "--tensors"),
        cli("plan", "in.pth", "-o", "x.safetensors"),
        cli("merge", "in.pth", "other.pth", "-o", "x.pth", code=4),
    ):
        assert "\x1b" not in done.stdout + done.stderr
