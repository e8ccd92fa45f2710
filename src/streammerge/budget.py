"""The memory model: what one chunk in flight costs, and how many fit a budget. Pure arithmetic.

    peak = RUN + tensors * PER_TENSOR + staging
           + workers * (PER_WORKER + chunk_elems * bytes_per_element + inputs * (window + chunk_elems * input_bytes))

Every buffer the engine uses is a term here, and the engine takes its buffers from :func:`slots`, so the model cannot
drift from what is allocated.
"""

from __future__ import annotations

from dataclasses import dataclass

from streammerge.errors import BudgetError
from streammerge.tensors import GRAIN
from streammerge.units import binary_bytes

RUN_BYTES = 8 << 20
"""Open files, maps, threads' shared state, progress."""
PER_TENSOR_BYTES = 800
"""One tensor of one input: its name, entries, and share of the plan."""
PER_WORKER_BYTES = 2 << 20
"""A thread's stack and its malloc arena."""
STAGING_BYTES = 28 << 20
"""For tensors that must be copied out first: a block of the copy, and the pages of the source that it touches."""
BEST_CHUNK_ELEMS = 4 * GRAIN
MOST_WINDOW_BYTES = 8 << 20
"""Mapped pages of one input that one worker lets stay behind its cursor: giving them back costs every CPU an interrupt,
so it is done rarely. They count as memory although the kernel could take them back at any time."""


@dataclass(frozen=True, slots=True)
class ElementCost:
    """Bytes that one element of a chunk in flight needs, by purpose; the widest tensor of the run decides each.

    ``mapped`` are those of an element in mapped pages, of each of ``inputs`` at once.
    """

    compute: int
    widen: int
    out: int
    read: int
    inputs: int = 0
    mapped: int = 0

    @property
    def buffers(self) -> int:
        return 2 * self.compute + self.widen + self.out + 2 * self.read


@dataclass(frozen=True, slots=True)
class Budget:
    """How a run uses its memory: ``workers`` threads, each with chunks of ``chunk_elems`` elements."""

    workers: int
    chunk_elems: int
    window_bytes: int
    cost: ElementCost
    peak_bytes: int


def slots(cost: ElementCost, chunk_elems: int) -> dict[str, tuple[int, int]]:
    """(offset, bytes) of each buffer in a worker's arena. ``total`` and ``operand`` hold compute numbers, ``widen``
    a half-way float32 copy, ``out`` the rounded result, ``read0`` and ``read1`` raw input."""
    sizes = {
        "total": cost.compute,
        "operand": cost.compute,
        "widen": cost.widen,
        "out": cost.out,
        "read0": cost.read,
        "read1": cost.read,
    }
    made, cursor = {}, 0
    for name, size in sizes.items():
        made[name] = (cursor, size * chunk_elems)
        cursor += size * chunk_elems
    return made


def fit(memory_bytes: int, workers: int, tensors: int, cost: ElementCost, staging: bool) -> Budget:
    """The most workers and the best chunk that ``memory_bytes`` allow. Raises BudgetError naming the least that would."""
    fixed = RUN_BYTES + tensors * PER_TENSOR_BYTES + (STAGING_BYTES if staging else 0)

    def peak(count: int, chunk: int, window: int) -> int:
        mapped = cost.inputs * (window + chunk * cost.mapped) if cost.mapped else 0
        return fixed + count * (PER_WORKER_BYTES + chunk * cost.buffers + mapped)

    for count in range(workers, 0, -1):
        chunk = BEST_CHUNK_ELEMS
        while chunk >= GRAIN:
            window = MOST_WINDOW_BYTES
            while window and peak(count, chunk, window) > memory_bytes:
                window = window // 2 if window > MOST_WINDOW_BYTES // 64 else 0
            if peak(count, chunk, window) <= memory_bytes:
                return Budget(count, chunk, window, cost, peak(count, chunk, window))
            chunk //= 2
    least = peak(1, GRAIN, 0)
    raise BudgetError(
        f"{binary_bytes(memory_bytes)} of memory are too little for this merge, "
        f"which needs at least {binary_bytes(least)}; pass --memory {-(-least // (1 << 20))}MiB or more"
    )
