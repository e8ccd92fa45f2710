"""Stages as models, as text."""

from __future__ import annotations

import re

import pytest

from streammerge.recipe.adapted import is_there, split
from streammerge.recipe.stage_names import STAGE_NAME, stage_of, stage_text


@pytest.mark.parametrize("name", ["s1", "models.0", "a stage", "linear"])
def test_a_name_comes_back_from_its_text(name: str) -> None:
    assert stage_of(stage_text(name)) == name
    assert re.fullmatch(STAGE_NAME, name)
    assert is_there(stage_text(name))


@pytest.mark.parametrize("text", ["s1", "<stage >", "<stage a", "x<stage a>", "<in memory 1>", "<stage a> + b"])
def test_other_texts_are_no_stages(text: str) -> None:
    assert stage_of(text) is None


@pytest.mark.parametrize("name", ["", "a+b", "a/b", "<a>", "a\nb"])
def test_names_that_no_stage_has(name: str) -> None:
    assert re.fullmatch(STAGE_NAME, name) is None


def test_a_stage_takes_adapters() -> None:
    found = split("<stage a> + 0.5*<stage b>")
    assert found is not None
    assert found.base == "<stage a>"
