"""Facts of merges, outputs and comparisons; the pages are tested in test_making.py."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

import streammerge as sm
from streammerge.reporting.gathered import of_diff


def test_a_comparison_has_a_row_for_each_common_tensor(tmp_path: Path) -> None:
    save_file({"l.0.w": torch.ones(4), "l.1.w": torch.ones(4), "only": torch.ones(2)}, tmp_path / "a.safetensors")
    save_file({"l.0.w": torch.ones(4), "l.1.w": torch.full((4,), 1.5)}, tmp_path / "b.safetensors")
    facts = of_diff(sm.diff(tmp_path / "a.safetensors", tmp_path / "b.safetensors"))
    assert [(row.name, row.distances, row.how) for row in facts.rows] == [
        ("l.0.w", (0.0,), "equal"),
        ("l.1.w", (0.5,), "differs"),
    ]
    assert {row.mark for row in facts.rows} == {""}
    assert facts.summary == [("moved most, from A", "l.1 (50\xa0%), l.0 (0\xa0%)"), ("not compared", "1 only in A: only")]


def test_a_comparison_marks_what_has_no_distance_and_bundles_names(tmp_path: Path) -> None:
    more = {f"v.{n}.w": torch.ones(1) for n in range(30)}
    a = {"l.0.w": torch.tensor([1.0, torch.nan]), "l.1.w": torch.ones(4), "count": torch.tensor(3)}
    save_file(a | more, tmp_path / "a.safetensors")
    save_file(a | {"count": torch.tensor(9)}, tmp_path / "b.safetensors")
    diff = sm.diff(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    facts = of_diff(diff)
    assert [(row.name, row.distances, row.mark) for row in facts.rows] == [
        ("count", (None,), "i"),
        ("l.0.w", (0.0,), "N"),
        ("l.1.w", (0.0,), ""),
    ]
    assert facts.accounts == [("A", "only here", 30, "v.{0-29}.w", "the other lacks it")]
    assert ("not compared", "30 only in A: v.{0-29}.w") in facts.summary
    assert "only in A  v.{0-29}.w" in str(diff)
