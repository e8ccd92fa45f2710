"""Which rule of a recipe takes which tensor."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import TypeVar

from streammerge.recipe.model import Recipe, Rule

V = TypeVar("V", covariant=True)


class Rules:
    """Finds the first rule that matches a tensor. ``taken`` counts the tensors of each rule, by the rule's ``id``."""

    def __init__(self, recipe: Recipe) -> None:
        self.rules = recipe.rules
        self.taken: Counter[int] = Counter()

    def of(self, name: str) -> Rule | None:
        """Returns the rule that takes a tensor, None if none does."""
        for rule in self.rules:
            if rule.takes(name):
                return rule
        return None

    def over(self, names: Collection[str]) -> Mapping[str, Rule | None]:
        """Returns name -> the rule that takes it."""
        return {name: self.of(name) for name in names} if self.rules else _Unruled(names)

    def count(self, rules: Iterable[Rule | None]) -> None:
        """Counts one tensor for each of these rules."""
        self.taken.update(id(rule) for rule in rules if rule)


def drops(rule: Rule | None) -> bool:
    """Whether the rule keeps its tensors out of the output."""
    return rule is not None and rule.drop


class OverNames(Mapping[str, V]):
    """A value for each of some names. Made instead of a dict, since names can be many."""

    def __init__(self, names: Collection[str]) -> None:
        self._names = names

    def __len__(self) -> int:
        return len(self._names)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)


class _Unruled(OverNames[None]):
    """Names -> None, where a recipe has no rules."""

    def __getitem__(self, name: str) -> None:
        return None
