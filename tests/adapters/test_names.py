"""Which tensor of a base a module is."""

from __future__ import annotations

import pytest

import streammerge as sm
from adapters.arithmetic import adapter_of, baked, base_of, change, drawn, factors, same


def test_two_possible_tensors_are_an_error() -> None:
    base_of({f"{tower}.layers.0.q.weight": drawn(1, 8, 8) for tower in ("text", "vision")})
    adapter_of(factors("model.layers.0.q", 8, 8), config={"r": 4})
    with pytest.raises(sm.MismatchError, match=r"could be text\.layers\.0\.q\.weight, vision\.layers\.0\.q\.weight"):
        sm.convert("base+lora", "out/")


def test_layers_of_two_stacks_are_an_error() -> None:
    base = {f"text.model.layers.{n}.q.weight": drawn(n, 8, 8) for n in range(2)}
    base |= {f"vision.layers.{n}.q.weight": drawn(n, 8, 8) for n in range(4)}
    base_of(base)
    lora = {}
    for number in range(4):
        lora |= factors(f"model.layers.{number}.q", 8, 8)
    adapter_of(lora, config={"r": 4})
    with pytest.raises(sm.MismatchError, match="a model with other layers"):
        sm.convert("base+lora", "out/")


def test_other_beginnings_of_names_are_found() -> None:
    base = {f"language_model.model.layers.{n}.q.weight": drawn(n, 8, 6) for n in range(12)}
    base_of(base)
    lora = factors("model.language_model.layers.1.q", 8, 6) | factors("model.language_model.layers.11.q", 8, 6, seed=30)
    adapter_of(lora, config={"r": 4, "lora_alpha": 4})
    expected = {name: each.double() for name, each in base.items()}
    for number in (1, 11):
        expected[f"language_model.model.layers.{number}.q.weight"] += change(
            lora, f"model.language_model.layers.{number}.q", 1
        )
    same(baked("base+lora"), expected)


def test_the_nearest_name_is_told() -> None:
    base_of({"model.layers.0.self_attn.q_proj.weight": drawn(1, 8, 6)})
    adapter_of(factors("model.layers.0.self_attn.q_prj", 8, 6), config={"r": 4})
    with pytest.raises(sm.MismatchError, match=r"the nearest name there is model\.layers\.0\.self_attn\.q_proj\.weight"):
        sm.convert("base+lora", "out/")


def test_names_that_are_one_without_dots_are_an_error() -> None:
    base_of({"a_b.c.weight": drawn(1, 8, 6), "a.b_c.weight": drawn(2, 8, 6)})
    tensors = {"lora_unet_a_b_c.lora_down.weight": drawn(3, 4, 6), "lora_unet_a_b_c.lora_up.weight": drawn(4, 8, 4)}
    with pytest.raises(sm.MismatchError, match="which are one without their dots"):
        sm.convert(f"base+{adapter_of(tensors)}", "out/")
