"""Compressed records: inflated first, then read like any other bytes."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import assert_same, deflate, load_safetensors, octets

import streammerge as sm
from sources.suite import Disk, draw, merge_of, room
from streammerge.sources.base import read_whole
from streammerge.sources.deflated import (
    Damaged,
    Deflated,
    PackedRecord,
    of_bytes,
    records,
    swapped,
    unpacked,
    with_inflated,
)
from streammerge.sources.joined import joined
from streammerge.sources.rows import rows_of
from streammerge.sources.stored import Stored
from streammerge.sources.strided import Strided
from streammerge.tensors.dtypes import DType
from streammerge.tensors.spec import TensorSpec


def packed(disk: Disk, view: torch.Tensor, name: str = "w") -> Deflated:
    """Returns the source of a view over a compressed storage."""
    whole = torch.empty(0, dtype=view.dtype).set_(view.untyped_storage())
    data = octets(whole)
    machine = zlib.compressobj(wbits=-15)
    small = machine.compress(data) + machine.flush()
    path, offset = disk.write(small)
    spec = TensorSpec(name, DType.F32, tuple(view.shape))
    record = PackedRecord(offset, len(small), len(data))
    made = of_bytes(spec, path, view.storage_offset() * 4, tuple(view.stride()), record)
    assert isinstance(made, Deflated)
    return made


def test_what_lies_in_bytes_is_as_simple_as_it_can_be() -> None:
    spec, record = TensorSpec("w", DType.F32, (2, 3)), PackedRecord(7, 10, 24)
    assert of_bytes(spec, "f", 8) == Stored(spec, "f", 8)
    assert of_bytes(spec, "f", 8, (3, 1)) == Stored(spec, "f", 8)
    assert of_bytes(spec, "f", 8, (1, 2)) == Strided(spec, "f", 8, (1, 2))
    assert of_bytes(spec, "f", 0, None, record) == Deflated(spec, "f", record, Stored(spec, "f", 0))
    empty = TensorSpec("w", DType.C64, (0, 3))
    assert of_bytes(empty, "f", 0, (1, 2), record, "conjugated") == Stored(empty, "f", 0)


def test_a_record_is_named_once_and_put_in_everywhere(tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    base = draw((40, 30), torch.float32)
    turned, plain = packed(disk, base.t()), disk.stored(base)
    nested = joined("j", [rows_of(turned, 3, 9), rows_of(turned, 0, 30)], 0)
    assert set(records(nested)) == {turned.key}
    assert not [*records(plain)]
    assert nested.blobs[0] == (turned.path, turned.record.offset, turned.record.compressed_bytes)
    place = disk.write(octets(base))
    inflated = with_inflated(nested, {turned.key: place})
    assert not [*records(inflated)]
    assert bytes(read_whole(inflated, room())) == octets(torch.cat([base.t()[3:9], base.t()]))
    assert with_inflated(plain, {}) is plain
    with pytest.raises(ValueError, match="must be inflated first"):
        nested.open(room())


def test_nested_in_a_merge(tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    base = draw((301, 433), torch.float32)
    turned = packed(disk, base.t())
    nested = joined("w", [rows_of(turned, 3, 433), rows_of(turned, 0, 3)], 0)
    whole = disk.stored(torch.cat([base.t()[3:], base.t()[:3]]))
    for way in ({}, {"io": "pread"}):
        made = merge_of(tmp_path, [{"w": nested}, {"w": whole}], "linear", **way)
        assert torch.equal(made["w"], torch.cat([base.t()[3:], base.t()[:3]]))


def test_a_strided_view_of_a_compressed_storage(tmp_path: Path) -> None:
    base = torch.arange(7 * 11 * 13, dtype=torch.float32)
    content = {"t": base.view(7, 143).t(), "w": base[5:9], "same": base[5:9], "c": draw((5,), torch.complex64).conj()}
    torch.save(content, tmp_path / "stored.pth")
    told: list[object] = []
    sm.convert(deflate(tmp_path / "stored.pth", tmp_path / "in.pth"), tmp_path / "out.safetensors", listener=told.append)
    assert_same(load_safetensors(tmp_path / "out.safetensors"), content)
    spooled = [event for event in told if type(event).__name__ == "Spooled"]
    assert [event.nbytes for event in spooled] == [4 * 1001, 40]  # each storage once


@pytest.mark.parametrize("step", [1, 7, 1 << 20])
@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_texts_and_big_endian_numbers_are_unpacked(step: int, size: int) -> None:
    """Any pieces of the packed bytes give the same bytes."""
    data = bytes(range(256)) * 3
    numbers = np.frombuffer(data, f">u{size}")
    expected = numbers.astype(f"<u{size}").tobytes()
    for form, packed in (("raw", data), ("text", data.decode("latin-1").encode())):
        record = PackedRecord(0, len(packed), len(data), form, size)
        assert b"".join(unpacked(record, (packed[i : i + step] for i in range(0, len(packed), step)))) == expected
    assert swapped(data, size) == expected


@pytest.mark.parametrize("packed", [b"\xc3", "ŀ".encode(), b"\xff"])
def test_a_text_with_other_characters_is_damage(packed: bytes) -> None:
    with pytest.raises(Damaged):
        list(unpacked(PackedRecord(0, len(packed), 1, "text"), iter([packed])))


@pytest.mark.parametrize("nbytes", [99_999, 100_001])
def test_a_record_of_another_length_stops_the_run(tmp_path: Path, nbytes: int) -> None:
    disk = Disk(tmp_path)
    path, offset = disk.write("ü".encode() * 100_000)
    spec = TensorSpec("w", DType.U8, (nbytes,))
    source = of_bytes(spec, path, 0, None, PackedRecord(offset, 200_000, nbytes, "text"))
    with pytest.raises(sm.FormatError, match="damaged"):
        merge_of(tmp_path, [{"w": source}], "linear", options={"integers": "first"})
