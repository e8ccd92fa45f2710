"""8-bit weights with scales, under the names that programs give them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import load_safetensors
from safetensors.torch import save_file

import streammerge as sm
from quantised.samples import E2M1, FP8, FP8_CONFIG, Tensors, fp8_blocks, in_blocks

CODES = torch.randn(200, 300, generator=torch.Generator().manual_seed(1)).to(FP8)
BYTES = torch.randint(-128, 128, (200, 300), generator=torch.Generator().manual_seed(2)).char()
ROWS, ONE = torch.rand(200, 1) + 0.5, torch.rand(1) + 0.5
GRID = torch.rand(2, 3) + 0.5
EXPONENTS = torch.randint(120, 130, (200, 10), generator=torch.Generator().manual_seed(4), dtype=torch.uint8)
STACK = torch.randn(3, 200, 300).to(FP8)
PLAIN = CODES.float()
CASES: dict[str, tuple[Tensors, torch.Tensor]] = {
    "blocks": ({"m.weight": CODES, "m.weight_scale_inv": GRID}, PLAIN * in_blocks(GRID, 200, 300)),
    "blocks in bf16": (
        {"m.weight": CODES, "m.weight_scale_inv": GRID.bfloat16()},
        PLAIN * in_blocks(GRID.bfloat16(), 200, 300),
    ),
    "exponents": (
        {"m.weight": CODES, "m.weight_scale_inv": torch.tensor([[120, 127, 130], [126, 0, 121]], dtype=torch.uint8)},
        PLAIN * in_blocks(torch.tensor([[2.0**-7, 1, 8], [0.5, 2.0**-127, 2.0**-6]]), 200, 300),
    ),
    "deepseek's own names": ({"m.weight": CODES, "m.scale": GRID}, PLAIN * in_blocks(GRID, 200, 300)),
    "a stack of experts": (
        {"m.gate_up_proj": STACK, "m.gate_up_proj_scale_inv": GRID.expand(3, 2, 3).contiguous()},
        STACK.float() * in_blocks(GRID, 200, 300),
    ),
    "by rows": ({"m.weight": CODES, "m.weight_scale": ROWS, "m.input_scale": ONE}, PLAIN * ROWS),
    "by rows, flat": ({"m.weight": CODES, "m.weight_scale": ROWS.view(-1)}, PLAIN * ROWS),
    "by tensor": ({"m.weight": CODES, "m.weight_scale": ONE, "m.k_scale": ONE.clone()}, PLAIN * ONE),
    "by tensor, 0-d": ({"m.weight": CODES, "m.weight_scale": ONE[0].clone()}, PLAIN * ONE),
    "by columns of a square stack": (
        {
            "m.up_proj": STACK[:, :, :200].contiguous(),
            "m.up_proj_scale": ROWS.view(1, 1, 200).expand(3, 1, 200).contiguous(),
        },
        STACK[:, :, :200].float() * ROWS.view(1, 1, 200),
    ),
    "4-bit floats in int8": (
        {"m.weight": BYTES[:, :160].contiguous(), "m.scale": EXPONENTS.view(torch.float8_e8m0fnu)},
        E2M1[torch.stack((BYTES[:, :160].int() & 15, BYTES[:, :160].int() >> 4 & 15), 2).view(200, 320)]
        * torch.exp2(EXPONENTS.float() - 127).repeat_interleave(32, 1),
    ),
    "mistral's names": ({"m.weight": CODES, "m.qscale_weight": ONE[0].clone(), "m.qscale_act": ONE}, PLAIN * ONE),
    "int8 by rows": ({"m.weight": BYTES, "m.weight_scale": ROWS}, BYTES.float() * ROWS),
    "int8 with zero points": (
        {"m.weight": BYTES, "m.weight_scale": ROWS, "m.weight_zero_point": BYTES[:, :1].contiguous()},
        (BYTES.float() - BYTES[:, :1].float()) * ROWS,
    ),
    "int8 in groups": (
        {"m.weight": BYTES, "m.weight_scale": torch.arange(2000.0).view(200, 10)},
        BYTES.float() * torch.arange(2000.0).view(200, 10).repeat_interleave(30, 1),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_its_numbers(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tensors, expected = CASES[case]
    save_file(tensors | {"norm.weight": torch.ones(3)}, "a.safetensors")
    sm.convert("a.safetensors", "b.safetensors", dtype="float32")
    made = load_safetensors(Path("b.safetensors"))
    (name,) = made.keys() - {"norm.weight"}
    assert name in tensors
    assert torch.equal(made[name], expected)
    sm.convert("a.safetensors", "c.safetensors")
    assert load_safetensors(Path("c.safetensors"))[name].dtype == torch.bfloat16
    index = sm.inspect("a.safetensors")
    assert list(index.quantised) == [name]
    assert index.stored is not None
    assert index.stored.keys() == {*tensors, "norm.weight"}


@pytest.mark.parametrize(
    ("scales", "said"),
    [
        (torch.ones(7, 7), r"of shape \[200, 300\] has scales of shape \[7, 7\], and its configuration states no blocks"),
        (torch.ones(3, 7, 1), r"has scales of shape \[3, 7, 1\], which do not fit it"),
        (torch.ones(0), r"has scales of shape \[0\], which do not fit it"),
    ],
)
def test_scales_must_fit(scales: torch.Tensor, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_file({"m.weight": torch.zeros(200, 300).to(FP8), "m.weight_scale_inv": scales}, "a.safetensors")
    where = r"^a\.safetensors is quantised: scaled fp8 or int8, but the quantised weight m\.weight .*"
    with pytest.raises(sm.MismatchError, match=where + said):
        sm.convert("a.safetensors", "b.safetensors")


def test_scales_that_do_not_fit_the_stated_blocks_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two scales for 300 columns could mean blocks of 150, but the configuration says 128."""
    monkeypatch.chdir(tmp_path)
    Path("a").mkdir()
    save_file({"m.weight": torch.zeros(200, 300).to(FP8), "m.weight_scale_inv": torch.ones(2, 2)}, "a/model.safetensors")
    sm.convert("a", "guessed.safetensors")
    Path("a/config.json").write_text(json.dumps({"quantization_config": FP8_CONFIG}))
    with pytest.raises(
        sm.MismatchError, match=r"has scales of shape \[2, 2\], and its configuration states no blocks that fit"
    ):
        sm.convert("a", "b.safetensors")


@pytest.mark.parametrize("end", ["weight_scale_inv", "weight_scale"])
def test_a_weight_without_its_scale_is_refused_where_others_have_one(
    end: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shard that was not copied: the codes alone are numbers too, a hundred times as large as the weights."""
    monkeypatch.chdir(tmp_path)
    whole = {f"{name}.weight": CODES.clone() for name in "mn"} | {f"{name}.{end}": ONE.clone() for name in "mn"}
    save_file(whole, "a.safetensors")
    save_file({name: tensor for name, tensor in whole.items() if name != f"n.{end}"}, "b.safetensors")
    for inputs in (["a.safetensors", "b.safetensors"], ["b.safetensors", "a.safetensors"]):
        with pytest.raises(
            sm.MismatchError,
            match=rf"^b\.safetensors is quantised: .* n\.weight has no n\.{end}, as others have; copy the file",
        ):
            sm.merge(inputs, "c.safetensors")


def test_plain_8_bit_floats_need_no_scale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone, and in ComfyUI's older form, where a layer without a scale has the scale 1."""
    monkeypatch.chdir(tmp_path)
    save_file({"m.weight": CODES}, "a.safetensors")
    save_file({"m.weight": CODES, "n.weight": CODES.clone(), "n.scale_weight": ONE[0].clone()}, "b.safetensors")
    for name in "ab":
        sm.convert(f"{name}.safetensors", f"{name}32.safetensors", dtype="float32")
        assert torch.equal(load_safetensors(Path(f"{name}32.safetensors"))["m.weight"], PLAIN)


def test_scales_that_are_not_finite_stop_a_merge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    codes, scales = fp8_blocks(torch.randn(200, 300))
    for name, number in (("a", torch.nan), ("b", 0.0)):
        scales[1, 1] = number
        save_file({"m.weight": codes, "m.weight_scale_inv": scales}, f"{name}.safetensors")
    with pytest.raises(sm.StreammergeError, match=r"m\.weight.*a\.safetensors"):
        sm.merge(["a.safetensors", "b.safetensors"], "c.safetensors")
    sm.convert("b.safetensors", "d.safetensors")
    assert not load_safetensors(Path("d.safetensors"))["m.weight"][128:, 128:256].any()


@pytest.mark.parametrize(
    "tensors",
    [
        {"m.weight": BYTES, "m.scale": ROWS},
        {"m.weight": BYTES, "m.weight_scale": torch.ones(200, 1).byte()},
        {"m.weight": BYTES.byte(), "m.weight_scale": ROWS},
        {"m.weight": BYTES.int(), "m.weight_scale": ROWS},
        {"m.compressed": CODES, "m.bitmask": BYTES.byte(), "m.weight_scale": ROWS},
    ],
    ids=lambda tensors: " ".join(f"{name} {tensor.dtype}" for name, tensor in tensors.items()),
)
def test_integers_of_unknown_schemes_stay_refused(
    tensors: Tensors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        save_file(tensors, f"{name}.safetensors")
    with pytest.raises(sm.MismatchError, match=r"a\.safetensors is quantised"):
        sm.merge(["a.safetensors", "b.safetensors"], "c.safetensors", integers="first")
