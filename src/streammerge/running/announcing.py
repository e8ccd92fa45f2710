"""Announces what workers read next, so that remote files are fetched while earlier pieces are computed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from streammerge.planning.tasks import MergeTask, Piece
from streammerge.sources.stored import Stored
from streammerge.stores.inputs import InputFiles

Unit = TypeVar("Unit")
_MOST_WHOLE_BYTES = 64 << 20
"""A nested source of more bytes is not announced, because a piece of it may read a small part."""


def announced(
    units: Iterable[Unit],
    inputs: InputFiles,
    pieces: Callable[[Unit], Iterable[Piece]] = lambda unit: unit,  # type: ignore[assignment,return-value]
) -> Iterator[Unit]:
    """Yields the units, each after those that come next were announced, as far as the blocks have room.

    ``pieces``: returns the pieces whose inputs a unit reads.
    """
    waiting: deque[tuple[Unit, int]] = deque()
    held, most = 0, inputs.ahead_bytes // 4
    for unit in units:
        nbytes = sum(announce(inputs, piece.task, piece.start, piece.stop) for piece in pieces(unit))
        waiting.append((unit, nbytes))
        held += nbytes
        while held > most and waiting:
            first, nbytes = waiting.popleft()
            held -= nbytes
            yield first
    for first, _ in waiting:
        yield first


def announce(inputs: InputFiles, task: MergeTask, start: int, stop: int) -> int:
    """Announces the bytes that elements ``start`` to ``stop`` of a task are made from. Returns their number."""
    total = 0
    for source in task.sources:
        if source.__class__ is Stored:
            size = source.spec.dtype.component.element_bytes
            inputs.announce(source.path, source.offset + start * size, (stop - start) * size)
            total += (stop - start) * size
        elif start == 0:
            blobs = source.blobs
            nbytes = sum(blob.nbytes for blob in blobs)
            if nbytes <= _MOST_WHOLE_BYTES:
                for blob in blobs:
                    inputs.announce(*blob)
                total += nbytes
    return total
