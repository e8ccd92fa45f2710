"""Calls that a file system or platform lacks: the output is made all the same, and a weaker promise is said."""

from __future__ import annotations

import errno
import mmap
import os
from pathlib import Path
from typing import Any

import pytest
from conftest import assert_same, load_safetensors, trained
from safetensors.torch import save_file

import streammerge as sm
from streammerge.stores import libc, system


@pytest.fixture
def pair(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{number}.safetensors" for number in range(2)]
    for path in paths:
        save_file(trained(1), path)
    return paths


def raises(number: int) -> Any:
    def call(*arguments: object, **options: object) -> Any:
        raise OSError(number, os.strerror(number))

    return call


@pytest.mark.parametrize("out", ["out.safetensors", "out"])
def test_without_syncing_folders(pair: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str) -> None:
    good = os.fsync

    def fsync(fd: int) -> None:
        if os.path.isdir(f"/dev/fd/{fd}"):
            raise OSError(errno.EINVAL, "Invalid argument")
        good(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    result = sm.merge(pair, tmp_path / out)
    assert [note for note in result.notes if "does not sync folders; a power failure may undo its name" in note]
    sm.verify(tmp_path / out, sample=0)


@pytest.mark.parametrize("out", ["out.safetensors", "out"])
def test_a_folder_that_may_not_be_listed_takes_an_output(
    pair: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str
) -> None:
    """Write and search permission are enough to publish a name; opening a folder needs read permission."""
    good = os.open

    def opened(path: Any, flags: int, *rest: Any, **options: Any) -> int:
        if flags & os.O_DIRECTORY and Path(path) == tmp_path:
            raise PermissionError(errno.EACCES, "Permission denied")
        return good(path, flags, *rest, **options)

    monkeypatch.setattr(os, "open", opened)
    result = sm.merge(pair, tmp_path / out)
    assert [note for note in result.notes if "does not sync folders; a power failure may undo its name" in note]
    sm.verify(tmp_path / out, sample=0)


def test_as_on_macos(pair: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """None of Linux's own calls, and F_FULLFSYNC. What macOS itself does is not tried here."""
    full: list[int] = []
    good = system.fcntl.fcntl

    def fcntl(fd: int, what: int, *rest: Any) -> Any:
        if what == 51:
            full.append(fd)
            return 0
        return good(fd, what, *rest)

    monkeypatch.setattr(system.fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(system.fcntl, "fcntl", fcntl)
    for name in ("_fallocate", "_renameat2", "_sync_file_range"):
        monkeypatch.setattr(libc, name, None)
    for name in ("posix_fallocate", "posix_fadvise", "preadv", "O_DIRECT", "sched_getaffinity"):
        monkeypatch.delattr(os, name, raising=False)
    monkeypatch.delattr(mmap, "MADV_DONTNEED", raising=False)
    for io in ("mmap", "pread"):
        sm.merge(pair, tmp_path / f"{io}.safetensors", io=io, polite=True)
        assert_same(load_safetensors(tmp_path / f"{io}.safetensors"), trained(1))
    assert len(full) >= 2


@pytest.mark.parametrize("number", [errno.ENOTTY, errno.EINVAL])
def test_a_full_sync_that_the_drive_does_not_know_is_a_sync(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    synced: list[int] = []
    monkeypatch.setattr(system.fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(system.fcntl, "fcntl", raises(number))
    monkeypatch.setattr(os, "fsync", synced.append)
    system.full_sync(7)
    assert synced == [7]
    monkeypatch.setattr(system.fcntl, "fcntl", raises(errno.EIO))
    with pytest.raises(OSError, match="Input/output"):
        system.full_sync(7)


def test_a_side_file_that_vanishes_does_not_undo_a_run(tmp_path: Path) -> None:
    """The output is published by then, and what the run wrote is known from the plan."""
    (tmp_path / "in").mkdir()
    save_file(trained(1), tmp_path / "in" / "model.safetensors")
    (tmp_path / "in" / "config.json").write_text("{}")
    (tmp_path / "in" / "vocabulary.txt").write_text("a b c")
    planned = sm.plan(tmp_path / "in", tmp_path / "out")

    def listen(event: object) -> None:
        if type(event).__name__ == "Published":
            (tmp_path / "in" / "vocabulary.txt").unlink()

    result = sm.merge(tmp_path / "in", tmp_path / "out", listener=listen)
    assert result.written_bytes == sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    assert planned.write_bytes == result.written_bytes
