"""Model cards. The oracles: PyYAML reads the keys, as the hub does; the texts of the inputs' own cards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

import streammerge as sm

COMMIT = "0123456789abcdef0123456789abcdef01234567"
APACHE = "---\nlicense: apache-2.0\nlanguage:\n- en\n---\n# mine\n"


def model(folder: Path, seed: int = 0, card: str | bytes | None = None, config: str = "config.json") -> Path:
    folder.mkdir(parents=True)
    save_file({"w": torch.full((5,), float(seed)), "b": torch.tensor(float(seed))}, folder / "model.safetensors")
    (folder / config).write_text(json.dumps({"model_type": "llama"}))
    if card is not None:
        (folder / "README.md").write_bytes(card.encode() if isinstance(card, str) else card)
    return folder


def read(folder: Path) -> tuple[dict[str, Any], str]:
    """Returns the keys and the rest of a card, cut as the hub cuts them: at lines of three dashes."""
    begin, keys, text = (folder / "README.md").read_text().split("---\n", 2)
    assert not begin
    return yaml.safe_load(keys), text


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_card_has_the_recipe_the_models_and_the_method(here: Path) -> None:
    for seed, name in enumerate(("base", "chat", "code")):
        model(here / name, seed)
    sm.merge(["chat", "code"], "out/", base="base", method="ties", parameters={"density": 0.5}, weights=[0.7, 0.3])
    keys, text = read(here / "out")
    assert keys == {"library_name": "transformers", "tags": ["merge", "streammerge"]}
    recipe = text.split("```yaml\n")[1].split("```")[0]
    assert recipe == (here / "out" / "streammerge.yaml").read_text()
    assert "# Merge of chat, base, code\n" in text
    assert "`ties`" in text
    assert "- `base` (the base)\n" in text
    assert "- `chat`\n" in text
    assert "Licences" not in text
    assert sm.verify("out", sample="100%").recomputed


def test_a_recipe_gives_the_same_bytes_for_any_workers(here: Path) -> None:
    for seed, name in enumerate("ab"):
        model(here / name, seed, APACHE)
    for workers in (1, 3):
        sm.merge(["a", "b"], f"out{workers}/", workers=workers, executor="threads")
    assert (here / "out1" / "README.md").read_bytes() == (here / "out3" / "README.md").read_bytes()
    sums = json.loads((here / "out1" / "streammerge.json").read_text())["checksums"]
    assert "README.md" in sums


def test_models_of_the_hubs_cache_are_the_base_models(here: Path) -> None:
    cache = here / "hub"
    for seed, name in enumerate(("one", "two.5")):
        model(cache / f"models--org--{name}" / "snapshots" / COMMIT, seed)
    model(here / "own", 3)
    inputs = [cache / f"models--org--{name}" / "snapshots" / COMMIT for name in ("one", "two.5")]
    sm.merge([*inputs, "own"], "out/")
    keys, text = read(here / "out")
    assert keys["base_model"] == ["org/one", "org/two.5"]
    assert keys["base_model_relation"] == "merge"
    assert f"- [org/two.5](https://huggingface.co/org/two.5) at commit `{COMMIT}`\n" in text


OTHER = "---\nlicense: other\nlicense_name: llama3\nlicense_link: LICENSE\n---\n"


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (APACHE, APACHE, {"license": "apache-2.0"}),
        (APACHE, "---\r\nlicense: apache-2.0\r\n---\r\n", {"license": "apache-2.0"}),
        (OTHER, OTHER, {"license": "other", "license_name": "llama3", "license_link": "LICENSE"}),
        (OTHER, OTHER.replace("llama3", "llama4"), {}),
        (APACHE, OTHER, {}),
        (APACHE, None, {}),
        (APACHE, "# no keys\n", {}),
        (APACHE, "---\nlicense: [\n---\n", {}),
        (APACHE, b"---\nlicense: \xff\xfe\n---\n", {}),
        (APACHE, "---\nlicense: {a: 1}\n---\n", {}),
        ("---\nlicense:\n- mit\n- gpl\ntags: [x]\n---\n", "---\nlicense: [mit, gpl]\n---\n", {"license": ["mit", "gpl"]}),
    ],
)
def test_a_licence_is_stated_where_all_models_state_it(
    here: Path, first: str, second: str | None, expected: dict[str, Any]
) -> None:
    model(here / "a", 1, first)
    model(here / "b", 2, second)
    sm.merge(["a", "b"], "out/")
    keys, text = read(here / "out")
    assert {name: value for name, value in keys.items() if name.startswith("license")} == expected
    assert "What the cards of the models state" in text
    stated = yaml.safe_load(first.split("---\n")[1])["license"]
    assert f"- `a`: `{stated if isinstance(stated, str) else stated[0]}`" in text


def test_the_card_of_the_first_model_stays_behind_and_can_be_kept(here: Path) -> None:
    model(here / "a", 1, APACHE)
    model(here / "b", 2, APACHE)
    made = sm.merge(["a", "b"], "out/")
    assert any("README.md (the card of the first input" in note for note in made.notes)
    sm.merge(["a", "b"], "kept/", card=False)
    assert (here / "kept" / "README.md").read_text() == APACHE
    assert "card: false" in (here / "kept" / "streammerge.yaml").read_text()
    sm.merge(recipe=here / "kept" / "streammerge.yaml", out="again/")
    assert (here / "again" / "README.md").read_text() == APACHE
    sm.convert("a", "converted/")
    assert (here / "converted" / "README.md").read_text() == APACHE


def test_a_card_that_somebody_wrote_is_not_replaced(here: Path) -> None:
    model(here / "a", 1)
    model(here / "b", 2)
    sm.merge(["a", "b"], "out/")
    sm.merge(["a", "b"], "out/", overwrite=True)
    (here / "mine").mkdir()
    (here / "mine" / "README.md").write_text("my own")
    with pytest.raises(sm.RecipeError, match=r"also holds README\.md"):
        sm.merge(["a", "b"], "mine/", overwrite=True)
    assert (here / "mine" / "README.md").read_text() == "my own"


@pytest.mark.parametrize(
    ("config", "library"), [("config.json", "transformers"), ("model_index.json", "diffusers"), ("params.json", None)]
)
def test_only_folders_that_a_library_of_the_hub_loads_have_a_card(here: Path, config: str, library: str | None) -> None:
    for seed, name in enumerate("ab"):
        model(here / name, seed, config="config.json" if library == "transformers" else "params.json")
        if library == "diffusers":
            (here / name / "model_index.json").write_text("{}")
    sm.merge(["a", "b"], "out/")
    assert (here / "out" / "README.md").exists() == (library is not None)
    if library:
        assert read(here / "out")[0]["library_name"] == library


def test_names_from_files_and_recipes_stay_text(here: Path) -> None:
    """A name or a template that holds backquotes ends no block of code."""
    model(here / "a`b", 1)
    model(here / "c", 2, "---\nlicense: '`x`'\n---\n")
    sm.merge(["a`b", "c"], "out/", chat_template="```\n{{ messages }}\n````\n")
    _, text = read(here / "out")
    assert "- ``a`b``\n" in text
    assert "`` `x` ``" in text
    assert text.count("`````") == 2  # the fence is longer than any run inside
    assert "# Merge of a\\`b, c" in text


def test_a_stage_has_no_card_and_its_models_are_named(here: Path) -> None:
    for seed, name in enumerate("abc"):
        model(here / name, seed, APACHE)
    stage = {"merge_method": "linear", "models": [{"model": "a"}, {"model": "b"}], "parameters": {"weight": 0.5}}
    recipe = {"merge_method": "slerp", "base_model": "mean", "models": [{"model": "mean"}, {"model": "c"}]}
    recipe |= {"parameters": {"t": 0.5}, "stages": {"mean": stage}, "name": "My *merge*"}
    sm.merge(recipe=recipe, out="out/")
    keys, text = read(here / "out")
    assert keys["license"] == "apache-2.0"
    assert "# My \\*merge\\*\n" in text
    assert all(f"- `{name}`\n" in text for name in "abc")
    sm.merge(recipe=recipe, out="kept/", card=False)
    assert (here / "kept" / "README.md").read_text() == APACHE
