"""Which tensors are compared, and what is told of names, shapes, dtypes, ties and extras."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import streammerge as sm


def some(shift: float = 0.0) -> dict[str, torch.Tensor]:
    return {f"model.layers.{n}.{k}.weight": torch.arange(6.0).view(2, 3) + n + shift for n in range(4) for k in "qkv"}


def test_what_only_one_side_has(tmp_path: Path) -> None:
    save_file(some() | {"a.x": torch.ones(1)}, tmp_path / "a.safetensors")
    save_file(some() | {"b.y": torch.ones(2), "b.z": torch.ones(2)}, tmp_path / "b.safetensors")
    diff = sm.diff(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert (diff.only_a, diff.only_b, diff.equal, diff.sums.differing) == (("a.x",), ("b.y", "b.z"), False, 0)
    assert "only in A  a.x" in str(diff)


def test_names_are_matched_as_in_a_merge(tmp_path: Path) -> None:
    torch.save({"model": some(), "epoch": 3}, tmp_path / "a.pth")
    save_file({name.removeprefix("model."): t for name, t in some().items()}, tmp_path / "b.safetensors")
    diff = sm.diff(tmp_path / "a.pth", tmp_path / "b.safetensors")
    assert diff.equal
    assert diff.tensors[0].name == "model.layers.0.q.weight"
    assert diff.tensors[0].other == "layers.0.q.weight"
    assert any("12 tensors match once" in note for note in diff.notes)


def test_shapes_and_kinds_that_differ(tmp_path: Path) -> None:
    a = {"x": torch.ones(3, 2), "y": torch.ones(2), "z": torch.ones(2)}
    b = {"x": torch.ones(2, 3), "y": torch.ones(2, dtype=torch.complex64), "z": torch.ones(2, dtype=torch.bfloat16)}
    save_file(a, tmp_path / "a.safetensors")
    save_file(b, tmp_path / "b.safetensors")
    diff = sm.diff(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert [(each.name, each.equal, each.comparable) for each in diff.tensors] == [
        ("x", False, False),
        ("y", False, False),
        ("z", True, True),
    ]
    assert diff.elems == 2
    shown = str(diff)
    assert "2 of 3 differ, 1 by shape, 1 by kind of dtype" in shown
    assert "x [3, 2] and [2, 3]" in shown
    assert "1 tensor: float32 in A, bfloat16 in B" in shown


def test_ties(tmp_path: Path) -> None:
    shared = torch.arange(6.0)
    torch.save({"embed": shared, "head": shared, "x": torch.ones(1)}, tmp_path / "tied.pth")
    torch.save({"embed": shared, "head": shared.clone(), "x": torch.ones(1)}, tmp_path / "apart.pth")
    save_file({"embed": shared, "x": torch.ones(1)}, tmp_path / "once.safetensors")
    both = sm.diff(tmp_path / "tied.pth", tmp_path / "tied.pth")
    assert (both.equal, both.ties, len(both.tensors)) == (True, (), 2)
    apart = sm.diff(tmp_path / "tied.pth", tmp_path / "apart.pth")
    assert (apart.equal, apart.ties, len(apart.tensors)) == (True, ("head: tied in A, separate in B",), 3)
    once = sm.diff(tmp_path / "once.safetensors", tmp_path / "tied.pth")
    assert (once.equal, once.ties) == (True, ("head: tied in B, not stored a second time in A",))
    torch.save({"embed": shared, "head": shared + 1, "x": torch.ones(1)}, tmp_path / "moved.pth")
    assert not sm.diff(tmp_path / "tied.pth", tmp_path / "moved.pth").equal


@pytest.mark.parametrize(
    ("one", "two", "said"),
    [
        ({"epoch": 3}, {"epoch": 3}, ""),
        ({"epoch": 3, "loss": float("nan")}, {"epoch": 4, "loss": float("nan")}, "epoch differs"),
        ({"epoch": 3, "by": "me"}, {"lr": 0.1}, "epoch, by are in A only; lr is in B only"),
    ],
)
def test_extras(tmp_path: Path, one: dict[str, object], two: dict[str, object], said: str) -> None:
    torch.save({"model": some(), **one}, tmp_path / "a.pth")
    torch.save({"model": some(), **two}, tmp_path / "b.pth")
    diff = sm.diff(tmp_path / "a.pth", tmp_path / "b.pth")
    assert (diff.extras, diff.equal) == (said, True)


def test_a_base_without_some_tensors(tmp_path: Path) -> None:
    a, b, base = some(1.0), some(2.0), some()
    del base["model.layers.0.q.weight"]
    base["model.layers.1.q.weight"] = torch.ones(5)
    diff = sm.diff(a, b, base)
    assert [each.name for each in diff.tensors if not each.base] == ["model.layers.0.q.weight", "model.layers.1.q.weight"]
    assert diff.agreement is not None
    assert diff.agreement.cosine == pytest.approx(1.0)
    assert diff.agreement.equal_signs == 1.0


def test_a_folder_of_shards_and_a_file(tmp_path: Path) -> None:
    save_file(some(), tmp_path / "a.safetensors")
    sm.convert(tmp_path / "a.safetensors", tmp_path / "folder/", max_shard_size=100)
    assert sm.diff(tmp_path / "a.safetensors", tmp_path / "folder").equal


def test_nothing_in_common(tmp_path: Path) -> None:
    save_file({"x": torch.ones(2)}, tmp_path / "a.safetensors")
    save_file({"y": torch.ones(3)}, tmp_path / "b.safetensors")
    diff = sm.diff(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert (diff.tensors, diff.only_a, diff.only_b, diff.equal) == ((), ("x",), ("y",), False)
    assert "only in B" in str(diff)
