"""The journal: what is read back, what damage costs, and that no piece is written down before its file is synced."""

from __future__ import annotations

import json
import threading
import time
import zlib
from typing import Any

import pytest
from conftest import wait_until

from streammerge.stores import journal
from streammerge.stores.base import JournalFile
from streammerge.stores.journal import Earlier, Finished, FinishedTable, Journal

PIECES = [
    Finished(n, n << 16, 'a "b"\n.safetensors', 8 + n, n, 7 * n, {"nan": n} if n % 2 else {}, "00beef" * (n // 2))
    for n in range(4)
]


class Kept(JournalFile):
    """A record in memory. ``log`` also has what the files do."""

    def __init__(self, log: list[str]) -> None:
        self.data: bytes | None = None
        self.log = log

    def read(self) -> bytes | None:
        return self.data

    def begin(self, data: bytes) -> None:
        self.data = data

    def append(self, data: bytes) -> None:
        self.log.append("append")
        self.data = (self.data or b"") + data

    def end(self) -> None:
        self.log.append("end")


class Whole:
    """The part of an output that is not sent in parts."""

    in_parts = False

    def holds(self, offset: int, nbytes: int) -> bool:
        return True


class Synced(Whole):
    def __init__(self, log: list[str], fails: bool = False) -> None:
        self.log, self.fails = log, fails

    def sync(self) -> None:
        self.log.append("sync")
        if self.fails:
            raise OSError("the disk failed")


def made(log: list[str], keeps: bool = True, fails: bool = False) -> tuple[Journal, Kept]:
    record, files = Kept(log), {PIECES[0].file: Synced(log, fails)}
    return Journal(record, {"form": 1}, lambda: files, keeps), record  # type: ignore[arg-type,return-value]


def test_what_is_begun_with_is_read_back_each_line_with_its_checksum() -> None:
    made_journal, record = made([])
    assert made_journal.earlier() is None
    made_journal.begin(PIECES)
    assert made_journal.finish() == set()
    assert made_journal.earlier() == Earlier({"form": 1}, FinishedTable(PIECES), len(PIECES))
    assert made_journal.kept_bytes == sum(range(4))
    for line in (record.data or b"").splitlines():
        assert line[:8] == b"%08x" % zlib.crc32(line[9:])
        json.loads(line[9:])


def test_pieces_count_up_to_the_first_line_that_is_damaged() -> None:
    made_journal, record = made([])
    made_journal.begin(PIECES)
    made_journal.stop()
    good = record.data or b""
    starts = [0, *(n + 1 for n, octet in enumerate(good) if octet == 10)]
    for at in range(len(good)):
        record.data = good[:at] + bytes([good[at] ^ 4]) + good[at + 1 :]
        line = max(n for n, start in enumerate(starts) if start <= at)
        found = journal.read(record)
        assert found is not None
        assert found.plan == (None if line == 0 else {"form": 1})
        assert line == 0 or found.pieces == PIECES[: line - 1]
        whole = sum(start - 1 <= at for start in starts[1:])  # a line that lacks only its end is whole
        record.data = good[:at]
        assert journal.read(record).pieces == PIECES[: max(whole - 1, 0)]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "line", ['{"task":0,"start":0,"new":1}', "[1,2]", "7", '"text"', json.dumps({**PIECES[1]._asdict(), "new": 1})]
)
def test_a_journal_of_another_version_is_counted_and_not_believed(line: str) -> None:
    _, record = made([])
    record.data = journal._lines(['{"plan":{"form":99}}', line, line])
    assert journal.read(record) == Earlier({"form": 99}, FinishedTable([]), 2)
    record.data = journal._lines([line, line])
    assert journal.read(record) == Earlier({}, FinishedTable([]), 1)


@pytest.mark.parametrize(
    "wrong", [{"task": -1}, {"task": 1 << 32}, {"start": 1.0}, {"nbytes": True}, {"file": 7}, {"nonfinite": []}]
)
def test_a_line_with_values_that_no_piece_has_ends_the_pieces(wrong: dict[str, Any]) -> None:
    _, record = made([])
    lines = [json.dumps(PIECES[0]._asdict() | change) for change in ({}, wrong, {})]
    record.data = journal._lines(['{"plan":{"form":1}}', *lines])
    assert journal.read(record) == Earlier({"form": 1}, FinishedTable(PIECES[:1]), 3)


def test_a_table_is_the_pieces_it_was_made_of() -> None:
    for count in range(len(PIECES) + 1):
        table = FinishedTable(PIECES[:count])
        assert list(table) == [table[row] for row in range(count)] == table[:] == PIECES[:count]
        assert (len(table), table.nbytes) == (count, sum(range(count)))
    assert FinishedTable(PIECES) != FinishedTable(PIECES[1:])
    assert table[-1] == PIECES[-1]
    with pytest.raises(IndexError):
        table[len(PIECES)]


def test_a_piece_is_written_down_after_its_file_was_synced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "INTERVAL_SECONDS", 0.001)
    log: list[str] = []
    made_journal, _ = made(log)
    made_journal.begin([])
    assert not log
    made_journal.add(PIECES[3])
    wait_until(lambda: "append" in log)
    assert log[:2] == ["sync", "append"]
    wait_until(lambda: made_journal.kept_bytes == 3)
    made_journal.finish()
    assert log[-2:] == ["sync", "end"]
    assert made_journal.earlier() == Earlier({"form": 1}, FinishedTable([PIECES[3]]), 1)


@pytest.mark.parametrize(("keeps", "fails"), [(False, False), (True, True)])
def test_nothing_is_written_down_of_a_file_that_was_not_synced(
    keeps: bool, fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "INTERVAL_SECONDS", 0.001)
    log: list[str] = []
    made_journal, _ = made(log, keeps, fails)
    made_journal.begin([])
    made_journal.add(PIECES[3])
    wait_until(lambda: not made_journal._waiting)
    assert made_journal.finish() == ({PIECES[3].file} if fails else set())
    assert "append" not in log
    assert made_journal.kept_bytes == 0


def test_a_journal_that_was_stopped_vouches_for_no_sync() -> None:
    made_journal, _ = made([])
    made_journal.begin([])
    made_journal.stop()
    with pytest.raises(RuntimeError, match="were not synced"):
        made_journal.finish()


class Disk(Whole):
    """A file whose sync takes its time. ``started`` is set when a sync begins, and the sync ends when ``free`` is set."""

    def __init__(self) -> None:
        self.started, self.free, self.syncs = threading.Event(), threading.Event(), 0

    def sync(self) -> None:
        self.syncs += 1
        self.started.set()
        assert self.free.wait(60)


def on_disks(monkeypatch: pytest.MonkeyPatch, names: str, interval_seconds: float = 60) -> tuple[Journal, list[Disk]]:
    monkeypatch.setattr(journal, "INTERVAL_SECONDS", interval_seconds)
    disks = {name: Disk() for name in names}
    return Journal(Kept([]), {"form": 1}, lambda: disks, True), list(disks.values())  # type: ignore[arg-type,return-value]


def test_an_interrupted_run_keeps_what_is_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    """No sync was due yet."""
    monkeypatch.setattr(journal, "INTERVAL_SECONDS", 60)
    log: list[str] = []
    made_journal, _ = made(log)
    made_journal.begin(PIECES[:1])
    made_journal.add(PIECES[1])
    made_journal.add(PIECES[3])
    made_journal.stop(last=True)
    assert log == ["sync", "append", "end"]
    assert made_journal.earlier() == Earlier({"form": 1}, FinishedTable([PIECES[0], PIECES[1], PIECES[3]]), 3)
    assert made_journal.kept_bytes == 4


def test_a_sync_that_was_under_way_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    made_journal, (disk,) = on_disks(monkeypatch, "a", 0.001)
    made_journal.begin([])
    made_journal.add(Finished(0, 0, "a", 0, 10, 1))
    assert disk.started.wait(60)
    made_journal.add(Finished(1, 0, "a", 10, 10, 1))
    threading.Timer(0.1, disk.free.set).start()
    made_journal.stop(last=True)
    assert made_journal.kept_bytes == 20


def test_a_disk_that_is_too_slow_costs_no_more_than_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "_STOP_SECONDS", 0.3)
    made_journal, (disk,) = on_disks(monkeypatch, "a", 0.001)
    made_journal.begin([])
    made_journal.add(Finished(0, 0, "a", 0, 10, 1))
    assert disk.started.wait(60)
    began = time.monotonic()
    made_journal.stop(last=True)
    assert 0.25 < time.monotonic() - began < 20
    disk.free.set()
    time.sleep(0.1)
    assert made_journal.kept_bytes == 0, "nothing is written down once stop has returned"
    assert made_journal.earlier() == Earlier({"form": 1}, FinishedTable([]), 0)


def test_a_file_that_takes_too_long_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "_FIRST_RATE", 1000.0)
    made_journal, disks = on_disks(monkeypatch, "ab")
    for disk in disks:
        disk.free.set()
    made_journal.begin([])
    made_journal.add(Finished(0, 0, "a", 0, 100, 1))
    made_journal.add(Finished(1, 0, "b", 0, 1_000_000_000_000_000, 1))
    made_journal.stop(last=True)
    assert (made_journal.kept_bytes, [disk.syncs for disk in disks]) == (100, [1, 0])


@pytest.mark.parametrize("whole", [False, True])
def test_an_interruption_of_the_last_sync_keeps_what_it_has_synced(whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C comes while the second file is synced, or when all are."""
    made_journal, disks = on_disks(monkeypatch, "ab")
    disks[0].free.set()
    made_journal.begin([])
    made_journal.add(Finished(0, 0, "a", 0, 10, 1))
    made_journal.add(Finished(1, 0, "b", 0, 30, 1))
    if whole:
        disks[1].free.set()
        made_journal.finish()
    else:
        made_journal._end("finish")
        assert disks[1].started.wait(60)
        threading.Timer(0.1, disks[1].free.set).start()
    made_journal.stop(last=True)
    assert made_journal.kept_bytes == 40
    assert made_journal.earlier().nbytes == 40  # type: ignore[union-attr]
