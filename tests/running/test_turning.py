"""Tensors that are made with their first axis last, in a temporary file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import load_safetensors
from safetensors.torch import save_file

import streammerge as sm
from methods.test_spectral import METHODS, ORACLES
from streammerge.events import Spooled, TaskDone


@pytest.mark.parametrize("method", METHODS)
def test_wide_tensors_in_files(method: str, tmp_path: Path) -> None:
    """A wide matrix and a convolution are made by columns in a temporary file, which goes, and can be verified."""
    shapes, paths = {"wide": (40, 900), "conv": (8, 6, 3, 3), "tall": (900, 40), "bias": (40,)}, []
    for number in range(4):
        make = torch.Generator().manual_seed(number)
        paths.append(tmp_path / f"{number}.safetensors")
        save_file({name: torch.randn(shape, generator=make) for name, shape in shapes.items()}, paths[-1])
    out = tmp_path / "out" / "merged.safetensors"
    out.parent.mkdir()
    done = sm.merge(paths[:3], out, method=method, base=paths[3])
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    assert done.plan.disk_bytes >= done.plan.write_bytes + 4 * 40 * 900
    assert done.read_bytes == done.plan.read_bytes
    *models, base = map(load_safetensors, paths)
    for name, tensor in load_safetensors(out).items():
        wide = [model[name].double() for model in models]
        wanted = ORACLES[method](wide, base[name].double(), None)
        torch.testing.assert_close(tensor.double(), wanted, rtol=1e-6, atol=1e-6)
    assert sm.verify(out, sample=1.0, inputs=tmp_path).sampled_tensors == len(shapes)


def test_nan_in_a_wide_tensor_is_refused_and_named(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.safetensors" for number in range(3)]
    for number, path in enumerate(paths):
        values = torch.randn(5, 40, generator=torch.Generator().manual_seed(number))
        values[2, 3] = float("nan") if number == 1 else 0
        save_file({"w": values}, path)
    with pytest.raises(sm.VerifyError, match=r"w: .*1\.safetensors"):
        sm.merge(paths[:2], tmp_path / "out.safetensors", method="iso_c", base=paths[2])


@pytest.mark.parametrize("executor", ["threads", "processes"])
def test_the_same_bytes_on_every_executor(executor: str, tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.safetensors" for number in range(3)]
    for number, path in enumerate(paths):
        make = torch.Generator().manual_seed(number)
        save_file({"a": torch.randn(90, 700, generator=make), "b": torch.randn(700, 90, generator=make)}, path)
    made = []
    for name, how in (("one", {"workers": 1}), ("two", {"workers": 2, "executor": executor, "io": "pread"})):
        out = tmp_path / f"{name}.safetensors"
        sm.merge(paths[:2], out, method="tsv", base=paths[2], **how)
        made.append(load_safetensors(out))
    for name in "ab":
        assert torch.equal(made[0][name], made[1][name])


def test_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.safetensors" for number in range(3)]
    for number, path in enumerate(paths):
        make = torch.Generator().manual_seed(number)
        save_file({"a": torch.randn(90, 700, generator=make), "b": torch.randn(90, 700, generator=make)}, path)
    options = {"method": "iso_c", "base": paths[2]}
    for stop_at in (Spooled, TaskDone):
        whole, out = tmp_path / f"whole {stop_at.__name__}.safetensors", tmp_path / f"{stop_at.__name__}.safetensors"
        sm.merge(paths[:2], whole, **options)

        def listen(event: object, stop_at: type = stop_at) -> None:
            if isinstance(event, stop_at):
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            sm.merge(paths[:2], out, listener=listen, **options)
        sm.merge(paths[:2], out, **options)
        made, wanted = load_safetensors(out), load_safetensors(whole)
        assert all(torch.equal(made[name], wanted[name]) for name in "ab")
        assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
