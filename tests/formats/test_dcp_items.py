"""The bytes of items: those that torch wrote, found in an archive or known from one like it."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch

import streammerge as sm
from streammerge.formats import torch_zip
from streammerge.formats.dcp_items import Heads, number_in
from streammerge.formats.dcp_metadata import Entry, Item
from streammerge.sources.stored import Stored
from streammerge.stores.base import Location
from streammerge.stores.locations import parse
from streammerge.tensors.dtypes import DType
from streammerge.tensors.spec import TensorSpec


def written(path: Path, values: list[object]) -> tuple[Location, list[Item]]:
    """Writes items one after the other, behind some other bytes."""
    data, items = b"x" * 100, list[Item]()
    for value in values:
        buffer = io.BytesIO()
        torch.save(value, buffer)
        items.append(Item(path.name, len(data), len(buffer.getvalue())))
        data += buffer.getvalue()
    path.write_bytes(data)
    return parse(str(path)), items


def test_items_like_one_before_are_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = [torch.randn(6, 5) for _ in range(3)] + [torch.randn(5, 6), torch.randn(6, 5).t().contiguous().t()]
    path, items = written(tmp_path / "__0_0.distcp", list(tensors))
    heads, opened = Heads(set()), list[str]()
    good = torch_zip.read_stream

    def read_stream(*arguments: object) -> object:
        opened.append(str(arguments[-1]))
        return good(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(torch_zip, "read_stream", read_stream)
    with path.stream() as stream:
        for number, (tensor, item) in enumerate(zip(tensors, items, strict=True)):
            source = heads.piece(stream, path, item, TensorSpec("w", DType.F32, tuple(tensor.shape)), str(number))
            if number == 4:
                assert source.__class__ is not Stored, "its strides are others"
                continue
            assert isinstance(source, Stored)
            with open(str(path), "rb") as file:
                file.seek(source.offset)
                assert file.read(source.spec.nbytes) == bytes(tensor.view(torch.uint8).numpy())
    assert opened == ["0", "3", "4"]


def test_where_the_bytes_lie_in_an_item(tmp_path: Path) -> None:
    tensor = torch.randn(6, 5)
    path, (item, odd) = written(tmp_path / "__0_0.distcp", [tensor, {"no": "tensor"}])
    entry = Entry(DType.F32, "float32", (12, 5), [((0, 0), (6, 5)), ((6, 0), (6, 5))])
    found = Heads(set()).within(path, (item.offset, item.nbytes), entry, (6, 0))
    assert found is not None
    with open(str(path), "rb") as file:
        file.seek(found[0])
        assert file.read(found[1]) == bytes(tensor.view(torch.uint8).numpy())
    assert Heads(set()).within(path, (item.offset, item.nbytes), entry, (3, 0)) is None, "no such piece"
    assert Heads(set()).within(path, (odd.offset, odd.nbytes), entry, (6, 0)) is None


def test_a_part_that_is_no_tensor_is_refused(tmp_path: Path) -> None:
    path, (item,) = written(tmp_path / "__0_0.distcp", [[1, 2]])
    with path.stream() as stream, pytest.raises(sm.FormatError, match=r"what: its part in __0_0\.distcp is no tensor"):
        Heads(set()).piece(stream, path, item, TensorSpec("w", DType.F32, (2,)), "what")


def test_numbers_of_counters(tmp_path: Path) -> None:
    values = [7, torch.tensor(-9), torch.tensor([12], dtype=torch.int32), torch.tensor([1, 2]), torch.tensor(1.5), "7"]
    path, items = written(tmp_path / "__0_0.distcp", list(values))
    found = [number_in((path, item.offset, item.nbytes), "step") for item in items]
    assert found == [7, -9, 12, None, None, None]
