"""Errors of outputs that do not fit or may not be replaced."""

from __future__ import annotations

import errno
import functools
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import streammerge as sm
from stores.test_base import at
from streammerge.stores.space import exists_already, no_room, space_checked


def test_a_full_store_says_what_it_knows() -> None:
    with pytest.raises(sm.SpaceError, match=r"no room for x: it needs 5.0 kB \(No space left on device\)"):  # noqa: SIM117
        with space_checked(at("x"), 5000):
            raise OSError(28, "No space left on device")
    with pytest.raises(OSError, match="Input/output error"):  # noqa: SIM117
        with space_checked(at("x"), 5000):
            raise OSError(5, "Input/output error")
    assert isinstance(no_room(at("x"), 1), sm.SpaceError)


def test_what_is_missing_is_said_where_the_free_space_is_known() -> None:
    said = str(no_room(at("x"), 5000, "full", free_bytes=2000))
    assert said == "no room for x: it needs 5.0 kB, 2.0 kB are free on that disk (3.0 kB are missing)"
    assert str(no_room(at("x"), 5000, "full", free_bytes=9000)).endswith("9.0 kB are free on that disk (full)")


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.EFBIG, r"it needs 5\.0 kB, and larger files are not allowed there; raise the limit \(ulimit -f\)"),
        (errno.EDQUOT, r"it needs 5\.0 kB, and the quota of its owner is used up"),
        (errno.ENOSPC, r"9\.0 kB are free on that disk \(No space left on device; perhaps for one more file"),
    ],
)
def test_a_limit_is_told_by_its_kind(number: int, said: str) -> None:
    """The free space of the disk says nothing about a limit on files, a quota, or file systems without a free inode."""
    with pytest.raises(sm.SpaceError, match=said), space_checked(at("x"), 5000, free_bytes=9000):
        raise OSError(number, os.strerror(number))


@pytest.mark.skipif(sys.platform == "win32", reason="needs limits of Unix")
def test_a_limit_on_the_size_of_files_is_told(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(300_000)}, tmp_path / "a.safetensors")
    command = [sys.executable, "-m", "streammerge", "convert", "a.safetensors", "-o", "b.safetensors"]
    limit = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (1000_000, 1000_000))
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, preexec_fn=limit)
    assert done.returncode == 6
    assert "larger files are not allowed there; raise the limit (ulimit -f), " in done.stderr
    assert "--max-shard-size" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_an_output_that_exists_names_the_option() -> None:
    assert "few://x exists already; pass `overwrite=True`" in str(exists_already(at("x")))
