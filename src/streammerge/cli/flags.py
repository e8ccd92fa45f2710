"""Translates options in messages from Python, where they stand in backquotes, to the command line."""

from __future__ import annotations

import re
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from streammerge.options.base import Option

_NAMED = re.compile(
    r"""`(?P<name>[a-z_]+)(?:=(?P<value>\{[^`{}]*\}|"[^`"]*"|'[^`']*'|[^`"'{}\s]+))?`|`"(?P<word>[^`"]*)"`"""
)
_PARAMETER = re.compile(r"""['"](\w+)['"]: (\[[^\]]*\]|[^,}]+)""")


def as_flags(text: str) -> str:
    """Returns the text with each option as it is typed: ```on_missing="base"``` becomes ``--on-missing base``.

    Keeps backquotes around anything else.
    """
    return _NAMED.sub(_typed, text)


def _typed(found: re.Match[str]) -> str:
    if found["word"] is not None:
        return found["word"]
    name, value = found["name"], found["value"]
    if name == "out":
        return "-o"
    option = _options().get(name)
    if option is None:
        return found[0]
    flag = option.flag
    if value is None or value in ("True", "False"):
        return flag
    if name == "parameters":
        return " ".join(f"{flag} {key}={_plain(each)}" for key, each in _PARAMETER.findall(value))
    return f"{flag} {_plain(value)}"


@cache
def _options() -> dict[str, Option]:
    from streammerge.options.base import options_of
    from streammerge.options.functions import CONVERT, EXTRACT, FINISH, MERGE, PLAN, REPORT, SWEEP, VERIFY, WORKER

    return options_of(*REPORT, *SWEEP, *WORKER, *FINISH, *EXTRACT, *PLAN, *MERGE, *CONVERT, *VERIFY)


def _plain(value: str) -> str:
    """Returns a Python value as it is typed. ``...`` stands for any value."""
    if value == "...":
        return "VALUE"
    return re.sub(r"""["'\[\]]""", "", value).replace(", ", ",")
