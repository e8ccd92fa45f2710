"""Names of models that are repositories of the hub, without a hub: what its cache on this machine tells."""

from __future__ import annotations

from pathlib import Path

import pytest

import streammerge as sm
from streammerge.recipe.hub_names import hub_place, on_the_hub, with_hub_places
from streammerge.recipe.model import Recipe
from streammerge.recipe.reader import read_recipe

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Makes the current folder empty, and a cache with one repository. Returns where that lies."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    home = tmp_path / "cache" / "models--org--name"
    (home / "snapshots" / COMMIT).mkdir(parents=True)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(COMMIT)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return str(home / "snapshots" / COMMIT)


def test_a_path_stays_and_a_repository_is_looked_for(cached: str) -> None:
    assert hub_place("org/name") == cached
    assert hub_place("hf://org/name@main") == cached
    assert hub_place("org/other") == "org/other"
    assert hub_place("s3://org/name") == "s3://org/name"
    Path("org").mkdir()
    Path("org/name").symlink_to("nothing")
    assert hub_place("org/name") == "org/name"
    with pytest.raises(sm.StoreError, match="hf://org/other: the hub's cache does not hold it"):
        hub_place("hf://org/other")


def test_each_part_of_a_model_with_adapters_is_looked_for(cached: str) -> None:
    Path("a").mkdir()
    written: dict[str, str] = {}
    assert hub_place("org/name + 0.5*a", written) == f"{cached} + 0.5*a"
    assert written == {cached: "org/name"}


def test_the_models_of_a_recipe_are_looked_for(cached: str) -> None:
    Path("a").mkdir()
    given: Recipe = read_recipe({"merge_method": "linear", "models": [{"model": "org/name"}, {"model": "a"}]})
    found = with_hub_places(given)
    assert list(found.named_models) == [cached, "a"]
    assert found.written[cached] == "org/name"


def test_why_an_absent_file_is_not_on_the_hub_either(cached: str) -> None:
    assert "while HF_HUB_OFFLINE is set" in on_the_hub("org/other")
    assert on_the_hub("a.pth") == on_the_hub("hf://org/other") == ""
