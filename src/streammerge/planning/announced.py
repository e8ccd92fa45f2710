"""Compares what configurations announce with the tensors of the inputs and of the output."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from streammerge.checkpoints.config import CONFIG, Tree, tree_of
from streammerge.checkpoints.index import CheckpointIndex
from streammerge.errors import printable
from streammerge.planning.aligned import Merged, MergedTensors, named, unlike
from streammerge.planning.outputs.layout import Layout
from streammerge.planning.views import Indexes
from streammerge.sources.table import same_tensors
from streammerge.tensors.spec import TensorSpec


def disagreements(indexes: Indexes, merged: Sequence[Merged], layout: Layout) -> list[str]:
    """Returns a sentence for each thing that the configuration of an input, or of the output, announces wrongly."""
    said, known = list[str](), list[tuple[CheckpointIndex, Tree, list[str]]]()
    for index in indexes.values():
        if index.in_memory or index.made_from:
            continue
        for part in index.parts.values() or [index]:
            tree = tree_of(part.path)
            if not tree:
                continue
            found = next((f for i, t, f in known if same_tensors(i.entries, part.entries) and t == tree), None)
            if found is None:
                from streammerge.checkpoints.announced import unannounced

                stored = part.plain or part  # what an adapter changes, the output's configuration follows
                found = unannounced(tree, stored.specs(), stored.aliases)
                known.append((part, tree, found))
            said += [f"{printable(part.path)}: {each}" for each in found]
    first = next(iter(indexes.values()))
    if layout.as_folder and not first.parts:
        written = next((file for file in layout.files if file.name == CONFIG), None)
        if written is not None or not _has_all_of_first(merged):
            from streammerge.checkpoints.announced import unannounced

            tree = _tree(b"".join(each.data for each in written.literals)) if written else tree_of(first.path)
            ties = {name for m in _tied(merged) for name in m.tied}
            before = {each.partition(": ")[2] for each in said}
            said += [f"the output: {each}" for each in unannounced(tree, _specs(merged), ties) if each not in before]
    return said


def _has_all_of_first(merged: Sequence[Merged]) -> bool:
    """Whether the tensors are surely those of the first checkpoint. Asks for no name."""
    if not isinstance(merged, MergedTensors) or len(merged) != len(merged.views.tables[0]):
        return False
    return not any(m.added for m in unlike(merged))


def _tree(data: bytes) -> Tree:
    try:
        tree: Any = json.loads(data)
    except ValueError:
        return {}
    return tree if isinstance(tree, dict) else {}


def _tied(merged: Sequence[Merged]) -> Iterator[Merged]:
    return (m for _, m in named(merged) if m.tied)


def _specs(merged: Sequence[Merged]) -> Mapping[str, TensorSpec]:
    found = {name: m.spec for name, m in named(merged)}
    return found | {name: m.spec for m in _tied(merged) for name in m.tied}
