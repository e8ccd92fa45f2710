"""Law 1: memory above start-up stays under the budget, measured by the kernel in a separate process."""

from __future__ import annotations

import ctypes
import itertools
import json
import mmap
import os
import subprocess
import sys
import time
from collections.abc import Container, Sequence
from pathlib import Path

import pytest
import torch
from benchmarks.headers import sparse_model
from safetensors.torch import save_file

import streammerge as sm
from methods.suite import Case, suites
from streammerge.methods.contracts import METHODS
from streammerge.methods.registry import find_method
from streammerge.planning import tasks
from streammerge.tensors.spec import GRAIN

RUNS = """
import json, re, sys, threading
import streammerge as sm
from streammerge.planning import tasks
from streammerge.tensors.spec import GRAIN
from streammerge.running.execution import prepare_torch

def anonymous():
    with open("/proc/self/status") as file:
        return sum(map(int, re.findall(r"Rss(?:Anon|Shmem):\\s+(\\d+)", file.read()))) * 1024

tasks.PIECE_ELEMS = int(sys.argv[2])
prepare_torch()
for inputs, out, options in json.loads(sys.argv[1]):
    start, peak, stop = anonymous(), 0, threading.Event()

    def watch():
        global peak
        while not stop.wait(0.002):
            peak = max(peak, anonymous())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    result = sm.merge(inputs, out, overwrite=True, **options)
    stop.set()
    watcher.join()
    print(json.dumps({"anonymous": peak - start, "resident": result.peak_bytes, "planned": result.plan.peak_bytes}))
"""
EXECUTORS, IO = ("threads", "processes"), ("mmap", "pread")
Run = tuple[list[Path], Path, dict[str, object]]


def sparse(path: Path, numel: int, tensors: int = 1, dtype: str = "BF16") -> Path:
    """Makes a safetensors file of zeros that takes no space on the disk."""
    size = {"BF16": 2, "F32": 4}[dtype]
    header = {
        f"w{i}": {"dtype": dtype, "shape": [numel], "data_offsets": [i * numel * size, (i + 1) * numel * size]}
        for i in range(tensors)
    }
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + tensors * numel * size)
    return path


def measured(*runs: Run) -> list[dict[str, int]]:
    """Returns the memory of each merge above start-up, all in one separate process."""
    argument = json.dumps([(list(map(str, inputs)), str(out), options) for inputs, out, options in runs], default=str)
    command = [sys.executable, "-c", RUNS, argument, str(tasks.PIECE_ELEMS)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1500)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("io", ["mmap", pytest.param("pread", marks=pytest.mark.slow)])
def test_law_1_memory_is_bounded(tmp_path: Path, io: str) -> None:
    """The same peak for two inputs and eight, for many tensors and one large one, and never above the plan."""
    many = [sparse(tmp_path / f"many{i}.safetensors", 1 << 20, 32, "F32") for i in range(2)]
    giant = [sparse(tmp_path / f"giant{i}.safetensors", 96 << 20) for i in range(2)]
    for inputs, memory in ((many, "512MiB"), (many * 4, "512MiB"), (giant, "64MiB"), (many * 4, "64MiB")):
        (peak,) = measured((inputs, tmp_path / "out.safetensors", {"io": io, "memory": memory}))
        budget = int(memory.removesuffix("MiB")) << 20
        assert peak["planned"] <= budget
        assert peak["anonymous"] <= min(peak["planned"], 48 << 20), peak
        assert peak["resident"] <= budget, peak


@pytest.mark.parametrize("io", ["mmap", pytest.param("pread", marks=pytest.mark.slow)])
def test_law_1_holds_for_all_processes_together(tmp_path: Path, io: str) -> None:
    """Worker processes report what each of them held at most. The sum stays under the plan, also for shared tensors."""
    inputs = [tmp_path / f"{number}.safetensors" for number in range(3)]
    for number, path in enumerate(inputs):
        make = torch.Generator().manual_seed(number)
        save_file({"large": torch.randn(3000, 4000, generator=make), "small": torch.ones(1000, 7)}, path)
    how = {"executor": "processes", "io": io, "workers": 3}
    for more in ({"memory": "96MiB"}, {"method": "ties", "base": str(inputs[2]), "parameters": {"density": 0.5}}):
        (peak,) = measured((inputs[:2], tmp_path / "out.safetensors", how | more))
        assert peak["anonymous"] < peak["resident"] <= peak["planned"], (more, peak)


@pytest.mark.slow
def test_law_1_holds_for_huge_pages_of_the_cache(tmp_path: Path) -> None:
    """New files are cached in pages of 2 MiB, and one access maps a whole page; sparse files are not.

    If mapped pages of all inputs do not fit the budget, the files are read instead.
    """
    inputs = [tmp_path / f"{number}.safetensors" for number in range(8)]
    for number, path in enumerate(inputs):
        save_file({"large": torch.full((32, 1 << 19), number + 0.5).bfloat16(), "small": torch.ones(7)}, path)
    for count, memory in ((3, 48), (8, 32), (5, 512)):
        runs = [(inputs[:count], tmp_path / "out.safetensors", {"memory": f"{memory}MiB", "workers": 2})]
        (peak,) = measured(*runs)
        assert peak["resident"] <= min(peak["planned"], memory << 20), (count, memory, peak)


@pytest.mark.parametrize("io", [pytest.param("mmap", marks=pytest.mark.slow), "pread"])
def test_law_1_for_strided_tensors(tmp_path: Path, io: str) -> None:
    """A transposed tensor of 64 MiB: read where it lies, copied and merged, without a temporary file."""
    make = "import torch, sys; torch.save({'w': torch.zeros(1 << 12, 1 << 12).t()}, sys.argv[1])"
    subprocess.run([sys.executable, "-c", make, str(tmp_path / "in.pth")], check=True)
    for inputs, memory, method in ((1, 24, "linear"), (2, 96, "ties")):
        options = {"memory": f"{memory}MiB", "io": io, "method": method}
        options |= {"base": tmp_path / "in.pth"} if method == "ties" else {}
        (peak,) = measured(([tmp_path / "in.pth"] * inputs, tmp_path / "out.safetensors", options))
        assert peak["anonymous"] <= peak["planned"] <= memory << 20, peak
        assert peak["resident"] <= memory << 20, peak


NESTED = """
import json, re, sys, threading
from pathlib import Path
from sources.suite import COPY, Disk, draw, find_method, index_of, planned
import torch
from streammerge.checkpoints.index import open_checkpoint
from streammerge.recipe.arguments import recipe_of
from streammerge.running.execution import execute, prepare_torch
from streammerge.running.process import resident_bytes
from streammerge.running.session import RunOptions
from streammerge.sources.joined import joined
from streammerge.sources.merged import merged
from streammerge.sources.rows import gathered
from streammerge.sources.strided import Strided
from streammerge.tensors.spec import TensorSpec

folder, memory, io = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
wholes = [open_checkpoint(folder / f"{n}.safetensors").entries["w0"] for n in range(2)]
turned = [Strided(TensorSpec("w", w.spec.dtype, (2048, 4096)), w.path, w.offset, (1, 2048)) for w in wholes]
pieces = joined("w", [turned[0], turned[1]], 1)
chosen = gathered(pieces, [*range(2047, 1000, -1), *range(1001)])
source = merged("w", find_method("ties"), [chosen, pieces, chosen], {"density": 0.4}, based=True)
indexes = [index_of(folder, {"w": each}, f"in{n}") for n, each in enumerate((source, pieces))]
recipe = recipe_of([str(i.path) for i in indexes], "slerp", None, None, {"t": 0.3}, {})

def anonymous():
    with open("/proc/self/status") as file:
        return sum(map(int, re.findall(r"Rss(?:Anon|Shmem):\\s+(\\d+)", file.read()))) * 1024

prepare_torch()
start, peak, stop = anonymous(), 0, threading.Event()

def watch():
    global peak
    while not stop.wait(0.002):
        peak = max(peak, anonymous())

threading.Thread(target=watch, daemon=True).start()
plan = planned(recipe, indexes, folder / "out.safetensors", memory_bytes=memory << 20, io=io)
result = execute(plan, RunOptions(overwrite=True), resident_bytes())
stop.set()
print(json.dumps({"anonymous": peak - start, "resident": result.peak_bytes, "planned": plan.peak_bytes}))
"""


@pytest.mark.parametrize(("memory", "io"), [pytest.param(256, "mmap", marks=pytest.mark.slow), (96, "pread")])
def test_law_1_for_nested_sources(tmp_path: Path, memory: int, io: str) -> None:
    """A merge by slerp of a merge by ties of gathered rows of joined, transposed tensors; 32 MiB each."""
    for number in range(2):
        save_file({"w0": torch.full((2048 * 4096,), number + 0.5).bfloat16()}, tmp_path / f"{number}.safetensors")
    command = [sys.executable, "-c", NESTED.replace("\\\\", "\\"), str(tmp_path), str(memory), io]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr
    peak = json.loads(done.stdout)
    assert peak["anonymous"] <= peak["planned"] <= memory << 20, peak
    assert peak["resident"] <= memory << 20, peak


@pytest.mark.parametrize("out", [pytest.param("out.safetensors", marks=pytest.mark.slow), "out.pth"])
def test_law_1_counts_data_that_lies_in_pickles(tmp_path: Path, out: str) -> None:
    """40 MiB of bytes beside the tensors, in each of two files."""
    for number in range(2):
        torch.save({"w": torch.ones(1000), "blob": bytes(40 << 20)}, tmp_path / f"{number}.pth")
    inputs = [tmp_path / f"{number}.pth" for number in range(2)]
    with pytest.raises(sm.BudgetError):
        sm.plan(inputs, out, memory="96MiB")
    (peak,) = measured((inputs, tmp_path / out, {"memory": "2GiB"}))
    assert peak["anonymous"] <= peak["planned"], peak


@pytest.mark.slow
def test_law_1_one_tensor_of_4_gib(tmp_path: Path) -> None:
    giant = [sparse(tmp_path / f"{i}.safetensors", 1 << 31) for i in range(3)]
    for io in ("mmap", "pread"):
        (peak,) = measured((giant, tmp_path / "out.safetensors", {"memory": "64MiB", "io": io}))
        assert peak["anonymous"] <= 48 << 20, peak
        assert peak["resident"] <= 64 << 20, peak


def test_law_1_for_many_tensors(tmp_path: Path) -> None:
    """What is held for each tensor is in the plan: here it is nearly everything."""
    paths = [sparse(tmp_path / f"{number}.safetensors", 16, 40_000) for number in range(2)]
    small = [sparse(tmp_path / f"small{number}.safetensors", 16, 10) for number in range(2)]
    how = {"memory": "1GiB", "workers": 1, "io": "pread"}
    _, peak = measured(*((inputs, tmp_path / "out.safetensors", how) for inputs in (small, paths)))
    assert peak["planned"] // 2 < peak["resident"] <= peak["planned"], peak


def test_inspect_and_plan_stay_small_and_without_torch(tmp_path: Path) -> None:
    """40 MiB for a file of 2 GB."""
    path = sparse(tmp_path / "in.safetensors", 1 << 20, 1000)
    for call in (f"sm.inspect({str(path)!r})", f"sm.plan([{str(path)!r}] * 2)"):
        code = f"import sys, streammerge as sm; {call}; print('torch' in sys.modules, open('/proc/self/status').read())"
        shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        assert shown.startswith("False")
        peak = int(shown.partition("VmHWM:")[2].split()[0])
        assert peak < 40 << 10, f"{peak} kB"


def cached_share(path: Path) -> float:
    """Returns the share of a file that is in the page cache."""
    size = path.stat().st_size
    pages = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
    with open(path, "rb") as file, mmap.mmap(file.fileno(), size, mmap.MAP_PRIVATE) as mapped:
        address = ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(mapped)))
        assert ctypes.CDLL(None).mincore(address, ctypes.c_size_t(size), pages) == 0
        del address
    return sum(page & 1 for page in pages) / len(pages)


@pytest.mark.parametrize("command", ["linear", "ties", "convert"])
@pytest.mark.parametrize("io", ["mmap", "pread"])
def test_polite_runs_give_the_page_cache_back(tmp_path: Path, io: str, command: str) -> None:
    inputs = [tmp_path / f"{number}.safetensors" for number in range(3)]
    for number, path in enumerate(inputs):
        save_file({f"w{i}": torch.full((6 << 20,), float(number)) for i in range(3)}, path)
        with open(path, "rb") as file:
            os.fsync(file.fileno())  # dirty pages cannot be dropped
    out = tmp_path / "out.safetensors"
    for polite in (False, True):
        for path in inputs:
            path.read_bytes()
        options = {"io": io, "overwrite": True, "polite": polite}
        if command == "convert":
            read = inputs[:1]
            sm.convert(read[0], out, **options)
        else:
            read = inputs if command == "ties" else inputs[1:]
            base = {"base": inputs[0]} if command == "ties" else {}
            sm.merge(inputs[1:], out, method=command, **base, **options)
        left = max(map(cached_share, read))
        assert left < 0.3 if polite else left == 1


def held_as_a_row(case: Case, elems: int) -> bool:
    contract = find_method(case.method)
    return contract.rows((elems,), contract.resolve(case.parameters, case.models)) == elems


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Six files of 32 MB without holes, each with two matrices, whose pages are in the cache."""
    paths = [tmp_path_factory.mktemp("dense") / f"{number}.safetensors" for number in range(6)]
    for number, path in enumerate(paths):
        make = torch.Generator().manual_seed(number)
        shapes = {"first": (8000, 1000), "second": (8001, 1000)}
        save_file({name: torch.randn(shape, generator=make).bfloat16() for name, shape in shapes.items()}, path)
    return paths


def tight(inputs: list[Path], options: dict[str, object], more: int) -> str:
    """Returns a budget that the plan uses up. ``more``: how many mebibytes it has above the least that gives the merge all
    the workers that it asks for."""
    low, high = 1, 1 << 10
    while low < high:
        middle = (low + high) // 2
        try:
            enough = sm.plan(inputs, memory=middle << 20, **options).budget.workers == options["workers"]  # type: ignore[arg-type]
        except sm.BudgetError:
            enough = False
        low, high = (low, middle) if enough else (middle + 1, high)
    plan = sm.plan(inputs, memory=(low + more) << 20, **options)  # type: ignore[arg-type]
    return f"{-(-plan.peak_bytes // (1 << 20))}MiB"


@pytest.mark.parametrize(
    ("executor", "io", "more", "chosen"),
    [
        ("processes", "mmap", 0, {"della_linear", "ties", "slerp"}),
        *(pytest.param(*how, None, marks=pytest.mark.slow) for how in itertools.product(EXECUTORS, IO, (0, 16))),
    ],
)
def test_law_1_for_methods_at_tight_budgets(
    tmp_path: Path,
    dense: list[Path],
    executor: str,
    io: str,
    more: int,
    chosen: set[str] | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Methods on four workers, which all have something to do. The kernel counts no more than the budget. ``chosen``: all
    methods if it is None."""
    monkeypatch.setattr(tasks, "PIECE_ELEMS", 32 * GRAIN)
    runs, cases = list[Run](), dict[str, Case]()
    for case in (case for suite in suites() for case in suite.CASES):
        cases[case.method] = case  # the last of each method
    assert cases.keys() >= METHODS.built_in.keys()
    cases = {name: case for name, case in cases.items() if chosen is None or name in chosen}
    small = [sparse(tmp_path / f"small{number}.safetensors", 1 << 14) for number in range(6)]
    for case in cases.values():
        options: dict[str, object] = {"method": case.method, "parameters": case.parameters, "workers": 4, "io": io}
        # A run on little tensors loads the pages of libraries first, because they are no memory of a merge.
        for paths, how in ((small, {"memory": "1GiB"}), (dense, {"executor": executor})):
            asked = options | how | ({"base": paths[0]} if case.base else {})
            inputs = paths[1 : case.models + 1]
            if paths is dense:
                asked["memory"] = tight(inputs, asked, more)
            runs.append((inputs, tmp_path / "out.safetensors", asked))
    over = []
    for case, (_, _, asked), found in zip(cases.values(), runs[1::2], measured(*runs)[1::2], strict=True):
        allowed = int(str(asked["memory"]).removesuffix("MiB")) << 20
        if found["resident"] > allowed:
            over.append(f"{case}: {found['resident']} of {allowed} bytes")
    assert not over, over


def hold_their_plans(tmp_path: Path, shape: tuple[int, int], methods: Sequence[str]) -> None:
    """Merges matrices of this shape, with no more memory than the plan needs."""
    paths = [tmp_path / f"{number}.safetensors" for number in range(4)]
    for number, path in enumerate(paths):
        save_file({"w": torch.randn(shape, generator=torch.Generator().manual_seed(number)).bfloat16()}, path)
    small = [sparse(tmp_path / f"small{number}.safetensors", 1 << 14) for number in range(4)]
    runs: list[Run] = []
    for method in methods:
        for inputs in (small, paths):  # the first loads the pages of libraries
            options: dict[str, object] = {"method": method, "base": inputs[3], "workers": 1}
            memory = tight(inputs[:3], options, 1) if inputs is paths else "1GiB"
            runs.append((inputs[:3], tmp_path / "out.safetensors", options | {"memory": memory}))
    for (_, _, asked), found in zip(runs[1::2], measured(*runs)[1::2], strict=True):
        assert found["resident"] <= found["planned"] <= int(str(asked["memory"]).removesuffix("MiB")) << 20, (asked, found)


def test_law_1_for_wide_matrices_of_spectral_methods(tmp_path: Path) -> None:
    """Matrices that are read and made by columns, with no more memory than the plan needs."""
    hold_their_plans(tmp_path, (600, 4000), ("iso_c", "iso_cts", "tsv", "knots"))


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(2304, 4608), (4608, 2304)])
def test_law_1_for_long_sides_of_spectral_methods(tmp_path: Path, shape: tuple[int, int]) -> None:
    """Matrices that are decomposed in place, with sums and vectors in a temporary file."""
    hold_their_plans(tmp_path, shape, ("iso_c", "iso_cts", "tsv"))


def peaks(tmp_path: Path, elems: int, memory: str, chosen: Container[str]) -> list[tuple[str, dict[str, int]]]:
    """Runs each case of these methods on one tensor of this many elements, partly filled unless it is held whole."""
    paths = [sparse(tmp_path / f"{i}.safetensors", elems) for i in range(6)]
    for number, path in enumerate(paths):
        noise = torch.randn(1 << 12, generator=torch.Generator().manual_seed(number)).bfloat16()
        with open(path, "r+b") as file:
            for place in range(0, elems - len(noise), elems // 16):
                file.seek(path.stat().st_size - 2 * elems + 2 * place)
                file.write(noise.view(torch.uint8).numpy())
    every = [case for suite in suites() for case in suite.CASES]
    cases = [case for case in every if case.method in chosen and not held_as_a_row(case, elems)]
    runs: list[Run] = []
    for case in cases:
        base = {"base": paths[0]} if case.base else {}
        options = {"parameters": case.parameters, "method": case.method, "memory": memory} | base
        runs.append((paths[1 : case.models + 1], tmp_path / "out.safetensors", options))
    return [(str(case), found) for case, found in zip(cases, measured(*runs), strict=True)]


def test_law_1_for_methods(tmp_path: Path) -> None:
    """One long tensor, passes included."""
    for case, peak in peaks(tmp_path, 6_000_001, "256MiB", METHODS.built_in):
        assert peak["anonymous"] <= peak["planned"] <= 256 << 20, (case, peak)
        assert peak["resident"] <= 256 << 20, (case, peak)


@pytest.mark.slow
def test_law_1_for_methods_on_a_billion_elements(tmp_path: Path) -> None:
    for case, peak in peaks(tmp_path, 10**9, "512MiB", ["ties", "slerp", "karcher", "sce", "dare_ties"]):
        assert peak["anonymous"] <= peak["planned"] <= 512 << 20, (case, peak)
        assert peak["resident"] <= 512 << 20, (case, peak)


@pytest.mark.slow
def test_resuming_200_000_tensors_stays_under_the_budget(tmp_path: Path) -> None:
    """The first run is killed by SIGKILL when half of the tensors are on the disk. The budget leaves no room for an object
    per line of the journal, which would be 100 MiB."""
    models = [sparse_model(tmp_path / name, 200_000, 40, 4096) for name in "ab"]
    command = [
        sys.executable,
        "-m",
        "streammerge",
        "merge",
        *map(str, models),
        "-o",
        str(tmp_path / "out"),
        "--no-progress",
    ]
    command += ["--format", "json", "--memory", "288MiB"]
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    journal = tmp_path / ".out.streammerge" / "journal"
    while not (journal.exists() and journal.stat().st_size > 16_000_000):
        assert first.poll() is None
        time.sleep(0.2)
    first.kill()
    first.wait()
    done = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert "continued an interrupted run" in done["notes"][0]
    assert done["peak_bytes"] <= done["memory_bytes"] == 288 << 20
    assert sm.verify(tmp_path / "out", sample=0).tensors == 200_000
