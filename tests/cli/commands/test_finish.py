"""``streammerge finish``: what is missing, and the result."""

from __future__ import annotations

import json
from pathlib import Path

from conftest import Cli


def test_what_is_missing_is_named_with_the_command_that_makes_it(
    cli: Cli, tmp_path: Path, voices: tuple[Path, Path]
) -> None:
    cli("plan", *voices, "-o", "out.pth", "--save", "merge.plan")
    said = cli("finish", "merge.plan", code=9).stderr
    assert "units have no receipt yet: 0" in said
    assert "`streammerge worker merge.plan --claim` makes them" in said
    told = json.loads(cli("finish", "merge.plan", "--format", "json", code=9).stdout)
    assert told["error"]["class"] == "UnfinishedError"
    cli("worker", "merge.plan", "--claim")
    (tmp_path / "out.pth").write_bytes(b"mine")
    assert "--overwrite" in cli("finish", "merge.plan", code=2).stderr
    (tmp_path / "out.pth").unlink()
    assert json.loads(cli("finish", "merge.plan", "--format", "json").stdout)["tensors"] == 9
    assert "is finished already" in cli("finish", "merge.plan").stderr
