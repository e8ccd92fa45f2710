"""NeMo archives, and the folders of NeMo 2 and Megatron."""

from __future__ import annotations

import io
import json
import subprocess
import tarfile
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from conftest import assert_same, load_safetensors, mean, octets

import streammerge as sm
from formats import dcp_maker
from formats.suite import FormatSuite, Tensors

FORMATS: dict[str, Any] = {"pax": tarfile.PAX_FORMAT, "gnu": tarfile.GNU_FORMAT, "ustar": tarfile.USTAR_FORMAT}
Mode = Literal["w", "w:gz"]


def pack(path: Path, folder: Path, form: str = "pax", mode: Mode = "w") -> Path:
    """Packs a folder as NeMo does, with the folder itself as "." in it."""
    with tarfile.open(path, mode, format=FORMATS[form]) as archive:
        archive.add(folder, arcname=".")
    return path


def archive_of(path: Path, tensors: Tensors, form: str = "pax") -> Path:
    folder = path.parent / f"{path.name}-content"
    folder.mkdir(exist_ok=True)
    (folder / "model_config.yaml").write_text("target: nemo\n")
    torch.save(tensors, folder / "model_weights.ckpt")
    return pack(path, folder, form)


class TestNemo(FormatSuite):
    NAME = "in.nemo"

    def write(self, path: Path, tensors: Tensors) -> None:
        archive_of(path, tensors)

    def files(self, path: Path) -> list[Path]:
        return [path]


@pytest.mark.parametrize("form", FORMATS)
def test_every_kind_of_tar(tmp_path: Path, form: str) -> None:
    tensors = {"a.weight": torch.randn(300, 7), "b": torch.randn(5)}
    path = archive_of(tmp_path / "in.nemo", tensors, form)
    sm.convert(path, tmp_path / "out.safetensors")
    assert_same(load_safetensors(tmp_path / "out.safetensors"), tensors)
    index = sm.inspect(path)
    assert index.format == "NeMo archive"
    assert index.container.facts["beside"] == "model_config.yaml"


def content(path: Path) -> dict[str, bytes]:
    """What Python's tarfile finds in an archive, which NeMo reads with it: name -> bytes, in order."""
    with tarfile.open(path) as archive:
        return {m.name: found.read() for m in archive.getmembers() if (found := archive.extractfile(m)) is not None}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("first", ["model_weights.ckpt", "a_tokenizer.model", "z_vocab.txt"])
def test_a_merged_archive_is_one(tmp_path: Path, form: str, first: str) -> None:
    """The weights stand first, in the middle and last in it; everything else is the first input's to the byte."""
    tensors = [{"enc.weight": torch.randn(300, 7), "enc.bias": torch.randn(5)} for _ in range(2)]
    for number, each in enumerate(tensors):
        with tarfile.open(tmp_path / f"{number}.nemo", "w", format=FORMATS[form]) as archive:
            torch.save(each, tmp_path / "model_weights.ckpt")
            for name in ("a_tokenizer.model", "z_vocab.txt"):
                (tmp_path / name).write_bytes(f"{name} {number}".encode() * 99)
            names = ["model_weights.ckpt", "a_tokenizer.model", "z_vocab.txt"]
            for name in names[names.index(first) :] + names[: names.index(first)]:
                archive.add(tmp_path / name, arcname=f"./{name}")
    out = tmp_path / "out.nemo"
    sm.merge([tmp_path / "0.nemo", tmp_path / "1.nemo"], out)
    ours, theirs = content(out), content(tmp_path / "0.nemo")
    weights = torch.load(io.BytesIO(ours.pop("./model_weights.ckpt")), weights_only=True)
    assert theirs.pop("./model_weights.ckpt")
    assert ours == theirs
    assert list(ours) == list(theirs)
    for name in tensors[0]:
        assert torch.equal(weights[name], mean([each[name] for each in tensors], [1, 1]))
    assert sm.verify(out, inputs=tmp_path).recomputed
    data = bytearray(out.read_bytes())
    data[data.index(b"z_vocab.txt 0")] ^= 1  # a byte outside the weights has a checksum too
    out.write_bytes(data)
    with pytest.raises(sm.VerifyError, match="header"):
        sm.verify(out, inputs=tmp_path)


def test_the_rest_of_an_archive_is_told(tmp_path: Path) -> None:
    path = archive_of(tmp_path / "in.nemo", {"a": torch.ones(3)})
    made = sm.convert(path, tmp_path / "out.safetensors")
    assert "left out of the output: model_config.yaml (the output is one file)" in made.notes
    assert "left out" not in "".join(sm.convert(path, tmp_path / "out.nemo").notes)


def test_an_archive_with_much_beside_its_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streammerge.formats.nemo._MOST_BYTES_BESIDE", 1000)
    path = archive_of(tmp_path / "in.nemo", {"a": torch.ones(3)})
    with pytest.raises(sm.RecipeError, match=r"too much to write it again; write a \.ckpt file"):
        sm.convert(path, tmp_path / "out.nemo")


def test_a_gzip_archive(tmp_path: Path) -> None:
    (tmp_path / "content").mkdir()
    torch.save({"a": torch.ones(2)}, tmp_path / "content" / "model_weights.ckpt")
    path = pack(tmp_path / "an in.nemo", tmp_path / "content", mode="w:gz")
    with pytest.raises(sm.FormatError, match="is a gzip file, a packed tar archive, as NeMo writes some") as told:
        sm.inspect(path)
    subprocess.run(str(told.value).split("`")[1], shell=True, check=True)
    assert sm.inspect(tmp_path / "unpacked-an in.nemo").format == "NeMo archive"


def test_parts_of_model_parallel_ranks(tmp_path: Path) -> None:
    for rank in (0, 1):
        (tmp_path / "content" / f"mp_rank_0{rank}").mkdir(parents=True)
        torch.save({"a": torch.ones(2)}, tmp_path / "content" / f"mp_rank_0{rank}" / "model_weights.ckpt")
    with pytest.raises(sm.FormatError, match="in parts of 2 model-parallel ranks"):
        sm.inspect(pack(tmp_path / "in.nemo", tmp_path / "content"))


def member(name: str, data: bytes, size: int | None = None) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = len(data) if size is None else size
    return info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % 512)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (member("./model_weights.ckpt", b"x", 8 << 20), "truncated"),
        (member("./model_weights.ckpt", b"x"), "not in the zip format"),
        (2 * member("./model_config.yaml", b"x"), "twice"),
        (member("./model_config.yaml", b"x"), "a tar archive, not a PyTorch checkpoint"),
        (member("./model_config.yaml", b"x") + b"rubbish" * 100, "damaged at byte 1024"),
    ],
)
def test_damaged_archives(tmp_path: Path, data: bytes, said: str) -> None:
    (tmp_path / "in.nemo").write_bytes(data)
    with pytest.raises(sm.FormatError, match=said):
        sm.inspect(tmp_path / "in.nemo")


# ------------------------------------------------------------------------------------------------ Megatron and NeMo 2


def megatron(folder: Path, seed: int = 1, layers: int = 4, ranks: int = 2) -> tuple[Path, Tensors]:
    """Writes a torch_dist folder: all layers of a kind are one tensor, whose pieces are layers and parts of ranks."""
    make = torch.Generator().manual_seed(seed)
    tensors = {
        "decoder.layers.mlp.linear_fc2.weight": torch.randn(layers, 6, 8, generator=make),
        "decoder.layers.self_attention.linear_qkv.weight": torch.randn(layers, 12, 6, generator=make),
        "decoder.layers.mlp.experts.experts.linear_fc1.weight": torch.randn(layers, 2, 4, 6, generator=make),
        "decoder.final_layernorm.weight": torch.randn(6, generator=make),
    }

    def cut(name: str, tensor: torch.Tensor) -> dcp_maker.Boxes:
        if tensor.dim() < 3:
            return dcp_maker.whole(name, tensor)
        axis = 2 if "fc2" in name else 1
        size = tensor.shape[axis] // ranks
        boxes = []
        for layer in range(layers):
            for rank in range(ranks):
                offsets, sizes = [0] * tensor.dim(), list(tensor.shape)
                offsets[0], sizes[0] = layer, 1
                offsets[axis], sizes[axis] = rank * size, size
                boxes.append((tuple(offsets), tuple(sizes)))
        return boxes

    state = {f"optimizer.state.exp_avg.{name}": tensor for name, tensor in tensors.items()}
    objects = {"decoder.layers.self_attention.core_attention._extra_state/shard_0_4": b"x"}
    dcp_maker.write(folder, tensors | state, cut, objects)
    torch.save({"iteration": 700, "args": {"num_layers": layers}}, folder / "common.pt")
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}))
    return folder, tensors


def test_megatrons_layers_are_one_tensor(tmp_path: Path) -> None:
    folder, tensors = megatron(tmp_path / "run" / "iter_0000700")
    (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text("700\n")
    for place in (folder, tmp_path / "run"):
        sm.convert(place, tmp_path / "out.safetensors", overwrite=True)
        assert_same(load_safetensors(tmp_path / "out.safetensors"), tensors)
    assert sm.inspect(folder).container.facts == {"ranks": "4", "step": "700 (iteration)"}


def test_megatrons_common_state_in_an_entry(tmp_path: Path) -> None:
    """megatron-core 0.19.2 writes no common.pt. It stores the dictionary in a list, as any object of a rank."""
    common = [{"iteration": 101, "args": {"num_layers": 4}, "checkpoint_version": 3.0}]
    objects = {"common_state/shard_0_1": common, "decoder.layers.self_attention.linear_qkv._extra_state/shard_0_4": [None]}
    tensors = {"decoder.layers.self_attention.linear_qkv.weight": torch.ones(4, 6, 2)}
    dcp_maker.write(tmp_path / "run", tensors, objects=objects)
    (tmp_path / "run" / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
    found = sm.inspect(tmp_path / "run")
    assert found.container.facts == {"ranks": "1", "step": "101 (iteration)"}
    assert not found.notes
    dcp_maker.write(tmp_path / "odd", tensors, objects={"common_state/shard_0_1": [{"iteration": "x"}, 5]})
    assert sm.inspect(tmp_path / "odd").container.facts == {"ranks": "1"}


def test_a_folder_of_nemo_2(tmp_path: Path) -> None:
    one, tensors = megatron(tmp_path / "a" / "weights")
    two, others = megatron(tmp_path / "b" / "weights", 2, ranks=1)
    for folder in (one, two):
        (folder.parent / "context").mkdir()
        (folder.parent / "context" / "model.yaml").write_text("x")
    sm.merge([one.parent, two.parent], tmp_path / "out/", max_shard_size="5GB")
    made = load_safetensors(tmp_path / "out" / "model.safetensors")
    assert {n: octets(t) for n, t in made.items()} == {
        n: octets(mean([t, others[n]], [0.5, 0.5])) for n, t in tensors.items()
    }
    written = sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert "context/model.yaml" in written
    assert not any("weights/" in name for name in written)


def test_megatrons_legacy_format(tmp_path: Path) -> None:
    for rank in (0, 1):
        (tmp_path / "run" / "iter_0000007" / f"mp_rank_0{rank}").mkdir(parents=True)
        state = {"model": {"language_model": {"w": torch.ones(3)}}, "checkpoint_version": 3.0, "iteration": 7}
        torch.save(state, tmp_path / "run" / "iter_0000007" / f"mp_rank_0{rank}" / "model_optim_rng.pt")
    (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text("7")
    for place in (tmp_path / "run", tmp_path / "run" / "iter_0000007"):
        with pytest.raises(sm.FormatError, match=r"legacy format, in parts of 2 ranks .*tools/checkpoint/convert\.py"):
            sm.inspect(place)
    (tmp_path / "run" / "iter_0000007" / "mp_rank_01" / "model_optim_rng.pt").unlink()
    assert list(sm.inspect(tmp_path / "run")) == ["w"]


def test_megatrons_zarr_format(tmp_path: Path) -> None:
    (tmp_path / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    with pytest.raises(sm.FormatError, match="zarr format, which is not read"):
        sm.inspect(tmp_path)


def test_a_pax_size_beyond_the_header(tmp_path: Path) -> None:
    """Python tells sizes of 8 GiB or more in an extended header only."""
    tensors = {"a": torch.randn(7)}
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    data = buffer.getvalue()
    record = f" size={len(data)}\n"
    record = f"{len(record) + len(str(len(record) + 2))}{record}"
    info = tarfile.TarInfo("x")
    info.type, info.size = b"x", len(record)
    header = info.tobuf(tarfile.USTAR_FORMAT) + record.encode() + bytes(-len(record) % 512)
    (tmp_path / "in.nemo").write_bytes(header + member("./model_weights.ckpt", data, 0) + bytes(1024))
    sm.convert(tmp_path / "in.nemo", tmp_path / "out.safetensors")
    assert_same(load_safetensors(tmp_path / "out.safetensors"), tensors)
