"""Folders of torch.distributed.checkpoint: written by torch's own writer, compared with torch's own converter."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import assert_same, load_safetensors, mean, octets
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import streammerge as sm
from formats import dcp_maker
from formats.dcp_maker import grid, sharded, whole
from formats.suite import FormatSuite, Tensors


class TestWhole(FormatSuite):
    NAME = "in"

    def write(self, path: Path, tensors: Tensors) -> None:
        dcp_maker.write(path, tensors)


class TestGrid(FormatSuite):
    NAME = "in"

    def write(self, path: Path, tensors: Tensors) -> None:
        dcp_maker.write(path, tensors, grid(2, 3))


def made_of(seed: int) -> Tensors:
    make = torch.Generator().manual_seed(seed)
    shapes = {"rows": (10, 6), "cols": (6, 70), "long": (33_001, 5), "cube": (4, 5, 6), "one": (1,), "tiny": (2, 3)}
    found = {name: torch.randn(shape, generator=make) for name, shape in shapes.items()}
    return found | {"half": torch.randn(9, 300, generator=make).bfloat16(), "scalar": torch.tensor(float(seed))}


def entries_of(path: Path, **asked: Any) -> dict[str, Any]:
    return {name: entry.spec.shape for name, entry in sm.inspect(path, **asked).entries.items()}


@pytest.mark.parametrize("cut", [whole, sharded(0, 4), sharded(1, 4), sharded(2, 3), grid(2, 2), grid(3, 4)])
@pytest.mark.parametrize("one_file", [True, False])
def test_what_torchs_converter_makes(tmp_path: Path, cut: dcp_maker.Cut, one_file: bool) -> None:
    tensors = made_of(1)
    folder = dcp_maker.write(tmp_path / "in", tensors, cut, single_file_per_rank=one_file)
    dcp_to_torch_save(folder, tmp_path / "torch.pth")
    sm.convert(folder, tmp_path / "out.safetensors")
    made = load_safetensors(tmp_path / "out.safetensors")
    assert_same(made, torch.load(tmp_path / "torch.pth"))
    assert_same(made, tensors)


@pytest.mark.parametrize("io", ["mmap", "pread"])
@pytest.mark.parametrize("workers", [1, 2])
def test_the_mean_of_two_that_were_cut_otherwise(tmp_path: Path, io: str, workers: int) -> None:
    one, two = made_of(1), made_of(2)
    paths = [
        dcp_maker.write(tmp_path / "a", one, sharded(1, 4)),
        dcp_maker.write(tmp_path / "b", two, sharded(0, 3), ranks=3),
    ]
    sm.merge(paths, tmp_path / "out.safetensors", weights=[0.6, 0.4], io=io, workers=workers, memory="64MiB")
    made = load_safetensors(tmp_path / "out.safetensors")
    assert {n: octets(t) for n, t in made.items()} == {n: octets(mean([one[n], two[n]], [0.6, 0.4])) for n in one}
    sm.verify(tmp_path / "out.safetensors")


def test_pieces_in_another_order_in_memory(tmp_path: Path) -> None:
    tensors = {"w": torch.randn(40, 30), "v": torch.randn(8, 9, 7)}
    folder = dcp_maker.write(
        tmp_path / "in", tensors, sharded(0, 3), local=lambda piece: piece.transpose(0, 1).contiguous().transpose(0, 1)
    )
    sm.convert(folder, tmp_path / "out.safetensors")
    assert_same(load_safetensors(tmp_path / "out.safetensors"), tensors)


def trained(folder: Path, seed: int = 1, **writing: Any) -> tuple[Path, Tensors]:
    """Writes a model with its optimizer, as FSDP2 does."""
    weights = {
        f"layers.{n}.weight": torch.randn(10, 6, generator=torch.Generator().manual_seed(seed + n)) for n in range(3)
    }
    tensors = {f"model.{name}": weight for name, weight in weights.items()}
    paths = {f"model.{name}": ("model", name) for name in weights}
    for name in weights:
        for part in ("exp_avg", "exp_avg_sq", "step"):
            key = f"optimizer.state.{name}.{part}"
            tensors[key] = torch.zeros(10, 6) if part != "step" else torch.tensor(9.0)
            paths[key] = ("optimizer", "state", name, part)
    objects = {"step": 70, "optimizer.param_groups.0.lr": 0.1}
    paths |= {"step": ("step",), "optimizer.param_groups.0.lr": ("optimizer", "param_groups", 0, "lr")}
    return dcp_maker.write(folder, tensors, sharded(0, 4), objects, paths, **writing), weights


def test_the_model_is_found_and_the_optimizer_left_out(tmp_path: Path) -> None:
    folder, weights = trained(tmp_path / "in")
    index = sm.inspect(folder)
    assert list(index) == list(weights)
    assert index.container.facts == {"ranks": "4", "step": "70 (step)"}
    assert any("not merged: the state of the optimizer" in note and "(9 tensors, 1.5 kB)" in note for note in index.notes)
    sm.convert(folder, tmp_path / "out.pth")
    assert_same(torch.load(tmp_path / "out.pth"), weights)


def test_an_optimizer_is_left_out_without_paths(tmp_path: Path) -> None:
    """torchtitan has no prefix of the model, Megatron no paths."""
    weight = torch.randn(3, 2)
    state = {
        "state.layers.0.w.exp_avg": weight,
        "state.layers.0.w.step": torch.ones(()),
        "param_groups.layers.0.w.lr": weight,
    }
    titan = dcp_maker.write(tmp_path / "titan", {"layers.0.w": weight} | state)
    assert list(sm.inspect(titan)) == ["layers.0.w"]
    megatron = {"decoder.layers.mlp.w": weight, "optimizer.state.exp_avg.decoder.layers.mlp.w": weight}
    assert list(sm.inspect(dcp_maker.write(tmp_path / "megatron", megatron))) == ["decoder.layers.mlp.w"]
    accelerate = dcp_maker.write(tmp_path / "accelerate", {"model.a.w": weight, "model.b": weight})
    assert list(sm.inspect(accelerate)) == ["a.w", "b"]


def test_counters_of_a_training_are_no_weights(tmp_path: Path) -> None:
    """Older versions of torchtitan save them as tensors, and the last step, which is the model only, has none."""
    paths = {"w": ("w",), "train_state.step": ("train_state", "step")}
    for step in (100, 200):
        counters = {"train_state.step": torch.tensor(step, dtype=torch.int32), "dataloader": torch.tensor(step)}
        dcp_maker.write(tmp_path / f"step-{step}", {"w": torch.full((3, 2), float(step))} | counters, whole, {}, paths)
        assert sm.inspect(tmp_path / f"step-{step}").container.facts["step"] == f"{step} (train_state.step)"
    dcp_maker.write(tmp_path / "step-300", {"w": torch.full((3, 2), 300.0)})
    result = sm.merge(tmp_path / "step-*", tmp_path / "out.safetensors", last=3)
    assert load_safetensors(tmp_path / "out.safetensors")["w"].unique().tolist() == [200]
    assert any("not merged: the state of the training (2 tensors, 12 bytes)" in note for note in result.notes)
    sm.merge([tmp_path / "step-100", tmp_path / "step-200"], tmp_path / "out/")
    loaded = {"train_state.step": torch.zeros((), dtype=torch.int32)}
    torch.distributed.checkpoint.load(loaded, checkpoint_id=tmp_path / "out", no_dist=True)
    assert loaded["train_state.step"] == 100, "the first's stays, as all that stands beside the weights"


def test_only_the_state_of_an_optimizer(tmp_path: Path) -> None:
    folder = dcp_maker.write(tmp_path / "in", {"optimizer.state.w.exp_avg": torch.ones(3)})
    with pytest.raises(sm.FormatError, match="the state of an optimizer only; give the folder of the weights"):
        sm.inspect(folder)


def test_a_missing_rank_is_named(tmp_path: Path) -> None:
    folder, _ = trained(tmp_path / "in")
    (folder / "__2_0.distcp").unlink()
    with pytest.raises(sm.FormatError, match=r"__2_0\.distcp is absent, which holds parts of model\.layers\.0\.weight"):
        sm.convert(folder, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_a_truncated_file(tmp_path: Path) -> None:
    folder, _ = trained(tmp_path / "in")
    data = (folder / "__2_0.distcp").read_bytes()
    (folder / "__2_0.distcp").write_bytes(data[: len(data) // 4])
    with pytest.raises(sm.FormatError, match=r"truncated, so copy it again"):
        sm.inspect(folder)


def test_files_without_their_metadata(tmp_path: Path) -> None:
    folder, _ = trained(tmp_path / "in")
    (folder / ".metadata").unlink()
    with pytest.raises(sm.FormatError, match=r"without its \.metadata, .* give an earlier step if the save did not finish"):
        sm.inspect(folder)


def test_compressed_pieces_are_refused_by_name(tmp_path: Path) -> None:
    folder, _ = trained(tmp_path / "in")
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    for place in metadata.storage_data.values():
        place.transform_descriptors = ["stream.zstd/1"]
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(sm.FormatError, match=r"stream\.zstd/1, which is not read; save the checkpoint without compression"):
        sm.inspect(folder)


def edited(folder: Path, edit: Any) -> Path:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    edit(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    return folder


def first(metadata: Any) -> Any:
    return metadata.state_dict_metadata["model.layers.0.weight"]


def last(metadata: Any) -> Any:
    return metadata.state_dict_metadata["model.layers.2.weight"]


HOSTILE = {
    "a hole": (lambda m: first(m).chunks.pop(), "has a hole"),
    "a part twice": (lambda m: first(m).chunks.append(first(m).chunks[0]), "overlap"),
    "one part in place of another": (lambda m: first(m).chunks.__setitem__(1, first(m).chunks[0]), "overlap"),
    "outside": (lambda m: setattr(first(m).chunks[1], "offsets", torch.Size([1000, 0])), "outside its shape"),
    "huge": (lambda m: setattr(first(m), "size", torch.Size([1 << 40, 1 << 40])), "overflows"),
    "other axes": (lambda m: setattr(first(m), "size", torch.Size([60])), "outside its shape"),
    "another dtype": (lambda m: setattr(first(m).properties, "dtype", torch.int32), "is announced"),
    "another dtype of the last": (lambda m: setattr(last(m).properties, "dtype", torch.int32), "is announced"),
    "beyond the file": (lambda m: [setattr(p, "offset", 1 << 60) for p in m.storage_data.values()], "truncated"),
    "within another": (
        lambda m: [setattr(p, "offset", 0) for p in m.storage_data.values()],
        "stand behind its zip archive|overlaps|announced",
    ),
    "another file": (
        lambda m: [setattr(p, "relative_path", "../../etc/passwd") for p in m.storage_data.values()],
        "not the name of a file",
    ),
    "no places": (lambda m: m.storage_data.clear(), "no file is named"),
    "no sizes": (lambda m: setattr(first(m), "size", None), "no metadata of a distributed checkpoint"),
    "text as size": (lambda m: setattr(first(m), "size", ("a", 1)), "no metadata of a distributed checkpoint"),
    "negative": (lambda m: setattr(first(m), "size", (-1, 1)), "no metadata of a distributed checkpoint"),
    "no metadata": (lambda m: m.__dict__.clear(), "no metadata of a distributed checkpoint"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_metadata(tmp_path: Path, name: str) -> None:
    folder, _ = trained(tmp_path / "in")
    edit, said = HOSTILE[name]
    with pytest.raises(sm.FormatError, match=said) as caught:
        sm.inspect(edited(folder, edit))
    assert "\n" not in str(caught.value)


class Canary:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (open, (self.path, "w"))


def test_nothing_in_metadata_is_executed(tmp_path: Path) -> None:
    folder, weights = trained(tmp_path / "in")
    edited(folder, lambda m: setattr(m, "storage_meta", Canary(str(tmp_path / "canary"))))
    assert list(sm.inspect(folder)) == list(weights)
    edited_size = pickle.dumps(Canary(str(tmp_path / "canary")))
    (folder / ".metadata").write_bytes(edited_size)
    with pytest.raises(sm.FormatError, match="no metadata of a distributed checkpoint"):
        sm.inspect(folder)
    assert not (tmp_path / "canary").exists()


def test_metadata_of_each_rank(tmp_path: Path) -> None:
    """use_collectives=False writes one for each rank, which tells its own pieces only."""
    folder, weights = trained(tmp_path / "in")
    data = (folder / ".metadata").read_bytes()
    (folder / ".metadata").unlink()
    for rank in range(4):
        metadata = pickle.loads(data)
        for entry in metadata.state_dict_metadata.values():
            if hasattr(entry, "chunks"):
                entry.chunks = entry.chunks[rank : rank + 1]
        (folder / f"__{rank}.metadata").write_bytes(pickle.dumps(metadata))
    sm.convert(folder, tmp_path / "out.safetensors")
    assert_same(load_safetensors(tmp_path / "out.safetensors"), weights)
    shutil.move(folder / "__3.metadata", tmp_path)
    with pytest.raises(sm.FormatError, match="has a hole"):
        sm.inspect(folder)


def test_an_output_folder_has_no_parts_of_ranks(tmp_path: Path) -> None:
    folder, weights = trained(tmp_path / "in")
    (folder / "config.json").write_text("{}")
    sm.convert(folder, tmp_path / "out/")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json", "model.safetensors", "streammerge.json",
    ]  # fmt: skip
    assert_same(load_safetensors(tmp_path / "out" / "model.safetensors"), weights)


def _rank(rank: int, ranks: int, folder: str, store: str) -> None:
    """One rank of a training with FSDP2 in two dimensions, which saves model and optimizer."""
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch import nn
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", rank=rank, world_size=ranks, init_method=f"file://{store}")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3, bias=False))
    fully_shard(net, mesh=init_device_mesh("cpu", (ranks,)))
    optimizer = torch.optim.AdamW(net.parameters())
    net(torch.ones(2, 5)).sum().backward()
    optimizer.step()
    model, state = get_state_dict(net, optimizer)
    dcp.save({"model": model, "optimizer": state, "step": 3}, checkpoint_id=f"{folder}/in")
    whole = get_model_state_dict(net, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        torch.save(whole, f"{folder}/whole.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_real_ranks_of_fsdp2(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_rank, (3, str(tmp_path), str(tmp_path / "store")), nprocs=3)
    sm.convert(tmp_path / "in", tmp_path / "out.safetensors")
    assert_same(load_safetensors(tmp_path / "out.safetensors"), torch.load(tmp_path / "whole.pt"))
    assert sm.inspect(tmp_path / "in").container.facts == {"ranks": "3", "step": "3 (step)"}
