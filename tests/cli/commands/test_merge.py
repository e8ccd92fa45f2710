"""``streammerge merge``: its options, and what it does about other runs."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from conftest import Cli


def test_two_runs_on_one_output(tmp_path: Path, cli: Cli, voices: tuple[Path, Path]) -> None:
    from streammerge.stores.locations import parse

    with_lock = parse(tmp_path / "voice.pth").stage()
    try:
        done = cli("merge", *voices, "-o", "voice.pth", code=7)
        assert f"process {os.getpid()}" in done.stderr
    finally:
        with_lock.abort()
    cli("merge", *voices, "-o", "voice.pth")


def test_what_a_killed_run_left_is_removed_by_the_next(tmp_path: Path, cli: Cli, voices: tuple[Path, Path]) -> None:
    left = tmp_path / ".voice.pth.streammerge"
    (left / "output").mkdir(parents=True)
    (left / "output" / "voice.pth").write_bytes(b"half")
    (left / "lock").write_text("4194305\n")
    cli("merge", *voices, "-o", "voice.pth")
    assert not left.exists()
    assert torch.load(tmp_path / "voice.pth")["step"] == 30


def test_a_dry_run_plans_the_output_that_the_merge_writes(tmp_path: Path, cli: Cli, voices: tuple[Path, Path]) -> None:
    shown = cli("merge", *voices, "-o", "voice", "--dry-run")
    assert "voice is written as voice.pth" in shown.stderr
    assert "-> voice.pth" in shown.stdout
    assert not list(tmp_path.glob("voice*"))


def test_help_names_every_option_of_the_interface(cli: Cli) -> None:
    shown = cli("merge", "--help").stdout
    options = "--weights --no-normalize --method --memory --workers --io --dtype --out-dtype --compute-dtype --state-dict"
    options += " --ema --last --max-shard-size --convert-first --overwrite --on-missing --integers --allow-nonfinite"
    options += " --format --debug --no-progress --dry-run --keep-optimizer"
    assert [option for option in options.split() if option not in shown] == []
