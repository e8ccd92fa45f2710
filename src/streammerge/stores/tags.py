"""Entity tags that are digests: of whole objects, or of objects that were uploaded in parts of a usual size.

S3 gives an object the MD5 of its bytes as its tag, or of the MD5s of its parts. Encryption by a key service gives others.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from typing import Any

from streammerge.stores.checksums import CRC32C

CELL_BYTES = 256 << 10
"""Checksums of this many bytes each stand for the digest, which can only be compared for the whole object."""
_TAG = re.compile(r'"?([0-9a-f]{32})(?:-(\d+))?"?')
_USUAL_MIB = (5, 8, 10, 15, 16, 20, 25, 32, 50, 64, 100, 128)


def part_sizes(tag: str, size: int) -> list[int]:
    """Returns the sizes of parts that a tag may stand for; the size of the object for a plain digest. Empty for others."""
    found = _TAG.fullmatch(tag)
    if found is None:
        return []
    if found[2] is None:
        return [max(size, 1)]
    return [each << 20 for each in _USUAL_MIB if max(-(-size // (each << 20)), 1) == int(found[2])]


def cells(data: Any) -> Iterator[int]:
    """Yields the checksum of each cell of bytes that begin with one."""
    view = memoryview(data)
    for start in range(0, len(view), CELL_BYTES):
        yield CRC32C.update(view[start : start + CELL_BYTES])


def read_through(tag: str, size: int, blocks: Iterable[Any]) -> tuple[bool, str, list[int]]:
    """Reads an object once, in blocks of whole cells. Returns whether its tag is the digest of these bytes, their plain
    digest, and the checksums of the cells."""
    sizes, sums = part_sizes(tag, size), list[int]()
    plain = hashlib.md5(usedforsecurity=False)
    parts: dict[int, list[Any]] = {each: [hashlib.md5(usedforsecurity=False)] for each in sizes}
    done = 0
    for data in blocks:
        view = memoryview(data)
        sums += cells(view)
        plain.update(view)
        for each, digests in parts.items():
            at = 0
            while at < len(view):
                room = each - (done + at) % each
                digests[-1].update(view[at : at + room])
                at += min(room, len(view) - at)
                if (done + at) % each == 0 and done + at < size:
                    digests.append(hashlib.md5(usedforsecurity=False))
        done += len(view)
    bare = tag.strip('"')
    composed = (
        f"{hashlib.md5(b''.join(each.digest() for each in digests), usedforsecurity=False).hexdigest()}-{len(digests)}"
        for digests in parts.values()
    )
    return bare == plain.hexdigest() or bare in composed, plain.hexdigest(), sums
