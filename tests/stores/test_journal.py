"""The journal: what is read back, what damage costs, and that no piece is written down before its file is synced."""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest

from streammerge.stores import journal
from streammerge.stores.base import JournalFile
from streammerge.stores.journal import Earlier, Finished, Journal

PIECES = [Finished(n, n << 16, 'a "b"\n.safetensors', 8 + n, n, 7 * n, {"nan": n} if n % 2 else {}) for n in range(4)]


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


class Synced:
    def __init__(self, log: list[str], fails: bool = False) -> None:
        self.log, self.fails = log, fails

    def sync(self) -> None:
        self.log.append("sync")
        if self.fails:
            raise OSError("the disk failed")


def made(log: list[str], keeps: bool = True, fails: bool = False) -> tuple[Journal, Kept]:
    record, files = Kept(log), {PIECES[0].file: Synced(log, fails)}
    return Journal(record, {"form": 1}, lambda: files, keeps), record  # type: ignore[arg-type,return-value]


def wait(until: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 20
    while not until():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_what_is_begun_with_is_read_back_each_line_with_its_checksum() -> None:
    made_journal, record = made([])
    assert made_journal.earlier() is None
    made_journal.begin(PIECES)
    assert made_journal.finish() == set()
    assert made_journal.earlier() == Earlier({"form": 1}, PIECES, len(PIECES))
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
    "line", ['{"task":0,"start":0,"new":1}', "[1,2]", "7", '"text"', json.dumps({**asdict(PIECES[1]), "new": 1})]
)
def test_a_journal_of_another_version_is_counted_and_not_believed(line: str) -> None:
    _, record = made([])
    record.data = journal._lines(['{"plan":{"form":99}}', line, line])
    assert journal.read(record) == Earlier({"form": 99}, [], 2)
    record.data = journal._lines([line, line])
    assert journal.read(record) == Earlier({}, [], 1)


def test_a_piece_is_written_down_after_its_file_was_synced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "INTERVAL_SECONDS", 0.001)
    log: list[str] = []
    made_journal, _ = made(log)
    made_journal.begin([])
    assert not log
    made_journal.add(PIECES[3])
    wait(lambda: "append" in log)
    assert log[:2] == ["sync", "append"]
    wait(lambda: made_journal.kept_bytes == 3)
    made_journal.finish()
    assert log[-2:] == ["sync", "end"]
    assert made_journal.earlier() == Earlier({"form": 1}, [PIECES[3]], 1)


@pytest.mark.parametrize(("keeps", "fails"), [(False, False), (True, True)])
def test_nothing_is_written_down_of_a_file_that_was_not_synced(
    keeps: bool, fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "INTERVAL_SECONDS", 0.001)
    log: list[str] = []
    made_journal, _ = made(log, keeps, fails)
    made_journal.begin([])
    made_journal.add(PIECES[3])
    wait(lambda: not made_journal._waiting)
    assert made_journal.finish() == ({PIECES[3].file} if fails else set())
    assert "append" not in log
    assert made_journal.kept_bytes == 0


def test_a_journal_that_was_stopped_vouches_for_no_sync() -> None:
    made_journal, _ = made([])
    made_journal.begin([])
    made_journal.stop()
    with pytest.raises(RuntimeError, match="were not synced"):
        made_journal.finish()
