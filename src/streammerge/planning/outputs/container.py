"""Plans the output: its container, its files, and the place of each tensor.

The name decides the container. A ``.pth`` keeps the tree of the first input, with its tensors replaced. A safetensors file
or folder uses the names of the state dict.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from streammerge.checkpoints.index import CheckpointIndex
from streammerge.errors import RecipeError, listed, printable
from streammerge.formats import safetensors
from streammerge.formats.records import RECEIPT_KEY
from streammerge.methods.registry import COPY
from streammerge.planning.aligned import Merged, MergedTensors
from streammerge.planning.alignment import Alignment
from streammerge.planning.dispositions.ledger import ONE_FILE, Dispositions
from streammerge.planning.outputs.layout import (
    PLAIN_ENDINGS,
    Accounting,
    Layout,
    Placed,
    PlacedTensors,
    PlannedOutput,
    blank_sums,
    hashes_of,
    metadata_of,
    stays_enclosed,
)
from streammerge.planning.receipt import ITSELF, escaped, files_beside, input_files, planned
from streammerge.planning.views import Indexes
from streammerge.recipe.adapted import parts_of
from streammerge.recipe.document import to_json
from streammerge.recipe.locations import travelling, travelling_names
from streammerge.recipe.model import Recipe
from streammerge.recipe.names import is_held
from streammerge.recipe.stage_names import stage_of
from streammerge.stores.base import Location
from streammerge.stores.checksums import CRC32, CRC32C
from streammerge.stores.locations import parse
from streammerge.tensors.spec import TensorSpec

PICKLED_ENDINGS = (".pth", ".pt", ".ckpt", ".bin", ".th", ".tar")


def ending_of(name: str) -> str:
    """Returns the ending by which a file's name says what the file is; "" if its last dot belongs to the name.

    Models are called ``Llama-3.1-8B-mean`` and ``mean-v0.2``.
    """
    dot = name.rfind(".")
    return name[dot:] if dot > 0 and re.fullmatch(r"\.[A-Za-z]\w*", name[dot:]) else ""


def container_of(out: Location, first: CheckpointIndex | None = None) -> str:
    """Returns "safetensors", "pickle" or "folder" for an output's name. Raises RecipeError for any other name.

    Endings may be capitals, as some file systems and programs write them; the name stays as it is given.
    ``first``: the first input. A file whose name has another ending, or none (``g_05000000``), is of a program whose loader
    expects such names. An output with the same ending is a file of the same format.
    """
    if out.ends_in_slash or out.store.is_always_folder(out) or out.is_folder():
        return "folder"
    ending = out.suffix.lower()
    if ending == ".safetensors":
        return "safetensors"
    if ending in (*PICKLED_ENDINGS, *PLAIN_ENDINGS):
        return "pickle"
    if ending == ".gguf":
        raise RecipeError(
            f"{printable(out.name)}: GGUF is read and not written; end the name in / for a folder, and make a GGUF file of "
            "it with llama.cpp's convert_hf_to_gguf.py"
        )
    endings = (out.suffix, ending_of(out.name))
    if first is not None and not first.in_memory and first.path.suffix in endings and first.path.is_file():
        if first.container.members and first.container.enclosed is None:
            raise RecipeError(
                f"{printable(out.name)}: an archive whose weights are no single file is read and not written; end the name "
                "in .safetensors or .ckpt"
            )
        return "pickle" if first.container.pickled else "safetensors"
    if not endings[1]:
        return "folder"
    raise RecipeError(
        f"{printable(out.name)} does not say what to write; end it in .safetensors, in .pth (.pt, .ckpt, .bin, .th, .pkl) "
        "or in / for a folder"
    )


def like_first(first: CheckpointIndex) -> Location:
    """Returns a name for an output of the first input's kind, where the user names none."""
    if first.in_memory or first.path.is_file():
        return parse("merged" + (".safetensors" if first.in_memory else ending_like(first.path)))
    return parse("merged/")


def ending_like(first: Location) -> str:
    """Returns the ending of an output of the same kind as this file. GGUF is not written, so it becomes safetensors."""
    ending = first.suffix
    return ending if ending == ending_of(first.name) and ending.lower() != ".gguf" else ".safetensors"


def plan_output(out: Location, recipe: Recipe, indexes: Indexes, alignment: Alignment, hashed: bool) -> PlannedOutput:
    """Plans the output of these tensors under the name ``out``. Pure: nothing is written.

    ``hashed``: the receipt holds the SHA-256 of whole input files.
    """
    first = indexes[recipe.checkpoints[0]]
    kind, name = container_of(out, first), out.name
    names = travelling_names(recipe)
    origins = _named(names, indexes)
    inputs = input_files(origins)
    if alignment.tokenized is not None:
        models = {own: parse(path) for path, own in names.items() if not (is_held(path) or stage_of(path))}
        inputs |= files_beside(models, alignment.tokenized.read)
    receipt = planned(
        json.loads(to_json(travelling(recipe).to_dict())),
        inputs,
        recipe.seed,
        CRC32 if kind == "pickle" or (kind == "folder" and _is_pickled_folder(recipe, first)) else CRC32C,
        hashed,
        computed=recipe.merge_method is not COPY
        or recipe.recast is not None
        or any(i.adapters or i.made_from or i.quantised for i in indexes.values()),
        held={name: index.nbytes for name, index in origins.items() if index.in_memory},
    )
    made = _planned(kind, name, recipe, first, indexes, alignment, Accounting(receipt, origins, alignment))
    made.inputs = inputs
    return made


def _named(names: Mapping[str, str], indexes: Indexes) -> dict[str, CheckpointIndex]:
    """Returns the name that each checkpoint and each adapter has in the receipt, with its index. Instead of a stage, its
    models."""
    return named_origins(names, {each.path: index for each, index in indexes.items()})


def named_origins(names: Mapping[str, str], indexes: Mapping[str, CheckpointIndex]) -> dict[str, CheckpointIndex]:
    """Returns the name in a receipt of each checkpoint and adapter -> its index. ``names``: path -> name in the receipt.
    ``indexes``: what a recipe calls a model -> its index. Instead of a stage, it has the models of the stage."""
    found: dict[str, CheckpointIndex] = {}
    for text, index in indexes.items():
        parts = (index,) if index.plain is None else (index.plain, *index.adapters)
        for path, part in zip(parts_of(text), parts, strict=True):
            if part.made_from:
                found |= named_origins(names, part.made_from)
            elif path in names:  # while a stage is planned, the models of those before it have no names
                found[names[path]] = part
    return found


def _planned(
    kind: str,
    name: str,
    recipe: Recipe,
    first: CheckpointIndex,
    indexes: Indexes,
    alignment: Alignment,
    accounting: Accounting,
) -> PlannedOutput:
    merged = alignment.merged
    if kind != "folder" and any(first.parts):
        models = listed([each or "." for each in first.parts])
        from streammerge.planning.dispositions.files import is_file_of_folder  # here, because most outputs are possible

        which = "files" if all(map(is_file_of_folder, first.parts.values())) else "subfolders"
        raise RecipeError(
            f"{printable(first.path)} holds several models ({models}), which no program loads from one file; "
            f"end the output's name in /, or give one of the {which}"
        )
    if kind != "folder":
        _place_beside(name, first, alignment.dispositions)
        _note_tokens(recipe, first, alignment)
    elif first.container.members:
        why = "in the archive of the first input, which the output is not"
        alignment.dispositions.add("file", first.container.members, "dropped", why)
    if kind != "folder" and recipe.output.keep_optimizer and first.container.own_files:
        alignment.notes.append(
            "`keep_optimizer` is without effect, because the optimizer of the first input is in parts of several ranks"
        )
    if kind == "pickle":
        from streammerge.planning.outputs.pickled import pickled_output

        return pickled_output(name, recipe, first, indexes, alignment, accounting)
    dispositions = Dispositions()
    dispositions.update(alignment.dispositions)
    if kind == "folder" and _is_pickled_folder(recipe, first):
        return _folder(recipe, first, indexes, alignment, accounting, dispositions)
    for thing, why in _left_behind(first) if first.extras is not None else ():
        dispositions.add("entry", thing, "dropped", why)
    if kind == "folder":
        return _folder(recipe, first, indexes, alignment, accounting, dispositions)
    metadata = metadata_of(recipe, first)
    dispositions.add("entry", hashes_of(first), "dropped", ONE_FILE)
    if isinstance(merged, MergedTensors):
        names, kinds = merged.columns()
    else:
        specs = {spec.name: (spec, m) for m in merged for spec in (m.spec, *_tied_specs(m))}
        names, kinds = list(specs), [spec for spec, _ in specs.values()]
    sums = {ITSELF: blank_sums([spec.nbytes for spec in kinds])}
    receipt, accounts = accounting.of([merged] if isinstance(merged, MergedTensors) else merged)
    receipt = replace(receipt, checksums=sums, dispositions=dispositions.record())
    metadata[RECEIPT_KEY] = receipt.text()
    file, starts = safetensors.plan_columns(name, names, kinds, metadata)
    file = file._replace(receipt=escaped(receipt.text()))
    layout = Layout((file,), receipt)
    if isinstance(merged, MergedTensors):
        return PlannedOutput(layout, [PlacedTensors(merged, 0, starts)], dispositions=dispositions, accounts=accounts)
    placed = [Placed(spec, m, 0, start) for (spec, m), start in zip(specs.values(), starts, strict=True)]
    return PlannedOutput(layout, placed, dispositions=dispositions, accounts=accounts)


def _note_tokens(recipe: Recipe, first: CheckpointIndex, alignment: Alignment) -> None:
    """Says what a file cannot hold: its vocabulary, if it is not that beside the first input."""
    tokens = alignment.tokenized
    if tokens is not None and tokens.vocabulary.edited:
        count = len(tokens.vocabulary.new)
        alignment.warnings.append(
            f"the output is one file, so the vocabulary with {count} new tokens is not written; end the output's name in / "
            "for a folder that has it"
        )
    elif tokens is not None:
        from streammerge.checkpoints.tokens import vocabulary_folder

        if vocabulary_folder(first.path) != tokens.vocabulary.giver.file.parent:
            alignment.notes.append(f"the output's tokens are those of {printable(tokens.vocabulary.giver.file)}")
    if recipe.chat_template is not None:
        alignment.warnings.append("the output is one file, which has no chat template; end its name in / for a folder")


def _left_behind(first: CheckpointIndex) -> Iterator[tuple[str, str]]:
    from streammerge.planning.dispositions.entries import left_behind

    return left_behind(first)


def _place_beside(name: str, first: CheckpointIndex, dispositions: Dispositions) -> None:
    """Records what becomes of all that the first input holds beside its weights, where the output is one file."""
    if stays_enclosed(name, first):
        dispositions.add("file", first.container.members, "copied")
    else:
        dispositions.add("file", [*_beside(first), *first.container.members], "dropped", "the output is one file")


def _beside(first: CheckpointIndex) -> list[str]:
    """Returns the names of the files and subfolders beside the weights, if the first input is a folder."""
    if first.in_memory or not first.path.is_folder():
        return []
    own = {file.name for file in first.files}
    own |= {above.name for file in first.files for above in file.parents if above.parent == first.path}
    return [
        each.name + "/" * each.is_folder()
        for each in first.path.children()
        if each.name not in own and not each.name.startswith(".")
    ]


def _is_pickled_folder(recipe: Recipe, first: CheckpointIndex) -> bool:
    from streammerge.planning.outputs.folder import is_pickled  # here, because files do without folders and configurations

    return is_pickled(recipe, first)


def _folder(*planned: Any) -> PlannedOutput:
    from streammerge.planning.outputs.folder import folder_output

    return folder_output(*planned)


def _tied_specs(merged: Merged) -> list[TensorSpec]:
    return [TensorSpec(name, merged.spec.dtype, merged.spec.shape) for name in merged.tied]
