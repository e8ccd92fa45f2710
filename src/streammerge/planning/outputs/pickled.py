"""Plans a ``.pth`` or ``.pkl`` output: the tree of the first input with its tensors replaced and stale parts removed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from streammerge.checkpoints.index import CheckpointIndex
from streammerge.errors import RecipeError, listed, printable
from streammerge.formats import plain_pickle, torch_zip
from streammerge.formats.base import LayoutFile
from streammerge.formats.records import RECEIPT_KEY, RECIPE_KEY
from streammerge.pickles.arrays import array_over, is_array, native, numpy_dtype
from streammerge.pickles.candidates import Found
from streammerge.pickles.repickle import Edit, storage_ref, stream
from streammerge.pickles.tree import Blank, Enclosed, OrderedTree, StorageRef, TensorRef, is_quantised, mapping_items, walk
from streammerge.planning.aligned import Merged
from streammerge.planning.alignment import Alignment
from streammerge.planning.conservation import Account
from streammerge.planning.copies import AlignedCopy, align_copies, record_entries
from streammerge.planning.dispositions.entries import Entries, decide
from streammerge.planning.dispositions.ledger import Dispositions
from streammerge.planning.outputs.bookkeeping import drop_facts, merge_bookkeeping
from streammerge.planning.outputs.layout import (
    PLAIN_ENDINGS,
    Accounting,
    Layout,
    Placed,
    PlannedOutput,
    blank_sums,
    recipe_record,
    stays_enclosed,
)
from streammerge.planning.receipt import ITSELF
from streammerge.planning.views import Indexes
from streammerge.recipe.document import to_yaml
from streammerge.recipe.model import Recipe
from streammerge.sources.base import Source
from streammerge.sources.inline import Inline
from streammerge.tensors.dtypes import DType
from streammerge.tensors.spec import TensorSpec, contiguous_strides

"""Names of plain pickles. An input of torch's keeps its container under such a name."""
_BARE = TensorRef(StorageRef("", None, 0), DType.F32, 0, (), ())
"""A tensor without a wrapper."""
_COPIES = 4
"""Copies of a pickle in memory at once while it is written: in the layout, sealed, joined, checksummed."""


@dataclass(frozen=True, slots=True)
class PickledFile:
    """A planned archive, its tensors with their places, and the blank checksums that a receipt has of it."""

    file: LayoutFile
    placed: list[Placed]
    notes: list[str]
    dispositions: Dispositions
    sums: str
    pickle_bytes: int


def pickled_output(
    name: str, recipe: Recipe, base: CheckpointIndex, indexes: Indexes, alignment: Alignment, accounting: Accounting
) -> PlannedOutput:
    made, accounts = accounting.receipt, list[Account]()

    def beside(sums: str, dispositions: Dispositions, held: Iterable[Merged | Source]) -> dict[str, bytes]:
        nonlocal made, accounts
        made, accounts = accounting.of(held)
        made = replace(made, checksums={ITSELF: sums}, dispositions=dispositions.record())
        record = recipe_record(recipe)
        texts = {RECIPE_KEY: to_yaml(record).encode()} if record else {}
        return texts | {RECEIPT_KEY: made.text().encode()}

    planned = pickled_file(name, recipe, base, indexes, alignment, beside)
    layout = Layout((planned.file,), made, pickle_bytes=planned.pickle_bytes)
    return PlannedOutput(layout, planned.placed, planned.notes, dispositions=planned.dispositions, accounts=accounts)


def pickled_file(
    name: str,
    recipe: Recipe,
    base: CheckpointIndex,
    indexes: Indexes,
    alignment: Alignment,
    beside: Callable[[str, Dispositions, Iterable[Merged | Source]], dict[str, bytes]],
    flat: bool = False,
) -> PickledFile:
    """Plans one file. ``beside``: makes recipe and receipt, by their keys, from the blank checksums, the decisions and the
    tensors.

    ``flat``: it holds a flat state dict of the merged tensors instead of the first input's tree.
    """
    merged = list(alignment.merged)
    if base.format == "TorchScript archive":
        raise RecipeError(
            f"{printable(base.path)} is a TorchScript archive, which is code and cannot be written again; "
            "write a .safetensors file, or a .pth with a plain checkpoint as the first input"
        )
    plain = _is_plain(name, base)
    tree, holders = _tree(base, merged, flat, plain)
    moved = alignment.restacked or any(m.base_names[0] not in base.entries for m in merged if not m.added)
    if holders is None and moved:
        raise RecipeError(
            f"a .pth has the container of its first input, {printable(base.path)}, in which no layers can be moved; "
            "write a .safetensors file or a folder"
        )
    edit = Edit()
    builder = _Builder(edit, plain, plain and holders is not None)
    notes: list[str] = []
    dispositions = Dispositions()
    dispositions.update(alignment.dispositions)
    if name.endswith(PLAIN_ENDINGS) and not plain:
        notes.append(
            f"{printable(name)} has the container of the first input, which torch.load reads and pickle.load does not"
        )
    if base.container.format.startswith("PyTorch ") and base.container.format != "PyTorch zip":
        notes.append(
            f"{printable(base.path)} is in the {base.container.format} format; the output is in today's zip format"
        )
    for m in merged:
        builder.place_merged(m)
    if holders is None:
        home = {name: m.spec.name for m in merged for name in m.base_names if not m.added}
        entries = decide(recipe, indexes, base)
        copies = align_copies(recipe, base, entries, alignment)
        _add(base, indexes, [m for m in merged if m.added], edit, builder)
        renames = _edit_first(base, recipe, home, edit, builder)
        for own, found, chosen in entries.averaged:
            if chosen in home:
                _put(found, builder.standing_in(own, found, home[chosen], base.entries[chosen]), edit, builder)
        _edit_beside(entries, copies, renames, edit, builder)
        notes += record_entries(entries, copies, dispositions)
        if len(alignment.shares) > 1:
            said = merge_bookkeeping([tree for tree, _ in alignment.shares], [w for _, w in alignment.shares], edit)
            if said:
                notes.append(f"bookkeeping: {', '.join(said)}")
                dispositions.add("entry", said, "edited", "bookkeeping")
            notes += drop_facts([tree for tree, _ in alignment.shares], edit, dispositions)
        builder.place_rest(tree, base, home)
    else:
        for key, m in holders.items():
            edit.replaced[id(tree[key])] = builder.stand_in(m.spec.name, tree[key])
    sums = blank_sums([spec.nbytes for spec, _, _ in builder.tensors.values()])
    told = beside(sums, dispositions, filter(None, (m or source for _, m, source in builder.tensors.values())))
    if plain:
        pickle = stream(tree, edit, headers=[plain_pickle.header(key, text) for key, text in told.items()])
        file = plain_pickle.plan_layout(name, pickle, told[RECEIPT_KEY])
    else:
        pickle = stream(tree, edit)
        file = torch_zip.plan_layout(name, pickle, builder.storages, base.container.magic, told)
    pickle_bytes = sum(len(part) for part in pickle if isinstance(part, bytes))
    if base.container.enclosed is not None and stays_enclosed(name, base):
        inner = file.size
        file = base.container.enclosed(file)
        pickle_bytes += file.size - inner
    placed = [Placed(spec, m, 0, file.offsets[n], source) for n, (spec, m, source) in builder.tensors.items()]
    return PickledFile(file, placed, notes, dispositions, sums, _COPIES * pickle_bytes)


def _is_plain(name: str, base: CheckpointIndex) -> bool:
    """Whether an output is a plain pickle: by its name, or since the first input is one and has such a name."""
    if name.endswith(PLAIN_ENDINGS):
        return not base.format.startswith("PyTorch")
    return base.format == plain_pickle.NAME and not base.in_memory and name.endswith(base.path.suffix or name)


def _tree(base: CheckpointIndex, merged: list[Merged], flat: bool, plain: bool) -> tuple[Any, dict[str, Merged] | None]:
    """Returns the first input's own tree, or a flat state dict if the first input has no tree that can be written.

    For a flat state dict, also returns its key -> the merged tensor; else None.
    """
    if base.extras is not None and base.format != "sharded PyTorch" and not flat:
        return base.extras, None
    tree: dict[Any, Any] = {} if plain else OrderedTree()
    holders: dict[str, Merged] = {}
    for m in merged:
        for name in (m.spec.name, *m.tied):
            tree[name] = replace(_BARE)
            holders[name] = m
    return tree, holders


class _Builder:
    """Gives every tensor of a pickle its own bytes: a storage, or for an array of numpy a blank in the pickle.

    ``plain``: the output is a plain pickle, in which storages are blanks too. ``arrays``: every tensor is an array.
    """

    def __init__(self, edit: Edit, plain: bool, arrays: bool) -> None:
        self.edit, self.plain, self.arrays = edit, plain, arrays
        self.storages: dict[str, tuple[str, int]] = {}
        self.tensors: dict[str, tuple[TensorSpec, Merged | None, Source | None]] = {}
        self._merged: dict[str, Merged] = {}
        self._made: dict[tuple[str, bool], StorageRef] = {}
        self._copies: dict[tuple[object, ...], StorageRef] = {}
        self._dtypes: dict[DType, Any] = {}

    def place_merged(self, merged: Merged) -> None:
        """Makes a merged tensor known. It gets its bytes where it is put into the tree."""
        self._merged[merged.spec.name] = merged

    def _home(self, name: str, as_array: bool) -> StorageRef:
        """Returns the bytes of a merged tensor in a storage or in an array. A tensor that stands as both has them twice."""
        made = self._made.get((name, as_array))
        if made is None:
            merged = self._merged[name]
            made = self._made[name, as_array] = self._place(merged.spec, merged, None, as_array)
        return made

    def _place(self, spec: TensorSpec, merged: Merged | None, source: Source | None, as_array: bool) -> StorageRef:
        label = spec.name
        while label in self.tensors:
            label += "'"
        self.tensors[label] = (spec, merged, source)
        if as_array:
            return Blank.of(label, spec.nbytes)
        key = label if self.plain else str(len(self.storages))
        self.storages[label] = (key, spec.nbytes)
        made = storage_ref(key, spec.dtype, spec.numel)
        return Enclosed(key, made.dtype, made.numel) if self.plain else made

    def _fresh(self, spec: TensorSpec, storage: StorageRef, like: TensorRef | None) -> TensorRef:
        if isinstance(storage, Blank) and not isinstance(storage, Enclosed):
            return array_over(storage, spec.dtype, spec.shape, like, self._dtype(spec, like))
        made = TensorRef(storage, spec.dtype, 0, spec.shape, contiguous_strides(spec.shape))
        if like is not None:
            made.requires_grad, made.state = like.requires_grad, like.state
            made.wrapper = () if is_quantised(like) else like.wrapper
        return made

    def _dtype(self, spec: TensorSpec, like: TensorRef | None) -> Any:
        """Returns the pickled dtype of an array: the input's where it is the same."""
        if like is not None and is_array(like) and native(like.wrapper[3], spec.dtype):
            return like.wrapper[3]
        if spec.dtype not in self._dtypes:
            self._dtypes[spec.dtype] = numpy_dtype(spec.dtype)
        if self._dtypes[spec.dtype] is None:
            raise RecipeError(
                f"{printable(spec.name)} would be an array of {spec.dtype.torch_name}, which numpy does not have; "
                "pass another `dtype`, or write a .safetensors file"
            )
        return self._dtypes[spec.dtype]

    def stand_in(self, name: str, node: TensorRef) -> TensorRef:
        """Returns a tensor over the bytes of the merged tensor ``name``: an array if ``node`` is one, else with its
        wrapper."""
        spec = self._merged[name].spec
        return self._fresh(spec, self._home(name, self.arrays or is_array(node)), node)

    def added(self, name: str, like: TensorRef) -> TensorRef:
        """Returns the merged tensor ``name`` for a new entry: an array if its neighbour ``like`` is one."""
        return self.stand_in(name, like if is_array(like) else _BARE)

    def standing_in(self, own: str, found: Found, name: str, entry: Source) -> str:
        """Returns the name of the tensor that stands in the place of ``found``: the merged tensor ``name``, made of
        ``entry``, or the same in the dtype of ``found``."""
        merged = self._merged[name]
        spec = merged.spec
        dtype = found.ref.dtype if found.node is None else found.node.dtype
        if dtype is spec.dtype or spec.dtype is not entry.spec.dtype or dtype.kind != spec.dtype.kind:
            return name
        self.place_merged(replace(merged, spec=replace(spec, name=own, dtype=dtype), tied=()))
        return own

    def place_rest(self, tree: Any, base: CheckpointIndex, home: dict[str, str]) -> None:
        """Copies from the first input all tensors that are still reachable and were not merged.

        A tensor that is a merged tensor under another path becomes that one. ``home``: base name -> merged name.
        """
        merged = {(base.plain or base).entries[name].place: made for name, made in home.items()}
        nodes = deque(walk(tree, self.edit.skipped()))
        while nodes:
            path, node = nodes.popleft()
            if id(node) in self.edit.replaced:
                continue
            if isinstance(node, TensorRef) and is_quantised(node):  # it stays as it is, with its integers and scales
                nodes.extend(((*path, *below), part) for below, part in walk(node.wrapper[1]))
                continue
            if isinstance(node, TensorRef):
                if is_array(node) and isinstance(node.entry, Inline):
                    continue  # its bytes stay in the pickle
                name = ".".join(map(str, path))
                entry = base.container.locate(name, node)
                if entry.nbytes and entry.place in merged:
                    self.edit.replaced[id(node)] = self.stand_in(merged[entry.place], node)
                    continue
                storage = self._copies.get(entry.place)
                if storage is None:
                    storage = self._place(entry.spec, None, entry, self.arrays or is_array(node))
                    self._copies[entry.place] = storage
                self.edit.replaced[id(node)] = self._fresh(entry.spec, storage, node)
            elif isinstance(node, StorageRef):
                octets = TensorRef(StorageRef(node.key, None, node.nbytes), DType.U8, 0, (node.nbytes,), (1,))
                entry = base.container.locate(f"storage {node.key}", octets)
                made = self._place(entry.spec, None, entry, as_array=False)
                self.edit.replaced[id(node)] = type(made)(made.key, node.dtype, node.numel, kind=node.kind)


def _edit_first(
    base: CheckpointIndex, recipe: Recipe, home: dict[str, str], edit: Edit, builder: _Builder
) -> dict[str, tuple[Any, str]]:
    """Puts the merged tensors into the first input's tree. Returns name -> (key, new key) of those that are renamed."""
    selection, renames = base.selection, dict[str, tuple[Any, str]]()
    codes = {weight.stored[0]: name for name, weight in base.quantised.items()}  # a pack has another name than its numbers
    for found in selection.tensors:
        name = found.name if found.name in home else codes.get(found.name, "")
        if name not in home:
            _drop(found.name, found.holder, found.key, edit)
            continue
        _put(found, home[name], edit, builder)
        written = recipe.output_name(name)
        if written != base.renamed.get(found.name, found.name):
            if found.holder is None or selection.chosen[0].kind != "state dict":
                raise RecipeError("tensors of a state dict only can be renamed in a .pth; write a .safetensors file")
            key = edit.renamed[id(found.holder), found.key] = _key(base, found, written)
            renames[found.name] = found.key, key
    return renames


def _put(found: Found, name: str, edit: Edit, builder: _Builder) -> None:
    """Puts the tensor ``name`` of the output into the place of a tensor of the tree."""
    node = found.node or found.ref
    made = builder.stand_in(name, node)
    already = edit.replaced.setdefault(id(node), made)
    if already is not made and already.storage is not made.storage and found.holder is not None:
        edit.values[id(found.holder), found.key] = made


def _edit_beside(
    entries: Entries,
    copies: list[AlignedCopy],
    renames: dict[str, tuple[Any, str]],
    edit: Edit,
    builder: _Builder,
) -> None:
    """Puts the merged copies and single tensors into the first input's tree, and leaves out what would be stale."""
    for aligned in copies:
        copy = aligned.copy
        for m in (*aligned.merged, *(m for _, m in aligned.added)):
            builder.place_merged(m)
        holder = next(iter(copy.tensors.values())).holder
        if aligned.added and (holder is None or mapping_items(holder) is None):
            raise RecipeError(f"nothing can be added to {printable(copy.label)}; write a .safetensors file")
        if aligned.added:
            like = next(iter(copy.tensors.values())).ref
            edit.added[id(holder)] = [(key, builder.added(m.spec.name, like)) for key, m in aligned.added]
        for name, found in copy.tensors.items():
            if name in aligned.homes:
                _put(found, aligned.homes[name], edit, builder)
                if renames and copy.candidate is not None and copy.candidate.kind == "state dict":
                    old, new = renames.get(name, ("", ""))
                    if isinstance(old, str) and new and found.name.endswith(old):
                        edit.renamed[id(found.holder), found.key] = found.name.removesuffix(old) + new
            else:
                _drop(copy.output_name(name), found.holder, found.key, edit)
    for drop in entries.drops:
        if isinstance(drop.holder, list | tuple):
            edit.emptied.setdefault(id(drop.holder), set()).add(drop.key)
        elif drop.instead is None:
            edit.values[id(drop.holder), drop.key] = None
        else:
            _drop(drop.name, drop.holder, drop.key, edit)


def _key(base: CheckpointIndex, found: Found, written: str) -> str:
    """The key in its own state dict of a tensor that is called ``written`` in the output."""
    chosen = base.selection.chosen
    if len(chosen) == 1:
        return written
    own = next(each for each in chosen if any(one.holder is found.holder for one in each.tensors[:1]))
    prefix = "".join(f"{part}." for part in own.path)
    if not written.startswith(prefix) or written == prefix:
        raise RecipeError(
            f"{printable(found.name)} cannot be called {printable(written)} in a .pth, which has it in "
            f"{printable(own.label)}; write a .safetensors file"
        )
    return written.removeprefix(prefix)


def _add(base: CheckpointIndex, indexes: Indexes, added: list[Merged], edit: Edit, builder: _Builder) -> None:
    """Puts tensors that the first checkpoint lacks behind those of its state dict."""
    if not added or _add_state_dicts(base, indexes, added, edit, builder):
        return
    holders = {id(found.holder): found.holder for found in base.selection.tensors}
    holder = next(iter(holders.values()))
    taken = {key for key, _ in mapping_items(holder) or []} & {m.spec.name for m in added}
    if taken:
        raise RecipeError(
            f"{listed(sorted(taken))}: the first input has something else of that name; write a .safetensors file"
        )
    if len(holders) > 1 or holder is None or mapping_items(holder) is None or base.selection.chosen[0].kind != "state dict":
        raise RecipeError(
            f"{printable(added[0].spec.name)} cannot be added to {printable(base.path)}, which holds no single state dict; "
            "write a .safetensors file"
        )
    like = base.selection.tensors[0].ref
    edit.added[id(holder)] = [(m.spec.name, builder.added(m.spec.name, like)) for m in added]


def _add_state_dicts(base: CheckpointIndex, indexes: Indexes, added: list[Merged], edit: Edit, builder: _Builder) -> bool:
    """Adds state dicts that the first checkpoint lacks, such as another speaker's, behind those that it has at its top.

    Returns False, and adds nothing, if the tensors are not all of such state dicts.
    """
    chosen, known = base.selection.chosen, mapping_items(base.extras)
    if known is None or len(chosen) < 2 or any(len(each.path) != 1 for each in chosen):
        return False
    taken = {key for key, _ in known}
    others = [each for index in indexes.values() if index.extras is not None for each in index.selection.chosen]
    beside = [each.path[0] for each in others if len(each.path) == 1]
    keys = [key for key in dict.fromkeys(beside) if isinstance(key, str) and key not in taken]
    like, made = base.selection.tensors[0].ref, dict[str, dict[str, TensorRef]]()
    for m in added:
        key = next((key for key in keys if m.spec.name.startswith(f"{key}.")), None)
        if key is None:
            return False
        made.setdefault(key, {})[m.spec.name.removeprefix(f"{key}.")] = builder.added(m.spec.name, like)
    edit.added[id(base.extras)] = list(made.items())
    return True


def _drop(name: str, holder: Any, key: Any, edit: Edit) -> None:
    if holder is None or mapping_items(holder) is None:
        raise RecipeError(f"{printable(name)} cannot be left out of this file's container; write a .safetensors file")
    edit.dropped.add((id(holder), key))
