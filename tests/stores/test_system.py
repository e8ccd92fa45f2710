"""Calls that a file system or platform lacks: the output is made all the same, and a weaker promise is said."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import assert_same, load_safetensors, trained
from safetensors.torch import save_file

import streammerge as sm
from streammerge.stores import system
from streammerge.stores.files import OutputFile
from streammerge.stores.locations import parse


@pytest.fixture
def pair(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{number}.safetensors" for number in range(2)]
    for path in paths:
        save_file(trained(1), path)
    return paths


def fails(number: int) -> Any:
    def call(*arguments: object) -> int:
        ctypes.set_errno(number)
        return -1

    return call


def raises(number: int) -> Any:
    def call(*arguments: object, **options: object) -> Any:
        raise OSError(number, os.strerror(number))

    return call


UNKNOWN = (errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


@pytest.mark.parametrize("number", [None, *UNKNOWN])
def test_without_reservation(pair: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int | None) -> None:
    monkeypatch.setattr(system, "_fallocate", None if number is None else fails(number))
    monkeypatch.setattr(os, "posix_fallocate", raises(errno.EIO))  # the C library would write into each block
    result = sm.merge(pair, tmp_path / "out.safetensors")
    assert_same(load_safetensors(tmp_path / "out.safetensors"), trained(1))
    assert [note for note in result.notes if "does not reserve room; a disk that fills up is noticed late" in note]


def test_without_reservation_a_file_that_cannot_fit_is_told_first(
    pair: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(system, "_fallocate", None)
    monkeypatch.setattr("streammerge.stores.local.LocalStore.free_bytes", lambda self, location: 3)
    with pytest.raises(sm.SpaceError, match=r"3 bytes are free on that disk|3 B are free"):
        sm.merge(pair, tmp_path / "out.safetensors")
    assert sorted(tmp_path.iterdir()) == pair


def test_reservation_goes_on_after_a_signal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good, calls = system._fallocate, []
    if good is None:
        pytest.skip("this platform has no fallocate")

    def interrupted(*arguments: Any) -> int:
        calls.append(arguments)
        return fails(errno.EINTR)() if len(calls) < 3 else int(good(*arguments))

    monkeypatch.setattr(system, "_fallocate", interrupted)
    file = OutputFile(parse(tmp_path / "x"), 10_000)
    assert file.reserved
    assert len(calls) == 3
    assert os.stat(tmp_path / "x").st_blocks * 512 >= 10_000
    file.close()


def test_a_full_disk_is_no_missing_call(pair: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "_fallocate", fails(errno.ENOSPC))
    with pytest.raises(sm.SpaceError):
        sm.merge(pair, tmp_path / "out.safetensors")
    assert sorted(tmp_path.iterdir()) == pair


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


@pytest.mark.parametrize("number", [None, errno.ENOSYS, errno.EINVAL])
@pytest.mark.parametrize("out", ["out.safetensors", "out"])
def test_without_exchanging_names(
    pair: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str, number: int | None
) -> None:
    monkeypatch.setattr(system, "_renameat2", None if number is None else fails(number))
    sm.merge(pair, tmp_path / out)
    with pytest.raises(sm.RecipeError, match="exists already"):
        sm.merge(pair, tmp_path / out)
    sm.merge(pair, tmp_path / out, overwrite=True)
    sm.verify(tmp_path / out, sample=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.safetensors", "1.safetensors", out]


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
        monkeypatch.setattr(system, name, None)
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


KEPT = """
import sys
import torch
from streammerge.stores import system

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

if sys.argv[1] == "given back":
    system.return_large_blocks()
kept = []
before = resident()
for _ in range(60):
    large = torch.ones(1 << 20, dtype=torch.float64)
    kept.append(torch.ones(256))
    del large
    kept.append(torch.ones(256))
print((resident() - before) >> 20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks for resident pages")
def test_large_blocks_are_given_back() -> None:
    """Small blocks between large ones make the C library keep all of these, unless it is told otherwise."""
    found = {
        how: int(subprocess.run([sys.executable, "-c", KEPT, how], capture_output=True, text=True, check=True).stdout)
        for how in ("as it is", "given back")
    }
    assert found["given back"] <= 16, found
