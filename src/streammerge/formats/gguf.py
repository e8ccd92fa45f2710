"""GGUF, the format of llama.cpp. Its reader is imported when there is such a file."""

from __future__ import annotations

from streammerge.formats.base import Container, Match
from streammerge.stores.base import Location

_MAGIC = b"GGUF"


def matches(head: bytes, size: int) -> Match:
    return head[:4] == _MAGIC


def read(path: Location) -> Container:
    """Returns the container of a GGUF file, or of the whole set if it is one file of several. Raises FormatError."""
    from streammerge.formats.gguf_file import read_gguf  # here, because most files are of other formats

    return read_gguf(path)
