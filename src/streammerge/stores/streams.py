"""A file that is read at offsets, as a stream of Python."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any, BinaryIO, Protocol


class Readable(Protocol):
    """The part of an opened input that a stream needs."""

    size: int

    def read_into(self, buffer: memoryview, offset: int) -> None: ...

    def close(self) -> None: ...


class InputStream(io.RawIOBase):
    """An input as an unbuffered stream."""

    def __init__(self, source: Readable) -> None:
        self.source, self.position = source, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.source.size}[whence]
        if self.position < 0:
            raise ValueError(f"negative seek position {self.position}")
        return self.position

    def tell(self) -> int:
        return self.position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        count = max(min(len(view), self.source.size - self.position), 0)
        if count:
            self.source.read_into(view[:count], self.position)
        self.position += count
        return count

    def close(self) -> None:
        if not self.closed:
            self.source.close()
        super().close()


def read_starts(stream: BinaryIO, offsets: Sequence[int]) -> None:
    """Says that a stream is read at all these places next. A remote file is then asked for all at once."""
    source = getattr(getattr(stream, "raw", None), "source", None)
    ask = getattr(source, "read_starts", None)
    if ask is not None:
        ask(offsets)
