"""What ``.metadata`` tells, compared with what torch wrote."""

from __future__ import annotations

import pickle
from copy import deepcopy
from pathlib import Path

import pytest
import torch

import streammerge as sm
from formats import dcp_maker
from formats.dcp_maker import sharded
from streammerge.formats.dcp_metadata import Entry, Item, Metadata, joined, read_metadata
from streammerge.stores.locations import parse
from streammerge.tensors.dtypes import DType


def test_tensors_and_places_are_those_that_torch_wrote(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(10, 3), "b": torch.randn(4).bfloat16(), "s": torch.tensor(2.5)}
    folder = dcp_maker.write(tmp_path / "in", tensors, sharded(0, 4))
    path = parse(str(folder / ".metadata"))
    found = read_metadata((path, 0, path.size), "in")
    theirs = pickle.loads((folder / ".metadata").read_bytes())
    assert {name: entry.shape for name, entry in found.tensors.items()} == {n: tuple(t.shape) for n, t in tensors.items()}
    assert [entry.dtype for entry in found.tensors.values()] == [DType.F32, DType.BF16, DType.F32]
    for name, entry in theirs.state_dict_metadata.items():
        assert found.tensors[name].boxes == [(tuple(each.offsets), tuple(each.sizes)) for each in entry.chunks]
    assert len(found.items) == len(theirs.storage_data)
    for index, info in theirs.storage_data.items():
        assert found.items[index.fqn, tuple(index.offset)] == Item(info.relative_path, info.offset, info.length)


def test_metadata_in_a_part_of_a_file_are_the_same(tmp_path: Path) -> None:
    """As in an archive."""
    folder = dcp_maker.write(tmp_path / "in", {"a": torch.randn(10, 3)})
    data = (folder / ".metadata").read_bytes()
    (tmp_path / "archive").write_bytes(b"x" * 77 + data + b"y" * 9)
    alone, within = parse(str(folder / ".metadata")), parse(str(tmp_path / "archive"))
    assert read_metadata((within, 77, len(data)), "in") == read_metadata((alone, 0, len(data)), "in")


def told(rank: int, shape: tuple[int, ...] = (4, 3), dtype: str = "float32") -> Metadata:
    """What one of two ranks tells: both have the first rows, and each has two of its own."""
    boxes = [((0, 0), (1, 3)), ((1 + rank, 0), (1, 3))]
    items = {("w", box[0]): Item(f"__{rank}_0.distcp", number * 100, 100) for number, box in enumerate(boxes)}
    return Metadata({"w": Entry(DType.F32, dtype, shape, boxes)}, ["step"], items, {"w": ("model", "w")})


def test_a_piece_that_several_ranks_have_counts_once() -> None:
    assert joined([alone := told(0)]) is alone
    made = joined([told(0), told(1)])
    assert made.tensors["w"].boxes == [((0, 0), (1, 3)), ((1, 0), (1, 3)), ((2, 0), (1, 3))]
    assert made.items["w", (0, 0)].file == "__0_0.distcp", "the first rank's"
    assert made.items["w", (2, 0)].file == "__1_0.distcp"
    assert (made.objects, made.paths) == (["step"], {"w": ("model", "w")})


@pytest.mark.parametrize("other", [told(1, shape=(5, 3)), told(1, dtype="float16")])
def test_ranks_that_tell_otherwise_are_refused(other: Metadata) -> None:
    with pytest.raises(sm.FormatError, match="the tensor w has another dtype or shape in the metadata of another rank"):
        joined([told(0), other])


def test_what_ranks_told_stays_as_it_was() -> None:
    first, second = told(0), told(1)
    copies = deepcopy([first, second])
    joined([first, second])
    assert [first, second] == copies
