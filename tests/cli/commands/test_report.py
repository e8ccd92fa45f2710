"""``streammerge report``; more in tests/reporting."""

from __future__ import annotations

from pathlib import Path

import torch
from conftest import Cli
from safetensors.torch import save_file


def test_an_output_without_a_receipt_has_no_report(tmp_path: Path, cli: Cli) -> None:
    save_file({"w": torch.ones(3)}, tmp_path / "a.safetensors")
    assert "receipt" in cli("report", "a.safetensors", "-o", "a.html", code=3).stderr
    assert not (tmp_path / "a.html").exists()
