"""The pure parts: units, dtypes, names, budget, checksums, the executor, and the shape of the package itself."""

from __future__ import annotations

import ast
import itertools
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import streammerge as sm
from streammerge import budget
from streammerge.checksums import CRC32, CRC32C, Checksum
from streammerge.dtypes import DType, parse_dtype
from streammerge.executors.local import ThreadExecutor
from streammerge.inputs import numeric_order
from streammerge.names import bare, describe_match, match_names
from streammerge.tensors import GRAIN, is_contiguous, ranges
from streammerge.units import PAGE_BYTES, binary_bytes, decimal_bytes, parse_bytes

SOURCE = Path(sm.__file__).parent

LAYERS = {
    0: [
        "choices",
        "tensors",
        "dtypes",
        "units",
        "events",
        "errors",
        "tree",
        "checksums",
        "names",
        "rng",
        "select",
        "layers",
        "quantised",
        "version",
    ],
    1: [
        "group",
        "sums",
        "order",
        "budget",
        "storage",
        "memory",
        "executors",
        "unpickle",
        "rebuild",
        "repickle",
        "statedict",
    ],
    2: ["formats", "methods", "recipe", "bookkeeping", "huggingface"],
    3: ["checkpoint", "workspace", "tasks", "engine", "staging", "writer", "receipt"],
    4: [
        "inputs",
        "conversions",
        "choose",
        "parts",
        "values",
        "mismatch",
        "align",
        "output",
        "placing",
        "structure",
        "pickled",
        "planning",
        "wish",
        "relatives",
        "resume",
    ],
    5: ["production", "run", "verification", "recomputation"],
    6: ["api"],
    7: ["__init__", "cli", "__main__"],
}


def test_imports_go_downward_only() -> None:
    layer = {name: number for number, names in LAYERS.items() for name in names}
    order = [name for names in LAYERS.values() for name in names]
    for path in SOURCE.rglob("*.py"):
        room = path.relative_to(SOURCE).with_suffix("").parts[0]
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("streammerge"):
                parts = (node.module or "").split(".")
                used = [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]
                for other in used:
                    other = "__init__" if other == "__version__" else other
                    assert other in order, f"{path.name} imports {other}, which has no layer"
                    assert layer[other] <= layer[room], f"{room} ({layer[room]}) imports {other} ({layer[other]})"
                    if room != other and layer[other] == layer[room] and layer[room] == 2:
                        assert {room, other} != {"formats", "methods"}


def test_public_names_are_sorted_and_there() -> None:
    assert sm.__all__ == sorted(sm.__all__)
    assert all(hasattr(sm, name) for name in sm.__all__)


def test_torch_is_imported_only_where_values_are_computed() -> None:
    heavy = ("torch", "numpy", "safetensors", "yaml")
    code = f"import sys, streammerge.cli; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("text", "size"),
    [("512MiB", 512 << 20), ("5GB", 5 * 10**9), ("1.5g", 15 * 10**8), ("7", 7), (9, 9), ("2 KiB", 2048), ("1T", 10**12)],
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "x", "5 apples", "-1", "1e9", "GiB"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(sm.RecipeError):
        parse_bytes(text)


def test_sizes_as_people_read_them() -> None:
    assert [decimal_bytes(n) for n in (0, 999, 1999, 1_900_000_000, 123_456)] == [
        "0 bytes",
        "999 bytes",
        "2.0 kB",
        "1.9 GB",
        "123 kB",
    ]
    assert [binary_bytes(n) for n in (1 << 20, 221 << 20, 3 << 30)] == ["1.0 MiB", "221 MiB", "3.0 GiB"]


def test_the_dtype_table_agrees_with_torch() -> None:
    for dtype in DType:
        assert dtype.torch.itemsize == dtype.element_bytes
        assert dtype.torch.is_floating_point == (dtype.kind == "float" or dtype.kind == "packed")
        assert dtype.torch.is_complex == (dtype.kind == "complex")
        if dtype.storage_class:
            assert getattr(torch, dtype.storage_class).dtype == dtype.torch
        assert parse_dtype(dtype.torch) is parse_dtype(dtype.value) is parse_dtype(dtype.torch_name) is dtype


def test_names() -> None:
    assert bare("module._orig_mod.xtts.gpt.w") == "gpt.w"
    assert bare("model") == "model"
    ours, theirs = ["a.w", "b.w", "b.module.c"], ["module.a.w", "module.b.w", "module.b.c"]
    assert match_names(ours, theirs) == dict(zip(ours, theirs, strict=True))
    assert match_names(["w", "module.w"], ["module.w"]) == {"module.w": "module.w"}
    assert match_names(["w", "module.w"], ["_orig_mod.w"]) == {}, "an ambiguous name must not be guessed"
    assert match_names(["model.w", "model.v"], ["w", "v"]) == {"model.w": "w", "model.v": "v"}
    assert match_names(["w", "v"], ["net.w", "net.v"]) == {"w": "net.w", "v": "net.v"}
    assert match_names(["model.w", "w"], ["w", "net.w"]) == {"w": "w"}, "two tensors must not be crossed"
    assert match_names(["student.w"], ["teacher.w"]) == {}, "different models must not be matched"
    assert describe_match({"a": "module.a", "b": "module.b"}) == [
        "2 tensors match once 'module.' is removed from its names"
    ]
    assert sorted(["c-1000", "c-200", "c-200b"], key=numeric_order) == ["c-200", "c-200b", "c-1000"]


def test_contiguity() -> None:
    for tensor in (
        torch.empty(2, 3),
        torch.empty(2, 3).t(),
        torch.empty(0, 3).t(),
        torch.empty(1, 5)[:, ::1].t(),
        torch.empty(4)[::2],
    ):
        assert is_contiguous(tuple(tensor.shape), tensor.stride()) == tensor.is_contiguous()


def test_ranges_cover() -> None:
    assert list(ranges(0, 4)) == []
    assert list(ranges(9, 4)) == [(0, 4), (4, 8), (8, 9)]


@pytest.mark.parametrize("kind", [CRC32, CRC32C])
@pytest.mark.parametrize("sizes", [[0], [1], [5, 0, 3], [1 << 16, 1, 70_001], [3] * 50])
def test_checksums_join(kind: Checksum, sizes: list[int]) -> None:
    data, parts, cursor = os.urandom(sum(sizes)), [], 0
    for size in sizes:
        parts.append((cursor, size, kind.update(data[cursor : cursor + size])))
        cursor += size
    assert kind.join(reversed(parts)) == kind.update(data) == kind.update(data[3:], kind.update(data[:3]))
    assert kind.combine(kind.update(b"ab"), kind.update(b"c"), 1) == kind.update(b"abc")


def test_checksums_are_those_of_the_standards() -> None:
    assert (CRC32.update(b"123456789"), CRC32C.update(b"123456789")) == (0xCBF43926, 0xE3069283)


class TestBudget:
    cost = budget.Cost(compute=3, buffers=5, out=7, read=11, passes_bytes=17, spread_bytes=19)

    def test_the_peak_is_the_sum_of_its_terms(self) -> None:
        fitted = budget.fit(1 << 40, workers=3, tensors=5, cost=self.cost, staging=True)
        buffers = 5 * 3 + 2 * 11
        expected = budget.RUN_BYTES + 5 * budget.PER_TENSOR_BYTES + budget.STAGING_BYTES + 19
        expected += 3 * (budget.PER_WORKER_BYTES + 17 + budget.BEST_OUT_BYTES + budget.BEST_CHUNK_ELEMS * buffers)
        assert (fitted.workers, fitted.chunk_elems, fitted.peak_bytes) == (3, budget.BEST_CHUNK_ELEMS, expected)

    def test_slots_are_what_was_counted(self) -> None:
        made = budget.slots(budget.Budget(1, 100, 5000, 1000, self.cost, 0))
        assert sum(size for _, size in made.values()) == 100 * self.cost.element_bytes + 5000 + PAGE_BYTES
        assert all(offset % PAGE_BYTES == 0 for offset, _ in made.values())
        ends = sorted((offset, offset + size) for offset, size in made.values())
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(ends))

    def test_less_memory_means_smaller_chunks_then_fewer_workers_then_an_error(self) -> None:
        seen, memory = [], 1 << 28
        with pytest.raises(sm.BudgetError) as error:
            while True:
                fitted = budget.fit(memory, workers=4, tensors=5, cost=self.cost, staging=False)
                assert fitted.peak_bytes <= memory
                assert fitted.chunk_elems % GRAIN == 0
                seen.append((fitted.workers, fitted.chunk_elems))
                memory -= 1 << 20
        assert seen == sorted(seen, reverse=True)
        assert seen[-1] == (1, GRAIN)
        least = int(str(error.value).rpartition("--memory ")[2].partition("MiB")[0]) << 20
        budget.fit(least, workers=4, tensors=5, cost=self.cost, staging=False)
        with pytest.raises(sm.BudgetError):
            budget.fit(least - (1 << 20), workers=4, tensors=5, cost=self.cost, staging=False)

    def test_mapped_windows_shrink_before_chunks(self) -> None:
        cost = budget.Cost(compute=8, buffers=2, out=2, read=0, inputs=8, mapped=2)
        wide, narrow = (budget.fit(m << 20, workers=2, tensors=10, cost=cost, staging=False) for m in (512, 64))
        assert wide.window_bytes == budget.MOST_WINDOW_BYTES > narrow.window_bytes
        assert wide.chunk_elems == narrow.chunk_elems


class TestExecutor:
    @pytest.mark.parametrize("workers", [1, 2, 8])
    def test_every_task_runs_once(self, workers: int) -> None:
        assert sorted(ThreadExecutor(workers).run(range(500), lambda n: n * n)) == [n * n for n in range(500)]

    def test_the_first_error_stops_the_rest(self) -> None:
        ran: list[int] = []

        def fail(number: int) -> int:
            ran.append(number)
            if number == 20:
                raise KeyError("twenty")
            return number

        with pytest.raises(KeyError):
            list(ThreadExecutor(2).run(range(100_000), fail))
        assert len(ran) < 1000

    def test_no_thread_is_left_when_the_listener_stops(self) -> None:
        before = threading.active_count()
        results = ThreadExecutor(4).run(range(10_000), lambda n: n)
        next(results)
        results.close()
        assert threading.active_count() == before


def test_the_callers_torch_threads_are_left_alone(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(3)}, tmp_path / "in.pth")
    before = torch.get_num_threads()
    sm.merge([tmp_path / "in.pth"], tmp_path / "out.pth")
    assert torch.get_num_threads() == before
