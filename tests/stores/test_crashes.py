"""Crashes, failing disks, vanishing inputs and long lives, on processes of their own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest
import torch
from conftest import trained

import streammerge as sm

SWEEP = Path(__file__).parents[1] / "crashes.py"
STRACE = shutil.which("strace")


def sweep(*arguments: object) -> tuple[int, int]:
    """Runs a sweep; how many crashes were tried, and how many of those went on from kept pieces."""
    done = subprocess.run([sys.executable, SWEEP, *map(str, arguments)], capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout + done.stderr
    tried, survived, resumed = map(int, re.findall(r"\d+", done.stdout.splitlines()[-1]))
    assert tried == survived
    return tried, resumed


@pytest.mark.parametrize(
    ("kind", "every"), [("file", 12), ("archive", 24), ("spooled", 28), ("folder", 28), ("replaced folder", 28)]
)
@pytest.mark.sampled(2)
def test_killed_at_any_call_nothing_is_lost(kind: str, every: int) -> None:
    tried, _ = sweep("kill-at-calls", "--kind", kind, "--every", every)
    assert tried > 5


@pytest.mark.parametrize(("kind", "every"), [("file", 24), ("replaced folder", 48)])
@pytest.mark.sampled(2)
def test_a_disk_that_fails_at_any_call_loses_nothing(kind: str, every: int) -> None:
    tried, _ = sweep("fail-at-calls", "--kind", kind, "--every", every)
    assert tried > 12


def test_killed_at_any_moment_nothing_is_lost() -> None:
    tried, _ = sweep("kill-at-moments", "--kind", "file", "--moments", 20)
    assert tried == 20


@pytest.mark.slow
@pytest.mark.parametrize("which", ["kill-at-calls", "fail-at-calls", "kill-at-moments"])
def test_all_crashes(which: str) -> None:
    tried, resumed = sweep(which)
    assert tried >= 500
    assert resumed > 0


# ------------------------------------------------------------------------------------------- by the kernel, from outside

CALLS = ("pwrite64", "write", "fsync", "fallocate", "renameat2", "mkdir", "ftruncate", "unlink", "unlinkat")


def traced(folder: Path, call: str, fault: str, number: int, out: str) -> tuple[int, bool]:
    """A merge whose calls to paths beside the output are tampered with: exit code, and whether it came to that."""
    watched = [arg for path in beside(folder, out) for arg in ("-P", str(path))]
    trace = folder / "trace"
    command = [str(STRACE), "-f", "-qq", "-o", str(trace), *watched, "-e", f"trace={call}"]
    command += ["-e", f"inject={call}:{fault}:when={number}", sys.executable, "-m", "streammerge", "merge"]
    command += ["0.pth", "1.pth", "-o", str(folder / out), "--workers", "1", "--format", "quiet"]  # as it is watched
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    assert "Traceback" not in done.stderr
    return done.returncode, done.returncode == -9 or "INJECTED" in trace.read_text()


def beside(folder: Path, out: str) -> list[Path]:
    staging = folder / f".{out}.streammerge"
    name = out if "." in out else "model.safetensors"
    inside = ["", "lock", "journal", "journal.new", "output", f"output/{name}", "output/streammerge.json"]
    return [folder, folder / out, *(staging / part for part in inside)]


def check_traced(folder: Path, out: str, call: str, fault: str, most: int) -> int:
    """Tampers with the first call, the second, and so on; how many there were."""
    for number in range(2):
        torch.save({"model": trained(number), "step": number}, folder / f"{number}.pth")
    (folder / "whole").mkdir()
    sm.merge([folder / "0.pth", folder / "1.pth"], folder / "whole" / out)
    whole = content(folder / "whole" / out)
    for number in range(1, most + 1):
        code, happened = traced(folder, call, fault, number, out)
        if not happened:
            return number - 1
        there = content(folder / out)
        assert there in (None, whole), (call, number)
        if code == 0:
            assert there == whole
        if there is None:
            sm.merge([folder / "0.pth", folder / "1.pth"], folder / out)
            assert content(folder / out) == whole
        shutil.rmtree(folder / out) if (folder / out).is_dir() else (folder / out).unlink()
        with_rest = {path.name for path in folder.iterdir()}
        assert with_rest - {f".{out}.streammerge"} == {"0.pth", "1.pth", "whole", "trace"}
    return most


def content(out: Path) -> dict[str, bytes] | None:
    if out.is_dir():
        return {path.name: path.read_bytes() for path in out.iterdir()}
    return {"": out.read_bytes()} if out.exists() else None


@pytest.mark.skipif(STRACE is None, reason="strace is not installed")
@pytest.mark.parametrize("call", ["pwrite64", pytest.param("fsync", marks=pytest.mark.slow), "renameat2"])
def test_killed_by_the_kernel_at_a_call(tmp_path: Path, call: str) -> None:
    assert check_traced(tmp_path, "out.safetensors", call, "signal=SIGKILL", 1 if call == "renameat2" else 2) >= 1


@pytest.mark.slow
@pytest.mark.skipif(STRACE is None, reason="strace is not installed")
@pytest.mark.parametrize("fault", ["signal=SIGKILL", "error=ENOSPC", "error=EIO", "error=EINTR"])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("out", ["out.safetensors", "out.pth", "out"])
def test_every_call_of_every_container_by_the_kernel(tmp_path: Path, out: str, call: str, fault: str) -> None:
    check_traced(tmp_path, out, call, fault, 40)


# -------------------------------------------------------------------------------------------------------------- long lives


def lives(merges: int, folder: Path) -> None:
    for number in range(2):
        torch.save({"model": trained(number), "step": number}, folder / f"{number}.pth")
    process = psutil.Process()
    counts = []
    for number in range(merges):
        out = folder / ["out.safetensors", "out.pth", "out"][number % 3]
        options = {"weights": [0.3, 0.7]} if number % 2 else {"method": "karcher"}
        sm.merge([folder / "0.pth", folder / "1.pth"], out, overwrite=True, **options)
        sm.verify(out, inputs=folder, sample="20%")
        if number % 10 == 0:
            entries = len(list(folder.iterdir()))
            counts.append((process.num_fds(), threading.active_count(), entries, process.memory_info().rss))
    early, late = counts[len(counts) // 2], counts[-1]
    assert all(after <= before for before, after in zip(early[:3], late[:3], strict=True))
    assert late[3] - early[3] < 3 << 20, counts


def test_many_merges_leave_no_files_threads_or_memory(tmp_path: Path) -> None:
    lives(61, tmp_path)


@pytest.mark.slow
def test_a_thousand_merges_leave_no_files_threads_or_memory(tmp_path: Path) -> None:
    before = set(os.listdir("/tmp"))
    lives(1001, tmp_path)
    assert not {name for name in set(os.listdir("/tmp")) - before if name.startswith("streammerge")}
