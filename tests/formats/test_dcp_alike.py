"""Metadata of the steps of a run: read once where they tell the same, and each by itself otherwise."""

from __future__ import annotations

import os
import pickle
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import load_safetensors
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

import streammerge as sm
from formats.dcp_maker import sharded, write
from streammerge.formats import dcp, dcp_alike, dcp_items, dcp_metadata
from streammerge.stores import system
from streammerge.stores.locations import parse


def _step(name: str, seed: int, rows: int = 10, label: str = "") -> dict[str, torch.Tensor]:
    """Writes a step, whose metadata end as torch's own do, and returns its tensors."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {f"w{n}": torch.randn(rows, 3, generator=generator) for n in range(400)}  # several frames of a pickle
    path = write(Path(name), tensors, sharded(0, 3))
    with (path / ".metadata").open("rb") as file:
        made: Metadata = pickle.load(file)
    made.storage_meta = StorageMeta(Path(name), save_id=label or f"{seed:032}")
    with (path / ".metadata").open("wb") as file:
        pickle.dump(made, file, protocol=4)
    return tensors


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def _read(name: str) -> dcp_metadata.Metadata:
    path = parse(f"{name}/.metadata")
    return dcp_metadata.read_metadata((path, 0, path.size), name)


def test_steps_of_a_run_are_read_once() -> None:
    for name, seed in (("step-9", 1), ("step-10", 2)):  # the longer name changes the length of the last frame
        _step(name, seed)
    assert Path("step-9/.metadata").read_bytes() != Path("step-10/.metadata").read_bytes()
    first = _read("step-9")
    assert _read("step-10") is first


def test_what_was_read_is_forgotten_with_its_container() -> None:
    _step("step-9", 1)
    container = dcp.read(parse("step-9"))
    assert len(dcp_metadata._KNOWN) == 1
    del container
    assert not dcp_metadata._KNOWN


def test_archives_of_the_next_step_are_known_by_their_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    for number in (1, 2):
        _step(f"step-{number}", number)
    _step("step-3", 3, rows=11)
    read, parsed = dcp_items.torch_zip.read_stream, list[str]()

    def counted(stream: Any, path: Any, *more: Any) -> Any:
        parsed.append(path.parent.name)
        return read(stream, path, *more)

    monkeypatch.setattr(dcp_items.torch_zip, "read_stream", counted)
    kept = [dcp.read(parse(f"step-{number}")) for number in (1, 2, 3)]
    assert {name: parsed.count(name) for name in parsed} == {"step-1": 2, "step-3": 2}  # of 4 and 3, or 4 and 4 rows
    assert len(kept) == 3


def test_an_archive_of_the_next_step_that_begins_in_another_way_is_read() -> None:
    for number in (1, 2):
        _step(f"step-{number}", number)
    kept = dcp.read(parse("step-1"))
    file = max(Path("step-2").glob("*.distcp"), key=lambda path: path.stat().st_size)
    data = file.read_bytes()
    at = data.rindex(b"FloatStorage")
    file.write_bytes(data[:at] + b"ShortStorage" + data[at + 12 :])
    with pytest.raises(sm.FormatError, match=r"w\d+"):
        dcp.read(parse("step-2"))
    assert kept.tree


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="the system cannot be asked")
def test_the_heads_of_all_archives_are_asked_for_before_one_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    _step("step-1", 1)
    asked = list[tuple[int, int]]()
    monkeypatch.setattr(system, "read_ahead", lambda fd, offset, nbytes: asked.append((offset, offset + nbytes)))
    read = dcp_items.torch_zip.read_stream

    def checked(stream: Any, path: Any, place: tuple[int, int], *more: Any) -> Any:
        assert len(asked) == 400 * 3
        assert any(begin <= place[0] < end for begin, end in asked)
        return read(stream, path, place, *more)

    monkeypatch.setattr(dcp_items.torch_zip, "read_stream", checked)
    dcp.read(parse("step-1"))
    assert len(asked) == 400 * 3


def test_steps_of_a_run_are_merged_right() -> None:
    tensors = [_step(f"step-{number}", number) for number in (8, 9, 10)]
    sm.merge("step-*", "out.safetensors")
    made = load_safetensors(Path("out.safetensors"))
    for name in tensors[0]:
        wanted = sum(each[name].double() for each in tensors) / 3
        assert torch.equal(made[name], wanted.float())


@pytest.mark.parametrize("rows", [11, 9])
def test_other_shapes_are_other_metadata(rows: int) -> None:
    _step("step-1", 1)
    _step("step-2", 2, rows=rows)
    first, second = _read("step-1"), _read("step-2")
    assert second is not first
    assert second.tensors["w0"].shape == (rows, 3)


def test_every_changed_byte_before_the_end_counts() -> None:
    _step("step-1", 1)
    data = Path("step-1/.metadata").read_bytes()
    wanted = dcp_alike.likeness(data)
    assert wanted is not None
    end = data.rfind(b"storage_meta") - 2
    frame = dcp_alike._last_frame(data, end)
    assert frame > 1000  # there are several
    for at in (*range(40), *range(end - 40, end), *range(frame - 3, frame), *range(frame + 8, frame + 11)):
        changed = bytearray(data)
        changed[at] ^= 1
        assert dcp_alike.likeness(bytes(changed)) != wanted, at


@pytest.mark.parametrize("text", ["state_dict_metadata", "planner_data", "storage_data"])
def test_an_end_that_tells_more_is_not_alike(text: str) -> None:
    _step("step-1", 1, label="".join(list(text)))  # another object than the key, so the pickle has it as a text again
    assert dcp_alike.likeness(Path("step-1/.metadata").read_bytes()) is None


@pytest.mark.parametrize(
    "end", [b"", b"\x8c\x0cstorage_meta", b"\x8c\x0cstorage_meta\x94\x8c\xff.", b"\x8c\x0cstorage_meta.."]
)
def test_an_end_that_is_cut_is_not_alike(end: bytes) -> None:
    assert dcp_alike.likeness(b"\x80\x04" + end) is None


def test_an_end_with_a_call_by_name_is_not_alike() -> None:
    data = b"\x80\x04\x8c\x0cstorage_metacos\nsystem\n."
    assert dcp_alike.likeness(data) is None
    assert dcp_alike.likeness(data.replace(b"cos\nsystem\n", b"N")) is not None


def _told(read: Callable[[], dcp_metadata.Metadata]) -> dcp_metadata.Metadata | type[Exception]:
    try:
        return read()
    except sm.StreammergeError as error:
        return type(error)


def test_a_damaged_end_tells_the_same_with_and_without_another_step() -> None:
    for seed in (1, 2):
        write(Path(f"step-{seed}"), {f"w{n}": torch.ones(4, 3) for n in range(3)}, sharded(0, 3))
        path = Path(f"step-{seed}/.metadata")
        made: Metadata = pickle.loads(path.read_bytes())
        made.storage_meta = StorageMeta(path.parent, save_id=f"{seed:032}")
        path.write_bytes(pickle.dumps(made, protocol=4))
    first, data = _read("step-1"), Path("step-2/.metadata").read_bytes()
    assert _read("step-2") is first
    end, drawn, hits = data.rfind(b"storage_meta"), random.Random(1), 0
    Path("m").mkdir()
    inserted = [b"", b"\x94", b"u", b"(", b"N", b"0", b"\xff", b"\x8c\1a\x94"]
    for _ in range(600):
        changed, at = bytearray(data), drawn.randrange(end - 20, len(data))
        changed[at : at + drawn.randrange(3)] = drawn.choice(inserted)
        Path("m/.metadata").write_bytes(changed)
        made_anew, found = _told(partial(dcp_metadata._read, bytes(changed), "m")), _told(partial(_read, "m"))
        assert found == made_anew, bytes(changed[end:])
        hits += found is first
    assert hits > 5
