"""Translates options in messages from Python, where they stand in backquotes, to the command line."""

from __future__ import annotations

import re

from streammerge.options import CONVERT, EXTRACT, FINISH, MERGE, PLAN, REPORT, SWEEP, VERIFY, WORKER, options_of

_OPTIONS = options_of(*REPORT, *SWEEP, *WORKER, *FINISH, *EXTRACT, *PLAN, *MERGE, *CONVERT, *VERIFY)
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
    if name not in _OPTIONS:
        return found[0]
    flag = _OPTIONS[name].flag
    if value is None or value in ("True", "False"):
        return flag
    if name == "parameters":
        return " ".join(f"{flag} {key}={_plain(each)}" for key, each in _PARAMETER.findall(value))
    return f"{flag} {_plain(value)}"


def _plain(value: str) -> str:
    """Returns a Python value as it is typed. ``...`` stands for any value."""
    if value == "...":
        return "VALUE"
    return re.sub(r"""["'\[\]]""", "", value).replace(", ", ",")
