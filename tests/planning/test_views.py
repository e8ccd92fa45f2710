"""Views: which tensors a recipe's models, slices and modules mean. Whole merges: recipe/test_rules.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import streammerge as sm
from streammerge.planning.views import Parts, make_parts
from streammerge.recipe.reader import read_recipe


@pytest.fixture(autouse=True)
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in "abc":
        tensors = {f"layers.{n}.w": torch.ones(1) for n in range(4)} | {"embed.w": torch.ones(1), "norm.w": torch.ones(1)}
        save_file(tensors, tmp_path / f"{name}.safetensors")
    both = {f"{part}.layers.{n}.w": torch.ones(1) for part in ("enc", "dec") for n in range(2)} | {"head.w": torch.ones(1)}
    save_file(both, tmp_path / "both.safetensors")


def parts(method: str, **keys: Any) -> Parts:
    recipe = read_recipe({"merge_method": method, **keys})
    return make_parts(recipe, {each: sm.inspect(each.path) for each in recipe.checkpoints})


def listed(names: str) -> list[dict[str, str]]:
    return [{"model": f"{name}.safetensors"} for name in names]


def source(first: int, stop: int, name: str = "a") -> dict[str, Any]:
    return {"model": f"{name}.safetensors", "layer_range": [first, stop]}


@pytest.mark.parametrize(
    ("method", "models", "base", "views", "numbers"),
    [
        ("linear", "ab", None, "ab", (0, 1)),
        ("ties", "ab", "c", "cab", (1, 2)),
        ("ties", "ab", "b", "ba", (1,)),
        ("linear", "ab", "b", "ba", (1, 0)),
    ],
)
def test_the_base_stands_first_and_models_keep_their_order(
    method: str, models: str, base: str | None, views: str, numbers: tuple[int, ...]
) -> None:
    keys = {} if base is None else {"base_model": f"{base}.safetensors"}
    (part,) = parts(method, models=listed(models), **keys).parts
    assert "".join(view.index.path.name[0] for view in part.views) == views
    assert part.models == numbers
    assert (part.based, part.layers) == (base is not None, {"layers": (0, 4)})
    assert part.order(part.method) == ((0, *numbers) if method == "ties" else numbers)


def test_slices_are_renumbered_and_only_the_ends_have_what_is_outside() -> None:
    made = parts("passthrough", slices=[{"sources": [each]} for each in (source(0, 2), source(1, 3, "b"), source(3, 4))])
    pairs = [{new: entry.spec.name for new, entry in part.views[0].entries.items()} for part in made.parts]
    assert pairs == [
        {"embed.w": "embed.w", "layers.0.w": "layers.0.w", "layers.1.w": "layers.1.w"},
        {"layers.2.w": "layers.1.w", "layers.3.w": "layers.2.w"},
        {"norm.w": "norm.w", "layers.4.w": "layers.3.w"},
    ]
    (moved,) = made.restacked
    assert (moved.stack, moved.before) == ("layers", 4)
    assert [(path.name[0], number) for path, number in moved.layers] == [("a", 0), ("a", 1), ("b", 1), ("b", 2), ("a", 3)]
    assert [part.layers["layers"] for part in made.parts] == [(0, 2), (2, 2), (4, 1)]
    assert [made.parts[1].position(name) for name in ("layers.2.w", "layers.3.w", "norm.w")] == [0.0, 1.0, 0.0]


def test_every_slice_that_reaches_too_far_is_told() -> None:
    with pytest.raises(sm.RecipeError) as caught:
        parts("passthrough", slices=[{"sources": [each]} for each in (source(0, 5), source(0, 4), source(9, 12, "b"))])
    assert "[0, 5] reaches beyond the 4 layers of a.safetensors" in str(caught.value)
    assert "[9, 12] reaches beyond the 4 layers of b.safetensors" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 3


def test_a_stack_that_could_be_another_one_must_be_named() -> None:
    one = [{"sources": [source(0, 1, "both")]}]
    with pytest.raises(sm.RecipeError, match=r"several stacks of layers: .*say which with modules"):
        parts("passthrough", slices=one)
    made = parts("passthrough", modules={"dec": {"slices": one}})
    assert [list(part.views[0].entries) for part in made.parts] == [
        ["dec.layers.0.w"],
        ["enc.layers.0.w", "enc.layers.1.w", "head.w"],
    ]
    assert any(note.startswith("3 tensors belong to no module, so they are copied") for note in made.notes)
    with pytest.raises(sm.RecipeError, match="belongs to a module text; names begin with dec, enc, head"):
        parts("passthrough", modules={"text": {"models": [{"model": "both.safetensors"}]}})


@pytest.mark.parametrize("first", ["plain", "prefixed"])
def test_slices_of_checkpoints_with_another_prefix_have_the_names_of_the_first(first: str) -> None:
    """As GPT-2 on the hub (``h.0``) and as transformers saves it (``transformer.h.0``)."""
    bare = {f"h.{n}.w": torch.ones(1) for n in range(3)} | {"wte.weight": torch.ones(1), "ln_f.weight": torch.ones(1)}
    save_file(bare, "plain.safetensors")
    save_file({f"transformer.{n}": t for n, t in bare.items()} | {"lm_head.weight": torch.ones(1)}, "prefixed.safetensors")
    other = {"plain": "prefixed", "prefixed": "plain"}[first]
    made = parts("passthrough", slices=[{"sources": [source(0, 2, first)]}, {"sources": [source(1, 3, other)]}])
    names = {name for part in made.parts for name in part.views[0].entries}
    prefix = "" if first == "plain" else "transformer."
    wanted = {f"{prefix}{name}" for name in ("h.0.w", "h.1.w", "h.2.w", "h.3.w", "wte.weight", "ln_f.weight")}
    assert names == wanted | ({"lm_head.weight"} if other == "prefixed" else set())
