"""Passes that several machines share: the same bytes, who makes what, deaths in a pass, files that lie."""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import wait_until
from safetensors.torch import save_file

import streammerge as sm
from running.test_shared import LEASE_SECONDS, machine
from streammerge.kernels.chunk import Look, Step, Sweep
from streammerge.kernels.kth_largest import _Found
from streammerge.kernels.ranking import Cut
from streammerge.planning import saved, tasks, units
from streammerge.planning.units import Unit, cut
from streammerge.running import exchanging
from streammerge.running.exchanging import Unsendable, as_data, of_data
from streammerge.stores import claims
from streammerge.tensors.spec import GRAIN

HERE = __name__


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "PIECE_ELEMS", GRAIN)
    monkeypatch.setattr(units, "_LEAST_COST", 300_000)
    monkeypatch.setattr(units, "_LEAST_PASSED", 2_000_000)
    monkeypatch.setattr(saved, "LEASE_SECONDS", LEASE_SECONDS)


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    """Each with a tensor of 14 pieces, and one of rows."""
    paths = []
    for seed in (1, 2, 3):
        make = torch.Generator().manual_seed(seed)
        made = {"giant": torch.randn(14 * GRAIN, generator=make).bfloat16(), "short": torch.randn(90, 301, generator=make)}
        made["rows"] = torch.randn(1000, 700, generator=make)
        paths.append(tmp_path / f"{seed}.safetensors")
        save_file(made, paths[-1])
    return paths


WAYS: dict[str, dict[str, Any]] = {
    "ties": {"density": 0.3},
    "breadcrumbs": {"density": 0.5, "gamma": 0.1},
    "slerp": {"t": 0.3},
    "nuslerp": {"nuslerp_row_wise": True},
    "ramplus_tl": {},
    "geometric_median": {},
}


def asked(method: str, models: list[Path]) -> dict[str, Any]:
    base = {"base": models[2]} if method in ("ties", "breadcrumbs", "ramplus_tl") else {}
    return {"method": method, "parameters": WAYS[method], **base}


def whole(tmp_path: Path, models: list[Path], way: dict[str, Any]) -> bytes:
    """Returns the bytes that one machine makes."""
    return Path(str(sm.merge(models[:2], tmp_path / "whole.safetensors", **way).out)).read_bytes()


def exchanged(tmp_path: Path) -> list[Path]:
    return sorted(tmp_path.glob(f".*.machines/{claims.ANSWERS}/*"))


@pytest.mark.parametrize("method", WAYS)
@pytest.mark.sampled(2)
def test_the_same_bytes_in_any_shares(tmp_path: Path, models: list[Path], method: str) -> None:
    way = asked(method, models)
    expected = whole(tmp_path, models, way)
    for shares in (1, 2, 7):
        plan, out = tmp_path / f"plan{shares}", tmp_path / f"out{shares}.safetensors"
        made = cut(sm.plan(models[:2], out, save=plan, **way).tasks)
        assert len([unit for unit in made if unit.exchanges]) > 2
        for n in range(shares):  # the others may be late
            sm.worker(plan, share=f"{n}/{shares}", workers=1 + n % 2)
        assert exchanged(tmp_path)
        sm.finish(plan)
        assert out.read_bytes() == expected, shares


def test_answers_come_in_the_order_of_one_machine(
    tmp_path: Path, models: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums depend on it in their last bits, which a rounded output does not show."""
    over, counts = exchanging.Exchange.over, list[int]()

    def compared(self: exchanging.Exchange, sweep: Sweep) -> Sweep:
        def both(look: Look, step: Step[Any], start: int, stop: int, sparse: int = 0) -> Iterator[Any]:
            found = [*over(self, sweep)(look, step, start, stop, sparse)]
            assert repr(found) == repr([*sweep(look, step, start, stop, sparse)])
            counts.append(len(found))
            yield from found

        return both

    monkeypatch.setattr(exchanging.Exchange, "over", compared)
    plan = tmp_path / "plan"
    sm.plan(models[:2], tmp_path / "out.safetensors", save=plan, **asked("slerp", models))
    assert sm.worker(plan, claim=True, workers=1).left == 0
    assert max(counts) > 2


def test_sums_are_exchanged_in_less_than_a_kilobyte(tmp_path: Path, models: list[Path]) -> None:
    sm.plan(models[:2], tmp_path / "out.safetensors", save=tmp_path / "plan", **asked("slerp", models))
    sm.worker(tmp_path / "plan", claim=True)
    files = exchanged(tmp_path)
    assert len(files) > 4
    assert max(path.stat().st_size for path in files) < 1000


@pytest.mark.parametrize("method", ["ties", "slerp"])
@pytest.mark.sampled(2)
def test_machines_at_once_make_each_block_once(
    tmp_path: Path, models: list[Path], method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    way = asked(method, models)
    expected = whole(tmp_path, models, way)
    plan, out = tmp_path / "plan", tmp_path / "out.safetensors"
    monkeypatch.setattr(saved, "LEASE_SECONDS", 60.0)  # no machine is taken for dead because this one is busy
    sm.plan(models[:2], out, save=plan, **way)
    monkeypatch.setenv("MACHINES", "2")
    several = [machine(plan, tmp_path / "told", 0.0, share=f"{n}/2", workers=1) for n in range(2)]
    said = [each.communicate(timeout=400) for each in several]
    assert all(each.returncode == 0 for each in several), said
    (home,) = tmp_path.glob(".*.machines")
    owners = {each.read_bytes() for each in (home / claims.CLAIMS).glob("answer-*.0")}
    assert len(owners) == 2, "they share the passes"
    assert not [*(home / claims.CLAIMS).glob("answer-*.1")], "nothing is made twice"
    sm.finish(plan)
    assert out.read_bytes() == expected


def test_a_machine_that_dies_in_a_pass_costs_its_block(
    tmp_path: Path, models: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    way = asked("ties", models)
    expected = whole(tmp_path, models, way)
    plan, out = tmp_path / "plan", tmp_path / "out.safetensors"
    sm.plan(models[:2], out, save=plan, **way)
    monkeypatch.setenv("ANSWER_SECONDS", "0.3")
    first = machine(plan, tmp_path / "told", 0.0, claim=True, workers=1)
    wait_until(lambda: len(exchanged(tmp_path)) >= 2)
    first.kill()
    first.communicate()
    there = {path.name: path.stat().st_ino for path in exchanged(tmp_path)}
    began = time.monotonic()
    assert sm.worker(plan, claim=True).left == 0
    assert time.monotonic() - began < 20
    assert there.items() <= {path.name: path.stat().st_ino for path in exchanged(tmp_path)}.items(), "what is there is used"
    sm.finish(plan)
    assert out.read_bytes() == expected


def test_a_damaged_answer_is_made_again(tmp_path: Path, models: list[Path]) -> None:
    way = asked("ties", models)
    expected = whole(tmp_path, models, way)
    plan, out = tmp_path / "plan", tmp_path / "out.safetensors"
    units_ = cut(sm.plan(models[:2], out, save=plan, **way).tasks)
    sm.worker(plan, share=f"1/{len(units_)}")
    sm.worker(plan, share=f"2/{len(units_)}")
    files = exchanged(tmp_path)
    assert files
    for number, path in enumerate(files):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data if number % 2 else data[: len(data) // 2])
    assert sm.worker(plan, claim=True).left == 0
    sm.finish(plan)
    assert out.read_bytes() == expected


def test_answers_that_are_no_plain_data_are_not_sent(
    tmp_path: Path, models: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then each machine makes the passes of its tensors itself."""
    way = asked("ties", models)
    expected = whole(tmp_path, models, way)
    plan, out = tmp_path / "plan", tmp_path / "out.safetensors"
    sm.plan(models[:2], out, save=plan, **way)

    def refuse(answer: object, module: str) -> bytes:
        raise Unsendable

    monkeypatch.setattr(exchanging, "as_data", refuse)
    sm.worker(plan, share="0/2")
    monkeypatch.undo()
    monkeypatch.setattr(tasks, "PIECE_ELEMS", GRAIN)
    assert sm.worker(plan, share="1/2").left == 0
    sm.finish(plan)
    assert out.read_bytes() == expected


@dataclass(frozen=True)
class Own:
    count: int


PLAIN = [
    [1, 2.5, None, "text", b"octets", (True, {"a": [float("inf")]})],
    [torch.arange(5), torch.tensor(2.0), torch.ones(2, 0), torch.randn(3, 4).bfloat16(), torch.tensor([True])],
    {(0, 3): Cut(4, 0.5, 7), (1, 1): _Found([3], [torch.ones(2)], [torch.arange(2)], [[(0, 2)]], True)},
    [Own(3)],
]


@pytest.mark.parametrize("answer", PLAIN)
def test_plain_data_come_back(answer: Any) -> None:
    made = of_data(as_data(answer, HERE), HERE)
    assert repr(made) == repr(answer)


def test_nothing_else_is_sent() -> None:
    for thing in (lambda: 1, os.system, Path("x"), torch.Size([3]), pickle.Unpickler):
        with pytest.raises(Unsendable):
            as_data([thing], HERE)
    with pytest.raises(Unsendable):
        as_data(Own(1), "another.module")


class Hostile:
    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, ("was-called",)


def test_a_hostile_answer_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made = pickle.dumps(Hostile())
    data = b"%08x" % exchanging.zlib.crc32(made) + made
    with pytest.raises(ValueError, match="no plain data"):
        of_data(data, HERE)
    assert not (tmp_path / "was-called").exists()


def test_which_tensors_are_shared(tmp_path: Path, models: list[Path]) -> None:
    def parts(**way: Any) -> list[Unit]:
        return [unit for unit in cut(sm.plan(models[:2], tmp_path / "o.safetensors", **way).tasks) if unit.last]

    shared = parts(**asked("slerp", models))
    giant = [unit for unit in shared if unit.start == shared[0].start]
    assert all(unit.exchanges for unit in shared)
    assert len(giant) > 2
    assert len({unit.last - unit.first for unit in giant[:-1]}) == 1
    assert not any(unit.exchanges for unit in parts()), "a method without passes has nothing to exchange"
    assert not parts(method="iso_c", base=models[2]), "a whole matrix is one worker's"
