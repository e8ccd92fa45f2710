"""Adapters of experts, fused or one by one, on bases of both kinds."""

from __future__ import annotations

import pytest
import torch

import streammerge as sm
from adapters.arithmetic import Tensors, adapter_of, baked, base_of, change, drawn, factors, same

EXPERTS, RANK, HIDDEN, INNER = 3, 2, 8, 6


def expert_deltas(scale: float) -> tuple[Tensors, torch.Tensor, torch.Tensor]:
    """Returns factors of fused experts, and their updates of gate_up [E, 2I, H] and down [E, H, I] in float64."""
    lora = {
        "model.layers.0.mlp.experts.base_layer.lora_A.weight": drawn(1, RANK * EXPERTS, HIDDEN),
        "model.layers.0.mlp.experts.base_layer.lora_B.weight": drawn(2, 2 * INNER, RANK * EXPERTS),
        "model.layers.0.mlp.experts.lora_A.weight": drawn(3, RANK * EXPERTS, INNER),
        "model.layers.0.mlp.experts.lora_B.weight": drawn(4, HIDDEN, RANK * EXPERTS),
    }
    made = []
    for down, up in ((1, 2), (3, 4)):
        a = lora[list(lora)[down - 1]].double().view(EXPERTS, RANK, -1)
        b = lora[list(lora)[up - 1]].double().view(-1, RANK, EXPERTS)
        made.append(torch.stack([scale * b[:, :, each] @ a[each] for each in range(EXPERTS)]))
    return lora, made[0], made[1]


@pytest.mark.parametrize("order", [["gate_up_proj", "down_proj"], ["down_proj", "gate_up_proj"]])
@pytest.mark.parametrize("form", ["fused", "transposed", "separate"])
def test_parameters_of_fused_experts(form: str, order: list[str]) -> None:
    lora, both, down = expert_deltas(1.5)
    place = "model.layers.0.mlp.experts"
    stored = {"gate_up_proj": drawn(5, EXPERTS, 2 * INNER, HIDDEN), "down_proj": drawn(6, EXPERTS, HIDDEN, INNER)}
    expected = {"gate_up_proj": stored["gate_up_proj"].double() + both, "down_proj": stored["down_proj"].double() + down}
    if form == "separate":
        base, wanted = {}, {}
        for tensors, into in ((stored, base), (expected, wanted)):
            for each in range(EXPERTS):
                where = f"model.layers.0.block_sparse_moe.experts.{each}"
                into[f"{where}.w1.weight"] = tensors["gate_up_proj"][each, :INNER]
                into[f"{where}.w3.weight"] = tensors["gate_up_proj"][each, INNER:]
                into[f"{where}.w2.weight"] = tensors["down_proj"][each]
    else:
        turn = (lambda each: each.transpose(1, 2)) if form == "transposed" else (lambda each: each)
        base = {f"{place}.{name}": turn(each) for name, each in stored.items()}
        wanted = {f"{place}.{name}": turn(each) for name, each in expected.items()}
    base_of(base)
    targets = [f"mlp.experts.{each}" for each in order]
    adapter_of(lora, config={"r": RANK, "lora_alpha": 3, "target_parameters": targets})
    same(baked("base+lora"), wanted)


@pytest.mark.parametrize("order", [["gate_up_proj", "down_proj"], ["down_proj", "gate_up_proj"]])
def test_patterns_name_the_parameters_of_a_module(order: list[str]) -> None:
    """PEFT matches patterns with the name of the parameter, not with that of its module."""
    place, ranks = "model.layers.0.mlp.experts", {"gate_up_proj": 3, "down_proj": 1}
    stored = {"gate_up_proj": drawn(5, EXPERTS, 2 * INNER, HIDDEN), "down_proj": drawn(6, EXPERTS, HIDDEN, INNER)}
    lora, expected = dict[str, torch.Tensor](), dict[str, torch.Tensor]()
    for inside, scale, (name, weight) in zip(("base_layer.", ""), (2.0, 5.0), stored.items(), strict=True):
        down, up = drawn(1, ranks[name] * EXPERTS, weight.shape[2]), drawn(2, weight.shape[1], ranks[name] * EXPERTS)
        lora |= {f"{place}.{inside}lora_A.weight": down, f"{place}.{inside}lora_B.weight": up}
        a, b = down.double().view(EXPERTS, ranks[name], -1), up.double().view(-1, ranks[name], EXPERTS)
        update = torch.stack([scale * b[:, :, each] @ a[each] for each in range(EXPERTS)])
        expected[f"{place}.{name}"] = weight.double() + update
    base_of({f"{place}.{name}": each for name, each in stored.items()})
    adapter_of(
        lora,
        config={
            "r": 3,
            "lora_alpha": 6,
            "rank_pattern": {"experts.down_proj": 1},
            "alpha_pattern": {r"layers\.\d+\.mlp\.experts\.down_proj": 5},
            "target_parameters": [f"mlp.experts.{each}" for each in order],
        },
    )
    same(baked("base+lora"), expected)


@pytest.mark.parametrize("across", [False, True])
def test_factors_of_single_experts_on_fused_ones(across: bool) -> None:
    place = "model.layers.0.block_sparse_moe"
    stored = {"gate_up_proj": drawn(5, EXPERTS, 2 * INNER, HIDDEN), "down_proj": drawn(6, EXPERTS, HIDDEN, INNER)}
    lora, expected = dict[str, torch.Tensor](), {name: each.double() for name, each in stored.items()}
    ranks = {"0.w1": 2, "2.w1": 1, "1.w3": 2, "0.w2": 2}
    for number, (name, rank) in enumerate(ranks.items()):
        out, inner = (HIDDEN, INNER) if name.endswith("w2") else (INNER, HIDDEN)
        made = factors(f"{place}.experts.{name}", out, inner, rank, 10 + 2 * number)
        lora |= made
        expert, update = int(name[0]), change(made, f"{place}.experts.{name}", 4 / rank)
        if name.endswith("w2"):
            expected["down_proj"][expert] += update
        else:
            expected["gate_up_proj"][expert, slice(0, INNER) if name.endswith("w1") else slice(INNER, None)] += update
    lora |= factors(f"{place}.gate", EXPERTS, HIDDEN, 2, 50)
    expected["gate.weight"] = drawn(7, EXPERTS, HIDDEN).double() + change(lora, f"{place}.gate", 2)
    turn = (lambda each: each.transpose(1, 2)) if across else (lambda each: each)
    names = {name: f"model.layers.0.mlp.{'' if name == 'gate.weight' else 'experts.'}{name}" for name in expected}
    base = {names[name]: turn(each) for name, each in stored.items()} | {names["gate.weight"]: drawn(7, EXPERTS, HIDDEN)}
    base_of(base)
    adapter_of(lora, config={"r": 2, "lora_alpha": 4, "rank_pattern": {"experts.2.w1": 1}})
    wanted = {names[name]: each if each.dim() == 2 else turn(each) for name, each in expected.items()}
    same(baked("base+lora"), wanted)


@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("strength", ["", "0.5*"])
def test_norms_of_single_experts_on_fused_ones(across: bool, strength: str) -> None:
    """DoRA gives the rows of each expert's matrix norms, which no product of factors can."""
    place = "model.layers.0.block_sparse_moe"
    stored = {"gate_up_proj": drawn(5, EXPERTS, 2 * INNER, HIDDEN), "down_proj": drawn(6, EXPERTS, HIDDEN, INNER)}
    lora, expected = dict[str, torch.Tensor](), {name: each.double() for name, each in stored.items()}
    for number, name in enumerate(("0.w1", "2.w1", "1.w3", "0.w2")):
        out, inner = (HIDDEN, INNER) if name.endswith("w2") else (INNER, HIDDEN)
        module = f"{place}.experts.{name}"
        made = factors(module, out, inner, 2, 10 + 2 * number) | {
            f"{module}.lora_magnitude_vector": drawn(30 + number, out)
        }
        lora |= made
        rows = slice(None) if name.endswith("w2") else slice(0, INNER) if name.endswith("w1") else slice(INNER, None)
        whole = expected["down_proj" if name.endswith("w2") else "gate_up_proj"][int(name[0])]
        updated = whole[rows] + change(made, module, 2)
        normed = made[f"{module}.lora_magnitude_vector"].double()[:, None] * updated / updated.norm(dim=1, keepdim=True)
        whole[rows] += (0.5 if strength else 1.0) * (normed - whole[rows])
    turn = (lambda each: each.transpose(1, 2)) if across else (lambda each: each)
    base_of({f"model.layers.0.mlp.experts.{name}": turn(each) for name, each in stored.items()})
    adapter_of(lora, config={"r": 2, "lora_alpha": 4, "use_dora": True})
    same(
        baked(f"base+{strength}lora"), {f"model.layers.0.mlp.experts.{name}": turn(each) for name, each in expected.items()}
    )


def test_other_updates_of_single_experts_are_named() -> None:
    stored = {"gate_up_proj": drawn(5, EXPERTS, 2 * INNER, HIDDEN), "down_proj": drawn(6, EXPERTS, HIDDEN, INNER)}
    base_of({f"model.layers.0.mlp.experts.{name}": each for name, each in stored.items()})
    module = "model.layers.0.mlp.experts.0.up_proj"
    shapes = {"w1_a": (INNER, 2), "w1_b": (2, HIDDEN), "w2_a": (INNER, 2), "w2_b": (2, HIDDEN)}
    adapter_of({f"{module}.hada_{name}": drawn(1, *shape) for name, shape in shapes.items()})
    with pytest.raises(sm.MismatchError, match="updates of the kind loha of single experts"):
        baked("base+lora.safetensors")
