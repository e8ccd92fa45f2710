"""Which rule takes a tensor. What a rule does to it: recipe/test_rules.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from streammerge.planning.ruled import Rules, drops
from streammerge.recipe.reader import read_recipe


@pytest.fixture(autouse=True)
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        Path(f"{name}.safetensors").touch()


def rules(*written: dict[str, object]) -> Rules:
    models = [{"model": "a.safetensors"}, {"model": "b.safetensors"}]
    return Rules(read_recipe({"merge_method": "linear", "models": models, "rules": list(written)}))


def test_the_first_rule_that_matches_takes_a_tensor() -> None:
    found = rules({"match": "*.bias", "drop": True}, {"match": "enc.*", "copy": "a.safetensors"})
    taken = found.over(["enc.bias", "enc.weight", "dec.weight"])
    assert taken == {"enc.bias": found.rules[0], "enc.weight": found.rules[1], "dec.weight": None}
    assert [drops(rule) for rule in taken.values()] == [True, False, False]
    found.count(taken.values())
    found.count([found.rules[1], None])
    assert [found.taken[id(rule)] for rule in found.rules] == [1, 2]


def test_without_rules_each_name_has_none() -> None:
    names = {"a": 1, "b": 2}
    taken = rules().over(names)
    assert [*taken] == ["a", "b"]
    assert len(taken) == 2
    assert dict(taken) == {"a": None, "b": None}
    assert not drops(taken["a"])
