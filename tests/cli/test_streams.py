"""Standard streams that were closed before the start."""

from __future__ import annotations

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
    save_file({"w": torch.ones(3)}, tmp_path / "a.safetensors")
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    for arguments in (["methods", "ties"], ["merge", "a.safetensors", "a.safetensors", "-o", "模型.safetensors"]):
        command = [sys.executable, "-m", "streammerge", *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.startswith(b"wrote \\u6a21\\u578b.safetensors")
