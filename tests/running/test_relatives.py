"""Checkpoints of one training are distinguished from unrelated ones."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import octets
from safetensors.torch import save_file

import streammerge as sm
from streammerge.running import relatives
from streammerge.sources.stored import Stored
from streammerge.stores.buffers import Buffers
from streammerge.stores.locations import parse
from streammerge.stores.remote import RangedInput
from streammerge.tensors.dtypes import parse_dtype
from streammerge.tensors.spec import TensorSpec


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_two_trainings_are_told_from_fine_tunes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made = {name: {f"l{i}.weight": draw(s + i, 64, 64) for i in range(3)} for name, s in (("a", 0), ("b", 50))}
    tuned = {name: t + 0.1 * draw(99, 64, 64) for name, t in made["a"].items()}
    for tensors in (*made.values(), tuned):
        tensors["norm.weight"] = torch.ones(512)
    for name, tensors in (*made.items(), ("tuned", tuned)):
        save_file(tensors, tmp_path / f"{name}.safetensors")
    related = sm.merge(["a.safetensors", "tuned.safetensors"], "one.safetensors")
    assert related.warnings == ()
    apart = sm.merge(["a.safetensors", "tuned.safetensors", "b.safetensors"], "two.safetensors")
    assert len(apart.warnings) == 1
    assert "b.safetensors has the names and shapes of a.safetensors but seems to come from another" in apart.warnings[0]
    u, v = (torch.stack([made[n][f"l{i}.weight"].flatten() for i in range(3)]).double() for n in "ab")
    median = torch.nn.functional.cosine_similarity(u, v).median().item()
    assert f"median cosine of 3 sampled tensors is {median:.3f}" in apart.warnings[0]


@pytest.mark.parametrize("count", [3, 40])
def test_samples_of_remote_files_are_asked_for_alone(
    count: int, tmp_path: Path, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two trainings, of which the first is sampled once, though it is compared twice."""
    for name, seed in (("a", 0), ("b", 100), ("c", 200)):
        made = {f"l{number:02}.weight": draw(seed + number, 200, 200) for number in range(count)}
        save_file(made, tmp_path / f"{name}.safetensors")
        parse(f"{s3}/{name}.safetensors").write_whole((tmp_path / f"{name}.safetensors").read_bytes(), overwrite=False)
    lengths, fetch = list[int](), RangedInput.fetch

    def counted(self: RangedInput, start: int, stop: int, buffers: Buffers | None = None) -> memoryview:
        if self._ahead is not None:
            lengths.append(stop - start)
        return fetch(self, start, stop, buffers)

    monkeypatch.setattr(RangedInput, "fetch", counted)
    monkeypatch.setattr(relatives, "_MOST_BYTES", 5 * 3 * 4 << 15)
    done = sm.merge([f"{s3}/{name}.safetensors" for name in "abc"], tmp_path / "out.safetensors")
    assert len(done.warnings) == 1
    assert "2 inputs" in done.warnings[0]
    assert lengths.count(4 << 15) == 3 * min(count, 16)


@pytest.mark.parametrize("name", ["float64", "float32", "float16", "bfloat16", "float8_e4m3fn"])
def test_cosines_are_those_of_torch(name: str) -> None:
    """Though numpy computes them, since who finishes an output needs no torch for anything else."""
    dtype = getattr(torch, name)
    spec = TensorSpec("w", parse_dtype(name), (40, 50))
    one, two = draw(1, 2000).to(dtype), (2 * draw(1, 2000) + draw(2, 2000)).to(dtype)
    source = Stored(spec, parse("x"), 0)
    found = relatives._cosine(*(relatives._numbers(source, memoryview(octets(each))) for each in (one, two)))
    wanted = torch.nn.functional.cosine_similarity(one.double(), two.double(), dim=0).item()
    assert found == pytest.approx(wanted, abs=1e-12)


def test_numbers_without_a_direction_have_no_cosine() -> None:
    ones, zeros = np.ones(3), np.zeros(3)
    assert relatives._cosine(ones, zeros) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert relatives._cosine(np.array([np.inf, 1.0, 0.0]), zeros + 2) is None
        assert relatives._cosine(np.array([np.nan, 1.0, 0.0]), ones) is None


def test_a_merge_needs_no_numpy(tmp_path: Path) -> None:
    """A broken installation of it is no reason to lose a merge: strangers are told by torch then."""
    for seed in (1, 2):
        save_file({"w": draw(seed, 64, 64)}, tmp_path / f"{seed}.safetensors")
    merge = "sm.merge(['1.safetensors', '2.safetensors'], 'out.safetensors').warnings[0]"
    code = f"import sys; sys.modules['numpy'] = None; import streammerge as sm; print({merge})"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "seems to come from another training" in done.stdout
