"""Weights in the blocks of ggml, which GGUF files hold: 32, 64 or 256 numbers with scales of their own, in float32.

The order of operations is that of ggml, so the numbers are the same to the bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from streammerge.sources.base import Needs, Reader, Room, Source, region_bytes
from streammerge.sources.codebooks import codebook, even_signs, signs
from streammerge.sources.stored import Stored
from streammerge.sources.unpacked import E2M1
from streammerge.tensors.dtypes import DType
from streammerge.tensors.spec import GRAIN, TensorSpec

if TYPE_CHECKING:
    import torch

_SPAN_ELEMS = 2 * GRAIN
_IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""The numbers of 4-bit codes that are not spaced evenly."""


@dataclass(frozen=True, slots=True)
class Ggml(Source):
    """The numbers of ``packed`` bytes, whose blocks have the layout ``kind``, in float32.

    ``head_rows``: rows of one attention head, if the rows of each head are stored with their halves interleaved, as for the
    rotary embeddings of llama.cpp; else 0. The result has them in the order of transformers.
    """

    spec: TensorSpec
    packed: Stored
    kind: str
    head_rows: int = 0

    def needs(self) -> Needs:
        span = self.span_blocks
        size = BLOCKS[self.kind].nbytes
        scratch = region_bytes((2 if self.head_rows else 1) * span * size)
        held = 24 * span * BLOCKS[self.kind].elems
        return Needs(scratch_bytes=scratch, held_bytes=held, computes=True) + self.packed.needs()

    def open(self, room: Room) -> Reader:
        return _Reader(self, room)

    @property
    def dequantises(self) -> bool:
        return True

    @property
    def row_blocks(self) -> int:
        """Blocks in a row. A row is never cut within a block."""
        return self.spec.shape[-1] // BLOCKS[self.kind].elems if self.spec.shape else 0

    @property
    def span_blocks(self) -> int:
        """Blocks that are computed at once."""
        elems = BLOCKS[self.kind].elems
        most = -(-self.spec.numel // elems)
        span = min(most, _SPAN_ELEMS // elems)
        return max(span, min(self.row_blocks, most)) if self.head_rows else span

    def rows(self, start: int, stop: int) -> Source | None:
        if self.head_rows:
            return None
        spec, packed = self.spec, self.packed
        row = packed.nbytes // spec.shape[0] if spec.shape[0] else 0
        part = Stored(
            TensorSpec(packed.spec.name, DType.U8, ((stop - start) * row,)), packed.path, packed.offset + start * row
        )
        return Ggml(TensorSpec(spec.name, spec.dtype, (stop - start, *spec.shape[1:])), part, self.kind)


class _Reader(Reader):
    def __init__(self, source: Ggml, room: Room) -> None:
        self._source, self._room = source, room
        self._packed = source.packed.open(room)
        self._layout = BLOCKS[source.kind]
        span = source.span_blocks * self._layout.nbytes
        self._raw = room.take((2 if source.head_rows else 1) * span)

    def read(self, start: int, stop: int, out: memoryview) -> memoryview:
        import torch

        elems, at = self._layout.elems, start
        into = torch.frombuffer(out, dtype=torch.float32)
        while at < stop:
            self._room.halt()
            first = at // elems
            if self._source.head_rows:
                count, made = self._interleaved(first, -(-stop // elems))
            else:
                count = min(-(-stop // elems) - first, self._source.span_blocks)
                made = self._layout.numbers(self._blocks(first, count))
            end = min(stop, (first + count) * elems)
            skipped = at - first * elems
            into[at - start : end - start] = made.reshape(-1)[skipped : skipped + end - at]
            at = end
        return out

    def _blocks(self, first: int, count: int) -> torch.Tensor:
        """Returns stored blocks as rows of bytes."""
        import torch

        size = self._layout.nbytes
        made = self._packed.read(first * size, (first + count) * size, self._raw[: count * size])
        return torch.frombuffer(made, dtype=torch.uint8).view(count, size)

    def _interleaved(self, first: int, stop: int) -> tuple[int, torch.Tensor]:
        """Returns the numbers of some blocks from the block ``first`` of the result on, and how many blocks these are."""
        wide, head = self._source.row_blocks, self._source.head_rows
        row, skipped = divmod(first, wide)
        number, inner = divmod(row, head)
        half, place = divmod(inner, head // 2)
        stored = number * head + 2 * place + half
        if skipped or stop - first < wide:  # a part of one row
            count = min(stop - first, wide - skipped)
            return count, self._layout.numbers(self._blocks(stored * wide + skipped, count))
        rows = min((stop - first) // wide, head // 2 - place, max(self._source.span_blocks // wide, 1))
        blocks = self._blocks(stored * wide, (2 * rows - 1) * wide)
        every = blocks.as_strided(
            (rows, wide, self._layout.nbytes), (2 * wide * self._layout.nbytes, self._layout.nbytes, 1)
        )
        return rows * wide, self._layout.numbers(every.reshape(rows * wide, self._layout.nbytes))


@dataclass(frozen=True, slots=True)
class Layout:
    """A block of ``elems`` numbers in ``nbytes`` bytes. ``numbers``: from rows of bytes to rows of float32 numbers."""

    elems: int
    nbytes: int
    numbers: Callable[[torch.Tensor], torch.Tensor]


def _half(octets: torch.Tensor) -> torch.Tensor:
    """Returns float16 numbers in float32."""
    import torch

    return octets.contiguous().view(torch.float16).float()


def _nibbles(octets: torch.Tensor) -> torch.Tensor:
    """Returns the low halves of some bytes, then their high halves."""
    import torch

    return torch.cat((octets & 15, octets >> 4), -1)


def _bits(octets: torch.Tensor) -> torch.Tensor:
    """Returns the bits of each row of bytes, the lowest first."""
    return _shifted(octets.unsqueeze(-1), 8, 1, 1).reshape(len(octets), -1)


def _shifted(octets: torch.Tensor, count: int, step: int, mask: int, before: bool = False) -> torch.Tensor:
    """Returns fields of bytes: ``count`` shifts by ``step``, as a new axis behind the last one or before it."""
    import torch

    shifts = torch.arange(0, count * step, step, dtype=torch.uint8)
    if before:
        return (octets.unsqueeze(-2) >> shifts.view(-1, 1)) & mask
    return (octets >> shifts) & mask


def _q4_0(blocks: torch.Tensor) -> torch.Tensor:
    return _half(blocks[:, :2]) * (_nibbles(blocks[:, 2:]).float() - 8)


def _q4_1(blocks: torch.Tensor) -> torch.Tensor:
    return _half(blocks[:, :2]) * _nibbles(blocks[:, 4:]).float() + _half(blocks[:, 2:4])


def _q5_0(blocks: torch.Tensor) -> torch.Tensor:
    codes = _nibbles(blocks[:, 6:]) | _bits(blocks[:, 2:6]) << 4
    return _half(blocks[:, :2]) * (codes.float() - 16)


def _q5_1(blocks: torch.Tensor) -> torch.Tensor:
    codes = _nibbles(blocks[:, 8:]) | _bits(blocks[:, 4:8]) << 4
    return _half(blocks[:, :2]) * codes.float() + _half(blocks[:, 2:4])


def _q8_0(blocks: torch.Tensor) -> torch.Tensor:
    import torch

    return blocks[:, 2:].view(torch.int8).float() * _half(blocks[:, :2])


def _q2_k(blocks: torch.Tensor) -> torch.Tensor:
    count = len(blocks)
    scales, codes = blocks[:, :16], _shifted(blocks[:, 16:80].reshape(count, 2, 32), 4, 2, 3, before=True)
    scale = (_half(blocks[:, 80:82]) * (scales & 15).float()).unsqueeze(-1)
    least = (_half(blocks[:, 82:84]) * (scales >> 4).float()).unsqueeze(-1)
    return scale * codes.reshape(count, 16, 16).float() - least


def _q3_k(blocks: torch.Tensor) -> torch.Tensor:
    import torch

    count = len(blocks)
    high = _shifted(blocks[:, :32], 8, 1, 1, before=True).reshape(count, 16, 16)
    low = _shifted(blocks[:, 32:96].reshape(count, 2, 32), 4, 2, 3, before=True).reshape(count, 16, 16)
    packed = blocks[:, 96:108]
    scales = torch.cat((packed[:, :8] & 15, packed[:, :8] >> 4), 1)
    scales = scales | _shifted(packed[:, 8:], 4, 2, 3, before=True).reshape(count, 16) << 4
    scale = (_half(blocks[:, 108:]) * (scales.float() - 32)).unsqueeze(-1)
    return scale * (low.float() - ((high ^ 1) << 2).float())


def _six_bits(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns eight scales and eight offsets of six bits, which lie in twelve bytes."""
    import torch

    one, two, both = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = torch.cat((one & 63, (both & 15) | (one >> 2 & 48)), 1)
    return scales, torch.cat((two & 63, (both >> 4) | (two >> 2 & 48)), 1)


def _q4_k(blocks: torch.Tensor) -> torch.Tensor:
    return _of_six_bits(blocks, _shifted(blocks[:, 16:].reshape(-1, 4, 32), 2, 4, 15, before=True).reshape(-1, 8, 32))


def _q5_k(blocks: torch.Tensor) -> torch.Tensor:
    low = _shifted(blocks[:, 48:].reshape(-1, 4, 32), 2, 4, 15, before=True).reshape(-1, 8, 32)
    return _of_six_bits(blocks, low | _shifted(blocks[:, 16:48], 8, 1, 1, before=True) << 4)


def _of_six_bits(blocks: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    scales, offsets = _six_bits(blocks[:, 4:16])
    scale = (_half(blocks[:, :2]) * scales.float()).unsqueeze(-1)
    least = (_half(blocks[:, 2:4]) * offsets.float()).unsqueeze(-1)
    return scale * codes.float() - least


def _q6_k(blocks: torch.Tensor) -> torch.Tensor:
    import torch

    low = _shifted(blocks[:, :128].reshape(-1, 2, 64), 2, 4, 15, before=True).reshape(-1, 8, 32)
    high = _shifted(blocks[:, 128:192].reshape(-1, 2, 32), 4, 2, 3, before=True).reshape(-1, 8, 32)
    scale = _half(blocks[:, 208:]) * blocks[:, 192:208].contiguous().view(torch.int8).float()
    return scale.unsqueeze(-1) * ((low | high << 4).float() - 32).reshape(-1, 16, 16)


def _iq4_nl(blocks: torch.Tensor) -> torch.Tensor:
    return _half(blocks[:, :2]) * _table(_IQ4)[_nibbles(blocks[:, 2:]).int()]


def _iq4_xs(blocks: torch.Tensor) -> torch.Tensor:
    count = len(blocks)
    low = _shifted(blocks[:, 4:8].unsqueeze(-1), 2, 4, 15).reshape(count, 8)
    high = _shifted(blocks[:, 2:4].unsqueeze(-1), 4, 2, 3).reshape(count, 8)
    scale = (_half(blocks[:, :2]) * ((low | high << 4).float() - 32)).unsqueeze(-1)
    codes = _shifted(blocks[:, 8:].reshape(count, 8, 16), 2, 4, 15, before=True).reshape(count, 8, 32)
    return scale * _table(_IQ4)[codes.int()]


def _tq1_0(blocks: torch.Tensor) -> torch.Tensor:
    """Five numbers in a byte: the byte is their fraction in base 3, by 256. Four in each of the last four bytes."""
    import torch

    powers = torch.tensor((1, 3, 9, 27, 81), dtype=torch.uint8).view(-1, 1)
    parts = ((blocks[:, :32], 5), (blocks[:, 32:48], 5), (blocks[:, 48:52], 4))
    codes = torch.cat([(octets.unsqueeze(1) * powers[:count]).flatten(1) for octets, count in parts], 1)
    return _half(blocks[:, 52:]) * ((codes.int() * 3 >> 8) - 1).float()


def _tq2_0(blocks: torch.Tensor) -> torch.Tensor:
    codes = _shifted(blocks[:, :64].reshape(-1, 2, 32), 4, 2, 3, before=True).flatten(1)
    return _half(blocks[:, 64:]) * (codes.float() - 1)


def _words(octets: torch.Tensor) -> torch.Tensor:
    """Returns little-endian numbers of 16 bits, which each two bytes of a row are."""
    pairs = octets.reshape(*octets.shape[:-1], -1, 2).int()
    return pairs[..., 0] | pairs[..., 1] << 8


def _fields(words: torch.Tensor, count: int, step: int) -> torch.Tensor:
    """Returns each word shifted to the right by 0, ``step``, ..., as a new axis behind the last one."""
    import torch

    return words.unsqueeze(-1) >> torch.arange(0, count * step, step, dtype=torch.int32)


def _scale_in_quarters(blocks: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
    """Returns d * (0.5 + s) / 4 for scales s of four bits."""
    scales = _shifted(packed.unsqueeze(-1), 2, 4, 15).flatten(1)
    return _half(blocks[:, :2]) * (scales.float() + 0.5) * 0.25


def _iq2_xxs(blocks: torch.Tensor) -> torch.Tensor:
    octets = blocks[:, 2:].reshape(-1, 8, 8)
    words = _words(octets[..., 4:]).long()
    fields = words[..., 0] | words[..., 1] << 16
    scale = _half(blocks[:, :2]) * ((fields >> 28).float() + 0.5) * 0.25
    numbers = codebook("IQ2_XXS")[octets[..., :4].int()] * even_signs()[_fields(fields, 4, 7) & 127]
    return scale.view(-1, 8, 1, 1) * numbers


def _iq2_xs(blocks: torch.Tensor) -> torch.Tensor:
    codes = _words(blocks[:, 2:66])
    numbers = codebook("IQ2_XS")[codes & 511] * even_signs()[codes >> 9]
    return _scale_in_quarters(blocks, blocks[:, 66:]).view(-1, 16, 1, 1) * numbers.view(-1, 16, 2, 8)


def _iq2_s(blocks: torch.Tensor) -> torch.Tensor:
    high = _shifted(blocks[:, 66:74].unsqueeze(-1), 4, 2, 3).flatten(1).int()
    numbers = codebook("IQ2_S")[blocks[:, 2:34].int() | high << 8] * signs()[blocks[:, 34:66].int()]
    return _scale_in_quarters(blocks, blocks[:, 74:]).view(-1, 16, 1, 1) * numbers.view(-1, 16, 2, 8)


def _iq3_xxs(blocks: torch.Tensor) -> torch.Tensor:
    words = _words(blocks[:, 66:].reshape(-1, 8, 4)).long()
    fields = words[..., 0] | words[..., 1] << 16
    scale = _half(blocks[:, :2]) * ((fields >> 28).float() + 0.5) * 0.5
    vectors = codebook("IQ3_XXS")[blocks[:, 2:66].int()].view(-1, 8, 4, 8)
    return scale.view(-1, 8, 1, 1) * (vectors * even_signs()[_fields(fields, 4, 7) & 127])


def _iq3_s(blocks: torch.Tensor) -> torch.Tensor:
    high = _bits(blocks[:, 66:74]).int()
    vectors = codebook("IQ3_S")[blocks[:, 2:66].int() | high << 8].view(-1, 8, 4, 8)
    scales = _shifted(blocks[:, 106:].unsqueeze(-1), 2, 4, 15).flatten(1)
    scale = _half(blocks[:, :2]) * (2 * scales + 1).float()
    return scale.view(-1, 8, 1, 1) * (vectors * signs()[blocks[:, 74:106].int()].view(-1, 8, 4, 8))


_DELTA = 0.125
"""What is added to the numbers of a codebook of IQ1, or taken away."""


def _iq1_s(blocks: torch.Tensor) -> torch.Tensor:
    words = _words(blocks[:, 34:])
    scale = _half(blocks[:, :2]) * (2 * (words >> 12 & 7) + 1).float()
    delta = _DELTA - 2 * _DELTA * (words >> 15).float()
    high = (_fields(words, 4, 3) & 7).flatten(1)
    vectors = codebook("IQ1")[blocks[:, 2:34].int() | high << 8].view(-1, 8, 4, 8)
    return scale.view(-1, 8, 1, 1) * (vectors + delta.view(-1, 8, 1, 1))


def _iq1_m(blocks: torch.Tensor) -> torch.Tensor:
    """The four highest bits of each word of scales are a part of the block's scale in float16."""
    import torch

    words = _words(blocks[:, 48:])
    parts = words >> 12 << torch.arange(0, 16, 4, dtype=torch.int32)
    whole = parts.sum(-1, keepdim=True, dtype=torch.int32)
    whole = _half(torch.cat((whole & 255, whole >> 8), 1).to(torch.uint8))
    scale = whole * (2 * (_fields(words, 4, 3) & 7).flatten(1) + 1).float()
    high = _shifted(blocks[:, 32:48].unsqueeze(-1), 2, 4, 15).flatten(1).int()
    delta = _DELTA - 2 * _DELTA * (high >> 3).float()
    vectors = codebook("IQ1")[blocks[:, :32].int() | (high & 7) << 8].view(-1, 16, 2, 8)
    return scale.view(-1, 16, 1, 1) * (vectors + delta.view(-1, 16, 2, 1))


def _mxfp4(blocks: torch.Tensor) -> torch.Tensor:
    import torch

    scale = torch.ldexp(torch.ones(len(blocks), 1, dtype=torch.float64), blocks[:, :1].int() - 128).float()
    return scale * _table(_DOUBLED)[_nibbles(blocks[:, 1:]).int()]


def _nvfp4(blocks: torch.Tensor) -> torch.Tensor:
    import torch

    codes = blocks[:, 4:].reshape(-1, 4, 8)
    octets = blocks[:, :4].int()
    exponent, fraction = octets >> 3 & 15, (octets & 7).float()
    scale = torch.where(exponent == 0, fraction * 2.0**-9, torch.ldexp(1 + fraction / 8, exponent - 7)) * 0.5
    scale = scale.masked_fill_((octets == 0) | (octets == 0x7F), 0.0).unsqueeze(-1)
    return scale * _table(_DOUBLED)[_nibbles(codes).int()]


_DOUBLED = tuple(2 * number + 0.0 for number in E2M1)  # with one zero: that of code 8 is no negative one


@cache
def _table(numbers: tuple[float, ...]) -> torch.Tensor:
    import torch

    return torch.tensor(numbers, dtype=torch.float32)


BLOCKS: dict[str, Layout] = {
    "Q4_0": Layout(32, 18, _q4_0),
    "Q4_1": Layout(32, 20, _q4_1),
    "Q5_0": Layout(32, 22, _q5_0),
    "Q5_1": Layout(32, 24, _q5_1),
    "Q8_0": Layout(32, 34, _q8_0),
    "Q2_K": Layout(256, 84, _q2_k),
    "Q3_K": Layout(256, 110, _q3_k),
    "Q4_K": Layout(256, 144, _q4_k),
    "Q5_K": Layout(256, 176, _q5_k),
    "Q6_K": Layout(256, 210, _q6_k),
    "TQ1_0": Layout(256, 54, _tq1_0),
    "TQ2_0": Layout(256, 66, _tq2_0),
    "IQ1_S": Layout(256, 50, _iq1_s),
    "IQ1_M": Layout(256, 56, _iq1_m),
    "IQ2_XXS": Layout(256, 66, _iq2_xxs),
    "IQ2_XS": Layout(256, 74, _iq2_xs),
    "IQ2_S": Layout(256, 82, _iq2_s),
    "IQ3_XXS": Layout(256, 98, _iq3_xxs),
    "IQ3_S": Layout(256, 110, _iq3_s),
    "IQ4_NL": Layout(32, 18, _iq4_nl),
    "IQ4_XS": Layout(256, 136, _iq4_xs),
    "MXFP4": Layout(32, 17, _mxfp4),
    "NVFP4": Layout(64, 36, _nvfp4),
}
"""The layouts that are read, by their names in ggml."""


def ggml(name: str, shape: tuple[int, ...], packed: Stored, kind: str, head_rows: int = 0) -> Ggml:
    """Returns a tensor of this shape. ``packed``: its bytes, whose number and whose rows must fit the layout."""
    return Ggml(TensorSpec(name, DType.F32, shape), packed, kind, head_rows)
