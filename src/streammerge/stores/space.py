"""Errors of outputs that cannot be written: no space is left, or the name is taken."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator

from streammerge.errors import RecipeError, SpaceError, printable
from streammerge.stores.base import Location
from streammerge.units import decimal_bytes

_NOT_ALLOWED = {
    errno.EFBIG: "larger files are not allowed there; raise the limit (ulimit -f), write to another file system, or into a "
    "folder with `max_shard_size`",
    errno.EDQUOT: "the quota of its owner is used up; remove something, or write to another place",
}
_NO_SPACE = (errno.ENOSPC, *_NOT_ALLOWED)


def exists_already(out: object) -> RecipeError:
    """The error of an output that may not be replaced."""
    return RecipeError(f"{printable(out)} exists already; pass `overwrite=True` to replace it, or choose another name")


@contextlib.contextmanager
def space_checked(location: Location, nbytes: int, free_bytes: int | None = None) -> Iterator[None]:
    """Turns "no space left" into a SpaceError that says how much is missing.

    ``free_bytes``: the free space before the call, if the call may fill the disk before it fails.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_SPACE:
            raise
        why = error.strerror or ""
        if error.errno in _NOT_ALLOWED:
            needed = f"no room for {printable(location.name)}: it needs {decimal_bytes(nbytes)}"
            raise SpaceError(f"{needed}, and {_NOT_ALLOWED[error.errno]} ({why})") from error
        raise no_room(location, nbytes, why, free_bytes) from error


def no_room(location: Location, nbytes: int, why: str = "", free_bytes: int | None = None) -> SpaceError:
    """The error of a file of ``nbytes`` that does not fit."""
    needed = f"no room for {printable(location.name)}: it needs {decimal_bytes(nbytes)}"
    free = location.parent.free_bytes() if free_bytes is None else free_bytes
    if free is None:
        return SpaceError(f"{needed} ({why})")
    missing = f"{decimal_bytes(nbytes - free)} are missing" if nbytes > free else why
    if missing == os.strerror(errno.ENOSPC):
        missing += "; perhaps for one more file, which `df -i` tells"
    return SpaceError(f"{needed}, {decimal_bytes(free)} are free on that disk ({missing})")
