"""Files that are read: counts are always checked, and special files are refused."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest

import streammerge as sm
from streammerge.stores import system
from streammerge.stores.files import InputFile
from streammerge.stores.locations import parse
from test_memory import cached_share


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


@pytest.mark.parametrize("mapped", [False, True])
def test_what_follows_a_released_range_stays_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mapped: bool
) -> None:
    """The system has read it ahead. To drop it read a run's inputs three times."""
    mib, dropped = 1 << 20, list[tuple[int, int]]()
    monkeypatch.setattr(system, "drop_cached", lambda fd, offset, nbytes: dropped.append((offset, offset + nbytes)))
    (tmp_path / "x").write_bytes(bytes(16 * mib))
    file = InputFile(parse(tmp_path / "x"), polite=True)
    if mapped:
        assert not any(file.view(0, 8 * mib))
    for begin in (0, 4 * mib, 8 * mib, 12 * mib):
        file.release(begin, 4 * mib)
    assert [end for _, end in dropped] == [4 * mib, 8 * mib, 12 * mib, 16 * mib]
    assert all(begin <= max(end - 4 * mib, 0) for begin, end in dropped)


@pytest.mark.skipif(not hasattr(os, "RWF_NOWAIT"), reason="the system does not tell")
def test_whether_a_byte_is_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x").write_bytes(bytes(1 << 20))
    file = InputFile(parse(tmp_path / "x"))
    assert file.is_cached(0)
    assert file.is_cached((1 << 20) - 1)
    with open(tmp_path / "x", "rb") as opened:
        os.fsync(opened.fileno())  # what is not written cannot be dropped
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if cached_share(tmp_path / "x") == 0:  # a file system in memory drops nothing
        assert not file.is_cached(0)
    monkeypatch.delattr(os, "RWF_NOWAIT")
    assert not file.is_cached(0)


@pytest.mark.skipif(os.geteuid() != 0, reason="takes the place of another user")
def test_a_folder_that_may_not_be_entered_is_told() -> None:
    """A file in it is not absent: nobody could tell."""
    folder = Path(tempfile.mkdtemp())
    try:
        (folder / "x").write_bytes(b"1")
        os.seteuid(65534)
        try:
            with pytest.raises(sm.FormatError, match=r"x: Permission denied, since its folder may not be entered"):
                parse(folder / "x").status()
            assert "may not be entered" in parse(folder / "x").broken_link()
        finally:
            os.seteuid(0)
        assert parse(folder / "x").broken_link() == parse(folder / "y").broken_link() == ""
    finally:
        shutil.rmtree(folder)
