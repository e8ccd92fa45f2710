"""The safetensors format: u64 header length, JSON header, tensors back to back.

Reading checks all rules of the specification (no overlap, hole, trailing byte, duplicate key, header beyond 100 MB) and
the arithmetic of every size. Writing is planned: the header is complete before the first tensor is read.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from streammerge.errors import FormatError, MismatchError, listed, printable
from streammerge.formats.base import Container, LayoutFile, Literal, flat_tensor
from streammerge.sources.stored import Stored
from streammerge.stores.base import Location
from streammerge.strict_json import load_json
from streammerge.tensors.dtypes import DType
from streammerge.tensors.spec import TensorSpec
from streammerge.units import PAGE_BYTES

MAX_HEADER_BYTES = 100_000_000
_MOST_KNOWN_BYTES = 32 << 20
_MAX_INTEGER = 1 << 63
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
    begin, data_bytes = 8 + length, size - 8 - length
    header = _known.get(data)
    if header is None or header.data_bytes != data_bytes:
        header = _header(data, data_bytes, where)
        _known.keep(data, header)
    tree = {spec.name: flat_tensor(Stored(spec, path, begin + start)) for spec, start in header.placed}
    return Container(path, "safetensors", tree, {}, (path,), dict(header.metadata))


@dataclass(frozen=True, slots=True)
class _Header:
    """A parsed header: each tensor with its offset in the data, in the order of offsets."""

    metadata: dict[str, str]
    placed: list[tuple[TensorSpec, int]]
    data_bytes: int


def _header(data: bytes, data_bytes: int, where: str) -> _Header:
    """Parses a header and checks all rules. Raises FormatError."""
    fields = _parse(data, where)
    metadata = _metadata(fields.pop("__metadata__", None), where)
    specs: dict[str, TensorSpec] = {}
    spans: list[tuple[int, int, str]] = []
    for name, given in fields.items():
        spec, begin, end = _tensor(name, given, where)
        spans.append((begin, end, name))
        specs[name] = spec
    _check_spans(spans, data_bytes, where)
    return _Header(metadata, [(specs[name], begin) for begin, _, name in spans], data_bytes)


class _Known(dict[bytes, _Header]):
    """Headers read so far, within :func:`shared_headers`."""

    room = 0

    def keep(self, data: bytes, header: _Header) -> None:
        if len(data) <= self.room:
            self.room -= len(data)
            self[data] = header


_known = _Known()


@contextmanager
def shared_headers() -> Iterator[None]:
    """Parses equal headers only once inside the block. Fine-tunes of one model often have equal headers."""
    _known.room = _MOST_KNOWN_BYTES
    try:
        yield
    finally:
        _known.room = 0
        _known.clear()


def _parse(data: bytes, where: str) -> dict[str, Any]:
    try:
        header = load_json(data.decode("utf-8"))
    except ValueError as error:
        raise FormatError(f"{where}: its safetensors header cannot be read ({printable(error)})") from error
    if not isinstance(header, dict):
        raise FormatError(f"{where}: its safetensors header is not an object")
    return header


def _metadata(value: Any, where: str) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        raise FormatError(f"{where}: __metadata__ may hold strings only")
    return value


def _naturals(value: Any) -> bool:
    """Whether it is a list of non-negative integers that fit into 63 bits."""
    if not isinstance(value, list):
        return False
    for number in value:  # noqa: SIM110 - this runs for every tensor of every file, and all() takes twice as long
        if number.__class__ is not int or not 0 <= number < _MAX_INTEGER:
            return False
    return True


def _tensor(name: str, fields: Any, where: str) -> tuple[TensorSpec, int, int]:
    if not isinstance(fields, dict) or fields.keys() != {"dtype", "shape", "data_offsets"}:
        raise _malformed(where, name, "must have exactly dtype, shape and data_offsets")
    shape, offsets = fields["shape"], fields["data_offsets"]
    if not _naturals(shape) or len(shape) > 64:
        raise _malformed(where, name, "has a malformed shape")
    if not _naturals(offsets) or len(offsets) != 2:
        raise _malformed(where, name, "has malformed data_offsets")
    dtype = _DTYPES.get(fields["dtype"]) if isinstance(fields["dtype"], str) else None
    if dtype is None:
        raise _malformed(where, name, f"has dtype {printable(fields['dtype'])}, which is not supported")
    if math.prod(filter(None, shape)) >= _MAX_INTEGER:
        raise _malformed(where, name, "has a shape whose size overflows")
    if dtype is DType.F4:
        if not shape or shape[-1] % 2:
            raise _malformed(where, name, "is F4, which needs an even last dimension")
        shape = [*shape[:-1], shape[-1] // 2]
    spec = TensorSpec(name, dtype, tuple(shape))
    nbytes = spec.nbytes
    if offsets[1] - offsets[0] != nbytes:
        raise _malformed(where, name, f"has {offsets[1] - offsets[0]} bytes where {dtype} {shape} needs {nbytes}")
    return spec, offsets[0], offsets[1]


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


def aligned(specs: Iterable[TensorSpec]) -> list[TensorSpec]:
    """Keeps the order of tensors if each then starts at a multiple of its element size; else sorts wide dtypes first."""
    specs = list(specs)
    cursor = 0
    for spec in specs:
        if cursor % spec.dtype.element_bytes:
            return sorted(specs, key=lambda s: -s.dtype.element_bytes)
        cursor += spec.nbytes
    return specs


def plan_layout(file_name: str, specs: Iterable[TensorSpec], metadata: dict[str, str]) -> LayoutFile:
    """Plans the place of each byte of a safetensors file. Raises MismatchError if the format cannot hold a tensor."""
    specs = aligned(specs)
    foreign = [f"{s.name} ({s.dtype})" for s in specs if not s.dtype.in_safetensors]
    if foreign:
        raise MismatchError(f"safetensors cannot hold {listed(foreign)}; leave them out with `drop`, or write a .pth")
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    starts, cursor = {}, 0
    for spec in specs:
        if not spec.name.isascii() and any("\ud800" <= c <= "\udfff" for c in spec.name):
            raise MismatchError(
                f"{printable(file_name)} cannot hold the name {printable(spec.name)}, which is not valid text; write a .pth"
            )
        if spec.name == "__metadata__" or spec.name in header:
            raise MismatchError(f"two tensors would be called {printable(spec.name)} in {printable(file_name)}")
        shape = list(spec.shape)
        if spec.dtype is DType.F4:
            if not shape:
                raise MismatchError(f"safetensors cannot hold the 0-d F4 tensor {printable(spec.name)}")
            shape[-1] *= 2
        header[spec.name] = {"dtype": spec.dtype.value, "shape": shape, "data_offsets": [cursor, cursor + spec.nbytes]}
        starts[spec.name], cursor = cursor, cursor + spec.nbytes
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
    # the format requires multiples of 8 bytes; whole pages can be written past the page cache
    text += b" " * (-(8 + len(text)) % PAGE_BYTES)
    if len(text) > MAX_HEADER_BYTES:
        raise MismatchError(
            f"{printable(file_name)} would need a header of {len(text)} bytes; write a sharded folder instead"
        )
    begin = 8 + len(text)
    offsets = {name: begin + start for name, start in starts.items()}
    return LayoutFile(file_name, begin + cursor, offsets, (Literal(0, struct.pack("<Q", len(text)) + text),))
