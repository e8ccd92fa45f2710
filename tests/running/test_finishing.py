"""Publishing what several machines have made: whole or not at all, by one machine, again after a crash."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import trained
from safetensors.torch import save_file

import streammerge as sm
from streammerge.events import TaskDone
from streammerge.planning import saved, units
from streammerge.requests.machines import joint_of
from streammerge.running.finishing import spans
from streammerge.stores import claims, joint, lock
from streammerge.stores.base import Joint
from streammerge.stores.claims import Claims
from streammerge.stores.files import file_status
from streammerge.stores.locations import parse

LEASE_SECONDS = 0.5


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A plan of several units; what it should make is in ``whole.safetensors``."""
    monkeypatch.setattr(units, "_LEAST_COST", 10_000)
    monkeypatch.setattr(saved, "LEASE_SECONDS", LEASE_SECONDS)
    for seed in (1, 2):
        tensors = {name: tensor for name, tensor in trained(seed).items() if tensor.is_floating_point()}
        save_file(tensors | {f"more.{n}": torch.full((40, 40), n + seed / 3) for n in range(20)}, tmp_path / f"{seed}.st")
    inputs = [tmp_path / "1.st", tmp_path / "2.st"]
    sm.merge(inputs, tmp_path / "whole.safetensors")
    sm.plan(inputs, tmp_path / "out.safetensors", save=tmp_path / "plan")
    return tmp_path / "plan"


def place_of(plan: Path) -> Joint:
    return joint_of(saved.read_saved(parse(plan)))


def is_right(folder: Path) -> bool:
    return (folder / "out.safetensors").read_bytes() == (folder / "whole.safetensors").read_bytes()


def test_numbers_in_words() -> None:
    assert spans([1]) == "1"
    assert spans([0, 2, 3, 4, 9]) == "0, 2 to 4, 9"
    assert spans(list(range(0, 100, 2))).endswith("14 and 42 more")


def test_missing_units_are_named(plan: Path, tmp_path: Path) -> None:
    with pytest.raises(
        sm.UnfinishedError, match=r"units have no receipt yet: 0 to \d+; a worker with `claim=True`"
    ) as caught:
        sm.finish(plan)
    count = len(saved.read_saved(parse(plan)).units)
    assert caught.value.missing == tuple(range(count))
    assert not list(tmp_path.glob(".*")), "asking leaves nothing"
    sm.worker(plan, share="1/2")
    with pytest.raises(sm.UnfinishedError) as caught:
        sm.finish(plan)
    assert 0 < len(caught.value.missing) < count
    sm.worker(plan, share="2/2")
    damaged = Path((place_of(plan).home / claims.UNITS / "1").key)
    damaged.write_bytes(damaged.read_bytes()[:-9])
    with pytest.raises(sm.UnfinishedError, match=f"1 of {count} units have no receipt yet: 1"):
        sm.finish(plan)
    assert not (tmp_path / "out.safetensors").exists()


def test_finishing_does_without_torch(plan: Path, tmp_path: Path) -> None:
    """Its import would be two thirds of a finish."""
    sm.worker(plan, share="1/1")
    code = f"import sys; import streammerge as sm; sm.finish({str(plan)!r}); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert is_right(tmp_path)


def test_finishing_makes_no_tensor_again(plan: Path, tmp_path: Path) -> None:
    sm.worker(plan, claim=True)
    (file,) = Path(place_of(plan).content.key).iterdir()
    made = file.stat()
    events: list[object] = []
    assert sm.finish(plan, listener=events.append).read_bytes == 0
    assert not [event for event in events if isinstance(event, TaskDone)]
    assert (tmp_path / "out.safetensors").stat().st_ino == made.st_ino, "it is the file that the machines have written"
    assert is_right(tmp_path)


def test_an_output_that_exists_needs_overwrite(plan: Path, tmp_path: Path) -> None:
    sm.worker(plan, claim=True)
    (tmp_path / "out.safetensors").write_bytes(b"theirs")
    with pytest.raises(sm.RecipeError, match="exists already"):
        sm.finish(plan)
    assert (tmp_path / "out.safetensors").read_bytes() == b"theirs"
    sm.finish(plan, overwrite=True)
    assert is_right(tmp_path)


def test_finishing_twice_changes_nothing(plan: Path, tmp_path: Path) -> None:
    sm.worker(plan, claim=True)
    sm.finish(plan)
    status = file_status(str(tmp_path / "out.safetensors"))
    again = sm.finish(plan)
    assert again.notes[-1].endswith("is finished already")
    assert sm.worker(plan, claim=True).finished
    assert file_status(str(tmp_path / "out.safetensors")) == status
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("at", ["before the name", "after the name"])
def test_a_crash_while_finishing(plan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str) -> None:
    sm.worker(plan, claim=True)

    class Died(BaseException):
        pass

    def die(*more: object) -> None:
        raise Died

    monkeypatch.setattr(joint.LocalJoint, "clear", die)
    if at == "before the name":
        monkeypatch.setattr(joint.LocalStaging, "_rename", die)
    with pytest.raises(Died):
        sm.finish(plan)
    assert (tmp_path / "out.safetensors").exists() == (at == "after the name")
    monkeypatch.undo()
    sm.finish(plan)
    assert is_right(tmp_path)
    assert not list(tmp_path.glob(".*"))


def test_one_machine_finishes(plan: Path, tmp_path: Path) -> None:
    sm.worker(plan, claim=True)
    with Claims(place_of(plan), LEASE_SECONDS) as other:
        other.take("finish")
        with pytest.raises(sm.LockedError, match=r"is being finished by process \d+"):
            sm.finish(plan)
    sm.finish(plan)
    assert is_right(tmp_path)


def test_a_machine_that_died_while_finishing_is_followed(plan: Path, tmp_path: Path) -> None:
    sm.worker(plan, claim=True)
    home = place_of(plan).home
    with Claims(place_of(plan), LEASE_SECONDS) as other:
        other.take("finish")
        name = other.name
    elsewhere = lock.this_run()._replace(host="node7", boot="other", namespace="other")
    Path((home / claims.MACHINES / name).key).write_text(str({"beat": 1, **elsewhere._asdict()}).replace("'", '"'))
    sm.finish(plan)
    assert is_right(tmp_path)
