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
    assert facts.summary == [("moved most, from A", "l.1 (50\xa0%), l.0 (0\xa0%)"), ("not compared", "1 only in A: only")]
