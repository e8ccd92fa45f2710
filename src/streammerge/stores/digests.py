"""The bytes of a file without some of its ranges, and their digest."""

from __future__ import annotations

import io
from collections.abc import Iterator

from streammerge.stores.base import Location

COPY_BYTES = 1 << 20
"""Bytes that are copied or compared at once."""


def outside(location: Location, spans: list[tuple[int, int]]) -> Iterator[bytes]:
    """Yields all bytes of a file outside the given (offset, bytes), which are in order."""
    cursor = 0
    with location.stream() as stream:
        for offset, nbytes in (*spans, (stream.seek(0, io.SEEK_END), 0)):
            stream.seek(cursor)
            while cursor < offset:
                data = stream.read(min(offset - cursor, COPY_BYTES))
                if not data:
                    return
                yield data
                cursor += len(data)
            cursor = max(cursor, offset + nbytes)


def digest_outside(location: Location, spans: list[tuple[int, int]]) -> str:
    """Returns the SHA-256 of a file without the given (offset, bytes)."""
    import hashlib  # here, since it brings all of OpenSSL

    digest = hashlib.sha256()
    for data in outside(location, spans):
        digest.update(data)
    return digest.hexdigest()
