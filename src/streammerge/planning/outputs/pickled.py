"""Plans a ``.pth`` output: the tree of the first input with its tensors replaced and stale parts removed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from streammerge.checkpoints.index import CheckpointIndex
from streammerge.errors import RecipeError, listed, printable
from streammerge.formats import torch_zip
from streammerge.formats.base import LayoutFile
from streammerge.options import RECEIPT_FILE, RECIPE_FILE
from streammerge.pickles.repickle import Edit, repickle, storage_ref
from streammerge.pickles.state_dict import Found
from streammerge.pickles.tree import OrderedTree, StorageRef, TensorRef, mapping_items, walk
from streammerge.planning.alignment import Alignment, Merged
from streammerge.planning.copies import AlignedCopy, align_copies, record_entries
from streammerge.planning.dispositions.entries import Entries, decide
from streammerge.planning.dispositions.ledger import Dispositions
from streammerge.planning.outputs.bookkeeping import drop_facts, merge_bookkeeping
from streammerge.planning.outputs.layout import Layout, Output, Placed, blank_sums, recipe_record
from streammerge.planning.receipt import ITSELF, Receipt
from streammerge.planning.views import Indexes
from streammerge.recipe.document import to_yaml
from streammerge.recipe.model import Recipe
from streammerge.sources.base import Source
from streammerge.tensors.dtypes import DType
from streammerge.tensors.spec import TensorSpec, contiguous_strides

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
    name: str, recipe: Recipe, base: CheckpointIndex, indexes: Indexes, alignment: Alignment, receipt: Receipt
) -> Output:
    made = receipt

    def beside(sums: str, dispositions: Dispositions) -> dict[str, bytes]:
        nonlocal made
        made = replace(receipt, checksums={ITSELF: sums}, dispositions=dispositions.record())
        record = recipe_record(recipe)
        texts = {RECIPE_FILE: to_yaml(record).encode()} if record else {}
        return texts | {RECEIPT_FILE: made.text().encode()}

    planned = pickled_file(name, recipe, base, indexes, alignment, beside)
    layout = Layout((planned.file,), made, pickle_bytes=planned.pickle_bytes)
    return Output(layout, planned.placed, planned.notes, dispositions=planned.dispositions)


def pickled_file(
    name: str,
    recipe: Recipe,
    base: CheckpointIndex,
    indexes: Indexes,
    alignment: Alignment,
    beside: Callable[[str, Dispositions], dict[str, bytes]],
    flat: bool = False,
) -> PickledFile:
    """Plans one archive. ``beside``: makes its further records from the blank checksums and the decisions.

    ``flat``: it holds a flat state dict of the merged tensors instead of the first input's tree.
    """
    merged = alignment.merged
    if base.format == "TorchScript archive":
        raise RecipeError(
            f"{printable(base.path)} is a TorchScript archive, which is code and cannot be written again; "
            "write a .safetensors file, or a .pth with a plain checkpoint as the first input"
        )
    tree, holders = _tree(base, merged, flat)
    moved = alignment.restacked or any(m.base_names[0] not in base.entries for m in merged if not m.added)
    if holders is None and moved:
        raise RecipeError(
            f"a .pth has the container of its first input, {printable(base.path)}, in which no layers can be moved; "
            "write a .safetensors file or a folder"
        )
    edit = Edit()
    builder = _Builder(edit)
    notes: list[str] = []
    dispositions = Dispositions()
    dispositions.update(alignment.dispositions)
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
        _add(base, [m for m in merged if m.added], edit, builder)
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
            edit.replaced[id(tree[key])] = builder.refs[m.spec.name]
    pickle = repickle(tree, edit)
    sums = blank_sums([nbytes for _, nbytes in builder.storages.values()])
    file = torch_zip.plan_layout(name, pickle, builder.storages, base.container.magic, beside(sums, dispositions))
    placed = [Placed(spec, m, 0, file.offsets[n], source) for n, (spec, m, source) in builder.tensors.items()]
    return PickledFile(file, placed, notes, dispositions, sums, _COPIES * len(pickle))


def _tree(base: CheckpointIndex, merged: list[Merged], flat: bool) -> tuple[Any, dict[str, Merged] | None]:
    """Returns the first input's own tree, or a flat state dict if the first input has no tree that can be written.

    For a flat state dict, also returns its key -> the merged tensor; else None.
    """
    if base.extras is not None and base.format != "sharded PyTorch" and not flat:
        return base.extras, None
    tree, holders = OrderedTree(), {}
    for m in merged:
        for name in (m.spec.name, *m.tied):
            tree[name] = TensorRef(StorageRef("", m.spec.dtype, 0), m.spec.dtype, 0, (), ())
            holders[name] = m
    return tree, holders


class _Builder:
    """Gives every tensor of a pickle its own storage."""

    def __init__(self, edit: Edit) -> None:
        self.edit = edit
        self.refs: dict[str, TensorRef] = {}
        self.storages: dict[str, tuple[str, int]] = {}
        self.tensors: dict[str, tuple[TensorSpec, Merged | None, Source | None]] = {}
        self._copies: dict[tuple[object, ...], StorageRef] = {}

    def place_merged(self, merged: Merged) -> None:
        self.refs[merged.spec.name] = self._fresh(merged.spec, self._storage(merged.spec, merged, None), None)

    def _storage(self, spec: TensorSpec, merged: Merged | None, source: Source | None) -> StorageRef:
        key, label = str(len(self.storages)), spec.name
        while label in self.tensors:
            label += "'"
        self.storages[label] = (key, spec.nbytes)
        self.tensors[label] = (spec, merged, source)
        return storage_ref(key, spec.dtype, spec.numel)

    def _fresh(self, spec: TensorSpec, storage: StorageRef, like: TensorRef | None) -> TensorRef:
        made = TensorRef(storage, spec.dtype, 0, spec.shape, contiguous_strides(spec.shape))
        if like is not None:
            made.requires_grad, made.wrapper, made.state = like.requires_grad, like.wrapper, like.state
        return made

    def stand_in(self, name: str, node: TensorRef) -> TensorRef:
        """Returns a tensor over the storage of the merged tensor ``name``, with the wrapper of ``node``."""
        ref = self.refs[name]
        spec = TensorSpec(name, ref.dtype, ref.shape)
        return self._fresh(spec, ref.storage, node)

    def standing_in(self, own: str, found: Found, name: str, entry: Source) -> str:
        """Returns the name of the tensor that stands in the place of ``found``: the merged tensor ``name``, made of
        ``entry``, or the same in the dtype of ``found``."""
        spec, merged, _ = self.tensors[name]
        dtype = found.ref.dtype if found.node is None else found.node.dtype
        if merged is None or dtype is spec.dtype or spec.dtype is not entry.spec.dtype or dtype.kind != spec.dtype.kind:
            return name
        self.place_merged(replace(merged, spec=replace(spec, name=own, dtype=dtype), tied=()))
        return own

    def place_rest(self, tree: Any, base: CheckpointIndex, home: dict[str, str]) -> None:
        """Copies from the first input all tensors that are still reachable and were not merged.

        A tensor that is a merged tensor under another path becomes that one. ``home``: base name -> merged name.
        """
        merged = {base.entries[name].place: made for name, made in home.items()}
        nodes = list(walk(tree, self.edit.dropped | set(self.edit.values)))
        for path, node in nodes:
            if id(node) in self.edit.replaced:
                continue
            if isinstance(node, TensorRef):
                name = ".".join(map(str, path))
                entry = base.container.locate(name, node)
                if entry.nbytes and entry.place in merged:
                    self.edit.replaced[id(node)] = self.stand_in(merged[entry.place], node)
                    continue
                storage = self._copies.get(entry.place)
                if storage is None:
                    storage = self._copies[entry.place] = self._storage(entry.spec, None, entry)
                self.edit.replaced[id(node)] = self._fresh(entry.spec, storage, node)
            elif isinstance(node, StorageRef):
                octets = TensorRef(StorageRef(node.key, None, node.nbytes), DType.U8, 0, (node.nbytes,), (1,))
                entry = base.container.locate(f"storage {node.key}", octets)
                key = self._storage(entry.spec, None, entry).key
                self.edit.replaced[id(node)] = StorageRef(key, node.dtype, node.numel)


def _edit_first(
    base: CheckpointIndex, recipe: Recipe, home: dict[str, str], edit: Edit, builder: _Builder
) -> dict[str, tuple[Any, str]]:
    """Puts the merged tensors into the first input's tree. Returns name -> (key, new key) of those that are renamed."""
    selection, renames = base.selection, dict[str, tuple[Any, str]]()
    for found in selection.tensors:
        if found.name not in home:
            _drop(found.name, found.holder, found.key, edit)
            continue
        _put(found, home[found.name], edit, builder)
        written = recipe.output_name(found.name)
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
            edit.added[id(holder)] = [(key, builder.refs[m.spec.name]) for key, m in aligned.added]
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
        if drop.instead is None:
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


def _add(base: CheckpointIndex, added: list[Merged], edit: Edit, builder: _Builder) -> None:
    """Puts tensors that the first checkpoint lacks behind those of its state dict."""
    if not added:
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
    edit.added[id(holder)] = [(m.spec.name, builder.refs[m.spec.name]) for m in added]


def _drop(name: str, holder: Any, key: Any, edit: Edit) -> None:
    if holder is None or mapping_items(holder) is None:
        raise RecipeError(f"{printable(name)} cannot be left out of this file's container; write a .safetensors file")
    edit.dropped.add((id(holder), key))
