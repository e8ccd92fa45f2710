"""Translates options in messages from Python, where they stand in backquotes, to the command line."""

from __future__ import annotations

import re
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from streammerge.options.base import Option

_NAMED = r"""`(?P<name>[a-z_]+)(?:=(?P<value>\{[^`{}]*\}|"[^`"]*"|'[^`']*'|[^`"'{}\s]+))?`|`"(?P<word>[^`"]*)"`"""
_PARAMETER = r"""['"](\w+)['"]: (\[[^\]]*\]|[^,}]+)"""


def as_flags(text: str) -> str:
    """Returns the text with each option as it is typed: ```on_missing="base"``` becomes ``--on-missing base``.

    Keeps backquotes around anything else.
    """
    return re.sub(_NAMED, _typed, text) if "`" in text else text


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
        return " ".join(f"{flag} {key}={_plain(each)}" for key, each in re.findall(_PARAMETER, value))
    return f"{flag} {_plain(value)}"


@cache
def _options() -> dict[str, Option]:
    from streammerge.options.base import options_of
    from streammerge.options.functions import CONVERT, EXTRACT, FINISH, MERGE, PLAN, REPORT, SWEEP, VERIFY, WORKER

    return options_of(*REPORT, *SWEEP, *WORKER, *FINISH, *EXTRACT, *PLAN, *MERGE, *CONVERT, *VERIFY)


def _plain(value: str) -> str:
    """Returns a Python value as it is typed in a shell. ``...`` stands for any value."""
    if value == "...":
        return "VALUE"
    plain = re.sub(r"""["'\[\]]""", "", value).replace(", ", ",")
    return f"'{plain}'" if re.search(r"[\s*?<>|&;()$!#~{}\\]", plain) else plain
