"""Decides what becomes of each entry of a pickle beside the chosen state dict.

A copy of the weights (a running average, a second state dict, a list without names) that every model has is merged with
its counterparts. A copy that only some have would be stale, so it is left out. Single tensors of floating-point numbers
that every model has in the same shape are merged too. All else is copied from the checkpoint that gives the container,
without the state of the training.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, field, replace
from typing import Any

from streammerge.checkpoints.index import CheckpointIndex
from streammerge.errors import RecipeError, listed, printable
from streammerge.methods.registry import COPY
from streammerge.pickles.candidates import Candidate, Found, dotted, inside
from streammerge.pickles.copies import Originals, node_at, numbers_outside, outside, tensor_at, trail, unread_outside
from streammerge.pickles.state_dict import Selection
from streammerge.pickles.training_state import (
    bars,
    is_measurement,
    is_record,
    is_training_state,
    masters_in,
    states_elsewhere,
)
from streammerge.pickles.tree import MISSING, FieldName, TensorRef, mapping_items, number, walk
from streammerge.planning.dispositions.ledger import Fate
from streammerge.recipe.model import Recipe, Reference
from streammerge.tensors.conventions import AVERAGED, PROGRESS
from streammerge.tensors.names import is_counter

Indexes = Mapping[Reference, CheckpointIndex]
STALE = "not in every input, so it would be stale"
AVERAGE = "the chosen weights stand here too"
LENT = "the input has none"
OPTIMIZER = "stale after a merge; `keep_optimizer=True` keeps the first input's"
EMPTIED = "stale after a merge, so None is in its place; `keep_optimizer=True` keeps the first input's"
NUMBERS = "plain numbers that differ"
RECORDS = "settings and records of the first input's training, which differ"
BESIDE = "a safetensors file holds tensors only"
OUTSIDE = "outside the state dict that is written; `state_dict` chooses it"
ONE_COPY = "the output holds one copy of the weights; `state_dict` and `ema` choose it"


@dataclass(slots=True)
class Copy:
    """Tensors beside the chosen state dict that are merged like it.

    ``tensors``: name in the merge -> the tensor of the checkpoint that gives the container. A copy's tensors have the names
    of the chosen ones that they are copies of, so that the same rules and gradients take them. ``indexes``: the same
    tensors of each checkpoint. ``candidate``: None for single tensors, which are no copy of the weights.
    """

    label: str
    tensors: dict[str, Found]
    indexes: dict[Reference, CheckpointIndex]
    candidate: Candidate | None = None

    @property
    def prefix(self) -> str:
        """Returns what stands before the names of the chosen tensors in the copy, such as ``module.``."""
        return next((f.name.removesuffix(name) for name, f in self.tensors.items() if f.name.endswith(name)), "")

    def output_name(self, name: str) -> str:
        """Returns a name that no other tensor of the output has."""
        return f"{self.label}.{self.tensors[name].name}" if self.candidate else name


@dataclass(frozen=True, slots=True)
class Drop:
    """An entry that is left out, or stays as ``instead``. A member of a list or tuple becomes None."""

    name: str
    holder: Any
    key: Any
    why: str
    instead: Any = MISSING

    @property
    def fate(self) -> Fate:
        return "edited" if self.instead is None else "dropped"


@dataclass(slots=True)
class Entries:
    """The decisions.

    ``averaged``: (name, tensor, name of the chosen tensor that stands in its place). ``kept``: why -> names of tensors that
    are the first input's. ``told``: the same for those that a user must know of. ``foreign``: copies and single tensors
    that only other inputs have. ``numbers``: plain numbers that differ; they are the first input's. ``records``: the same
    in records of the training and in settings.
    """

    copies: list[Copy] = field(default_factory=list)
    averaged: list[tuple[str, Found, str]] = field(default_factory=list)
    drops: list[Drop] = field(default_factory=list)
    kept: dict[str, list[str]] = field(default_factory=dict)
    told: dict[str, list[str]] = field(default_factory=dict)
    foreign: list[str] = field(default_factory=list)
    numbers: list[str] = field(default_factory=list)
    records: list[str] = field(default_factory=list)


def decide(recipe: Recipe, indexes: Indexes, first: CheckpointIndex) -> Entries:
    """Returns what becomes of the entries of ``first``, which gives the container."""
    return _Deciding(recipe, indexes, first).run()


class _Deciding:
    def __init__(self, recipe: Recipe, indexes: Indexes, first: CheckpointIndex) -> None:
        self.recipe, self.indexes, self.first = recipe, indexes, first
        self.conversion = recipe.merge_method is COPY and len(indexes) == 1
        self.lent = recipe.merge_method is COPY and any(rule.copy for rule in recipe.rules)
        """Whether the first checkpoint only lends its container to the tensors of another one."""
        models = [recipe.of(entry) for entry in recipe.entries]
        self.needed = [index for each, index in indexes.items() if index is first or any(each.same(m) for m in models)]
        self.entries = Entries()
        self.taken: set[int] = set()
        self.originals: dict[int, tuple[Originals, dict[int, str]]] = {}
        self.partners: set[int] = set()
        self.stale: list[tuple[Candidate, list[CheckpointIndex]]] = []

    def _originals(self, index: CheckpointIndex) -> Originals:
        return self._known(index)[0]

    def _names(self, index: CheckpointIndex) -> dict[int, str]:
        """Returns the identity of each tensor of the chosen candidates -> its name in the merge."""
        return self._known(index)[1]

    def _known(self, index: CheckpointIndex) -> tuple[Originals, dict[int, str]]:
        if id(index) not in self.originals:
            self.originals[id(index)] = Originals(index.selection.chosen), _chosen_names(index)
        return self.originals[id(index)]

    def run(self) -> Entries:
        selection, entries = self.first.selection, self.entries
        if self.first.extras is None or self.first.format == "sharded PyTorch":
            return entries
        if self.recipe.output.only:
            from streammerge.planning.dispositions.pruned import WHY, pruned  # here, because most outputs have all

            entries.drops += [Drop(name, holder, key, WHY) for name, holder, key in pruned(self.first)]
            return entries
        self.taken = _taken(selection)
        for averaged, name in selection.left_out:
            self._stands_in(averaged.name, averaged, name)
        for candidate in selection.copies:
            self._decide(candidate)
        entries.drops += self._stale_copies()
        entries.foreign += dict.fromkeys(candidate.label for candidate in self._foreign())
        if not self.recipe.output.keep_optimizer:
            entries.drops += self._training_state()
        elif (path := next(masters_in(self.first.extras), None)) is not None:
            raise RecipeError(
                f"{printable(self.first.path)}: the optimizer holds the weights in float32 ({_shown(path)}), from which "
                "training would go on instead of from the merge; leave `keep_optimizer` out"
            )
        if self.lent:
            single = [".".join(map(str, path)) for path, _ in outside(self.first.extras, self.taken)]
            entries.told |= {LENT: single} if single else {}
        elif not self.conversion:
            self._decide_single()
            self._tell_numbers()
            entries.foreign += dict.fromkeys(self._foreign_single())
        return entries

    # -- copies -----------------------------------------------------------------------------------------------------

    def _decide(self, candidate: Candidate) -> None:
        selection = self.first.selection
        known = self._originals(self.first).of(candidate)
        asked = self.recipe.ema != "ignore" or self._reference.state_dict is not None
        averaged = asked and any(c.averaged for c in selection.chosen) and not self.conversion
        plain = averaged and not candidate.averaged  # the loader reads the plain weights
        if known and (plain or self.lent):
            for found in candidate.tensors:
                name = self._names(self.first).get(id(known.get(found.name)))
                if name is not None:
                    self._stands_in(f"{candidate.label}.{found.name}", found, name)
            return
        weights = bool(known) or (candidate.averaged and any(f.ref.shape for f in candidate.tensors))
        if not weights:
            return  # its tensors are decided one by one
        partners = {id(index): self._partner(index, candidate) for index in self.needed}
        lacking = [index for index in self.needed if partners[id(index)] is None]
        lacking += [index for index in self.indexes.values() if self.lent and index is not self.first]
        if lacking:
            self.stale.append((candidate, lacking))
            return
        self.entries.copies.append(self._copy(candidate, partners))

    def _foreign(self) -> Iterator[Candidate]:
        """Yields the copies of the weights in other models that have no counterpart in the first checkpoint."""
        ours = {candidate.path for candidate in self.first.selection.candidates}
        for index in self.needed:
            for candidate in index.selection.copies:
                known = candidate.path in ours or id(candidate) in self.partners
                if not known and self._originals(index).of(candidate):
                    yield candidate

    def _stands_in(self, own: str, found: Found, name: str) -> None:
        self.entries.averaged.append((own, found, name))
        self.taken.add(id(found.node or found.ref))

    def _partner(self, index: CheckpointIndex, candidate: Candidate) -> Candidate | None:
        """Returns the same copy in another checkpoint: at the same place, or the only one of its kind elsewhere."""
        if index.adapters:  # they update the chosen weights only
            return None
        if index is self.first:
            return candidate
        usable = [c for c in index.selection.candidates if not c.stale]
        same = next((c for c in usable if c.path == candidate.path), None)
        if same is not None:
            return same if same.kind == candidate.kind else None
        ours = {c.path for c in self.first.selection.candidates}
        chosen = index.selection.chosen
        others = [c for c in usable if c.path not in ours and c.kind == candidate.kind and c not in chosen]
        others = [c for c in others if c.averaged == candidate.averaged and _shapes(c) == _shapes(candidate)]
        if len(others) != 1:
            return None
        self.partners.add(id(others[0]))
        return others[0]

    def _copy(self, candidate: Candidate, partners: Mapping[int, Candidate | None]) -> Copy:
        label = candidate.label
        tensors = self._table(self.first, candidate, label)
        made = dict(self.indexes)
        for each, index in self.indexes.items():
            partner = partners[id(index)] if id(index) in partners else self._partner(index, candidate)
            if partner is not None:
                table = tensors if index is self.first else self._table(index, partner, label)
                made[each] = _as_numbers(index.with_tensors((name, found.ref) for name, found in table.items()))
        base = next((each for each in made if self.recipe.base is not None and each.same(self.recipe.base)), None)
        if base is not None and made[base] is self.indexes[base]:
            tensors = self._beside_base(base, made, tensors)
        self.taken.update(id(found.ref) for found in tensors.values())
        return Copy(label, tensors, made, candidate)

    def _table(self, index: CheckpointIndex, candidate: Candidate, label: str) -> dict[str, Found]:
        """Returns the tensors of a copy: under the names of the chosen ones, or under their path without a counterpart."""
        (originals, names), table = self._known(index), dict[str, Found]()
        known = originals.of(candidate)
        for found in candidate.tensors:
            home = known.get(found.name)
            table[f"{label}.{found.name}" if home is None else names[id(home)]] = found
        return table

    def _beside_base(
        self, base: Reference, made: dict[Reference, CheckpointIndex], tensors: dict[str, Found]
    ) -> dict[str, Found]:
        """Makes the weights of a base that has no such copy the ancestors of the copy's tensors.

        Returns the tensors that have an ancestor. The others are decided one by one.
        """
        from streammerge.tensors.matching import match  # here, because most bases have the copies of their models

        ours, theirs = ({n: e.spec.shape for n, e in index.entries.items()} for index in (self._own(made), made[base]))
        chosen = set(self._names(self.first).values())
        common = {name: other for name, other in match(ours, theirs).names.items() if name in chosen}
        wanted = {base: set(common.values()), self._reference: set(common)}
        for each, index in made.items():
            names = wanted.get(each)
            if names is None and index is not self.indexes[each]:
                known = set(self._names(self.indexes[each]).values())
                names = {name for name in index.entries if name in known}
            if names is not None:
                made[each] = index.only(names)
        return {name: found for name, found in tensors.items() if name in common}

    @property
    def _reference(self) -> Reference:
        return next(each for each, index in self.indexes.items() if index is self.first)

    def _own(self, made: Mapping[Reference, CheckpointIndex]) -> CheckpointIndex:
        return made[self._reference]

    def _stale_copies(self) -> Iterator[Drop]:
        """Yields the copies that not every model has. Two of them may be all that their mapping holds."""
        refs = {id(found.ref) for candidate, _ in self.stale for found in candidate.tensors}
        self.taken |= refs
        seen: set[tuple[int, Any]] = set()
        for candidate, lacking in self.stale:
            drop = dropped(candidate, self.first, lacking, refs)
            if (id(drop.holder), drop.key) not in seen:
                seen.add((id(drop.holder), drop.key))
                yield drop

    # -- the state of the training ----------------------------------------------------------------------------------

    def _training_state(self) -> Iterator[Drop]:
        """Yields optimizer, scheduler and scaler in a merged state dict, and at every level above it. Those that stand
        elsewhere are known by their content only."""
        tree, seen = self.first.extras, set[tuple[int, Any]]()
        copies = [copy.candidate for copy in self.entries.copies if copy.candidate]
        for candidate in [*self.first.selection.chosen, *copies]:
            nodes = [tree, *(value for _, _, value in trail(tree, candidate.path))]
            parts = (*candidate.path, MISSING) if candidate.others else candidate.path
            for node, part in zip(nodes, parts, strict=False):
                holder, items = inside(node)
                members = isinstance(holder, list | tuple)
                for key, value in items if members or holder is node else ():
                    if isinstance(value, TensorRef):
                        continue
                    stale = key != part and value is not None and is_training_state(key, value)
                    if stale and (id(holder), key) not in seen:
                        seen.add((id(holder), key))
                        self.taken.add(id(value))
                        yield Drop(_shown((key,)), holder, key, EMPTIED if members else OPTIMIZER)
        for path, holder, key, value in states_elsewhere(tree):
            if (id(holder), key) not in seen and id(value) not in self.taken:
                self.taken.add(id(value))
                yield Drop(_shown(path), holder, key, OPTIMIZER)

    # -- single tensors ---------------------------------------------------------------------------------------------

    def _decide_single(self) -> None:
        for path, kind in unread_outside(self.first.extras, self.taken):
            self.entries.told.setdefault(unread(kind), []).append(".".join(map(str, path)))
        single = list(outside(self.first.extras, self.taken))
        if not single:
            return
        known = [self.first, *(self._own(copy.indexes) for copy in self.entries.copies)]
        merged = {e.place for index in known for e in (index.plain or index).entries.values() if e.nbytes}
        others = {each: index for each, index in self._giving.items() if index is not self.first}
        tensors: dict[str, Found] = {}
        theirs: dict[Reference, list[tuple[str, TensorRef]]] = {each: [] for each in others}
        for path, ref in single:
            name = ".".join(map(str, path))
            if self.first.container.locate(name, ref).place in merged:
                continue  # a merged tensor under another path
            found = {each: tensor_at(index.extras, path) for each, index in others.items()}
            if _is_count(path):  # a base that is no model has no part in a count
                found = {each: other for each, other in found.items() if other is not None or self._is_needed(others[each])}
            why = _why_kept(path, ref, list(found.values()))
            if why:
                quiet = any(map(bars, path)) and ref.dtype.kind not in ("float", "complex")  # random states
                table = self.entries.kept if quiet else self.entries.told
                table.setdefault(why, []).append(name)
                continue
            tensors[name] = Found(name, ref)
            for each, other in found.items():
                theirs[each] += [(name, other)] if other is not None else []
        if tensors:
            made = {each: index.with_tensors(theirs[each]) for each, index in others.items()}
            own = made[self._reference] = self.first.with_tensors((name, found.ref) for name, found in tensors.items())
            for each in others:
                lacking = {name: entry for name, entry in own.entries.items() if name not in made[each].entries}
                made[each] = replace(made[each], entries={**made[each].entries, **lacking})
            self.entries.copies.append(Copy("", tensors, {each: made[each] for each in self.indexes if each in made}))

    def _tell_numbers(self) -> None:
        """Notes plain numbers that differ, such as a ``log_alpha``, which may be part of the model."""
        others = [index.extras for index in self.needed if index is not self.first]
        for path, value in numbers_outside(self.first.extras, self.taken):
            known = _is_count(path) or any(isinstance(part, str) and re.fullmatch(PROGRESS, part) for part in path)
            if not known and any(number(node_at(tree, path)) not in (None, value) for tree in others):
                quiet = any(map(bars, path)) or any(map(is_record, path))
                (self.entries.records if quiet else self.entries.numbers).append(_shown(path))

    def _foreign_single(self) -> Iterator[str]:
        """Yields the names of the single tensors of other models for which the first checkpoint has nothing."""
        for index in self.needed:
            if index is self.first or index.extras is None or index.format == "sharded PyTorch":
                continue
            copies = {id(found.ref) for candidate in index.selection.copies for found in candidate.tensors}
            merged = {entry.place for entry in index.entries.values() if entry.nbytes}
            for path, ref in outside(index.extras, _taken(index.selection) | copies):
                name = ".".join(map(str, path))
                known = tensor_at(self.first.extras, path) is not None or any(map(bars, path))
                if not known and index.container.locate(name, ref).place not in merged:
                    yield name

    def _is_needed(self, index: CheckpointIndex) -> bool:
        """Whether it is one of the models."""
        return any(index is needed for needed in self.needed)

    @property
    def _giving(self) -> dict[Reference, CheckpointIndex]:
        """The models and the base: all that give a merge its tensors."""
        base = self.recipe.base
        return {
            each: index
            for each, index in self.indexes.items()
            if self._is_needed(index) or (base is not None and each.same(base))
        }


def _as_numbers(index: CheckpointIndex) -> CheckpointIndex:
    """Returns a copy of the weights with its quantised weights as numbers. Raises RecipeError for packed ones, which have
    other names than their numbers."""
    if not index.may_be_quantised:
        return index
    from streammerge.quantised.dequantised import dequantised  # here, because most copies are not quantised

    made = dequantised(index)
    packed = [weight.stored[0] for name, weight in made.quantised.items() if name != weight.stored[0]]
    if packed:
        raise RecipeError(
            f"{printable(index.path)} holds a copy of the weights that is packed too ({listed(packed)}), which is not "
            "written; write a .safetensors file, which holds one copy"
        )
    return made


def _why_kept(path: tuple[Any, ...], ref: TensorRef, theirs: list[TensorRef | None]) -> str:
    """Returns why a single tensor stays the first input's; empty if it is merged."""
    for each in theirs:
        if each is None:
            return "not in every input"
        if each.shape != ref.shape:
            return "of another shape in another input"
        if each.dtype.kind != ref.dtype.kind:
            return "of another dtype in another input"
    if any(map(is_record, path)) or (not ref.shape and any(map(is_measurement, path))):
        return "a record of the training"
    return "" if _is_count(path) or ref.dtype.kind in ("float", "complex") else "no floating-point numbers"


def unread(kind: str) -> str:
    """Returns why a tensor in a form that is not read stays the first input's."""
    return f"{kind}, so not merged"


def _is_count(path: tuple[Any, ...]) -> bool:
    return isinstance(path[-1], str) and is_counter(path[-1])


def dropped(
    candidate: Candidate,
    first: CheckpointIndex,
    lacking: Iterable[CheckpointIndex],
    refs: Set[int] = frozenset(),
    why: str = STALE,
) -> Drop:
    """Returns how a copy is left out, with what belongs to it: the decay and the counters beside averaged weights.

    ``refs``: the identities of all tensors that are left out. ``lacking``: the checkpoints without it. One of them may have
    None in its place, which the program wrote itself. Then the output has None too.
    """
    own = {id(found.ref) for found in candidate.tensors} | refs
    steps = trail(first.extras, candidate.path)
    for depth, (holder, key, value) in enumerate(steps, start=1):
        if depth < len(steps) and not (_is_averaged(key) and _holds_only(value, own)):
            continue
        path = candidate.path[:depth]
        others = [trail(index.extras, path) for index in lacking]
        nothing = any(len(other) == depth and other[-1][2] is None for other in others)
        return Drop(".".join(map(printable, path)), holder, key, why, None if nothing else MISSING)
    return Drop(candidate.label, None, None, why)


def _shown(path: tuple[Any, ...]) -> str:
    """Returns the name of an entry. The position in a list or tuple at the top stands in brackets."""
    own = [part for part in path if not isinstance(part, FieldName)] or path
    first = f"[{own[0]}]" if isinstance(own[0], int) else str(own[0])
    return ".".join((first, *map(str, own[1:])))


def _is_averaged(key: Any) -> bool:
    return isinstance(key, str) and re.fullmatch(AVERAGED, key) is not None


def _holds_only(value: Any, refs: set[int]) -> bool:
    return all(id(node) in refs for _, node in walk(value) if isinstance(node, TensorRef))


def _chosen_names(index: CheckpointIndex) -> dict[int, str]:
    """Returns the identity of each tensor of the chosen candidates -> its name in the merge."""
    selection, renamed = index.selection, {old: new for new, old in index.renamed.items()}
    names = {}
    for candidate in selection.chosen:
        for found in candidate.tensors:
            name = found.name if len(selection.chosen) == 1 else dotted((*candidate.path, found.name))
            names[id(found)] = renamed.get(name, name)
    return names


def _taken(selection: Selection) -> set[int]:
    """Returns the identities of the mappings that hold nothing but chosen tensors, and of all other chosen tensors."""
    whole = [c for c in selection.chosen if c.kind == "state dict" and not c.others and not selection.left_out]
    if len(whole) == len(selection.chosen):
        return {id(candidate.tensors[0].holder) for candidate in whole}
    return {id(found.node or found.ref) for found in selection.tensors}


def _shapes(candidate: Candidate) -> list[tuple[int, ...]]:
    return [found.ref.shape for found in candidate.tensors]


# ------------------------------------------------------------------------------------------- outputs without a container


def left_behind(first: CheckpointIndex) -> Iterator[tuple[str, str]]:
    """Yields (name, why) of what an output without a pickle does not hold: other copies, single tensors, plain data."""
    tree, selection = first.extras, first.selection
    if tree is None or first.format == "sharded PyTorch":
        return
    taken = _taken(selection) | {id(averaged.ref) for averaged, _ in selection.left_out}
    tops = {candidate.path[0] for candidate in selection.chosen if candidate.path}
    originals = Originals(selection.chosen)
    read = {id(found.ref) for found in selection.tensors if found.node is not None}
    for candidate in selection.copies:
        taken.update(id(found.ref) for found in candidate.tensors)
        tops.update(candidate.path[:1])
        if all(id(found.ref) in read for found in candidate.tensors):
            continue  # its averages stand in the place of the plain weights
        weights = candidate.averaged or originals.of(candidate)
        yield candidate.label, ONE_COPY if weights else OUTSIDE
    for path, _ in outside(tree, taken):
        tops.add(path[0])
        yield ".".join(map(printable, path)), OUTSIDE
    for path, kind in unread_outside(tree, taken):
        tops.add(path[0])
        yield ".".join(map(printable, path)), f"{kind}, which a safetensors file does not hold"
    for key, value in mapping_items(tree) or ():
        if key not in tops and not isinstance(value, TensorRef):
            yield printable(key), BESIDE
