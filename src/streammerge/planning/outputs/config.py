"""Plans the edited ``config.json`` of an output folder."""

from __future__ import annotations

import json

from streammerge.checkpoints.huggingface import CONFIG, edited_config, is_embedding, is_head, read_config
from streammerge.checkpoints.index import CheckpointIndex
from streammerge.errors import listed, printable
from streammerge.formats.base import LayoutFile
from streammerge.planning.alignment import Alignment, Merged
from streammerge.planning.dispositions.ledger import Dispositions
from streammerge.planning.outputs.layout import text_file
from streammerge.recipe.model import Recipe
from streammerge.stores.base import Location


def config_file(
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
    return [text_file(CONFIG, json.dumps(edited, indent=2, ensure_ascii=False) + "\n")]


def _has_own_head(merged: list[Merged]) -> bool:
    """Whether the output has a head that differs from the embeddings."""
    embeddings = {
        tuple(s.place for s in m.sources) for m in merged if not is_head(m.spec.name) and is_embedding(m.spec.name)
    }
    return bool(embeddings) and any(
        is_head(m.spec.name) and tuple(s.place for s in m.sources) not in embeddings for m in merged
    )
