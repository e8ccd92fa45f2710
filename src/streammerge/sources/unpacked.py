"""Numbers of few bits that lie packed in bytes or words: 4-bit floats, and integers of 1 to 8 bits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from streammerge.errors import MismatchError, printable
from streammerge.sources.base import Needs, Reader, Room, Source, region_bytes
from streammerge.tensors.dtypes import DType
from streammerge.tensors.spec import GRAIN, TensorSpec

if TYPE_CHECKING:
    import torch

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""The numbers of the 4-bit float with two bits of exponent, by their codes."""
PACKS = (DType.U8, DType.I8, DType.F4, DType.I32)
_SPAN_ELEMS = 4 * GRAIN
_WORD_BITS = 32


@dataclass(frozen=True, slots=True)
class Unpacked(Source):
    """Fields of ``bits`` bits in ``packed``, from the low bits of each byte, or from the high ones if ``high_first``.

    4-bit floats in float32 if ``floats``, else integers minus ``2 ** (bits - 1)`` as int8. ``pitch``: bytes of one row in
    the pack. ``per_word``: fields in a word of 32 bits, whose remaining bits are unused; 0 if fields cross words.
    :func:`unpacked` makes it.
    """

    spec: TensorSpec
    packed: Source
    bits: int
    pitch: int
    floats: bool = False
    high_first: bool = False
    per_word: int = 0

    def needs(self) -> Needs:
        span = self.span
        held = 16 * span if self.bits in (3, 5, 6, 7) else 8 * span
        return Needs(scratch_bytes=region_bytes(self.raw_bytes), held_bytes=held, computes=True) + self.packed.needs()

    def open(self, room: Room) -> Reader:
        return _Reader(self, room)

    @property
    def dequantises(self) -> bool:
        return self.floats

    @property
    def columns(self) -> int:
        return self.spec.shape[-1]

    @property
    def span(self) -> int:
        """Elements that are unpacked at once."""
        return min(_SPAN_ELEMS, self.spec.numel)

    @property
    def raw_bytes(self) -> int:
        """Bytes of the pack that hold a span, and the words at its ends."""
        return (self.span * _WORD_BITS // self.per_word if self.per_word else self.span * self.bits) // 8 + 24


def unpacked(
    name: str, packed: Source, shape: tuple[int, ...], bits: int, *, floats: bool = False, high_first: bool = False
) -> Unpacked:
    """Returns a tensor of this shape whose rows lie packed. Raises MismatchError for a pack that cannot hold it."""
    columns, rows = shape[-1] if shape else 1, math.prod(shape[:-1])
    dense, loose = -(-columns * bits // 8), -(-columns // max(_WORD_BITS // bits, 1)) * 4
    words = -(-columns * bits // _WORD_BITS) * 4
    pitch = packed.nbytes // rows if rows else words if packed.spec.dtype is DType.I32 else dense
    fits = packed.spec.dtype in PACKS and rows * pitch == packed.nbytes
    if fits and pitch in ((dense, words) if packed.spec.dtype is DType.I32 else (dense,)):
        per_word = 0
    elif fits and packed.spec.dtype is DType.I32 and pitch == loose:
        per_word = _WORD_BITS // bits
    else:
        raise MismatchError(
            f"{printable(name)}: {packed.spec.dtype} {list(packed.spec.shape)} of {printable(packed.spec.name)} does not "
            f"hold {list(shape)} numbers of {bits} bits"
        )
    spec = TensorSpec(name, DType.F32 if floats else DType.I8, shape)
    return Unpacked(spec, packed, bits, pitch, floats, high_first, per_word)


class _Reader(Reader):
    def __init__(self, source: Unpacked, room: Room) -> None:
        self._source, self._room = source, room
        self._packed, self._raw = source.packed.open(room), room.take(source.raw_bytes)
        self._word = source.packed.spec.dtype.element_bytes
        self._size = source.spec.dtype.element_bytes
        gapless = not source.per_word and source.pitch * 8 == source.columns * source.bits
        self._columns = source.spec.numel if gapless else source.columns

    def read(self, start: int, stop: int, out: memoryview) -> memoryview:
        at, size = start, self._size
        while at < stop:
            self._room.halt()
            row, column = divmod(at, self._columns)
            end = min(stop, at - column + self._columns, at + self._source.span)
            self._fields(row * self._source.pitch, column, end - at, out[(at - start) * size : (end - start) * size])
            at = end
        return out

    def _fields(self, base: int, first: int, count: int, out: memoryview) -> None:
        """Unpacks fields of one row, whose bytes begin at ``base``."""
        import torch

        source = self._source
        bits, per_word = source.bits, source.per_word
        low = first // per_word * _WORD_BITS if per_word else first * bits
        high = -(-(first + count) // per_word) * _WORD_BITS if per_word else (first + count) * bits
        begin, end = base + low // 8, base + -(-high // 8)
        word = self._word
        first_word, last_word = begin // word, -(-end // word)
        raw = self._packed.read(first_word, last_word, self._raw[: (last_word - first_word) * word])
        octets = torch.frombuffer(raw, dtype=torch.uint8)[begin - first_word * word : end - first_word * word]
        into = torch.frombuffer(out, dtype=torch.float32 if source.floats else torch.int8)
        if per_word or bits in (3, 5, 6, 7):
            places = torch.arange(count, dtype=torch.int32).add_(first)
            at = places // per_word * _WORD_BITS + places % per_word * bits if per_word else places * bits
            into.copy_(_field(octets, at - low // 8 * 8, bits).sub_(1 << (bits - 1)))
            return
        each = 8 // bits
        skipped = first % each
        table = _table(bits, source.floats, source.high_first)
        made = table.index_select(0, octets.int()).view(into.dtype)
        into.copy_(made[skipped : skipped + count])


def _field(octets: torch.Tensor, places: torch.Tensor, bits: int) -> torch.Tensor:
    """Returns the integers of ``bits`` bits at these bits of a little-endian text of bytes."""
    import torch

    wide = torch.nn.functional.pad(octets.int(), (0, 1))
    at = places >> 3
    return ((wide[at] | wide[at + 1] << 8) >> (places & 7)) & ((1 << bits) - 1)


def pairs() -> torch.Tensor:
    """Returns for each byte the two 4-bit floats in it, the low one first, as one integer of 64 bits."""
    return _table(4, True, False)


@cache
def _table(bits: int, floats: bool, high_first: bool) -> torch.Tensor:
    """Returns for each byte the numbers that it holds, as one row of bytes."""
    import torch

    each = 8 // bits
    shifts = [bits * (each - 1 - at if high_first else at) for at in range(each)]
    codes = torch.tensor([[(octet >> shift) & ((1 << bits) - 1) for shift in shifts] for octet in range(256)])
    made = torch.tensor(E2M1)[codes] if floats else codes.sub(1 << (bits - 1)).to(torch.int8)
    wide: torch.dtype = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}[each * made.element_size()]
    return made.contiguous().view(wide).view(-1)


@dataclass(frozen=True, slots=True)
class UnpackedDown(Source):
    """Integers that lie packed along the first axis of a matrix: zero points of groups. Held whole.

    :func:`unpacked_down` makes it.
    """

    spec: TensorSpec
    packed: Source
    bits: int

    def needs(self) -> Needs:
        held = 17 * self.spec.numel + 10 * self.packed.nbytes
        return Needs(held_bytes=held, computes=True) + self.packed.needs()

    def open(self, room: Room) -> Reader:
        return _DownReader(self, room)


def unpacked_down(name: str, packed: Source, shape: tuple[int, int], bits: int) -> UnpackedDown:
    """Returns a matrix whose columns lie packed in words. Raises MismatchError for a pack that cannot hold it."""
    if packed.spec.dtype is not DType.I32 or packed.spec.shape != (-(-shape[0] * bits // _WORD_BITS), shape[1]):
        raise MismatchError(
            f"{printable(name)}: {packed.spec.dtype} {list(packed.spec.shape)} of {printable(packed.spec.name)} does not "
            f"hold {list(shape)} zero points of {bits} bits"
        )
    return UnpackedDown(TensorSpec(packed.spec.name, DType.I8, shape), packed, bits)


class _DownReader(Reader):
    def __init__(self, source: UnpackedDown, room: Room) -> None:
        self._source, self._room, self._packed = source, room, source.packed.open(room)

    def read(self, start: int, stop: int, out: memoryview) -> memoryview:
        import torch

        whole = self._room.once(self._source, self._whole)
        torch.frombuffer(out, dtype=torch.int8).copy_(whole[start:stop])
        return out

    def _whole(self) -> torch.Tensor:
        import torch

        packed, bits = self._source.packed, self._source.bits
        raw = self._packed.read(0, packed.spec.numel, memoryview(bytearray(packed.nbytes)))
        words = torch.frombuffer(raw, dtype=torch.int32).view(packed.spec.shape).T.contiguous()
        places = torch.arange(self._source.spec.shape[0], dtype=torch.int32).mul_(bits)
        wide = torch.nn.functional.pad(words.view(torch.uint8).int(), (0, 1))
        at = places >> 3
        fields = ((wide[:, at] | wide[:, at + 1] << 8) >> (places & 7)) & ((1 << bits) - 1)
        return fields.sub_(1 << (bits - 1)).to(torch.int8).T.contiguous().view(-1)
