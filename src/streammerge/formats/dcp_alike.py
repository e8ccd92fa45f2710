"""Metadata of distributed checkpoints that tell the same: the steps of one run, which differ in their end only.

Each step's ``.metadata`` ends with the folder and a random name of the saving. What stands before is the same bytes in all
steps, and takes most of the time of reading them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import NamedTuple

MOST_BYTES = 64 << 20
"""Longer metadata are read without being compared, since they would be held as a whole."""
_END = b"\x8c\x0cstorage_meta"
_NAMES = frozenset(
    b"storage_meta StorageMeta checkpoint_id pathlib PosixPath WindowsPath pathlib._local save_id load_id modules version "
    b"1.0.0".split()
)
"""The texts of an end that are the same in all steps: names of fields and classes. Others differ."""
_TOLD = (b"state_dict_metadata", b"planner_data", b"storage_data")
"""The entries that are read. None of them may stand in the end."""
_MOST_END_BYTES = 1 << 16
_FRAME, _TEXT, _LONG_TEXT, _CLASS, _STOP = 0x95, 0x8C, ord("X"), 0x93, ord(".")
_PLAIN = frozenset(b"\x94\x93\x81\x85\x86\x87\x88\x89)}](NRtusaeb.")
"""Opcodes without an argument that may stand in the end: those of dictionaries, lists, tuples, objects and their names."""
_FIRST = ord("h")
"""The opcode that takes what was remembered under a number. The end takes the first only, the name of torch's module."""


class Likeness(NamedTuple):
    """What two files have in common if they tell the same: a hash of all before the end, and the end without its texts."""

    before: bytes
    end: bytes


def likeness(data: bytes) -> Likeness | None:
    """Returns what tells that files are alike. None for a file whose end is not as torch writes it."""
    at = data.rfind(_END)
    if at < 0 or len(data) - at > _MOST_END_BYTES:
        return None
    end, known = bytearray(), [False, False]  # known: which texts are names
    for opcode, argument in _opcodes(data, at):
        if opcode is None or argument in _TOLD or not _is_text(argument) or (opcode == _CLASS and not all(known[-2:])):
            return None
        end.append(opcode)
        if opcode in (_TEXT, _LONG_TEXT):
            known.append(argument in _NAMES)
            end += argument if known[-1] else b""
    frame = _last_frame(data, at)
    digest = hashlib.sha256(data[:frame])
    digest.update(memoryview(data)[min(frame + 8, at) : at])  # without the length of the last frame, which spans the end
    return Likeness(digest.digest(), bytes(end))


def _is_text(data: bytes) -> bool:
    try:
        data.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        return False
    return True


def _opcodes(data: bytes, at: int) -> Iterator[tuple[int | None, bytes]]:
    """Yields each opcode from ``at`` on with its text, (None, b"") for one that is not expected."""
    while at < len(data):
        opcode, at = data[at], at + 1
        size = 0
        if opcode in (_TEXT, _LONG_TEXT):
            width = 1 if opcode == _TEXT else 4
            size, at = int.from_bytes(data[at : at + width], "little"), at + width
        elif opcode == _FIRST and data[at : at + 1] == b"\0":
            at += 1
        elif opcode not in _PLAIN:
            break
        if at + size > len(data):
            break
        yield opcode, data[at : at + size]
        at += size
        if opcode == _STOP:
            if at == len(data):
                return
            break
    yield None, b""


def _last_frame(data: bytes, before: int) -> int:
    """Returns where the length of the last frame lies that begins before an offset; that offset if there are no frames."""
    found, at = before, 2
    while at < before and data[at] == _FRAME:
        found = at + 1
        at += 9 + int.from_bytes(data[found : found + 8], "little")
    return found
