"""Patterns of rules: a glob on a tensor's name, or a regular expression between slashes that is searched in it."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass, field
from typing import Any

from streammerge.errors import RecipeError, printable

_MOST_SECONDS = 1.0


@dataclass(frozen=True)
class Pattern:
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
