"""A checkpoint without its data: which tensors it has, where their bytes are, and what else it says."""

from __future__ import annotations

import struct
from collections.abc import ItemsView, Iterable, Iterator, KeysView, Mapping, Sequence, ValuesView
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

from streammerge.errors import FormatError, RecipeError, StreammergeError, printable
from streammerge.formats import detect
from streammerge.formats.base import MOST_EXPANDED_BYTES, Container
from streammerge.pickles.candidates import AllFound, Found
from streammerge.pickles.state_dict import Selection, select
from streammerge.pickles.tree import Global, TensorRef, is_quantised, number, plain, walk
from streammerge.sources.base import Source
from streammerge.sources.table import StoredTable
from streammerge.stores.base import Location, Status
from streammerge.stores.locations import PathLike, parse
from streammerge.stores.remembering import remembering
from streammerge.tensors.dtypes import DType
from streammerge.tensors.spec import TensorSpec
from streammerge.units import counted, decimal_bytes, inflected

if TYPE_CHECKING:
    from streammerge.recipe.patterns import Rename

_SHOWN = 20
"""Tensors that a notebook shows."""


class QuantisedWeight(NamedTuple):
    """A weight that is stored as several tensors.

    ``source``: its numbers. ``stored``: the names of its tensors in the file, codes first. ``scheme``: what people call the
    way in which it is stored.
    """

    source: Source
    stored: tuple[str, ...]
    scheme: str


@dataclass(slots=True, repr=False, eq=False)
class CheckpointIndex(Mapping[str, Source]):
    """A mapping from the names of tensors to their entries: ``len(index)``, ``index[name]``, iteration over the names.

    As for every mapping, two are equal if their items are: the same tensors of the same file. It is not hashable.

    ``entries``: every tensor of the state dict by name, in its order. ``aliases``: tied name -> the first name of
    the same tensor. ``extras``: the inert tree of a pickled file, None for safetensors. ``files``: all it is read from.
    ``renamed``: name -> its name in the file, where a recipe calls it otherwise. ``parts``: subfolder -> the index of the
    model in it, "" for the folder's own, where a folder holds several models. There a tensor's name begins with its
    subfolder and a slash. ``warnings``: what may be wrong with the checkpoint. ``adapters``: the indexes of adapters that
    its tensors are updated by, and then ``plain``: the checkpoint without them, and ``adapted_as``: its name in a recipe.
    ``made_from``: the models of a stage, whose tensors are merges of theirs, by their names in the recipe. ``homes``: the
    file that each tensor of a stage would be in. ``declared``: the dtype of each tensor that a stage does not round.
    ``quantised``: the weights that are stored as several tensors, by their names in ``entries``, which have their numbers;
    and then ``stored``: the checkpoint with its tensors as they are stored.
    """

    path: Location
    entries: Mapping[str, Source]
    aliases: dict[str, str]
    extras: Any
    metadata: dict[str, str]
    files: tuple[Location, ...]
    container: Container
    selection: Selection
    notes: list[str] = field(default_factory=list)
    renamed: dict[str, str] = field(default_factory=dict)
    parts: dict[str, CheckpointIndex] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    adapters: tuple[CheckpointIndex, ...] = ()
    plain: CheckpointIndex | None = None
    adapted_as: str = ""
    made_from: Mapping[str, CheckpointIndex] = field(default_factory=dict)
    homes: Mapping[str, Location] = field(default_factory=dict)
    declared: Mapping[str, DType] = field(default_factory=dict)
    quantised: Mapping[str, QuantisedWeight] = field(default_factory=dict)
    stored: CheckpointIndex | None = None

    def with_names(self, renames: Sequence[Rename]) -> CheckpointIndex:
        """The same checkpoint under other names. Raises RecipeError where two tensors would have one name."""
        if not renames:
            return self
        from streammerge.recipe.patterns import renamed as renaming

        try:
            names = renaming(self.entries, renames)
        except RecipeError as error:
            raise RecipeError(f"{printable(self.path)}: {error}") from error
        changed = {new: old for old, new in names.items() if new != old}
        entries = {names[old]: entry.named(names[old]) for old, entry in self.entries.items()}
        found = [replace(each, name=names.get(each.name, each.name)) for each in self.selection.tensors]
        told = [f"{printable(self.path)}: {counted(len(changed), 'tensor')} renamed by `rename`"] if changed else []
        return replace(
            self,
            entries=entries,
            aliases={names[name]: names[first] for name, first in self.aliases.items()},
            selection=replace(self.selection, tensors=found),
            notes=[*self.notes, *told],
            renamed=changed,
            homes={names[name]: home for name, home in self.homes.items()},
            declared={names[name]: dtype for name, dtype in self.declared.items()},
            plain=self.plain and self.plain.with_names(renames),
            quantised={names[name]: weight for name, weight in self.quantised.items()},
        )

    def with_tensors(self, tensors: Iterable[tuple[str, TensorRef]]) -> CheckpointIndex:
        """Returns the same checkpoint with other tensors of its tree, under these names. Raises FormatError."""
        entries, aliases = _located(self.path, self.container, tensors)
        made = replace(self, entries=entries, aliases=aliases, extras=None, notes=[], renamed={}, quantised={}, stored=None)
        return replace(made, adapters=(), plain=None) if self.adapters else made

    def share(self, other: CheckpointIndex) -> None:
        """Holds what is equal in two checkpoints, such as the names of tensors, once."""
        if isinstance(self.entries, StoredTable) and isinstance(other.entries, StoredTable):
            self.entries.share(other.entries)

    def only(self, names: AbstractSet[str]) -> CheckpointIndex:
        """Returns the same checkpoint with the tensors of these names."""
        entries = {name: entry for name, entry in self.entries.items() if name in names}
        aliases = {name: first for name, first in self.aliases.items() if name in entries and first in entries}
        return replace(self, entries=entries, aliases=aliases)

    def __len__(self) -> int:
        return len(self.entries)

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def __getitem__(self, name: str) -> Source:
        return self.entries[name]

    def keys(self) -> KeysView[str]:
        return self.entries.keys()

    def values(self) -> ValuesView[Source]:
        return self.entries.values()

    def items(self) -> ItemsView[str, Source]:
        return self.entries.items()

    def specs(self) -> Mapping[str, TensorSpec]:
        """Returns name -> dtype and shape. A table's specifications are without names."""
        if isinstance(self.entries, StoredTable):
            return self.entries.specs()
        return {name: entry.spec for name, entry in self.entries.items()}

    def __repr__(self) -> str:
        held = f"{counted(len(self.entries), 'tensor')}, {decimal_bytes(self.nbytes)}"
        return f"<CheckpointIndex {printable(self.path)}: {self.format}, {held}>"

    def _repr_html_(self) -> str:
        from streammerge.notebook import table

        held = f"{counted(len(self.entries), 'tensor')}, {self.numel:,} parameters, {decimal_bytes(self.nbytes)}"
        facts = [("format", self.format), ("tensors", held)]
        facts += [("state dict", printable(self.selection.label))] if not self.parts else []
        facts += [("tied", f"{len(self.aliases)} names")] if self.aliases else []
        facts += [("note", note) for note in self.notes] + [("warning", warning) for warning in self.warnings]
        shown = list(islice(self.items(), _SHOWN))
        rows = [
            (printable(name), entry.spec.dtype.torch_name, "x".join(map(str, entry.spec.shape)) or "scalar")
            for name, entry in shown
        ]
        more = f"the first {len(shown)} of {len(self.entries)} tensors" if len(self.entries) > len(shown) else ""
        return table(printable(self.adapted_as or self.path), facts, ("tensor", "dtype", "shape"), rows, more)

    @property
    def narrow(self) -> bool:
        """Whether it has dtypes that quantised weights are stored in."""
        table = self.entries if isinstance(self.entries, StoredTable) else None
        kinds = self.specs().values() if table is None else table.distinct().values()
        return any(kind.dtype in _NARROW for kind in kinds)

    @property
    def _computed(self) -> list[Source]:
        return [] if isinstance(self.entries, StoredTable) else list(self.entries.values())

    @property
    def may_be_quantised(self) -> bool:
        """Whether quantised weights may be in it."""
        return self.narrow or any(entry.dequantises for entry in self._computed)

    @property
    def in_memory(self) -> bool:
        """Whether the caller holds it, so that it is in no file."""
        return not self.files

    @property
    def format(self) -> str:
        return self.container.format

    @property
    def numel(self) -> int:
        """Parameters, tied ones counted once."""
        if isinstance(self.entries, StoredTable):
            return self.entries.numel
        return sum(e.spec.numel for n, e in self.entries.items() if n not in self.aliases)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors, tied ones counted once."""
        if isinstance(self.entries, StoredTable):
            return self.entries.nbytes
        return sum(e.nbytes for n, e in self.entries.items() if n not in self.aliases)

    def identities(self) -> dict[Location, Status]:
        """What each file is now, to notice when it changes."""
        return {path: path.status() for each in self.origins() for path in each.files}

    def origins(self) -> list[CheckpointIndex]:
        """Returns the checkpoints whose files its tensors are read from: itself, or for a stage those of its models."""
        if not self.made_from:
            return [self]
        return [*(each for made in self.made_from.values() for each in made.origins()), *self.adapters]

    def classes(self) -> list[str]:
        """Names of the classes and functions that its pickle mentions, none of which was imported."""
        return sorted({n.path for _, n in walk(self.extras) if isinstance(n, Global) and not _is_torch_type(n)})

    def plain_data(self) -> Any:
        """What stands beside the tensors (configuration, step, losses), as JSON-able data; None when there is nothing."""
        if not isinstance(self.extras, dict):
            return None if isinstance(self.extras, TensorRef) else plain(self.extras)
        tops = {c.path[0] for c in self.selection.candidates if c.path}
        rest = {k: v for k, v in self.extras.items() if k not in tops and not isinstance(v, TensorRef)}
        return plain(rest)

    def value(self, key: str) -> float | int | None:
        """A number by its path, such as ``model_loss.eval_loss``: in the plain data, or a tensor of one element."""
        node: Any = self.extras
        for part in key.split("."):
            node = node.get(part) if isinstance(node, dict) else None
        return self._element(key, node) if isinstance(node, TensorRef) else number(node)

    def _element(self, key: str, ref: TensorRef) -> float | int | None:
        """Returns the only element of a tensor; None if it has more, or is of a dtype that no program counts in."""
        form = _FORMS.get(ref.dtype)
        if form is None or any(size != 1 for size in ref.shape):
            return None
        from streammerge.sources.deflated import Damaged, read_small  # here, because few are asked for

        try:
            data = read_small(self.container.locate(key, ref))
        except Damaged:
            return None
        found: float | int = struct.unpack(form, b"\0\0" + data if ref.dtype is DType.BF16 else data)[0]
        return found


_NARROW = frozenset((DType.F8_E4M3, DType.F8_E5M2, DType.F4, DType.I8, DType.U8, DType.I32))
_FORMS = {DType.F64: "<d", DType.F32: "<f", DType.BF16: "<f", DType.F16: "<e", DType.I64: "<q", DType.I32: "<i"}


def _did_you_mean(path: Location) -> str:
    """Returns what stands beside an absent file under nearly the same name, or what to do if the hub has such names."""
    import difflib

    from streammerge.recipe.hub_names import on_the_hub

    try:
        names = [beside.name for beside in path.parent.children()]
    except OSError:
        names = []
    near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.8)
    return f"; did you mean {printable(path.with_name(near[0]))}?" if near else on_the_hub(str(path))


def _check_expansion(path: Location, container: Container, entries: list[Source]) -> None:
    """Many small storages expanded, or one seen by many tensors, would fill a disk when they are written out."""
    total, stored = sum(e.nbytes for e in entries), sum(s.nbytes for s in container.storages.values())
    if total > MOST_EXPANDED_BYTES + 16 * stored:
        raise FormatError(
            f"{printable(path)}: its tensors claim {total} bytes over {stored} stored; they are expanded beyond reason"
        )


def _is_torch_type(node: Global) -> bool:
    return node.module == "torch" or node.module.startswith("torch.storage") or node.path == "collections.OrderedDict"


def open_checkpoint(place: PathLike, state_dict: str | None = None, ema: str = "ignore") -> CheckpointIndex:
    """The index of a file or folder; nothing in it is executed and no tensor is read.

    Raises FormatError for what cannot be read and RecipeError when ``state_dict`` or ``ema`` ask for what is not there.
    """
    path = parse(place)
    with remembering():
        return _opened(path, state_dict, ema)


def _opened(path: Location, state_dict: str | None, ema: str) -> CheckpointIndex:
    if not path.exists():
        raise RecipeError(path.broken_link() or f"{printable(path)} does not exist{_did_you_mean(path)}")
    try:
        container = detect.read(path)
    except StreammergeError:
        raise
    except OSError as error:
        raise FormatError(f"{printable(path)} cannot be read ({printable(error.strerror or error)})") from error
    made = index_of(container, path, state_dict, ema)
    if is_shard_of_model(path.name) and path.is_file():
        made.notes.append(f"{printable(path)} is one shard of a checkpoint; its folder is the whole")
    return made


def is_shard_of_model(name: str) -> bool:
    """Whether a file has the name of one shard of a model."""
    if "-of-" not in name:
        return False
    from streammerge.formats.file_names import is_shard, is_whole_model  # here, because most files are whole

    return is_whole_model(name) and is_shard(name)


def index_of(container: Container, path: Location, state_dict: str | None = None, ema: str = "ignore") -> CheckpointIndex:
    """The index of a container that was read already. ``path``: what messages call it. Raises as for a file."""
    if container.parts:
        return _of_parts(container, path, state_dict, ema)
    try:
        selection = select(container.tree, state_dict, ema)
    except StreammergeError as error:
        raise type(error)(f"{printable(path)}: {error}") from error
    entries: Mapping[str, Source]
    if isinstance(selection.tensors, AllFound):  # all of a table
        entries, aliases = container.tree.table, dict[str, str]()
    else:
        entries, aliases = _located(path, container, ((found.name, found.ref) for found in selection.tensors))
    extras = container.tree if container.pickled else None
    notes = [*container.notes, *(f"{printable(path)}: {note}" for note in selection.notes)]
    integers = sum(is_quantised(found.ref) for found in selection.tensors) if container.pickled else 0
    if integers:
        verb = inflected(integers, "is", "are")
        notes.append(f"{printable(path)}: {counted(integers, 'quantised tensor')} of torch {verb} read as float32")
    return CheckpointIndex(
        path,
        entries,
        aliases,
        extras,
        container.metadata,
        container.files,
        container,
        selection,
        notes,
        warnings=container.warnings,
    )


def _located(
    path: Location, container: Container, tensors: Iterable[tuple[str, TensorRef]]
) -> tuple[dict[str, Source], dict[str, str]]:
    """Returns name -> source of these tensors, and tied name -> the first name of the same tensor."""
    entries: dict[str, Source] = {}
    aliases: dict[str, str] = {}
    places: dict[tuple[object, ...], str] = {}
    pickled, loose = container.pickled, list[Source]()
    for name, ref in tensors:
        if name in entries:
            raise FormatError(f"{printable(path)}: the name {printable(name)} stands for two tensors")
        entry = entries[name] = container.locate(name, ref)
        if not pickled:  # tensors of a safetensors file have bytes of their own
            continue
        if entry.nbytes:
            first = places.setdefault(entry.place, name)
            if first != name:
                aliases[name] = first
                continue
        if ref.entry is None:
            loose.append(entry)
    if pickled:
        _check_expansion(path, container, loose)
    return entries, aliases


def _of_parts(container: Container, path: Location, state_dict: str | None, ema: str) -> CheckpointIndex:
    """The index of a folder that holds several models. A ``state_dict`` is that of the folder's own model."""
    if state_dict is not None and "" not in container.parts:
        raise RecipeError(f"{printable(path)} holds several models, so `state_dict` cannot name one; give a subfolder")
    parts = {
        name: index_of(part, path / name, state_dict if not name else None, ema) for name, part in container.parts.items()
    }
    made = next(iter(parts.values()))
    entries: dict[str, Source] = {}
    aliases: dict[str, str] = {}
    tensors: list[Found] = []
    notes = [*container.notes]
    for name, part in parts.items():
        prefix = f"{name}/" if name else ""
        for own, entry in part.entries.items():
            if prefix + own in entries:
                raise FormatError(f"{printable(path)}: the name {printable(prefix + own)} stands for two tensors")
            entries[prefix + own] = entry.named(prefix + own)
        aliases |= {prefix + own: prefix + first for own, first in part.aliases.items()}
        tensors += [replace(found, name=prefix + found.name) for found in part.selection.tensors]
        notes += part.notes
    selection = replace(
        made.selection,
        tensors=tensors,
        chosen=[each for part in parts.values() for each in part.selection.chosen],
        candidates=[each for part in parts.values() for each in part.selection.candidates],
    )
    extras = made.extras if "" in parts else None
    notes = list(dict.fromkeys(notes))
    files, metadata, warnings = container.files, container.metadata, container.warnings
    return CheckpointIndex(
        path, entries, aliases, extras, metadata, files, container, selection, notes, parts=parts, warnings=warnings
    )
