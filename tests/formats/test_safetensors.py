"""The safetensors format."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import streammerge as sm
from formats.suite import FormatSuite, Tensors
from streammerge.formats import safetensors
from streammerge.tensors.dtypes import DType
from streammerge.tensors.spec import TensorSpec


def test_packed_fp4_doubles_its_last_dimension(tmp_path: Path) -> None:
    value = torch.arange(12, dtype=torch.uint8).view(3, 4).view(torch.float4_e2m1fn_x2)
    torch.save({"w": value}, tmp_path / "in.pth")
    sm.convert(tmp_path / "in.pth", tmp_path / "out.safetensors")
    header = (tmp_path / "out.safetensors").read_bytes()[8:]
    assert b'"dtype":"F4","shape":[3,8]' in header
    sm.convert(tmp_path / "out.safetensors", tmp_path / "back.pth")
    back = torch.load(tmp_path / "back.pth", weights_only=True)["w"]
    assert back.shape == (3, 4)
    assert back.view(torch.uint8).tolist() == value.view(torch.uint8).tolist()


class TestSafetensors(FormatSuite):
    DTYPES = (*FormatSuite.DTYPES, torch.float8_e4m3fn, torch.float8_e5m2)

    def write(self, path: Path, tensors: Tensors) -> None:
        save_file(tensors, path)


def header(tensors: list[tuple[str, str, list[int], list[int]]], **style: Any) -> bytes:
    """Returns the JSON of a header, in the style of ``json.dumps``."""
    entries = {name: {"dtype": d, "shape": shape, "data_offsets": offsets} for name, d, shape, offsets in tensors}
    return json.dumps({"__metadata__": {"format": "pt"}, **entries}, **style).encode()


USUAL = [
    ("a.0", "F32", [2, 3], [0, 24]),
    ("ü", "BF16", [], [24, 26]),
    ("c", "F4", [4], [26, 28]),
    ("d", "U8", [1], [28, 29]),
]


@pytest.mark.parametrize("style", [{}, {"separators": (",", ":")}, {"ensure_ascii": False}, {"indent": 1}])
def test_a_usual_header_is_read_as_any_other(style: dict[str, Any]) -> None:
    for count in range(len(USUAL) + 1):
        data = header(USUAL[:count], **style)
        size = USUAL[count - 1][3][1] if count else 0
        usual, any_ = safetensors._usual(data, size), safetensors._any(data, size, "it")
        assert usual is None or columns(usual) == columns(any_)
        written_usually = count and "indent" not in style and (count < 2 or not style.get("ensure_ascii", True))
        assert (usual is not None) == bool(written_usually), (count, style)


def columns(made: Any) -> tuple[Any, ...]:
    kinds = [(kind.dtype, kind.shape, kind.nbytes) for kind in made.kinds]
    return made.metadata, made.names, kinds, list(made.starts)


def test_a_damaged_header_is_never_read_as_a_usual_one() -> None:
    """The quick reader accepts nothing that the strict one refuses, and reads nothing otherwise."""
    draw = random.Random(0)
    data = header(USUAL, ensure_ascii=False, separators=(",", ":"))
    accepted = 0
    for _ in range(20_000):
        made = bytearray(data)
        for _ in range(draw.randint(1, 3)):
            at = draw.randrange(len(made))
            kind = draw.randrange(4)
            if kind == 0:
                made[at] = draw.choice(b'0123456789",:{}[] \\abF\n-')
            elif kind == 1:
                del made[at : at + draw.randint(1, 3)]
            elif kind == 2:
                made[at:at] = bytes([draw.choice(b'0 ,"}')])
            else:
                made += draw.choice([b" ", b"  ", b"\n", b"}", b"x"])
        usual = safetensors._usual(bytes(made), 29)
        if usual is not None:
            accepted += 1
            assert columns(usual) == columns(safetensors._any(bytes(made), 29, "it")), bytes(made)
    assert accepted > 200


@pytest.mark.parametrize(
    "changed",
    [
        [("a", "F32", [1], [0, 4]), ("a", "F32", [1], [4, 8])],
        [("__metadata__", "F32", [1], [0, 4])],
        [("a", "F32", [1], [4, 8]), ("b", "F32", [1], [0, 4])],
        [("a", "F32", [0], [0, 0]), ("b", "F32", [2], [0, 8])],
        [("a", "F32", [1], [0, 4]), ("b", "F32", [1], [3, 7])],
        [("a", "F32", [3], [0, 8])],
        [("a", "Q8", [8], [0, 8])],
        [("a", "F4", [1], [0, 8])],
        [("a", "F32", [2], [0, 9])],
    ],
)
def test_an_unusual_header_is_left_to_the_strict_reader(changed: list[Any]) -> None:
    entries = [
        f'"{name}":{{"dtype":"{d}","shape":{json.dumps(shape)},"data_offsets":{json.dumps(offsets)}}}'
        for name, d, shape, offsets in changed
    ]
    assert safetensors._usual(("{" + ",".join(entries) + "}").encode(), 8) is None


def test_a_planned_header_is_what_json_writes() -> None:
    specs = [
        TensorSpec("a.weight", DType.F32, (2, 3)),
        TensorSpec('quote " and \\ and ü', DType.BF16, (5,)),
        TensorSpec("zero-d", DType.U8, ()),
        TensorSpec("odd\n", DType.U8, (3,)),
        TensorSpec("f4", DType.F4, (3, 4)),
        TensorSpec("empty", DType.F32, (0, 2)),
    ]
    file, starts = safetensors.plan_columns("x", [spec.name for spec in specs], specs, {"format": "pt"})
    data = file.literals[0].data
    written = json.loads(data[8:])
    ordered = sorted(specs, key=lambda spec: -spec.dtype.element_bytes)
    expected: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    cursor = 0
    for spec in ordered:
        shape = [*spec.shape[:-1], spec.shape[-1] * 2] if spec.dtype is DType.F4 else list(spec.shape)
        expected[spec.name] = {"dtype": spec.dtype.value, "shape": shape, "data_offsets": [cursor, cursor + spec.nbytes]}
        cursor += spec.nbytes
    assert data[8:].rstrip(b" ") == json.dumps(expected, ensure_ascii=False, separators=(",", ":")).encode()
    assert written == expected
    assert list(file.offsets) == [spec.name for spec in ordered]
    for spec, start in zip(specs, starts, strict=True):
        assert start == file.offsets[spec.name] == len(data) + expected[spec.name]["data_offsets"][0]
