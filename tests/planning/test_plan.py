"""Plans: their decisions from headers and budget, and their refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import deflate
from safetensors.torch import save_file

import streammerge as sm


@pytest.fixture
def inputs(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{number}.safetensors" for number in range(8)]
    for number, path in enumerate(paths):
        save_file({"w": torch.full((300, 1000), float(number))}, path)
    return paths


@pytest.mark.parametrize("out", ["/", ".", ""])
def test_an_output_needs_a_name(inputs: list[Path], out: str) -> None:
    with pytest.raises(sm.RecipeError, match=r"is not a name for an output|is an empty text"):
        sm.plan(inputs, out)


def test_where_mapped_pages_have_no_room_inputs_are_read(inputs: list[Path]) -> None:
    wide, narrow = sm.plan(inputs, memory="512MiB"), sm.plan(inputs, memory="24MiB")
    assert (wide.io, narrow.io) == ("mmap", "pread")
    assert narrow.peak_bytes <= 24 << 20 < wide.peak_bytes
    assert "pread)" in str(narrow)
    with pytest.raises(sm.BudgetError, match='pass `memory="12MiB"` or more'):
        sm.plan(inputs, memory="4MiB")


def test_a_plan_tells_what_must_be_inflated_first(tmp_path: Path) -> None:
    """Plans two tensors over one compressed storage."""
    storage = torch.ones(300_000)
    torch.save({"w": storage.view(300, 1000).t(), "v": storage[:7]}, tmp_path / "stored.pth")
    deflate(tmp_path / "stored.pth", tmp_path / "in.pth")
    plan = sm.plan([tmp_path / "in.pth"] * 2, tmp_path / "out.pth")
    assert plan.torch_needed
    assert "spooled  1 packed records, unpacked into 1.2 MB of temporary files" in str(plan)
    assert plan.to_json()["spooled_tensors"] == ["w", "v"]
    assert plan.disk_bytes == plan.write_bytes + 1_200_000


def test_a_strided_tensor_is_read_where_it_lies(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(300, 1000).t()}, tmp_path / "in.pth")
    plan = sm.plan([tmp_path / "in.pth"] * 2, tmp_path / "out.pth")
    assert plan.torch_needed
    assert "spooled" not in str(plan)
    assert plan.disk_bytes == plan.write_bytes


def test_a_size_of_shards_needs_a_folder(inputs: list[Path], tmp_path: Path) -> None:
    noted = [sm.plan(inputs, tmp_path / out, max_shard_size="1MB").notes for out in ("out.safetensors", "out/")]
    assert [any("`max_shard_size` is without effect" in note for note in notes) for notes in noted] == [True, False]
