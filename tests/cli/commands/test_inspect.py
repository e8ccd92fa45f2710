"""``streammerge inspect``: what it prints of a file."""

from __future__ import annotations

import json
import re
from pathlib import Path

from conftest import Cli


def test_inspect_tells_what_is_inside(cli: Cli, voices: tuple[Path, Path]) -> None:
    shown = cli("inspect", "news.pth").stdout
    for text in ("PyTorch zip", "model: 9 tensors", "training   optimizer", "step: 10", "epoch: 3", "nothing was executed"):
        assert text in shown
    table = cli("inspect", "news.pth", "--tensors").stdout
    assert re.search(r"^xtts\.embed\.weight +float32 +301x433 +@\d+", table, re.MULTILINE)
    data = json.loads(cli("inspect", "news.pth", "--format", "json", "--tensors").stdout)
    assert data["executed"] is False
    assert data["data"]["model_loss"] == {"train_loss": 2.0, "eval_loss": None}
    assert data["entries"]["xtts.layer.bias"]["shape"] == [31]
