"""Unpacks packed records, which have no random access, into one temporary file beside the output."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Protocol, TypeVar

from streammerge.errors import FormatError, printable
from streammerge.sources.base import Source
from streammerge.sources.deflated import Damaged, PackedKey, PackedRecord, records, unpacked, with_inflated
from streammerge.sources.stored import Stored
from streammerge.stores.base import Input, Output
from streammerge.stores.digests import COPY_BYTES
from streammerge.stores.inputs import InputFiles
from streammerge.tensors.spec import ranges

_ALIGNMENT = 64


class Reads(Protocol):
    """Anything with sources: a dataclass, so that it can be made again with others."""

    @property
    def sources(self) -> tuple[Source, ...]: ...


Task = TypeVar("Task", bound=Reads)


def spooled_tasks(
    tasks: Sequence[Task],
    needed: Iterable[Task],
    inputs: InputFiles,
    create: Callable[[int], Output],
    done: Callable[[str, PackedRecord], None],
) -> Sequence[Task]:
    """Unpacks the records of the ``needed`` tasks. Returns all tasks, with sources that read the inflated bytes.

    ``create`` makes a file of the given size in bytes. ``done`` is called for each record with the name of a tensor in it.
    Holds at most a few MiB, whatever the size of a record. Raises FormatError for a damaged record.
    """
    names: dict[PackedKey, str] = {}
    for task in needed:
        for source in task.sources:
            if source.__class__ is not Stored:
                for key in records(source):
                    names.setdefault(key, source.spec.name)
    if not names:
        return tasks
    offsets, size = _layout(names)
    target = create(size)
    for (path, record), offset in offsets.items():
        _inflate(inputs.get(path), record, target, offset)
        done(names[path, record], record)
    inputs.check_whole()
    places = {key: (target.location, offset) for key, offset in offsets.items()}
    return [replace(task, sources=tuple(with_inflated(s, places) for s in task.sources)) for task in tasks]  # type: ignore[type-var]


def _layout(names: dict[PackedKey, str]) -> tuple[dict[PackedKey, int], int]:
    """Returns the offset of each record in the temporary file, and the size of the file in bytes."""
    offsets, cursor = {}, 0
    for key in names:
        offsets[key] = cursor
        cursor += -(-key[1].nbytes // _ALIGNMENT) * _ALIGNMENT
    return offsets, cursor


def _inflate(source: Input, record: PackedRecord, target: Output, offset: int) -> None:
    written = 0
    try:
        for data in unpacked(record, _pieces(source, record)):
            target.write_full(data[: record.nbytes - written], offset + written)
            written += len(data)
            if written > record.nbytes:
                break
    except Damaged as error:
        raise FormatError(f"{printable(source.location)}: a packed record cannot be unpacked ({error})") from error
    if written != record.nbytes:
        raise FormatError(
            f"{printable(source.location)}: a packed record has {written} bytes, not {record.nbytes}; it is damaged"
        )


def _pieces(source: Input, record: PackedRecord) -> Iterator[bytes]:
    for start, stop in ranges(record.compressed_bytes, COPY_BYTES):
        buffer = bytearray(stop - start)
        source.read_into(memoryview(buffer), record.offset + start)
        yield bytes(buffer)
