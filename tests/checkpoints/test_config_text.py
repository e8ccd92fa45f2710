"""Edits of a JSON text change nothing else. The oracle is json, and the text itself."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from streammerge.checkpoints.config_text import REMOVED, KeyPath, edited

TEXT = """{
  "architectures": ["Zamba2ForCausalLM"],
  "eps": 1e-05, "big": 1E400,
  "kinds": [
    "a",
    "b"
  ],
  "limit": [0.0, Infinity],
  "text_config": {
    "depth" : 3,
    "kinds": ["a", "b"],
    "empty": {}
  },
  "depth": 3
}
"""


def test_only_the_values_change() -> None:
    changed: dict[KeyPath, Any] = {
        ("depth",): 4,
        ("text_config", "depth"): 4,
        ("text_config", "kinds"): ["a", "b", "a"],
        ("kinds",): ["a", "b", "a"],
    }
    expected = TEXT.replace('"depth" : 3', '"depth" : 4').replace('"depth": 3', '"depth": 4')
    expected = expected.replace('["a", "b"]', '["a", "b", "a"]').replace('    "b"\n', '    "b",\n    "a"\n')
    assert edited(TEXT, changed) == expected
    assert edited(TEXT, {}) == TEXT


def test_new_keys_stand_last_and_in_line() -> None:
    made = edited(TEXT, {("tie",): False, ("text_config", "tie"): True, ("text_config", "empty", "x"): 1})
    expected = TEXT.replace('"depth": 3\n', '"depth": 3,\n  "tie": false\n')
    expected = expected.replace('"empty": {}', '"empty": {"x": 1},\n    "tie": true')
    assert made == expected


@pytest.mark.parametrize(
    ("text", "edits", "expected"),
    [
        ("{}", {("a",): 1}, '{"a": 1}'),
        ("{ }", {("a",): 1, ("b",): 2}, '{ "a": 1, "b": 2}'),
        ('{"a":1}', {("a",): [1, 2]}, '{"a":[1, 2]}'),
        ('{"a":1}', {("b",): 2, ("c",): 3}, '{"a":1, "b": 2, "c": 3}'),
        ('{"a": 1, "a": 2}', {("a",): 3}, '{"a": 1, "a": 3}'),
        ('{"x": {"a": 1}, "x": {"a": 2}}', {("x", "a"): 3}, '{"x": {"a": 1}, "x": {"a": 3}}'),
        ('{"\\u0061\\"": NaN}', {('a"',): 1.5}, '{"\\u0061\\"": 1.5}'),
        ('{"a": "}{,:\\"", "b": [{"a": 1}]}', {("b",): 0}, '{"a": "}{,:\\"", "b": 0}'),
        ('\n\t{\r\n\t"a"\t:\tnull\r\n\t}\n', {("a",): "x"}, '\n\t{\r\n\t"a"\t:\t"x"\r\n\t}\n'),
        ('{"a": 1}', {("a",): float("inf"), ("b",): "\ud800"}, '{"a": Infinity, "b": "\\ud800"}'),
    ],
)
def test_texts(text: str, edits: dict[KeyPath, Any], expected: str) -> None:
    assert edited(text, edits) == expected


def drawn(chance: random.Random, depth: int = 0) -> Any:
    if depth < 3 and (depth == 0 or chance.random() < 0.3):
        return {f"k{n}": drawn(chance, depth + 1) for n in chance.sample(range(6), chance.randint(0, 5))}
    values = (1, -2.5e-7, None, True, "a\n\"'", [], [1, 2], [{"k1": 1}], float("inf"), "\u00e9\U0001f600")
    return chance.choice(values)


@pytest.mark.parametrize("seed", range(200))
def test_drawn_trees(seed: int) -> None:
    """The edited text is read as the edited tree, whatever the layout of the text."""
    chance = random.Random(seed)
    tree = drawn(chance)
    indent, ascii_only = chance.choice([None, 0, 1, 2, "\t"]), chance.random() < 0.5
    text = json.dumps(tree, indent=indent, ensure_ascii=ascii_only)
    edits: dict[KeyPath, Any] = {}
    expected = json.loads(text)
    holders: list[tuple[KeyPath, dict[str, Any]]] = [((), expected)]
    for path, holder in holders:
        holders += [((*path, key), value) for key, value in holder.items() if isinstance(value, dict)]
    for path, holder in holders:
        for key in [key for key, value in holder.items() if not isinstance(value, dict) and chance.random() < 0.4]:
            edits[(*path, key)] = holder[key] = chance.choice([7, "new", [1, 2, 3], False])  # fmt: skip
        if chance.random() < 0.4:
            edits[(*path, "added")] = holder["added"] = 8  # fmt: skip
    assert json.loads(edited(text, edits)) == expected
    assert list(json.loads(edited(text, edits))) == list(expected)


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ('{"a": 1, "q": {"b": [1, 2]}, "c": 3}', '{"a": 1, "c": 3}'),
        ('{\n  "a": 1,\n  "q": {\n    "b": 2\n  }\n}\n', '{\n  "a": 1\n}\n'),
        ('{\n  "q": 1,\n  "c": 3\n}', '{\n  "c": 3\n}'),
        ('{"q": {}}', "{}"),
        ('{"a": 1}', '{"a": 1}'),
    ],
)
def test_a_key_is_taken_out(text: str, left: str) -> None:
    assert edited(text, {("q",): REMOVED}) == left
    assert json.loads(left) == {key: value for key, value in json.loads(text).items() if key != "q"}
