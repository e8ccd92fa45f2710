"""Files that are written: counts are checked, long writes go past the page cache, a full disk is found first."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import load_safetensors, trained
from safetensors.torch import save_file

import streammerge as sm
from streammerge.stores import libc, system
from streammerge.stores.locations import parse
from streammerge.stores.written_files import OutputFile


class TestPastThePageCache:
    """Long writes, wherever they begin and end, and whatever the file system says to them."""

    MIB = 1 << 20

    def written(self, path: Path, where: list[tuple[int, int, int]]) -> tuple[bytes, bytes]:
        """What is there and what should be, after writes of (offset, bytes, first byte of a page in memory)."""
        expected, made = bytearray(3 * self.MIB), OutputFile(parse(path), 3 * self.MIB)
        for number, (offset, nbytes, lead) in enumerate(where):
            memory = mmap.mmap(-1, nbytes + 4096)
            memory[lead : lead + nbytes] = random.Random(number).randbytes(nbytes)
            made.write_full(memoryview(memory)[lead : lead + nbytes], offset)
            expected[offset : offset + nbytes] = memory[lead : lead + nbytes]
        made.sync()
        made.close()
        return path.read_bytes(), bytes(expected)

    PLACES = (
        (0, 3 * MIB, 0),
        (4096, MIB, 0),
        (1001, 2 * MIB, 1001),  # pages in memory as in the file, but for the ends
        (1001, 2 * MIB + 5, 1002),  # not so: the file system refuses
        (3 * MIB - 700_001, 700_001, (3 * MIB - 700_001) % 4096),
        (77, 1, 0),
        (5000, 300, 3),
    )

    def test_the_bytes_are_right(self, tmp_path: Path) -> None:
        for number, place in enumerate(self.PLACES):
            there, expected = self.written(tmp_path / str(number), [place])
            assert there == expected, place
        there, expected = self.written(tmp_path / "all", list(self.PLACES))
        assert there == expected

    def test_without_it(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(system, "open_direct", lambda path: -1)
        there, expected = self.written(tmp_path / "out", list(self.PLACES))
        assert there == expected

    @pytest.mark.parametrize("cut", [1, 4096, 100_000, 262_144])
    def test_short_counts_are_continued(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: int) -> None:
        good = os.pwrite
        monkeypatch.setattr(
            os, "pwrite", lambda fd, data, offset: good(fd, data[:cut] if len(data) > cut else data, offset)
        )
        places = [place for place in self.PLACES if place[1] < 2 * self.MIB] if cut == 1 else list(self.PLACES)
        there, expected = self.written(tmp_path / "out", places[-3:] if cut == 1 else places)
        assert there == expected

    def test_it_is_what_a_merge_does(self, tmp_path: Path) -> None:
        """Nearly nothing of the output is in the page cache, where the file system can do without."""
        (tmp_path / "probe").touch()
        probe = system.open_direct(str(tmp_path / "probe"))
        if probe < 0:
            pytest.skip("this file system knows no O_DIRECT")
        os.close(probe)
        seen: dict[int, int] = {}
        good = os.pwrite

        def pwrite(fd: int, data: memoryview, offset: int) -> int:
            count = good(fd, data, offset)
            direct = bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT)
            seen[direct] = seen.get(direct, 0) + count
            return count

        for number in range(2):
            save_file({"w": torch.randn(3_000_000), "b": torch.randn(1001)}, tmp_path / f"{number}.safetensors")
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(os, "pwrite", pwrite)
            sm.merge([tmp_path / "0.safetensors", tmp_path / "1.safetensors"], tmp_path / "out.safetensors")
        assert seen[True] > 11_500_000
        assert seen[False] < 500_000


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_is_found_before_the_first_byte(tmp_path: Path) -> None:
    mount = tmp_path / "small"
    mount.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", mount], capture_output=True, check=False
    ).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        save_file({"w": torch.ones(1 << 20)}, tmp_path / "in.safetensors")
        with pytest.raises(sm.SpaceError, match=r"4\.2 MB.*are missing"):
            sm.merge([tmp_path / "in.safetensors"], mount / "out.safetensors")
        assert list(mount.iterdir()) == []
    finally:
        subprocess.run(["umount", mount], check=True)


def test_the_free_space_is_asked_before_a_reservation_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some file systems fill the disk before they say that it is full."""
    free = [82_000_000]

    def reserve(fd: int, nbytes: int) -> bool:
        free[0] = 0
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(libc, "reserve", reserve)
    monkeypatch.setattr("streammerge.stores.local.LocalStore.free_bytes", lambda self, location: free[0])
    with pytest.raises(sm.SpaceError, match=r"needs 100 MB, 82\.0 MB are free on that disk \(18\.0 MB are missing\)"):
        OutputFile(parse(tmp_path / "x"), 100_000_000)


STRACE = shutil.which("strace")


def watching(fault: str) -> list[str]:
    """Returns the start of a command that injects a fault into a call. Only that call stops the program."""
    watched = ["-e", f"trace={fault.partition(':')[0]}", "-e", f"inject={fault}"]
    return [str(STRACE), "-f", "--seccomp-bpf", "-o", "/dev/null", *watched]


@pytest.mark.skipif(STRACE is None, reason="strace is not installed")
@pytest.mark.parametrize(
    ("call", "code"),
    [
        ("pwrite64:error=ENOSPC:when=2", 6),
        ("pwrite64:error=EIO:when=2", 1),
        ("fallocate:error=ENOSPC:when=1", 6),
        ("fsync:error=EIO", 1),
    ],
)
def test_injected_faults_leave_no_output(tmp_path: Path, call: str, code: int) -> None:
    save_file(trained(1), tmp_path / "in.safetensors")
    command = [*watching(call), sys.executable, "-m", "streammerge"]
    command += ["merge", "in.safetensors", "-o", "out.safetensors", "--workers", "1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.safetensors"]


@pytest.mark.skipif(STRACE is None, reason="strace is not installed")
def test_an_output_that_cannot_be_named_is_kept(tmp_path: Path) -> None:
    """All is made and synced when the rename fails, so the same command only has to name it."""
    save_file(trained(1), tmp_path / "in.safetensors")
    command = [sys.executable, "-m", "streammerge", "merge", "in.safetensors", "-o", "out.safetensors", "--workers", "1"]
    broken = [*watching("renameat2:error=EIO"), *command]
    done = subprocess.run(broken, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 1, done.stderr
    assert "are kept; the same command goes on from there" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out.safetensors").exists()
    subprocess.run(command, cwd=tmp_path, check=True, timeout=120)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.safetensors", "out.safetensors"]
    made = load_safetensors(tmp_path / "out.safetensors")
    assert all(torch.equal(made[name], tensor) for name, tensor in trained(1).items())
