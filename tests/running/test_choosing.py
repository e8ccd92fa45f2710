"""The choice of the executor: by name, by the number of workers, and by whether methods can be sent to processes."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import Cli
from safetensors.torch import save_file

import streammerge as sm
from running.own_methods import centred
from streammerge.kernels.chunk import Kernel
from streammerge.kernels.group import TensorGroup
from streammerge.running import choosing
from streammerge.running.executors.threads import ThreadExecutor
from streammerge.sources.joined import joined
from streammerge.stores.registry import STORES

GIB = 1 << 30


@pytest.fixture
def pair(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{number}.safetensors" for number in range(2)]
    for number, path in enumerate(paths):
        save_file({"w": torch.full((300, 70), number + 0.5), "v": torch.ones(7)}, path)
    return paths


@pytest.fixture
def _little_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choosing, "LEAST_BYTES", 1)
    monkeypatch.setattr(choosing, "LEAST_BYTES_OF_PASSES", 1)


def test_few_workers_or_little_to_read_are_threads(pair: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    assert sm.plan(pair, workers=64, memory=8 * GIB).executor == "threads", "there is little to read"
    monkeypatch.setattr(choosing, "LEAST_BYTES", 1)
    assert [sm.plan(pair, workers=n, memory=8 * GIB).executor for n in (1, 4, 5, 64)] == [
        "threads",
        "threads",
        "processes",
        "processes",
    ]
    monkeypatch.setattr(choosing, "processes_supported", lambda: False)
    assert sm.plan(pair, workers=5, memory=8 * GIB).executor == "threads"


def test_methods_with_passes_take_processes_earlier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor counts as 512 KiB more than it has. Here 60 tensors of 1000 bytes are many small ones."""
    paths = [tmp_path / f"{number}.safetensors" for number in range(2)]
    for number, path in enumerate(paths):
        save_file({f"w{n}": torch.full((250,), n + number + 0.5) for n in range(60)}, path)

    def chosen(method: str) -> list[str]:
        how: dict[str, Any] = {"method": method, "parameters": {"t": 0.3} if method == "slerp" else {}}
        return [sm.plan(paths, workers=n, memory=8 * GIB, **how).executor for n in (1, 2, 3, 4, 5)]

    assert set(chosen("slerp")) == {"threads"}, "60 tensors count as 30 MiB"
    monkeypatch.setattr(choosing, "LEAST_BYTES_OF_PASSES", 30 << 20)
    assert chosen("slerp") == ["threads", *["processes"] * 4]
    assert set(chosen("linear")) == {"threads"}, "this method has no passes"
    monkeypatch.setattr(choosing, "LEAST_BYTES_OF_PASSES", 1)
    monkeypatch.setattr(choosing, "TENSOR_BYTES", 1)
    assert chosen("slerp") == ["threads", "threads", *["processes"] * 3], "the tensors are not small"


@pytest.mark.usefixtures("_little_is_enough")
def test_processes_count_in_the_budget(pair: list[Path]) -> None:
    threads, processes = (sm.plan(pair, workers=8, executor=name, memory="4GiB") for name in ("threads", "processes"))
    assert processes.peak_bytes == threads.peak_bytes + 8 * (12 << 20)
    assert "8 workers in processes" in str(processes)
    assert "8 workers," in str(threads)
    assert (processes.to_json()["executor"], threads.to_json()["executor"]) == ("processes", "threads")


@pytest.mark.usefixtures("_little_is_enough")
def test_auto_takes_threads_where_memory_has_no_room_for_more_processes(pair: list[Path]) -> None:
    chosen = {mib: sm.plan(pair, workers=8, memory=mib << 20) for mib in (30, 60, 100, 1000)}
    assert {plan.executor for plan in chosen.values()} == {"threads", "processes"}
    for mib, plan in chosen.items():
        assert plan.peak_bytes <= mib << 20
        assert plan.executor == "threads" or plan.budget.workers > 4


def methods_that_are_stuck() -> list[Callable[..., Kernel]]:
    def inner(group: TensorGroup) -> Kernel:
        return lambda chunk: chunk.models[0]

    return [inner, lambda group: lambda chunk: chunk.models[0]]


@pytest.mark.usefixtures("_little_is_enough")
@pytest.mark.parametrize("method", methods_that_are_stuck())
def test_a_method_that_cannot_be_sent(pair: list[Path], tmp_path: Path, method: Callable[..., Kernel]) -> None:
    with pytest.raises(sm.RecipeError, match=r"cannot be sent to worker processes; put its function into a module"):
        sm.plan(pair, method=method, executor="processes")
    assert sm.plan(pair, method=method, workers=8, memory=8 * GIB).executor == "threads"
    sm.merge(pair, tmp_path / "out.safetensors", method=method, workers=8)


def test_a_method_of_the_script_that_runs(pair: list[Path], tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, streammerge as sm\n"
        "def mine(group): return lambda chunk: chunk.models[0]\n"
        f"sm.merge({list(map(str, pair))}, sys.argv[1], method=mine, executor=sys.argv[2])\n"
    )
    runs = [
        subprocess.run([sys.executable, script, tmp_path / "out.safetensors", name], capture_output=True, text=True)
        for name in ("processes", "auto")
    ]
    assert "cannot be sent to worker processes" in runs[0].stderr
    assert runs[1].returncode == 0, runs[1].stderr


LOADED_BY_PATH = """
import dataclasses, streammerge as sm
from streammerge.sources.constant import Constant
from streammerge.stores.local import LOCAL


def method(group, *, of=None):
    return lambda chunk: chunk.models[0]


class Doubled(Constant):
    pass


def helper():
    pass


class Wrapped(sm.Store):
    scheme = "wrapped"

    def _inner(self, location):
        return LOCAL.parse("/" + location.key)

    def status(self, location):
        return self._inner(location).status()

    def is_folder(self, location):
        return self._inner(location).is_folder()

    def list_names(self, location):
        return LOCAL.list_names(self._inner(location))

    def opened(self, location):
        return self._inner(location).open()
"""


@pytest.fixture
def loaded_by_path(tmp_path: Path) -> Iterator[ModuleType]:
    """A module that this process knows, and that no other process finds by its name."""
    file = tmp_path / "elsewhere" / "loaded_by_path.py"
    file.parent.mkdir()
    file.write_text(LOADED_BY_PATH)
    spec = importlib.util.spec_from_file_location("loaded_by_path", file)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["loaded_by_path"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["loaded_by_path"]
    STORES.unregister("wrapped")


@pytest.mark.usefixtures("_little_is_enough")
@pytest.mark.parametrize("what", ["method", "parameter", "store"])
@pytest.mark.sampled(3)
def test_what_only_this_process_can_import_stays_with_threads(
    what: str, pair: list[Path], tmp_path: Path, loaded_by_path: ModuleType
) -> None:
    """Such a merge runs with threads. "auto" says so, and "processes" is refused before anything is written."""
    inputs: list[Any] = pair
    options: dict[str, Any] = {"workers": 5, "memory": 8 * GIB}
    if what == "method":
        options["method"] = loaded_by_path.method
    elif what == "parameter":
        options |= {"method": "running.own_methods:named", "parameters": {"of": loaded_by_path.helper}}
    else:
        sm.register_store(loaded_by_path.Wrapped)
        inputs = [f"wrapped:/{path}" for path in pair]
    with pytest.raises(
        sm.RecipeError, match=r"(method .*loaded_by_path:method|parameter of|store wrapped://) cannot be sent"
    ):
        sm.merge(inputs, tmp_path / "out.safetensors", executor="processes", **options)
    assert not (tmp_path / "out.safetensors").exists()
    result = sm.merge(inputs, tmp_path / "out.safetensors", **options)
    assert result.plan.executor == "threads"
    assert any("the workers are threads, because" in note and "cannot be sent" in note for note in result.notes)


def test_a_source_that_only_this_process_can_import(pair: list[Path], loaded_by_path: ModuleType) -> None:
    plan = sm.plan(pair)
    spec = plan.tasks[0].out
    own = loaded_by_path.Doubled(spec, bytes(spec.dtype.element_bytes))
    plan.expressions = [joined("w", [own, own], 0)]
    with pytest.raises(sm.RecipeError, match=r"the source Doubled of tensor .* cannot be sent to worker processes"):
        choosing.choose_executor(plan, "processes")


def test_a_store_of_the_script_that_runs(pair: list[Path], tmp_path: Path) -> None:
    """As in a notebook: its class is in ``__main__``."""
    script = tmp_path / "script.py"
    inputs = [f"wrapped:/{path}" for path in pair]
    script.write_text(
        f"{LOADED_BY_PATH}\nimport sys\nsm.register_store(Wrapped)\n"
        f"sm.merge({inputs!r}, sys.argv[1], executor=sys.argv[2])\n"
    )
    runs = [
        subprocess.run([sys.executable, script, tmp_path / "out.safetensors", name], capture_output=True, text=True)
        for name in ("processes", "auto")
    ]
    assert "RecipeError: the store wrapped:// cannot be sent to worker processes" in runs[0].stderr
    assert runs[1].returncode == 0, runs[1].stderr


def test_a_method_of_an_imported_module_can_be_sent(pair: list[Path], tmp_path: Path) -> None:
    for name in ("threads", "processes"):
        sm.merge(pair, tmp_path / f"{name}.safetensors", method=centred, executor=name, workers=2)
    assert (tmp_path / "threads.safetensors").read_bytes() == (tmp_path / "processes.safetensors").read_bytes()


def test_where_there_is_no_fork(pair: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choosing, "processes_supported", lambda: False)
    plan = sm.plan(pair, executor="processes")
    assert plan.executor == "threads"
    assert any("a system with fork" in note for note in plan.notes)


def test_unknown_names_and_what_makes_an_executor(pair: list[Path]) -> None:
    with pytest.raises(sm.RecipeError, match=r"unknown executor processses; did you mean processes"):
        sm.plan(pair, executor="processses")
    assert sm.plan(pair, executor=ThreadExecutor).executor == "ThreadExecutor"


def test_on_the_command_line(cli: Cli, pair: list[Path], tmp_path: Path) -> None:
    arguments = ["merge", *pair, "--workers", 2]
    for name in ("auto", "threads", "processes"):
        cli(*arguments, "-o", f"{name}.safetensors", "--executor", name, fresh=name == "processes")
    assert len({(tmp_path / f"{name}.safetensors").read_bytes() for name in ("auto", "threads", "processes")}) == 1
    done = cli("plan", *pair, "--executor", "processes")
    assert f"{len(os.sched_getaffinity(0))} workers in processes" in done.stdout
    cli("convert", pair[0], "-o", "out.pth", "--executor", "processes", "--workers", 2)
