"""The text of a recipe, and where its keys stand. Hostile texts: test_reader.py."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as some

import streammerge as sm
from streammerge.recipe.document import parse_yaml, to_json, to_yaml

TEXT = """\
a: 1
b:
  - x
  - c: [yes, 1e-1, 0x10]
? d
: &anchor {e: null}
f: {<<: *anchor, g: 2}
a: 3
"""


def test_data_is_what_yaml_says_and_places_are_those_of_the_keys() -> None:
    document = parse_yaml(TEXT, "wish.yaml")
    expected = yaml.safe_load(TEXT)
    assert document.data == expected | {"a": 1}, "of a key that stands twice the first is read"
    assert document.doubled == [("a",)]
    lines = {path: (place.line, place.column) for path, place in document.positions.items()}
    assert lines[("b",)] == (2, 1)
    assert lines[("b", 0)] == (3, 5)
    assert lines[("b", 1, "c")] == (4, 5)
    assert lines[("d", "e")] == (6, 12)
    assert lines[("f", "g")][0] == 7
    assert lines[("a",)] == (8, 1), "the second is the mistake"
    assert str(document.positions[("b",)]).startswith("wish.yaml")


PLAIN = some.recursive(
    some.none() | some.booleans() | some.integers(-(2**53), 2**53) | some.floats(allow_nan=False, allow_infinity=False)
    | some.text(some.characters(codec="utf-8", exclude_characters="\x85\u2028\u2029", exclude_categories=["Cc", "Cs"])),
    lambda inner: some.lists(inner, max_size=4) | some.dictionaries(some.text("abcdefg-", min_size=1), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


@settings(deadline=None)
@given(some.dictionaries(some.text("klmnop", min_size=1), PLAIN, min_size=1, max_size=5))
def test_data_goes_to_yaml_and_to_json_and_back(data: dict[str, Any]) -> None:
    assert yaml.safe_load(to_yaml(data)) == data
    assert parse_yaml(to_yaml(data), "x").data == data
    assert "\n" not in to_json(data)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty"),
        ("# nothing\n", "is empty"),
        ("a: 1\n---\nb: 2\n", "x:3:1: several documents in one file"),
        ("a: [1\n", "this is not YAML"),
        ("a:\n\t- b", "x:2:1: this is not YAML"),
        ("a: !!python/name:os.system ''", "x:1:4: .* is not a value that a recipe can have"),
        ("<<: 3", "<< takes a mapping"),
    ],
)
def test_what_is_no_document(text: str, words: str) -> None:
    with pytest.raises(sm.RecipeError, match=words):
        parse_yaml(text, "x")
