"""Matrices without their strongest part."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sources.suite import Disk, draw, room
from streammerge.errors import RecipeError
from streammerge.sources.base import read_whole
from streammerge.sources.residual import residual


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("way", ["pissa", "olora"])
def test_the_part_is_taken_out(tmp_path: Path, way: str, transposed: bool) -> None:
    stored = draw((40, 24), torch.float32)
    weight = (stored.t() if transposed else stored).double()
    if way == "pissa":
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        taken = left[:, :4] @ torch.diag(values[:4]) @ right[:4]
    else:
        q, r = torch.linalg.qr(weight)
        taken = 0.5 * q[:, :4] @ r[:4]
    expected = weight - taken
    made = residual(Disk(tmp_path).stored(stored), 4, way, 0.5, transposed)
    found = torch.frombuffer(read_whole(made, room()), dtype=torch.float32).view(40, 24)
    torch.testing.assert_close(found.double(), expected.t() if transposed else expected, rtol=0, atol=1e-5)
    assert made.needs().held_bytes >= 16 * stored.numel()


def test_what_has_no_such_part_is_refused(tmp_path: Path) -> None:
    stored = Disk(tmp_path).stored(torch.zeros(3, 4))
    with pytest.raises(RecipeError, match="no part of rank 4"):
        residual(stored, 4, "pissa")
    with pytest.raises(RecipeError, match="no way to take a part"):
        residual(stored, 2, "corda")
