"""Exceptions that streammerge raises, and helpers that print names safely.

::

    StreammergeError
     |- RecipeError    2  the request is invalid: unknown method, parameter or dtype; the output exists
     |- FormatError    4  a file is damaged, or in a form that is not supported
     |- MismatchError  4  checkpoints disagree: names, shapes, dtypes
     |- BudgetError    5  the plan does not fit the memory budget; names the smallest budget that would
     |- SpaceError     6  the disk is too full; names the missing bytes
     |- LockedError    7  another run owns the output
     |- ChangedError   8  an input changed since it was planned
     |- UnfinishedError 9 units of a plan are missing, which other machines make
     |- VerifyError    3  the output could not be verified, or is wrong
     |   `- UncheckedError  the last check itself failed; the finished work is kept
     |- StoreError     1  a remote store cannot be reached, or refuses; what was made is kept
     `- TaskError      1  a task failed; names tensor, method and range, and chains the cause

The number is the exit code of the command line. As ``diff`` does, ``streammerge diff`` also exits with 1 when it finds a
difference; it then prints its report, and no error. A message is one sentence: what is wrong, where, what to do.
"""

from __future__ import annotations


class StreammergeError(Exception):
    """Base class of every error that streammerge raises on purpose. ``exit_code``: that of the command line."""

    exit_code = 1


class RecipeError(StreammergeError):
    """The request is invalid, or the output exists."""

    exit_code = 2


class FormatError(StreammergeError):
    """A file is damaged, or in a form that is not supported."""

    exit_code = 4


class MismatchError(StreammergeError):
    """Checkpoints disagree in names, shapes or dtypes."""

    exit_code = 4


class BudgetError(StreammergeError):
    """The plan does not fit the memory budget."""

    exit_code = 5


class SpaceError(StreammergeError):
    """The disk has too little free space."""

    exit_code = 6


class LockedError(StreammergeError):
    """Another run owns the output."""

    exit_code = 7


class ChangedError(StreammergeError):
    """An input changed since it was planned."""

    exit_code = 8


class UnfinishedError(StreammergeError):
    """Units of a plan have no receipt yet. ``missing``: their numbers. ``remedy``: what makes them."""

    exit_code = 9
    remedy = "a worker with `claim=True` makes them"

    def __init__(self, said: str, missing: tuple[int, ...] = ()) -> None:
        super().__init__(said, missing)
        self.missing = missing

    def __str__(self) -> str:
        return f"{self.args[0]}; {self.remedy}"


class VerifyError(StreammergeError):
    """The output could not be verified, or is wrong."""

    exit_code = 3


class UncheckedError(VerifyError):
    """The last check itself failed; the finished work is kept."""


class StoreError(StreammergeError, OSError):
    """A remote store cannot be reached, or refuses a request."""

    exit_code = 1


class TaskError(StreammergeError):
    """A task of the run failed; the cause is chained."""

    exit_code = 1


def printable(text: object, limit: int = 200) -> str:
    """Escapes control and other unprintable characters of a name from a file, and cuts it to ``limit`` characters."""
    whole = str(text)
    if whole.isprintable() and len(whole) <= limit:
        return whole
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in whole[: limit + 1])
    return shown if len(shown) <= limit else f"{shown[: limit - 20]}...({len(whole)} characters)"


def listed(names: list[str], most: int = 8) -> str:
    """Returns ``a, b, c and 5 more``, with each name escaped."""
    shown = ", ".join(printable(n, 120) for n in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
