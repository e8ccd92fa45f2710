"""Tensors that cannot be mapped where they lie (compressed, not contiguous, lazily conjugated) are copied out first.

Each goes, in C order, into one temporary file beside the output; its entry then points there.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from streammerge.errors import FormatError, printable
from streammerge.storage import COPY_BYTES, InputFile, InputFiles, OutputFile
from streammerge.tensors import Deflated, TensorEntry, contiguous_strides

if TYPE_CHECKING:
    import torch

_BLOCK_BYTES = 4 << 20
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


def _records(entries: list[TensorEntry]) -> list[tuple[str, Deflated]]:
    return list(dict.fromkeys((e.path, e.deflated) for e in entries if e.deflated is not None))


def stage(
    entries: list[TensorEntry], inputs: InputFiles, target: OutputFile, done: Callable[[TensorEntry], None]
) -> dict[tuple[object, ...], TensorEntry]:
    """Writes each entry's numbers into ``target``; place of the entry -> its new, mappable entry.

    At most a few MiB are held, whatever the size of a tensor. Raises FormatError for a damaged record.
    """
    offsets, size = staged_layout(entries)
    cursor = size
    inflated: dict[tuple[str, Deflated], int] = {}
    for path, record in reversed(_records(entries)):
        cursor -= -(-record.nbytes // _ALIGNMENT) * _ALIGNMENT
        _inflate(inputs.get(path), record, target, cursor)
        inflated[path, record] = cursor
    made = {}
    for entry, offset in zip(entries, offsets, strict=True):
        plain = entry
        if entry.deflated is not None:
            start = inflated[entry.path, entry.deflated] + entry.offset
            plain = replace(entry, path=str(target.path), offset=start, deflated=None)
        source = inputs.get(plain.path)
        if plain.mappable:
            target.copy_from(source, plain.offset, offset, plain.nbytes)
        else:
            _gather(plain, source, target, offset)
        made[entry.place] = replace(entry, path=str(target.path), offset=offset, strides=None, deflated=None, lazy="")
        done(entry)
    return made


def _inflate(source: InputFile, record: Deflated, target: OutputFile, offset: int) -> None:
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
        raise FormatError(f"{printable(source.path)}: a compressed record cannot be unpacked ({error})") from error
    if written != record.nbytes:
        raise FormatError(f"{printable(source.path)}: a compressed record has {written} bytes, not {record.nbytes}; it is damaged")


def _gather(entry: TensorEntry, source: InputFile, target: OutputFile, offset: int) -> None:
    """Copies a strided tensor in C order, in blocks along its first dimensions."""
    import torch

    spec, strides = entry.spec, entry.strides or contiguous_strides(entry.spec.shape)
    size = spec.dtype.element_bytes
    reach = sum((n - 1) * stride for n, stride in zip(spec.shape, strides, strict=True)) + 1
    flat = torch.frombuffer(source.view(entry.offset, reach * size), dtype=spec.dtype.torch)
    view = flat.as_strided(spec.shape, strides)
    if entry.lazy == "conjugated":
        view = view.conj()
    elif entry.lazy:
        view = torch._neg_view(view)
    for block in _blocks(view, max(_BLOCK_BYTES // size, 1)):
        data = block.clone(memory_format=torch.contiguous_format).resolve_conj().resolve_neg()
        octets = data.reshape(-1).view(torch.uint8)
        buffer = bytearray(octets.numel())
        torch.frombuffer(buffer, dtype=torch.uint8).copy_(octets)
        target.write_full(buffer, offset)
        offset += len(buffer)
        source.release(entry.offset, reach * size)


def _blocks(view: torch.Tensor, most: int) -> Iterator[torch.Tensor]:
    """Parts of at most about ``most`` elements, in C order."""
    if view.numel() <= most or view.dim() == 0:
        yield view
        return
    rows = max(most // max(view[0].numel(), 1), 1)
    if view[0].numel() > most:
        for row in view:
            yield from _blocks(row, most)
        return
    for start in range(0, view.shape[0], rows):
        yield view[start : start + rows]
