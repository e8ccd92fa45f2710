"""Folders of torch.distributed.checkpoint (DCP): each rank's pieces in files of its own, and one pickle that lists them.

``.metadata`` tells the shape of each tensor, its pieces, and where each lies: a range of a ``.distcp`` file that is a whole
archive of torch.save. The pickle is read as an inert tree. FSDP2, torchtitan, accelerate, Lightning, Megatron and NeMo 2
write such folders; they differ in the names of the tensors.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, BinaryIO
from weakref import WeakValueDictionary

from streammerge.errors import FormatError, StreammergeError, listed, printable
from streammerge.formats import archive, safetensors, torch_zip
from streammerge.formats.base import Container
from streammerge.formats.dcp_alike import MOST_BYTES, Likeness, likeness
from streammerge.formats.pieces import PIECE_BYTES, Box, PieceOf, assembled, check_boxes, checked_shape, piece_of_dtype
from streammerge.formats.shards import is_safe
from streammerge.pickles.tree import Global, Instance, TensorRef, flat_tensor, number
from streammerge.pickles.unpickle import unpickle
from streammerge.sources.base import Allocated, Source, read_whole
from streammerge.sources.stored import Stored
from streammerge.stores.base import Location
from streammerge.tensors.dtypes import BY_TORCH_NAME, DType
from streammerge.tensors.spec import TensorSpec
from streammerge.units import counted, decimal_bytes

METADATA = ".metadata"
NAME = "torch distributed checkpoint"
"""What :class:`Container` calls the format."""
_OF_RANK = re.compile(r"__\d+\.metadata")
_RANK = re.compile(r"__(\d+)_\d+\.distcp")
_OPTIMIZER = re.compile(r"(?i)((.*_)?optim(izer)?s?|chained)(_\d+|_states?|_state_dict)?")
_FLAT_OPTIMIZER = re.compile(
    r"state\..+\.(exp_avg|exp_avg_sq|max_exp_avg_sq|step|momentum_buffer|square_avg|sum)|param_groups\..+"
)
_MASTER = re.compile(r"(?:.*?\.)?(?:fp32_param|master_param|param)\.(.+)")
_STEPS = ("iteration", "global_step", "step", "epoch")
_BESIDE = ("meta.pt", "common.pt")
BESIDE = (*_BESIDE, "metadata.json")
"""Files of other programs in such a folder, without which these do not read it."""
_OWN_FILES = r"\.metadata|__\d+\.metadata|__\d+_\d+\.distcp|meta\.pt|common\.pt|metadata\.json"
_MOST_HEAD_BYTES = 2048
_AROUND_BYTES = 2048
"""Before and after the begin of an item: the end of the one before it, which the receipt's digest has, and its head."""
_LISTED_BYTES = 4000
"""Memory of one piece in the tree of ``.metadata``. 3900 were measured."""
_MOST_OBJECT_BYTES = 1 << 20
_MOST_PATH = 32
_COUNTERS = (DType.I64, DType.I32)
_DAMAGE = (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError)


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
    read, the bytes before the data, the length, and what was announced; the archives of the next step begin like them."""

    tensors: dict[str, Entry] = field(default_factory=dict)
    objects: list[str] = field(default_factory=list)
    items: dict[tuple[str, tuple[int, ...] | None], Item] = field(default_factory=dict)
    paths: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    heads: set[tuple[bytes, int, DType, tuple[int, ...]]] = field(default_factory=set, repr=False, compare=False)


Place = tuple[Location, int, int]
"""A file of the checkpoint: where its bytes are. A location, an offset in it, and the number of bytes."""


class Home:
    """A folder that holds the files of a checkpoint. An archive may stand for one."""

    def __init__(self, folder: Location) -> None:
        self.folder, self.where = folder, printable(folder)
        self._places: dict[str, Place | None] = {}

    def names(self) -> list[str]:
        return [path.name for path in self.folder.children()]

    def place(self, name: str) -> Place | None:
        """Returns the place of a file, None if it is absent. Raises FormatError if it is no regular file."""
        if name not in self._places:  # an object store answers late
            path = self.folder / name
            self._places[name] = (path, 0, path.size) if path.lexists() else None
        return self._places[name]


def read(folder: Location) -> Container:
    """Returns the container of a DCP folder. Raises FormatError; nothing in it is executed."""
    return read_home(Home(folder))


def read_home(home: Home) -> Container:
    """Returns the container of a DCP folder, wherever its files are. Raises FormatError."""
    names = home.names()
    names = [METADATA] if METADATA in names else [name for name in names if _OF_RANK.fullmatch(name)]
    told, files = list[Metadata](), list[Location]()
    for name in names:
        place = home.place(name)
        if place is not None:
            told.append(read_metadata(place, f"{home.where}/{name}"))
            files.append(place[0])
    metadata = told[0] if len(told) == 1 else Metadata()
    for of_rank in told if len(told) != 1 else ():
        _add(metadata, of_rank)
    return _Reading(home, metadata, files).container()


# ------------------------------------------------------------------------------------------------------------- .metadata


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


# ---------------------------------------------------------------------------------------------------------- the tensors


def is_optimizer_item(name: str, path: tuple[Any, ...]) -> bool:
    """Whether an entry belongs to the state of an optimizer, by its name and the keys that lead to it."""
    keys = [*path[:-1]] if len(path) > 1 else name.split(".", 2)[:-1]
    return any(isinstance(key, str) and _OPTIMIZER.fullmatch(key) for key in keys[:3]) or (
        _FLAT_OPTIMIZER.fullmatch(name) is not None
    )


def weight_of_master(name: str, entry: Entry, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """Returns the weight of which an optimizer's entry is the copy in float32, by its name in Megatron
    (``optimizer.state.param.WEIGHT``). None for any other entry. ``shapes``: those of the weights."""
    found = _MASTER.fullmatch(name) if entry.dtype is DType.F32 else None
    while found is not None:  # "param" may be a part of a weight's name too
        if shapes.get(found[1]) == entry.shape:
            return found[1]
        found = _MASTER.fullmatch(found[1])
    return None


@dataclass(frozen=True, slots=True)
class Saved:
    """What an output of the same kind takes over: the files, and what ``.metadata`` tells beside the weights. ``told``: all
    that it tells, kept so that it is not read again for the next step of the run."""

    home: Home
    metadata: Metadata
    told: Metadata

    def place(self, item: Item, what: str) -> tuple[Location, int]:
        """Returns the file and the offset of an item. Raises FormatError if it is not there."""
        found = self.home.place(item.file) if is_safe(item.file) else None
        if found is None or item.offset + item.nbytes > found[2]:
            raise FormatError(
                f"{self.home.where}: {printable(item.file)} lacks the entry {printable(what)}; copy that file"
            )
        return found[0], found[1] + item.offset


class _Reading:
    """Makes the container of one folder."""

    def __init__(self, home: Home, metadata: Metadata, files: list[Location]) -> None:
        self.home, self.metadata, self.where = home, metadata, home.where
        self.weights: dict[str, Entry] = {}
        self.left: dict[str, Entry] = {}
        for name, entry in metadata.tensors.items():
            optimizer = is_optimizer_item(name, metadata.paths.get(name, (name,)))
            (self.left if optimizer else self.weights)[name] = entry
        self.files = files
        self.lengths = {len(before) for before, *_ in metadata.heads}

    def container(self) -> Container:
        if not self.weights:
            what = "the state of an optimizer only" if self.left else "no tensors"
            raise FormatError(f"{self.where} holds {what}; give the folder of the weights")
        self._check_entries()
        sources = self._pieces()
        refs: dict[str, TensorRef] = {}
        everything: list[Source] = []
        for name, entry in self.weights.items():
            what = self._what(name)
            pieces = [PieceOf(box[0], sources[name, box[0]]) for box in entry.boxes if math.prod(box[1])]
            spec = TensorSpec(name, _known(entry, what), entry.shape)
            source = assembled(spec, pieces, self.files[0], what)
            everything.append(source)
            refs[name] = flat_tensor(source)
        used = {item.file for (name, _), item in self.metadata.items.items() if name in self.weights}
        places = {name: place for name in sorted(used) if (place := self.home.place(name)) is not None}
        files = tuple(dict.fromkeys((*self.files, *(path for path, _, _ in places.values()))))
        held = PIECE_BYTES * sum(len(entry.boxes) for entry in self.weights.values())
        tree = _nested(refs, self.metadata.paths)
        made = Container(self.home.folder, NAME, tree, {}, files, held_bytes=held, arrays=everything)
        made.own_files = _OWN_FILES
        made.reading_bytes = _LISTED_BYTES * len(self.metadata.items)
        items = {key: item for key, item in self.metadata.items.items() if key[0] not in self.weights}
        beside = Metadata(self.left, self.metadata.objects, items, self.metadata.paths)
        made.distributed = Saved(self.home, beside, self.metadata)
        made.skipped = self._skipped(places)
        made.notes += self._notes()
        made.facts |= self._facts()
        return made

    def _what(self, name: str) -> str:
        return f"{self.where}: tensor {printable(name)}"

    def _check_entries(self) -> None:
        for name, entry in self.weights.items():
            what = self._what(name)
            if "_flat_param" in name:
                raise FormatError(
                    f"{what} holds parameters that FSDP has flattened, which is not read; save them with "
                    "use_orig_params=True, or as a full state dict"
                )
            _known(entry, what)
            check_boxes(entry.boxes, entry.shape, what)

    def _pieces(self) -> dict[tuple[str, tuple[int, ...]], Source]:
        """Returns the source of each piece that is not empty, by the name of its tensor and its offsets."""
        by_file: dict[str, list[tuple[Item, str, Box, DType]]] = defaultdict(list)
        for name, entry in self.weights.items():
            for box in entry.boxes:
                if not math.prod(box[1]):
                    continue
                item = self.metadata.items.get((name, box[0]))
                if item is None:
                    raise FormatError(f"{self._what(name)}: no file is named for its part at {list(box[0])}")
                by_file[item.file].append((item, name, box, _known(entry, "")))
        places = self._places(by_file)
        for file, wanted in by_file.items():
            path, base, _ = places[file]
            begins = (max(base + item.offset - _AROUND_BYTES, 0) for item, *_ in wanted)
            path.store.will_need(path, [(begin, 2 * _AROUND_BYTES) for begin in begins])
        made: dict[tuple[str, tuple[int, ...]], Source] = {}
        for file, wanted in by_file.items():
            path, base, size = places[file]
            wanted.sort(key=lambda each: each[0].offset)
            with path.stream() as stream:
                head = stream.read(9)
                if not base and safetensors.matches(head, size):
                    made |= self._of_safetensors(path, wanted)
                    continue
                end = 0
                for item, name, box, dtype in wanted:
                    what = self._what(name)
                    if item.transforms:
                        raise FormatError(
                            f"{what} is stored with {listed([*item.transforms])}, which is not read; save the checkpoint "
                            "without compression"
                        )
                    if item.offset + item.nbytes > size:
                        raise FormatError(
                            f"{what} ends at byte {item.offset + item.nbytes} of {printable(file)}, which has {size}; the "
                            "file is truncated, so copy it again"
                        )
                    if item.offset < end:
                        raise FormatError(f"{what} overlaps another item of {printable(file)}; such a file is refused")
                    end = item.offset + item.nbytes
                    within = Item(file, base + item.offset, item.nbytes)
                    made[name, box[0]] = self._piece(stream, path, within, TensorSpec(name, dtype, box[1]), what)
        return made

    def _places(self, by_file: Mapping[str, list[tuple[Item, str, Box, DType]]]) -> dict[str, Place]:
        """Returns where the files of the pieces are. Raises FormatError for one that is absent."""
        places = {}
        for file, wanted in by_file.items():
            if not is_safe(file):
                raise FormatError(
                    f"{self.where}: {printable(file)} is not the name of a file in this folder; such metadata are refused"
                )
            place = self.home.place(file)
            if place is None:
                names = listed(sorted({name for _, name, _, _ in wanted}), 4)
                raise FormatError(
                    f"{self.where}: {printable(file)} is absent, which holds parts of {names}; copy the files of all ranks"
                )
            places[file] = place
        return places

    def _piece(self, stream: BinaryIO, path: Location, item: Item, spec: TensorSpec, what: str) -> Source:
        """Returns the source of an item that is an archive of torch.save.

        An archive begins as another one does if its tensor has the same dtype, shape and strides. Then its bytes lie in the
        same place, and nothing more is read of it.
        """
        stream.seek(item.offset)
        head = stream.read(min(item.nbytes, _MOST_HEAD_BYTES))
        for length in self.lengths:
            if (
                head[:length],
                item.nbytes,
                spec.dtype,
                spec.shape,
            ) in self.metadata.heads:  # also a tensor's of another name
                return Stored(spec, path, item.offset + length)
        container = torch_zip.read_stream(stream, path, (item.offset, item.nbytes), what)
        if not isinstance(container.tree, TensorRef):
            raise FormatError(f"{what}: its part in {printable(item.file)} is no tensor; the file is damaged")
        source = piece_of_dtype(container.locate(spec.name, container.tree), spec.dtype, spec.shape, what)
        if source.__class__ is Stored and item.offset < source.begin[1] <= item.offset + _MOST_HEAD_BYTES:
            length = source.begin[1] - item.offset
            self.metadata.heads.add((head[:length], item.nbytes, spec.dtype, spec.shape))
            self.lengths.add(length)
        return source

    def _of_safetensors(
        self, path: Location, wanted: list[tuple[Item, str, Box, DType]]
    ) -> dict[tuple[str, tuple[int, ...]], Source]:
        """Returns the pieces in a file that was written as safetensors."""
        held, made = safetensors.read(path).tree, {}
        for _, name, box, dtype in wanted:
            what = self._what(name)
            if name not in held:
                raise FormatError(f"{what} is not in {printable(path.name)}; the file is damaged")
            made[name, box[0]] = piece_of_dtype(held[name].entry, dtype, box[1], what)
        return made

    def _skipped(self, places: Mapping[str, Place]) -> dict[Location, list[tuple[int, int]]]:
        """Returns the ranges of the used files whose items no merge reads: whole items, or the bytes of an optimizer's
        copies of the weights, which an output has from the merge."""
        skipped: dict[Location, list[tuple[int, int]]] = defaultdict(list)
        shapes = {name: entry.shape for name, entry in self.weights.items()}
        masters = {name for name, entry in self.left.items() if weight_of_master(name, entry, shapes) is not None}
        for (name, offsets), item in self.metadata.items.items():
            if name not in self.weights and item.file in places and item.nbytes:
                path, base, size = places[item.file]
                span = base + item.offset, item.nbytes
                if name in masters and offsets is not None and item.offset + item.nbytes <= size:
                    span = self._within(path, span, self.left[name], offsets) or span
                skipped[path].append(span)
        return skipped

    def _within(
        self, path: Location, span: tuple[int, int], entry: Entry, offsets: tuple[int, ...]
    ) -> tuple[int, int] | None:
        """Returns where the bytes of a tensor lie in its item. None if they are not plain ones."""
        sizes = dict(entry.boxes).get(offsets)
        if sizes is None or entry.dtype is None:
            return None
        with path.stream() as stream:
            try:
                source = self._piece(stream, path, Item("", *span), TensorSpec("", entry.dtype, sizes), "")
            except StreammergeError:
                return None
        return (source.offset, source.spec.nbytes) if source.__class__ is Stored else None

    def _notes(self) -> list[str]:
        notes = []
        if self.left:
            nbytes = sum(math.prod(e.shape) * (e.dtype.element_bytes if e.dtype else 1) for e in self.left.values())
            held = f"{counted(len(self.left), 'tensor')}, {decimal_bytes(nbytes)}"
            notes.append(f"beside the weights, not merged: the state of the optimizer ({held})")
        objects = [name for name in self.metadata.objects if "/shard_" not in name]  # Megatron's are of no interest
        objects = [name for name in objects if not is_optimizer_item(name, self.metadata.paths.get(name, (name,)))]
        if objects:
            notes.append(f"beside the weights, not merged: {listed(objects)}")
        return notes

    def _facts(self) -> dict[str, str]:
        """Returns what is known of the run: how many ranks wrote the checkpoint, and at which step."""
        facts = {}
        ranks = {found[1] for item in self.metadata.items.values() if (found := _RANK.fullmatch(item.file))}
        if ranks:
            facts["ranks"] = str(len(ranks))
        for name, step in sorted(self._steps(), key=lambda each: _STEPS.index(each[0].rpartition(".")[2])):
            facts.setdefault("step", f"{step} ({name})")
        return facts

    def _steps(self) -> Iterator[tuple[str, int]]:
        """Yields the counters of the run, by name. Lightning and Megatron have them in a file of their own."""
        for file in _BESIDE:
            try:
                place = self.home.place(file)
                tree = torch_zip.read(place[0], place[1:]).tree if place is not None else None
            except (StreammergeError, OSError):
                continue
            told = tree if isinstance(tree, dict) else {}
            for key in _STEPS:
                if isinstance(found := number(told.get(key)), int):
                    yield key, found
        for (name, _), item in self.metadata.items.items():
            if name.rpartition(".")[2] not in _STEPS or name in self.left or item.nbytes > _MOST_OBJECT_BYTES:
                continue
            try:
                value = self._number(name, item)
            except (StreammergeError, OSError):
                continue
            if value is not None:
                yield name, value

    def _number(self, name: str, item: Item) -> int | None:
        place = self.home.place(item.file) if is_safe(item.file) else None
        if place is None or item.transforms or item.offset + item.nbytes > place[2]:
            return None
        container = torch_zip.read(place[0], (place[1] + item.offset, item.nbytes))
        found = number(container.tree)
        ref = container.tree
        if isinstance(ref, TensorRef) and ref.dtype in _COUNTERS and math.prod(ref.shape) == 1:
            data = read_whole(container.locate(name, ref), Allocated(lambda location: location.open()))
            found = int.from_bytes(data, "little", signed=True)
        return found if isinstance(found, int) else None


def _known(entry: Entry, what: str) -> DType:
    if entry.dtype is None:
        raise FormatError(f"{what} has dtype {printable(entry.dtype_name)}, which is not supported")
    return entry.dtype


def _nested(refs: Mapping[str, TensorRef], paths: Mapping[str, tuple[Any, ...]]) -> dict[Any, Any]:
    """Returns the tensors as the state dict that was saved. Without paths, a prefix that all share is taken off."""
    tops = {name.partition(".")[0] for name in refs}
    prefixed = not paths and len(tops) == 1 and tops <= {"model", "state_dict"} and all("." in name for name in refs)
    tree: dict[Any, Any] = {}
    for name, ref in refs.items():
        path = paths.get(name) or (tuple(name.split(".", 1)) if prefixed else (name,))
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
            if not isinstance(node, dict):
                break
        if not isinstance(node, dict) or path[-1] in node:
            node, path = tree, (name,)
        if path[-1] in node:
            raise FormatError(f"the name {printable(name)} stands for two entries of a distributed checkpoint")
        node[path[-1]] = ref
    return tree
