"""Worker processes: the rules for every executor, and how processes start, end and clean up."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import ModuleType

import psutil
import pytest
from conftest import hear_signals, wait_until

import streammerge as sm
from running.executors.suite import ExecutorSuite
from running.executors.toys import SLOW_SECONDS, Allocates, Dies, Square, Tells, Waits
from streammerge.planning.budget import PER_PROCESS_BYTES
from streammerge.running.executors.base import processes_supported
from streammerge.running.executors.processes import ProcessExecutor

WAIT_SECONDS = 20.0
SCRIPT = """
import sys, threading
from contextlib import closing, contextmanager
from running.executors.toys import Square, Waits
from streammerge.planning.budget import PER_PROCESS_BYTES
from streammerge.running.executors.base import processes_supported
from streammerge.running.executors.processes import ProcessExecutor

print("begun", flush=True)
with closing(ProcessExecutor(2)) as executor:
    if sys.argv[1:]:
        for result in executor.run(Waits(sys.argv[1]), range(10)):
            print("one", flush=True)
    else:
        print(sum(executor.run(Square(), range(10))), flush=True)
"""


def descendants() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


@pytest.fixture
def _nothing_is_left() -> Iterator[None]:
    before = {process.pid for process in descendants()}
    files = len(os.listdir("/proc/self/fd"))
    yield
    assert {process.pid for process in descendants()} <= before, "no process, and no zombie"
    assert len(os.listdir("/proc/self/fd")) <= files, "no open file"


@pytest.mark.usefixtures("_nothing_is_left")
class TestProcessExecutor(ExecutorSuite):
    executor = ProcessExecutor


@pytest.mark.usefixtures("_nothing_is_left")
class TestProcesses:
    @pytest.mark.parametrize(
        ("by", "said"),
        [
            (signal.SIGKILL, r"worker process \d+ was killed by signal 9, perhaps because memory ran out; run the same"),
            (signal.SIGSEGV, r"worker process \d+ was killed by signal 11; run the same"),
            (0, r"worker process \d+ ended unexpectedly with exit code 7; run the same"),
        ],
    )
    def test_a_worker_that_dies_ends_the_run_with_one_sentence(self, by: int, said: str) -> None:
        with closing(ProcessExecutor(3)) as executor:
            began = time.monotonic()
            with pytest.raises(sm.TaskError, match=said) as caught:
                list(executor.run(Dies(50, by), range(100_000)))
            assert isinstance(caught.value.__cause__, OSError), "the machine failed, and the same run may succeed"
            assert time.monotonic() - began < WAIT_SECONDS
            assert sorted(executor.run(Square(), range(3))) == [0, 1, 4], "it can be used again"

    def test_the_server_that_dies_ends_the_run_too(self) -> None:
        with closing(ProcessExecutor(2)) as executor:
            results = executor.run(Tells(), range(100_000))
            os.kill(next(results)["parent"], signal.SIGKILL)
            with pytest.raises(sm.TaskError, match="was killed by signal 9"):
                list(results)

    def test_a_worker_that_does_not_notice_is_killed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from streammerge.running.executors import processes

        monkeypatch.setattr(processes, "_STOP_SECONDS", 0.2)
        with closing(ProcessExecutor(2)) as executor:
            results = executor.run(Tells(), range(100_000))
            os.kill(next(results)["pid"], signal.SIGSTOP)
            results.close()
            assert sorted(executor.run(Square(), range(3))) == [0, 1, 4]

    def test_what_a_worker_cannot_import_is_one_sentence(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The code of the work, and of a unit, in a module that only this process has."""
        module = ModuleType("only_here")
        exec("class Work:\n    modules = ()\nclass Unit:\n    pass", vars(module))
        monkeypatch.setitem(sys.modules, "only_here", module)
        for work, unit in ((module.Work(), 0), (Square(), module.Unit())):
            with (
                closing(ProcessExecutor(1)) as executor,
                pytest.raises(sm.TaskError, match=r"cannot load what it was sent \(ModuleNotFoundError: No module named"),
            ):
                list(executor.run(work, [unit]))

    def test_memory_of_the_workers_is_counted(self) -> None:
        with closing(ProcessExecutor(2)) as executor:
            list(executor.run(Allocates(50 << 20), range(8)))
        assert 100 << 20 <= executor.peak_bytes < (100 << 20) + 2 * PER_PROCESS_BYTES
        assert 5 << 20 < executor.startup_bytes < 100 << 20

    def test_small_works_hardly_grow_a_worker(self) -> None:
        with closing(ProcessExecutor(4)) as executor:
            list(executor.run(Square(), range(1000)))
        assert 0 < executor.peak_bytes < 4 * PER_PROCESS_BYTES

    def test_it_can_be_used_from_a_thread(self) -> None:
        made: list[int] = []

        def use() -> None:
            with closing(ProcessExecutor(2)) as executor:
                made.extend(executor.run(Square(), range(10)))

        thread = threading.Thread(target=use)
        thread.start()
        thread.join(WAIT_SECONDS)
        assert sorted(made) == [number * number for number in range(10)]


@contextmanager
def started(*arguments: object) -> Iterator[subprocess.Popen[str]]:
    """Runs the script. It hears SIGINT even if the suite was started in the background, and is killed in the end."""
    folder = Path(__file__).parent.parent.parent
    path = os.pathsep.join([str(folder), *filter(None, sys.path)])
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
        preexec_fn=hear_signals,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def test_a_script_needs_no_guard(tmp_path: Path) -> None:
    """The script runs once, and the prints of workers are not in its output."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    path = os.pathsep.join([str(Path(__file__).parent.parent.parent), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}, timeout=60
    )
    assert (done.stdout, done.stderr, done.returncode) == ("begun\n285\n", "", 0)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL, signal.SIGTERM])
def test_no_process_outlives_the_caller(how: int, tmp_path: Path) -> None:
    with started(tmp_path) as script:
        wait_until(lambda: len(list(tmp_path.glob("begun [1-9]*"))) >= 2)
        workers = psutil.Process(script.pid).children(recursive=True)
        assert len(workers) == 3
        script.send_signal(how)
        script.communicate(timeout=WAIT_SECONDS)
        wait_until(lambda: not any(each.is_running() and each.status() != "zombie" for each in workers))
        if how == signal.SIGINT:
            assert len(list(tmp_path.glob("ended *"))) == 2, "the units were told to stop, and did"


def test_a_fork_server_that_is_starting_ends_with_the_caller(tmp_path: Path) -> None:
    with started(tmp_path) as script:
        wait_until(lambda: psutil.Process(script.pid).children())
        workers = psutil.Process(script.pid).children(recursive=True)
        script.kill()
        script.communicate(timeout=WAIT_SECONDS)
        wait_until(lambda: not any(each.is_running() and each.status() != "zombie" for each in workers))


def test_stopping_is_quick(tmp_path: Path) -> None:
    with closing(ProcessExecutor(2)) as executor:
        results = executor.run(Waits(str(tmp_path)), range(100))
        next(results)
        began = time.monotonic()
        results.close()
        assert time.monotonic() - began < 20 * SLOW_SECONDS


def test_a_frozen_program_is_not_started_as_an_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    assert processes_supported()
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    assert not processes_supported()
