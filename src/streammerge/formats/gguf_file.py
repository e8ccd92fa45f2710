"""Files of llama.cpp: metadata by keys, a list of tensors, and their bytes.

Tensors in blocks of ggml become float32 numbers while they are read. Of known architectures the names are those of
transformers, and what llama.cpp changes in tensors is undone.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO, NamedTuple

from streammerge.errors import FormatError, listed, printable
from streammerge.formats.base import Container, flat_tensor
from streammerge.formats.gguf_names import ARCHITECTURES, DROPPED, Named, head_count, named
from streammerge.sources.base import Source
from streammerge.sources.constant import Constant
from streammerge.sources.elementwise import summed
from streammerge.sources.ggml import BLOCKS, Ggml, ggml
from streammerge.sources.permuted import permuted, shaped
from streammerge.sources.stored import Stored
from streammerge.stores.base import Location
from streammerge.tensors.dtypes import DType
from streammerge.tensors.spec import TensorSpec

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_PLAIN: dict[int, DType] = {
    0: DType.F32,
    1: DType.F16,
    24: DType.I8,
    25: DType.I16,
    26: DType.I32,
    27: DType.I64,
    28: DType.F64,
    30: DType.BF16,
}
_BLOCKS: dict[int, str] = {
    2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K",
    16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS",
    29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4",
}  # fmt: skip
_UNREAD: dict[int, str] = {9: "Q8_1", 15: "Q8_K"}
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_MOST_TENSORS = 1 << 20
_MOST_KEYS = 1 << 16
_MOST_NAME_BYTES = 1 << 10
_MOST_KEPT_BYTES = 1 << 16
_MOST_AXES = 8
_DEEPEST = 4
_MOST_FILES = 10_000
_SKIPPED_BYTES = 1 << 20
_OF_SET = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


def read_gguf(path: Location) -> Container:
    """Returns the container of a GGUF file, or of the whole set if it is one file of several. Raises FormatError."""
    headers = [_header(each) for each in _files(path)]
    container = Container(path, "GGUF", {}, {}, tuple(header.path for header in headers))
    first = headers[0].metadata
    architecture = first.get("general.architecture")
    if first.get("general.type") == "adapter":
        raise FormatError(f"{printable(path)} is an adapter (LoRA) for llama.cpp; give the adapter that it was made from")
    made = _Names(path, first, architecture if isinstance(architecture, str) else "")
    for header in headers:
        for info in header.tensors:
            made.add(header, info)
    container.tree = {name: flat_tensor(source) for name, source in made.sources.items()}
    container.notes += made.notes()
    return container


def _files(path: Location) -> list[Location]:
    """Returns the files of the set that a name belongs to. Raises FormatError if one of them is absent."""
    found = _OF_SET.fullmatch(path.name)
    if found is None:
        return [path]
    count = int(found["count"])
    if not 1 <= count <= _MOST_FILES:
        raise FormatError(f"{printable(path)}: its name says that it is one of {count} files")
    names = [f"{found['stem']}-{number:05}-of-{count:05}.gguf" for number in range(1, count + 1)]
    absent = [name for name in names if not path.with_name(name).is_file()]
    if absent:
        raise FormatError(
            f"{printable(path)} is one file of {count}, and {listed(absent)} is absent; the download is not complete"
        )
    return [path.with_name(name) for name in names]


class _Info(NamedTuple):
    """A tensor as the header tells it. ``shape``: as torch counts it. ``start``: offset in the file."""

    name: str
    shape: tuple[int, ...]
    kind: int
    start: int
    nbytes: int


@dataclass(slots=True)
class _Header:
    """``metadata``: the scalars and short texts; arrays are left out."""

    path: Location
    metadata: dict[str, Any] = field(default_factory=dict)
    tensors: list[_Info] = field(default_factory=list)


class _Reading:
    """Reads a header from a stream, and never more than the file has."""

    def __init__(self, stream: BinaryIO, size: int, where: str) -> None:
        self.stream, self.size, self.where, self.at = stream, size, where, 0

    def take(self, nbytes: int) -> bytes:
        """Returns the next bytes. Raises FormatError at the end of the file."""
        if nbytes > self.size - self.at:
            raise FormatError(f"{self.where} is a truncated GGUF file: its header goes on behind byte {self.size}")
        data = self.stream.read(nbytes)
        if len(data) != nbytes:
            raise FormatError(
                f"{self.where} is a truncated GGUF file: its header goes on behind byte {self.at + len(data)}"
            )
        self.at += nbytes
        return data

    def skip(self, nbytes: int) -> None:
        if nbytes > self.size - self.at:
            raise FormatError(f"{self.where} is a truncated GGUF file: its header goes on behind byte {self.size}")
        while nbytes:
            nbytes -= len(self.take(min(nbytes, _SKIPPED_BYTES)))

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def text(self, most: int, what: str) -> str:
        nbytes = self.number("<Q")
        if nbytes > most:
            raise FormatError(f"{self.where}: {what} has {nbytes} bytes, more than {most}")
        try:
            return self.take(nbytes).decode("utf-8")
        except UnicodeDecodeError as error:
            raise FormatError(f"{self.where}: {what} is not valid UTF-8") from error

    def value(self, kind: int, depth: int = 0) -> Any:
        """Returns a scalar or a short text, None for anything longer. Raises FormatError for a type that there is not."""
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            nbytes = self.number("<Q")
            if nbytes > _MOST_KEPT_BYTES:
                self.skip(nbytes)
                return None
            return self.take(nbytes).decode("utf-8", "replace")
        if kind != _ARRAY or depth == _DEEPEST:
            raise FormatError(f"{self.where}: its metadata has a value of type {kind}, which GGUF does not have there")
        inner, count = self.number("<I"), self.number("<Q")
        if inner in _SCALARS:
            self.skip(count * struct.calcsize(_SCALARS[inner]))
            return None
        if count * 8 > self.size - self.at:  # each has a length of its own
            raise FormatError(f"{self.where}: its metadata has an array of {count} values, which the file is too short for")
        for _ in range(count):
            if inner == _STRING:
                self.skip(self.number("<Q"))
            else:
                self.value(inner, depth + 1)
        return None


def _header(path: Location) -> _Header:
    where, size = printable(path), path.size
    made = _Header(path)
    with path.stream() as stream:
        reading = _Reading(stream, size, where)
        if reading.take(4) != _MAGIC:
            raise FormatError(f"{where} is no GGUF file")
        version = reading.number("<I")
        if version not in _VERSIONS:
            if version == 1 or struct.unpack(">I", struct.pack("<I", version))[0] not in _VERSIONS:
                raise FormatError(
                    f"{where} is of version {version} of GGUF; versions {_VERSIONS[0]} and {_VERSIONS[1]} are read"
                )
            raise FormatError(
                f"{where} is a big-endian GGUF file, which is not read; convert it with llama.cpp's gguf_convert_endian"
            )
        tensors, keys = reading.number("<Q"), reading.number("<Q")
        if tensors > _MOST_TENSORS or keys > _MOST_KEYS:
            raise FormatError(f"{where} claims {tensors} tensors and {keys} keys, more than a model has; it is damaged")
        for _ in range(keys):
            key = reading.text(_MOST_NAME_BYTES, "a key of its metadata")
            value = reading.value(reading.number("<I"))
            if value is not None:
                made.metadata[key] = value
        infos = [_info(reading) for _ in range(tensors)]
        alignment = made.metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 0 < alignment <= 1 << 20 or alignment & (alignment - 1):
            raise FormatError(f"{where}: its alignment {printable(alignment)} is no power of two")
        begin = -(-reading.at // alignment) * alignment
    made.tensors = [each._replace(start=begin + each.start) for each in infos]
    _check(made, begin, size, alignment, where)
    return made


def _info(reading: _Reading) -> _Info:
    """Reads what the header says of one tensor. The start counts from the begin of the data."""
    name = reading.text(_MOST_NAME_BYTES, "the name of a tensor")
    axes = reading.number("<I")
    what = f"{reading.where}: tensor {printable(name)}"
    if axes > _MOST_AXES:
        raise FormatError(f"{what} has {axes} axes; it is damaged")
    shape = tuple(reversed(struct.unpack(f"<{axes}Q", reading.take(8 * axes))))
    kind, start = reading.number("<I"), reading.number("<Q")
    numel = math.prod(shape)
    if math.prod(filter(None, shape)) >= 1 << 63:
        raise FormatError(f"{what} has a shape whose size overflows")
    if kind in _PLAIN:
        return _Info(name, shape, kind, start, numel * _PLAIN[kind].element_bytes)
    if kind not in _BLOCKS:
        said = f"of the type {_UNREAD[kind]}" if kind in _UNREAD else f"of the unknown type {kind}"
        raise FormatError(f"{what} is {said}, which is not read; give a file of Q2_K to Q8_0, F16 or BF16, or the original")
    layout = BLOCKS[_BLOCKS[kind]]
    if not shape or shape[-1] % layout.elems:
        raise FormatError(f"{what} of shape {list(shape)} does not consist of blocks of {layout.elems} numbers")
    return _Info(name, shape, kind, start, numel // layout.elems * layout.nbytes)


def _check(header: _Header, begin: int, size: int, alignment: int, where: str) -> None:
    """Raises FormatError for tensors that lie outside of the file or in each other, and for two of one name."""
    cursor, names = begin, set[str]()
    for info in sorted(header.tensors, key=lambda each: (each.start, each.nbytes)):
        what = f"{where}: tensor {printable(info.name)}"
        if info.name in names:
            raise FormatError(f"{what} is there twice; the file is damaged")
        names.add(info.name)
        if info.start % alignment:
            raise FormatError(
                f"{what} begins at byte {info.start}, which is no multiple of {alignment}; the file is damaged"
            )
        if info.start + info.nbytes > size:
            raise FormatError(
                f"{what} reaches to byte {info.start + info.nbytes} of a file of {size} bytes; it is truncated or damaged"
            )
        if info.start < cursor and info.nbytes:
            raise FormatError(f"{what} overlaps the tensor before it; the file is damaged")
        cursor = max(cursor, info.start + info.nbytes)


@dataclass(slots=True)
class _Names:
    """The tensors under their names in transformers, if the architecture is known."""

    path: Location
    metadata: dict[str, Any]
    architecture: str
    sources: dict[str, Source] = field(default_factory=dict)
    kept: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)

    def add(self, header: _Header, info: _Info) -> None:
        """Adds a tensor, or all experts that are stacked in it. Raises FormatError if two would have one name."""
        if self.architecture in ARCHITECTURES and DROPPED.search(info.name):
            self.dropped.append(info.name)
            return
        found = named(self.architecture, info.name)
        if found is None:
            self.kept.append(info.name)
            found = Named(info.name)
        for name, source in self._made(header, info, found):
            if name in self.sources:
                raise FormatError(f"{printable(self.path)}: the name {printable(name)} stands for two tensors")
            self.sources[name] = source

    def _made(self, header: _Header, info: _Info, found: Named) -> Iterator[tuple[str, Source]]:
        if found.expert and len(info.shape) == 3:
            each = info.nbytes // max(info.shape[0], 1)
            for number in range(info.shape[0]):
                name = found.expert.format(number)
                yield (
                    name,
                    _source(
                        header, info._replace(shape=info.shape[1:], start=info.start + number * each, nbytes=each), name
                    ),
                )
            return
        name = info.name if found.expert else found.name
        if found.heads:
            yield name, self._in_order(header, info, name, found.heads)
        elif found.raised:
            source = _source(header, info, name)
            ones = Constant(TensorSpec(name, DType.F32, info.shape), struct.pack("<f", 1.0))
            yield name, summed([source, ones], [1.0, -1.0], DType.F32)
        elif name.endswith("shared_expert_gate.weight") and len(info.shape) == 1:
            yield name, shaped(_source(header, info, name), 1, -1)
        else:
            yield name, _source(header, info, name)

    def _in_order(self, header: _Header, info: _Info, name: str, key: str) -> Source:
        """Returns queries or keys with the rows of each head in the order of transformers."""
        heads = head_count(self.metadata, self.architecture, key)
        rows = info.shape[0] if info.shape else 0
        if heads is None or rows % (2 * heads):
            raise FormatError(
                f"{printable(self.path)}: tensor {printable(info.name)} of shape {list(info.shape)} cannot be brought into "
                f"the order of transformers, since the metadata states no {key} that fits"
            )
        source = _source(header, info, name)
        if isinstance(source, Ggml):
            return ggml(name, info.shape, source.packed, source.kind, rows // heads)
        halves = shaped(source, heads, rows // heads // 2, 2, *info.shape[1:])
        return shaped(permuted(halves, 0, 2, 1, *range(3, len(halves.spec.shape))), *info.shape).named(name)

    def notes(self) -> list[str]:
        where, said = printable(self.path), list[str]()
        if self.architecture not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            told = (
                f"its architecture {printable(self.architecture)} is"
                if self.architecture
                else "it tells no architecture, or"
            )
            said.append(f"{where}: the names of llama.cpp are kept, since {told} none of {known}")
        elif self.kept:
            said.append(
                f"{where}: {listed(self.kept, 2)} keep their names, since transformers' names for them are not known"
            )
        if self.dropped:
            said.append(f"{where}: {listed(self.dropped)} is left out, since llama.cpp makes it of the configuration")
        return said


def _source(header: _Header, info: _Info, name: str) -> Source:
    """Returns the numbers of a tensor, in the order in which they are stored."""
    if info.kind in _PLAIN:
        return Stored(TensorSpec(name, _PLAIN[info.kind], info.shape), header.path, info.start)
    packed = Stored(TensorSpec(info.name, DType.U8, (info.nbytes,)), header.path, info.start)
    return ggml(name, info.shape, packed, _BLOCKS[info.kind])
