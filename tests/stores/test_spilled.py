"""An unnamed temporary file: read back, bounded by the disk, gone with its object."""

from __future__ import annotations

import errno
import gc
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from streammerge.errors import SpaceError
from streammerge.stores import libc
from streammerge.stores.local import LOCAL
from streammerge.stores.memory import memory_store
from streammerge.stores.spilled import SpillFile


def descriptors(folder: Path) -> int:
    """How many descriptors of this process are files that were made in the folder."""
    found = 0
    for link in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            found += str(link.readlink()).startswith(f"{folder}/")
    return found


def test_bytes_come_back_and_no_name_is_left(tmp_path: Path) -> None:
    file = SpillFile(1 << 20, LOCAL.parse(str(tmp_path)))
    data = os.urandom(70_001)
    file.write(memoryview(data), 12_345)
    file.write(memoryview(data[:10]), 0)
    made = bytearray(len(data))
    file.read_into(memoryview(made), 12_345)
    assert made == data
    assert not list(tmp_path.iterdir())
    assert descriptors(tmp_path) == 1
    del file
    gc.collect()
    assert descriptors(tmp_path) == 0


def test_bytes_behind_the_end_are_an_error(tmp_path: Path) -> None:
    file = SpillFile(100, LOCAL.parse(str(tmp_path)))
    with pytest.raises(OSError, match="has become shorter"):
        file.read_into(memoryview(bytearray(10)), 95)


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, nbytes: int) -> bool:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(libc, "reserve", full)
    with pytest.raises(SpaceError, match=r"no room for a temporary file: it needs 1\.0 GB"):
        SpillFile(10**9, LOCAL.parse(str(tmp_path)))


def test_an_output_elsewhere_spills_into_the_systems_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for home in (None, memory_store.parse("memory://here/out")):
        file = SpillFile(4096, home)
        file.write(memoryview(b"abc"), 7)
        made = bytearray(3)
        file.read_into(memoryview(made), 7)
        assert made == b"abc"
    assert not list(tmp_path.iterdir())


def test_another_process_reads_and_writes_it_while_its_maker_lives(tmp_path: Path) -> None:
    file = SpillFile(1000, LOCAL.parse(str(tmp_path)))
    file.write(memoryview(b"from here"), 3)
    program = (
        "import sys; from streammerge.stores.spilled import SpillFile, SpillPlace\n"
        "file = SpillFile.at(SpillPlace(*eval(sys.argv[1])))\n"
        "data = bytearray(9); file.read_into(memoryview(data), 3); print(data.decode())\n"
        "file.write(memoryview(b'from there'), 500)"
    )
    said = subprocess.run(
        [sys.executable, "-c", program, repr(tuple(file.place))], capture_output=True, check=True, text=True
    )
    assert said.stdout == "from here\n"
    data = bytearray(10)
    file.read_into(memoryview(data), 500)
    assert data == b"from there"


def test_a_place_that_is_no_longer_the_file_is_not_opened(tmp_path: Path) -> None:
    file = SpillFile(1000, LOCAL.parse(str(tmp_path)))
    place, before = file.place, descriptors(tmp_path)
    assert SpillFile.at(place) is not None
    for other in (
        place._replace(inode=place.inode + 1),
        place._replace(boot="another machine"),
        place._replace(process=2**30),
        place._replace(descriptor=10**6),
    ):
        assert SpillFile.at(other) is None
    gc.collect()
    assert descriptors(tmp_path) == before
