"""The zip container of torch.save (1.6 and later) and of TorchScript: its reader and its writer.

Records are stored uncompressed at known offsets, so tensors are read in place. Compressed records are marked, and
copied into a temporary file before they are read. Writing is planned: every offset is known before a byte is read.
Checksums are known last; they are put into the headers when the archive is sealed.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import BinaryIO

from streammerge.errors import FormatError, printable
from streammerge.formats import archive
from streammerge.formats.base import Container, LayoutFile, Literal, Match, StorageBytes
from streammerge.formats.records import RECEIPT_FILE, RECEIPT_KEY, RECIPE_FILE, RECIPE_KEY
from streammerge.pickles.arrays import Arrays
from streammerge.pickles.rebuild import StorageTable
from streammerge.pickles.tree import Blank
from streammerge.pickles.unpickle import MAX_PICKLE_BYTES, unpickle
from streammerge.stores.base import Location
from streammerge.stores.checksums import CRC32

MAX_RECORD_BYTES = 16 << 20
_BESIDE = {RECIPE_KEY: RECIPE_FILE, RECEIPT_KEY: RECEIPT_FILE}
ALIGNMENT = 64
_LOCAL, _CENTRAL, _END = b"PK\3\4", b"PK\1\2", b"PK\5\6"


def matches(head: bytes, size: int) -> Match:
    """torch writes its pickle first; any other zip archive may be of another format."""
    if not archive.matches(head):
        return False
    return archive.first_name(head).endswith(b"/data.pkl") or "unless another"


def read(path: Location, window: archive.Window | None = None, inner: str = "") -> Container:
    """Returns the container of a torch zip archive. Raises FormatError; nothing in it is executed.

    ``window``: where it lies inside the file; then its ``inner`` name stands in messages.
    """
    with path.stream() as stream:
        return read_stream(stream, path, window, f"{printable(path)}: {inner}" if inner else printable(path))


def read_stream(whole: BinaryIO, path: Location, window: archive.Window | None, where: str) -> Container:
    """Returns the container of a torch zip archive in an open file, or in a window of it."""
    base = window[0] if window else 0
    with archive.within(whole, window) as stream:
        members = archive.members(stream, where)
        pickles = [name for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise FormatError(_not_torch(where, list(members), pickles))
        root = pickles[0][: -len("data.pkl")]
        order = archive.record(stream, members.get(root + "byteorder"), 16, where) or b"little"
        if order != b"little":
            raise FormatError(
                f"{where} was saved on a big-endian machine, which is not supported; save it again on this one"
            )
        table = StorageTable()
        member = members[pickles[0]]
        on_disk = member.record.compressed_bytes if member.record else member.nbytes
        arrays = Arrays(path, None if member.record else base + member.offset)
        tree = unpickle(_pickle(stream, member, where), table, where, on_disk, arrays)
        beside = {key: members.get(root + name) for key, name in _BESIDE.items()}
        texts = {key: archive.record(stream, member, MAX_RECORD_BYTES, where) for key, member in beside.items()}
        stream.seek(0)
        magic = stream.read(2)
    script = root + "constants.pkl" in members and any(name.startswith(root + "code/") for name in members)
    kind = "TorchScript archive" if script else "PyTorch zip"
    held = member.nbytes - arrays.left_bytes
    container = Container(path, kind, tree, {}, (path,), pickled=True, magic=magic, held_bytes=held, arrays=arrays.sources)
    container.notes += arrays.notes
    container.metadata |= {key: text.decode("utf-8", "replace") for key, text in texts.items() if text}
    _find_storages(container, table, members, root + "data/", where, base)
    return container


def _pickle(stream: BinaryIO, member: archive.Member, where: str) -> bytes | BinaryIO:
    """Returns the pickle; a long one in place, since most of it are arrays, which need not be read."""
    if member.record is not None or member.nbytes <= archive.MOST_INFLATED_BYTES:
        return archive.record(stream, member, MAX_PICKLE_BYTES, where)
    stream.seek(member.offset)
    return stream


def _find_storages(
    container: Container,
    table: StorageTable,
    members: Mapping[str, archive.Member],
    folder: str,
    where: str,
    base: int,
) -> None:
    """Adds the places of the storages. ``base``: where the archive begins in its file."""
    compressed = 0
    for ref in table.refs.values():
        member = members.get(folder + ref.key)
        if member is None:
            raise FormatError(f"{where}: storage {printable(ref.key)} is missing from the archive; it is damaged")
        if member.nbytes != ref.nbytes:
            raise FormatError(
                f"{where}: storage {printable(ref.key)} has {member.nbytes} bytes where its tensors expect {ref.nbytes}; "
                "it is damaged"
            )
        compressed += member.record is not None
        record = member.record and replace(member.record, offset=base + member.record.offset)
        offset = member.offset if record else base + member.offset
        container.storages[ref.key] = StorageBytes(container.path, offset, member.nbytes, record)
    if compressed:
        container.notes.append(
            f"{compressed} of its storages are compressed; they are unpacked into a temporary file first"
        )


def _not_torch(where: str, names: list[str], pickles: list[str]) -> str:
    if pickles:
        return f"{where} holds {len(pickles)} pickles ({', '.join(map(printable, pickles[:3]))}); a checkpoint has one"
    if any(name.endswith(".data/extern_modules") for name in names):
        return f"{where} is a torch.package archive, which is code; load it with torch.package and save its state_dict()"
    if any(name.endswith(".npy") for name in names):
        return (
            f"{where} is a numpy .npz archive, not a PyTorch checkpoint; save its arrays with safetensors.numpy.save_file"
        )
    if any("model_weights_config.json" in name or name.endswith("/archive_format") for name in names):
        return f"{where} is a torch.export archive; load it with torch.export.load and save its state_dict()"
    if any(name.endswith((".distcp", ".metadata")) for name in names):
        return f"{where} is a zipped distributed checkpoint; unpack it first"
    return f"{where} is a zip archive without data.pkl, so not a PyTorch checkpoint; unpack it if a checkpoint is inside"


# ---------------------------------------------------------------------------------------------------------- writing


@dataclass(frozen=True, slots=True)
class _Record:
    """One record of a planned archive. ``parts``: its bytes; a :class:`Blank` is filled by a tensor later."""

    name: str
    parts: tuple[bytes | Blank, ...]
    nbytes: int
    header_offset: int = 0
    crc: int = 0

    @classmethod
    def of(cls, name: str, *parts: bytes | Blank) -> _Record:
        return cls(name, parts, sum(map(_bytes_of, parts)))

    def placed(self) -> Iterator[tuple[int, bytes | Blank]]:
        """Yields its parts with their offsets in the archive."""
        offset = self.data_offset
        for part in self.parts:
            yield offset, part
            offset += _bytes_of(part)

    def with_crc(self, checksums: Mapping[int, int]) -> _Record:
        """Returns it with its own checksum. ``checksums``: those of the tensors by offset."""
        if len(self.parts) == 1:
            crc = _crc(self.parts[0], checksums.get(self.data_offset, 0))
            return self if crc == self.crc else replace(self, crc=crc)
        known = ((offset, _bytes_of(part), _crc(part, checksums.get(offset, 0))) for offset, part in self.placed())
        return replace(self, crc=CRC32.join(each for each in known if each[1]))

    @property
    def zip64(self) -> bool:
        return self.nbytes >= 0xFFFFFFFF

    def padding(self) -> int:
        fixed = self.header_offset + 30 + len(self.name.encode()) + (20 if self.zip64 else 0) + 4
        return -fixed % ALIGNMENT

    @property
    def data_offset(self) -> int:
        return self.header_offset + 30 + len(self.name.encode()) + (20 if self.zip64 else 0) + 4 + self.padding()

    def local_header(self) -> bytes:
        size = 0xFFFFFFFF if self.zip64 else self.nbytes
        extra = struct.pack("<HHQQ", 1, 16, self.nbytes, self.nbytes) if self.zip64 else b""
        extra += struct.pack("<HH", 0x4246, self.padding()) + b"Z" * self.padding()
        name = self.name.encode()
        version = 45 if self.zip64 else 20
        head = struct.pack("<4sHHHHHIIIHH", _LOCAL, version, 0x800, 0, 0, 0x21, self.crc, size, size, len(name), len(extra))
        return head + name + extra

    def central_header(self) -> bytes:
        wide, far = self.zip64, self.header_offset >= 0xFFFFFFFF
        values = ([self.nbytes, self.nbytes] if wide else []) + ([self.header_offset] if far else [])
        extra = struct.pack(f"<HH{len(values)}Q", 1, 8 * len(values), *values) if values else b""
        size, offset = 0xFFFFFFFF if wide else self.nbytes, 0xFFFFFFFF if far else self.header_offset
        name, version = self.name.encode(), 45 if values else 20
        fields = (version, version, 0x800, 0, 0, 0x21, self.crc, size, size, len(name), len(extra), 0, 0, 0, 0, offset)
        return struct.pack("<4sHHHHHHIIIHHHHHII", _CENTRAL, *fields) + name + extra


def _bytes_of(part: bytes | Blank) -> int:
    return part.nbytes if isinstance(part, Blank) else len(part)


def _crc(part: bytes | Blank, of_tensor: int) -> int:
    return of_tensor if isinstance(part, Blank) else zlib.crc32(part)


def plan_layout(
    file_name: str,
    pickle: Sequence[bytes | Blank],
    storages: Mapping[str, tuple[str, int]],
    magic: bytes,
    beside: Mapping[str, bytes],
) -> LayoutFile:
    """Plans the place of each byte of a torch archive. ``storages`` maps tensor names to (storage key, bytes).

    ``pickle``: its parts; tensors that are arrays lie between them. ``beside``: recipe and receipt by their keys; torch
    ignores these records.

    The root is "archive", and data are 64-byte aligned, as torch.load(mmap=True) needs. There is no ``.format_version``
    record: with one, torch would guess offsets from the habits of its own writer.
    """
    records = [_Record.of("archive/data.pkl", *pickle), _Record.of("archive/byteorder", b"little")]
    records += [_Record.of(f"archive/data/{key}", Blank.of(name, nbytes)) for name, (key, nbytes) in storages.items()]
    records.append(_Record.of("archive/version", b"3\n"))
    records += [_Record.of(f"archive/{_BESIDE[key]}", data) for key, data in beside.items()]
    placed, cursor = [], 0
    for record in records:
        record = replace(record, header_offset=cursor)
        placed.append(record)
        cursor = record.data_offset + record.nbytes
    offsets = {part.key: at for record in placed for at, part in record.placed() if isinstance(part, Blank)}
    size, blank = cursor + len(_directory(placed, cursor)), beside.get(RECEIPT_KEY, b"")
    return LayoutFile(file_name, size, offsets, receipt=blank, seal=partial(_sealed, placed, cursor, magic, blank))


def _sealed(
    placed: list[_Record], cursor: int, magic: bytes, blank: bytes, checksums: Mapping[int, int], receipt: bytes
) -> list[Literal]:
    """Returns all bytes of the archive outside tensors, from the CRC-32 of each tensor (by offset) and the final
    receipt."""
    records = [replace(r, parts=(receipt,)) if r.parts == (blank,) else r for r in placed]
    records = [record.with_crc(checksums) for record in records]
    literals: list[Literal] = []
    for record in records:
        before = record.local_header()
        for offset, part in record.placed():
            if isinstance(part, bytes):
                literals.append(Literal(offset - len(before), before + part))
                before = b""
        if before:
            literals.append(Literal(record.header_offset, before))
    if magic != b"PK":
        literals[0] = Literal(0, magic + literals[0].data[2:])
    return [*literals, Literal(cursor, _directory(records, cursor))]


def with_blank_receipt(rest: bytes, final: bytes, blank: bytes) -> bytes:
    """Returns the bytes around the tensors of a finished archive with the receipt, its last record, blank again.
    Returns b"" if the final receipt is not found."""
    name, crc, was = f"archive/{RECEIPT_FILE}".encode(), *(struct.pack("<I", zlib.crc32(text)) for text in (blank, final))
    at = rest.rfind(final)
    local, central = rest.rfind(name, 0, at), rest.rfind(name)
    if not 30 <= local < at < central or not rest[local - 16 : local - 12] == rest[central - 30 : central - 26] == was:
        return b""
    made = bytearray(rest)
    made[local - 16 : local - 12] = made[central - 30 : central - 26] = crc
    made[at : at + len(final)] = blank
    return bytes(made)


def _directory(records: list[_Record], start: int) -> bytes:
    central = b"".join(record.central_header() for record in records)
    count, size = len(records), len(central)
    end = b""
    if count >= 0xFFFF or start >= 0xFFFFFFFF or size >= 0xFFFFFFFF:
        end += struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, count, count, size, start)
        end += struct.pack("<4sIQI", b"PK\6\7", 0, start + size, 1)
    small = (min(count, 0xFFFF), min(count, 0xFFFF), min(size, 0xFFFFFFFF), min(start, 0xFFFFFFFF))
    return central + end + struct.pack("<4sHHHHIIH", _END, 0, 0, *small, 0)
