"""Infinities and NaN that all inputs have: the output keeps them, and no method computes with them.

An element is *agreed* where all inputs, a base included, have the same infinity, or all have NaN. Attention masks and
buffers that wait for statistics are made of such numbers. Arithmetic turns them into NaN (inf - inf, 0 * inf). So the
output takes them from the inputs, and sums and searches over a tensor leave them out.

All work is done in blocks, so that it needs little memory. It is done only where a result is not finite.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from streammerge.tensors.spec import ranges

if TYPE_CHECKING:
    import torch

Read = Callable[[int, int, int], "torch.Tensor"]
"""(source, start, stop) -> its raw numbers."""
AGREED = "every input"
"""Stands in the counts of NaN and infinity for numbers that all inputs have, which the output keeps."""
_BLOCK_ELEMS = 1 << 14


def finite(values: torch.Tensor) -> torch.Tensor:
    """Returns where numbers are finite, also for 8-bit floats."""
    return (values.float() if values.element_size() == 1 else values).isfinite()


def agreed(read: Read, sources: int, start: int, stop: int) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Yields (first element, element after the last, mask) for each block that has agreed elements."""
    for a, b in ranges(stop - start, _BLOCK_ELEMS):
        first = _wide(read(0, start + a, start + b))
        mask = first.isfinite().logical_not_()
        for source in range(1, sources):
            if not bool(mask.any()):
                break
            other = _wide(read(source, start + a, start + b))
            mask &= (other == first) | (other.isnan() & first.isnan())
        if bool(mask.any()):
            yield start + a, start + b, mask


def blank(values: torch.Tensor, read: Read, sources: int, start: int, stop: int) -> None:
    """Sets the agreed elements of a source's numbers to zero. ``values`` are elements ``start`` to ``stop``."""
    for a, b, mask in agreed(read, sources, start, stop):
        values[a - start : b - start].masked_fill_(mask, 0)


def settle(out: torch.Tensor, read: Read, sources: int, start: int, row: int, without: Callable[[], torch.Tensor]) -> int:
    """Puts agreed numbers into a result that is not finite there. Returns how many are put in.

    ``out`` has the elements from ``start``, in the output's dtype. An agreed number that this dtype cannot hold stays out.
    ``without()`` computes the same elements without the agreed ones. Where ``row`` elements belong together, a row with
    agreed elements is taken from there, because one such number makes NaN of its whole row.
    """
    import torch

    spoiled = torch.zeros(-(-len(out) // row), dtype=torch.bool) if row > 1 else None  # the last row may be shorter
    count = 0
    for number, source_stop, mask in agreed(read, sources, start, start + len(out)):
        a, b = number - start, source_stop - start
        mask &= ~finite(out[a:b])
        if spoiled is not None:
            spoiled[(mask.nonzero()[:, 0] + a) // row] = True
        else:
            count += _put(out[a:b], read(0, number, source_stop), mask)
    if spoiled is None or not bool(spoiled.any()):
        return count
    clean = without().reshape(-1)
    for number in spoiled.nonzero()[:, 0].tolist():
        spoiled_row = slice(number * row, (number + 1) * row)
        _bits(out)[spoiled_row] = _bits(clean[spoiled_row].to(out.dtype))
    for number, source_stop, mask in agreed(read, sources, start, start + len(out)):
        a, b = number - start, source_stop - start
        mask &= spoiled[torch.arange(a, b) // row]
        count += _put(out[a:b], read(0, number, source_stop), mask)
    return count


def count_nonfinite(values: torch.Tensor) -> int:
    return sum([b - a - int(finite(values[a:b]).sum()) for a, b in ranges(len(values), _BLOCK_ELEMS)])


def origins(
    out: torch.Tensor, settled: int, read: Read, sources: int, start: int, origin: Callable[[int], str]
) -> Iterator[tuple[str, int]]:
    """Yields where the non-finite numbers of a result come from, and how many those inputs have at its elements.

    ``settled``: how many of them all inputs have; these do not count. An overflow comes from no input.
    """
    left, met = count_nonfinite(out) - settled, False
    for source in range(sources if left else 0):
        count = count_nonfinite(read(source, start, start + len(out))) - settled
        if count > 0:
            met = True
            yield origin(source), count
    if left and not met:
        yield "the result (overflow)", left


def _put(out: torch.Tensor, raw: torch.Tensor, mask: torch.Tensor) -> int:
    """Puts raw numbers into a result where the mask is set and its dtype can hold them. Returns how many."""
    values, wide = raw.to(out.dtype), _wide(raw)
    made = _wide(values)
    mask &= (made == wide) | (made.isnan() & wide.isnan())
    _bits(out)[mask] = _bits(values)[mask]
    return int(mask.sum())


def _wide(raw: torch.Tensor) -> torch.Tensor:
    """Returns a copy of raw numbers in a dtype that can be compared with every other float."""
    import torch

    return raw.to(torch.float64 if raw.dtype == torch.float64 else torch.float32, copy=True)


def _bits(values: torch.Tensor) -> torch.Tensor:
    """Views numbers as integers. torch cannot put 8-bit floats into places."""
    import torch

    return values.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()])
