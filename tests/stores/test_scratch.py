"""Files for a while."""

from __future__ import annotations

import os

import pytest

from streammerge.stores.scratch import scratch


def test_files_go_with_the_block() -> None:
    with scratch() as create:
        first, second = create(5), create(0)
        first.write_full(b"12345", 0)
        assert first.location != second.location
        assert first.location.read(1, 3) == b"234"
        folder = first.location.local_path
        assert folder is not None
    assert not os.path.lexists(os.path.dirname(folder))
    with pytest.raises(OSError, match="Bad file descriptor"):
        first.write_full(b"x", 0)
