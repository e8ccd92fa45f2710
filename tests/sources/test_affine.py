"""Quantised tensors of torch, in files and in memory: their numbers are those of ``dequantize()``."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import load_safetensors

import streammerge as sm
from sources.suite import room
from streammerge.errors import FormatError
from streammerge.formats import detect
from streammerge.sources.affine import affine
from streammerge.sources.base import read_whole
from streammerge.sources.memory import in_memory
from streammerge.stores.locations import parse

pytestmark = pytest.mark.filterwarnings("ignore")
SHAPES = ((70, 1013), (3, 5, 7), (11,), (0, 3))


def quantised(kind: str, shape: tuple[int, ...] = (30, 517)) -> torch.Tensor:
    make = torch.Generator().manual_seed(len(shape))
    numbers = 30 * torch.randn(shape, generator=make)
    if kind.startswith("channel"):
        axis = len(shape) - 1 if kind.endswith("last") else 0
        count = shape[axis]
        if kind == "channel float":
            scales, zeros = torch.rand(count, generator=make) + 0.01, 4 * torch.rand(count, generator=make)
        else:
            scales, zeros = torch.rand(count, generator=make).double() + 0.01, torch.arange(count) % 9
        return torch.quantize_per_channel(numbers, scales, zeros, axis, torch.quint8)
    dtype = getattr(torch, kind)
    return torch.quantize_per_tensor(numbers, 1e-7 if dtype is torch.qint32 else 0.0517, 3, dtype)


KINDS = ("qint8", "quint8", "qint32", "channel", "channel last", "channel float")


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_are_those_of_torch(kind: str, tmp_path: Path) -> None:
    for shape in SHAPES:
        tensor = quantised(kind, shape)
        expected = tensor.dequantize()
        torch.save({"w": tensor, "x": torch.ones(1)}, tmp_path / "a.pth")
        (tmp_path / "b.pkl").write_bytes(pickle.dumps({"w": tensor, "x": torch.ones(1)}))
        sources = [in_memory("w", tensor)]
        for name in ("a.pth", "b.pkl"):
            container = detect.read(parse(tmp_path / name))
            sources.append(container.locate("w", container.tree["w"]))
        for source in sources:
            assert bytes(read_whole(source, room())) == expected.numpy().tobytes(), (shape, source)
        if tensor.numel() > 20:
            reader, out = sources[0].open(room()), memoryview(bytearray(4 * 10))
            assert bytes(reader.read(7, 17, out)) == expected.flatten()[7:17].numpy().tobytes()


@pytest.mark.parametrize(
    "view", [lambda q: q.t(), lambda q: q[3:9], lambda q: q[:, 5:9]], ids=["turned", "rows", "columns"]
)
def test_views_of_quantised_tensors(view: Callable[[Any], Any], tmp_path: Path) -> None:
    tensor = view(quantised("quint8"))
    torch.save({"w": tensor}, tmp_path / "a.pth")
    container = detect.read(parse(tmp_path / "a.pth"))
    expected = tensor.dequantize().contiguous().numpy().tobytes()
    assert bytes(read_whole(container.locate("w", container.tree["w"]), room())) == expected
    assert bytes(read_whole(in_memory("w", tensor), room())) == expected


def test_a_merge_of_quantised_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The output is plain, also in a .pth. What no merge reads stays as it is, quantised or sparse."""
    monkeypatch.chdir(tmp_path)
    made = [{"w": quantised("channel", (30, 40)), "b": torch.full((3,), float(n))} for n in (1, 2)]
    made[1]["w"] = quantised("quint8", (30, 40))
    spare = quantised("qint8", (4, 5))
    sparse = torch.eye(3).to_sparse()
    for name, state in zip("ab", made, strict=True):
        optimizer = {"state": {0: {"m": sparse, "q": spare}}, "param_groups": [{"params": [0]}]}
        torch.save({"model": state, "optimizer": optimizer, "graph": sparse}, f"{name}.pth")
    expected = ((made[0]["w"].dequantize().double() + made[1]["w"].dequantize().double()) / 2).float()
    result = sm.merge(["a.pth", "b.pth"], "out.safetensors")
    assert torch.equal(load_safetensors(Path("out.safetensors"))["w"], expected)
    assert any("1 quantised tensor of torch" in note for note in result.notes)
    sm.merge(["a.pth", "b.pth"], "out.pth", keep_optimizer=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = torch.load("out.pth", weights_only=False)
    assert torch.equal(out["model"]["w"], expected)
    assert not out["model"]["w"].is_quantized
    assert torch.equal(out["optimizer"]["state"][0]["m"].to_dense(), torch.eye(3))
    assert torch.equal(out["optimizer"]["state"][0]["q"].int_repr(), spare.int_repr())
    assert torch.equal(out["graph"].to_dense(), torch.eye(3))
    assert sm.verify("out.pth", sample="100%").equal_elems
    state = {"model": made[0], "optimizer": {"m": sparse}}
    sm.merge([state, "b.pth"], "held.safetensors")
    assert torch.equal(load_safetensors(Path("held.safetensors"))["w"], expected)


def test_what_takes_part_and_is_not_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"a.w": torch.ones(2), "b.w": torch.eye(3).to_sparse()}, "sparse.pth")
    with pytest.raises(sm.MismatchError, match=r"sparse tensors \(b\.w\)"):
        sm.convert("sparse.pth", "out.safetensors")
    with pytest.raises(FormatError, match=r"tensor b\.w is sparse"):
        sm.merge([{"b.w": torch.eye(3).to_sparse()}] * 2, "out.safetensors")
    torch.save({"a.w": torch.ones(2), "l._packed_params": (quantised("qint8"), None)}, "packed.pth")
    with pytest.raises(sm.MismatchError, match=r"packed tensors \(l\._packed_params\)"):
        sm.convert("packed.pth", "out.safetensors")


def test_helpers_that_do_not_fit_are_refused() -> None:
    codes, few = in_memory("w", torch.ones(3, 4, dtype=torch.int8)), torch.ones(2)
    helpers = [in_memory("s", few), in_memory("z", few)]
    with pytest.raises(FormatError, match="the quantised tensor w has scales or zero points that do not fit it"):
        affine("w", codes, scales=helpers[0], zeros=helpers[1])
    with pytest.raises(FormatError):
        affine("w", in_memory("w", torch.ones(3)))
