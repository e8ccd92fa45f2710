"""Blocks of remote files that are fetched before they are read.

One :class:`Ahead` serves all inputs of a run in one process. It holds a bounded number of blocks, and as many requests run
at once as there is room for blocks. A reader announces what it reads next; a file that is read in sequence is also fetched
ahead without announcements. A reader of a block that was not announced comes first.

Many ranges are read side by side: one of each model by each worker. There must be room for a block of each, or each read
drops a block that another one still needs. So blocks are smaller where there are many such *streams*. Announced blocks are
fetched in the order in which they are *due*, which is not that of the announcements: the first block of a range comes
before the last one of the range that was announced before it.
"""

from __future__ import annotations

import heapq
import itertools
import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Protocol

from streammerge.stores.buffers import Buffers

BLOCK_BYTES = 8 << 20
"""The preferred size of a block, which is one request."""
LEAST_BLOCK_BYTES = 256 << 10
_MOST_REQUESTS = 32
_BLOCKS = 16
BLOCKS_OF_STREAM = 3
"""The least blocks for each stream in a budget: the present one, the one after it, and one under way. Where memory gives
more than that, blocks are larger, and there are two and a half for each."""
_POLL_SECONDS = 0.2


class Fetched(Protocol):
    """The part of a remote file that is needed here. Two files with equal ``identity`` have equal bytes."""

    identity: tuple[object, ...]
    size: int

    def fetch(self, start: int, stop: int, buffers: Buffers | None = None) -> memoryview:
        """Returns these bytes, by one request that is repeated if it fails. ``buffers``: where they may be put."""
        ...


class _Block:
    """A block that is waited for, or there. ``wanted``: announced bytes that were not read yet. ``due``: see
    :meth:`Ahead.announce`. ``touched``: whether any of it was read."""

    __slots__ = ("data", "due", "error", "file", "index", "touched", "wanted")

    def __init__(self, file: Fetched, index: int, due: int) -> None:
        self.file, self.index, self.due, self.wanted = file, index, due, 0
        self.data: memoryview | None = None
        self.error: BaseException | None = None
        self.touched = False

    @property
    def done(self) -> bool:
        return self.data is not None or self.error is not None


_Key = tuple[tuple[object, ...], int]


class Ahead:
    """Fetches and holds blocks. Safe for threads.

    ``nbytes``: memory for all. Blocks take half of it. The rest is for what the client's allocator keeps of blocks that
    were dropped, since each thread has its own. ``streams``: the number of ranges that are read side by side.

    ``halt``: raises an exception when the run is stopping; called by readers while they wait.
    """

    def __init__(self, nbytes: int, streams: int = 1) -> None:
        nbytes //= 2
        self._streams = max(streams, 1)
        block = min(max(nbytes // max(self._streams * 5 // 2, _BLOCKS), LEAST_BLOCK_BYTES), BLOCK_BYTES)
        self.block_bytes = block - block % LEAST_BLOCK_BYTES
        self._most = max(nbytes // self.block_bytes, 2)
        self._following = max(self._most // self._streams // 4, 1)
        """How many blocks are fetched ahead of a reader that announces nothing."""
        self._buffers = Buffers(self.block_bytes)
        self._lock = threading.Lock()
        self._ready = threading.Condition(self._lock)
        """Readers wait here for blocks."""
        self._room = threading.Condition(self._lock)
        """Threads that fetch wait here for queued blocks and room. One block wakes one of them, not all."""
        self._blocks: OrderedDict[_Key, _Block] = OrderedDict()
        """Blocks that are there, or under way, the longest unused first."""
        self._queue: list[tuple[int, int, _Key]] = []
        """A heap of blocks by the time when they are due. A block that became due earlier is in it twice."""
        self._queued: dict[_Key, _Block] = {}
        self._turns = itertools.count()
        self._urgent: deque[_Key] = deque()
        self._last: dict[tuple[object, ...], int] = {}
        self._threads: list[threading.Thread] = []
        self._announced = 0
        self._closed = False
        self.halt: Callable[[], object] = lambda: None

    def announce(self, file: Fetched, offset: int, nbytes: int) -> None:
        """Says that these bytes are read next.

        Time is counted in bytes that all readers together have read. A range is begun when all that was announced before is
        read, or nearly. Then it is read beside the other streams, so each of its bytes takes as many as there are streams.
        """
        with self._lock:
            before, begin = len(self._queued), offset
            stop = min(offset + nbytes, file.size)
            while offset < stop:
                index = offset // self.block_bytes
                upto = min((index + 1) * self.block_bytes, stop)
                due = self._announced + (offset - begin) * self._streams
                self._block(file, index, due).wanted += upto - offset
                offset = upto
            self._announced += max(stop - begin, 0)
            self._start_threads()
            self._room.notify(len(self._queued) - before)

    def read_into(self, file: Fetched, buffer: memoryview, offset: int) -> None:
        """Fills the buffer from ``offset``. Waits for blocks that are not there yet."""
        done = 0
        while done < len(buffer):
            index, start = divmod(offset + done, self.block_bytes)
            count = min(self.block_bytes - start, len(buffer) - done)
            buffer[done : done + count] = self._data(file, index, count)[start : start + count]
            done += count

    def held(self, file: Fetched, offset: int, nbytes: int) -> memoryview | None:
        """Returns the bytes if they lie in one block. Waits for it. None if they lie in several."""
        index, start = divmod(offset, self.block_bytes)
        if start + nbytes > self.block_bytes:
            return None
        return self._data(file, index, nbytes)[start : start + nbytes]

    def close(self) -> None:
        """Drops all blocks. Threads end after their present request."""
        with self._lock:
            self._closed = True
            self._blocks.clear()
            self._queued.clear()
            self._queue.clear()
            self._urgent.clear()
            self._room.notify_all()
            self._ready.notify_all()

    def _data(self, file: Fetched, index: int, count: int) -> memoryview:
        key = (file.identity, index)
        with self._lock:
            block = self._blocks.get(key)
            if block is not None:
                self._blocks.move_to_end(key)
            else:
                before = len(self._queued)
                follows = key not in self._queued and self._last.get(file.identity) in (index - 1, index)
                block = self._block(file, index, self._announced)
                self._urgent.append(key)
                if follows:  # read in sequence, and not announced
                    for later in range(index + 1, min(index + 1 + self._following, self._count(file))):
                        self._block(file, later, self._announced)
                self._start_threads()
                self._room.notify(max(len(self._queued) - before, 1))
            self._last[file.identity] = index
            block.wanted -= count
            block.touched = True
            while not block.done:
                self._ready.wait(_POLL_SECONDS)
                self.halt()
            if block.wanted <= 0:
                self._room.notify()  # its room may be taken
            if block.error is not None:
                self._blocks.pop(key, None)
                self._room.notify()
                raise block.error
            data = block.data
        assert data is not None
        return data

    def _count(self, file: Fetched) -> int:
        return -(-file.size // self.block_bytes)

    def _block(self, file: Fetched, index: int, due: int) -> _Block:
        """Returns a block, and queues it if it is neither there nor queued."""
        key = (file.identity, index)
        block = self._blocks.get(key)
        if block is not None:
            return block
        block = self._queued.get(key)
        if block is None or due < block.due:
            if block is None:
                block = self._queued[key] = _Block(file, index, due)
            block.due = due
            heapq.heappush(self._queue, (due, next(self._turns), key))
        return block

    def _start_threads(self) -> None:
        """Starts threads until there is one for each queued block, or as many as may run."""
        wanted = min(len(self._queued) + len(self._blocks), self._most, _MOST_REQUESTS)
        while len(self._threads) < wanted:
            thread = threading.Thread(target=self._work, name=f"streammerge-fetch-{len(self._threads)}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def _work(self) -> None:
        while True:
            with self._lock:
                block = self._next()
                while block is None:
                    if self._closed:
                        return
                    self._room.wait()
                    block = self._next()
            start = block.index * self.block_bytes
            try:
                data, error = block.file.fetch(start, min(start + self.block_bytes, block.file.size), self._buffers), None
            except BaseException as failed:  # noqa: BLE001 - carried to the reader, whatever it is
                data, error = None, failed
            with self._lock:
                block.data, block.error = data, error
                self._ready.notify_all()
            del block, data, error

    def _next(self) -> _Block | None:
        """Takes the next block to fetch. Returns None if there is none, or no room."""
        while self._urgent and self._urgent[0] not in self._queued:
            self._urgent.popleft()
        while self._queue and self._queue[0][2] not in self._queued:
            heapq.heappop(self._queue)
        if self._closed or not self._queued:
            return None
        key = self._urgent[0] if self._urgent else self._queue[0][2]
        if not self._has_room(self._queued[key] if self._urgent else None):
            return None
        if self._urgent:
            self._urgent.popleft()
        block = self._blocks[key] = self._queued.pop(key)
        return block

    def _has_room(self, urgent: _Block | None) -> bool:
        """Whether there is room for a block. Drops one that was read if there is none; another one if it is ``urgent``."""
        if len(self._blocks) < self._most:
            return True
        found = next((key for key, each in self._blocks.items() if each.done and each.wanted <= 0), None)
        if found is None and urgent is not None:
            found = self._least_wanted(urgent.due)
        if found is None:
            return False
        dropped = self._blocks.pop(found)
        if dropped.wanted > 0 and dropped.error is None:  # it will be fetched again, in its turn
            self._block(dropped.file, dropped.index, dropped.due).wanted = dropped.wanted
        return True

    def _least_wanted(self, due: int) -> _Key | None:
        """Returns the block that is needed last, if it is due later than ``due``; else the one that was unused for the
        longest time, which may have been announced and then not read. None if all are under way."""
        there = [key for key, each in self._blocks.items() if each.done]
        later = [key for key in there if not self._blocks[key].touched and self._blocks[key].due > due]
        return max(later, key=lambda key: self._blocks[key].due) if later else next(iter(there), None)
