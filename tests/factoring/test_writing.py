"""The files of an adapter that is made are whole, and their receipt tells every byte."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

import streammerge as sm
from factoring.test_single import written
from streammerge.factoring.writing import from_number
from streammerge.tensors.dtypes import DType
from streammerge.tensors.spec import TensorSpec


@pytest.mark.parametrize("out", ["made.safetensors", "made/"])
def test_each_byte_has_a_checksum(out: str) -> None:
    one, other = written("one.safetensors", "diffusers", 4), written("other.safetensors", "diffusers", 2)
    result = sm.merge([one, other], out=out)
    assert isinstance(result, sm.AdapterResult)
    files = [path for path in Path(out).iterdir() if path.name != "streammerge.json"] if out[-1:] == "/" else [Path(out)]
    assert sm.verify(out).tensors == 6
    for path in files:
        data = path.read_bytes()
        for place in (9, len(data) // 2, len(data) - 1):
            path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
            with pytest.raises(sm.StreammergeError):
                sm.verify(out)
        path.write_bytes(data)
    sm.verify(out)


def test_the_output_does_not_depend_on_workers_and_can_be_replaced() -> None:
    one, other = written("one.safetensors", "kohya", 4, 2.0), written("other.safetensors", "diffusers", 2)
    seen = set()
    for workers, memory in ((1, "64MiB"), (4, "1GiB")):
        sm.merge([one, other], out="made.safetensors", workers=workers, memory=memory, overwrite=True)
        seen.add(Path("made.safetensors").read_bytes())
    assert len(seen) == 1
    with pytest.raises(sm.RecipeError, match="overwrite"):
        sm.merge([one, other], out="made.safetensors")


def test_numbers_are_written_in_their_dtype() -> None:
    for dtype, form in ((DType.F64, "<d"), (DType.F32, "<f"), (DType.F16, "<e")):
        assert bytes(from_number(TensorSpec("alpha", dtype, ()), 2.5)(0, 8)) == struct.pack(form, 2.5)
    assert bytes(from_number(TensorSpec("alpha", DType.BF16, ()), 2.5)(0, 2)) == struct.pack("<f", 2.5)[2:]
