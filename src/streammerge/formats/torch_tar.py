"""The format of torch 0.1: an uncompressed tar with the members sys_info, pickle, tensors and storages."""

from __future__ import annotations

import io
import re
import struct
from typing import Any, BinaryIO

from streammerge.errors import FormatError, printable
from streammerge.formats.base import Container, StorageBytes
from streammerge.pickles.arrays import Arrays
from streammerge.pickles.rebuild import Damaged, natural, storage_dtype, text
from streammerge.pickles.tree import PersistentId, StorageRef, TensorRef
from streammerge.pickles.unpickle import unpickle
from streammerge.stores.base import Location

_MEMBERS = ("pickle", "tensors", "storages")
_MOST = 1_000_000


def matches(head: bytes, size: int) -> bool:
    return head[257:262] == b"ustar"


def read(path: Location) -> Container:
    """Returns the container of a tar checkpoint. Raises FormatError; nothing in it is executed."""
    where = printable(path)
    with path.stream() as stream:
        places = _places(stream, where)
        try:
            if "sys_info" in places:
                system = unpickle(_at(stream, places["sys_info"]), where=where)
                if not isinstance(system, dict) or system.get("little_endian") is False:
                    raise FormatError(f"{where} was saved on a big-endian machine, which is not supported")
            refs, storages = _storages(stream, places["storages"], path, where)
            tensors = _tensors(stream, places["tensors"], refs, where)
            arrays = Arrays(path, places["pickle"][0])
            pickle = _at(stream, places["pickle"])
            tree = unpickle(pickle, lambda pid: tensors.get(_key(pid), PersistentId(pid)), where, arrays=arrays)
        except (Damaged, struct.error, KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise FormatError(f"{where}: damaged tar checkpoint ({type(error).__name__}: {printable(error)})") from error
    held = places["pickle"][1] - arrays.left_bytes
    return Container(path, "PyTorch tar", tree, storages, (path,), pickled=True, held_bytes=held, arrays=arrays.sources)


def _places(stream: BinaryIO, where: str) -> dict[str, tuple[int, int]]:
    """Returns (offset, bytes) of each member. Raises FormatError.

    Walks the plain headers, because torch's archives have no extended ones. Python's tarfile would trust extended
    headers of any length, and loop on a negative length.
    """
    members: dict[str, tuple[int, int]] = {}
    cursor, end = 0, stream.seek(0, io.SEEK_END)
    for _ in range(_MOST):
        stream.seek(cursor)
        header = stream.read(512)
        if not header.strip(b"\0"):
            break
        nbytes = _member_bytes(header)
        if nbytes < 0 or not matches(header, end):
            raise FormatError(f"{where}: its tar directory is damaged at byte {cursor}")
        if cursor + 512 + nbytes > end:
            raise FormatError(f"{where} is truncated: a member of its tar archive reaches beyond its end")
        if header[156:157] in (b"0", b"\0"):
            name = header[:100].rstrip(b"\0").decode("utf-8", "replace").removeprefix("./")
            if name in members:
                raise FormatError(f"{where} holds the member {printable(name)} twice; such a file is refused")
            members[name] = (cursor + 512, nbytes)
        cursor += 512 + -(-nbytes // 512) * 512
    if not all(name in members for name in _MEMBERS):
        raise FormatError(f"{where} is a tar archive, not a PyTorch checkpoint; unpack it and give the checkpoint inside")
    return members


def _member_bytes(header: bytes) -> int:
    if header[124:125] == b"\x80":  # a binary number, in files beyond 8 GB
        return int.from_bytes(header[125:136], "big")
    try:
        return int(header[124:136].strip(b"\0 "), 8)
    except ValueError:
        return -1


def _at(stream: BinaryIO, place: tuple[int, int]) -> BinaryIO:
    stream.seek(place[0])
    return stream


def _key(value: Any) -> Any:
    """Returns a name or a number. Some members write numbers as text, as torch's reader expects."""
    name = str(value) if isinstance(value, int) else text(value)
    return int(name) if re.fullmatch("-?[0-9]{1,20}", name) else name


def _number(stream: BinaryIO, where: str) -> int:
    count = unpickle(stream, where=where)
    if not isinstance(count, int) or not 0 <= count < _MOST:
        raise Damaged("a count is not a number")
    return count


def _storages(
    stream: BinaryIO, place: tuple[int, int], path: Location, where: str
) -> tuple[dict[Any, StorageRef], dict[str, StorageBytes]]:
    refs: dict[Any, StorageRef] = {}
    storages: dict[str, StorageBytes] = {}
    _at(stream, place)
    for _ in range(_number(stream, where)):
        key, _location, kind = unpickle(stream, where=where)
        (numel,) = struct.unpack("<q", stream.read(8))
        ref = StorageRef(str(_key(key)), storage_dtype(kind), numel)
        start = stream.tell()
        if numel < 0 or start + ref.nbytes > sum(place):
            raise FormatError(f"{where} is truncated: storage {printable(ref.key)} reaches beyond its end")
        refs[_key(key)], storages[ref.key] = ref, StorageBytes(path, start, ref.nbytes)
        stream.seek(start + ref.nbytes)
    for target, root, offset, numel in unpickle(stream, where=where):
        whole = refs[_key(root)]
        refs[_key(target)] = StorageRef(whole.key, whole.dtype, natural(numel), natural(offset))
    return refs, storages


def _tensors(stream: BinaryIO, place: tuple[int, int], refs: dict[Any, StorageRef], where: str) -> dict[Any, TensorRef]:
    tensors: dict[Any, TensorRef] = {}
    _at(stream, place)
    for _ in range(_number(stream, where)):
        key, storage_key, _kind = unpickle(stream, where=where)
        (rank,) = struct.unpack("<i4x", stream.read(8))
        if not 0 <= rank <= 64:
            raise Damaged(f"a tensor of {rank} dimensions")
        values = struct.unpack(f"<{2 * rank + 1}q", stream.read(8 * (2 * rank + 1)))
        storage = refs[_key(storage_key)]
        if storage.dtype is None or min(values) < 0:
            raise Damaged("a tensor with a negative size")
        tensors[_key(key)] = TensorRef(storage, storage.dtype, values[-1], values[:rank], values[rank:-1])
    return tensors
