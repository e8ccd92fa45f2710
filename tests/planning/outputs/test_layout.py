"""What every kind of output is planned as."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import streammerge as sm
from streammerge.methods.registry import COPY, find_method
from streammerge.planning.outputs.layout import blank_sums, recipe_record
from streammerge.recipe.model import Model, Recipe
from streammerge.recipe.reader import read_recipe

SHAPES: tuple[tuple[int, ...], ...] = ((), (0, 3), (7,), (30, 10))


@pytest.mark.parametrize("name", ["out.safetensors", "out.pth", "out"])
def test_the_size_is_that_of_the_files_that_are_written(name: str, tmp_path: Path) -> None:
    save_file({str(n): torch.ones(shape) for n, shape in enumerate(SHAPES)}, tmp_path / "in.safetensors")
    made = sm.merge([tmp_path / "in.safetensors"] * 2, tmp_path / name)
    files = [tmp_path / name] if (tmp_path / name).is_file() else sorted((tmp_path / name).iterdir())
    assert made.plan.layout.size == sum(path.stat().st_size for path in files)


@pytest.mark.parametrize(("sizes", "checksums"), [([], 1), ([0], 1), ([1], 2), ([5, 0, 7], 3), (list(range(100)), 100)])
def test_every_tensor_with_bytes_and_all_around_them_has_a_checksum(sizes: list[int], checksums: int) -> None:
    assert blank_sums(sizes) == "00000000" * checksums


def test_a_merge_carries_its_recipe_and_a_conversion_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    one, two = Model(str(tmp_path / "a.pth")), Model(str(tmp_path / "b.pth"))
    assert recipe_record(Recipe(COPY, (one,))) is None
    assert recipe_record(Recipe(COPY, (one, two))) is not None
    record = recipe_record(Recipe(find_method("linear"), (one, two)))
    assert str(tmp_path) not in json.dumps(record)
    for name in ("a.pth", "b.pth"):
        torch.save({"w": torch.ones(1)}, name)
    assert record is not None
    assert read_recipe(record).to_dict() == record
