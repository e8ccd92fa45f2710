"""The system is asked for local inputs ahead of the workers: each range once, in the workers' order, within a bound."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import streammerge as sm
from streammerge.errors import ChangedError
from streammerge.methods.registry import find_method
from streammerge.planning.tasks import MergeTask, Piece, PieceDone, batches, pieces
from streammerge.running import engine
from streammerge.running.prefetching import Prefetching, known_bytes, windows
from streammerge.sources.base import Blob
from streammerge.sources.joined import joined
from streammerge.sources.stored import Stored
from streammerge.stores import descriptors, system
from streammerge.stores.files import InputFile
from streammerge.stores.locations import parse
from streammerge.tensors.dtypes import DType
from streammerge.tensors.spec import TensorSpec

MIB = 1 << 20


class Files:
    """Stands for the open inputs. Notes what is asked for; the file ``broken`` cannot be read."""

    def __init__(self, broken: str = "") -> None:
        self.passed: Any = None
        self.asked: list[Blob] = []
        self.broken = broken
        self.changed = threading.Condition()

    def get(self, path: Any) -> Any:
        return _File(self, path)

    @property
    def nbytes(self) -> int:
        return sum(blob.nbytes for blob in self.asked)

    def settled(self, nbytes: int) -> int:
        """Returns the bytes that were asked for, once they are so many and no more come."""
        with self.changed:
            assert self.changed.wait_for(lambda: self.nbytes >= nbytes, 60)
        time.sleep(0.05)
        return self.nbytes


class _File:
    def __init__(self, files: Files, path: Any) -> None:
        self.files, self.path = files, path

    def will_need(self, offset: int, nbytes: int) -> None:
        if str(self.path) == self.files.broken:
            raise ChangedError("it is gone")
        with self.files.changed:
            self.files.asked.append(Blob(self.path, offset, nbytes))
            self.files.changed.notify_all()


def task(elems: int, begin: int = 0, inputs: str = "ab", offset: int = 0) -> MergeTask:
    spec = TensorSpec("w", DType.F32, (elems,))
    return MergeTask(spec, find_method("linear"), tuple(Stored(spec, parse(i), begin) for i in inputs), 0, offset)


def units(*tasks: MergeTask, nbytes: int = 8 * MIB) -> list[list[Piece]]:
    return [*batches(iter([p for number, each in enumerate(tasks) for p in pieces(each, number)]), nbytes)]


def made(unit: list[Piece]) -> Iterator[PieceDone]:
    for piece in unit:
        yield PieceDone(piece.number, piece.start, piece.stop, 0, {})


def covered(blobs: list[Blob]) -> dict[str, list[tuple[int, int]]]:
    """Returns the ranges of each file in the order in which they were asked for."""
    found: dict[str, list[tuple[int, int]]] = {}
    for path, offset, nbytes in blobs:
        found.setdefault(str(path), []).append((offset, offset + nbytes))
    return found


def test_windows_go_through_all_inputs_and_ask_for_each_byte_once() -> None:
    (unit,) = units(task(5 * MIB // 4, 100), nbytes=8 * MIB)
    found = [*windows(unit)]
    assert [[str(blob.path) for blob, _ in window] for window in found] == [["a", "b"]] * 3
    for ranges in covered([blob for window in found for blob, _ in window]).values():
        assert ranges == [(100, 100 + 2 * MIB), (100 + 2 * MIB, 100 + 4 * MIB), (100 + 4 * MIB, 100 + 5 * MIB)]


def test_neighbours_are_asked_for_as_one_range() -> None:
    gap, size = 64, 1000
    tasks = [task(size, 8 + number * (4 * size + gap), offset=number * 4 * size) for number in range(10)]
    (unit,) = units(*tasks)
    (window,) = windows(unit)
    assert [blob[1:] for blob, _ in window] == [(8, 10 * 4 * size + 9 * gap)] * 2
    assert [needed for _, needed in window] == [10 * 4 * size] * 2
    assert sum(map(known_bytes, unit)) == 2 * 10 * 4 * size


def test_pieces_of_several_ranks_are_asked_for_where_they_lie() -> None:
    spec = TensorSpec("w", DType.F32, (1000, 4))
    whole = joined("w", [Stored(TensorSpec("w", DType.F32, (500, 4)), parse(name), 32) for name in "xy"])
    unit = [Piece(MergeTask(spec, find_method("linear"), (whole,), 0, 0), 0, 1000, 3000)]
    (window,) = windows(unit)
    assert [(str(blob.path), *blob[1:]) for blob, _ in window] == [("x", 32 + 4000, 4000), ("y", 32, 4000)]


def test_no_more_than_the_bound_is_ahead_of_the_workers() -> None:
    files, most, whole = Files(), 16 * MIB, 192 * MIB
    given = units(task(24 * MIB))
    passed = 0
    with closing(Prefetching(files, 1, most)) as ahead:  # type: ignore[arg-type]
        for unit in ahead.units(given):
            nbytes = sum(map(known_bytes, unit))
            for _ in range(4):
                asked = files.settled(min(passed + most, whole))
                assert asked <= min(passed + most + 2 * MIB, whole)
                files.passed(nbytes // 4)
                passed += nbytes // 4
            for done in made(unit):
                ahead.made(done)
        assert passed == whole
        assert files.settled(whole) == whole
    for ranges in covered(files.asked).values():  # each byte once, in order
        assert [0, *(end for _, end in ranges)] == [*(begin for begin, _ in ranges), whole // 2]


def test_units_that_are_made_make_room_though_nobody_says_what_is_passed() -> None:
    """Copies say nothing."""
    files = Files()
    with closing(Prefetching(files, 2, 4 * MIB)) as ahead:  # type: ignore[arg-type]
        for unit in ahead.units(units(task(8 * MIB))):
            for done in made(unit):
                ahead.made(done)
        assert files.settled(64 * MIB) == 64 * MIB


def test_passes_over_the_same_bytes_lead_no_further_than_what_workers_have_taken() -> None:
    files = Files()
    with closing(Prefetching(files, 1, 4 * MIB)) as ahead:  # type: ignore[arg-type]
        taken = ahead.units(units(task(24 * MIB)))
        next(taken)
        for _ in range(20):
            files.passed(16 * MIB)
        assert files.settled(36 * MIB) <= 38 * MIB


def test_units_of_several_workers_are_asked_for_side_by_side() -> None:
    files = Files()
    given = units(task(8 * MIB))  # of 16 MiB of each input
    with closing(Prefetching(files, 2, 16 * MIB)) as ahead:  # type: ignore[arg-type]
        list(ahead.units(given))
        files.settled(16 * MIB)
    begins = [blob.offset for blob in files.asked if str(blob.path) == "a"]
    assert begins[:4] == [0, 16 * MIB, 2 * MIB, 18 * MIB]


def test_nothing_is_asked_for_after_a_failure_and_all_units_come() -> None:
    files, given = Files(broken="b"), units(task(8 * MIB))
    with closing(Prefetching(files, 1)) as ahead:  # type: ignore[arg-type]
        assert [*ahead.units(given)] == given
        ahead._thread.join(10)
        assert not ahead._thread.is_alive()
    assert [str(blob.path) for blob in files.asked] == ["a"]


@pytest.mark.parametrize("known", [True, False])
def test_units_wait_in_a_bounded_number(known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after a failure, and where it is not known what units read."""
    monkeypatch.setattr(Stored, "ranged", property(lambda source: known))
    files, seen = Files(broken="a"), list[int]()

    def counted() -> Iterator[list[Piece]]:
        for number, unit in enumerate(units(*[task(10, offset=40 * number) for number in range(500)], nbytes=40)):
            seen.append(number)
            yield unit

    with closing(Prefetching(files, 1, MIB)) as ahead:  # type: ignore[arg-type]
        for number, _ in enumerate(ahead.units(counted())):
            assert len(seen) <= number + 40
            if known:
                ahead._thread.join(10)
        assert len(seen) == number + 1 == 500
        assert len(ahead._next) < 40
    assert not files.asked


def test_when_a_run_ends_early_nothing_more_is_asked_for() -> None:
    files = Files()
    ahead = Prefetching(files, 1, 2 * MIB)  # type: ignore[arg-type]
    next(ahead.units(units(task(8 * MIB))))
    before = files.settled(2 * MIB)
    ahead.close()
    assert files.passed is None
    ahead.passed(8 * MIB)
    assert files.nbytes == before
    assert not ahead._thread.is_alive()


# ------------------------------------------------------------------------------------------------------------- real files


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    monkeypatch.setattr(engine, "LEAST_PREFETCHED_BYTES", 1)
    monkeypatch.setattr(InputFile, "is_cached", lambda *given: False)  # new files are
    paths = [tmp_path / f"{number}.safetensors" for number in range(2)]
    for number, path in enumerate(paths):
        make = torch.Generator().manual_seed(number)
        save_file({f"w{size}": torch.randn(size, generator=make) for size in (7, 300_000, 1_000_001)}, path)
    return paths


@pytest.fixture
def advised(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """Collects what the system is asked to read: the name of the file, the offset, and the end."""
    found: list[tuple[str, int, int]] = []
    real = os.posix_fadvise

    def advise(fd: int, offset: int, nbytes: int, advice: int) -> None:
        if advice == os.POSIX_FADV_WILLNEED:
            found.append((os.path.basename(os.readlink(f"/proc/self/fd/{fd}")), offset, offset + nbytes))
        real(fd, offset, nbytes, advice)

    monkeypatch.setattr(os, "posix_fadvise", advise)
    return found


linux = pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="names files by /proc")


@linux
@pytest.mark.parametrize("io", ["mmap", "pread"])
def test_a_merge_asks_for_its_tensors_once(pair: list[Path], advised: list[Any], tmp_path: Path, io: str) -> None:
    sm.merge(pair, tmp_path / "out.safetensors", io=io, executor="threads")  # type: ignore[arg-type]
    nbytes = 4 * (7 + 300_000 + 1_000_001)
    for path in pair:
        end = path.stat().st_size
        ranges = [(begin, stop) for name, begin, stop in advised if name == path.name]
        assert [end - nbytes, *(stop for _, stop in ranges)] == [*(begin for begin, _ in ranges), end]


@linux
@pytest.mark.parametrize("options", [{"polite": True}, {"executor": "processes"}])
def test_who_is_polite_and_processes_ask_for_nothing(
    pair: list[Path], advised: list[Any], tmp_path: Path, options: dict[str, Any]
) -> None:
    sm.merge(pair, tmp_path / "out.safetensors", **options)
    assert not advised


@linux
def test_a_merge_whose_inputs_are_in_the_cache_asks_for_nothing(
    pair: list[Path], advised: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked, places = set[tuple[str, int]](), 2 * 3 * 4  # of both inputs each of three tensors at four places

    def cached(self: InputFile, offset: int) -> bool:
        looked.add((self.location.name, offset))
        return len(looked) < most

    monkeypatch.setattr(InputFile, "is_cached", cached)
    for most in (places, places + 1):
        looked.clear()
        advised.clear()
        sm.merge(pair, tmp_path / "out.safetensors", executor="threads", overwrite=True)
        assert len(looked) == places
        assert bool(advised) is (most == places), "what one place lacks"


@linux
def test_short_merges_and_more_files_than_stay_open_ask_for_nothing(
    pair: list[Path], advised: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "LEAST_PREFETCHED_BYTES", 2 * 4 * (7 + 300_000 + 1_000_001) + 1)
    sm.merge(pair, tmp_path / "out.safetensors", executor="threads")
    monkeypatch.setattr(engine, "LEAST_PREFETCHED_BYTES", 1)
    monkeypatch.setattr(descriptors, "limit", lambda: 1)
    sm.merge(pair, tmp_path / "out.safetensors", executor="threads", overwrite=True)
    assert not advised


def test_a_merge_goes_on_where_the_system_cannot_be_asked(
    pair: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sm.merge(pair, tmp_path / "wanted.safetensors", executor="threads")
    monkeypatch.delattr(os, "posix_fadvise", raising=False)
    sm.merge(pair, tmp_path / "out.safetensors", executor="threads")
    assert (tmp_path / "out.safetensors").read_bytes() == (tmp_path / "wanted.safetensors").read_bytes()


@linux
def test_a_long_range_is_asked_for_in_the_steps_of_the_system(
    tmp_path: Path, advised: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(system, "most_ahead", lambda device: 1000)
    (tmp_path / "x").write_bytes(bytes(3500))
    InputFile(parse(tmp_path / "x")).will_need(500, 2500)
    InputFile(parse(tmp_path / "x")).will_need(3000, 9000)  # past the end of a file that was cut
    spans = [(500, 1500), (1500, 2500), (2500, 3000), (3000, 3500)]
    assert advised == [("x", *span) for span in spans]


@pytest.mark.parametrize(("told", "wanted"), [("4", 128), ("128", 128), ("512", 512), ("8192", 2048), ("?", 128)])
def test_how_much_the_system_reads_ahead_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: str, wanted: int
) -> None:
    asked = []

    def opened(path: str) -> Any:
        asked.append(path)
        (tmp_path / "told").write_text(f"{told}\n")
        return (tmp_path / "told").open()

    monkeypatch.setattr(system, "open", opened, raising=False)
    assert system.most_ahead(os.makedev(253, 7)) == wanted << 10
    assert asked == ["/sys/class/bdi/253:7/read_ahead_kb"]


def test_of_an_unknown_device_the_system_reads_a_little() -> None:
    assert system.most_ahead(os.makedev(4001, 77)) == 128 << 10
