"""Files that machines send: what waits in memory, and when it is sent."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

import streammerge as sm
from streammerge.stores.locations import parse
from streammerge.stores.parts import PartedOutput
from streammerge.stores.s3 import S3Upload


def test_few_parts_of_an_archive_wait_in_memory(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The header of a record holds a checksum, and is given as soon as its tensor is made."""
    paths = []
    for seed in (1, 2):
        make = torch.Generator().manual_seed(seed)
        paths.append(tmp_path / f"{seed}.pth")
        torch.save({f"{n}": torch.randn(300, 1001, generator=make) for n in range(200)}, paths[-1])
    waiting = list[int]()
    write = PartedOutput.write_full

    def watched(self: PartedOutput, data: Any, offset: int) -> None:
        write(self, data, offset)
        waiting.append(self.waiting)

    monkeypatch.setattr(PartedOutput, "write_full", watched)
    send = S3Upload.send

    def slow(self: S3Upload, number: int, data: memoryview) -> Any:
        time.sleep(0.5)  # so that the last parts are sent after the workers have ended
        return send(self, number, data)

    monkeypatch.setattr(S3Upload, "send", slow)
    expected = Path(str(sm.merge(paths, tmp_path / "whole.pth").out)).read_bytes()
    sm.plan(paths, f"{s3}/out.pth", save=tmp_path / "plan")
    sm.worker(tmp_path / "plan", claim=True, workers=1)
    sm.finish(tmp_path / "plan")
    assert max(waiting) <= 10, "of 46 parts"
    place = parse(f"{s3}/out.pth")
    assert place.read(0, place.size) == expected
