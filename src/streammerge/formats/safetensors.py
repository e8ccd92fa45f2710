"""The safetensors format: u64 header length, JSON header, tensors back to back.

Reading checks all rules of the specification (no overlap, hole, trailing byte, duplicate key, header beyond 100 MB) and
the arithmetic of every size. Writing is planned: the header is complete before the first tensor is read.
"""

from __future__ import annotations

import json
import math
import re
import struct
from array import array
from collections.abc import Iterable, Sequence
from functools import lru_cache
from sys import intern
from typing import Any, NamedTuple

from streammerge.errors import FormatError, MismatchError, listed, printable
from streammerge.formats.base import Container, LayoutFile, Literal, Offsets
from streammerge.pickles.tree import FlatTree
from streammerge.sources.table import StoredTable
from streammerge.stores.base import Location
from streammerge.strict_json import STRICT, load_json
from streammerge.tensors.dtypes import DType
from streammerge.tensors.spec import TensorSpec
from streammerge.units import PAGE_BYTES

MAX_HEADER_BYTES = 100_000_000
_MAX_INTEGER = 1 << 63
_quoted = json.encoder.encode_basestring
"""A text in JSON, without escapes for letters beyond ASCII."""
_DTYPES = {name: dtype for name, dtype in DType.__members__.items() if dtype.in_safetensors}


def matches(head: bytes, size: int) -> bool:
    return size >= 8 and head[8:9] == b"{" and struct.unpack("<Q", head[:8])[0] <= max(size, MAX_HEADER_BYTES)


def read(path: Location) -> Container:
    """Returns the container of a .safetensors file. Raises FormatError if any rule of the format is broken."""
    where = printable(path)
    size = path.size
    with path.stream() as stream:
        (length,) = struct.unpack("<Q", stream.read(8).ljust(8, b"\0"))
        if length > MAX_HEADER_BYTES:
            raise FormatError(f"{where}: its header claims {length} bytes; safetensors allows {MAX_HEADER_BYTES}")
        if 8 + length > size:
            raise FormatError(f"{where} is truncated: its header ends at byte {8 + length}, the file at {size}")
        data = stream.read(length)
    header = _header(data, size - 8 - length, where)
    files, starts = array("I", bytes(4 * len(header.names))), array("Q", [8 + length + start for start in header.starts])
    table = StoredTable(header.names, header.kinds, [path], files, starts)
    return Container(path, "safetensors", FlatTree(table), {}, (path,), header.metadata)


class _Header(NamedTuple):
    """A parsed header: the columns of its tensors in the order of their offsets in the data."""

    metadata: dict[str, str]
    names: list[str]
    kinds: list[TensorSpec]
    starts: Iterable[int]


_SHAPED = r'"dtype" ?: ?"[A-Z0-9_]+", ?"shape" ?: ?\[[0-9, ]*\]'
_NUMBER = r"(0|[1-9][0-9]{0,17})"
_ENTRY = re.compile(rf' ?"([^"\\\x00-\x1f]*)" ?: ?\{{({_SHAPED}), ?"data_offsets" ?: ?\[{_NUMBER}, ?{_NUMBER}\]\}}([,}}])')
_METADATA = re.compile(r'\{ ?"__metadata__" ?: ?(?=\{)')


def _header(data: bytes, data_bytes: int, where: str) -> _Header:
    """Parses a header and checks all rules. Raises FormatError."""
    return _usual(data, data_bytes) or _any(data, data_bytes, where)


def _usual(data: bytes, data_bytes: int) -> _Header | None:
    """Parses a header as nearly all programs write it: the tensors in the order of their bytes, each with the same keys in
    the same order. Returns None for any other, right or wrong.

    It takes a third of the time of a JSON parser, and holds one tensor at a time.
    """
    try:
        text, metadata, at = data.decode("utf-8"), dict[str, str](), 1
        if found := _METADATA.match(text):
            metadata, at = STRICT.raw_decode(text, found.end())
            if text[at : at + 1] != "," or not _is_metadata(metadata):
                return None
            at += 1
    except (ValueError, RecursionError):
        return None
    names, kinds, starts = list[str](), list[TensorSpec](), array("Q")
    known: dict[str, TensorSpec] = {}
    cursor, after = 0, ","
    for entry in _ENTRY.finditer(text, at):
        name, shaped, begin, end, after = entry.groups()
        kind = known.get(shaped)
        if kind is None:
            try:
                kind = known[shaped] = _kind(shaped)
            except (FormatError, ValueError):
                return None
        nbytes = kind.nbytes
        start = int(begin)
        if entry.start() != at or start != cursor or int(end) - start != nbytes or not nbytes:
            return None
        names.append(intern(name))
        kinds.append(kind)
        starts.append(start)
        cursor += nbytes
        at = entry.end()
        if after == "}":
            break
    different = set(names)
    whole = text[:1] == "{" and after == "}" and cursor == data_bytes and not text[at:].strip(" ")
    if not whole or len(different) < len(names) or "__metadata__" in different:
        return None
    return _Header(metadata, names, kinds, starts)


@lru_cache(maxsize=1 << 12)
def _kind(shaped: str) -> TensorSpec:
    """Returns the dtype and shape that a part of a header tells. Raises FormatError or ValueError."""
    return _specified("", "", load_json("{" + shaped + "}"))


def _any(data: bytes, data_bytes: int, where: str) -> _Header:
    """Parses any header. Raises FormatError."""
    fields = _parse(data, where)
    metadata = _metadata(fields.pop("__metadata__", None), where)
    kinds: dict[str, TensorSpec] = {}
    spans: list[tuple[int, int, str]] = []
    for name, given in fields.items():
        kinds[name], begin, end = _tensor(name, given, where)
        spans.append((begin, end, name))
    _check_spans(spans, data_bytes, where)
    names = [name for _, _, name in spans]
    return _Header(metadata, names, [kinds[name] for name in names], [begin for begin, _, _ in spans])


def _parse(data: bytes, where: str) -> dict[str, Any]:
    try:
        header = load_json(data.decode("utf-8"))
    except ValueError as error:
        raise FormatError(f"{where}: its safetensors header cannot be read ({printable(error)})") from error
    if not isinstance(header, dict):
        raise FormatError(f"{where}: its safetensors header is not an object")
    return header


def _is_metadata(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(v, str) for v in value.values())


def _metadata(value: Any, where: str) -> dict[str, str]:
    if value is None:
        return {}
    if not _is_metadata(value):
        raise FormatError(f"{where}: __metadata__ may hold strings only")
    return value  # type: ignore[no-any-return]


def _naturals(value: Any) -> bool:
    """Whether it is a list of non-negative integers that fit into 63 bits."""
    if not isinstance(value, list):
        return False
    for number in value:  # noqa: SIM110 - this runs for every tensor of every file, and all() takes twice as long
        if number.__class__ is not int or not 0 <= number < _MAX_INTEGER:
            return False
    return True


def _tensor(name: str, fields: Any, where: str) -> tuple[TensorSpec, int, int]:
    """Returns the kind of a tensor, and the begin and end of its bytes in the data."""
    if not isinstance(fields, dict) or fields.keys() != {"dtype", "shape", "data_offsets"}:
        raise _malformed(where, name, "must have exactly dtype, shape and data_offsets")
    kind, offsets = _specified(name, where, fields), fields["data_offsets"]
    if not _naturals(offsets) or len(offsets) != 2:
        raise _malformed(where, name, "has malformed data_offsets")
    if offsets[1] - offsets[0] != kind.nbytes:
        needed = f"where {kind.dtype} {list(kind.shape)} needs {kind.nbytes}"
        raise _malformed(where, name, f"has {offsets[1] - offsets[0]} bytes {needed}")
    return kind, offsets[0], offsets[1]


def _specified(name: str, where: str, fields: dict[str, Any]) -> TensorSpec:
    """Returns dtype and shape of a tensor, without its name."""
    shape = fields["shape"]
    if not _naturals(shape) or len(shape) > 64:
        raise _malformed(where, name, "has a malformed shape")
    dtype = _DTYPES.get(fields["dtype"]) if isinstance(fields["dtype"], str) else None
    if dtype is None:
        raise _malformed(where, name, f"has dtype {printable(fields['dtype'])}, which is not supported")
    if math.prod(filter(None, shape)) >= _MAX_INTEGER:
        raise _malformed(where, name, "has a shape whose size overflows")
    if dtype is DType.F4:
        if not shape or shape[-1] % 2:
            raise _malformed(where, name, "is F4, which needs an even last dimension")
        shape = [*shape[:-1], shape[-1] // 2]
    return TensorSpec("", dtype, tuple(shape))


def _malformed(where: str, name: str, what: str) -> FormatError:
    return FormatError(f"{where}: tensor {printable(name)} {what}")


def _check_spans(spans: list[tuple[int, int, str]], data_bytes: int, where: str) -> None:
    """Sorts the spans. Raises FormatError unless they cover the data without overlap or hole."""
    cursor = 0
    spans.sort()
    for begin, end, name in spans:
        if begin != cursor:
            kind = (
                "overlaps the tensor before it" if begin < cursor else f"leaves a hole of {begin - cursor} bytes before it"
            )
            raise FormatError(f"{where}: tensor {printable(name)} {kind}; the file is damaged")
        cursor = end
    if cursor > data_bytes:
        raise FormatError(f"{where} is truncated: {cursor - data_bytes} bytes of its tensors are missing")
    if cursor < data_bytes:
        raise FormatError(f"{where} has {data_bytes - cursor} bytes behind its last tensor; the file is damaged")


def _order(kinds: Sequence[TensorSpec]) -> list[int] | None:
    """Returns the order in which each tensor starts at a multiple of its element size: wide dtypes first. Returns None if
    the given order is one."""
    cursor = 0
    for kind in kinds:
        if cursor % kind.dtype.element_bytes:
            return sorted(range(len(kinds)), key=lambda at: -kinds[at].dtype.element_bytes)
        cursor += kind.nbytes
    return None


def plan_layout(file_name: str, specs: Iterable[TensorSpec], metadata: dict[str, str]) -> LayoutFile:
    """Plans the place of each byte of a safetensors file. Raises MismatchError if the format cannot hold a tensor."""
    specs = list(specs)
    return plan_columns(file_name, [spec.name for spec in specs], specs, metadata)[0]


def plan_columns(
    file_name: str, names: Sequence[str], kinds: Sequence[TensorSpec], metadata: dict[str, str]
) -> tuple[LayoutFile, array[int]]:
    """Plans a safetensors file of tensors with these names, dtypes and shapes. Returns the offset of each tensor too.

    Raises MismatchError if the format cannot hold a tensor.
    """
    order = _order(kinds)
    if order is not None:
        names, kinds = [names[at] for at in order], [kinds[at] for at in order]
    foreign = [f"{n} ({k.dtype})" for n, k in zip(names, kinds, strict=True) if not k.dtype.in_safetensors]
    if foreign:
        raise MismatchError(f"safetensors cannot hold {listed(foreign)}; leave them out with `drop`, or write a .pth")
    _check_names(file_name, names)
    starts, cursor = array("Q"), 0
    parts = [json.dumps({"__metadata__": metadata}, ensure_ascii=False, separators=(",", ":"))[1:-1]] if metadata else []
    known: dict[int, str] = {}
    for name, kind in zip(names, kinds, strict=True):
        said = known.get(id(kind))
        if said is None:
            said = known[id(kind)] = _said(name, kind)
        end = cursor + kind.nbytes
        parts.append(f"{_quoted(name)}:{said}[{cursor},{end}]}}")
        starts.append(cursor)
        cursor = end
    text = f"{{{','.join(parts)}}}".encode("utf-8", "replace")
    # the format requires multiples of 8 bytes; whole pages can be written past the page cache
    text += b" " * (-(8 + len(text)) % PAGE_BYTES)
    if len(text) > MAX_HEADER_BYTES:
        raise MismatchError(
            f"{printable(file_name)} would need a header of {len(text)} bytes; write a sharded folder instead"
        )
    begin = 8 + len(text)
    starts = array("Q", [begin + start for start in starts])
    head = Literal(0, struct.pack("<Q", len(text)) + text)
    file = LayoutFile(file_name, begin + cursor, Offsets(names, starts), (head,))
    if order is None:
        return file, starts
    given = array("Q", bytes(starts.itemsize * len(starts)))
    for at, start in zip(order, starts, strict=True):
        given[at] = start
    return file, given


def _check_names(file_name: str, names: Sequence[str]) -> None:
    """Raises MismatchError for names that a header cannot hold."""
    for name in names:
        if not name.isascii() and any("\ud800" <= c <= "\udfff" for c in name):
            raise MismatchError(
                f"{printable(file_name)} cannot hold the name {printable(name)}, which is not valid text; write a .pth"
            )
    seen = {"__metadata__"}
    if len(seen.union(names)) <= len(names):
        twice = next(name for name in names if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise MismatchError(f"two tensors would be called {printable(twice)} in {printable(file_name)}")


def _said(name: str, kind: TensorSpec) -> str:
    """Returns how a header tells dtype and shape, up to the offsets."""
    shape = list(kind.shape)
    if kind.dtype is DType.F4:
        if not shape:
            raise MismatchError(f"safetensors cannot hold the 0-d F4 tensor {printable(name)}")
        shape[-1] *= 2
    return f'{{"dtype":"{kind.dtype.value}","shape":[{",".join(map(str, shape))}],"data_offsets":'
