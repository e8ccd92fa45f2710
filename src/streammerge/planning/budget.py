"""The memory model: what one chunk in flight costs, and how many fit a budget. Pure arithmetic.

    peak = RUN + tensors * PER_TENSOR + pickles + spooling + spread
           + workers * (PER_WORKER + beside + passes + out + chunk_elems * bytes_per_element + scratch + tiles * tile
                        + inputs * huge_pages(window + chunk_elems * input_bytes))

Every buffer the engine uses is a term here, and the engine takes its buffers from :func:`slots`, so the model cannot
drift from what is allocated.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass

from streammerge.errors import BudgetError
from streammerge.tensors.spec import GRAIN
from streammerge.units import HUGE_PAGE_BYTES, PAGE_BYTES, binary_bytes

RUN_BYTES = 8 << 20
"""Open files, maps, threads' shared state, progress."""
PER_TENSOR_BYTES = 800
"""One tensor of one input: its name, entries, and share of the plan."""
PER_WORKER_BYTES = 2 << 20
"""A thread's stack, its malloc arena, and the pages by which its buffers are aligned."""
SPOOLING_BYTES = 8 << 20
"""Blocks of a compressed record before and after it is inflated."""
BEST_TILE_BYTES = 8 << 20
"""What a reader of scattered elements reads ahead. Larger tiles read more of the file at each place that they visit."""
PER_PROCESS_BYTES = 8 << 20
"""What a worker holds beside because it is a process: pages of the interpreter that it writes to, and messages."""
BEST_CHUNK_ELEMS = 4 * GRAIN
"""Twice that, and twice the window, for methods with passes, which do more with a chunk and look at tensors again."""
BEST_OUT_BYTES = 8 << 20
"""What a worker collects before it writes: enough that the disk is not asked too often."""
MOST_WINDOW_BYTES = 4 << 20
"""What one worker keeps of one input. Of mapped pages this much stays behind its cursor: giving them back costs every CPU
an interrupt, so it is done rarely; they count as memory although the kernel could take them back at any time, and so do
the huge pages that a touch may map. Tensors that fit stay for all passes, also where they are read by pread."""
_LEAST_TILE_BYTES = 1 << 20
_MOST_HALVINGS = 6
"""How often the output buffer, the window and the tile may be halved before window and tile are dropped."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What a chunk in flight needs; the widest task of the run decides each.

    Bytes per element: ``compute`` of one buffer of numbers, of which there are ``buffers``; ``out`` of the result, which
    is collected before it is written; ``read`` of a read buffer; ``mapped`` of one input in mapped pages. ``inputs``:
    how many are kept at once. ``row``: elements that a chunk must hold together. ``passes``: whether a tensor is
    looked at again. ``passes_bytes``: what the passes of a tensor hold that is one worker's; ``spread_bytes``: of one
    that all workers share. ``scratch``: bytes of the regions that readers of nested sources have for themselves,
    ``shared``: of the one that they share; ``tiles``: how many tiles they want; ``held``: bytes that they hold elsewhere.
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

    @property
    def element_bytes(self) -> int:
        return self.buffers * self.compute + 2 * self.read

    @property
    def keeps(self) -> bool:
        """Whether a worker has memory of its own for inputs that stay for all passes: some are not mapped."""
        return self.read > 0 or not self.mapped

    def most(self, other: Cost) -> Cost:
        """Of each kind the greater."""
        return Cost(*map(max, astuple(self), astuple(other)))


@dataclass(frozen=True, slots=True)
class Budget:
    """How a run uses its memory: ``workers`` threads, each with chunks of ``chunk_elems`` elements, which writes up to
    ``out_bytes`` at once, leaves ``window_bytes`` of each input mapped behind it, and gives each tile ``tile_bytes``."""

    workers: int
    chunk_elems: int
    out_bytes: int
    window_bytes: int
    cost: Cost
    peak_bytes: int
    tile_bytes: int = 0

    @property
    def kept_bytes(self) -> int:
        """What a worker may keep of all inputs together."""
        return self.window_bytes * self.cost.inputs


def slots(budget: Budget) -> dict[str, tuple[int, int]]:
    """(offset, bytes) of each region in a worker's arena: ``slots`` for the buffers that methods name, ``out`` what is
    to be written, from any byte of a page on, ``read0`` and ``read1`` raw input, ``kept`` inputs that are not mapped and
    stay for all passes; ``reader ...`` what readers of nested sources use. Each begins with a
    page."""
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
    }
    made, cursor = {}, 0
    for name, size in sizes.items():
        made[name] = (cursor, size)
        cursor += -(-size // PAGE_BYTES) * PAGE_BYTES
    return made


def _huge_pages(nbytes: int) -> int:
    """Bytes of all huge pages in which so many bytes, wherever they begin, can lie."""
    return (-(-nbytes // HUGE_PAGE_BYTES) + 1) * HUGE_PAGE_BYTES


def fit(
    memory_bytes: int,
    workers: int,
    tensors: int,
    cost: Cost,
    spooling: bool = False,
    pickle_bytes: int = 0,
    beside_bytes: int = 0,
) -> Budget:
    """The most workers and the best chunk that ``memory_bytes`` allow. Raises BudgetError naming the least that would.

    ``beside_bytes``: what each worker holds beside its buffers, such as the blocks that a verification compares.
    """
    fixed = RUN_BYTES + tensors * PER_TENSOR_BYTES + (SPOOLING_BYTES if spooling else 0) + pickle_bytes + cost.spread_bytes

    def peak(count: int, chunk: int, out: int, window: int, tile: int) -> int:
        kept = cost.inputs * ((_huge_pages(window + chunk * cost.mapped) if cost.mapped else 0) + window * cost.keeps)
        nested = cost.scratch + cost.shared + cost.tiles * tile + cost.held
        return fixed + count * (
            PER_WORKER_BYTES + beside_bytes + cost.passes_bytes + out + chunk * cost.element_bytes + kept + nested
        )

    least_chunk, more = max(GRAIN, cost.row), 2 if cost.passes else 1
    for count in range(workers, 0, -1):
        chunk = max(BEST_CHUNK_ELEMS * more, least_chunk)
        while True:
            for halvings in range(_MOST_HALVINGS + 1):
                last = halvings == _MOST_HALVINGS
                window = 0 if last else MOST_WINDOW_BYTES * more >> halvings
                tile = 0 if last or not cost.tiles else max(BEST_TILE_BYTES >> halvings, _LEAST_TILE_BYTES)
                out = max(BEST_OUT_BYTES >> halvings, cost.out * chunk)
                needed = peak(count, chunk, out, window, tile)
                if needed <= memory_bytes:
                    return Budget(count, chunk, out, window, cost, needed, tile)
            if chunk == least_chunk:
                break
            chunk = max(chunk // 2, least_chunk)
    least = peak(1, least_chunk, max(BEST_OUT_BYTES >> _MOST_HALVINGS, cost.out * least_chunk), 0, 0)
    rows = f" with rows of {cost.row} elements, which are held whole" if cost.row > GRAIN else ""
    raise BudgetError(
        f"{binary_bytes(memory_bytes)} of memory are too little for this merge{rows}, "
        f'which needs at least {binary_bytes(least)}; pass `memory="{-(-least // (1 << 20))}MiB"` or more'
    )
