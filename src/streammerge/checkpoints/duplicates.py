"""Paths that are one checkpoint: links to one file, and copies with the same bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import NamedTuple

from streammerge.errors import ChangedError, FormatError, RecipeError, printable
from streammerge.stores.base import Location, Status
from streammerge.stores.locations import parse

_BLOCK_BYTES = 4 << 20
_FEW_BYTES = 64 << 10


class _File(NamedTuple):
    """A file of a checkpoint. ``name``: its path below the checkpoint's folder; "" for a checkpoint that is one file."""

    name: str
    location: Location
    status: Status


_Files = tuple[_File, ...]


def distinct(paths: Sequence[str], notes: list[str]) -> list[str]:
    """Returns the paths without duplicates of a checkpoint, and adds a note about each of those.

    Of several duplicates, the one with a number in its name stays, otherwise the first. Bytes are read only where names
    and sizes of the files are equal: first the ends of the files, then, where these are equal too, all of them.
    """
    from streammerge.checkpoints.numbers import Numbers, number_of, numbers_in

    def told(path: str) -> tuple[bool, bool]:
        """How well a name tells the place of a checkpoint: by itself, or by that of its folder."""
        return numbers_in(parse(path).name) != Numbers(), number_of(path) is not None

    groups: dict[object, list[str]] = {}
    files = {path: _files(path) for path in paths}
    for path, each in files.items():
        groups.setdefault(tuple((file.name, file.status.size) for file in each) or path, []).append(path)
    stays: dict[str, str] = {}
    for group in groups.values():
        kept: dict[bytes, list[str]] = {}
        for path in group if len(group) > 1 else ():
            alike = kept.setdefault(_ends(files[path]), [])
            twin = next((known for known in alike if is_same(files[known], files[path])), None)
            if twin is None:
                alike.append(path)
            elif told(twin) < told(path):
                alike[alike.index(twin)] = path
                stays[twin] = path
            else:
                stays[path] = twin
    for path, twin in stays.items():
        while twin in stays:
            twin = stays[twin]
        notes.append(f"{printable(path)} is the same checkpoint as {printable(twin)}, so it counts once")
    return [path for path in files if path not in stays]


def twice_told(paths: Sequence[str]) -> list[str]:
    """Notes about paths under which one checkpoint was named several times. No byte is read."""
    notes, seen = [], dict[object, str]()
    for path, times in Counter(paths).items():
        if times > 1:
            notes.append(f"{printable(path)} is named {times} times, and counts {times} times")
        files = tuple((file.name, file.status) for file in _files(path))
        first = seen.setdefault(files, path) if files else path
        if first != path:
            notes.append(f"{printable(path)} is the same checkpoint as {printable(first)}, and counts twice")
    return notes


def _files(path: str) -> _Files:
    """Returns all files of a checkpoint. Files that cannot be accessed are left out."""
    try:
        place = parse(path)
        return tuple(_below(place, "", set())) if place.is_folder() else (_File("", place, place.status()),)
    except (OSError, FormatError, RecipeError):
        return ()


def _below(folder: Location, prefix: str, seen: set[Location]) -> Iterator[_File]:
    """The files in a folder and in the folders below it. ``seen``: folders that were entered; a link may lead back."""
    resolved = folder.resolve()
    if resolved in seen:
        return
    seen.add(resolved)
    for each in folder.children():
        if each.is_folder():
            yield from _below(each, f"{prefix}{each.name}/", seen)
        elif each.is_file():
            yield _File(prefix + each.name, each, each.status())


def _ends(files: _Files) -> bytes:
    """A digest of the last bytes of each file; the directory of an archive, with its checksums, stands there."""
    import hashlib  # here, since it brings all of OpenSSL

    digest = hashlib.sha256()
    for _, location, status in files:
        with suppress(OSError, FormatError):
            digest.update(location.read(max(status.size - _FEW_BYTES, 0), min(status.size, _FEW_BYTES)))
    return digest.digest()


def is_same(one: _Files, two: _Files) -> bool:
    """Whether two checkpoints, with files of the same names and sizes, have the same bytes."""
    try:
        return all(a.status.place == b.status.place or _equal(a, b) for a, b in zip(one, two, strict=True))
    except (OSError, FormatError, ChangedError):
        return False


def _equal(one: _File, two: _File) -> bool:
    """Whether two files of one size have the same bytes."""
    with one.location.stream() as ours, two.location.stream() as theirs:
        return all(ours.read(_BLOCK_BYTES) == theirs.read(_BLOCK_BYTES) for _ in range(0, one.status.size, _BLOCK_BYTES))
