"""Errors as people or programs read them: a sentence on stderr, or with ``--format json`` one object on stdout."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from streammerge.cli.terminal import CannotPrint, put, say

EXIT_CODES = (
    "Exit codes: 0 done, 1 a task failed (of diff also: the checkpoints differ), 2 an invalid request, 3 "
    "the output is wrong or cannot be verified, 4 an input cannot be read or does not fit, 5 too little memory, 6 too "
    "little disk, 7 another run owns the output, 8 an input changed, 9 units of a plan are missing, 130 "
    "interrupted."
)


def add_note(error: BaseException, text: str) -> None:
    """Adds what a program should know beside an error, such as what is kept. ``BaseException.add_note`` of Python 3.11."""
    error.__notes__ = [*notes_of(error), text]  # type: ignore[attr-defined]


def notes_of(error: BaseException) -> list[str]:
    """Returns the notes that were added to an error."""
    return list(getattr(error, "__notes__", ()))


def wants_json(typed: Sequence[str], environment: Mapping[str, str] = os.environ) -> bool:
    """Returns whether a command line asks for JSON. It may be one that cannot be read: the last ``--format`` counts."""
    options = list(typed[: typed.index("--")] if "--" in typed else typed)
    forms = [each.partition("=")[2] for each in options if each.startswith("--format=")]
    forms += [value for name, value in pairwise(options) if name == "--format"]
    if forms:
        return forms[-1] == "json"
    command = next((each for each in options if not each.startswith("-")), "")
    return environment.get(f"STREAMMERGE_{command.upper()}_FORMAT") == "json"


def fail(kind: str, sentence: str, exit_code: int, notes: Sequence[str] = (), as_json: bool = False) -> None:
    """Reports an error. As JSON it is the one object on stdout, and the last event on stderr.

    ``kind``: the name of its class. ``sentence``: what is wrong, where, what to do, with options as they are typed.
    """
    import json

    if not as_json:
        say(f"error: {sentence}", err=True)
        return
    said: dict[str, Any] = {"class": kind, "exit_code": exit_code, "message": sentence, "notes": [*notes]}
    put(json.dumps({"event": "Failed", **said}), err=True)
    with contextlib.suppress(CannotPrint):  # perhaps that is the error
        put(json.dumps({"error": said}))
