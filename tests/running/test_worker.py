"""Merges in other processes: the same bytes with every method, errors, deaths of workers, and kept pieces."""

from __future__ import annotations

import os
import pickle
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from conftest import Cli, first_of_each, hear_signals, interrupt, journalled, wait_until, when_kept
from safetensors.torch import save_file

import streammerge as sm
from methods.suite import Case, suites
from running.executors.test_processes import descendants
from running.own_methods import failing
from streammerge.methods.registry import COPY, find_method, list_methods
from streammerge.planning import tasks
from streammerge.planning.budget import Budget, Cost
from streammerge.planning.tasks import MergeTask, Piece
from streammerge.running.executors.base import Halted, Host
from streammerge.running.executors.processes import ProcessExecutor
from streammerge.running.executors.threads import ThreadExecutor
from streammerge.running.job import Bench, Job
from streammerge.running.session import Run
from streammerge.running.worker import MergeWork
from streammerge.sources.stored import Stored
from streammerge.stores import journal
from streammerge.stores.checksums import CRC32C
from streammerge.stores.inputs import statuses
from streammerge.stores.locations import parse
from streammerge.tensors.dtypes import DType
from streammerge.tensors.spec import GRAIN, TensorSpec

CASES = [case for suite in suites() for case in suite.CASES if find_method(case.method).passes]


@pytest.fixture
def _nothing_is_left() -> Iterator[None]:
    before = {process.pid for process in descendants()}
    yield
    assert {process.pid for process in descendants()} <= before


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("models")
    shapes = {"long": (5 * GRAIN + 77,), "rows": (701, 487), "wide": (3, 80_001), "small": (3,), "scalar": (), "no": (0, 2)}
    paths = [folder / f"{number}.safetensors" for number in range(6)]
    for number, path in enumerate(paths):
        make = torch.Generator().manual_seed(99)
        base = {name: torch.randn(shape, generator=make) for name, shape in shapes.items()}
        make.manual_seed(number)
        save_file({n: (t + 0.1 * torch.randn(t.shape, generator=make)).bfloat16() for n, t in base.items()}, path)
    return paths


class Lasting(ProcessExecutor):
    """Serves many merges, one after the other, so that torch is imported only once."""

    def close(self) -> None:
        """Does nothing, so that the next merge uses the same workers."""


@pytest.fixture(scope="module")
def processes() -> Iterator[Lasting]:
    executor = Lasting(2)
    yield executor
    ProcessExecutor.close(executor)


@pytest.mark.parametrize("case", first_of_each(CASES, lambda case: case.method), ids=str)
@pytest.mark.sampled(3)
def test_spread_tensors_have_the_same_bytes_in_processes(
    case: Case, files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: Lasting
) -> None:
    """All workers run the passes, and bind the method themselves."""
    options: dict[str, Any] = {"method": case.method, "parameters": case.parameters}
    options |= {"base": files[5]} if case.base else {}
    sm.merge(files[: case.models], tmp_path / "alone.safetensors", workers=1, **options)
    monkeypatch.setattr(tasks, "PIECE_ELEMS", GRAIN)
    for executor in (ThreadExecutor, lambda workers: processes):
        out = tmp_path / "spread.safetensors"
        sm.merge(files[: case.models], out, workers=2, executor=executor, overwrite=True, **options)
        assert out.read_bytes() == (tmp_path / "alone.safetensors").read_bytes(), executor


def test_every_method_can_be_sent() -> None:
    for method in list_methods().values():
        assert pickle.loads(pickle.dumps(method)) is method


def test_results_are_small(files: list[Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sizes = []
    finished = Run._finished

    def seen(self: Run, piece: Any, done: Any) -> Any:
        sizes.append(len(pickle.dumps(done)))
        return finished(self, piece, done)

    monkeypatch.setattr(Run, "_finished", seen)
    sm.merge(files[:2], tmp_path / "out.safetensors", executor="processes")
    assert 0 < max(sizes) < 1000


@pytest.mark.parametrize("executor", ["threads", "processes"])
def test_an_error_of_a_method_names_tensor_and_elements(files: list[Path], tmp_path: Path, executor: str) -> None:
    with pytest.raises(sm.TaskError, match=r"failing, elements 0 to \d+\) failed: of its own") as caught:
        sm.merge(files[:2], tmp_path / "out.safetensors", method=failing, executor=executor, workers=2)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert not list(tmp_path.iterdir())


def test_an_input_that_shrinks_is_told(files: list[Path], tmp_path: Path) -> None:
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for number, path in enumerate(paths):
        save_file({f"w{i}": torch.full((3000, 1000), i + number + 0.5) for i in range(8)}, path)

    def shrink(event: object) -> None:
        if type(event).__name__ == "TaskDone":
            os.truncate(paths[1], 100_000)

    with pytest.raises(sm.ChangedError, match=r"b\.safetensors (was truncated|ended|changed)"):
        sm.merge(paths, tmp_path / "out.safetensors", executor="processes", workers=2, listener=shrink)
    assert not (tmp_path / "out.safetensors").exists()


# ------------------------------------------------------------------------------------------------------------- deaths


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, _nothing_is_left: None) -> list[Path]:
    """Makes two checkpoints of many pieces, which the journal records at once."""
    monkeypatch.setattr(tasks, "PIECE_ELEMS", GRAIN)
    monkeypatch.setattr(journal, "INTERVAL_SECONDS", 0.001)
    paths = []
    for number in range(2):
        chance = torch.Generator().manual_seed(number)
        tensors = {f"layer.{i}": torch.randn(2, GRAIN + 77, generator=chance) for i in range(30)}
        paths.append(tmp_path / f"{number}.safetensors")
        save_file(tensors, paths[-1])
    return paths


WAYS: list[dict[str, Any]] = [{}, {"method": "slerp", "parameters": {"t": 0.3}}]


def workers() -> list[psutil.Process]:
    """Returns the worker processes of the run that began last."""
    return max(psutil.Process().children(), key=lambda server: server.create_time()).children()


@pytest.mark.parametrize(
    ("victim", "way"),
    [
        pytest.param("worker", WAYS[0], id="worker-linear"),
        pytest.param("server", WAYS[1], id="server-slerp"),
        pytest.param("worker", WAYS[1], id="worker-slerp", marks=pytest.mark.slow),
        pytest.param("server", WAYS[0], id="server-linear", marks=pytest.mark.slow),
    ],
)
@pytest.mark.sampled(2)
def test_a_killed_process_ends_the_run_and_the_next_one_goes_on(
    pair: list[Path], tmp_path: Path, way: dict[str, Any], victim: str
) -> None:
    sm.merge(pair, tmp_path / "whole.safetensors", workers=2, **way)
    out, events, killed = tmp_path / "out.safetensors", list[object](), list[int]()

    def kill() -> None:
        worker = workers()[0]
        killed.append(worker.pid if victim == "worker" else worker.ppid())
        os.kill(killed[0], signal.SIGKILL)

    kills = when_kept(out, 5, kill)

    def listen(event: object) -> None:
        events.append(event)
        kills(event)

    with pytest.raises(sm.TaskError) as caught:
        sm.merge(pair, out, executor="processes", workers=2, listener=listen, **way)
    said = "worker process {}" if victim == "worker" else "process {}, which starts the workers,"
    assert str(caught.value).startswith(f"{said.format(killed[0])} was killed by signal 9, perhaps because memory ran out")
    assert type(events[-1]).__name__ == "Suspended"
    assert not out.exists()
    assert journalled(out) >= 5
    result = sm.merge(pair, out, executor="processes", workers=2, **way)
    assert any(note.startswith("continued an interrupted run") for note in result.notes)
    assert out.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "0.safetensors",
        "1.safetensors",
        "out.safetensors",
        "whole.safetensors",
    ]


def test_without_resuming_nothing_is_kept(pair: list[Path], tmp_path: Path) -> None:
    killed: list[int] = []

    def kill(event: object) -> None:
        if type(event).__name__ == "TaskDone" and not killed:
            killed.append(workers()[0].pid)
            os.kill(killed[0], signal.SIGKILL)

    with pytest.raises(sm.TaskError, match="was killed by signal 9"):
        sm.merge(pair, tmp_path / "out.safetensors", executor="processes", workers=2, listener=kill, resume=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.safetensors", "1.safetensors"]


def test_a_run_of_processes_goes_on_in_threads_and_the_other_way(pair: list[Path], tmp_path: Path) -> None:
    sm.merge(pair, tmp_path / "whole.safetensors", workers=2)
    out = tmp_path / "out.safetensors"

    def interrupted_at(wanted: int, executor: str) -> None:
        with pytest.raises(KeyboardInterrupt):
            sm.merge(pair, out, executor=executor, workers=2, listener=when_kept(out, wanted, interrupt))

    interrupted_at(5, "processes")
    interrupted_at(15, "threads")
    result = sm.merge(pair, out, executor="processes", workers=2)
    assert any(note.startswith("continued an interrupted run") for note in result.notes)
    assert out.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


SLOW = """
import sys
from streammerge.planning import tasks
from streammerge.stores import journal
tasks.PIECE_ELEMS, journal.INTERVAL_SECONDS = 1 << 16, 0.001
from streammerge.running import session
import time
finished = session.Run._finished
def slowly(self, piece, done):
    time.sleep(0.01)
    return finished(self, piece, done)
session.Run._finished = slowly
from streammerge.cli.main import run
sys.argv[0] = "streammerge"
run()
"""


@pytest.mark.parametrize("how", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGKILL])
@pytest.mark.sampled(2)
def test_a_stopped_command_leaves_no_process(pair: list[Path], tmp_path: Path, how: int, cli: Cli) -> None:
    sm.merge(pair, tmp_path / "whole.safetensors", workers=2)
    out = tmp_path / "out.safetensors"
    arguments = ["merge", *map(str, pair), "-o", str(out), "--executor", "processes", "--workers", "2"]
    slow = [sys.executable, "-c", SLOW, *arguments]
    with subprocess.Popen(slow, stderr=subprocess.PIPE, text=True, preexec_fn=hear_signals) as command:
        wait_until(lambda: journalled(out) >= 5 or command.poll() is not None)
        processes = psutil.Process(command.pid).children(recursive=True)
        assert len(processes) == 3
        began = time.monotonic()
        command.send_signal(how)
        _, said = command.communicate(timeout=30)
        assert time.monotonic() - began < 20
        wait_until(lambda: not any(each.is_running() and each.status() != "zombie" for each in processes))
    if how != signal.SIGKILL:
        assert command.returncode == 128 + how
        assert re.search(r"are kept; the same command goes on from there", said)
    assert not out.exists()
    assert journalled(out) >= 5
    sm.merge(pair, out, executor="processes", workers=2)
    assert out.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


class Counted:
    """A destination that counts the bytes that are written."""

    def __init__(self) -> None:
        self.nbytes = 0

    def open(self, bench: Bench) -> Counted:
        return self

    def write_full(self, data: memoryview, offset: int) -> None:
        self.nbytes += len(data)

    def found(self) -> None: ...


@pytest.mark.parametrize("way", ["kernel", "numpy", "copy"])
def test_a_worker_that_is_to_stop_ends_between_two_chunks(way: str, tmp_path: Path) -> None:
    """Whatever makes the chunks."""
    chunks, out = 5, Counted()
    spec = TensorSpec("w", DType.F32, (chunks * 4 * GRAIN,))
    (tmp_path / "a.bin").write_bytes(bytes(spec.nbytes))
    sources = (Stored(spec, parse(str(tmp_path / "a.bin")), 0),) * (1 if way == "copy" else 2)
    method = COPY if way == "copy" else find_method("linear")
    task = MergeTask(spec, method, sources, 0, 0, {} if way == "copy" else method.resolve({}, 2), "float64")
    budget = Budget(1, GRAIN if way == "kernel" else 4 * GRAIN, 4 * GRAIN, 1 << 20, Cost(8, 2, 4, 4), 0)
    modules = () if way == "numpy" else ("torch",)
    job = Job("stopping", budget, statuses([sources[0].path]), False, True, CRC32C, (out,), modules)
    asked = list[int]()

    def stopping() -> bool:
        asked.append(out.nbytes)
        return len(asked) > 3

    host = Host(stopping)
    worker = MergeWork(job).open(host)
    with pytest.raises(Halted):
        worker.run([Piece(task, 0, 0, task.elems)])
    assert len(asked) == 4
    assert out.nbytes < spec.nbytes
    worker.close()
    host.close()
