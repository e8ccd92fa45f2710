"""Receipts of units: read as they were written, small, refused when damaged."""

from __future__ import annotations

import random
from array import array

from streammerge.planning import units
from streammerge.running.unit_receipts import UnitReceipt


def test_a_receipt_is_read_as_it_was_written_and_small() -> None:
    draw = random.Random(1)
    sums = array("I", [draw.getrandbits(32) for _ in range(units.MOST_TENSORS)])
    plain = UnitReceipt(sums)
    assert UnitReceipt.read(plain.data(), len(sums)) == plain
    found = {n: {"a.safetensors": n + 1, "b.safetensors": 2} for n in range(4)}
    assert UnitReceipt.read(UnitReceipt(sums, found).data(), len(sums)) == UnitReceipt(sums, found)
    many = {10_000 + n: {f"models/number-{n}.safetensors": 7} for n in range(120)}
    data = UnitReceipt(sums, many).data()
    assert max(map(len, (plain.data(), data))) < 1000
    read = UnitReceipt.read(data, len(sums))
    assert read is not None
    assert 7 * len(read.nonfinite) + read.more == 7 * 120, "what is not listed is counted"


def test_a_damaged_receipt_is_none() -> None:
    data = UnitReceipt(array("I", [1, 2, 3])).data()
    assert UnitReceipt.read(data, 3) is not None
    assert UnitReceipt.read(data, 2) is None
    assert UnitReceipt.read(b"", 0) is None
    for at in range(len(data) - 1):
        assert UnitReceipt.read(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :], 3) is None
