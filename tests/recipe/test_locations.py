"""Where the models of a recipe are found, and what they are called in an output."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import assert_same, load_safetensors

import streammerge as sm
from streammerge.errors import FormatError
from streammerge.methods.registry import find_method
from streammerge.recipe.fields import Problems
from streammerge.recipe.locations import located, travelling, travelling_names
from streammerge.recipe.model import Model, Recipe, Rule
from streammerge.recipe.patterns import parse_pattern
from streammerge.recipe.reader import read_recipe
from streammerge.recipe.settings import constant
from streammerge.stores.base import Input, Location, Status, Store
from streammerge.stores.locations import HERE, parse
from streammerge.stores.registry import STORES

LINEAR = "merge_method: linear\nmodels: [{model: a.safetensors}, {model: b.safetensors}]\n"


def test_absolute_paths_stay_out_of_the_output(models: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / "a.safetensors").rename(tmp_path / name / "x.safetensors") if name == "one" else (
            tmp_path / "b.safetensors"
        ).rename(tmp_path / name / "x.safetensors")
    sm.merge([tmp_path / "one" / "x.safetensors", tmp_path / "two" / "x.safetensors"], tmp_path / "out")
    record = yaml.safe_load((tmp_path / "out" / "streammerge.yaml").read_text())
    assert [m["model"] for m in record["models"]] == ["one/x.safetensors", "two/x.safetensors"]
    made = sm.merge(recipe=tmp_path / "out" / "streammerge.yaml", out=tmp_path / "again")
    assert_same(load_safetensors(made.out / "model.safetensors"), load_safetensors(tmp_path / "out" / "model.safetensors"))


def test_models_are_found_beside_the_recipe_and_in_the_hubs_cache(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "recipe.yaml").write_text(LINEAR)
    monkeypatch.chdir(elsewhere)
    assert sm.plan(recipe=tmp_path / "recipe.yaml").recipe.inputs == (
        str(tmp_path / "a.safetensors"),
        str(tmp_path / "b.safetensors"),
    )
    revision = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--org--name"
    (repository / "snapshots" / revision).mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    (repository / "snapshots" / revision / "model.safetensors").symlink_to(tmp_path / "b.safetensors")
    (tmp_path / "recipe.yaml").write_text(LINEAR.replace("b.safetensors", "org/name"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    found = read_recipe(tmp_path / "recipe.yaml")
    assert found.inputs[1] == str(repository / "snapshots" / revision)
    assert found.written[found.inputs[1]] == "org/name"


def names(*models: str, **keys: Any) -> dict[str, str]:
    return travelling_names(Recipe(find_method("linear"), tuple(map(Model, models)), **keys))


def test_names_travel_as_they_are_unless_one_is_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert names("a.pth", "in/b.pth") == {"a.pth": "a.pth", "in/b.pth": "in/b.pth"}
    assert names("in/a.pth", f"{tmp_path}/in/b.pth") == {"in/a.pth": "a.pth", f"{tmp_path}/in/b.pth": "b.pth"}
    assert names(f"{tmp_path}/x/a.pth", f"{tmp_path}/y/a.pth") == {
        f"{tmp_path}/x/a.pth": "x/a.pth",
        f"{tmp_path}/y/a.pth": "y/a.pth",
    }
    assert names(f"FILE://{tmp_path}/in/b.pth") == {f"FILE://{tmp_path}/in/b.pth": "b.pth"}
    assert names("<in memory 1>", f"{tmp_path}/a.pth") == {"<in memory 1>": "<in memory 1>", f"{tmp_path}/a.pth": "a.pth"}
    assert names("/found/a.pth", written={"/found/a.pth": "a.pth"}) == {"/found/a.pth": "a.pth"}


class Archives(Store):
    """A store whose names hold paths of this machine."""

    scheme = "archives"
    always_absolute = False

    def status(self, location: Location) -> Status:
        raise FormatError(f"{location} is absent")

    def is_folder(self, location: Location) -> bool:
        return False

    def list_names(self, location: Location) -> list[str]:
        return []

    def opened(self, location: Location) -> Input:
        raise FormatError(f"{location} is absent")


def test_no_path_travels_inside_a_name_with_a_scheme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(STORES, "_own", {"archives": Archives()})
    near, far = "archives://in/x.zip/a.pth", f"archives://{tmp_path}/in/x.zip/a.pth"
    assert names(near) == {near: near}
    assert names(far) == {far: "archives://a.pth"}
    assert names(far, "in/b.pth") == {far: "archives://x.zip/a.pth", "in/b.pth": "b.pth"}
    assert names("memory:///in/a.pth", far)["memory:///in/a.pth"] == "memory:///in/a.pth"
    for folder in (parse(tmp_path / "in"), parse(f"archives://{tmp_path}/in")):
        assert parse("archives://x.zip/a.pth", folder) == parse(far)
    assert parse("archives://x.zip/a.pth", parse("memory://in")).key == "x.zip/a.pth"
    assert parse(near).absolute() == parse(far)


def test_the_recipe_that_travels_says_every_default() -> None:
    recipe = Recipe(find_method("linear"), (Model("a.pth"), Model("b.pth", {"weight": constant(3)})))
    assert travelling(recipe).to_dict()["parameters"] == {"weight": 1.0, "normalize": True}
    said = replace(recipe, parameters={"normalize": constant(False)})
    assert travelling(said).to_dict()["parameters"]["normalize"] is False
    ruled = replace(recipe, rules=(Rule((parse_pattern("q"),), merge_method=find_method("task_arithmetic")),))
    assert travelling(ruled).to_dict().get("parameters", {}) == {}, "the rule's method has other defaults"


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("absent.pth", "absent.pth does not exist in . or inner; run this from the folder that holds it"),
        ("a+b", "a+b does not exist, neither as a path nor as the model a with an adapter"),
        ("a@b", "a@b does not exist"),
        ("org/name", "org/name does not exist, and the hub's cache does not hold it, while HF_HUB_OFFLINE is set"),
        ("hf://org/name@x", "hf://org/name@x: the hub's cache does not hold it"),
        ("/absent.pth", "/absent.pth does not exist"),
        ("nostore://x", "nostore"),
    ],
)
def test_an_absent_model_is_reported_at_its_key(
    model: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    problems = Problems()
    recipe = Recipe(find_method("linear"), (Model(model, path=("models", 0)),))
    located(recipe, [HERE, parse("inner")], problems)
    ((path, said),) = problems
    assert path == ("models", 0, "model")
    assert words in said


def test_a_folder_has_one_name_however_it_is_spelled(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative, absolute and in an object store: the recipe is part of the output's bytes."""
    monkeypatch.chdir(tmp_path)
    for slash in ("", "/"):
        relative = names(f"chat{slash}", f"code{slash}")
        absolute = names(f"{tmp_path}/chat{slash}", f"{tmp_path}/code{slash}")
        stored = names(f"s3://bucket/a/chat{slash}", f"s3://bucket/a/code{slash}")
        assert [*relative.values()] == [*absolute.values()] == [*stored.values()] == [f"chat{slash}", f"code{slash}"]
