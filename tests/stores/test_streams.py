"""A file that is read at offsets, as a stream of Python."""

from __future__ import annotations

import io

import pytest

from stores.test_base import at
from streammerge.stores.streams import InputStream

DATA = bytes(range(100))


@pytest.mark.parametrize("buffered", [False, True])
def test_it_reads_as_a_stream_of_bytes_does(buffered: bool) -> None:
    """The oracle is Python's own stream over the same bytes."""
    raw, oracle = InputStream(at("a").open()), io.BytesIO(DATA)
    stream = io.BufferedReader(raw) if buffered else raw
    for offset, whence in ((0, 0), (97, 0), (-3, 2), (200, 0), (5, 0), (7, 1), (0, 2)):
        assert stream.seek(offset, whence) == oracle.seek(offset, whence)
        for nbytes in (0, 1, 10, 1000):
            assert stream.read(nbytes) == oracle.read(nbytes)
            assert stream.tell() == oracle.tell()
    assert stream.readable()
    assert stream.seekable()
    with pytest.raises(ValueError, match="negative"):
        stream.seek(-1)


def test_closing_it_closes_the_input_once() -> None:
    closed = []

    class Counted:
        size = 3

        def read_into(self, buffer: memoryview, offset: int) -> None:
            raise AssertionError

        def close(self) -> None:
            closed.append(True)

    stream = InputStream(Counted())
    stream.close()
    stream.close()
    assert closed == [True]
