"""What the metadata of a distributed checkpoint tell: its tensors with their pieces, and where each piece lies.

The pickle is read as an inert tree, and the tree as plain data. Nothing else is believed: every size is a natural number,
and every name a text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, BinaryIO
from weakref import WeakValueDictionary

from streammerge.errors import FormatError, printable
from streammerge.formats import archive
from streammerge.formats.dcp_alike import MOST_BYTES, Likeness, likeness
from streammerge.formats.pieces import Box, checked_shape
from streammerge.pickles.tree import Global, Instance
from streammerge.pickles.unpickle import unpickle
from streammerge.stores.base import Location
from streammerge.tensors.dtypes import BY_TORCH_NAME, DType

_MOST_PATH = 32
_DAMAGE = (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError)


Place = tuple[Location, int, int]
"""A file of the checkpoint: where its bytes are. A location, an offset in it, and the number of bytes."""
Head = tuple[bytes, int, DType, tuple[int, ...]]
"""The bytes before the data of an archive, its length, and the dtype and shape that it was announced to hold."""


@dataclass(frozen=True, slots=True)
class Item:
    """Where a piece or an object lies: a range of a file in the folder."""

    file: str
    offset: int
    nbytes: int
    transforms: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor as ``.metadata`` tells it. ``boxes``: the offsets and sizes of its pieces."""

    dtype: DType | None
    dtype_name: str
    shape: tuple[int, ...]
    boxes: list[Box]


@dataclass
class Metadata:
    """What ``.metadata`` tells. ``items``: (name, offsets) of a piece, or (name, None) of an object -> where it lies. It
    has no slots, since it is referred to weakly.

    ``paths``: name -> the keys that lead to it in the state dict, where they are known. ``heads``: of archives that were
    read; the archives of the next step begin like them."""

    tensors: dict[str, Entry] = field(default_factory=dict)
    objects: list[str] = field(default_factory=list)
    items: dict[tuple[str, tuple[int, ...] | None], Item] = field(default_factory=dict)
    paths: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    heads: set[Head] = field(default_factory=set, repr=False, compare=False)


_KNOWN: WeakValueDictionary[Likeness, Metadata] = WeakValueDictionary()
"""What is known of files that a container was made of, by their likeness. Nobody changes it, but for its ``heads``."""


def read_metadata(place: Place, where: str) -> Metadata:
    """Returns what a ``.metadata`` file tells, which is not to be changed. Raises FormatError; nothing in it is executed.

    The steps of a run tell the same, so one is read for all.
    """
    path, offset, nbytes = place
    with path.stream() as whole:
        stream = archive.within(whole, (offset, nbytes))
        if nbytes > MOST_BYTES:
            return _read(stream, where)
        data = stream.read()
    alike = likeness(data)
    if alike is None:
        return _read(data, where)
    known = _KNOWN.get(alike)
    if known is None:
        known = _KNOWN[alike] = _read(data, where)
    return known


def _read(source: bytes | BinaryIO, where: str) -> Metadata:
    tree = unpickle(source, where=where)
    try:
        return _metadata(tree, where)
    except _DAMAGE as error:
        raise FormatError(
            f"{where} is no metadata of a distributed checkpoint, or is damaged ({type(error).__name__}: "
            f"{printable(error)}); nothing was executed"
        ) from error


def _metadata(tree: Any, where: str) -> Metadata:
    fields, made = _state(tree, "Metadata"), Metadata()
    known: dict[int, tuple[int, ...]] = {}
    for name, told in _mapping(fields["state_dict_metadata"]).items():
        name = _text(name)
        if _class(told) == "BytesStorageMetadata":
            made.objects.append(name)
            continue
        told = _state(told, "TensorStorageMetadata")
        what = f"{where}: tensor {printable(name)}"
        boxes = []
        for chunk in told["chunks"]:
            place = _state(chunk, "ChunkStorageMetadata")
            boxes.append((_sizes(place["offsets"], known), checked_shape(_sizes(place["sizes"], known), what)))
        shape = checked_shape(_sizes(told["size"], known), what)
        kind = _dtype_name(told["properties"])
        made.tensors[name] = Entry(BY_TORCH_NAME.get(kind), kind, shape, boxes)
    for key, place in _mapping(fields.get("storage_data") or {}).items():
        index, info = _state(key, "MetadataIndex"), _state(place, "_StorageInfo")
        offset = index.get("offset")
        at = None if offset is None else _sizes(offset, known)
        item = Item(
            _text(info["relative_path"]),
            _natural(info["offset"]),
            _natural(info["length"]),
            tuple(map(_text, info.get("transform_descriptors") or ())),
        )
        made.items[_text(index["fqn"]), at] = item
    planner = fields.get("planner_data")
    for name, path in planner.items() if isinstance(planner, dict) else ():
        if isinstance(path, tuple) and path and len(path) <= _MOST_PATH and all(isinstance(k, str | int) for k in path):
            made.paths[_text(name)] = path
    return made


def _class(node: Any) -> str:
    return node.path.rpartition(".")[2] if isinstance(node, Instance) else type(node).__name__


def _state(node: Any, name: str) -> Mapping[str, Any]:
    """Returns the fields of an object of this class."""
    if _class(node) != name or not isinstance(node.state, dict):
        raise ValueError(f"{name} expected, {_class(node)} found")
    return node.state


def _mapping(node: Any) -> dict[Any, Any]:
    if not isinstance(node, dict):
        raise TypeError(f"a dictionary expected, {_class(node)} found")
    return node


def _text(value: Any) -> str:
    if not isinstance(value, str) or len(value) > 4000:
        raise ValueError("a name is not a text")
    return value


def _natural(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 62:
        raise ValueError("a size or an offset is no natural number")
    return value


def _sizes(node: Any, known: dict[int, tuple[int, ...]]) -> tuple[int, ...]:
    """Returns a torch.Size. ``known``: those that were looked at before, since pickles mention them again."""
    if (found := known.get(id(node))) is not None:
        return found
    values = node.args[0] if isinstance(node, Instance) and node.path == "torch.Size" and node.args else node
    if not isinstance(values, tuple | list):
        raise TypeError("a shape is no tuple")
    made = known[id(node)] = tuple(map(_natural, values))
    return made


def _dtype_name(properties: Any) -> str:
    """Returns the name of a dtype. The state of the properties is a tuple, or a dictionary in older versions."""
    state = properties.state if isinstance(properties, Instance) else None
    kind = state.get("dtype") if isinstance(state, dict) else state[0] if isinstance(state, tuple) and state else None
    if not isinstance(kind, Global) or kind.module != "torch":
        raise ValueError("a dtype is not one of torch")
    return kind.name


# ---------------------------------------------------------------------------------------------------------- ranks


def joined(told: Sequence[Metadata]) -> Metadata:
    """Returns what the metadata of all ranks tell together."""
    if len(told) == 1:
        return told[0]
    made = Metadata()
    for of_rank in told:
        _add(made, of_rank)
    return made


def _add(made: Metadata, of_rank: Metadata) -> None:
    """Adds what another rank tells. A piece that several ranks have counts once."""
    for name, entry in of_rank.tensors.items():
        known = made.tensors.setdefault(name, entry)
        if known is not entry:
            if (known.dtype_name, known.shape) != (entry.dtype_name, entry.shape):
                raise FormatError(
                    f"the tensor {printable(name)} has another dtype or shape in the metadata of another rank"
                )
            there = set(known.boxes)
            more = [box for box in entry.boxes if box not in there]
            made.tensors[name] = replace(known, boxes=[*known.boxes, *more])
    made.objects += [name for name in of_rank.objects if name not in made.objects]
    made.items = {**of_rank.items, **made.items}
    made.paths = {**of_rank.paths, **made.paths}
