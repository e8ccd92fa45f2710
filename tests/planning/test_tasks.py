"""Batches: short tensors are computed and written together, with the same result as one by one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import load_safetensors, mean, octets
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

import streammerge as sm
from streammerge.methods.registry import find_method
from streammerge.planning import budget
from streammerge.planning import tasks as tasks_module
from streammerge.planning.tasks import MergeTask, Piece, as_one_piece, batches, named, pieces, stretches
from streammerge.running.worker import MergeWorker
from streammerge.running.workspace import Outgoing, Workspace
from streammerge.sources.stored import Stored
from streammerge.stores.locations import parse
from streammerge.tensors.dtypes import DType
from streammerge.tensors.spec import TensorSpec


def tasks(sizes: list[int], gaps: list[int], method: str = "linear") -> list[MergeTask]:
    """Makes tasks of these sizes, one after the other in the output, with a gap before each in the second input."""
    made, offset, other = [], 0, 0
    for number, (size, gap) in enumerate(zip(sizes, gaps, strict=True)):
        spec = TensorSpec(f"t{number}", DType.F32, (size,))
        other += gap
        sources = (Stored(spec, parse("a"), offset), Stored(spec, parse("b"), other))
        made.append(MergeTask(spec, find_method(method), sources, 0, offset, {"weight": [0.5, 0.5]}))
        offset, other = offset + 4 * size, other + 4 * size
    return made


def all_pieces(made: list[MergeTask]) -> list[Piece]:
    return [piece for number, task in enumerate(made) for piece in pieces(task, number)]


@given(st.lists(st.tuples(st.integers(0, 9), st.sampled_from([0, 0, 0, 4])), max_size=20), st.integers(1, 100))
def test_every_piece_is_in_one_batch_and_one_stretch(shape: list[tuple[int, int]], most: int) -> None:
    wanted = all_pieces(tasks([size for size, _ in shape], [gap for _, gap in shape]))
    found = list(batches(wanted, most))
    assert [piece for batch in found for piece in batch] == wanted
    for batch in found:
        assert len(batch) == 1 or sum(piece.nbytes for piece in batch) <= most
        assert [piece for stretch in stretches(batch) for piece in stretch] == batch
        for stretch in stretches(batch):
            whole = as_one_piece(stretch)
            assert (whole.offset, whole.nbytes) == (stretch[0].offset, sum(piece.nbytes for piece in stretch))
            for source, last in zip(whole.task.sources, stretch[-1].task.sources, strict=True):
                assert source.offset + source.nbytes == last.offset + last.nbytes


def test_what_ends_a_stretch() -> None:
    one, two = tasks([4, 4], [0, 0])

    def together(*made: MergeTask) -> bool:
        return len([*stretches(all_pieces(list(made)))]) == 1

    assert together(one, two)
    for other in (
        replace(two, parameters={"weight": [0.6, 0.4]}),
        replace(two, method=find_method("n_average")),
        replace(two, compute="float64"),
        replace(two, based=True),
        replace(two, sources=two.sources[:1]),
        replace(two, out=replace(two.out, dtype=DType.BF16)),
        replace(two, sources=(two.sources[0], replace(two.sources[1], path="c"))),
        replace(two, sources=(two.sources[0], replace(two.sources[1], spec=TensorSpec("t1", DType.I32, (4,))))),
    ):
        assert not together(one, other)
    assert not together(*tasks([4, 4], [0, 8]))
    assert not together(*tasks([4, 4], [0, 0], "ties"))


def test_a_part_of_a_long_tensor_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streammerge.planning.tasks.PIECE_ELEMS", 1 << 16)
    wanted = all_pieces(tasks([5, 1 << 17, 7], [0, 0, 0]))
    assert [len(batch) for batch in batches(wanted, 1 << 30)] == [1, 1, 1, 1]


@pytest.mark.parametrize("method", ["linear", "karcher", "dare_linear"])
def test_together_as_each_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """Mixes odd and empty sizes, dtypes, integers and one NaN. Bytes and messages are the same as one by one."""
    make = torch.Generator().manual_seed(0)
    models = []
    for _ in range(3):
        tensors = {f"{n:03}": torch.randn(n * 37 % 501, generator=make) for n in range(80)}
        tensors |= {f"x{n}": torch.randn(n, 3, generator=make).bfloat16() for n in range(9)}
        tensors |= {"040i": torch.arange(7)}
        models.append(tensors)
    models[1]["017"][5] = float("nan")
    paths = [tmp_path / f"{number}.safetensors" for number in range(3)]
    for path, tensors in zip(paths, models, strict=True):
        save_file(tensors, path)
    base = {"base": paths[0], "parameters": {"density": 0.5}} if method == "dare_linear" else {}
    inputs = paths[1:] if base else paths
    seen = []
    for way in ("together", "alone"):
        if way == "alone":
            monkeypatch.setattr("streammerge.running.engine.batches", lambda wanted, most: ([piece] for piece in wanted))
        done = sm.merge(inputs, tmp_path / f"{way}.safetensors", method=method, allow_nonfinite=True, **base)
        seen.append(([w for w in done.warnings if "NaN" in w], (tmp_path / f"{way}.safetensors").read_bytes()))
        assert sm.verify(tmp_path / f"{way}.safetensors", sample="100%").tensors == len(models[0])
    assert seen[0] == seen[1]
    assert "017: 1 in " in seen[0][0][0]
    if method == "linear":
        merged = load_safetensors(tmp_path / "together.safetensors")
        for name in ("000", "016", "018", "079", "x8"):
            assert octets(merged[name]) == octets(mean([m[name] for m in models], [1, 1, 1]))


@pytest.mark.parametrize("elems", [100, 4099, 90_001])
def test_every_byte_of_a_region_is_there(elems: int) -> None:
    """Checks the output's region too. It is the last region if inputs are mapped, and may begin anywhere in a page."""
    fitted = budget.Budget(1, elems, 8 * elems, 0, budget.Cost(8, 3, 8, 0), 0)
    workspace = Workspace(fitted)
    for region, (_, size) in budget.regions(fitted).items():
        assert len(workspace.octets(region)) == size
    for offset in (0, 1, 4095, 8191):
        assert len(Outgoing(lambda data, offset: None, workspace.octets("out"), offset).room(8 * elems)) == 8 * elems


def test_neighbours_are_computed_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(2):
        save_file({f"{n:04}": torch.full((16,), float(n)) for n in range(1000)}, tmp_path / f"{number}.safetensors")
    calls, good = [], MergeWorker._one

    def one(self: MergeWorker, *arguments: object) -> object:
        calls.append(arguments)
        return good(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(MergeWorker, "_one", one)
    sm.merge([tmp_path / "0.safetensors", tmp_path / "1.safetensors"], tmp_path / "out.safetensors")
    assert len(calls) == 1


def test_stretches_of_methods_with_passes_have_an_end() -> None:
    batch = all_pieces([replace(task, method=find_method("slerp")) for task in tasks([4, 4, 4, 100, 4], [0] * 5)])
    sizes = [[piece.stop for piece in stretch] for stretch in stretches(batch, 96)]
    assert sizes == [[4, 4, 4], [100], [4]], "inputs of 32 bytes each, and of 800"
    assert all(len(stretch) == 1 for stretch in stretches(batch))


def test_threads_that_make_tasks_do_not_disturb_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full dictionary of tasks is left as it is, because another thread may be going through it."""
    save_file({f"w{number}": torch.ones(2) for number in range(4)}, tmp_path / "a.safetensors")
    monkeypatch.setattr(tasks_module, "_MOST_KEPT", 2)
    made = sm.plan([tmp_path / "a.safetensors"] * 2).tasks
    made._kept = {}  # type: ignore[attr-defined]
    for number in range(4):
        before = made._kept  # type: ignore[attr-defined]
        held = {*before}
        assert made[number] is made[number]
        assert held <= {*before}
        assert len(made._kept) <= 2  # type: ignore[attr-defined]


def test_names_stand_beside_a_task_of_their_kind(tmp_path: Path) -> None:
    """The tensors of the second input lie in another order, and one has another shape and dtype."""
    shapes = {f"layers.{n}.w": (3, 2) for n in range(5)} | {"head": (4,)}
    for name, keys in (("a", [*shapes]), ("b", [*shapes][::-1])):
        tensors = {key: torch.zeros(shapes[key], dtype=torch.float16 if key == "head" else torch.float32) for key in keys}
        save_file(tensors, tmp_path / f"{name}.safetensors")
    made = sm.plan([tmp_path / "a.safetensors", tmp_path / "b.safetensors"]).tasks
    for few in (made, list(made)):
        found = list(named(few))
        assert [name for name, _ in found] == [task.out.name for task in made]
        assert [(t.out.shape, t.out.dtype) for _, t in found] == [(t.out.shape, t.out.dtype) for t in made]
    assert len({id(task) for _, task in named(made)}) == 2
