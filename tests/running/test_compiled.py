"""Merges with compiled functions: the same bytes as without."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import streammerge as sm
from streammerge.compiled import library
from streammerge.running.compiled import TaskSums

pytestmark = pytest.mark.skipif(library.library() is None, reason="the package was built without a C compiler")


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    found = [tmp_path / f"{number}.safetensors" for number in range(9)]
    for number, path in enumerate(found):
        drawn = torch.Generator().manual_seed(number)
        long = torch.randn(300, 1001, generator=drawn)
        odd = torch.randn(77, generator=drawn)
        odd[3], odd[5] = math.inf, -math.inf if number else 1.0
        save_file(
            {
                "brain": long.bfloat16(),
                "half": torch.randn(257, 300, generator=drawn).half(),
                "long": long,
                "odd": odd,
                "small.1": torch.randn(11, generator=drawn).bfloat16(),
                "small.2": torch.randn(12, generator=drawn).bfloat16(),
                "wide": torch.randn(40, 50, generator=drawn, dtype=torch.float64),
                "zero": torch.zeros(()),
            },
            path,
        )
    return found


MERGES: list[tuple[int, dict[str, Any]]] = [
    (2, {"weights": [0.6, 0.4]}),
    (9, {"weights": [0.1 * number + 0.05 for number in range(9)], "out_dtype": "bfloat16"}),
    (3, {"method": "n_average", "out_dtype": "float16"}),
    (2, {"method": "slerp", "parameters": {"t": 0.3}}),
    (3, {"method": "multislerp", "weights": [0.2, 0.5, 0.3]}),
    (4, {"method": "model_stock", "base": 8}),
    (2, {"method": "nuslerp", "weights": [0.2, 0.5], "base": 8}),
    (2, {"method": "add_difference", "base": 8, "parameters": {"alpha": 0.7}}),
    (3, {"method": "geometric_median"}),
    (1, {"method": "copy", "out_dtype": "float32"}),
]


@pytest.mark.parametrize("number", range(len(MERGES)))
@pytest.mark.parametrize(
    "ways", [{"io": "mmap"}, {"io": "pread"}, {"io": "mmap", "executor": "processes", "workers": 2}], ids=str
)
@pytest.mark.sampled(12)
def test_a_merge_has_the_bytes_of_one_without_them(
    number: int, ways: dict[str, Any], paths: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count, options = MERGES[number]
    options = {**options, "allow_nonfinite": True}
    if "base" in options:
        options["base"] = paths[options["base"]]
    calls, plain = list[int](), TaskSums.put
    monkeypatch.setattr(
        TaskSums, "put", lambda self, source, a, b, into: calls.append(b - a) or plain(self, source, a, b, into)
    )
    made = [tmp_path / "with.safetensors", tmp_path / "without.safetensors"]
    result = sm.merge(paths[:count], made[0], **options, **ways)
    here = ways.get("executor") != "processes" and options.get("method") != "copy"  # torch converts, as it is loaded
    assert not here or sum(calls) > 300 * 1001
    monkeypatch.setattr(library, "_loaded", lambda: None)
    monkeypatch.setenv("STREAMMERGE_COMPILED", "0")
    calls.clear()
    other = sm.merge(paths[:count], made[1], **options, **ways)
    assert not calls
    assert tensors(made[0]) == tensors(made[1])
    assert result.nonfinite == other.nonfinite
    assert ways["io"] == "pread" or result.read_bytes == other.read_bytes  # a chunk with infinity is read twice then


def tensors(path: Path) -> dict[str, bytes]:
    return {name: bytes(each.reshape(-1).view(torch.uint8).numpy()) for name, each in load_file(path).items()}


@pytest.mark.parametrize("io", ["mmap", "pread"])
def test_what_is_measured_is_the_same(io: str, paths: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for name in ("with", "without"):
        out = tmp_path / f"{name}.safetensors"
        sm.merge(paths[:3], out, statistics=True, io=io, allow_nonfinite=True)
        found.append(json.loads(Path(f"{out}.statistics.json").read_text()))
        monkeypatch.setattr(library, "_loaded", lambda: None)
    told = ("output", "time", "memory")  # what belongs to a run
    for each in found:
        each["made"] = [row for row in each["made"] if row[0] not in told]
    assert found[0]["made"] == found[1]["made"]
    apart = {"made": 0, "samples": 0}
    assert {**found[0], **apart} == {**found[1], **apart}


def test_a_sample_beside_infinities_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [tmp_path / f"{number}.safetensors" for number in range(3)]
    for number, path in enumerate(files):
        long = torch.randn(1200, 1000, generator=torch.Generator().manual_seed(number))
        long[::50, 7] = math.inf  # all have it, so most chunks are settled by torch
        save_file({"long": long}, path)
    found = []
    for name in ("with", "without"):
        out = tmp_path / f"{name}.safetensors"
        sm.merge(files, out, statistics=True, io="mmap", allow_nonfinite=True)
        found.append(json.loads(Path(f"{out}.statistics.json").read_text())["distances"])
        monkeypatch.setattr(library, "_loaded", lambda: None)
    assert found[0] == found[1]
    assert "0.8" in str(found[0])
