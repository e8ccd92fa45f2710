"""Zip archives of checkpoints: the places of records' bytes. Only small requested records are unpacked."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from dataclasses import dataclass
from typing import Any, BinaryIO

from streammerge.errors import FormatError, printable
from streammerge.sources.deflated import PackedRecord
from streammerge.stores.streams import read_starts

MOST_INFLATED_BYTES = 32 << 20
Window = tuple[int, int]
"""The (offset, bytes) of an archive that lies inside a file."""
_LOCAL = b"PK\3\4"
END, END_BYTES = b"PK\5\6", 22
"""How the last record of a zip archive begins, and its length without a comment."""


def matches(head: bytes) -> bool:
    """Whether it is a zip archive. GPT-SoVITS writes its version number over the first two bytes."""
    return head[:4] == _LOCAL or (head[2:4] == b"\3\4" and head[:1] == b"0" and head[1:2].isdigit())


def first_name(head: bytes) -> bytes:
    """The name of the first record of a zip archive, as far as it lies in its first bytes."""
    return head[30 : 30 + int.from_bytes(head[26:28], "little")]


@dataclass(frozen=True, slots=True)
class Member:
    """A record. Its bytes are at ``offset``; the bytes of a compressed one are unpacked from ``record``."""

    name: str
    offset: int
    nbytes: int
    record: PackedRecord | None

    @property
    def span(self) -> tuple[int, int]:
        return self.record.span if self.record else (self.offset, self.nbytes)


class Within(io.RawIOBase):
    """A part of a stream as a stream of its own, which does not close the whole."""

    def __init__(self, stream: BinaryIO, window: Window) -> None:
        self._stream, (self._begin, self._nbytes) = stream, window
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._nbytes}[whence]
        if self._at < 0:
            raise ValueError(f"negative seek position {self._at}")
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        count = max(min(len(view), self._nbytes - self._at), 0)
        self._stream.seek(self._begin + self._at)
        data = self._stream.read(count)
        view[: len(data)] = data
        self._at += len(data)
        return len(data)


def within(stream: BinaryIO, window: Window | None) -> BinaryIO:
    """Returns a part of a stream as a stream that begins at 0; the stream itself without a window."""
    return stream if window is None else io.BufferedReader(Within(stream, window), 4096)


def members(stream: BinaryIO, where: str) -> dict[str, Member]:
    """Returns the records by name. Raises FormatError if the directory is damaged or false."""
    try:
        archive = zipfile.ZipFile(stream)
        infos = archive.infolist()
    except (
        zipfile.BadZipFile,
        NotImplementedError,
        ValueError,
        OverflowError,
        MemoryError,
        OSError,
        struct.error,
    ) as error:
        raise FormatError(
            f"{where}: its zip directory cannot be read ({printable(error)}); it is truncated or damaged"
        ) from error
    end = stream.seek(0, io.SEEK_END)
    _refuse_surroundings(stream, archive, end, where)
    found: dict[str, Member] = {}
    read_starts(stream, [min(max(info.header_offset, 0), end) for info in infos])
    for info in infos:
        name = printable(info.filename)
        if info.filename in found:
            raise FormatError(f"{where} holds the record {name} twice; such a file is refused")
        if info.flag_bits & 0x41:
            raise FormatError(
                f"{where}: record {name} is encrypted, which is not supported; save it again without encryption"
            )
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise FormatError(
                f"{where}: record {name} is compressed by method {info.compress_type}; unpack and zip it again"
            )
        found[info.filename] = _place(stream, info, end, where)
    _check_overlap(found, where)
    return found


def _refuse_surroundings(stream: BinaryIO, archive: zipfile.ZipFile, end: int, where: str) -> None:
    """Raises FormatError for bytes before the first record, or behind the directory. torch finds other records there."""
    before = min((info.header_offset for info in archive.infolist()), default=0)
    if before:
        raise FormatError(
            f"{where}: {before} bytes stand before its zip archive, as where archives are joined, or where a file is one "
            "rank's part of a distributed checkpoint; torch.load does not read it either, so save it again"
        )
    last = end - len(archive.comment) - END_BYTES
    stream.seek(max(last, 0))
    if stream.read(len(END)) != END:
        raise FormatError(
            f"{where}: bytes stand behind its zip archive; something was written to its end, or the download is damaged; "
            "fetch it or save it again"
        )


def _place(stream: BinaryIO, info: zipfile.ZipInfo, end: int, where: str) -> Member:
    """Finds a record's data behind its local header. The central directory does not give the length of that header."""
    stream.seek(min(max(info.header_offset, 0), end))
    header = stream.read(30)
    magic_fits = header[:4] == _LOCAL or (info.header_offset == 0 and matches(header))
    if len(header) < 30 or not magic_fits:
        raise FormatError(f"{where}: record {printable(info.filename)} is not where the zip directory says; it is damaged")
    name_bytes, extra_bytes = struct.unpack("<HH", header[26:30])
    if stream.read(name_bytes) != info.orig_filename.encode("utf-8" if info.flag_bits & 0x800 else "cp437", "replace"):
        raise FormatError(f"{where}: record {printable(info.filename)} has another name in its own header; it is damaged")
    offset = info.header_offset + 30 + name_bytes + extra_bytes
    if offset + info.compress_size > end:
        raise FormatError(f"{where} is truncated: record {printable(info.filename)} reaches beyond its end")
    if info.compress_type == zipfile.ZIP_STORED:
        if info.compress_size != info.file_size:
            raise FormatError(f"{where}: record {printable(info.filename)} is stored, yet has two sizes; it is damaged")
        return Member(info.filename, offset, info.file_size, None)
    return Member(info.filename, 0, info.file_size, PackedRecord(offset, info.compress_size, info.file_size))


def _check_overlap(found: dict[str, Member], where: str) -> None:
    cursor, before = 0, ""
    for (offset, nbytes), name in sorted((member.span, name) for name, member in found.items()):
        if nbytes and offset < cursor:
            raise FormatError(
                f"{where}: the records {printable(before)} and {printable(name)} overlap; such a file is refused"
            )
        cursor, before = max(cursor, offset + nbytes), name


def record(stream: BinaryIO, member: Member | None, most: int, where: str) -> bytes:
    """Returns a whole record of at most ``most`` bytes; empty for None. Raises FormatError."""
    if member is None:
        return b""
    limit = min(most, MOST_INFLATED_BYTES) if member.record else most
    if member.nbytes > limit:
        raise FormatError(
            f"{where}: record {printable(member.name)} of {member.nbytes} bytes is beyond the limit of {limit}"
        )
    data = head(stream, member, member.nbytes + 1, where)
    if len(data) != member.nbytes:
        raise FormatError(
            f"{where}: record {printable(member.name)} has {len(data)} bytes, not {member.nbytes}; it is damaged"
        )
    return data


def head(stream: BinaryIO, member: Member, nbytes: int, where: str) -> bytes:
    """Returns the first ``nbytes`` bytes of a record, or all if there are fewer. Raises FormatError."""
    start, stored = member.span
    stream.seek(start)
    if member.record is None or nbytes == 0:  # zlib takes 0 for no limit
        return stream.read(min(nbytes, stored))
    try:
        # deflate makes incompressible data only slightly longer
        enough = stream.read(min(stored, nbytes + nbytes // 8 + 1024))
        return zlib.decompressobj(-15).decompress(enough, nbytes)
    except zlib.error as error:
        raise FormatError(f"{where}: record {printable(member.name)} cannot be unpacked ({error})") from error
