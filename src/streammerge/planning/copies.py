"""Aligns the copies of the weights, and the single tensors beside them, as the chosen weights are aligned."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from streammerge.checkpoints.index import CheckpointIndex
from streammerge.errors import MismatchError, RecipeError, listed
from streammerge.methods.registry import COPY
from streammerge.planning.aligned import Merged
from streammerge.planning.alignment import Alignment, align
from streammerge.planning.dispositions.entries import AVERAGE, NUMBERS, RECORDS, Copy, Entries, dropped
from streammerge.planning.dispositions.ledger import Dispositions, Fate
from streammerge.recipe.model import Recipe
from streammerge.units import counted


@dataclass(slots=True)
class AlignedCopy:
    """The tensors of a copy in the output. ``homes``: name in the merge -> name of the tensor of the output.

    A tensor that every input ties to a chosen one is that one: it has a home and is not in ``merged``. ``added``: (key in
    the mapping, tensor) of those that only another input has.
    """

    copy: Copy
    merged: list[Merged]
    homes: dict[str, str]
    added: list[tuple[str, Merged]]


def align_copies(recipe: Recipe, first: CheckpointIndex, entries: Entries, alignment: Alignment) -> list[AlignedCopy]:
    """Returns the aligned copies. Moves a copy that cannot be merged to those that are left out or kept."""
    made = []
    known = _Known(alignment.merged) if entries.copies else None
    single = replace(recipe, rules=(), dtype=None, out_dtype=None)  # statistics stay as precise as they are
    for copy in list(entries.copies):
        try:
            aligned = align(recipe if copy.candidate else single, copy.indexes)
            _quantise(recipe, copy, aligned)
        except (MismatchError, RecipeError) as error:
            _refuse(copy, entries, first, str(error).partition("\n")[0].rstrip(":"))
            continue
        homes: dict[str, str] = {}
        merged, added = list[Merged](), list[tuple[str, Merged]]()
        for m in aligned.merged:
            if m.added:
                key = copy.prefix + m.spec.name.removeprefix(f"{copy.label}.")
                added.append((key, replace(m, spec=replace(m.spec, name=f"{copy.label}.{key}"))))
                continue
            twin = known.same(m) if known else None
            name = copy.output_name(m.base_names[0]) if twin is None else twin.spec.name
            homes |= dict.fromkeys((n for n in m.base_names if n in copy.tensors), name)
            if twin is None and m.base_names[0] in copy.tensors:
                merged.append(replace(m, spec=replace(m.spec, name=name), tied=()))
        if copy.candidate is not None and copy.candidate.kind == "list" and len(homes) < len(copy.tensors):
            _refuse(copy, entries, first, "a list cannot be without the tensors that a rule leaves out")
            continue
        made.append(AlignedCopy(copy, merged, homes, added))
    return made


def _quantise(recipe: Recipe, copy: Copy, aligned: Alignment) -> None:
    """Quantises a copy of the weights that the first input holds quantised too, if the output is quantised."""
    if recipe.quantise is None or not copy.indexes[recipe.checkpoints[0]].quantised:
        return
    from streammerge.planning.like_base import like_base  # here, because most outputs are not quantised

    like_base(recipe, copy.indexes, aligned)


def _refuse(copy: Copy, entries: Entries, first: CheckpointIndex, why: str) -> None:
    entries.copies.remove(copy)
    if copy.candidate is None:
        entries.told.setdefault(why, []).extend(copy.tensors)
        return
    others = [index for index in copy.indexes.values() if index.path != first.path]
    entries.drops.append(dropped(copy.candidate, first, others, why=f"it would be stale: {why}"))


class _Known:
    """The merged tensors of the chosen state dict, by what they are made from."""

    def __init__(self, merged: Iterable[Merged]) -> None:
        self.by_places = {tuple(s.place for s in m.sources): m for m in merged if m.spec.nbytes}

    def same(self, m: Merged) -> Merged | None:
        """Returns the tensor that has the same numbers in every input and in the output."""
        twin = self.by_places.get(tuple(s.place for s in m.sources)) if m.spec.nbytes else None
        if twin is None or (twin.method, twin.parameters, twin.rest, twin.spec.dtype) != (
            m.method,
            m.parameters,
            m.rest,
            m.spec.dtype,
        ):
            return None
        return twin


def record_entries(entries: Entries, copies: list[AlignedCopy], dispositions: Dispositions) -> list[str]:
    """Records what becomes of the entries beside the chosen weights. Returns notes about tensors that were not merged."""
    for aligned in copies:
        copy, groups = aligned.copy, dict[tuple[Fate, str], list[str]]()
        if copy.candidate is not None:
            dispositions.add("entry", copy.label, "merged", "a copy of the weights")
        made = {m.spec.name: m for m in aligned.merged}
        for name in copy.tensors:
            home = aligned.homes.get(name)
            m = made.get(home) if home else None
            key: tuple[Fate, str] = ("merged", "tied to the chosen weights")
            if home is None:
                key = ("dropped", "like the tensor that it is a copy of")
            elif m is not None:
                key = ("copied", m.why) if m.method is COPY else ("merged", f"by {m.method.name}")
            groups.setdefault(key, []).append(copy.output_name(name))
        for _, m in aligned.added:
            groups.setdefault(("copied", m.why), []).append(m.spec.name)
        for (fate, why), names in groups.items():
            dispositions.add("tensor", names, fate, why)
    dispositions.add("tensor", [name for name, _, _ in entries.averaged], "edited", AVERAGE)
    for drop in entries.drops:
        dispositions.add("entry", drop.name, drop.fate, drop.why)
    dispositions.add("entry", entries.foreign, "dropped", "the first input lacks it")
    for table in (entries.kept, entries.told):
        for why, names in table.items():
            dispositions.add("tensor", names, "copied", why)
    dispositions.add("entry", entries.numbers, "copied", NUMBERS)
    dispositions.add("entry", entries.records, "copied", RECORDS)
    told = {**entries.told, **({NUMBERS: entries.numbers} if entries.numbers else {})}
    notes = [f"kept as the first input has them: {listed(names)} ({why})" for why, names in told.items()]
    if entries.averaged:
        count = counted(len(entries.averaged), "tensor")
        notes.append(f"{count} beside the chosen weights hold these too, since a loader may read them")
    return notes
