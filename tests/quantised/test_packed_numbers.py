"""Packs of compressed-tensors and modelopt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import load_safetensors
from safetensors.torch import save_file

import streammerge as sm
from quantised.samples import E2M1, Tensors, packed

MAKE = torch.Generator().manual_seed(1)
ROWS, COLUMNS = 40, 192
CODES = torch.randint(0, 16, (ROWS, COLUMNS), generator=MAKE)
NIBBLES = (CODES[:, ::2] | CODES[:, 1::2] << 4).to(torch.uint8)
SCALES = torch.rand(ROWS, COLUMNS // 16, generator=MAKE).to(torch.float8_e4m3fn)
EXPONENTS = torch.randint(120, 130, (ROWS, COLUMNS // 32), generator=MAKE, dtype=torch.uint8)
WHOLE = torch.tensor([7.3])


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def converted(tensors: Tensors, config: dict[str, Any] | None = None) -> torch.Tensor:
    """Returns the numbers that a conversion makes of one weight, and checks that nothing else is left of it."""
    Path("a").mkdir()
    save_file(tensors, "a/model.safetensors")
    Path("a/config.json").write_text(json.dumps({"quantization_config": config} if config else {}))
    sm.convert("a", "out/", dtype="float32")
    (made,) = load_safetensors(Path("out/model.safetensors")).items()
    assert made[0] == "m.weight"
    return made[1]


def grouped(scales: torch.Tensor, size: int) -> torch.Tensor:
    return scales.float().repeat_interleave(size, 1)[:, :COLUMNS]


@pytest.mark.parametrize("divides", [True, False])
def test_nvfp4(divides: bool) -> None:
    """modelopt multiplies by the scale of the whole tensor, compressed-tensors divides by it."""
    if divides:
        parts = {"m.weight_packed": NIBBLES, "m.weight_scale": SCALES, "m.weight_global_scale": WHOLE}
        scales = SCALES.float() / WHOLE
    else:
        parts = {"m.weight": NIBBLES, "m.weight_scale": SCALES, "m.weight_scale_2": WHOLE[0].clone()}
        scales = SCALES.float() * WHOLE
    parts["m.input_scale" if not divides else "m.input_global_scale"] = torch.ones(1)
    assert torch.equal(converted(parts), E2M1[CODES] * grouped(scales, 16))


def test_mxfp4() -> None:
    made = converted({"m.weight_packed": NIBBLES, "m.weight_scale": EXPONENTS})
    assert torch.equal(made, E2M1[CODES] * grouped(torch.exp2(EXPONENTS.float() - 127), 32))


@pytest.mark.parametrize("stated", ["config", "shape", "neither"])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("group", [32, 64, COLUMNS, 10**6])
def test_packs_of_integers(bits: int, group: int, stated: str) -> None:
    """The number of columns follows from groups and bits, or stands in a helper."""
    fields = torch.randint(0, 1 << bits, (ROWS, COLUMNS), generator=MAKE)
    size = min(group, COLUMNS)
    scales = torch.rand(ROWS, COLUMNS // size, generator=MAKE)
    parts = {"m.weight_packed": packed(fields, bits), "m.weight_scale": scales}
    weights = {"num_bits": bits, "type": "int", "strategy": "group", "group_size": group if group < COLUMNS else None}
    config = {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": weights}}}
    if stated != "config" or group >= COLUMNS:
        parts["m.weight_shape"] = torch.tensor([ROWS, COLUMNS])
    if stated == "neither":
        parts.pop("m.weight_shape", None)
        with pytest.raises(sm.MismatchError, match=r"m\.weight is a pack, and neither its configuration nor weight_shape"):
            converted(parts)
        return
    made = converted(parts, config if stated == "config" else None)
    assert torch.equal(made, (fields - (1 << (bits - 1))).float() * grouped(scales, size))


def test_zero_points_and_the_order_of_groups() -> None:
    fields, zeros = (torch.randint(0, 16, shape, generator=MAKE) for shape in ((ROWS, COLUMNS), (ROWS, 6)))
    scales, order = torch.rand(ROWS, 6, generator=MAKE), torch.randperm(COLUMNS, generator=MAKE) // 32
    parts = {
        "m.weight_packed": packed(fields, 4),
        "m.weight_scale": scales,
        "m.weight_shape": torch.tensor([ROWS, COLUMNS]),
        "m.weight_zero_point": packed(zeros.T.contiguous(), 4).T.contiguous(),
        "m.weight_g_idx": order.int(),
    }
    assert torch.equal(converted(parts), (fields - zeros[:, order]).float() * scales[:, order])


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        (
            {"m.weight_shape": torch.tensor([ROWS, 10**9])},
            r"is no pack of shape \[40, 1000000000\], which its helper states",
        ),
        ({"m.weight_shape": torch.tensor([ROWS, -8])}, r"is no pack of shape \[40, -8\]"),
        ({"m.weight_scale": torch.ones(3, 6)}, "are no scales of I8"),
        (
            {"m.weight_packed": NIBBLES, "m.weight_scale": SCALES},
            r"m\.weight has no m\.weight_global_scale, by which nvfp4 is scaled",
        ),
        ({"m.weight_zero_point": torch.ones(9, 6).int()}, "zero points of 4 bits"),
        ({"m.weight_g_idx": torch.ones(9).int()}, "does not give the groups of 192 columns"),
        ({"m.weight_packed": torch.ones(9).int()}, r"of shape \[9\] is no pack of a matrix"),
    ],
    ids=str,
)
def test_helpers_must_fit(parts: Tensors, said: str) -> None:
    whole = {"m.weight_packed": packed(CODES, 4), "m.weight_scale": torch.ones(ROWS, 6)}
    whole["m.weight_shape"] = torch.tensor([ROWS, COLUMNS])
    with pytest.raises(sm.MismatchError, match=said):
        converted(whole | parts)


def test_groups_must_be_as_the_configuration_states() -> None:
    """Five scales for 192 columns could mean groups of 39."""
    parts = {"m.weight_packed": packed(CODES, 4), "m.weight_scale": torch.ones(ROWS, 5)}
    parts["m.weight_shape"] = torch.tensor([ROWS, COLUMNS])
    config = {"config_groups": {"group_0": {"weights": {"num_bits": 4, "group_size": 32}}}}
    with pytest.raises(sm.MismatchError, match=r"of 192 columns has 5 scales in a row, and .* states groups of 32"):
        converted(parts, config)


def test_what_only_helps_to_read_is_not_told_as_unused() -> None:
    """The shape of a pack, and the scale of activations, go into no tensor of the output."""
    for name in "ab":
        parts = {"m.weight_packed": packed(CODES, 4), "m.weight_scale": torch.ones(ROWS, 6)}
        parts |= {"m.weight_shape": torch.tensor([ROWS, COLUMNS]), "m.input_scale": torch.ones(1)}
        save_file(parts, f"{name}.safetensors")
    result = sm.merge(["a.safetensors", "b.safetensors"], "c.safetensors", strict=True)
    assert not result.warnings


def test_a_format_that_is_not_read_is_refused() -> None:
    """Six-bit floats are packed in bytes too."""
    parts = {"m.weight_packed": torch.zeros(ROWS, COLUMNS * 3 // 4).byte(), "m.weight_scale": EXPONENTS}
    with pytest.raises(sm.MismatchError, match=r"are no scales of F32 \[40, 288\]"):
        converted(parts)
