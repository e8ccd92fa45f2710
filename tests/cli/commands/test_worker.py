"""``streammerge worker``: shares and claims on the command line."""

from __future__ import annotations

import json
from pathlib import Path

from conftest import Cli


def test_two_shares_and_the_bytes_of_a_merge(cli: Cli, tmp_path: Path, voices: tuple[Path, Path]) -> None:
    cli("merge", *voices, "-o", "whole.pth")
    said = cli("plan", *voices, "-o", "out.pth", "--save", "merge.plan")
    assert "streammerge worker merge.plan --share 1/N" in said.stderr
    assert not (tmp_path / "out.pth").exists()
    assert "units of" in cli("worker", "merge.plan", "--share", "1/2").stdout
    second = json.loads(cli("worker", "merge.plan", "--share", "2/2", "--format", "json", "--memory", "1GiB").stdout)
    assert second["left"] == 0
    assert second["memory_bytes"] == 1 << 30
    assert "`streammerge finish merge.plan`" in cli("worker", "merge.plan", "--claim").stderr
    cli("finish", "merge.plan")
    assert (tmp_path / "out.pth").read_bytes() == (tmp_path / "whole.pth").read_bytes()


def test_mistakes_are_one_sentence(cli: Cli, tmp_path: Path, voices: tuple[Path, Path]) -> None:
    assert "needs a name for its output; pass -o" in cli("plan", *voices, "--save", "p", code=2).stderr
    cli("plan", *voices, "-o", "out.pth", "--save", "merge.plan")
    assert "like --share 1/8, or any that are free with --claim" in cli("worker", "merge.plan", code=2).stderr
    assert "--share takes I/N" in cli("worker", "merge.plan", "--share", "3/2", code=2).stderr
    assert "is no saved plan" in cli("worker", voices[0], "--claim", code=4).stderr
