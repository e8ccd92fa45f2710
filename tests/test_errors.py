"""Exit codes, and names from files that are safe to print."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from streammerge import errors
from streammerge.errors import StreammergeError, listed, printable

INTERFACE = {
    "RecipeError": 2,
    "FormatError": 4,
    "MismatchError": 4,
    "BudgetError": 5,
    "SpaceError": 6,
    "LockedError": 7,
    "ChangedError": 8,
    "UnfinishedError": 9,
    "VerifyError": 3,
    "StoreError": 1,
    "TaskError": 1,
}
"""What scripts of users ask for."""


def test_exit_codes_are_those_that_are_promised() -> None:
    assert {kind.__name__: kind.exit_code for kind in StreammergeError.__subclasses__()} == INTERFACE
    shown = re.findall(r"-\s(\w+Error)\s+(\d)", errors.__doc__ or "")
    assert {name: int(code) for name, code in shown} == INTERFACE


@settings(deadline=None)
@given(some.text(), some.integers(40, 300))
def test_printable_text_is_printable_and_short(text: str, limit: int) -> None:
    shown = printable(text, limit)
    assert shown.isprintable()
    assert len(shown) <= limit + len(f"...({len(text)} characters)")
    if text.isprintable() and len(text) <= limit:
        assert shown == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain", "plain"),
        ("", ""),
        (Path("a/b"), "a/b"),
        ("a\nb\x1b[31m", r"a\nb\x1b[31m"),
        ("\u202egnp", r"\u202egnp"),
        ("\udcff", r"\udcff"),
        ("x" * 200, "x" * 200),
        ("x" * 201, "x" * 180 + "...(201 characters)"),
    ],
)
def test_what_is_shown(text: object, shown: str) -> None:
    assert printable(text) == shown


def test_lists_say_how_many_they_leave_out() -> None:
    names = [f"n{number}" for number in range(11)]
    assert listed([]) == ""
    assert listed(names[:1]) == "n0"
    assert listed(names[:8]) == "n0, n1, n2, n3, n4, n5, n6, n7"
    assert listed(names[:9]) == "n0, n1, n2, n3, n4, n5, n6, n7 and 1 more"
    assert listed(names, 2) == "n0, n1 and 9 more"
    assert listed(["a\tb"]) == r"a\tb"
