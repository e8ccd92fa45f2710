"""Chooses among several copies of the weights, so that every input gives the same copy."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from streammerge.checkpoints.index import CheckpointIndex, index_of
from streammerge.errors import listed, printable
from streammerge.recipe.model import Recipe, Reference
from streammerge.tensors.names import why_optional

if TYPE_CHECKING:
    from streammerge.pickles.candidates import Candidate

_Indexes = dict[Reference, CheckpointIndex]


def agreed(recipe: Recipe, indexes: _Indexes) -> _Indexes:
    """Returns the indexes. Takes another state dict where only that one is in every model.

    One file may have the weights and their average, the other one only the average. Then both give the average. A choice
    of the user stays.
    """
    models = list(dict.fromkeys(next(each for each in indexes if each.same(recipe.of(entry))) for entry in recipe.entries))
    free = recipe.ema == "ignore" and not any(each.state_dict for each in models)
    if not free or len(models) < 2 or not any(indexes[each].selection.copies for each in models):
        return indexes
    first, others = indexes[models[0]], [indexes[each] for each in models[1:]]
    wanted = _common(first, others)
    if wanted is None:
        return _by_names(indexes, models)
    return {each: _taken(index, wanted) if each in models else index for each, index in indexes.items()}


def differing_keys(indexes: Iterable[CheckpointIndex]) -> list[str]:
    """Returns a note if the inputs have their weights under different keys, which may mean different things.

    Two files with the voice of one speaker each have them under the speakers' names.
    """
    below = [each for each in indexes if each.extras is not None and _is_below_a_key(each)]
    if len({each.selection.label for each in below}) < 2:
        return []
    said = [f"{printable(each.selection.label)} in {printable(each.path)}" for each in below]
    return [f"the weights that are merged are those of {listed(said, 4)}"]


def _is_below_a_key(index: CheckpointIndex) -> bool:
    return len(index.selection.chosen) == 1 and bool(index.selection.chosen[0].path)


def _common(first: CheckpointIndex, others: list[CheckpointIndex]) -> Candidate | None:
    """Returns the state dict of the first that every other one has too, under the same keys."""
    chosen = first.selection.chosen
    if all(_at(other, candidate) for other in others for candidate in chosen):
        return chosen[0] if len(chosen) == 1 else None
    return next((copy for copy in _copies(first) if all(_at(other, copy) for other in others)), None)


def _at(index: CheckpointIndex, wanted: Candidate) -> Candidate | None:
    usable = (c for c in index.selection.candidates if not c.barred and c.kind != "list")
    return next((c for c in usable if c.path == wanted.path), None)


def _copies(index: CheckpointIndex) -> list[Candidate]:
    """Returns the other state dicts that hold the weights too."""
    from streammerge.pickles.copies import Originals

    selection = index.selection
    usable = [c for c in selection.copies if not c.barred and c.kind != "list"]
    originals = Originals(selection.chosen)
    return [c for c in usable if originals.of(c)]


def _taken(index: CheckpointIndex, wanted: Candidate | None) -> CheckpointIndex:
    """Returns the index with the wanted state dict taken."""
    selection = index.selection
    if wanted is None or index.adapters or wanted.path in [c.path for c in selection.chosen]:
        return index  # adapters update the state dict that is taken already
    made = index_of(index.container, index.path, state_dict=wanted.label)
    note = f"{printable(index.path)}: '{wanted.label}' was taken, since not every input has '{printable(selection.label)}'"
    return replace(made, notes=[*made.notes, note])


def _by_names(indexes: _Indexes, models: list[Reference]) -> _Indexes:
    """Takes the copies whose names are those of another input, where the keys above them differ."""
    made = dict(indexes)
    first = models[0]
    for other in models[1:]:
        ours, theirs = made[first].selection, made[other].selection
        if _alike(_names(ours.chosen), _names(theirs.chosen), 0.5):
            continue
        for copy in _copies(made[other]):
            if _alike(_names(ours.chosen), _names([copy]), 0.9):
                made[other] = _taken(made[other], copy)
                break
        else:
            fits = (copy for copy in _copies(made[first]) if _alike(_names([copy]), _names(theirs.chosen), 0.9))
            made[first] = _taken(made[first], next(fits, None))
    return made


def _names(candidates: Iterable[Candidate]) -> set[str]:
    tensors = (found for candidate in candidates for found in candidate.tensors)
    return {found.name for found in tensors if not why_optional(found.name, found.ref.shape)}


def _alike(one: set[str], two: set[str], share: float) -> bool:
    return len(one & two) >= share * max(len(one), len(two))
