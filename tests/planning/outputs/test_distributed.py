"""Outputs that are folders of torch.distributed.checkpoint: torch reads them, and training can go on from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from conftest import assert_same, load_safetensors, mean, octets
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import streammerge as sm
from formats import dcp_maker
from streammerge.formats import dcp_writer

Tensors = dict[str, torch.Tensor]
NAMES = ("emb.weight", "layers.0.weight", "layers.0.bias", "scalar", "empty", "half")


def weights_of(seed: int) -> Tensors:
    make = torch.Generator().manual_seed(seed)
    shapes = {"emb.weight": (33, 6), "layers.0.weight": (70_001, 3), "layers.0.bias": (7,), "scalar": (), "empty": (0, 4)}
    found = {name: torch.randn(shape, generator=make) for name, shape in shapes.items()}
    return found | {"half": torch.randn(9, 2, generator=make).bfloat16()}


def trained(folder: Path, seed: int) -> tuple[Path, Tensors]:
    weights = weights_of(seed)
    tensors = {f"model.{name}": weight for name, weight in weights.items()}
    paths: dict[str, tuple[Any, ...]] = {f"model.{name}": ("model", name) for name in weights}
    for name in ("emb.weight", "layers.0.bias"):
        tensors[f"optimizer.state.{name}.exp_avg"] = torch.full_like(weights[name], seed)
        paths[f"optimizer.state.{name}.exp_avg"] = ("optimizer", "state", name, "exp_avg")
    tensors["rng"], paths["rng"] = torch.arange(5, dtype=torch.uint8), ("rng",)
    objects = {"step": 70 + seed, "optimizer.lr": 0.1, "lr_scheduler": {"last_epoch": 4}}
    paths |= {"step": ("step",), "optimizer.lr": ("optimizer", "lr"), "lr_scheduler": ("lr_scheduler",)}
    return dcp_maker.write(folder, tensors, dcp_maker.sharded(0, 3), objects, paths, ranks=3), weights


def by_torch(folder: Path, to: Path) -> dict[str, Any]:
    dcp_to_torch_save(folder, to)
    return torch.load(to, weights_only=False)  # type: ignore[no-any-return]


@pytest.fixture
def pair(tmp_path: Path) -> tuple[list[Path], Tensors]:
    """Two checkpoints, and their mean."""
    (a, one), (b, two) = trained(tmp_path / "a", 1), trained(tmp_path / "b", 2)
    return [a, b], {name: mean([one[name], two[name]], [0.5, 0.5]) for name in one}


def test_torch_reads_the_mean(tmp_path: Path, pair: tuple[list[Path], Tensors]) -> None:
    paths, wanted = pair
    sm.merge(paths, tmp_path / "out/")
    made = by_torch(tmp_path / "out", tmp_path / "out.pth")
    assert {name: octets(tensor) for name, tensor in made["model"].items()} == {n: octets(t) for n, t in wanted.items()}
    assert made["step"] == 71
    assert torch.equal(made["rng"], torch.arange(5, dtype=torch.uint8))
    assert made.keys() == {"model", "step", "rng"}
    sm.verify(tmp_path / "out", sample="100%")


def test_the_optimizer_on_request(tmp_path: Path, pair: tuple[list[Path], Tensors]) -> None:
    paths, _ = pair
    sm.merge(paths, tmp_path / "out/", keep_optimizer=True)
    made = by_torch(tmp_path / "out", tmp_path / "out.pth")
    assert torch.equal(made["optimizer"]["state"]["emb.weight"]["exp_avg"], torch.full((33, 6), 1.0))
    assert made["optimizer"]["lr"] == 0.1
    assert made["lr_scheduler"] == {"last_epoch": 4}
    sm.verify(tmp_path / "out")


def test_one_file_has_no_optimizer_and_says_so(tmp_path: Path, pair: tuple[list[Path], Tensors]) -> None:
    paths, wanted = pair
    result = sm.merge(paths, tmp_path / "out.pth", keep_optimizer=True)
    assert_same(torch.load(tmp_path / "out.pth"), wanted)
    assert any("`keep_optimizer` is without effect" in note for note in result.notes)


def test_a_model_loads_it_in_place(tmp_path: Path, pair: tuple[list[Path], Tensors]) -> None:
    paths, wanted = pair
    sm.merge(paths, tmp_path / "out/")
    state = {"model": {name: torch.zeros_like(tensor) for name, tensor in wanted.items()}, "step": 0}
    dcp.load(state, checkpoint_id=tmp_path / "out", no_dist=True)
    assert_same(state["model"], wanted)  # type: ignore[arg-type]
    assert state["step"] == 71


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_long_tensors_are_written_in_blocks(
    tmp_path: Path, pair: tuple[list[Path], Tensors], monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """Only where blocks can be merged by themselves."""
    paths, wanted = pair
    base, _ = trained(tmp_path / "base", 3)
    asked: dict[str, Any] = {"method": method, "base": base, "parameters": {"density": 0.5}} if method == "ties" else {}
    sm.merge(paths, tmp_path / "whole/", **asked)
    monkeypatch.setattr(dcp_writer, "BLOCK_BYTES", 100_000)
    sm.merge(paths, tmp_path / "out/", **asked)
    made, whole = by_torch(tmp_path / "out", tmp_path / "out.pth"), by_torch(tmp_path / "whole", tmp_path / "whole.pth")
    assert_same(made["model"], whole["model"])
    if method == "linear":
        assert_same(made["model"], wanted)
    pieces = sm.inspect(tmp_path / "out")["layers.0.weight"].parts
    assert len(pieces) == (9 if method == "linear" else 0)
    sm.verify(tmp_path / "out", sample="100%")


def test_no_byte_depends_on_the_machine(tmp_path: Path, pair: tuple[list[Path], Tensors]) -> None:
    paths, _ = pair
    sm.merge(paths, tmp_path / "one/", workers=1)
    sm.merge(paths, tmp_path / "two/", workers=3, memory="40MiB", io="pread")
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_an_older_output_is_replaced(tmp_path: Path, pair: tuple[list[Path], Tensors]) -> None:
    paths, wanted = pair
    sm.merge([paths[0], paths[0]], tmp_path / "out/")
    (tmp_path / "out" / "__0_1.distcp").write_bytes(b"of an older output")
    sm.merge(paths, tmp_path / "out/", overwrite=True)
    assert_same(by_torch(tmp_path / "out", tmp_path / "out.pth")["model"], wanted)
    assert not (tmp_path / "out" / "__0_1.distcp").exists()


def test_an_output_is_an_input_again(tmp_path: Path, pair: tuple[list[Path], Tensors]) -> None:
    paths, wanted = pair
    sm.merge(paths, tmp_path / "out/")
    sm.merge([tmp_path / "out", tmp_path / "out"], tmp_path / "again.safetensors")
    assert_same(load_safetensors(tmp_path / "again.safetensors"), wanted)


def test_damage_is_found(tmp_path: Path, pair: tuple[list[Path], Tensors]) -> None:
    paths, _ = pair
    sm.merge(paths, tmp_path / "out/")
    entry = sm.inspect(tmp_path / "out")["layers.0.weight"]
    path, offset = entry.begin
    data = bytearray(Path(str(path)).read_bytes())
    data[offset + 5] ^= 1
    Path(str(path)).write_bytes(data)
    with pytest.raises(sm.VerifyError, match=r"tensor model\.layers\.0\.weight"):
        sm.verify(tmp_path / "out")


def test_safetensors_on_request(tmp_path: Path, pair: tuple[list[Path], Tensors]) -> None:
    paths, wanted = pair
    result = sm.merge(paths, tmp_path / "out/", max_shard_size="5GB")
    assert_same(load_safetensors(tmp_path / "out" / "model.safetensors"), wanted)
    assert not any("distributed checkpoint as" in note for note in result.notes)
    sm.convert(paths[0], tmp_path / "converted/")
    assert (tmp_path / "converted" / "model.safetensors").is_file()


def test_a_trainers_folder(tmp_path: Path) -> None:
    paths = []
    for seed in (1, 2):
        folder, _ = trained(tmp_path / f"checkpoint-{seed}" / "pytorch_model_fsdp_0", seed)
        (folder.parent / "config.json").write_text(json.dumps({"model_type": "llama", "torch_dtype": "float32"}))
        paths.append(folder.parent)
    sm.merge(paths, tmp_path / "out/")
    assert (tmp_path / "out" / "config.json").is_file()
    made = by_torch(tmp_path / "out" / "pytorch_model_fsdp_0", tmp_path / "out.pth")
    assert set(made["model"]) == set(NAMES)
    assert sorted(path.name for path in (tmp_path / "out" / "pytorch_model_fsdp_0").iterdir()) == [
        ".metadata",
        "__0_0.distcp",
    ]
    sm.verify(tmp_path / "out")


def of_accelerate(folder: Path, seed: int) -> Path:
    """A checkpoint as accelerate and transformers save it: weights, optimizer and the rest stand apart."""
    make = torch.Generator().manual_seed(seed)
    state = {"optimizer.state.w.exp_avg": torch.randn(8, 3, generator=make)}
    dcp_maker.write(
        folder / "pytorch_model_fsdp_0", {"model.w": torch.randn(8, 3, generator=make)}, dcp_maker.sharded(0, 2), ranks=2
    )
    dcp_maker.write(folder / "optimizer_0", state, dcp_maker.sharded(0, 2), ranks=2)
    torch.save({"last_epoch": seed}, folder / "scheduler.bin")
    torch.save({"step": seed}, folder / "random_states_0.pkl")
    (folder / "trainer_state.json").write_text("{}")
    (folder / "events.out.tfevents.1").write_text("x")
    return folder


def test_the_optimizer_in_a_folder_of_its_own(tmp_path: Path) -> None:
    first, second = (of_accelerate(tmp_path / f"checkpoint-{seed}", seed) for seed in (1, 2))
    beside = ["scheduler.bin", "random_states_0.pkl", "trainer_state.json"]
    kept = sm.merge([first, second], tmp_path / "kept/", keep_optimizer=True)
    for file in sorted((first / "optimizer_0").iterdir()) + [first / name for name in beside]:
        assert (tmp_path / "kept" / file.relative_to(first)).read_bytes() == file.read_bytes()
    assert not (tmp_path / "kept" / "events.out.tfevents.1").exists()
    assert not any("random_states" in note for note in kept.notes if "left out" in note)
    made = by_torch(tmp_path / "kept" / "optimizer_0", tmp_path / "state.pth")
    assert_same(made, by_torch(first / "optimizer_0", tmp_path / "first.pth"))
    sm.merge([first, second], tmp_path / "out/")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "pytorch_model_fsdp_0", "streammerge.json", "streammerge.yaml",
    ]  # fmt: skip
    notes = " ".join(sm.plan([first, second], tmp_path / "other/").notes)
    assert "optimizer_0/ (stale after a merge; `keep_optimizer=True` keeps the first input's)" in notes
    shards = sm.plan([first, second], tmp_path / "shards/", max_shard_size="1GB").notes
    assert not any("keep_optimizer" in note for note in shards)
    sm.verify(tmp_path / "kept", inputs=tmp_path)
    sm.merge([first, second], tmp_path / "kept/", keep_optimizer=True, overwrite=True)


def test_a_renamed_and_a_dropped_tensor(tmp_path: Path, pair: tuple[list[Path], Tensors]) -> None:
    paths, wanted = pair
    recipe = {
        "merge_method": "linear",
        "models": [{"model": str(path)} for path in paths],
        "rules": [{"match": "scalar", "drop": True}, {"match": "emb.weight", "copy": str(paths[0])}],
        "output": {"container": "first"},
    }
    sm.merge(recipe=recipe, out=tmp_path / "out/")
    made = by_torch(tmp_path / "out", tmp_path / "out.pth")["model"]
    assert set(made) == set(NAMES) - {"scalar"}
    assert torch.equal(made["emb.weight"], weights_of(1)["emb.weight"])
    assert torch.equal(made["half"], wanted["half"])


def test_files_of_megatron_stay_beside_it(tmp_path: Path) -> None:
    paths = []
    for seed in (1, 2):
        tensors = {"decoder.layers.mlp.weight": torch.randn(4, 3, 2), "decoder.norm": torch.randn(3)}
        objects = {"decoder.layers._extra_state/shard_0_4": b"x"}
        folder = dcp_maker.write(tmp_path / str(seed), tensors, objects=objects)
        torch.save({"iteration": seed}, folder / "common.pt")
        (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
        paths.append(folder)
    sm.merge(paths, tmp_path / "out/")
    assert torch.load(tmp_path / "out" / "common.pt") == {"iteration": 1}
    assert (tmp_path / "out" / "metadata.json").is_file()
    made = by_torch(tmp_path / "out", tmp_path / "out.pth")
    assert made["decoder.layers._extra_state/shard_0_4"] == b"x"
    assert made["decoder.layers.mlp.weight"].shape == (4, 3, 2)


def test_checksums_of_megatrons_files_are_left_out(tmp_path: Path) -> None:
    """megatron-core 0.19.2 writes integrity.json with verify_integrity, and then refuses files that differ from it."""
    for name in ("a", "b"):
        folder = dcp_maker.write(tmp_path / name, {"decoder.w": torch.randn(4, 3)})
        (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
        (folder / "integrity.json").write_text('{"algorithm": "sha256", "files": {".metadata": "00"}}')
    result = sm.merge([tmp_path / "a", tmp_path / "b"], tmp_path / "out/")
    assert not (tmp_path / "out" / "integrity.json").exists()
    assert (tmp_path / "out" / "metadata.json").is_file()
    assert any("integrity.json (a checksum of the input's files)" in note for note in result.notes)


def with_masters(folder: Path, seed: int, name: str = "optimizer.state.param.decoder.w") -> tuple[Path, torch.Tensor]:
    """Writes a checkpoint whose optimizer holds the weight in float32, as Megatron's does."""
    weight = torch.randn(70_001, 3, generator=torch.Generator().manual_seed(seed)).bfloat16()
    tensors = {"decoder.w": weight, name: weight.float() + 1e-4, "optimizer.state.exp_avg.decoder.w": weight.float() * seed}
    return dcp_maker.write(folder, tensors, dcp_maker.sharded(0, 3), ranks=3), weight


@pytest.mark.parametrize("kind", ["param", "fp32_param", "master_param"])
def test_an_optimizers_copies_of_the_weights_are_the_merge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(dcp_writer, "BLOCK_BYTES", 400_000)
    master = f"optimizer.state.{kind}.decoder.w"
    (a, one), (b, two) = (with_masters(tmp_path / str(seed), seed, master) for seed in (1, 2))
    result = sm.merge([a, b], tmp_path / "out/", weights=[0.3, 0.7], keep_optimizer=True)
    made = by_torch(tmp_path / "out", tmp_path / "out.pth")
    exact = (one.double() * 0.3 + two.double() * 0.7) / (0.3 + 0.7)
    assert torch.equal(made[master], exact.float())
    assert torch.equal(made["decoder.w"], exact.bfloat16())
    assert torch.equal(made["optimizer.state.exp_avg.decoder.w"], one.float())
    assert not any(master in note for note in result.notes)
    sm.verify(tmp_path / "out")
    without = sm.merge([a, b], tmp_path / "bare/")
    assert any(master in note for note in without.notes)


def test_a_weight_that_is_called_param_has_its_own_state(tmp_path: Path) -> None:
    paths = []
    for seed in (1, 2):
        weight = torch.full((4, 2), float(seed))
        tensors = {"param.w": weight, "w": weight, "optimizer.state.param.w.exp_avg": weight * 5}
        paths.append(dcp_maker.write(tmp_path / str(seed), tensors))
    sm.merge(paths, tmp_path / "out/", keep_optimizer=True)
    made = by_torch(tmp_path / "out", tmp_path / "out.pth")
    assert torch.equal(made["optimizer.state.param.w.exp_avg"], torch.full((4, 2), 5.0))


def test_an_optimizers_buckets_of_weights_are_refused(tmp_path: Path) -> None:
    name = "optimizer.distributed.dp_group_idx_0.gbuf_idx_0.dtype_(torch.bfloat16, torch.float32).bucket_idx_0.param"
    paths = [with_masters(tmp_path / str(seed), seed, name)[0] for seed in (1, 2)]
    with pytest.raises(sm.RecipeError, match=r"in buckets .* leave `keep_optimizer` out, or save"):
        sm.merge(paths, tmp_path / "out/", keep_optimizer=True)
    sm.merge(paths, tmp_path / "out/")


def cut_masters(folder: Path) -> Path:
    """Writes a weight of two layers that two ranks hold, and its copy as megatron-core 0.14 stores it with the sharding
    type fully_sharded_model_space: the layer, the pieces along each axis, and the elements of a piece."""
    tensors = {
        "decoder.w": torch.randn(2, 4, 3).bfloat16(),
        "optimizer.state.fp32_param.decoder.w": torch.randn(2, 2, 1, 6),
    }
    return dcp_maker.write(folder, tensors, ranks=2)


def gathered_masters(folder: Path) -> Path:
    """Writes the copies as megatron-core 0.14 does with the sharding type dp_zero_gather_scatter, NeMo 2's default."""
    name = "optimizer.distributed.dp_group_idx_0.param_state/shard_0_1"
    state = [{"per_bucket_numel": [24], 0: {"param": torch.randn(24), "exp_avg": torch.randn(24)}}]
    return dcp_maker.write(folder, {"decoder.w": torch.randn(2, 4, 3).bfloat16()}, objects={name: state})


@pytest.mark.parametrize(
    ("made", "how"), [(cut_masters, "in pieces of its ranks"), (gathered_masters, "in one object")], ids=["cut", "gathered"]
)
def test_an_optimizers_weights_in_another_form_are_refused(tmp_path: Path, made: Any, how: str) -> None:
    paths = [made(tmp_path / name) for name in ("a", "b")]
    with pytest.raises(sm.RecipeError, match=f"holds the weights in float32 {how} .* leave `keep_optimizer` out, or save"):
        sm.merge(paths, tmp_path / "out/", keep_optimizer=True)
    sm.merge(paths, tmp_path / "out/")
    assert by_torch(tmp_path / "out", tmp_path / "out.pth").keys() == {"decoder.w"}
