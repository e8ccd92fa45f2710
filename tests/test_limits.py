"""Law 1 enforced by the kernel: merges run in a memory cgroup, which kills a process above its limit."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from benchmarks.cgroup import why_not
from benchmarks.measure import Measured, measure
from safetensors.torch import save_file

REASON = why_not()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))
ELEMS = 32 << 20


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Writes three files of 67 MB; one tensor is nearly the whole file."""
    folder = tmp_path_factory.mktemp("inputs")
    block = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))
    for number in range(3):
        large = (block + 0.01 * number).bfloat16().repeat(ELEMS >> 20)
        save_file({"large": large, "small": torch.randn(1001)}, folder / f"{number}.safetensors")
    return [folder / f"{number}.safetensors" for number in range(3)]


def merge(inputs: list[Path], out: Path, memory: str, *options: str, limit: int | None = None) -> Measured:
    command = [sys.executable, "-m", "streammerge", "merge", *inputs, "-o", out, "--memory", memory]
    return measure([*command, "--format", "json", "--no-progress", *options], limit)


def told(done: Measured) -> dict[str, int]:
    result: dict[str, int] = json.loads(done.output.splitlines()[-1])
    return result


@pytest.mark.parametrize(
    ("method", "io"),
    [
        ("linear", "mmap"),
        ("ties", "pread"),
        pytest.param("linear", "pread", marks=pytest.mark.slow),
        pytest.param("ties", "mmap", marks=pytest.mark.slow),
    ],
)
def test_law_1_holds_where_the_kernel_kills(inputs: list[Path], tmp_path: Path, method: str, io: str) -> None:
    options = ["--method", method, "--io", io]
    if method == "ties":
        options += ["--base", str(inputs[0]), "-p", "density=0.5"]
        inputs = inputs[1:]
    free = merge(inputs, tmp_path / "free.safetensors", "1GiB", *options)
    assert free.exit_code == 0, free.output
    for memory in (80,):
        out = tmp_path / f"{memory}.safetensors"
        limit = told(free)["startup_bytes"] + (memory << 20)
        limited = merge(inputs, out, f"{memory}MiB", *options, limit=limit)
        assert limited.exit_code == 0, limited.output
        assert out.read_bytes() == (tmp_path / "free.safetensors").read_bytes()
        assert limited.cgroup is not None
        assert limited.cgroup <= limit


def test_the_limit_kills(tmp_path: Path) -> None:
    """The same limit kills a process that holds a whole model, so the limit works."""
    hungry = measure([sys.executable, "-c", "b = b'x' * (256 << 20)"], 64 << 20)
    assert hungry.exit_code == -9


def test_a_budget_below_need_ends_before_an_input_is_read(inputs: list[Path], tmp_path: Path) -> None:
    for path in inputs:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    refused = merge(inputs, tmp_path / "out.safetensors", "4MiB", limit=300 << 20)
    assert refused.exit_code == 5
    assert "--memory" in refused.output
    assert refused.disk_read < 16 << 20
    assert not (tmp_path / "out.safetensors").exists()


def test_the_memory_that_a_process_may_have_is_known() -> None:
    code = "from streammerge.running import process; print(process.memory_bytes())"
    assert int(measure([sys.executable, "-c", code], 300 << 20).output) == 300 << 20
    assert int(measure([sys.executable, "-c", code]).output) > 300 << 20
