"""The open files and buffers that the workers of one process share."""

from __future__ import annotations

import errno
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import streammerge as sm
from streammerge.running import job
from streammerge.running.executors.threads import ThreadExecutor
from streammerge.stores import descriptors, system


class Elsewhere(ThreadExecutor):
    """Threads that open all files themselves, as a process does."""

    def run(self, work: Any, units: Any, backlog: int = 64) -> Any:
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(job, "_lent", {})
            yield from super().run(work, units, backlog)


@pytest.mark.parametrize("fails", [False, True])
def test_a_sync_that_failed_when_a_worker_closed_a_file_is_an_error(
    fails: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is closed while the worker is at other files, and the kernel does not repeat the error."""
    save_file({f"w{number}": torch.ones(3000) for number in range(20)}, tmp_path / "in.safetensors")
    synced, good = list[int](), system.full_sync

    def full_sync(fd: int) -> None:
        if threading.current_thread().name.startswith("streammerge-"):
            synced.append(fd)
            if fails and len(synced) == 1:
                raise OSError(errno.EIO, "the disk failed")
        good(fd)

    monkeypatch.setattr(system, "full_sync", full_sync)
    monkeypatch.setattr(descriptors, "limit", lambda: 4)
    how: dict[str, Any] = {"executor": Elsewhere, "workers": 1, "max_shard_size": 12_500}
    if fails:
        with pytest.raises(OSError, match="the disk failed"):
            sm.merge([tmp_path / "in.safetensors"], tmp_path / "out", **how)
    else:
        sm.merge([tmp_path / "in.safetensors"], tmp_path / "out", **how)
    assert len(synced) > 5
    assert (tmp_path / "out").exists() != fails
