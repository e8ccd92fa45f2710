"""Where a repository of the hub is read: in the hub's cache if that holds all of it, else on the hub, at one commit."""

from __future__ import annotations

from typing import NamedTuple

from streammerge.errors import RecipeError, StoreError, StreammergeError, printable
from streammerge.stores.base import Location
from streammerge.stores.remembering import recalled
from streammerge.stores.repositories import Repository, is_offline, snapshot


class Found(NamedTuple):
    """The place of a repository as text, or why there is none: then the place is empty."""

    place: str
    error: StreammergeError | None = None


def on_hub(repository: Repository) -> Found:
    """Returns where a repository is read. A branch or a tag is the commit that it is on the hub now.

    If the hub cannot be asked, they are the commit that the cache knows.
    """
    return recalled(("place", str(repository)), lambda: _sought(repository))


def _sought(repository: Repository) -> Found:
    cached = snapshot(repository)
    inner = repository.inner
    try:
        if is_offline():
            raise StoreError("the hub's cache does not hold it, while HF_HUB_OFFLINE is set")
        from streammerge.stores import hub_client  # here, since most names are paths
        from streammerge.stores.hub import HUB

        if not hub_client.is_installed():
            raise RecipeError(
                "the hub is read by the package huggingface_hub; install it with `pip install 'streammerge[hub]'`"
            )
        commit = HUB.commit(repository.name, repository.revision, once=cached is not None)
        pinned = repository.at(commit)
        folder = snapshot(pinned)
        if folder is not None and HUB.is_whole(pinned.name, commit, folder):
            return Found(str(_below(folder, inner)))
        there = HUB.parse(HUB.spelled(str(pinned)))
        if not there.exists() and not there.has_magic:
            raise RecipeError(f"{printable(pinned.name)} has no {printable(inner or 'files')} at commit {commit}")
        return Found(str(there))
    except StreammergeError as error:
        if cached is not None and (_below(cached, inner).exists() or _below(cached, inner).has_magic):
            return Found(str(_below(cached, inner)))
        return Found("", error)


def _below(folder: Location, inner: str) -> Location:
    return folder / inner if inner else folder
