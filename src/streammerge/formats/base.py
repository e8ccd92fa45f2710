"""The container that every format reader returns, and the layout of an output file."""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence, ValuesView
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol
from typing import Literal as OneOf

from streammerge.errors import FormatError, printable
from streammerge.pickles.tree import FlatTree, TensorRef, is_quantised
from streammerge.pickles.tree import flat_tensor as flat_tensor
from streammerge.sources.base import Source
from streammerge.sources.table import StoredTable
from streammerge.stores.base import Location
from streammerge.tensors.spec import TensorSpec, is_contiguous

if TYPE_CHECKING:
    from streammerge.sources.deflated import PackedRecord

MOST_EXPANDED_BYTES = 64 << 20
PART_ENDING = ".distcp"
"""How the names of files end that hold one rank's part of a distributed checkpoint."""
_INDEX_NAME = r"\.index(\.[\w-]+)?\.json$"
Match = bool | OneOf["unless another"]
"""Whether a file is of a format. "unless another": it may be, and every other format is asked first."""


class StorageBytes(NamedTuple):
    """The place of one torch storage's bytes. In a packed record ``offset`` counts its unpacked bytes."""

    path: Location
    offset: int
    nbytes: int
    record: PackedRecord | None = None

    @property
    def span(self) -> tuple[int, int]:
        """(offset, bytes) in the file."""
        return self.record.span if self.record else (self.offset, self.nbytes)


@dataclass(frozen=True, slots=True)
class Form:
    """How a folder stores a checkpoint: the names of its files.

    ``stem``, ``variant`` and ``ending``: the parts of a name such as ``model.fp16-00001-of-00002.safetensors``. ``index``:
    the name of its index, "" without one. ``files``: the names of its files with tensors, as paths below the folder.
    """

    stem: str
    ending: str
    variant: str = ""
    index: str = ""
    files: tuple[str, ...] = ()

    def named(self, number: int = 1, count: int = 1) -> str:
        """Returns the name of one of ``count`` files. ``number`` counts from 1."""
        name = f"{self.stem}.{self.variant}" if self.variant else self.stem
        return f"{name}{self.ending}" if count == 1 else f"{name}-{number:05}-of-{count:05}{self.ending}"

    def index_name(self) -> str:
        """Returns the name of an index of several files, as transformers and diffusers call it."""
        return self.index or f"{self.stem}{self.ending}.index{f'.{self.variant}' if self.variant else ''}.json"


def is_index(name: str) -> bool:
    """Whether a file is an index of shards, by its name."""
    return re.search(_INDEX_NAME, name) is not None


def is_part(path: Location) -> bool:
    """Whether a file is one rank's part of a distributed checkpoint, by its name."""
    return path.name.endswith(PART_ENDING)


@dataclass(slots=True, eq=False)
class Container:
    """A checkpoint on the disk: the inert tree, and the places of its storages. No tensor was read.

    ``pickled``: the tree comes from a pickle; tensors may share storages and be beside other data. Otherwise the tree
    maps names to tensors (:func:`flat_tensor`, :class:`FlatTree`). ``held_bytes``: bytes of pickles, whose data is in the
    tree. ``arrays``: the sources of tensors that lie in no storage: numpy's arrays in a pickle, tensors in pieces of
    several ranks. ``skipped``: ranges of (offset, bytes) in files that no merge reads, such as the state of an optimizer.
    ``facts``: what is known of the run that wrote it, for people. ``own_files``: a pattern of the names of files in its
    folder that belong to a checkpoint in pieces, whether it is read from them or not. ``distributed``: what its format
    needs to write such a checkpoint again. ``reading_bytes``: what reading it takes for a while, if that is more than twice
    ``held_bytes``. ``form``: how a folder stores it.
    ``parts``: subfolder -> its container, "" for the folder's own weights, where a folder holds several models that belong
    together; then the tree is empty. ``warnings``: what may be wrong with the checkpoint. ``members``: the names of what an
    archive holds beside the weights. ``enclosed``: puts a planned file of weights into that archive instead of its own.
    """

    path: Location
    format: str
    tree: Any
    storages: dict[str, StorageBytes]
    files: tuple[Location, ...]
    metadata: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    pickled: bool = False
    magic: bytes = b"PK"
    held_bytes: int = 0
    arrays: list[Source] = field(default_factory=list)
    form: Form | None = None
    parts: dict[str, Container] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    skipped: dict[Location, list[tuple[int, int]]] = field(default_factory=dict)
    facts: dict[str, str] = field(default_factory=dict)
    own_files: str = ""
    distributed: Any = None
    reading_bytes: int = 0
    members: list[str] = field(default_factory=list)
    enclosed: Callable[[LayoutFile], LayoutFile] | None = None

    @property
    def table(self) -> StoredTable | None:
        """Its tensors as columns, if it is read so."""
        return self.tree.table if isinstance(self.tree, FlatTree) else None

    def tensor_spans(self, joined: bool = False) -> dict[Location, list[tuple[int, int]]]:
        """Returns the spans of tensors' bytes in each file, as sorted (offset, bytes). All other bytes are headers.

        ``joined``: neighbours may be one span.
        """
        spans: dict[Location, list[tuple[int, int]]] = {path: [] for path in self.files}
        for part in self.parts.values():
            spans |= part.tensor_spans(joined)
        if self.table is not None:
            return spans | self.table.spans(joined)
        for store in self.storages.values():
            spans[store.path].append(store.span)
        for path, skipped in self.skipped.items():
            spans[path] += skipped
        near, there = None, list[tuple[int, int]]()  # the file of the tensor before; a path's hash takes its time
        flat = self.tree.values() if isinstance(self.tree, dict) else ()
        for entry in (*self.arrays, *(ref.entry for ref in flat if isinstance(ref, TensorRef))):
            for path, offset, nbytes in entry.blobs if entry is not None else ():
                if path is not near:
                    near, there = path, spans[path]
                there.append((offset, nbytes))
        return {path: sorted(dict.fromkeys(span for span in found if span[1])) for path, found in spans.items()}

    def tensor_begins(self) -> dict[Location, Collection[int]]:
        """Returns where the bytes of the tensors that are not empty begin in each file."""
        if self.table is None:
            return {path: [offset for offset, _ in spans] for path, spans in self.tensor_spans().items()}
        found: dict[Location, Collection[int]] = dict.fromkeys(self.files, ())
        return found | self.table.begins()

    def locate(self, name: str, ref: TensorRef) -> Source:
        """Returns the entry of one tensor. Raises FormatError if the tensor does not fit its storage."""
        if ref.entry is not None:
            return ref.entry.named(name)
        if is_quantised(ref):
            return self._dequantised(name, ref)
        store = self.storages.get(ref.storage.key)
        if store is None:
            where = self._where(name)
            raise FormatError(f"{where} lies in storage {printable(ref.storage.key)}, which the file does not have")
        spec, size = TensorSpec(name, ref.dtype, ref.shape), ref.dtype.element_bytes
        start = (ref.storage.view_offset + ref.offset) * size
        contiguous, reach = is_contiguous(ref.shape, ref.strides), spec.numel - 1
        if reach >= 0 and not contiguous:
            reach = sum((n - 1) * stride for n, stride in zip(ref.shape, ref.strides, strict=True))
        if start < 0 or start + (reach + 1) * size > store.nbytes:
            raise FormatError(
                f"{self._where(name)} reaches to byte {start + (reach + 1) * size} of a storage of {store.nbytes} bytes; "
                "the file is damaged"
            )
        if spec.nbytes > max(store.nbytes, MOST_EXPANDED_BYTES):
            raise FormatError(
                f"{self._where(name)} claims {spec.nbytes} bytes over a storage of {store.nbytes}; "
                "it is expanded beyond reason"
            )
        strides = None if contiguous else ref.strides
        from streammerge.sources.deflated import of_bytes

        return of_bytes(spec, store.path, store.offset + start, strides, store.record, ref.lazy)

    def _dequantised(self, name: str, ref: TensorRef) -> Source:
        """Returns the entry of a quantised tensor of torch: an expression over its integers and scales."""
        from streammerge.pickles.rebuild import Quantiser, quantiser  # here, because few files have them
        from streammerge.sources.affine import affine

        said = quantiser(ref.wrapper[1].args[4]) or Quantiser()
        integers = ref.storage.dtype or ref.dtype
        codes = self.locate(name, replace(ref, dtype=integers, wrapper=()))
        scales, zeros = (None if each is None else self.locate(name, each) for each in (said.scales, said.zeros))
        try:
            return affine(name, codes, said.scale, said.zero, scales, zeros, said.axis)
        except FormatError as error:
            raise FormatError(f"{printable(self.path)}: {error}") from error

    def _where(self, name: str) -> str:
        return f"{printable(self.path)}: tensor {printable(name)}"


class Format(Protocol):
    """What reads one container: a module of this room, or an object that a plug-in brings.

    ``matches`` judges by the first 512 bytes and the size. ``read`` finds out where the bytes of the tensors lie and reads
    none of them; it raises FormatError. Nothing in the file is executed.
    """

    def matches(self, head: bytes, size: int) -> Match: ...

    def read(self, path: Location) -> Container: ...


class Literal(NamedTuple):
    """Bytes of an output file that belong to no tensor."""

    offset: int
    data: bytes


class Offsets(Mapping[str, int]):
    """Names of tensors -> where they begin in a file, as two columns. ``starts``: in the order of the names."""

    __slots__ = ("_found", "names", "starts")

    def __init__(self, names: Sequence[str], starts: array[int]) -> None:
        self.names, self.starts = names, starts
        self._found: dict[str, int] | None = None

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __getitem__(self, name: str) -> int:
        if self._found is None:
            self._found = dict(zip(self.names, self.starts, strict=True))
        return self._found[name]

    def values(self) -> ValuesView[int]:
        return _Starts(self)


class _Starts(ValuesView[int]):
    """The offsets, without a search by name."""

    _mapping: Offsets

    def __iter__(self) -> Iterator[int]:
        return iter(self._mapping.starts)


class LayoutFile(NamedTuple):
    """The plan of one output file: its size, the offset of each tensor, and all its other bytes.

    ``receipt``: the blank receipt among the literals, as written in this file. ``seal``: makes the literals from the
    tensors' checksums (by offset) and the receipt, in formats whose headers contain checksums.
    """

    name: str
    size: int
    offsets: Mapping[str, int]
    literals: tuple[Literal, ...] = ()
    receipt: bytes = b""
    seal: Callable[[Mapping[int, int], bytes], list[Literal]] | None = None

    def around(self, checksums: Mapping[int, int], receipt: bytes) -> list[Literal]:
        """Returns all bytes outside tensors, with these checksums (by offset) and this receipt instead of the blank
        one."""
        if self.seal is not None:
            return self.seal(checksums, receipt)
        if receipt == self.receipt:
            return [*self.literals]
        return [Literal(each.offset, each.data.replace(self.receipt, receipt)) for each in self.literals]
