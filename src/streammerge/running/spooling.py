"""Tensors that cannot be mapped where they lie (compressed, not contiguous, lazily conjugated) are copied out first.

Each goes, in C order, into one temporary file beside the output; its entry then points there.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from streammerge.errors import FormatError, printable
from streammerge.planning.tasks import MergeTask
from streammerge.stores.base import COPY_BYTES, Input, Location, Output
from streammerge.stores.inputs import InputFiles
from streammerge.tensors.spec import Deflated, TensorEntry, contiguous_strides

if TYPE_CHECKING:
    import torch

_BLOCK_BYTES = 8 << 20
_TOUCHED_BYTES = 16 << 20
_ALIGNMENT = 64


def staged_layout(entries: list[TensorEntry]) -> tuple[list[int], int]:
    """Offsets of the tensors in the temporary file, then those of inflated storages; and its size."""
    offsets, cursor = [], 0
    for entry in entries:
        offsets.append(cursor)
        cursor += -(-entry.nbytes // _ALIGNMENT) * _ALIGNMENT
    for record in _records(entries):
        cursor += -(-record[1].nbytes // _ALIGNMENT) * _ALIGNMENT
    return offsets, cursor


def _records(entries: list[TensorEntry]) -> list[tuple[Location, Deflated]]:
    return list(dict.fromkeys((e.path, e.deflated) for e in entries if e.deflated is not None))


def stage(
    entries: list[TensorEntry], inputs: InputFiles, target: Output, done: Callable[[TensorEntry], None]
) -> dict[tuple[object, ...], TensorEntry]:
    """Writes each entry's numbers into ``target``; place of the entry -> its new, mappable entry.

    At most a few MiB are held, whatever the size of a tensor. Raises FormatError for a damaged record.
    """
    offsets, size = staged_layout(entries)
    cursor = size
    inflated: dict[tuple[Location, Deflated], int] = {}
    for path, record in reversed(_records(entries)):
        cursor -= -(-record.nbytes // _ALIGNMENT) * _ALIGNMENT
        _inflate(inputs.get(path), record, target, cursor)
        inflated[path, record] = cursor
    made = {}
    for entry, offset in zip(entries, offsets, strict=True):
        plain = entry
        if entry.deflated is not None:
            start = inflated[entry.path, entry.deflated] + entry.offset
            plain = replace(entry, path=target.location, offset=start, deflated=None)
        source = inputs.get(plain.path)
        if plain.mappable:
            target.copy_from(source, plain.offset, offset, plain.nbytes)
        else:
            _gather(plain, source, target, offset)
        made[entry.place] = replace(entry, path=target.location, offset=offset, strides=None, deflated=None, lazy="")
        done(entry)
    return made


def staged_tasks(
    tasks: list[MergeTask],
    needed: list[MergeTask],
    inputs: InputFiles,
    create: Callable[[int], Output],
    done: Callable[[TensorEntry], None],
) -> list[MergeTask]:
    """The tasks, with copies in place of what cannot be mapped and is ``needed``; ``create`` makes the file for them."""
    entries = list({s.place: s for task in needed for s in task.sources if not s.mappable}.values())
    if not entries:
        return tasks
    made = stage(entries, inputs, create(staged_layout(entries)[1]), done)
    inputs.check_whole()
    return [replace(task, sources=tuple(made.get(s.place, s) for s in task.sources)) for task in tasks]


def _inflate(source: Input, record: Deflated, target: Output, offset: int) -> None:
    machine = zlib.decompressobj(-15)
    taken = written = 0
    try:
        while not machine.eof and written < record.nbytes:
            piece = machine.unconsumed_tail
            if not piece and taken < record.compressed_bytes:
                buffer = bytearray(min(COPY_BYTES, record.compressed_bytes - taken))
                source.read_into(memoryview(buffer), record.offset + taken)
                taken += len(buffer)
                piece = bytes(buffer)
            data = machine.decompress(piece, COPY_BYTES)
            if not data and not piece:
                break
            target.write_full(data[: record.nbytes - written], offset + written)
            written += len(data)
    except zlib.error as error:
        raise FormatError(f"{printable(source.location)}: a compressed record cannot be unpacked ({error})") from error
    if written != record.nbytes:
        raise FormatError(
            f"{printable(source.location)}: a compressed record has {written} bytes, not {record.nbytes}; it is damaged"
        )


def _gather(entry: TensorEntry, source: Input, target: Output, offset: int) -> None:
    """Copies a strided tensor in C order: block by block of the copy, bounded in the pages of the source it touches."""
    import torch

    spec, strides = entry.spec, entry.strides or contiguous_strides(entry.spec.shape)
    size = spec.dtype.element_bytes
    # Moving needs the width only, and torch moves integers of every width; a lazy sign needs the numbers.
    dtype = (
        spec.dtype.torch
        if entry.lazy
        else {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}.get(size, spec.dtype.torch)
    )
    flat = torch.frombuffer(source.view(entry.offset, _span(spec.shape, strides) * size), dtype=dtype)
    view = flat.as_strided(spec.shape, strides)
    if entry.lazy == "conjugated":
        view = view.conj()
    elif entry.lazy:
        view = torch._neg_view(view)
    buffer = bytearray(min(spec.nbytes, _BLOCK_BYTES))
    numbers = torch.frombuffer(buffer, dtype=dtype)

    def copy(part: torch.Tensor, into: torch.Tensor) -> None:
        reach = _span(part.shape, part.stride())
        dim = max(range(part.dim()), key=lambda d: (part.shape[d] - 1) * part.stride(d), default=None)
        if dim is None or reach * size <= _TOUCHED_BYTES or part.shape[dim] == 1:
            into.copy_(part)
            source.release(entry.offset + int(part.storage_offset()) * size, reach * size)
            return
        rest = reach - (part.shape[dim] - 1) * part.stride(dim)
        step = max((_TOUCHED_BYTES // size - rest) // part.stride(dim), 1)
        for start in range(0, part.shape[dim], step):
            length = min(step, part.shape[dim] - start)
            copy(part.narrow(dim, start, length), into.narrow(dim, start, length))

    for block in _blocks(view, _BLOCK_BYTES // size):
        copy(block, numbers[: block.numel()].view(block.shape))
        target.write_full(memoryview(buffer)[: block.numel() * size], offset)
        offset += block.numel() * size


def _span(shape: Sequence[int], strides: Sequence[int]) -> int:
    """Elements from the first to the last of a strided tensor."""
    return sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) + 1


def _blocks(view: torch.Tensor, most: int) -> Iterator[torch.Tensor]:
    """Parts of at most ``most`` elements, in C order."""
    if view.numel() <= most:
        yield view
    elif view[0].numel() > most:
        for row in view:
            yield from _blocks(row, most)
    else:
        rows = most // view[0].numel()
        for start in range(0, view.shape[0], rows):
            yield view[start : start + rows]
