"""Thousands of small random injuries to valid checkpoints: inspecting one gives a result or streammerge's own error."""

from __future__ import annotations

import io
import json
import random
import zipfile
from pathlib import Path

import pytest

import hostile as h
import streammerge
from streammerge.cli import render
from streammerge.errors import StreammergeError

MUTANTS = 500
PICKLE = h.stream(
    {"m": {"w": h.tensor(), "v": h.tensor((2, 2), (1, 2))}, "c": h.call("a.b", 1, "x"), "s": {"lr": 0.1, "l": [1, None]}}, 4
)
MODULE = (
    h.name("a.Net")
    + h.dump(())
    + b"\x81"
    + h.dump({"_modules": {}, "_parameters": {"w": h.tensor()}, "_buffers": {}})
    + b"b"
)
SEEDS: dict[str, bytes] = {
    "zip": h.zip_bytes(PICKLE),
    "zip, compressed": h.zip_bytes(PICKLE, compress=True),
    "zip of a module": h.zip_bytes(h.stream(h.Raw(MODULE))),
    "legacy": h.legacy_bytes(PICKLE),
    "tar": h.tar_bytes(h.stream({"w": h.CONTAINERS["tar"][1]}), [("1", "0", 0, 4)]),
    "safetensors": h.safetensors_bytes({"__metadata__": {"a": "b"}, "w": h.f32(0, 8), "v": h.f32(8, 16, [1, 2])}),
    "index": json.dumps({"metadata": {"total_size": 32}, "weight_map": {"w": "a", "v": "b"}}).encode(),
}
PIECES = [bytes([code]) for code in b"RQbt(}]sueo02N)\x81\x85\x8f\x90\x91\x92\x93\x94"]
PIECES += [
    b"K\0",
    b"h\0",
    b"J\xff\xff\xff\xff",
    b"\xff" * 8,
    b"\0" * 8,
    b"\xff\xff\xff\x7f",
    b'"',
    b"{",
    b"-",
    b"1e9",
    b"null",
]


def injured(content: bytes, chance: random.Random) -> bytes:
    made = bytearray(content)
    for _ in range(chance.choice([1, 1, 2, 4, 10])):
        at, piece = chance.randrange(len(made) + 1), chance.choice(PIECES)
        kind = chance.randrange(7)
        if kind == 0:
            made[at : at + 1] = bytes([chance.randrange(256)])
        elif kind == 1 and at < len(made):
            made[at] ^= 1 << chance.randrange(8)
        elif kind == 2:
            made[at : at + len(piece)] = piece
        elif kind == 3:
            made[at:at] = piece
        elif kind == 4:
            del made[at : at + chance.randrange(1, 9)]
        elif kind == 5:
            start = chance.randrange(len(made) + 1)
            made[at:at] = made[start : start + chance.randrange(1, 40)]
        elif chance.random() < 0.2:
            del made[at:]
    return bytes(made)


def injured_within(content: bytes, chance: random.Random) -> bytes:
    """An archive that is whole, but for one of its records."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        records = {i.filename: archive.read(i) for i in archive.infolist()}
    records["archive/data.pkl"] = injured(records["archive/data.pkl"], chance)
    return h.zip_of(records.items())


@pytest.mark.parametrize("label", SEEDS)
def test_injured_files_are_read_or_refused(label: str, tmp_path: Path) -> None:
    for shard, content in (("a", {"w": h.f32(0, 16)}), ("b", {"v": h.f32(0, 16)})):
        (tmp_path / shard).write_bytes(h.safetensors_bytes(content))
    path = tmp_path / ("x.index.json" if label == "index" else "x.pth")
    path.write_bytes(SEEDS[label])
    streammerge.inspect(path)
    chance = random.Random(label)
    for number in range(MUTANTS):
        within = label.startswith("zip") and number % 4
        path.write_bytes((injured_within if within else injured)(SEEDS[label], chance))
        try:
            index = streammerge.inspect(path)
            render.index_text(index, True)
            json.dumps(render.index_json(index, True))
        except StreammergeError as error:
            assert str(error).isprintable()
