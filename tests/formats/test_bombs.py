"""Small files that claim much memory or time: each is answered with little of both."""

from __future__ import annotations

import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import hostile as h

MEASURED = """
import json, sys
from contextlib import suppress
from streammerge import StreammergeError, api
from streammerge.cli import render

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

with suppress(StreammergeError):
    api.plan(sys.argv[2])  # loads what every plan loads
before, said = peak(), "read"
try:
    index = api.inspect(sys.argv[1])
    shown = len(render.index_text(index, True)) + len(json.dumps(render.index_json(index, True)))
    api.plan(sys.argv[1])
except StreammergeError as error:
    said = str(error)
print(peak() - before, said)
"""


def bomb(opcodes: bytes) -> bytes:
    """Returns a checkpoint with a tensor, and beside it the object that the opcodes leave on the stack."""
    return h.zip_bytes(b"\x80\x04}X\1\0\0\0w" + h.tensor() + b"sX\1\0\0\0x" + opcodes + b"s.", compress=True)


def pairs(count: int) -> h.Raw:
    return h.memoized(1, [(str(i), i) for i in range(count)])


MEGABYTE = h.memoized(1, "a" * (1 << 20))
NESTED_NAMES = h.stream(
    {"x": h.Raw(MEGABYTE + b"0" + b"}j\1\0\0\0" * 31 + h.dump({f"m{i}": {"w": h.tensor()} for i in range(99)}) + b"s" * 31)}
)
BOMBS: dict[str, Callable[[], bytes]] = {
    "tuples as a value": lambda: bomb(h.shared(60)),
    "lists as a value": lambda: bomb(h.shared(60, kind="l")),
    "wide lists": lambda: bomb(h.shared(20, 500, kind="l")),
    "a bomb under many keys": lambda: h.zip_bytes(
        h.stream({"w": h.tensor(), "k": h.Raw(h.shared(60)), **{f"k{i}": h.again(1060) for i in range(999)}})
    ),
    "tuples as a key": lambda: bomb(b"}" + h.shared(60) + b"K\1s"),
    "tuples as many keys": lambda: bomb(b"}(" + h.shared(5) + b"K\1" + b"j\xed\3\0\0K\1" * 200_000 + b"u"),
    "object as a key": lambda: bomb(b"}" + h.name("a.B") + h.shared(60) + b"\x85R}s"),
    "object as a name": lambda: h.zip_bytes(
        h.stream({"x": h.Raw(b"}" + h.name("a.B") + h.shared(60) + b"\x85R" + h.dump({"w": h.tensor()}) + b"s")})
    ),
    "persistent id": lambda: bomb(h.shared(60) + b"Q"),
    "huge memo index": lambda: bomb(b"Nr\xff\xff\xff\xff"),
    "bytes of 2**40": lambda: bomb(b"\x8e" + struct.pack("<Q", 1 << 40)),
    "text of 2**32": lambda: bomb(b"X\xff\xff\xff\xff"),
    "frame of 2**60": lambda: bomb(b"\x95" + struct.pack("<Q", 1 << 60) + b"N"),
    "bytes of 2**40 in the legacy form": lambda: h.legacy_bytes(b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40) + b"."),
    "huge number": lambda: bomb(b"\x8b" + struct.pack("<i", 1 << 20) + b"\x7f" * (1 << 20)),
    "huge number as text": lambda: bomb(b"L" + b"9" * 100_000 + b"L\n"),
    "huge number as many keys": lambda: bomb(b"}(\x8a\xff" + b"\x7f" * 255 + b"r\1\0\0\0" + b"Nj\1\0\0\0" * 100_001 + b"u"),
    "deep lists": lambda: bomb(b"]" * 100_000 + b"a" * 99_999),
    "deep tuples": lambda: bomb(b")" + b"\x85" * 100_000),
    "deep dictionaries": lambda: bomb(b"}" + b"K\1}" * 100_000 + b"s" * 100_000),
    "deep calls": lambda: bomb(h.name("a.B") + b")R" * 100_000),
    "deep subclasses": lambda: bomb((h.name("torch._tensor._rebuild_from_type_v2") + b"(") * 5_000 + b"t" * 5_000),
    "pickle of 400 MB": lambda: h.zip_bytes(b"\0" * (400 << 20), compress=True),
    "empty sets": lambda: bomb(b"(" + b"\x8f" * (8 << 20) + b"t"),
    "empty lists": lambda: bomb(b"](" + b"]" * (8 << 20) + b"e"),
    "marks": lambda: bomb(b"(" * (8 << 20)),
    "memo": lambda: bomb(b"N" + b"\x94" * (8 << 20)),
    "the same tensor": lambda: bomb(h.memoized(1, h.tensor()) + b"0](" + b"h\1" * (4 << 20) + b"e"),
    "ordered dictionaries of one list": lambda: bomb(
        pairs(10_000) + b"0" + (h.name("collections.OrderedDict") + b"h\1\x85R0") * 10_000 + b"N"
    ),
    "encodings of one text": lambda: bomb(
        MEGABYTE + b"0](" + (h.name("_codecs.encode") + b"h\1X\6\0\0\0latin1\x86R") * 10_000 + b"e"
    ),
    "names of one text": lambda: bomb(MEGABYTE + b"0](" + b"h\1h\1\x93" * 10_000 + b"e"),
    "one long text": lambda: bomb(MEGABYTE + b"0](" + b"h\1" * 100_000 + b"e"),
    "one long name": lambda: h.zip_bytes(NESTED_NAMES),
    "2**60 elements": lambda: h.zip_bytes(h.stream({"w": h.tensor((1 << 59,), (0,))})),
    "optimizer of 2**60 elements": lambda: h.zip_bytes(
        h.stream({"m": {"w": h.tensor()}, "optimizer": {"w": h.tensor((1 << 59,), (0,))}})
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("label", BOMBS)
def test_bombs_take_little_memory_and_time(label: str, tmp_path: Path) -> None:
    path = tmp_path / "bomb.pth"
    path.write_bytes(BOMBS[label]())
    (tmp_path / "plain.pth").write_bytes(bomb(b"N"))
    assert path.stat().st_size < 5 << 20
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, path, tmp_path / "plain.pth"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr[-2000:]
    kibibytes, _, said = done.stdout.partition(" ")
    assert int(kibibytes) < 64 << 10, done.stdout
    assert said.strip() == "read" or "bomb.pth" in said
