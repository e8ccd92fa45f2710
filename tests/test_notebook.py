"""What notebooks show of the objects that the library returns."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import streammerge as sm
from streammerge.notebook import table

HOSTILE = "<script>alert(1)</script>"


class Cells(HTMLParser):
    """Collects the texts of cells. Raises AssertionError for a tag that is not closed where it should be."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: object) -> None:
        assert tag in {"div", "strong", "table", "thead", "tbody", "tr", "th", "td"}
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def shown(thing: object) -> list[str]:
    return Cells(thing._repr_html_()).texts  # type: ignore[attr-defined]


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for seed in (1, 2):
        torch.manual_seed(seed)
        tensors = {f"layers.{number}.weight": torch.randn(3, 2) for number in range(30)}
        save_file({**tensors, HOSTILE: torch.tensor(float(seed))}, f"{seed}.safetensors")
    return tmp_path


def test_each_object_is_a_table_of_what_it_prints(models: Path) -> None:
    inputs = ["1.safetensors", "2.safetensors"]
    plan = shown(sm.plan(inputs, "out.safetensors", weights=[1, 3]))
    assert plan[0] == "linear -> out.safetensors"
    assert "31 merged by linear" in plan
    assert any("weight 0.75" in text for text in plan)
    result = shown(sm.merge(inputs, "out.safetensors"))
    assert result[:2] == ["out.safetensors", "output"]
    assert "memory" in result
    index = shown(sm.inspect("out.safetensors"))
    assert "31 tensors, 181 parameters, 724 bytes" in index
    assert "layers.0.weight" in index
    assert "the first 20 of 31 tensors" in index
    verified = shown(sm.verify("out.safetensors"))
    assert verified[0] == "verified out.safetensors"
    diff = shown(sm.diff(*inputs))
    assert diff[0] == "diff"
    assert "|B-A|/|A|" in diff
    assert "the 12 of 31 layers that moved most, the farthest first" in diff


def test_names_are_text_and_never_tags(models: Path) -> None:
    for thing in (sm.inspect("1.safetensors"), sm.diff("1.safetensors", "2.safetensors")):
        assert "<script" not in thing._repr_html_()
    assert HOSTILE in shown(sm.inspect("1.safetensors"))
    assert "<script" not in table(HOSTILE, [(HOSTILE, HOSTILE)], [HOSTILE], [[HOSTILE]], HOSTILE)


def test_an_adapter_is_a_table_of_its_worst_layers(models: Path) -> None:
    made = shown(sm.extract("2.safetensors", "adapter/", base="1.safetensors", rank=1))
    assert made[made.index("layer") : made.index("layer") + 3] == ["layer", "error", "rank"]
