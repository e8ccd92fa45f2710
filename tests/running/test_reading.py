"""Works that read files: checksums of parts, and hashes of whole files."""

from __future__ import annotations

import hashlib
import pickle
import random
import zlib
from contextlib import closing
from pathlib import Path

import pytest

import streammerge as sm
from streammerge.running.executors.base import Executors, Halted, Host
from streammerge.running.executors.processes import ProcessExecutor
from streammerge.running.executors.threads import ThreadExecutor
from streammerge.running.reading import RANGE_BYTES, ChecksumWork, HashWork, neighbours
from streammerge.stores.checksums import CRC32
from streammerge.stores.digests import COPY_BYTES
from streammerge.stores.locations import parse

BOTH = pytest.mark.parametrize("executor", [ThreadExecutor, ProcessExecutor])
SIZES = [0, 1, 4097, COPY_BYTES, 2 * COPY_BYTES + 5]


@pytest.fixture
def files(tmp_path: Path) -> dict[str, bytes]:
    made = {}
    for number, size in enumerate(SIZES):
        content = hashlib.shake_128(bytes([number])).digest(size)
        (tmp_path / str(number)).write_bytes(content)
        made[str(tmp_path / str(number))] = content
    return made


@BOTH
def test_checksums_of_parts(files: dict[str, bytes], executor: Executors) -> None:
    parts = [
        ((path, start), parse(path), start, len(content) - start - cut)
        for path, content in files.items()
        for start, cut in ((0, 0), (3, 1), (len(content), 0))
        if start + cut <= len(content)
    ]
    with closing(executor(2)) as running:
        results = list(running.run(ChecksumWork(CRC32), neighbours(parts)))
    found = dict(pair for values, sums in results for pair in zip(values, sums, strict=True))
    assert found == {
        which: zlib.crc32(files[path][start : start + nbytes]) for which, _, start, nbytes in parts for path in which[:1]
    }


@BOTH
def test_a_file_that_ends_early_is_told(files: dict[str, bytes], executor: Executors) -> None:
    path = list(files)[2]
    with closing(executor(2)) as running, pytest.raises(sm.ChangedError, match="ended before byte 4098"):
        list(running.run(ChecksumWork(CRC32), neighbours([(0, parse(path), 0, 4098)])))


@BOTH
def test_hashes(files: dict[str, bytes], executor: Executors) -> None:
    with closing(executor(2)) as running:
        found = dict(running.run(HashWork(), [(path, parse(path)) for path in files]))
    assert found == {path: hashlib.sha256(content).hexdigest() for path, content in files.items()}


def test_they_are_small_and_stop_in_the_middle_of_a_file(files: dict[str, bytes]) -> None:
    stopping = Host(lambda: True)
    path = parse(list(files)[-1])
    for work, unit in ((ChecksumWork(CRC32), next(neighbours([(0, path, 0, SIZES[-1])]))), (HashWork(), (0, path))):
        assert len(pickle.dumps(work)) < 300
        with pytest.raises(Halted):
            work.open(stopping).run(unit)  # type: ignore[attr-defined]


@pytest.mark.parametrize("long", [0, 1, COPY_BYTES - 1, COPY_BYTES, RANGE_BYTES - 7, RANGE_BYTES + 1])
def test_neighbours_are_read_together_and_have_their_own_checksums(tmp_path: Path, long: int) -> None:
    """Also across the ends of the buffer and of a unit, with empty parts, gaps, and another file between."""
    content = random.Random(1).randbytes(RANGE_BYTES + 2 * COPY_BYTES)
    (tmp_path / "a").write_bytes(content)
    (tmp_path / "b").write_bytes(content[::-1])
    one, other = parse(tmp_path / "a"), parse(tmp_path / "b")
    sizes = [3, 0, long, 1, 5, COPY_BYTES // 2, 7]
    starts = [sum(sizes[:n]) + 2 * (n > 4) for n in range(len(sizes))]
    parts = [
        ((path, start), path, start, size) for path in (one, other, one) for start, size in zip(starts, sizes, strict=True)
    ]
    units = list(neighbours(parts))
    assert 6 <= len(units) <= 15
    worker = ChecksumWork(CRC32).open(Host(lambda: False))
    for (path, start), value, size in (
        (*pair, size) for unit in units for *pair, size in zip(*worker.run(unit), unit[3], strict=True)
    ):
        data = content if path is one else content[::-1]
        assert value == zlib.crc32(data[start : start + size])
