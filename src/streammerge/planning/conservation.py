"""Accounts for every tensor of every input: merged into what, copied, tied, fused, or left out and why.

What the output reads is found by the places of bytes, and not by names, so that an account does not repeat a mistake of the
alignment. Most tensors follow a rule: they go into the tensor of their own name, all in one way. An account counts these,
and names the others. Tensors of tables are counted by way, without an object for each.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from streammerge.checkpoints.index import CheckpointIndex
from streammerge.errors import MismatchError, printable
from streammerge.methods.registry import COPY
from streammerge.pickles.training_state import bars
from streammerge.pickles.tree import TensorRef, walk
from streammerge.planning.aligned import Merged, MergedTensors, Way, unlike
from streammerge.planning.alignment import BY_RULE, Alignment
from streammerge.sources.base import BlobPath, Source
from streammerge.sources.stored import Stored
from streammerge.sources.table import StoredTable
from streammerge.tensors.bundles import bundled, form_of, shown
from streammerge.tensors.names import why_optional
from streammerge.units import counted

Fate = Literal["merged", "copied", "tied", "fused", "read", "training", "dropped"]
TRAINING = "the state of the training, which belongs to no merged model"
AVERAGED = "the average is asked for in its place"
_BESIDE = "beside the weights"
HELPERS = "a helper of quantised weights, which are numbers with it"
_NUMBERS = "a number of the adapter, which was read"
_ABSENT = "the first input lacks it"
_OTHER_DICT = "another state dict or copy, which the output has no place for"
_SINGLE = "beside the weights; the output has what the first input has there"
_EMPTY = "it has no elements to merge"
_PART = "no part of the merge takes it"
_REPLACED = "an adapter has another in its place"
_COPIED_FROM = "only rules copy from this model"
Label = tuple[Fate, str]
"""The fate of a tensor, and why or how."""


@dataclass(slots=True, eq=False)
class _Group:
    """The tensors of one fate. ``names``: of some that keep their names. ``moved``: (name, name in the output) of those
    that do not. ``count``: all of them."""

    count: int = 0
    names: list[str] = field(default_factory=list)
    moved: list[tuple[str, str]] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class Account:
    """What became of the tensors of one checkpoint. ``spooled``: how many are unpacked into a temporary file first."""

    checkpoint: str
    tensors: int = 0
    spooled: int = 0
    groups: dict[Label, _Group] = field(default_factory=dict)

    def add(self, label: Label, name: str, into: str = "") -> None:
        group = self.groups.setdefault(label, _Group())
        group.count += 1
        if into and into != name:
            group.moved.append((name, into))
        else:
            group.names.append(name)

    def add_many(self, label: Label, count: int) -> None:
        """Adds tensors that go into the tensors of their own names."""
        self.groups.setdefault(label, _Group()).count += count

    def count(self, *fates: Fate) -> int:
        return sum(group.count for (fate, _), group in self.groups.items() if fate in fates)

    def unused(self) -> Iterator[tuple[str, list[str]]]:
        """Yields (why, names) of what is left out although nobody asked for it. The state of a training does not count."""
        for (fate, why), group in self.groups.items():
            if fate == "dropped" and not why.startswith((BY_RULE, AVERAGED, _COPIED_FROM)):
                yield why, group.names

    def record(self) -> dict[str, Any]:
        """Returns the account as data for JSON. The largest group of tensors that are used under their names is without
        names; all other names are given as :func:`bundled` writes them."""
        used = [group.count - len(group.moved) for (fate, _), group in self.groups.items() if fate != "dropped"]
        most, fates = max(used, default=0), list[dict[str, Any]]()
        for (fate, why), group in sorted(self.groups.items(), key=lambda each: each[0]):
            said = {"fate": fate, "why": why}
            same = group.count - len(group.moved)
            if same and fate != "dropped" and same == most:
                fates.append({**said, "count": same})
                most = -1
            elif same:
                fates.append({**said, "count": same, "names": bundled(sorted(group.names))})
            forms: dict[object, list[tuple[str, str]]] = {}
            for name, into in sorted(group.moved):
                forms.setdefault((form_of(name), form_of(into)), []).append((name, into))
            for pairs in forms.values():
                names, into_names = bundled(name for name, _ in pairs), bundled(into for _, into in pairs)
                fates.append({**said, "count": len(pairs), "names": names, "into": into_names})
        spooled = {"spooled": self.spooled} if self.spooled else {}
        return {"checkpoint": self.checkpoint, "tensors": self.tensors, **spooled, "fates": fates}


def unused_text(accounts: Iterable[Account]) -> str:
    """Returns in one line what is not used, "" if everything is."""
    said = []
    for each in accounts:
        found = list(each.unused())
        if found:
            count = sum(len(names) for _, names in found)
            why = ", ".join(f"{shown(bundled(names), 3)} ({reason})" for reason, names in found)
            said.append(f"{count:,} of {counted(each.tensors, 'tensor')} of {printable(each.checkpoint)}: {why}")
    return f"not used: {'; '.join(said)}" if said else ""


def is_alarming(accounts: Iterable[Account]) -> bool:
    """Whether anything is not used that a loader needs."""
    return any(not why.startswith(f"{_ABSENT};") for each in accounts for why, _ in each.unused())


def used_text(accounts: Sequence[Account]) -> str:
    """Returns in one line what the inputs have and what is used of it, for a plan."""
    total = sum(each.tensors for each in accounts)
    training = sum(each.count("training") for each in accounts)
    dropped = sum(each.count("dropped") for each in accounts)
    lost = sum(len(names) for each in accounts for _, names in each.unused())
    said = [f"{total - training - dropped:,} of {counted(total, 'tensor')} of {counted(len(accounts), 'input')}"]
    said += [f"{training:,} of a training"] * bool(training)
    said += [f"{dropped - lost:,} left out by rules"] * bool(dropped - lost) + [f"{lost:,} not used"] * bool(lost)
    return ", ".join(said) if len(said) > 1 else f"all {said[0].partition(' of ')[2]}"


def refuse_unused(accounts: Iterable[Account], disagreements: Sequence[str]) -> None:
    """Raises MismatchError if a tensor is not used, or if a configuration disagrees with its tensors."""
    said = [*filter(None, [unused_text(accounts)]), *disagreements]
    if said:
        raise MismatchError(
            f"`strict=True` refuses this merge: {'; '.join(said)}; leave `strict` out to merge all the same"
        )


def accounts_of(
    named: Mapping[str, CheckpointIndex], alignment: Alignment, made: Iterable[Merged | MergedTensors | Source]
) -> list[Account]:
    """Returns the account of each checkpoint.

    ``named``: name of each checkpoint in the receipt -> its index. ``made``: all that the output holds: tensors that are
    merged or copied, and the sources of those beside the weights.
    """
    uses, reasons = _Uses(made), _Reasons(alignment)
    return [_account(name, index, uses, reasons) for name, index in named.items()]


def _account(name: str, index: CheckpointIndex, uses: _Uses, reasons: _Reasons) -> Account:
    entries = index.entries if index.stored is None else index.stored.entries
    account = Account(name, len(entries))
    table = entries if isinstance(entries, StoredTable) else None
    lost: Iterable[tuple[str, Source]]
    if table is not None and id(table) in uses.tables:
        lost = [(table.names[row], table.at(row)) for row in uses.of_table(table, account)]
    else:
        lost = entries.items()
    why, helpers = _Why(index, reasons), _helpers(index)
    for own, entry in lost:
        old = index.renamed.get(own, own)
        account.spooled += _is_deflated(entry)
        use = uses.of(entry)
        if use and own in index.aliases:
            first = index.aliases[own]
            account.add(("tied", ""), old, index.renamed.get(first, first))
        elif use:
            account.add(use[0] if own in index.entries else ("read", HELPERS), old, use[1])
        elif own in helpers and ((codes := helpers[own]) is None or uses.of(entries[codes])):
            account.add(("read", HELPERS), old)  # such as the shape of a pack, which its header tells too
        else:
            account.add(why.of(own, entry), old)
    _add_others(index, uses, account)
    return account


def _helpers(index: CheckpointIndex) -> dict[str, str | None]:
    """Returns the tensors that only help to read quantised weights -> the codes of the weight. None for scales of
    activations."""
    if not index.quantised:
        return {}
    from streammerge.quantised.dequantised import scales_activations  # here, because most weights are plain

    of_activations: dict[str, str | None] = dict.fromkeys(filter(scales_activations, index.stored or ()))
    return of_activations | {name: each.stored[0] for each in index.quantised.values() for name in each.stored[1:]}


def _add_others(index: CheckpointIndex, uses: _Uses, account: Account) -> None:
    """Adds the tensors of a pickle beside the chosen state dict."""
    for part in index.parts.values():
        _add_others(part, uses, account)
    if not index.container.pickled or index.parts or index.extras is None:
        return
    selection = index.selection
    chosen = {id(found.ref) for found in selection.tensors}
    replaced = {id(found.node) for found in selection.tensors if found.node is not None}
    training = {id(f.ref) for each in selection.candidates if each.barred or each.stale for f in each.tensors}
    dicts = {id(f.ref) for each in selection.candidates if each.kind != "loose tensors" for f in each.tensors}
    for path, node in walk(index.extras):
        if not isinstance(node, TensorRef) or id(node) in chosen:
            continue
        chosen.add(id(node))
        label = ".".join(map(str, path))
        account.tensors += 1
        source = index.container.locate(label, node)
        if use := uses.of(source):
            account.add(use[0], label, use[1])
        elif id(node) in training or any(map(bars, path)):
            account.add(("training", TRAINING), label)
        elif id(node) in replaced:
            account.add(("dropped", AVERAGED), label)
        else:
            account.add(("dropped", _OTHER_DICT if id(node) in dicts else _SINGLE), label)


class _Uses:
    """What an output reads: rows of tables, and places of bytes."""

    def __init__(self, made: Iterable[Merged | MergedTensors | Source]) -> None:
        self.tables: dict[int, list[tuple[MergedTensors, int]]] = {}
        self._numbers: dict[BlobPath, int] = {}
        self._near: tuple[BlobPath, int] = (None, -1)
        self._exact: dict[tuple[object, ...], tuple[Label, str]] = {}
        self._held: dict[int, list[tuple[int, int, Label, str]]] = {}
        self._sorted = False
        seen = set[int]()
        for each in made:
            if isinstance(each, MergedTensors):
                for number, table in enumerate(each.views.tables):
                    self.tables.setdefault(id(table), []).append((each, number))
            for one in unlike(each) if isinstance(each, MergedTensors) else [each]:
                if id(one) not in seen:  # a tensor under several names comes several times
                    seen.add(id(one))
                    self._add(one)

    def _add(self, one: Merged | Source) -> None:
        if isinstance(one, Source):
            self._add_source(one, ("copied", _BESIDE), one.spec.name)
            return
        label = label_of(one)
        for source in (*one.sources, *([one.rest] if one.rest is not None else [])):
            self._add_source(source, label, one.spec.name)

    def _add_source(self, source: Source, label: Label, into: str) -> None:
        if source.__class__ is Stored:
            self._put(source, label, into)
            return
        from streammerge.sources.joined import Joined

        if isinstance(source, Joined) and len(source.pieces) > 1:
            label = "fused", label[1]
        for leaf in _leaves(source):
            self._put(leaf, label, into)

    def _number(self, path: BlobPath) -> int:
        if path is not self._near[0]:  # a path's hash takes its time
            self._near = path, self._numbers.setdefault(path, len(self._numbers))
        return self._near[1]

    def _key(self, leaf: Source) -> tuple[object, ...]:
        if isinstance(leaf, Stored):
            return self._number(leaf.path), leaf.offset, leaf.spec.nbytes
        from streammerge.sources.deflated import Deflated

        if isinstance(leaf, Deflated):
            return self._number(leaf.path), *leaf.record.span, leaf.within.offset
        blobs = leaf.blobs
        return (self._number(blobs[0].path), *blobs[0][1:]) if blobs else leaf.place

    def _put(self, leaf: Source, label: Label, into: str) -> None:
        key = self._key(leaf)
        if key in self._exact:
            return
        self._exact[key] = label, into
        if not _is_deflated(leaf):
            for path, offset, nbytes in leaf.blobs:
                if nbytes:
                    self._held.setdefault(self._number(path), []).append((offset, nbytes, label, into))

    def of(self, source: Source) -> tuple[Label, str] | None:
        """Returns what becomes of a tensor of an input, and the name of a tensor of the output that it goes into."""
        if not self._exact:
            return None
        if source.__class__ is Stored:
            return self._found(source)
        found = [self._found(leaf) for leaf in _leaves(source)]
        return next(filter(None, found), None)

    def _found(self, leaf: Source) -> tuple[Label, str] | None:
        exact = self._exact.get(self._key(leaf))
        if exact is not None or _is_deflated(leaf):
            return exact
        if not self._sorted:
            for held in self._held.values():
                held.sort(key=lambda each: each[:2])
            self._sorted = True
        for path, offset, nbytes in leaf.blobs:
            held = self._held.get(self._number(path), [])
            at = max(bisect_left(held, (offset,)) - 1, 0)  # one that begins before may reach into it
            while at < len(held) and held[at][0] < offset + nbytes:
                if held[at][0] + held[at][1] > offset:
                    return held[at][2:]
                at += 1
        return None

    def of_table(self, table: StoredTable, account: Account) -> list[int]:
        """Adds the tensors of a table that are merged as rows to its account. Returns the rows of the others."""
        there = self.tables[id(table)]
        ways: dict[int, tuple[Way, int]] = {}
        plain = sum(len(merged) for merged, _ in there) == len(table)
        for merged, number in there:
            plain = plain and merged.views.theirs[number] is None
            objects: dict[int, Any] = {id(made): made for made in merged.made}  # a table may have as many ways as tensors
            for key, count in Counter(map(id, merged.made)).items():
                known = ways.get(key)
                ways[key] = (known[0] if known else objects[key], (known[1] if known else 0) + count)
        labels = {key: label_of(way.like) for key, (way, _) in ways.items() if isinstance(way, Way)}
        numbers = {key: number for number, key in enumerate(labels, start=1)}
        covers = all(isinstance(way, Way) and number in way.tables for (_, number) in there for way, _ in ways.values())
        if plain and covers and len(set(labels.values())) == 1:
            account.add_many(next(iter(labels.values())), len(table))
            return []
        by_row = array("I", bytes(4 * len(table)))
        moved: dict[int, str] = {}
        for merged, number in there:
            takes = {key: numbers[key] for key in labels if number in ways[key][0].tables}
            theirs, first = merged.views.theirs[number], merged.views.tables[0]
            for made, row in zip(merged.made, merged.rows, strict=True):
                taken = takes.get(id(made), 0)
                own = row if theirs is None else theirs[row]
                if taken and own >= 0:
                    by_row[own] = taken
                    if theirs is not None and table.names[own] != first.names[row]:
                        moved[own] = first.names[row]
        found = list(labels.values())
        lost = list[int]()
        for row, taken in enumerate(by_row):
            if not taken:
                lost.append(row)
            else:
                account.add(found[taken - 1], table.names[row], moved.get(row, "") if moved else "")
        return lost


def label_of(m: Merged) -> Label:
    """Returns what happens to the inputs of a tensor of the output."""
    if m.method is not COPY or m.inner is not None:
        return "merged", f"by {(m.inner or m.method).name}"
    others = [source for source in m.sources if source.__class__ is not Stored]
    if not others:
        return "copied", m.why
    from streammerge.sources.merged import methods_in

    # a copy of what another merge makes, such as a quantised result
    found = next((method for source in others for method in methods_in(source)), None)
    return ("copied", m.why) if found is None else ("merged", f"by {found.name}")


def _is_deflated(source: Source) -> bool:
    if source.__class__ is Stored:
        return False
    from streammerge.sources.deflated import Deflated

    return isinstance(source, Deflated)


def _leaves(source: Source) -> Iterator[Source]:
    """Yields the inner sources that read bytes."""
    parts = source.parts
    if not parts:
        yield source
    for part in parts:
        yield from _leaves(part)


class _Reasons:
    """Why tensors of the first checkpoint are left out, and how those that stay are made."""

    def __init__(self, alignment: Alignment) -> None:
        self.alignment = alignment

    @cached_property
    def dropped(self) -> dict[str, str]:
        """Name -> why the first's tensor is left out."""
        return dict(self.alignment.dispositions.dropped("tensor"))

    @cached_property
    def made(self) -> dict[str, Merged]:
        """Name in the first checkpoint -> the tensor of the output, of those that are like no other."""
        return {name: m for m in unlike(self.alignment.merged) for name in m.base_names}


class _Why:
    """Why tensors of one checkpoint are left out."""

    def __init__(self, index: CheckpointIndex, reasons: _Reasons) -> None:
        self.index, self.reasons = index, reasons

    @cached_property
    def views(self) -> list[tuple[Mapping[str, Source], Mapping[str, str] | None]]:
        """The tensors in each view of the checkpoint, and name there -> name in the first view; None for a first view."""
        found: list[tuple[Mapping[str, Source], Mapping[str, str] | None]] = []
        for view, matched in self.reasons.alignment.viewed:
            if view.index.path == self.index.path or (view.index.plain and view.index.plain.path == self.index.path):
                turned = None if matched is None else {theirs: ours for ours, theirs in matched.items()}
                found.append((view.entries, turned))
        return found

    def of(self, name: str, entry: Source) -> Label:
        if not self.views and self.index.selection and any(self.index is each for each in self._adapters):
            return "read", _NUMBERS
        why = _PART if self.views else _COPIED_FROM
        for entries, first in self.views:
            if name not in entries:
                continue
            ours = name if first is None else first.get(name)
            if ours is None:
                reason = why_optional(name, entry.spec.shape)
                return "dropped", _ABSENT + (f"; it is of {reason}" if reason else "")
            if ours in self.reasons.dropped:
                return "dropped", self.reasons.dropped[ours]
            made = self.reasons.made.get(ours)
            if made is not None and made.why:
                return "dropped", made.why if made.why.startswith(BY_RULE) else f"the first input's is kept: {made.why}"
            replaced = self._adapters and entries[name] != entry
            why = _REPLACED if replaced else "the merge method does not use this model"
        return ("dropped", why) if entry.spec.numel or why != _PART else ("copied", _EMPTY)

    @cached_property
    def _adapters(self) -> list[CheckpointIndex]:
        return [each for view, _ in self.reasons.alignment.viewed for each in view.index.adapters]
