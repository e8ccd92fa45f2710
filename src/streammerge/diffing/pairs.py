"""Finds which tensors of two checkpoints are compared, and what headers tell of both. Reads headers only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from streammerge.checkpoints.config_differences import differing_configs
from streammerge.checkpoints.index import CheckpointIndex
from streammerge.diffing.numbers import COMPARED, COMPARED_WITH_BASE
from streammerge.errors import listed, printable
from streammerge.formats.records import RECEIPT_KEY, RECIPE_KEY
from streammerge.planning.budget import Budget
from streammerge.planning.costs import budget_of
from streammerge.planning.experts import conformed
from streammerge.planning.tasks import MergeTask
from streammerge.planning.views import View
from streammerge.sources.base import Source
from streammerge.sources.deflated import PackedKey, records
from streammerge.sources.stored import Stored
from streammerge.sources.table import same_names
from streammerge.stores.base import Location, Status
from streammerge.tensors.dtypes import DType
from streammerge.tensors.matching import Matching, describe, match
from streammerge.tensors.spec import TensorSpec

_WIDE = (DType.F64, DType.C128, DType.I64, DType.U64)
_REAL = ("float", "int", "bool")
_PARAMETERS: dict[str, dict[str, Any]] = {kind: {"kind": kind} for kind in ("float", "int", "bool", "complex", "packed")}
"""One object for each kind, because tensors with equal parameters are read together."""


@dataclass(slots=True)
class Pair:
    """A tensor that both have: its name in A and in B, its specification in both, and the number of its task.

    ``task`` is None if the numbers cannot be compared, because shapes or kinds of dtypes differ.
    """

    name: str
    other: str
    a: TensorSpec
    b: TensorSpec
    task: int | None = None


@dataclass(slots=True)
class Comparison:
    """The plan of a comparison: pairs in the order of A, and tasks in the order of reading.

    ``only_a`` and ``only_b``: names without a partner. ``ties``: sentences about names that are tied on one side only.
    ``extras``: a sentence about what differs beside the tensors, "" for nothing. The other fields are those of
    :class:`~streammerge.planning.plan.Plan`.
    """

    pairs: list[Pair]
    tasks: list[MergeTask]
    only_a: list[str]
    only_b: list[str]
    ties: list[str]
    extras: str
    expressions: list[Source]
    spooled: dict[PackedKey, str]
    budget: Budget
    memory_bytes: int
    io: str
    identities: dict[Location, Status]
    pickle_bytes: int
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    executor: str = "threads"
    out: Location | None = None

    @property
    def read_bytes(self) -> int:
        return sum(task.read_bytes for task in self.tasks) + sum(record.nbytes for _, record in self.spooled)


def plan_comparison(
    a: CheckpointIndex, b: CheckpointIndex, base: CheckpointIndex | None, memory_bytes: int, workers: int, io: str
) -> Comparison:
    """Returns the plan of a comparison. Raises BudgetError if ``memory_bytes`` is too small, MismatchError for experts
    whose form cannot be told."""
    ours, notes = View(a, a.entries, a.aliases), [*a.notes, *b.notes, *(base.notes if base else ())]
    theirs, matched = _partners(ours, b, notes)
    ancestor, ancestors = _partners(ours, base, notes) if base is not None else (None, dict[str, str]())
    pairs, jobs = list[Pair](), list[tuple[Pair, tuple[Source, ...]]]()
    for name, entry in ours.entries.items():
        other = matched.get(name)
        if other is None:
            continue
        two = theirs.entries[other]
        pair = Pair(name, other, entry.spec, two.spec)
        first = ours.aliases.get(name)
        if first is not None and first in matched and _is_tied(theirs, other, matched[first]):
            continue  # the same tensor once more, in both
        pairs.append(pair)
        if _comparable(entry.spec, two.spec):
            known = ancestors.get(name) or ancestors.get(first or name)
            three = ancestor.entries[known] if ancestor is not None and known else None
            fits = three is not None and entry.spec.dtype.kind != "packed" and _comparable(entry.spec, three.spec)
            jobs.append((pair, (three, entry, two) if three is not None and fits else (entry, two)))
    tasks = _tasks(jobs)
    expressions = list({s.place: s for task in tasks for s in task.sources if s.__class__ is not Stored}.values())
    spooled: dict[PackedKey, str] = {}
    for source in expressions:
        for record in records(source):
            spooled.setdefault(record, source.spec.name)
    opened = [a, b, *([base] if base is not None else [])]
    held = [index.container.held_bytes for index in opened]
    reading = max(index.container.reading_bytes for index in opened)
    pickle_bytes = sum(held) + max(2 * max(held), reading)  # reading a pickle takes two copies of it beside its tree
    budget, io = budget_of(tasks, memory_bytes, workers, io, bool(spooled), pickle_bytes)
    used = set(matched.values())
    return Comparison(
        pairs,
        tasks,
        [name for name in ours.entries if name not in matched and ours.aliases.get(name) not in matched],
        [name for name in theirs.entries if name not in used and theirs.aliases.get(name) not in used],
        [*_ties(ours, theirs, matched)],
        _extras(a, b),
        expressions,
        spooled,
        budget,
        memory_bytes,
        io,
        {path: known for index in opened for path, known in index.identities().items()},
        pickle_bytes,
        list(dict.fromkeys(notes)),
        list(dict.fromkeys([w for index in opened for w in index.warnings] + differing_configs([a, b]))),
    )


def _partners(ours: View, index: CheckpointIndex, notes: list[str]) -> tuple[View, Mapping[str, str]]:
    """Returns the view of a checkpoint, and our name -> its name, matched as merges match them. Adds notes about it."""
    theirs, note = conformed(ours, View(index, index.entries, index.aliases))
    notes += [note] if note else []
    if same_names(ours.entries, theirs.entries):
        return theirs, {name: name for name in ours.entries}
    found: Matching = match(*({n: e.spec.shape for n, e in view.entries.items()} for view in (ours, theirs)))
    notes += [f"{printable(index.path)}: {text}" for text in describe(found.names)]
    notes += [
        f"{printable(index.path)}: {each.tensors} tensors may be the same once '{printable(each.theirs)}' in their names "
        f"is read as '{printable(each.ours)}', which is not certain"
        for each in found.doubtful
    ]
    return theirs, found.names


def _comparable(a: TensorSpec, b: TensorSpec) -> bool:
    """Whether the numbers of two tensors can be compared: equal shapes, and real, complex or equally packed numbers."""
    if a.shape != b.shape:
        return False
    return (
        a.dtype is b.dtype or (a.dtype.kind in _REAL and b.dtype.kind in _REAL) or a.dtype.kind == b.dtype.kind == "complex"
    )


def _is_tied(view: View, one: str, two: str) -> bool:
    return one == two or view.entries[one].place == view.entries[two].place


def _tasks(jobs: list[tuple[Pair, tuple[Source, ...]]]) -> list[MergeTask]:
    """Returns the tasks, sorted by the place in A, so that its pages are read once and in sequence."""
    ranks: dict[Any, int] = {}
    keys = []
    for _, sources in jobs:
        path, offset = sources[-2].begin
        keys.append((ranks.setdefault(path, len(ranks)), offset))
    tasks, cursor = list[MergeTask](), 0
    for number in sorted(range(len(jobs)), key=keys.__getitem__):
        pair, sources = jobs[number]
        based = len(sources) > 2
        compute = "float64" if any(source.spec.dtype in _WIDE for source in sources) else "float32"
        method = COMPARED_WITH_BASE if based else COMPARED
        pair.task = len(tasks)
        tasks.append(MergeTask(pair.a, method, sources, 0, cursor, _PARAMETERS[pair.a.dtype.kind], compute, based))
        cursor += pair.a.nbytes  # as neighbours, so that short tensors make batches
    return tasks


def _ties(ours: View, theirs: View, matched: Mapping[str, str]) -> Iterator[str]:
    """Yields sentences about names that are one tensor on one side only."""
    back = {other: name for name, other in matched.items()}
    for side, view, partner, far in (("A", ours, matched, theirs), ("B", theirs, back, ours)):
        apart, absent = list[str](), list[str]()
        for name, first in view.aliases.items():
            if first not in partner:
                continue
            if name not in partner:
                absent.append(name)
            elif not _is_tied(far, partner[name], partner[first]):
                apart.append(name)
        other = "B" if side == "A" else "A"
        if apart:
            yield f"{listed(apart)}: tied in {side}, separate in {other}"
        if absent:
            yield f"{listed(absent)}: tied in {side}, not stored a second time in {other}"


def _extras(a: CheckpointIndex, b: CheckpointIndex) -> str:
    """Returns a sentence about entries that are no tensors and differ, "" if none do."""
    one, two = _entries(a), _entries(b)
    said = []
    for what, keys in (
        ("differs", [key for key in one if key in two and not _alike(one[key], two[key])]),
        ("is in A only", [key for key in one if key not in two]),
        ("is in B only", [key for key in two if key not in one]),
    ):
        if keys:
            said.append(f"{listed(keys, 6)} {what if len(keys) == 1 else _plural(what)}")
    return "; ".join(said)


def _plural(words: str) -> str:
    return words.replace("differs", "differ").replace("is in", "are in")


def _alike(one: Any, two: Any) -> bool:
    return repr(one) == repr(two)  # NaN equals NaN


def _entries(index: CheckpointIndex) -> dict[str, Any]:
    if index.container.pickled:
        data = index.plain_data()
        return {str(key): value for key, value in data.items()} if isinstance(data, dict) else {}
    return {k: v for k, v in index.metadata.items() if k not in (RECIPE_KEY, RECEIPT_KEY, "format")}
