"""Experts that one checkpoint fuses and another does not: every form against every other, against torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import load_safetensors, mean, octets
from safetensors.torch import save_file

import streammerge as sm

Tensors = dict[str, torch.Tensor]
COUNT, HIDDEN, INNER, LAYERS = 4, 6, 10, 3


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def experts(seed: int, hidden: int = HIDDEN, inner: int = INNER) -> Tensors:
    """The matrices of all experts of a layer, by role."""
    make = torch.Generator().manual_seed(seed)
    shapes = {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
    return {role: torch.randn(COUNT, *shape, generator=make) for role, shape in shapes.items()}


def mixtral(of: Tensors, layer: int) -> Tensors:
    words = {"gate": "w1", "down": "w2", "up": "w3"}
    made = {f"experts.{n}.{words[r]}.weight": m[n] for r, m in of.items() for n in range(COUNT)}
    return {f"model.layers.{layer}.block_sparse_moe.{name}": tensor for name, tensor in made.items()}


def qwen(of: Tensors, layer: int) -> Tensors:
    return {f"model.layers.{layer}.mlp.experts.{n}.{r}_proj.weight": m[n] for r, m in of.items() for n in range(COUNT)}


def fused(of: Tensors, layer: int) -> Tensors:
    both = torch.cat([of["gate"], of["up"]], 1)
    return {f"model.layers.{layer}.mlp.experts.{n}": t for n, t in (("gate_up_proj", both), ("down_proj", of["down"]))}


def llama4(of: Tensors, layer: int) -> Tensors:
    made = {name.replace("mlp", "feed_forward"): t.transpose(1, 2) for name, t in fused(of, layer).items()}
    return {f"language_{name}": tensor.contiguous() for name, tensor in made.items()}


def stacked(of: Tensors, layer: int) -> Tensors:
    return {f"model.layers.{layer}.mlp.switch_mlp.{role}_proj.weight": tensor for role, tensor in of.items()}


FORMS = [mixtral, qwen, fused, llama4, stacked]
SEPARATE = {mixtral, qwen}
Form = Callable[[Tensors, int], Tensors]


def checkpoint(form: Form, layers: list[Tensors], seed: int) -> Tensors:
    """With a router beside the experts, and a norm."""
    made = {}
    for number, of in enumerate(layers):
        tensors = form(of, number)
        place = next(iter(tensors)).split(".experts")[0].split(".switch_mlp")[0]
        router = torch.randn(COUNT, HIDDEN, generator=torch.Generator().manual_seed(seed + number))
        made |= tensors | {f"{place}.gate.weight": router}
    return {name: tensor.clone() for name, tensor in made.items()} | {"model.norm.weight": torch.ones(HIDDEN) * seed}


@pytest.mark.parametrize("first", FORMS)
@pytest.mark.parametrize("second", FORMS)
def test_every_form_as_every_other(first: Form, second: Form) -> None:
    if first is second or not {first, second} & SEPARATE:
        pytest.skip("the same, or both fused")
    one, two = ([experts(10 * seed + layer) for layer in range(LAYERS)] for seed in (1, 2))
    save_file(checkpoint(first, one, 5), "a.safetensors")
    save_file(checkpoint(second, two, 7), "b.safetensors")
    result = sm.merge(["a.safetensors", "b.safetensors"], "out.safetensors")
    merged = [{role: (a[role] + b[role].double()).div(2).float() for role in a} for a, b in zip(one, two, strict=True)]
    expected, out = checkpoint(first, merged, 5), load_safetensors(Path("out.safetensors"))
    assert out.keys() == expected.keys()
    for name, tensor in expected.items():
        if "experts" in name or "switch_mlp" in name:
            assert octets(out[name]) == octets(tensor), name
    routers = [checkpoint(form, [], seed) for form, seed in ((first, 5), (second, 7))]
    assert octets(out["model.norm.weight"]) == octets(mean([r["model.norm.weight"] for r in routers], [1, 1]))
    assert any(f"experts in {LAYERS} layers are read as" in note for note in result.plan.notes)


def test_square_experts_are_not_guessed() -> None:
    square = [experts(seed, 8, 8) for seed in (1, 2)]
    save_file({n: t.clone() for n, t in qwen(square[0], 0).items()}, "a.safetensors")
    save_file({n: t.clone() for n, t in stacked(square[1], 0).items()}, "b.safetensors")
    for order in (["a.safetensors", "b.safetensors"], ["b.safetensors", "a.safetensors"]):
        with pytest.raises(sm.MismatchError, match=r"experts in model\.layers\.0\.mlp are square"):
            sm.plan(order)
    save_file({n: t.clone() for n, t in fused(square[1], 0).items()}, "b.safetensors")
    assert sm.plan(["a.safetensors", "b.safetensors"]), "gate and up in one are not square"


@pytest.mark.parametrize("change", ["bias", "an expert more", "another size", "a missing matrix"])
def test_what_does_not_fit_is_told_as_fused(change: str) -> None:
    one, two = qwen(experts(1), 0), fused(experts(2), 0)
    if change == "bias":  # gate and up alternate in GPT-OSS, which has biases
        two["model.layers.0.mlp.experts.gate_up_proj_bias"] = torch.ones(COUNT, 2 * INNER)
    elif change == "an expert more":
        one |= {name.replace(".0.gate", ".4.gate"): t for name, t in one.items() if "experts.0" in name}
        one |= {n.replace("experts.0.", f"experts.{COUNT}."): t for n, t in list(one.items()) if "experts.0." in n}
    elif change == "another size":
        one = qwen(experts(1, HIDDEN, INNER + 1), 0)
    else:
        del one["model.layers.0.mlp.experts.2.up_proj.weight"]
    for name, tensors in (("a", one), ("b", two)):
        save_file({n: t.clone() for n, t in tensors.items()}, f"{name}.safetensors")
    with pytest.raises(sm.MismatchError, match=r"this looks like fused experts in b\.safetensors"):
        sm.plan(["a.safetensors", "b.safetensors"])


def test_a_rule_copies_fused_experts_in_the_firsts_form() -> None:
    save_file({n: t.clone() for n, t in qwen(experts(1), 0).items()}, "a.safetensors")
    two = experts(2)
    save_file({n: t.clone() for n, t in fused(two, 0).items()}, "b.safetensors")
    rules = [{"match": "*.experts.1.*", "copy": "b.safetensors"}]
    models = [{"model": "a.safetensors"}, {"model": "b.safetensors"}]
    sm.merge(recipe={"merge_method": "linear", "models": models, "rules": rules}, out="out.safetensors")
    out = load_safetensors(Path("out.safetensors"))
    assert octets(out["model.layers.0.mlp.experts.1.up_proj.weight"]) == octets(two["up"][1])


@pytest.mark.parametrize("form", FORMS)
def test_methods_that_look_at_whole_tensors_say_what_one_is(form: Form) -> None:
    layers = [experts(layer) for layer in range(LAYERS)]
    for seed, name in enumerate(("a", "b")):
        save_file(checkpoint(form, layers, seed), f"{name}.safetensors")
    for method, parameters in (("slerp", {"t": 0.5}), ("linear", {})):
        base = {"base": "a.safetensors"} if method == "slerp" else {}
        notes = sm.plan(["a.safetensors", "b.safetensors"], method=method, parameters=parameters, **base).notes
        said = [note for note in notes if "all experts of a layer count as one tensor" in note]
        assert len(said) == (method == "slerp" and form not in SEPARATE)
