"""Plans a ``.pth`` or ``.pkl`` output: the tree of the first input with its tensors replaced and stale parts removed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from streammerge.checkpoints.index import CheckpointIndex
from streammerge.errors import RecipeError, listed, printable
from streammerge.formats import plain_pickle, torch_zip
from streammerge.methods.registry import COPY
from streammerge.options import RECEIPT_KEY, RECIPE_KEY
from streammerge.pickles.arrays import array_over, is_array, native, numpy_dtype
from streammerge.pickles.repickle import Edit, storage_ref, stream
from streammerge.pickles.state_dict import Found, is_training_state
from streammerge.pickles.tree import Blank, Instance, OrderedTree, StorageRef, TensorRef, mapping_items, walk
from streammerge.planning.alignment import Alignment, Merged
from streammerge.planning.dispositions.ledger import Dispositions
from streammerge.planning.dispositions.pruned import WHY as ONLY
from streammerge.planning.dispositions.pruned import pruned
from streammerge.planning.outputs.bookkeeping import drop_facts, merge_bookkeeping
from streammerge.planning.outputs.layout import Layout, Output, Placed, blank_sums, recipe_record
from streammerge.planning.receipt import ITSELF, Receipt
from streammerge.recipe.document import to_yaml
from streammerge.recipe.model import Recipe
from streammerge.sources.base import Source
from streammerge.sources.inline import Inline
from streammerge.tensors.dtypes import DType
from streammerge.tensors.spec import TensorSpec, contiguous_strides

PLAIN_ENDINGS = (".pkl", ".pickle")
"""Names of plain pickles. An input of torch's keeps its container under such a name."""
_BARE = TensorRef(StorageRef("", None, 0), DType.F32, 0, (), ())
"""A tensor without a wrapper."""
_COPIES = 4
"""Copies of a pickle in memory at once while it is written: in the layout, sealed, joined, checksummed."""


def pickled_output(name: str, recipe: Recipe, base: CheckpointIndex, alignment: Alignment, receipt: Receipt) -> Output:
    merged = alignment.merged
    if base.format == "TorchScript archive":
        raise RecipeError(
            f"{printable(base.path)} is a TorchScript archive, which is code and cannot be written again; "
            "write a .safetensors file, or a .pth with a plain checkpoint as the first input"
        )
    plain = name.endswith(PLAIN_ENDINGS) and not base.format.startswith("PyTorch")
    tree, holders = _tree(base, merged, plain)
    moved = alignment.restacked or any(m.base_names[0] not in base.entries for m in merged if not m.added)
    if holders is None and moved:
        raise RecipeError(
            f"a .pth has the container of its first input, {printable(base.path)}, in which no layers can be moved; "
            "write a .safetensors file or a folder"
        )
    edit = Edit()
    builder = _Builder(edit, plain)
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
        _add(base, [m for m in merged if m.added], edit, builder)
        _edit_first(base, recipe, home, edit, builder, notes, dispositions)
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
    record = recipe_record(recipe)
    sums = {ITSELF: blank_sums([spec.nbytes for spec, _, _ in builder.tensors.values()])}
    receipt = replace(receipt, checksums=sums, dispositions=dispositions.record())
    told = {RECIPE_KEY: to_yaml(record).encode()} if record else {}
    told[RECEIPT_KEY] = receipt.text().encode()
    if plain:
        pickle = stream(tree, edit, headers=[plain_pickle.header(key, text) for key, text in told.items()])
        file = plain_pickle.plan_layout(name, pickle, told[RECEIPT_KEY])
    else:
        pickle = stream(tree, edit)
        file = torch_zip.plan_layout(name, pickle, builder.storages, base.container.magic, told)
    placed = [Placed(spec, m, 0, file.offsets[n], source) for n, (spec, m, source) in builder.tensors.items()]
    pickle_bytes = sum(len(part) for part in pickle if isinstance(part, bytes))
    layout = Layout((file,), receipt, pickle_bytes=_COPIES * pickle_bytes)
    return Output(layout, placed, notes, dispositions=dispositions)


def _tree(base: CheckpointIndex, merged: list[Merged], plain: bool) -> tuple[Any, dict[str, Merged] | None]:
    """Returns the first input's own tree, or a flat state dict if the first input has no tree that can be written.

    For a flat state dict, also returns its key -> the merged tensor; else None.
    """
    if base.extras is not None and base.format != "sharded PyTorch":
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

    ``plain``: the output is a plain pickle, in which every tensor is an array.
    """

    def __init__(self, edit: Edit, plain: bool) -> None:
        self.edit, self.plain = edit, plain
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
        key = str(len(self.storages))
        self.storages[label] = (key, spec.nbytes)
        return storage_ref(key, spec.dtype, spec.numel)

    def _fresh(self, spec: TensorSpec, storage: StorageRef, like: TensorRef | None) -> TensorRef:
        if isinstance(storage, Blank):
            return array_over(storage, spec.dtype, spec.shape, like, self._dtype(spec, like))
        made = TensorRef(storage, spec.dtype, 0, spec.shape, contiguous_strides(spec.shape))
        if like is not None:
            made.requires_grad, made.wrapper, made.state = like.requires_grad, like.wrapper, like.state
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
        return self._fresh(spec, self._home(name, self.plain or is_array(node)), node)

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
                if is_array(node) and isinstance(node.entry, Inline):
                    continue  # its bytes stay in the pickle
                name = ".".join(map(str, path))
                entry = base.container.locate(name, node)
                if entry.nbytes and entry.place in merged:
                    self.edit.replaced[id(node)] = self.stand_in(merged[entry.place], node)
                    continue
                storage = self._copies.get(entry.place)
                if storage is None:
                    storage = self._place(entry.spec, None, entry, self.plain or is_array(node))
                    self._copies[entry.place] = storage
                self.edit.replaced[id(node)] = self._fresh(entry.spec, storage, node)
            elif isinstance(node, StorageRef):
                octets = TensorRef(StorageRef(node.key, None, node.nbytes), DType.U8, 0, (node.nbytes,), (1,))
                entry = base.container.locate(f"storage {node.key}", octets)
                key = self._place(entry.spec, None, entry, as_array=False).key
                self.edit.replaced[id(node)] = StorageRef(key, node.dtype, node.numel)


def _edit_first(
    base: CheckpointIndex,
    recipe: Recipe,
    home: dict[str, str],
    edit: Edit,
    builder: _Builder,
    notes: list[str],
    dispositions: Dispositions,
) -> None:
    """Edits the first input's tree: puts the merged tensors in, and drops stale and unwanted parts."""
    selection = base.selection
    for found in selection.tensors:
        where = (id(found.holder), found.key)
        if found.name not in home:
            _drop(found.name, found.holder, found.key, edit)
            continue
        node = found.node or found.ref
        made = builder.stand_in(home[found.name], node)
        already = edit.replaced.setdefault(id(node), made)
        if already is not made and already.storage is not made.storage and found.holder is not None:
            edit.values[where] = made
        written = recipe.output_name(found.name)
        if written != base.renamed.get(found.name, found.name):
            if found.holder is None or selection.chosen[0].kind != "state dict":
                raise RecipeError("tensors of a state dict only can be renamed in a .pth; write a .safetensors file")
            edit.renamed[where] = _key(base, found, written)
    for found in selection.left_out:
        _drop(found.name, found.holder, found.key, edit)
    if recipe.output.only:
        for name, holder, key in pruned(base):
            _drop(name, holder, key, edit)
            dispositions.add("entry", name, "dropped", ONLY)
        return
    replaced = recipe.merge_method is not COPY or any(rule.copy for rule in recipe.rules)
    for twin in selection.twins if replaced else ():
        if selection.chosen[0].averaged and not twin.averaged and all(found.name in home for found in twin.tensors):
            for found in twin.tensors:  # the loader reads the plain weights, so they become the merged averaged weights
                node = found.node or found.ref
                edit.replaced.setdefault(id(node), builder.stand_in(home[found.name], node))
            notes.append(f"'{printable(twin.label)}' has the merged weights too")
            continue
        _drop(twin.label, twin.holder, twin.key, edit)
        dispositions.add("entry", twin.label, "dropped", "it was not merged and would be stale")
    if not recipe.output.keep_optimizer:
        gone = _drop_training_state(base, edit)
        dispositions.add("entry", gone, "dropped", "`keep_optimizer=True` keeps the first input's")


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
    first = base.selection.tensors[0].ref
    like = first if is_array(first) else _BARE
    edit.added[id(holder)] = [(m.spec.name, builder.stand_in(m.spec.name, like)) for m in added]


def _drop(name: str, holder: Any, key: Any, edit: Edit) -> None:
    if holder is None or mapping_items(holder) is None:
        raise RecipeError(f"{printable(name)} cannot be left out of this file's container; write a .safetensors file")
    edit.dropped.add((id(holder), key))


def _drop_training_state(base: CheckpointIndex, edit: Edit) -> list[str]:
    """Drops optimizer, scheduler and scaler at every level above the chosen state dicts. Returns their keys."""
    gone: list[str] = []
    for candidate in base.selection.chosen:
        node: Any = base.extras
        for part in candidate.path:
            for key, value in mapping_items(node) or []:
                fresh = (id(node), key) not in edit.dropped
                if is_training_state(key, value) and key != part and value is not None and fresh:
                    edit.dropped.add((id(node), key))
                    gone.append(str(key))
            if isinstance(node, Instance) and isinstance(node.state, dict):
                node = node.state
            node = node[part] if isinstance(node, dict | list | tuple) else dict(mapping_items(node) or []).get(part)
    return gone
