"""Views of storages, gathered from the file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import octets

from sources.suite import DTYPES, Case, Disk, SourceSuite, draw, room
from streammerge.sources.base import Allocated
from streammerge.sources.strided import STRIP_BYTES, Strided
from streammerge.stores.locations import parse
from streammerge.tensors.dtypes import DType
from streammerge.tensors.spec import TensorSpec


def views(dtype: torch.dtype) -> Iterator[torch.Tensor]:
    base = draw((7 * 11 * 13,), dtype)
    yield base.view(7, 143).t()
    yield base.view(7, 11, 13).permute(2, 0, 1)
    yield base.view(7, 11, 13).permute(1, 2, 0)
    yield base[::2]
    yield base[5:900:7]
    yield base[:2].unsqueeze(1).expand(2, 5)
    yield base[3].expand(4, 3)
    yield base[3:4].squeeze()
    yield base.view(7, 11, 13)[2:5, 3:, ::4]
    yield base.view(7, 11, 13)[:, 4].t()
    yield base.as_strided((5, 9), (3, 2), 1)  # overlapping
    yield base.as_strided((100, 8), (1, 1))
    yield base[:0].view(0, 3).t()
    yield draw((2, 3, 4, 5), dtype).contiguous(memory_format=torch.channels_last)


class TestStrided(SourceSuite):
    def cases(self, disk: Disk) -> Iterator[Case]:
        for dtype in DTYPES:
            for view in views(dtype):
                yield Case(disk.strided(view), view)
        for dtype in (torch.complex64, torch.complex128):
            numbers = draw((6, 5), dtype)
            for view in (numbers.conj(), numbers.conj().t(), numbers.conj()[1:, ::2], numbers.conj().imag):
                yield Case(disk.strided(view), view)
        for large in (draw((1500, 1301), torch.float32).t(), draw((600, 70, 9), torch.bfloat16).permute(1, 0, 2)):
            yield Case(disk.strided(large), large)
        wide = draw((64, 9000), torch.float64)
        yield Case(disk.strided(wide.t()), wide.t())
        yield Case(disk.strided(wide[:, ::3000]), wide[:, ::3000])


class Counting:
    """Counts the calls and the bytes of a file."""

    def __init__(self, path: str) -> None:
        self.file, self.calls, self.nbytes = parse(path).open(), 0, 0

    def read_into(self, buffer: memoryview, offset: int) -> None:
        self.calls, self.nbytes = self.calls + 1, self.nbytes + len(buffer)
        self.file.read_into(buffer, offset)


@pytest.mark.parametrize(
    ("view", "calls", "amplified"),
    [
        (lambda: draw((2048, 2048), torch.float32).t(), 5 * 2048, 1.1),  # a chunk, then four tiles: each visits 2048 rows
        (lambda: draw((3_000_000,), torch.float32)[::2], 30, 2.1),
        (lambda: draw((3000, 1000), torch.float32)[:, :500], 30, 2.1),
        (lambda: draw((100, 60_000), torch.float32)[:, :20_000], 120, 1.1),
        (lambda: draw((1,), torch.float32).expand(1 << 20), 8, 1.1),
    ],
    ids=["transposed", "every other", "left half", "long rows", "expanded"],
)
def test_reading_in_order_asks_the_disk_seldom_and_for_little_more(
    tmp_path: Path, view: object, calls: int, amplified: float
) -> None:
    tensor = view()  # type: ignore[operator]
    source = Disk(tmp_path).strided(tensor)
    file = Counting(source.begin[0])
    reader = source.open(Allocated(lambda path: file, 4 << 20))
    numel, step, made = tensor.numel(), 1 << 18, []
    for start in range(0, numel, step):
        stop = min(start + step, numel)
        made.append(bytes(reader.read(start, stop, memoryview(bytearray((stop - start) * 4)))))
    assert b"".join(made) == octets(tensor)
    assert file.calls <= calls, file.calls
    assert file.nbytes <= amplified * max(source.nbytes, STRIP_BYTES), file.nbytes


def test_beyond_2_gib(tmp_path: Path) -> None:
    """Reads a sparse file of 5 GiB with a few numbers, by a transposed view and by a view with a large offset."""
    path, rows, columns = tmp_path / "sparse", 1 << 15, 40_000
    with open(path, "wb") as file:
        file.truncate(4 * rows * columns)
    places = {(0, 0): 1.0, (1, 39_999): 2.0, (30_000, 7): 3.0, (32_767, 39_999): 4.0}
    with open(path, "r+b") as file:
        for (row, column), value in places.items():
            file.seek(4 * (row * columns + column))
            file.write(torch.tensor([value]).numpy().tobytes())
    turned = Strided(TensorSpec("w", DType.F32, (columns, rows)), parse(path), 0, (1, columns))
    reader = turned.open(room())
    for (row, column), value in places.items():
        at = column * rows + row
        start = max(at - 2, 0)
        stop = min(at + 3, rows * columns)
        found = torch.frombuffer(reader.read(start, stop, memoryview(bytearray(4 * (stop - start)))), dtype=torch.float32)
        assert found[at - start] == value
        assert found.sum() == value
    corner = Strided(
        TensorSpec("w", DType.F32, (2, 3)), parse(path), 4 * ((rows - 2) * columns + columns - 3), (columns, 1)
    )
    found = torch.frombuffer(corner.open(room()).read(0, 6, memoryview(bytearray(24))), dtype=torch.float32)
    assert found.tolist() == [0, 0, 0, 0, 0, 4.0]
    assert json.dumps(corner.place, default=str)
