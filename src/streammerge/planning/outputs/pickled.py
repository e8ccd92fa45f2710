"""Plans a ``.pth`` or ``.pkl`` output: the tree of the first input with its tensors replaced and stale parts removed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from streammerge.checkpoints.index import CheckpointIndex
from streammerge.errors import RecipeError, printable
from streammerge.formats import plain_pickle, torch_zip
from streammerge.formats.base import LayoutFile
from streammerge.formats.records import RECEIPT_KEY, RECIPE_KEY
from streammerge.pickles.repickle import Edit, stream
from streammerge.pickles.tree import OrderedTree
from streammerge.planning.aligned import Merged
from streammerge.planning.alignment import Alignment
from streammerge.planning.conservation import Account
from streammerge.planning.dispositions.ledger import Dispositions
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
from streammerge.planning.outputs.tree_builder import BARE, Builder
from streammerge.planning.receipt import ITSELF
from streammerge.planning.views import Indexes
from streammerge.recipe.document import to_yaml
from streammerge.recipe.model import Recipe
from streammerge.sources.base import Source

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
    builder = Builder(edit, plain, plain and holders is not None)
    notes: list[str] = []
    dispositions = Dispositions()
    dispositions.update(alignment.dispositions)
    if name.lower().endswith(PLAIN_ENDINGS) and not plain:
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
        from streammerge.planning.outputs.tree_edits import edit_tree  # here, because safetensors inputs have no tree

        notes += edit_tree(recipe, base, indexes, alignment, builder, dispositions)
    else:
        for key, m in holders.items():
            edit.replaced[id(tree[key])] = builder.stand_in(m.spec.name, tree[key])
    sums = blank_sums([spec.nbytes for spec, _, _ in builder.tensors.values()])
    made = (m or source for _, m, source in builder.tensors.values())
    told = beside(sums, dispositions, filter(None, chain(made, builder.kept)))
    if plain:
        headers = [plain_pickle.header(key, text) for key, text in told.items()]
        pickle = stream(tree, edit, headers=headers, origin=printable(base.path))
        file = plain_pickle.plan_layout(name, pickle, told[RECEIPT_KEY])
    else:
        pickle = stream(tree, edit, origin=printable(base.path))
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
    if name.lower().endswith(PLAIN_ENDINGS):
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
            tree[name] = replace(BARE)
            holders[name] = m
    return tree, holders
