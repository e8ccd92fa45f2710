"""Which tensors a pattern takes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import streammerge as sm
from streammerge.recipe.patterns import parse_pattern


@pytest.mark.parametrize(
    ("text", "takes", "leaves"),
    [
        ("*", ["", "a", "a.b"], []),
        ("a.*", ["a.", "a.b", "a.b.c"], ["a", "xa.b", "A.b"]),
        ("a.?", ["a.b"], ["a.", "a.bc"]),
        ("[ab].w", ["a.w", "b.w"], ["c.w", "ab.w"]),
        ("a+b", ["a+b"], ["aab"]),
        ("/b/", ["b", "abc"], ["a"]),
        (r"/^l\.\d+\.w$/", ["l.0.w", "l.12.w"], ["l.x.w", "xl.0.w", "l.0.w.x"]),
        ("//", ["", "a"], []),
        ("/", ["/"], ["a"]),
        ("/a", ["/a"], ["a"]),
    ],
)
def test_what_a_pattern_takes(text: str, takes: list[str], leaves: list[str]) -> None:
    pattern = parse_pattern(text)
    assert str(pattern) == text
    assert all(map(pattern.matches, takes))
    assert not any(map(pattern.matches, leaves))
    assert pattern == parse_pattern(text)


@pytest.mark.parametrize("text", ["/(/", "/*/", r"/\p{nothing}/", "/(?P<a/"])
def test_what_is_no_regular_expression(text: str) -> None:
    with pytest.raises(sm.RecipeError, match="is not a regular expression"):
        parse_pattern(text)


@pytest.mark.parametrize("value", ["", None, 3, ["a"]])
def test_what_is_no_text(value: object) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - the reader says what is expected
        parse_pattern(value)


def test_a_pattern_without_end_is_stopped(tmp_path: Path) -> None:
    """The standard library's would go on until the sun has burned out."""
    for number in range(2):
        save_file({"a" * 60: torch.ones(2)}, tmp_path / f"{number}.safetensors")
    recipe = {
        "merge_method": "linear",
        "models": [{"model": str(tmp_path / f"{number}.safetensors")} for number in range(2)],
        "rules": [{"match": r"/^(\w|\w\w)+\d$/", "drop": True}],
    }
    with pytest.raises(sm.RecipeError, match="takes too long"):
        sm.plan(recipe=recipe)
