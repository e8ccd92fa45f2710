"""What a name tells by itself."""

from __future__ import annotations

from streammerge.recipe.names import held_name, is_held, is_recipe_name


def test_names_of_checkpoints_in_memory() -> None:
    assert [is_held(name) for name in (held_name(1), held_name(12), "<in memory x>", "a.pth")] == [True, True, False, False]


def test_names_of_recipes() -> None:
    assert all(map(is_recipe_name, ("a.yaml", "in/a.yml", "a.json", "A.YAML")))
    assert not any(map(is_recipe_name, ("model.safetensors.index.json", "a.pth", "yaml", "a.yaml/b.pth")))
