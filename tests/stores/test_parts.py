"""Files that are sent in parts: every byte arrives once, in parts of one size, and few parts wait in memory."""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Sequence

import pytest

from stores.suite import noise
from streammerge.errors import StoreError
from streammerge.stores.locations import parse
from streammerge.stores.parts import (
    MOST_PARTS,
    PART_BYTES,
    Part,
    PartedOutput,
    Sender,
    SmallOutput,
    Upload,
    buffer_bytes,
    part_bytes,
)

EACH = 1000
HERE = parse("out")


class Kept(Upload):
    """Keeps what is sent. ``seconds``: what sending takes. ``fails``: the number of a part that fails."""

    def __init__(self, seconds: float = 0.0, fails: int = -1) -> None:
        self.sent: dict[int, bytes] = {}
        self.seconds, self.fails = seconds, fails
        self.running = self.most_running = 0
        self._lock = threading.Lock()

    def send(self, number: int, data: memoryview) -> Part:
        with self._lock:
            self.running += 1
            self.most_running = max(self.most_running, self.running)
        time.sleep(self.seconds)
        with self._lock:
            self.running -= 1
            assert number not in self.sent
            if number == self.fails:
                raise StoreError("no more")
            self.sent[number] = bytes(data)
        return Part(len(data), f"tag {number}")

    def complete(self, parts: Sequence[Part], replaces: bool) -> None:
        raise AssertionError

    def abort(self) -> None:
        raise AssertionError


def sent(upload: Kept) -> bytes:
    return b"".join(upload.sent[number] for number in sorted(upload.sent))


@pytest.mark.parametrize("size", [0, 1, EACH - 1, EACH, EACH + 1, 50 * EACH + 77])
def test_pieces_in_any_order_by_many_threads(size: int) -> None:
    data, upload, sender, chance = noise(size), Kept(), Sender(), random.Random(size)
    file = PartedOutput(HERE, size, upload, sender, EACH)
    borders = sorted({0, size, *(chance.randint(0, size) for _ in range(100))})
    spans = list(itertools.pairwise(borders))
    literal, rest = spans[::5], [span for number, span in enumerate(spans) if number % 5]
    file.preset((start, data[start:stop]) for start, stop in literal)
    chance.shuffle(rest)

    def write(first: int) -> None:
        for start, stop in rest[first::4]:
            file.write_full(memoryview(data)[start:stop], start)

    threads = [threading.Thread(target=write, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [part.size for part in file.finish()] == [len(upload.sent[number]) for number in range(file.count)]
    assert sent(upload) == data
    sender.close()


def test_parts_are_sent_when_they_are_whole_and_a_writer_waits_for_the_senders() -> None:
    data, upload, sender = noise(40 * EACH), Kept(0.01), Sender(3)
    file = PartedOutput(HERE, len(data), upload, sender, EACH)
    for start in range(0, len(data), EACH // 2):
        file.write_full(data[start : start + EACH // 2], start)
        assert file.waiting <= 1
        assert len(file.parts) + 3 + 1 >= start // EACH
    file.sync()
    assert len(file.parts) == 40
    assert upload.most_running == 3
    assert file.holds(0, len(data))
    sender.close()


def test_known_bytes_need_no_memory_until_a_part_is_begun() -> None:
    data, upload, sender = noise(10 * EACH), Kept(), Sender()
    file = PartedOutput(HERE, len(data), upload, sender, EACH)
    file.preset([(0, data[:1500]), (5 * EACH, data[5 * EACH : 5 * EACH + 10])])
    assert file.waiting == 0
    file.write_full(data[1500:2000], 1500)
    file.sync()
    assert file.holds(EACH, EACH)
    assert not file.holds(0, 1)
    file.write_full(data[2000:], 2000)
    file.finish()
    assert sent(upload) == data
    sender.close()


def test_bytes_that_become_known_later_complete_parts_that_wait() -> None:
    data, upload, sender = noise(3 * EACH), Kept(), Sender()
    file = PartedOutput(HERE, len(data), upload, sender, EACH)
    file.write_full(data[10:1010], 10)
    file.write_full(data[1020:], 1020)
    file.sync()
    assert file.waiting == 2
    file.preset([(0, data[:10]), (1010, data[1010:1020])])
    file.sync()
    assert file.waiting == 0
    assert sent(upload) == data
    sender.close()


def test_earlier_parts_are_kept_and_not_sent_again() -> None:
    data, upload, sender = noise(4 * EACH), Kept(), Sender()
    earlier = {1: Part(EACH, "a"), 2: Part(EACH, "b")}
    file = PartedOutput(HERE, len(data), upload, sender, EACH, earlier)
    assert file.kept
    assert file.holds(EACH, 2 * EACH)
    assert not file.holds(EACH, 2 * EACH + 1)
    file.write_full(data, 0)
    assert [part.tag for part in file.finish()] == ["tag 0", "a", "b", "tag 3"]
    assert upload.sent.keys() == {0, 3}
    sender.close()


def test_a_part_that_cannot_be_sent_is_an_error_of_the_next_write_and_of_the_end() -> None:
    upload, sender = Kept(fails=0), Sender()
    file = PartedOutput(HERE, 2 * EACH, upload, sender, EACH)
    file.write_full(bytes(EACH), 0)
    file.sync()
    assert not file.holds(0, 1)
    for end in (lambda: file.write_full(b"1", EACH), file.finish):
        with pytest.raises(StoreError, match="no more"):
            end()
    sender.close()


def test_a_writer_that_waits_is_stopped() -> None:
    upload, sender = Kept(3.0), Sender(1)
    file = PartedOutput(HERE, 4 * EACH, upload, sender, EACH)

    def halt() -> None:
        raise KeyboardInterrupt

    file.halted_by(halt)
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        file.write_full(bytes(4 * EACH), 0)
    assert time.monotonic() - began < 2
    sender.close()


def test_the_largest_file_has_as_many_parts_as_may_be() -> None:
    assert part_bytes(0) == part_bytes(PART_BYTES * MOST_PARTS) == PART_BYTES
    for size in (PART_BYTES * MOST_PARTS + 1, 10**12, 5 * 10**12):
        each = part_bytes(size)
        assert each % (1 << 20) == 0
        assert -(-size // each) <= MOST_PARTS
    assert buffer_bytes(10**9)[0] < 100 << 20


def test_a_small_file_stays_in_memory() -> None:
    file = SmallOutput(HERE, 5)
    file.write_full(b"ab", 1)
    assert bytes(file.data) == b"\0ab\0\0"
    assert not file.holds(0, 1)
