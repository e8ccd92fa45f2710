"""Calls of the C library that a system lacks: the output is made all the same, and a weaker promise is said."""

from __future__ import annotations

import ctypes
import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import assert_same, load_safetensors, trained
from safetensors.torch import save_file

import streammerge as sm
from streammerge.stores import libc
from streammerge.stores.locations import parse
from streammerge.stores.written_files import OutputFile


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
    monkeypatch.setattr(libc, "_fallocate", None if number is None else fails(number))
    monkeypatch.setattr(os, "posix_fallocate", raises(errno.EIO))  # the C library would write into each block
    result = sm.merge(pair, tmp_path / "out.safetensors")
    assert_same(load_safetensors(tmp_path / "out.safetensors"), trained(1))
    assert [note for note in result.notes if "does not reserve room; a disk that fills up is noticed late" in note]


def test_without_reservation_a_file_that_cannot_fit_is_told_first(
    pair: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(libc, "_fallocate", None)
    monkeypatch.setattr("streammerge.stores.local.LocalStore.free_bytes", lambda self, location: 3)
    with pytest.raises(sm.SpaceError, match=r"3 bytes are free on that disk|3 B are free"):
        sm.merge(pair, tmp_path / "out.safetensors")
    assert sorted(tmp_path.iterdir()) == pair


def test_reservation_goes_on_after_a_signal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good, calls = libc._fallocate, []
    if good is None:
        pytest.skip("this platform has no fallocate")

    def interrupted(*arguments: Any) -> int:
        calls.append(arguments)
        return fails(errno.EINTR)() if len(calls) < 3 else int(good(*arguments))

    monkeypatch.setattr(libc, "_fallocate", interrupted)
    file = OutputFile(parse(tmp_path / "x"), 10_000)
    assert file.reserved
    assert len(calls) == 3
    assert os.stat(tmp_path / "x").st_blocks * 512 >= 10_000
    file.close()


def test_a_full_disk_is_no_missing_call(pair: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libc, "_fallocate", fails(errno.ENOSPC))
    with pytest.raises(sm.SpaceError):
        sm.merge(pair, tmp_path / "out.safetensors")
    assert sorted(tmp_path.iterdir()) == pair


@pytest.mark.parametrize("number", [None, errno.ENOSYS, errno.EINVAL])
@pytest.mark.parametrize("out", ["out.safetensors", "out"])
def test_without_exchanging_names(
    pair: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str, number: int | None
) -> None:
    monkeypatch.setattr(libc, "_renameat2", None if number is None else fails(number))
    sm.merge(pair, tmp_path / out)
    with pytest.raises(sm.RecipeError, match="exists already"):
        sm.merge(pair, tmp_path / out)
    sm.merge(pair, tmp_path / out, overwrite=True)
    sm.verify(tmp_path / out, sample=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.safetensors", "1.safetensors", out]


KEPT = """
import sys
import torch
from streammerge.stores import libc

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

if sys.argv[1] == "given back":
    libc.return_large_blocks()
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
