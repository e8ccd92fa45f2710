"""Options in sentences of the library, as they are typed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import Cli

import streammerge as sm
from streammerge.cli.flags import as_flags


@pytest.mark.parametrize(
    ("said", "typed"),
    [
        ("pass `overwrite=True` to replace it", "pass --overwrite to replace it"),
        ("(`normalize=False` uses them)", "(--no-normalize uses them)"),
        ('pass `memory="12MiB"` or more', "pass --memory 12MiB or more"),
        ('`on_missing="base"`, `"drop"`', "--on-missing base, drop"),
        ("`parameters={'t': ...}`", "-p t=VALUE"),
        ("`parameters={'t': 0.3, 'density': [0.5, 0.7]}`", "-p t=0.3 -p density=0.5,0.7"),
        ("`last=3`, but", "--last 3, but"),
        ('`rename="<dog>=<cat>"` says so', "--rename '<dog>=<cat>' says so"),
        ('`rename="b.*=a.*"`', "--rename 'b.*=a.*'"),
        ("give `weights` and `out`", "give --weights and -o"),
        ("`streammerge methods` lists them; run `git lfs pull`", "`streammerge methods` lists them; run `git lfs pull`"),
        ("``code`` and `unknown`", "``code`` and `unknown`"),
    ],
)
def test_the_command_line_shows_them_as_they_are_typed(said: str, typed: str) -> None:
    assert as_flags(said) == typed


def test_errors_notes_and_plans_of_the_command_line_show_flags(cli: Cli, voices: tuple[Path, Path], tmp_path: Path) -> None:
    assert "; --keep-optimizer keeps" in cli("merge", *voices, "-o", "out.pth").stderr
    assert "pass --overwrite to replace it" in cli("merge", *voices, "-o", "out.pth", code=2).stderr
    shown = cli("plan", *voices, "-o", "x.pth").stdout
    assert "scaler (stale after a merge; --keep-optimizer keeps the first input's)" in shown
    assert "`" not in shown
    told = json.loads(cli("plan", *voices, "-o", "out.pth", "--format", "json").stdout)
    assert any("--keep-optimizer" in note for note in told["notes"])
    assert any("--overwrite" in warning for warning in told["warnings"])
    assert any("`keep_optimizer=True`" in note for note in sm.plan(voices, tmp_path / "x.pth").notes), (
        "the library speaks Python"
    )
