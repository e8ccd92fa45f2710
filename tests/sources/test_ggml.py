"""Blocks of ggml, against a reference that reads them number by number from the description of each layout."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from sources.suite import Case, Disk, SourceSuite
from streammerge.sources.codebooks import codebook
from streammerge.sources.ggml import BLOCKS, Ggml, ggml
from streammerge.sources.stored import Stored
from streammerge.tensors.dtypes import DType

IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
CODEBOOKS = {name: codebook(name).tolist() for name in ("IQ1", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S")}
FP4 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)


def f32(number: float) -> float:
    return float(np.float32(number))


def half(octets: bytes) -> float:
    return float(struct.unpack("<e", octets)[0])


def nibble(octets: bytes, at: int, count: int) -> int:
    """Returns number ``at`` of ``count``, whose first half lies in the low bits."""
    return octets[at % (count // 2)] >> (4 if at >= count // 2 else 0) & 15


def six_bits(octets: bytes, at: int) -> tuple[int, int]:
    if at < 4:
        return octets[at] & 63, octets[at + 4] & 63
    return (
        octets[at + 4] & 15 | (octets[at - 4] >> 6) << 4,
        octets[at + 4] >> 4 | (octets[at] >> 6) << 4,
    )


def word(octets: bytes, at: int, nbytes: int = 2) -> int:
    """Returns little-endian number ``at`` of some bytes."""
    return int.from_bytes(octets[at * nbytes : (at + 1) * nbytes], "little")


def sign(code: int, at: int, even: bool) -> int:
    """Returns sign ``at`` of eight. ``even``: the code has seven bits, and the eighth sign makes their number even."""
    code |= (bin(code).count("1") % 2) << 7 if even else 0
    return -1 if code >> at & 1 else 1


def of_codebook(kind: str, b: bytes, at: int) -> float:
    """Returns number ``at`` of a block of one to three bits."""
    eight, part, inner = at // 8, at // 32, at % 8
    if kind == "TQ1_0":
        begin, wide, inner = (0, 32, at) if at < 160 else (32, 16, at - 160) if at < 240 else (48, 4, at - 240)
        octet = b[begin + inner % wide] * 3 ** (inner // wide) % 256
        return f32(half(b[52:]) * (octet * 3 // 256 - 1))
    if kind == "TQ2_0":
        return f32(half(b[64:]) * ((b[at // 128 * 32 + at % 32] >> at % 128 // 32 * 2 & 3) - 1))
    if kind == "IQ1_S":
        high = word(b[34:], part)
        vector = CODEBOOKS["IQ1"][b[2 + eight] | (high >> eight % 4 * 3 & 7) << 8]
        scale = f32(half(b[:2]) * (2 * (high >> 12 & 7) + 1))
        return f32(scale * (vector[inner] + (-0.125 if high >> 15 else 0.125)))
    if kind == "IQ1_M":
        whole = sum((word(b[48:], i) >> 12) << 4 * i for i in range(4)).to_bytes(2, "little")
        high = b[32 + eight // 2] >> eight % 2 * 4 & 15
        vector = CODEBOOKS["IQ1"][b[eight] | (high & 7) << 8]
        scale = f32(half(whole) * (2 * (word(b[48:], at // 64) >> at % 64 // 16 * 3 & 7) + 1))
        return f32(scale * (vector[inner] + (-0.125 if high & 8 else 0.125)))
    four = at // 4
    if kind in ("IQ2_XXS", "IQ3_XXS"):
        fields = word(b[2:], 2 * part + 1, 4) if kind == "IQ2_XXS" else word(b[66:], part, 4)
        factor = sign(fields >> eight % 4 * 7 & 127, inner, True)
        scale = f32(half(b[:2]) * (0.5 + (fields >> 28)))
        if kind == "IQ2_XXS":
            return f32(scale * 0.25 * factor * CODEBOOKS[kind][b[2 + part * 8 + eight % 4]][inner])
        return f32(scale * 0.5 * factor * CODEBOOKS[kind][b[2 + four]][at % 4])
    if kind == "IQ3_S":
        place = b[2 + four] | (b[66 + four // 8] >> four % 8 & 1) << 8
        scale = f32(half(b[:2]) * (1 + 2 * (b[106 + part // 2] >> part % 2 * 4 & 15)))
        return f32(scale * CODEBOOKS[kind][place][at % 4] * sign(b[74 + eight], inner, False))
    scales, group = b[66:] if kind == "IQ2_XS" else b[74:], at // 16
    scale = f32(half(b[:2]) * (0.5 + (scales[group // 2] >> group % 2 * 4 & 15))) * 0.25
    if kind == "IQ2_XS":
        code = word(b[2:], eight)
        return f32(scale * CODEBOOKS[kind][code & 511][inner] * sign(code >> 9, inner, True))
    place = b[2 + eight] | (b[66 + eight // 4] >> eight % 4 * 2 & 3) << 8
    return f32(scale * CODEBOOKS[kind][place][inner] * sign(b[34 + eight], inner, False))


def number(kind: str, b: bytes, at: int) -> float:
    """Returns number ``at`` of a block."""
    if kind in ("Q4_0", "IQ4_NL"):
        code = nibble(b[2:], at, 32)
        return f32(half(b[:2]) * (code - 8 if kind == "Q4_0" else IQ4[code]))
    if kind == "Q4_1":
        return f32(f32(half(b[:2]) * nibble(b[4:], at, 32)) + half(b[2:4]))
    if kind in ("Q5_0", "Q5_1"):
        begin = 2 if kind == "Q5_0" else 4
        (bits,) = struct.unpack("<I", b[begin : begin + 4])
        code = nibble(b[begin + 4 :], at, 32) | (bits >> at & 1) << 4
        return f32(half(b[:2]) * (code - 16)) if kind == "Q5_0" else f32(f32(half(b[:2]) * code) + half(b[2:4]))
    if kind == "Q8_0":
        return f32(half(b[:2]) * struct.unpack("<b", b[2 + at : 3 + at])[0])
    if kind == "Q2_K":
        code = b[16 + at // 128 * 32 + at % 32] >> at % 128 // 32 * 2 & 3
        scale = b[at // 16]
        return f32(f32(f32(half(b[80:82]) * (scale & 15)) * code) - f32(half(b[82:84]) * (scale >> 4)))
    if kind == "Q3_K":
        code = b[32 + at // 128 * 32 + at % 32] >> at % 128 // 32 * 2 & 3
        code -= 0 if b[at % 32] >> at // 32 & 1 else 4
        group = at // 16
        low = b[96 + group % 8] >> (4 if group >= 8 else 0) & 15
        scale = low | (b[104 + group % 4] >> group // 4 * 2 & 3) << 4
        return f32(f32(half(b[108:]) * (scale - 32)) * code)
    if kind in ("Q4_K", "Q5_K"):
        scale, least = six_bits(b[4:16], at // 32)
        begin = 16 if kind == "Q4_K" else 48
        code = b[begin + at // 64 * 32 + at % 32] >> (4 if at % 64 >= 32 else 0) & 15
        code |= (b[16 + at % 32] >> at // 32 & 1) << 4 if kind == "Q5_K" else 0
        return f32(f32(f32(half(b[:2]) * scale) * code) - f32(half(b[2:4]) * least))
    if kind == "Q6_K":
        part, inner = at // 128, at % 128
        code = b[part * 64 + inner % 64] >> (4 if inner >= 64 else 0) & 15
        code |= (b[128 + part * 32 + inner % 32] >> inner // 32 * 2 & 3) << 4
        scale = struct.unpack("<b", b[192 + at // 16 : 193 + at // 16])[0]
        return f32(f32(half(b[208:]) * scale) * (code - 32))
    if kind == "IQ4_XS":
        group = at // 32
        (high,) = struct.unpack("<H", b[2:4])
        scale = b[4 + group // 2] >> group % 2 * 4 & 15 | (high >> 2 * group & 3) << 4
        return f32(f32(half(b[:2]) * (scale - 32)) * IQ4[nibble(b[8 + group * 16 :], at % 32, 32)])
    if kind[:2] in ("TQ", "IQ"):
        return of_codebook(kind, b, at)
    if kind == "MXFP4":
        return f32(2.0 ** (b[0] - 128) * FP4[nibble(b[1:], at, 32)])
    scale = float(torch.tensor(b[at // 16] & 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn)) / 2
    scale = 0.0 if b[at // 16] in (0, 0x7F) or math.isnan(scale) else scale
    return f32(scale * FP4[nibble(b[4 + at // 16 * 8 :], at % 16, 16)])


def sample(disk: Disk, kind: str, shape: tuple[int, ...], seed: int) -> tuple[Stored, torch.Tensor]:
    """Returns random blocks without NaN, and their numbers."""
    layout, count = BLOCKS[kind], math.prod(shape) // BLOCKS[kind].elems
    drawn = torch.randint(0, 256, (count, layout.nbytes), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    halves = {
        "Q2_K": (81, 83),
        "Q3_K": (109,),
        "Q6_K": (209,),
        "TQ1_0": (53,),
        "TQ2_0": (65,),
        "IQ1_M": (55,),
        "MXFP4": (),
        "NVFP4": (),
    }.get(kind, (1,))
    for place in (*halves, *((3,) if kind in ("Q4_1", "Q5_1", "Q4_K", "Q5_K") else ())):
        drawn[:, place] &= 0xBF  # no exponent of NaN or infinity
    if kind == "MXFP4":
        drawn[:, 0] = drawn[:, 0] % 100 + 70
    expected = [number(kind, bytes(block), at) for block in drawn.tolist() for at in range(layout.elems)]
    path, offset = disk.write(drawn.numpy().tobytes())
    packed = Stored(disk.stored(drawn).spec, path, offset)
    return packed, torch.tensor(expected, dtype=torch.float32).view(shape)


class TestGgml(SourceSuite):
    dtype = DType.F32

    def cases(self, disk: Disk) -> Iterator[Case]:
        for seed, (kind, layout) in enumerate(BLOCKS.items()):
            shape = (3, layout.elems) if seed % 2 else (2, 2, 2 * layout.elems)
            packed, expected = sample(disk, kind, shape, seed)
            yield Case(ggml("w", shape, packed, kind), expected)
        for kind, heads, wide in (("Q8_0", 3, 2), ("Q4_K", 2, 1), ("Q4_0", 1, 3)):
            columns = wide * BLOCKS[kind].elems
            packed, expected = sample(disk, kind, (heads * 8, columns), 7)
            halves = expected.view(heads, 4, 2, columns).transpose(1, 2).reshape(-1, columns)
            yield Case(ggml("w", (heads * 8, columns), packed, kind, 8), halves.contiguous())

    def test_rows_are_bytes_too(self, tmp_path: Any) -> None:
        packed, expected = sample(Disk(tmp_path), "Q5_1", (4, 64), 3)
        source = ggml("w", (4, 64), packed, "Q5_1").rows(1, 3)
        assert isinstance(source, Ggml)
        from sources.suite import room
        from streammerge.sources.base import read_whole

        assert bytes(read_whole(source, room())) == bytes(expected[1:3].contiguous().view(torch.uint8).numpy())


@pytest.mark.parametrize("kind", BLOCKS)
def test_long_tensors_are_read_in_any_parts(kind: str, tmp_path: Any) -> None:
    """A tensor of several spans, whose numbers are those of its blocks one by one."""
    layout = BLOCKS[kind]
    count = 300_000 // layout.elems
    drawn = torch.randint(0, 0x38, (count, layout.nbytes), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    disk = Disk(tmp_path)
    source = ggml("w", (count, layout.elems), disk.stored(drawn), kind)
    expected = layout.numbers(drawn).reshape(-1)
    from sources.suite import room

    reader = source.open(room())
    for start, stop in ((0, 300_000 // layout.elems * layout.elems), (131_000, 263_001), (7, 9)):
        made = bytearray(reader.read(start, stop, memoryview(bytearray(4 * (stop - start)))))
        assert torch.equal(torch.frombuffer(made, dtype=torch.float32), expected[start:stop])
