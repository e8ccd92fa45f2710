"""Interrupted runs are listed, and what they left is removed, without harm to a run that goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import Cli, journalled, wait_until
from safetensors.torch import save_file

import streammerge as sm
from streammerge.stores.claims import Claims
from streammerge.stores.leftovers import discard, leftover_of, leftovers
from streammerge.stores.locations import parse

SLOW = """
import sys, time, streammerge as sm
from streammerge.events import TaskDone
def slowly(event):
    if isinstance(event, TaskDone):
        time.sleep(0.3)
sm.merge(["a.safetensors", "b.safetensors"], sys.argv[1], memory="24MiB", workers=1, listener=slowly)
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        save_file({f"w{number:02}": torch.randn(1 << 20) for number in range(12)}, f"{name}.safetensors")
    return tmp_path


def begun(out: str) -> subprocess.Popen[bytes]:
    """Starts a slow run and waits until its journal lists pieces."""
    run = subprocess.Popen([sys.executable, "-c", SLOW, out])
    wait_until(lambda: journalled(Path(out)) or run.poll() is not None)
    assert run.poll() is None
    return run


def test_a_run_that_goes_on_is_listed_and_not_removed(here: Path, cli: Cli) -> None:
    run = begun("out.safetensors")
    try:
        found = leftover_of(parse("out.safetensors"))
        assert found is not None
        assert found.owner is not None
        assert found.owner.pid == run.pid
        assert f"out.safetensors: being written by process {run.pid}" in cli("runs").stdout
        with pytest.raises(sm.LockedError, match=f"process {run.pid}"):
            discard(parse("out.safetensors"))
        assert "being written" in cli("clean", "out.safetensors", code=7).stderr
        assert cli("clean", ".", "--yes").stdout == "no run is going on here, and none was interrupted\n"
        assert run.poll() is None
    finally:
        run.kill()
        run.wait()


def test_what_a_killed_run_left_is_listed_and_removed(here: Path, cli: Cli) -> None:
    for out in ("one.safetensors", "two.safetensors"):
        run = begun(out)
        run.send_signal(signal.SIGKILL)
        run.wait()
    before = sorted(os.listdir())
    found = leftovers(parse("."))
    assert [each.out.name for each in found] == ["one.safetensors", "two.safetensors"]
    assert all(each.owner is None and each.kept_bytes > 0 and each.user == Path().owner() for each in found)
    assert "two.safetensors: interrupted at 2" in cli("runs").stdout
    assert "add --yes" in cli("clean", ".").stderr
    assert sorted(os.listdir()) == before, "listing removes nothing"
    assert cli("clean", "one.safetensors").stdout.startswith("removed what a run into one.safetensors had left (")
    assert not Path(".one.safetensors.streammerge").exists()
    result = sm.merge(["a.safetensors", "b.safetensors"], "two.safetensors", memory="24MiB", workers=1)
    assert any("continued an interrupted run" in note for note in result.notes), "the other one can still be continued"
    assert leftovers(parse(".")) == []
    assert "no run has left anything for two.safetensors" in cli("clean", "two.safetensors", code=2).stderr


def test_an_output_stays_when_a_replacement_is_discarded(here: Path, cli: Cli) -> None:
    Path("out.safetensors").write_bytes(b"mine")
    home = Path(".out.safetensors.streammerge")
    home.mkdir()
    (home / "notes.txt").write_text("a stranger's")
    assert "nothing is kept" in cli("runs").stdout
    cli("clean", ".", "--yes")
    assert Path("out.safetensors").read_bytes() == b"mine"
    assert (home / "notes.txt").exists(), "what is not ours stays"


def test_a_folder_is_needed(here: Path, cli: Cli) -> None:
    assert "is no folder" in cli("runs", "a.safetensors", code=2).stderr
    assert cli("runs", "--format", "json").stdout.strip() == '{\n  "runs": []\n}'


def test_what_machines_have_left_of_a_plan_is_listed_and_discarded(tmp_path: Path) -> None:
    for name in "ab":
        save_file({"w": torch.ones(100, 100)}, tmp_path / f"{name}.safetensors")
    out = tmp_path / "out.safetensors"
    sm.plan([tmp_path / "a.safetensors", tmp_path / "b.safetensors"], out, save=tmp_path / "plan")
    sm.worker(tmp_path / "plan", claim=True)
    (found,) = leftovers(parse(tmp_path))
    assert (str(found.out), found.owner, found.kept_bytes) == (str(out), None, 40_000)
    assert leftover_of(parse(out)) == found
    assert leftover_of(parse(tmp_path / "out")) is None
    joint = parse(out).join(found.folder.name.split(".")[-2])
    with Claims(joint, 30.0):
        (busy,) = leftovers(parse(tmp_path))
        assert busy.owner is not None
        with pytest.raises(sm.LockedError, match="is being written by process"):
            discard(parse(out))
    discard(parse(out))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors", "plan"]
