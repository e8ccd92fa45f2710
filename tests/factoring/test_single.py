"""An adapter as one file, in the dialect of the first: loaders compute the updates of the inputs, summed in float64."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import streammerge as sm
from adapters.arithmetic import Tensor, drawn
from adapters.test_updates import CASES, MANGLED
from adapters.test_updates import made as one_case

SHAPES = {"query": (12, 10), "kernel": (6, 4, 3, 3), "text": (8, 8)}
NAMES = {
    "kohya": (
        "lora_unet_down_blocks_0_attentions_0_to_q",
        "lora_unet_down_blocks_0_resnets_0_conv1",
        "lora_te_layers_0_fc1",
    ),
    "sdxl": ("lora_unet_input_blocks_1_1_to_q", "lora_unet_input_blocks_1_0_in_layers_2", "lora_te1_layers_0_fc1"),
    "diffusers": (
        "unet.down_blocks.0.attentions.0.to_q",
        "unet.down_blocks.0.resnets.0.conv1",
        "text_encoder.layers.0.fc1",
    ),
    "earlier": ("unet.down_blocks.0.attentions.0.to_q", "unet.down_blocks.0.resnets.0.conv1", "text_encoder.layers.0.fc1"),
}
ENDS = {"diffusers": (".lora_A.weight", ".lora_B.weight"), "earlier": (".lora.down.weight", ".lora.up.weight")}
FLAT = (".lora_down.weight", ".lora_up.weight")
Updates = dict[str, Tensor]


def written(
    file: str,
    dialect: str,
    rank: int,
    alpha: float = 0.0,
    labels: Sequence[str] = tuple(SHAPES),
    dtype: torch.dtype = torch.float16,
    metadata: Mapping[str, str] | None = None,
) -> str:
    tensors = {}
    down, up = ENDS.get(dialect, FLAT)
    for seed, (label, name) in enumerate(zip(SHAPES, NAMES[dialect], strict=True)):
        if label in labels:
            out, inner, *kernel = SHAPES[label]
            tensors[name + down] = drawn(seed + rank, rank, inner, *kernel, dtype=dtype)
            tensors[name + up] = drawn(seed + rank + 9, out, rank, *(1 for _ in kernel), dtype=dtype)
            if alpha:
                tensors[f"{name}.alpha"] = torch.tensor(alpha, dtype=dtype)
    save_file(tensors, file, dict(metadata or {}))
    return file


def updates(file: str) -> Updates:
    """Returns the updates as loaders compute them: alpha by rank, 1 without alphas."""
    tensors, found = load_file(file), {}
    for dialect, names in NAMES.items():
        down, up = ENDS.get(dialect, FLAT)
        for label, name in zip(SHAPES, names, strict=True):
            if name + down in tensors:
                one, other = tensors[name + up].double(), tensors[name + down].double()
                scale = float(tensors[f"{name}.alpha"]) / len(other) if f"{name}.alpha" in tensors else 1.0
                found[label] = scale * (one.flatten(1) @ other.flatten(1)).view(SHAPES[label])
    return found


def close(found: Updates, inputs: Sequence[Updates], weights: Sequence[float], share: float) -> None:
    every = {label for each in inputs for label in each}
    assert found.keys() == every
    for label in every:
        zero = torch.zeros(SHAPES[label], dtype=torch.float64)
        expected = sum((w * each.get(label, zero) for w, each in zip(weights, inputs, strict=True)), zero)
        assert (found[label] - expected).norm() <= share * expected.norm(), label


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("kohya", "kohya"),
        ("kohya", "diffusers"),
        ("diffusers", "kohya"),
        ("diffusers", "earlier"),
        ("earlier", "sdxl"),
        ("sdxl", "kohya"),
        ("sdxl", "diffusers"),
    ],
)
def test_the_sum_of_updates_in_the_dialect_of_the_first(first: str, second: str) -> None:
    has_alphas = first in ("kohya", "sdxl")
    one = written("one.safetensors", first, 4, 2.0 if has_alphas else 0.0)
    other = written("other.safetensors", second, 3, 6.0 if second in ("kohya", "sdxl") else 0.0, ("text", "kernel"))
    sm.merge([one, other], out="made.safetensors", weights=[3, 1])
    made = load_file("made.safetensors")
    assert made.keys() == load_file(one).keys()
    assert {tensor.dtype for name, tensor in made.items() if not name.endswith(".alpha")} == {torch.float16}
    close(updates("made.safetensors"), [updates(one), updates(other)], (0.75, 0.25), 5e-4)
    sm.merge([one, other], out="made.safetensors", weights=[3, 1], dtype="float32", overwrite=True)
    close(updates("made.safetensors"), [updates(one), updates(other)], (0.75, 0.25), 1e-7)


def test_updates_are_the_products_of_stacked_factors() -> None:
    """Also for a program that forgets the alpha. Half of a half is exact."""
    one, other = written("one.safetensors", "kohya", 4, 2.0), written("other.safetensors", "kohya", 6, 3.0)
    sm.merge([one, other], out="made.safetensors")
    inputs, made = [load_file(one), load_file(other)], load_file("made.safetensors")
    for name in NAMES["kohya"]:
        for part, axis in zip(FLAT, (0, 1), strict=True):
            stacked = torch.cat([each[name + part] for each in inputs], axis)
            assert torch.equal(made[name + part], stacked if axis else stacked / 4)
        assert made[f"{name}.alpha"] == 10
        assert made[f"{name}.alpha"].dtype == torch.float16


@pytest.mark.parametrize(
    ("options", "weights", "share"),
    [
        ({"method": "cat", "weights": [0.7, -0.4]}, (0.7, -0.4), 1e-3),
        ({"method": "svd", "weights": [0.7, -0.4], "parameters": {"rank": 50}}, (0.7, -0.4), 1e-3),
        ({"parameters": {"energy": 1.0}}, (0.5, 0.5), 1e-3),
        ({"method": "task_arithmetic", "parameters": {"rank": 50}}, (1, 1), 1e-3),
        ({"method": "svd", "parameters": {"energy": "90%"}}, (1, 1), 0.33),
    ],
)
def test_weights_methods_and_ranks(options: dict[str, Any], weights: tuple[float, float], share: float) -> None:
    one, other = (
        written("one.safetensors", "kohya", 4, 2.0),
        written("other.safetensors", "kohya", 2, 8.0, ("query", "text")),
    )
    sm.merge([one, other], out="made.safetensors", **options)
    close(updates("made.safetensors"), [updates(one), updates(other)], weights, share)
    alphas = {float(each) for name, each in load_file("made.safetensors").items() if name.endswith(".alpha")}
    assert len(alphas) == 1  # diffusers mistakes others
    assert sm.verify("made.safetensors", sample="100%").recomputed
    sm.merge(recipe=json.loads(sm.inspect("made.safetensors").metadata["streammerge"]), out="again.safetensors")
    assert Path("again.safetensors").read_bytes() == Path("made.safetensors").read_bytes()


@pytest.mark.parametrize("case", [name for name in CASES if not name.startswith("a ")])
def test_every_kind_of_update_becomes_two_factors(case: str) -> None:
    _, tensors, delta = one_case(case)
    save_file({name: each.contiguous() for name, each in tensors.items()}, "one.safetensors")
    plain = case.startswith(("LoCon", "DyLoRA")) or case == "LoRA"
    options = {} if plain else {"method": "svd", "parameters": {"rank": 64}}
    if not plain:
        with pytest.raises(sm.MismatchError, match="give the parameter rank"):
            sm.merge(["one.safetensors"], out="made.safetensors")
    sm.merge(["one.safetensors"], out="made.safetensors", **options)
    made = load_file("made.safetensors")
    up, down = made[MANGLED + FLAT[1]].double(), made[MANGLED + FLAT[0]].double()
    assert made.keys() == {MANGLED + each for each in (*FLAT, *([".alpha"] if f"{MANGLED}.alpha" in tensors else []))}
    scale = float(made.get(f"{MANGLED}.alpha", len(down))) / len(down)
    found = scale * up.flatten(1) @ down.flatten(1)
    torch.testing.assert_close(found, delta.flatten(1), rtol=1e-5, atol=1e-5)
    if "Tucker" in case or case == "LoCon":  # the others do not tell the kernel
        assert down.shape[2:] == delta.shape[2:]


def test_kernels_are_known_by_another_adapter_or_by_the_name() -> None:
    name = NAMES["kohya"][1]
    loha = {
        f"{name}.hada_w{number}_{side}": drawn(number, *((6, 2) if side == "a" else (2, 36)))
        for number in (1, 2)
        for side in "ab"
    }
    save_file(loha | {f"{name}.alpha": torch.tensor(2.0)}, "loha.safetensors")
    other = written("other.safetensors", "kohya", 2, 2.0, ("kernel",))
    product = (loha[f"{name}.hada_w1_a"] @ loha[f"{name}.hada_w1_b"]) * (
        loha[f"{name}.hada_w2_a"] @ loha[f"{name}.hada_w2_b"]
    )
    for inputs, expected in ((["loha.safetensors"], [{}]), (["loha.safetensors", other], [{}, updates(other)])):
        sm.merge(inputs, out="made.safetensors", method="svd", parameters={"rank": 6}, overwrite=True)
        expected[0] = {"kernel": product.double().view(SHAPES["kernel"])}
        close(updates("made.safetensors"), expected, [1] * len(inputs), 1e-5)


def test_metadata_say_what_the_merge_is() -> None:
    theirs = {
        "ss_network_module": "lycoris.kohya",
        "ss_network_dim": "4",
        "ss_network_alpha": "2",
        "ss_network_args": '{"algo": "lora"}',
        "ss_base_model_version": "sd_v1",
        "ss_tag_frequency": "{}",
        "sshs_model_hash": "0f",
        "ss_clip_skip": "2",
        "trigger": "word",
    }
    one = written("one.safetensors", "kohya", 4, 2.0, metadata=theirs)
    more = {"ss_clip_skip": "2", "ss_base_model_version": "sd_v2"}
    other = written("other.safetensors", "kohya", 2, 1.0, ("query",), metadata=more)
    result = sm.merge([one, other], out="made.safetensors", method="cat")
    found = sm.inspect("made.safetensors").metadata
    said = {key: value for key, value in found.items() if not key.startswith("streammerge")}
    assert said == {
        "ss_network_module": "networks.lora",
        "ss_network_dim": "Dynamic",
        "ss_network_alpha": "4",
        "ss_network_args": '{"conv_dim": "4", "conv_alpha": "4"}',
        "ss_base_model_version": "sd_v1",
        "ss_clip_skip": "2",
        "trigger": "word",
        "format": "pt",
    }
    assert "'ss_base_model_version' differs: sd_v1 in one.safetensors, sd_v2 in other.safetensors" in result.warnings[0]


def test_configurations_in_metadata_tell_ranks_of_the_merge() -> None:
    config = {"unet.r": 4, "unet.lora_alpha": 8, "text_encoder.r": 4, "text_encoder.lora_alpha": 2}
    one = written("one.safetensors", "diffusers", 4, metadata={"lora_adapter_metadata": json.dumps(config)})
    other = written("other.safetensors", "diffusers", 2, 0.0, ("query",))
    sm.merge([one, other], out="made.safetensors", method="cat")
    scaled = updates(one)
    scales = {"query": 2.0, "kernel": 2.0, "text": 0.5}
    close(updates("made.safetensors"), [{k: scales[k] * v for k, v in scaled.items()}, updates(other)], (1, 1), 1e-3)
    said = json.loads(sm.inspect("made.safetensors").metadata["lora_adapter_metadata"])
    assert (said["unet.r"], said["unet.lora_alpha"], said["text_encoder.r"], said["text_encoder.lora_alpha"]) == (
        6,
        6,
        4,
        4,
    )
    assert said["unet.rank_pattern"] == said["unet.alpha_pattern"] == {"down_blocks.0.resnets.0.conv1": 4}
    again = sm.merge(["made.safetensors"], out="again.safetensors", method="cat")
    assert not again.warnings
    close(updates("again.safetensors"), [updates("made.safetensors")], (1,), 1e-3)


def test_the_form_follows_the_name_of_the_output() -> None:
    one, other = written("one.safetensors", "diffusers", 4), written("other.safetensors", "kohya", 2, 2.0)
    sm.merge([one, other], out="folder/")
    settings = json.loads(Path("folder/adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"]) == (6, 6)
    plan = sm.plan([one, other])
    assert plan.to_json()["files"][0]["name"] == ""
    assert "in one file, like one.safetensors" in str(plan)
    for inputs, out, error, match in (
        ([other, one], "flat/", sm.MismatchError, "give the output a name that ends in .safetensors"),
        ([one, other], "made.pt", sm.RecipeError, "written as .safetensors"),
        ([one, other], "one.safetensors", sm.FormatError, "one of the inputs"),
        (["folder", one], "made.safetensors", sm.RecipeError, "an adapter is a folder with its configuration"),
    ):
        with pytest.raises(error, match=match):
            sm.merge(inputs, out=out, overwrite=True)


def test_an_update_that_needs_its_base_is_refused_by_its_reason() -> None:
    name = NAMES["kohya"][0]
    one = load_file(written("one.safetensors", "kohya", 4, 2.0, ("query",)))
    for more, match in (
        ({f"{name}.dora_scale": drawn(1, 12, 1)}, r"depends on the base \(DoRA\)"),
        ({f"{name}.diff_b": drawn(1, 12)}, "that of a bias"),
        ({"lora_unet_norm.w_norm": drawn(1, 12)}, "a vector"),
    ):
        save_file(one | more, "other.safetensors")
        with pytest.raises(sm.MismatchError, match=match):
            sm.merge(["one.safetensors", "other.safetensors"], out="made.safetensors")
    save_file({**one, name + FLAT[0]: torch.full((4, 10), torch.nan)}, "other.safetensors")
    with pytest.raises(sm.MismatchError, match=rf"{name}.lora_down.weight of other.safetensors has NaN or infinity"):
        sm.merge(["one.safetensors", "other.safetensors"], out="made.safetensors")
    without = written("without.safetensors", "diffusers", 4)
    with pytest.raises(sm.MismatchError, match="too large for float16"):
        sm.merge([without], out="made.safetensors", method="cat", weights=[1e8])
