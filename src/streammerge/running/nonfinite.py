"""NaN and infinity in results, counted by the input that they come from."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from streammerge.errors import printable
from streammerge.kernels.agreed import AGREED, count_nonfinite, origins
from streammerge.kernels.chunk import Chunk, Kernel

if TYPE_CHECKING:
    import torch

    from streammerge.sources.base import Source
    from streammerge.stores.base import Input, Location


class Numbers(Protocol):
    """The numbers of a task's sources, as :class:`~streammerge.running.workspace.Inputs` has them."""

    def __len__(self) -> int: ...
    def read(self, source: int, start: int, stop: int, /) -> torch.Tensor: ...
    def origin(self, source: int, /) -> str: ...


def may_be_nonfinite(out: torch.Tensor) -> bool:
    """Whether there may be NaN or infinity. The sum is finite only if all terms are; it may also overflow by itself."""
    if out.element_size() == 1:
        out = out.float()
    return not math.isfinite(out.sum().item())


def nonfinite_of(out: torch.Tensor, kernel: Kernel, row: int, chunk: Chunk, source: Numbers) -> dict[str, int]:
    """Counts the non-finite numbers by the file that they come from. An overflow, which no input has, is counted under
    "the result".

    Numbers that all inputs agree on are put into the result first, and are counted under AGREED.
    """
    if not count_nonfinite(out):
        return {}
    counts: dict[str, int] = {}
    settled = chunk.settle(kernel, row, out)
    if settled:
        counts[AGREED] = settled
    for name, count in origins(out, settled, source.read, len(source), chunk.start, source.origin):
        counts[name] = counts.get(name, 0) + count
    return counts


def culprit(sources: Sequence[Source], origin: str, opened: Callable[[Location], Input]) -> str:
    """Says in brackets which tensor of a file has NaN or infinity, if the input with this origin is made of several
    tensors, like a base with an adapter; "" otherwise, and where some must be unpacked first. Reads them. ``opened``: opens
    a file."""
    from streammerge.sources.base import Allocated
    from streammerge.sources.deflated import records
    from streammerge.sources.wide import not_finite

    source = next((each for each in sources if each.parts and each.origin == origin and not any(records(each))), None)
    found = None if source is None else not_finite(source, Allocated(opened))
    if found is None or not found.blobs:
        return ""
    return f" ({printable(found.spec.name)} of {printable(found.blobs[0].path)})"
