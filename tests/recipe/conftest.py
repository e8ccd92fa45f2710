"""Models that the recipes of these tests name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import trained
from safetensors.torch import save_file


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Writes a, b, c and base as safetensors files into the current folder."""
    for seed, name in enumerate(("base", "a", "b", "c")):
        made = trained(seed)
        made["norm.num_batches_tracked"] = torch.tensor(5)
        save_file(made, tmp_path / f"{name}.safetensors")
    monkeypatch.chdir(tmp_path)
    return tmp_path
