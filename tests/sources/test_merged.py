"""A merge as the input of another merge: equal bit for bit to a merge into a file first, with passes too."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import assert_same, first_of_each, load_safetensors, octets
from safetensors.torch import save_file

import streammerge as sm
from methods.suite import Case as Use
from methods.suite import suites
from sources.suite import GRAIN, WAYS, Case, Disk, SourceSuite, draw, index_of, merge_of, planned, room, run
from streammerge.methods.contracts import merge_method
from streammerge.methods.registry import COPY, INTEGERS, find_method, merge_tensors
from streammerge.planning import tasks
from streammerge.planning.digest import can_be_resumed
from streammerge.recipe.arguments import recipe_of
from streammerge.recipe.model import Model, Recipe
from streammerge.running.choosing import choose_executor
from streammerge.running.execution import execute
from streammerge.running.session import RunOptions
from streammerge.sources.base import Reader, Room, Source, read_whole
from streammerge.sources.constant import Constant
from streammerge.sources.joined import joined
from streammerge.sources.memory import in_memory
from streammerge.sources.merged import merged
from streammerge.sources.rows import gathered
from streammerge.stores.inputs import InputFiles
from streammerge.tensors.dtypes import BY_TORCH_NAME, DType
from streammerge.tensors.spec import PIECE_ELEMS, TensorSpec

USES = [
    Use("linear", 3, {"weight": [0.5, 0.2, 0.3]}),
    Use("slerp", 2, {"t": 0.3}),
    Use("ties", 2, {"density": 0.4}),
    Use("dare_linear", 2, {"density": 0.6}),
    Use("sce", 2, {"select_topk": 0.5}),
    Use("arcee_fusion", 1),
]
"""A few different methods. Another test below uses every method."""


def source_of(use: Use, tensors: list[Source], dtype: DType | None = None) -> Source:
    first = 0 if use.base else 1
    return merged("tensor", find_method(use.method), tensors[first:], use.parameters, based=bool(use.base), dtype=dtype)


def oracle(use: Use, tensors: list[torch.Tensor]) -> torch.Tensor:
    base = {"base": tensors[0]} if use.base else {}
    return merge_tensors(use.method, *tensors[1:], **base, **use.parameters)


class TestMerged(SourceSuite):
    def cases(self, disk: Disk) -> Iterator[Case]:
        for use in USES:
            for shape in ((), (1,), (0, 3), (7,), (5, 3), (301, 433), (2, 129, 517)):
                tensors = [draw(shape, torch.float32, seed) for seed in range(use.models + 1)]
                sources = [disk.stored(tensor, "tensor") for tensor in tensors]
                yield Case(source_of(use, sources), oracle(use, tensors).float())
            for dtype in (torch.bfloat16, torch.float16, torch.float64):
                tensors = [draw((31, 17), dtype, seed) for seed in range(use.models + 1)]
                sources = [disk.stored(tensor, "tensor") for tensor in tensors]
                yield Case(source_of(use, sources), oracle(use, tensors).to(dtype))
                kept = BY_TORCH_NAME[str(oracle(use, tensors).dtype)[6:]]
                yield Case(source_of(use, sources, kept), oracle(use, tensors))
        numbers = [draw((11, 3), torch.complex64, seed) for seed in range(2)]
        mean = (numbers[0].to(torch.complex128) * 0.5 + numbers[1].to(torch.complex128) * 0.5).to(torch.complex64)
        yield Case(merged("tensor", find_method("linear"), [disk.stored(n) for n in numbers]), mean)
        counts = torch.arange(70_000)
        yield Case(
            merged("tensor", INTEGERS, [disk.stored(counts), disk.stored(counts + 1)], {"policy": "max"}), counts + 1
        )
        yield Case(merged("tensor", COPY, [disk.stored(counts)]), counts)


EVERY = [case for suite in suites() for case in suite.CASES]


def _sample(use: Use) -> str:
    """What one case stands for: a method, or all that decompose matrices, which take long."""
    return "spectral" if use.method in ("iso_c", "iso_cts", "knots", "tsv") else use.method


@pytest.mark.parametrize("use", first_of_each(EVERY, _sample), ids=str)
@pytest.mark.sampled(2)
def test_every_method_within_and_around(tmp_path: Path, use: Use) -> None:
    """Each method merges its own result with other nested sources."""
    shape, disk = (301, 433), Disk(tmp_path)
    tensors = [draw(shape, torch.float32, seed) for seed in range(use.models + 1)]
    plain: list[Source] = [disk.stored(tensor, "tensor") for tensor in tensors]
    halves = joined("tensor", [disk.stored(part.contiguous()) for part in tensors[-1].split([100, 333], 1)], 1)
    first = {"tensor": source_of(use, plain)}
    whole = {"tensor": disk.stored(oracle(use, tensors).float(), "tensor")}
    assert bytes(read_whole(first["tensor"], room())) == octets(oracle(use, tensors).float())
    rest = [{"tensor": each} for each in plain[1 : use.models]] if use.models > 1 else []
    nested = [*rest[:-1], {"tensor": halves}] if rest else []
    flat = [*rest[:-1], {"tensor": plain[-1]}] if rest else []
    base = [{"tensor": plain[0]}] if use.base else []
    options: dict[str, Any] = {"parameters": use.parameters, "based": bool(use.base)}
    expected = merge_of(tmp_path, [*base, whole, *flat], use.method, **options)
    for way in ({}, {"io": "pread", "memory_bytes": 96 << 20}):
        assert_same(merge_of(tmp_path, [*base, first, *nested], use.method, **options, **way), expected)


@pytest.mark.parametrize("use", USES, ids=str)
@pytest.mark.sampled(2)
def test_a_long_tensor_as_by_way_of_a_file(tmp_path: Path, use: Use) -> None:
    """The tensor has several pieces, so that workers share the passes of a real merge."""
    shape = (PIECE_ELEMS + 2 * GRAIN + 77,) if use.method != "sce" else (70, PIECE_ELEMS // 64 + 77)
    paths = [tmp_path / f"{number}.safetensors" for number in range(use.models + 1)]
    for number, path in enumerate(paths):
        save_file({"tensor": draw(shape, torch.bfloat16, number)}, path)
    base = {"base": paths[0]} if use.base else {}
    sm.merge(paths[1:], tmp_path / "first.safetensors", method=use.method, parameters=use.parameters, **base)
    sources = [sm.inspect(path).entries["tensor"] for path in paths]
    staged = sm.inspect(tmp_path / "first.safetensors").entries["tensor"]
    assert bytes(read_whole(source_of(use, sources), room())) == bytes(read_whole(staged, room()))
    expected = merge_of(tmp_path, [{"tensor": staged}, {"tensor": sources[0]}], "slerp", parameters={"t": 0.4})
    inputs = [{"tensor": source_of(use, sources)}, {"tensor": sources[0]}]
    for way in WAYS[1:] if use.method != "arcee_fusion" else WAYS[1:3]:  # arcee_fusion holds the whole tensor
        assert_same(merge_of(tmp_path, inputs, "slerp", parameters={"t": 0.4}, **way), expected)


@merge_method("inner_product", models=(2, 2), buffers=5, compute="float64")
def inner_product(group: Any) -> Any:
    """The inner product of the models everywhere: all bits of a sum over the tensor."""
    value = float(group.gram()[0, 1])
    return lambda chunk: chunk.load(0).mul_(0).add_(value)


def test_sums_are_made_in_the_order_of_a_merge_into_a_file(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.safetensors" for number in range(2)]
    for number, path in enumerate(paths):
        save_file({"tensor": draw((PIECE_ELEMS + 40 * GRAIN + 77,), torch.float64, number)}, path)
    sm.merge(paths, tmp_path / "out.safetensors", method=inner_product)
    sources = [sm.inspect(path).entries["tensor"] for path in paths]
    made = merged("tensor", find_method(inner_product), sources).open(room())
    first = bytes(made.read(0, 1, memoryview(bytearray(8))))
    assert first == octets(first_number(tmp_path / "out.safetensors"))


def first_number(path: Path) -> torch.Tensor:
    return load_safetensors(path)["tensor"][:1]


def deep(disk: Disk) -> tuple[Source, torch.Tensor]:
    """Makes a deeply nested source: rows of a merge of a constant and of rows of pieces of transposed tensors."""
    parts = [draw((433, 200), torch.float32, seed) for seed in range(3)]
    pieces = joined("p", [disk.strided(part.t()) for part in parts], 0)
    held = in_memory("m", draw((433, 600), torch.float32, 7).t())
    chosen = [*range(50, 400), 3, 3, 599, *range(0, 600, 5)]
    inner = merged(
        "tensor", find_method("ties"), [gathered(held, chosen), gathered(pieces, chosen)], {"density": 0.5}, based=True
    )
    fill = Constant(TensorSpec("c", DType.F32, (20, 433)), octets(torch.tensor(0.5)))
    source = gathered(joined("j", [inner, fill], 0), [*range(480, 100, -1), 5, 6, 7])
    pieces_t = torch.cat([part.t() for part in parts])
    inner_t = merge_tensors("ties", pieces_t[chosen], base=draw((433, 600), torch.float32, 7).t()[chosen], density=0.5)
    whole = torch.cat([inner_t.float(), torch.full((20, 433), 0.5)])
    return source.named("w"), whole[[*range(480, 100, -1), 5, 6, 7]]


def test_nested_five_deep(tmp_path: Path) -> None:
    source, expected = deep(Disk(tmp_path))
    assert bytes(read_whole(source, room())) == octets(expected)
    other = Disk(tmp_path).stored(expected * 0.5, "w")
    for method, parameters in (("linear", {}), ("slerp", {"t": 0.2}), ("karcher", {})):
        wanted = merge_of(tmp_path, [{"w": in_memory("w", expected)}, {"w": other}], method, parameters=parameters)
        for way in WAYS:
            made = merge_of(tmp_path, [{"w": source}, {"w": other}], method, parameters=parameters, **way)
            assert_same(made, wanted)


class Counted(Source):
    """Counts how often its numbers are read."""

    __slots__ = ("inner", "spec")
    reads = 0

    def __init__(self, inner: Source) -> None:
        self.inner, self.spec = inner, inner.spec

    parts = property(lambda self: ())  # type: ignore[assignment]
    blobs = property(lambda self: self.inner.blobs)  # type: ignore[assignment]
    place = property(lambda self: ("Counted", self.inner.place))  # type: ignore[assignment]

    def needs(self) -> Any:
        return self.inner.needs()

    def open(self, room: Room) -> Reader:
        inner = self.inner.open(room)

        class Passing(Reader):
            def read(self, start: int, stop: int, out: memoryview) -> memoryview:
                Counted.reads += stop - start
                return inner.read(start, stop, out)

        return Passing()


def test_passes_are_made_once_for_a_tensor_and_a_worker(tmp_path: Path) -> None:
    """The tensor has three pieces. slerp reads it once in its pass, and at most once for the result."""
    tensor = draw((2 * PIECE_ELEMS + 5,), torch.bfloat16)
    whole = Disk(tmp_path).stored(tensor)
    Counted.reads = 0
    source = merged("w", find_method("slerp"), [whole, Counted(whole)], {"t": 0.5})
    index = index_of(tmp_path, {"w": source})
    run(planned(Recipe(COPY, (Model(str(index.path)),)), [index], tmp_path / "out.safetensors", workers=1))
    assert tensor.numel() < Counted.reads <= 2 * tensor.numel()


def test_non_finite_numbers_are_told_by_the_files_of_the_inner_sources(tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    bad = draw((50, 3), torch.float32)
    bad[4, 1] = float("nan")
    sources = [disk.stored(draw((50, 3), torch.float32)), disk.stored(bad)]
    inner = merged("w", find_method("linear"), sources)
    with pytest.raises(sm.VerifyError) as error:
        merge_of(tmp_path, [{"w": inner}, {"w": sources[0]}], "linear")
    assert f"w: 1 in {sources[0].path}, {sources[1].path}" in str(error.value)


def test_what_does_not_fit(tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    one, other = disk.stored(draw((3, 4), torch.float32)), disk.stored(draw((4, 3), torch.float32))
    linear = find_method("linear")
    with pytest.raises(sm.RecipeError, match="cannot be merged with"):
        merged("w", linear, [one, other])
    with pytest.raises(sm.RecipeError, match="cannot be merged with"):
        merged("w", linear, [one, disk.stored(torch.ones(3, 4).int())])
    with pytest.raises(sm.RecipeError, match="needs a base"):
        merged("w", find_method("ties"), [one, one])
    with pytest.raises(sm.RecipeError, match="has no parameter"):
        merged("w", linear, [one, one], {"t": 0.3})


@merge_method("first_of_mine", passes=False)
def first_of_mine(group: Any) -> Any:
    return lambda chunk: chunk.models[0]


def test_what_can_be_continued(tmp_path: Path) -> None:
    """Looks at inner methods, and at inner tensors in memory."""
    whole = Disk(tmp_path).stored(draw((3, 4), torch.float32), "w")
    own = merged("w", find_method(first_of_mine), [whole])
    for source, wanted in (
        (whole, True),
        (merged("w", find_method("linear"), [whole, whole]), True),
        (joined("w", [own, whole]), False),
        (joined("w", [in_memory("w", torch.ones(3, 4)), whole]), False),
    ):
        index = index_of(tmp_path, {"w": source})
        plan = planned(Recipe(COPY, (Model(str(index.path)),)), [index], tmp_path / "out.safetensors")
        assert can_be_resumed(plan) is wanted


def test_a_file_that_changed_meanwhile_is_noticed(tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    whole = disk.stored(draw((300, 4), torch.float32), "w")
    index = index_of(tmp_path, {"w": gathered(whole, [5, 4, 3])})
    plan = planned(Recipe(COPY, (Model(str(index.path)),)), [index], tmp_path / "out.safetensors")
    assert whole.path in plan.identities
    Path(str(whole.path)).write_bytes(b"short")
    with pytest.raises(sm.ChangedError):
        run(plan)
    assert InputFiles  # the reader's way to files


def test_two_functions_without_a_name_of_their_own_are_two_methods(tmp_path: Path) -> None:
    """Lambdas of one scope have one qualified name. Their merges of the same sources are other tensors."""
    methods = [find_method(lambda group, by=by: lambda chunk: chunk.models[0] * by) for by in (1, 2)]
    numbers = in_memory("x", torch.arange(10.0))
    sources = [merged("x", method, [numbers]).named(name) for name, method in zip("ab", methods, strict=True)]
    assert sources[0].method.place == sources[1].method.place
    assert sources[0].place != sources[1].place
    assert sources[0].place == merged("x", methods[0], [numbers]).place
    assert find_method("linear").identity == "streammerge.methods.linear:linear"
    made = merge_of(tmp_path, [dict(zip("ab", sources, strict=True))], "linear")
    assert torch.equal(made["b"], 2 * made["a"])


@pytest.mark.parametrize("method", ["linear", "slerp"])
@pytest.mark.sampled(2)
def test_nested_sources_have_the_same_bytes_in_processes(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every kind of source that reads files, inside each other, in pieces on all workers, with passes too."""
    monkeypatch.setattr(tasks, "PIECE_ELEMS", GRAIN)
    disk, shape = Disk(tmp_path), (700, 300)
    base, one, two = (draw(shape, torch.bfloat16, seed) for seed in range(3))
    inner = merged(
        "tensor", find_method("ties"), [disk.stored(each) for each in (base, one, two)], {"density": 0.4}, based=True
    )
    mixed = gathered(inner, [*range(699, 300, -1), *range(300)])
    constant = Constant(TensorSpec("tensor", DType.BF16, (1, 300)))
    pieces = joined("tensor", [mixed, constant], 0)
    turned = disk.strided(draw((300, 700), torch.bfloat16, 5).t(), "tensor")
    nested = merged("tensor", find_method("slerp"), [pieces, turned], {"t": 0.3})
    indexes = [
        index_of(tmp_path, {"tensor": nested, "small": disk.stored(one[0], "small")}, "in0"),
        index_of(tmp_path, {"tensor": disk.stored(two, "tensor"), "small": disk.stored(two[0], "small")}, "in1"),
    ]
    parameters = {"t": 0.4} if method == "slerp" else {}
    recipe = recipe_of([str(each.path) for each in indexes], method, None, None, parameters, {})
    made = []
    for executor, workers in (("threads", 1), ("threads", 3), ("processes", 3)):
        plan = planned(recipe, indexes, tmp_path / "out.safetensors", workers=workers)
        choose_executor(plan, executor)
        assert plan.executor == executor
        execute(plan, RunOptions(overwrite=True, executor=executor), 0)
        made.append((tmp_path / "out.safetensors").read_bytes())
    assert made[0] == made[1] == made[2]
