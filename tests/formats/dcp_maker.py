"""Folders of torch.distributed.checkpoint, made by torch's own writer in one process that plays all ranks."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner, create_default_global_save_plan
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

Boxes = list[tuple[tuple[int, ...], tuple[int, ...]]]
Cut = Callable[[str, torch.Tensor], Boxes]


def whole(name: str, tensor: torch.Tensor) -> Boxes:
    return [((0,) * tensor.dim(), tuple(tensor.shape))]


def sharded(axis: int, ranks: int) -> Cut:
    """Cuts as DTensor does: even pieces along an axis, the last ones shorter or empty."""

    def cut(name: str, tensor: torch.Tensor) -> Boxes:
        if tensor.dim() <= axis:
            return whole(name, tensor)
        boxes, at = [], 0
        for piece in _chunks(tensor.shape[axis], ranks):
            offsets, sizes = [0] * tensor.dim(), list(tensor.shape)
            offsets[axis], sizes[axis] = at, piece
            boxes.append((tuple(offsets), tuple(sizes)))
            at += piece
        return boxes

    return cut


def _chunks(length: int, ranks: int) -> list[int]:
    size = -(-length // ranks)
    return [max(min(size, length - at * size), 0) for at in range(ranks)]


def grid(rows: int, columns: int) -> Cut:
    """Cuts tensors of two axes or more into a grid, others along their only axis."""

    def cut(name: str, tensor: torch.Tensor) -> Boxes:
        if tensor.dim() < 2:
            return sharded(0, rows)(name, tensor)
        return [
            ((*row[0][:1], *column[0][1:2], *column[0][2:]), (row[1][0], column[1][1], *column[1][2:]))
            for row in sharded(0, rows)(name, tensor)
            for column in sharded(1, columns)(name, tensor)
        ]

    return cut


class _Planner(DefaultSavePlanner):
    def __init__(self, values: Mapping[MetadataIndex, Any]) -> None:
        super().__init__()
        self.values = values

    def resolve_data(self, write_item: WriteItem) -> Any:
        value = self.values[write_item.index]
        if isinstance(value, torch.Tensor):
            return value
        buffer = io.BytesIO()
        torch.save(value, buffer)
        return buffer


def write(
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    cut: Cut = whole,
    objects: Mapping[str, Any] | None = None,
    paths: Mapping[str, tuple[Any, ...]] | None = None,
    ranks: int = 4,
    local: Callable[[torch.Tensor], torch.Tensor] = lambda piece: piece.contiguous(),
    **writing: Any,
) -> Path:
    """Writes a folder. Piece number n of a tensor is rank n's, modulo the number of ranks. ``local``: a piece as its rank
    holds it."""
    plans: list[list[WriteItem]] = [[] for _ in range(ranks)]
    values: dict[MetadataIndex, Any] = {}
    for name, value in (objects or {}).items():
        index = MetadataIndex(name)
        plans[0].append(WriteItem(index, WriteItemType.BYTE_IO))
        values[index] = value
    for name, tensor in tensors.items():
        for number, (offsets, sizes) in enumerate(cut(name, tensor)):
            piece = tensor
            for axis, (at, size) in enumerate(zip(offsets, sizes, strict=True)):
                piece = piece.narrow(axis, min(at, tensor.shape[axis]), size)
            index = MetadataIndex(name, torch.Size(offsets))
            chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
            data = TensorWriteData(chunk, TensorProperties.create_from_tensor(tensor), tensor.size())
            kind = WriteItemType.SHARD if tensor.dim() else WriteItemType.TENSOR
            plans[number % ranks].append(WriteItem(index, kind, tensor_data=data))
            values[index] = local(piece.clone()) if tensor.dim() else tensor
    made, metadata = create_default_global_save_plan([SavePlan(items) for items in plans])
    metadata.planner_data = None if paths is None else dict(paths)
    writer, planner = FileSystemWriter(folder, **writing), _Planner(values)
    writer.set_up_storage_writer(is_coordinator=True)
    made = writer.prepare_global_plan([writer.prepare_local_plan(plan) for plan in made])
    writer.finish(metadata, [writer.write_data(plan, planner).wait() for plan in made])
    return folder
