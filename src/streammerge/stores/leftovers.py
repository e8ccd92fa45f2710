"""Finds and removes what interrupted runs have left beside their outputs."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import stat
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from streammerge.errors import LockedError, RecipeError, printable
from streammerge.stores import claims, journal, lock
from streammerge.stores.base import Location
from streammerge.stores.commit import JOURNAL, LocalJournalFile, hidden_folder, output_of, staging_folder
from streammerge.units import counted, decimal_bytes

if TYPE_CHECKING:
    from streammerge.stores.remains import Remains

_MACHINES = re.compile(r"\.(.+)\.([0-9a-f]{12})\.machines")
"""The name of a folder in which machines make an output: the output's name, and the key of the plan."""
_ALIVE_SECONDS = 120.0
"""A machine that has shown nothing for this time is dead, whatever its lease is."""


@dataclass(frozen=True, slots=True)
class Leftover:
    """The hidden folder of a run.

    ``out``: its output. ``user``: who owns the folder. ``owner``: the run that has the lock, None if none has.
    ``kept_bytes``: bytes of the pieces that a next run can continue from. ``changed``: when the journal was written last,
    in seconds since 1970; 0 without a journal. ``uploads``: the uploads to an object store that were not completed.
    """

    out: Location
    folder: Location
    user: str
    owner: lock.Owner | None
    kept_bytes: int
    changed: float
    uploads: int = 0

    def __str__(self) -> str:
        if self.owner is not None:
            return f"{printable(self.out)}: being written by {self.owner}"
        when = time.strftime(" at %Y-%m-%d %H:%M", time.localtime(self.changed)) if self.changed else ""
        kept = f"{decimal_bytes(self.kept_bytes)} are kept" if self.kept_bytes else "nothing is kept"
        kept += f"; {counted(self.uploads, 'upload')} not completed" if self.uploads else ""
        whose = f", of {printable(self.user)}" if self.user else ""
        return f"{printable(self.out)}: interrupted{when}{whose}; {kept}"


def leftovers(folder: Location) -> list[Leftover]:
    """Returns what runs have left in a folder, by the names of their outputs. Raises RecipeError if it is no folder.

    Of an object store, also uploads below the folder that nobody has completed.
    """
    if folder.store.sends_parts:
        from streammerge.stores.remains import remains  # here, since local outputs do without

        return [_of_remains(each) for each in remains(folder)]
    if not folder.is_folder():
        raise RecipeError(f"{printable(folder)} is no folder; give the folder in which outputs are made")
    found = []
    for each in folder.children():
        name, shared = output_of(each.name), _MACHINES.fullmatch(each.name)
        if (name or shared) and stat.S_ISDIR(os.lstat(each.key).st_mode):
            found.append(_of_machines(folder / shared[1], each) if shared else _leftover(folder / name, each))
    return found


def leftover_of(out: Location) -> Leftover | None:
    """Returns what a run has left for an output, None if there is nothing."""
    if out.store.sends_parts:
        from streammerge.stores.remains import remains_of

        found = remains_of(out)
        return None if found is None else _of_remains(found)
    folder = out.parent
    own = {staging_folder(Path(out.absolute().key)).name, *(each.name for each in _shared_homes(out))}
    return next((each for each in leftovers(folder) if each.folder.name in own), None) if folder.is_folder() else None


def discard(out: Location) -> None:
    """Removes what an interrupted run has left for an output. The output itself stays.

    Raises LockedError if that run, or a machine that makes units of a plan, may still be there.
    """
    homes = [] if out.store.sends_parts else _shared_homes(out)
    for home in homes:
        owner = _of_machines(out, home).owner
        if owner is not None:
            raise LockedError(f"{printable(out)} is being written by {owner}; wait for it")
    staging = out.stage(overwrite=True)
    for staging.as_folder in (True, False):
        staging.clear()
    staging.abort()
    for home in homes:
        shutil.rmtree(home.key)


def _shared_homes(out: Location) -> list[Location]:
    """Returns the folders in which machines make this output by saved plans."""
    folder, place = out.absolute().parent, Path(out.absolute().key)
    found = [(each, _MACHINES.fullmatch(each.name)) for each in (folder.children() if folder.is_folder() else ())]
    return [
        folder / each.name
        for each, named in found
        if named and hidden_folder(place, f".{named[2]}.machines").name == each.name
    ]


def _of_machines(out: Location, home: Location) -> Leftover:
    """Returns what machines have made of a saved plan. Its owner is one of them that may be alive."""
    kept, changed, owner = 0, 0.0, None
    for _, receipt in claims.finished(home):
        with contextlib.suppress(ValueError, KeyError):
            kept += json.loads(receipt.partition(b" ")[2])["bytes"]
    for name in claims.names_in(home / claims.MACHINES):
        with contextlib.suppress(OSError):
            written = os.stat((home / claims.MACHINES / name).key).st_mtime
            changed = max(changed, written)
            if time.time() - written < _ALIVE_SECONDS:
                owner = claims.living_in(home, name) or owner
    return Leftover(out, home, _user(Path(home.key)), owner, kept, changed)


def _of_remains(found: Remains) -> Leftover:
    return Leftover(found.out, found.folder, found.user, found.owner, found.kept_bytes, found.changed, found.uploads)


def _leftover(out: Location, folder: Location) -> Leftover:
    kept, changed = 0, 0.0
    with contextlib.suppress(OSError, ValueError):
        earlier = journal.read(LocalJournalFile(folder / JOURNAL))
        kept = earlier.nbytes if earlier else 0
        changed = os.stat((folder / JOURNAL).key).st_mtime
    return Leftover(out, folder, _user(Path(folder.key)), _running(f"{folder.key}/lock"), kept, changed)


def _user(folder: Path) -> str:
    try:
        return folder.owner()
    except (KeyError, OSError):  # a container knows no names of users
        return f"user {os.lstat(folder).st_uid}"


def _running(path: str) -> lock.Owner | None:
    """Returns the run that has the lock, None if nobody has it."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return lock.owner_in(fd) or lock.UNKNOWN
    finally:
        os.close(fd)
    return None
