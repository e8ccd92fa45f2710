"""Distances on a sample; how they are shown is tested in tests/reporting."""

from __future__ import annotations

import json
import math
from array import array
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import streammerge as sm
from streammerge.planning.plan import Plan
from streammerge.planning.tasks import pieces
from streammerge.requests.merging import Request
from streammerge.running import measuring
from streammerge.running.execution import Result, execute
from streammerge.running.finished import MeasuredTasks
from streammerge.running.measuring import squares
from streammerge.running.process import resident_bytes
from streammerge.running.sampling import places
from streammerge.running.session import RunOptions

SHAPES = {"long": (2, 4_200_001), "odd": (1, 70_001), **{f"s{n}": (n, 33) for n in range(1, 40)}, "one": (1,), "no": (0,)}


def inputs(folder: Path, dtypes: tuple[torch.dtype, ...], ending: str = "safetensors") -> list[Path]:
    made = [folder / f"{number}.{ending}" for number in range(len(dtypes))]
    for number, (path, dtype) in enumerate(zip(made, dtypes, strict=True)):
        make = torch.Generator().manual_seed(number)
        tensors = {name: torch.randn(shape, generator=make).to(dtype) for name, shape in SHAPES.items()}
        save_file(tensors, path) if ending == "safetensors" else torch.save(tensors, path)
    return made


def measured(inputs: list[Path], out: Path, **asked: Any) -> Result:
    asked = {"recipe": None, "base": None, **asked}
    plan: Plan = Request.of({"inputs": inputs, "out": out, **asked}).plan()
    return execute(plan, RunOptions(measures=True, overwrite=True), resident_bytes())


def check(result: Result, files: list[dict[str, torch.Tensor]], made: dict[str, torch.Tensor]) -> None:
    assert result.measured is not None
    for number, (task, measured) in enumerate(zip(result.plan.tasks, result.measured.distances(), strict=True)):
        name = task.out.name
        if not task.elems:
            assert not measured
            continue
        there = torch.cat(
            [piece.start + torch.from_numpy(places(piece.stop - piece.start)) for piece in pieces(task, number)]
        )
        here = made[name].flatten()[there].double()
        for file, distance in zip(files, measured, strict=True):
            own = file[name].flatten()[there].double()
            assert distance == pytest.approx(float((here - own).norm() / own.norm()), rel=1e-5), name


@pytest.mark.parametrize(
    "ways", [{"workers": 1}, {"workers": 3, "memory": "40MiB"}, {"io": "pread"}, {"method": "slerp"}, {"method": "ties"}]
)
def test_distances_are_those_of_the_sample_however_it_is_made(tmp_path: Path, ways: dict[str, Any]) -> None:
    method = ways.get("method")
    paths = inputs(tmp_path, (torch.bfloat16,) * (3 if method == "ties" else 2))
    more = {"slerp": {"parameters": {"t": 0.3}}, "ties": {"base": paths.pop(0) if method == "ties" else None}}
    how = more.get(method, {"weights": [0.3, 0.7]})
    result = measured(paths, tmp_path / "out.safetensors", **how, **ways)
    every = [how["base"], *paths] if method == "ties" else paths
    check(result, list(map(load_file, every)), load_file(tmp_path / "out.safetensors"))


@pytest.mark.parametrize("room", [1, 7, 100, 1000])
def test_a_sample_may_be_longer_than_what_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    monkeypatch.setattr(measuring, "_MOST_HELD", room)
    shapes = {name: shape for name, shape in SHAPES.items() if room > 7 or math.prod(shape) < 300}
    monkeypatch.setitem(globals(), "SHAPES", shapes)
    paths = inputs(tmp_path, (torch.bfloat16,) * 2)
    result = measured(paths, tmp_path / "out.safetensors", weights=[0.3, 0.7], workers=1)
    check(result, list(map(load_file, paths)), load_file(tmp_path / "out.safetensors"))


@pytest.mark.parametrize("dtypes", [(torch.float16, torch.float32), (torch.float64, torch.bfloat16), (torch.float32,) * 2])
def test_dtypes_may_differ_and_archives_have_no_neighbours(tmp_path: Path, dtypes: tuple[torch.dtype, ...]) -> None:
    paths = inputs(tmp_path, dtypes, "pth")
    result = measured(paths, tmp_path / "out.pth", weights=[0.3, 0.7])
    check(result, list(map(torch.load, paths)), torch.load(tmp_path / "out.pth"))


def test_squares_leave_out_what_is_not_finite_and_hold_what_float32_does_not() -> None:
    apart = np.array([[3.0, 4.0, math.nan, 1e-30, 2e25, 0.0]], np.float32)
    own = np.array([[1.0, 1.0, 5.0, 1e-30, 1e25, 0.0]], np.float32)
    with np.errstate(all="ignore"):
        found = squares(np.concatenate([own, apart]), np.array([0, 2, 4, 5]))
    assert found[:, 1] == pytest.approx([25.0, 1e-60, 4e50, 0.0])
    assert found[:, 0] == pytest.approx([2.0, 1e-60, 1e50, 0.0])
    assert squares(np.concatenate([own, apart])[:, :2], np.array([0]))[0] == pytest.approx([2.0, 25.0])


def test_norms_of_pieces_are_joined() -> None:
    rows = [[3, 6, 0, 0, 1, 0], [0] * 6, [0] * 6, [4, 8, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0], [3, 8, 0, 0, 1, 0]]
    norms = np.array(rows, np.float32).tobytes()
    found = MeasuredTasks(3, norms, 24, array("I", [24, 0, 0, 16, 8, 24]), [(2, 4, 2)])
    assert found.distances() == [[0.5, 0.0, None], [], [pytest.approx(3 / 65**0.5), 0.0, None]]
    assert MeasuredTasks(4, norms, 24, array("I", [24, 0, 0, 16, 0, 0])).distances()[3] == [0.5, 0.0]
    assert MeasuredTasks(2, b"", 0, b"").distances() == [[], []]


def test_what_lies_beside_nan_is_measured(tmp_path: Path) -> None:
    paths = inputs(tmp_path, (torch.float32, torch.float32))
    for path in paths:
        tensors = load_file(path)
        tensors["s3"][0, 4] = math.inf  # all have it, so the output keeps it
        save_file(tensors, path)
    result = measured(paths, tmp_path / "out.safetensors")
    assert result.measured is not None
    found = {task.out.name: own for task, own in zip(result.plan.tasks, result.measured.distances(), strict=True)}
    assert all(each is not None and 0.5 < each < 1 for name in ("s2", "s3", "s4") for each in found[name])


def test_statistics_of_a_run_that_goes_on_are_those_of_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from streammerge.events import TaskDone

    paths, out = inputs(tmp_path, (torch.bfloat16, torch.bfloat16)), tmp_path / "out.safetensors"
    sm.merge(paths, tmp_path / "whole.safetensors", statistics=True)
    count = 0

    def stop(event: object) -> None:
        nonlocal count
        count += isinstance(event, TaskDone)
        if count == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sm.merge(paths, out, statistics=True, listener=stop)
    result = sm.merge(paths, out, statistics=True)
    assert any("continued" in note for note in result.notes)
    whole, parts = (json.loads((tmp_path / f"{name}.safetensors.statistics.json").read_text()) for name in ("whole", "out"))
    assert parts["distances"] == whole["distances"]


def test_sums_do_not_depend_on_chunks_and_workers(tmp_path: Path) -> None:
    paths = inputs(tmp_path, (torch.bfloat16, torch.bfloat16))
    ways: list[dict[str, Any]] = [{"workers": 1}, {"workers": 3, "memory": "40MiB"}, {"io": "pread", "workers": 2}]
    found = []
    for number, way in enumerate(ways):
        result = measured(paths, tmp_path / f"out{number}.safetensors", **way)
        assert result.measured is not None
        found.append([[None if d is None else f"{d:.7g}" for d in each] for each in result.measured.distances()])
    assert found[0] == found[1] == found[2]


def test_the_first_of_neighbours_holds_what_was_measured_of_all(tmp_path: Path) -> None:
    from streammerge.planning.tasks import PieceDone

    done = [PieceDone(number, 0, 1, 0, {}) for number in (3, 4, 5, 7, 8, 9)]
    own = measuring.Measuring()
    own.begin_unit(len(done), 2)
    own._sums[:] = np.arange(24).reshape(6, 4)
    own._inputs = [2, 2, 1, 1, 0, 2]  # 5 has fewer sources than 4, 7 does not follow 5, and 8 is not measured
    norms = np.sqrt(np.arange(24)).astype("<f4").reshape(6, 4)
    expected = [norms[:2].tobytes(), b"", norms[2, :2].tobytes(), norms[3, :2].tobytes(), b"", norms[5].tobytes()]
    assert [each.measured for each in own.put_into(done)] == expected


def test_a_plain_merge_measures_nothing(tmp_path: Path) -> None:
    for name in "ab":
        save_file({"w": torch.ones(3)}, tmp_path / f"{name}.safetensors")
    merged = sm.merge([tmp_path / f"{name}.safetensors" for name in "ab"], tmp_path / "out.safetensors")
    assert merged.measured is not None
    assert not any(merged.measured.distances())
