"""Checkpoints of several ranks as safetensors: what HuggingFaceStorageWriter of torch.distributed.checkpoint writes.

Each rank has files of its own, ``shard-00001-model-00001-of-00001.safetensors``, which say where each piece begins in its
tensor. No file tells the shape of a tensor: it is as large as its pieces reach.
"""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any

from streammerge.errors import FormatError, listed, printable
from streammerge.formats import safetensors
from streammerge.formats.base import Container
from streammerge.formats.pieces import PIECE_BYTES, PieceOf, assembled, check_boxes, checked_shape
from streammerge.pickles.tree import flat_tensor
from streammerge.sources.base import Source
from streammerge.stores.base import Location
from streammerge.strict_json import load_json
from streammerge.tensors.spec import TensorSpec

NAME = "safetensors of several ranks"
"""What :class:`Container` calls the format."""
_FILE = re.compile(r"shard-(?P<rank>\d+)-model-(?P<number>\d+)-of-(?P<count>\d+)\.safetensors")
_PLACES = "DCP_SHARDING_INFO"


def is_file_of(name: str) -> bool:
    """Whether a file belongs to such a checkpoint, by its name."""
    return _FILE.fullmatch(name) is not None


def read(folder: Location) -> Container:
    """Returns the container of a folder of such files. Raises FormatError."""
    where = printable(folder)
    files = [path for path in folder.children() if is_file_of(path.name)]
    ranks = _ranks(files, where)
    pieces: dict[str, list[PieceOf]] = defaultdict(list)
    for path in files:
        held = safetensors.read(path)
        places = _places(held, path)
        for name, ref in held.tree.items():
            source: Source = ref.entry
            pieces[name].append(PieceOf(_offsets(places.get(name), source, path), source))
    tree = {name: flat_tensor(_whole(name, found, files[0], where)) for name, found in pieces.items()}
    count = sum(map(len, pieces.values()))
    made = Container(folder, NAME, tree, {}, tuple(files), held_bytes=PIECE_BYTES * count)
    made.own_files = _FILE.pattern
    made.facts["ranks"] = str(ranks)
    return made


def _ranks(files: list[Location], where: str) -> int:
    """Returns the number of ranks. Raises FormatError if the file of one is missing."""
    named = [found for path in files if (found := _FILE.fullmatch(path.name))]
    there = {(int(each["rank"]), int(each["number"]), int(each["count"])) for each in named}
    ranks = {rank for rank, _, _ in there}
    first, last = min(0, *ranks) if 0 in ranks else 1, max(ranks)
    absent = [f"of rank {rank}" for rank in range(first, min(last, first + 100_000)) if rank not in ranks]
    for rank, _, count in sorted(there):
        absent += [f"{n} of rank {rank}" for n in range(1, min(count, 100_000) + 1) if (rank, n, count) not in there]
    if absent:
        raise FormatError(f"{where}: the files {listed(list(dict.fromkeys(absent)))} are absent; copy those of all ranks")
    return len(ranks)


def _places(held: Container, path: Location) -> dict[str, Any]:
    """Returns name -> what a file says about the place of a piece."""
    try:
        told = load_json(held.metadata.get(_PLACES, ""))
    except ValueError as error:
        raise FormatError(f"{printable(path)} does not say where its parts of tensors begin ({_PLACES})") from error
    if not isinstance(told, dict):
        raise FormatError(f"{printable(path)}: {_PLACES} is no JSON object")
    return told


def _offsets(told: Any, source: Source, path: Location) -> tuple[int, ...]:
    values = told.get("saved_offsets") if isinstance(told, dict) else None
    sizes = source.spec.shape
    if not isinstance(values, list) or len(values) != len(sizes) or not all(type(n) is int and n >= 0 for n in values):
        raise FormatError(f"{printable(path)} does not say where its part of {printable(source.spec.name)} begins")
    return tuple(values)


def _whole(name: str, pieces: list[PieceOf], nowhere: Location, where: str) -> Source:
    what = f"{where}: tensor {printable(name)}"
    first = pieces[0].source.spec
    if any(piece.source.spec.dtype != first.dtype or len(piece.sizes) != len(first.shape) for piece in pieces):
        raise FormatError(f"{what} has parts of different dtypes or numbers of axes; the files are of two checkpoints")
    reach = [max(p.offsets[axis] + p.sizes[axis] for p in pieces) for axis in range(len(first.shape))]
    shape = checked_shape(tuple(reach), what)
    check_boxes([(piece.offsets, piece.sizes) for piece in pieces], shape, what)
    return assembled(TensorSpec(name, first.dtype, shape), pieces, nowhere, what)
