"""Decides which tensors of the checkpoints go into each tensor of the output. Reads headers only.

Finds every disagreement before a byte is written, and reports all of them together.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from streammerge.errors import MismatchError, RecipeError, listed, printable
from streammerge.methods.contracts import MergeMethod
from streammerge.methods.registry import COPY, INTEGERS
from streammerge.planning.aligned import Merged, MergedTensors, Views, Way, has_rows_of_first, named, names_of, unlike
from streammerge.planning.dispositions.ledger import Dispositions
from streammerge.planning.matched import MatchedViews, SameNames, matched
from streammerge.planning.mismatch import Differing, Mismatch
from streammerge.planning.missing import KEPT, Ignored, Missing
from streammerge.planning.parameters import ParameterValues, shares
from streammerge.planning.refusals import quantised, refuse_inseparable, refuse_unmerged, refuse_unreadable
from streammerge.planning.ruled import Rules, drops
from streammerge.planning.shapes import Fitted, differ, fit, framed
from streammerge.planning.views import Indexes, Part, Restacked, View, make_parts
from streammerge.recipe.model import Recipe, Reference, Rule
from streammerge.sources.base import Source
from streammerge.sources.stored import Stored as StoredSource
from streammerge.sources.table import StoredTable, same_names
from streammerge.tensors.dtypes import DType, promoted
from streammerge.tensors.names import is_counter, is_state, why_ignored, why_optional
from streammerge.tensors.spec import TensorSpec

if TYPE_CHECKING:
    from streammerge.checkpoints.index import CheckpointIndex
    from streammerge.planning.vocabularies import Tokenized

_DIFFERING = ("differs in shape or dtype", "differ in shape or dtype")
_WIDE = (DType.F64, DType.C128)
BY_RULE = "by the rule for "
"""The begin of each reason that is a rule of the recipe."""
_Sources = list[Source | None]
HELPERS = "they only help to read quantised weights, and the output's are not quantised"
_FITS = Fitted([])
"""Stands for sources that fit together as they are, so that no object is made for most tensors."""


@dataclass(slots=True, eq=False)
class Alignment:
    """``taken``: how many tensors each rule took. ``restacked`` as :class:`parts.Parts` has it.

    ``shares``: each checkpoint, and its weight in means of plain numbers. ``dispositions``: of the tensors.
    ``tokenized``: the output's vocabulary, if the recipe asks for one. ``mixed``: the tensors that have several dtypes in
    the inputs, by the smallest dtype that holds all of them. ``viewed``: each view, with the name in the first view of a
    part -> its name here; None for a first view.
    """

    merged: Sequence[Merged]
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    taken: list[int] = field(default_factory=list)
    restacked: list[Restacked] = field(default_factory=list)
    shares: list[tuple[CheckpointIndex, float]] = field(default_factory=list)
    dispositions: Dispositions = field(default_factory=Dispositions)
    tokenized: Tokenized | None = None
    mixed: dict[DType, list[str]] = field(default_factory=dict)
    viewed: list[tuple[View, Mapping[str, str] | None]] = field(default_factory=list)


def align(recipe: Recipe, indexes: Indexes) -> Alignment:
    """Returns the output's tensors, in the first checkpoint's order. Raises MismatchError and RecipeError."""
    first = indexes[recipe.checkpoints[0]]
    for index in indexes.values():
        refuse_unreadable(index)
    parts = make_parts(recipe, indexes)
    alignment = Alignment([], parts.notes, restacked=parts.restacked)
    alignment.shares = shares(parts.parts[0])
    mismatch = Mismatch(str(first.path))
    rules = Rules(recipe)
    for part in parts.parts:
        _Aligner(recipe, indexes, part, rules, alignment, mismatch).run()
    if mismatch:
        mismatch.quantised = {str(each.path): said for each in indexes.values() if (said := quantised(each))}
    mismatch.refuse(recipe)
    conversion = recipe.merge_method is COPY and len(indexes) == 1
    refuse_inseparable(indexes.values(), alignment.merged, conversion)
    if recipe.on_missing != "error" or recipe.on_shape != "error":
        refuse_unmerged(recipe, indexes, alignment.merged)
    extra = recipe.on_missing == "union"  # what else stays out is said of all inputs in one line
    alignment.warnings += [f'`on_missing="{recipe.on_missing}"`: {row}' for row in mismatch.rows(recipe.on_missing, extra)]
    if not alignment.merged:
        raise RecipeError(
            "the rules leave no tensor over" if first.entries else f"{printable(first.path)} has no tensors to merge"
        )
    if len(parts.parts) > 1 and not parts.restacked:
        order = {name: number for number, name in enumerate(first.entries)}
        alignment.merged = sorted(alignment.merged, key=lambda m: order.get(m.base_names[0], len(order)))
    _check_output_names(alignment.merged)
    _record(alignment)
    if first.stored is not None and recipe.quantise is None:
        gone = [name for name in first.stored.entries if name not in first.entries]
        alignment.dispositions.add("tensor", gone, "dropped", HELPERS)
    alignment.taken = [rules.taken[id(rule)] for rule in recipe.rules]
    alignment.warnings += _idle(recipe, alignment.taken, first.entries)
    if recipe.rename and not any(index.renamed for index in indexes.values()):
        alignment.warnings.append(f"no tensor's name matches `rename` {', '.join(printable(r) for r in recipe.rename)}")
    return alignment


def _idle(recipe: Recipe, taken: list[int], names: Any) -> list[str]:
    """Returns warnings about patterns that match no tensor."""
    said = []
    for rule, count in zip(recipe.rules, taken, strict=True):
        if not count:
            met = any(map(rule.takes, names))
            why = "every tensor that it matches is taken by a rule before it" if met else "no tensor's name matches"
            said.append(f"{recipe.at(rule.path)}the rule for {printable(rule)} took no tensor: {why}")
    prefix = recipe.output.strip_prefix
    if prefix and not any(n.startswith(prefix) for n in names):
        said.append(f"no tensor's name matches `strip_prefix` {printable(prefix)}")
    return said


def _record(alignment: Alignment) -> None:
    """Records what becomes of the tensors of the output."""
    groups: dict[tuple[bool, str], list[str]] = {}
    for name, m in named(alignment.merged):
        key = (False, f"by {m.inner.name}, the leading block") if m.inner else (False, f"by {m.method.name}")
        key = (True, m.why) if m.method is COPY and not m.inner else key
        groups.setdefault(key, []).append(name)
        if m.tied:
            groups[key] += m.tied
    for (copied, why), names in groups.items():
        alignment.dispositions.add("tensor", names, "copied" if copied else "merged", why)


class _Aligner:
    """Aligns the tensors of one part's views by their names."""

    def __init__(
        self,
        recipe: Recipe,
        indexes: Indexes,
        part: Part,
        rules: Rules,
        alignment: Alignment,
        mismatch: Mismatch,
    ) -> None:
        self.recipe, self.indexes, self.part, self.rules = recipe, indexes, part, rules
        self.alignment, self.mismatch = alignment, mismatch
        self.base = part.views[0]
        self.views = MatchedViews(self.base, [self._conformed(view) for view in part.views[1:]])
        for other, doubtful in zip(self.views.others, self.views.doubtful, strict=True):
            if doubtful:
                self.mismatch.doubtful.setdefault(str(other.index.path), []).extend(doubtful)
        self.missing = Missing(recipe, indexes[recipe.checkpoints[0]], self.views, rules, mismatch)
        self.values = ParameterValues(recipe, part)
        self.copies: dict[Reference, tuple[View, Mapping[str, str]]] = {}
        self.remade = Ignored(why_ignored)
        self.valued: dict[tuple[int, int], Way] = {}
        self.declared = {
            id(entry): view.index.declared[entry.spec.name]
            for view in (self.base, *self.views.others)
            if view.index.declared
            for entry in view.entries.values()
            if entry.spec.name in view.index.declared
        }
        """The dtype that a tensor of a stage would have in a file, where the stage does not round it."""

    def run(self) -> None:
        self.alignment.viewed += [(self.base, None), *self.views.pairs()]
        for other, matches in self.views.pairs():
            if not isinstance(matches, SameNames):
                from streammerge.tensors.matching import describe

                self.alignment.notes += [f"{printable(other.index.path)}: {text}" for text in describe(matches)]
        ruled = self.rules.over(self.base.entries)
        ties = {name: first for name, first in self._shared_ties().items() if ruled[name] is ruled[first]}
        names = self.missing.kept(ties, ruled)
        self.alignment.notes += self.missing.notes
        if self.recipe.rules:
            self.rules.count(ruled.values())
            names = [n for n in names if not drops(ruled[n])]
        if len(names) < len(ruled):
            self._record_dropped(names, ruled)
        views = None if self.alignment.merged else self._tables()
        made = self._rows(views, names, ruled) if views else self._objects(names, ties, ruled)
        added = [self._addition(*each) for each in self.missing.added.values()]
        if isinstance(made, MergedTensors):
            for each in added:
                made.add(each)
            self.alignment.merged = made
        else:
            self.alignment.merged = [*self.alignment.merged, *made, *added]
        self.alignment.notes += self.remade.notes(KEPT, _DIFFERING)

    def _objects(self, names: list[str], ties: dict[str, str], ruled: Mapping[str, Rule | None]) -> list[Merged]:
        """Makes the tensors of these names one by one."""
        kept, tied_to = set(names) if ties else set[str](), dict[str, list[str]]()
        for name in names if ties else ():
            if ties.get(name) in kept:
                tied_to.setdefault(ties[name], []).append(name)
        made = []
        for name in names:
            if ties.get(name) in kept:
                continue
            merged = self._merged((name, *tied_to.get(name, ())), ruled[name])
            if merged is not None:
                made.append(merged)
        return made

    def _tables(self) -> Views | None:
        """Returns the tables of all views, None if not all are tables under the output's names."""
        tables = [view.entries for view in (self.base, *self.views.others) if isinstance(view.entries, StoredTable)]
        if self.recipe.output.strip_prefix or len(tables) <= len(self.views.others):
            return None
        first = tables[0]
        theirs: list[array[int] | None] = [None]
        for table, matches in zip(tables[1:], self.views.matches, strict=True):
            if table.names is first.names:
                theirs.append(None)
            else:
                found = (table.rows[matches[name]] if name in matches else -1 for name in first.names)
                theirs.append(array("i", found))
        return Views(tables, theirs)

    def _rows(self, views: Views, names: list[str], ruled: Mapping[str, Rule | None]) -> MergedTensors:
        """Makes the tensors of these names as rows of tables.

        The first tensor of each kind is made as an object. It is the example for all that have the same dtypes, shape and
        rule, if nothing depends on the name. The others are made one by one.
        """
        first, made = views.tables[0], MergedTensors(views)
        alike = all(table.kinds is first.kinds for table in views.tables) and not any(views.theirs)
        known: dict[Any, tuple[Way | None, bool]] = {}
        rows = range(len(first)) if len(names) == len(first) else [first.rows[name] for name in names]
        for name, row in zip(names, rows, strict=True):
            rule = ruled[name]
            key = id(first.kinds[row]) if alike else self._kinds(views, row), id(rule)
            way, fixed = known.get(key, (None, False))
            if way is None:
                merged = self._merged((name,), rule)
                if merged is None:
                    continue
                way, fixed = known[key] = (None, False) if key in known else self._way(merged, views, row, rule)
                if way is None:
                    made.add(merged)
                    continue
            made.add(way if fixed else self._valued(way, views, row, rule), row)
        return made

    def _kinds(self, views: Views, row: int) -> tuple[int, ...]:
        """Returns the dtypes and shapes of a tensor in all views, by identity; 0 for none."""
        rows = [views.row(number, row) for number in range(len(views.tables))]
        return tuple([0 if row < 0 else id(table.kinds[row]) for table, row in zip(views.tables, rows, strict=True)])

    def _way(self, merged: Merged, views: Views, row: int, rule: Rule | None) -> tuple[Way | None, bool]:
        """Returns the way of a tensor if others of its kind can be made in it, and whether their parameters are equal."""
        first, method = views.tables[0], merged.method
        whole = method is COPY and self.part.method is COPY
        tables = (0,) if method is COPY else self.part.order(method)
        plain = first.kinds[row].numel != 1 and method is not INTEGERS and merged.spec.dtype.kind in ("float", "complex")
        everywhere = all(views.row(number, row) >= 0 for number in range(len(views.tables)))
        if (
            not (plain or whole)
            or not everywhere
            or merged.rest is not None
            or merged.inner is not None
            or merged.why  # a reason may depend on the name
            or merged.spec.shape != first.kinds[row].shape
            or [s.place for s in merged.sources] != [s.place for s in views.sources(Way(merged, tables), row)]
        ):
            return None, False
        return Way(merged, tables), method is COPY or self.values.fixed(method, self._models(method), rule)

    def _models(self, method: MergeMethod) -> tuple[int, ...]:
        """Returns the views that are models for a method, in its order."""
        return self.part.order(method)[self.part.takes_base(method) :]

    def _valued(self, way: Way, views: Views, row: int, rule: Rule | None) -> Way:
        """Returns the way with the parameters of the tensor in this row."""
        like, name = way.like, views.tables[0].names[row]
        entries = [table.at(views.row(number, row)) for number, table in enumerate(views.tables)]
        values = self.values.of(like.method, self._models(like.method), name, entries, rule)
        if values is like.parameters:
            return way
        key = id(way), id(values)
        if key not in self.valued:
            self.valued[key] = Way(replace(like, parameters=values), way.tables)
        return self.valued[key]

    def _conformed(self, view: View) -> View:
        """Returns the view with its experts in the form of the first view."""
        if same_names(self.base.entries, view.entries):
            return view
        from streammerge.planning.experts import conformed

        made, note = conformed(self.base, view)
        if note and note not in self.alignment.notes:
            self.alignment.notes.append(note)
        return made

    def _record_dropped(self, names: list[str], ruled: Mapping[str, Rule | None]) -> None:
        from streammerge.planning.dispositions.entries import STALE

        kept, add = set(names), self.alignment.dispositions.add
        gone = [(name, rule) for name, rule in ruled.items() if name not in kept]
        for rule in {id(rule): rule for _, rule in gone if rule and rule.drop}.values():
            add("tensor", [name for name, own in gone if own is rule], "dropped", f"{BY_RULE}{printable(rule)}")
        stale = self.missing.stale
        add("tensor", sorted(stale - kept), "dropped", STALE)
        absent = [name for name, rule in gone if not drops(rule) and name not in stale]
        add("tensor", absent, "dropped", f'not in every input, `on_missing="{self.recipe.on_missing}"`')

    def _shared_ties(self) -> dict[str, str]:
        """Returns the ties of the first checkpoint that every checkpoint has: name -> the name it is tied to."""
        ties, parted = self.views.shared_ties()
        if parted:
            self.alignment.warnings.append(
                f"{listed(parted)}: tied in {printable(self.base.index.path)} but separate in another input, "
                "so merged separately and no longer tied"
            )
        return ties

    def _merged(self, names: tuple[str, ...], rule: Rule | None) -> Merged | None:
        name, recipe = names[0], self.recipe
        tied = tuple(map(recipe.output_name, names[1:]))
        sources = self.views.sources(name)
        if rule and rule.copy:
            entry = self._copied(name, rule)
            spec, why = (
                self._spec(name, entry.spec, rule),
                f"{BY_RULE}{printable(rule)}",
            )
            return Merged(names, spec, COPY, (entry,), tied=tied, why=why)
        method = self.part.method
        if rule and rule.merge_method and method is not COPY:
            method = rule.merge_method
        if method.base == "required" and not self.part.based:
            where = recipe.at(rule.path if rule else ())
            raise RecipeError(
                f"{where}{method.name} needs a base, and {printable(name)} has none here; name it as base_model"
            )
        fitted = self._fitted(name, sources)
        if fitted is None:
            return None
        if fitted is not _FITS:
            sources = fitted.sources
        merged = self._of_fitted(names, tied, rule, method, sources, fitted)
        return merged if fitted.frame is None else self._framed(merged, fitted.frame)

    def _of_fitted(
        self,
        names: tuple[str, ...],
        tied: tuple[str, ...],
        rule: Rule | None,
        method: MergeMethod,
        sources: _Sources,
        fitted: Fitted,
    ) -> Merged:
        name, recipe, rest = names[0], self.recipe, fitted.rest
        first = sources[0] or self.base.entries[name]
        spec = self._spec(name, first.spec, rule)
        if rest is not None:
            spec = replace(spec, shape=(rest.spec.shape[0] + first.spec.shape[0], *spec.shape[1:]))
        order, based = self.part.order(method), self.part.takes_base(method)
        used = [sources[number] for number in order]
        present = tuple(filter(None, used))
        lacking = len(present) < len(used)
        absent_here = lacking and (
            (based and used[0] is None)
            or recipe.on_missing in ("base", "union")
            or self.missing.optional(name)
            or why_optional(name, first.spec.shape)
        )
        too_few = lacking and sum(s is not None for s in used[based:]) < method.models[0]
        if fitted.keep or method is COPY or absent_here or too_few or is_state(name):
            why = "" if method is COPY else "not in every input" if lacking else "differs in shape or dtype"
            why = why if fitted.keep or lacking or method is COPY else "the state of a module, which only the module reads"
            return Merged(names, spec, COPY, (first,), tied=tied, rest=rest, why=why)
        counts = first.spec.numel == 1 and is_counter(name)
        if counts or fitted.mixed or first.spec.dtype.kind not in ("float", "complex"):
            in_order = tuple(filter(None, [sources[number] for number in sorted(order)]))
            if fitted.mixed or not counts or first.spec.dtype.kind not in ("float", "complex"):
                return self._integers(names, spec, in_order, tied, rest)
            counted = replace(spec, dtype=first.spec.dtype)
            return Merged(names, counted, INTEGERS, in_order, {"policy": "max"}, tied=tied, rest=rest)
        if not (rule and rule.dtype):
            spec = self._promoted(spec, first, present)
        wide = any(s.spec.dtype in _WIDE for s in present)
        preferred = recipe.compute_dtype.torch_name if recipe.compute_dtype else method.compute
        values = self.values.of(method, order[based:], name, sources, rule)
        compute = "float64" if wide else preferred
        return Merged(names, spec, method, present, values, compute, based, tied, rest)

    def _promoted(self, spec: TensorSpec, first: Source, present: tuple[Source, ...]) -> TensorSpec:
        """Returns the output tensor with a dtype that holds those of all inputs, if the recipe asks for it."""
        for source in present:  # a plain loop: this runs for every tensor
            if source.spec.dtype is not first.spec.dtype:
                break
        else:
            return spec
        dtypes = set(map(self._written, present))
        if len(dtypes) == 1:
            return replace(spec, dtype=dtypes.pop())
        if self.recipe.recast is not None or not all(dtype.kind == "float" for dtype in dtypes):
            return spec
        wide = promoted(dtypes)
        self.alignment.mixed.setdefault(wide, []).append(spec.name)
        return replace(spec, dtype=wide) if self.recipe.promotes else spec

    def _addition(self, name: str, home: str, view: View) -> Merged:
        """A tensor that the first checkpoint lacks, as the first model that has it holds it. ``home``: its name here."""
        entry, rule = view.entries[name], self.rules.of(name)
        if rule is not None:
            self.rules.taken[id(rule)] += 1
        wished = (rule.dtype if rule else None) or self.recipe.recast
        dtype = wished if wished is not None and entry.spec.dtype.kind == "float" else self._written(entry)
        return Merged(
            (home,),
            TensorSpec(self.recipe.output_name(home), dtype, entry.spec.shape),
            COPY,
            (entry,),
            added=True,
            why="the first input lacks it",
        )

    def _spec(self, name: str, spec: TensorSpec, rule: Rule | None) -> TensorSpec:
        """Returns the output tensor. It has the base's dtype unless another one is asked for."""
        entry = self.base.entries[name]
        dtype = self._written(entry)
        if dtype.kind != spec.dtype.kind:
            dtype = spec.dtype
        wished = (rule.dtype if rule else None) or self.recipe.recast
        if wished is not None and dtype.kind == "float":
            dtype = wished
        named = self.recipe.output_name(name)
        return spec if dtype is spec.dtype and named == spec.name else TensorSpec(named, dtype, spec.shape)

    def _written(self, entry: Source) -> DType:
        """Returns the dtype that a tensor has in an output if none is asked for."""
        if entry.__class__ is StoredSource:
            return entry.spec.dtype
        declared = self.declared.get(id(entry), entry.spec.dtype)
        return DType.BF16 if declared is DType.F32 and entry.dequantises else declared

    def _copied(self, name: str, rule: Rule) -> Source:
        """Returns the tensor in the model that the rule names."""
        path = str(rule.copy)
        wanted = self.recipe.copied(path, rule.rename)
        if wanted not in self.copies:
            index = next(index for reference, index in self.indexes.items() if reference.same(wanted))
            own = next((view for view in self.part.views if view.index is index), None)
            view = self._conformed(own or View(index, index.entries, index.aliases))
            self.copies[wanted] = view, matched(self.base, view)[0]
        view, matches = self.copies[wanted]
        theirs = matches.get(name, matches.get(self.base.aliases.get(name, name)))
        if theirs is None:
            raise MismatchError(
                f"{self.recipe.at(rule.path)}{printable(path)} has no tensor {printable(name)} to copy; "
                "narrow the rule's pattern"
            )
        return view.entries[theirs]

    def _fitted(self, name: str, sources: _Sources) -> Fitted | None:
        """Returns the sources, made to fit: _FITS if they fit already, None if no policy settles their differences."""
        first = self.base.entries[name].spec
        for s in sources:  # a plain loop: this runs for every tensor
            if s is not None and s.spec is not first and (s.spec.shape != first.shape or s.spec.dtype is not first.dtype):
                break
        else:
            return _FITS
        if not any(s is not None and differ(first, s.spec) for s in sources):
            return _FITS
        if self.remade.takes(name, self.base.entries[name]):
            return Fitted(sources, keep=True)
        policy = self.recipe.on_shape
        made = fit(name, sources, [view.index.path for view in self.part.views], policy)
        if isinstance(made, Differing):
            self.mismatch.differing.append(made)
            return None
        if made.said:
            why = "an extension of the others" if made.extends else f'`on_shape="{policy}"`'
            self.alignment.warnings.append(f"{why}: {made.said}")
        if made.extends:
            self.mismatch.extended.append(made.extends)
        return made

    def _framed(self, merged: Merged, frame: Source) -> Merged:
        """Puts a merged block into the first's tensor, which is larger."""
        from streammerge.sources.merged import Merged as MergedSource
        from streammerge.sources.merged import by_columns

        block = MergedSource(
            merged.spec,
            merged.method,
            merged.sources,
            merged.parameters,
            merged.compute,
            merged.based,
            self.recipe.seed,
            merged.spec.name,
        )
        whole = framed(by_columns(block), frame)
        return Merged(merged.base_names, whole.spec, COPY, (whole,), tied=merged.tied, inner=merged.method)

    def _integers(
        self,
        names: tuple[str, ...],
        spec: TensorSpec,
        present: tuple[Source, ...],
        tied: tuple[str, ...],
        rest: Source | None,
    ) -> Merged:
        policy = self.recipe.integers or ("max" if is_counter(names[0]) else "error")
        if policy == "max" and present[0].spec.dtype.kind == "packed":
            raise MismatchError(
                f"{printable(names[0])} holds packed {present[0].spec.dtype} values, of which there is no largest"
            )
        if len(present) == 1:
            return Merged(names, spec, COPY, present, tied=tied, rest=rest)
        whole = next((source.spec.dtype for source in present if source.spec.dtype.kind != "float"), spec.dtype)
        if spec.dtype.kind == "float":  # floats that stand for integers
            spec = replace(spec, dtype=whole)
        return Merged(names, spec, INTEGERS, present, {"policy": policy}, tied=tied, rest=rest)


def _check_output_names(merged: Sequence[Merged]) -> None:
    if has_rows_of_first(merged):
        return
    names = [*names_of(merged), *(name for m in unlike(merged) for name in m.tied)]
    if len(set(names)) == len(names):
        return
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise RecipeError(f"two tensors would be called {printable(name)} in the output; change `strip_prefix`")
        seen.add(name)
