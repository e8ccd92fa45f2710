"""The formulas of Kohya's, LyCORIS' and ComfyUI's factors, against the same in float64."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import streammerge as sm
from adapters.arithmetic import Tensor, Tensors, adapter_of, baked, base_of, drawn, same

PLACE = "down_blocks.0.attentions.0.to_q"
MANGLED = "lora_unet_down_blocks_0_attentions_0_to_q"
Delta = Callable[[dict[str, Tensor]], Tensor]


def _loha(f: dict[str, Tensor]) -> Tensor:
    return (f["hada_w1_a"] @ f["hada_w1_b"].flatten(1)) * (f["hada_w2_a"] @ f["hada_w2_b"].flatten(1))


def _tucker(t: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.einsum("ijkl,jr,ip->prkl", t, b, a)


LINEAR, CONV = (8, 6), (8, 6, 3, 3)
CASES: dict[str, tuple[tuple[int, ...], dict[str, tuple[int, ...]], float, Delta]] = {
    "LoRA": (
        LINEAR,
        {"lora_up.weight": (8, 4), "lora_down.weight": (4, 6)},
        0.5,
        lambda f: f["lora_up.weight"] @ f["lora_down.weight"],
    ),
    "LoCon": (
        CONV,
        {"lora_up.weight": (8, 4, 1, 1), "lora_down.weight": (4, 6, 3, 3)},
        0.5,
        lambda f: (f["lora_up.weight"].flatten(1) @ f["lora_down.weight"].flatten(1)).view(CONV),
    ),
    "LoCon Tucker": (
        CONV,
        {"lora_up.weight": (8, 4, 1, 1), "lora_down.weight": (4, 6, 1, 1), "lora_mid.weight": (4, 4, 3, 3)},
        0.5,
        lambda f: torch.einsum(
            "oa,abkl,bi->oikl", f["lora_up.weight"].flatten(1), f["lora_mid.weight"], f["lora_down.weight"].flatten(1)
        ),
    ),
    "DyLoRA of a convolution": (
        CONV,
        {"lora_up.weight": (8, 4), "lora_down.weight": (4, 6, 3, 3)},
        0.5,
        lambda f: (f["lora_up.weight"] @ f["lora_down.weight"].flatten(1)).view(CONV),
    ),
    "DyLoRA of a convolution, by its first versions": (
        CONV,
        {"lora_up.weight": (8, 4), "lora_down.weight": (4, 54)},
        0.5,
        lambda f: (f["lora_up.weight"] @ f["lora_down.weight"]).view(CONV),
    ),
    "a linear layer as a convolution": (
        (8, 6, 1, 1),
        {"lora_up.weight": (8, 4), "lora_down.weight": (4, 6)},
        0.5,
        lambda f: (f["lora_up.weight"] @ f["lora_down.weight"]).view(8, 6, 1, 1),
    ),
    "LoHa": (LINEAR, {"hada_w1_a": (8, 4), "hada_w1_b": (4, 6), "hada_w2_a": (8, 4), "hada_w2_b": (4, 6)}, 0.5, _loha),
    "LoHa of a convolution": (
        CONV,
        {"hada_w1_a": (8, 4), "hada_w1_b": (4, 54), "hada_w2_a": (8, 4), "hada_w2_b": (4, 54)},
        0.5,
        lambda f: _loha(f).view(CONV),
    ),
    "LoHa Tucker": (
        CONV,
        {f"hada_{n}": s for k in "12" for n, s in ((f"t{k}", (4, 4, 3, 3)), (f"w{k}_a", (4, 8)), (f"w{k}_b", (4, 6)))},
        0.5,
        lambda f: (
            _tucker(f["hada_t1"], f["hada_w1_a"], f["hada_w1_b"]) * _tucker(f["hada_t2"], f["hada_w2_a"], f["hada_w2_b"])
        ),
    ),
    "LoKr": (
        LINEAR,
        {"lokr_w1": (2, 3), "lokr_w2_a": (4, 4), "lokr_w2_b": (4, 2)},
        0.5,
        lambda f: torch.kron(f["lokr_w1"], f["lokr_w2_a"] @ f["lokr_w2_b"]),
    ),
    "LoKr whose alpha has no effect": (
        LINEAR,
        {"lokr_w1": (2, 3), "lokr_w2": (4, 2)},
        1.0,
        lambda f: torch.kron(f["lokr_w1"], f["lokr_w2"]),
    ),
    "LoKr of two products": (
        LINEAR,
        {"lokr_w1_a": (2, 4), "lokr_w1_b": (4, 3), "lokr_w2_a": (4, 4), "lokr_w2_b": (4, 2)},
        0.5,
        lambda f: torch.kron(f["lokr_w1_a"] @ f["lokr_w1_b"], f["lokr_w2_a"] @ f["lokr_w2_b"]),
    ),
    "LoKr Tucker": (
        CONV,
        {"lokr_w1": (2, 3), "lokr_t2": (4, 4, 3, 3), "lokr_w2_a": (4, 4), "lokr_w2_b": (4, 2)},
        0.5,
        lambda f: torch.kron(
            f["lokr_w1"].view(2, 3, 1, 1), _tucker(f["lokr_t2"], f["lokr_w2_a"], f["lokr_w2_b"]).contiguous()
        ),
    ),
    "a whole difference": (LINEAR, {"diff": (8, 6)}, 1.0, lambda f: f["diff"]),
}


def made(case: str, dtype: torch.dtype = torch.float32) -> tuple[Tensors, Tensors, Tensor]:
    """Returns a base, an adapter, and its update in float64."""
    shape, shapes, scale, delta = CASES[case]
    parts = {part: drawn(number + 10, *size) for number, (part, size) in enumerate(shapes.items())}
    tensors = {f"{MANGLED}.{part}": each for part, each in parts.items()}
    if "diff" not in parts:
        tensors[f"{MANGLED}.alpha"] = torch.tensor(2.0)
    base = {f"{PLACE}.weight": drawn(1, *shape, dtype=dtype), f"{PLACE}.bias": drawn(2, shape[0], dtype=dtype)}
    return base, tensors, scale * delta({part: each.double() for part, each in parts.items()})


@pytest.mark.parametrize("strength", [1.0, -0.5])
@pytest.mark.parametrize("case", CASES)
def test_every_kind_of_update(case: str, strength: float) -> None:
    base, tensors, delta = made(case)
    base_of(base)
    expected = {name: each.double() for name, each in base.items()}
    expected[f"{PLACE}.weight"] += strength * delta
    same(baked(f"base+{strength}*{adapter_of(tensors)}"), expected)


@pytest.mark.parametrize("strength", [1.0, 0.25])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("case", ["LoRA", "LoCon", "LoHa", "LoKr"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_of_lycoris(case: str, axis: int, strength: float, dtype: torch.dtype) -> None:
    """The norm is that of the updated weight, with the dtype's epsilon, as in LyCORIS."""
    base, tensors, delta = made(case, dtype)
    weight = base[f"{PLACE}.weight"].double()
    shape = [weight.shape[axis] if each == axis else 1 for each in range(weight.dim())]
    scale = drawn(50, *shape).abs()
    base_of(base)
    total, others = weight + delta, [each for each in range(weight.dim()) if each != axis]
    norm = total.pow(2).sum(others, keepdim=True).sqrt() + torch.finfo(dtype).eps
    expected = {name: each.double() for name, each in base.items()}
    expected[f"{PLACE}.weight"] += strength * (scale.double() * total / norm - weight)
    same(baked(f"base+{strength}*{adapter_of(tensors | {f'{MANGLED}.dora_scale': scale})}"), expected)


def test_biases_norms_and_replacements() -> None:
    base, tensors, delta = made("LoRA")
    base |= {"mid_block.norm.weight": drawn(3, 6), "mid_block.norm.bias": drawn(4, 6), "conv_in.weight": drawn(5, 3, 2)}
    base_of(base)
    tensors |= {
        f"{MANGLED}.diff_b": drawn(20, 8),
        "lora_unet_mid_block_norm.w_norm": drawn(21, 6),
        "lora_unet_mid_block_norm.b_norm": drawn(22, 6),
        "lora_unet_conv_in.set_weight": drawn(23, 3, 2),
    }
    expected = {name: each.double() for name, each in base.items()}
    expected[f"{PLACE}.weight"] += delta
    expected[f"{PLACE}.bias"] += drawn(20, 8).double()
    expected["mid_block.norm.weight"] += drawn(21, 6).double()
    expected["mid_block.norm.bias"] += drawn(22, 6).double()
    expected["conv_in.weight"] = drawn(23, 3, 2).double()
    same(baked(f"base+{adapter_of(tensors)}"), expected)


def test_the_part_of_a_pipeline_is_told_by_the_begin_of_a_name() -> None:
    folder = Path("pipe")
    names = ("down_blocks.0.resnets.0.conv1", "up_blocks.0.resnets.0.conv1")
    for part in ("unet", "text_encoder"):
        (folder / part).mkdir(parents=True)
        save_file(
            {f"{name}.weight": drawn(n + len(part), 8, 6) for n, name in enumerate(names)},
            folder / part / "model.safetensors",
        )
    (folder / "model_index.json").write_text('{"unet": ["a", "b"], "text_encoder": ["a", "b"]}')
    tensors, expected = dict[str, Tensor](), dict[str, Tensor]()
    for n, name in enumerate(names):
        up, down = drawn(10 + n, 8, 4), drawn(20 + n, 4, 6)
        tensors |= {f"unet.{name}.lora_A.weight": down, f"unet.{name}.lora_B.weight": up}
        expected[f"{name}.weight"] = drawn(n + len("unet"), 8, 6).double() + up.double() @ down.double()
    sm.convert(f"pipe+{adapter_of(tensors)}", "out/")
    same(load_file("out/unet/model.safetensors"), expected)


def test_a_lora_with_diffusers_names_on_an_original_stable_diffusion() -> None:
    unet = "model.diffusion_model"
    base = {
        f"{unet}.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight": drawn(1, 8, 6),
        f"{unet}.output_blocks.2.1.conv.weight": drawn(2, 8, 6, 3, 3),
        "cond_stage_model.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight": drawn(3, 8, 6),
    }
    base_of(base)
    names = (
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q",
        "lora_unet_up_blocks_0_upsamplers_0_conv",
        "lora_te_text_model_encoder_layers_0_self_attn_q_proj",
    )
    tensors, expected = dict[str, Tensor](), dict[str, Tensor]()
    for number, (name, (key, weight)) in enumerate(zip(names, base.items(), strict=True)):
        up, down = drawn(10 + number, 8, 4), drawn(20 + number, 4, *weight.shape[1:])
        wide = (1, 1) if weight.dim() == 4 else ()
        tensors |= {f"{name}.lora_up.weight": up.view(8, 4, *wide), f"{name}.lora_down.weight": down}
        expected[key] = weight.double() + (up.double() @ down.double().flatten(1)).view(weight.shape)
    same(baked(f"base+{adapter_of(tensors)}"), expected)


@pytest.mark.parametrize("dora", [False, True])
def test_parts_of_fused_projections(dora: bool) -> None:
    key = "conditioner.embedders.1.model.transformer.resblocks.2.attn.in_proj_weight"
    base = {key: drawn(1, 18, 6)}
    base_of(base)
    expected, tensors = base[key].double(), dict[str, Tensor]()
    for number, part in ((0, "q_proj"), (2, "v_proj")):
        name = f"lora_te2_text_model_encoder_layers_2_self_attn_{part}"
        up, down = drawn(10 + number, 6, 4), drawn(20 + number, 4, 6)
        tensors |= {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}
        rows = slice(6 * number, 6 * number + 6)
        expected[rows] += up.double() @ down.double()
        if dora:
            tensors[f"{name}.dora_scale"] = scale = drawn(30 + number, 6, 1)
            eps = torch.finfo(torch.float32).eps
            expected[rows] *= scale.double() / (expected[rows].pow(2).sum(1, keepdim=True).sqrt() + eps)
    same(baked(f"base+{adapter_of(tensors)}"), {key: expected})


def test_parts_of_a_fused_block_of_flux() -> None:
    key = "single_blocks.0.linear1.weight"
    base = {key: drawn(1, 18 + 24, 6)}
    base_of(base)
    expected, tensors = base[key].double(), dict[str, Tensor]()
    rows = {"attn.to_k": slice(6, 12), "proj_mlp": slice(18, 42)}
    for number, (part, place) in enumerate(rows.items()):
        up, down = drawn(10 + number, place.stop - place.start, 4), drawn(20 + number, 4, 6)
        name = f"transformer.single_transformer_blocks.0.{part}"
        tensors |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
        expected[place] += up.double() @ down.double()
    same(baked(f"base+{adapter_of(tensors)}"), {key: expected})


@pytest.mark.parametrize("dora", [False, True])
def test_a_fused_update_of_flux_on_separate_tensors(dora: bool) -> None:
    parts = {"attn.to_q": 6, "attn.to_k": 6, "attn.to_v": 6, "proj_mlp": 24}
    base = {f"single_transformer_blocks.0.{part}.weight": drawn(n, rows, 6) for n, (part, rows) in enumerate(parts.items())}
    base_of(base)
    name = "lora_unet_single_blocks_0_linear1"
    up, down, scale = drawn(10, 42, 4), drawn(11, 4, 6), drawn(12, 42, 1).abs()
    tensors = {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down} | (
        {f"{name}.dora_scale": scale} if dora else {}
    )
    whole = torch.cat(list(base.values())).double() + up.double() @ down.double()
    if dora:
        whole *= scale.double() / (whole.pow(2).sum(1, keepdim=True).sqrt() + torch.finfo(torch.float32).eps)
    expected = dict(zip(base, whole.split(list(parts.values())), strict=True))
    same(baked(f"base+{adapter_of(tensors)}"), expected)
    tensors[f"{name}.lora_up.weight"] = drawn(10, 41, 4)
    with pytest.raises(sm.MismatchError, match="which have 42 rows together"):
        sm.convert(f"base+{adapter_of(tensors, 'short')}", "out/")


@pytest.mark.parametrize("case", CASES)
def test_factors_of_other_shapes_are_errors(case: str) -> None:
    _, tensors, _ = made(case)
    base_of({f"{PLACE}.weight": drawn(1, 7, 5), f"{PLACE}.bias": drawn(2, 7)})
    with pytest.raises(sm.MismatchError, match=r"lora_unet_down_blocks_0_attentions_0_to_q\..* does not fit"):
        sm.convert(f"base+{adapter_of(tensors)}", "out/")


GLORA: dict[str, tuple[tuple[int, ...], dict[str, tuple[int, ...]], Callable[[Tensor, dict[str, Tensor]], Tensor]]] = {
    "linear": (
        (8, 6),
        {"a1": (6, 4), "a2": (4, 6), "b1": (8, 4), "b2": (4, 6)},
        lambda w, f: w @ f["a1"] @ f["a2"] + f["b1"] @ f["b2"],
    ),
    "older releases": (
        (8, 6),
        {"a1": (4, 6), "a2": (6, 4), "b1": (4, 6), "b2": (8, 4)},
        lambda w, f: w @ f["a2"] @ f["a1"] + f["b2"] @ f["b1"],
    ),
    "square": (
        (6, 6),
        {"a1": (6, 4), "a2": (4, 6), "b1": (6, 4), "b2": (4, 6)},
        lambda w, f: w @ f["a1"] @ f["a2"] + f["b1"] @ f["b2"],
    ),
    "kernels of one position": (
        (8, 6, 1, 1),
        {"a1": (6, 4, 1, 1), "a2": (4, 6, 1, 1), "b1": (8, 4, 1, 1), "b2": (4, 6, 1, 1)},
        lambda w, f: (
            w.flatten(1) @ f["a1"].flatten(1) @ f["a2"].flatten(1) + f["b1"].flatten(1) @ f["b2"].flatten(1)
        ).view(8, 6, 1, 1),
    ),
    "kernels": (
        (8, 6, 3, 3),
        {"a1": (6, 4, 1, 1), "a2": (4, 6, 1, 1), "b1": (8, 4, 1, 1), "b2": (4, 6, 3, 3)},
        lambda w, f: (
            torch.einsum("oikl,ir,rj->ojkl", w, f["a1"].flatten(1), f["a2"].flatten(1))
            + (f["b1"].flatten(1) @ f["b2"].flatten(1)).view(8, 6, 3, 3)
        ),
    ),
}


@pytest.mark.parametrize("kind", GLORA)
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_glora(kind: str, strength: float) -> None:
    """The update contains the weights of the base."""
    shape, sizes, formula = GLORA[kind]
    weight = drawn(1, *shape)
    made = {part: drawn(2 + number, *size) for number, (part, size) in enumerate(sizes.items())}
    base_of({f"{PLACE}.weight": weight})
    adapter_of({f"{MANGLED}.{part}.weight": each for part, each in made.items()} | {f"{MANGLED}.alpha": torch.tensor(2.0)})
    update = 0.5 * formula(weight.double(), {part: each.double() for part, each in made.items()})
    text = "base+lora.safetensors" if strength == 1 else f"base+{strength}*lora.safetensors"
    same(baked(text), {f"{PLACE}.weight": weight.double() + strength * update})


def test_glora_of_square_factors_has_two_meanings() -> None:
    base_of({f"{PLACE}.weight": drawn(1, 4, 4)})
    adapter_of({f"{MANGLED}.{part}.weight": drawn(2, 4, 4) for part in ("a1", "a2", "b1", "b2")})
    with pytest.raises(sm.MismatchError, match="all square"):
        baked("base+lora.safetensors")


@pytest.mark.parametrize(
    ("old", "new"), [((8, 6), (8, 9)), ((8, 6), (10, 6)), ((8, 4, 3, 3), (8, 9, 3, 3)), ((8, 6), (8, 6))]
)
def test_a_base_is_filled_up_with_zeros(old: tuple[int, ...], new: tuple[int, ...]) -> None:
    """`reshape_weight` of ComfyUI: an adapter for more channels than the base has."""
    weight, down, up = drawn(1, *old), drawn(2, 4, *new[1:]), drawn(3, new[0], 4, *(1 for _ in new[2:]))
    base_of({f"{PLACE}.weight": weight})
    adapter_of(
        {
            f"diffusion_model.{PLACE}.lora_down.weight": down,
            f"diffusion_model.{PLACE}.lora_up.weight": up,
            f"diffusion_model.{PLACE}.reshape_weight": torch.tensor(new),
        }
    )
    wide = torch.zeros(new, dtype=torch.float64)
    wide[tuple(slice(0, size) for size in old)] = weight.double()
    expected = wide + (up.double().flatten(1) @ down.double().flatten(1)).view(new)
    same(baked("base+lora.safetensors"), {f"{PLACE}.weight": expected})
    warned = [each for each in sm.inspect("base+lora.safetensors").warnings if "fills" in each]
    assert len(warned) == (old != new)


def test_a_base_is_not_cut() -> None:
    base_of({f"{PLACE}.weight": drawn(1, 8, 6)})
    lora = {"lora_down.weight": drawn(2, 4, 5), "lora_up.weight": drawn(3, 8, 4), "reshape_weight": torch.tensor([8, 5])}
    adapter_of({f"diffusion_model.{PLACE}.{name}": each for name, each in lora.items()})
    with pytest.raises(sm.MismatchError, match="no larger shape"):
        baked("base+lora.safetensors")


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_multiples_of_lycoris(strength: float) -> None:
    """LyCORIS' IA3 adds its numbers to 1, tells beside them whether they multiply inputs, and leaves biases."""
    base = {
        "a.q.weight": drawn(1, 6, 4),
        "a.q.bias": drawn(2, 6),
        "a.k.weight": drawn(3, 6, 4),
        "a.c.weight": drawn(4, 5, 3, 2, 2),
    }
    lora = {
        "lycoris_a_q.weight": drawn(5, 6),
        "lycoris_a_q.on_input": torch.tensor(0),
        "lycoris_a_k.weight": drawn(6, 4),
        "lycoris_a_k.on_input": torch.tensor(1),
        "lycoris_a_c.weight": drawn(7, 1, 5, 1, 1),
        "lycoris_a_c.on_input": torch.tensor(0),
    }
    base_of(base)
    adapter_of(lora)
    doubled = {name: tensor.double() for name, tensor in (base | lora).items()}
    expected = {name: doubled[name] for name in base}
    expected["a.q.weight"] = doubled["a.q.weight"] * (1 + strength * doubled["lycoris_a_q.weight"][:, None])
    expected["a.k.weight"] = doubled["a.k.weight"] * (1 + strength * doubled["lycoris_a_k.weight"])
    expected["a.c.weight"] = doubled["a.c.weight"] * (1 + strength * doubled["lycoris_a_c.weight"].view(5, 1, 1, 1))
    same(baked(f"base+{strength}*lora.safetensors"), expected)
    lora["lycoris_a_k.on_input"] = torch.tensor(0)
    Path("lora.safetensors").unlink()
    adapter_of(lora)
    with pytest.raises(sm.MismatchError, match=r"its numbers have the shape \[4\]"):
        baked("base+lora.safetensors")
