"""A maker makes the bytes of one tensor, chunk by chunk. A worker chooses one, writes what it makes and records it.

========================  =======================================================================================
:mod:`.copying`           copies the bytes of the only source
:mod:`.computing`         calls the method's kernel. It can make every tensor
:mod:`.summing`           proposes the sums of many models by products
:mod:`.plain`             makes weighted sums and integers by numpy, without torch
========================  =======================================================================================

All are given the same: a task, the numbers of its sources (:class:`~streammerge.running.workspace.Inputs`), and the
worker's memory. The bytes of a computed tensor are those of the kernel. A maker that is not sure of a chunk, as with NaN,
hands it over to the kernel's maker, which it was given. So nobody above sees which one made a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from streammerge.running.workspace import Outgoing


class Maker(Protocol):
    """Makes the bytes of one tensor, of the pieces that a worker has in hand."""

    @property
    def nonfinite(self) -> dict[str, int]:
        """The number of NaN and infinite values in what was made so far, by source."""
        ...

    def spans(self, start: int, stop: int, /) -> Iterator[tuple[int, int]]:
        """Yields the bounds of the chunks of a piece that are made at once. They are made in this order."""
        ...

    def put(self, start: int, stop: int, outgoing: Outgoing, /) -> memoryview:
        """Makes the elements of one chunk. Returns their bytes, which are the last in ``outgoing``."""
        ...
