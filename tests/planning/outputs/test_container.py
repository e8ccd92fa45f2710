"""The output before it exists: its container, its shards, its metadata. The oracles are json and safetensors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import load_safetensors
from safetensors import safe_open
from safetensors.torch import save_file

import streammerge as sm
from streammerge.planning.outputs.container import container_of
from streammerge.stores.locations import parse

TENSORS = {f"layers.{n}.w": torch.full((25,), float(n)) for n in range(5)} | {"e": torch.empty(0), "s": torch.tensor(1.0)}


@pytest.fixture
def single(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "in.safetensors", {"mine": "kept", "sshs_model_hash": "old", "format": "tf"})
    return tmp_path / "in.safetensors"


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("x.safetensors", "safetensors"),
        *((f"x{end}", "pickle") for end in (".pth", ".pt", ".ckpt", ".bin", ".th", ".tar")),
        ("X.SAFETENSORS", "safetensors"), ("x.Pth", "pickle"), ("X.CKPT", "pickle"),
        ("x", "folder"), ("x/", "folder"), ("x.pth/", "folder"), ("there.pth", "folder"),
        ("Llama-3.1-8B-mean", "folder"), ("mean-v0.2", "folder"),
    ],
)  # fmt: skip
def test_the_name_decides_the_container(name: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.pth").mkdir()
    assert container_of(parse(name)) == kind


def test_a_name_that_says_neither_is_refused() -> None:
    with pytest.raises(sm.RecipeError, match=r"x\.txt does not say what to write"):
        container_of(parse("x.txt"))


@pytest.mark.parametrize(
    ("first", "wanted"),
    [
        ("a.safetensors", ("merged.safetensors",)),
        ("a.pth", ("merged.pth",)),
        ("g_05000000", ("merged",)),
        ("folder", ("model.safetensors", "config.json")),
        ("pickled", ("pytorch_model.bin", "config.json")),
        ("stated", ("merged.safetensors",)),
    ],
)
def test_without_a_name_the_output_is_planned_like_the_first_input(
    first: str, wanted: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a merge makes it under a name without an ending."""
    monkeypatch.chdir(tmp_path)
    tensors = {"w": torch.ones(3)}
    for folder in ("folder", "pickled"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text("{}")
    save_file(tensors, "a.safetensors")
    save_file(tensors, "folder/model.safetensors")
    for name in ("a.pth", "g_05000000", "pickled/pytorch_model.bin"):
        torch.save(tensors, name)
    given = tensors if first == "stated" else first
    made = sm.plan([given, "a.safetensors"])  # type: ignore[list-item]
    assert made.out is None
    assert made.layout.as_folder == (len(wanted) == 2)
    assert {*wanted} <= {file.name for file in made.layout.files} | {name for _, name in made.layout.side_files}
    if first != "stated":
        sm.merge([first, "a.safetensors"], f"out{Path(wanted[0]).suffix}" if len(wanted) == 1 else "out")
        if made.layout.as_folder:
            assert {*wanted} <= {path.name for path in (tmp_path / "out").iterdir()}


def test_metadata_is_the_first_inputs_without_hashes(single: Path) -> None:
    out = single.parent / "out.safetensors"
    for merged in (False, True):
        sm.merge([single, single], out, overwrite=True) if merged else sm.convert(single, out)
        with safe_open(out, "pt") as file:
            metadata = file.metadata()
        assert (metadata["mine"], metadata["format"], "sshs_model_hash" in metadata) == ("kept", "pt", False)
        assert ("streammerge" in metadata) == merged


def test_a_hash_that_is_left_out_is_told(single: Path, tmp_path: Path) -> None:
    result = sm.merge([single, single], tmp_path / "told.safetensors")
    assert "left out of the output: sshs_model_hash (true of the first input only)" in result.notes


@pytest.mark.parametrize("ending", ["", ".mdl", "-1.5"])
@pytest.mark.parametrize("form", ["pickle", "safetensors"])
def test_an_output_may_be_called_as_the_inputs_are(
    ending: str, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """HiFi-GAN's loader opens ``g_05000000``."""
    monkeypatch.chdir(tmp_path)
    tensors = [{"conv.weight": torch.full((3, 2), float(n))} for n in (1, 2)]
    for number, each in enumerate(tensors):
        if form == "pickle":
            torch.save({"generator": each}, f"g_{number:04}{ending}")
        else:
            save_file(each, f"g_{number:04}{ending}")
    sm.merge([f"g_0000{ending}", f"g_0001{ending}"], f"g_mix{ending}")
    out = Path(f"g_mix{ending}")
    assert out.is_file()
    made = torch.load(out, weights_only=True)["generator"] if form == "pickle" else load_safetensors(out)
    assert torch.equal(made["conv.weight"], torch.full((3, 2), 1.5))
    sm.merge([f"g_0000{ending}", f"g_0001{ending}"], "folder/")
    assert Path("folder/model.safetensors").is_file()


def test_a_folder_without_an_ending_gives_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("one", "two"):
        Path(name).mkdir()
        save_file({"w": torch.ones(2)}, f"{name}/model.safetensors")
    sm.merge(["one", "two"], "out")
    assert Path("out/model.safetensors").is_file()
