"""Names of repositories of the Hugging Face hub, and the hub's cache on this machine.

Nothing here asks the hub, or needs its library. After ``hf://``, a repository is called ``org/name[@revision][/folder]``.
Without it, a repository is called ``org/name`` or ``org/name@revision[/folder]``.
"""

from __future__ import annotations

import os
import posixpath
import re
from typing import NamedTuple
from urllib.parse import quote, unquote

from streammerge.errors import FormatError
from streammerge.stores.base import Location
from streammerge.stores.local import LOCAL

SCHEME = "hf"
MAIN = "main"
OTHER_KINDS = ("datasets/", "spaces/", "kernels/", "buckets/")
"""The beginnings of names of repositories that are no models."""
_FILES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".th", ".tar", ".pkl", ".yaml", ".yml", ".json")
"""Endings by which a text without ``hf://`` means a file."""
_MOST_REVISION_BYTES = 100
_PART = r"[A-Za-z0-9_](?:[\w.-]{0,94}[A-Za-z0-9_])?"
_REVISION = r"refs/(?:pr|convert)/[\w.-]+|[\w.%-]+"
_NAMED = rf"(?as)(?P<name>{_PART}/{_PART})(?:@(?P<revision>{_REVISION}))?(?:/(?P<inner>.+))?"
_CACHED = r"(?:^|/)models--([\w.-]+?)--([\w.-]+)/snapshots/([0-9a-f]{40})(?:/(.*))?$"
_COMMIT = "[0-9a-f]{40}"


class Repository(NamedTuple):
    """A repository at a revision, or a file or folder ``inner`` in it.

    ``name``: ``org/name``. ``revision``: a branch, a tag or a commit; "" if none was given.
    """

    name: str
    revision: str = ""
    inner: str = ""

    @property
    def is_pinned(self) -> bool:
        """Whether the revision is a commit, whose files never change."""
        return re.fullmatch(_COMMIT, self.revision) is not None

    def at(self, commit: str) -> Repository:
        return self._replace(revision=commit)

    def __str__(self) -> str:
        """Returns the name as it is typed after ``hf://``."""
        revision = f"@{quote(self.revision, safe='')}" if self.revision else ""
        return self.name + revision + (f"/{self.inner}" if self.inner else "")


def read_name(text: str) -> Repository | None:
    """Reads what stands after ``hf://``. None for a text that is no name of a repository."""
    found = re.fullmatch(_NAMED, text.rstrip("/"))
    if found is None or "--" in found["name"] or ".." in found["name"] or found["name"].startswith(OTHER_KINDS):
        return None
    inner = found["inner"] or ""
    if any(part in ("", ".", "..") for part in inner.split("/")) and inner:
        return None
    return Repository(found["name"], unquote(found["revision"] or ""), inner)


def named_repository(text: str) -> Repository | None:
    """Returns the repository that a text may mean, with ``hf://`` or without it; None for other texts."""
    start = f"{SCHEME}://"
    if text[: len(start)].lower() == start:
        typed = text[len(start) :]
        return read_name(typed.removeprefix("models/") if typed.count("/") > 1 else typed)
    found = read_name(text)
    if found is None or (found.inner and not found.revision) or found.name.endswith(_FILES):
        return None
    return found


def repository_of(location: Location) -> Repository | None:
    """Returns the repository that a location lies in, at its commit: on the hub, or in a snapshot of the hub's cache.

    None for all other places.
    """
    if location.store.scheme == SCHEME:
        found = read_name(location.key)
        return found if found is not None and found.is_pinned else None
    cached = re.search(_CACHED, location.key) if location.store is LOCAL else None
    if cached is None:
        return None
    return Repository(f"{cached[1]}/{cached[2]}", cached[3], (cached[4] or "").strip("/"))


def leading_repository(location: Location) -> Repository | None:
    """Returns the repository that a location lies in, if its name leads to the location on this machine.

    None in a snapshot of a cache that the hub's client does not use here: such a file is found by its path alone.
    """
    found = repository_of(location)
    if found is None or location.store.scheme == SCHEME:
        return found
    kept = snapshot(found)
    if kept is None:
        return None
    return found if (kept / found.inner if found.inner else kept).resolve() == location.resolve() else None


def snapshot(repository: Repository) -> Location | None:
    """Returns the folder in the hub's cache that holds a revision of a repository, whole or in part; None without one."""
    cache = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or posixpath.join(hub_home(), "hub")
    folder = LOCAL.parse(os.path.expanduser(cache)) / f"models--{repository.name.replace('/', '--')}"
    commit = repository.revision
    if not repository.is_pinned:
        reference = folder / "refs" / (repository.revision or MAIN)
        try:
            commit = reference.read(0, min(reference.size, _MOST_REVISION_BYTES)).decode().strip()
        except (OSError, ValueError, FormatError):
            return None
    found = folder / "snapshots" / commit
    return found if re.fullmatch(_COMMIT, commit) and found.is_folder() else None


def hub_home() -> str:
    """Returns the folder of the hub's client on this machine."""
    home = os.environ.get("HF_HOME") or posixpath.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    return os.path.expanduser(home)


def is_offline() -> bool:
    """Whether the user's environment forbids to ask the hub."""
    return any(
        os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    )
