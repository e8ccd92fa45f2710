"""Gives the bytes outside tensors to outputs that are sent in parts, as soon as they are known.

Nothing else can be sent before them: a part waits in memory until all its bytes are there. Most headers are known from the
start. Those of archives hold checksums, and follow when their tensors are made. A receipt is known last.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Protocol

from streammerge.planning.outputs.layout import Layout
from streammerge.planning.tasks import MergeTask, place_of
from streammerge.running.finished import Part
from streammerge.stores.base import Output

_MOST_WAITING = 4
"""Parts that may wait before headers are looked for that are known by now."""


class Finished(Protocol):
    """What is known of finished pieces."""

    def by_file(self) -> Iterable[tuple[str, list[Part]]]:
        """Returns the name of each file with its parts, sorted."""
        ...


class Sealing:
    """The known bytes of the files of one output. Does nothing for files that are not sent in parts. ``outputs``: None for
    a file that another machine makes."""

    def __init__(
        self, layout: Layout, tasks: Sequence[MergeTask], outputs: Sequence[Output | None], done: Finished
    ) -> None:
        self._layout, self._tasks, self._outputs, self._done = layout, tasks, outputs, done
        self._looked: dict[int, int] = {}
        self._nbytes: dict[int, dict[int, int]] = {}
        for number, output in enumerate(outputs):
            if output is not None and output.in_parts:
                self._give(number, {})

    def made(self, number: int) -> None:
        """Called when a piece of a file was made. Looks for headers that are known by now if many parts wait for them."""
        output = self._outputs[number]
        if output is None or not output.in_parts or self._layout.files[number].seal is None:
            return
        waiting: int = getattr(output, "waiting", 0)
        if waiting >= self._looked.get(number, 0) + _MOST_WAITING:
            self._give(number, self._whole_sums(number))
            self._looked[number] = getattr(output, "waiting", 0)

    def _give(self, number: int, sums: dict[int, int]) -> None:
        """Gives the bytes that do not depend on what is unknown: those that stay the same when it is replaced."""
        file = self._layout.files[number]
        zeros, ones = dict.fromkeys(file.offsets.values(), 0), dict.fromkeys(file.offsets.values(), 0xFFFFFFFF)
        other = bytes(byte ^ 1 for byte in file.receipt)
        known = file.around({**zeros, **sums}, file.receipt)
        changed = file.around({**ones, **sums}, other)
        same = ((a.offset, a.data) for a, b in zip(known, changed, strict=True) if a.data == b.data)
        output = self._outputs[number]
        if output is not None:
            output.preset(same)

    def _whole_sums(self, number: int) -> dict[int, int]:
        """Returns the offset of each tensor that is made -> its checksum."""
        wanted = self._nbytes.get(number)
        if wanted is None:
            wanted = self._nbytes[number] = {}
            starts = sorted(set(self._layout.files[number].offsets.values()))
            for task in range(len(self._tasks)):
                file, offset, nbytes = place_of(self._tasks, task)
                if file == number and nbytes:
                    start = _start_of(starts, offset)
                    wanted[start] = wanted.get(start, 0) + nbytes
        starts = sorted(wanted)
        names = [file.name for file in self._layout.files]
        parts = next(parts for name, parts in self._done.by_file() if name == names[number])
        made: dict[int, int] = {}
        for start, own in groupby(parts, lambda part: _start_of(starts, part[0])):
            every = list(own)
            if sum(nbytes for _, nbytes, _ in every) == wanted[start]:
                made[start] = self._layout.receipt.kind.join(every)
        return made


def _start_of(starts: Sequence[int], offset: int) -> int:
    return starts[bisect_right(starts, offset) - 1]
