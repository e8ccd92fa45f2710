"""Finds what interrupted runs have left in object stores: hidden folders with locks and journals, and open uploads."""

from __future__ import annotations

from typing import Any, NamedTuple

from streammerge.errors import RecipeError, printable
from streammerge.stores import journal, lock
from streammerge.stores.base import Location
from streammerge.stores.commit import output_of
from streammerge.stores.staged import Item, ObjectJournal, home_of, owner_of, runs


class Remains(NamedTuple):
    """What is left of one output. The fields are those of :class:`streammerge.stores.leftovers.Leftover`."""

    out: Location
    folder: Location
    user: str
    owner: lock.Owner | None
    kept_bytes: int
    changed: float
    uploads: int


def remains(folder: Location) -> list[Remains]:
    """Returns what is left in a folder, and of uploads below it. Raises RecipeError if there is nothing of that name."""
    store: Any = folder.store
    uploads = store.uploads_below(folder)
    if not uploads and not folder.is_folder():
        raise RecipeError(f"{printable(folder)} is no folder; give the folder in which outputs are made")
    outs = {folder / name: 0 for each in store.entries(folder).folders if (name := output_of(each))}
    homes: dict[Location, bool] = {}
    for upload in uploads:
        above = [upload, *(each for each in upload.parents if "/" in each.key)]
        out = next((each for each in above if each in outs or _has_home(store, each, homes)), upload)
        outs[out] = outs.get(out, 0) + 1
    return [_remains(store, out, count) for out, count in sorted(outs.items())]


def remains_of(out: Location) -> Remains | None:
    """Returns what is left of an output, None if there is nothing."""
    store: Any = out.store
    if "/" not in out.key:
        return None
    if not store.items(home_of(out)):
        uploads = [each for each in store.uploads_below(out) if each == out]
        return _remains(store, out, len(uploads)) if uploads else None
    return _remains(store, out, len(store.uploads_below(out)))


def _has_home(store: Any, out: Location, known: dict[Location, bool]) -> bool:
    if out not in known:
        known[out] = bool(store.items(home_of(out)))
    return known[out]


def _remains(store: Any, out: Location, uploads: int) -> Remains:
    home = home_of(out)
    items: list[Item] = store.items(home)
    owner, user = None, ""
    for item in items:
        if item.location == home / "lock":
            try:
                found = owner_of(store.get(item.location)[0])
            except FileNotFoundError:
                continue
            user = found.user
            owner = found if runs(found, item, store) else None
    earlier = journal.read(ObjectJournal(store, home / "journal"))
    changed = max((item.written for item in items if item.location.parent.parent == home / "journal"), default=0.0)
    return Remains(out, home, user, owner, earlier.nbytes if earlier else 0, changed, uploads)
