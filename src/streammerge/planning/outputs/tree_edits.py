"""Edits the tree of the first input, which becomes the output's: its tensors are replaced, its stale parts left out.

Only :mod:`streammerge.planning.outputs.pickled` loads it, and only if the first input has a tree.
"""

from __future__ import annotations

from typing import Any

from streammerge.checkpoints.index import CheckpointIndex
from streammerge.errors import RecipeError, listed, printable
from streammerge.pickles.candidates import Found
from streammerge.pickles.repickle import Edit
from streammerge.pickles.tree import TensorRef, mapping_items
from streammerge.planning.aligned import Merged
from streammerge.planning.alignment import Alignment
from streammerge.planning.copies import AlignedCopy, align_copies, record_entries
from streammerge.planning.dispositions.entries import Entries, decide
from streammerge.planning.dispositions.ledger import Dispositions
from streammerge.planning.outputs.bookkeeping import drop_facts, merge_bookkeeping
from streammerge.planning.outputs.tree_builder import Builder
from streammerge.planning.views import Indexes
from streammerge.recipe.model import Recipe


def edit_tree(
    recipe: Recipe,
    base: CheckpointIndex,
    indexes: Indexes,
    alignment: Alignment,
    builder: Builder,
    dispositions: Dispositions,
) -> list[str]:
    """Puts what is merged into the first input's tree, by the edits of ``builder``. Returns notes.

    Raises RecipeError if the tree cannot hold what is merged.
    """
    edit, merged = builder.edit, alignment.merged
    stored = (base.plain or base).entries
    new = [m for m in merged if m.added or stored.keys().isdisjoint(m.base_names)]  # also what an adapter adds to its base
    home = {name: m.spec.name for m in merged for name in m.base_names if not m.added and name in stored}
    entries = decide(recipe, indexes, base)
    copies = align_copies(recipe, base, entries, alignment)
    _add(base, indexes, new, edit, builder)
    renames = _edit_first(base, recipe, home, edit, builder)
    for own, found, chosen in entries.averaged:
        if chosen in home:
            _put(found, builder.standing_in(own, found, home[chosen], base.entries[chosen]), edit, builder)
    _edit_beside(entries, copies, renames, edit, builder)
    notes = record_entries(entries, copies, dispositions)
    if len(alignment.shares) > 1:
        trees = [index.extras for index, _ in alignment.shares]
        said = merge_bookkeeping(trees, [weight for _, weight in alignment.shares], edit)
        if said:
            notes.append(f"bookkeeping: {', '.join(said)}")
            dispositions.add("entry", said, "edited", "bookkeeping")
        notes += drop_facts(trees, edit, dispositions)
    builder.place_rest(base.extras, base, home)
    return notes


def _edit_first(
    base: CheckpointIndex, recipe: Recipe, home: dict[str, str], edit: Edit, builder: Builder
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


def _put(found: Found, name: str, edit: Edit, builder: Builder) -> None:
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
    builder: Builder,
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


def _add(base: CheckpointIndex, indexes: Indexes, added: list[Merged], edit: Edit, builder: Builder) -> None:
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


def _add_state_dicts(base: CheckpointIndex, indexes: Indexes, added: list[Merged], edit: Edit, builder: Builder) -> bool:
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
