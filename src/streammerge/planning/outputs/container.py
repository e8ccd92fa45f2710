"""Plans the output: its container, its files, and the place of each tensor.

The name decides the container. A ``.pth`` keeps the tree of the first input, with its tensors replaced. A safetensors file
or folder uses the names of the state dict.
"""

from __future__ import annotations

import json
from dataclasses import replace

from streammerge.checkpoints.huggingface import CONFIG, edited_config, is_embedding, is_head, read_config
from streammerge.checkpoints.index import CheckpointIndex
from streammerge.errors import RecipeError, listed, printable
from streammerge.formats import safetensors
from streammerge.formats.base import LayoutFile, Literal
from streammerge.formats.folder import side_files
from streammerge.methods.registry import COPY
from streammerge.options import RECEIPT_FILE, RECEIPT_KEY, RECIPE_FILE, RECIPE_KEY
from streammerge.planning.alignment import Alignment, Merged
from streammerge.planning.dispositions.entries import left_behind
from streammerge.planning.dispositions.ledger import Dispositions
from streammerge.planning.outputs.layout import Layout, Output, Placed, blank_sums, recipe_record
from streammerge.planning.outputs.pickled import PLAIN_ENDINGS, pickled_output
from streammerge.planning.receipt import ITSELF, Receipt, escaped, input_files, planned
from streammerge.planning.views import Indexes
from streammerge.recipe.document import to_json, to_yaml
from streammerge.recipe.locations import resolved, travelling_names
from streammerge.recipe.model import Recipe
from streammerge.stores.base import Location
from streammerge.stores.checksums import CRC32, CRC32C
from streammerge.tensors.spec import TensorSpec
from streammerge.units import parse_bytes

PICKLED_ENDINGS = (".pth", ".pt", ".ckpt", ".bin", ".th", ".tar")
DEFAULT_SHARD_BYTES = parse_bytes("5GB")


def container_of(out: Location) -> str:
    """Returns "safetensors", "pickle" or "folder" for an output's name. Raises RecipeError for any other name."""
    if out.ends_in_slash or out.is_folder() or not out.suffix:
        return "folder"
    if out.suffix == ".safetensors":
        return "safetensors"
    if out.suffix in (*PICKLED_ENDINGS, *PLAIN_ENDINGS):
        return "pickle"
    raise RecipeError(
        f"{printable(out.name)} does not say what to write; end it in .safetensors, in .pth (.pt, .ckpt, .bin, .th, .pkl) "
        "or in / for a folder"
    )


def plan_output(out: Location, recipe: Recipe, indexes: Indexes, alignment: Alignment, hashed: bool) -> Output:
    """Plans the output of these tensors under the name ``out``. Pure: nothing is written.

    ``hashed``: the receipt holds the SHA-256 of whole input files.
    """
    kind, name = container_of(out), out.name
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
        held={names[each.path]: index.nbytes for each, index in indexes.items() if index.in_memory},
    )
    made = _planned(kind, name, recipe, first, indexes, alignment, receipt)
    made.inputs = inputs
    return made


def _planned(
    kind: str,
    name: str,
    recipe: Recipe,
    first: CheckpointIndex,
    indexes: Indexes,
    alignment: Alignment,
    receipt: Receipt,
) -> Output:
    merged = alignment.merged
    if kind == "pickle":
        return pickled_output(name, recipe, first, indexes, alignment, receipt)
    notes: list[str] = []
    dispositions = Dispositions()
    dispositions.update(alignment.dispositions)
    for thing, why in left_behind(first):
        dispositions.add("entry", thing, "dropped", why)
    metadata = _metadata(recipe, first)
    if kind == "folder":
        return _folder(recipe, first, alignment, metadata, notes, receipt, dispositions)
    specs = {spec.name: (spec, m) for m in merged for spec in (m.spec, *_tied_specs(m))}
    sums = {ITSELF: blank_sums([spec.nbytes for spec, _ in specs.values()])}
    receipt = replace(receipt, checksums=sums, dispositions=dispositions.record())
    metadata[RECEIPT_KEY] = receipt.text()
    file = safetensors.plan_layout(name, [spec for spec, _ in specs.values()], metadata)
    file = replace(file, receipt=escaped(receipt.text()))
    placed = [Placed(spec, m, 0, file.offsets[n]) for n, (spec, m) in specs.items()]
    return Output(Layout((file,), receipt), placed, notes, dispositions=dispositions)


def _tied_specs(merged: Merged) -> list[TensorSpec]:
    return [TensorSpec(name, merged.spec.dtype, merged.spec.shape) for name in merged.tied]


def _metadata(recipe: Recipe, first: CheckpointIndex) -> dict[str, str]:
    """Returns the first checkpoint's own metadata, ``format: pt`` and, for a merge, the recipe."""
    kept = {k: v for k, v in first.metadata.items() if "hash" not in k.lower() and k not in (RECIPE_KEY, RECEIPT_KEY)}
    record = recipe_record(recipe)
    return kept | {"format": "pt"} | ({RECIPE_KEY: to_json(record)} if record else {})


# ---------------------------------------------------------------------------------------------------------- folders


def _folder(
    recipe: Recipe,
    base: CheckpointIndex,
    alignment: Alignment,
    metadata: dict[str, str],
    notes: list[str],
    receipt: Receipt,
    dispositions: Dispositions,
) -> Output:
    merged = alignment.merged
    shards = _shards(recipe, base, alignment)
    files: list[LayoutFile] = []
    placed: list[Placed] = []
    sums: dict[str, str] = {}
    for number, (name, members) in enumerate(shards.items()):
        file = safetensors.plan_layout(name, [m.spec for m in members], metadata)
        files.append(file)
        sums[name] = blank_sums([m.spec.nbytes for m in members])
        placed += [Placed(m.spec, m, number, file.offsets[m.spec.name]) for m in members]
    tied = [name for m in merged for name in m.tied]
    if tied:
        notes.append(f"tied tensors are stored once, as Hugging Face folders have it: without {listed(tied)}")
    if len(shards) > 1:
        files.append(_index(shards))
    copied: list[tuple[Location, str]] = []
    folder = base.path if base.path.is_folder() else base.path.parent if base.path.name.endswith(".index.json") else None
    if folder is not None:
        copied, left = side_files(folder)
        dispositions.add("file", left, "dropped", "a checksum of the input's files, too large, or no regular file")
        files += _config(folder, recipe, base, alignment, notes, dispositions)
    record = recipe_record(recipe)
    if record:
        files.append(_text_file(RECIPE_FILE, to_yaml(record)))
    names = {file.name for file in files}
    beside = tuple(c for c in copied if c[1] not in names)
    sums |= {name: blank_sums([]) for name in (*names, *(name for _, name in beside)) if name not in sums}
    dispositions.add("file", [name for _, name in beside], "copied")
    receipt = replace(receipt, checksums=dict(sorted(sums.items())), dispositions=dispositions.record())
    file = _text_file(RECEIPT_FILE, receipt.text(2))
    files.append(replace(file, receipt=file.literals[0].data))
    return Output(Layout(tuple(files), receipt, True, beside), placed, notes, dispositions=dispositions)


def _config(
    folder: Location,
    recipe: Recipe,
    base: CheckpointIndex,
    alignment: Alignment,
    notes: list[str],
    dispositions: Dispositions,
) -> list[LayoutFile]:
    """Returns the edited configuration when the merge changed what it states: dtype, layers, tied head, vocabulary."""
    config = read_config(folder)
    if config is None:
        return []
    dtype = recipe.recast.torch_name if recipe.recast else None
    configs = {path: read_config(path) for r in alignment.restacked for path, _ in r.layers if path.is_folder()}
    restacked = [(r.stack, r.before, [(configs.get(path), n) for path, n in r.layers]) for r in alignment.restacked]
    embeddings = [m for m in alignment.merged if is_embedding(m.base_names[0]) and m.base_names[0] in base.entries]
    sizes = {(base.entries[m.base_names[0]].spec.shape[0], m.spec.shape[0]) for m in embeddings if m.spec.shape}
    grown = next((pair for pair in sizes if pair[0] != pair[1]), None)
    parts = [holder for holder in (config, config.get("text_config")) if isinstance(holder, dict)]
    headless = not any(map(is_head, base.entries))
    untied = _has_own_head(alignment.merged) and (headless or any(part.get("tie_word_embeddings") for part in parts))
    edited, unknown = edited_config(config, dtype=dtype, restacked=restacked, untied=untied, vocabulary=grown)
    if unknown:
        notes.append(f"{CONFIG} does not say how many layers {listed(unknown)} has; set it there by hand if it should")
    if edited == config:
        return []
    changed = [key for key in edited if edited[key] != config.get(key)]
    said = ", ".join(f"{printable(key)} is now {printable(edited[key], 60)}" for key in changed)
    notes.append(f"{CONFIG}: {said}")
    dispositions.add("file", CONFIG, "edited", said)
    return [_text_file(CONFIG, json.dumps(edited, indent=2, ensure_ascii=False) + "\n")]


def _has_own_head(merged: list[Merged]) -> bool:
    """Whether the output has a head that differs from the embeddings."""
    embeddings = {
        tuple(s.place for s in m.sources) for m in merged if not is_head(m.spec.name) and is_embedding(m.spec.name)
    }
    return bool(embeddings) and any(
        is_head(m.spec.name) and tuple(s.place for s in m.sources) not in embeddings for m in merged
    )


def _text_file(name: str, text: str) -> LayoutFile:
    data = text.encode()
    return LayoutFile(name, len(data), {}, (Literal(0, data),))


def _shards(recipe: Recipe, base: CheckpointIndex, alignment: Alignment) -> dict[str, list[Merged]]:
    """Returns file name -> tensors: the shards of the first input, or shards filled in order up to the largest size."""
    grouped: list[list[Merged]] = [[]]
    merged, largest = alignment.merged, recipe.output.max_shard_size
    homes: list[Location] = []
    for m in merged if not alignment.restacked else ():  # an added tensor goes along with the one before it
        homes.append(homes[-1] if m.added and homes else base.entries.get(m.base_names[0], m.sources[0]).begin[0])
    if len(set(homes)) > 1 and largest is None:
        by_path: dict[Location, list[Merged]] = {}
        for m, path in zip(merged, homes, strict=True):
            by_path.setdefault(path, []).append(m)
        grouped = list(by_path.values())
        if all(path.suffix == ".safetensors" for path in by_path):
            return {path.name: members for path, members in by_path.items()}
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
