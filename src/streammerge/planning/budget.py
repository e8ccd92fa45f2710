"""The memory model: the cost of one chunk in flight, and the number of chunks that fit a budget. Pure arithmetic.

    peak = RUN + tensors * PER_TENSOR + tasks * PER_TASK + columns * PER_COLUMN + rows * PER_ROW + together * PER_CHECKED
           + pieces * PER_PIECE + pickles + spooling + spread + remote
           + workers * (PER_WORKER + beside + passes + out + chunk_elems * bytes_per_element + scratch + tiles * tile
                        + remembered + summed + inputs * huge_pages(window + chunk_elems * input_bytes))

Every buffer the engine uses is a term here, and the engine takes its buffers from :func:`regions`, so the model cannot
drift from what is allocated.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from streammerge.errors import BudgetError
from streammerge.stores.base import Location, Status
from streammerge.stores.inputs import InputFiles
from streammerge.tensors.spec import GRAIN
from streammerge.units import HUGE_PAGE_BYTES, PAGE_BYTES, binary_bytes

RUN_BYTES = 8 << 20
"""Open files, maps, shared state of the threads, progress."""
PER_TENSOR_BYTES = 800
"""One tensor of one input: its name and its entries. 640 to 750 were measured."""
PER_TASK_BYTES = 2600
"""One tensor of the output: its task, its place, its share of headers, receipt and journal."""
PER_COLUMN_BYTES = 60
"""One tensor of one input that is a row of a table."""
PER_CHECKED_BYTES = 900
"""One tensor of a file while it is checked: what the safetensors library holds of a header, and the names."""
PER_ROW_BYTES = 800
"""One tensor of the output that is a row of tables: its name, its place, its share of headers, receipt and journal."""
PER_PIECE_BYTES = 300
"""A piece of a long tensor: its line of an earlier run's journal while that is read and written again, and its columns."""
PER_WORKER_BYTES = 2 << 20
"""A thread's stack, its malloc arena, and the padding that aligns its buffers to pages."""
SPOOLING_BYTES = 8 << 20
"""Blocks of a packed record before and after it is unpacked."""
REMOTE_BYTES = 24 << 20
"""What the client of remote stores holds: its library, connections, and answers under way."""
BEST_AHEAD_BYTES = 256 << 20
"""Blocks of remote inputs that are fetched ahead, those under way included, and as much again that the client's allocator
holds. 1.1 times the blocks were measured."""
_LEAST_AHEAD_BYTES = 8 << 20
LEAST_STREAM_BYTES = 1536 << 10
"""The least of these for each remote file that each worker reads at one time: three blocks of the least size. With less,
each read drops a block that another worker still needs, and the same bytes are fetched many times."""
BEST_TILE_BYTES = 8 << 20
"""Bytes that a reader of scattered elements reads ahead. A larger tile reads more at each place of the file it visits."""
PER_PROCESS_BYTES = 12 << 20
"""Additional memory of a worker that is a process: messages, and pages shared with other workers until it writes to them,
such as the reference counts of objects. Such pages were 7 to 9.5 MiB, by method."""
BEST_CHUNK_ELEMS = 4 * GRAIN
"""Preferred chunk. Methods with passes get twice the window, since they read tensors again."""
FLOAT64_CHUNK_ELEMS = 2 * GRAIN
"""The same of methods with passes that compute in float64: their few buffers then stay in a core's second cache. With
chunks of 8 grains they took a third more CPU time."""
LONG_CHUNK_ELEMS = 8 * GRAIN
"""The same of methods that draw masks, which takes many calls for each chunk, and of those that decompose a whole tensor,
whose sums are products of rows."""
BEST_OUT_BYTES = 8 << 20
"""Bytes that a worker collects before it writes, so that writes are few and large."""
MOST_WINDOW_BYTES = 4 << 20
"""Bytes of one input that one worker keeps. Mapped pages stay behind the cursor up to this size, because giving pages back
interrupts every CPU. They count as memory although the kernel could reclaim them at any time. The huge pages that one
access may map count too. Tensors that fit stay for all passes, also when they are read by pread."""
_LEAST_TILE_BYTES = 1 << 20
_MOST_HALVINGS = 6
"""How often the output buffer, the window and the tile may be halved before window and tile are dropped, and the memory for
what is read again."""


class Cost(NamedTuple):
    """The memory of one chunk in flight. Each field is the maximum over all tasks of the run.

    Bytes per element: ``compute`` of one compute buffer, ``out`` of the result, which is collected before it is written,
    ``read`` of one read buffer, ``mapped`` of one input in mapped pages. ``buffers``: the number of compute buffers.
    ``inputs``: the number of inputs that are kept at once. ``row``: elements that a chunk must hold together. ``passes``:
    whether tensors are read more than once. ``passes_bytes``: memory for the passes of a tensor that one worker makes
    alone. ``spread_bytes``: memory for the passes of a tensor that all workers share. Readers of nested sources need:
    ``scratch`` bytes of their own regions, ``shared`` bytes of the region that they share, ``tiles`` tiles, and ``held``
    bytes outside the worker's buffers. To remember what they read several times they can use ``remembered`` bytes, and need
    ``passing`` bytes for each element of a chunk beside ``lag`` bytes. ``summed``: bytes for sums
    by products, if tensors can be summed so. ``best``: the preferred chunk, 0 if any is as good.
    """

    compute: int
    buffers: int
    out: int
    read: int
    inputs: int = 0
    mapped: int = 0
    row: int = 1
    passes: bool = False
    passes_bytes: int = 0
    spread_bytes: int = 0
    scratch: int = 0
    shared: int = 0
    tiles: int = 0
    held: int = 0
    remembered: int = 0
    passing: int = 0
    lag: int = 0
    summed: int = 0
    best: int = 0

    @property
    def element_bytes(self) -> int:
        return self.buffers * self.compute + 2 * self.read

    @property
    def keeps(self) -> bool:
        """Whether a worker needs its own memory for inputs that stay for all passes, because some are not mapped."""
        return self.read > 0 or not self.mapped

    def most(self, other: Cost) -> Cost:
        """Returns the maximum of each field."""
        return Cost._make(map(max, self, other))


class Budget(NamedTuple):
    """How a run uses its memory. Each of the ``workers`` computes chunks of ``chunk_elems`` elements, writes up to
    ``out_bytes`` at once, keeps ``window_bytes`` of each input mapped behind its cursor, and uses tiles of ``tile_bytes``.
    ``ahead_bytes``: blocks of remote inputs, of all workers together; 0 without such inputs. ``remembered_bytes``: what
    each worker has for tensors that are read several times through merges. ``streams``: the most remote files that a worker
    reads at one time. ``summed_bytes``: what each worker has for sums by products; 0 if it makes none.
    """

    workers: int
    chunk_elems: int
    out_bytes: int
    window_bytes: int
    cost: Cost
    peak_bytes: int
    tile_bytes: int = 0
    ahead_bytes: int = 0
    remembered_bytes: int = 0
    streams: int = 0
    summed_bytes: int = 0

    @property
    def kept_bytes(self) -> int:
        """Bytes of all inputs together that a worker may keep."""
        return self.window_bytes * self.cost.inputs

    def opened(self, expected: Mapping[Location, Status], polite: bool = False, processes: int = 1) -> InputFiles:
        """Returns the inputs of a run, of one of so many processes that share the work."""
        workers = -(-self.workers // processes)
        return InputFiles(expected, polite, self.ahead_bytes // processes, workers * self.streams)


def regions(budget: Budget) -> dict[str, tuple[int, int]]:
    """Returns (offset, bytes) of each region in a worker's arena. Each region begins with a page.

    ``slots``: the buffers that methods name. ``out``: bytes to be written, which may begin anywhere in a page. ``read0``
    and ``read1``: raw input. ``kept``: inputs that are not mapped and stay for all passes. ``reader ...``: regions for the
    readers of nested sources.
    """
    cost, elems = budget.cost, budget.chunk_elems
    sizes = {
        "slots": cost.compute * cost.buffers * elems,
        "out": budget.out_bytes + PAGE_BYTES,
        "read0": cost.read * elems,
        "read1": cost.read * elems,
        "kept": budget.kept_bytes if cost.keeps else 0,
        "reader scratch": cost.scratch,
        "reader tiles": cost.tiles * budget.tile_bytes,
        "reader shared": cost.shared,
        "remembered": budget.remembered_bytes,
        "summed": budget.summed_bytes,
    }
    made, cursor = {}, 0
    for name, size in sizes.items():
        made[name] = (cursor, size)
        cursor += -(-size // PAGE_BYTES) * PAGE_BYTES
    return made


def _huge_pages(nbytes: int) -> int:
    """Returns the bytes of all huge pages that ``nbytes`` bytes can touch, wherever they begin."""
    return (-(-nbytes // HUGE_PAGE_BYTES) + 1) * HUGE_PAGE_BYTES


class Load(NamedTuple):
    """What a run holds besides the chunks in flight.

    ``tensors``: of all inputs together. ``tasks``: tensors of the output. ``columns`` and ``rows``: the same for tensors
    that are rows of tables. ``together``: the most of these in one file. ``pieces``: those of tensors that have several.
    ``pickle_bytes``: pickles while they are read and written. ``beside_bytes``: what each worker holds beside its buffers,
    such as the blocks that a verification compares. ``spooling``: whether packed records are unpacked first. ``streams``:
    the most files that a worker reads at one time, if inputs are fetched over a network; else 0.
    """

    tensors: int = 0
    tasks: int = 0
    columns: int = 0
    rows: int = 0
    together: int = 0
    pieces: int = 0
    pickle_bytes: int = 0
    beside_bytes: int = 0
    spooling: bool = False
    streams: int = 0

    @property
    def fixed_bytes(self) -> int:
        """Bytes that do not depend on workers and chunks."""
        listed = self.tensors * PER_TENSOR_BYTES + self.tasks * PER_TASK_BYTES + self.columns * PER_COLUMN_BYTES
        listed += self.rows * PER_ROW_BYTES + self.together * PER_CHECKED_BYTES + self.pieces * PER_PIECE_BYTES
        return RUN_BYTES + listed + self.pickle_bytes + SPOOLING_BYTES * self.spooling + REMOTE_BYTES * (self.streams > 0)


class _Sizes(NamedTuple):
    """Sizes that are tried: a chunk in elements, and what goes with it in bytes."""

    chunk: int
    out: int
    window: int
    tile: int
    ahead: int
    remembered: int
    summed: int


def _chunks(cost: Cost) -> Iterator[int]:
    """Yields the sizes of chunks from the preferred one down to the least."""
    least = max(GRAIN, cost.row)
    chunk = max(cost.best or BEST_CHUNK_ELEMS, least)
    yield chunk
    while chunk > least:
        chunk = max(chunk // 2, least)
        yield chunk


def _sizes(cost: Cost, load: Load, workers: int, chunk: int, halvings: int, remembered_bytes: int) -> _Sizes:
    """Returns what goes with a chunk after so many halvings. ``remembered_bytes``: the least for what is read again."""
    last, more = halvings == _MOST_HALVINGS, 2 if cost.passes else 1
    window = 0 if last else MOST_WINDOW_BYTES * more >> halvings
    tile = 0 if last or not cost.tiles else max(BEST_TILE_BYTES >> halvings, _LEAST_TILE_BYTES)
    least_ahead = max(_LEAST_AHEAD_BYTES, workers * load.streams * LEAST_STREAM_BYTES)
    ahead = max(BEST_AHEAD_BYTES >> halvings, least_ahead) if load.streams else 0
    passing = 0 if last else min(cost.passing * chunk + cost.lag, cost.remembered)
    summed = 0 if last else cost.summed
    out = max(BEST_OUT_BYTES >> halvings, cost.out * chunk)
    return _Sizes(chunk, out, window, tile, ahead, max(passing, remembered_bytes), summed)


def _peak_bytes(cost: Cost, load: Load, workers: int, sizes: _Sizes) -> int:
    """Returns the memory of a run with so many workers. The module's docstring has the formula."""
    mapped = _huge_pages(sizes.window + sizes.chunk * cost.mapped) if cost.mapped else 0
    kept = cost.inputs * (mapped + sizes.window * cost.keeps)
    nested = cost.scratch + cost.shared + cost.tiles * sizes.tile + cost.held + sizes.remembered + sizes.summed
    own = PER_WORKER_BYTES + load.beside_bytes + cost.passes_bytes + sizes.out + sizes.chunk * cost.element_bytes
    return load.fixed_bytes + cost.spread_bytes + sizes.ahead + workers * (own + kept + nested)


def fit(memory_bytes: int, workers: int, cost: Cost, load: Load, remembered_bytes: int = 0) -> Budget:
    """Returns the most workers and the best chunk that ``memory_bytes`` allows.

    ``remembered_bytes``: the least that each worker gets for what is read again. Raises BudgetError, which names the least
    memory that is enough.
    """
    room = memory_bytes - load.fixed_bytes - cost.spread_bytes
    for count in range(max(min(workers, room // PER_WORKER_BYTES), 1), 0, -1):
        for chunk in _chunks(cost):
            for halvings in range(_MOST_HALVINGS + 1):
                sizes = _sizes(cost, load, count, chunk, halvings, remembered_bytes)
                needed = _peak_bytes(cost, load, count, sizes)
                if needed <= memory_bytes:
                    own = (sizes.out, sizes.window, cost, needed, sizes.tile, sizes.ahead, sizes.remembered, load.streams)
                    return Budget(count, chunk, *own, sizes.summed)
    *_, least_chunk = _chunks(cost)
    least = _peak_bytes(cost, load, 1, _sizes(cost, load, 1, least_chunk, _MOST_HALVINGS, 0))
    rows = f" with rows of {cost.row} elements, which are held whole" if cost.row > GRAIN else ""
    raise BudgetError(
        f"{binary_bytes(memory_bytes)} of memory are too little for this run{rows}, "
        f'which needs at least {binary_bytes(least)}; pass `memory="{-(-least // (1 << 20))}MiB"` or more'
    )
