"""Plans a folder of torch.distributed.checkpoint: files of items, and ``.metadata`` that lists them.

Each tensor is one piece, or several blocks of rows if it is long. ``dcp.load`` reads them on any number of ranks: each
rank takes from a piece what it needs. An item is a whole archive of torch.save.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

from streammerge.formats import torch_zip
from streammerge.formats.base import LayoutFile, Literal
from streammerge.formats.dcp import METADATA
from streammerge.formats.pieces import Box
from streammerge.pickles.repickle import repickle, storage_ref
from streammerge.pickles.tree import MISSING, Global, Instance, TensorRef
from streammerge.tensors.dtypes import DType
from streammerge.tensors.spec import contiguous_strides

BLOCK_BYTES = 256 << 20
"""A longer tensor is written in blocks of rows of up to this size, since a rank holds a whole piece while it loads."""
_FILE_BYTES = 5_000_000_000
_ALIGNMENT = 64
_MODULE = "torch.distributed.checkpoint.metadata"
_VERSION = "1.0.0"


@dataclass(frozen=True, slots=True)
class Piece:
    """A piece to be written. ``label``: its own name among all pieces. ``tensor``: the name of its tensor, and ``box`` its
    place there. ``dtype``: that of a tensor; None for an item of ``nbytes`` bytes that is copied as it is, which is an
    object without a ``box``."""

    label: str
    tensor: str
    nbytes: int
    box: Box | None = None
    dtype: DType | None = None
    transforms: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Whole:
    """A tensor of the checkpoint as ``.metadata`` tells it."""

    dtype_name: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Item:
    """An item of a file: where it begins, how long it is, and its archive if it is made here."""

    piece: Piece
    offset: int
    nbytes: int
    archive: LayoutFile | None


def plan_files(
    pieces: Sequence[Piece], tensors: Mapping[str, Whole], paths: Mapping[str, tuple[Any, ...]]
) -> tuple[list[LayoutFile], dict[str, tuple[int, int]]]:
    """Plans the files of these pieces, ``.metadata`` last. Returns them, and label -> number of the file and offset of the
    piece's bytes in it.

    ``paths``: name -> the keys that lead to it in a state dict, where they are known.
    """
    files: list[list[_Item]] = [[]]
    cursor = 0
    for piece in pieces:
        archive = None if piece.dtype is None else _archive(piece)
        nbytes = piece.nbytes if archive is None else archive.size
        if files[-1] and cursor + nbytes > _FILE_BYTES:
            files.append([])
            cursor = 0
        files[-1].append(_Item(piece, cursor, nbytes, archive))
        cursor += nbytes + -nbytes % _ALIGNMENT
    names = [f"__0_{number}.distcp" for number in range(len(files))]
    layouts = [_file(name, items) for name, items in zip(names, files, strict=True)]
    places = {label: (number, at) for number, layout in enumerate(layouts) for label, at in layout.offsets.items()}
    data = _metadata(dict(zip(names, files, strict=True)), tensors, paths)
    return [*layouts, LayoutFile(METADATA, len(data), {}, (Literal(0, data),))], places


def _archive(piece: Piece) -> LayoutFile:
    if piece.dtype is None or piece.box is None:
        raise ValueError(f"{piece.label} is no tensor")
    return torch_zip.plan_layout(
        piece.label, [_pickle(piece.dtype, piece.box[1])], {piece.label: ("0", piece.nbytes)}, b"PK", {}
    )


@cache
def _pickle(dtype: DType, shape: tuple[int, ...]) -> bytes:
    numel = 1
    for length in shape:
        numel *= length
    return repickle(TensorRef(storage_ref("0", dtype, numel), dtype, 0, shape, contiguous_strides(shape)))


def _file(name: str, items: list[_Item]) -> LayoutFile:
    offsets = {}
    for item in items:
        within = 0 if item.archive is None else item.archive.offsets[item.piece.label]
        offsets[item.piece.label] = item.offset + within
    last = items[-1] if items else None
    size = last.offset + last.nbytes if last else 0
    return LayoutFile(name, size, offsets, seal=partial(_sealed, items))


def _sealed(items: list[_Item], checksums: Mapping[int, int], receipt: bytes) -> list[Literal]:
    """Returns all bytes of a file outside the tensors, from the checksum of each tensor by its offset."""
    literals: list[Literal] = []
    end = 0
    for item in items:
        if item.offset > end:
            literals.append(Literal(end, bytes(item.offset - end)))
        if item.archive is not None and item.archive.seal is not None:
            own = {at: checksums.get(item.offset + at, 0) for at in item.archive.offsets.values()}
            literals += [Literal(item.offset + each.offset, each.data) for each in item.archive.seal(own, b"")]
        end = item.offset + item.nbytes
    return literals


# ------------------------------------------------------------------------------------------------------------- .metadata


def _made(module: str, name: str, state: Any) -> Instance:
    return Instance("new", Global(module, name), (), state=state)


@cache
def _size(values: tuple[int, ...]) -> Instance:
    return Instance("call", Global("torch", "Size"), (values,))


@cache
def _properties(dtype_name: str) -> Instance:
    layout = Instance("call", Global("torch.serialization", "_get_layout"), ("torch.strided",))
    contiguous = Instance("call", Global(_MODULE, "_MEM_FORMAT_ENCODING"), (0,))
    return _made(_MODULE, "TensorProperties", (Global("torch", dtype_name), layout, False, contiguous, False))


def _metadata(
    files: Mapping[str, list[_Item]], tensors: Mapping[str, Whole], paths: Mapping[str, tuple[Any, ...]]
) -> bytes:
    """Returns the pickle of ``.metadata``."""
    chunks: dict[str, list[Instance]] = {name: [] for name in tensors}
    told: dict[str, Any] = {}
    places: dict[Any, Any] = {}
    for file, items in files.items():
        for item in items:
            piece = item.piece
            index: dict[str, Any] = {"fqn": piece.tensor, "offset": None, "index": None}
            if piece.box is not None:
                offsets, sizes = map(_size, piece.box)
                index |= {"offset": offsets, "index": len(chunks[piece.tensor])}
                chunks[piece.tensor].append(_made(_MODULE, "ChunkStorageMetadata", {"offsets": offsets, "sizes": sizes}))
            else:
                told[piece.tensor] = Instance("new", Global(_MODULE, "BytesStorageMetadata"), (), state=MISSING)
            info: dict[str, Any] = {"relative_path": file, "offset": item.offset, "length": item.nbytes}
            if piece.transforms:
                info["transform_descriptors"] = [*piece.transforms]
            key = _made(_MODULE, "MetadataIndex", index)
            places[key] = _made("torch.distributed.checkpoint.filesystem", "_StorageInfo", info)
    for name, whole in tensors.items():
        state = {"properties": _properties(whole.dtype_name), "size": _size(whole.shape), "chunks": chunks[name]}
        told[name] = _made(_MODULE, "TensorStorageMetadata", state)
    planner = {name: paths[name] for name in told if name in paths} if paths else None
    state = {
        "state_dict_metadata": told,
        "planner_data": planner,
        "storage_data": places,
        "storage_meta": None,
        "version": _VERSION,
    }
    return repickle(_made(_MODULE, "Metadata", state))
