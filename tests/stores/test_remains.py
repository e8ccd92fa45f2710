"""What killed runs leave in an object store, and how it is removed."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load, save_file

import streammerge as sm
from streammerge.cli.main import cli
from streammerge.stores import multipart
from streammerge.stores.base import Location
from streammerge.stores.leftovers import discard, leftover_of, leftovers
from streammerge.stores.locations import parse
from streammerge.stores.staged import home_of

SLOW = """
import time
from streammerge.stores import journal, multipart
journal.INTERVAL_SECONDS = 0.2
send = multipart.Requests.send
def slow(self, key, upload, number, data):
    time.sleep(0.5)
    return send(self, key, upload, number, data)
multipart.Requests.send = slow
from streammerge.cli.main import run
run()
"""


def inputs(folder: Path) -> list[Path]:
    made = []
    for number in (1, 2):
        tensors = {f"w{n}": torch.randn(1000, 1000, generator=torch.Generator().manual_seed(n * number)) for n in range(12)}
        made.append(folder / f"{number}.safetensors")
        save_file(tensors, made[-1])
    return made


def uploads(bucket: str) -> list[str]:
    return [each.key for each in multipart.Requests(bucket).uploads("")]


def killed(paths: list[Path], out: Location, *more: str) -> None:
    """Begins a merge, and kills it when a part of the output is in the journal."""
    command = [sys.executable, "-c", SLOW, "merge", *map(str, paths), "-o", str(out), "--no-progress", *more]
    run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    store: Any = out.store
    until = time.monotonic() + 60
    while time.monotonic() < until and run.poll() is None:
        if len(store.items(home_of(out) / "journal")) > 1:
            break
        time.sleep(0.02)
    assert run.poll() is None, run.communicate()[1]
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert run.stderr is not None
    run.stderr.close()


@pytest.mark.parametrize("name", ["out.safetensors", "out/"])
@pytest.mark.sampled(2)
def test_a_killed_run_is_continued_and_ends_in_the_same_bytes(name: str, s3: str, tmp_path: Path) -> None:
    paths, out = inputs(tmp_path), parse(f"{s3}/{name}")
    more = ["--max-shard-size", "20MB"] if name.endswith("/") else []
    killed(paths, out, *more)
    assert not out.exists()
    found = leftover_of(out)
    assert found is not None
    assert found.kept_bytes > 0
    assert found.owner is None
    assert found.uploads == (3 if more else 1)
    result = sm.merge(paths, out, max_shard_size="20MB" if more else None)
    assert any("continued an interrupted run" in note for note in result.notes)
    assert result.read_bytes < result.plan.read_bytes
    local = tmp_path / name
    sm.merge(paths, f"{local}/" if more else local, max_shard_size="20MB" if more else None)
    for each in local.iterdir() if more else [local]:
        there = out / each.name if more else out
        assert there.read(0, there.size) == each.read_bytes(), each.name
    bucket = s3.removeprefix("s3://")
    assert uploads(bucket) == []
    assert [each.name for each in parse(s3).children()] == [out.name]


def test_what_a_killed_run_left_is_listed_and_removed(s3: str, tmp_path: Path) -> None:
    paths, out, bucket = inputs(tmp_path), parse(f"{s3}/results/out.safetensors"), s3.removeprefix("s3://")
    killed(paths, out)
    orphan = multipart.Requests(bucket).begin("results/deep/other.safetensors")
    listed = CliRunner().invoke(cli, ["clean", f"{s3}/results"])
    assert listed.exit_code == 0
    assert f"{out}: interrupted at" in listed.output
    assert "deep/other.safetensors: interrupted; nothing is kept; 1 upload not completed" in listed.output
    assert len(uploads(bucket)) == 2
    runs = CliRunner().invoke(cli, ["runs", f"{s3}/results", "--format", "json"])
    assert [each["out"] for each in json.loads(runs.output)["runs"]] == [f"{s3}/results/deep/other.safetensors", str(out)]
    CliRunner().invoke(cli, ["clean", str(out)])
    assert uploads(bucket) == ["results/deep/other.safetensors"]
    assert leftover_of(out) is None
    removed = CliRunner().invoke(cli, ["clean", s3, "--yes"])
    assert removed.exit_code == 0, removed.output
    assert uploads(bucket) == []
    assert parse(s3).children() == []
    assert orphan


def test_what_a_running_merge_has_is_not_removed(s3: str) -> None:
    out = parse(f"{s3}/deep/out")
    staging = out.stage()
    staging.create("model.safetensors", 100)
    (found,) = leftovers(parse(s3))
    assert found.out == out
    assert found.owner is not None
    assert found.owner.pid == os.getpid()
    with pytest.raises(sm.LockedError, match=f"process {os.getpid()}"):
        discard(out)
    assert "no run is going on" in CliRunner().invoke(cli, ["clean", s3, "--yes"]).output
    assert len(uploads(s3.removeprefix("s3://"))) == 1
    staging.abort()
    assert leftovers(parse(s3)) == []


def test_a_run_killed_while_it_publishes_is_continued(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths, out = inputs(tmp_path), parse(f"{s3}/out/")
    complete, calls = multipart.Requests.complete, []

    def failing(self: multipart.Requests, *args: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return complete(self, *args)

    monkeypatch.setattr(multipart.Requests, "complete", failing)
    with pytest.raises(KeyboardInterrupt):
        sm.merge(paths, out, max_shard_size="20MB")
    assert [each.name for each in out.children()] == ["model-00001-of-00003.safetensors"]
    result = sm.merge(paths, out, max_shard_size="20MB")
    assert result.read_bytes == 0
    assert len(calls) == 4
    assert uploads(s3.removeprefix("s3://")) == []
    merged = load((out / "model-00001-of-00003.safetensors").read(0, (out / "model-00001-of-00003.safetensors").size))
    assert merged
    assert sm.verify(out, inputs=tmp_path).recomputed


@pytest.mark.slow
@pytest.mark.parametrize("name", ["out.safetensors", "out.pth", "out/"])
def test_a_merge_that_is_killed_again_and_again_ends_in_the_same_bytes(name: str, s3: str, tmp_path: Path) -> None:
    paths, out, chance = inputs(tmp_path), parse(f"{s3}/{name}"), random.Random(name)
    if name.endswith(".pth"):
        for path in paths:
            torch.save(load(path.read_bytes()), path.with_suffix(".pth"))
        paths = [path.with_suffix(".pth") for path in paths]
    more = ["--max-shard-size", "20MB"] if name.endswith("/") else []
    command = [sys.executable, "-c", SLOW, "merge", *map(str, paths), "-o", str(out), "--no-progress", *more]
    for _ in range(6):
        run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            run.wait(chance.uniform(2.0, 12.0))
        run.send_signal(signal.SIGKILL)
        run.wait()
        if (out / "streammerge.json" if more else out).exists():  # killed after it had published, or not killed
            out.sweep()
            break
    else:
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    local = tmp_path / "local" / name
    local.parent.mkdir()
    sm.merge(paths, f"{local}/" if more else local, max_shard_size="20MB" if more else None)
    for each in local.iterdir() if more else [local]:
        there = out / each.name if more else out
        assert there.read(0, there.size) == each.read_bytes(), each.name
    assert uploads(s3.removeprefix("s3://")) == []
    assert [each.name for each in parse(s3).children()] == [out.name]
