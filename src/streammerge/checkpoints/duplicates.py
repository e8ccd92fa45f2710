"""Paths that are one checkpoint: links to one file, and copies with the same bytes."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from streammerge.checkpoints.numbers import number_of
from streammerge.errors import ChangedError, printable
from streammerge.stores.local import read_full

_BLOCK_BYTES = 4 << 20
_FEW_BYTES = 64 << 10
_Files = tuple[tuple[str, str, tuple[int, int], int], ...]


def distinct(paths: Sequence[str], notes: list[str]) -> list[str]:
    """The paths without those that are one checkpoint with another of them; a note says which.

    Of several the one with a number in its name stays, else the first. Bytes are read only where names and sizes of the
    files are equal: first the ends of the files, then, where these are equal too, all of them.
    """
    groups: dict[object, list[str]] = {}
    files = {path: _files(path) for path in paths}
    for path, each in files.items():
        groups.setdefault(tuple((name, size) for name, _, _, size in each) or path, []).append(path)
    stays: dict[str, str] = {}
    for group in groups.values():
        kept: dict[bytes, list[str]] = {}
        for path in group if len(group) > 1 else ():
            alike = kept.setdefault(_ends(files[path]), [])
            twin = next((known for known in alike if is_same(files[known], files[path])), None)
            if twin is None:
                alike.append(path)
            elif number_of(twin) is None and number_of(path) is not None:
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
    notes, seen = [], dict[_Files, str]()
    for path in paths:
        files = tuple((name, "", key, size) for name, _, key, size in _files(path))
        first = seen.setdefault(files, path) if files else path
        if first != path:
            notes.append(f"{printable(path)} is the same checkpoint as {printable(first)}, and counts twice")
    return notes


def _files(path: str) -> _Files:
    """(name, path, device and inode, size) of all files of a checkpoint; nothing for what cannot be looked at."""
    place = Path(path)
    try:
        found = sorted(each for each in place.rglob("*") if each.is_file()) if place.is_dir() else [place]
        status = [(each, each.stat()) for each in found]
    except OSError:
        return ()
    names = [str(each.relative_to(place)) if each != place else "" for each in found]
    return tuple(
        (name, str(each), (known.st_dev, known.st_ino), known.st_size)
        for name, (each, known) in zip(names, status, strict=True)
    )


def _ends(files: _Files) -> bytes:
    """A digest of the last bytes of each file; the directory of an archive, with its checksums, stands there."""
    import hashlib  # here, since it brings all of OpenSSL

    digest = hashlib.sha256()
    for _, path, _, size in files:
        with suppress(OSError, ChangedError):
            digest.update(read_full(path, max(size - _FEW_BYTES, 0), min(size, _FEW_BYTES)))
    return digest.digest()


def is_same(one: _Files, two: _Files) -> bool:
    """Whether two checkpoints, with files of the same names and sizes, have the same bytes."""
    apart = [(a, b, size) for (_, a, own, size), (_, b, other, _) in zip(one, two, strict=True) if own != other]
    try:
        for a, b, size in apart:
            for start in range(0, size, _BLOCK_BYTES):
                count = min(_BLOCK_BYTES, size - start)
                if read_full(a, start, count) != read_full(b, start, count):
                    return False
    except (OSError, ChangedError):
        return False
    return True
