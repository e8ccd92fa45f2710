"""Which tensors tell of a quantisation, and what they are about. Real layouts: recipe/test_rules.py."""

from __future__ import annotations

import pytest

from streammerge.tensors.quantised import belongs, companions
from streammerge.tensors.spec import TensorSpec


def specs(**dtypes: str) -> dict[str, TensorSpec]:
    """Tensors of shape [4], 0-d where the dtype ends in a zero dimension's mark ``!``."""
    names = {name.replace("__", "."): dtype for name, dtype in dtypes.items()}
    return {n: TensorSpec(n, d.rstrip("!"), () if d.endswith("!") else (4,)) for n, d in names.items()}


@pytest.mark.parametrize(
    ("tensors", "found"),
    [
        (specs(l__weight="uint8", l__weight__absmax="float32"), {"l.weight.absmax": ("bitsandbytes", "l.weight")}),
        (specs(l__qweight="int32", l__bias="float16"), {"l.qweight": ("GPTQ or AWQ", "l")}),
        (
            specs(l__weight="float8_e4m3fn", l__weight_scale_inv="float32"),
            {"l.weight_scale_inv": ("scaled fp8 (weight_scale_inv)", "l")},
        ),
        (specs(e__w_blocks="uint8", e__w_scales="uint8"), {"e.w_blocks": ("MXFP4", "e.w"), "e.w_scales": ("MXFP4", "e.w")}),
        (specs(), {}),
        (specs(l__weight="float32", l__scale="float32"), {}),
        (specs(l__weight="float8_e4m3fn", l__bias="float32"), {}),
        (specs(l__position="int64", l__scale="float32"), {}),
        (specs(l__steps="int32!", l__scale="float32"), {}),
        (specs(a__weight="int8", b__scale="float32"), {}),
    ],
)
def test_companions(tensors: dict[str, TensorSpec], found: dict[str, tuple[str, str]]) -> None:
    assert companions(tensors) == found


@pytest.mark.parametrize(
    ("name", "stem", "wanted"),
    [
        ("l.w", "l.w", True),
        ("l.w.absmax", "l.w", True),
        ("l.w_scale", "l.w", True),
        ("l.w2", "l.w", False),
        ("l", "l.w", False),
        ("other.l.w", "l.w", False),
    ],
)
def test_what_belongs_to_a_stem(name: str, stem: str, wanted: bool) -> None:
    assert belongs(name, stem) is wanted
