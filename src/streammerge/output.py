"""The output before it exists: which container it is, which files it has, where each tensor goes.

The name decides the container. A ``.pth`` keeps the tree of the first input, its tensors replaced; a safetensors file
or folder has the state dict's own names.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from streammerge.align import Alignment, Merged
from streammerge.bookkeeping import merge_bookkeeping
from streammerge.checkpoint import CheckpointIndex
from streammerge.checksums import CRC32, CRC32C
from streammerge.dtypes import DType
from streammerge.errors import RecipeError, listed, printable
from streammerge.formats import safetensors, torch_zip
from streammerge.formats.base import Layout, LayoutFile, Literal
from streammerge.formats.folder import side_files
from streammerge.formats.torch_zip import RECEIPT
from streammerge.huggingface import CONFIG, HEADS, edited_config, is_embedding, read_config
from streammerge.methods.registry import COPY
from streammerge.parts import Indexes
from streammerge.receipt import ITSELF, KEY, InputSpans, Receipt, escaped, input_files, planned
from streammerge.recipe import Recipe, resolved, to_json, to_yaml
from streammerge.recipe.locate import RECORD, travelling_names
from streammerge.repickle import Edit, repickle, storage_ref
from streammerge.statedict import is_training_state
from streammerge.storage import file_size
from streammerge.tensors import TensorEntry, TensorSpec, contiguous_strides
from streammerge.tree import Instance, OrderedTree, StorageRef, TensorRef, mapping_items, walk
from streammerge.units import parse_bytes

PICKLED_ENDINGS = (".pth", ".pt", ".ckpt", ".bin", ".th", ".tar")
DEFAULT_SHARD_BYTES = parse_bytes("5GB")


@dataclass(slots=True)
class Placed:
    """A tensor of the output and where it goes; ``source`` for those copied from the first input beside the merge."""

    spec: TensorSpec
    merged: Merged | None
    file: int
    offset: int
    source: TensorEntry | None = None


@dataclass(slots=True)
class Output:
    """Layout, tensors with their places, and what to tell about it. ``inputs``: see :class:`Plan`."""

    layout: Layout
    placed: list[Placed]
    notes: list[str] = field(default_factory=list)
    inputs: dict[str, InputSpans] = field(default_factory=dict)


def container_of(out: str | Path) -> str:
    """ "safetensors", "pickle" or "folder", from the output's name. Raises RecipeError for a name that says neither."""
    path, text = Path(out), str(out)
    if text.endswith("/") or path.is_dir() or not path.suffix:
        return "folder"
    if path.suffix == ".safetensors":
        return "safetensors"
    if path.suffix in PICKLED_ENDINGS:
        return "pickle"
    raise RecipeError(
        f"{printable(path.name)} does not say what to write; end it in .safetensors, in .pth (.pt, .ckpt, .bin, .th) "
        "or in / for a folder"
    )


def plan_output(out: str | Path, recipe: Recipe, indexes: Indexes, alignment: Alignment, hashed: bool) -> Output:
    """The output of these tensors under that name. Pure: nothing is written. ``hashed``: the receipt has whole hashes."""
    kind, name = container_of(out), Path(out).name
    first = indexes[recipe.checkpoints[0]]
    names = travelling_names(recipe)
    inputs = input_files({names[each.path]: index for each, index in indexes.items()})
    receipt = planned(
        json.loads(to_json(resolved(recipe).to_dict())),
        inputs,
        recipe.seed,
        CRC32 if kind == "pickle" else CRC32C,
        hashed,
        computed=recipe.merge_method is not COPY or recipe.recast is not None,
    )
    made = _planned(kind, name, recipe, first, alignment, receipt)
    made.inputs = inputs
    return made


def _planned(
    kind: str, name: str, recipe: Recipe, first: CheckpointIndex, alignment: Alignment, receipt: Receipt
) -> Output:
    merged = alignment.merged
    if kind == "pickle":
        return _pickle(name, recipe, first, alignment, receipt)
    notes = _left_behind(first)
    metadata = _metadata(recipe, first)
    if kind == "folder":
        return _folder(recipe, first, alignment, metadata, notes, receipt)
    specs = {spec.name: (spec, m) for m in merged for spec in (m.spec, *_tied_specs(m))}
    receipt = replace(receipt, checksums={ITSELF: _blank_sums([spec.nbytes for spec, _ in specs.values()])})
    metadata[KEY] = receipt.text()
    file = safetensors.plan_layout(name, [spec for spec, _ in specs.values()], metadata)
    file = replace(file, receipt=escaped(receipt.text()))
    placed = [Placed(spec, m, 0, file.offsets[n]) for n, (spec, m) in specs.items()]
    return Output(Layout((file,), receipt=receipt), placed, notes)


def _blank_sums(sizes: list[int]) -> str:
    """Room for the checksums of a file with tensors of these sizes, and of what is around them."""
    return "0" * 8 * (sum(size > 0 for size in sizes) + 1)


def _tied_specs(merged: Merged) -> list[TensorSpec]:
    return [TensorSpec(name, merged.spec.dtype, merged.spec.shape) for name in merged.tied]


def _record(recipe: Recipe) -> dict[str, Any] | None:
    """The recipe that made the output, without any path of this machine; none for a conversion."""
    conversion = recipe.merge_method is COPY and len(recipe.checkpoints) == 1
    return None if conversion else resolved(recipe).to_dict()


def _metadata(recipe: Recipe, first: CheckpointIndex) -> dict[str, str]:
    """The first checkpoint's own metadata, ``format: pt``, and for merges the recipe."""
    kept = {k: v for k, v in first.metadata.items() if "hash" not in k.lower() and k not in ("streammerge", KEY)}
    record = _record(recipe)
    return kept | {"format": "pt"} | ({"streammerge": to_json(record)} if record else {})


def _left_behind(first: CheckpointIndex) -> list[str]:
    extras = first.extras
    if not isinstance(extras, dict) or not first.selection.chosen[0].path:
        return []
    chosen = {c.path[0] for c in first.selection.chosen}
    rest = [str(key) for key in extras if key not in chosen]
    return [f"not in a safetensors file, so left out: {listed(rest)}"] if rest else []


# ---------------------------------------------------------------------------------------------------------- folders


def _folder(
    recipe: Recipe,
    base: CheckpointIndex,
    alignment: Alignment,
    metadata: dict[str, str],
    notes: list[str],
    receipt: Receipt,
) -> Output:
    merged = alignment.merged
    shards = _shards(recipe, base, alignment)
    files: list[LayoutFile] = []
    placed: list[Placed] = []
    sums: dict[str, str] = {}
    for number, (name, members) in enumerate(shards.items()):
        file = safetensors.plan_layout(name, [m.spec for m in members], metadata)
        files.append(file)
        sums[name] = _blank_sums([m.spec.nbytes for m in members])
        placed += [Placed(m.spec, m, number, file.offsets[m.spec.name]) for m in members]
    tied = [name for m in merged for name in m.tied]
    if tied:
        notes.append(f"tied tensors are stored once, as Hugging Face folders have it: without {listed(tied)}")
    if len(shards) > 1:
        files.append(_index(shards))
    copied: list[tuple[Path, str]] = []
    folder = base.path if base.path.is_dir() else base.path.parent if base.path.name.endswith(".index.json") else None
    if folder is not None:
        copied, left = side_files(folder)
        if left:
            notes.append(f"not copied from {printable(folder)}: {listed(left)}")
        files += _config(folder, recipe, base, alignment, notes)
    record = _record(recipe)
    if record:
        files.append(_text_file(RECORD, to_yaml(record)))
    names = {file.name for file in files}
    beside = tuple(c for c in copied if c[1] not in names)
    sums |= {name: _blank_sums([]) for name in (*names, *(name for _, name in beside)) if name not in sums}
    receipt = replace(receipt, checksums=dict(sorted(sums.items())))
    file = _text_file(RECEIPT, receipt.text(2))
    files.append(replace(file, receipt=file.literals[0].data))
    return Output(Layout(tuple(files), True, beside, receipt), placed, notes)


def _config(
    folder: Path, recipe: Recipe, base: CheckpointIndex, alignment: Alignment, notes: list[str]
) -> list[LayoutFile]:
    """The configuration, where the merge changed what it says: dtype, layers, a head of its own, the vocabulary."""
    config = read_config(folder)
    if config is None:
        return []
    dtype = recipe.recast.torch_name if recipe.recast else None
    configs = {path: read_config(path) for r in alignment.restacked for path, _ in r.layers if path.is_dir()}
    restacked = [(r.stack, r.before, [(configs.get(path), n) for path, n in r.layers]) for r in alignment.restacked]
    embeddings = [m for m in alignment.merged if is_embedding(m.base_names[0]) and m.base_names[0] in base.entries]
    sizes = {(base.entries[m.base_names[0]].spec.shape[0], m.spec.shape[0]) for m in embeddings if m.spec.shape}
    grown = next((pair for pair in sizes if pair[0] != pair[1]), None)
    parts = [holder for holder in (config, config.get("text_config")) if isinstance(holder, dict)]
    headless = not any(head in base.entries for head in HEADS)
    untied = _has_own_head(alignment.merged) and (headless or any(part.get("tie_word_embeddings") for part in parts))
    edited, unknown = edited_config(config, dtype=dtype, restacked=restacked, untied=untied, vocabulary=grown)
    if unknown:
        notes.append(f"{CONFIG} does not say how many layers {listed(unknown)} has; set it there by hand if it should")
    if edited == config:
        return []
    changed = [key for key in edited if edited[key] != config.get(key)]
    notes.append(f"{CONFIG}: {', '.join(f'{printable(k)} is now {printable(edited[k], 60)}' for k in changed)}")
    return [_text_file(CONFIG, json.dumps(edited, indent=2, ensure_ascii=False) + "\n")]


def _has_own_head(merged: list[Merged]) -> bool:
    """Whether a head is written that is not made of the embeddings."""
    embeddings = {
        tuple(s.place for s in m.sources) for m in merged if m.spec.name not in HEADS and is_embedding(m.spec.name)
    }
    return any(m.spec.name in HEADS and tuple(s.place for s in m.sources) not in embeddings for m in merged)


def _text_file(name: str, text: str) -> LayoutFile:
    data = text.encode()
    return LayoutFile(name, len(data), {}, (Literal(0, data),))


def _shards(recipe: Recipe, base: CheckpointIndex, alignment: Alignment) -> dict[str, list[Merged]]:
    """File name -> tensors: as the first input has them, or filled in order up to the largest size."""
    grouped: list[list[Merged]] = [[]]
    merged, largest = alignment.merged, recipe.output.max_shard_size
    homes = [] if alignment.restacked else [base.entries.get(m.base_names[0], m.sources[0]).path for m in merged]
    if len(set(homes)) > 1 and largest is None:
        by_path: dict[str, list[Merged]] = {}
        for m, path in zip(merged, homes, strict=True):
            by_path.setdefault(path, []).append(m)
        grouped = list(by_path.values())
        if all(path.endswith(".safetensors") for path in by_path):
            return {Path(path).name: members for path, members in by_path.items()}
    else:
        most, filled = largest or DEFAULT_SHARD_BYTES, 0
        for m in merged:
            if grouped[-1] and filled + m.spec.nbytes > most:
                grouped.append([])
                filled = 0
            grouped[-1].append(m)
            filled += m.spec.nbytes
    if len(grouped) == 1:
        return {"model.safetensors": grouped[0]}
    return {f"model-{i:05}-of-{len(grouped):05}.safetensors": members for i, members in enumerate(grouped, start=1)}


def _index(shards: dict[str, list[Merged]]) -> LayoutFile:
    weight_map = {m.spec.name: name for name, members in shards.items() for m in members}
    total = sum(m.spec.nbytes for members in shards.values() for m in members)
    content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return _text_file("model.safetensors.index.json", json.dumps(content, indent=2, ensure_ascii=False) + "\n")


# ---------------------------------------------------------------------------------------------------------- pickles


def _pickle(name: str, recipe: Recipe, base: CheckpointIndex, alignment: Alignment, receipt: Receipt) -> Output:
    merged = alignment.merged
    if base.format == "TorchScript archive":
        raise RecipeError(
            f"{printable(base.path)} is a TorchScript archive, which is code and cannot be written again; "
            "write a .safetensors file, or a .pth with a plain checkpoint as the first input"
        )
    tree, holders = _tree(base, merged)
    moved = alignment.restacked or any(m.base_names[0] not in base.entries for m in merged)
    if holders is None and moved:
        raise RecipeError(
            f"a .pth has the container of its first input, {printable(base.path)}, in which no layers can be moved; "
            "write a .safetensors file or a folder"
        )
    edit = Edit()
    builder = _Builder(edit)
    notes: list[str] = []
    if base.container.format.startswith("PyTorch ") and base.container.format != "PyTorch zip":
        notes.append(
            f"{printable(base.path)} is in the {base.container.format} format; the output is in today's zip format"
        )
    for m in merged:
        builder.place_merged(m)
    if holders is None:
        home = {name: m.spec.name for m in merged for name in m.base_names}
        _edit_first(base, recipe, home, edit, builder, notes)
        if len(alignment.shares) > 1:
            said = merge_bookkeeping([tree for tree, _ in alignment.shares], [w for _, w in alignment.shares], edit)
            if said:
                notes.append(f"bookkeeping: {', '.join(said)}")
        builder.place_rest(tree, base, home)
    else:
        for key, m in holders.items():
            edit.replaced[id(tree[key])] = builder.refs[m.spec.name]
    pickle = repickle(tree, edit)
    record = _record(recipe)
    receipt = replace(receipt, checksums={ITSELF: _blank_sums([nbytes for _, nbytes in builder.storages.values()])})
    beside = {RECORD: to_yaml(record).encode()} if record else {}
    beside[RECEIPT] = receipt.text().encode()
    file = torch_zip.plan_layout(name, pickle, builder.storages, base.container.magic, beside)
    placed = [Placed(spec, m, 0, file.offsets[n], source) for n, (spec, m, source) in builder.tensors.items()]
    return Output(Layout((file,), receipt=receipt), placed, notes)


def _tree(base: CheckpointIndex, merged: list[Merged]) -> tuple[Any, dict[str, Merged] | None]:
    """The first input's own tree, or a flat state dict where it has none that could be written."""
    if base.extras is not None and base.format != "sharded PyTorch":
        return base.extras, None
    tree, holders = OrderedTree(), {}
    for m in merged:
        for name in (m.spec.name, *m.tied):
            tree[name] = TensorRef(StorageRef("", m.spec.dtype, 0), m.spec.dtype, 0, (), ())
            holders[name] = m
    return tree, holders


class _Builder:
    """Gives every tensor that a pickle will mention a storage of its own."""

    def __init__(self, edit: Edit) -> None:
        self.edit = edit
        self.refs: dict[str, TensorRef] = {}
        self.storages: dict[str, tuple[str, int]] = {}
        self.tensors: dict[str, tuple[TensorSpec, Merged | None, TensorEntry | None]] = {}
        self._copies: dict[tuple[object, ...], StorageRef] = {}

    def place_merged(self, merged: Merged) -> None:
        self.refs[merged.spec.name] = self._fresh(merged.spec, self._storage(merged.spec, merged, None), None)

    def _storage(self, spec: TensorSpec, merged: Merged | None, source: TensorEntry | None) -> StorageRef:
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
        """A tensor over the merged storage of that name, wrapped as ``node`` is."""
        ref = self.refs[name]
        spec = TensorSpec(name, ref.dtype, ref.shape)
        return self._fresh(spec, ref.storage, node)

    def place_rest(self, tree: Any, base: CheckpointIndex, home: dict[str, str]) -> None:
        """Copies of the first input's for all tensors that are still reachable and were not merged.

        One that is a merged tensor under another path is that. ``home``: base name -> merged name.
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
    base: CheckpointIndex, recipe: Recipe, home: dict[str, str], edit: Edit, builder: _Builder, notes: list[str]
) -> None:
    """The first input's tree with merged tensors in place, and without what is stale or was not wanted."""
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
        if recipe.output_name(found.name) != found.name:
            if found.holder is None or selection.chosen[0].kind != "state dict":
                raise RecipeError("--strip-prefix renames tensors of a state dict only; write a .safetensors file")
            edit.renamed[where] = recipe.output_name(str(found.key))
    for found in selection.left_out:
        _drop(found.name, found.holder, found.key, edit)
    for twin in selection.twins if recipe.merge_method is not COPY else ():
        if selection.chosen[0].averaged and not twin.averaged and all(found.name in home for found in twin.tensors):
            for found in twin.tensors:  # the loader reads the plain weights, which are now the averaged ones
                node = found.node or found.ref
                edit.replaced.setdefault(id(node), builder.stand_in(home[found.name], node))
            notes.append(f"'{printable(twin.label)}' has the merged weights too")
            continue
        _drop(twin.label, twin.holder, twin.key, edit)
        notes.append(f"left out of the output: '{printable(twin.label)}', which was not merged and would be stale")
    if not recipe.output.keep_optimizer:
        gone = _drop_training_state(base, edit)
        if gone:
            notes.append(f"left out of the output: {listed(gone)} (--keep-optimizer keeps the first input's)")


def _drop(name: str, holder: Any, key: Any, edit: Edit) -> None:
    if holder is None or mapping_items(holder) is None:
        raise RecipeError(f"{printable(name)} cannot be left out of this file's container; write a .safetensors file")
    edit.dropped.add((id(holder), key))


def _drop_training_state(base: CheckpointIndex, edit: Edit) -> list[str]:
    """Optimizer, scheduler and scaler beside the chosen state dicts, at every level down to them."""
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


def side_bytes(layout: Layout) -> int:
    return sum(file_size(source) for source, _ in layout.side_files)
