"""Mapped files that shrink: the run ends with an error, and other faults stay what they were."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from streammerge.stores import faults

TRUNCATING = """
import os, sys, torch, streammerge as sm
path, out, io, cut, when, method = sys.argv[1:]
seen = []
def listen(event):
    if type(event).__name__ == "TaskDone":
        seen.append(event)
        if len(seen) == int(when):
            os.truncate(path, int(cut))
try:
    sm.merge([path.replace("1.", "0."), path], out, listener=listen, io=io, workers=2, method=method)
except sm.StreammergeError as error:
    print(type(error).__name__, error)
"""


@pytest.mark.parametrize(
    ("method", "io"),
    [
        ("linear", "mmap"),
        ("karcher", "pread"),
        pytest.param("linear", "pread", marks=pytest.mark.slow),
        pytest.param("karcher", "mmap", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(("share", "when"), [(0.0, 1), (0.3, 2), (0.95, 1), (0.6, 9)])
@pytest.mark.sampled(2, by="method")
def test_a_truncated_input_is_an_error_and_no_death(tmp_path: Path, io: str, method: str, share: float, when: int) -> None:
    for number in range(2):
        save_file(
            {f"w{i}": torch.full((1 << 19,), float(number + i)) for i in range(12)}, tmp_path / f"{number}.safetensors"
        )
    path = tmp_path / "1.safetensors"
    cut = int(path.stat().st_size * share)
    command = [sys.executable, "-c", TRUNCATING, path, tmp_path / "out.safetensors", io, cut, when, method]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
    assert re.match(r"ChangedError .*1\.safetensors", done.stdout)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0.safetensors", "1.safetensors"]


def test_a_bus_error_that_is_not_ours_is_as_deadly_as_ever(tmp_path: Path) -> None:
    code = """
import mmap, os, sys
from streammerge.stores import faults
with open(sys.argv[1], "wb+") as file:
    file.write(bytes(8192))
    file.flush()
    mapped = mmap.mmap(file.fileno(), 8192)
    os.truncate(sys.argv[1], 0)
    with faults.survived():
        mapped[5000]
print("alive")
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "x")], capture_output=True, text=True, timeout=60)
    assert done.returncode == -7
    assert "alive" not in done.stdout


WATCHED = """
import mmap, os, sys
from streammerge.stores import faults
marks = []
with open(sys.argv[1], "wb+") as file:
    file.write(b"x" * 3 * mmap.PAGESIZE)
    file.flush()
    mapped = mmap.mmap(file.fileno(), 3 * mmap.PAGESIZE)
    faults.watch(mapped, lambda: marks.append(1))
    with faults.survived(), faults.survived():
        assert mapped[-1] == 120 and not marks
        os.truncate(sys.argv[1], mmap.PAGESIZE)
        print(mapped[0], mapped[mmap.PAGESIZE], mapped[-1], len(marks))
    mapped.close()
del mapped
print(len(faults._maps))
"""


@pytest.mark.skipif(not faults._SUPPORTED, reason="SIGBUS is answered on Linux only")
def test_lost_pages_are_zeros_and_the_file_is_marked_once(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", WATCHED, str(tmp_path / "x")], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.split()) == (0, ["120", "0", "0", "1", "0"]), done.stderr
