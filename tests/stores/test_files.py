"""Files that are read: counts are always checked, and special files are refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import streammerge as sm
from streammerge.stores.files import InputFile
from streammerge.stores.locations import parse


def test_short_reads_are_noticed(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"12345")
    file = InputFile(parse(tmp_path / "x"))
    with pytest.raises(sm.ChangedError, match="ended before byte 8"):
        file.read_into(memoryview(bytearray(6)), 2)
    with pytest.raises(sm.ChangedError):
        file.view(2, 6)


def test_special_files_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.pth")
    with pytest.raises(sm.FormatError, match="not a regular file"):
        sm.inspect(tmp_path / "fifo.pth")
