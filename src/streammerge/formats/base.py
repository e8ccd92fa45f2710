"""What every format reader returns, and the one place where a tensor of a tree is turned into bytes at an offset."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from streammerge.errors import FormatError, printable
from streammerge.pickles.tree import StorageRef, TensorRef
from streammerge.sources.base import Source
from streammerge.sources.deflated import Record, of_bytes
from streammerge.tensors.spec import TensorSpec, is_contiguous

MOST_EXPANDED_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class StorageBytes:
    """Where the bytes of one torch storage lie: at ``offset`` of the file, or of the inflated bytes of ``record``."""

    path: str
    offset: int
    nbytes: int
    record: Record | None = None

    @property
    def span(self) -> tuple[int, int]:
        """(offset, bytes) in the file."""
        return self.record.span if self.record else (self.offset, self.nbytes)


@dataclass(slots=True)
class Container:
    """A checkpoint as it lies on the disk: the inert tree, and where its storages are. No tensor was read.

    ``pickled``: whether the tree is that of a pickle, in which tensors share storages and have other data beside them;
    if not, it is the tensors by their names (:func:`flat_tensor`). ``held_bytes``: of pickles, whose data is in the tree.
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
    held_bytes: int = 0

    def tensor_spans(self) -> dict[str, list[tuple[int, int]]]:
        """Where in its files the bytes of tensors lie, as (offset, bytes) in order; the rest is its headers."""
        spans: dict[str, list[tuple[int, int]]] = {str(path): [] for path in self.files}
        for store in self.storages.values():
            spans[store.path].append(store.span)
        for ref in self.tree.values() if isinstance(self.tree, dict) else ():
            if isinstance(ref, TensorRef) and ref.entry is not None:
                for path, offset, nbytes in ref.entry.blobs:
                    spans[path].append((offset, nbytes))
        return {path: sorted(dict.fromkeys(span for span in found if span[1])) for path, found in spans.items()}

    def locate(self, name: str, ref: TensorRef) -> Source:
        """The source of one tensor. Raises FormatError when it does not fit its storage."""
        if ref.entry is not None:
            return ref.entry.named(name)
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
        return of_bytes(spec, store.path, store.offset + start, strides, store.record, ref.lazy)

    def _where(self, name: str) -> str:
        return f"{printable(self.path)}: tensor {printable(name)}"


_NO_STORAGE = StorageRef("", None, 0)


def flat_tensor(entry: Source) -> TensorRef:
    """A tensor whose bytes are its own, for formats without storages."""
    return TensorRef(_NO_STORAGE, entry.spec.dtype, 0, entry.spec.shape, (), entry=entry)


@dataclass(frozen=True, slots=True)
class Literal:
    """Bytes of an output file that are not a tensor's."""

    offset: int
    data: bytes


@dataclass(frozen=True, slots=True)
class LayoutFile:
    """One output file before it exists: its size, where each tensor goes, and all its other bytes.

    ``receipt``: the bytes among the literals that are the receipt, still blank, as they stand in this file. ``seal``
    makes the literals instead where they hold the checksums of tensors, from these by offset and from the receipt.
    """

    name: str
    size: int
    offsets: dict[str, int]
    literals: tuple[Literal, ...] = ()
    receipt: bytes = b""
    seal: Callable[[Mapping[int, int], bytes], list[Literal]] | None = None

    def around(self, checksums: Mapping[int, int], receipt: bytes) -> list[Literal]:
        """All bytes but the tensors', from these checksums by offset, and with that receipt in place of the blank one."""
        if self.seal is not None:
            return self.seal(checksums, receipt)
        if receipt == self.receipt:
            return [*self.literals]
        return [Literal(each.offset, each.data.replace(self.receipt, receipt)) for each in self.literals]
