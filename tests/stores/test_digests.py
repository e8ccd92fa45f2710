"""All bytes of a file except some ranges."""

from __future__ import annotations

import hashlib

import pytest

from stores.test_base import at
from streammerge.stores.digests import digest_outside, outside


@pytest.mark.parametrize("spans", [[], [(0, 100)], [(0, 0)], [(10, 5), (15, 5), (90, 10)], [(0, 1), (99, 1)]])
def test_all_but_some_bytes(spans: list[tuple[int, int]]) -> None:
    data = bytes(range(100))
    kept = bytes(byte for place, byte in enumerate(data) if not any(o <= place < o + n for o, n in spans))
    assert b"".join(outside(at("a"), spans)) == kept
    assert digest_outside(at("a"), spans) == hashlib.sha256(kept).hexdigest()
