"""The items of a distributed checkpoint: ranges of ``.distcp`` files, each a whole archive of torch.save or a safetensors
tensor."""

from __future__ import annotations

import math
from typing import BinaryIO

from streammerge.errors import FormatError, StreammergeError, printable
from streammerge.formats import torch_zip
from streammerge.formats.dcp_metadata import Entry, Head, Item, Place
from streammerge.formats.pieces import piece_of_dtype
from streammerge.pickles.tree import TensorRef, number
from streammerge.sources.base import Allocated, Source, read_whole
from streammerge.sources.stored import Stored
from streammerge.stores.base import Location
from streammerge.tensors.dtypes import DType
from streammerge.tensors.spec import TensorSpec

_MOST_HEAD_BYTES = 2048
_COUNTERS = (DType.I64, DType.I32)


class Heads:
    """Finds the bytes of tensors in the items of a folder. What is known of one spares the reading of those like it.

    ``heads``: what is known of others, to which it adds."""

    def __init__(self, heads: set[Head]) -> None:
        self._heads = heads
        self._lengths = {len(before) for before, *_ in heads}

    def piece(self, stream: BinaryIO, path: Location, item: Item, spec: TensorSpec, what: str) -> Source:
        """Returns the source of an item that is an archive of torch.save.

        An archive begins as another one does if its tensor has the same dtype, shape and strides. Then its bytes lie in the
        same place, and nothing more is read of it.
        """
        stream.seek(item.offset)
        head = stream.read(min(item.nbytes, _MOST_HEAD_BYTES))
        for length in self._lengths:
            if (head[:length], item.nbytes, spec.dtype, spec.shape) in self._heads:  # also a tensor's of another name
                return Stored(spec, path, item.offset + length)
        container = torch_zip.read_stream(stream, path, (item.offset, item.nbytes), what)
        if not isinstance(container.tree, TensorRef):
            raise FormatError(f"{what}: its part in {printable(item.file)} is no tensor; the file is damaged")
        source = piece_of_dtype(container.locate(spec.name, container.tree), spec.dtype, spec.shape, what)
        if source.__class__ is Stored and item.offset < source.begin[1] <= item.offset + _MOST_HEAD_BYTES:
            length = source.begin[1] - item.offset
            self._heads.add((head[:length], item.nbytes, spec.dtype, spec.shape))
            self._lengths.add(length)
        return source

    def within(
        self, path: Location, span: tuple[int, int], entry: Entry, offsets: tuple[int, ...]
    ) -> tuple[int, int] | None:
        """Returns where the bytes of a tensor lie in its item. None if they are not plain ones."""
        sizes = dict(entry.boxes).get(offsets)
        if sizes is None or entry.dtype is None:
            return None
        with path.stream() as stream:
            try:
                source = self.piece(stream, path, Item("", *span), TensorSpec("", entry.dtype, sizes), "")
            except StreammergeError:
                return None
        return (source.offset, source.spec.nbytes) if source.__class__ is Stored else None


def number_in(place: Place, name: str) -> int | None:
    """Returns the whole number that an item of a file is, as a counter is. None if it is something else. ``place``: of the
    item."""
    container = torch_zip.read(place[0], place[1:])
    found = number(container.tree)
    ref = container.tree
    if isinstance(ref, TensorRef) and ref.dtype in _COUNTERS and math.prod(ref.shape) == 1:
        data = read_whole(container.locate(name, ref), Allocated(lambda location: location.open()))
        found = int.from_bytes(data, "little", signed=True)
    return found if isinstance(found, int) else None
