"""Local files that several machines write: exclusive creation, files made by whoever is first, publishing."""

from __future__ import annotations

import errno
import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import streammerge as sm
from streammerge.stores import lock
from streammerge.stores.locations import parse
from streammerge.stores.written_files import SharedOutputFile
from streammerge.units import PAGE_BYTES


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("durable", [True, False])
def test_a_small_file_is_created_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool, durable: bool) -> None:
    if not links:

        def no_link(*names: object) -> None:
            raise OSError(errno.EPERM, "no links here")

        monkeypatch.setattr(os, "link", no_link)
    place = parse(tmp_path / "claim")
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(lambda n: place.create_small(b"%d" % n, durable), range(40)))
    assert sum(got) == 1
    assert (tmp_path / "claim").read_bytes() == b"%d" % got.index(True)
    assert os.listdir(tmp_path) == ["claim"], "nothing else is left"


def test_a_killed_process_is_in_nobodys_way(tmp_path: Path) -> None:
    """Containers have equal names, and their processes equal ids."""
    code = """
import os, sys
from streammerge.stores.locations import parse
os.getpid = lambda: 1
if sys.argv[1] == "killed":
    os.link = lambda *names: os._exit(9)
print(parse("claim").create_small(b"x"))
"""
    for how, said in (("killed", (9, "")), ("alive", (0, "True\n"))):
        done = subprocess.run([sys.executable, "-c", code, how], cwd=tmp_path, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == said, done.stderr
    assert (tmp_path / "claim").read_bytes() == b"x"


def test_an_answer_that_was_lost_is_no_refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server of NFS may make the link and the client not hear of it, and ask again."""
    link = os.link

    def twice(source: Any, target: Any) -> None:
        link(source, target)
        link(source, target)

    monkeypatch.setattr(os, "link", twice)
    assert parse(tmp_path / "claim").create_small(b"x")
    assert not parse(tmp_path / "claim").create_small(b"y")


def test_a_small_file_is_replaced_in_place(tmp_path: Path) -> None:
    place = parse(tmp_path / "beat")
    place.replace_small(b"longer")
    number = (tmp_path / "beat").stat().st_ino
    place.replace_small(b"short")
    assert (tmp_path / "beat").read_bytes() == b"short"
    assert (tmp_path / "beat").stat().st_ino == number


@pytest.mark.parametrize("exact", [True, False])
def test_ranges_of_several_machines(tmp_path: Path, exact: bool) -> None:
    """Neighbours share a page, and nobody writes a byte of the other."""
    size = 5 * PAGE_BYTES + 17
    cuts = [0, 1, 100, PAGE_BYTES - 1, PAGE_BYTES + 3, 3 * PAGE_BYTES, 3 * PAGE_BYTES + 1, size]
    files = [SharedOutputFile(parse(tmp_path / "f"), size, exact) for _ in range(3)]
    content = os.urandom(size)
    for turn, (a, b) in enumerate(pairwise(cuts)):
        files[turn % 3].write_full(content[a:b], a)
    for file in files:
        file.sync()
        file.close()
    assert (tmp_path / "f").read_bytes() == content


def test_parts_of_pages_are_written_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through a descriptor with O_DSYNC: a client of NFS then sends no byte around them."""
    written: dict[bool, list[tuple[int, int]]] = {True: [], False: []}
    pwrite = os.pwrite

    def spied(fd: int, data: Any, offset: int) -> int:
        import fcntl

        written[bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DSYNC)].append((offset, len(data)))
        return pwrite(fd, data, offset)

    file = SharedOutputFile(parse(tmp_path / "f"), 4 * PAGE_BYTES, exact=True)
    monkeypatch.setattr(os, "pwrite", spied)
    file.write_full(bytes(3 * PAGE_BYTES), 10)
    file.write_full(b"abc", 3 * PAGE_BYTES + 10)
    assert written == {
        True: [(10, PAGE_BYTES - 10), (3 * PAGE_BYTES, 10), (3 * PAGE_BYTES + 10, 3)],
        False: [(PAGE_BYTES, 2 * PAGE_BYTES)],
    }
    file.close()


def test_who_comes_second_keeps_the_bytes_of_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "one_kernel", lambda folder: False)
    place = parse(tmp_path / "out").join("key")
    place.begin(("units",))
    place.begin(("units",))
    first = place.open("a/b.safetensors", 100)
    first.write_full(b"x" * 100, 0)
    second = pickle.loads(pickle.dumps(place)).open("a/b.safetensors", 100)
    buffer = bytearray(100)
    assert second.read_into(memoryview(buffer), 0) == 100
    assert buffer == b"x" * 100
    assert not (tmp_path / "out").exists()


def test_publishing_and_a_crash_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = parse(tmp_path / "out.safetensors")
    place = out.join("key")
    place.begin(("units",))
    place.open("out.safetensors", 3).write_full(b"abc", 0)
    assert not place.published()
    staging = place.stage(False, {})
    staging.create("out.safetensors", 3, keep=True)
    monkeypatch.setattr(type(place), "clear", lambda self: None)  # the machine dies before that
    staging.commit(as_folder=False)
    monkeypatch.undo()
    assert place.published()
    assert (tmp_path / "out.safetensors").read_bytes() == b"abc"
    (tmp_path / "out.safetensors").unlink()
    assert not place.published()
    place.clear()
    assert os.listdir(tmp_path) == []


def test_an_output_of_others_is_not_replaced(tmp_path: Path) -> None:
    out = parse(tmp_path / "out.safetensors")
    place = out.join("key")
    place.begin(())
    (tmp_path / "out.safetensors").write_bytes(b"theirs")
    with pytest.raises(sm.RecipeError, match="exists already"):
        place.stage(False, {})
    assert Path(place.home.key).is_dir(), "what the machines have made stays"
