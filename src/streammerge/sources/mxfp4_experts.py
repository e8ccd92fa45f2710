"""Experts of gpt-oss: 4-bit floats in blocks of 32 with a power of two each, stored with rows and columns swapped."""

from __future__ import annotations

from dataclasses import dataclass

from streammerge.errors import MismatchError, printable
from streammerge.sources.base import Needs, Reader, Room, Source, region_bytes
from streammerge.sources.narrow import scales_of
from streammerge.sources.unpacked import pairs
from streammerge.tensors.dtypes import DType
from streammerge.tensors.spec import TensorSpec

_BLOCK = 32
_BLOCK_BYTES = 16


@dataclass(frozen=True, slots=True)
class Mxfp4Experts(Source):
    """``[experts, inputs, outputs]`` in float32, from ``blocks`` of ``[experts, outputs, inputs / 32, 16]`` bytes and their
    ``scales``. :func:`mxfp4_experts` makes it.

    The packed bytes of one expert are held. A reader computes 32 rows of the result at a time, which are one block of each
    row that is stored.
    """

    spec: TensorSpec
    blocks: Source
    scales: Source

    def needs(self) -> Needs:
        scratch = (
            region_bytes(self.expert_bytes) + region_bytes(self.expert_scales) + region_bytes(4 * _BLOCK * self.outputs)
        )
        held = 8 * _BLOCK * self.outputs + 16 * self.outputs
        return Needs(scratch_bytes=scratch, held_bytes=held, computes=True) + self.blocks.needs() + self.scales.needs()

    def open(self, room: Room) -> Reader:
        return _Reader(self, room)

    @property
    def dequantises(self) -> bool:
        return True

    @property
    def outputs(self) -> int:
        return self.spec.shape[2]

    @property
    def groups(self) -> int:
        return self.spec.shape[1] // _BLOCK

    @property
    def expert_scales(self) -> int:
        return self.outputs * self.groups

    @property
    def expert_bytes(self) -> int:
        return self.expert_scales * _BLOCK_BYTES


def mxfp4_experts(name: str, blocks: Source, scales: Source) -> Mxfp4Experts:
    """Returns the parameter that blocks and scales stand for. Raises MismatchError if they do not fit each other."""
    shape = blocks.spec.shape
    if (
        (blocks.spec.dtype, scales.spec.dtype) != (DType.U8, DType.U8)
        or len(shape) != 4
        or shape[3] != _BLOCK_BYTES
        or scales.spec.shape != shape[:3]
    ):
        raise MismatchError(
            f"{printable(name)}: {scales.spec.dtype} {list(scales.spec.shape)} of {printable(scales.spec.name)} are no "
            f"scales of {blocks.spec.dtype} {list(shape)}"
        )
    return Mxfp4Experts(TensorSpec(name, DType.F32, (shape[0], shape[2] * _BLOCK, shape[1])), blocks, scales)


class _Reader(Reader):
    def __init__(self, source: Mxfp4Experts, room: Room) -> None:
        self._source, self._room = source, room
        self._blocks, self._scales = source.blocks.open(room), source.scales.open(room)
        self._packed, self._exponents = room.take(source.expert_bytes), room.take(source.expert_scales)
        self._tile = room.take(4 * _BLOCK * source.outputs)
        self._expert = self._made = -1

    def read(self, start: int, stop: int, out: memoryview) -> memoryview:
        tile, at = _BLOCK * self._source.outputs, start
        while at < stop:
            number, inner = divmod(at, tile)
            if self._made != number:
                self._make(number)
            end = min(stop, at - inner + tile)
            out[4 * (at - start) : 4 * (end - start)] = self._tile[4 * inner : 4 * (inner + end - at)]
            at = end
        return out

    def _make(self, number: int) -> None:
        """Computes 32 rows of the result: one block of each stored row of an expert."""
        import torch

        self._room.halt()
        self._made = -1
        source = self._source
        expert, group = divmod(number, source.groups)
        if self._expert != expert:
            self._load(expert)
        packed = torch.frombuffer(self._packed, dtype=torch.uint8).view(source.outputs, source.groups, _BLOCK_BYTES)[
            :, group
        ]
        exponents = torch.frombuffer(self._exponents, dtype=torch.uint8).view(source.outputs, source.groups)[:, group]
        scales = scales_of(memoryview(exponents.contiguous().numpy()), DType.U8)  # type: ignore[arg-type]
        numbers = pairs().index_select(0, packed.reshape(-1).int()).view(torch.float32).view(source.outputs, _BLOCK)
        into = torch.frombuffer(self._tile, dtype=torch.float32).view(_BLOCK, source.outputs)
        into.copy_(numbers.mul_(scales.unsqueeze(1)).T)
        self._made = number

    def _load(self, expert: int) -> None:
        """Reads the packed bytes of an expert."""
        self._expert = -1
        for reader, region in ((self._blocks, self._packed), (self._scales, self._exponents)):
            count = len(region)
            made = reader.read(expert * count, (expert + 1) * count, region)
            if made is not region:
                region[:] = made
        self._expert = expert
