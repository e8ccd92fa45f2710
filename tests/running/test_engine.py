"""The engine: which tensors go to which works, and in which order."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import streammerge as sm
from streammerge.methods.registry import find_method
from streammerge.planning import tasks
from streammerge.planning.budget import Cost, Load, fit
from streammerge.planning.tasks import MergeTask
from streammerge.running.engine import run_all
from streammerge.running.executors.base import Executor, Host
from streammerge.running.job import Bench, Job, lent, new_key
from streammerge.running.sweeping import SweepWork
from streammerge.running.worker import MergeWork
from streammerge.sources.stored import Stored
from streammerge.stores.checksums import CRC32C
from streammerge.stores.inputs import InputFiles
from streammerge.stores.locations import parse
from streammerge.tensors.dtypes import DType
from streammerge.tensors.spec import GRAIN, TensorSpec

SEEN: list[tuple[type, list[Any]]] = []


class Watched(Executor):
    """Runs on the calling thread, gives results in the wrong order, and records works and units."""

    def run(self, work: Any, units: Iterable[Any], backlog: int = 64) -> Generator[Any, None, None]:
        given = list(units)
        SEEN.append((type(work), given))
        with closing(work.open(Host(lambda: False))) as worker:
            yield from map(worker.run, reversed(given))


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    monkeypatch.setattr(tasks, "PIECE_ELEMS", GRAIN)
    SEEN.clear()
    paths = [tmp_path / f"{number}.safetensors" for number in range(2)]
    for number, path in enumerate(paths):
        make = torch.Generator().manual_seed(number)
        sizes = {"long": 3 * GRAIN + 5, "short": 7, "empty": 0, "other": GRAIN}
        save_file({name: torch.randn(size, generator=make) for name, size in sizes.items()}, path)
    return paths


def test_long_tensors_are_swept_in_pieces_and_then_made(pair: list[Path], tmp_path: Path) -> None:
    how = {"method": "slerp", "parameters": {"t": 0.3}}
    sm.merge(pair, tmp_path / "wanted.safetensors", workers=1, **how)  # type: ignore[arg-type]
    sm.merge(pair, tmp_path / "out.safetensors", executor=Watched, **how)  # type: ignore[arg-type]
    assert (tmp_path / "out.safetensors").read_bytes() == (tmp_path / "wanted.safetensors").read_bytes()
    assert [kind for kind, _ in SEEN] == [MergeWork, SweepWork, MergeWork]
    alone, sweep, spread = (units for _, units in SEEN)
    assert {piece.task.out.name for batch in alone for piece in batch} == {"short", "other"}
    ends = [(0, GRAIN), (GRAIN, 2 * GRAIN), (2 * GRAIN, 3 * GRAIN), (3 * GRAIN, 3 * GRAIN + 5)]
    assert sweep == [(number, *span) for number, span in enumerate(ends)]
    assert [(piece.start, piece.stop) for (piece,) in spread] == ends


def test_without_passes_all_pieces_are_one_work(pair: list[Path], tmp_path: Path) -> None:
    sm.merge(pair, tmp_path / "out.safetensors", executor=Watched)
    ((kind, units),) = SEEN
    assert kind is MergeWork
    assert sum(len(batch) for batch in units) == 4 + 1 + 1


@pytest.mark.parametrize("elsewhere", [True, False])
def test_only_workers_of_this_process_have_their_inputs_fetched_here(
    elsewhere: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other processes fetch what they read themselves: blocks that nobody reads here would be in the way."""
    announced = list[int]()
    monkeypatch.setattr(InputFiles, "announce", lambda self, place, offset, nbytes: announced.append(nbytes))
    monkeypatch.setattr(Watched, "elsewhere", elsewhere)
    save_file({"w": torch.ones(100)}, tmp_path / "in.safetensors")
    source = Stored(TensorSpec("w", DType.F32, (100,)), parse(tmp_path / "in.safetensors"), 0)
    task = MergeTask(source.spec, find_method("linear"), (source,), 0, 0)
    budget = fit(1 << 28, 1, Cost(8, 2, 4, 4), Load(streams=1))
    job = Job(new_key(), budget, {}, False, False, CRC32C, (Nowhere(),))
    inputs = InputFiles({})
    with lent(job, inputs), closing(run_all(job, Watched(1), [task], lambda piece: True, inputs)) as results:
        assert [(done.start, done.stop) for done in results] == [(0, 100)]
    assert announced == ([] if elsewhere else [400])


class Nowhere:
    """Takes bytes and forgets them."""

    def open(self, bench: Bench) -> Nowhere:
        return self

    def write_full(self, data: Any, offset: int) -> None:
        pass

    def found(self) -> None:
        return None
