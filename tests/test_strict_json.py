"""JSON that two readers could take for two things is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from streammerge.strict_json import load_json

VALUES = some.recursive(
    some.none() | some.booleans() | some.integers() | some.floats(allow_nan=False, allow_infinity=False) | some.text(),
    lambda inner: some.lists(inner) | some.dictionaries(some.text(), inner),
)


@settings(deadline=None)
@given(VALUES)
def test_everything_else_is_what_json_says(value: Any) -> None:
    for text in (json.dumps(value), json.dumps(value).encode(), json.dumps(value, ensure_ascii=False, indent=1)):
        assert load_json(text) == value


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"a": 1, "b": 2, "a": 1}', "the key a is given twice"),
        ('[{"x": {"": 0, "": 0}}]', "the key  is given twice"),
        ('{"\\u0061": 1, "a": 2}', "the key a is given twice"),
        ('{"a\\n": 1, "a\\n": 2}', r"the key a\\n is given twice"),
        ("NaN", "NaN is not JSON"),
        ('{"a": [-Infinity]}', "-Infinity is not JSON"),
        ("[" * 200_000, "nested too deeply"),
        ('{"a":' * 200_000, "nested too deeply"),
        ("", "Expecting value"),
        ("{} {}", "Extra data"),
        (b"\xff\xfe\x00", "."),
    ],
)
def test_what_is_refused(text: str | bytes, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        load_json(text)
