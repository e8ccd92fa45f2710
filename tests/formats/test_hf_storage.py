"""Safetensors of several ranks, as HuggingFaceStorageWriter writes them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import assert_same, load_safetensors
from safetensors.torch import save_file

import streammerge as sm
from formats.dcp_maker import Cut, grid, sharded, whole
from formats.suite import FormatSuite, Tensors


def write(folder: Path, tensors: Tensors, cut: Cut, ranks: int) -> Path:
    """Writes pieces as torch does: pieces without elements are in no file."""
    folder.mkdir(parents=True)
    for rank in range(ranks):
        held, places = {}, {}
        for name, tensor in tensors.items():
            boxes = [box for number, box in enumerate(cut(name, tensor)) if number % ranks == rank]
            for offsets, sizes in boxes:
                piece = tensor
                for axis, (at, size) in enumerate(zip(offsets, sizes, strict=True)):
                    piece = piece.narrow(axis, min(at, tensor.shape[axis]), size)
                if piece.numel() or not any(offsets):
                    held[name], places[name] = piece.contiguous().clone(), {"saved_offsets": list(offsets)}
        told = {"format": "pt", "DCP_VERSION": "1.0", "DCP_SHARDING_INFO": json.dumps(places)}
        save_file(held, folder / f"shard-{rank + 1:05}-model-00001-of-00001.safetensors", told)
    return folder


class TestWhole(FormatSuite):
    NAME = "in"

    def write(self, path: Path, tensors: Tensors) -> None:
        write(path, tensors, whole, 1)


TENSORS = {"rows": torch.randn(10, 6), "cols": torch.randn(6, 10), "one": torch.randn(1), "half": torch.randn(9, 4).half()}


@pytest.mark.parametrize("cut", [sharded(0, 4), sharded(1, 4), grid(2, 2)])
def test_pieces_of_four_ranks(tmp_path: Path, cut: Cut) -> None:
    folder = write(tmp_path / "in", TENSORS, cut, 4)
    sm.convert(folder, tmp_path / "out.safetensors")
    assert_same(load_safetensors(tmp_path / "out.safetensors"), TENSORS)
    assert sm.inspect(folder).container.facts == {"ranks": "4"}


def test_a_missing_rank(tmp_path: Path) -> None:
    folder = write(tmp_path / "in", TENSORS, sharded(0, 4), 4)
    (folder / "shard-00002-model-00001-of-00001.safetensors").unlink()
    with pytest.raises(sm.FormatError, match="of rank 2 are absent; copy those of all ranks"):
        sm.inspect(folder)


def test_a_file_that_does_not_say_where_its_parts_begin(tmp_path: Path) -> None:
    folder = write(tmp_path / "in", TENSORS, sharded(0, 2), 2)
    save_file(TENSORS, folder / "shard-00002-model-00001-of-00001.safetensors")
    with pytest.raises(sm.FormatError, match="does not say where its parts of tensors begin"):
        sm.inspect(folder)


@pytest.mark.parametrize("place", [[1 << 62, 0], [-1, 0], [0], "x", [1.5, 0], [100, 0]])
def test_hostile_places(tmp_path: Path, place: object) -> None:
    folder = write(tmp_path / "in", TENSORS, sharded(0, 2), 2)
    held = {"rows": torch.ones(5, 6)}
    told = {"DCP_SHARDING_INFO": json.dumps({"rows": {"saved_offsets": place}})}
    save_file(held, folder / "shard-00002-model-00001-of-00001.safetensors", told)
    with pytest.raises(sm.FormatError, match=r"does not say|overflows|hole"):
        sm.inspect(folder)
