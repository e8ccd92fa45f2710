"""Conversion keeps every bit, both ways."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import assert_same, load_safetensors, trained
from safetensors.torch import save_file

import streammerge as sm


def all_dtypes() -> dict[str, torch.Tensor]:
    octets = torch.arange(256, dtype=torch.uint8)
    names = "float64 float32 float16 bfloat16 int8 int16 int32 int64 uint8 uint16 uint32 uint64 complex64"
    names += " float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz float8_e8m0fnu"
    made = {name: octets.clone().view(getattr(torch, name)) for name in names.split()}
    return made | {"bool": octets[:7] > 3}


def same_bits(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert_same({k: v.view(torch.uint8) for k, v in actual.items()}, {k: v.view(torch.uint8) for k, v in expected.items()})
    assert {k: v.dtype for k, v in actual.items()} == {k: v.dtype for k, v in expected.items()}


def test_every_dtype_there_and_back(tmp_path: Path) -> None:
    torch.save(all_dtypes(), tmp_path / "in.pth")
    sm.convert(tmp_path / "in.pth", tmp_path / "out.safetensors")
    same_bits(load_safetensors(tmp_path / "out.safetensors"), all_dtypes())
    sm.convert(tmp_path / "out.safetensors", tmp_path / "back.pth")
    same_bits(torch.load(tmp_path / "back.pth", weights_only=True), all_dtypes())


def test_what_safetensors_cannot_hold_is_named(tmp_path: Path) -> None:
    content = {"w": torch.ones(2), "wide": torch.ones(2, dtype=torch.complex128)}
    torch.save(content, tmp_path / "in.pth")
    with pytest.raises(sm.MismatchError, match=r"wide \(complex128\).*`drop`"):
        sm.convert(tmp_path / "in.pth", tmp_path / "out.safetensors")
    sm.convert(tmp_path / "in.pth", tmp_path / "out.safetensors", drop=["wide"])
    sm.convert(tmp_path / "in.pth", tmp_path / "out.pth")
    assert_same(torch.load(tmp_path / "out.pth"), content)


def test_dtype_keep_drop_and_prefix(tmp_path: Path) -> None:
    content = {f"module.{name}": value for name, value in trained(1).items()}
    torch.save({"model": content, "step": 3}, tmp_path / "in.pth")
    options: dict[str, Any] = {
        "dtype": "float16",
        "keep": ["module.layer.*", "*scale"],
        "drop": ["*.bias"],
        "strip_prefix": "module.",
    }
    expected = {"layer.weight": trained(1)["layer.weight"].half(), "scale": trained(1)["scale"].half()}
    sm.convert(tmp_path / "in.pth", tmp_path / "out.safetensors", **options)
    assert_same(load_safetensors(tmp_path / "out.safetensors"), expected)
    sm.convert(tmp_path / "in.pth", tmp_path / "out.pth", **options)
    made = torch.load(tmp_path / "out.pth")
    assert_same(made["model"], expected)
    assert made["step"] == 3


def test_recasting_that_overflows_stops(tmp_path: Path) -> None:
    torch.save({"w": torch.tensor([1e30])}, tmp_path / "in.pth")
    with pytest.raises(sm.VerifyError, match=r"w: 1 in the result \(overflow\)"):
        sm.convert(tmp_path / "in.pth", tmp_path / "out.safetensors", dtype="float16")
    assert not (tmp_path / "out.safetensors").exists()


def test_extras_are_kept_readable(tmp_path: Path, voices: tuple[Path, Path]) -> None:
    result = sm.convert(voices[0], tmp_path / "out.safetensors", extras=tmp_path / "extras.json")
    extras = json.loads((tmp_path / "extras.json").read_text())
    assert extras["data"]["config"] == {"model": "xtts", "languages": ["en"], "audio": {"sample_rate": 22050}}
    assert extras["data"]["step"] == 10
    assert any("left out of the output: config" in note for note in result.notes)


def test_extras_of_a_model_in_the_cache_of_the_hub(
    tmp_path: Path, voices: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    revision = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--org--name"
    (repository / "snapshots" / revision).mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    (repository / "snapshots" / revision / "model.pth").symlink_to(voices[0])
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    sm.convert("org/name", "out.safetensors", extras="extras.json")
    assert json.loads((tmp_path / "extras.json").read_text())["data"]["step"] == 10


@pytest.mark.parametrize("extras", ["in.pth", "out.safetensors", "there.json"])
def test_extras_replace_nothing(tmp_path: Path, extras: str) -> None:
    torch.save(trained(1), tmp_path / "in.pth")
    (tmp_path / "there.json").write_text("mine")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(sm.RecipeError):
        sm.convert(tmp_path / "in.pth", tmp_path / "out.safetensors", extras=tmp_path / extras)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    if extras == "in.pth":
        with pytest.raises(sm.RecipeError, match="an input or the output"):
            sm.convert(tmp_path / "in.pth", tmp_path / "out.safetensors", extras=tmp_path / extras, overwrite=True)


def test_patterns_that_meet_nothing_are_said(tmp_path: Path) -> None:
    torch.save(trained(1), tmp_path / "in.pth")
    result = sm.convert(tmp_path / "in.pth", tmp_path / "out.safetensors", drop=["nothing*"], strip_prefix="nope.")
    assert any("the rule for nothing* took no tensor" in warning for warning in result.warnings)
    assert any("`strip_prefix` nope." in warning for warning in result.warnings)


def test_a_pth_keeps_ema_and_drops_the_optimizer(tmp_path: Path) -> None:
    torch.save(
        {"model": trained(1), "ema": trained(2), "optimizer": {"state": {}, "param_groups": []}}, tmp_path / "in.pth"
    )
    sm.convert(tmp_path / "in.pth", tmp_path / "out.pth")
    made = torch.load(tmp_path / "out.pth")
    assert list(made) == ["model", "ema"]
    assert_same(made["ema"], trained(2))


def test_metadata_says_pt_and_the_mode_follows_the_umask(tmp_path: Path) -> None:
    torch.save(trained(1), tmp_path / "in.pth")
    sm.convert(tmp_path / "in.pth", tmp_path / "out.safetensors")
    from safetensors import safe_open

    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"
    (tmp_path / "touched").touch()
    assert (tmp_path / "out.safetensors").stat().st_mode == (tmp_path / "touched").stat().st_mode


@pytest.mark.parametrize("container", ["safetensors", "pth", "bin"])
def test_what_only_moves_bytes_does_without_torch(tmp_path: Path, container: str) -> None:
    """inspect, plan, convert, and verify of what was converted, where torch cannot be imported."""
    (tmp_path / "absent" / "torch").mkdir(parents=True)
    (tmp_path / "absent" / "torch" / "__init__.py").write_text("raise ImportError('torch is not here')\n")
    values = {n: t for n, t in trained(1).items() if t.dim()}
    if container == "safetensors":
        save_file(values, tmp_path / "in.safetensors")
    else:
        torch.save(
            {"model": values, "step": 7}, tmp_path / f"in.{container}", _use_new_zipfile_serialization=container == "pth"
        )
    code = f"""
import streammerge as sm
try:
    import torch
except ImportError as error:
    assert str(error) == "torch is not here"
path = "in.{container}"
assert len(sm.inspect(path).entries) == {len(values)}
for method in ("linear", "karcher"):
    assert len(sm.plan([path, path], method=method).tasks) == {len(values)}
assert "linear" in str(sm.plan([path, path]))
for out in ("out.safetensors", "out.pth", "out"):
    sm.convert(path, out, drop=["one"])
    assert sm.verify(out, sample="100%").recomputed
"""
    search = os.pathsep.join([str(tmp_path / "absent"), str(Path(sm.__file__).parent.parent)])
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": search}, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    expected = {name: value for name, value in values.items() if name != "one"}
    assert_same(load_safetensors(tmp_path / "out.safetensors"), expected)
    made = torch.load(tmp_path / "out.pth")
    assert_same(made if container == "safetensors" else made["model"], expected)
