"""The format of torch 0.1: an uncompressed tar with the members sys_info, pickle, tensors and storages."""

from __future__ import annotations

import struct
import tarfile
from pathlib import Path
from typing import Any, BinaryIO

from streammerge.errors import FormatError, printable
from streammerge.formats.base import Container, StorageBytes
from streammerge.storage import open_stream
from streammerge.tree import PersistentId, StorageRef, TensorRef
from streammerge.unpickle import Damaged, storage_dtype, text, unpickle

_MEMBERS = ("pickle", "tensors", "storages")
_MOST = 1_000_000


def matches(head: bytes, size: int) -> bool:
    return head[257:262] == b"ustar"


def read(path: Path) -> Container:
    """The container of a tar checkpoint. Raises FormatError; nothing in it is executed."""
    where = printable(path)
    with open_stream(path) as stream:
        places = _places(stream, where)
        try:
            if "sys_info" in places:
                system = unpickle(_at(stream, places["sys_info"]), where=where)
                if not isinstance(system, dict) or system.get("little_endian") is False:
                    raise FormatError(f"{where} was saved on a big-endian machine, which is not supported")
            refs, storages = _storages(stream, places["storages"], path, where)
            tensors = _tensors(stream, places["tensors"], refs, where)
            tree = unpickle(_at(stream, places["pickle"]), lambda pid: tensors.get(_key(pid), PersistentId(pid)), where)
        except (Damaged, struct.error, KeyError, TypeError, ValueError) as error:
            raise FormatError(f"{where}: damaged tar checkpoint ({type(error).__name__}: {printable(error)})") from error
    return Container(path, "PyTorch tar", tree, storages, (path,))


def _places(stream: BinaryIO, where: str) -> dict[str, tuple[int, int]]:
    try:
        with tarfile.open(fileobj=stream, mode="r:") as archive:
            members = {m.name.removeprefix("./"): m for m in archive if m.isreg()}
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise FormatError(f"{where}: its tar directory cannot be read ({printable(error)})") from error
    if not all(name in members for name in _MEMBERS):
        kind = "a NeMo archive" if any(n.endswith(("model_config.yaml", "model_weights.ckpt")) for n in members) else "a tar archive"
        raise FormatError(f"{where} is {kind}, not a PyTorch checkpoint; unpack it and give the checkpoint inside")
    return {name: (member.offset_data, member.size) for name, member in members.items()}


def _at(stream: BinaryIO, place: tuple[int, int]) -> BinaryIO:
    stream.seek(place[0])
    return stream


def _key(value: Any) -> Any:
    return text(value) if isinstance(value, str | bytes) else value


def _number(stream: BinaryIO, where: str) -> int:
    count = unpickle(stream, where=where)
    if not isinstance(count, int) or not 0 <= count < _MOST:
        raise Damaged("a count is not a number")
    return count


def _storages(
    stream: BinaryIO, place: tuple[int, int], path: Path, where: str
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
        refs[_key(key)], storages[ref.key] = ref, StorageBytes(str(path), start, ref.nbytes)
        stream.seek(start + ref.nbytes)
    for target, root, offset, numel in unpickle(stream, where=where):
        whole = refs[_key(root)]
        refs[_key(target)] = StorageRef(whole.key, whole.dtype, numel, offset)
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
