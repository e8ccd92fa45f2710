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
from dataclasses import dataclass

from streammerge.errors import FormatError, StreammergeError, listed, printable
from streammerge.formats import safetensors, torch_zip
from streammerge.formats.base import Container
from streammerge.formats.dcp_items import Heads, number_in
from streammerge.formats.dcp_metadata import Entry, Item, Metadata, Place, joined, read_metadata
from streammerge.formats.dcp_names import is_beside_weights, is_optimizer_item, nested, weight_of_master
from streammerge.formats.pieces import PIECE_BYTES, Box, PieceOf, assembled, check_boxes, piece_of_dtype
from streammerge.formats.shards import is_safe
from streammerge.pickles.tree import TensorRef, flat_tensor, number
from streammerge.sources.base import Source
from streammerge.stores.base import Location
from streammerge.tensors.dtypes import DType
from streammerge.tensors.spec import TensorSpec
from streammerge.units import counted, decimal_bytes

METADATA = ".metadata"
NAME = "torch distributed checkpoint"
"""What :class:`Container` calls the format."""
_OF_RANK = re.compile(r"__\d+\.metadata")
_RANK = re.compile(r"__(\d+)_\d+\.distcp")
_STEPS = ("iteration", "global_step", "step", "epoch")
_COMMON = "common_state/shard_0_1"
"""The entry in which Megatron stores what no rank has for itself. Versions before 0.19 write it as common.pt."""
_BESIDE = ("meta.pt", "common.pt")
BESIDE = (*_BESIDE, "metadata.json")
"""Files of other programs in such a folder, without which these do not read it."""
_OWN_FILES = r"\.metadata|__\d+\.metadata|__\d+_\d+\.distcp|meta\.pt|common\.pt|metadata\.json"
_AROUND_BYTES = 2048
"""Before and after the begin of an item: the end of the one before it, which the receipt's digest has, and its head."""
_LISTED_BYTES = 4000
"""Memory of one piece in the tree of ``.metadata``. 3900 were measured."""
_MOST_OBJECT_BYTES = 1 << 20


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
    return _Reading(home, joined(told), files).container()


class _Reading:
    """Makes the container of one folder."""

    def __init__(self, home: Home, metadata: Metadata, files: list[Location]) -> None:
        self.home, self.metadata, self.where = home, metadata, home.where
        self.weights: dict[str, Entry] = {}
        self.left: dict[str, Entry] = {}
        for name, entry in metadata.tensors.items():
            beside = is_beside_weights(name, metadata.paths.get(name, (name,)))
            (self.left if beside else self.weights)[name] = entry
        self.files = files
        self.heads = Heads(metadata.heads)

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
        tree = nested(refs, self.metadata.paths)
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
                    made[name, box[0]] = self.heads.piece(stream, path, within, TensorSpec(name, dtype, box[1]), what)
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
                    span = self.heads.within(path, span, self.left[name], offsets) or span
                skipped[path].append(span)
        return skipped

    def _notes(self) -> list[str]:
        notes = []
        if self.left:
            nbytes = sum(math.prod(e.shape) * (e.dtype.element_bytes if e.dtype else 1) for e in self.left.values())
            held = f"{counted(len(self.left), 'tensor')}, {decimal_bytes(nbytes)}"
            of_optimizer = all(map(self._is_of_optimizer, self.left))
            what = "optimizer" if of_optimizer else "training"
            notes.append(f"beside the weights, not merged: the state of the {what} ({held})")
        objects = [name for name in self.metadata.objects if "/shard_" not in name]  # Megatron's are of no interest
        objects = [name for name in objects if not self._is_of_optimizer(name)]
        if objects:
            notes.append(f"beside the weights, not merged: {listed(objects)}")
        return notes

    def _is_of_optimizer(self, name: str) -> bool:
        return is_optimizer_item(name, self.metadata.paths.get(name, (name,)))

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
        """Yields the counters of the run, by name. Lightning and Megatron have them in a file or an entry of their own."""
        for file in _BESIDE:
            place = self.home.place(file)
            if place is not None:
                yield from self._counters(place)
        if (place := self._object(self.metadata.items.get((_COMMON, None)))) is not None:
            yield from self._counters(place)
        for (name, _), item in self.metadata.items.items():
            if name.rpartition(".")[2] not in _STEPS or self._is_of_optimizer(name):
                continue
            try:
                value = number_in(place, name) if (place := self._object(item)) is not None else None
            except (StreammergeError, OSError):
                continue
            if value is not None:
                yield name, value

    def _counters(self, place: Place) -> Iterator[tuple[str, int]]:
        """Yields the counters in a dictionary that torch.save has written."""
        try:
            tree = torch_zip.read(place[0], place[1:]).tree
        except (StreammergeError, OSError):
            return
        if isinstance(tree, list) and len(tree) == 1:  # as Megatron stores an object
            tree = tree[0]
        told = tree if isinstance(tree, dict) else {}
        for key in _STEPS:
            if isinstance(found := number(told.get(key)), int):
                yield key, found

    def _object(self, item: Item | None) -> Place | None:
        """Returns where an item lies that is short enough for an object. None if it does not, or is compressed."""
        if item is None or item.transforms or item.nbytes > _MOST_OBJECT_BYTES:
            return None
        place = self.home.place(item.file) if is_safe(item.file) else None
        if place is None or item.offset + item.nbytes > place[2]:
            return None
        return place[0], place[1] + item.offset, item.nbytes


def _known(entry: Entry, what: str) -> DType:
    if entry.dtype is None:
        raise FormatError(f"{what} has dtype {printable(entry.dtype_name)}, which is not supported")
    return entry.dtype
