"""The same elements in another shape."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from sources.suite import DTYPES, Case, Disk, SourceSuite, draw
from streammerge.sources.reshaped import reshaped
from streammerge.sources.rows import gathered


class TestReshaped(SourceSuite):
    def cases(self, disk: Disk) -> Iterator[Case]:
        for dtype in DTYPES:
            tensor = draw((1, 7), dtype)
            yield Case(reshaped(disk.stored(tensor), (7, 1)), tensor.view(7, 1))
            yield Case(reshaped(gathered(disk.stored(tensor.view(7, 1)), [3, 1, 1, 0]), (1, 4)), tensor[:, [3, 1, 1, 0]])


def test_another_number_of_elements_is_refused(tmp_path: Path) -> None:
    source = Disk(tmp_path).stored(draw((2, 3), DTYPES[0]))
    assert reshaped(source, (2, 3)) is source
    with pytest.raises(ValueError, match="as many elements"):
        reshaped(source, (2, 4))
