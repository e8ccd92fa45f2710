"""Patterns of rules: a glob on a tensor's name, or a regular expression between slashes that is searched in it.

Renamings use the same two kinds of patterns.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from streammerge.errors import RecipeError, printable

_MOST_SECONDS = 1.0


@dataclass(frozen=True)
class Pattern:
    """A pattern as it was written, and compiled."""

    text: str
    compiled: Any = field(compare=False, repr=False)

    def matches(self, name: str) -> bool:
        """Whether the pattern matches a name. Raises RecipeError after a second, because a foreign pattern may take
        forever."""
        try:
            return self.compiled.search(name, timeout=_MOST_SECONDS) is not None
        except TimeoutError as error:
            raise RecipeError(
                f"the pattern {printable(self.text)} takes too long on {printable(name)}; write it more simply"
            ) from error

    def __str__(self) -> str:
        return self.text


def parse_pattern(text: Any) -> Pattern:
    """Parses a pattern. Raises RecipeError for an invalid regular expression, ValueError for no text."""
    import regex  # which can be stopped, other than the standard library's; here, since few commands have a pattern

    if not isinstance(text, str) or not text:
        raise ValueError(text)
    if len(text) > 1 and text[0] == text[-1] == "/":
        try:
            return Pattern(text, regex.compile(text[1:-1]))
        except (regex.error, RecursionError, OverflowError, MemoryError) as error:
            raise RecipeError(f"{printable(text)} is not a regular expression ({printable(error)})") from error
    return Pattern(text, regex.compile(r"\A" + fnmatch.translate(text)))


@dataclass(frozen=True)
class Rename:
    """Another name for the tensors that a pattern matches.

    ``old.*`` to ``new.*``: a ``*`` of the new name stands for what the same ``*`` of the pattern took. ``/regex/``: what it
    finds is replaced, and ``\\1`` stands for its first group.
    """

    pattern: str
    name: str
    compiled: Any = field(compare=False, repr=False)

    def of(self, name: str) -> str | None:
        """Returns the new name, None if the pattern does not match. Raises RecipeError if that takes longer than a
        second."""
        import regex

        try:
            found = self.compiled.search(name, timeout=_MOST_SECONDS)
            if found is None:
                return None
            if _is_regex(self.pattern):
                return str(self.compiled.sub(self.name, name, timeout=_MOST_SECONDS))
        except TimeoutError as error:
            raise RecipeError(
                f"the pattern {printable(self.pattern)} takes for ever on {printable(name)}; write it more simply"
            ) from error
        except (regex.error, IndexError) as error:
            raise RecipeError(
                f"{printable(self.name)} cannot be the new name for {printable(self.pattern)} ({printable(error)})"
            ) from error
        taken = iter(found.groups())
        return "".join(next(taken) if part == "*" else part for part in re.split(r"(\*)", self.name))

    def __str__(self) -> str:
        return f"{self.pattern} -> {self.name}"


def _is_regex(pattern: str) -> bool:
    return len(pattern) > 2 and pattern[0] == pattern[-1] == "/"


def parse_rename(pattern: Any, name: Any) -> Rename:
    """Returns the renaming of names that a pattern matches. Raises RecipeError for an invalid pattern or new name."""
    import regex

    if not isinstance(pattern, str) or not isinstance(name, str) or not pattern:
        raise ValueError(pattern)
    if _is_regex(pattern):
        compiled = parse_pattern(pattern).compiled
        groups = max([0, *map(int, re.findall(r"\\(\d+)", name))])
        if groups > compiled.groups:
            raise RecipeError(
                f"{printable(name)} names group {groups} of {printable(pattern)}, which has {compiled.groups}"
            )
        return Rename(pattern, name, compiled)
    if name.count("*") > pattern.count("*"):
        raise RecipeError(f"{printable(name)} has more * than {printable(pattern)}, so there is nothing to put there")
    if not name:
        raise RecipeError(f"the new name for {printable(pattern)} is empty")
    parts = [regex.escape(part) for part in pattern.split("*")]
    return Rename(pattern, name, regex.compile(r"\A" + "(.*)".join(parts) + r"\Z", regex.DOTALL))


def parse_renames(value: Any) -> tuple[Rename, ...]:
    """Renamings from a mapping, from one text ``FROM=TO``, or from a list of such texts. The first that matches is used."""
    if isinstance(value, Mapping):
        return tuple(parse_rename(pattern, name) for pattern, name in value.items())
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, Sequence) or not all(isinstance(each, str | Rename) for each in value):
        raise TypeError
    return tuple(each if isinstance(each, Rename) else _split(each) for each in value)


def _split(text: str) -> Rename:
    regular, equals, name = text.partition("/=") if text.startswith("/") else ("", "", "")
    pattern = f"{regular}/"
    if not equals:
        pattern, equals, name = text.partition("=")
    if not equals:
        raise RecipeError(f"{printable(text)} is no renaming; write FROM=TO, like old.*=new.*")
    return parse_rename(pattern, name)


def renamed(names: Iterable[str], renames: Sequence[Rename]) -> dict[str, str]:
    """Returns name -> new name for all names. Raises RecipeError if two names would become equal."""
    made: dict[str, str] = {}
    owners: dict[str, str] = {}
    for name in names:
        new = next((other for each in renames if (other := each.of(name)) is not None), name)
        if not new:
            raise RecipeError(f"{printable(name)} would have an empty name; change `rename`")
        first = owners.setdefault(new, name)
        if first != name:
            raise RecipeError(
                f"{printable(first)} and {printable(name)} would both be called {printable(new)}; change `rename`"
            )
        made[name] = new
    return made
