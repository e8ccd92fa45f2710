"""The beginnings of local inputs are read into the system's cache while a merge is planned, within a bound."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

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
Noted = list[tuple[str, int, int]]


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> Noted:
    """Notes what is read into the cache: file, first byte, and the byte behind the last. Nothing is in it before."""
    noted: Noted = []

    def read_into_cache(self: files.InputFile, offset: int, nbytes: int, sink: int) -> None:
        noted.append((self.location.name, offset, offset + nbytes))

    monkeypatch.setattr(files.InputFile, "read_into_cache", read_into_cache)
    monkeypatch.setattr(files.InputFile, "is_cached", lambda self, offset: False)
    monkeypatch.setattr(head_start, "LEAST_PREFETCHED_BYTES", 2 * MIB)
    monkeypatch.setattr(engine, "LEAST_PREFETCHED_BYTES", 1 << 60)  # the workers' own reads are left alone
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


def read(noted: Noted, count: int, *checkpoints: dict[str, Source], most_bytes: int | None = 64 * MIB) -> Noted:
    """Returns what a head start reads, sorted, once it is so many ranges."""
    with closing(HeadStart(most_bytes)) as head:
        head.opened(checkpoints)
        wait_until(lambda: len(noted) >= count)
        files_open = head._files
        assert files_open._files
    assert not files_open._files
    return sorted(noted)


def test_each_checkpoint_has_its_share(tmp_path: Path, noted: Noted) -> None:
    both = [checkpoint(tmp_path / name, (MIB,), (3,), (2 * MIB,), begin=40) for name in "ab"]
    share = 6 * MIB
    assert read(noted, 2, *both, most_bytes=2 * share) == [(name, 40, 40 + share) for name in "ab"]


def test_long_ranges_are_read_in_parts(tmp_path: Path, noted: Noted) -> None:
    found = read(noted, 3, checkpoint(tmp_path / "a", (5 * MIB,)))
    assert found == [("a", 0, 8 * MIB), ("a", 8 * MIB, 16 * MIB), ("a", 16 * MIB, 20 * MIB)]


def test_neighbours_are_one_range_and_pieces_are_read_where_they_lie(tmp_path: Path, noted: Noted) -> None:
    parts = [checkpoint(tmp_path / name, (3, 100), (5, 100_000)) for name in "xy"]
    whole = {name: joined(name, [part[name] for part in parts], 0) for name in parts[0]}
    assert read(noted, 2, whole) == [(name, 0, 4 * (300 + 500_000)) for name in "xy"]


def test_what_has_no_place_in_a_file_is_passed_over(tmp_path: Path, noted: Noted) -> None:
    spec = TensorSpec("c", DType.F32, (MIB,))
    entries: dict[str, Source] = {"c": Constant(spec, 1.0), **checkpoint(tmp_path / "a", (), (0, 3), (MIB,))}
    assert read(noted, 1, entries) == [("a", 0, 4 + 4 * MIB)]


@pytest.mark.parametrize("most_bytes", [None, 0])
def test_short_checkpoints_are_left_alone_and_start_no_thread(tmp_path: Path, noted: Noted, most_bytes: int | None) -> None:
    """A megabyte of each of two is wanted."""
    length = (MIB // 16,) if most_bytes is None else (8 * MIB,)
    before = threading.active_count()
    head = HeadStart(most_bytes)
    head.opened([checkpoint(tmp_path / name, length, length) for name in "ab"])
    assert threading.active_count() == before
    head.close()
    assert not noted


def test_inputs_in_the_cache_are_left_alone(tmp_path: Path, noted: Noted, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ends of a range may be there, since the headers around it were read."""
    ends = {0, 8 * MIB - 1}
    monkeypatch.setattr(files.InputFile, "is_cached", lambda file, at: file.location.name == "a" or at in ends)
    both = [checkpoint(tmp_path / name, (2 * MIB,)) for name in "ab"]
    assert read(noted, 1, *both) == [("b", 0, 8 * MIB)]


def test_a_file_that_cannot_be_read_is_no_error_here(tmp_path: Path, noted: Noted, monkeypatch: pytest.MonkeyPatch) -> None:
    good = files.InputFile.read_into_cache

    def gone(self: files.InputFile, offset: int, nbytes: int, sink: int) -> None:
        if self.location.name == "a":
            raise ChangedError("it is gone")
        good(self, offset, nbytes, sink)

    monkeypatch.setattr(files.InputFile, "read_into_cache", gone)
    three = [checkpoint(tmp_path / name, (2 * MIB,)) for name in "abc"]
    (tmp_path / "b").unlink()
    assert read(noted, 1, *three) == [("c", 0, 8 * MIB)]


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[list[Path]]:
    paths = [tmp_path / f"{name}.safetensors" for name in "ab"]
    for seed, path in enumerate(paths):
        save_file({"w": torch.randn(MIB, generator=torch.Generator().manual_seed(seed))}, path)
    yield paths
    assert not [each for each in threading.enumerate() if each.name == "streammerge-cache-reader"]


@pytest.mark.parametrize("executor", ["threads", "processes"])
def test_a_merge_reads_the_beginnings_of_all_inputs(pair: list[Path], tmp_path: Path, noted: Noted, executor: str) -> None:
    def wait(event: object) -> None:
        wait_until(lambda: len(noted) == 2)

    sm.merge(pair, tmp_path / "out.safetensors", executor=executor, listener=wait)
    assert sorted(noted) == [(path.name, path.stat().st_size - 4 * MIB, path.stat().st_size) for path in pair]


def test_a_plan_and_a_polite_merge_read_nothing(pair: list[Path], tmp_path: Path, noted: Noted) -> None:
    sm.plan(pair, tmp_path / "out.safetensors")
    sm.merge(pair, tmp_path / "out.safetensors", polite=True)
    assert not noted


@pytest.mark.usefixtures("noted")
def test_a_merge_that_is_refused_leaves_no_thread(pair: list[Path], tmp_path: Path) -> None:
    save_file({"w": torch.zeros(3 * MIB // 4)}, tmp_path / "c.safetensors")
    with pytest.raises(sm.MismatchError):
        sm.merge([*pair, tmp_path / "c.safetensors"], tmp_path / "out.safetensors")


def test_the_bound_is_a_share_of_the_memory(tmp_path: Path, noted: Noted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "memory_bytes", lambda: 64 * MIB)
    assert read(noted, 1, checkpoint(tmp_path / "a", (16 * MIB,)), most_bytes=None) == [("a", 0, 8 * MIB)]


def test_the_system_has_read_what_was_said(tmp_path: Path) -> None:
    """Of a real file that is not in the cache, as far as this disk lets files be dropped from it."""
    path = tmp_path / "a"
    path.write_bytes(bytes(300 * MIB))
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if system.is_cached(file.fileno(), 4 * MIB):
            pytest.skip("this file system keeps its pages")
        with closing(HeadStart(8 * MIB)) as head:
            head.opened([checkpoint(path, (75 * MIB,))])
            wait_until(lambda: all(system.is_cached(file.fileno(), place) for place in (0, 5 * MIB, 8 * MIB - 1)))
        assert not system.is_cached(file.fileno(), 200 * MIB)
