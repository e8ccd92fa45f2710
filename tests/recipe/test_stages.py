"""Stages of a recipe in all their forms, and their mistakes with the lines."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import streammerge as sm
from streammerge.recipe.document import to_yaml
from streammerge.recipe.reader import read_recipe
from streammerge.recipe.stage_names import stage_text
from streammerge.recipe.stages import needed, stages_used


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in "abc":
        save_file({"w": torch.ones(3)}, f"{name}.safetensors")


def read(text: str) -> sm.recipe.model.Recipe:  # type: ignore[name-defined]
    Path("r.yaml").write_text(text)
    return read_recipe("r.yaml")


INNER = "merge_method: linear\nmodels: [a.safetensors, b.safetensors]\n"
INLINE = """
merge_method: linear
models:
  - model: {merge_method: linear, models: [a.safetensors, b.safetensors]}
  - c.safetensors
"""
SECTION = """
merge_method: linear
models: [s, c.safetensors]
stages:
  s: {merge_method: linear, models: [a.safetensors, b.safetensors]}
"""
DOCUMENTS = f"name: s\n{INNER}---\nmerge_method: linear\nmodels: [s, c.safetensors]\n"


@pytest.mark.parametrize(("text", "name"), [(INLINE, "models.0"), (SECTION, "s"), (DOCUMENTS, "s")])
def test_the_forms_say_the_same(text: str, name: str) -> None:
    recipe = read(text)
    assert [model.model for model in recipe.models] == [stage_text(name), "c.safetensors"]
    assert [model.model for model in recipe.stages[name].models] == ["a.safetensors", "b.safetensors"]
    assert stages_used(recipe) == needed(recipe) == [name]


@pytest.mark.parametrize("text", [INLINE, SECTION, DOCUMENTS])
def test_a_recipe_travels_and_is_read_again(text: str) -> None:
    recipe = sm.plan(recipe="r.yaml" if read(text) else "").recipe
    from streammerge.recipe.reader import travelling

    record = travelling(recipe).to_dict()
    assert travelling(read_recipe(record)).to_dict() == record
    assert to_yaml(record)


def test_the_output_is_the_document_that_no_other_names() -> None:
    recipe = read(f"name: s\n{INNER}---\nname: t\nmerge_method: linear\nmodels: [s, c.safetensors]\n")
    assert list(recipe.stages) == ["s"]
    assert recipe.name == "t"


def test_documents_may_come_in_any_order() -> None:
    recipe = read(
        f"merge_method: linear\nmodels: [t, a.safetensors]\n---\nname: t\n{INNER.replace('a.', 's+a.')}"
        f"---\nname: s\n{INNER}"
    )
    assert stages_used(recipe) == ["s", "t"]


def test_recipes_within_recipes_get_names_by_their_places() -> None:
    innermost = "{merge_method: linear, models: [a.safetensors, b.safetensors]}"
    inner = f"{{merge_method: linear, models: [{{model: {innermost}}}, c.safetensors]}}"
    recipe = read(f"merge_method: linear\nmodels:\n  - model: {inner}\n  - a.safetensors\n")
    assert stages_used(recipe) == ["models.0.models.0", "models.0"]


@pytest.mark.parametrize(
    ("text", "place", "said"),
    [
        (DOCUMENTS.replace("[a.", "[t, a."), "3:", "t does not exist.*the stages are s"),
        (f"name: s\n{INNER}---\nname: t\n{INNER}", "5:1", "not clear which is the output"),
        (SECTION.replace("[a.safetensors,", "[s,"), "5:3", "in a circle: s -> s"),
        (
            DOCUMENTS.replace("[a.", "[u, a.") + f"---\nname: u\n{INNER.replace('a.safetensors', 's')}",
            "1:1",
            "circle: s -> u -> s",
        ),
        (SECTION.replace("linear, models: [a", "linea, models: [a"), "5:7", "linea"),
        (SECTION.replace("{merge_method: linear, m", "{m"), "5:3", "needs merge_method"),
        (SECTION.replace("{merge_method: linear, m", "{merge_method: slerp, m"), "5:7", "slerp needs the parameter t"),
        (SECTION.replace(" s:", " a+b:"), "5:3", "cannot be a stage's name"),
        (SECTION + "  s: 3\n", "6:3", "given twice"),
        (SECTION.replace("b.safetensors]}", "b.safetensors], out_path: x}"), "5:", "out_path is not supported"),
    ],
)
def test_mistakes_have_their_lines(text: str, place: str, said: str) -> None:
    with pytest.raises(sm.RecipeError, match=rf"(?s)r.yaml:{place}.*({said})"):
        read(text)


def test_a_stage_that_nothing_needs_is_said() -> None:
    recipe = read(f"{INNER}stages:\n  s: {{merge_method: linear, models: [a.safetensors]}}\n")
    assert stages_used(recipe) == []
    assert "nothing needs the stages s" in recipe.ignored[0]


def test_a_stage_is_called_like_a_method_or_a_keyword() -> None:
    """mergekit takes every such text for the stage."""
    text = f"name: linear\n{INNER}---\nmerge_method: linear\nmodels: [linear, c.safetensors]\ndtype: float32\n"
    recipe = read(text)
    assert recipe.merge_method.name == "linear"
    assert recipe.models[0].model == stage_text("linear")


def test_options_hold_for_all_stages_but_those_about_the_output() -> None:
    read(SECTION)
    recipe = sm.plan(recipe="r.yaml", seed=3, dtype="bfloat16").recipe
    assert (recipe.seed, recipe.stages["s"].seed) == (3, 3)
    assert recipe.dtype is not None
    assert recipe.stages["s"].dtype is None


def test_a_recipe_in_place_of_a_model_takes_no_name_of_another() -> None:
    inner = "{merge_method: linear, models: [a.safetensors, b.safetensors]}"
    declared = "{merge_method: linear, models: [b.safetensors, c.safetensors]}"
    named = "{merge_method: linear, name: x, models: [a.safetensors]}"
    recipe = read(
        f"stages:\n  models.0: {declared}\nmerge_method: linear\nmodels:\n  - model: {inner}\n  - models.0\n  - {named}\n"
    )
    wanted = [stage_text(name) for name in ("models.0'", "models.0", "x")]
    assert [model.model for model in recipe.models] == wanted
    assert [model.model for model in recipe.stages["models.0'"].models] == ["a.safetensors", "b.safetensors"]
    assert [model.model for model in recipe.stages["models.0"].models] == ["b.safetensors", "c.safetensors"]
