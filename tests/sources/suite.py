"""The rules for every source: its numbers equal the same operation on whole tensors, in any order of reading.

A test of a new source inherits :class:`SourceSuite`. Its ``cases`` yields sources and their expected tensors.
"""

from __future__ import annotations

import itertools
import os
import pickle
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import load_safetensors, octets
from safetensors.torch import save_file

from streammerge.checkpoints.index import CheckpointIndex, open_checkpoint
from streammerge.methods.registry import COPY, find_method
from streammerge.planning.plan import Plan, build_plan
from streammerge.recipe.arguments import recipe_of
from streammerge.recipe.model import Model, Recipe
from streammerge.running.execution import execute
from streammerge.running.session import RunOptions
from streammerge.sources.base import Allocated, Blob, Source, read_whole
from streammerge.sources.stored import Stored
from streammerge.sources.strided import Strided
from streammerge.stores.base import Location
from streammerge.stores.inputs import InputFiles
from streammerge.stores.locations import parse
from streammerge.tensors.dtypes import BY_TORCH_NAME, DType
from streammerge.tensors.spec import GRAIN, TensorSpec

Tensor = torch.Tensor
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
DTYPES = (*FLOATS, torch.float8_e4m3fn, torch.complex64, torch.complex128, torch.int64, torch.uint8, torch.bool)
SHAPES: tuple[tuple[int, ...], ...] = ((), (1,), (0, 3), (7,), (5, 3), (3, 1, 4), (301, 433), (2, 129, 517))
"""0-d, one element, empty, odd, and more than a grain."""
INPUT = "cases"


@dataclass(frozen=True)
class Case:
    """A source and its expected tensor."""

    source: Source
    expected: Tensor

    def __str__(self) -> str:
        return f"{type(self.source).__name__} {self.expected.dtype} {list(self.expected.shape)}"


def draw(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Draws any numbers of that dtype except NaN and infinity."""
    make = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=make).bool()
    if not dtype.is_floating_point and not dtype.is_complex:
        return torch.randint(0, 100, shape, generator=make).to(dtype)
    if dtype.is_complex:
        return torch.complex(*(torch.randn(shape, generator=make, dtype=torch.float64) for _ in range(2))).to(dtype)
    return torch.randn(shape, generator=make, dtype=torch.float64 if dtype == torch.float64 else None).to(dtype)


_NUMBERS = itertools.count()


class Disk:
    """Writes tensors into files, and makes sources over them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, data: bytes, before: int = 5) -> tuple[Location, int]:
        """Writes these bytes unaligned. Returns their file and offset."""
        path = self.folder / f"{next(_NUMBERS)}.bin"
        path.write_bytes(b"x" * before + data + b"yz")
        return parse(path), before

    def stored(self, tensor: Tensor, name: str = "w") -> Stored:
        spec = TensorSpec(name, BY_TORCH_NAME[str(tensor.dtype).removeprefix("torch.")], tuple(tensor.shape))
        return Stored(spec, *self.write(octets(tensor)))

    def strided(self, view: Tensor, name: str = "w") -> Source:
        """Returns the source of a view over its whole storage."""
        whole = torch.empty(0, dtype=view.dtype).set_(view.untyped_storage())
        path, offset = self.write(octets(whole))
        spec = TensorSpec(name, BY_TORCH_NAME[str(view.dtype).removeprefix("torch.")], tuple(view.shape))
        lazy = "conjugated" if view.is_conj() else "negated" if view.is_neg() else ""
        return Strided(spec, path, offset + view.storage_offset() * view.element_size(), tuple(view.stride()), lazy)


def room(tile_bytes: int = 1 << 20) -> Allocated:
    return Allocated(InputFiles({}).get, tile_bytes)


def index_of(folder: Path, entries: dict[str, Source], label: str = INPUT) -> CheckpointIndex:
    """Returns the index of a checkpoint whose tensors are these sources."""
    path = folder / f"{label}.safetensors"
    if not path.exists():
        save_file({"none": torch.zeros(1)}, path)
    files = {each for entry in entries.values() for each in entry.paths if isinstance(each, Location)}
    index = open_checkpoint(path)
    return replace(index, entries=entries, aliases={}, files=(parse(path), *sorted(files)))


def planned(recipe: Recipe, indexes: list[CheckpointIndex], out: Path, **ways: Any) -> Plan:
    known = dict(zip(recipe.checkpoints, indexes, strict=True))
    ways = {"memory_bytes": 512 << 20, "workers": 2} | ways
    return build_plan(recipe, known, parse(out), **ways)


def run(plan: Plan) -> dict[str, Tensor]:
    """Runs a plan. Returns the tensors of its output."""
    execute(plan, RunOptions(overwrite=True), 0)
    assert plan.out is not None
    return load_safetensors(Path(str(plan.out)))


def merge_of(
    folder: Path,
    inputs: list[dict[str, Source]],
    method: str,
    out: str = "out.safetensors",
    based: bool = False,
    **ways: Any,
) -> dict[str, Tensor]:
    """Merges checkpoints whose tensors are sources. The first one is the base if ``based``."""
    indexes = [index_of(folder, entries, f"in{number}") for number, entries in enumerate(inputs)]
    paths = [str(index.path) for index in indexes]
    parameters = ways.pop("parameters", {})
    recipe = recipe_of(paths[based:], method, paths[0] if based else None, None, parameters, ways.pop("options", {}))
    return run(planned(recipe, indexes, folder / out, **ways))


class _Noting(Allocated):
    """A room that notes what is read of files."""

    def __init__(self) -> None:
        super().__init__(lambda location: location.open())
        self.read: list[Blob] = []

    def touched(self, path: Any, offset: int, nbytes: int) -> None:
        self.read.append(Blob(path, offset, nbytes))


def _places(blobs: list[Blob]) -> dict[Any, list[tuple[int, int]]]:
    """Returns the ranges of each file, in order, neighbours joined."""
    found: dict[Any, list[tuple[int, int]]] = {}
    for path, offset, nbytes in sorted(blobs, key=lambda blob: (str(blob.path), blob.offset)):
        ranges = found.setdefault(path, [])
        if ranges and ranges[-1][1] == offset:
            ranges[-1] = ranges[-1][0], offset + nbytes
        else:
            ranges.append((offset, offset + nbytes))
    return found


WAYS: tuple[dict[str, Any], ...] = (
    {},
    {"workers": 1},
    {"io": "pread"},
    {"memory_bytes": 40 << 20, "workers": 1},
    {"memory_bytes": 40 << 20, "io": "pread", "workers": 3},
)


class SourceSuite:
    """The checks. ``cases`` yields small cases of every dtype and shape that the source supports, and long cases.

    ``dtype``: what merges are asked for, where the source's dtype is not that of an output.
    """

    dtype: DType | None = None

    def cases(self, disk: Disk) -> Iterator[Case]:
        raise NotImplementedError

    def made(self, folder: Path) -> list[Case]:
        folder.mkdir(exist_ok=True)
        return list(self.cases(Disk(folder)))

    def test_whole(self, tmp_path: Path) -> None:
        cases = self.made(tmp_path)
        assert cases
        for case in cases:
            spec = case.source.spec
            assert (spec.dtype.torch, spec.shape) == (case.expected.dtype, tuple(case.expected.shape)), str(case)
            assert bytes(read_whole(case.source, room())) == octets(case.expected), str(case)

    @pytest.mark.parametrize("tile_bytes", [0, 1 << 12, 1 << 20])
    def test_any_ranges_in_any_order(self, tmp_path: Path, tile_bytes: int) -> None:
        chance = random.Random(tile_bytes)
        for case in self.made(tmp_path):
            data, size, numel = octets(case.expected), case.expected.element_size(), case.expected.numel()
            if not numel:
                continue
            reader = case.source.open(room(tile_bytes))
            step = max(numel // 5, 1)
            asked = [(a, min(a + step, numel)) for a in range(0, numel, step)]  # in order, as a merge reads
            for _ in range(8):
                start = chance.randrange(numel)
                asked.append((start, chance.randint(start + 1, numel)))
            for start, stop in asked:
                out = memoryview(bytearray((stop - start) * size))
                made = reader.read(start, stop, out)
                assert bytes(made) == data[start * size : stop * size], (str(case), start, stop)

    def test_what_is_ranged_tells_the_bytes_that_are_read(self, tmp_path: Path) -> None:
        chance = random.Random(0)
        for case in self.made(tmp_path):
            if not case.source.ranged or not case.expected.numel():
                assert case.source.ranged or not [*case.source.blobs_of(0, case.expected.numel())]
                continue
            numel = case.expected.numel()
            for start in (0, *(chance.randrange(numel) for _ in range(8))):
                stop = chance.randint(start + 1, numel)
                noting = _Noting()
                out = memoryview(bytearray((stop - start) * case.expected.element_size()))
                case.source.open(noting).read(start, stop, out)
                told = [*case.source.blobs_of(start, stop)]
                assert sum(blob.nbytes for blob in told) == len(out), (str(case), start, stop)
                assert _places(told) == _places(noting.read), (str(case), start, stop)

    def test_it_is_plain_data(self, tmp_path: Path) -> None:
        """The source is frozen, equal after pickling, and names the blobs that it reads."""
        for case in self.made(tmp_path):
            again = pickle.loads(pickle.dumps(case.source))
            assert bytes(read_whole(again, room())) == octets(case.expected)
            assert again.place == case.source.place or case.source.held
            assert hash(case.source.place) == hash(case.source.place)
            with pytest.raises((AttributeError, TypeError)):
                case.source.spec = None  # type: ignore[assignment]
            renamed = case.source.named("other")
            assert (renamed.spec.name, renamed.spec.shape) == ("other", case.source.spec.shape)
            assert bytes(read_whole(renamed, room())) == octets(case.expected)
            for path, offset, nbytes in case.source.blobs:
                assert offset + nbytes <= os.stat(path).st_size
            rebuilt = case.source.with_parts(case.source.parts)
            assert bytes(read_whole(rebuilt, room())) == octets(case.expected)

    def test_its_needs_are_all_that_it_takes(self, tmp_path: Path) -> None:
        """Reads in a room that gives no byte more than the source's needs."""
        for case in self.made(tmp_path):
            if case.expected.numel():
                needs = case.source.needs()
                strict = Strict(needs)
                out = memoryview(bytearray(case.source.nbytes))
                assert bytes(case.source.open(strict).read(0, case.expected.numel(), out)) == octets(case.expected)
                assert strict.scratch_bytes == needs.scratch_bytes, str(case)
                assert strict.tiles == needs.tiles, str(case)

    def test_a_merge_takes_it_like_any_tensor(self, tmp_path: Path) -> None:
        """Copies and averages the source. Any workers, memory and way of reading give the same bytes."""
        cases = [c for c in self.made(tmp_path / "data") if BY_TORCH_NAME[str(c.expected.dtype)[6:]].in_safetensors]
        entries = {f"t{n}": case.source.named(f"t{n}") for n, case in enumerate(cases)}
        recipe = Recipe(COPY, (Model(str(tmp_path / f"{INPUT}.safetensors")),), dtype=self.dtype)
        seen = set()
        for way in WAYS:
            index = index_of(tmp_path, entries)
            made = run(planned(recipe, [index], tmp_path / "out.safetensors", **way))
            for number, case in enumerate(cases):
                assert octets(made[f"t{number}"]) == octets(case.expected), (str(case), way)
            seen.add((tmp_path / "out.safetensors").read_bytes())
        assert len(seen) == 1
        whole_on = Disk(tmp_path)
        whole = {f"t{n}": whole_on.stored(case.expected, f"t{n}") for n, case in enumerate(cases)}
        for method in ("linear", "slerp"):
            parameters = {"t": 0.3} if method == "slerp" else {}
            options = {"dtype": self.dtype} if self.dtype else {}
            expected = merge_of(tmp_path, [whole, whole], method, parameters=parameters, options=options)
            for way in WAYS[::2]:
                made = merge_of(tmp_path, [entries, whole], method, parameters=parameters, options=options, **way)
                assert {n: octets(t) for n, t in made.items()} == {n: octets(t) for n, t in expected.items()}, (method, way)


class Strict(Allocated):
    """Counts the memory that readers take."""

    def __init__(self, needs: Any) -> None:
        super().__init__(InputFiles({}).get, 1 << 14)
        self.needs, self.scratch_bytes, self.tiles = needs, 0, 0

    def take(self, nbytes: int) -> memoryview:
        self.scratch_bytes += -(-nbytes // 64) * 64
        return super().take(nbytes)

    def tile(self) -> memoryview:
        self.tiles += 1
        return super().tile()

    def shared(self, nbytes: int) -> memoryview:
        assert nbytes <= self.needs.shared_bytes
        return super().shared(nbytes)


__all__ = ["COPY", "DTYPES", "FLOATS", "GRAIN", "SHAPES", "Case", "DType", "Disk", "SourceSuite", "draw", "find_method"]
Make = Callable[[Disk], Iterator[Case]]
