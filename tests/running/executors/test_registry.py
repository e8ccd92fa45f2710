"""Executors are found by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import streammerge as sm
from streammerge.running.executors.registry import executors, find_executor
from streammerge.running.executors.threads import ThreadExecutor


def test_executors(tmp_path: Path) -> None:
    assert executors()["threads"] is ThreadExecutor is find_executor("threads")
    made: list[int] = []

    @sm.executor("counted")
    def counted(workers: int) -> ThreadExecutor:
        made.append(workers)
        return ThreadExecutor(workers)

    save_file({"w": torch.ones(3)}, tmp_path / "a.safetensors")
    sm.merge(tmp_path / "a.safetensors", tmp_path / "out.safetensors", executor="counted", workers=3)
    assert made == [3]
    with pytest.raises(sm.RecipeError, match=r"unknown executor thread; did you mean threads\?"):
        find_executor("thread")
    with pytest.raises(sm.RecipeError, match="`executor` takes a name"):
        find_executor(3)  # type: ignore[arg-type]
