"""Outputs of object stores: the lock, and what is visible when. The suite of stores has the rest (test_objects.py)."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import streammerge as sm
from streammerge.stores import staged
from streammerge.stores.base import Location
from streammerge.stores.locations import parse
from streammerge.stores.lock import this_run
from streammerge.stores.parts import Part, PartedOutput
from streammerge.stores.staged import home_of, whole_tag


def lock_of(out: Location, **fields: Any) -> None:
    (home_of(out) / "lock").write_whole(json.dumps(this_run()._replace(**fields)._asdict()).encode(), overwrite=True)


def test_the_lock_of_a_dead_process_is_taken_over(s3: str) -> None:
    out = parse(f"{s3}/out")
    lock_of(out, pid=(1 << 22) + 1)
    out.stage().abort()
    assert not (home_of(out) / "lock").exists()


def test_the_lock_of_another_machine_is_taken_over_when_it_is_old(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    out = parse(f"{s3}/out")
    lock_of(out, host="elsewhere", boot="another", pid=1)
    with pytest.raises(sm.LockedError, match="being written by process 1 on elsewhere"):
        out.stage()
    monkeypatch.setattr(staged, "LEASE_SECONDS", -1.0)
    out.stage().abort()


@pytest.mark.parametrize("ahead", [-3600.0, 3600.0])
def test_the_age_of_a_lock_is_told_by_the_clock_of_the_store(
    s3: str, ahead: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = parse(f"{s3}/out")
    lock_of(out, host="elsewhere", boot="another", pid=1)
    now = time.time
    monkeypatch.setattr(staged.time, "time", lambda: now() + ahead)
    with pytest.raises(sm.LockedError, match="on elsewhere"):
        out.stage()
    assert [each.name for each in home_of(out).children()] == ["lock"]
    monkeypatch.setattr(staged, "LEASE_SECONDS", -1.0)
    out.stage().abort()


def test_a_run_that_lost_its_lock_publishes_nothing(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staged, "BEAT_SECONDS", 0.05)
    out = parse(f"{s3}/out")
    staging = out.stage()
    staging.create("x", 1).write_full(b"1", 0)
    lock_of(out, host="elsewhere")
    until = 0
    while not staging._lock._lost and until < 200:  # type: ignore[attr-defined]
        until += 1
        staged.time.sleep(0.05)
    with pytest.raises(sm.LockedError, match="taken over"):
        staging.commit(as_folder=True)
    staging.abort()
    assert not out.exists()
    assert (home_of(out) / "lock").exists()


def test_indexes_and_receipts_come_last(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = []
    for number in (1, 2):
        folder = tmp_path / str(number)
        folder.mkdir()
        save_file({f"w{n}": torch.full((100, 100), float(n)) for n in range(3)}, folder / "model.safetensors")
        (folder / "config.json").write_text('{"hidden_size": 100}')
        (folder / "tokenizer.json").write_text("{}")
        paths.append(folder)
    store: Any = parse(s3).store
    made: list[str] = []
    put = type(store).put

    def seen(self: Any, location: Location, *more: Any) -> Any:
        if ".streammerge" not in location.key:
            there = [each.name for each in parse(f"{s3}/out").children()]
            assert sum(name.endswith(".safetensors") for name in there) == 3
            made.append(location.name)
        return put(self, location, *more)

    monkeypatch.setattr(type(store), "put", seen)
    sm.merge(paths, f"{s3}/out/", max_shard_size="50kB")
    assert made[-1] == "streammerge.json"
    assert made[-2] == "model.safetensors.index.json"


def test_the_tag_of_a_whole_object_follows_from_its_parts() -> None:
    tags = ["0cc175b9c0f1b6a831c399e269772661", "92eb5ffee6ae2fec3ad71c777531578f"]
    assert whole_tag([Part(1, tag) for tag in tags]) == "96e024ba2074fe77e8e965ba43a704be-2"
    assert whole_tag([Part(1, "not a digest")]) == ""


def test_an_archive_sends_its_records_while_it_is_made(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The header of a record holds its checksum. Parts do not wait for it longer than for the record."""
    paths = []
    for number in (1, 2):
        tensors = {f"w{n}": torch.full((1000, 1000), float(n * number)) for n in range(30)}
        paths.append(tmp_path / f"{number}.pth")
        torch.save(tensors, paths[-1])
    most, covered = [0], PartedOutput._covered

    def watched(self: PartedOutput, *args: Any) -> None:
        most[0] = max(most[0], self.waiting)
        covered(self, *args)

    monkeypatch.setattr(PartedOutput, "_covered", watched)
    sm.merge(paths, f"{s3}/out.pth")
    sm.merge(paths, tmp_path / "out.pth")
    there = parse(f"{s3}/out.pth")
    assert there.read(0, there.size) == (tmp_path / "out.pth").read_bytes()
    assert most[0] < 15  # of 15 parts; how many depends on how soon results are seen
