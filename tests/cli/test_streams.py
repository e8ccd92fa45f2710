"""Standard streams that were closed before the start."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import load_safetensors
from safetensors.torch import save_file


@pytest.mark.parametrize("closed", ["2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_no_harm(tmp_path: Path, closed: str) -> None:
    """Nothing that is opened takes their numbers, and nothing that is printed goes into a model."""
    save_file({"w": torch.ones(3)}, tmp_path / "a.safetensors")
    command = f"{shlex.quote(sys.executable)} -m streammerge merge a.safetensors a.safetensors -o out.safetensors {closed}"
    assert subprocess.run(["sh", "-c", command], cwd=tmp_path, timeout=60).returncode == 0
    assert load_safetensors(tmp_path / "out.safetensors")["w"].tolist() == [1, 1, 1]


def test_an_encoding_without_the_characters_is_no_error(tmp_path: Path) -> None:
    for name, value in (("a", 1.0), ("b", 0.0)):
        save_file({"w": torch.full((3,), value)}, tmp_path / f"{name}.safetensors")
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    for arguments in (["methods", "ties"], ["merge", "a.safetensors", "b.safetensors", "-o", "模型.safetensors"]):
        command = [sys.executable, "-m", "streammerge", *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.startswith(b"wrote \\u6a21\\u578b.safetensors")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("form", ["human", "json"])
def test_a_stream_that_cannot_be_written_is_not_the_disk_of_the_output(form: str, tmp_path: Path) -> None:
    for name, value in (("a", 0.0), ("b", 2.0)):
        save_file({"w": torch.full((3,), value)}, tmp_path / f"{name}.safetensors")
    inputs = ["a.safetensors", "b.safetensors"]
    command = [sys.executable, "-m", "streammerge", "merge", *inputs, "-o", "out.safetensors", "--format", form]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, cwd=tmp_path, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120)
    assert done.returncode == 1
    assert load_safetensors(tmp_path / "out.safetensors")["w"].tolist() == [1, 1, 1]
    last = done.stderr.splitlines()[-1]
    if form == "human":
        assert done.stderr == "note: the output is there, whole\nerror: cannot print on stdout: No space left on device\n"
    else:
        failed = json.loads(last)
        assert failed["message"] == "cannot print on stdout: No space left on device"
        assert failed["notes"] == ["the output is there, whole"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("form", ["human", "json"])
def test_a_log_that_cannot_be_written_stops_no_merge(form: str, tmp_path: Path) -> None:
    for name, value in (("a", 0.0), ("b", 2.0)):
        save_file({"w": torch.full((3,), value)}, tmp_path / f"{name}.safetensors")
    inputs = ["a.safetensors", "b.safetensors", "--weights", "1,1", "--no-normalize"]
    command = [sys.executable, "-m", "streammerge", "merge", *inputs, "-o", "out.safetensors", "--format", form]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=full, text=True, timeout=120)
    assert done.returncode == 0
    assert "out.safetensors" in done.stdout
    assert load_safetensors(tmp_path / "out.safetensors")["w"].tolist() == [2, 2, 2]
