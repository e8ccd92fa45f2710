"""Names of files and folders within a store: what can be told from a name alone, without asking the store.

They follow ``pathlib.PurePosixPath``, whose import takes as long as inspecting a file.
"""

from __future__ import annotations

import posixpath
import re
from typing import TypeVar

K = TypeVar("K", bound="Key")
MAGIC = re.compile(r"[*?[]")
"""The characters of patterns."""


def normal(name: str) -> str:
    """Returns a name without empty parts, parts ".", and a slash at its end; "." if nothing is left."""
    parts = [part for part in name.split("/") if part and part != "."]
    root = "/" * name.startswith("/") * (2 if name.startswith("//") and not name.startswith("///") else 1)
    return root + "/".join(parts) or "."


class Key:
    """A name within a store, in the form of :func:`normal`."""

    __slots__ = ("key",)

    key: str

    @property
    def name(self) -> str:
        """The last part; "" for the root."""
        return "" if self.key == "." else self.key.rpartition("/")[2]

    @property
    def suffix(self) -> str:
        """The last dot of the name and what follows it; "" if there is no dot, or only one at the begin or at the end."""
        return self.name[len(self.stem) :]

    @property
    def stem(self) -> str:
        name = self.name
        dot = name.rfind(".")
        return name[:dot] if 0 < dot < len(name) - 1 else name

    @property
    def parent(self: K) -> K:
        return self._at(posixpath.dirname(self.key))

    @property
    def parents(self: K) -> tuple[K, ...]:
        found, here = [], self
        while (above := here.parent).key != here.key:
            found.append(above)
            here = above
        return tuple(found)

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts; of an absolute name, the root is the first."""
        inner = self.key.lstrip("/")
        root = self.key[: len(self.key) - len(inner)]
        parts = inner.split("/") if inner and inner != "." else []
        return (root, *parts) if root else tuple(parts)

    @property
    def has_magic(self) -> bool:
        """Whether it reads as a pattern."""
        return MAGIC.search(self.key) is not None

    def __truediv__(self: K, name: str) -> K:
        return self._at(posixpath.join(self.key, name))

    def with_name(self: K, name: str) -> K:
        """Returns the same with another last part. Raises ValueError for the root, and for what is no single part."""
        if not self.name or name in ("", ".") or "/" in name:
            raise ValueError(f"{self.key!r} cannot be renamed to {name!r}")
        return self._at(posixpath.join(posixpath.dirname(self.key), name))

    def relative_to(self, folder: Key) -> str:
        """The part of the name below a folder. ValueError when it does not lie there."""
        own, above = self.parts, folder.parts
        inner = "/".join(own[len(above) :])
        if own[: len(above)] != above or inner.startswith("/"):
            raise ValueError(f"{self.key!r} is not in the subpath of {folder.key!r}")
        return inner or "."

    def _at(self: K, key: str) -> K:
        """Returns another name in the same store. ``key``: may have any form."""
        raise NotImplementedError
