"""Recipes from the arguments of merge() and of the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from conftest import Cli, load_safetensors
from safetensors.torch import save_file

import streammerge as sm
from streammerge.cli.main import cli as command_line
from streammerge.recipe.arguments import conversion, overridden, recipe_of
from streammerge.recipe.model import Recipe
from streammerge.tensors.dtypes import DType

LINEAR = "merge_method: linear\nmodels: [{model: a.safetensors}, {model: b.safetensors}]\n"


def test_file_dict_and_arguments_give_the_same_bytes(models: Path) -> None:
    Path("recipe.yaml").write_text(
        "merge_method: ties\nbase_model: base.safetensors\nparameters: {density: 0.5}\nmodels:\n"
        "- {model: a.safetensors, parameters: {weight: 0.7}}\n- {model: b.safetensors, parameters: {weight: 0.3}}\n"
        "output: {container: first}\n"
    )
    sm.merge(recipe="recipe.yaml", out="one.safetensors")
    sm.merge(recipe=yaml.safe_load(Path("recipe.yaml").read_text()), out="two.safetensors")
    given = {"base": "base.safetensors", "method": "ties", "parameters": {"density": 0.5}, "weights": [0.7, 0.3]}
    sm.merge(["a.safetensors", "b.safetensors"], "three.safetensors", **given)
    one, two, three = (Path(f"{n}.safetensors").read_bytes() for n in ("one", "two", "three"))
    assert one == two == three


@pytest.mark.parametrize(
    "arguments",
    [
        ["a.safetensors", "b.safetensors", "--weights", "0.6,0.4"],
        ["a.safetensors", "b.safetensors", "--weights", "2,1", "--no-normalize", "--dtype", "bfloat16"],
        ["a.safetensors", "b.safetensors", "--base", "base.safetensors", "--method", "dare_ties", "-p", "density=0.5,0.7"],
        ["a.safetensors", "b.safetensors", "--method", "slerp", "-p", "t=0.3", "--integers", "first", "--seed", "4"],
        ["?.safetensors", "--last", "2", "--ema-decay", "0.5"],
        ["a.safetensors", "base.safetensors", "--base", "base.safetensors", "--method", "task_arithmetic"],
    ],
    ids=" ".join,
)
def test_any_command_can_be_saved_as_a_recipe(arguments: list[str], models: Path) -> None:
    def run(*words: str) -> str:
        # in this process, where torch is already imported
        done = CliRunner().invoke(command_line, words, catch_exceptions=False)
        assert done.exit_code == 0
        return done.stdout

    Path("saved.yaml").write_text(run("plan", *arguments, "--format", "yaml"))
    run("merge", *arguments, "-o", "one.safetensors")
    run("merge", "saved.yaml", "-o", "two.safetensors")
    assert Path("one.safetensors").read_bytes() == Path("two.safetensors").read_bytes()
    Path("inside.yaml").write_text(run("inspect", "one.safetensors", "--recipe"))
    run("merge", "inside.yaml", "-o", "three.safetensors")
    assert Path("one.safetensors").read_bytes() == Path("three.safetensors").read_bytes()


def test_options_win_over_a_recipe_and_models_do_not(models: Path, cli: Cli) -> None:
    Path("recipe.yaml").write_text(LINEAR + "dtype: bfloat16\n")
    cli("merge", "recipe.yaml", "-o", "out.safetensors", "--dtype", "float32", "--out-dtype", "float16")
    assert load_safetensors(Path("out.safetensors"))["scale"].dtype == torch.float16
    assert "weights beside a recipe" in cli("plan", "recipe.yaml", "--weights", "1,2", code=2).stderr
    with pytest.raises(sm.RecipeError, match="base, highest, t beside a recipe"):
        sm.plan(recipe="recipe.yaml", base="base.safetensors", highest=True, parameters={"t": 0.3})
    assert "stands alone" in cli("plan", "recipe.yaml", "a.safetensors", code=2).stderr


def per_model(recipe: Recipe, name: str) -> list[object]:
    return [model.parameters[name][0].value if name in model.parameters else None for model in recipe.models]


def test_a_list_is_one_value_per_model_and_the_base_may_go_without() -> None:
    def ties(density: list[float], base: str = "base") -> Recipe:
        return recipe_of(["a", "base", "b"], "ties", base, None, {"density": density}, {})

    assert per_model(ties([0.1, 0.2, 0.3]), "density") == [0.1, 0.2, 0.3]
    assert per_model(ties([0.1, 0.3]), "density") == [0.1, None, 0.3]
    assert per_model(ties([0.1]), "density") == [0.1, 0.1, 0.1]
    for wrong, base in (([0.1, 0.2], "other"), ([0.1, 0.2, 0.3, 0.4], "base")):
        with pytest.raises(sm.RecipeError, match=f"{len(wrong)} values of density for 3 models"):
            ties(wrong, base)


@pytest.mark.parametrize(
    ("weights", "parameters", "words"),
    [
        ([1.0], {}, "1 weight for 2 inputs"),
        ([0, 6, 0, 4], {}, "4 weights for 2 inputs; .* like 0.6,0.4; a decimal number has a point, not a comma"),
        ([1.0, float("nan")], {}, "weights must be finite"),
        ([1.0, 2.0], {"weight": 1}, "give only one"),
        (None, {"weight": 1, "weight_": 2}, "the parameter weight is given twice"),
        (None, {"weight": "heavy"}, "weight takes a number"),
    ],
)
def test_weights_and_parameters_that_contradict(weights: list[float] | None, parameters: Any, words: str) -> None:
    with pytest.raises(sm.RecipeError, match=words):
        recipe_of(["a", "b"], "linear", None, weights, parameters, {})


def test_an_option_replaces_a_key_only_if_it_is_given() -> None:
    recipe = recipe_of(["a"], "linear", None, None, {}, {"out_dtype": "float16", "seed": 3, "max_shard_size": "1kB"})
    assert (recipe.out_dtype, recipe.seed, recipe.output.max_shard_size) == (DType.F16, 3, 1000)
    assert overridden(recipe, {"seed": None, "on_missing": None}) == recipe
    assert overridden(recipe, {"dtype": "bfloat16"}).recast is DType.BF16, "the later word counts"
    for name, value in (("seed", "many"), ("on_missing", "never"), ("dtype", "int8"), ("max_shard_size", 0)):
        with pytest.raises(sm.RecipeError, match=f"`{name}`"):
            overridden(recipe, {name: value})


def test_patterns_of_a_conversion_become_rules_in_their_order() -> None:
    recipe = conversion("a", ["*.bias"], ["enc.*"], {})
    actions = [
        next((rule.action for rule in recipe.rules if rule.takes(name)), None) for name in ("enc.bias", "enc.w", "w")
    ]
    assert actions == ["left out", "merged", "left out"]
    assert conversion("a", [], [], {}).rules == ()
    with pytest.raises(sm.RecipeError, match="take a pattern"):
        conversion("a", [""], [], {})


class TestContainer:
    """Which checkpoint gives names, dtypes, shapes and files: a command line's first model, or a recipe's base."""

    @pytest.fixture(autouse=True)
    def _files(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        make = torch.Generator().manual_seed(1)
        values = [torch.randn(5, 3, generator=make) for _ in range(3)]
        torch.save({"model": {"module.w": values[0].half(), "n": torch.tensor(1)}, "voice": "a"}, "a.pth")
        torch.save({"model": {"module.w": values[1].half(), "n": torch.tensor(2)}, "voice": "b"}, "b.pth")
        save_file({"w": values[2], "n": torch.tensor(9)}, "base.safetensors", {"made": "base"})
        self.expected = values[0].half().double() + values[1].half().double() - values[2].double()

    def test_the_first_model_of_a_command_line(self) -> None:
        sm.merge(["a.pth", "b.pth"], "out.pth", base="base.safetensors", method="add_difference", integers="first")
        out = torch.load("out.pth", weights_only=True)
        assert out["voice"] == "a"
        assert list(out["model"]) == ["module.w", "n"]
        assert torch.equal(out["model"]["module.w"], self.expected.half())
        assert out["model"]["n"].item() == 1, "the base is not first"
        again = sm.inspect("out.pth")
        assert again.entries["module.w"].spec.dtype == "F16"

    def test_the_base_of_a_recipe(self) -> None:
        models = [{"model": "a.pth"}, {"model": "b.pth"}]
        wish = {"merge_method": "add_difference", "base_model": "base.safetensors", "models": models, "integers": "first"}
        sm.merge(recipe=wish, out="out.safetensors")
        out = load_safetensors(Path("out.safetensors"))
        assert out.keys() == {"w", "n"}
        assert torch.equal(out["w"], self.expected.float())
        assert out["n"].item() == 9
        sm.merge(recipe=wish | {"output": {"container": "first"}}, out="first.safetensors")
        assert load_safetensors(Path("first.safetensors")).keys() == {"module.w", "n"}

    def test_a_base_among_the_models_stays_first_where_the_method_wants_it(self) -> None:
        save_file({"w": torch.tensor([1.0, 0.0])}, "x.safetensors")
        save_file({"w": torch.tensor([0.0, 1.0])}, "y.safetensors")
        options = {"method": "slerp", "parameters": {"t": 0.25}}
        sm.merge(["x.safetensors", "y.safetensors"], "one.safetensors", base="y.safetensors", **options)
        sm.merge(["y.safetensors", "x.safetensors"], "two.safetensors", **options)
        one, two = (load_safetensors(Path(f"{name}.safetensors"))["w"] for name in ("one", "two"))
        assert torch.equal(one, two)

    def test_a_tensor_that_the_base_lacks_is_kept(self) -> None:
        for name, extra in (("x", 1.0), ("y", 2.0)):
            save_file({"w": torch.full((2,), extra), "new": torch.full((2,), extra)}, f"{name}.safetensors")
        save_file({"w": torch.zeros(2)}, "z.safetensors")
        options = {"base": "z.safetensors", "method": "task_arithmetic", "weights": [1, 1]}
        with pytest.raises(sm.MismatchError, match=r"z\.safetensors lacks 1: new"):
            sm.plan(["x.safetensors", "y.safetensors"], **options)
        for policy in ("base", "average-present", "union"):
            sm.merge(["x.safetensors", "y.safetensors"], "out.safetensors", on_missing=policy, overwrite=True, **options)
            out = load_safetensors(Path("out.safetensors"))
            assert out["w"].tolist() == [3, 3]
            assert out["new"].tolist() == [1, 1], policy
