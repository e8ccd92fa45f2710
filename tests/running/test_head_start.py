"""The beginnings of local inputs are asked for while a merge is planned: in turn, each range once, within a bound."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import wait_until
from safetensors.torch import save_file

import streammerge as sm
from streammerge.errors import ChangedError
from streammerge.running import engine, head_start, process
from streammerge.running.head_start import HeadStart
from streammerge.sources.base import Source
from streammerge.sources.constant import Constant
from streammerge.sources.joined import joined
from streammerge.sources.stored import Stored
from streammerge.stores import files, system
from streammerge.stores.locations import parse
from streammerge.tensors.dtypes import DType
from streammerge.tensors.spec import TensorSpec

MIB = 1 << 20


@pytest.fixture(autouse=True)
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """Notes what is asked of the system: file, first byte, and the byte behind the last. Nothing is in its cache."""
    noted: list[tuple[str, int, int]] = []

    def will_need(self: files.InputFile, offset: int, nbytes: int) -> None:
        noted.append((self.location.name, offset, offset + nbytes))

    monkeypatch.setattr(files.InputFile, "will_need", will_need)
    monkeypatch.setattr(files.InputFile, "is_cached", lambda self, offset: False)
    monkeypatch.setattr(head_start, "LEAST_PREFETCHED_BYTES", 2 * MIB)
    monkeypatch.setattr(engine, "LEAST_PREFETCHED_BYTES", 1 << 60)  # the workers' own reads are not asked for
    return noted


def checkpoint(path: Path, *shapes: tuple[int, ...], begin: int = 0) -> dict[str, Source]:
    """Returns float32 tensors that lie one after the other in a file."""
    found: dict[str, Source] = {}
    for number, shape in enumerate(shapes):
        spec = TensorSpec(f"w{number}", DType.F32, shape)
        found[spec.name] = Stored(spec, parse(path), begin)
        begin += spec.nbytes
    with path.open("ab") as file:
        file.truncate(begin)
    return found


def ended(head: HeadStart, asked: list[tuple[str, int, int]], count: int) -> None:
    """Waits until so many ranges are asked for. Then closes it, which waits for what is asked for at this moment."""
    wait_until(lambda: len(asked) >= count)
    head.close()


def of(name: str, noted: list[tuple[str, int, int]]) -> list[tuple[int, int]]:
    return [(start, stop) for file, start, stop in noted if file == name]


def test_checkpoints_are_asked_for_in_turn_and_to_their_share(tmp_path: Path, asked: list[tuple[str, int, int]]) -> None:
    head = HeadStart(24 * MIB)
    ready = threading.Event()
    first, second = (checkpoint(tmp_path / name, (7 * MIB,), (3,), (MIB,), begin=40) for name in "ab")
    head.opened(Waits(ready, first), 2)
    head.opened(second, 2)
    ready.set()
    ended(head, asked, 6)
    assert [name for name, _, _ in asked] == ["a", "b"] * 3
    for name in "ab":
        assert of(name, asked) == [(40 + 4 * MIB * turn, 40 + 4 * MIB * (turn + 1)) for turn in range(3)]


class Waits(dict[str, Source]):
    """Tensors that can be looked at a second time, by the thread, when an event is set."""

    def __init__(self, ready: threading.Event, entries: Mapping[str, Source]) -> None:
        super().__init__(entries)
        self._ready, self._looks = ready, 0

    def values(self) -> Any:
        self._looks += 1
        assert self._looks == 1 or self._ready.wait(60)
        return super().values()


def test_neighbours_are_one_range_and_pieces_are_asked_for_where_they_lie(
    tmp_path: Path, asked: list[tuple[str, int, int]]
) -> None:
    parts = [checkpoint(tmp_path / name, (3, 100), (5, 100_000)) for name in "xy"]
    whole = {name: joined(name, [part[name] for part in parts], 0) for name in parts[0]}
    head = HeadStart(64 * MIB)
    head.opened(whole, 1)
    ended(head, asked, 2)
    assert sorted(asked) == [(name, 0, 4 * (300 + 500_000)) for name in "xy"]


def test_what_has_no_place_in_a_file_is_passed_over(tmp_path: Path, asked: list[tuple[str, int, int]]) -> None:
    spec = TensorSpec("c", DType.F32, (MIB,))
    entries: dict[str, Source] = {"c": Constant(spec, 1.0), **checkpoint(tmp_path / "a", (), (0, 3), (2 * MIB,))}
    head = HeadStart(64 * MIB)
    head.opened(entries, 1)
    ended(head, asked, 2)
    assert (asked[0][1], asked[-1][2]) == (0, 4 + 8 * MIB)
    assert sum(stop - start for _, start, stop in asked) == 4 + 8 * MIB


def test_short_checkpoints_are_not_asked_for_and_start_no_thread(tmp_path: Path, asked: list[tuple[str, int, int]]) -> None:
    head = HeadStart()
    head.opened(checkpoint(tmp_path / "a", (MIB // 16,), (MIB // 16,)), 2)  # a megabyte of both is wanted
    assert head._thread is None
    head.close()
    assert not asked


def test_inputs_in_the_cache_are_left_alone(
    tmp_path: Path, asked: list[tuple[str, int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files.InputFile, "is_cached", lambda self, offset: self.location.name == "a")
    head = HeadStart(64 * MIB)
    for name in "ab":
        head.opened(checkpoint(tmp_path / name, (4 * MIB,)), 2)
    ended(head, asked, 1)
    assert {name for name, _, _ in asked} == {"b"}


def test_a_file_that_cannot_be_read_is_no_error_here(
    tmp_path: Path, asked: list[tuple[str, int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(self: files.InputFile, offset: int, nbytes: int) -> None:
        raise ChangedError("it is gone")

    monkeypatch.setattr(files.InputFile, "will_need", gone)
    head = HeadStart(64 * MIB)
    head.opened(checkpoint(tmp_path / "a", (4 * MIB,)), 1)
    assert head._thread is not None
    head._thread.join(60)
    assert not head._thread.is_alive()
    head.close()


def test_the_thread_ends_when_all_is_asked_for(tmp_path: Path, asked: list[tuple[str, int, int]]) -> None:
    head = HeadStart(8 * MIB)
    head.opened(checkpoint(tmp_path / "a", (4 * MIB,)), 1)
    assert head._thread is not None
    head._thread.join(60)
    assert not head._thread.is_alive()
    assert [(start, stop) for _, start, stop in asked] == [(0, 4 * MIB), (4 * MIB, 8 * MIB)]
    head.opened(checkpoint(tmp_path / "b", (4 * MIB,)), 1)  # too late: nothing is asked for, and nothing waits
    head.close()
    assert {name for name, _, _ in asked} == {"a"}


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[list[Path]]:
    paths = [tmp_path / f"{name}.safetensors" for name in "ab"]
    for seed, path in enumerate(paths):
        save_file({"w": torch.randn(MIB, generator=torch.Generator().manual_seed(seed))}, path)
    yield paths
    assert not [each for each in threading.enumerate() if each.name == "streammerge-head-start"]


@pytest.mark.parametrize("executor", ["threads", "processes"])
def test_a_merge_asks_for_both_inputs(
    pair: list[Path], tmp_path: Path, asked: list[tuple[str, int, int]], executor: str
) -> None:
    sm.merge(pair, tmp_path / "out.safetensors", executor=executor)
    for path in pair:
        ((start, stop),) = of(path.name, asked)
        assert (stop - start, stop) == (4 * MIB, path.stat().st_size)


def test_a_plan_and_a_polite_merge_ask_for_nothing(
    pair: list[Path], tmp_path: Path, asked: list[tuple[str, int, int]]
) -> None:
    sm.plan(pair, tmp_path / "out.safetensors")
    sm.merge(pair, tmp_path / "out.safetensors", polite=True)
    assert not asked


def test_a_merge_that_is_refused_leaves_no_thread(pair: list[Path], tmp_path: Path) -> None:
    save_file({"w": torch.zeros(3 * MIB // 4)}, tmp_path / "c.safetensors")
    with pytest.raises(sm.MismatchError):
        sm.merge([*pair, tmp_path / "c.safetensors"], tmp_path / "out.safetensors")


def test_the_bound_is_a_share_of_the_memory(
    tmp_path: Path, asked: list[tuple[str, int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "memory_bytes", lambda: 64 * MIB)
    head = HeadStart()
    head.opened(checkpoint(tmp_path / "a", (16 * MIB,)), 1)
    ended(head, asked, 2)
    assert [(start, stop) for _, start, stop in asked] == [(0, 4 * MIB), (4 * MIB, 8 * MIB)]


def test_the_system_reads_what_it_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a real file that is not in the cache, as far as this disk lets files be dropped from it."""
    monkeypatch.undo()
    path = tmp_path / "a"
    path.write_bytes(bytes(300 * MIB))
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if system.is_cached(file.fileno(), 0):
            pytest.skip("this file system keeps its pages")
        head = HeadStart(8 * MIB)
        head.opened(checkpoint(path, (75 * MIB,)), 1)
        wait_until(lambda: all(system.is_cached(file.fileno(), place) for place in (0, 5 * MIB, 8 * MIB - 1)))
        head.close()
        assert not system.is_cached(file.fileno(), 200 * MIB)
