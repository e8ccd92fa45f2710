"""The benchmarks measure correctly and report regressions."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from benchmarks import cluster, executors, history, page
from benchmarks.cases import CASES, Case
from benchmarks.files import Model
from benchmarks.measure import measure
from benchmarks.runner import OURS, REFERENCE, run_case
from safetensors import safe_open

from streammerge.planning.units import Unit

MIB = 1 << 20
NIGHT: dict[str, Any] = {
    "time": "2026-01-01T00:00:00+00:00",
    "commit": "abc1234",
    "version": "1",
    "machine": {"cpu": "some", "cores": 2},
    "results": [
        {
            "case": "linear",
            "tool": OURS,
            "exit_code": 0,
            "seconds": 2.0,
            "cpu_seconds": 3.0,
            "ratio": 1.0,
            "ratio_low": 0.9,
            "ratio_high": 1.1,
            "anonymous_bytes": 100 * MIB,
            "resident_bytes": 300 * MIB,
            "cgroup_bytes": None,
            "gb_per_second": 3.0,
        }
    ],
}


def night(**changes: Any) -> dict[str, Any]:
    made = copy.deepcopy(NIGHT)
    made["results"][0] |= changes
    return made


def test_a_process_is_measured_by_what_it_does(tmp_path: Path) -> None:
    """A process with 200 MiB of its own, one second of arithmetic, 8 MiB to the disk, and an exit code."""
    code = f"""
import os, sys, time
held = b'x' * (200 << 20)
end = time.process_time() + 1
while time.process_time() < end: pass
with open({str(tmp_path / "out")!r}, 'wb') as f: f.write(held[:8 << 20]); f.flush(); os.fsync(f.fileno())
print('said'); sys.exit(3)
"""
    done = measure([sys.executable, "-c", code])
    assert (done.exit_code, done.output) == (3, "said\n")
    assert 200 * MIB <= done.anonymous <= 240 * MIB
    assert done.anonymous <= done.resident <= 260 * MIB
    assert 1 <= done.cpu_seconds <= done.seconds * 1.2
    assert done.disk_written >= 8 * MIB or not done.disk_written  # file systems in memory have no disk
    assert max(own for _, own, _ in done.samples) == done.anonymous


def test_what_a_parent_holds_is_not_the_childs() -> None:
    """The child does not inherit the parent's memory, as it does in ru_maxrss."""
    held = b"x" * (400 << 20)
    assert measure([sys.executable, "-c", "pass"]).resident < 100 * MIB
    assert len(held) == 400 << 20


@pytest.mark.parametrize("form", ["safetensors", "pth", "legacy"])
@pytest.mark.parametrize("shape", ["layers", "giant", "small"])
@pytest.mark.sampled(3, by="form")
def test_files_are_what_they_are_called(tmp_path: Path, shape: str, form: str) -> None:
    gigabytes = 0.3 if shape == "layers" else 0.01
    path = Model(gigabytes, 1, "bfloat16", shape, form).made(tmp_path)
    assert abs(path.stat().st_size - gigabytes * 1e9) < 0.4 * gigabytes * 1e9
    shown = subprocess.run([sys.executable, "-m", "streammerge", "inspect", path, "--format", "json"], capture_output=True)
    assert json.loads(shown.stdout)["tensors"] == len([*Model(gigabytes, 1, "bfloat16", shape, form).shapes()])
    if form == "safetensors":
        with safe_open(path, "pt") as opened:
            values = opened.get_tensor(next(iter(opened.keys()))).float()
        assert 0.015 < float(values.std()) < 0.025


@pytest.mark.slow
def test_a_case_is_run_beside_its_reference(tmp_path: Path) -> None:
    models = (Model(0.01, 0, shape="small"), Model(0.01, 1, shape="small"))
    arguments = ("merge", "{0}", "{1}", "-o", "{out}", "--format", "json", "--no-progress")
    said: list[str] = []
    results = run_case(Case("tiny", models, arguments), tmp_path / "files", tmp_path, 2, False, said.append)
    reference, ours, synced, _torch = results
    assert (reference["tool"], ours["tool"], ours["exit_code"], ours["rounds"]) == (REFERENCE, OURS, 0, 2)
    assert reference["ratio"] == reference["ratio_low"] == reference["ratio_high"] == 1
    assert ours["ratio_low"] <= ours["ratio"] <= ours["ratio_high"]
    assert ours["output_bytes"] < ours["input_bytes"] < 21e6
    assert 0 < ours["own_seconds"] < ours["seconds"]
    startup = measure([sys.executable, "-c", "import numpy"]).resident  # a short mean loads no torch
    assert 0.8 * startup < ours["resident_bytes"] < startup + 100 * MIB
    assert synced["ratio"] > 0
    assert len(said) == 8
    assert not (tmp_path / "run").exists()


def test_a_failure_is_told(tmp_path: Path) -> None:
    case = Case("fails", (Model(0.01, 0, shape="small"),), ("merge", "{0}", "-o", "{out}", "--method", "nothing"))
    results = run_case(case, tmp_path, tmp_path, 1, False, lambda text: None)
    assert results[1]["exit_code"] == 2
    assert "nothing" in results[1]["output"]
    assert history.regressions([history.night(results)]) == ["fails: it failed with exit code 2"]


class TestRegressions:
    def test_memory_beyond_three_percent(self) -> None:
        assert history.regressions([night(), night(resident_bytes=308 * MIB)]) == []
        (worse,) = history.regressions([night(), night(), night(resident_bytes=310 * MIB)])
        assert worse == f"linear: resident memory rose from {300 * MIB / 1e6:.1f} to {310 * MIB / 1e6:.1f} MB"

    def test_time_that_stays_worse_for_three_nights(self) -> None:
        slow = night(ratio=1.3)
        assert history.regressions([night(), night(), slow, slow]) == []
        assert history.regressions([night(), slow, night(), slow, slow]) == []
        (worse,) = history.regressions([night(), night(), slow, slow, slow])
        assert worse == "linear: 1.30 times the reference for 3 nights, 1.00 before"

    def test_only_machines_that_are_alike_are_compared(self) -> None:
        other = night(resident_bytes=900 * MIB, ratio=9) | {"machine": {"cpu": "another"}}
        assert history.regressions([night(), other]) == []

    def test_none_without_nights(self) -> None:
        assert history.regressions([]) == []


def test_the_history_is_lines_that_git_can_hold(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    assert history.read(path) == []
    history.append(path, night(samples=[(0.0, 1, 2)]))
    history.append(path, night())
    assert history.read(path) == [night(), night()]
    assert len(path.read_text().splitlines()) == 2


def test_one_night_is_one(tmp_path: Path) -> None:
    assert "<p>1 night; the last:" in page.write(tmp_path / "site", [night()]).read_text()


def test_the_page_shows_nights_and_escapes_what_it_shows(tmp_path: Path) -> None:
    sampled = night(
        case="<linear>", samples=[(0.0, MIB, 2 * MIB), (1.0, 2 * MIB, 3 * MIB)], startup_bytes=MIB, memory_bytes=MIB
    )
    sizes = [night(case=f"linear of {size} GB")["results"][0] for size in (1, 2)]
    sampled["results"] += sizes + [each | {"tool": "mergekit", "exit_code": -9, "limit_bytes": MIB} for each in sizes[:1]]
    path = page.write(tmp_path / "site", [night(), night(resident_bytes=900 * MIB), sampled])
    text = path.read_text()
    assert "&lt;linear&gt;" in text
    assert "<linear>" not in text
    assert "killed by the kernel" in text
    for name in ("memory-by-size", "memory-over-time", "nights"):
        assert (tmp_path / "site" / f"{name}.svg").read_text().startswith("<?xml")
        assert f'src="{name}.svg"' in text


def test_cases_are_called_each_by_one_name() -> None:
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)
    assert sum(case.quick for case in CASES) >= 3


def test_the_line_between_threads_and_processes() -> None:
    seconds = {
        ("linear", 1, "threads"): [2.0, 9.0, 2.0],
        ("linear", 1, "processes"): [3.0, 3.0, 3.0],
        ("linear", 8, "threads"): [1.0],
        ("linear", 8, "processes"): [0.5],
        ("ties", 1, "threads"): [1.0],
        ("ties", 1, "processes"): [1.0],
    }
    lines = executors.table(seconds)
    assert lines[1].split() == ["linear", "1", "2.00", "3.00", "0.67"]
    assert lines[-2:] == [
        "linear: processes are faster from 8 workers on",
        "ties: processes are faster at no number of workers here",
    ]


@pytest.mark.slow
def test_executors_are_timed_beside_each_other(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.executors", "--files", str(tmp_path), "--gigabytes", "0.1"]
    done = subprocess.run([*command, "--rounds", "1", "--workers", "1"], capture_output=True, text=True, check=True)
    assert [line.split()[:2] for line in done.stdout.splitlines()[1:3]] == [["linear", "1"], ["ties", "1"]]


@pytest.mark.parametrize("method", ["linear", pytest.param("ties", marks=pytest.mark.slow)])
def test_a_small_merge_has_as_many_chunks_as_the_whole_one(method: str, tmp_path: Path) -> None:
    """Only then the Python code of an emulated merge runs as often as that of the real one."""
    command = [sys.executable, "-m", "benchmarks.emulation", str(tmp_path), "--shape", "small", "--gigabytes", "0.005"]
    found = []
    for more in (["--whole"], []):
        done = subprocess.run([*command, "--method", method, *more], capture_output=True, text=True, check=True)
        found.append([json.loads(line) for line in done.stdout.splitlines()])
    assert [run["turn"] for run in found[0]] == [0, 1]
    assert [(run["chunks"], run["elems"]) for run in found[0]] == [(run["chunks"], run["elems"]) for run in found[1]]
    assert found[0][1]["chunks"] > 0


def test_an_emulated_worker_waits_for_each_element(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.emulation", str(tmp_path), "--shape", "small", "--gigabytes", "0.005"]
    done = subprocess.run([*command, "--nanoseconds", "200"], capture_output=True, text=True, check=True)
    seconds = json.loads(done.stdout.splitlines()[-1])["seconds"]
    elems = 0.005e9 // 2 // (1 << 15) * (1 << 15)
    assert elems * 200e-9 < seconds < 20 * elems * 200e-9


def test_the_bytes_from_which_processes_repay_their_start() -> None:
    times = {"threads": [5.0, 4.0, 4.0, 9.0], "processes": [3.0, 1.0, 2.0, 2.0]}
    runs = [{"workers": 8, "executor": name, "seconds": s, "elems": 0} for name, all_ in times.items() for s in all_]
    (row,) = executors._rows("ties", "small", executors._median(runs), 8.0, 0.25)
    assert row.split() == ["ties", "small", "8", "2.00", "4.00", "2.00", "0.0", "0.0", "(cpu)"]


def test_a_case_above_its_own_bar_is_a_regression() -> None:
    """From the first night on."""
    result = {"case": "plan", "tool": OURS, "exit_code": 0, "ratio": 1.0, "cpu_seconds": 3.9, "resident_bytes": 190 << 20}
    result |= {"most_cpu_seconds": 4.0, "most_bytes": 200 << 20, "anonymous_bytes": 1}
    for more, count in (({}, 0), ({"cpu_seconds": 4.1}, 1), ({"resident_bytes": 201 << 20}, 1)):
        assert len(history.regressions([{"machine": {}, "results": [result | more]}])) == count


# ---------------------------------------------------------------------------------------------------- many machines


def a_plan(units: int, cost: int) -> cluster.Planned:
    return cluster.Planned([Unit(n, n, n + 1, cost) for n in range(units)], units * cost * 2 // 3, units * cost // 3, units)


def test_simulated_machines_share_the_work_until_the_storage_is_full() -> None:
    plan = a_plan(4000, 1_000_000_000)
    machines = cluster.Machines(1, network=10e9, storage=100e9, seconds_per_gb=[0.1], start_seconds=0.0, claim_seconds=0.0)
    machines = replace(machines, receipt_seconds=0.0)
    one = cluster.simulate(plan, machines)
    assert one.seconds == pytest.approx(400, rel=0.01), "4 TB at the network's rate"
    for claims in (True, False):
        eight = cluster.simulate(plan, replace(machines, nodes=8, claims=claims))
        assert eight.seconds == pytest.approx(50, rel=0.02)
    assert cluster.simulate(plan, replace(machines, nodes=64)).seconds == pytest.approx(40, rel=0.2), "the storage is full"
    slow = replace(machines, seconds_per_gb=[10.0])
    assert cluster.simulate(plan, slow).seconds == pytest.approx(4000 * 10 / 16, rel=0.01), "the cores are slowest"
    assert one.busy == pytest.approx(1.0)


def test_simulated_deaths_cost_units_and_time() -> None:
    plan = a_plan(500, 1_000_000_000)
    calm = cluster.Machines(4)
    lossy = replace(calm, deaths_per_hour=400.0)
    assert cluster.simulate(plan, calm).lost == 0
    died = cluster.simulate(plan, lossy)
    assert died.lost > 0
    assert died.seconds > cluster.simulate(plan, calm).seconds
    assert died == cluster.simulate(plan, lossy), "the same seed gives the same run"


def test_sparse_models_are_planned(tmp_path: Path) -> None:
    plan = cluster.planned(tmp_path, layers=1, experts=2)
    assert plan.tensors == 2 + 5 + 6
    assert sum(path.stat().st_blocks for path in tmp_path.rglob("*.safetensors")) < 200
    assert plan.write_bytes == pytest.approx(plan.read_bytes / 2, rel=0.01)


@pytest.mark.slow
def test_the_page_has_the_simulated_numbers(tmp_path: Path) -> None:
    text = (Path(cluster.__file__).parents[1] / "docs" / "cluster.md").read_text()
    shown = text.partition("simulate -->\n")[2].partition("\n<!-- end -->")[0]
    plans = {method: cluster.planned(tmp_path, method) for method in cluster.METHODS}
    assert shown == cluster.tables(plans, json.loads(cluster.MEASURED.read_text()))
