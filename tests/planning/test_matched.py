"""Views whose tensors are matched by name. How names are matched: tensors/test_matching.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import streammerge as sm
from streammerge.planning.matched import MatchedViews, SameNames, matched
from streammerge.planning.views import View

W, D, V = torch.zeros(4, 2), torch.ones(4, 2), torch.ones(3)


def view(path: Path) -> View:
    index = sm.inspect(path)
    return View(index, index.entries, index.aliases)


@pytest.fixture
def plain(tmp_path: Path) -> View:
    save_file({"enc.w": W, "enc.v": V, "dec.w": D}, tmp_path / "plain.safetensors")
    return view(tmp_path / "plain.safetensors")


def test_equal_names_need_no_table(plain: View, tmp_path: Path) -> None:
    save_file({"enc.w": W + 1, "enc.v": V, "dec.w": D}, tmp_path / "other.safetensors")
    names, doubtful = matched(plain, view(tmp_path / "other.safetensors"))
    assert isinstance(names, SameNames)
    assert dict(names) == {name: name for name in ("enc.w", "enc.v", "dec.w")}
    assert "enc.x" not in names
    assert names.get("enc.x") is None
    assert not doubtful


def test_sources_are_in_the_order_of_the_views(plain: View, tmp_path: Path) -> None:
    save_file({f"module.{name}": tensor for name, tensor in (("enc.w", W), ("enc.v", V))}, tmp_path / "led.safetensors")
    save_file({"enc.w": W, "enc.v": V, "dec.w": D}, tmp_path / "same.safetensors")
    views = MatchedViews(plain, [view(tmp_path / "led.safetensors"), view(tmp_path / "same.safetensors")])
    assert [s and s.spec.name for s in views.sources("enc.w")] == ["enc.w", "module.enc.w", "enc.w"]
    assert [s and s.spec.name for s in views.sources("dec.w")] == ["dec.w", None, "dec.w"]
    assert [other.index.path.name for other, _ in views.pairs()] == ["led.safetensors", "same.safetensors"]


def test_a_tie_is_shared_if_all_have_it(tmp_path: Path) -> None:
    def saved(name: str, head: torch.Tensor, embed: torch.Tensor) -> View:
        torch.save({"embed": embed, "head": head, "norm": V}, tmp_path / name)
        return view(tmp_path / name)

    one, two, three, four = (torch.full((4, 2), float(n)) for n in range(4))
    tied = [saved("a.pth", one, one), saved("b.pth", two, two)]
    assert MatchedViews(tied[0], tied[1:]).shared_ties() == ({"head": "embed"}, [])
    apart = saved("c.pth", three, four)
    assert MatchedViews(tied[0], [tied[1], apart]).shared_ties() == ({}, ["head"])
    assert MatchedViews(apart, tied).shared_ties() == ({}, []), "the first's ties decide"


def test_a_name_without_characters(tmp_path: Path) -> None:
    """torch.save({"": tensor}): the state dict of a module that is one parameter, with its prefix removed."""
    for number in range(2):
        torch.save({"": torch.full((3,), float(number)), "w": torch.full((2,), float(number))}, tmp_path / f"{number}.pt")
    sm.merge([tmp_path / "0.pt", tmp_path / "1.pt"], tmp_path / "out.pt")
    made = torch.load(tmp_path / "out.pt")
    assert made[""].tolist() == [0.5] * 3
    assert made["w"].tolist() == [0.5] * 2
