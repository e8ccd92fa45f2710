"""Samples of pieces: even, and the same however pieces are cut into chunks or made as one."""

from __future__ import annotations

import numpy as np
import pytest

from streammerge.running.sampling import WINDOW, of_many, of_one, places, sample_size


@pytest.mark.parametrize("elems", [1, 15, 16, 17, 255, 1000, 65_536, 262_145, 1 << 22])
def test_a_sample_is_spread_evenly(elems: int) -> None:
    own = places(elems)
    assert len(own) == sample_size(elems)
    assert (np.diff(own) > 0).all()
    assert 0 <= own[0] <= own[-1] < elems
    if elems > 1000:
        assert len(own) == {1000: 256, 65_536: 256, 262_145: 640, 1 << 22: 4096}[elems]
        assert (
            len({column // WINDOW for column in own % 1024}) >= min(len(own) // WINDOW, 64) // 2
        )  # no column is preferred
        halves = np.histogram(own, 2, (0, elems))[0]
        assert halves.min() >= len(own) * 2 // 5


@pytest.mark.parametrize("skipped", [0, 5])
def test_pieces_that_are_made_as_one_have_their_own_samples(skipped: int) -> None:
    sizes = (40, 256, 257, 1000, 65_536, 65_537, 3, 32_768, 70_000)
    length = sum(sizes) - skipped - 60_000  # the last piece goes on in another chunk
    wanted, begin = list[int](), -skipped
    for size in sizes:
        wanted += [begin + place for place in places(size).tolist() if 0 <= begin + place < length]
        begin += size
    assert of_many(sizes, skipped, length).places.tolist() == wanted


@pytest.mark.parametrize("elems", [1, 256, 1000, 70_001, 4_194_304])
@pytest.mark.parametrize("chunk", [77, 65_536, 262_144])
def test_chunks_share_the_sample_of_their_piece(elems: int, chunk: int) -> None:
    found = list[int]()
    for start in range(0, elems, chunk):
        own = of_one(elems, start, min(start + chunk, elems))
        if own.windows is not None:
            assert own.places.tolist() == (own.windows[:, None] * WINDOW + np.arange(WINDOW)).ravel().tolist()
        found += (start + own.places).tolist()
    assert found == places(elems).tolist()
