"""Tensors that not all checkpoints have: which of them go into the output."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from streammerge.errors import listed, printable
from streammerge.planning.matched import MatchedViews, SameNames, first_names, shapes
from streammerge.planning.mismatch import Mismatch
from streammerge.planning.ruled import Rules, drops
from streammerge.planning.views import View
from streammerge.recipe.model import Recipe, Rule
from streammerge.sources.base import Source
from streammerge.tensors.names import copies_among, is_counter, spelled, why_optional
from streammerge.units import counted, inflected

if TYPE_CHECKING:
    from streammerge.checkpoints.index import CheckpointIndex
    from streammerge.checkpoints.profiles import Profile


KEPT = ("it is kept as the first has it", "they are kept as the first has them")
_OUT = ("it stays out, as the first lacks it", "they stay out, as the first lacks them")
_PARTIAL = ("is not in every input", "are not in every input")


class Missing:
    """Compares the names of a part's views.

    ``added``: the tensors that only other views have and the policy adds, by spelling: their name there, that in the
    output, and the view.
    ``stale``: names of a running average that only the first view has. ``notes``: what is said about all this.
    """

    def __init__(
        self, recipe: Recipe, first: CheckpointIndex, views: MatchedViews, rules: Rules, mismatch: Mismatch
    ) -> None:
        self.recipe, self.first, self.views, self.rules, self.mismatch = recipe, first, views, rules, mismatch
        self.base = views.base
        self.added: dict[str, tuple[str, str, View]] = {}
        self.stale: set[str] = set()
        self.notes: list[str] = []

    def kept(self, ties: Mapping[str, str], ruled: Mapping[str, Rule | None]) -> list[str]:
        """Returns the first view's names that go into the output, after the policy for tensors that some inputs lack.

        ``ties``: name -> the name it is tied to. ``ruled``: each name of the first view -> its rule.
        """
        partial: set[str] = set()
        merged_here = list(ruled)
        if self.recipe.rules:
            merged_here = [n for n, rule in ruled.items() if not drops(rule) and not (rule and rule.copy)]
        absent, foreign = Ignored(why_optional), Ignored(why_optional)
        for other, matched in self.views.pairs():
            self._compare(other, matched, merged_here)
            if isinstance(matched, SameNames):
                continue
            missing = [n for n in merged_here if n not in matched and not (n in ties and ties[n] in matched)]
            used = set(matched.values())
            extra = [n for n in other.entries if n not in used and other.aliases.get(n) not in used]
            extra = [n for n in extra if not drops(self.rules.of(n))]
            partial.update(missing)
            missing, extra = self._without_copies(other, missing, extra)
            missing = [n for n in missing if not self.optional(n) and not absent.takes(n, self.base.entries[n])]
            needed = self._beside_added(other, extra)
            extra = [n for n in extra if n in needed or not (self.optional(n) or foreign.takes(n, other.entries[n]))]
            self._note_mismatch(other, missing, extra)
            if self.recipe.on_missing == "union":
                for name, home in first_names(matched, extra).items():
                    home = home if home not in self.base.entries else name
                    self.added.setdefault(spelled(home), (name, home, other))
        self.notes += absent.notes(KEPT)
        self.notes += foreign.notes(_OUT)
        optional = [n for n in ruled if n in partial and self.optional(n)]
        if optional and self.profile:
            self.notes.append(
                f"{counted(len(optional), 'tensor')} that the {self.profile.name} loader ignores "
                f"({optional[0].split('.')[0]}.*, ...) {inflected(len(optional), 'is', 'are')} not in every input, and "
                "kept as in the first"
            )
        if self.recipe.on_missing == "drop":
            return [n for n in ruled if n not in partial or n in absent.names or self.optional(n)]
        return [n for n in ruled if n not in self.stale] if self.stale else list(ruled)

    def optional(self, name: str) -> bool:
        """Whether an input may lack the tensor, because the program that the first checkpoint belongs to ignores it."""
        return self.profile is not None and self.profile.ignores(name)

    @cached_property
    def profile(self) -> Profile | None:
        """Returns the first checkpoint's profile. It is needed only if inputs lack tensors, because finding it reads
        every name."""
        from streammerge.checkpoints.profiles import profile_of

        return profile_of(self.first)

    def _without_copies(self, other: View, missing: list[str], extra: list[str]) -> tuple[list[str], list[str]]:
        """Removes the names of a running average that only one of the two has beside its plain weights.

        The average of one input would be stale, so it is left out, unless `on_missing` says what becomes of it.
        """
        if self.recipe.on_missing != "error" or not (missing or extra):
            return missing, extra
        ours, theirs = (_whole_copies(view.entries, names) for view, names in ((self.base, missing), (other, extra)))
        self.stale.update(ours)
        if theirs:
            self.notes.append(
                f"{printable(other.index.path)}: {counted(len(theirs), 'tensor')} ({listed(theirs, 2)}) "
                f"{inflected(len(theirs), 'is', 'are')} a running average, which {printable(self.base.index.path)} lacks; "
                f"{inflected(len(theirs), 'it stays', 'they stay')} out"
            )
        return [n for n in missing if n not in set(ours)], [n for n in extra if n not in set(theirs)]

    def _beside_added(self, other: View, extra: list[str]) -> set[str]:
        """Returns the counters of modules that are added as a whole, without which their loader finds a name missing."""
        if self.recipe.on_missing != "union":
            return set()
        modules = {n.rpartition(".")[0] for n in extra if not why_optional(n, other.entries[n].spec.shape)}
        return {n for n in extra if is_counter(n) and n.rpartition(".")[0] in modules}

    def _compare(self, other: View, matched: Mapping[str, str], merged_here: Sequence[str]) -> None:
        """Counts the names that the two have in common, over all parts of the merge."""
        if merged_here and other.entries:
            same = isinstance(matched, SameNames)
            common = len(merged_here) if same else sum(name in matched for name in merged_here)
            self.mismatch.count(str(other.index.path), common, len(merged_here), len(other.entries))

    def _note_mismatch(self, other: View, missing: list[str], extra: list[str]) -> None:
        path = str(other.index.path)
        for table, names in ((self.mismatch.missing, missing), (self.mismatch.extra, extra)):
            if names:
                table.setdefault(path, []).extend(names)
        if missing or extra:
            self.mismatch.names.setdefault(path, shapes(other.entries))
            self.mismatch.names.setdefault(self.mismatch.first, shapes(self.base.entries))


class Ignored:
    """Collects tensors that may differ between the inputs, by reason. ``why`` returns the reason for a name and a shape."""

    def __init__(self, why: Callable[[str, tuple[int, ...]], str]) -> None:
        self.why = why
        self.reasons: dict[str, list[str]] = {}
        self.names: set[str] = set()

    def takes(self, name: str, entry: Source) -> bool:
        """Returns whether a tensor may differ, and remembers it."""
        reason = self.why(name, entry.spec.shape)
        if reason and name not in self.names:
            self.names.add(name)
            self.reasons.setdefault(reason, []).append(name)
        return bool(reason)

    def notes(self, fate: tuple[str, str], what: tuple[str, str] = _PARTIAL) -> list[str]:
        """Returns a sentence for each reason. ``fate``, ``what``: what is said of one tensor, and of several."""
        return [
            f"{counted(len(names), 'tensor')} ({listed(names, 2)}) {inflected(len(names), *what)}; "
            f"{inflected(len(names), *fate)}, since {inflected(len(names), 'it belongs to', 'they are')} {reason}"
            for reason, names in self.reasons.items()
        ]


def _whole_copies(entries: Mapping[str, Source], names: Sequence[str]) -> list[str]:
    """Returns the names of the running averages among ``entries`` of which every name is in ``names``."""
    some = set(names)
    return [name for own in copies_among(entries).values() if some.issuperset(own) for name in own]
