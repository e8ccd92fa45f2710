"""Which tensors a rule takes: a glob on the name, or a regular expression between slashes that is found in it."""

from __future__ import annotations

import fnmatch
import re
from dataclasses import dataclass, field
from typing import Any

from streammerge.errors import RecipeError, printable


@dataclass(frozen=True)
class Pattern:
    text: str
    found: re.Pattern[str] = field(compare=False, repr=False)

    def __str__(self) -> str:
        return self.text


def parse_pattern(text: Any) -> Pattern:
    """The pattern as it is written; RecipeError for a regular expression that is none."""
    if not isinstance(text, str) or not text:
        raise ValueError(text)
    if len(text) > 1 and text[0] == text[-1] == "/":
        try:
            return Pattern(text, re.compile(text[1:-1]))
        except (re.error, RecursionError, OverflowError) as error:
            raise RecipeError(f"{printable(text)} is not a regular expression ({printable(error)})") from error
    return Pattern(text, re.compile(r"\A" + fnmatch.translate(text)))
