"""The container that every format reader returns, and the layout of an output file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from streammerge.errors import FormatError, printable
from streammerge.pickles.tree import StorageRef, TensorRef
from streammerge.tensors.spec import Deflated, TensorEntry, TensorSpec, is_contiguous

MOST_EXPANDED_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class StorageBytes:
    """The place of one torch storage's bytes. For a compressed record, ``offset`` is 0 within ``deflated``."""

    path: str
    offset: int
    nbytes: int
    deflated: Deflated | None = None


@dataclass(slots=True)
class Container:
    """A checkpoint on the disk: the inert tree, and the places of its storages. No tensor was read.

    ``pickled``: the tree comes from a pickle; tensors may share storages and be beside other data. Otherwise the tree
    maps names to tensors (:func:`flat_tensor`).
    """

    path: Path
    format: str
    tree: Any
    storages: dict[str, StorageBytes]
    files: tuple[Path, ...]
    metadata: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    pickled: bool = False
    magic: bytes = b"PK"

    def tensor_spans(self) -> dict[str, list[tuple[int, int]]]:
        """Returns the spans of tensors' bytes in each file, as sorted (offset, bytes). All other bytes are headers."""
        spans: dict[str, list[tuple[int, int]]] = {str(path): [] for path in self.files}
        for store in self.storages.values():
            spans[store.path].append(store.deflated.span if store.deflated else (store.offset, store.nbytes))
        for ref in self.tree.values() if isinstance(self.tree, dict) else ():
            if isinstance(ref, TensorRef) and (entry := ref.entry) is not None:
                spans[entry.path].append(entry.span)
        return {path: sorted(dict.fromkeys(span for span in found if span[1])) for path, found in spans.items()}

    def locate(self, name: str, ref: TensorRef) -> TensorEntry:
        """Returns the entry of one tensor. Raises FormatError if the tensor does not fit its storage."""
        if ref.entry is not None:
            return ref.entry if ref.entry.spec.name == name else replace(ref.entry, spec=replace(ref.entry.spec, name=name))
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
        if not spec.numel:  # an empty tensor needs no conjugation and no unpacking
            return TensorEntry(spec, store.path, store.offset + start)
        return TensorEntry(spec, store.path, store.offset + start, strides, store.deflated, ref.lazy)

    def _where(self, name: str) -> str:
        return f"{printable(self.path)}: tensor {printable(name)}"


_NO_STORAGE = StorageRef("", None, 0)


def flat_tensor(entry: TensorEntry) -> TensorRef:
    """Makes a tensor with its own bytes, for formats without storages."""
    return TensorRef(_NO_STORAGE, entry.spec.dtype, 0, entry.spec.shape, (), entry=entry)


@dataclass(frozen=True, slots=True)
class Literal:
    """Bytes of an output file that belong to no tensor."""

    offset: int
    data: bytes


@dataclass(frozen=True, slots=True)
class LayoutFile:
    """The plan of one output file: its size, the offset of each tensor, and all its other bytes.

    ``receipt``: the blank receipt among the literals, as written in this file. ``seal``: makes the literals from the
    tensors' checksums (by offset) and the receipt, in formats whose headers contain checksums.
    """

    name: str
    size: int
    offsets: dict[str, int]
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
