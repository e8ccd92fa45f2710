"""The buffers of a worker: a method may name its own as it likes, and a run leaves torch's settings as they were."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest
import torch
from conftest import load_safetensors
from safetensors.torch import save_file

import streammerge as sm
from streammerge.kernels.chunk import Chunk, Kernel
from streammerge.kernels.group import TensorGroup
from streammerge.methods.registry import merge_tensors
from streammerge.planning.budget import Budget, Cost
from streammerge.running.workspace import WorkerRoom, Workspace
from streammerge.sources.constant import Constant
from streammerge.stores.inputs import InputFiles
from streammerge.tensors.dtypes import DType
from streammerge.tensors.spec import TensorSpec

REGIONS = ["slots", "out", "kept", "read0", "read1", "reader scratch", "reader tiles", "reader shared"]
OF_CHUNKS = ["base", "model 0", "model 1", "operand", "widen", "first", "keys", "uniform", "uniform bits"]
OF_PASSES = ["scratch", "places", "gram x", "gram y", "gram product"]


def test_the_callers_torch_threads_are_left_alone(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(3)}, tmp_path / "in.pth")
    before = torch.get_num_threads()
    sm.merge([tmp_path / "in.pth"], tmp_path / "out.pth")
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("slot", [*REGIONS, *OF_CHUNKS, *OF_PASSES])
def test_a_method_may_give_its_buffer_any_name(slot: str, tmp_path: Path) -> None:
    """The numbers are those of the formula, whatever this package calls its own buffers."""

    def method(group: TensorGroup) -> Kernel:
        def look(chunk: Chunk) -> list[torch.Tensor]:
            return [chunk.empty(slot).copy_(chunk.load(0)).sub_(chunk.base).abs_()]

        cut = group.kth_largest(look, [[group.elems // 2]])[0][0]
        group.gram()

        def kernel(chunk: Chunk) -> torch.Tensor:
            own = chunk.empty(slot).copy_(chunk.models[0]).sub_(chunk.base)
            group.uniform(chunk, 0)
            own.add_(chunk.delta(1)).add_(chunk.models[0]).add_(chunk.base)
            return own.masked_fill_((chunk.models[0] - chunk.base).abs() < cut.threshold, 0)

        return kernel

    paths = [tmp_path / f"{number}.safetensors" for number in range(3)]
    for number, path in enumerate(paths):
        make = torch.Generator().manual_seed(number)
        save_file({f"w{i}": torch.randint(-100, 100, (1003,), generator=make).half() for i in range(4)}, path)
    base, one, two = map(load_safetensors, paths)
    for io in ("mmap", "pread"):
        sm.merge(paths[1:], tmp_path / f"{io}.safetensors", method=method, base=paths[0], io=io, workers=1)
    made = [load_safetensors(tmp_path / f"{io}.safetensors") for io in ("mmap", "pread")]
    for name in base:
        b, x, y = (tensors[name].float() for tensors in (base, one, two))
        apart = (x - b).abs()
        wanted = ((x - b) + (y - b) + x + b).masked_fill(apart < apart.sort(descending=True).values[501 - 1], 0)
        for tensors in made:
            assert torch.equal(tensors[name].float(), wanted), (slot, name)
        assert torch.equal(merge_tensors(method, x, y, base=b), wanted)


def test_what_is_made_once_belongs_to_one_source() -> None:
    """A source that a reader makes while it is opened may be gone, and the next one may have its place in memory."""
    workspace = Workspace(Budget(1, 100, 5000, 1000, Cost(4, 1, 4, 4), 0))
    with closing(InputFiles({})) as files:
        room = WorkerRoom(files, workspace, (), lambda: None)
        for number in range(50):
            source = Constant(TensorSpec("w", DType.U8, (3,)), bytes([number]))
            assert [room.once(source, lambda number=number: number) for _ in range(2)] == [number] * 2
            del source
