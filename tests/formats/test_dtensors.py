"""Rank files with DTensors of torch, written by one process that plays each rank."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import assert_same, load_safetensors, mean, octets
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

import streammerge as sm

Tensors = dict[str, torch.Tensor]
PLACES: dict[str, tuple[tuple[int, ...], list[Any]]] = {
    "rows": ((4,), [Shard(0)]),
    "cols": ((4,), [Shard(1)]),
    "both": ((2, 2), [Shard(0), Shard(1)]),
    "hybrid": ((2, 2), [Replicate(), Shard(0)]),
    "twice": ((2, 2), [Shard(0), Shard(0)]),
    "copied": ((4,), [Replicate()]),
    "tiny": ((4,), [Shard(0)]),
}


@contextmanager
def playing(rank: int, ranks: int) -> Iterator[None]:
    dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def made_of(seed: int) -> Tensors:
    make = torch.Generator().manual_seed(seed)
    shapes = {
        "rows": (10, 6),
        "cols": (6, 10),
        "both": (5, 7),
        "twice": (12, 3),
        "copied": (3,),
        "tiny": (2, 3),
        "plain": (4,),
    }
    found = {name: torch.randn(shape, generator=make) for name, shape in shapes.items()}
    return found | {"hybrid": torch.randn(9, 4, generator=make).bfloat16()}


def local_of(tensor: torch.Tensor, mesh: tuple[int, ...], placements: list[Any], rank: int) -> torch.Tensor:
    """Cuts by torch.chunk, one axis of the mesh after the other."""
    place = (rank,) if len(mesh) == 1 else divmod(rank, mesh[1])
    for size, at, placement in zip(mesh, place, placements, strict=True):
        if isinstance(placement, Shard):
            parts = tensor.chunk(size, placement.dim)
            tensor = parts[at] if at < len(parts) else tensor.narrow(placement.dim, 0, 0)
    return tensor.contiguous().clone()


def write(
    folder: Path, tensors: Tensors, wrap: Any = lambda state: state, name: str = "model_world_size_4_rank_{}.pt"
) -> Path:
    folder.mkdir(parents=True)
    for rank in range(4):
        with playing(rank, 4):
            state = {}
            for key, tensor in tensors.items():
                if key not in PLACES:
                    state[key] = tensor
                    continue
                mesh, placements = PLACES[key]
                ranks = DeviceMesh("cpu", torch.arange(4).view(mesh), mesh_dim_names=("dp", "tp")[: len(mesh)])
                local = local_of(tensor, mesh, placements, rank)
                made = DTensor.from_local(
                    local, ranks, placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
                )
                state[key] = torch.nn.Parameter(made) if key == "rows" else made
                kept = state[key]._spec.mesh  # torch keeps that of the first rank in this process
                kept._rank, kept._coordinate_on_dim = rank, (rank,) if len(mesh) == 1 else divmod(rank, mesh[1])
            torch.save(wrap(state), folder / name.format(rank))
    return folder


def test_whole_tensors(tmp_path: Path) -> None:
    tensors = made_of(1)
    folder = write(tmp_path / "step-9" / "actor", tensors)
    torch.save({"state": {}, "param_groups": []}, folder / "optim_world_size_4_rank_0.pt")
    torch.save({"state": {}, "param_groups": []}, folder / "optim_world_size_4_rank_1.pt")
    for place in (folder, folder.parent):
        sm.convert(place, tmp_path / "out.safetensors", overwrite=True)
        assert_same(load_safetensors(tmp_path / "out.safetensors"), tensors)
    assert sm.inspect(folder).container.facts == {"ranks": "4", "mesh": "4 (dp)"}


def test_a_state_dict_within_a_checkpoint(tmp_path: Path) -> None:
    tensors = made_of(1)
    folder = write(tmp_path / "in", tensors, lambda state: {"model": state, "optimizer": {"state": {}, "param_groups": []}})
    sm.convert(folder, tmp_path / "out.safetensors")
    assert_same(load_safetensors(tmp_path / "out.safetensors"), tensors)


def test_a_merge(tmp_path: Path) -> None:
    one, two = made_of(1), made_of(2)
    paths = [write(tmp_path / "a", one), write(tmp_path / "b", two, name="checkpoint.rank{}.pth")]
    sm.merge(paths, tmp_path / "out.safetensors", weights=[0.6, 0.4])
    made = load_safetensors(tmp_path / "out.safetensors")
    assert {n: octets(t) for n, t in made.items()} == {n: octets(mean([one[n], two[n]], [0.6, 0.4])) for n in one}
    sm.verify(tmp_path / "out.safetensors")


@pytest.mark.parametrize("rank", [1, 3])
def test_a_missing_rank_is_named(tmp_path: Path, rank: int) -> None:
    folder = write(tmp_path / "in", made_of(1))
    (folder / f"model_world_size_4_rank_{rank}.pt").unlink()
    with pytest.raises(sm.FormatError, match=f"the files of the ranks {rank} are absent; copy those of all"):
        sm.inspect(folder)


def test_one_rank_alone_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "in", {"rows": torch.randn(8, 2), "cols": torch.randn(3, 8)})
    with pytest.raises(sm.StreammergeError, match=r"distributed|one rank's part"):
        sm.convert(folder / "model_world_size_4_rank_0.pt", tmp_path / "out.safetensors")


def test_files_of_two_models(tmp_path: Path) -> None:
    folder = write(tmp_path / "in", made_of(1))
    torch.save({"other": torch.ones(1)}, folder / "model_world_size_4_rank_2.pt")
    with pytest.raises(sm.FormatError, match="is not in the file of rank 2; the files are of two checkpoints"):
        sm.inspect(folder)


def test_flattened_parameters_are_refused(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for rank in range(2):
        torch.save({"_flat_param": torch.ones(3)}, tmp_path / "in" / f"pytorch_model_fsdp_0_rank{rank}.bin")
    with pytest.raises(sm.FormatError, match="parameters that FSDP has flattened"):
        sm.inspect(tmp_path / "in")
