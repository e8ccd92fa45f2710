"""Merges on the nodes of a Ray cluster: three on this machine. Nodes and drivers are killed and stopped."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import streammerge as sm
from streammerge.requests.cluster import NodeWork
from streammerge.running.executors.ray import Head

DRIVER = Path(__file__).with_name("ray_driver.py")
LEASE_SECONDS = 4.0


def test_what_a_node_tells_is_small() -> None:
    import pickle

    node = NodeWork("plan", {})
    node._tensor = "x" * 5000
    assert len(pickle.dumps(node.told())) < 1000


def test_a_node_returns_its_error(tmp_path: Path) -> None:
    from streammerge.running.executors.messages import unpickled_error

    answer = NodeWork(str(tmp_path / "nothing"), {}).work()
    assert isinstance(answer, bytes)
    assert isinstance(unpickled_error(answer), sm.RecipeError)


COMMON = {"object_store_memory": 80 << 20, "include_dashboard": False, "node_ip_address": "127.0.0.1"}


@contextmanager
def clusters(nodes: int) -> Iterator[Any]:
    """A cluster of a head without CPUs and some nodes of two CPUs, on loopback."""
    pytest.importorskip("ray", reason="ray is not installed: pip install 'streammerge[ray]'")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(Path(sm.__file__).parents[1]), str(DRIVER.parent), *([before] if before else [])]
    )
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={**COMMON, "num_cpus": 0, "memory": 1 << 20})
    for _ in range(nodes):
        made.add_node(**COMMON, num_cpus=2, memory=2 << 30)
    try:
        yield made
    finally:
        made.shutdown()
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    with clusters(nodes=3) as made:
        yield made


@pytest.fixture
def models(tmp_path: Path) -> list[str]:
    paths = []
    for seed in (1, 2):
        make = torch.Generator().manual_seed(seed)
        save_file(
            {f"layers.{n}.w": torch.randn(200, 301, generator=make) for n in range(60)}, tmp_path / f"{seed}.safetensors"
        )
        paths.append(str(tmp_path / f"{seed}.safetensors"))
    return paths


def driver(cluster: Any, out: Path, seconds: float, **options: Any) -> subprocess.Popen[bytes]:
    """Starts a merge. What it says goes to files, since Ray tells each death, and a full pipe would stop it."""
    running = subprocess.Popen(
        [sys.executable, str(DRIVER), cluster.address, str(out), str(seconds), str(LEASE_SECONDS), json.dumps(options)],
        stdout=(said := tempfile.TemporaryFile()),  # noqa: SIM115 - read when it has ended
        stderr=(complained := tempfile.TemporaryFile()),  # noqa: SIM115
    )
    running.said = (said, complained)  # type: ignore[attr-defined]
    return running


def texts(running: subprocess.Popen[bytes]) -> tuple[str, str]:
    """Waits for a merge. Returns what it has written to both streams."""
    running.wait(200)
    both = running.said  # type: ignore[attr-defined]
    for file in both:
        file.seek(0)
    out, err = (file.read().decode() for file in both)
    return out, err


def result(running: subprocess.Popen[bytes]) -> Any:
    out, err = texts(running)
    assert running.returncode == 0, err[-3000:]
    return json.loads(out.splitlines()[-1])


def receipts(folder: Path) -> list[Path]:
    return list(folder.glob(".*.machines/units/[0-9]*"))


def wait_for_receipts(folder: Path, count: int, running: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while len(receipts(folder)) < count:
        if time.monotonic() > deadline or running.poll() is not None:
            running.kill()
            raise AssertionError(texts(running))
        time.sleep(0.02)


def expected(models: list[str], folder: Path, **options: Any) -> bytes:
    return Path(str(sm.merge(models, folder / "whole.safetensors", **options).out)).read_bytes()


@pytest.mark.slow
def test_three_nodes_make_the_bytes_of_one_thread(cluster: Any, tmp_path: Path, models: list[str]) -> None:
    out = tmp_path / "out.safetensors"
    said = result(driver(cluster, out, 0.02, inputs=models))
    assert out.read_bytes() == expected(models, tmp_path, workers=1)
    assert said["read_bytes"] >= 2 * 60 * 200 * 301 * 4
    assert 0 < said["peak_bytes"] < 512 << 20
    assert not list(tmp_path.glob(".*"))


@pytest.mark.slow
def test_an_error_of_a_node_is_that_of_the_merge(cluster: Any, tmp_path: Path, models: list[str]) -> None:
    save_file({f"layers.{n}.w": torch.full((200, 301), float("inf")) for n in range(60)}, models[1])
    said = result(driver(cluster, tmp_path / "out.safetensors", 0, inputs=models))
    assert said["error"] == "VerifyError"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1.safetensors", "2.safetensors"], "nothing is left"


@pytest.mark.slow
def test_a_killed_node_costs_what_it_was_making(cluster: Any, tmp_path: Path, models: list[str]) -> None:
    out = tmp_path / "out.safetensors"
    running = driver(cluster, out, 0.1, inputs=models, workers=1)
    wait_for_receipts(tmp_path, 3, running)
    node = cluster.worker_nodes and next(iter(cluster.worker_nodes))
    cluster.remove_node(node, allow_graceful=False)
    said = result(running)
    assert out.read_bytes() == expected(models, tmp_path)
    assert any("a node was lost" in note for note in said["notes"])
    cluster.add_node(object_store_memory=80 << 20, node_ip_address="127.0.0.1", num_cpus=2, memory=2 << 30)


@pytest.mark.slow
def test_a_stopped_node_does_not_stop_the_merge(cluster: Any, tmp_path: Path, models: list[str]) -> None:
    """Its raylet and its process are stopped: nothing ends, and nothing answers."""
    out = tmp_path / "out.safetensors"
    running = driver(cluster, out, 0.1, inputs=models, workers=1)
    wait_for_receipts(tmp_path, 3, running)
    node = next(iter(cluster.worker_nodes))
    raylet = node.all_processes["raylet"][0].process.pid
    import psutil

    stopped = [*psutil.Process(raylet).children(recursive=True), psutil.Process(raylet)]
    for each in stopped:
        each.send_signal(signal.SIGSTOP)
    try:
        result(running)
        assert out.read_bytes() == expected(models, tmp_path)
        for path in models:
            Path(path).write_bytes(bytes(Path(path).stat().st_size))
    finally:
        for each in stopped:
            each.send_signal(signal.SIGCONT)
    time.sleep(2 * LEASE_SECONDS)
    assert out.read_bytes() == (tmp_path / "whole.safetensors").read_bytes(), "who goes on later writes nothing"
    cluster.remove_node(node, allow_graceful=False)
    cluster.add_node(object_store_memory=80 << 20, node_ip_address="127.0.0.1", num_cpus=2, memory=2 << 30)


@pytest.mark.slow
def test_the_same_command_goes_on_after_its_death(cluster: Any, tmp_path: Path, models: list[str]) -> None:
    out = tmp_path / "out.safetensors"
    running = driver(cluster, out, 0.1, inputs=models, workers=1)
    wait_for_receipts(tmp_path, 4, running)
    running.kill()
    running.wait()
    assert not out.exists()
    there = len(receipts(tmp_path))
    said = result(driver(cluster, out, 0, inputs=models))
    assert any("continued an interrupted run" in note for note in said["notes"])
    assert there >= 4
    assert out.read_bytes() == expected(models, tmp_path)


@pytest.mark.slow
def test_the_death_of_the_head_is_told(tmp_path: Path, models: list[str]) -> None:
    """Ray itself would end the process after a minute, with a line of its log."""
    with clusters(nodes=1) as made:
        running = driver(made, tmp_path / "out.safetensors", 1.0, inputs=models, workers=1)
        wait_for_receipts(tmp_path, 3, running)
        for processes in made.head_node.all_processes.values():
            for each in processes:
                os.kill(each.process.pid, signal.SIGKILL)
        said = result(running)
    assert said["error"] == "TaskError"
    assert "the head of the Ray cluster is lost; start a cluster, and the same command goes on" in said["said"]
    assert len(receipts(tmp_path)) >= 3
    sm.merge(models, tmp_path / "out.safetensors")
    assert (tmp_path / "out.safetensors").read_bytes() == expected(models, tmp_path)


DEATHS = 50


@pytest.mark.slow
def test_fifty_deaths(cluster: Any, tmp_path: Path, models: list[str]) -> None:
    """Of processes and of nodes in turn. A merge that has lost all its nodes goes on by the same command."""
    wanted, died, merges, commands = expected(models, tmp_path), 0, 0, 0
    while died < DEATHS:
        merges += 1
        out = tmp_path / f"out{merges}.safetensors"
        while not out.exists():
            commands += 1
            running = driver(cluster, out, 0.1, inputs=models, workers=1)
            while running.poll() is None and died < DEATHS:
                before = len(receipts(tmp_path))
                deadline = time.monotonic() + 60
                while running.poll() is None and len(receipts(tmp_path)) <= before and time.monotonic() < deadline:
                    time.sleep(0.02)
                if running.poll() is None:
                    died += kill_one(cluster, of_node=died % 3 == 2)
            said = result(running)
            assert "error" not in said or "the same command goes on" in said["said"], said
        assert out.read_bytes() == wanted
        assert not [path for path in tmp_path.glob(".*") if out.name in path.name], "nothing is left beside the output"
    print(f"{died} deaths in {merges} merges by {commands} commands")


def kill_one(cluster: Any, of_node: bool) -> int:
    """Kills a process that makes units, or the node of one. Returns how many were killed."""
    import psutil

    for node in random.sample([*cluster.worker_nodes], len(cluster.worker_nodes)):
        raylet = node.all_processes["raylet"][0].process.pid
        with suppress(psutil.NoSuchProcess):
            working = [each for each in psutil.Process(raylet).children() if "SlowNode" in " ".join(each.cmdline())]
            if working and of_node:
                cluster.remove_node(node, allow_graceful=False)
                cluster.add_node(**COMMON, num_cpus=2, memory=2 << 30)
                return 1
            if working:
                working[0].kill()
                return 1
    return 0


def test_a_head_that_does_not_answer_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as head:
        place = f"127.0.0.1:{head.getsockname()[1]}"
        ray = SimpleNamespace(get_runtime_context=lambda: SimpleNamespace(gcs_address=place))
        watched = Head(ray)
        assert watched.lost_seconds() == 0
    assert 0 < watched.lost_seconds() < watched.lost_seconds()
    assert Head(SimpleNamespace(get_runtime_context=SimpleNamespace)).lost_seconds() == 0


def test_a_cluster_that_is_not_there(tmp_path: Path, models: list[str]) -> None:
    pytest.importorskip("ray", reason="ray is not installed: pip install 'streammerge[ray]'")
    with pytest.raises(sm.RecipeError, match=r"no Ray cluster at 127\.0\.0\.1:1;"):
        sm.merge(models, tmp_path / "out.safetensors", executor="ray", address="127.0.0.1:1")
