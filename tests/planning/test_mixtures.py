"""Mixtures of experts: names, numbers, routers, configuration, against what the definitions say."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import load_safetensors
from safetensors.torch import save_file

import streammerge as sm

LAYERS, HIDDEN, INNER, TOKENS = 2, 8, 12, 10
WORDS = ["<s>", "</s>", "red", "dog", "cat", "one", "two", "three", "four", "five"]


def make(folder: str, seed: int, kind: str = "llama", biased: bool = False) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    shapes = {"model.embed_tokens.weight": (TOKENS, HIDDEN)}
    for n in range(LAYERS):
        shapes |= {f"model.layers.{n}.self_attn.{part}_proj.weight": (HIDDEN, HIDDEN) for part in "qkvo"}
        if biased:
            shapes |= {f"model.layers.{n}.self_attn.{part}_proj.bias": (HIDDEN,) for part in "qkv"}
        shapes |= {f"model.layers.{n}.mlp.{part}_proj.weight": (INNER, HIDDEN) for part in ("gate", "up")}
        shapes[f"model.layers.{n}.mlp.down_proj.weight"] = (HIDDEN, INNER)
        shapes[f"model.layers.{n}.input_layernorm.weight"] = (HIDDEN,)
    shapes |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (TOKENS, HIDDEN)}
    made = {name: torch.randn(shape, generator=draw).to(torch.bfloat16) for name, shape in shapes.items()}
    Path(folder).mkdir()
    save_file(made, f"{folder}/model.safetensors", metadata={"format": "pt"})
    config = {"architectures": ["X"], "model_type": kind, "num_hidden_layers": LAYERS, "intermediate_size": INNER}
    Path(folder, "config.json").write_text(json.dumps({**config, "hidden_size": HIDDEN, "dtype": "bfloat16"}))
    model = {"type": "WordLevel", "vocab": {word: n for n, word in enumerate(WORDS)}, "unk_token": "</s>"}
    added = [{"id": 0, "content": "<s>", "special": True, "single_word": False, "lstrip": False, "rstrip": False,
              "normalized": False}]  # fmt: skip
    tokenizer = {"version": "1.0", "added_tokens": added, "model": model, "pre_tokenizer": {"type": "Whitespace"}}
    Path(folder, "tokenizer.json").write_text(json.dumps(tokenizer))
    Path(folder, "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>"}))
    return made


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, torch.Tensor]]:
    monkeypatch.chdir(tmp_path)
    return [make(f"m{n}", n) for n in range(3)]


def recipe(**keys: Any) -> dict[str, Any]:
    experts = [{"source_model": "m1", "positive_prompts": ["red dog"]}, {"source_model": "m2", "positive_prompts": ["cat"]}]
    return {"base_model": "m0", "experts": experts, "gate_mode": "random", **keys}


def built(asked: dict[str, Any], out: str = "out/", **more: Any) -> dict[str, torch.Tensor]:
    sm.merge(recipe=asked, out=out, **more)
    return load_safetensors(f"{out}model.safetensors")


def test_mixtral_has_the_names_of_its_own_checkpoints(models: list[dict[str, torch.Tensor]]) -> None:
    made = built(recipe())
    want = {name: tensor for name, tensor in models[0].items() if ".mlp." not in name}
    for n in range(LAYERS):
        for e in (0, 1):
            for old, new in (("gate", "w1"), ("up", "w3"), ("down", "w2")):
                name = f"model.layers.{n}.block_sparse_moe.experts.{e}.{new}.weight"
                want[name] = models[e + 1][f"model.layers.{n}.mlp.{old}_proj.weight"]
    gates = {name: made.pop(name) for name in list(made) if "block_sparse_moe.gate" in name}
    assert sorted(made) == sorted(want)
    assert all(torch.equal(made[name], want[name]) for name in want)
    assert {tuple(gate.shape) for gate in gates.values()} == {(2, HIDDEN)}
    assert len({gate.float().sum().item() for gate in gates.values()}) == LAYERS
    config = json.loads(Path("out/config.json").read_text())
    assert (config["architectures"], config["model_type"]) == (["MixtralForCausalLM"], "mixtral")
    assert (config["num_local_experts"], config["num_experts_per_tok"]) == (2, 2)
    assert Path("out/tokenizer.json").read_bytes() == Path("m0/tokenizer.json").read_bytes()
    assert sm.verify("out/")


@pytest.mark.parametrize(("kind", "block"), [("llama", "block_sparse_moe"), ("qwen3", "mlp")])
def test_experts_are_fused_on_demand(kind: str, block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As mergekit 0.1.5 writes them: gate above up. Nothing else differs from the mixture with separate experts."""
    monkeypatch.chdir(tmp_path)
    models = [make(f"m{n}", n, kind) for n in range(3)]
    noisy = recipe()
    noisy["experts"][0] |= {"noise_scale": 0.1, "residual_scale": 0.5}
    separate, fused = built(noisy), built({**noisy, "fused_experts": True}, "fused/")
    parts = ("w1", "w3", "w2") if kind == "llama" else ("gate_proj", "up_proj", "down_proj")
    for n in range(LAYERS):
        old, new = f"model.layers.{n}.{block}.", f"model.layers.{n}.mlp."
        each = [[separate.pop(f"{old}experts.{e}.{part}.weight") for part in parts] for e in (0, 1)]
        both, down = fused.pop(f"{new}experts.gate_up_proj"), fused.pop(f"{new}experts.down_proj")
        assert (both.shape, down.shape) == ((2, 2 * INNER, HIDDEN), (2, HIDDEN, INNER))
        for e, (gate, up, back) in enumerate(each):
            if e:  # noise is drawn by the name of a tensor
                assert torch.equal(both[e], torch.cat((gate, up)))
                assert torch.equal(down[e], back)
        moved, router = separate.pop(f"{old}gate.weight"), fused.pop(f"{new}gate.weight")
        assert (moved.shape, moved.dtype) == (router.shape, router.dtype)
    assert separate.keys() == fused.keys()
    assert all(torch.equal(fused[name], tensor) for name, tensor in separate.items())
    assert Path("out/config.json").read_text() == Path("fused/config.json").read_text()
    assert torch.equal(models[0]["lm_head.weight"], fused["lm_head.weight"])
    assert sm.verify("fused/", sample=1.0)


def test_programs_without_fused_experts_are_told(models: list[dict[str, torch.Tensor]]) -> None:
    for asked in ({"architecture": "deepseek"}, {"architecture": "qwen", "shared_experts": [{"source_model": "m0"}]}):
        with pytest.raises(sm.RecipeError, match="leave fused_experts out"):
            sm.plan(recipe=recipe(fused_experts=True, **asked))


def test_qwen2_has_a_shared_expert_and_biases(models: list[dict[str, torch.Tensor]]) -> None:
    made = built(recipe(architecture="qwen", shared_experts=[{"source_model": "m0"}], experts_per_token=1))
    assert torch.equal(
        made["model.layers.1.mlp.shared_expert.up_proj.weight"], models[0]["model.layers.1.mlp.up_proj.weight"]
    )
    assert torch.equal(
        made["model.layers.1.mlp.experts.1.down_proj.weight"], models[2]["model.layers.1.mlp.down_proj.weight"]
    )
    assert made["model.layers.0.mlp.shared_expert_gate.weight"].shape == (1, HIDDEN)
    assert made["model.layers.0.self_attn.q_proj.bias"].count_nonzero() == 0
    config = json.loads(Path("out/config.json").read_text())
    assert (config["num_experts"], config["shared_expert_intermediate_size"]) == (2, INNER)
    assert config["num_experts_per_tok"] == 1


def test_deepseek_and_qwen3(models: list[dict[str, torch.Tensor]]) -> None:
    made = built(recipe(architecture="deepseek", shared_experts=[{"source_model": "m2"}]))
    assert torch.equal(
        made["model.layers.0.mlp.shared_experts.up_proj.weight"], models[2]["model.layers.0.mlp.up_proj.weight"]
    )
    config = json.loads(Path("out/config.json").read_text())
    assert (config["n_routed_experts"], config["n_shared_experts"], config["num_experts_per_tok"]) == (2, 1, 2)
    for number in range(3):
        make(f"q{number}", 10 + number, "qwen3")
    asked = {"base_model": "q0", "experts": [{"source_model": "q1"}, {"source_model": "q2"}], "gate_mode": "uniform_random"}
    gate = built(asked, "three/")["model.layers.0.mlp.gate.weight"].float()
    assert gate.abs().max() <= HIDDEN**-0.5
    assert json.loads(Path("three/config.json").read_text())["model_type"] == "qwen3_moe"


def test_noise_comes_before_the_residual_scale(models: list[dict[str, torch.Tensor]]) -> None:
    asked = recipe(dtype="float32", seed=4)
    asked["experts"][0] |= {"noise_scale": 0.1, "residual_scale": 0.5}
    made = built(asked)
    whole = []
    for n in range(LAYERS):
        for old, new, scale in (("gate", "w1", 1.0), ("up", "w3", 1.0), ("down", "w2", 0.5)):
            ours = made[f"model.layers.{n}.block_sparse_moe.experts.0.{new}.weight"]
            theirs = models[1][f"model.layers.{n}.mlp.{old}_proj.weight"].float()
            whole.append((ours / scale - theirs).flatten())
    noise = torch.cat(whole)
    assert abs(noise.std() - 0.1) < 0.1 * 4 / math.sqrt(2 * noise.numel())
    assert abs(noise.mean()) < 0.1 * 4 / math.sqrt(noise.numel())
    assert noise.unique().numel() == noise.numel()
    again = built(asked, "again/", workers=1, memory="100MiB")
    assert all(torch.equal(made[name], again[name]) for name in made)
    other = built({**asked, "seed": 5}, "other/")
    name = "model.layers.0.block_sparse_moe.experts.0.w1.weight"
    assert not torch.equal(other[name], made[name])


def test_cheap_embed_is_the_direction_of_the_prompts(models: list[dict[str, torch.Tensor]]) -> None:
    pytest.importorskip("tokenizers")
    asked = recipe(gate_mode="cheap_embed")
    asked["experts"][1]["negative_prompts"] = ["two three"]
    made = built(asked)
    rows = models[0]["model.embed_tokens.weight"].double()

    def unit(vector: torch.Tensor) -> torch.Tensor:
        return vector / vector.norm()

    first = unit(rows[[0, 2, 3]].sum(0))
    second = unit(unit(rows[[0, 4]].sum(0)) - unit(rows[[0, 6, 7]].sum(0)))
    want = torch.stack([first, second]).to(torch.bfloat16)
    for n in range(LAYERS):
        assert torch.equal(made[f"model.layers.{n}.block_sparse_moe.gate.weight"], want)


def test_routers_from_a_file(models: list[dict[str, torch.Tensor]]) -> None:
    gates = torch.randn(LAYERS, 2, HIDDEN)
    save_file({"gates": gates}, "gates.safetensors")
    asked = recipe(gate_mode="hidden", gate_file="gates.safetensors")
    made = built(asked)
    for n in range(LAYERS):
        assert torch.equal(made[f"model.layers.{n}.block_sparse_moe.gate.weight"], gates[n].to(torch.bfloat16))
    save_file({"gates": gates[:1]}, "few.safetensors")
    with pytest.raises(sm.MismatchError, match=r"here \[2, 2, 8\]; the file has .* \[1, 2, 8\]"):
        sm.plan(recipe={**asked, "gate_file": "few.safetensors"})


def test_an_expert_may_be_a_merge_and_the_mixture_a_model(models: list[dict[str, torch.Tensor]]) -> None:
    stage = {"merge_method": "linear", "models": ["m1", "m2"]}
    asked = recipe(stages={"half": stage})
    asked["experts"][0]["source_model"] = "half"
    made = built(asked)
    want = (models[1]["model.layers.0.mlp.up_proj.weight"].double() + models[2]["model.layers.0.mlp.up_proj.weight"]) / 2
    assert torch.equal(made["model.layers.0.block_sparse_moe.experts.0.w3.weight"], want.to(torch.bfloat16))
    outer = {"merge_method": "linear", "models": ["one", "two"], "stages": {"one": recipe(), "two": recipe(seed=1)}}
    sm.merge(recipe=outer, out="both/")
    assert json.loads(Path("both/config.json").read_text())["num_local_experts"] == 2


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"gate_mode": "hidden"}, "gate_mode hidden needs a run of the base model"),
        ({"gate_mode": "hidden_avg"}, "take one of random, uniform_random, cheap_embed"),
        ({"gate_mode": "hiden"}, "gate_mode takes one of"),
        ({"experts_per_token": 3}, "3 experts per token are more than the 2 experts"),
        ({"base_model": None}, "needs base_model"),
        ({"architecture": "qwen"}, "no mixture is made of llama models with 0 shared experts"),
        ({"architecture": "gpt"}, "architecture takes one of"),
        ({"models": ["m1"]}, "a mixture of experts has no models"),
        (
            {"experts": [{"source_model": "m1"}, {"source_model": "m2"}], "gate_mode": "cheap_embed"},
            "needs positive_prompts",
        ),
    ],
)
def test_mistakes(models: list[dict[str, torch.Tensor]], keys: dict[str, Any], said: str) -> None:
    with pytest.raises(sm.RecipeError, match=said):
        sm.plan(recipe=recipe(**keys))


def test_experts_of_other_shapes_are_named(models: list[dict[str, torch.Tensor]]) -> None:
    lost = {name: tensor for name, tensor in models[2].items() if "layers.1.mlp.up" not in name}
    save_file(lost, "m2/model.safetensors")
    with pytest.raises(sm.MismatchError, match=r"m2 has no tensor model.layers.1.mlp.up_proj.weight"):
        sm.plan(recipe=recipe())
