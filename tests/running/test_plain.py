"""Numbers made by numpy: the bytes of the kernels, and no torch in the process."""

from __future__ import annotations

import hashlib
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import streammerge as sm
from formats import dcp_maker
from running.test_makers import CHUNK, Bench, Opening, bench, kernel_maker
from running.test_makers import made as made_by
from streammerge.errors import MismatchError
from streammerge.kernels.group import TensorGroup
from streammerge.methods.exact import integers
from streammerge.methods.registry import COPY, INTEGERS, LINEAR, find_method
from streammerge.planning.tasks import MergeTask
from streammerge.running.computing import KernelMaker
from streammerge.running.plain import NumpyMaker, PlainNumbers
from streammerge.sources.stored import Stored
from streammerge.tensors.dtypes import DType
from streammerge.tensors.spec import TensorSpec

__all__ = ["bench"]
BOTH = pytest.mark.usefixtures("compiled_or_not")
FLOATS = [DType.F64, DType.F32, DType.BF16, DType.F16]
N = 20_001


class Held:
    """Sources in memory."""

    def __init__(self, models: list[torch.Tensor]) -> None:
        self.models = models

    def raw(self, source: int, start: int, stop: int) -> memoryview:
        return memoryview(self.models[source][start:stop].view(torch.uint8).numpy()).cast("B")

    def stays(self, source: int) -> bool:
        return True


def task_of(method: Any, models: list[torch.Tensor], out: DType, **parameters: Any) -> MergeTask:
    kinds = {kind.torch: kind for kind in DType if kind.torch is not None}
    sources = tuple(Stored(TensorSpec("w", kinds[each.dtype], tuple(each.shape)), "a", 0) for each in models)
    values = method.resolve(parameters, len(models)) if parameters or method.parameters else {}
    spec = TensorSpec("w", out, tuple(models[0].shape))
    return MergeTask(spec, method, sources, 0, 0, values, "float64" if method.sums else "float32")


def made(task: MergeTask, models: list[torch.Tensor], start: int = 0) -> tuple[torch.Tensor, int | None]:
    """Returns the numbers, and how many are agreed infinities; None if the numbers are not sure."""
    stop = len(models[0])
    into = memoryview(bytearray((stop - start) * task.out.dtype.element_bytes))
    numbers = PlainNumbers(memoryview(bytearray(8 * N)))
    agreed = numbers.put(task, Held(models), start, stop, into)
    return torch.frombuffer(into, dtype=task.out.dtype.torch), agreed


def numbers(dtype: DType, seed: int) -> torch.Tensor:
    """Any finite bits, many of them halfway between two numbers of a shorter dtype, and both zeros."""
    drawn = torch.Generator().manual_seed(seed)
    octets = torch.randint(0, 256, (N * dtype.element_bytes,), generator=drawn, dtype=torch.uint8)
    found = octets.view(dtype.torch)
    similar = torch.randn(N, generator=drawn).to(dtype.torch)
    halves = (torch.randint(-512, 512, (N,), generator=drawn) + 0.5).mul(2.0**-9).add(1.0).to(dtype.torch)
    which = torch.randint(0, 4, (N,), generator=drawn)
    found = torch.where(which == 0, similar, torch.where(which == 1, halves, found))
    found = torch.where(which == 3, torch.copysign(torch.zeros(()), found.float()).to(dtype.torch), found)
    return torch.where(found.isfinite() & (found.double().abs() < 1e4), found, similar).contiguous()


def octets(values: torch.Tensor) -> bytes:
    return bytes(values.contiguous().view(torch.uint8).numpy())


@pytest.mark.parametrize("out", FLOATS)
@pytest.mark.parametrize("dtypes", [[a] for a in FLOATS] + [[a, b] for a in FLOATS for b in FLOATS])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.sampled(4)
@BOTH
def test_sums_have_the_bytes_of_the_kernel(dtypes: list[DType], out: DType, normalize: bool) -> None:
    models = [numbers(dtype, number) for number, dtype in enumerate(dtypes)]
    for weights in ([0.6, 0.4], [1.0, 1.0], [1.0, -0.3], [3.0, 1.0], [0.0, 0.7]):
        task = task_of(LINEAR, models, out, weight=weights[: len(models)], normalize=normalize and weights[0] > 0)
        found, agreed = made(task, models)
        group = TensorGroup.of(*models, compute=torch.float64)
        wanted = group.merged(task.method.bind(group, task.parameters)).to(out.torch)
        assert agreed == 0
        assert octets(found) == octets(wanted)


@pytest.mark.parametrize("method", ["n_average", "ema"])
@BOTH
def test_other_sums_and_parts_of_a_tensor(method: str) -> None:
    models = [numbers(DType.F32, number) for number in range(5)]
    task = task_of(find_method(method), models, DType.BF16)
    group = TensorGroup.of(*models, compute=torch.float64)
    wanted = group.merged(task.method.bind(group, task.parameters)).to(torch.bfloat16)
    for start in (0, 1, N - 1, N):
        found, agreed = made(task, models, start) if start < N else (wanted[N:], 0)
        assert agreed == 0
        assert octets(found) == octets(wanted[start:])


@pytest.mark.parametrize("out", FLOATS)
@pytest.mark.parametrize("dtype", FLOATS)
@BOTH
def test_conversions_have_the_bytes_of_torch(dtype: DType, out: DType) -> None:
    model = numbers(dtype, 7)
    found, agreed = made(task_of(COPY, [model], out), [model])
    assert agreed == 0
    assert octets(found) == octets(model.to(out.torch))


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0xFF800001, 0x7F7FFFFF])
@pytest.mark.parametrize("place", [0, 9000, N - 1])
@BOTH
def test_nan_and_overflows_are_never_sure(bits: int, place: int) -> None:
    """The last bits are the largest float32, which is infinite in shorter dtypes. Those of NaN could be rounded to -0."""
    model = torch.ones(N)
    model.view(torch.int32)[place] = int(np.array(bits, np.uint32).view(np.int32))
    for out in (DType.BF16, DType.F16, *([DType.F32, DType.F64] if bits != 0x7F7FFFFF else [])):
        for task in (task_of(COPY, [model], out), task_of(LINEAR, [model], out, weight=[1.0])):
            assert made(task, [model])[1] is None


PLACES = {math.inf: [0, 77, 9000], -math.inf: [1, 78, N - 1]}


def with_infinities(models: list[torch.Tensor]) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Returns models with infinities at some places, and where these are."""
    where, copies = torch.zeros(N), [each.clone() for each in models]
    for value, places in PLACES.items():
        where[places] = value
        for each in copies:
            each[places] = value
    return copies, where


@pytest.mark.parametrize("out", FLOATS)
@pytest.mark.parametrize("dtypes", [[a] for a in FLOATS] + [[a, b] for a in FLOATS for b in FLOATS])
@BOTH
def test_infinities_that_all_have_stay_and_all_else_is_the_kernels(dtypes: list[DType], out: DType) -> None:
    plain = [numbers(dtype, number) for number, dtype in enumerate(dtypes)]
    models, where = with_infinities(plain)
    for weights in ([0.6, 0.4], [1.0, -0.3], [-3.0, 1.0], [0.7, 0.0]):
        task = task_of(LINEAR, models, out, weight=weights[: len(models)], normalize=False)
        found, agreed = made(task, models)
        group = TensorGroup.of(*plain, compute=torch.float64)
        wanted = group.merged(task.method.bind(group, task.parameters)).to(out.torch)
        wanted = torch.where(where != 0, where.to(out.torch), wanted)
        assert agreed == 6
        assert octets(found) == octets(wanted)
    if len(models) == 1:
        found, agreed = made(task_of(COPY, models, out), models)
        assert (agreed, octets(found)) == (6, octets(models[0].to(out.torch)))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("other", [0.5, math.inf, math.nan])
@pytest.mark.parametrize("model", [0, 1, 2])
@BOTH
def test_one_other_number_leaves_the_chunk_to_the_kernel(dtype: DType, other: float, model: int) -> None:
    models, _ = with_infinities([torch.ones(N, dtype=dtype.torch) for _ in range(3)])
    task = task_of(LINEAR, models, dtype, weight=[1.0] * 3)
    assert made(task, models)[1] == 6
    models[model][PLACES[-math.inf][1]] = other
    assert made(task, models)[1] is None
    models[model][PLACES[-math.inf][1]], models[model][5000] = -math.inf, math.inf
    assert made(task, models)[1] is None


@pytest.mark.parametrize("policy", ["error", "first", "last", "max"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_integers_are_settled_as_by_the_method(dtype: torch.dtype, policy: str) -> None:
    drawn = torch.Generator().manual_seed(3)
    top = 2 if dtype == torch.bool else 100
    models = [torch.randint(0, top, (N,), generator=drawn).to(dtype) for _ in range(3)]
    for chosen in (models, [models[0]] * 3):
        task = task_of(INTEGERS, chosen, next(kind for kind in DType if kind.torch == dtype), policy=policy)
        found, agreed = made(task, chosen)
        group = TensorGroup.of(*chosen)
        if policy == "error" and chosen is models:
            assert agreed is None
            with pytest.raises(MismatchError):
                group.merged(integers(group, policy=policy))
            continue
        wanted = {"last": chosen[-1], "max": torch.stack(list(chosen)).amax(0)}.get(policy, chosen[0])
        assert agreed == 0
        assert octets(found) == octets(wanted)


def test_the_kernel_of_a_piece_is_bound_once_and_only_for_chunks_that_are_not_sure(bench: Opening) -> None:
    for places, bound in (((), 0), ((5,), 1), ((5, CHUNK + 7, 3 * CHUNK), 1)):
        models = [torch.randn(4 * CHUNK) for _ in range(2)]
        for place in places:
            models[1][place] = torch.nan
        at, kernels = bench(models, weight=[0.5, 0.5]), list[KernelMaker]()

        def by_kernel(at: Bench = at, kernels: list[KernelMaker] = kernels) -> KernelMaker:
            kernels.append(kernel_maker(at))
            return kernels[-1]

        plain = PlainNumbers(at.workspace.octets("slots"))
        maker = NumpyMaker(plain, at.task, at.source, CHUNK, by_kernel)
        found = torch.frombuffer(bytearray(made_by(maker, 0, 4 * CHUNK, 4)), dtype=torch.float32)
        assert len(kernels) == bound
        assert maker.nonfinite == ({at.source.origin(1): len(places)} if places else {})
        assert found.isnan().nonzero().ravel().tolist() == [*places]


# --------------------------------------------------------------------------------------------------- in a process

_RUN = """
import json, sys
import streammerge as sm
result = sm.merge(json.loads(sys.argv[1]), sys.argv[2], overwrite=True, **json.loads(sys.argv[3]))
loaded = "torch" in sys.modules
print(json.dumps([loaded, result.peak_bytes, result.startup_bytes, list(result.warnings), list(result.notes)]))
"""


def merged(paths: list[Path], out: Path, **options: Any) -> tuple[Any, str]:
    """Merges in a process that has no torch. Returns what it said, and the digest of the output."""
    arguments = [json.dumps([str(path) for path in paths]), str(out), json.dumps(options)]
    said = json.loads(subprocess.check_output([sys.executable, "-c", _RUN, *arguments], text=True))
    return said, hashlib.sha256(out.read_bytes()).hexdigest()


def merged_here(paths: list[Path], out: Path, **options: Any) -> tuple[Any, str]:
    """The same in this process, which has loaded torch, and so computes with it."""
    result = sm.merge(paths, out, overwrite=True, **options)
    return [list(result.warnings), list(result.notes)], hashlib.sha256(out.read_bytes()).hexdigest()


def model(path: Path, seed: int, **others: torch.Tensor) -> Path:
    drawn = torch.Generator().manual_seed(seed)
    tensors = {f"layer.{n}.weight": torch.randn(300, 301, generator=drawn) for n in range(4)}
    tensors |= {"half": torch.randn(77, generator=drawn).half(), "brain": torch.randn(5, 5, generator=drawn).bfloat16()}
    tensors |= {"scalar": torch.tensor(1.5), "empty": torch.empty(0, 3), "steps": torch.tensor([3, 4])}
    save_file(tensors | others, path)
    return path


@pytest.mark.parametrize(
    "options",
    [
        {"weights": [0.6, 0.4]},
        {"io": "pread", "workers": 2},
        {"executor": "processes", "workers": 2},
        {"out_dtype": "bfloat16", "memory": "24MiB"},
        {"method": "ema"},
    ],
)
def test_a_short_merge_loads_no_torch(options: dict[str, Any], tmp_path: Path) -> None:
    paths = [model(tmp_path / f"{number}.safetensors", number) for number in range(2)]
    plain, digest = merged(paths, tmp_path / "out.safetensors", **options)
    said, wanted = merged_here(paths, tmp_path / "out.safetensors", **options | {"executor": "threads"})
    assert not plain[0]
    assert digest == wanted
    assert plain[1] < 24 << 20
    assert plain[2] < 100 << 20, "torch alone takes more"
    assert plain[3:] == said


@pytest.mark.parametrize("executor", ["threads", "processes"])
@pytest.mark.sampled(2)
def test_torch_comes_late_for_what_is_not_finite(executor: str, tmp_path: Path) -> None:
    wrong = torch.ones(100_000)
    wrong[70_000] = math.nan
    masks = {"mask": torch.full((4, 4), -math.inf)}
    paths = [model(tmp_path / "a.safetensors", 1, **masks, gate=torch.ones(100_000))]
    paths += [model(tmp_path / "b.safetensors", 2, **masks, gate=wrong)]
    options = {"executor": executor, "allow_nonfinite": True, "workers": 2, "memory": "40MiB"}
    plain, digest = merged(paths, tmp_path / "out.safetensors", **options)
    said, wanted = merged_here(paths, tmp_path / "out.safetensors", **options | {"executor": "threads"})
    assert digest == wanted
    assert plain[0] == (executor == "threads")
    assert plain[3:] == said
    assert any("gate: 1 in" in warning for warning in plain[3])
    assert plain[1] < 40 << 20
    assert load_file(tmp_path / "out.safetensors")["mask"].isneginf().all()


@pytest.mark.parametrize("executor", ["threads", "processes"])
def test_masks_of_infinities_load_no_torch(executor: str, tmp_path: Path) -> None:
    """Causal masks in three dtypes, one longer than a chunk, beside tensors that one stretch holds."""
    causal = torch.full((300, 300), -math.inf).triu(1)
    masks = {"attn.mask": causal, "half.mask": causal[:9, :9].half(), "brain.mask": causal.bfloat16().contiguous()}
    masks |= {"ceiling": torch.tensor([math.inf, -math.inf, 0.25])}
    paths = [model(tmp_path / f"{number}.safetensors", number, **masks) for number in range(2)]
    options = {"executor": executor, "workers": 2, "weights": [1.25, -0.25]}
    plain, digest = merged(paths, tmp_path / "out.safetensors", **options)
    found = load_file(tmp_path / "out.safetensors")
    said, wanted = merged_here(paths, tmp_path / "out.safetensors", **options | {"executor": "threads"})
    assert not plain[0]
    assert digest == wanted
    assert plain[3:] == said
    assert any("mask" in note for note in plain[4])
    assert all(torch.equal(found[name], mask) for name, mask in masks.items())


def test_torch_has_its_threads_again_after_it_came_late(tmp_path: Path) -> None:
    masks = {"mask": torch.full((4, 4), math.nan)}
    paths = [str(model(tmp_path / f"{number}.safetensors", number, **masks)) for number in range(2)]
    code = (
        "import sys, streammerge as sm; sm.merge(sys.argv[1:3], sys.argv[3], workers=2, executor='threads')\n"
        "print('torch' in sys.modules)\nimport torch; print(torch.get_num_threads())"
    )
    fresh = subprocess.check_output([sys.executable, "-c", "import torch; print(torch.get_num_threads())"])
    shown = subprocess.check_output([sys.executable, "-c", code, *paths, str(tmp_path / "out.safetensors")])
    assert shown == b"True\n" + fresh


_CONVERT = """
import sys
import streammerge as sm
result = sm.convert(sys.argv[1], sys.argv[2], overwrite=True, executor="threads", workers=1)
loaded = "torch" in sys.modules
import torch
print(loaded, result.peak_bytes < 40 << 20, torch.get_num_threads())
"""


@pytest.mark.parametrize(("name", "loads"), [("ranks", False), ("columns.pth", True)])
@pytest.mark.sampled(2)
def test_torch_never_comes_late_for_copies(name: str, loads: bool, tmp_path: Path) -> None:
    """Rows of several ranks are joined without it. A matrix by columns is gathered by it, so it is loaded first: its memory
    is not the run's, and it has its threads again."""
    matrix = torch.randn(300, 400)
    if loads:
        torch.save({"w": matrix.t().contiguous().t()}, tmp_path / name)
    else:
        dcp_maker.write(tmp_path / name, {"w": matrix}, dcp_maker.sharded(0, 4))
    out = tmp_path / "out.safetensors"
    shown = subprocess.check_output([sys.executable, "-c", _CONVERT, str(tmp_path / name), str(out)], text=True)
    fresh = subprocess.check_output([sys.executable, "-c", "import torch; print(torch.get_num_threads())"], text=True)
    assert shown == f"{loads} True {fresh}"
    assert torch.equal(load_file(out)["w"], matrix)
