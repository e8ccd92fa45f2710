"""``streammerge plan``: what it prints, and that it writes nothing."""

from __future__ import annotations

import json
import re
from pathlib import Path

from conftest import Cli


def test_plan_and_dry_run_write_nothing(cli: Cli, tmp_path: Path, voices: tuple[Path, Path]) -> None:
    before = sorted(tmp_path.iterdir())
    shown = cli("plan", *voices, "--weights", "3,1").stdout
    assert "weight 0.75" in shown
    assert "the weights sum to 4" in shown
    assert "merged by linear" in shown
    assert cli("merge", *voices, "-o", "voice.pth", "--dry-run").stdout.startswith("linear -> voice.pth")
    planned = json.loads(cli("plan", *voices, "--memory", "2GiB", "--format", "json").stdout)
    assert planned["memory_bytes"] == 2 << 30
    assert planned["peak_bytes"] < 2 << 30
    assert len(planned["tasks"]) == 9
    assert sorted(tmp_path.iterdir()) == before


def test_plan_tells_what_would_stop_a_run(cli: Cli, voices: tuple[Path, Path]) -> None:
    assert "exists already" in cli("plan", *voices, "-o", "news.pth").stdout
    assert "is no folder" in cli("plan", *voices, "-o", "news.pth/voice.pth").stdout
    assert "warning" not in cli("plan", *voices, "-o", "nowhere/voice.pth").stdout, "missing folders are made"
    assert re.search(r"disk +\d+ kB needed", cli("plan", *voices).stdout)
