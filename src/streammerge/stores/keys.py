"""Names of files and folders within a store: what can be told from a name alone, without asking the store."""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import TypeVar

K = TypeVar("K", bound="Key")
MAGIC = re.compile(r"[*?[]")
"""The characters of patterns."""


class Key:
    """A name within a store, without a trailing slash, in the form of a POSIX path."""

    __slots__ = ("key",)

    key: str

    @property
    def name(self) -> str:
        """The last part; "" for the root."""
        return PurePosixPath(self.key).name

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.key).suffix

    @property
    def stem(self) -> str:
        return PurePosixPath(self.key).stem

    @property
    def parent(self: K) -> K:
        return self._at(PurePosixPath(self.key).parent)

    @property
    def parents(self: K) -> tuple[K, ...]:
        return tuple(map(self._at, PurePosixPath(self.key).parents))

    @property
    def has_magic(self) -> bool:
        """Whether it reads as a pattern."""
        return MAGIC.search(self.key) is not None

    def __truediv__(self: K, name: str) -> K:
        return self._at(PurePosixPath(self.key) / name)

    def with_name(self: K, name: str) -> K:
        return self._at(PurePosixPath(self.key).with_name(name))

    def relative_to(self, folder: Key) -> str:
        """The part of the name below a folder. ValueError when it does not lie there."""
        return PurePosixPath(self.key).relative_to(folder.key).as_posix()

    def _at(self: K, key: PurePosixPath) -> K:
        """Returns another name in the same store."""
        raise NotImplementedError
