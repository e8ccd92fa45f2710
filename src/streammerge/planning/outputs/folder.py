"""Plans an output folder: shards and their index, the edited configuration, side files, recipe and receipt."""

from __future__ import annotations

import json
from dataclasses import replace

from streammerge.checkpoints.index import CheckpointIndex
from streammerge.errors import listed
from streammerge.formats import safetensors
from streammerge.formats.base import LayoutFile
from streammerge.formats.folder import side_files
from streammerge.options import RECEIPT_FILE, RECIPE_FILE
from streammerge.planning.alignment import Alignment, Merged
from streammerge.planning.dispositions.ledger import Dispositions
from streammerge.planning.outputs.config import config_file
from streammerge.planning.outputs.layout import Layout, Output, Placed, blank_sums, recipe_record, text_file
from streammerge.planning.receipt import Receipt
from streammerge.recipe.document import to_yaml
from streammerge.recipe.model import Recipe
from streammerge.stores.base import Location
from streammerge.units import parse_bytes

DEFAULT_SHARD_BYTES = parse_bytes("5GB")


def folder_output(
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
        files += config_file(folder, recipe, base, alignment, notes, dispositions)
    record = recipe_record(recipe)
    if record:
        files.append(text_file(RECIPE_FILE, to_yaml(record)))
    names = {file.name for file in files}
    beside = tuple(c for c in copied if c[1] not in names)
    sums |= {name: blank_sums([]) for name in (*names, *(name for _, name in beside)) if name not in sums}
    dispositions.add("file", [name for _, name in beside], "copied")
    receipt = replace(receipt, checksums=dict(sorted(sums.items())), dispositions=dispositions.record())
    file = text_file(RECEIPT_FILE, receipt.text(2))
    files.append(replace(file, receipt=file.literals[0].data))
    return Output(Layout(tuple(files), receipt, True, beside), placed, notes, dispositions=dispositions)


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
    return text_file("model.safetensors.index.json", json.dumps(content, indent=2, ensure_ascii=False) + "\n")
