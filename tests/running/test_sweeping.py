"""Passes of a long tensor are made by all workers, and give the same kernel to each."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import streammerge as sm
from running.own_methods import fickle
from streammerge.planning import tasks
from streammerge.running.executors.threads import ThreadExecutor
from streammerge.running.sweeping import SweepWork
from streammerge.tensors.spec import GRAIN


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    monkeypatch.setattr(tasks, "PIECE_ELEMS", GRAIN)
    paths = [tmp_path / f"{number}.safetensors" for number in range(3)]
    for number, path in enumerate(paths):
        save_file({"long": torch.randn(5 * GRAIN + 77, generator=torch.Generator().manual_seed(number))}, path)
    return paths


def test_a_method_that_is_not_a_function_of_its_group_is_told(
    files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COORDINATOR", str(os.getpid()))
    with pytest.raises(sm.TaskError, match=r"long.*other passes when it is bound a second time"):
        sm.merge(files[:2], tmp_path / "out.safetensors", method=fickle, executor="processes", workers=2)


def test_spans_cover_a_long_tensor_once_in_each_pass(
    files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """slerp makes one pass over two models. The bytes are those of one worker."""
    passes: dict[int, list[tuple[int, int]]] = {}
    opened = SweepWork.open

    def seen(self: SweepWork, host: object) -> object:
        worker = opened(self, host)  # type: ignore[arg-type]
        run = worker.run

        def counted(span: tuple[int, int, int]) -> object:
            passes.setdefault(len(self.passes), []).append(span[1:])
            return run(span)

        monkeypatch.setattr(worker, "run", counted)
        return worker

    monkeypatch.setattr(SweepWork, "open", seen)
    how = {"method": "slerp", "parameters": {"t": 0.3}}
    sm.merge(files[:2], tmp_path / "out.safetensors", workers=2, executor=ThreadExecutor, **how)
    assert [*passes] == [0]
    starts, stops = zip(*sorted(passes[0]), strict=True)
    assert (starts[0], stops[-1]) == (0, 5 * GRAIN + 77)
    assert starts[1:] == stops[:-1]
    sm.merge(files[:2], tmp_path / "alone.safetensors", workers=1, **how)
    assert (tmp_path / "out.safetensors").read_bytes() == (tmp_path / "alone.safetensors").read_bytes()
