"""The keys of a mixture of experts in a recipe."""

from __future__ import annotations

from pathlib import Path

import pytest

from streammerge.recipe.experts import ARCHITECTURE
from streammerge.recipe.reader import read_recipe


@pytest.mark.parametrize(
    ("text", "name"),
    [("mixtral", "mixtral"), ("Qwen", "qwen2"), ("qwen3", "qwen3"), ("deep", "deepseek"), ("MIX", "mixtral")],
)
def test_an_architecture_is_named_by_its_begin(text: str, name: str) -> None:
    assert ARCHITECTURE.parse(text) == name


def test_a_configuration_of_mergekit_moe_is_a_copy_of_a_mixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in "abc":
        (tmp_path / name).mkdir()
    text = "base_model: a\ngate_mode: random\nexperts:\n- source_model: b\n  noise_scale: 0.1\n- source_model: c\n"
    (tmp_path / "moe.yml").write_text(text)
    recipe = read_recipe("moe.yml")
    assert recipe.merge_method.name == "passthrough"
    mixture = recipe.stages["mixture"]
    assert [each.source_model for each in mixture.experts] == ["b", "c"]
    assert [each.noise_scale for each in mixture.experts] == [0.1, None]
    assert recipe.named_models == ["<stage mixture>", "a", "b", "c"]
