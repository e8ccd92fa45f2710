"""Filters and gradients of merges of adapters."""

from __future__ import annotations

import pytest
import torch

import streammerge as sm
from adapters.arithmetic import adapter_of, factors
from factoring.test_combination import Products, close, double, made_products, two


@pytest.mark.parametrize("method", ["linear", "cat", "task_arithmetic"])
def test_filters_and_gradients_hold_for_layers(method: str) -> None:
    """The layers of a gradient are those that the adapters have."""
    modules = [f"model.layers.{layer}.{kind}" for layer in range(3) for kind in ("self_attn.q_proj", "mlp.up_proj")]
    updates = list[Products]()
    for seed, name in ((100, "one"), (200, "other")):
        lora = dict[str, torch.Tensor]()
        for number, module in enumerate(modules):
            lora |= factors(module, 12, 8, 2, seed + 2 * number)
        adapter_of(lora, name, {"r": 2, "lora_alpha": 2})
        updates.append({module: double(lora, module) for module in modules})
    recipe = {
        "merge_method": method,
        "models": [
            {"model": "one", "parameters": {"weight": [{"filter": "mlp", "value": 0.25}, {"value": [0.0, 1.0]}]}},
            {"model": "other", "parameters": {"weight": [{"filter": "self_attn", "value": -1.5}]}},
        ],
        "parameters": {"normalize": False} | ({"rank": 12} if method == "task_arithmetic" else {}),
    }
    recipe["parameters"] = {} if method == "cat" else recipe["parameters"]
    result = sm.merge(recipe=recipe, out="made/")
    expected = {}
    for module in modules:
        first = 0.25 if "mlp" in module else int(module.split(".")[2]) / 2
        second = 1.0 if "mlp" in module else -1.5
        expected[module] = first * updates[0][module] + second * updates[1][module]
    close(made_products()[0], expected)
    if method == "cat":
        assert any("times the weights of each layer" in note for note in result.notes)
    assert sm.verify("made/", sample=1.0).repeated_elems > 0


def test_weights_of_a_layer_that_have_no_mean_are_an_error() -> None:
    two()
    recipe = {"merge_method": "linear", "models": ["one", "other"], "parameters": {"weight": [1, -1], "normalize": True}}
    sm.merge(recipe=recipe, out="made/")
    with pytest.raises(sm.RecipeError, match="the weights sum to 0"):
        sm.merge(recipe={**recipe, "parameters": {"weight": {"filter": "q_proj", "value": 0}}}, out="third/")
