"""Adapters from adapters, against the same arithmetic on whole products."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import load_file

import streammerge as sm
from adapters.arithmetic import Q, Tensors, V, adapter_of, base_of, base_tensors, drawn, factors

TABLE = "model.embed_tokens"
SHAPES = {Q: (24, 16), V: (12, 16), TABLE: (30, 16)}
Products = dict[str, torch.Tensor]


def two() -> list[Products]:
    """Writes two adapters of different ranks, scales and targets. Returns the updates of each."""
    table = {f"{TABLE}.lora_embedding_A": drawn(30, 2, 30), f"{TABLE}.lora_embedding_B": drawn(31, 16, 2)}
    one = factors(Q, 24, 16, 4) | factors(V, 12, 16, 4, 20)
    other = factors(Q, 24, 16, 2, 40) | table
    adapter_of(one, "one", {"r": 4, "lora_alpha": 6, "base_model_name_or_path": "b", "task_type": "CAUSAL_LM"})
    adapter_of(other, "other", {"r": 2, "lora_alpha": 3, "use_rslora": True, "base_model_name_or_path": "b"})
    return [
        {module: 1.5 * double(one, module) for module in (Q, V)},
        {Q: 3 / 2**0.5 * double(other, Q), TABLE: 3 / 2**0.5 * (table_of(other))},
    ]


def double(lora: Tensors, module: str) -> torch.Tensor:
    return lora[f"{module}.lora_B.weight"].double() @ lora[f"{module}.lora_A.weight"].double()


def table_of(lora: Tensors) -> torch.Tensor:
    return (lora[f"{TABLE}.lora_embedding_B"].double() @ lora[f"{TABLE}.lora_embedding_A"].double()).T


def weighted(updates: Sequence[Products], weights: Sequence[float]) -> Products:
    zero = {module: torch.zeros(shape, dtype=torch.float64) for module, shape in SHAPES.items()}
    return {
        module: sum((w * each.get(module, zero[module]) for w, each in zip(weights, updates, strict=True)), zero[module])
        for module in SHAPES
    }


def made_products(folder: str = "made") -> tuple[Products, dict[str, Any]]:
    """Returns the updates of an adapter that was written, as PEFT reads it."""
    settings = json.loads((Path(folder) / "adapter_config.json").read_text())
    lora = load_file(f"{folder}/adapter_model.safetensors")
    plain = {name.removeprefix("base_model.model."): tensor for name, tensor in lora.items()}
    found = {}
    for module in settings["target_modules"]:
        rank = settings["rank_pattern"].get(module, settings["r"])
        scale = settings["alpha_pattern"].get(module, settings["lora_alpha"]) / rank
        found[module] = scale * (table_of(plain) if module == TABLE else double(plain, module))
    return found, settings


def close(found: Products, expected: Products) -> None:
    assert found.keys() == expected.keys()
    for module, update in expected.items():
        torch.testing.assert_close(found[module], update, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "weights"),
    [
        ({}, (0.5, 0.5)),
        ({"weights": [3, 1]}, (0.75, 0.25)),
        ({"weights": [3, 1], "normalize": False}, (3, 1)),
        ({"method": "cat"}, (1, 1)),
        ({"method": "cat", "weights": [0.7, -0.4]}, (0.7, -0.4)),
        ({"method": "svd", "weights": [0.7, -0.4], "parameters": {"rank": 50}}, (0.7, -0.4)),
        ({"method": "task_arithmetic", "weights": [0.7, -0.4], "parameters": {"rank": 50}}, (0.7, -0.4)),
    ],
)
def test_sums_of_updates_are_exact(options: dict[str, Any], weights: tuple[float, float]) -> None:
    updates = two()
    sm.merge(["one", "other"], out="made/", **options)
    found, settings = made_products()
    close(found, weighted(updates, weights))
    assert (settings["base_model_name_or_path"], settings["task_type"], settings["use_rslora"]) == ("b", None, False)
    if options.get("method", "cat") == "cat":
        assert (settings["r"], settings["rank_pattern"]) == (6, {V: 4, TABLE: 2})


def test_svd_is_the_best_of_its_rank() -> None:
    updates = two()
    result = sm.merge(["one", "other"], out="made/", method="svd", parameters={"rank": 3})
    assert isinstance(result, sm.AdapterResult)
    best, lacking, total = {}, 0.0, 0.0
    for module, update in weighted(updates, (1, 1)).items():
        u, s, v = numpy.linalg.svd(update.numpy(), full_matrices=False)
        best[module] = torch.from_numpy((u[:, :3] * s[:3]) @ v[:3])
        lacking, total = lacking + (s[3:] ** 2).sum(), total + (s**2).sum()
    close(made_products()[0], best)
    assert result.error == pytest.approx((lacking / total) ** 0.5, rel=1e-6)


@pytest.mark.parametrize(
    ("method", "parameters"), [("ties", {"density": 0.5}), ("dare_ties", {"density": 0.5}), ("slerp", {"t": 0.3})]
)
def test_methods_see_products_and_give_what_they_give_on_a_base(method: str, parameters: dict[str, Any]) -> None:
    two()
    base = {name: torch.zeros_like(tensor).double() for name, tensor in base_tensors().items() if name != "lm_head.weight"}
    base_of(base)
    sm.merge(["one", "other"], out="made/", method=method, parameters={**parameters, "svd_rank": 50}, seed=3)
    sm.merge(["one", "other"], out="model/", base="base", method=method, parameters=parameters, seed=3)
    model = load_file("model/model.safetensors")
    close(made_products()[0], {module: model[f"{module}.weight"] for module in SHAPES})


def test_an_adapter_alone_is_cut_and_the_digest_is_one() -> None:
    two()
    seen = set()
    for workers, memory in ((1, "64MiB"), (4, "1GiB")):
        options = {"workers": workers, "memory": memory, "overwrite": True}
        sm.merge(["one"], out="made/", method="svd", parameters={"rank": 2}, **options)
        seen.add((Path("made") / "adapter_model.safetensors").read_bytes())
    assert len(seen) == 1


def test_adapters_are_found_by_a_pattern_and_their_weights_follow_them() -> None:
    updates = two()
    sm.merge("o*e*", out="made/", method="cat")
    close(made_products()[0], weighted(updates, (1, 1)))
    sm.merge(["other:0.25", "one:0.75"], out="made/", overwrite=True)
    close(made_products()[0], weighted(updates, (0.75, 0.25)))


def test_with_a_base_adapters_are_models() -> None:
    two()
    base_of(base_tensors())
    sm.merge(["one", "other"], out="a.safetensors", base="base", method="ties", parameters={"density": 0.5})
    sm.merge(["base+one", "base+other"], out="b.safetensors", base="base", method="ties", parameters={"density": 0.5})
    one, other = load_file("a.safetensors"), load_file("b.safetensors")
    assert all(torch.equal(one[name], other[name]) for name in other)
    with pytest.raises(sm.RecipeError, match="give adapters, and no `base`"):
        sm.merge(["one", "other"], out="c.safetensors", base="base", method="cat")


def test_what_is_no_product_is_refused_with_the_way_that_works() -> None:
    two()
    dora = factors(Q, 24, 16) | {f"{Q}.lora_magnitude_vector": drawn(1, 24)}
    adapter_of(dora, "dora", {"r": 4, "lora_alpha": 4, "use_dora": True})
    adapter_of(factors(Q, 24, 16), "pissa", {"r": 4, "lora_alpha": 4, "init_lora_weights": "pissa"})
    adapter_of(factors(Q, 24, 18), "larger", {"r": 4, "lora_alpha": 4})
    flat = {"lora_unet_a_b.lora_down.weight": drawn(1, 4, 16), "lora_unet_a_b.lora_up.weight": drawn(2, 24, 4)}
    adapter_of(flat, "kohya")
    for other, match in (
        ("dora", "depends on the base"),
        ("pissa", "changes the base"),
        ("kohya.safetensors", "has no name in the dialect of one"),
        ("larger", r"\[24, 16\], and that of .*\[24, 18\]"),
    ):
        with pytest.raises(sm.MismatchError, match=match):
            sm.merge(["one", other], out="made/")
    with pytest.raises(sm.RecipeError, match="no meaning for adapters alone"):
        sm.merge(["one", "other"], out="made/", on_missing="base")
    with pytest.raises(sm.RecipeError, match="rank takes"):
        sm.merge(["one", "other"], out="made/", method="svd", parameters={"rank": 0})
    with pytest.raises(sm.RecipeError, match="weights for 2 inputs"):
        sm.merge(["one", "other"], out="made/", weights=[1, 2, 3])
    assert not Path("made").exists()


def test_files_beside_an_adapter_that_are_not_in_the_output_are_told() -> None:
    two()
    result = sm.merge(["one", "other"], out="out/")
    assert not any("left out" in note for note in result.notes)
    for name in ("tokenizer.json", "chat_template.jinja", "README.md", "optimizer.pt"):
        Path("one", name).write_text("{}")
    result = sm.merge(["one", "other"], out="out/", overwrite=True)
    assert [note for note in result.notes if "left out" in note] == [
        "left out of the output, copy them if it needs them: chat_template.jinja, tokenizer.json of one"
    ]
