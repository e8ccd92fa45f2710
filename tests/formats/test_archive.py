"""Places of the records of zip archives. The oracle is the zipfile module."""

from __future__ import annotations

import io
import random
import zipfile
from pathlib import Path

import pytest

import streammerge as sm
from streammerge.formats.archive import MOST_INFLATED_BYTES, first_name, head, matches, members, record

RECORDS = {"a/data.pkl": b"x" * 1000, "a/empty": b"", "a/one": b"1", "a/noise": random.Random(1).randbytes(70_001)}


def archive(packing: int = zipfile.ZIP_STORED, records: dict[str, bytes] = RECORDS) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", packing) as made:
        for name, data in records.items():
            made.writestr(name, data)
    return stream.getvalue()


@pytest.mark.parametrize("packing", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_every_record_is_read_back(packing: int) -> None:
    data = archive(packing)
    stream, found = io.BytesIO(data), members(io.BytesIO(data), "x.pth")
    assert list(found) == list(RECORDS)
    for name, content in RECORDS.items():
        member = found[name]
        assert (member.nbytes, member.record is None) == (len(content), packing == zipfile.ZIP_STORED)
        if member.record is None:
            assert data[member.offset : member.offset + member.nbytes] == content
        assert record(stream, member, len(content), "x.pth") == content
        for nbytes in (1, 999, 1 << 20):
            assert head(stream, member, nbytes, "x.pth") == content[:nbytes]
    assert record(stream, None, 5, "x.pth") == b""


def test_a_record_beyond_the_limit_is_refused_before_it_is_unpacked() -> None:
    for packing in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        data = archive(packing)
        with pytest.raises(sm.FormatError, match="of 1000 bytes is beyond the limit of 999"):
            record(io.BytesIO(data), members(io.BytesIO(data), "x")["a/data.pkl"], 999, "x")
    bomb = archive(zipfile.ZIP_DEFLATED, {"b": bytes(MOST_INFLATED_BYTES + 1)})
    with pytest.raises(sm.FormatError, match=f"beyond the limit of {MOST_INFLATED_BYTES}"):
        record(io.BytesIO(bomb), members(io.BytesIO(bomb), "x")["b"], 1 << 40, "x")


def test_the_first_bytes_tell_an_archive_and_its_first_name() -> None:
    data = archive()
    assert matches(data)
    assert first_name(data[:512]) == b"a/data.pkl"
    assert matches(b"02" + data[2:]), "GPT-SoVITS writes a version over the magic"
    assert not matches(b"x2" + data[2:])
    assert not matches(b"0x" + data[2:])
    assert not matches(b"")


def test_a_directory_that_lies_is_refused() -> None:
    data = archive()
    for changed, words in (
        (data[: len(data) // 2], "its zip directory cannot be read"),
        (b"", "its zip directory cannot be read"),
        (data.replace(b"a/one", b"a/two", 1), "has another name in its own header"),
        (data.replace(b"PK\3\4", b"PK\3\5"), "is not where the zip directory says"),
        (data.replace(b"a/empty", b"a/noise"), "holds the record a/noise twice"),
    ):
        with pytest.raises(sm.FormatError, match=words):
            members(io.BytesIO(changed), "x.pth")
    with pytest.raises(sm.FormatError, match=f"compressed by method {zipfile.ZIP_BZIP2}"):
        members(io.BytesIO(archive(zipfile.ZIP_BZIP2)), "x.pth")


def test_records_that_overlap_are_refused() -> None:
    """Two entries of the directory point at one local header, as in a bomb of shared bytes."""
    data = bytearray(archive(records={"aa": b"12345", "ab": b"12345"}))
    second = data.rindex(b"PK\1\2")
    data[second + 42 : second + 46] = bytes(4)  # the offset of the second header: that of the first
    data[second + 46 : second + 48] = b"ab"
    with pytest.raises(sm.FormatError, match="has another name"):
        members(io.BytesIO(data), "x.pth")
    inner = archive(records={"ab": b"12345"})
    data = bytearray(archive(records={"aa": inner, "ab": b"12345"}))
    second = data.rindex(b"PK\1\2")
    data[second + 42 : second + 46] = data.index(b"PK\3\4", 4).to_bytes(4, "little")
    with pytest.raises(sm.FormatError, match="the records aa and ab overlap"):
        members(io.BytesIO(data), "x.pth")


def test_no_byte_of_a_compressed_record_is_none(tmp_path: Path) -> None:
    """zlib takes a limit of 0 for no limit, and a small record can unpack to any size."""
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as made:
        made.writestr("x", bytes(100_000))
    with open(tmp_path / "a.zip", "rb") as stream:
        member = members(stream, "a.zip")["x"]
        assert [len(head(stream, member, count, "a.zip")) for count in (0, 1, 7)] == [0, 1, 7]
