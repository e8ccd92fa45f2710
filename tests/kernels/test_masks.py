"""Masks beside memory: they come back, or nothing does."""

from __future__ import annotations

import errno

import numpy as np
import pytest

from streammerge.kernels.masks import MaskRoom, Masks, masks_bytes
from streammerge.stores.spilled import SpillFile

MODELS, ELEMS, GRAIN = 2, 2077, 1001


class Short:
    """Room of a disk that becomes full after so many bytes of a write."""

    def __init__(self, nbytes: int, most: int) -> None:
        self.file, self.most = SpillFile(nbytes), most

    def write(self, data: memoryview, offset: int) -> None:
        self.file.write(data[: self.most], offset)
        raise OSError(errno.ENOSPC, "No space left on device")

    def read_into(self, data: memoryview, offset: int) -> None:
        self.file.read_into(data, offset)


def grains() -> list[tuple[int, int, int]]:
    return [(model, start, min(start + GRAIN, ELEMS)) for model in range(MODELS) for start in range(0, ELEMS, GRAIN)]


def drawn(model: int, start: int, stop: int) -> np.ndarray:
    return np.packbits(np.random.default_rng([model, start]).integers(0, 2, stop - start, np.uint8))


def test_masks_come_back_bit_by_bit() -> None:
    room = MaskRoom(SpillFile(masks_bytes(MODELS, ELEMS, GRAIN)), 7)
    masks = Masks(room, ELEMS, GRAIN)
    assert all(masks.kept(*grain) is None for grain in grains())
    for grain in grains():
        masks.keep(*grain, drawn(*grain))
    for reader in (masks, Masks(room, ELEMS, GRAIN)):
        for grain in grains():
            found = reader.kept(*grain)
            assert found is not None
            assert np.array_equal(found, drawn(*grain))


def test_those_of_another_tensor_or_of_other_elements_do_not() -> None:
    spill = SpillFile(masks_bytes(MODELS, ELEMS, GRAIN))
    masks = Masks(MaskRoom(spill, 1), ELEMS, GRAIN)
    masks.keep(0, 0, GRAIN, drawn(0, 0, GRAIN))
    assert masks.kept(0, 0, GRAIN) is not None
    assert masks.kept(0, 0, GRAIN - 1) is None
    assert masks.kept(1, 0, GRAIN) is None
    assert Masks(MaskRoom(spill, 2), ELEMS, GRAIN).kept(0, 0, GRAIN) is None


@pytest.mark.parametrize("most", [0, 100, GRAIN // 8 + 1, GRAIN // 8 + 8])
def test_a_mask_of_which_a_part_was_written_is_not_there(most: int) -> None:
    spill = Short(masks_bytes(MODELS, ELEMS, GRAIN), most)
    masks = Masks(MaskRoom(spill, 1), ELEMS, GRAIN)
    masks.keep(0, 0, GRAIN, drawn(0, 0, GRAIN))
    assert masks.kept(0, 0, GRAIN) is None
    assert Masks(MaskRoom(spill, 1), ELEMS, GRAIN).kept(0, 0, GRAIN) is None


def test_a_file_that_is_too_short_has_nothing() -> None:
    assert Masks(MaskRoom(SpillFile(10), 1), ELEMS, GRAIN).kept(1, GRAIN, 2 * GRAIN) is None
