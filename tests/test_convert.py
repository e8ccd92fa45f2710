"""Conversion keeps every bit, from every form of file, both ways."""

from __future__ import annotations

import json
import struct
import tarfile
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Cli, assert_same, load_safetensors, trained

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


def test_packed_fp4_doubles_its_last_dimension(tmp_path: Path) -> None:
    value = torch.arange(12, dtype=torch.uint8).view(3, 4).view(torch.float4_e2m1fn_x2)
    torch.save({"w": value}, tmp_path / "in.pth")
    sm.convert(tmp_path / "in.pth", tmp_path / "out.safetensors")
    header = (tmp_path / "out.safetensors").read_bytes()[8:]
    assert b'"dtype":"F4","shape":[3,8]' in header
    sm.convert(tmp_path / "out.safetensors", tmp_path / "back.pth")
    back = torch.load(tmp_path / "back.pth", weights_only=True)["w"]
    assert back.shape == (3, 4)
    assert back.view(torch.uint8).tolist() == value.view(torch.uint8).tolist()


def test_what_safetensors_cannot_hold_is_named(tmp_path: Path) -> None:
    content = {"w": torch.ones(2), "wide": torch.ones(2, dtype=torch.complex128)}
    torch.save(content, tmp_path / "in.pth")
    with pytest.raises(sm.MismatchError, match=r"wide \(complex128\).*--drop"):
        sm.convert(tmp_path / "in.pth", tmp_path / "out.safetensors")
    sm.convert(tmp_path / "in.pth", tmp_path / "out.safetensors", drop=["wide"])
    sm.convert(tmp_path / "in.pth", tmp_path / "out.pth")
    assert_same(torch.load(tmp_path / "out.pth"), content)


def strided() -> dict[str, torch.Tensor]:
    base = torch.arange(7 * 11 * 13, dtype=torch.float32)
    return {
        "transposed": base.view(7, 143).t(),
        "permuted": base.view(7, 11, 13).permute(2, 0, 1),
        "every_other": base[::2],
        "expanded": torch.tensor([1.0, 2.0]).unsqueeze(1).expand(2, 5),
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "view": base[5:9],
        "conjugate": torch.randn(3, dtype=torch.complex64).conj(),
        "negative": torch.randn(3, dtype=torch.complex64).conj().imag,
        "large": torch.randn(1500, 1301).t(),
    }


@pytest.mark.parametrize("out", ["out.safetensors", "out.pth"])
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_strided_tensors_come_out_contiguous(tmp_path: Path, legacy: bool, out: str) -> None:
    content = strided()
    torch.save(content, tmp_path / "in.pth", _use_new_zipfile_serialization=not legacy)
    sm.convert(tmp_path / "in.pth", tmp_path / out)
    made = load_safetensors(tmp_path / out) if out.endswith("s") else torch.load(tmp_path / out)
    assert_same(made, content)
    assert all(tensor.is_contiguous() for tensor in made.values())


def test_compressed_archives_are_unpacked(tmp_path: Path) -> None:
    content = {"model": trained(3), "tied": None}
    content["model"]["again"] = content["model"]["embed.weight"]
    torch.save(content, tmp_path / "plain.pth")
    with (
        zipfile.ZipFile(tmp_path / "plain.pth") as source,
        zipfile.ZipFile(tmp_path / "in.pth", "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for name in source.namelist():
            target.writestr(name, source.read(name))
    sm.convert(tmp_path / "in.pth", tmp_path / "out.safetensors")
    assert_same(load_safetensors(tmp_path / "out.safetensors"), dict(content["model"]))
    assert any("compressed" in note for note in sm.inspect(tmp_path / "in.pth").notes)


def test_repacked_archives_are_read_where_the_bytes_are(tmp_path: Path) -> None:
    """Stored again by another tool, without torch's padding: predicted offsets would be wrong."""
    torch.save(trained(3), tmp_path / "plain.pth")
    with zipfile.ZipFile(tmp_path / "plain.pth") as source, zipfile.ZipFile(tmp_path / "renamed.bin", "w") as target:
        for name in reversed(source.namelist()):
            target.writestr(name, source.read(name))
    sm.convert(tmp_path / "renamed.bin", tmp_path / "out.safetensors")
    assert_same(load_safetensors(tmp_path / "out.safetensors"), trained(3))


def test_legacy_storage_views(tmp_path: Path) -> None:
    base = torch.randn(40)
    content = {"a": base[:10].view(2, 5), "b": base[10:], "whole": base}
    torch.save(content, tmp_path / "in.pth", _use_new_zipfile_serialization=False)
    sm.convert(tmp_path / "in.pth", tmp_path / "out.safetensors")
    assert_same(load_safetensors(tmp_path / "out.safetensors"), content)


def old_tar(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """The tar layout of torch 0.1, written by hand after its reader."""
    import pickle

    class Pickler(pickle._Pickler):
        def persistent_id(self, obj: Any) -> Any:
            return str(obj.key) if isinstance(obj, Key) else None

    class Key:
        def __init__(self, key: int) -> None:
            self.key = key

    def dumped(*values: Any) -> bytes:
        return b"".join(pickle.dumps(value, 2) for value in values)

    storages, table = dumped(len(tensors)), dumped(len(tensors))  # torch pickles keys as text, and numbers them here
    for number, tensor in enumerate(tensors.values()):
        storages += (
            dumped((100 + number, "cpu", torch.FloatStorage)) + struct.pack("<q", tensor.numel()) + tensor.numpy().tobytes()
        )
        sizes = [*tensor.shape, *tensor.stride(), 0]
        table += dumped((200 + number, 100 + number, torch.FloatTensor)) + struct.pack(
            f"<i4x{len(sizes)}q", tensor.dim(), *sizes
        )
    stream = BytesIO()
    Pickler(stream, 2).dump({name: Key(200 + number) for number, name in enumerate(tensors)})
    members = {"sys_info": dumped({"little_endian": True}), "pickle": stream.getvalue(), "tensors": table}
    with tarfile.open(path, "w") as archive:
        for name, data in {**members, "storages": storages + dumped([])}.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, BytesIO(data))


def test_the_old_tar_layout(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 5), "b": torch.randn(7)}
    old_tar(tmp_path / "in.pth", tensors)
    assert_same(torch.load(tmp_path / "in.pth", weights_only=False), tensors)
    sm.convert(tmp_path / "in.pth", tmp_path / "out.safetensors")
    assert_same(load_safetensors(tmp_path / "out.safetensors"), tensors)


def test_torchscript_is_read_and_not_written(tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)).eval()
    torch.jit.trace(module, torch.ones(2, 3)).save(tmp_path / "in.pt")
    assert sm.inspect(tmp_path / "in.pt").format == "TorchScript archive"
    sm.convert(tmp_path / "in.pt", tmp_path / "out.safetensors")
    expected = dict(module.state_dict())
    made = load_safetensors(tmp_path / "out.safetensors")
    assert_same({k: made[k] for k in expected}, expected)
    with pytest.raises(sm.RecipeError, match="TorchScript"):
        sm.convert(tmp_path / "in.pt", tmp_path / "out.pt")


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
    assert any("left out: config" in note for note in result.notes)


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


def test_empty_lazy_tensors(tmp_path: Path) -> None:
    torch.save(
        {"z": torch.empty(0, 3, dtype=torch.complex64).conj(), "t": torch.empty(3, 0).t(), "w": torch.ones(2)},
        tmp_path / "in.pth",
    )
    sm.convert(tmp_path / "in.pth", tmp_path / "out.safetensors")
    assert load_safetensors(tmp_path / "out.safetensors")["z"].shape == (0, 3)


def test_patterns_that_meet_nothing_are_said(tmp_path: Path) -> None:
    torch.save(trained(1), tmp_path / "in.pth")
    result = sm.convert(tmp_path / "in.pth", tmp_path / "out.safetensors", drop=["nothing*"], strip_prefix="nope.")
    assert any("the rule for nothing* took no tensor" in warning for warning in result.warnings)
    assert any("--strip-prefix nope." in warning for warning in result.warnings)


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


@pytest.mark.parametrize("name", ["missing", "size", "expanded", "negative"])
def test_tensors_that_do_not_fit_their_storage(tmp_path: Path, name: str, edit_pickle: Callable[..., Path]) -> None:
    change = {
        "missing": (b"X\x01\x00\x00\x000", b"X\x01\x00\x00\x007"),
        "size": (b"K\x04K\x05\x86", b"K\x04K\xff\x86"),
        "expanded": (b"K\x04K\x05\x86", b"J\xff\xff\xff\x7fJ\xff\xff\xff\x7f\x86"),
        "negative": (b"K\x04K\x05\x86", b"K\x04J\xff\xff\xff\xff\x86"),
    }[name]
    torch.save({"w": torch.ones(4, 5)}, tmp_path / "in.pth")
    with pytest.raises(sm.FormatError, match=r"edited\.pth"):
        sm.inspect(edit_pickle(tmp_path / "in.pth", *change))


@pytest.fixture
def edit_pickle(tmp_path: Path) -> Callable[..., Path]:
    def edit(path: Path, old: bytes, new: bytes) -> Path:
        with zipfile.ZipFile(path) as source, zipfile.ZipFile(tmp_path / "edited.pth", "w") as target:
            for name in source.namelist():
                data = source.read(name)
                if name.endswith("data.pkl"):
                    assert old in data
                    data = data.replace(old, new)
                target.writestr(name, data)
        return tmp_path / "edited.pth"

    return edit


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 1863\n", "Git LFS pointer.*1863.*git lfs pull"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "HTML"),
        (b"\0" * 100, "zero bytes"),
        (b"GGUF\3\0\0\0", "GGUF"),
        (b'{"weight_map": {}}', "JSON"),
        (b"merge_method: linear\nmodels: []\n", "text file"),
        (b"\x80\x04\x95\x0b\0\0\0", "plain pickle"),
        (b"PK\3\4 and nothing else", "truncated or damaged"),
        (b"\xff\xfe\x00\x01\x02\x03\x04\x05\x06\x07", "not a checkpoint of a known format"),
    ],
)
def test_what_a_file_is_is_decided_by_content(tmp_path: Path, cli: Cli, content: bytes, said: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(sm.FormatError, match=said):
        sm.inspect(tmp_path / "model.safetensors")


def test_truncated_files_are_named(tmp_path: Path) -> None:
    torch.save(trained(1), tmp_path / "zip.pth")
    torch.save(trained(1), tmp_path / "legacy.pth", _use_new_zipfile_serialization=False)
    sm.convert(tmp_path / "zip.pth", tmp_path / "st.safetensors")
    for path in list(tmp_path.iterdir()):
        for size in (path.stat().st_size - 1, path.stat().st_size // 2, 40):
            cut = tmp_path / "cut"
            cut.write_bytes(path.read_bytes()[:size])
            with pytest.raises(sm.FormatError, match="cut"):
                sm.inspect(cut)
