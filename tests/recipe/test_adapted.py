"""Texts that name a base with adapters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import streammerge as sm
from streammerge.recipe.adapted import Adapted, Part, absent, adapted_text, split, without_revisions

THERE = {"base", "one", "two", "a+b", "a", "org/x", "c++/m", "<in memory 1>"}


def parts(text: str) -> tuple[str, ...] | None:
    found = split(text, THERE.__contains__)
    return None if found is None else (found.base, *(f"{part.scale:g}:{part.path}" for part in found.adapters))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("base", None),
        ("base+one", ("base", "1:one")),
        ("base + one", ("base", "1:one")),
        ("base+one+two", ("base", "1:one", "1:two")),
        ("base+0.5*one+-2*two", ("base", "0.5:one", "-2:two")),
        ("base + 1e-3*one", ("base", "0.001:one")),
        ("a+b", None),
        ("a+b+one", ("a+b", "1:one")),
        ("base+a+b", ("base", "1:a+b")),
        ("c++/m+one", ("c++/m", "1:one")),
        ("<in memory 1>+one", ("<in memory 1>", "1:one")),
        ("org/x+one", ("org/x", "1:one")),
        ("base+absent", None),
        ("absent+one", None),
        ("base+", None),
        ("+one", None),
        ("base+inf*one", None),
    ],
)
def test_what_exists_tells_the_parts(text: str, expected: tuple[str, ...] | None) -> None:
    assert parts(text) == expected


def test_a_text_is_read_as_it_is_written() -> None:
    made = Adapted("base", (Part("one", 0.25), Part("two")))
    assert str(made) == "base + 0.25*one + two"
    assert split(str(made), THERE.__contains__) == made
    assert made.moved(["x", "y", "z"]) == Adapted("x", (Part("y", 0.25), Part("z")))


@pytest.mark.parametrize(
    ("lora", "expected"),
    [
        ("one", "base + one"),
        ({"path": "one"}, "base + one"),
        ({"path": "one", "scale": 0.5}, "base + 0.5*one"),
        ({"path": "one", "revision": None}, "base + one"),
        (["one", {"path": "two", "scale": 2}], "base + one + 2*two"),
        ("0.5*one", "base + 0.5*one"),
        ([], "base"),
    ],
)
def test_the_lora_of_a_recipe(lora: object, expected: str) -> None:
    assert adapted_text("base", lora) == expected


@pytest.mark.parametrize("lora", [3, {"scale": 1}, {"path": "one", "scale": "x"}, {"path": ""}, [None]])
def test_another_lora_is_refused(lora: object) -> None:
    with pytest.raises(ValueError, match=r"\S"):
        adapted_text("base", lora)


def test_a_revision_stands_behind_its_path() -> None:
    assert adapted_text("base", {"path": "org/one", "revision": "main"}) == "base + org/one@main"


def test_the_message_names_the_absent_part() -> None:
    assert "the adapter lost does not" in absent("base+one+lost", THERE.__contains__)
    assert "nor as the model lost" in absent("lost+one", THERE.__contains__)
    assert absent("lost", THERE.__contains__) == ""


def test_a_path_of_this_machine_has_no_revisions() -> None:
    there = {"base", "lora", "a@b"}.__contains__
    for text, path, left in (("base@v1", "base", "@v1"), ("a@b@main", "a@b", "@main")):
        said = without_revisions(text, there)
        assert f"{path} does" in said
        assert f"leave {left} out" in said
    for text in ("other@v1", "base", "@v1", "base@", "base@x/y"):
        assert not without_revisions(text, there)
    assert "leave @v2 out" in absent("base+lora@v2", there)
    assert "leave @v1 out" in absent("base@v1+lora", there)


def test_a_revision_behind_a_path_is_told_wherever_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_file({"w": torch.zeros(2)}, "base.safetensors")
    for text in ("base.safetensors@v1", "base.safetensors@v1+base.safetensors", "base.safetensors+base.safetensors@v1"):
        with pytest.raises(sm.RecipeError, match="leave @v1 out"):
            sm.inspect(text)
        with pytest.raises(sm.RecipeError, match="leave @v1 out"):
            sm.plan(recipe={"merge_method": "linear", "models": [text, "base.safetensors"]})
