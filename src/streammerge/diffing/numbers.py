"""Compares the numbers of one tensor, chunk by chunk: the passes of a merge method, which return sums in place of a kernel.

Sums are float64 sums of grains, added in their order, as those of merge methods.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from streammerge.diffing.sums import Sums
from streammerge.kernels.chunk import Chunk, Slot
from streammerge.kernels.group import TensorGroup
from streammerge.kernels.ranking import Cut
from streammerge.methods.contracts import MergeMethod
from streammerge.tensors.spec import GRAIN, ranges

if TYPE_CHECKING:
    import torch

_TENTH = 10
_A: Slot = ("compared a",)
_B: Slot = ("compared b",)
_C: Slot = ("compared base",)
_NARROW: Slot = ("compared narrow",)
_DIFFERENCE: Slot = ("compared difference",)
_CHANGE_A: Slot = ("compared change a",)
_CHANGE_B: Slot = ("compared change b",)
_MAGNITUDE: Slot = ("compared magnitude",)
_NO_OVERFLOW = 2.0**62
"""Differences of 64-bit integers below this do not overflow."""
_BITS = {1: "uint8", 2: "int16", 4: "int32", 8: "int64"}


def compared(group: TensorGroup, *, kind: str) -> Any:
    """Returns the :class:`Sums` of two tensors of one shape, in one pass. ``kind``: see :class:`DType`."""
    return _total(group, _Look(kind))


def compared_with_base(group: TensorGroup, *, kind: str) -> Any:
    """Returns the :class:`Sums` of two tensors and their base. Finds the largest tenth of both changes first."""
    rank = max(group.elems // _TENTH, 1)
    (cut_a,), (cut_b,) = group.kth_largest(_magnitudes, [[rank], [rank]])
    return _total(group, _Look(kind, (cut_a, cut_b)))


def _contract(function: Callable[..., Any], base: str, buffers: int, searches: int) -> MergeMethod:
    made = MergeMethod("diff", function, (2, 2), base, buffers=buffers, searches=searches, listed=False)
    function.contract = made  # type: ignore[attr-defined]
    return made


COMPARED = _contract(compared, "unused", 4, 0)
"""A comparison has the contract of a merge method, and gets memory and passes as one."""
COMPARED_WITH_BASE = _contract(compared_with_base, "required", 9, 1)


@dataclass(frozen=True, slots=True)
class Adding:
    """Adds the sums of grains."""

    def __call__(self, look: Callable[[Chunk], Iterable[Any]], chunks: Iterable[Chunk]) -> Sums:
        total = Sums()
        for chunk in chunks:
            for sums in look(chunk):
                total.add(sums)
        return total


def _total(group: TensorGroup, look: Callable[[Chunk], Iterator[Sums]]) -> Sums:
    total = Sums()
    for piece in group.answers(look, Adding()):
        total.add(piece)
    return total


def _magnitudes(chunk: Chunk) -> Iterator[torch.Tensor]:
    """Yields the magnitudes of both changes, zero where a number is not finite."""
    base = _wide(chunk, chunk.raw(-1), _C)
    changes = [_wide(chunk, chunk.raw(model), slot).sub_(base) for model, slot in enumerate((_A, _B))]
    _without_nonfinite(changes)
    for change in changes:
        yield _magnitude(chunk, change)


def _magnitude(chunk: Chunk, change: torch.Tensor) -> torch.Tensor:
    return chunk.empty(_MAGNITUDE)[: len(change)].copy_(change).abs_()


def _without_nonfinite(numbers: list[torch.Tensor]) -> int:
    """Sets elements to zero in all tensors where one of them is not finite. Returns how many."""
    if math.isfinite(sum(each.sum().item() for each in numbers)):
        return 0
    bad = ~numbers[0].isfinite()
    for each in numbers[1:]:
        bad |= ~each.isfinite()
    for each in numbers:
        each.masked_fill_(bad, 0)
    return int(bad.count_nonzero())


@dataclass(frozen=True, slots=True)
class _Look:
    """Yields the sums of each grain of a chunk. ``cuts``: those of the largest tenths, if there is a base."""

    kind: str
    cuts: tuple[Cut, Cut] | None = None

    def __call__(self, chunk: Chunk) -> Iterator[Sums]:
        # The base is copied first, because only two raw chunks are valid at one time.
        base = _wide(chunk, chunk.raw(-1), _C) if self.cuts else None
        a, b = chunk.raw(0), chunk.raw(1)
        for start, stop in ranges(chunk.elems, GRAIN):
            own = None if base is None else base[start:stop]
            yield self._grain(chunk, start, a[start:stop], b[start:stop], own)

    def _grain(self, chunk: Chunk, start: int, a: torch.Tensor, b: torch.Tensor, base: torch.Tensor | None) -> Sums:
        import torch

        flags = _bits(a).ne(_bits(b)) if a.dtype == b.dtype else None
        equal = flags is not None and not bool(flags.any())
        if self.kind == "packed":
            return Sums(len(a), int(flags.count_nonzero()) if flags is not None else len(a))
        one = _wide(chunk, a, _A)
        two = one if equal else _wide(chunk, b, _B)
        if flags is None:
            flags = _unequal(a, b, one, two)
        sums = Sums(len(a), 0 if equal else int(flags.count_nonzero()))
        if self.kind == "complex":
            sums.elems, sums.differing = len(a) // 2, int(flags.view(-1, 2).any(1).count_nonzero())
        sums.nonfinite = _without_nonfinite([one] + [two] * (not equal) + [base] * (base is not None))  # type: ignore[list-item]
        sums.aa = _dot(one, one)
        sums.bb, sums.ab = (sums.aa, sums.aa) if equal else (_dot(two, two), _dot(one, two))
        if not equal:
            difference = torch.sub(two, one, out=chunk.empty(_DIFFERENCE, torch.float64)[: len(a)])
            if a.dtype.itemsize == b.dtype.itemsize == 8 and not (a.is_floating_point() or b.is_floating_point()):
                _make_exact(difference, a, b)
            sums.dd = _dot(difference, difference)
            pairs = torch.view_as_complex(difference.view(-1, 2)) if self.kind == "complex" else difference
            sums.largest = pairs.abs().max().item()
        if base is not None:
            self._add_changes(chunk, start, sums, one, two, base)
        return sums

    def _add_changes(
        self, chunk: Chunk, start: int, sums: Sums, a: torch.Tensor, b: torch.Tensor, base: torch.Tensor
    ) -> None:
        """Adds what both have changed in the base. ``start``: the grain's first element in the chunk."""
        import torch

        sums.cc = _dot(base, base)
        change_a = torch.sub(a, base, out=chunk.empty(_CHANGE_A, torch.float64)[: len(a)])
        change_b = change_a if b is a else torch.sub(b, base, out=chunk.empty(_CHANGE_B, torch.float64)[: len(a)])
        sums.da = _dot(change_a, change_a)
        sums.db = sums.da if b is a else _dot(change_b, change_b)
        product = torch.mul(change_a, change_b, out=chunk.empty(_DIFFERENCE, torch.float64)[: len(a)])
        sums.dadb = product.sum().item()
        sums.changed, sums.agreeing = int(product.count_nonzero()), int((product > 0).count_nonzero())
        if self.cuts and (sums.da or sums.db):
            first, (cut_a, cut_b) = chunk.start + start, self.cuts
            in_a = cut_a.keep(_magnitude(chunk, change_a), first) != 0
            in_b = cut_b.keep(_magnitude(chunk, change_b), first) != 0
            sums.top_a, sums.top_b = int(in_a.count_nonzero()), int(in_b.count_nonzero())
            sums.top_both = int((in_a & in_b).count_nonzero())


def _dot(x: torch.Tensor, y: torch.Tensor) -> float:
    import torch

    return float(torch.dot(x, y).item())


def _wide(chunk: Chunk, raw: torch.Tensor, slot: Slot) -> torch.Tensor:
    """Returns raw numbers as float64."""
    import torch

    if raw.is_floating_point() and raw.dtype not in (torch.bfloat16, torch.float32, torch.float64):
        # torch converts half and fp8 to double one element at a time. The way over float32 is exact and faster.
        raw = chunk.empty(_NARROW, torch.float32)[: len(raw)].copy_(raw)
    return chunk.empty(slot, torch.float64)[: len(raw)].copy_(raw)


def _bits(values: torch.Tensor) -> torch.Tensor:
    import torch

    return values.view(getattr(torch, _BITS[values.element_size()]))


def _unequal(a: torch.Tensor, b: torch.Tensor, one: torch.Tensor, two: torch.Tensor) -> torch.Tensor:
    """Returns where numbers of two dtypes have other values. ``one`` and ``two`` are the same numbers as float64.

    NaN equals NaN. 64-bit integers are compared as such too, because float64 rounds them.
    """
    import torch

    flags = one.ne(two)
    if a.is_floating_point() and b.is_floating_point():
        return flags & ~(one.isnan() & two.isnan())
    return flags | _as_int64(a).ne(_as_int64(b)) if torch.int64 in (a.dtype, b.dtype) or _unsigned(a, b) else flags


def _unsigned(a: torch.Tensor, b: torch.Tensor) -> bool:
    import torch

    return torch.uint64 in (a.dtype, b.dtype)


def _as_int64(values: torch.Tensor) -> torch.Tensor:
    """Returns integers as int64, those of uint64 by their bits. Returns floating-point numbers cut to integers."""
    import torch

    return values.view(torch.int64) if values.dtype == torch.uint64 else values.to(torch.int64)


def _make_exact(difference: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """Replaces differences of 64-bit integers by those of integer arithmetic, rounded once, where it does not overflow."""
    import torch

    small = difference.abs() < _NO_OVERFLOW
    exact = (_as_int64(b) - _as_int64(a)).to(torch.float64)
    torch.where(small, exact, difference, out=difference)
