"""Units: every piece is in one of them, they are balanced, and shares of them are too."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import streammerge as sm
from streammerge.planning import units
from streammerge.planning.plan import Plan
from streammerge.planning.tasks import pieces
from streammerge.planning.units import MOST_TENSORS, Unit, cut, share, sums_of


def planned(folder: Path, shapes: dict[str, tuple[int, ...]], **more: object) -> Plan:
    for name in "ab":
        save_file({key: torch.ones(shape) for key, shape in shapes.items()}, folder / f"{name}.safetensors")
    return sm.plan([folder / "a.safetensors", folder / "b.safetensors"], folder / "out.safetensors", **more)  # type: ignore[arg-type]


def test_every_piece_is_in_one_unit(tmp_path: Path) -> None:
    shapes: dict[str, tuple[int, ...]] = {f"layers.{n}.w": (n % 7, 3) for n in range(500)}
    plan = planned(tmp_path, shapes | {"long": (5, 1 << 20), "scalar": ()})
    made = cut(plan.tasks)
    wanted = [piece.key for number, task in enumerate(plan.tasks) for piece in pieces(task, number)]
    assert sorted(piece.key for unit in made for piece in unit.pieces(plan.tasks)) == sorted(wanted)
    assert [unit.number for unit in made] == list(range(len(made)))
    assert max(unit.stop - unit.start for unit in made) <= MOST_TENSORS
    parts = sorted(place for unit in made for place in sums_of(unit, plan.tasks))
    for (file, offset, nbytes), (next_file, next_offset, _) in pairwise(parts):
        assert nbytes > 0
        assert file == next_file
        assert offset + nbytes == next_offset, "the parts cover the tensors, and none lies over another"
    assert sum(nbytes for _, _, nbytes in parts) == sum(task.out.nbytes for task in plan.tasks)
    assert [Unit.of_row(unit.number, unit.row()) for unit in made] == made


def test_a_long_tensor_is_several_units_unless_workers_share_its_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(units, "_LEAST_COST", 1 << 20)
    shapes = {"long": (11, 1 << 20), "short": (10, 10)}
    made = cut(planned(tmp_path, shapes).tasks)
    long = [unit for unit in made if unit.last]
    assert [unit.first for unit in long] == [0, *(unit.last for unit in long[:-1])]
    assert len(long) > 1
    assert not any(unit.alone for unit in made)
    more = {"method": "ties", "base": tmp_path / "a.safetensors", "parameters": {"density": 0.5}}
    plan = planned(tmp_path, shapes | {f"last.{n}": (3,) for n in range(3)}, **more)
    (alone,) = [unit for unit in cut(plan.tasks) if unit.alone]
    assert (plan.tasks[alone.start].out.name, alone.stop - alone.start, alone.last) == ("long", 1, 0)
    monkeypatch.setattr(units, "_LEAST_COST", 1 << 30)
    (whole,) = cut(plan.tasks)
    assert whole.alone, "one of its tensors is made by all workers"


def test_a_long_tensor_whose_inner_merge_makes_passes_is_one_unit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another worker would make these passes again."""
    monkeypatch.setattr(units, "_LEAST_COST", 1 << 20)
    for name in "ab":
        save_file({"long": torch.ones(11, 1 << 20), "short": torch.ones(3)}, tmp_path / f"{name}.safetensors")
    a, b = (str(tmp_path / f"{name}.safetensors") for name in "ab")
    inner = {"merge_method": "ties", "base_model": a, "models": [b], "parameters": {"density": 0.5}}
    recipe = {"merge_method": "linear", "models": ["inner", b], "parameters": {"weight": 0.5}, "stages": {"inner": inner}}
    made = cut(sm.plan(recipe=recipe, out=tmp_path / "out.safetensors").tasks)
    (alone,) = [unit for unit in made if unit.alone]
    assert (alone.stop - alone.start, alone.last) == (1, 0)


def test_a_decomposition_costs_more_than_its_bytes(tmp_path: Path) -> None:
    shapes: dict[str, tuple[int, ...]] = {"w": (1000, 1000)}
    mean = sum(unit.cost for unit in cut(planned(tmp_path, shapes).tasks))
    more = {"method": "tsv", "base": tmp_path / "a.safetensors"}
    assert sum(unit.cost for unit in cut(planned(tmp_path, shapes, **more).tasks)) > 20 * mean


@pytest.mark.parametrize("shares", [1, 2, 7, 64])
def test_shares_have_every_unit_once_and_are_balanced(shares: int) -> None:
    draw = random.Random(shares)
    made = [Unit(n, n, n + 1, draw.choice([0, 1, 5, 9, 10, 10, 10])) for n in range(2000)]
    made += [Unit(2000 + n, 0, 1, cost) for n, cost in enumerate((900, 4000, 20))]
    parts = [share(made, number, shares) for number in range(shares)]
    assert sorted(unit.number for part in parts for unit in part) == [unit.number for unit in made]
    loads = [sum(unit.cost for unit in part) for part in parts]
    total = sum(loads)
    assert max(loads) <= max(total / shares + 20, 4000 + 1)
    assert parts == [share(list(made), number, shares) for number in range(shares)]


def test_neighbours_are_in_one_share() -> None:
    made = [Unit(n, n, n + 1, 10) for n in range(100)]
    assert [unit.number for unit in share(made, 1, 4)] == list(range(25, 50))


def test_more_shares_than_units() -> None:
    made = [Unit(n, n, n + 1, 10) for n in range(3)]
    parts = [share(made, number, 8) for number in range(8)]
    assert sorted(unit.number for part in parts for unit in part) == [0, 1, 2]
    assert max(map(len, parts)) == 1
    assert share([], 0, 3) == []


def test_a_large_file_that_is_sent_is_several_units(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "_LEAST_SENT", 10 << 20)
    shapes: dict[str, tuple[int, ...]] = {f"layers.{n:02}.w": (100, 1000) for n in range(40)}
    plan = planned(tmp_path, shapes | {"embed": (11, 1 << 20), "scalar": (), "empty": (0, 3)})
    made = cut(plan.tasks, whole_files=True)
    assert all(unit.alone for unit in made)
    assert len(made) > 4
    assert any(unit.last for unit in made)
    assert max(unit.cost for unit in made) < 60 << 20, "a piece of a long tensor is not cut"
    assert [unit.number for unit in made] == list(range(len(made)))
    wanted = [piece.key for number, task in enumerate(plan.tasks) for piece in pieces(task, number)]
    assert sorted(piece.key for unit in made for piece in unit.pieces(plan.tasks)) == sorted(wanted)
    spans = []
    for unit in made:
        places = list(sums_of(unit, plan.tasks))
        spans.append((min(place[1] for place in places), max(place[1] + place[2] for place in places)))
    assert all(before[1] == after[0] for before, after in pairwise(spans)), "each unit is one range of the file"
    assert len(cut(plan.tasks, whole_files=True, shares_files=False)) == 1
    torch.save({"a": torch.ones(9, 1 << 20), "b": torch.ones(9, 1 << 20)}, tmp_path / "a.pth")
    archive = sm.plan([tmp_path / "a.pth", tmp_path / "a.pth"], tmp_path / "out.pth")
    assert len(cut(archive.tasks, whole_files=True)) == 1, "bytes that are known last lie between its tensors"
